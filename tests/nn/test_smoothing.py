"""Randomised smoothing: exact numbers, half-space classifiers whose truth is known, and the planted mistakes."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from surefoot.errors import InvalidInput, Refused
from surefoot.nn import smoothing as sm


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class HalfSpace(nn.Module):
    """Class 1 where w.x < c, class 0 elsewhere; under noise P[1] = Phi((c - w.x) / (sigma |w|))."""

    def __init__(self, w, c):
        super().__init__()
        self.register_buffer("w", w)
        self.c = c

    def forward(self, x):
        inside = self.c - x.flatten(1) @ self.w
        return torch.stack([-inside, inside], 1)


def biased_coin(p, dim=4):
    """A half space and an input at the origin with P[class 1] = p under sigma = 1."""
    w = torch.ones(dim, dtype=torch.float64) / math.sqrt(dim)
    return HalfSpace(w, float(stats.norm.ppf(p))), torch.zeros(1, dim, dtype=torch.float64)


# --- exact numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "n", "alpha", "p", "radius"),
    [
        (100, 100, 0.001, 0.93325, 1.50048),
        (1000, 1000, 0.001, 0.99312, 2.46326),
        (9000, 10000, 0.001, 0.89041, 1.22871),
        (800, 1000, 0.001, 0.75845, 0.70133),
        (800, 1000, 0.0005, 0.75568, 0.69246),
        (100_000, 100_000, 0.001, 0.999931, 3.81146),
    ],
)
def test_bound_and_radius_are_the_published_numbers(k, n, alpha, p, radius):
    low = sm.lower_confidence_bound(torch.tensor(k), n, alpha)
    assert low.dtype == torch.float64
    assert low.item() == pytest.approx(p, abs=5e-6)
    assert sm.smoothing_radius(low, 1.0).item() == pytest.approx(radius, abs=1e-5)
    assert sm.smoothing_radius(low, 0.25).item() == pytest.approx(0.25 * radius, abs=1e-5)


def test_half_the_votes_abstain():
    low = sm.lower_confidence_bound(torch.tensor(500), 1000, 0.001)
    assert low.item() == pytest.approx(0.45077, abs=5e-6)
    assert sm.smoothing_radius(low, 1.0).item() == 0.0
    assert sm.smoothing_radius(torch.tensor(0.5), 1.0).item() == 0.0


def test_no_hit_gives_zero_and_all_hits_the_cap():
    bounds = sm.lower_confidence_bound(torch.tensor([0, 50]), 50, 0.01)
    assert bounds[0] == 0.0
    assert bounds[1].item() == pytest.approx(0.01 ** (1 / 50), rel=1e-12)


def test_bounds_agree_with_scipy_and_mirror_each_other():
    k = torch.tensor([1, 7, 30, 99, 100])
    exact = [stats.binomtest(int(i), 100, alternative="greater").proportion_ci(0.99).low for i in k]
    torch.testing.assert_close(
        sm.lower_confidence_bound(k, 100, 0.01), torch.tensor(exact, dtype=torch.float64), rtol=1e-9, atol=0
    )
    exact = [stats.binomtest(int(i), 100, alternative="less").proportion_ci(0.99).high for i in k]
    torch.testing.assert_close(
        sm.upper_confidence_bound(k, 100, 0.01), torch.tensor(exact, dtype=torch.float64), rtol=1e-9, atol=0
    )


def test_p_value_is_the_two_sided_binomial_test():
    top, other = torch.tensor([60, 51, 100, 5, 0]), torch.tensor([40, 50, 0, 5, 0])
    exact = [float(stats.binomtest(int(a), int(a + b)).pvalue) if a + b else 1.0 for a, b in zip(top, other)]
    np.testing.assert_allclose(sm.binomial_p_value(top, other).numpy(), exact, rtol=1e-9)


# --- sampling -------------------------------------------------------------------------------------------------------


def reference_counts(model, x, n, sigma, num_classes, generator, batch):
    """The plain loop: one input and one vote at a time, on the same stream of noise."""
    counts = torch.zeros(len(x), num_classes, dtype=torch.int64)
    order = [i for i in range(len(x)) for _ in range(n)]
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        noise = torch.empty(len(rows), *x.shape[1:], dtype=x.dtype).normal_(generator=generator)
        for i, e in zip(rows, noise):
            counts[i, int(model((x[i] + sigma * e)[None]).argmax())] += 1
    return counts


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_votes_equal_a_plain_loop(batch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(inplace=True), nn.Linear(8, 5)).double().eval()
    x = torch.rand(6, 1, 4, 4, dtype=torch.float64, generator=rng())
    with torch.no_grad():
        expected = reference_counts(net, x, 23, 0.7, 5, rng(3), batch)
    got = sm.vote_counts(net, x, 23, sigma=0.7, num_classes=5, generator=rng(3), batch_size=batch)
    assert torch.equal(got, expected)
    assert (got.sum(1) == 23).all()


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_shared_votes_equal_a_plain_loop(batch, convolution):
    """sigma other than 1, and a first layer that takes the noise alone: scaled once, never clipped, fresh for every draw."""
    torch.manual_seed(0)
    first = (
        [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten()] if convolution else [nn.Flatten(), nn.Linear(16, 8), nn.ReLU()]
    )
    net = nn.Sequential(*first, nn.Linear(8, 5)).double().eval()
    x, n, sigma = torch.rand(6, 1, 4, 4, dtype=torch.float64, generator=rng()), 150, 0.35
    generator, expected = rng(3), torch.zeros(6, 5, dtype=torch.int64)
    with torch.no_grad():
        for start in range(0, n, min(batch, n)):
            drawn = torch.empty(min(batch, n - start), 1, 4, 4, dtype=torch.float64).normal_(generator=generator)
            for i in range(len(x)):
                expected[i] += torch.bincount(net(x[i] + sigma * drawn).argmax(1), minlength=5)
    got = sm.vote_counts(net, x, n, sigma=sigma, num_classes=5, generator=rng(3), batch_size=batch, shared=True)
    assert torch.equal(got, expected)
    assert (got > 0).sum() > 8


@pytest.mark.parametrize("shared", [False, True])
def test_a_model_that_writes_over_its_input_spoils_no_other_models_draws(shared):
    def overwriting(z):
        votes = torch.stack([z[:, 0], z[:, 1], z[:, 2]], 1)
        z.zero_()
        return votes

    def plain(z):
        return z[:, :3] - 0.1 * z[:, 3:]

    x = torch.rand(5, 6, dtype=torch.float64, generator=rng())
    options = {"sigma": 0.5, "num_classes": 3, "batch_size": 16, "shared": shared}
    both = sm.joint_vote_counts([overwriting, plain], x, 70, generator=rng(1), **options)
    for view, model in enumerate((overwriting, plain)):
        assert torch.equal(both[view], sm.vote_counts(model, x, 70, generator=rng(1), **options))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("batch", [1, 7, 25, 1000])
def test_each_noisy_row_names_its_input(batch, shared):
    x = 100.0 * torch.arange(5, dtype=torch.float64)[:, None].expand(5, 2)
    seen = torch.zeros(5, dtype=torch.int64)
    for rows, noisy in sm.noisy_batches(x, 10, sigma=0.5, generator=rng(), batch_size=batch, shared=shared):
        assert torch.equal(rows, (noisy[:, 0] / 100).round().long())
        seen += torch.bincount(rows, minlength=5)
    assert seen.tolist() == [10] * 5


def test_shared_noise_is_the_generators_own_to_its_rarest_values():
    """4 sigma and more among 200,000 numbers: what a clip at 3 sigma would take away."""
    x = torch.zeros(1, 200, dtype=torch.float64)
    batches = sm.noisy_batches(x, 1000, sigma=0.5, generator=rng(), batch_size=1000, shared=True)
    seen = torch.cat([noisy.clone() for _, noisy in batches])
    expected = torch.empty(1000, 200, dtype=torch.float64).normal_(generator=rng())
    assert torch.allclose(seen, 0.5 * expected) and (seen.abs() > 2.0).any()


def test_noise_is_fresh_gaussian_and_never_clipped():
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, 50).contiguous()
    seen = {0: [], 1: []}
    for rows, noisy in sm.noisy_batches(x, 400, sigma=0.5, generator=rng(), batch_size=150):
        assert len(rows) == len(noisy) <= 150
        for i in (0, 1):
            seen[i].append(noisy[rows == i].clone())
    for i in (0, 1):
        z = (torch.cat(seen[i]) - float(i)) / 0.5
        assert z.shape == (400, 50)
        assert len(z.flatten().unique()) == z.numel()
        assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 0.01
        assert (torch.cat(seen[i]) < 0).any()
        assert (torch.cat(seen[i]) > 1).any()


@pytest.mark.parametrize("batch", [3, 50, 64, 1000])
def test_shared_noise_is_the_same_draws_for_every_input(batch):
    x = torch.rand(5, 2, 3, dtype=torch.float64, generator=rng())
    seen = {i: [] for i in range(5)}
    for rows, noisy in sm.noisy_batches(x, 40, sigma=0.5, generator=rng(1), batch_size=batch, shared=True):
        assert len(rows) == len(noisy) <= batch
        assert (rows.diff() >= 0).all()
        for i in range(5):
            seen[i].append((noisy[rows == i] - x[i]).clone())
    drawn = [torch.cat(seen[i]) for i in range(5)]
    assert all(e.shape == (40, 2, 3) for e in drawn)
    assert len(drawn[0].flatten().unique()) == 240
    for e in drawn[1:]:
        torch.testing.assert_close(e, drawn[0])


def test_shared_noise_keeps_the_level_of_each_certificate():
    p, alpha, repeats = 0.8, 0.05, 800
    model, x = biased_coin(p)
    g = rng(11)
    options = {"sigma": 1.0, "num_classes": 2, "n0": 10, "n": 100, "alpha": alpha, "shared": True}
    found = [sm.certify(model, x.expand(2, -1).contiguous(), generator=g, **options) for _ in range(repeats)]
    broken = torch.stack([(f.prediction == 1) & (f.p_lower > p) for f in found]).double().mean(0)
    assert (broken <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / repeats)).all()


def test_a_certificate_does_not_depend_on_the_other_inputs_of_the_call():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x = torch.rand(6, 4, dtype=torch.float64, generator=rng())
    options = {"sigma": 0.5, "num_classes": 3, "n0": 20, "n": 300}
    whole = sm.certify(net, x, generator=rng(2), **options)
    part = sm.certify(net, x[3:5], generator=rng(2), **options)
    assert torch.equal(whole.prediction[3:5], part.prediction)
    assert torch.equal(whole.radius[3:5], part.radius)


def test_the_batch_follows_the_widest_layer_and_leaves_no_hook():
    wide = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 64, 3))
    x = torch.rand(3, 1, 8, 8, generator=rng())
    assert sm.check_deterministic(wide, x) == 64 * 64
    assert sm.check_deterministic(lambda z: z.flatten(1)[:, :3], x) == 256
    assert not any(m._forward_hooks for m in wide.modules())
    assert sm.default_batch(x, 64 * 64) == 128
    seen = []
    wide[0].register_forward_hook(lambda _m, z, _y: seen.append(len(z[0])))
    sm.certify(wide, x, sigma=0.5, num_classes=3, generator=rng(), n0=10, n=400)
    assert max(seen) == 128


class Viewed(nn.Module):
    """A convolution followed by a `view`, which refuses memory laid out channels last."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, x):
        z = self.conv(x)
        return z.view(len(z), -1)[:, :3]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_large_images_go_channels_last_with_the_same_votes(shared, channels):
    torch.manual_seed(0)
    seen = []
    net = nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(100, 5)
    )
    net[0].register_forward_pre_hook(lambda _, z: seen.append(z[0].stride(1)))
    net = net.double()
    x = torch.rand(3, channels, 22, 22, dtype=torch.float64, generator=rng())
    options = {"sigma": 0.5, "num_classes": 5, "batch_size": 16, "shared": shared}
    got = sm.vote_counts(net, x, 40, generator=rng(1), **options)
    assert seen[-1] == 1
    layout = {"sigma": 0.5, "batch_size": 16, "shared": shared}
    plain = torch.zeros(3, 5, dtype=torch.int64)
    with torch.no_grad():
        for rows, noisy in sm.noisy_batches(x, 40, generator=rng(1), **layout):
            plain.index_put_((rows, net(noisy).argmax(1)), torch.ones(len(rows), dtype=torch.int64), accumulate=True)
    assert torch.equal(got, plain)


def test_a_model_that_refuses_channels_last_gets_plain_images():
    counts = sm.vote_counts(Viewed(), torch.rand(2, 1, 24, 24), 10, sigma=0.5, num_classes=3, generator=rng())
    assert (counts.sum(1) == 10).all()


def test_sigma_may_differ_by_pixel():
    sigma = torch.tensor([0.1, 2.0])
    drawn = torch.cat([z.clone() for _, z in sm.noisy_batches(torch.zeros(1, 2), 4000, sigma=sigma, generator=rng())])
    # the standard deviation of a sample s.d. is sigma / sqrt(2 n): 4 of those
    assert ((drawn.std(0) / sigma - 1).abs() < 4 / math.sqrt(8000)).all()


def test_same_generator_same_result_and_global_state_untouched():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    before = torch.get_rng_state()
    options = {"sigma": 0.5, "num_classes": 3, "n": 200}
    a = sm.certify(net, torch.rand(3, 4, generator=rng()), generator=rng(1), **options)
    b = sm.certify(net, torch.rand(3, 4, generator=rng()), generator=rng(1), **options)
    assert torch.equal(a.radius, b.radius)
    assert torch.equal(a.prediction, b.prediction)
    assert torch.equal(before, torch.get_rng_state())


def test_float32_and_float64_follow_the_caller():
    for dtype in (torch.float32, torch.float64):
        seen = []
        sm.vote_counts(
            lambda z, seen=seen: seen.append(z.dtype) or torch.zeros(len(z), 2, dtype=z.dtype),
            torch.zeros(2, 3, dtype=dtype), 5, sigma=1.0, num_classes=2, generator=rng(),
        )  # fmt: skip
        assert set(seen) == {dtype}


def test_training_mode_is_switched_off_and_put_back():
    """Planted mistake: a train-mode model (batch statistics, dropout) is not the classifier that is certified."""
    net: Any = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    net[1].running_mean.fill_(3.0)
    net.train()
    net[2].eval()
    buffers = [b.clone() for b in net.buffers()]
    x = torch.rand(2, 4, generator=rng())
    got = sm.vote_counts(net, x, 300, sigma=1.0, num_classes=2, generator=rng(1), batch_size=100)
    assert net.training
    assert net[1].training
    assert not net[2].training
    assert all(torch.equal(a, b) for a, b in zip(buffers, net.buffers()))
    net.eval()
    assert torch.equal(got, sm.vote_counts(net, x, 300, sigma=1.0, num_classes=2, generator=rng(1), batch_size=100))
    net.train()
    noisy = [net(z.clone()) for _, z in sm.noisy_batches(x, 300, sigma=1.0, generator=rng(1), batch_size=100)]
    wrong = torch.cat(noisy).argmax(1).view(2, 300)
    assert not torch.equal(torch.stack([(wrong == c).sum(1) for c in (0, 1)], 1), got)


# --- the guarantee --------------------------------------------------------------------------------------------------


def test_certificates_of_half_spaces_are_broken_at_most_alpha_of_the_time():
    """10,000 certificates at alpha = .05, each with the truth known: radius > distance is an attack that succeeds."""
    p, alpha, trials = 0.8, 0.05, 10_000
    model, x = biased_coin(p)
    many = x.expand(trials, -1).contiguous()  # independent repeats, so each with draws of its own
    options = {"sigma": 1.0, "num_classes": 2, "n0": 20, "n": 100, "alpha": alpha, "shared": False}
    found = sm.certify(model, many, generator=rng(5), **options)
    distance = float(stats.norm.ppf(p))
    certified = found.prediction == 1
    broken = (certified & (found.radius > distance)).double().mean().item()
    assert broken <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / trials)
    assert broken > 0.01  # the bound is tight: the test could fail
    # the attack itself: a step of the certified size along w flips exactly the broken ones
    w: Any = model.w
    moved = w[None] * found.radius[:, None] * (1 - 1e-12)
    flips = torch.distributions.Normal(0.0, 1.0).cdf(model.c - moved @ w) < 0.5
    assert torch.equal(flips & certified, certified & (found.radius > distance))


def test_no_certificate_broken_in_ten_thousand_attacks_at_small_alpha():
    """alpha = 1e-6 leaves 1 % for a single break among 10,000 random half spaces; the attack is the worst one."""
    g = rng(7)
    trials, dim, sigma = 10_000, 6, 0.5
    w = torch.randn(trials, dim, generator=g, dtype=torch.float64)
    w /= w.norm(dim=1, keepdim=True)
    distance = torch.rand(trials, generator=g, dtype=torch.float64)
    inputs = torch.cat([w, distance[:, None], torch.zeros(trials, dim, dtype=torch.float64)], 1)

    def model(z):  # each input carries its own half space; only the last `dim` numbers are noisy
        inside = z[:, dim : dim + 1] - (z[:, :dim] * z[:, dim + 1 :]).sum(1, keepdim=True)
        return torch.cat([-inside, inside], 1)

    noise_on = torch.tensor([1e-300] * (dim + 1) + [sigma] * dim, dtype=torch.float64)
    chosen = sm.vote_counts(model, inputs, 50, sigma=noise_on, num_classes=2, generator=g).argmax(1)
    hits = sm.vote_counts(model, inputs, 400, sigma=noise_on, num_classes=2, generator=g)
    low = sm.lower_confidence_bound(hits.gather(1, chosen[:, None])[:, 0], 400, 1e-6)
    radius = sm.smoothing_radius(low, sigma)
    side = torch.where(chosen == 1, distance, -distance)  # signed distance to the boundary of the chosen class
    assert (radius > 0).sum() > 3000
    assert (side[radius > 0] > radius[radius > 0]).all()
    assert (radius <= sigma * stats.norm.ppf(1e-6 ** (1 / 400)) + 1e-12).all()


def test_selection_and_estimation_use_different_draws():
    """Planted mistake: choosing the class with the votes that also bound it fails when many classes tie."""
    classes, trials, alpha, n = 60, 3000, 0.05, 40

    def base(z):  # classes by angle, all equally likely: any bound above 1/60 is a failure
        angle = torch.atan2(z[:, 1], z[:, 0]) / (2 * math.pi) + 0.5
        return nn.functional.one_hot((angle * classes).long().clamp(0, classes - 1), classes).double()

    x = torch.zeros(trials, 2, dtype=torch.float64)
    options = {"sigma": 1.0, "num_classes": classes, "generator": rng(2), "shared": False}  # independent trials
    found = sm.certify(base, x, n0=n, n=n, alpha=alpha, **options)
    limit = alpha + 3 * math.sqrt(alpha * (1 - alpha) / trials)
    assert (found.p_lower > 1 / classes).double().mean() <= limit
    counts = sm.vote_counts(base, x, n, **options)
    reused = sm.lower_confidence_bound(counts.amax(1), n, alpha)
    assert (reused > 1 / classes).double().mean() > 5 * limit
    assert (found.draws == 2 * n).all()


def test_predict_errs_rarely_and_abstains_on_a_tie():
    model, x = biased_coin(0.5)
    alpha, calls, g = 0.2, 500, rng()  # one set of noise serves a whole call: each call is one trial
    got = torch.cat(
        [sm.predict(model, x, sigma=1.0, num_classes=2, generator=g, n=200, alpha=alpha) for _ in range(calls)]
    )
    named = (got != sm.ABSTAIN).double().mean().item()
    assert 0.1 < named <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / calls)
    model, x = biased_coin(0.9)
    assert sm.predict(model, x, sigma=1.0, num_classes=2, generator=rng(), n=200).tolist() == [1]


def three_bins(z):
    """Classes with the probabilities .45, .35, .2 under unit noise around 0."""
    cuts = torch.tensor(stats.norm.ppf([0.45, 0.8]), dtype=z.dtype)
    return nn.functional.one_hot(torch.bucketize(z[:, 0].contiguous(), cuts), 3).to(z.dtype)


def test_predict_tests_the_two_top_counts_two_sided_at_alpha():
    """Named just above the p-value of the two top counts among themselves, abstained just below: not n, one side or 2 alpha."""
    x = torch.zeros(1, 2, dtype=torch.float64)
    options = {"sigma": 1.0, "num_classes": 3, "n": 300}
    counts = sm.vote_counts(three_bins, x, 300, sigma=1.0, num_classes=3, generator=rng(4), shared=True)[0]
    first, second = counts.sort(descending=True).values[:2].tolist()
    p = float(stats.binomtest(first, first + second).pvalue)
    assert 1e-4 < p < 0.5
    for alpha, expected in ((1.001 * p, int(counts.argmax())), (0.999 * p, sm.ABSTAIN)):
        assert sm.predict(three_bins, x, generator=rng(4), alpha=alpha, **options).tolist() == [expected]


def test_a_bound_below_one_half_abstains_with_radius_zero():
    """Most votes for one class, but a lower bound between .4 and .5: nothing is certified."""
    model, x = biased_coin(0.56)
    found = sm.certify(model, x, sigma=1.0, num_classes=2, generator=rng(1), n0=100, n=1000, alpha=1e-6)
    assert 0.4 < found.p_lower.item() < 0.5
    assert found.prediction.tolist() == [sm.ABSTAIN] and found.radius.tolist() == [0.0]


# --- early stopping -------------------------------------------------------------------------------------------------


def test_looks_keep_alpha_whatever_stops_them():
    """Planted mistake: alpha unsplit over ten looks breaks the promise; the shares keep it."""
    p, alpha, trials = 0.7, 0.1, 4000
    model, x = biased_coin(p)
    at = tuple(range(20, 201, 20))
    many = x.expand(trials, -1).contiguous()
    target = float(stats.norm.ppf(p)) + 1e-9  # an optimist's target: any success is a failure of the bound
    limit = alpha + 3 * math.sqrt(alpha * (1 - alpha) / trials)
    options = {"sigma": 1.0, "num_classes": 2, "n0": 30, "shared": False}
    looks = sm.Looks(at, (0.1,) * 10, target=target)
    found = sm.certify(model, many, generator=rng(), alpha=alpha, looks=looks, **options)
    assert ((found.p_lower > p) & (found.prediction == 1)).double().mean() <= limit
    unsplit = sm.certify(model, many, generator=rng(), alpha=min(10 * alpha, 0.999), looks=looks, **options)
    assert ((unsplit.p_lower > p) & (unsplit.prediction == 1)).double().mean() > limit


def test_looks_stop_early_and_a_hopeless_input_costs_little():
    model, x = biased_coin(0.99)
    looks = sm.Looks((200, 2000), (0.5, 0.5), target=0.5)
    options = {"sigma": 1.0, "num_classes": 2, "generator": rng(), "n0": 10, "looks": looks}
    easy = sm.certify(model, x, **options)
    assert easy.draws.tolist() == [210]
    assert easy.radius.item() >= 0.5
    lost = sm.certify(lambda z: torch.nn.functional.one_hot((z[:, 0] * 50).long() % 10, 10).double(), x,
                      **{**options, "num_classes": 10})  # fmt: skip
    assert lost.draws.tolist() == [210]
    assert lost.prediction.tolist() == [sm.ABSTAIN]


def test_a_geometric_plan_is_declared_before_any_draw_and_keeps_alpha():
    looks = sm.Looks.geometric(10_000, target=0.5)
    assert looks.at == (100, 400, 1600, 6400, 10_000)
    assert sum(looks.spend) == pytest.approx(1.0)
    assert looks.spend[-1] == 0.5
    assert sm.Looks.geometric(80) == sm.Looks((80,), (1.0,))
    p, alpha, trials = 0.75, 0.1, 4000
    model, x = biased_coin(p)
    target = float(stats.norm.ppf(p)) + 1e-9  # whoever stops early has broken the bound
    plan = sm.Looks.geometric(400, target=target, first=25, factor=2)
    options = {"sigma": 1.0, "num_classes": 2, "n0": 30, "alpha": alpha, "shared": False}
    found = sm.certify(model, x.expand(trials, -1).contiguous(), generator=rng(3), looks=plan, **options)
    broken = ((found.p_lower > p) & (found.prediction == 1)).double().mean().item()
    assert 0.005 < broken <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / trials)


def test_a_plan_decides_at_its_target_as_the_fixed_procedure_does_with_fewer_draws():
    """Certified at the target radius or not: the same answers where the truth is clear, for a tenth of the draws."""
    w = torch.ones(4, dtype=torch.float64) / 2
    model = HalfSpace(w, 0.0)
    x = -torch.linspace(0.0, 4.0, 41, dtype=torch.float64)[:, None] * w
    options = {"sigma": 1.0, "num_classes": 2}
    fixed = sm.certify(model, x, generator=rng(1), n=10_000, **options)
    early = sm.certify(model, x, generator=rng(2), looks=sm.Looks.geometric(10_000, target=1.0), **options)
    distance = torch.linspace(0.0, 4.0, 41, dtype=torch.float64)
    clear = (distance - 1.0).abs() > 0.15
    assert torch.equal((fixed.radius >= 1.0)[clear], (early.radius >= 1.0)[clear])
    assert (early.radius <= distance).all()
    assert early.draws.sum() < 0.4 * fixed.draws.sum()
    assert (early.draws[distance > 2] <= 500).all()


def test_a_plan_follows_each_input_after_others_have_stopped():
    """Inputs of three classes that stop at different looks: each gets what it gets alone on the same noise."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    x = 1.5 * torch.randn(12, 4, dtype=torch.float64, generator=rng(1))
    looks = sm.Looks((50, 100, 200, 400), (0.25,) * 4, target=0.4)
    options = {"sigma": 0.4, "num_classes": 3, "n0": 30, "looks": looks}
    whole = sm.certify(net, x, generator=rng(2), **options)
    alone = [sm.certify(net, x[i : i + 1], generator=rng(2), **options) for i in range(len(x))]
    assert len(whole.draws.unique()) >= 3 and len(whole.prediction.unique()) >= 3
    for field in ("prediction", "radius", "p_lower", "draws"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(a, field) for a in alone])), field


def test_the_best_bound_of_all_looks_is_reported():
    """By hand from the same draws: max_j BetaInv(share_j alpha; k_j, at_j - k_j + 1), also where an early look gives it."""
    model, x = biased_coin(0.8)
    at, spend, alpha = (100, 120), (0.99, 0.01), 0.05
    options = {"sigma": 1.0, "num_classes": 2}
    found = sm.certify(model, x, generator=rng(3), n0=20, alpha=alpha, looks=sm.Looks(at, spend), **options)
    g, hits, bounds = rng(3), 0, []
    sm.vote_counts(model, x, 20, generator=g, shared=True, **options)
    for fresh, total, share in zip((100, 20), at, spend):
        hits += int(sm.vote_counts(model, x, fresh, generator=g, shared=True, **options)[0, 1])
        bounds.append(stats.beta.ppf(share * alpha, hits, total - hits + 1))
    assert bounds[0] > bounds[1]
    assert found.p_lower.item() == pytest.approx(max(bounds), rel=1e-9)


def test_an_input_is_given_up_beyond_doubt_only():
    """At p = .52 half of the inputs trail after 20 draws; none of them is hopeless."""
    model, x = biased_coin(0.52)
    options = {"sigma": 1.0, "num_classes": 2, "n0": 20, "shared": False}
    found = sm.certify(model, x.expand(60, -1), generator=rng(), looks=sm.Looks((20, 200), (0.5, 0.5)), **options)
    assert (found.draws == 220).all()


def test_no_share_of_alpha_may_be_negative():
    """-0.5 and 1.5 sum to 1, and would spend 1.5 alpha at the last look."""
    with pytest.raises(InvalidInput, match="spend"):
        sm.Looks((10, 20), (-0.5, 1.5))


def test_one_look_is_the_published_procedure():
    model, x = biased_coin(0.9)
    options = {"sigma": 1.0, "num_classes": 2}
    a = sm.certify(model, x, generator=rng(4), n=500, **options)
    b = sm.certify(model, x, generator=rng(4), looks=sm.Looks((500,), (1.0,)), **options)
    assert torch.equal(a.radius, b.radius)


# --- summaries ------------------------------------------------------------------------------------------------------


def test_certified_accuracy_counts_abstentions_as_wrong_even_at_zero():
    found = sm.Certificates(
        torch.tensor([1, 0, sm.ABSTAIN, 2]),
        torch.tensor([0.5, 0.9, 0.0, 0.1], dtype=torch.float64),
        torch.zeros(4, dtype=torch.float64),
        torch.zeros(4, dtype=torch.int64),
    )
    y = torch.tensor([1, 1, 1, 2])
    assert sm.certified_accuracy(found, y, (0.0, 0.1, 0.3, 0.5, 0.6)).tolist() == [0.5, 0.5, 0.25, 0.25, 0.0]
    assert sm.average_certified_radius(found, y) == pytest.approx(0.15)
    assert sm.correct_radii(found, y).tolist() == pytest.approx([0.5, 0.0, 0.0, 0.1])
    assert found.abstained.tolist() == [False, False, True, False]


def test_radius_grows_with_the_count():
    radius = sm.smoothing_radius(sm.lower_confidence_bound(torch.arange(501), 500, 0.001), 0.25)
    assert all(b >= a for a, b in pairwise(radius.tolist()))
    assert math.isfinite(radius[-1])


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"sigma": -1.0}, "sigma must be positive"),
        ({"alpha": 0.0}, "alpha must lie strictly"),
        ({"alpha": 1.0}, "alpha must lie strictly"),
        ({"n": 0}, "n must be an integer"),
        ({"n0": 0}, "n0 must be an integer"),
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, "floating point"),
        ({"x": torch.zeros(0, 4)}, "at least one input"),
        ({"x": torch.full((2, 4), float("nan"))}, "NaN"),
        ({"num_classes": 3}, "num_classes"),
    ],
)
def test_bad_input_is_one_sentence(change, words):
    call = {"x": torch.zeros(2, 4), "sigma": 1.0, "num_classes": 2, "n": 50, "generator": rng(), **change}
    with pytest.raises(InvalidInput, match=words):
        sm.certify(nn.Linear(4, 2), call.pop("x"), **call)


def test_broken_logits_and_hidden_randomness_are_refused():
    with pytest.raises(InvalidInput, match="NaN or infinite logits"):
        sm.vote_counts(lambda z: z * float("inf"), torch.ones(1, 2), 5, sigma=1.0, num_classes=2, generator=rng())
    g = rng()

    def dice(z):
        return torch.randn(len(z), 2, generator=g)

    with pytest.raises(Refused, match="stochastic=True"):
        sm.certify(dice, torch.ones(1, 2), sigma=1.0, num_classes=2, generator=rng(), n=20)
    sm.certify(dice, torch.ones(1, 2), sigma=1.0, num_classes=2, generator=rng(), n=20, stochastic=True)
    with pytest.raises(Refused, match="stochastic=True"):
        sm.predict(dice, torch.ones(1, 2), sigma=1.0, num_classes=2, generator=rng(), n=20)
    sm.predict(dice, torch.ones(1, 2), sigma=1.0, num_classes=2, generator=rng(), n=20, stochastic=True)
    with pytest.raises(InvalidInput, match="looks must increase"):
        sm.Looks((10, 10), (0.5, 0.5))
    with pytest.raises(InvalidInput, match="sum to at most 1"):
        sm.Looks((10, 20), (0.9, 0.5))


def test_choosing_and_estimating_on_the_same_draws_breaks_the_level():
    """Planted mistake: ten equal classes; the winner of the very draws that estimate it looks better than it is."""
    trials, n, alpha = 4000, 100, 0.05
    g = np.random.default_rng(0)
    first, fresh = (torch.from_numpy(g.multinomial(n, [0.1] * 10, trials)) for _ in range(2))
    chosen = first.argmax(1, keepdim=True)
    limit = alpha + 3 * math.sqrt(alpha * (1 - alpha) / trials)
    honest = sm.lower_confidence_bound(fresh.gather(1, chosen).squeeze(1), n, alpha) > 0.1
    reused = sm.lower_confidence_bound(first.gather(1, chosen).squeeze(1), n, alpha) > 0.1
    assert honest.double().mean() <= limit
    assert reused.double().mean() > 5 * limit
