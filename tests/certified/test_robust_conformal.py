"""Robust conformal sets: exact numbers, soundness where the smoothed score is known, planted mistakes, RCT."""

import copy
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from surefoot.certified import robust_conformal as rc
from surefoot.core.finding import Chart
from surefoot.core.subject import Subject
from surefoot.core.task import Split, Task, Training
from surefoot.errors import InvalidInput, Refused
from surefoot.nn.conformal import conformal_index, conformal_quantile, lac_scores, lac_sets
from surefoot.nn.smoothing import noisy_batches
from surefoot.training.loop import fit


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_probs(*shape, seed=0, scale=2.0):
    return (scale * torch.randn(*shape, generator=rng(seed), dtype=torch.float64)).softmax(-1)


def scores_of(mean, n=256, variance=0.0):
    mean = torch.as_tensor(mean, dtype=torch.float64)
    return rc.SmoothedScores(mean, torch.full_like(mean, variance), n)


# --- exact numbers --------------------------------------------------------------------------------------------------


def test_slacks_are_the_published_numbers():
    assert rc.hoeffding_slack(256, 0.001) == pytest.approx(0.116154, abs=1e-6)
    assert rc.bernstein_slack(0.0, 256, 0.001).item() == pytest.approx(0.0695507, abs=1e-7)
    assert rc.bernstein_slack(0.04, 256, 0.001).item() == pytest.approx(0.118288, abs=1e-6)
    assert rc.bernstein_slack(0.0366, 256, 0.001).item() == pytest.approx(rc.hoeffding_slack(256, 0.001), abs=1e-4)


def test_bernstein_with_one_tail_only_would_be_too_small():
    """Planted mistake: ln(1/beta) in place of ln(2/beta)."""
    wrong = math.sqrt(2 * 0.04 * math.log(1000) / 256) + 7 * math.log(1000) / (3 * 255)
    assert rc.bernstein_slack(0.04, 256, 0.001).item() > wrong + 0.005


def test_index_of_the_corrected_quantile():
    assert conformal_index(1000, 0.1 - 2 * 0.001) == 903
    means = torch.rand(1000, generator=rng(), dtype=torch.float64)
    ordered = means.sort().values
    assert rc.calibrate(means) == ordered[902]
    assert rc.calibrate(means, bound="none") == ordered[900]
    # exact in decimal, not in binary: 999 + 1 examples at level .9 + .002 is index 902, not 903
    assert rc.calibrate(means[:999]) == means[:999].sort().values[901]
    assert rc.calibrate(means[:8]) == math.inf
    interpolated = np.quantile(means.numpy(), 1 - 0.1 + 0.002)
    assert rc.calibrate(means) > interpolated  # planted mistake: an interpolated quantile is smaller


@pytest.mark.parametrize(("rank", "value"), [(0.895, 0.119203), (0.9, 0.5), (0.905, 0.880797)])
def test_transform_is_the_sigmoid_of_the_rank(rank, value):
    held = torch.arange(1, 1001, dtype=torch.float64) / 1000
    transform = rc.PostTrainingTransform.fit(held[torch.randperm(1000, generator=rng())])
    assert transform(torch.tensor([rank], dtype=torch.float64)).item() == pytest.approx(value, abs=1e-6)


def test_transform_is_monotone_in_unit_range_and_counts_ties():
    held = torch.rand(50, generator=rng(), dtype=torch.float64).round(decimals=1)
    transform = rc.PostTrainingTransform.fit(held, temperature=0.2, bias=0.5)
    grid = torch.linspace(0, 1, 501, dtype=torch.float64)
    out = transform(grid)
    assert (out.diff() >= 0).all()
    assert ((out >= 0) & (out <= 1)).all()
    for s in (0.0, 0.3, 1.0):
        rank = float((held <= s).double().mean())
        assert transform(torch.tensor(s, dtype=torch.float64)).item() == pytest.approx(
            1 / (1 + math.exp(-(rank - 0.5) / 0.2))
        )


# --- scores ---------------------------------------------------------------------------------------------------------


def test_aps_is_the_sum_of_the_larger_probabilities():
    probs = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.1, 0.8]], dtype=torch.float64)
    got = rc.aps_score(probs, torch.tensor([0.5, 0.0], dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor([[0.25, 0.9, 0.65], [0.8, 0.9, 0.0]], dtype=torch.float64))


def test_scores_equal_a_plain_loop():
    probs, u = random_probs(4, 5, 7), torch.rand(4, generator=rng(1), dtype=torch.float64)
    for score in ("hps", "aps"):
        transform = rc.PostTrainingTransform.fit(torch.rand(30, generator=rng(2)), temperature=0.1)
        for t in (None, transform):
            got = rc.smooth_scores(probs, score=score, u=u, transform=t)
            for i in range(4):
                for k in range(7):
                    row = []
                    for p in probs[i].tolist():
                        s = 1 - p[k] if score == "hps" else sum(q for q in p if q > p[k]) + float(u[i]) * p[k]
                        row.append(s if t is None else float(t(torch.tensor(s, dtype=torch.float64))))
                    assert got.mean[i, k].item() == pytest.approx(np.mean(row), abs=1e-12)
                    assert got.variance[i, k].item() == pytest.approx(np.var(row, ddof=1), abs=1e-12)


def test_a_u_per_label_gives_another_score():
    """Planted mistake: fresh u for each label. Scores of one input then lose their order."""
    probs = random_probs(2000, 1, 4)
    u = torch.rand(2000, generator=rng(1), dtype=torch.float64)
    one = rc.smooth_scores(probs, score="aps", u=u).mean
    order = probs[:, 0].argsort(1, descending=True)
    ranked = one.gather(1, order)
    assert (ranked.diff(dim=1) >= -1e-12).all()  # with one u, scores are ordered as the probabilities are, reversed
    many = torch.rand(2000, 4, generator=rng(2), dtype=torch.float64)
    with pytest.raises(InvalidInput, match="one number per example"):
        rc.smooth_scores(probs, score="aps", u=many)


def test_noise_is_drawn_once_for_all_labels_and_probabilities_are_float64():
    net = nn.Linear(6, 3)
    x = torch.rand(5, 6, generator=rng())
    got = rc.noisy_probabilities(net, x, 12, sigma=0.5, generator=rng(1), batch_size=7)
    assert got.shape == (5, 12, 3)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.sum(-1), torch.ones(5, 12, dtype=torch.float64))
    draws = torch.cat([z.clone() for _, z in noisy_batches(x, 12, sigma=0.5, generator=rng(1), batch_size=7)])
    torch.testing.assert_close(got.view(60, 3), net(draws).detach().double().softmax(-1))


def test_float32_matches_float64():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.rand(20, 6, generator=rng())
    single = rc.noisy_probabilities(net, x, 1, sigma=0.0, generator=rng())
    double = rc.noisy_probabilities(net.double(), x.double(), 1, sigma=0.0, generator=rng())
    torch.testing.assert_close(single, double, atol=1e-6, rtol=1e-5)


# --- sets -----------------------------------------------------------------------------------------------------------


def test_without_noise_attack_and_bounds_these_are_split_conformal_sets():
    probs, y = random_probs(500, 6), torch.randint(6, (500,), generator=rng(1))
    smoothed = rc.smooth_scores(probs[:, None])
    threshold = rc.calibrate(rc.true_label(smoothed.mean[:200], y[:200]), bound="none")
    assert threshold == conformal_quantile(lac_scores(probs[:200], y[:200]), 0.1).item()
    sets = rc.robust_sets(smoothed.take(slice(200, None)), threshold, eps=0.0, sigma=0.0, bound="none")
    assert torch.equal(sets.mask, lac_sets(probs[200:], threshold))
    tied = rc.robust_sets(scores_of([[threshold]]), threshold, eps=0.0, sigma=0.0, bound="none")
    assert tied.mask.all()


def test_the_inclusion_rule_by_hand():
    up, down = rc.hoeffding_slack(256, 0.001), rc.bernstein_slack(0.01, 256, 0.001).item()
    tau, eps, sigma = 0.3, 0.1, 0.2
    edge = (
        stats.norm.cdf(stats.norm.ppf(tau + up) + eps / sigma) + down
    )  # both sides are corrected, the shift is eps / sigma
    for delta, inside in ((-1e-6, True), (1e-6, False)):
        sets = rc.robust_sets(scores_of([[edge + delta]], variance=0.01), tau, eps=eps, sigma=sigma)
        assert bool(sets.mask) is inside
    plain = rc.robust_sets(scores_of([[edge - 1e-6]], variance=0.01), tau, eps=eps, sigma=sigma, bound="none")
    assert not plain.mask.any()


def test_both_slacks_cost_half_of_beta_each():
    low_variance, high = scores_of([[0.5]], variance=0.001), scores_of([[0.5]], variance=0.2)
    for given, slack in (
        (low_variance, rc.bernstein_slack(0.001, 256, 0.0005).item()),
        (high, rc.hoeffding_slack(256, 0.0005)),
    ):
        got = rc.robust_sets(given, 0.3, eps=0.1, sigma=0.2, bound="both").lower.item()
        assert got == pytest.approx(0.5 - slack)


def test_ends_of_the_probit():
    inside = rc.robust_sets(scores_of([[0.0, 1.0]]), 0.0, eps=1.0, sigma=0.1, bound="none")
    assert inside.mask.tolist() == [[True, False]]  # -inf against -inf is included
    full = rc.robust_sets(scores_of([[0.0, 0.5, 1.0]]), 1.0, eps=0.1, sigma=0.2, bound="none")
    assert full.mask.all()  # +inf against +inf is included
    assert rc.robust_sets(scores_of([[1.0]]), math.inf, eps=0.1, sigma=0.2).mask.all()
    assert rc.robust_sets(scores_of([[1.0]]), 0.89, eps=0.0, sigma=0.2).mask.all()  # tau + slack >= 1: trivial


def test_sets_nest_in_alpha_eps_and_bounds():
    draws = 2 * torch.randn(300, 1, 5, generator=rng(), dtype=torch.float64)
    draws = draws + 0.5 * torch.randn(300, 512, 5, generator=rng(1), dtype=torch.float64)
    smoothed = rc.smooth_scores(draws.softmax(-1))
    means = rc.true_label(smoothed.mean, smoothed.mean.argmin(1))
    by_alpha = [
        rc.robust_sets(smoothed, rc.calibrate(means, alpha=a), eps=0.1, sigma=0.4).mask for a in (0.5, 0.3, 0.1)
    ]
    by_eps = [rc.robust_sets(smoothed, rc.calibrate(means, alpha=0.5), eps=e, sigma=0.4).mask for e in (0.0, 0.1, 0.4)]
    for family in (by_alpha, by_eps):
        assert all((small <= big).all() for small, big in pairwise(family))
        assert (family[0] != family[-1]).any()
    # eps / sigma, not sigma / eps: more noise needs less widening
    low, high = (rc.robust_sets(smoothed, 0.3, eps=0.1, sigma=s, bound="none").mask for s in (0.2, 2.0))
    assert (high <= low).all()


def test_bernstein_covers():
    draws = torch.distributions.Beta(2.0, 5.0).mean
    rand = np.random.default_rng(0).beta(2, 5, size=(5000, 256))
    samples = torch.from_numpy(rand)
    slack = rc.bernstein_slack(samples.var(1), 256, 0.001)
    assert int((samples.mean(1) - slack > draws).sum()) <= 5  # beta of 5000, expected 0
    assert float(slack.mean()) < rc.hoeffding_slack(256, 0.001)  # V = .0255 < .0366


# --- soundness where the smoothed score is known ----------------------------------------------------------------------


def threshold_world(count, seed, classes=4):
    """s(x, y) = 1[x_y > c]: under noise sigma = 1 the score has mean Phi(x_y - c), and pushing x_y up by eps is the worst attack."""
    g = rng(seed)
    x = torch.randn(count, classes, generator=g, dtype=torch.float64)
    y = torch.randint(classes, (count,), generator=g)
    x[torch.arange(count), y] -= 1.5
    return x, y


def sampled_scores(x, n, seed):
    noise = torch.randn(len(x), n, x.shape[1], generator=rng(seed), dtype=torch.float64)
    hits = (x[:, None] + noise > 0).double()
    return rc.SmoothedScores(hits.mean(1), hits.var(1), n)


def test_the_shift_is_attained_exactly_and_never_broken():
    """S known: every attacked input keeps its label whenever S(x, y) <= tau, and just beyond it does not."""
    x, y = threshold_world(10_000, 0)
    eps, tau = 0.5, 0.3
    exact = torch.special.ndtr(x)
    pushed = x + eps * nn.functional.one_hot(y, 4)
    g = rng(5)
    other = torch.randn(x.shape, generator=g, dtype=torch.float64)
    other = x + eps * other / other.norm(dim=1, keepdim=True)
    kept = rc.true_label(exact, y) <= tau
    assert 1000 < int(kept.sum()) < 10_000
    for attacked in (pushed, other):
        mask = rc.robust_sets(
            scores_of(torch.special.ndtr(attacked)), tau, eps=eps + 1e-9, sigma=1.0, bound="none"
        ).mask
        assert rc.true_label(mask, y)[kept].all()
    worst = rc.robust_sets(scores_of(torch.special.ndtr(pushed)), tau, eps=eps - 1e-9, sigma=1.0, bound="none").mask
    assert torch.equal(rc.true_label(worst, y), rc.true_label(torch.special.ndtr(x + 1e-9), y) <= tau)  # tight


@pytest.mark.parametrize("bound", ["bernstein", "hoeffding", "both"])
def test_attacked_coverage_and_what_the_shortcuts_lose(bound: Any):
    """n = 500, n_MC = 64, 20 draws of the world: RSCP+ keeps 1 - alpha under the worst attack, with room; the shortcuts do not."""
    eps, alpha, covered, plain, unshifted = 0.5, 0.1, [], [], []
    for world in range(20):
        x, y = threshold_world(2500, 10 + world)
        clean = sampled_scores(x[:500], 64, 100 + world)
        attacked = sampled_scores(x[500:] + eps * nn.functional.one_hot(y[500:], 4), 64, 200 + world)
        means = rc.true_label(clean.mean, y[:500])
        ways: list[tuple[list, Any, float]] = [(covered, bound, eps), (plain, "none", eps), (unshifted, "none", 0.0)]
        for kept, way, shift in ways:
            threshold = rc.calibrate(means, alpha=alpha, bound=way)
            mask = rc.robust_sets(attacked, threshold, eps=shift, sigma=1.0, bound=way).mask
            kept.append(rc.true_label(mask, y[500:]).double().mean().item())
    error = 3 * np.std(covered) / math.sqrt(20) + 3 * math.sqrt(alpha * (1 - alpha) / 500 / 20)
    assert np.mean(covered) > 1 - alpha + error
    assert abs(np.mean(plain) - (1 - alpha)) < 0.03  # about 1 - alpha, without a promise
    assert np.mean(unshifted) < 1 - alpha - 0.05  # planted mistake: no eps shift


def test_correcting_one_side_only_is_caught():
    """Planted mistake: the test score is corrected, the threshold is not. An adversarial coincidence of both is what beta pays for."""
    both = rc.robust_sets(scores_of([[0.55]], variance=0.01), 0.3, eps=0.2, sigma=1.0)
    slack = rc.bernstein_slack(0.01, 256, 0.001).item()
    one_sided = stats.norm.ppf(0.55 - slack) - 0.2 <= stats.norm.ppf(0.3)
    assert both.mask.all()
    assert not one_sided


# --- the classifier ---------------------------------------------------------------------------------------------------


class Prototypes(nn.Module):
    """Logits by distance to fixed class centres: a sensible classifier without training."""

    def __init__(self, centres, sharpness):
        super().__init__()
        self.head = nn.Linear(centres.shape[1], len(centres), dtype=centres.dtype)
        with torch.no_grad():
            self.head.weight.copy_(sharpness * centres)
            self.head.bias.copy_(-sharpness * centres.square().sum(1) / 2)

    def forward(self, x):
        return self.head(x.flatten(1))


def blobs(count, seed, classes=5, dim=12, spread=0.45):
    centres = torch.nn.functional.one_hot(torch.arange(classes), dim).double() * 1.5
    g = rng(seed)
    y = torch.randint(classes, (count,), generator=g)
    return centres[y] + spread * torch.randn(count, dim, generator=g, dtype=torch.float64), y, Prototypes(centres, 4.0)


@pytest.mark.parametrize(("score", "bound"), [("hps", "hoeffding"), ("hps", "bernstein"), ("aps", "hoeffding")])
def test_sets_with_ptt_survive_a_smoothing_aware_attack(score, bound):
    x, y, model = blobs(1400, 1)
    eps = 0.25
    given = rc.RobustConformalClassifier(model, sigma=0.5, eps=eps, num_samples=128, score=score, bound=bound)
    given.fit_transform(x[:300], y[:300], generator=rng(1)).calibrate(x[300:800], y[300:800], generator=rng(2))

    def attack(net, a, b):
        return rc.smooth_pgd(net, a, b, eps=eps, sigma=0.5, steps=10, draws=8, generator=rng(3))

    data = [(x[800:1100], y[800:1100]), (x[1100:], y[1100:])]
    clean, attacked = given.evaluate(data, generator=rng(4)), given.evaluate(data, generator=rng(5), attack=attack)
    assert clean.guaranteed
    floor = 0.9 - 3 * math.sqrt(0.09 / 600 + 0.09 / 500)
    assert clean.coverage >= floor
    assert attacked.coverage >= floor
    assert clean.size < 4.0  # and the sets say something
    assert (attacked.covered <= clean.covered).double().mean() > 0.95


def test_plain_sets_lose_coverage_under_the_same_attack():
    x, y, model = blobs(1400, 1)
    plain = rc.RobustConformalClassifier(model, sigma=0.0, eps=0.0, bound="none").calibrate(
        x[:800], y[:800], generator=rng()
    )
    hit = rc.smooth_pgd(model, x[800:], y[800:], eps=0.25, sigma=0.0, generator=rng(1))
    assert ((hit - x[800:]).norm(dim=1) <= 0.25 + 1e-9).all()
    clean = plain.evaluate([(x[800:], y[800:])], generator=rng())
    attacked = plain.evaluate([(hit, y[800:])], generator=rng())
    assert not clean.guaranteed
    assert clean.coverage >= 0.9 - 3 * math.sqrt(0.09 / 600 + 0.09 / 800)
    assert attacked.coverage < 0.87


def test_ptt_makes_sets_smaller_than_rscp_plus():
    x, y, model = blobs(1600, 3)
    data = [(x[1100:], y[1100:])]
    plain = rc.RobustConformalClassifier(model, sigma=0.5, eps=0.25, bound="hoeffding", num_samples=128)
    plain.calibrate(x[:1100], y[:1100], generator=rng(1))  # the baseline gets the holdout for its calibration
    ptt = rc.RobustConformalClassifier(model, sigma=0.5, eps=0.25, bound="hoeffding", num_samples=128)
    ptt.fit_transform(x[:400], y[:400], generator=rng(2)).calibrate(x[400:1100], y[400:1100], generator=rng(3))
    baseline, small = plain.evaluate(data, generator=rng(4)), ptt.evaluate(data, generator=rng(5))
    assert small.size < 0.7 * baseline.size
    assert small.coverage >= 0.9 - 3 * math.sqrt(0.09 / 500 + 0.09 / 700)


def test_too_few_calibration_examples_give_full_sets_and_say_how_many_are_needed():
    x, y, model = blobs(60, 1)
    given = rc.RobustConformalClassifier(model, sigma=0.5, eps=0.25, num_samples=16)
    assert given.calibration_size == 10  # ceil(11 * .902) = 10
    given.calibrate(x[:9], y[:9], generator=rng())
    report = given.evaluate([(x[20:], y[20:])], generator=rng())
    assert (report.coverage, report.size, report.full) == (1.0, 5.0, 1.0)


def test_same_generator_same_sets_and_nothing_else_moves():
    x, y, model = blobs(80, 1)
    model.train()
    state, before = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    masks = []
    for _ in range(2):
        given = rc.RobustConformalClassifier(model, sigma=0.5, eps=0.25, num_samples=32, score="aps")
        masks.append(given.calibrate(x[:40], y[:40], generator=rng(1)).predict(x[40:], generator=rng(2)).scores)
    rc.smooth_pgd(model, x[:4], y[:4], eps=0.1, sigma=0.5, steps=2, generator=rng())
    assert torch.equal(*masks)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(model.parameters(), before))


# --- RCT --------------------------------------------------------------------------------------------------------------


def test_soft_order_statistic_is_hard_for_small_dispersion_and_its_gradient_sums_to_one():
    values = (4 * torch.randn(21, generator=rng(), dtype=torch.float64)).requires_grad_()
    for index in (0, 7, 20):
        assert rc.soft_order_statistic(values, index, 1e-3).item() == pytest.approx(values.sort().values[index].item())
        for dispersion in (1e-3, 0.5, 2.0, 100.0):
            (gradient,) = torch.autograd.grad(rc.soft_order_statistic(values, index, dispersion), values)
            assert gradient.sum().item() == pytest.approx(1.0)
            assert (gradient >= 0).all()
        assert rc.soft_order_statistic(values, index, 1e9).item() == pytest.approx(values.mean().item(), abs=1e-6)


def test_soft_sort_is_the_projection_onto_the_permutahedron():
    """Against the definition: the nearest point to ranks / dispersion in the convex hull of the permutations of the values."""
    from itertools import permutations

    from scipy.optimize import minimize

    values, dispersion = np.array([0.0, 3.0, 4.0]), 0.8
    corners = np.array(list(permutations(values)))
    target = np.arange(3) / dispersion
    best = minimize(
        lambda w: ((w @ corners - target) ** 2).sum(), np.full(6, 1 / 6), bounds=[(0, 1)] * 6,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, tol=1e-12,
    )  # fmt: skip
    got = [rc.soft_order_statistic(torch.tensor(values), i, dispersion).item() for i in range(3)]
    np.testing.assert_allclose(got, best.x @ corners, atol=1e-4)


def test_loss_equals_a_plain_computation():
    probs, y = random_probs(40, 4), torch.randint(4, (40,), generator=rng(1))
    got = rc.robust_conformal_loss(
        probs, y, alpha=0.2, correction=0.5, temperature=0.3, size_weight=0.7, target_size=1.2
    )
    q = stats.norm.ppf(probs.numpy())
    tau = np.sort(q[np.arange(20), y[:20].numpy()])[int(0.2 * 21) - 1] - 0.5
    inside = 1 / (1 + np.exp(-(q[20:] - tau) / 0.3))
    missed = np.mean(1 - inside[np.arange(20), y[20:].numpy()])
    size = np.maximum(inside.sum(1) - 1.2, 0).mean()
    assert got.item() == pytest.approx(math.log(missed + 0.7 * size + 1e-8), rel=1e-9)
    sure = torch.eye(4, dtype=torch.float64)[y]
    assert math.isfinite(rc.robust_conformal_loss(sure, y, alpha=0.2).item())  # probits of exact 0 and 1


def test_train_rct_changes_the_last_layer_only_and_lowers_the_loss():
    torch.manual_seed(0)
    x, y, _ = blobs(400, 5)
    body: Any = nn.Sequential(nn.Linear(12, 16, dtype=torch.float64), nn.ReLU(), nn.Linear(16, 5, dtype=torch.float64))
    body[0].weight.requires_grad_(False)
    before = [p.clone() for p in body.parameters()]
    loss = rc.RobustConformalLoss(correction=0.5, temperature=0.5)

    def value(net):
        probs = rc.noisy_probabilities(net, x, 8, sigma=0.5, generator=rng(9)).mean(1)
        return loss(probs, y).item()

    one, many = (
        rc.train_rct(body, x, y, sigma=0.5, loss=loss, epochs=e, batch_size=100, generator=rng(1)) for e in (1, 30)
    )
    assert value(many) < value(one) - 0.1
    assert torch.equal(many.get_parameter("0.weight"), body[0].weight)
    assert not torch.equal(many.get_parameter("2.weight"), body[2].weight)
    assert all(torch.equal(a, b) for a, b in zip(body.parameters(), before))
    assert [p.requires_grad for p in many.parameters()] == [False, True, True, True]


def vector_task(count=200):
    x, y, _ = blobs(count, 7)
    split = Split(x.float(), y)
    return Task("blobs", split, split, split, 5, modality="vector", bounds=None)


def test_the_treatment_trains_under_noise_and_keeps_the_architecture():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
    run = fit(
        net, vector_task(), Training(epochs=4, lr=1e-2), [rc.RobustConformalTraining(sigma=0.4, eps=0.2, epochs=5)]
    )
    assert [k for k, _ in run.model.named_parameters()] == [k for k, _ in net.named_parameters()]
    with pytest.raises(Refused, match="linear layer"):
        fit(
            nn.Sequential(nn.Linear(12, 5), nn.Tanh()),
            vector_task(),
            Training(epochs=1),
            [rc.RobustConformalTraining()],
        )
    with pytest.raises(Refused, match="batches of at least"):
        fit(net, vector_task(18), Training(epochs=1), [rc.RobustConformalTraining()])


# --- the instrument ---------------------------------------------------------------------------------------------------


def measured(spread=0.3, **settings):
    x, y, model = blobs(1300, 11, spread=spread)
    train, valid, test = (Split(x[a:b], y[a:b]) for a, b in ((0, 100), (100, 700), (700, 1300)))
    task = Task("blobs", train, valid, test, 5, modality="vector", bounds=None)
    subject = Subject(model, "it", "vector", (12,), 5, bounds=None)
    return rc.RobustSets(**settings).measure(subject, task), subject, task


def test_the_instrument_reports_size_and_coverage_with_and_without_attack():
    finding, _, _ = measured(eps=0.25, sigma=0.5)
    assert finding.unit == "labels"
    assert finding.better == "lower"
    assert finding.samples is not None and finding.value == pytest.approx(finding.samples.mean())
    assert 1.0 <= finding.value <= 3.0
    clean, attacked, naive = finding.parts
    floor = 0.9 - 3 * math.sqrt(0.09 / 150 + 0.09 / 352)
    assert clean.value >= floor
    assert attacked.value >= floor
    assert naive.value < attacked.value
    chart = finding.pictures[0]
    assert isinstance(chart, Chart)
    counts = chart.figure["data"][0]["y"]
    assert sum(counts) == finding.n == 150
    assert np.average(np.arange(6), weights=counts) == pytest.approx(finding.value)
    assert finding.details["holdout"] + finding.details["calibration"] == 550
    assert finding.fix == ("robust_conformal",)
    assert finding.warnings == ()


def test_the_instrument_warns_of_sets_that_say_nothing():
    finding, subject, task = measured(eps=3.0, sigma=6.0, num_samples=32)
    assert any("sampling error" in w and "not trained with noise" not in w for w in finding.warnings)
    blind, _, _ = measured(eps=3.0, sigma=6.0, num_samples=256)  # draws enough, and a model that noise of 6 blinds
    assert any("not trained with noise" in w for w in blind.warnings)
    few = task.changed(valid=task.valid.take(slice(0, 12)))
    short = rc.RobustSets(num_samples=16).measure(subject, few)
    assert short.value == 5.0
    assert any("no finite threshold" in w for w in short.warnings)
    assert rc.RobustSets().unfit(subject, task.changed(valid=Split(task.valid.x))) is not None
    with pytest.raises(InvalidInput, match="eps"):
        rc.RobustSets(eps=0.0)
    with pytest.raises(InvalidInput, match="2 beta"):
        rc.RobustSets(beta=0.05)


# --- bad input --------------------------------------------------------------------------------------------------------

NET = nn.Linear(3, 2)
HALF = torch.full((20, 2), 0.5)
LABELS = torch.zeros(20, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rc.RobustConformalClassifier(NET, sigma=0.2, eps=0.1, beta=0.05), "2 beta"),
        (lambda: rc.calibrate(torch.rand(50), beta=0.06), "2 beta"),
        (lambda: rc.RobustConformalClassifier(NET, sigma=0.2, eps=-0.1), "eps"),
        (lambda: rc.RobustConformalClassifier(NET, sigma=0.0, eps=0.1), "sigma = 0"),
        (lambda: rc.RobustConformalClassifier(NET, sigma=0.2, eps=0.1, score="raps"), "score"),  # type: ignore[arg-type]
        (lambda: rc.RobustConformalClassifier(NET, sigma=0.2, eps=0.1, bound="clt"), "bound"),  # type: ignore[arg-type]
        (lambda: rc.RobustConformalClassifier(NET, sigma=0.2, eps=0.1, num_samples=1), "num_samples"),
        (lambda: rc.RobustConformalClassifier(NET, sigma=0.2, eps=0.1).predict(torch.rand(2, 3), generator=rng()), "call calibrate"),
        (lambda: rc.RobustConformalClassifier(NET, sigma=0.2, eps=0.1).calibrate(torch.rand(2, 3), torch.tensor([0, 2]), generator=rng()), "y must lie"),
        (lambda: rc.RobustConformalClassifier(NET, sigma=0.2, eps=0.1).calibrate(torch.full((2, 3), math.nan), LABELS[:2], generator=rng()), "NaN"),
        (lambda: rc.RobustConformalClassifier(NET, sigma=0.2, eps=0.1).calibrate(torch.rand(0, 3), LABELS[:0], generator=rng()), "empty"),
        (lambda: rc.noisy_probabilities(nn.Threshold(9.0, math.nan), torch.rand(1, 3), 2, sigma=0.1, generator=rng()), "NaN"),
        (lambda: rc.PostTrainingTransform.fit(torch.tensor([0.5, 1.2])), "RAPS"),
        (lambda: rc.PostTrainingTransform.fit(torch.tensor([])), "at least one"),
        (lambda: rc.hps_score(torch.tensor([1.5, -0.5])), "softmax"),
        (lambda: rc.smooth_scores(HALF[:, None], score="aps"), "needs u"),
        (lambda: rc.smooth_scores(HALF), r"\[N, n, K\]"),
        (lambda: rc.robust_conformal_loss(HALF[:19], LABELS[:19]), "even"),
        (lambda: rc.robust_conformal_loss(HALF[:18], LABELS[:18]), "2 / alpha"),
        (lambda: rc.train_rct(NET, torch.rand(10, 3), LABELS[:10], sigma=0.5, loss=rc.RobustConformalLoss(), generator=rng()), "2 / alpha"),
        (lambda: rc.RobustConformalTraining(sigma=0.0), "sigma"),
        (lambda: rc.bernstein_slack(0.1, 1, 0.001), "n must"),
        (lambda: rc.RobustConformalClassifier(NET, sigma=0.2, eps=0.1).evaluate([], generator=rng()), "nothing to evaluate"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()


# --- what a plausible slip would change -------------------------------------------------------------------------------


class Moody(nn.Module):
    """Answers at random in training mode."""

    def __init__(self):
        super().__init__()
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.drop(x))


def test_a_model_in_training_mode_is_measured_and_attacked_in_evaluation_mode():
    net, x = Moody().train(), torch.rand(5, 6, generator=rng())
    torch.testing.assert_close(
        rc.noisy_probabilities(net, x, 1, sigma=0.0, generator=rng()),
        net.eval()(x).detach().double().softmax(-1)[:, None],
    )
    y, net = torch.arange(5) % 3, net.train()
    state = torch.get_rng_state()
    hits = [rc.smooth_pgd(net, x, y, eps=0.3, sigma=0.0, steps=3, generator=rng()) for _ in range(2)]
    assert torch.equal(*hits) and torch.equal(state, torch.get_rng_state()) and net.training


def test_scores_of_a_sure_network_are_not_rounding():
    """1 - p is 1e-9 here, which float32 softmax turns into 0."""
    sure = nn.Linear(1, 2)
    with torch.no_grad():
        sure.weight.copy_(torch.tensor([[1.0], [0.0]]))
        sure.bias.zero_()
    x = torch.full((1, 1), -math.log(1e-9))
    probs = rc.noisy_probabilities(sure, x, 1, sigma=0.0, generator=rng())
    assert rc.hps_score(probs)[0, 0, 0].item() == pytest.approx(1e-9, rel=1e-4)


def test_the_attack_lowers_the_probability_of_the_right_label_of_every_example():
    """Labels go with their own noisy copies: with mixed ones half of the examples would be pushed towards their label."""
    x, y, model = blobs(40, 1, classes=2)
    hit = rc.smooth_pgd(model, x, y, eps=0.4, sigma=0.3, steps=8, draws=6, generator=rng())
    before, after = (model(v).softmax(-1).gather(1, y[:, None])[:, 0] for v in (x, hit))
    assert (after < before).all()
    assert torch.equal(rc.smooth_pgd(model, x, y, eps=0.0, sigma=0.3, steps=2, generator=rng()), x)


def test_evaluating_under_attack_predicts_the_attacked_inputs():
    x, y, model = blobs(200, 1)
    given = rc.RobustConformalClassifier(model, sigma=0.0, eps=0.0, bound="none").calibrate(x, y, generator=rng())
    other = given.evaluate([(x, y)], generator=rng(), attack=lambda net, a, b: -a)
    direct = given.predict(-x, generator=rng())
    assert torch.equal(other.sizes, direct.sizes)
    assert torch.equal(other.covered, direct.mask.gather(1, y[:, None])[:, 0])
    assert other.coverage < 0.5


def test_one_rule_for_calibration_and_test():
    """The proof compares scores of one distribution: whatever changes the score asks for a new calibration."""
    x, y, model = blobs(400, 1)
    given = rc.RobustConformalClassifier(model, sigma=0.5, eps=0.25, num_samples=16)
    given.calibrate(x[:200], y[:200], generator=rng())
    given.num_samples = 64
    with pytest.raises(InvalidInput, match="call calibrate again"):
        given.predict(x[:2], generator=rng())
    given.fit_transform(x[200:300], y[200:300], generator=rng(1))
    with pytest.raises(InvalidInput, match="call calibrate"):
        given.predict(x[:2], generator=rng())
    assert given.transform is not None
    first = given.transform.holdout
    assert given.transform.bias == pytest.approx(0.9)
    assert len(first) == 100 and len(first.unique()) > 60  # one draw each, not an average
    given.fit_transform(x[200:300], y[200:300], generator=rng(1))
    assert torch.equal(first, given.transform.holdout)  # of base scores, not of scores already transformed
    copied = copy.deepcopy(given.calibrate(x[:200], y[:200], generator=rng()))
    assert torch.equal(copied.predict(x[:5], generator=rng(2)).mask, given.predict(x[:5], generator=rng(2)).mask)


def test_rct_is_the_loop_of_the_paper():
    """Head drawn anew, Nesterov SGD, rate / 10 after 2/5, 3/5 and 4/5, softmax before the mean over copies; against a plain loop."""
    x, y, _ = blobs(60, 5)
    torch.manual_seed(0)
    body: Any = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5)).double()
    body[1].running_mean.normal_(generator=rng(3))
    loss, epochs = rc.RobustConformalLoss(alpha=0.2, correction=0.3, temperature=0.5, size_weight=0.4), 5
    mine: Any = rc.train_rct(body, x, y, sigma=0.4, loss=loss, epochs=epochs, batch_size=24, copies=3, lr=0.1, weight_decay=1e-2, generator=rng(1))  # fmt: skip
    g = rng(1)
    bound = 8**-0.5
    w, b = (torch.rand(s, generator=g, dtype=torch.float64) * 2 * bound - bound for s in ((5, 8), (5,)))
    vw, vb = torch.zeros_like(w), torch.zeros_like(b)
    features = body[:3].eval()
    for epoch in range(epochs):
        lr = 0.1 * 0.1 ** sum(epoch >= s for s in (2, 3, 4))
        order = torch.randperm(60, generator=g)
        for start in (0, 24):  # the 12 that are left over rest
            part = order[start : start + 24]
            noisy = torch.cat([z.clone() for _, z in noisy_batches(x[part], 3, sigma=0.4, generator=g)])
            w, b = w.requires_grad_(), b.requires_grad_()
            p = (features(noisy).detach() @ w.T + b).softmax(-1).view(24, 3, 5).mean(1)
            gw, gb = torch.autograd.grad(loss(p, y[part]), (w, b))
            with torch.no_grad():
                gw, gb = gw + 1e-2 * w, gb + 1e-2 * b
                vw, vb = 0.9 * vw + gw, 0.9 * vb + gb
                w, b = w - lr * (gw + 0.9 * vw), b - lr * (gb + 0.9 * vb)
    # PyTorch starts the momentum with the first gradient, as the zeros above do
    torch.testing.assert_close(mine[3].weight.detach(), w.detach(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(mine[3].bias.detach(), b.detach(), rtol=1e-7, atol=1e-9)
    assert torch.equal(mine[1].running_mean, body[1].running_mean)


def test_rcts_index_is_guarded_against_binary_rounding():
    """alpha (n + 1) = .29 * 100 is 28.999... in binary and 29 in truth: the 29th smallest, not the 28th."""
    assert math.floor(0.29 * 100) == 28
    probs, y = random_probs(198, 3, seed=4), torch.zeros(198, dtype=torch.int64)
    q = torch.special.ndtri(probs)
    inside = torch.sigmoid((q[99:] - q[:99, 0].sort().values[28]) / 0.1)
    expected = math.log(1 - inside[:, 0].mean().item() + torch.relu(inside.sum(1) - 1).mean().item() + 1e-8)
    assert rc.robust_conformal_loss(probs, y, alpha=0.29, correction=0.0).item() == pytest.approx(expected)


def test_the_treatment_has_both_stages():
    torch.manual_seed(0)
    task = vector_task()
    net: Any = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
    treatment = rc.RobustConformalTraining(sigma=0.4, eps=0.2, epochs=2)
    assert treatment._loss().correction == pytest.approx(0.5)
    seen: list[torch.Tensor] = []
    handle = net[0].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    batch: Any = type("B", (), {"x": torch.zeros(200, 12), "y": task.train.y, "generator": rng()})()
    treatment.loss(net, batch)
    handle.remove()
    assert seen[0].std().item() == pytest.approx(0.4, rel=0.05)
    done: Any = treatment.finish(copy.deepcopy(net), task)
    assert torch.equal(done[0].weight, net[0].weight) and not torch.equal(done[2].weight, net[2].weight)
    with pytest.raises(Refused, match="batches of at least"):
        rc.RobustConformalTraining(batch_size=18).check(net, task)


def test_the_instrument_attacks_what_it_counts_and_calibrates_on_the_validation_split(monkeypatch):
    asked: list[tuple[float, float, int, int]] = []

    def away(model, x, y, *, eps, sigma, steps, draws, bounds, generator):
        asked.append((eps, sigma, steps, draws))
        return -x

    monkeypatch.setattr("surefoot.certified.robust_conformal.instrument.smooth_pgd", away)
    finding, subject, task = measured(eps=0.2, sigma=0.4, num_samples=64)
    assert asked == [(0.2, 0.4, 20, 8), (0.2, 0.0, 20, 8)]
    clean, attacked, naive = (part.value for part in finding.parts)
    assert clean > 0.9 > 0.5 > attacked and naive < 0.5
    monkeypatch.setattr("surefoot.certified.robust_conformal.instrument.smooth_pgd", lambda model, x, y, **_: x)
    other = task.changed(test=Split(task.test.x, (task.test.labels + 1) % 5))
    wrong = rc.RobustSets(eps=0.2, sigma=0.4, num_samples=64).measure(subject, other)
    assert wrong.parts[2].value < 0.3  # a threshold from the test split itself would still cover 90 %


SCORES = torch.rand(30, generator=rng(), dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rc.calibrate(2 * SCORES), "RAPS"),
        (lambda: rc.average_scores(3 * SCORES.view(2, 5, 3)), "RAPS"),
        (lambda: rc.robust_sets(scores_of([[0.5]]), math.nan, eps=0.1, sigma=0.2), "threshold"),
        (lambda: rc.train_rct(NET, torch.rand(20, 3), LABELS + 2, sigma=0.5, loss=rc.RobustConformalLoss(), generator=rng()), "y must lie"),
        (lambda: rc.train_rct(NET, torch.rand(20, 3), LABELS[:9], sigma=0.5, loss=rc.RobustConformalLoss(), generator=rng()), "one int64 label"),
        (lambda: rc.robust_conformal_loss(HALF, LABELS.double()), "int64"),
        (lambda: rc.smooth_pgd(NET, torch.rand(20, 3), LABELS + 2, eps=0.1, sigma=0.1, steps=1, generator=rng()), "y must lie"),
        (lambda: rc.noisy_probabilities(nn.LSTM(3, 2), torch.rand(2, 3), 2, sigma=0.1, generator=rng()), "must give logits"),
    ],
)  # fmt: skip
def test_more_bad_input_is_one_sentence(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()
