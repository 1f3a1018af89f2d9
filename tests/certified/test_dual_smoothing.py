"""Dual smoothing: the radius's exact numbers, tightness and soundness on half spaces, the halves, the treatment."""

import dataclasses
import json
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from surefoot.certified import dual_smoothing as ds
from surefoot.contracts import check_treatment
from surefoot.core.task import Split, Task, Training
from surefoot.errors import InvalidInput, Refused
from surefoot.models.networks import small_cnn
from surefoot.nn.masks import checkerboard_split, index_split
from surefoot.nn.smoothing import ABSTAIN, consistency_loss, lower_confidence_bound, noisy_batches
from surefoot.training.loop import fit

normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the radius -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "sigmas", "radius"),
    [
        (0.9, 0.9, (1.0,), 1.81239),
        (0.99, 0.6, (1.0,), 1.82412),
        (0.95, 0.4, (1.0,), 0.98394),
        (0.9, 0.2, (1.0,), 0.31108),
        (0.9, 0.8, (0.25, 0.5), 0.47475),
    ],
)
def test_radius_is_the_worked_number(a, b, sigmas, radius):
    assert ds.dual_radius(a, b, *sigmas).item() == pytest.approx(radius, abs=1e-5)


def test_clipping_a_negative_half_would_give_another_number():
    clipped = ds.dual_radius(0.95, 0.5, 1.0).item()
    assert clipped == pytest.approx(1.16309, abs=1e-5)
    assert ds.dual_radius(0.95, 0.4, 1.0).item() < clipped


def test_radius_is_zero_where_the_vote_is_not_certain():
    assert (
        ds.dual_radius(torch.tensor([0.5, 0.3, 0.0, 0.0]), torch.tensor([0.5, 0.7, 0.9, 1.0]), 1.0).tolist()
        == [0.0] * 4
    )
    with pytest.raises(InvalidInput, match="Probabilities"):
        ds.dual_radius(1.1, 0.5, 1.0)


def vote(a_score, b_score, s, t, sigma_l, sigma_r):
    """G(cA) of two half spaces after moves of s and t along their normals; every other class has 2 - G(cA)."""
    return normal.cdf(a_score - s / sigma_l) + normal.cdf(b_score - t / sigma_r)


@pytest.mark.parametrize(("a", "b"), [(0.9, 0.9), (0.99, 0.6), (0.95, 0.4), (0.9, 0.2)])
def test_certificate_is_tight(a, b):
    """At s = t = sigma (A + B) / 2 the vote crosses 1 exactly, and the norm of that move is R."""
    score_a, score_b = normal.icdf(torch.tensor([a, b], dtype=torch.float64))
    sigma = 0.7
    step = 0.5 * sigma * (score_a + score_b)
    assert abs(vote(score_a, score_b, step, step, sigma, sigma).item() - 1) < 1e-9
    assert math.hypot(step, step) == pytest.approx(ds.dual_radius(a, b, sigma).item(), rel=1e-9)


def test_no_attack_within_the_radius_breaks_exact_half_spaces():
    """100,000 attacked points: random probabilities, noises and directions at 0.999 R."""
    g = rng(1)
    n = 100_000
    p = torch.rand(2, n, generator=g, dtype=torch.float64)
    sigma_l, sigma_r = 0.3, 0.8
    radius = ds.dual_radius(p[0], p[1], sigma_l, sigma_r)
    angle = torch.rand(n, generator=g, dtype=torch.float64) * math.pi / 2
    # half of the attacks go where the theory says is worst: s, t proportional to 1/sigma
    angle[::2] = math.atan2(1 / sigma_r, 1 / sigma_l)
    s, t = 0.999 * radius * angle.cos(), 0.999 * radius * angle.sin()
    score = normal.icdf(p)
    kept = vote(score[0], score[1], s, t, sigma_l, sigma_r) > 1
    assert kept[radius > 0].all()
    assert (radius > 0).sum() > 40_000


def test_root_of_squared_radii_is_broken():
    """Planted mistake: sqrt(r_l^2 + r_r^2) = 2.340 instead of 1.824; a move within it turns the vote."""
    a, b = normal.icdf(torch.tensor([0.99, 0.6], dtype=torch.float64))
    wrong = math.hypot(a, b)
    assert wrong == pytest.approx(2.340, abs=1e-3)
    step = 0.99 * wrong / math.sqrt(2)
    assert vote(a, b, step, step, 1.0, 1.0) < 1
    clipped = normal.icdf(torch.tensor(0.95, dtype=torch.float64))  # and so does clipping B at 0
    step = 0.99 * clipped / 2
    assert vote(clipped, normal.icdf(torch.tensor(0.4, dtype=torch.float64)), step, step, 1.0, 1.0) < 1


class HalfSpace(nn.Module):
    """Class 1 where the mean of the whole (filled) image is below a threshold."""

    def __init__(self, threshold, w):
        super().__init__()
        self.threshold = threshold
        self.register_buffer("w", w)

    def forward(self, x):
        inside = self.threshold - x.flatten(1) @ self.get_buffer("w").flatten()
        return torch.stack([-inside, inside], 1)


def known_dual(p_left, p_right, sigma=1.0, size=4):
    """A dual classifier whose halves say class 1 with the given probabilities at x = 0."""
    masks = checkerboard_split((1, size, size))
    models = []
    for p, mask in zip((p_left, p_right), masks):
        w = mask.double() / mask.double().norm()
        models.append(HalfSpace(sigma * normal.icdf(torch.tensor(p, dtype=torch.float64)).item(), w))
    return ds.DualSmoothedClassifier(*models, sigma=sigma, num_classes=2, masks=masks, fill="zero").double()


def failure_rate(level, trials, n, p_left, p_right):
    """How often a bound at `level` per half exceeds the true probability of either half."""
    model = known_dual(p_left, p_right)
    x = torch.zeros(trials, 1, 4, 4, dtype=torch.float64)
    hits = model.vote_counts(x, n, generator=rng(3), shared=False)[:, :, 1]
    low = lower_confidence_bound(hits, n, level)
    return ((low[0] > p_left) | (low[1] > p_right)).double().mean().item()


def test_joint_failure_needs_the_split_of_alpha():
    trials, alpha = 4000, 0.05
    limit = alpha + 3 * math.sqrt(alpha * (1 - alpha) / trials)
    assert failure_rate(alpha / 2, trials, 400, 0.8, 0.7) <= limit
    assert failure_rate(alpha, trials, 400, 0.8, 0.7) > limit  # planted mistake: alpha not split


def test_certify_uses_fresh_draws_and_half_of_alpha():
    model = known_dual(0.9, 0.8)
    x = torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    found = model.certify(x, generator=rng(5), n0=50, n=300, alpha=0.01)
    g = rng(5)
    first, second = model.vote_counts(x, 50, generator=g), model.vote_counts(x, 300, generator=g)
    chosen = first.sum(0).argmax(1)
    low = lower_confidence_bound(second[:, torch.arange(3), chosen], 300, 0.005)
    assert torch.equal(found.p_left, low[0])
    assert torch.equal(found.p_right, low[1])
    torch.testing.assert_close(found.radius, ds.dual_radius(low[0], low[1], 1.0))
    assert (found.prediction == 1).all()
    assert (found.radius <= math.sqrt(2) * normal.icdf(torch.tensor(0.005 ** (1 / 300), dtype=torch.float64))).all()


def test_noise_shared_by_all_inputs_keeps_the_level_of_each_certificate():
    """800 calls of two inputs with one set of noise: each input's bounds fail at most alpha of the time, as with draws of its own."""
    model, alpha, g = known_dual(0.8, 0.7), 0.05, rng(21)
    x = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    found = [model.certify(x, generator=g, n0=10, n=100, alpha=alpha) for _ in range(800)]
    assert all(torch.equal(f.p_left[0], f.p_left[1]) for f in found)  # the same draws indeed
    broken = torch.stack([(f.prediction == 1) & ((f.p_left > 0.8) | (f.p_right > 0.7)) for f in found])
    rate = broken.double().mean(0)
    assert (rate <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / 800)).all()
    assert (rate > 0.005).all()  # tight enough that the test could fail


def test_a_certificate_does_not_depend_on_the_other_inputs_of_the_call():
    model = ds.DualSmoothedClassifier(tiny_net(), tiny_net(seed=1), sigma=0.5, num_classes=3, shape=(1, 8, 8)).double()
    x = torch.rand(5, 1, 8, 8, generator=rng(), dtype=torch.float64)
    whole = model.certify(x, generator=rng(2), n=300)
    part = model.certify(x[2:4], generator=rng(2), n=300)
    assert torch.equal(whole.p_left[2:4], part.p_left)
    assert torch.equal(whole.radius[2:4], part.radius)
    alone = model.certify(x, generator=rng(2), n=300, shared=False)
    assert not torch.equal(whole.p_left, alone.p_left)


def test_certificates_by_sampling_survive_the_worst_attack():
    """12,000 certificates with known truth: radius > (A + B) / sqrt 2 is the attack that succeeds; alpha = 1e-6."""
    g = rng(8)
    broken = certified = 0
    for _ in range(12):
        p = (0.3 + 0.69 * torch.rand(2, generator=g, dtype=torch.float64)).tolist()
        model = known_dual(*p)
        found = model.certify(
            torch.zeros(1000, 1, 4, 4, dtype=torch.float64), generator=g, n0=50, n=300, alpha=1e-6, shared=False
        )
        truth = normal.icdf(torch.tensor(p, dtype=torch.float64)).sum().item() / math.sqrt(2)
        side = torch.where(found.prediction == 1, truth, -truth)
        broken += int((~found.abstained & (found.radius >= side)).sum())
        certified += int((~found.abstained).sum())
    assert broken == 0
    assert certified > 4000


def test_radius_is_monotone_and_capped():
    counts = torch.arange(0, 501)
    low = lower_confidence_bound(counts, 500, 0.0005)
    radius = ds.dual_radius(low, torch.full_like(low, 0.8), 0.25)
    assert all(b >= a for a, b in pairwise(radius.tolist()))
    assert math.isfinite(radius[-1])


def test_sampling_cap_of_section_3b():
    n, alpha = 1000, 0.001
    cap_plain = normal.icdf(torch.tensor(alpha ** (1 / (2 * n)), dtype=torch.float64)).item()
    p = (alpha / 2) ** (1 / n)
    assert cap_plain == pytest.approx(2.70, abs=5e-3)
    assert ds.dual_radius(p, p, 1.0).item() == pytest.approx(3.44, abs=5e-3)


def test_abstention_is_minus_one_and_zero():
    model = known_dual(0.5, 0.5)
    found = model.certify(torch.zeros(200, 1, 4, 4, dtype=torch.float64), generator=rng(), n0=20, n=100, shared=False)
    assert found.abstained.all()
    assert (found.prediction == ABSTAIN).all()
    assert (found.radius == 0).all()


def test_predict_keeps_its_error_and_decides_clear_votes():
    x = torch.zeros(2000, 1, 4, 4, dtype=torch.float64)
    assert (known_dual(0.95, 0.3).predict(x[:5], generator=rng(), n=1000) == 1).all()
    tie = known_dual(0.7, 0.3).predict(x, generator=rng(), n0=20, n=200, alpha=0.05, shared=False)
    assert (tie != ABSTAIN).double().mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


# --- halves ---------------------------------------------------------------------------------------------------------


def test_noise_on_dropped_pixels_does_not_reach_the_network():
    seen = []
    model = ds.HalfClassifier(nn.Flatten(), checkerboard_split((4, 4))[0])
    for _, z in noisy_batches(torch.zeros(1, 1, 4, 4), 50, sigma=1.0, generator=rng()):
        other = torch.where(model.mask, z, torch.randn(z.shape, generator=rng(1)))
        seen.append(torch.equal(model(z), model(other)))
    assert all(seen)


# --- classifier -----------------------------------------------------------------------------------------------------


def tiny_net(classes=3, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, classes))


def test_forward_is_the_log_of_the_mean_probability_and_has_gradients():
    model = ds.DualSmoothedClassifier(tiny_net(), tiny_net(seed=1), sigma=0.25, num_classes=3, shape=(1, 8, 8))
    x = torch.rand(5, 1, 8, 8, generator=rng(), requires_grad=True)
    expected = (model.left(x).softmax(1) + model.right(x).softmax(1)) / 2
    torch.testing.assert_close(model(x).exp(), expected)
    model(x)[:, 0].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_certify_leaves_model_and_global_state_alone_and_repeats():
    model = ds.DualSmoothedClassifier(tiny_net(), tiny_net(seed=1), sigma=0.25, num_classes=3, shape=(1, 8, 8)).train()
    x = torch.rand(4, 1, 8, 8, generator=rng())
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    one, two = (model.certify(x, generator=rng(3), n=100, n0=20) for _ in range(2))
    for name in ds.DualCertificate.__dataclass_fields__:
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.radius = two.radius  # type: ignore[misc]


def test_two_noise_levels_and_vectors():
    masks = index_split(6, [0, 1, 2])
    net = nn.Linear(6, 2).double()
    model = ds.DualSmoothedClassifier(net, net, sigma=0.1, sigma_right=2.0, num_classes=2, masks=masks, fill="zero")
    seen = []
    model.left.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].clone()))
    model.vote_counts(torch.zeros(1, 6, dtype=torch.float64), 3000, generator=rng())
    drawn = torch.cat(seen)
    ratio = drawn.std(0) / torch.tensor([0.1, 0.1, 0.1, 2.0, 2.0, 2.0])
    assert ((ratio - 1).abs() < 4 / math.sqrt(6000)).all()
    found = model.certify(torch.zeros(1, 6, dtype=torch.float64), generator=rng(), n=50)
    torch.testing.assert_close(found.radius, ds.dual_radius(found.p_left, found.p_right, 0.1, 2.0))


def test_report_adds_batches_up():
    model = known_dual(0.95, 0.9)
    x = torch.zeros(4, 1, 4, 4, dtype=torch.float64)
    y = torch.tensor([1, 1, 0, 1])
    report = ds.certify_dual(model, [(x[:3], y[:3]), (x[3:], y[3:])], generator=rng(), n=300, radii=(0.0, 99.0))
    assert report.certified_accuracy == (0.75, 0.0)
    right = torch.where(report.certificate.prediction == y, report.certificate.radius, 0.0)
    assert report.average_radius == pytest.approx(right.mean().item())


def test_losses():
    logits = torch.randn(2, 6, 4, generator=rng(), dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    ce = sum(F.cross_entropy(part, y) for part in logits) / 2
    torch.testing.assert_close(consistency_loss(logits, y, 0.0), ce)
    mean = logits.softmax(-1).mean(0)
    kl = sum(F.kl_div(part.log_softmax(-1), mean, reduction="batchmean") for part in logits) / 2
    entropy = -(mean * mean.log()).sum(-1).mean()
    torch.testing.assert_close(consistency_loss(logits, y, 10.0), ce + 10 * kl + 0.5 * entropy)
    equal = logits[:1].expand(2, -1, -1)
    torch.testing.assert_close(consistency_loss(equal, y, 10.0, 0.0), F.cross_entropy(equal[0], y))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: known_dual(0.9, 0.9, sigma=0.0), "sigma"),
        (lambda: known_dual(0.9, 0.9).certify(torch.zeros(1, 1, 4, 4), generator=rng(), n0=0), "n0"),
        (lambda: known_dual(0.9, 0.9).certify(torch.zeros(1, 1, 4, 4), generator=rng(), n=0), "n must"),
        (lambda: known_dual(0.9, 0.9).certify(torch.zeros(1, 1, 4, 4), generator=rng(), alpha=1.0), "alpha"),
        (lambda: known_dual(0.9, 0.9).certify(torch.zeros(0, 1, 4, 4), generator=rng()), "empty"),
        (lambda: known_dual(0.9, 0.9).certify(torch.full((1, 1, 4, 4), math.nan), generator=rng()), "NaN"),
        (lambda: known_dual(0.9, 0.9).certify(torch.zeros(1, 1, 5, 4), generator=rng()), "masks split inputs"),
        (lambda: known_dual(0.9, 0.9).certify(torch.zeros(1, 1, 4, 4, dtype=torch.int64), generator=rng()), "floating"),
        (
            lambda: ds.DualSmoothedClassifier(
                tiny_net(3), tiny_net(4), sigma=1.0, num_classes=3, shape=(1, 8, 8)
            ).certify(torch.rand(1, 1, 8, 8), generator=rng()),
            "Both halves must give 3 classes",
        ),
        (lambda: ds.certify_dual(known_dual(0.9, 0.9), [], generator=rng()), "nothing to certify"),
        (lambda: ds.DualSmoothing(sigma=-1.0), "sigma"),
        (lambda: ds.DualSmoothing(partition="rows"), "partition"),  # type: ignore[arg-type]
        (lambda: ds.DualSmoothing().rebuild(tiny_net(), {}), "image shape"),
    ],
)
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()


# --- treatment ------------------------------------------------------------------------------------------------------


def easy_task(n=240, seed=0, dtype=torch.float32):
    """Three classes of smooth 8x8 images."""
    g = rng(seed)
    y = torch.arange(n) % 3
    centres = F.interpolate(torch.rand(3, 1, 2, 2, generator=rng(5)), size=(8, 8), mode="bilinear").to(dtype)
    x = (centres[y] + 0.1 * torch.randn(n, 1, 8, 8, generator=g).to(dtype)).clamp(0, 1)
    cut = (n // 2, 3 * n // 4)
    train, valid, test = (Split(x[a:b], y[a:b]) for a, b in pairwise((0, *cut, n)))
    return Task("smooth blobs", train, valid, test, 3, seed=seed)


def trained(task, **settings):
    net = tiny_net().to(task.train.x.dtype)
    settings = {"epochs": 6, "batch_size": 16, **settings}
    return fit(net, task, Training(epochs=6, batch_size=16, lr=3e-3), (ds.DualSmoothing(**settings),))


@pytest.mark.parametrize("partition", ["checkerboard", "left_right", "random"])
def test_treatment_trains_two_halves_and_rebuilds(partition):
    task = easy_task()
    run = trained(task, partition=partition, consistency_epochs=1)
    model = run.model
    assert isinstance(model, ds.DualSmoothedClassifier)
    assert not torch.equal(model.left.get_parameter("model.0.weight"), model.right.get_parameter("model.0.weight"))
    again = trained(task, partition=partition, consistency_epochs=1).model
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    treatment = run.treatments[0]
    json.dumps(treatment.settings())
    structure = json.loads(json.dumps(treatment.structure()))
    fresh = ds.DualSmoothing(**treatment.settings()).rebuild(tiny_net(seed=9), structure)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(task.test.x), model(task.test.x))
    back = ds.DualSmoothing(**treatment.settings())
    back.load_state_dict(treatment.state_dict())
    assert back.structure() == treatment.structure()


def test_treatment_is_accurate_in_float64_and_does_not_touch_what_it_was_given():
    task = easy_task(dtype=torch.float64)
    net = tiny_net().double()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    given = ds.DualSmoothing(epochs=6, batch_size=16)
    run = fit(net, task, Training(epochs=6, batch_size=16, lr=3e-3), (given,))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert given.shape_ is None
    assert (run.model(task.test.x).argmax(1) == task.test.y).double().mean() > 0.9
    assert run.model(task.test.x).dtype == torch.float64


def test_default_constructor_and_small_cnn_with_batch_norm():
    task = easy_task()
    treatment = ds.DualSmoothing(epochs=1)
    assert ds.DualSmoothing().settings()["sigma"] == 0.25
    run = fit(small_cnn((1, 8, 8), 3, widths=(4,)), task, Training(epochs=1), (treatment,))
    assert run.model(task.test.x).shape == (len(task.test), 3)


@pytest.mark.slow
def test_contracts():
    net = small_cnn((1, 8, 8), 3, widths=(4,), linear=0)
    check_treatment(ds.DualSmoothing(epochs=1), net, easy_task())
    check_treatment(ds.DualSmoothing(epochs=0, consistency_epochs=1, partition="random"), net, easy_task())


def test_treatment_refuses_what_has_no_pixels():
    split = Split(torch.rand(8, 5), torch.arange(8) % 2)
    with pytest.raises(Refused, match="index_split"):
        ds.DualSmoothing().check(nn.Linear(5, 2), Task("table", split, split, split, 2, modality="vector"))


@pytest.mark.slow
def test_trained_certificates_survive_attacks_on_the_smoothed_vote():
    """Every certified example is attacked along the smoothed gradient just inside its radius; the vote must hold."""
    task = easy_task(600)
    model = trained(task, epochs=6).model
    assert isinstance(model, ds.DualSmoothedClassifier)
    x, y = task.test.x, task.test.labels
    found = model.certify(x, generator=rng(1), n0=50, n=500)
    sure = ~found.abstained
    x, y, chosen, radius = x[sure], y[sure], found.prediction[sure], found.radius[sure].float().view(-1, 1, 1, 1)
    assert len(x) > 100
    attacked = 0
    for seed in range(4):
        g, z = rng(seed), x.clone()
        for _ in range(10):
            z.requires_grad_(True)
            noisy = z.unsqueeze(0) + model.sigma * torch.randn((16, *z.shape), generator=g)
            logits = model(noisy.flatten(0, 1)).unflatten(0, (16, len(z))).exp().mean(0)
            (grad,) = torch.autograd.grad(F.nll_loss(logits.clamp(min=1e-9).log(), chosen, reduction="sum"), z)
            with torch.no_grad():
                z = z + 0.4 * radius * grad / grad.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
                delta = z - x
                norm = delta.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
                z = x + delta * (0.99 * radius / norm)  # on the sphere just inside
        votes = model.vote_counts(z.detach(), 1000, generator=g).sum(0)
        assert torch.equal(votes.argmax(1), chosen)
        attacked += len(z)
    assert attacked >= 400
