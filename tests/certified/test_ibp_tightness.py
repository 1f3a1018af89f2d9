"""Tightness against closed forms, explicit matrices and corner enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.certified import ibp_tightness as T
from surefoot.contracts import check_instrument
from surefoot.core.subject import Subject
from surefoot.core.task import Split
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput, UnsupportedOp
from surefoot.models import mlp, seeded_build, small_cnn
from surefoot.nn.bounds import Box, Program, margin_rows, propagate


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(*weights: Tensor, relu: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.zero_()
        layers += [layer, nn.ReLU()] if relu else [layer]
    return nn.Sequential(*(layers[:-1] if relu else layers))


def gaussian(*sizes: int, seed: int) -> list[Tensor]:
    draw = noise(seed)
    return [torch.randn(o, i, generator=draw, dtype=torch.float64) for i, o in itertools.pairwise(sizes)]


def tau(model: nn.Module, x: Tensor, **more) -> T.TightnessReport:
    return T.propagation_tightness(model, x, **({"eps": 0.1, "data_range": None} | more))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.branch = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2)
        self.out = nn.Linear(36, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.first((x - 0.5) / 0.2)))
        return self.out(F.relu(x + self.branch(x)).flatten(1))


def residual() -> nn.Module:
    model = seeded_build(Residual, noise(0)).double().eval()
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([1.0, -0.7, 0.3, -1.2]))
        assert model.norm.running_var is not None
        model.norm.running_var.fill_(0.5)
    return model


def test_worked_numbers():
    w1, x = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), torch.zeros(1, 2).double()
    report = tau(linear(w1, torch.ones(1, 2)), x)
    values = [report.optimal_radius.item(), report.ibp_radius.item(), report.mean]
    assert values == pytest.approx([0.2, 0.4, 0.5])
    assert tau(linear(torch.ones(2, 1), torch.tensor([[1.0, -1.0]])), x[:, :1]).mean == 0.0


def test_one_layer_and_nonnegative_nets_are_exact():
    x = torch.rand(4, 5, generator=noise(0)).double()
    assert tau(linear(*gaussian(5, 3, seed=1)), x).mean == pytest.approx(1.0, abs=1e-12)
    positive = linear(*(w.abs() for w in gaussian(5, 8, 8, 3, seed=1)), relu=True)
    assert tau(positive, x).per_output.flatten().tolist() == pytest.approx([1.0] * 12)


def test_invariances_and_range():
    w1, w2 = gaussian(6, 16, 4, seed=0)
    x = torch.randn(5, 6, generator=noise(1)).double()
    base = tau(linear(w1, w2, relu=True), x).per_output
    assert (base >= 0).all() and (base <= 1 + 1e-5).all()
    scale, order = torch.rand(16, generator=noise(2)).double() + 0.1, torch.randperm(16, generator=noise(3))
    for model, eps in (
        (linear(w1, w2, relu=True), 1e-4),
        (linear(scale[:, None] * w1, w2 / scale, relu=True), 0.1),
        (linear(w1[order], w2[:, order], relu=True), 0.1),
    ):
        assert torch.allclose(tau(model, x, eps=eps).per_output, base, atol=1e-9)


@pytest.mark.parametrize("labelled", [False, True])
def test_exact_radius_is_that_of_the_autograd_jacobian(labelled):
    model, x = residual(), torch.rand(3, 2, 6, 6, generator=noise(0)).double()
    y = torch.tensor([0, 2, 1]) if labelled else None
    report = T.propagation_tightness(model, x, y, eps=0.3)
    radius = ((x + 0.3).clamp(0, 1) - (x - 0.3).clamp(0, 1)) / 2
    for i in range(3):
        jacobian = torch.func.jacrev(lambda t: model(t)[0])(x[i : i + 1])[:, 0]
        rows = margin_rows(y[i : i + 1], 3, torch.float64)[0] if y is not None else torch.eye(3).double()
        expected = (torch.einsum("rk,k...->r...", rows, jacobian).abs() * radius[i]).flatten(1).sum(1)
        assert torch.allclose(report.optimal_radius[i], expected, rtol=1e-9)


def test_both_radii_of_a_relu_net_from_explicit_matrices():
    w1, w2, w3 = gaussian(5, 9, 7, 3, seed=2)
    model, x = linear(w1, w2, w3, relu=True), torch.randn(1, 5, generator=noise(0)).double()
    d1 = torch.diag((w1 @ x[0] >= 0).double())
    d2 = torch.diag((w2 @ d1 @ w1 @ x[0] >= 0).double())
    rows = margin_rows(torch.tensor([1]), 3, torch.float64)[0]
    report = tau(model, x, target=torch.tensor([1]))
    assert torch.allclose(report.optimal_radius[0], 0.1 * (rows @ w3 @ d2 @ w2 @ d1 @ w1).abs().sum(1))
    assert torch.allclose(report.ibp_radius[0], 0.1 * ((rows @ w3).abs() @ d2 @ w2.abs() @ d1 @ w1.abs()).sum(1))
    first, second, whole = (value for _, value in report.per_layer_prefix)
    assert first == pytest.approx(1.0)
    assert second == pytest.approx(((w2 @ d1 @ w1).abs().sum(1) / (w2.abs() @ d1 @ w1.abs()).sum(1)).nanmean().item())
    assert whole == report.mean
    identity = tau(model, x, pattern=None)
    assert torch.allclose(identity.ibp_radius[0], 0.1 * (w3.abs() @ w2.abs() @ w1.abs()).sum(1))


def test_inside_one_linear_region_radii_are_the_true_ones_and_ibps():
    w1, w2 = gaussian(6, 8, 3, seed=4)
    model, x, eps = linear(w1, w2, relu=True), torch.randn(1, 6, generator=noise(5)).double(), 1e-3
    corners = x + eps * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6))).double()
    assert ((w1 @ corners.T > 0) == (w1 @ x.T > 0)).all()
    outputs = model(corners)
    report = tau(model, x, eps=eps)
    assert torch.allclose(report.optimal_radius[0], (outputs.amax(0) - outputs.amin(0)) / 2)
    box = propagate(Program(model), Box(x - eps, x + eps)).output
    assert torch.allclose(report.ibp_radius, box.radius)


def test_unstable_neurons_count_by_the_pattern_and_not_by_the_interval():
    """The interval radius of the ReLU net is a planted mistake: where signs are open it is another number."""
    w1, w2 = gaussian(6, 8, 3, seed=4)
    model, x = linear(w1, w2, relu=True), torch.randn(1, 6, generator=noise(5)).double()
    box = propagate(Program(model), Box(x - 1, x + 1)).output
    assert not torch.allclose(tau(model, x, eps=1.0).ibp_radius, box.radius, rtol=0.05)


@pytest.mark.parametrize(("hidden", "expected", "room"), [(1, 0.155, 0.005), (2, 0.0245, 0.002), (3, 0.0038, 0.0005)])
def test_tightness_at_initialisation(hidden, expected, room):
    sizes = (10, *(64,) * hidden, 10)
    x = torch.zeros(1, 10).double()
    mean = sum(tau(linear(*gaussian(*sizes, seed=s)), x, prefix_rows=0).mean for s in range(100)) / 100
    assert abs(mean - expected) < room
    assert T.expected_init_tightness(sizes) == pytest.approx(mean, rel=0.08)


def test_expected_widths():
    assert T.expected_init_tightness((3, 64, 2)) == pytest.approx(0.1567, abs=1e-4)
    assert T.expected_init_tightness((3, 256, 2)) == pytest.approx(0.0783, abs=1e-4)


def test_propagation_invariance_is_tau_one():
    assert T.is_propagation_invariant(torch.eye(2), torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    draw, exact = noise(0), 0
    for _ in range(1000):
        o, h, i = (int(torch.randint(1, 5, (), generator=draw)) for _ in range(3))
        w2, w1 = (torch.randint(-1, 2, s, generator=draw).double() for s in ((o, h), (h, i)))
        product, bound = (w2 @ w1).abs().sum(1), (w2.abs() @ w1.abs()).sum(1)
        assert T.invariant_rows(w1, w2).tolist() == (product == bound).tolist()
        assert T.is_propagation_invariant(w1, w2) == bool((product == bound).all())
        exact += T.is_propagation_invariant(w1, w2)
    assert 100 < exact < 900


def test_autoencoder_pays_for_information():
    x = torch.randn(1000, 400, generator=noise(0))
    report = T.linear_autoencoder_ibp(x, 16, 0.01)
    assert report.ibp_radius / 0.01 == pytest.approx(2 * 16 / math.pi, rel=0.05)
    assert report.optimal_radius / 0.01 == pytest.approx(math.sqrt(2 * 16 / math.pi), rel=0.05)
    full = T.linear_autoencoder_ibp(x[:, :20], 20, 0.01)
    assert full.optimal_radius == pytest.approx(0.01)
    assert full.reconstruction_error < 1e-12 < report.reconstruction_error
    assert full.tightness < report.tightness


def test_regulariser_is_the_log_of_the_report_and_trains():
    model, x, y = residual(), torch.rand(4, 2, 6, 6, generator=noise(0)).double(), torch.tensor([0, 1, 2, 0])
    regulariser = T.TightnessRegularizer(0.05)
    report = T.propagation_tightness(model, x, y, eps=0.05)
    before = regulariser(model, x, y)
    assert before.item() == pytest.approx(-report.per_output.log().mean().item())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(5):
        optimizer.zero_grad()
        regulariser(model, x, y).backward()
        optimizer.step()
    assert regulariser(model, x, y) < before


def test_dead_rows_are_counted_and_not_one():
    w1, _ = gaussian(3, 4, 2, seed=0)
    model = linear(w1, torch.tensor([[1.0, 2.0, -1.0, 0.5], [0.0] * 4]))
    report = tau(model, torch.zeros(1, 3).double())
    assert report.dead == 1 and report.per_output[0, 1].isnan() and 0 < report.mean < 1


def test_modes_and_deep_nets():
    model, x = residual().train(), torch.rand(3, 2, 6, 6, generator=noise(0)).double()
    flags = [m.training for m in model.modules()]
    first = T.propagation_tightness(model, x, eps=0.1)
    assert flags == [m.training for m in model.modules()]
    assert first.mean == T.propagation_tightness(model.eval(), x.float(), eps=0.1).mean == pytest.approx(first.mean)
    deep = linear(*(1e-4 * w for w in gaussian(*(8,) * 13, seed=0))).float()  # radii of 1e-40 underflow in float32
    assert math.isfinite(tau(deep, torch.zeros(1, 8)).mean)


def test_bad_input_is_one_sentence():
    model, x = linear(*gaussian(3, 4, 2, seed=0)), torch.zeros(2, 3).double()
    for change, words in (
        ({"eps": 0.0}, "eps"),
        ({"pattern": "x"}, "pattern"),
        ({"target": torch.tensor([0])}, "target"),
    ):
        with pytest.raises(InvalidInput, match=words):
            tau(model, x, **change)
    with pytest.raises(UnsupportedOp, match="ReLU"):
        tau(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), x)
    with pytest.raises(UnsupportedOp, match="running statistics"):
        tau(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)).double(), x)
    with pytest.raises(InvalidInput, match="width"):
        T.linear_autoencoder_ibp(torch.zeros(4, 3), 5, 0.1)
    with pytest.raises(InvalidInput, match="follow"):
        T.is_propagation_invariant(torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize(
    "factory", [lambda: mlp((1, 8, 8), 10, hidden=(16, 16)), lambda: small_cnn((1, 8, 8), 10, widths=(4, 8))]
)
def test_instrument(factory):
    task = digits(0, sizes=(100, 50, 60)).changed(budget="quick")
    subject = Subject(seeded_build(factory, noise(0)).eval(), "net", "image", (1, 8, 8), 10)
    finding = T.IBPTightness().measure(subject, task)
    assert 0 < finding.value < 1 and finding.n == 32 and len(finding.pictures) == 1
    check_instrument(T.IBPTightness(), subject, task)


# --- what a plausible wrong number would look like --------------------------------------------------------------------


def biased(model: nn.Sequential, shift: float) -> nn.Sequential:
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.bias.fill_(shift)
                break
    return model


def test_a_neuron_at_exactly_zero_is_active():
    both = linear(torch.ones(2, 1), torch.tensor([[1.0, -1.0]]), relu=True)
    report = tau(both, torch.zeros(1, 1).double())
    assert (report.dead, report.mean) == (0, 0.0)  # active: two paths that cancel, and not: no path at all


def test_a_leaky_gate_is_its_slope():
    model = nn.Sequential(linear(torch.ones(2, 1)), nn.LeakyReLU(0.25), linear(torch.tensor([[1.0, 3.0]])))
    report = tau(model, torch.full((1, 1), -2.0).double())
    assert report.optimal_radius.item() == pytest.approx(0.25 * 4 * 0.1)
    assert report.ibp_radius.item() == pytest.approx(0.25 * 4 * 0.1)


def test_the_centre_of_a_clipped_box_has_a_pattern_of_its_own():
    """At x = .02 and eps .1 the box in [0, 1] is centred on .06; a neuron that opens at .04 is shut at x."""
    model, x = biased(linear(torch.ones(1, 1), torch.ones(1, 1), relu=True), -0.04), torch.full((1, 1), 0.02).double()
    local = T.propagation_tightness(model, x, eps=0.1)
    centre = T.propagation_tightness(model, x, eps=0.1, pattern="center")
    assert (local.dead, centre.dead) == (1, 0)
    assert centre.optimal_radius.item() == pytest.approx(0.06)


def test_the_mean_is_of_ratios_over_rows_and_then_samples():
    model, x = linear(*gaussian(5, 9, 7, 3, seed=2), relu=True), torch.randn(6, 5, generator=noise(0)).double()
    report = tau(model, x, target=torch.tensor([0, 1, 2, 0, 1, 2]))
    ratios = report.optimal_radius / report.ibp_radius
    assert torch.allclose(report.per_sample, ratios.nanmean(1))
    assert report.mean == pytest.approx(ratios.nanmean(1).nanmean().item())
    assert report.mean != pytest.approx((report.optimal_radius.sum() / report.ibp_radius.sum()).item(), rel=1e-3)
    for size in (1, 4):  # labels travel with their samples
        parts = tau(model, x, target=torch.tensor([0, 1, 2, 0, 1, 2]), batch_size=size)
        assert torch.allclose(parts.per_output, report.per_output, equal_nan=True)


def test_layers_are_named_in_order_and_stand_for_evenly_spaced_neurons():
    w1, w2 = torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 1.0], [1.0, -1.0, 0.0]])
    model = linear(w1, w2, torch.ones(1, 3), relu=True)
    x = torch.ones(1, 1).double()
    names = [name for name, _ in tau(model, x).per_layer_prefix]
    assert names == ["_0", "_2", "_4"]
    two = dict(tau(model, x, prefix_rows=2).per_layer_prefix)["_2"]  # the first and the last neuron: 1 and 0
    assert two == pytest.approx(0.5)


def test_invariance_up_to_a_tolerance():
    w1, w2 = torch.tensor([[1.0], [-1e-3]]), torch.ones(1, 2)
    assert not T.is_propagation_invariant(w1, w2)
    assert T.is_propagation_invariant(w1, w2, tol=1e-2)


def test_the_autoencoder_keeps_the_leading_directions():
    x = torch.randn(60, 5, generator=noise(0)).double() * torch.tensor([4.0, 2.0, 1.0, 0.5, 0.1]).double()
    report = T.linear_autoencoder_ibp(x, 2, 0.1)
    left = torch.linalg.svdvals(x)[2:].square().sum().item() / x.numel()
    assert report.reconstruction_error == pytest.approx(left)
    with pytest.raises(InvalidInput, match="finite"):
        T.linear_autoencoder_ibp(x * math.nan, 2, 0.1)


def test_the_regulariser_counts_live_rows_only_and_has_a_floor():
    w1 = torch.ones(2, 1)
    x = torch.ones(3, 1).double()
    exact_and_dead = linear(w1, torch.tensor([[1.0, 1.0], [0.0, 0.0]]), relu=True)
    regulariser = T.TightnessRegularizer(0.1, data_range=None)
    assert regulariser(exact_and_dead, x).item() == pytest.approx(0.0)
    half_and_dead = linear(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]]), relu=True)
    point = torch.tensor([[2.0, 1.0]]).double()  # both neurons on: tau = 1/2, and a row without a path beside it
    value = regulariser(half_and_dead, point)
    assert value.item() == pytest.approx(math.log(2.0))
    value.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in half_and_dead.parameters())
    cancelled = linear(w1, torch.tensor([[1.0, -1.0]]), relu=True)
    assert regulariser(cancelled, x).item() == pytest.approx(-math.log(1e-8))


def test_the_instrument_measures_margins_of_labels_in_the_subjects_range():
    task = digits(0, sizes=(100, 50, 60)).changed(budget="quick")
    model = seeded_build(lambda: mlp((1, 8, 8), 10, hidden=(16,)), noise(0)).eval()
    subject = Subject(model, "net", "image", (1, 8, 8), 10)
    split = task.sample("ibp_tightness", 32)
    expected = T.propagation_tightness(model, split.x, split.labels, eps=0.2)
    assert (model(split.x).argmax(1) != split.labels).any()  # so that labels are not what an untrained net answers
    finding = T.IBPTightness(eps=0.2).measure(subject, task)
    assert finding.value == pytest.approx(expected.mean)
    assert finding.value != pytest.approx(
        T.propagation_tightness(model, split.x, split.labels, eps=0.2, data_range=None).mean, rel=1e-6
    )


def test_without_labels_the_instrument_takes_the_margins_of_the_answers():
    task = digits(0, sizes=(100, 50, 60)).changed(budget="quick")
    model = seeded_build(lambda: mlp((1, 8, 8), 10, hidden=(16,)), noise(0)).eval()
    bare = task.changed(test=Split(task.test.x))
    finding = T.IBPTightness(eps=0.1).measure(Subject(model, "net", "image", (1, 8, 8), 10), bare)
    split = bare.sample("ibp_tightness", 32)
    expected = T.propagation_tightness(model, split.x, model(split.x).argmax(1), eps=0.1)
    assert finding.value == pytest.approx(expected.mean)
