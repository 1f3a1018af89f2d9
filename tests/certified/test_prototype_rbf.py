"""Classification by components: reasoning, the closed-form radius, attacks on it, losses, the treatment, the instrument."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from surefoot.certified import prototype_rbf as rbf
from surefoot.certified.prototype_rbf import CBCHead, ClassificationByComponents, ComponentLogits, PrototypeRBF
from surefoot.certified.prototype_rbf.training import find_head, last_linear, without
from surefoot.core.finding import Chart, Thumbnails
from surefoot.core.subject import Subject
from surefoot.core.task import Training
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput, Refused
from surefoot.models import Normalized, mlp, seeded_build, small_cnn, small_resnet
from surefoot.nn.lipschitz import lipschitz_bound
from surefoot.training.loop import accuracy, fit

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def random_head(seed: int, f: int = 5, k: int = 7, c: int = 4, **options) -> ClassificationByComponents:
    """Reasoning spread widely, so that both signs and large weights occur."""
    head = ClassificationByComponents(f, k, c, components=normal(k, f, seed=seed), scale=1.5, generator=generator(seed), **options).double()  # fmt: skip
    head.reasoning.logits.data = 2 * normal(*head.reasoning.logits.shape, seed=seed + 1)
    return head


# --------------------------------------------------------------------------------------------------- reasoning


@pytest.mark.parametrize("variant", ["prior", "cbc2019", "positive"])
def test_reasoning_is_a_distribution_and_p_a_probability(variant):
    head = random_head(0, variant=variant)
    present, absent = head.reasoning.strengths()
    assert torch.allclose((present + absent).sum(0), torch.ones(4, dtype=F64))
    assert present.min() >= 0
    assert absent.min() >= 0
    assert (absent.sum() == 0) == (variant == "positive")
    p = head(3 * normal(200, 5, seed=9))
    assert p.min() >= 0
    assert p.max() <= 1


def test_certain_reasoning_gives_probability_one():
    reasoning = rbf.Reasoning(6, 3).double()
    for row, detected in ((0, 1.0), (1, 0.0)):  # all positive and all there; all negative and none there
        reasoning.logits.data = torch.full((2, 6, 3), -1e3, dtype=F64)
        reasoning.logits.data[row] = 0.0
        p = reasoning(torch.full((6,), detected, dtype=F64))
        assert torch.allclose(p, torch.ones(3, dtype=F64))


def test_the_softmax_is_over_both_kinds_together():
    reasoning = rbf.Reasoning(4, 2, generator=generator(3)).double()
    flat = reasoning.logits.detach().reshape(8, 2).softmax(0)
    present, absent = reasoning.strengths()
    assert torch.equal(torch.cat([present, absent]), flat)
    over_components_only = reasoning.logits.detach().softmax(1)  # the mistake: sums to 2 a class
    assert not torch.allclose(over_components_only[0], present)


def test_init_is_the_published_one():
    logits = rbf.Reasoning(500, 20, generator=generator(0)).logits
    assert logits.mean().item() == pytest.approx(0.6, abs=4 * 0.2 / math.sqrt(logits.numel()))
    assert logits.std().item() == pytest.approx(0.2, rel=4 / math.sqrt(2 * logits.numel()))


def test_old_normalisation_makes_little_evidence_certain():
    """cbc2019: indefinite reasoning divides out, so a class with hardly any definite reasoning can be sure; the prior form cannot."""
    old = rbf.Reasoning(3, 2, variant="cbc2019").double()
    old.logits.data = torch.zeros(3, 3, 2, dtype=F64)
    old.logits.data[2] = 20.0  # indefinite about everything
    old.logits.data[0, 0, 0] = 10.0  # but for a trace of one component
    present, absent, _ = old.logits.detach().softmax(0)
    assert (present + absent)[:, 0].sum() < 1e-4
    assert old(torch.tensor([1.0, 0.3, 0.3], dtype=F64))[0] > 0.99


def test_explanation_adds_up():
    head, x = random_head(4), normal(10, 5, seed=5)
    why = head.explain(x)
    assert torch.allclose(why.positive.sum(1) + why.negative.sum(1), head(x))
    assert torch.allclose(why.positive + why.negative, why.positive.clamp_min(0) + why.negative.clamp_min(0))


# --------------------------------------------------------------------------------------------------- the radius


def test_worked_example():
    """A=.5, B=.2, C=.1, s=1: z=1.850781, radius .615608."""
    distances = -torch.tensor([[0.5, 0.2]], dtype=F64).log()
    weights, bias = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=F64), torch.tensor([0.1, 0.0], dtype=F64)
    radius = rbf.rbf_radius(distances, weights, bias, 1.0, torch.tensor([0])).item()
    assert radius == pytest.approx(0.615608, abs=1e-6)
    assert math.exp(radius) == pytest.approx(1.850781, abs=1e-6)
    assert rbf.rbf_radius(distances, weights, bias, 3.0, torch.tensor([0])).item() != pytest.approx(3 * radius)


def test_single_component_radius_is_s_ln_2d():
    """rho_y = 1, rho_c = 0: p_y = d, p_c = 1 - d, boundary d = .5."""
    d = torch.tensor([[0.9], [0.6], [0.5], [0.3]], dtype=F64)
    weights, bias = torch.tensor([[1.0, -1.0]], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    for s in (1.0, 2.5):
        radius = rbf.rbf_radius(-s * d.log(), weights, bias, s, torch.zeros(4, dtype=torch.int64))
        assert torch.allclose(radius, s * (2 * d[:, 0]).log())


def test_limits():
    """No harmful component: infinite if C > 0, or C = 0 with A > 0; a tie is 0; else s ln(-A/C)."""
    d = torch.full((1, 2), 0.5, dtype=F64)
    zero = torch.tensor([0])

    def radius(w0: float, c: float) -> float:
        weights = torch.tensor([[w0, 0.0], [0.0, 0.0]], dtype=F64)
        return rbf.rbf_radius(-d.log(), weights, torch.tensor([c, 0.0], dtype=F64), 1.0, zero).item()

    assert radius(1.0, 0.2) == math.inf
    assert radius(1.0, 0.0) == math.inf
    assert radius(0.0, 0.0) == 0.0
    assert radius(1.0, -0.2) == pytest.approx(math.log(0.5 / 0.2))
    assert radius(-1.0, 0.7) == pytest.approx(math.log(0.7 / 0.5))
    assert radius(-1.0, -0.1) == -math.inf
    assert radius(0.0, -0.1) == -math.inf


def test_closed_form_is_the_root_of_the_quadratic():
    for seed in range(5):
        head, x = random_head(seed), 2 * normal(60, 5, seed=seed + 50)
        y = torch.randint(4, (60,), generator=generator(seed))
        distances, (weights, bias) = head.distances(x), head.reasoning.linear()
        got, d = rbf.rbf_radius(distances, weights, bias, head.scale, y), head.detect(x)
        expected = torch.full((60,), math.inf, dtype=F64)
        for c in range(4):
            for i in (y != c).nonzero()[:, 0].tolist():
                row = weights[:, y[i]] - weights[:, c]
                a, b = (row.clamp_min(0) @ d[i]).item(), ((-row).clamp_min(0) @ d[i]).item()
                offset = (bias[y[i]] - bias[c]).item()
                z = (offset + math.sqrt(offset**2 + 4 * a * b)) / (2 * b)
                expected[i] = min(expected[i].item(), 1.5 * math.log(z))
        assert torch.allclose(got, expected, atol=1e-9)


def test_bisection_is_never_smaller_and_equal_where_it_should_be():
    for seed in range(4):
        head, x = random_head(seed), 4 * normal(80, 5, seed=seed + 20)
        y = head(x).argmax(1)
        args = (head.distances(x), *head.reasoning.linear(), head.scale, y)
        closed, bisected = rbf.rbf_radius(*args), rbf.rbf_radius(*args, method="bisect")
        assert (bisected >= closed - 1e-9).all()
        far = args[0].amin(1) >= bisected
        assert far.sum() > 5
        assert torch.allclose(closed[far], bisected[far], atol=1e-8)


def test_the_published_grouping_is_smaller():
    head, x = random_head(1), 2 * normal(300, 5, seed=2)
    report = rbf.cbc_radius(head, x)
    assert report.radius_paper is not None
    assert (report.radius_paper <= report.radius + 1e-12).all()
    assert (report.radius_paper < 0.9 * report.radius).double().mean() > 0.5


def attack(score, x: torch.Tensor, radius: torch.Tensor, y: torch.Tensor, restarts: int, steps: int) -> torch.Tensor:
    """bool [B]: whether L2 PGD on the margin within `radius` (one a point) ever changes the answer y."""
    broken = torch.zeros(len(x), dtype=torch.bool)
    for restart in range(restarts):
        step = normal(*x.shape, seed=restart + 100)
        delta = step / step.norm(dim=1, keepdim=True) * radius.unsqueeze(1)
        for i in range(steps):
            delta.requires_grad_()
            out = score(x + delta)
            own = out.gather(1, y.unsqueeze(1))
            other = out.scatter(1, y.unsqueeze(1), -torch.inf).amax(1, keepdim=True)
            broken |= (other >= own).squeeze(1)
            (g,) = torch.autograd.grad((other - own).sum(), delta)
            size = radius.unsqueeze(1) * (0.5 if i < steps // 2 else 0.05)
            delta = (delta + size * g / g.norm(dim=1, keepdim=True).clamp_min(1e-12)).detach()
            delta = delta * (radius.unsqueeze(1) / delta.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp(max=1)
    return broken


@pytest.mark.parametrize(("kernel", "method"), [("exp", "closed"), ("exp", "bisect"), ("gaussian", "bisect")])
def test_no_attack_within_the_radius_succeeds(kernel, method):
    tried = 0
    for seed in range(4):
        options = {"kernel": kernel, "variant": ("prior", "cbc2019", "positive", "prior")[seed]}
        head, x = random_head(seed, **options), 1.5 * normal(500, 5, seed=seed + 7)
        if seed == 3:
            head.log_scale = nn.Parameter(normal(7, seed=3) * 0.5)  # a scale a component: the smallest one counts
        report = rbf.cbc_radius(head, x, method=method)
        finite = report.radius.isfinite() & (report.radius > 0)
        radius = 0.999 * report.radius[finite]
        assert not attack(head, x[finite], radius, report.prediction[finite], 3, 25).any()
        tried += int(finite.sum())
        beyond = attack(head, x[finite], 6 * radius, report.prediction[finite], 2, 25)
        assert beyond.double().mean() > 0.1  # the attack is one that can succeed
    assert tried > 1500


@pytest.mark.slow
def test_ten_thousand_points_and_long_attacks():
    for seed in range(20):
        head, x = random_head(seed, f=8, k=10, c=5), 1.5 * normal(600, 8, seed=seed + 7)
        report = rbf.cbc_radius(head, x)
        good = report.radius.isfinite() & (report.radius > 0)
        assert not attack(head, x[good], 0.999 * report.radius[good], report.prediction[good], 4, 60).any()


def fixed_harm(dist, weights, bias, scale, y):
    """z = A / (B - C): as if an attacker could only move away from what speaks for the class."""
    d, best = torch.exp(-dist / scale), torch.full((len(y),), math.inf, dtype=F64)
    for c in range(weights.shape[1]):
        rows, offset = weights[:, y].T - weights[:, [c]].T, bias[y] - bias[c]
        z = (rows.clamp_min(0) * d).sum(1) / ((-rows).clamp_min(0) * d).sum(1).sub(offset).clamp_min(1e-9)
        best = torch.where(y == c, best, torch.minimum(best, scale.min() * z.log()))
    return best


PLANTED = {  # published or tempting mistakes, each of which the attack must break
    "squared distances in the linear formula": lambda dist, w, b, s, y: rbf.rbf_radius(dist.square(), w, b, s, y),
    "mean s": lambda dist, w, b, s, y: s.mean() / s.min() * rbf.rbf_radius(dist, w, b, s, y),
    "harmful detections held fixed": lambda dist, w, b, s, y: fixed_harm(dist, w, b, s, y),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_planted_mistakes_are_caught(mistake):
    head, x = random_head(2), 1.5 * normal(800, 5, seed=8)
    head.log_scale = nn.Parameter(normal(7, seed=3) * 0.7)
    y = head(x).argmax(1)
    wrong = PLANTED[mistake](head.distances(x), *head.reasoning.linear(), head.scale, y).detach()
    usable = wrong.isfinite() & (wrong > 0)
    assert attack(head, x[usable], 0.999 * wrong[usable], y[usable], 3, 30).any()


def test_the_radius_is_attained_where_everything_is_in_line():
    """Helpful components on one side, harmful ones on the other, all farther away than the radius: exact."""
    components = torch.tensor([[-2.0, 0], [-3.0, 0], [2.5, 0], [4.0, 0]], dtype=F64)
    head = ClassificationByComponents(2, 4, 2, components=components, scale=1.3).double()
    head.reasoning.logits.data = torch.tensor([[[3.0, -2], [2, -2], [-2, 3], [-2, 2]], [[-2.0, 1], [-2, 1], [1, -2], [1, -2]]], dtype=F64)  # fmt: skip
    x = torch.tensor([[-0.3, 0.0]], dtype=F64)
    report = rbf.cbc_radius(head, x)
    radius = report.radius.item()
    assert report.prediction.item() == 0
    assert 0 < radius < head.distances(x).min().item()
    for share, expected in ((1 - 1e-6, 0), (1 + 1e-6, 1)):
        moved = x + torch.tensor([[share * radius, 0.0]], dtype=F64)
        assert head(moved).argmax(1).item() == expected


def test_scaling_and_permuting():
    head, x = random_head(6), 2 * normal(50, 5, seed=7)
    before = rbf.cbc_radius(head, x).radius
    larger = random_head(6)
    larger.components.data *= 4
    larger.log_scale.data += math.log(4)
    assert torch.allclose(rbf.cbc_radius(larger, 4 * x).radius, 4 * before)
    order = torch.randperm(7, generator=generator(1))
    moved = random_head(6)
    moved.components.data, moved.reasoning.logits.data = moved.components.data[order], moved.reasoning.logits.data[:, order]  # fmt: skip
    assert torch.allclose(rbf.cbc_radius(moved, x).radius, before)
    assert torch.allclose(moved(x), head(x))


def test_the_rbf_path_is_the_same_function():
    head, x = random_head(8), normal(30, 5, seed=1)
    weights, bias = head.reasoning.linear()
    assert torch.allclose(head.detect(x) @ weights + bias, head(x))
    report = rbf.cbc_radius(head, x)
    direct = rbf.rbf_radius(head.distances(x), weights, bias, head.scale, report.prediction)
    assert torch.equal(direct.clamp_min(0), report.radius)
    free = normal(7, 4, seed=4), normal(4, seed=5)  # any RBF network, no sum to one
    y = (head.detect(x) @ free[0] + free[1]).argmax(1)
    radius = rbf.rbf_radius(head.distances(x), *free, head.scale, y).detach()
    some = radius.isfinite()
    assert some.sum() > 10
    score = lambda v: head.detect(v) @ free[0] + free[1]  # noqa: E731
    assert not attack(score, x[some], 0.999 * radius[some], y[some], 3, 30).any()


def test_detections_may_underflow():
    """dist / s of thousands: A and B are 0 in any float, their logarithms are not."""
    distances = torch.tensor([[5000.0, 5001.0]], dtype=F64)
    weights, bias = torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64)
    assert rbf.rbf_radius(distances, weights, bias, 1.0, torch.tensor([0])).item() == pytest.approx(
        0.5
    )  # (5001-5000)/2
    for offset, expected in ((1e-3, 5001 + math.log(1e-3)), (-1e-3, -(5000 + math.log(1e-3)))):
        got = rbf.rbf_radius(distances, weights, torch.tensor([offset, 0.0], dtype=F64), 1.0, torch.tensor([0])).item()
        assert got == pytest.approx(expected, rel=1e-9)


def test_float32_agrees_with_float64():
    head, x = random_head(3), 2 * normal(200, 5, seed=5)
    y = head(x).argmax(1)
    weights, bias = head.reasoning.linear()
    exact = rbf.rbf_radius(head.distances(x), weights, bias, head.scale, y)
    single = random_head(3).float()
    w32, b32 = single.reasoning.linear()
    rough = rbf.rbf_radius(single.distances(x.float()), w32, b32, single.scale, y)
    assert torch.allclose(rough.double(), exact, atol=2e-5)
    assert torch.allclose(single(x.float()).double(), head(x), atol=1e-6)


# --------------------------------------------------------------------------------------------------- gradients, losses


def test_gradient_of_the_radius_is_that_of_finite_differences():
    x = normal(4, 5, seed=3)
    y = torch.tensor([0, 1, 2, 3])

    def radius(components, logits, log_scale):
        head = random_head(1)
        distances = torch.cdist(x, components, compute_mode="donot_use_mm_for_euclid_dist")
        flat = logits.flatten(0, 1).softmax(0).view_as(logits)
        assert flat.shape == head.reasoning.logits.shape
        return rbf.rbf_radius(distances, flat[0] - flat[1], flat[1].sum(0), log_scale.exp(), y)

    start = random_head(1)
    inputs = [t.detach().requires_grad_() for t in (start.components, start.reasoning.logits, start.log_scale)]
    assert torch.autograd.gradcheck(radius, inputs, atol=1e-6)


@pytest.mark.parametrize("variant", ["prior", "cbc2019", "positive"])
@pytest.mark.parametrize("loss", ["margin", "robust"])
def test_gradients_are_finite_whatever_the_point(variant, loss):
    head = random_head(5, variant=variant).float()
    x = torch.cat(
        [head.components.detach(), 1e4 * torch.ones(2, 5), torch.zeros(3, 5)]
    )  # on components, far away, anywhere
    y = torch.arange(len(x)) % 4
    value = rbf.CBCMarginLoss(0.2)(head(x), y) if loss == "margin" else rbf.CBCRobustLoss(0.5)(head, x, y)
    value.backward()
    assert torch.isfinite(value)
    for p in head.parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all()
    assert head.components.grad is not None
    assert head.components.grad.abs().sum() > 0


def test_the_row_of_the_class_itself_would_poison_the_gradient():
    """A = B = C = 0 in the row c = y: sqrt'(0), even masked afterwards, is NaN; that is why the row is left out."""
    a = torch.zeros(1, dtype=F64, requires_grad=True)
    masked = torch.where(torch.tensor([True]), torch.zeros(1, dtype=F64), (a**2 + 4 * a).sqrt())
    assert torch.autograd.grad(masked.sum(), a)[0].isnan().all()


def test_margin_loss():
    p = torch.tensor([[0.7, 0.5, 0.2], [0.3, 0.6, 0.1]])
    loss = rbf.CBCMarginLoss(0.3)(p, torch.tensor([0, 0]))
    assert loss.item() == pytest.approx((0.1 + 0.6) / 2)


def test_robust_loss_is_zero_once_the_radius_is_reached_and_bounded_below():
    head = random_head(2)
    x = 0.3 * normal(100, 5, seed=1)
    report = rbf.cbc_radius(head, x)
    some = report.radius > 0.1
    assert rbf.CBCRobustLoss(0.05)(head, x[some], report.prediction[some]).item() == 0
    wrong = (report.prediction + 1) % 4
    assert rbf.CBCRobustLoss(0.05, margin=0.1)(head, x, wrong).item() <= 2 * 0.05 + 1.1


def test_robustness_loss_enlarges_the_radius():
    task = digits(911, sizes=(500, 100, 300))
    x, y = task.train.x.flatten(1), task.train.labels
    test = task.test.x.flatten(1), task.test.labels
    results = {}
    for name in ("margin", "robust"):
        head = ClassificationByComponents.from_data(x, y, 10, per_class=2, generator=generator(0))
        optimizer = torch.optim.Adam(head.parameters(), 0.03)
        for step in range(120):
            pick = torch.randperm(500, generator=generator(step))[:100]
            robust = name == "robust" and step >= 60
            loss = rbf.CBCRobustLoss(1.0)(head, x[pick], y[pick]) if robust else rbf.CBCMarginLoss()(head(x[pick]), y[pick])  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results[name] = rbf.certify_prototypes(head, [test], radii=(0.25, 0.5))
    assert results["robust"].report.radius.mean() > 1.1 * results["margin"].report.radius.mean()
    assert results["robust"].accuracy > 0.85


# --------------------------------------------------------------------------------------------------- starting from data


def test_from_data_starts_at_the_classes():
    x = torch.cat([normal(30, 3, seed=c) * 0.1 + 4 * c for c in range(3)])
    y = torch.arange(3).repeat_interleave(30)
    head = ClassificationByComponents.from_data(x, y, 3, per_class=2, generator=generator(0))
    assert head.components.shape == (6, 3)
    nearest = torch.cdist(head.components, torch.tensor([[0.0], [4.0], [8.0]], dtype=F64).expand(3, 3)).argmin(1)
    assert nearest.tolist() == [0, 0, 1, 1, 2, 2]
    expected = torch.cdist(x, head.components).amin(1).median()
    assert head.scale.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (head(x).argmax(1) == y).double().mean() > 0.9  # the bonus alone classifies clean clusters
    one = ClassificationByComponents.from_data(
        x, y, 3, per_class=30, generator=generator(0)
    )  # every sample a component
    one(x).sum().backward()
    assert one.components.grad is not None and torch.isfinite(one.components.grad).all()


def test_kmeans_is_seeded_and_finds_clusters():
    x = torch.cat([normal(50, 2, seed=s) * 0.05 + torch.tensor(c, dtype=F64) for s, c in enumerate([[0, 0], [5, 0], [0, 5]])])  # fmt: skip
    first, second = (rbf.kmeans(x, 3, generator=generator(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert (torch.cdist(torch.tensor([[0.0, 0], [5, 0], [0, 5]], dtype=F64), first).amin(1) < 0.1).all()


# --------------------------------------------------------------------------------------------------- the deep head


def test_deep_head():
    features = normal(6, 5, 3, 4)
    head = CBCHead(5, 3, generator=generator(1)).double()
    d = head.detect(features)
    assert torch.allclose(d, torch.softmax(features, 1).amax((2, 3)))
    why = head.explain(features)
    assert torch.allclose(why.positive.sum(1) + why.negative.sum(1), head(features))
    clamped = CBCHead(5, 3, clamp=0.3, generator=generator(1)).double().eval()
    assert torch.equal(clamped.detect(features), d.where(d >= 0.3, 0.0))
    assert torch.equal(clamped.train().detect(features), d)
    with pytest.raises(Refused, match="clamp"):
        rbf.cbc_radius(clamped, features, feature_space=True)


def test_deep_radius_survives_attacks_in_feature_space():
    head = CBCHead(5, 4, generator=generator(1)).double()
    head.reasoning.logits.data = 2 * normal(2, 5, 4, seed=3)
    features = 2 * normal(600, 5, 2, 2, seed=4)
    report = rbf.cbc_radius(head, features)
    good = report.radius > 0
    assert good.double().mean() > 0.95
    score = lambda v: head(v.reshape(-1, 5, 2, 2))  # noqa: E731
    flat = features.flatten(1)
    assert not attack(score, flat[good], 0.999 * report.radius[good], report.prediction[good], 3, 30).any()
    assert attack(score, flat[good], 8 * report.radius[good], report.prediction[good], 2, 30).double().mean() > 0.1


def test_pretraining_losses():
    z = torch.softmax(normal(4, 6, 3, 3), 1)
    certain = torch.nn.functional.one_hot(torch.zeros(4, 3, 3, dtype=torch.int64), 6).permute(0, 3, 1, 2).double()
    assert rbf.alignment_loss(certain, certain).item() == pytest.approx(0, abs=1e-9)
    assert rbf.alignment_loss(z, z).item() == pytest.approx(-(z * z).sum(1).log().mean().item())
    assert rbf.presence_loss(torch.full((50, 6), 1.0)).item() == pytest.approx(0, abs=1e-6)
    assert rbf.presence_loss(torch.full((1, 6), 0.5)).item() == pytest.approx(-math.log(math.tanh(0.5)))


def test_deep_head_trains_on_a_backbone():
    task = digits(912, sizes=(500, 100, 300))
    body = seeded_build(lambda: small_cnn((1, 8, 8), 10, widths=(16, 24)), generator(2))[:6]
    model: Any = nn.Sequential(body, CBCHead(24, 10, generator=generator(1)))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(200):
        pick = torch.randperm(500, generator=generator(step))[:100]
        x, y = task.train.x[pick], task.train.labels[pick]
        shifted = (x + 0.05 * torch.randn(x.shape, generator=generator(step))).clamp(0, 1)
        maps = [model[1].maps(model[0](v)) for v in (x, shifted)]
        loss = rbf.CBCMarginLoss(0.05)(model[1].reasoning(maps[0].amax((2, 3))), y)
        loss = loss + (0.05 * rbf.alignment_loss(*maps) + 0.2 * rbf.presence_loss(maps[0].amax((2, 3))) if step < 60 else 0)  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert accuracy(model, task.test.x, task.test.labels) > 0.8


# --------------------------------------------------------------------------------------------------- behind a backbone


def test_a_radius_of_features_is_not_passed_off_as_one_of_inputs():
    backbone = Normalized(nn.Flatten(), [0.3], [0.2])
    head, x = random_head(0, f=4), torch.rand(50, 1, 2, 2, generator=generator(1), dtype=F64)
    with pytest.raises(Refused, match="features"):
        rbf.cbc_radius(head, x, backbone=backbone)
    features = rbf.cbc_radius(head, x, backbone=backbone, feature_space=True)
    constant = lipschitz_bound(backbone, x)
    inputs = rbf.cbc_radius(head, x, backbone=backbone, lipschitz=constant)
    assert constant == pytest.approx(5.0)
    assert torch.allclose(inputs.radius, features.radius / 5)
    assert (features.space, inputs.space) == ("feature", "input")
    score = lambda v: head(backbone.double()(v.reshape(-1, 1, 2, 2)))  # noqa: E731
    args = (x.flatten(1), 0.999 * inputs.radius, inputs.prediction, 2, 30)
    assert not attack(score, *args).any()
    assert attack(score, x.flatten(1), 0.999 * features.radius, inputs.prediction, 2, 30).any()  # the mistake


RECIPE = Training(epochs=8, lr=3e-3)


@pytest.mark.parametrize("net", ["cnn", "mlp", "resnet"])
def test_treatment_on_models_of_any_shape(net):
    task = digits(913, sizes=(600, 100, 300))
    nets = {"cnn": small_cnn, "mlp": mlp, "resnet": lambda s, c: small_resnet(s, c, widths=(8, 16))}
    model = seeded_build(lambda: nets[net]((1, 8, 8), 10), generator(0))
    run = fit(model, task, RECIPE, [PrototypeRBF()])
    assert find_head(run.model) is not None
    assert accuracy(run.model, task.test.x, task.test.labels) > 0.8
    assert run.model(task.test.x).exp().sum(1).max() <= 10


def test_treated_deep_model_is_certified_in_pixels_and_not_broken():
    task = digits(914, sizes=(600, 100, 300))
    model = seeded_build(lambda: mlp((1, 8, 8), 10, hidden=(16,)), generator(0))
    treated = fit(model, task, RECIPE, [PrototypeRBF(per_class=1)]).model.double()
    found = find_head(treated)
    assert found is not None
    backbone, x = without(treated, found[0]), task.test.x.double()
    report = rbf.cbc_radius(found[1], x, backbone=backbone, lipschitz=lipschitz_bound(backbone, x[:1]))
    score = lambda v: treated(v.reshape(-1, 1, 8, 8))  # noqa: E731
    assert report.radius.median() > 0
    assert not attack(score, x.flatten(1), 0.999 * report.radius, report.prediction, 2, 20).any()


def test_shallow_treatment_with_the_robustness_loss():
    task = digits(915, sizes=(600, 100, 300))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    radii = []
    for target in (0.0, 1.0):
        run = fit(model, task, Training(epochs=12, lr=0.03), [PrototypeRBF(target_radius=target)])
        found = find_head(run.model)
        assert found is not None
        radii.append(rbf.cbc_radius(found[1], task.test.x.flatten(1), task.test.labels).radius.mean())
    assert radii[1] > 1.1 * radii[0]
    with pytest.raises(Refused, match="larger features"):
        fit(mlp((1, 8, 8), 10, hidden=(8,)), task, RECIPE, [PrototypeRBF(target_radius=1.0)])


def test_instrument_draws_components_and_names_the_space():
    task = digits(916, sizes=(400, 100, 200)).changed(budget="quick")
    shallow = Normalized(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), [0.3], [0.4])
    run = fit(shallow, task, Training(epochs=6, lr=0.03), [PrototypeRBF()])
    subject = Subject(run.model, "digits", "image", (1, 8, 8), 10)
    finding = rbf.Components().measure(subject, task)
    thumbnails, heat, curve = finding.pictures
    assert isinstance(thumbnails, Thumbnails) and isinstance(heat, Chart) and isinstance(curve, Chart)
    assert thumbnails.images.shape == (20, 8, 8)
    assert "pixels" in thumbnails.caption
    assert len(heat.figure["data"][0]["z"]) == 10
    assert curve.figure["data"][0]["y"][0] == pytest.approx(finding.parts[0].value)
    assert finding.details["lipschitz"] == pytest.approx(2.5, rel=1e-5)
    assert finding.unit == "L2"
    deep = fit(small_cnn((1, 8, 8), 10), task, Training(epochs=2), [PrototypeRBF()]).model
    assert "seen in most" in rbf.Components().measure(subject.with_model(deep), task).pictures[0].caption
    plain = small_cnn((1, 8, 8), 10)
    assert "has none" in (rbf.Components().unfit(subject.with_model(plain), task) or "")
    behind = nn.Sequential(run.model, nn.Softmax(1))
    assert "stands behind" in (rbf.Components().unfit(subject.with_model(behind), task) or "")
    attention = nn.Sequential(nn.Flatten(), nn.Softmax(1), ComponentLogits(random_head(0, f=64, c=10).float()))
    unknown = rbf.Components().measure(subject.with_model(attention), task)
    assert unknown.unit == "L2 of features"
    assert "nothing about inputs" in unknown.warnings[0]


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ClassificationByComponents(3, 0, 2), "num_components"),
        (lambda: ClassificationByComponents(3, 2, 2, scale=0.0), "scale"),
        (lambda: ClassificationByComponents(3, 2, 2, scale=torch.ones(5)), "scale"),
        (lambda: ClassificationByComponents(3, 2, 2, components=torch.ones(2, 4)), "components"),
        (lambda: ClassificationByComponents(3, 2, 2, kernel="box"), "kernel"),  # type: ignore[arg-type]
        (lambda: ClassificationByComponents(3, 2, 2)(torch.ones(2, 3, dtype=torch.int64)), "floats"),
        (lambda: ClassificationByComponents(4, 2, 2)(torch.ones(2, 1, 2, 2)), "flatten"),
        (lambda: ClassificationByComponents.from_data(torch.rand(4, 3), torch.tensor([0, 0, 1, 1]), 3), "Class 2"),
        (lambda: ClassificationByComponents.from_data(torch.rand(4, 3), torch.tensor([0, 0, 1, 1]), 2, per_class=3), "at least as many"),
        (lambda: ClassificationByComponents.from_data(torch.rand(4, 1, 3), torch.tensor([0, 0, 1, 1]), 2), "flatten"),
        (lambda: rbf.rbf_radius(torch.full((1, 2), math.nan), torch.eye(2), torch.zeros(2), 1.0, torch.tensor([0])), "finite"),
        (lambda: rbf.rbf_radius(torch.ones(1, 2), torch.eye(2), torch.zeros(2), -1.0, torch.tensor([0])), "scale"),
        (lambda: rbf.rbf_radius(torch.ones(1, 2), torch.eye(2), torch.zeros(2), 1.0, torch.tensor([2])), "y must"),
        (lambda: rbf.rbf_radius(torch.ones(1, 2), torch.eye(2), torch.zeros(2), 1.0, torch.tensor([0]), kernel="gaussian"), "bisect"),
        (lambda: rbf.cbc_radius(ClassificationByComponents(3, 2, 2), torch.full((1, 3), math.nan)), "finite"),
        (lambda: rbf.certify_prototypes(ClassificationByComponents(3, 2, 2), []), "no batches"),
        (lambda: CBCHead(4, 2)(torch.rand(2, 5, 3, 3)), "feature maps"),
        (lambda: rbf.CBCMarginLoss(0.0), "margin"),
        (lambda: rbf.CBCRobustLoss(-1.0), "target_radius"),
        (lambda: PrototypeRBF(per_class=0), "per_class"),
        (lambda: PrototypeRBF(kernel="gaussian", target_radius=1.0), "closed form"),
    ],
)  # fmt: skip
def test_bad_input(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()


def test_wrong_models_are_refused():
    with pytest.raises(Refused, match="no head"):
        rbf.cbc_radius(nn.Linear(3, 2), torch.rand(2, 3))
    with pytest.raises(Refused, match="linear layer"):
        last_linear(nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Softmax(1)), torch.rand(2, 1, 2, 2))
    with pytest.raises(Refused, match="closed form"):
        rbf.CBCRobustLoss(1.0)(ClassificationByComponents(3, 2, 2, kernel="gaussian"), torch.rand(2, 3), torch.tensor([0, 1]))  # fmt: skip


# --------------------------------------------------------------------------------------------------- what a slip would change


def test_limits_of_bisection():
    """The same limits as the closed form's; where the answer is wrong, 0. Never above the truth: what it gives still has a margin."""
    d = torch.full((1, 2), 0.5, dtype=F64)
    zero = torch.tensor([0])

    def radius(w0: float, c: float) -> float:
        weights = torch.tensor([[w0, 0.0], [0.0, 0.0]], dtype=F64)
        bias = torch.tensor([c, 0.0], dtype=F64)
        return rbf.rbf_radius(-d.log(), weights, bias, 1.0, zero, method="bisect").item()

    assert radius(1.0, 0.2) == math.inf
    assert radius(1.0, 0.0) == math.inf
    assert radius(0.0, 0.0) == 0.0
    assert radius(-1.0, 1.2) == math.inf  # even d = 1 leaves a margin
    assert radius(1.0, -0.2) == pytest.approx(math.log(0.5 / 0.2))
    assert radius(1.0, -0.6) == 0.0
    assert radius(-1.0, -0.1) == 0.0
    assert radius(-1.0, 1.0) == pytest.approx(-math.log(0.5))  # reached where d = 1, at the component itself
    head, x = random_head(3), 2 * normal(300, 5, seed=5)
    report = rbf.cbc_radius(head, x, method="bisect")
    finite = report.radius.isfinite() & (report.radius > 0)
    rows = head.reasoning.linear()
    for i in finite.nonzero().flatten()[:40].tolist():
        t, y, dist = report.radius[i], int(report.prediction[i]), head.distances(x[i : i + 1])[0]
        margins = []
        for c in (k for k in range(4) if k != y):
            gap = rows[0][:, y] - rows[0][:, c]
            reached = torch.where(gap > 0, dist + t, (dist - t).clamp(min=0))
            margins.append(((gap * torch.exp(-reached / 1.5)).sum() + rows[1][y] - rows[1][c]).item())
        assert -1e-12 < min(margins) < 1e-9


def test_certificates_read_the_evaluated_backbone_in_float64():
    body: Any = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    body[1].running_mean.fill_(0.7)
    body[1].running_var.fill_(9.0)
    head, x = random_head(0).float(), torch.randn(30, 4, generator=generator(1))
    kept = copy.deepcopy(body.state_dict())
    still = rbf.cbc_radius(head, x, backbone=body.eval(), feature_space=True)
    moving = rbf.cbc_radius(head, x, backbone=body.train(), feature_space=True)
    assert torch.equal(still.radius, moving.radius) and body.training
    assert all(torch.equal(v, kept[k]) for k, v in body.state_dict().items())
    exact = copy.deepcopy(head).double()
    assert next(head.parameters()).dtype == torch.float32
    features = copy.deepcopy(body).double().eval()(x.double())
    assert torch.equal(still.radius, rbf.cbc_radius(exact, features).radius)
    assert still.radius.dtype == F64 and bool((still.radius.float().double() != still.radius).any())


def test_the_space_of_a_deep_head_is_that_of_its_features():
    head, maps = CBCHead(4, 3), torch.rand(5, 4, 2, 2)
    assert rbf.cbc_radius(head, maps).space == "feature"
    assert rbf.cbc_radius(head, maps, backbone=nn.Identity(), lipschitz=1.0).space == "input"
    assert rbf.cbc_radius(random_head(0), normal(3, 5)).space == "input"


def test_certified_accuracy_counts_right_answers_only():
    head, x = random_head(1), 2 * normal(200, 5, seed=2)
    y = torch.randint(4, (200,), generator=generator(0))
    report = rbf.cbc_radius(head, x, y)
    assert report.certified(0.0) == (head(x).argmax(1) == y).double().mean().item()
    assert (report.radius[~report.correct] == 0).all() and (report.signed[~report.correct] <= 0).all()


def test_robust_loss_by_hand():
    """max(0, gamma - radius) cut at 2 gamma; points that are wrong add their margin loss."""
    head, x = random_head(2), 0.8 * normal(60, 5, seed=1)
    y = torch.randint(4, (60,), generator=generator(1))
    signed = rbf.rbf_radius(head.distances(x), *head.reasoning.linear(), head.scale, y)
    gamma, total, p = 0.3, 0.0, head(x)
    assert (signed > gamma).any() and (signed < -gamma).any() and ((signed < 0) & (signed > -gamma)).any()
    for i in range(60):
        total += min(max(gamma - signed[i].item(), 0.0), 2 * gamma)
        if signed[i] <= 0:
            own = p[i, y[i]].item()
            total += max(max(p[i, k].item() for k in range(4) if k != y[i]) - own + 0.2, 0.0)
    assert rbf.CBCRobustLoss(gamma, margin=0.2)(head, x, y).item() == pytest.approx(total / 60)


def test_alignment_holds_one_view_fixed():
    first, second = (torch.softmax(normal(2, 4, 3, 3, seed=s), 1).requires_grad_() for s in (0, 1))
    rbf.alignment_loss(first, second).backward()
    expected = -second.detach() / (first * second).sum(1, keepdim=True).detach() / (2 * 9) / 2
    assert first.grad is not None and torch.allclose(first.grad, expected)
    seen = torch.rand(5, 3, generator=generator(0), dtype=F64)
    assert rbf.presence_loss(seen).item() == pytest.approx(-seen.sum(0).tanh().log().mean().item())  # sum, not mean


def test_seeds_of_kmeans_are_drawn_by_squared_distance():
    """From 0, points at 1 and 3 are taken as 1 : 9, not 1 : 3."""
    x, far = torch.tensor([[0.0], [1.0], [3.0]]), 0
    for seed in range(600):
        first = rbf.kmeans(x, 2, generator=generator(seed), rounds=1).flatten().sort().values
        far += first.tolist() == [0.5, 3.0]  # 0 and 3 as seeds, or 1 and 3; then 0 and 1 share one
    # the seeds (0, 1) end in [0, 2]; 1/3 of 1/10 begin at 0, and as many at 1 (1 : 4), none at 3 stay apart
    expected = 1 - (1 / 3) * (1 / 10) - (1 / 3) * (1 / 5)
    assert far / 600 == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 600))


def test_treatment_uses_its_settings(monkeypatch):
    from surefoot.certified.prototype_rbf import training as module

    task = digits(917, sizes=(120, 40, 60))
    model: Any = seeded_build(lambda: small_cnn((1, 8, 8), 10, widths=(4, 8)), generator(0))
    treatment = PrototypeRBF(kernel="gaussian", variant="positive", per_class=1, margin=0.3, bonus=1.0)
    changed, _ = treatment.prepare(model, task)
    found = find_head(changed)
    assert found is not None
    head: Any = found[1].head
    assert (head.kernel, head.reasoning.variant, len(head.components)) == ("gaussian", "positive", 10)
    batch: Any = type("Batch", (), {"x": task.train.x, "y": task.train.labels, "step": 0, "steps": 10})()
    p = changed(task.train.x).exp()
    assert torch.allclose(treatment.loss(changed, batch), rbf.CBCMarginLoss(0.3)(p, task.train.labels))
    body = without(changed.eval(), found[0])
    gap = [torch.cdist(module._training_features(body, task.train.x), head.components).amin(1).median().item()]
    gap.append(torch.cdist(body(task.train.x), head.components).amin(1).median().item())
    assert gap[0] < gap[1]  # components lie where the features of training batches are, not of fresh running statistics
    shallow = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    late = PrototypeRBF(target_radius=1.0, robust=0.4)
    wrapped, _ = late.prepare(shallow, task)
    kinds = []
    monkeypatch.setattr(module.CBCRobustLoss, "forward", lambda self, head, x, y: kinds.append("robust") or head(x).sum())  # fmt: skip
    monkeypatch.setattr(module.CBCMarginLoss, "forward", lambda self, p, y: kinds.append("margin") or p.sum())
    for step in range(10):
        batch.step = step
        late.loss(wrapped, batch)
    assert kinds == ["margin"] * 6 + ["robust"] * 4


def test_the_instruments_numbers_are_those_of_the_certificate():
    task = digits(918, sizes=(300, 60, 120)).changed(budget="quick")
    shallow = Normalized(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), [0.3], [0.4])
    model: Any = fit(shallow, task, Training(epochs=3, lr=0.03), [PrototypeRBF(per_class=1)]).model
    finding = rbf.Components(radii=(0.05, 0.2)).measure(Subject(model, "d", "image", (1, 8, 8), 10), task)
    split, found = task.sample("components", 100), find_head(model)
    assert found is not None
    x: Any = (split.x.double().flatten(1) - 0.3) / 0.4
    report = rbf.cbc_radius(found[1], x, split.labels)
    radius = report.radius * 0.4  # a normalised distance is 1/0.4 of a pixel's
    assert finding.value == pytest.approx(radius.mean().item(), rel=1e-5)
    for part, r in zip(finding.parts[1:], (0.05, 0.2), strict=True):
        assert part.value == pytest.approx((report.correct & (radius >= r)).double().mean().item())
    assert finding.details["mean_radius_paper"] == pytest.approx(0.4 * report.radius_paper.mean().item(), rel=1e-5)  # type: ignore[union-attr]  # fmt: skip
    assert 0 < finding.parts[2].value < finding.parts[1].value < finding.parts[0].value
    head: Any = found[1].head
    present, absent = head.reasoning.strengths()
    most = (present + absent).amax(1).argmax()
    pixels = (head.components[most].detach().double() * 0.4 + 0.3).clamp(0, 1).view(8, 8)
    picture: Any = finding.pictures[0]
    drawn = torch.from_numpy(picture.images[0]).double()
    assert (drawn - (255 * pixels).round()).abs().max() <= 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ClassificationByComponents.from_data(torch.rand(4, 3), torch.tensor([0, 0, 1, 2]), 2), r"\[0, 2\)"),
        (lambda: ClassificationByComponents.from_data(torch.rand(4, 3), torch.tensor([0, 0, 1]), 2), "per row"),
        (lambda: ClassificationByComponents.from_data(torch.rand(4, 3), torch.rand(4), 2), "int64"),
        (lambda: rbf.rbf_radius(torch.ones(1, 2), torch.eye(2) * math.nan, torch.zeros(2), 1.0, torch.tensor([0])), "weights"),
    ],
)  # fmt: skip
def test_more_bad_input(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()


def test_a_probability_of_zero_has_a_finite_logarithm():
    class Zero(CBCHead):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(features), 3)

    assert torch.isfinite(ComponentLogits(Zero(4, 3))(torch.rand(2, 4, 1, 1))).all()


def test_of_several_scales_the_smallest_counts():
    """A = .5, B = .2, C = .1 with s = 1 and 3: ln 1.850781 times 1, and not times 2 or 3."""
    scale = torch.tensor([1.0, 3.0], dtype=F64)
    distances = -torch.tensor([[0.5, 0.2]], dtype=F64).log() * scale
    weights, bias = torch.eye(2, dtype=F64), torch.tensor([0.1, 0.0], dtype=F64)
    assert rbf.rbf_radius(distances, weights, bias, scale, torch.tensor([0])).item() == pytest.approx(
        0.615608, abs=1e-6
    )
