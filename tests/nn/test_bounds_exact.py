"""Single operators and lines against their exact answer, where a wrong rule would still look like a plausible box."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import UnsupportedOp
from surefoot.nn import bounds as B
from surefoot.nn.bounds.encoding import Encoding
from surefoot.nn.bounds.linear import lower_bound
from surefoot.nn.bounds.operators import Box, Rectifier
from surefoot.nn.bounds.tightness import gated

SHAPE = (2, 5, 5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


class Calls(nn.Module):
    """A function of a bounded tensor and a few constants."""

    def __init__(self, function: Callable[[Any, Any], Any]):
        super().__init__()
        self.function = function
        self.register_buffer("kernel", draw(4, 2, 3, 3, seed=1))
        self.register_buffer("bias", draw(4, seed=2))
        self.register_buffer("each", draw(3, *SHAPE, seed=3))  # a constant with the batch's own dimension

    def forward(self, x):
        return self.function(self, x)


def norm(affine: bool) -> nn.Module:
    """Variances small enough for a misplaced eps to show."""
    layer = nn.BatchNorm2d(2, affine=affine, eps=1e-3)
    assert layer.running_mean is not None and layer.running_var is not None
    layer.running_mean.copy_(torch.tensor([0.4, -0.7]))
    layer.running_var.copy_(torch.tensor([2e-3, 0.5]))
    if affine:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([-1.3, 0.8]))
            layer.bias.copy_(torch.tensor([0.2, -0.1]))
    return layer


AFFINE: dict[str, Callable[[], nn.Module]] = {
    "batch-norm": lambda: norm(True),
    "batch-norm without affine": lambda: norm(False),
    "average with padding": lambda: nn.AvgPool2d(3, 2, 1),
    "average without counting padding": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "average with ceil_mode": lambda: nn.AvgPool2d(2, ceil_mode=True),
    "average with a divisor": lambda: nn.AvgPool2d(2, divisor_override=3),
    "adaptive average": lambda: nn.AdaptiveAvgPool2d((2, 3)),
    "functional average": lambda: Calls(lambda m, x: F.avg_pool2d(x, 3, 2, padding=1, count_include_pad=False)),
    "functional convolution": lambda: Calls(
        lambda m, x: F.conv2d(x, m.kernel, m.bias, stride=2, padding=1, dilation=1)
    ),
    "dense on more dimensions": lambda: nn.Linear(5, 3),
    "convolution, reflected": lambda: nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"),
    "convolution, same": lambda: nn.Conv2d(2, 3, 3, padding="same", dilation=2),
    "convolution, strided": lambda: nn.Conv2d(2, 4, 2, stride=3, padding=1, groups=2),
    "add alpha": lambda: Calls(lambda m, x: torch.add(x, -3 * x, alpha=2)),
    "subtract alpha": lambda: Calls(lambda m, x: torch.sub(x, x * m.each, alpha=0.5)),
    "add alpha times a constant": lambda: Calls(lambda m, x: torch.add(x, m.each, alpha=-2)),
    "subtract alpha times a constant": lambda: Calls(lambda m, x: torch.sub(x, 1.5, alpha=3)),
    "a constant minus it": lambda: Calls(lambda m, x: 0.7 - x),
    "its negative": lambda: Calls(lambda m, x: -x + 0.3),
    "times a negative number": lambda: Calls(lambda m, x: x * -2.5),
    "times a constant for each example": lambda: Calls(lambda m, x: x * m.each + m.each),
    "divided by a negative constant": lambda: Calls(lambda m, x: x / -(m.each.abs() + 0.1)),
    "mean, dimension kept": lambda: Calls(lambda m, x: x.mean((1, 3), keepdim=True)),
    "sum": lambda: Calls(lambda m, x: x.sum(-1)),
    "permuted before a reshape": lambda: Calls(lambda m, x: x.permute(0, 3, 1, 2).reshape(3, -1)[:, 3:21]),
    "transposed": lambda: Calls(lambda m, x: x.transpose(1, 3)),
    "joined": lambda: Calls(lambda m, x: torch.cat([x[:, :1] * 2, x, -x[:, 1:]], 1)),
    "read three times": lambda: Calls(lambda m, x: (x * 2 + x) - x * m.each),
}


@pytest.mark.parametrize("name", AFFINE)
def test_affine_operators_are_exact(name):
    """f(x) = J x + b: the linear bounds of C f are C f(c) -+ |C J| r, those of one weight layer by intervals f(c) -+ |J| r."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(AFFINE[name]()).double().eval()
    x = draw(3, *SHAPE, seed=4)
    radius = torch.rand(x.shape, generator=generator(5), dtype=torch.float64)
    with torch.no_grad():
        out = model(x).flatten(1)
        jacobian: Any = torch.func.jacfwd(lambda v: model(v).flatten(1))(x)  # [3, K, 3, ...]
        jacobian = torch.stack([jacobian[i, :, i].flatten(1) for i in range(3)])  # [3, K, D]
        walked = B.propagate(B.Program(model), Box(x - radius, x + radius))
        classes = draw(1, 4, out.shape[1], seed=6)
        rows = classes.reshape(1, 4, *walked.output.shape[1:])
        low = lower_bound(walked.steps, walked.end, rows, B.Region(walked.input))
    assert torch.allclose(walked.output.centre.flatten(1), out, atol=1e-12)
    flat = radius.flatten(1)[..., None]
    exact = (out @ classes[0].T) - ((classes @ jacobian).abs() @ flat)[..., 0]
    assert torch.allclose(low, exact, atol=1e-10)
    reach = (jacobian.abs() @ flat)[..., 0]
    got = walked.output.radius.flatten(1)
    assert (got >= reach - 1e-10).all()
    if walked.steps[walked.end].depth <= 1 and "reflected" not in name:  # whose border holds an input several times
        assert torch.allclose(got, reach, atol=1e-10)


MONOTONE: dict[str, Callable[[], nn.Module]] = {
    "max with padding": lambda: nn.MaxPool2d(3, 2, 1),
    "max with ceil_mode": lambda: nn.MaxPool2d(2, ceil_mode=True),
    "max with dilation": lambda: nn.MaxPool2d(2, 1, 1, dilation=2),
    "functional max": lambda: Calls(lambda m, x: F.max_pool2d(x, 3, stride=1, padding=1)),
    "adaptive max": lambda: nn.AdaptiveMaxPool2d(2),
    "hardtanh": lambda: nn.Hardtanh(-0.6, 0.4),
    "relu6": lambda: nn.Sequential(Calls(lambda m, x: 5 * x), nn.ReLU6()),
    "clamp from below": lambda: Calls(lambda m, x: x.clamp(min=-0.5)),
    "softplus": lambda: nn.Softplus(beta=3.0, threshold=5.0),
    "sigmoid": lambda: nn.Sigmoid(),
    "hardsigmoid": lambda: nn.Hardsigmoid(),
    "tanh": lambda: Calls(lambda m, x: x.tanh()),
    "relu": lambda: nn.ReLU(),
    "leaky relu": lambda: nn.LeakyReLU(0.3),
    "functional leaky relu": lambda: Calls(lambda m, x: F.leaky_relu(x, 0.7)),
}


@pytest.mark.parametrize("name", MONOTONE)
def test_monotone_operators_map_both_ends(name):
    """[f(l), f(u)], also where everything is negative: a padded zero would win there."""
    model = nn.Sequential(MONOTONE[name]())
    for shift in (0.0, -6.0):
        x = draw(3, *SHAPE, seed=4) + shift
        radius = torch.rand(x.shape, generator=generator(5), dtype=torch.float64)
        low, high = B.interval_bounds(model, x - radius, x + radius)
        assert torch.allclose(low, model(x - radius), atol=1e-12)
        assert torch.allclose(high, model(x + radius), atol=1e-12)


@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0])
def test_lines_enclose_the_rectifier_and_touch_it(slope):
    """below z <= f(z) <= above z + t on the whole box, the chord through both ends, boxes that end at 0 included."""
    ends = torch.tensor([[-2.0, 1.0], [-1.0, 2.0], [-1.0, 1.0], [-1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [-2, -1], [1, 2]])
    low, high = ends.double().unbind(1)
    below, above, intercept = Rectifier(slope).lines(Box(low[None], high[None]))
    z = low + torch.linspace(0, 1, 101, dtype=torch.float64)[:, None] * (high - low)
    truth = torch.maximum(z, slope * z)
    assert (below * z <= truth + 1e-12).all()
    assert (above * z + intercept >= truth - 1e-12).all()
    for end in (0, -1):
        assert torch.allclose(above[0] * z[end] + intercept[0], truth[end], atol=1e-12)
    stable = (low >= 0) | (high <= 0)
    assert torch.allclose((below * z)[:, stable], truth[:, stable], atol=1e-12)


class Thin(nn.Module):
    """Logits -leaky(z) and 0.1000000007 x with z = -x, margin -7e-10 x: false, but true by the slope 0.1 of float32."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.a.weight.fill_(-1.0)
            self.b.weight.fill_(1.0)

    def weigh(self):
        with torch.no_grad():
            self.out.weight.copy_(torch.tensor([[-1.0, 0.0], [0.0, 0.1000000007]], dtype=torch.float64))
        return self

    def forward(self, x):
        return self.out(torch.cat([F.leaky_relu(self.a(x), 0.1), self.b(x)], 1))


def test_the_leaky_slope_is_the_float64_one():
    model = Thin().double().weigh()
    x, y = torch.full((1, 1), 2.0, dtype=torch.float64), torch.tensor([0])
    logits = model(x)
    assert logits[0, 0] < logits[0, 1]  # class 1, by 1.4e-9
    assert not B.verified(model, x, y, 1.0, bounds=None, method="alpha-crown").any()
    low, high = B.linear_bounds(model, x, 0.5, bounds=None, rows=torch.tensor([[[1.0, -1.0]]], dtype=torch.float64))
    assert low.item() == pytest.approx(-7e-10 * 2.5, rel=1e-5)
    assert high.item() == pytest.approx(-7e-10 * 1.5, rel=1e-5)


class Slopes(nn.Module):
    """Rows whose bound would rise above the truth if a slope below left [s, 1]."""

    def __init__(self, slope: float):
        super().__init__()
        self.a = nn.Linear(1, 1)
        with torch.no_grad():
            self.a.weight.fill_(1.0)
            self.a.bias.zero_()
        self.act = nn.LeakyReLU(slope) if slope else nn.ReLU()

    def forward(self, x):
        z = self.a(x)
        y = self.act(z)
        return torch.cat([y - 2 * z, y + z, y, -y], 1)


@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_optimised_slopes_stay_between_the_rectifiers_own(slope):
    """y - 2z would be "at least 0" with slope 2, y + z with slope -1, a leaky y with slope 0; the truth is -1, -1 - s, -s."""
    model = Slopes(slope).double()
    x = torch.zeros(1, 1, dtype=torch.float64)
    truth = model(torch.linspace(-1, 1, 201, dtype=torch.float64)[:, None]).amin(0)
    low, _ = B.linear_bounds(model, x, 1.0, method="alpha-crown", bounds=None, intersect=False)
    assert (low[0] <= truth + 1e-9).all()
    assert torch.allclose(low[0], truth, atol=1e-6)  # one neuron: the best slope is exact


def test_a_leaky_relu_steeper_than_one_is_refused():
    """max(z, a z) and its lines hold for slopes up to 1."""
    for model in (nn.Sequential(nn.LeakyReLU(1.5)), Calls(lambda m, x: F.leaky_relu(x, 1.5))):
        with pytest.raises(UnsupportedOp, match="between 0 and 1"):
            B.interval_bounds(model, torch.zeros(1, 2), torch.ones(1, 2))


def test_gates_of_an_inactive_leaky_neuron_are_its_slope_in_float64():
    """The pattern's Jacobian and the encoding of complete verification: 0.1, not the nearest float32."""
    model = nn.Sequential(nn.Linear(1, 1), nn.LeakyReLU(0.1), nn.Linear(1, 1)).double()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.fill_(1.0)  # type: ignore[operator, union-attr]
            layer.bias.zero_()  # type: ignore[operator, union-attr]
    point, radius = torch.full((1, 1), -2.0, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    box = Box.around(point, radius)
    fixed = gated(B.Program(model), box, point)
    assert [g.item() for g in fixed.gates.values()] == [0.1]
    with torch.no_grad():
        made = Encoding(B.propagate(B.Program(model), box), {}, 0.0)
    assert [g.item() for g in made.gates.values()] == [0.1]


def positional(z: Tensor) -> None:
    F.relu(z, True)


def keyword(z: Tensor) -> None:
    F.relu(input=z, inplace=True)


def add_to(z: Tensor) -> None:
    z += 0.7  # the caller's name of it changes too


def divide(z: Tensor) -> None:
    z /= -2.0


IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "method": lambda z: z.relu_(),
    "function": lambda z: torch.relu_(z),
    "functional": lambda z: F.relu_(z),
    "positional": positional,
    "keyword": keyword,
    "scaling": lambda z: z.mul_(-2.0),
    "sum": add_to,
    "quotient": divide,
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_after_an_in_place_call_the_old_name_means_the_new_tensor(name):
    change = IN_PLACE[name]

    def forward(m: Any, x: Any) -> Any:
        z = x * 2.0 - 0.3
        change(z)
        return z * 3.0

    x = draw(3, 4)
    low, high = B.interval_bounds(Calls(forward), x, x)
    assert torch.allclose(low, forward(None, x)) and torch.allclose(high, forward(None, x))
    assert not torch.allclose(low, (x * 2.0 - 0.3) * 3.0)


@pytest.mark.parametrize("name", ["method", "keyword", "scaling", "sum"])
def test_in_place_on_a_buffer_that_a_view_reads_later_is_refused(name):
    """The view shares its memory either way: made from the tensor that changes, or the tensor that changes made from it."""
    change = IN_PLACE[name]

    def of_the_changed(m: Any, x: Any) -> Any:
        z = x * 2.0 - 0.3
        view = z.flatten(1)
        change(z)
        return view

    def the_changed(m: Any, x: Any) -> Any:
        z = x * 2.0 - 0.3
        change(z.view(3, -1))
        return z

    for forward in (of_the_changed, the_changed):
        with pytest.raises(UnsupportedOp, match="in place on a view"):
            B.interval_bounds(Calls(forward), draw(3, 2, 2), draw(3, 2, 2) + 9)


def slice_view(m: Any, x: Any) -> Any:
    z = x * 2.0 - 0.3
    part = z[:, 1:]
    torch.relu_(z)
    return part


def permuted_view(m: Any, x: Any) -> Any:
    z = x * 2.0 - 0.3
    part = z.transpose(1, 2)
    part.relu_()
    return z


def view_of_a_view(m: Any, x: Any) -> Any:
    z = x * 2.0 - 0.3
    part = z.view(3, -1).view(3, 2, 2)
    part.relu_()
    return z


def sibling_views(m: Any, x: Any) -> Any:
    z = x * 2.0 - 0.3
    one, two = z.view(3, -1), z.flatten(1)
    one.relu_()
    return two


@pytest.mark.parametrize("forward", [slice_view, permuted_view, view_of_a_view, sibling_views])
def test_no_kind_of_view_passes_by_the_in_place_check(forward):
    """Slices, transposes, views of views, two views of one tensor: refused, or bounds of what the model does."""
    x = draw(3, 2, 2)
    try:
        low, high = B.interval_bounds(Calls(forward), x, x)
    except UnsupportedOp:
        return
    assert torch.allclose(low, forward(None, x)) and torch.allclose(high, forward(None, x))


def test_a_clone_is_not_changed_with_its_source_and_no_constant_is_written_to():
    def skip(m: Any, x: Any) -> Any:
        z = x * 2.0 - 0.3
        kept = z.clone()
        z.relu_()
        return kept * 3.0 + z

    x = draw(3, 4)
    low, high = B.interval_bounds(Calls(skip), x, x)
    assert torch.allclose(low, skip(None, x)) and torch.allclose(high, skip(None, x))

    def into_a_constant(m: Any, x: Any) -> Any:
        total = m.each.clone()
        total.add_(x)
        return x + total

    y = draw(3, *SHAPE)
    with pytest.raises(UnsupportedOp, match="constant"):
        B.interval_bounds(Calls(into_a_constant), y, y)


def test_hooks_of_either_kind_are_refused():
    for hang in ("register_forward_hook", "register_forward_pre_hook"):
        for part in (0, None):
            model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
            getattr(model if part is None else model[part], hang)(lambda *_: None)
            with pytest.raises(UnsupportedOp, match="hooks"):
                B.interval_bounds(model, torch.zeros(1, 2), torch.ones(1, 2))


def test_a_ball_that_the_bounds_cut_stays_around_its_own_centre():
    """x = (0.1, 0.5), radius 0.3 in [0, 1]^2: x1 + x2 falls to 0.5 - sqrt(0.08) = 0.217. The ball alone says 0.6 - 0.3 sqrt(2) = 0.176,

    the box 0 + 0.2, and a ball around the middle of the box, (0.2, 0.5), would say 0.276.
    """
    model = nn.Sequential(nn.Linear(2, 1)).double()
    with torch.no_grad():
        model[0].weight.fill_(1.0)  # type: ignore[operator, union-attr]
        model[0].bias.zero_()  # type: ignore[operator, union-attr]
    x = torch.tensor([[0.1, 0.5]], dtype=torch.float64)
    low, _ = B.linear_bounds(model, x, 0.3, norm="l2")
    assert low.item() == pytest.approx(0.2, abs=1e-12)


def lines_of_relu(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adaptive slope below, chord above, one neuron after the other."""
    below, above, intercept = torch.zeros_like(low), torch.zeros_like(low), torch.zeros_like(low)
    for i, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        if a >= 0:
            below[i] = above[i] = 1.0
        elif b > 0:
            below[i], above[i], intercept[i] = float(b >= -a), b / (b - a), -a * b / (b - a)
    return below, above, intercept


def textbook_crown(weights, biases, x: Tensor, eps: float, norm: str, intersect: bool) -> tuple[Tensor, Tensor]:
    """Zhang et al. 2018 by matrices, for one input of a ReLU net; every layer's box by the lines of those before."""
    dual = (lambda a: a.norm(dim=1)) if norm == "l2" else (lambda a: a.abs().sum(1))

    def lower(rows: Tensor, layer: int) -> Tensor:
        """Of rows of z_layer."""
        constant = torch.zeros(len(rows), dtype=x.dtype)
        for k in range(layer, 0, -1):
            rows, constant = rows @ weights[k], constant + rows @ biases[k]
            below, above, intercept = lines_of_relu(*boxes[k - 1])
            constant = constant + rows.clamp(max=0) @ intercept
            rows = rows.clamp(min=0) * below + rows.clamp(max=0) * above
        return rows @ (weights[0] @ x + biases[0]) + constant - eps * dual(rows @ weights[0])

    boxes: list[tuple[Tensor, Tensor]] = []
    low, high = x - eps, x + eps
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
        eye = torch.eye(len(w), dtype=x.dtype)
        below, above = lower(eye, layer), -lower(-eye, layer)
        if intersect:
            centre, radius = w @ (low + high) / 2 + b, w.abs() @ (high - low) / 2
            loose_low, loose_high = centre - radius, centre + radius
            # a neuron that intervals find stable has exact lines, and keeps its interval; the outputs are cut
            kept = ((loose_low >= 0) | (loose_high <= 0)) & (layer < len(weights) - 1)
            below = torch.where(kept, loose_low, torch.maximum(below, loose_low))
            above = torch.where(kept, loose_high, torch.minimum(above, loose_high))
        boxes.append((below, above))
        low, high = below.clamp(min=0), above.clamp(min=0)
    return boxes[-1]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("intersect", [False, True])
def test_crown_is_the_textbooks(norm, intersect):
    """Four layers, batches of one, to the last digits: every layer refined, and none but by the rules of the paper."""
    for seed in range(5):
        sizes = (3, 8, 7, 6, 4)
        layers = [nn.Linear(a, b, dtype=torch.float64) for a, b in itertools.pairwise(sizes)]
        with torch.no_grad():
            for k, layer in enumerate(layers):
                layer.weight.copy_(draw(*layer.weight.shape, seed=seed * 10 + k))
                layer.bias.copy_(0.5 * draw(*layer.bias.shape, seed=seed * 10 + k + 5))
            model = nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU())))[:-1]
            x = draw(1, 3, seed=seed)
            weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
            expected = textbook_crown(weights, biases, x[0], 0.15, norm, intersect)
            got = B.linear_bounds(model, x, 0.15, norm=norm, bounds=None, intersect=intersect)
            cheap = B.linear_bounds(model, x, 0.15, method="crown-ibp", norm=norm, bounds=None, intersect=intersect)
        for ours, textbook in zip(got, expected, strict=True):
            assert torch.allclose(ours[0], textbook, atol=1e-9)
        assert (got[0] > cheap[0] + 1e-3).any()


def test_a_layer_with_a_bias_folded_into_batch_norm_in_training_is_the_clean_batchs():
    """Negative gammas, biases, grad on: the folded box of a batch of points is the normalised batch, and of a box exact."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).double().train()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([2.0, -3.0, 1.0]))
        model[1].weight.copy_(torch.tensor([-1.5, 0.7, 2.0]))
        model[1].bias.copy_(torch.tensor([0.3, -0.4, 0.5]))
    x = draw(4, *SHAPE)
    truth = model(x).detach()
    point = B.propagate(B.Program(model), Box(x, x), clean=x).output
    assert torch.allclose(point.lower, truth, atol=1e-10) and torch.allclose(point.upper, truth, atol=1e-10)
    conv = model[0](x)
    scale = model[1].weight / (conv.var((0, 2, 3), correction=0) + 1e-5).sqrt()
    reach = 0.1 * (model[0].weight * scale[:, None, None, None]).abs().sum((1, 2, 3))
    wide = B.propagate(B.Program(model), Box(x - 0.1, x + 0.1), clean=x).output
    assert torch.allclose(wide.upper - truth, reach[:, None, None].expand_as(truth), atol=1e-10)
    assert torch.allclose(truth - wide.lower, reach[:, None, None].expand_as(truth), atol=1e-10)
