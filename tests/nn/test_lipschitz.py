"""The product bound is exact for linear maps, holds for pairs of points, and refuses what it does not know."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from surefoot.errors import UnsupportedOp
from surefoot.models import Normalized, mlp, seeded_build, small_cnn, small_resnet
from surefoot.nn.lipschitz import lipschitz_bound, map_norm


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        return torch.cat([self.a(x) - self.b(x), torch.tanh(self.a(x))], 1)


NETS = {
    "mlp": (lambda: mlp((6,), 3, hidden=(8, 8)), (6,)),
    "cnn": (lambda: Normalized(small_cnn((1, 8, 8), 4), [0.3], [0.25]), (1, 8, 8)),
    "resnet": (lambda: small_resnet((2, 8, 8), 4, widths=(4, 8)), (2, 8, 8)),
    "pooled": (lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.LeakyReLU(0.1), nn.MaxPool2d(3, 1), nn.AvgPool2d(2), nn.Flatten()), (1, 8, 8)),
    "joined": (Joined, (6,)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_holds_for_pairs_of_points_near_and_far(name):
    factory, shape = NETS[name]
    model = seeded_build(factory, generator(1)).double().eval()
    bound = lipschitz_bound(model, torch.rand(2, *shape))
    for scale in (1e-3, 1.0, 30.0):
        x = torch.randn(500, *shape, generator=generator(2), dtype=torch.float64)
        step = scale * torch.randn(x.shape, generator=generator(3), dtype=torch.float64)
        rise = (model(x + step) - model(x)).flatten(1).norm(dim=1) / step.flatten(1).norm(dim=1)
        assert rise.max() <= bound
    assert bound < math.inf


def test_exact_for_linear_maps():
    linear = nn.Linear(7, 4, dtype=torch.float64)
    expected = torch.linalg.matrix_norm(linear.weight, 2).item()
    assert lipschitz_bound(linear, torch.rand(1, 7)) == pytest.approx(expected, rel=1e-8)
    conv = nn.Conv2d(1, 2, 3, 2, 1, bias=False, dtype=torch.float64)
    eye = torch.eye(36, dtype=torch.float64).reshape(36, 1, 6, 6)
    exact = torch.linalg.matrix_norm(conv(eye).reshape(36, -1), 2).item()
    assert lipschitz_bound(conv, torch.rand(1, 1, 6, 6)) == pytest.approx(exact, rel=1e-8)
    norm = lipschitz_bound(Normalized(nn.Flatten(), [0.0, 0.0], [0.5, 0.1]), torch.rand(1, 2, 2, 2))
    assert norm == pytest.approx(10.0)


def test_the_bound_for_large_maps_is_above_the_exact_norm(monkeypatch):
    conv = nn.Conv2d(2, 3, 3, padding=1, bias=False, dtype=torch.float64)
    args = (lambda x: conv(x), (1, 2, 6, 6), torch.zeros(1, dtype=torch.float64))
    absolute = lambda x: nn.functional.conv2d(x, conv.weight.abs(), padding=1)  # noqa: E731
    with torch.no_grad():
        exact = map_norm(*args, absolute=absolute)
        monkeypatch.setattr("surefoot.nn.lipschitz.MATRIX_ENTRIES", 0)
        assert exact < map_norm(*args, absolute=absolute) < 6 * exact


def test_leaves_the_model_alone_and_refuses_what_it_does_not_know():
    model = small_cnn((1, 8, 8), 3).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lipschitz_bound(model, torch.rand(2, 1, 8, 8))
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(UnsupportedOp):
        lipschitz_bound(nn.Sequential(nn.Linear(3, 3), nn.Softmax(1)), torch.rand(1, 3))
    with pytest.raises(UnsupportedOp, match="Max-pooling"):
        lipschitz_bound(nn.MaxPool2d(2), torch.rand(1, 1, 200, 200))


class Functional(nn.Module):
    def forward(self, x):
        return nn.functional.max_pool2d(x, 3, 1, 1)  # keeps the shape, and is not elementwise


def test_overlapping_maxima_count_their_windows():
    x = torch.rand(1, 1, 8, 8)
    assert lipschitz_bound(Functional(), x) == pytest.approx(3.0)  # nine windows hold an inner pixel
    assert lipschitz_bound(nn.MaxPool2d(2), x) == 1
    assert lipschitz_bound(nn.AdaptiveMaxPool2d(3), x) == pytest.approx(2.0)
    assert lipschitz_bound(nn.Sigmoid(), x) == 1
    peak = torch.zeros(1, 1, 8, 8)
    peak[0, 0, 4, 4] = 1.0
    assert (Functional()(peak) - Functional()(0 * peak)).norm() == pytest.approx(3.0)  # attained


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.a, self.b = (nn.Linear(4, 3, bias=True, dtype=torch.float64) for _ in range(2))

    def forward(self, x):
        return self.function(self, x)


def test_each_rule_gives_its_own_constant():
    """|sign| of a join, the root of squares of a concatenation, |scale| of negative scales, one after the other multiplied."""
    signs = torch.tensor([0.5, -4.0, 1.0, 1.0], dtype=torch.float64)
    model: Any = seeded_build(lambda: Calls(None), generator(3))
    one, two = (torch.linalg.matrix_norm(layer.weight, 2).item() for layer in (model.a, model.b))
    for function, expected in (
        (lambda m, x: torch.sub(m.a(x), m.b(x), alpha=3), one + 3 * two),
        (lambda m, x: torch.cat([m.a(x), -2 * m.b(x)], 1), math.hypot(one, 2 * two)),
        (lambda m, x: -m.a(x), one),
        (lambda m, x: m.a(x) * -2.5 + 7, 2.5 * one),
        (lambda m, x: m.a(x * signs), 4 * one),
        (lambda m, x: x + torch.relu(x), 2.0),
    ):
        model.function = function
        assert lipschitz_bound(model, torch.rand(1, 4)) == pytest.approx(expected, rel=1e-8)


def test_convolution_and_average_are_exact_with_a_bias_and_after_training_mode():
    model: Any = seeded_build(
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3, bias=True), nn.BatchNorm2d(2)), generator(4)
    ).double()
    with torch.no_grad():
        model[0].bias.fill_(9.0)
        model[1].running_var.copy_(torch.tensor([0.04, 0.25], dtype=torch.float64))
        eye = torch.eye(25, dtype=torch.float64).reshape(25, 1, 5, 5)
        matrix = nn.functional.conv2d(eye, model[0].weight).reshape(25, -1)
    first, scale = torch.linalg.matrix_norm(matrix, 2).item(), (0.04 + 1e-5) ** -0.5
    assert lipschitz_bound(model.train(), torch.rand(2, 1, 5, 5)) == pytest.approx(first * scale, rel=1e-8)
    assert lipschitz_bound(nn.AvgPool2d(2), torch.rand(1, 1, 4, 4)) == pytest.approx(0.5, rel=1e-8)


def test_the_bound_for_large_maps_holds_for_wide_and_narrow_maps(monkeypatch):
    """||W||_1 or ||W||_inf alone is below ||W||_2 for one of the two; signed sums are below for either."""
    monkeypatch.setattr("surefoot.nn.lipschitz.MATRIX_ENTRIES", 0)
    for weight in (torch.ones(6, 1), torch.ones(1, 6), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])):
        out, inside = weight.shape
        kernel = weight.double().reshape(out, inside, 1, 1)
        conv = nn.Conv2d(inside, out, 1, bias=False, dtype=torch.float64)
        conv.weight = nn.Parameter(kernel)
        exact = torch.linalg.matrix_norm(weight.double(), 2).item()
        assert exact <= lipschitz_bound(conv, torch.rand(1, inside, 2, 2)) <= 1.5 * exact


def test_the_most_windows_are_found_in_whatever_chunk(monkeypatch):
    """One input a chunk; the last one, a corner, lies in four windows and an inner one in nine."""
    monkeypatch.setattr("surefoot.nn.lipschitz.MATRIX_ENTRIES", 1)
    assert lipschitz_bound(Functional(), torch.rand(1, 1, 8, 8)) == pytest.approx(3.0)
