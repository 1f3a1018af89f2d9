"""Exact numbers, ingredients and refusals of fast certified training, and an attack on what it certifies."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from surefoot.certified import fast_ibp as ibp
from surefoot.certified.fast_ibp import FastIBP
from surefoot.contracts import check_treatment
from surefoot.core.task import Training
from surefoot.core.treatment import Batch
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput, Refused, SurefootError
from surefoot.models import mlp, seeded_build, small_cnn, small_resnet
from surefoot.nn.bounds import Bounds, Box, Program, Rectifier, Step, propagate, region_around, verified
from surefoot.training.loop import accuracy, fit


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(factory, seed: int = 0) -> nn.Module:
    return seeded_build(factory, generator(seed))


# --------------------------------------------------------------------------------------------------- initialisation


def test_standard_deviations_of_the_initialisation():
    model: Any = built(lambda: mlp((784,), 10, hidden=(3000, 64)))
    ibp.init_ibp_(model, generator=generator(0))
    n = model[1].weight.numel()
    assert model[1].weight.std().item() == pytest.approx(0.0031972, rel=4 / math.sqrt(2 * n))
    assert math.sqrt(2 * math.pi) / 784 == pytest.approx(0.0031972, rel=1e-4)
    conv: Any = built(lambda: nn.Sequential(nn.Conv2d(64, 256, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)))
    ibp.init_ibp_(conv, generator=generator(0))
    n = conv[0].weight.numel()
    assert conv[0].weight.std().item() == pytest.approx(0.0043518, rel=4 / math.sqrt(2 * n))


def radii(model: nn.Module, width: int) -> list[float]:
    centre = torch.zeros(1, width)
    walked = propagate(Program(model), Box(centre - 1, centre + 1))
    return [box.radius.mean().item() for _, box in walked.rectifiers]


def test_radius_keeps_its_size_under_the_initialisation_and_explodes_under_he():
    model: Any = built(lambda: mlp((512,), 10, hidden=(512,) * 7))
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=generator(1))
            nn.init.zeros_(module.bias)
    he = radii(model, 512)
    ibp.init_ibp_(model, generator=generator(0))
    ours = radii(model, 512)
    assert all(abs(r - 2.0) <= 0.15 for r in ours)
    assert all(abs(b / a - 1) <= 0.05 for a, b in itertools.pairwise(ours))
    assert all(b / a == pytest.approx(math.sqrt(512 / math.pi), rel=0.05) for a, b in itertools.pairwise(he))
    assert he[-1] / ours[-1] > 100


def test_classifier_and_biases_stay_bit_identical():
    model: Any = built(lambda: small_cnn((1, 8, 8), 10))
    last, bias = model[-1].weight.clone(), model[-3].bias.clone()
    first = model[0].weight.clone()
    ibp.init_ibp_(model, generator=generator(0))
    assert torch.equal(model[-1].weight, last)
    assert torch.equal(model[-3].bias, bias)
    assert not torch.equal(model[0].weight, first)
    ibp.init_ibp_(model, generator=generator(0), skip_last=False)
    assert not torch.equal(model[-1].weight, last)


class Join(nn.Module):
    """y = x + g(x), ReLU, convolution; `between` stands behind the join."""

    def __init__(self, between: nn.Module):
        super().__init__()
        self.g, self.after, self.between = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 64, 3), between
        self.plain = nn.Conv2d(64, 64, 3)
        self.out = nn.Linear(64 * 4, 3)

    def forward(self, x):
        x = self.between(torch.relu(x + self.g(x)))
        return self.out(torch.relu(self.plain(torch.relu(self.after(x)))).flatten(1))


@pytest.mark.parametrize("between", [nn.Identity(), nn.BatchNorm2d(16), nn.AvgPool2d(1)])
def test_half_weights_behind_a_join(between):
    model: Any = built(lambda: Join(between))
    full = math.sqrt(2 * math.pi) / (16 * 9)
    ibp.init_ibp_(model, generator=generator(0))
    margin = 4 / math.sqrt(2 * model.after.weight.numel())
    assert model.after.weight.std().item() == pytest.approx(full / 2, rel=margin)
    assert model.g.weight.std().item() == pytest.approx(full, rel=4 / math.sqrt(2 * model.g.weight.numel()))
    assert model.plain.weight.std().item() == pytest.approx(math.sqrt(2 * math.pi) / (64 * 9), rel=0.05)
    ibp.init_ibp_(model, generator=generator(0), halve_after_add=False)
    assert model.after.weight.std().item() == pytest.approx(full, rel=margin)


def test_residual_reference_net_is_halved_behind_its_blocks():
    model: Any = built(lambda: small_resnet((1, 8, 8), 10, widths=(16, 32)))
    ibp.init_ibp_(model, generator=generator(0))
    for conv in (model[4].branch[0], model[4].skip):
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 * math.pi) / conv.weight[0].numel() / 2, rel=0.15)


def test_batch_norm_behind_every_affine_layer_but_the_classifier():
    plain = built(lambda: ibp.cnn7(1, 8, width=4, linear_size=16, batch_norm=False))
    model = ibp.add_batchnorm(copy.deepcopy(plain))
    kinds = [type(m) for m in model.modules() if isinstance(m, ibp.AFFINE + ibp.NORMS)]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d] * 5 + [nn.Linear, nn.BatchNorm1d, nn.Linear]
    again = ibp.add_batchnorm(copy.deepcopy(model))
    assert list(again.state_dict()) == list(model.state_dict())
    x = torch.rand(3, 1, 8, 8, generator=generator(0))
    assert torch.allclose(
        model.eval()(x), plain(x), atol=1e-4
    )  # fresh running statistics: a factor of 1/sqrt(1 + 1e-5)


def test_cnn7_has_the_papers_layers():
    model = built(lambda: ibp.cnn7(3, 32))
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convs] == [64, 64, 128, 128, 128]
    assert [c.stride for c in convs] == [(1, 1), (1, 1), (2, 2), (1, 1), (1, 1)]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert built(lambda: ibp.cnn7(1, 9, width=2))(torch.zeros(2, 1, 9, 9)).shape == (2, 10)


# --------------------------------------------------------------------------------------------------- schedule


def test_smoothed_ramp():
    length, eps = 40, 0.3
    values = [ibp.smoothed_eps(t, length, eps) for t in range(length + 1)]
    assert values[0] == 0
    assert values[-1] == eps
    assert all(b > a for a, b in itertools.pairwise(values))
    m = length / 4
    alpha = eps / ((length - m) * 4 * m**3 + m**4)
    assert values[5] == pytest.approx(alpha * 5**4)
    assert values[20] == pytest.approx(alpha * (m**4 + 4 * m**3 * 10))
    step = 1e-4
    left = (ibp.smoothed_eps(m, length, eps) - ibp.smoothed_eps(m - step, length, eps)) / step
    right = (ibp.smoothed_eps(m + step, length, eps) - ibp.smoothed_eps(m, length, eps)) / step
    assert left == pytest.approx(4 * alpha * m**3, rel=1e-4)
    assert right == pytest.approx(left, rel=1e-4)
    assert ibp.smoothed_eps(-3, length, eps) == 0
    assert ibp.smoothed_eps(99, length, eps) == eps


def test_ramp_moves_with_every_batch_and_ends_at_eps():
    method = FastIBP(eps=0.2, natural=0.1, ramp=0.4)
    radius = [method.eps_at(step, 100) for step in range(100)]
    assert radius[:11] == [0.0] * 11
    assert all(b > a for a, b in itertools.pairwise(radius[10:51]))
    assert radius[50:] == [0.2] * 50


# --------------------------------------------------------------------------------------------------- regularisers


def bounds_of(start_radius: float, *layers: Box) -> Bounds:
    """A finished walk with given boxes before its rectifiers."""
    x = torch.zeros_like(layers[0].lower)
    steps = [Step("input", None, (), Box(x - start_radius, x + start_radius), None)]
    for box in layers:
        steps.append(Step("affine", None, (0,), box, None))
        steps.append(Step("relu", Rectifier(), (len(steps) - 1,), Rectifier().interval(box), None))
    return Bounds(tuple(steps), len(steps) - 1)


def around(centre, radius: float = 0.0) -> Box:
    centre = torch.as_tensor(centre, dtype=torch.float64)
    return Box(centre - radius, centre + radius)


def test_tightness_loss():
    centre = torch.zeros(2, 4)
    assert ibp.tightness_loss(bounds_of(1.0, around(centre, 4.0))).item() == pytest.approx(0.5)
    assert ibp.tightness_loss(bounds_of(1.0, around(centre, 2.0), around(centre, 0.5))).item() == 0
    assert ibp.tightness_loss(bounds_of(1.0, around(centre, 4.0), around(centre, 1.0))).item() == pytest.approx(0.25)
    assert ibp.tightness_loss(bounds_of(1.0, around(centre, 2.0001))).item() > 0


def test_balance_loss_folds_and_is_symmetric():
    # over all 4 entries: active mean .2, inactive mean .1, ratio 2, folded to .5: nothing to pay at tol .5
    centre = torch.tensor([[0.5, 0.3, -0.1, -0.3]], dtype=torch.float64)
    bounds = bounds_of(0.1, around(centre))
    mean, variance = ibp._balance_ratios(bounds.rectifiers[0][1].lower, bounds.rectifiers[0][1].upper)
    assert mean[0].item() == pytest.approx(0.5)
    mu = 0.1
    active, inactive = (0.5 - mu) ** 2 + (0.3 - mu) ** 2, (-0.1 - mu) ** 2 + (-0.3 - mu) ** 2
    assert variance[0].item() == pytest.approx(min(active / inactive, inactive / active))
    assert ibp.relu_balance_loss(bounds).item() == pytest.approx(max(0.0, 0.5 - variance[0].item()) / 0.5)
    uneven = torch.tensor([[0.9, -0.1, -0.05, 0.4], [0.3, 0.2, 0.1, -0.2]], dtype=torch.float64)
    one, other = (ibp.relu_balance_loss(bounds_of(0.1, around(c))).item() for c in (uneven, -uneven))
    assert one == pytest.approx(other)
    assert one > 0


def test_balance_is_over_the_batch_and_counts_unstable_neurons_in_the_mean():
    one = around(torch.tensor([[0.4, 0.2], [-0.4, -0.2]]))  # every example is one-sided, the batch is balanced
    assert ibp.relu_balance_loss(bounds_of(0.1, one)).item() == 0
    mixed = Box(torch.tensor([[0.1, -0.3, -0.6]]), torch.tensor([[0.3, 0.5, -0.2]]))  # centres .2, .1 (unstable), -.4
    (mean, _), (variance, _) = ibp._balance_ratios(mixed.lower, mixed.upper)
    assert mean.item() == pytest.approx(0.5)
    mu = (0.2 + 0.1 - 0.4) / 3
    assert variance.item() == pytest.approx((0.2 - mu) ** 2 / (0.4 + mu) ** 2)


@pytest.mark.parametrize("centre", [[[0.3, 0.2]], [[-0.3, -0.2]], [[0.0, 0.0]]])
def test_one_sided_layers_are_passed_over_with_finite_gradients(centre):
    low = torch.tensor(centre, dtype=torch.float64, requires_grad=True)
    both = torch.tensor([[0.9, -0.1]], dtype=torch.float64)
    loss = ibp.relu_balance_loss(bounds_of(0.1, Box(low, low), around(both)))
    assert loss.item() == pytest.approx(ibp.relu_balance_loss(bounds_of(0.1, around(both))).item() / 2)
    (gradient,) = torch.autograd.grad(loss + low.sum() * 0, low)
    assert torch.isfinite(gradient).all()


def test_regularisers_are_in_the_graph():
    model: Any = built(lambda: ibp.cnn7(1, 8, width=4, linear_size=16))
    x = torch.rand(16, 1, 8, 8, generator=generator(0))
    for loss in (ibp.tightness_loss, ibp.relu_balance_loss):
        model.zero_grad()
        walked = propagate(Program(model), region_around(x, 0.1).box, clean=x)
        loss(walked).backward()
        assert model[0].affine.weight.grad.abs().sum() > 0


# --------------------------------------------------------------------------------------------------- the loss


def first_batch(step: int = 0, steps: int = 100, n: int = 32) -> Batch:
    task = digits(0)
    return Batch(task.train.x[:n], task.train.labels[:n], torch.arange(n), 0, step, 10, steps, generator(0))


def prepared(**settings) -> tuple[FastIBP, nn.Module]:
    method = FastIBP(**settings)
    model, _ = method.prepare(built(lambda: small_cnn((1, 8, 8), 10)), digits(0))
    return method, model.train()


def test_natural_phase_is_clean_cross_entropy_and_moves_the_statistics_once():
    method, model = prepared(strength=0.0)
    twin, batch = copy.deepcopy(model), first_batch()
    loss = method.loss(model, batch)
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(twin(batch.x), batch.y).item(), rel=1e-5)
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_after_the_ramp_the_loss_is_the_robust_one_alone():
    method, model = prepared(strength=0.5)
    batch = first_batch(step=90)
    loss = method.loss(copy.deepcopy(model), batch)
    assert loss.item() == pytest.approx(ibp.ibp_loss(model, batch.x, batch.y, method.eps).item(), rel=1e-6)


def test_regularisers_fade_along_the_ramp():
    bare, _ = prepared(strength=0.0)
    full, model = prepared(strength=0.5)
    for step in (0, 10, 25, 39):
        batch = first_batch(step=step)
        eps = full.eps_at(step, 100)
        walked = propagate(
            Program(copy.deepcopy(model)), region_around(batch.x, max(eps, 1e-6)).box, clean=batch.x
        )  # fmt: skip
        extra = ibp.tightness_loss(walked) + ibp.relu_balance_loss(walked)
        gap = full.loss(copy.deepcopy(model), batch) - bare.loss(copy.deepcopy(model), batch)
        assert gap.item() == pytest.approx(0.5 * (1 - eps / 0.1) * extra.item(), rel=1e-3, abs=1e-4)


def test_robust_loss_bounds_the_loss_of_every_point():
    model = built(lambda: small_cnn((1, 8, 8), 10)).eval()
    batch = first_batch()
    worst = ibp.ibp_loss(model, batch.x, batch.y, 0.02, reduction="none")
    box = region_around(batch.x, 0.02).box
    for seed in range(20):
        point = box.lower + torch.rand(box.shape, generator=generator(seed)) * (box.upper - box.lower)
        assert (nn.functional.cross_entropy(model(point), batch.y, reduction="none") <= worst + 1e-5).all()


def test_crown_ibp_margins_fade_to_ibp():
    method, model = prepared(margins="crown-ibp", strength=0.0)
    plain, _ = prepared(strength=0.0)
    early, late = first_batch(step=20), first_batch(step=60)
    assert method.loss(copy.deepcopy(model), early) < plain.loss(copy.deepcopy(model), early)
    assert method.loss(copy.deepcopy(model), late) == plain.loss(copy.deepcopy(model), late)


# --------------------------------------------------------------------------------------------------- the run

RECIPE = Training(epochs=10, batch_size=64, lr=3e-3, schedule="step", milestones=(0.7, 0.85), gamma=0.2)


def strided() -> nn.Module:
    """Quick to train: one strided convolution and a hidden layer."""
    head = [nn.Flatten(), nn.Linear(8 * 16, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), *head)


@pytest.mark.slow
def test_a_trained_net_is_certified_and_attacks_break_nothing():
    task = digits(0)
    run = fit(built(strided), task, RECIPE, [FastIBP(eps=0.05, ramp=0.4)])
    plain = fit(built(strided), task, RECIPE)
    x, y = task.test.x[:200], task.test.labels[:200]
    ours = verified(run.model, x, y, 0.05, method="ibp")
    assert ours.double().mean() > 0.35
    assert verified(plain.model, x, y, 0.05, method="ibp").sum() == 0
    assert accuracy(run.model, x, y) >= ours.double().mean().item()
    model, tried = run.model.double(), 0
    low, high = (x[ours].double() - 0.05).clamp(0, 1), (x[ours].double() + 0.05).clamp(0, 1)
    for seed in range(12):
        point = low + torch.rand(low.shape, generator=generator(seed), dtype=low.dtype) * (high - low)
        for _ in range(10):
            point.requires_grad_()
            (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(point), y[ours]), point)
            point = (point + 0.015 * gradient.sign()).detach().clamp(low, high)
            assert (model(point).argmax(1) == y[ours]).all()
            tried += len(point)
    assert tried >= 5_000


def test_bound_health_reports_every_relu():
    model = built(lambda: small_cnn((1, 8, 8), 10)).train()
    health = ibp.bound_health(model, digits(0).test.x[:8], 0.05)
    assert len(health) == 4
    assert model.training
    for layer in health:
        assert layer.active + layer.inactive + layer.unstable == pytest.approx(1)
        assert layer.growth > 0


@pytest.mark.slow
def test_contracts():
    task = digits(0, sizes=(128, 40, 60))
    check_treatment(FastIBP(), built(lambda: small_cnn((1, 8, 8), 10)), task)
    check_treatment(FastIBP(), built(lambda: mlp((1, 8, 8), 10, hidden=(16, 16))), task)


def test_saved_weights_fit_a_rebuilt_model():
    task = digits(0, sizes=(128, 40, 60))
    factory = lambda: mlp((1, 8, 8), 10, hidden=(16,))  # noqa: E731
    run = fit(built(factory), task, Training(epochs=1), [FastIBP()])
    fresh = FastIBP().rebuild(built(factory, 1), {})
    fresh.load_state_dict(run.model.state_dict())
    assert torch.equal(fresh.eval()(task.test.x), run.model(task.test.x))


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "settings",
    [{"eps": 0.0}, {"eps": -1.0}, {"ramp": 0.0}, {"natural": -0.1}, {"natural": 0.6, "ramp": 0.4}, {"tol": 0.0}, {"tol": 1.5},
     {"strength": -1.0}, {"terms": ("magic",)}, {"margins": "magic"}, {"clip_norm": 0.0}],
)  # fmt: skip
def test_bad_settings_are_refused(settings):
    with pytest.raises(InvalidInput, match=next(iter(settings))):
        FastIBP(**settings)


class Softmax(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return torch.softmax(self.fc(x.flatten(1)), 1)


def test_bad_models_and_lengths_are_refused():
    task = digits(0, sizes=(65, 40, 60))
    with pytest.raises(Refused, match="softmax"):
        fit(Softmax(), task, RECIPE, [FastIBP()])
    with pytest.raises(InvalidInput, match="no linear or convolutional"):
        ibp.init_ibp_(nn.Sequential(nn.Flatten(), nn.ReLU()), generator=generator(0))
    with pytest.raises(Refused, match="dropout"):
        fit(nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 10)), task, RECIPE, [FastIBP()])
    with pytest.raises(SurefootError, match="batch of at least 2"):
        fit(mlp((1, 8, 8), 10), task, RECIPE, [FastIBP()])  # 65 examples: the last batch of 64 has one
    with pytest.raises(InvalidInput, match="length"):
        ibp.smoothed_eps(0, 0, 0.1)
    with pytest.raises(InvalidInput, match="tol"):
        ibp.tightness_loss(bounds_of(1.0, around(torch.zeros(1, 2))), tol=0.0)
