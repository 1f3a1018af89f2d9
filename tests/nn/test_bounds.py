"""Bounds must contain the truth on any supported net; planted mistakes must be found by the same checks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import InvalidInput, SurefootError, UnsupportedOp
from surefoot.models import Normalized, mlp, small_cnn, small_resnet
from surefoot.nn import bounds as B
from surefoot.nn.bounds import rules
from surefoot.nn.bounds.graph import Program, propagate
from surefoot.nn.bounds.operators import Box, Op, Rectifier, Scale

METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scramble(model: nn.Module, seed: int) -> nn.Module:
    """Random weights of either sign everywhere, batch-norm's gamma and statistics included."""
    noise = generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 1.0 / max(1, parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.7
            parameter.copy_(spread * torch.randn(parameter.shape, generator=noise, dtype=parameter.dtype))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=noise, dtype=buffer.dtype))
            if name.endswith("running_var"):
                buffer.copy_(0.2 + torch.rand(buffer.shape, generator=noise, dtype=buffer.dtype))
    return model


class Zoo(nn.Module):
    """Every kind of node: grouped, dilated and strided convolutions, negative gammas, a residual join, cat, functional calls."""

    def __init__(self, groups=2, dilation=2, stride=2, pool="avg", act="relu", padding_mode: Any = "zeros"):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, padding_mode=padding_mode)
        self.norm = nn.BatchNorm2d(4)
        self.branch = nn.Conv2d(4, 4, 3, padding=dilation, dilation=dilation, groups=groups)
        self.down = nn.Conv2d(8, 4, 3, stride=stride, padding=1)
        self.down_norm = nn.BatchNorm2d(4)
        self.pool = {"avg": nn.AvgPool2d(2, ceil_mode=True), "max": nn.MaxPool2d(2), "none": nn.Identity()}[pool]
        self.act = act
        self.hidden = nn.LazyLinear(6)
        self.out = nn.Linear(6, 3)
        self.register_buffer("offset", torch.tensor([[[0.1]], [[-0.2]]]))

    def activate(self, x):
        if self.act == "leaky":
            return F.leaky_relu(x, 0.1)
        return torch.tanh(x) if self.act == "tanh" else F.relu(x)

    def forward(self, x):
        x = self.activate(self.norm(self.first((x - self.offset) * 1.5)))
        x = self.activate(x + self.branch(x))
        x = torch.cat([x, -x], 1)
        x = self.pool(self.activate(self.down_norm(self.down(x))))
        x = self.activate(self.hidden(x.view(x.size(0), -1)))
        return self.out(x) / 0.5


def zoo(seed: int = 0, **kinds) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Zoo(**kinds)
        model.eval()(torch.zeros(2, 2, 6, 6))
    return scramble(model, seed).double().eval()


def points_in(box: Box, many: int, seed: int) -> Tensor:
    """Random points of a box, a third of them corners, `[many, B, ...]`."""
    noise = generator(seed)
    share = torch.rand((many, *box.shape), generator=noise, dtype=box.lower.dtype)
    share[: many // 3] = share[: many // 3].round()
    return box.lower + share * (box.upper - box.lower)


def escaped(model: nn.Module, box: Box, many: int = 40, seed: int = 0, clean: Tensor | None = None, refine=None) -> int:
    """How many sampled values leave their box, over every step of the net."""
    program = Program(model)
    with torch.no_grad():
        walked = propagate(program, box, clean=clean, refine=refine)
        frozen = copy.deepcopy(model)
        count = 0
        for point in points_in(box, many, seed):
            truth = propagate(Program(frozen), Box(point, point), clean=clean)
            for step, exact in zip(walked.steps, truth.steps, strict=True):
                value = exact.box.centre
                slack = 1e-9 * (1 + value.abs())
                count += int(((value < step.box.lower - slack) | (value > step.box.upper + slack)).sum())
    return count


# --------------------------------------------------------------------------------------------------- exact numbers


def worked_example() -> tuple[nn.Module, Tensor]:
    net: Any = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        net[0].bias.copy_(torch.tensor([0.0, 0.5]))
        net[2].weight.fill_(1.0)
        net[2].bias.zero_()
    return net, torch.zeros(1, 2)


@pytest.mark.parametrize(
    ("method", "intersect", "low", "high"),
    [("ibp", True, 0.0, 4.5), ("crown", False, -1.5, 3.5), ("crown", True, 0.0, 3.5), ("alpha-crown", True, 0.0, 3.5)],
)
def test_worked_example(method, intersect, low, high):
    net, x = worked_example()
    lower, upper = B.linear_bounds(net, x, 1.0, method=method, bounds=None, intersect=intersect)
    assert (lower.item(), upper.item()) == pytest.approx((low, high), abs=1e-6)


def test_worked_example_lines_and_preactivations():
    net, _ = worked_example()
    walked = propagate(Program(net), Box(-torch.ones(1, 2), torch.ones(1, 2)))
    (_, box), step = walked.rectifiers[0], walked.steps[2]
    assert torch.allclose(box.lower, torch.tensor([[-2.0, -1.5]]))
    assert torch.allclose(box.upper, torch.tensor([[2.0, 2.5]]))
    assert isinstance(step.op, Rectifier)
    below, above, _ = step.op.lines(box)
    assert torch.allclose(above, torch.tensor([[0.5, 0.625]]))
    assert below.tolist() == [[1.0, 1.0]]


def test_degenerate_neuron_divides_by_nothing():
    op = B.Rectifier()
    zero = torch.zeros(1, 3)
    for line in op.lines(Box(zero, zero)):
        assert torch.isfinite(line).all()
    assert op.lines(Box(zero, zero))[2].abs().max() == 0


def test_eps_zero_is_the_model():
    for model, shape in (
        (zoo(), (2, 6, 6)),
        (zoo(pool="max", act="leaky"), (2, 6, 6)),
        (scramble(mlp((5,), 3), 1).double(), (5,)),
    ):
        x = torch.rand(4, *shape, dtype=torch.float64, generator=generator(0))
        for method in METHODS:
            low, high = B.linear_bounds(model, x, 0.0, method=method)
            assert torch.allclose(low, model(x), atol=1e-6)
            assert torch.allclose(high, model(x), atol=1e-6)


def test_l2_ball_of_a_linear_model_is_exact():
    model: Any = scramble(nn.Sequential(nn.Linear(6, 3)), 3).double()
    x = torch.rand(4, 6, dtype=torch.float64, generator=generator(1))
    low, high = B.linear_bounds(model, x, 0.3, norm="l2", bounds=None)
    radius = 0.3 * model[0].weight.norm(dim=1)
    assert torch.allclose(low, model(x) - radius)
    assert torch.allclose(high, model(x) + radius)


def test_box_is_cut_at_the_bounds():
    region = B.region_around(torch.tensor([[0.05, 0.5, 1.0]]), 0.1)
    assert torch.allclose(region.box.lower, torch.tensor([[0.0, 0.4, 0.9]]))
    assert torch.allclose(region.box.upper, torch.tensor([[0.15, 0.6, 1.0]]))
    assert not torch.allclose(region.box.centre, torch.tensor([[0.05, 0.5, 1.0]]))


# --------------------------------------------------------------------------------------------------- soundness


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    groups=st.sampled_from([1, 2, 4]),
    dilation=st.sampled_from([1, 2]),
    stride=st.sampled_from([1, 2, 3]),
    pool=st.sampled_from(["avg", "max", "none"]),
    act=st.sampled_from(["relu", "leaky", "tanh"]),
    padding_mode=st.sampled_from(["zeros", "reflect", "circular"]),
    eps=st.sampled_from([0.003, 0.03, 0.3]),
)
def test_every_box_contains_the_truth(seed, groups, dilation, stride, pool, act, padding_mode, eps):
    model = zoo(seed, groups=groups, dilation=dilation, stride=stride, pool=pool, act=act, padding_mode=padding_mode)
    x = torch.rand(2, 2, 6, 6, dtype=torch.float64, generator=generator(seed))
    region = B.region_around(x, eps)
    assert escaped(model, region.box, many=12, seed=seed) == 0
    assert escaped(model, region.box, many=12, seed=seed, refine=B.crown_refiner(region)) == 0
    values = torch.stack([model(p) for p in points_in(region.box, 30, seed)])
    tight = {}
    for method in METHODS:
        low, high = B.linear_bounds(model, x, eps, method=method)
        assert (values >= low - 1e-9).all(), method
        assert (values <= high + 1e-9).all(), method
        tight[method] = low
    assert (tight["crown-ibp"] >= tight["ibp"] - 1e-9).all()
    assert (tight["alpha-crown"] >= tight["crown"] - 1e-9).all()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), eps=st.sampled_from([0.05, 0.5]), clip=st.booleans())
def test_l2_ball_contains_the_truth(seed, eps, clip):
    model = zoo(seed, pool="avg")
    x = torch.rand(2, 2, 6, 6, dtype=torch.float64, generator=generator(seed))
    bounds = (0.0, 1.0) if clip else None
    direction = torch.randn(60, *x.shape, dtype=torch.float64, generator=generator(seed + 1))
    ball = x + eps * direction / direction.flatten(2).norm(dim=2)[..., None, None, None]
    ball = ball.clamp(0, 1) if clip else ball
    values = torch.stack([model(p) for p in ball])
    for method in METHODS:
        low, high = B.linear_bounds(model, x, eps, method=method, norm="l2", bounds=bounds)
        assert (values >= low - 1e-9).all()
        assert (values <= high + 1e-9).all()


def test_reference_networks_and_normalisation_in_front():
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=generator(0))
    for net in (small_cnn((3, 8, 8), 10, widths=(4, 4)), small_resnet((3, 8, 8), 10, widths=(4, 4))):
        model = Normalized(scramble(net, 2), [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]).double().eval()
        assert escaped(model, B.region_around(x, 0.05).box) == 0
        assert B.supported(model, x) is None


def test_normalisation_leaves_eps_in_the_raw_scale():
    inner: Any = scramble(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), 0).double()
    model = Normalized(inner, [0.5], [0.25]).double()
    x = torch.full((1, 1, 1, 3), 0.5, dtype=torch.float64)
    low, high = B.linear_bounds(model, x, 0.1, method="ibp")
    assert torch.allclose((high - low) / 2, 0.1 / 0.25 * inner[1].weight.abs().sum(1))


def test_elision_is_never_looser():
    for seed in range(20):
        model = zoo(seed)
        x = torch.rand(3, 2, 6, 6, dtype=torch.float64, generator=generator(seed))
        y = torch.tensor([0, 1, 2])
        low, high = B.interval_bounds(model, (x - 0.05).clamp(0, 1), (x + 0.05).clamp(0, 1))
        elided = B.margin_bounds(model, x, y, 0.05, method="ibp")
        others = torch.tensor([[1, 2], [0, 2], [0, 1]])
        assert (elided >= low.gather(1, y[:, None]) - high.gather(1, others) - 1e-9).all()


def test_margin_rows_name_the_other_classes_in_order():
    rows = B.margin_rows(torch.tensor([1, 0]), 3)
    assert rows.tolist() == [[[-1, 1, 0], [0, 1, -1]], [[1, -1, 0], [1, 0, -1]]]


def test_joins_are_summed_before_the_split():
    """x - x through two branches is 0 exactly only if the coefficients meet before the rectifier splits them."""

    class Cancel(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            z = torch.relu(self.a(x))
            return z - z

    low, high = B.linear_bounds(Cancel(), torch.rand(2, 3, generator=generator(0)), 0.5, intersect=False)
    assert low.abs().max() == 0
    assert high.abs().max() == 0


def test_chunked_rows_agree():
    model = zoo(3)
    x = torch.rand(2, 2, 6, 6, dtype=torch.float64, generator=generator(0))
    whole = B.linear_bounds(model, x, 0.05)
    cut = B.linear_bounds(model, x, 0.05, memory_mb=0.005)
    assert torch.allclose(whole[0], cut[0])
    assert torch.allclose(whole[1], cut[1])


# --------------------------------------------------------------------------------------------------- batch-norm in training


def training_net(seed: int = 0) -> nn.Module:
    return zoo(seed, pool="avg").train()


def test_training_bounds_hold_for_the_clean_batch_and_move_the_statistics_once():
    model: Any = training_net()
    twin = training_net()
    x = torch.rand(6, 2, 6, 6, dtype=torch.float64, generator=generator(1))
    logits = twin(x)
    walked = propagate(Program(model), B.region_around(x, 0.03).box, clean=x)
    assert walked.logits is not None and torch.allclose(walked.logits, logits, atol=1e-12)
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    assert model.norm.num_batches_tracked == 1
    assert escaped(training_net(), B.region_around(x, 0.03).box, clean=x) == 0
    walked.output.lower.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_gradients_flow_through_the_batch_statistics():
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    x = torch.rand(5, 3, dtype=torch.float64, generator=generator(0))
    propagate(Program(model), Box(x, x), clean=x).output.centre.pow(2).sum().backward()
    ours = model[0].weight.grad.clone()
    model.zero_grad()
    model(x).pow(2).sum().backward()
    assert torch.allclose(ours, model[0].weight.grad)


def test_momentum_none_averages_all_batches():
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None)).double()
    twin: Any = copy.deepcopy(model)
    for seed in range(3):
        x = torch.rand(5, 3, dtype=torch.float64, generator=generator(seed))
        propagate(Program(model), Box(x, x), clean=x)
        twin(x)
    assert torch.allclose(model[1].running_var, twin[1].running_var)
    assert torch.allclose(model[1].running_mean, twin[1].running_mean)


# --------------------------------------------------------------------------------------------------- planted mistakes


def test_a_missing_absolute_gamma_is_found(monkeypatch):
    monkeypatch.setattr(
        Scale, "interval", lambda self, box: Box.around(self.value(box.centre), box.radius * self.scale)
    )
    x = torch.rand(2, 2, 6, 6, dtype=torch.float64, generator=generator(0))
    assert escaped(zoo(), B.region_around(x, 0.03).box) > 0


class SeparateNorm(Op):
    """The commonest bug: lower and upper bounds are normalised by statistics of their own."""

    def __init__(self, module):
        self.module = module

    def value(self, *inputs):
        return F.batch_norm(inputs[0], None, None, self.module.weight, self.module.bias, training=True)

    def interval(self, *boxes):
        low, high = self.value(boxes[0].lower), self.value(boxes[0].upper)
        return Box(torch.minimum(low, high), torch.maximum(low, high))


def test_batch_statistics_from_the_bounds_are_found(monkeypatch):
    x = torch.rand(6, 2, 6, 6, dtype=torch.float64, generator=generator(1))
    box = B.region_around(x, 0.03).box
    points = points_in(box, 40, 0)
    truths = [propagate(Program(training_net()), Box(p, p), clean=x) for p in points]

    def outside() -> int:
        bounds = propagate(Program(training_net()), box, clean=x)
        return sum(
            int(((t.box.centre < b.box.lower - 1e-9) | (t.box.centre > b.box.upper + 1e-9)).sum())
            for truth in truths
            for t, b in zip(truth.steps, bounds.steps, strict=True)
        )

    assert outside() == 0
    monkeypatch.setitem(rules.RULES, nn.BatchNorm2d, lambda m, x: (SeparateNorm(m), (x,)))
    assert outside() > 0


def test_a_tie_is_not_verified():
    model: Any = nn.Sequential(nn.Linear(2, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([0.1, 0.1, -9.0]))
    x, y = torch.full((1, 2), 0.5), torch.tensor([0])
    assert (B.margin_bounds(model, x, y, 0.1) >= 0).all()  # what "at least zero" would have let through
    for method in METHODS:
        assert not B.verified(model, x, y, 0.1, method=method).any()


def test_a_tie_by_rounding_is_not_verified():
    """0.1 + 0.2 against 0.3: equal on paper, different by one rounding in float64."""
    model: Any = nn.Sequential(nn.Linear(2, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([0.0, 0.3], dtype=torch.float64))
    x = torch.tensor([[0.1, 0.2]], dtype=torch.float64)
    assert model(x)[0, 0] > model(x)[0, 1]
    assert not B.verified(model, x, torch.tensor([0]), 0.0).any()


def test_infinite_bounds_are_not_verified():
    model: Any = scramble(mlp((4,), 3, hidden=(8, 8)), 0)
    with torch.no_grad():
        model[1].weight.mul_(1e200 if model[1].weight.dtype == torch.float64 else 1e38)
    x = torch.full((2, 4), 1e-3)
    assert not B.verified(model.double(), x, torch.tensor([0, 1]), 0.5).all()


# --------------------------------------------------------------------------------------------------- certificates under attack


def attack(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, seed: int) -> Tensor:
    """One random-start sign-gradient run on the smallest margin; returns every point met, `[steps + 1, B, ...]`."""
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    point = low + torch.rand(x.shape, generator=generator(seed), dtype=x.dtype) * (high - low)
    met = [point]
    for _ in range(steps):
        point = point.detach().requires_grad_()
        logits = model(point)
        rivals = logits.scatter(1, y[:, None], -torch.inf).amax(1)
        (gradient,) = torch.autograd.grad((rivals - logits.gather(1, y[:, None])[:, 0]).sum(), point)
        point = (point + 0.3 * eps * gradient.sign()).detach().clamp(low, high)
        met.append(point)
    return torch.stack(met)


def balanced_net() -> tuple[nn.Module, Tensor, Tensor]:
    """A net whose three classes are all met, with 120 inputs and the classes it gives them."""
    model: Any = zoo(5, pool="avg")
    x = torch.rand(120, 2, 6, 6, dtype=torch.float64, generator=generator(0))
    with torch.no_grad():
        model.out.bias -= model(x).mean(0) * 0.5  # the net divides its logits by 0.5
    model.requires_grad_(False)
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize(("method", "eps"), [("ibp", 0.0015), ("crown", 0.01), ("alpha-crown", 0.01)])
def test_ten_thousand_attacked_points_break_no_certificate(method, eps):
    model, x, y = balanced_net()
    proven = B.verified(model, x, y, eps, method=method)
    assert 0.2 < proven.double().mean() < 1.0  # some of each, or the test says nothing
    tried = broken = 0
    for seed in range(10_000 // int(proven.sum()) // 11 + 1):
        met = attack(model, x[proven], y[proven], eps, 10, seed)
        tried += met.shape[0] * met.shape[1]
        broken += int((model(met.flatten(0, 1)).argmax(1) != y[proven].repeat(len(met))).sum())
    assert tried >= 10_000
    assert broken == 0


def test_the_attack_does_break_what_is_not_proven():
    model, x, y = balanced_net()
    open_ones = ~B.verified(model, x, y, 0.05)
    met = attack(model, x[open_ones], y[open_ones], 0.05, 10, 0)
    assert (model(met.flatten(0, 1)).argmax(1) != y[open_ones].repeat(len(met))).any()


def test_float32_model_is_certified_in_float64():
    model = zoo(5, pool="avg").float()
    x = torch.rand(20, 2, 6, 6, generator=generator(0))
    y = model(x).argmax(1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    single = B.verified(model, x, y, 0.01)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(single, B.verified(model.double(), x.double(), y, 0.01))


# --------------------------------------------------------------------------------------------------- graphs


class Inplace(nn.Module):
    """An in-place ReLU changes the tensor that the skip connection reads afterwards."""

    def __init__(self):
        super().__init__()
        self.a, self.relu = nn.Linear(3, 3), nn.ReLU(inplace=True)

    def forward(self, x):
        z = self.a(x)
        r = self.relu(z)
        return r + z


def test_in_place_operations_are_followed():
    model = scramble(Inplace(), 0).double()
    x = torch.rand(3, 3, dtype=torch.float64, generator=generator(0))
    low, high = B.interval_bounds(model, x, x)
    assert torch.allclose(low, model(x))
    assert torch.allclose(high, model(x))


class InplaceView(nn.Module):
    def forward(self, x):
        flat = x.flatten(1)
        torch.relu_(flat)
        return flat + x.flatten(1)


def test_in_place_on_a_view_that_is_read_later_is_refused():
    with pytest.raises(UnsupportedOp, match="in place on a view"):
        B.interval_bounds(InplaceView(), torch.zeros(1, 1, 2), torch.ones(1, 1, 2))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(1, 2, 3, padding="same", bias=False)
        self.w = nn.Parameter(torch.randn(3, 8, generator=generator(0)))

    def forward(self, x, scale: float = 2.0):
        b = x.shape[0]
        x = F.conv2d(x, self.c.weight, padding=1)
        x = F.max_pool2d(F.dropout(x, 0.5, self.training), 2)
        x = x.permute(0, 2, 3, 1).transpose(1, 2)[:, :, :2].reshape(b, -1)
        x += 0.1
        x = x.clamp(-1, 1) * scale - torch.sigmoid(x)
        return F.linear(x, self.w) - 0.5 * (1 - x.mean(1, keepdim=True).expand_as(x[:, :3]) if False else 1)


def test_functional_calls_shapes_and_defaults():
    model = Functional().double().eval()
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64, generator=generator(0))
    low, high = B.interval_bounds(model, x, x)
    assert torch.allclose(low, model(x))
    assert torch.allclose(high, model(x))
    assert escaped(model, B.region_around(x, 0.2).box) == 0


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.inside = nn.LayerNorm(3)

    def forward(self, x):
        return self.function(self, x)


class OtherLinear(nn.Linear):
    def forward(self, input):
        return torch.softmax(input @ self.weight, 1)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda m, x: torch.softmax(x, 1), "softmax"),
        (lambda m, x: m.inside(x), "inside"),
        (lambda m, x: x * x, "mul"),
        (lambda m, x: 1.0 / x, "truediv"),
        (lambda m, x: x.mean(), "mean"),
        (lambda m, x: x.sum(0, keepdim=True), "sum"),
        (lambda m, x: torch.cat([x, x]), "cat"),
        (lambda m, x: x.t(), "t"),
        (lambda m, x: x[0], "getitem"),
        (lambda m, x: x.view(-1), "view"),
        (lambda m, x: F.leaky_relu(x, -0.5), "leaky_relu"),
        (lambda m, x: x @ x.new_ones(3, 2), "new_ones"),
    ],
)
def test_unsupported_nodes_are_named(function, name):
    with pytest.raises(UnsupportedOp, match=rf"Node '{name}"):
        B.interval_bounds(Lambda(function), torch.zeros(2, 3), torch.ones(2, 3))
    assert name in B.supported(Lambda(function), torch.zeros(2, 3))


def test_untraceable_hooked_or_overridden_modules_are_refused():
    branching = Lambda(lambda m, x: x if x.sum() > 0 else -x)
    with pytest.raises(UnsupportedOp, match="cannot be traced"):
        B.interval_bounds(branching, torch.zeros(1, 3), torch.ones(1, 3))
    hooked: Any = nn.Sequential(nn.Linear(3, 3))
    hooked[0].register_forward_hook(lambda m, i, o: 2 * o)
    with pytest.raises(UnsupportedOp, match="hooks"):
        B.interval_bounds(hooked, torch.zeros(1, 3), torch.ones(1, 3))
    with pytest.raises(UnsupportedOp, match="matmul"):
        B.interval_bounds(nn.Sequential(OtherLinear(3, 3)), torch.zeros(1, 3), torch.ones(1, 3))
    no_statistics = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(UnsupportedOp, match="running statistics"):
        B.interval_bounds(no_statistics, torch.zeros(2, 3), torch.ones(2, 3))


def test_dropout_in_training_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    x = torch.rand(2, 3, generator=generator(0))
    with pytest.raises(UnsupportedOp, match="dropout"):
        propagate(Program(model), Box(x, x))
    B.interval_bounds(model, x, x)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.full((2, 5), 1.5)}, "must lie in bounds"),
        ({"x": torch.full((2, 5), float("nan"))}, "finite"),
        ({"x": torch.zeros(2, 5, dtype=torch.int64)}, "floating point"),
        ({"x": torch.zeros(0, 5), "y": torch.zeros(0, dtype=torch.int64)}, "at least one"),
        ({"eps": -0.1}, "eps"),
        ({"eps": float("nan")}, "eps"),
        ({"y": torch.tensor([0, 3])}, "between 0 and 2"),
        ({"y": torch.tensor([0])}, "labels for 2"),
        ({"y": torch.tensor([0.0, 1.0])}, "int64"),
        ({"method": "magic"}, "method"),
        ({"norm": "l1"}, "norm"),
    ],
)
def test_bad_input_is_one_sentence(change, match):
    arguments = {"x": torch.zeros(2, 5), "y": torch.tensor([0, 1]), "eps": 0.1, **change}
    for function in (B.margin_bounds, B.verified):
        with pytest.raises(SurefootError, match=match):
            function(mlp((5,), 3), **arguments)


def test_broken_models_are_refused():
    model: Any = mlp((5,), 3)
    with torch.no_grad():
        model[1].bias[0] = float("nan")
    with pytest.raises(InvalidInput, match="NaN"):
        B.verified(model, torch.zeros(1, 5), torch.tensor([0]), 0.1)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(InvalidInput, match="at least 2"):
        propagate(Program(net), Box(torch.zeros(1, 3), torch.ones(1, 3)), clean=torch.zeros(1, 3))
    with pytest.raises(InvalidInput, match="clean"):
        propagate(Program(net), Box(torch.zeros(2, 3), torch.ones(2, 3)))
    with pytest.raises(InvalidInput, match="must not exceed"):
        B.interval_bounds(mlp((5,), 3), torch.ones(1, 5), torch.zeros(1, 5))
    with pytest.raises(InvalidInput, match="rows"):
        B.linear_bounds(mlp((5,), 3), torch.zeros(2, 5), 0.1, rows=torch.zeros(2, 4))


def test_nothing_of_the_callers_is_touched():
    model: Any = zoo(2).train()
    x = torch.rand(3, 2, 6, 6, dtype=torch.float64, generator=generator(0))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.norm.eval()
    random = torch.get_rng_state()
    for method in METHODS:
        B.margin_bounds(model, x, torch.tensor([0, 1, 2]), 0.1, method=method)
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


# --------------------------------------------------------------------------------------------------- fast kernels


def test_rectified_pair_is_relu_of_both_ends_with_its_gradients():
    draw = generator(0)
    centre, radius = torch.randn(4, 50, generator=draw).double(), torch.rand(4, 50, generator=draw).double()
    weights = torch.randn(2, 4, 50, generator=draw).double()
    gradients = []
    for fused in (True, False):
        c, r = centre.clone().requires_grad_(), radius.clone().requires_grad_()
        box = B.Rectifier().interval(Box.around(c, r)) if fused else Box(F.relu(c - r), F.relu(c + r))
        (weights[0] * box.centre + weights[1] * box.radius).sum().backward()
        gradients.append((box.centre.detach(), box.radius.detach(), c.grad, r.grad))
    for ours, plain in zip(*gradients, strict=True):
        assert torch.allclose(ours, plain, atol=1e-12)


def test_rectified_pair_is_exact_where_nothing_is_cut():
    """An active neuron keeps its box to the last bit, an unstable one starts at 0 to the last bit, in float32."""
    draw = generator(3)
    centre, radius = torch.randn(2000, generator=draw).requires_grad_(), torch.rand(2000, generator=draw)
    box = B.Rectifier().interval(Box.around(centre, radius))
    active, unstable = centre > radius, centre.abs() < radius
    assert torch.equal(box.centre[active], centre[active]) and torch.equal(box.radius[active], radius[active])
    assert (box.lower[unstable] == 0).all() and (box.upper[~active & ~unstable] == 0).all()


def separate_statistics(x: Tensor, w: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    scale = (var + 1e-5).rsqrt() * (1.0 if w is None else w)
    shift = -mean * scale + (0.0 if b is None else b)
    return F.batch_norm(x, None, None, w, b, True), scale.reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batch_statistics_have_the_gradients_of_separate_passes(affine, layout, dtype):
    from surefoot.nn.bounds.kernels import BatchStatistics

    draw = generator(0)
    x0 = torch.randn(6, 3, 4, 2, generator=draw).double() * 0.5 + 2
    weights = [torch.randn(s, generator=draw).double() for s in (x0.shape, (1, 3, 1, 1), (1, 3, 1, 1))]
    running = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    results = []
    for fused in (True, False):
        kind = dtype if fused else torch.float64
        x = x0.to(kind).contiguous(memory_format=layout).requires_grad_()
        w: Any = torch.tensor([0.5, -1.0, 2.0]).to(kind).requires_grad_() if affine else None
        b: Any = torch.ones(3).to(kind).requires_grad_() if affine else None
        made = BatchStatistics.apply(x, w, b, *running, 0.25, 1e-5) if fused else separate_statistics(x, w, b)
        torch.stack([(v.to(kind) * m).sum() for v, m in zip(weights, made, strict=True)]).sum().backward()
        results.append([*made, x.grad, *([w.grad, b.grad] if affine else [])])
    for ours, plain in zip(*results, strict=True):
        assert torch.allclose(ours.double(), plain, rtol=1e-4, atol=1e-10 if dtype == torch.float64 else 1e-4)
    assert torch.allclose(running[0].double(), 0.25 * x0.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(running[1].double(), 0.75 + 0.25 * x0.var((0, 2, 3)), atol=1e-6)


def small_conv_net(stride: int = 1) -> nn.Module:
    layers = [
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride),
        nn.BatchNorm2d(6),
    ]
    size = 6 if stride == 1 else 3
    head = [nn.Flatten(), nn.Linear(6 * size**2, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)]
    return scramble(nn.Sequential(*layers, nn.ReLU(), *head), 1).train()


def robust_step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    walked = propagate(Program(model), B.region_around(x, 0.02).box, clean=x)
    loss = B.robust_cross_entropy(B.interval_margins(walked, y))
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("factory", [small_conv_net, lambda: small_conv_net(2), lambda: training_net(3).float()])
def test_float32_training_matches_float64_in_any_layout_of_the_model(factory):
    """Loss, gradients through the batch statistics and running statistics of the fast step, against float64 in plain layout."""
    exact = factory().double()
    channels = next(exact.parameters()).shape[1]
    size = 8 if channels == 1 else 6
    x, y = torch.rand(7, channels, size, size, generator=generator(2)), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    truth = robust_step(exact, x.double(), y)
    for layout in (torch.contiguous_format, torch.channels_last):
        model = factory().to(memory_format=layout)
        before = [p.stride() for p in model.parameters()]
        assert torch.allclose(robust_step(model, x.contiguous(memory_format=layout), y).double(), truth, rtol=1e-5)
        for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            scale = max(float(q.grad.abs().max()), 1.0)  # biases before a batch-norm have no gradient but rounding
            assert (p.grad - q.grad).abs().max() <= 1e-4 * scale, name
        assert [p.stride() for p in model.parameters()] == before
        for ours, theirs in zip(model.buffers(), exact.buffers(), strict=True):
            assert torch.allclose(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="channels-last pays with oneDNN alone")
def test_training_walks_run_channels_last_on_a_cpu_and_other_walks_do_not():
    model, x = small_conv_net(), torch.rand(4, 1, 8, 8, generator=generator(0))
    box = B.region_around(x, 0.02).box

    def layouts(walked: B.Bounds) -> set[bool]:
        tensors = [t for s in walked.steps[1:] for t in (s.box.centre, s.box.radius, s.value) if t is not None]
        return {t.is_contiguous() for t in tensors if t.dim() == 4}

    assert layouts(propagate(Program(model), box, clean=x)) == {False}
    with torch.no_grad():
        assert layouts(propagate(Program(model), box, clean=x)) == {True}


def test_autocast_may_leave_centre_and_radius_in_different_types():
    model, x = training_net().float(), torch.rand(6, 2, 6, 6, generator=generator(1))
    truth = robust_step(training_net().float(), x, y := torch.tensor([0, 1, 2, 0, 1, 2]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = robust_step(model, x, y)
    assert torch.allclose(loss.float(), truth, rtol=0.05)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    centre, radius = torch.randn(50).requires_grad_(), torch.rand(50).bfloat16().requires_grad_()
    box = B.Rectifier().interval(Box.around(centre, radius))
    (box.centre.sum() + box.radius.sum()).backward()
    assert torch.allclose(box.upper, F.relu(centre + radius), atol=1e-6) and radius.grad is not None


def test_reshapes_keep_the_layout_of_gradients():
    from surefoot.nn.bounds.kernels import contiguous

    x = torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = torch.rand(2, 48)
    flat = contiguous(x).reshape(2, -1)
    assert torch.equal(flat, x.flatten(1))
    (flat * weights).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weights.reshape(2, 3, 4, 4))
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("method", ["crown-ibp", "alpha-crown-ibp", "crown", "alpha-crown"])
def test_residual_nets_by_every_method_hold_and_get_tighter(method):
    """Shi et al.'s ladder on a residual net with batch-norm: never looser than intervals, never beyond a sampled margin."""
    model = scramble(small_resnet((1, 6, 6), 4, widths=(3, 4)), 2).double().eval()
    x = torch.rand(3, 1, 6, 6, generator=generator(0)).double()
    y = model(x).argmax(1)
    ours, intervals = (B.margin_bounds(model, x, y, 0.02, method=m).detach() for m in (method, "ibp"))  # type: ignore[arg-type]
    assert (ours >= intervals - 1e-9).all()
    assert (ours > intervals + 1e-3).any()
    for point in points_in(B.region_around(x, 0.02).box, 200, 1):
        truth = (B.margin_rows(y, 4, torch.float64) @ model(point).unsqueeze(2)).squeeze(2)
        assert (truth >= ours - 1e-9).all()
