"""Complete verification against brute force over activation regions, replayed counterexamples, and every kind of answer."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import InvalidInput, UnsupportedOp
from surefoot.models import small_resnet
from surefoot.nn import bounds as B
from surefoot.nn.bounds import Limits, decide, decide_margins, encoding, phase_bounds, preactivations


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(*sizes: int, seed: int, slope: float = 0.0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.LeakyReLU(slope) if slope else nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).double()
    draw = noise(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return model


def patterns(model: nn.Module, shape: tuple[int, ...], seed: int, free: float = 0.5) -> dict[str, Tensor]:
    draw = noise(seed)
    return {
        name: (torch.randint(0, 2, size, generator=draw) * 2 - 1) * (torch.rand(size, generator=draw) > free)
        for name, size in B.rectifier_shapes(model, torch.zeros(1, *shape)).items()
    }


def brute_force(model: nn.Sequential, low: float, high: float, row: np.ndarray, sign: np.ndarray, slope: float = 0.0):
    """Minimum of a row over the closed phases of a net with one hidden layer, by one exact LP an activation region."""
    w1, b1, w2, b2 = (p.detach().numpy() for p in model.parameters())
    best = np.inf
    for active in itertools.product((True, False), repeat=len(b1)):
        a = np.array(active)
        if ((sign == 1) & ~a).any() or ((sign == -1) & a).any():
            continue
        gate = np.where(a, 1.0, slope)
        cost = row @ w2 @ (gate[:, None] * w1)
        constant = row @ (w2 @ (gate * b1) + b2)
        side = np.where(a, -1.0, 1.0)  # active: -z <= 0
        found = linprog(cost, side[:, None] * w1, -side * b1, bounds=[(low, high)] * w1.shape[1])
        if found.status == 0:
            best = min(best, found.fun + constant)
    return best


@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_verdicts_equal_brute_force_over_all_activation_regions(slope):
    seen = {"verified": 0, "falsified": 0, "empty_region": 0}
    lower, upper = -torch.ones(1, 2), torch.ones(1, 2)
    for seed in range(100):
        model = net(2, 4, 2, seed=seed, slope=slope)
        phases = patterns(model, (2,), seed)
        truth = brute_force(model, -1, 1, np.array([1.0, -1.0]), phases["_1"].numpy(), slope)
        if abs(truth) < 1e-4:
            continue
        decision = decide_margins(model, lower, upper, 0, phases=phases)
        expected = "empty_region" if truth == np.inf else "verified" if truth > 0 else "falsified"
        assert decision.status == expected, (seed, truth, decision)
        seen[expected] += 1
        if expected == "falsified":
            x = decision.counterexample
            assert x is not None
            logits, inputs = preactivations(model, x)
            assert (model(x)[0, 0] <= model(x)[0, 1]) and torch.allclose(logits, model(x))
            sign = phases["_1"]
            assert (inputs["_1"][0][sign > 0] > 0).all() and (inputs["_1"][0][sign < 0] <= 0).all()
        if expected == "verified":
            assert decision.margins.item() <= truth + 1e-6
    assert min(seen.values()) >= 8


def test_every_row_is_decided_and_competitors_are_named_by_class():
    """Three classes: each competitor alone and all together, against brute force; a violated last row is not passed over."""
    lower, upper, last = -torch.ones(1, 2), torch.ones(1, 2), 0
    for seed in range(25):
        model, label = net(2, 4, 3, seed=seed), seed % 3
        with torch.no_grad():
            model[2].bias[label] += 2.0  # type: ignore[index, union-attr]
        truth = {}
        for k in (c for c in range(3) if c != label):
            row = np.eye(3)[label] - np.eye(3)[k]
            truth[k] = brute_force(model, -1, 1, row, np.zeros(4))
            alone = decide_margins(model, lower, upper, label, competitors=(k,))
            assert alone.status == ("verified" if truth[k] > 0 else "falsified"), (seed, k, truth)
        together = decide_margins(model, lower, upper, label)
        least = np.array(list(truth.values()))
        assert together.status == ("verified" if least.min() > 0 else "falsified"), (seed, truth)
        if together.verified:
            assert (together.margins.numpy() <= least + 1e-6).all()
        else:
            assert together.row is not None and least[together.row] <= 0
        last += bool(least[0] > 0 >= least[1])
    assert last >= 2


def test_a_big_m_that_is_too_small_is_found(monkeypatch):
    """A tenth of the upper bound in y <= s z + (1 - s) u d cuts true points away; brute force must disagree then."""
    honest = encoding._flat

    class Small(encoding.Encoding):
        def _relu(self, index, parent, op):
            monkeypatch.setattr(
                encoding, "_flat", lambda t: honest(t) * torch.where(t > 0, 0.1, 1.0)[0].flatten().numpy()
            )
            super()._relu(index, parent, op)
            monkeypatch.setattr(encoding, "_flat", honest)

    monkeypatch.setattr("surefoot.nn.bounds.complete.Encoding", Small)
    wrong = 0
    for seed in range(60):
        model = net(2, 4, 2, seed=seed)
        truth = brute_force(model, -1, 1, np.array([1.0, -1.0]), np.zeros(4))
        decision = decide_margins(model, -torch.ones(1, 2), torch.ones(1, 2), 0)
        wrong += decision.status == "verified" and truth < -1e-4
    assert wrong > 0


class Joined(nn.Module):
    """Convolutions with stride, groups and dilation, batch-norm with negative gammas, a join, a concatenation, a mean."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.branch = nn.Conv2d(2, 2, 3, padding=2, dilation=2, groups=2)
        self.down, self.out = nn.Conv2d(4, 2, 3, stride=2, padding=1), nn.Linear(2 * 4 + 2, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.first((x - 0.5) / 0.3)))
        x = F.leaky_relu(x + self.branch(x), 0.1)
        x = torch.cat([x, -x], 1)
        return self.out(torch.cat([F.relu(self.down(x)).flatten(1), x[:, :2].mean((2, 3))], 1))


def joined(seed: int) -> nn.Module:
    model, draw = Joined(), noise(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=draw))
        assert model.norm.running_mean is not None and model.norm.running_var is not None
        model.norm.running_mean.copy_(torch.randn(2, generator=draw))
        model.norm.running_var.copy_(0.5 + torch.rand(2, generator=draw))
    return model.double().eval()


def test_forms_are_the_net_itself():
    """With the true outputs of the open neurons put in, the affine forms give the logits of any input of the box."""
    model, draw = joined(0), noise(1)
    x = torch.rand(1, 1, 4, 4, generator=draw, dtype=torch.float64)
    region = B.region_around(x, 0.2)
    with torch.no_grad():
        walked = B.propagate(B.Program(model), region.box)
        made = encoding.Encoding(walked, {}, 0.0)
        matrix, constant = made.forms(walked.end, torch.eye(3, dtype=torch.float64).unsqueeze(0))
        assert made.binaries > 10
        for _ in range(5):
            point = x + 0.2 * (2 * torch.rand(x.shape, generator=draw, dtype=torch.float64) - 1)
            point = point.clamp(0, 1)
            values = np.zeros(matrix.shape[1])
            values[: made.inputs] = point.flatten().numpy()
            exact = B.propagate(B.Program(model), B.Box(point, point))
            for index, chosen in made.unstable.items():
                first = made.first[index]
                values[first : first + len(chosen)] = exact.steps[index].box.centre.flatten().numpy()[chosen]
            assert np.allclose(matrix @ values + constant, model(point)[0].numpy(), atol=1e-9)


@pytest.mark.parametrize("residual", [False, True])
def test_residual_convolutional_nets_are_decided(residual):
    """What CROWN proves stays proven, what it leaves open is decided, and no sampled point breaks a proof."""
    shape = (1, 4, 4)
    statuses = []
    for seed in range(5):
        if residual:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = small_resnet(shape, 3, widths=(2, 2)).double().eval()
        else:
            model = joined(seed)
        draw = noise(seed)
        x = torch.rand(1, *shape, generator=draw, dtype=torch.float64)
        y = model(x).argmax(1)
        for eps in (0.01, 0.04):
            low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
            decision = decide_margins(model, low, high, int(y), limits=Limits(max_nodes=500))
            statuses.append(decision.status)
            if bool(B.verified(model, x, y, eps, method="crown")):
                assert decision.verified
            if decision.verified:
                points = low + (high - low) * torch.rand((2000, *shape), generator=draw, dtype=torch.float64)
                assert (model(points).argmax(1) == y).all()
            if decision.status == "falsified":
                assert model(decision.counterexample).argmax(1) != y
    assert statuses.count("unknown") == 0
    assert statuses.count("verified") > 0


def test_milp_closes_what_bounds_leave_open():
    """A net whose margin is |x| - |x| + 0.5 for two inputs apart: bounds are loose, the truth is exact."""
    model: Any = net(1, 4, 2, seed=0)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[1.0, 1.0, -1.0, -1.0], [0.0] * 4]))
        model[2].bias.copy_(torch.tensor([0.5, 0.0]))
    lower, upper = -torch.ones(1, 1), torch.ones(1, 1)
    assert not B.verified(model, torch.zeros(1, 1), torch.tensor([0]), 1.0, bounds=None)
    decision = decide_margins(model, lower, upper, 0)
    assert decision.verified and decision.by == "milp" and decision.binaries == 4
    few = decide_margins(model, lower, upper, 0, limits=Limits(max_binaries=3))
    assert few.status == "unknown" and "max_binaries=3" in few.reason and few.by == "lp"
    assert decide_margins(model, lower, upper, 0, limits=Limits(time_limit=1e-9)).status == "unknown"


def test_all_phases_fixed_is_a_linear_program():
    model = net(3, 6, 6, 3, seed=3)
    x = torch.rand(1, 3, generator=noise(0), dtype=torch.float64)
    _, inputs = preactivations(model, x)
    phases = {name: torch.where(z[0] > 0, 1, -1) for name, z in inputs.items()}
    bounds = phase_bounds(model, x - 1, x + 1, phases)
    assert bounds is not None
    made = encoding.Encoding(bounds, {}, 0.0)
    assert made.binaries == 0
    decision = decide_margins(model, x - 1, x + 1, int(model(x).argmax()), phases=phases)
    assert decision.binaries == 0 and decision.by in ("bounds", "lp") and decision.status != "unknown"


def test_empty_regions_are_not_verified():
    model: Any = net(2, 2, 2, seed=0)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        model[0].bias.copy_(torch.tensor([-5.0, 0.0]))
    lower, upper = torch.zeros(1, 2), torch.ones(1, 2)
    by_bounds = decide_margins(model, lower, upper, 0, phases={"_1": torch.tensor([1, 0])})
    assert by_bounds.status == "empty_region" and by_bounds.by == "bounds"
    with (
        torch.no_grad()
    ):  # z1 = x1 + x2 - 1.3 and z2 = 0.4 - x1 in [0, 1]^2, and a third that only together is impossible
        model: Any = net(2, 3, 2, seed=0)
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]))
        model[0].bias.copy_(torch.tensor([-1.3, 0.4, 0.4]))
    by_program = decide(model, lower, upper, torch.zeros(0, 2), phases={"_1": torch.tensor([1, 1, 1])})
    assert by_program.status == "empty_region" and by_program.by != "bounds"
    assert decide(model, lower, upper, torch.zeros(0, 2), phases={"_1": torch.tensor([1, 1, 0])}).verified


def edge(offset: float) -> nn.Sequential:
    """Logits (relu(x + offset), 0) of one input."""
    model: Any = net(1, 1, 2, seed=0)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(offset)
        model[2].weight.copy_(torch.tensor([[1.0], [0.0]]))
        model[2].bias.zero_()
    return model


def test_a_tie_is_a_violation_and_the_edge_of_a_phase_is_not():
    one = torch.ones(1, 1)
    assert decide_margins(edge(0.0), -one, one, 0).status == "falsified"  # x <= 0 gives the tie 0 = 0
    on_the_edge = decide_margins(edge(0.0), -one, one, 0, phases={"_1": torch.tensor([1])})
    assert on_the_edge.status == "unknown"  # f_0 > 0 wherever z > 0, but only the closed phase is in the program
    assert "edge" in on_the_edge.reason
    assert decide_margins(edge(0.0), 0.1 * one, one, 0, phases={"_1": torch.tensor([1])}).verified


def test_a_phase_that_holds_at_one_point_is_not_empty():
    """z = x in [0, 1] is inactive at x = 0 alone, where the logits tie; z = 0 everywhere is inactive everywhere."""
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    inactive = {"_1": torch.tensor([-1])}
    assert decide_margins(edge(0.0), zero, one, 0, phases=inactive).status == "falsified"
    dead = edge(0.0)
    with torch.no_grad():
        dead[0].weight.zero_()  # type: ignore[operator, union-attr]
        dead[2].bias.copy_(torch.tensor([0.5, 0.0]))  # type: ignore[operator, union-attr]
    assert decide_margins(dead, zero, one, 0, phases=inactive).status == "verified"


def test_a_witness_outside_of_the_region_shows_nothing():
    """x1 + x2 > 1.5 and x1 < 0.4 need x2 > 1.1: empty in [0, 1]^2, and (0.3, 1.3) is no input of it."""
    model: Any = net(2, 2, 2, seed=0)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([-1.5, 0.4]))
    active, rows = {"_1": torch.tensor([1, 1])}, torch.zeros(0, 2)
    outside = torch.tensor([[0.3, 1.3]])
    lower, upper = torch.zeros(1, 2), torch.ones(1, 2)
    assert decide(model, lower, upper, rows, phases=active, witness=outside).status == "empty_region"
    assert decide(model, lower, 2 * upper, rows, phases=active, witness=outside).verified


@pytest.mark.parametrize("slope", [0.0, 0.4])
def test_the_relaxation_is_the_triangle(slope):
    """z = x in [-1, 3]: y lies between max(z, s z) and the chord; the LP of c y + e z has its minimum at a corner of that."""
    model: Any = nn.Sequential(nn.Linear(1, 1), nn.LeakyReLU(slope) if slope else nn.ReLU(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.fill_(1.0)
            layer.bias.zero_()
    low, high = torch.tensor([[-1.0]], dtype=torch.float64), torch.tensor([[3.0]], dtype=torch.float64)
    with torch.no_grad():
        made = encoding.Encoding(B.propagate(B.Program(model), B.Box(low, high)), {}, 0.0)
        corners = [(-1.0, -slope), (0.0, 0.0), (3.0, 3.0)]
        for c, e in ((-1.0, 0.0), (-1.0, 0.6), (1.0, 0.0), (1.0, -0.7), (2.0, -1.1), (1.0, 0.2)):
            program = made.program(torch.tensor([c], dtype=torch.float64), float("inf"))
            program.cost[0] += e  # of the input, which is z
            found = program.solve(integer=False, time_limit=10.0)
            assert found.bound == pytest.approx(min(c * y + e * z for z, y in corners), abs=1e-7)


def test_phase_bounds_are_within_plain_bounds_and_hold():
    model, draw = net(3, 8, 8, 3, seed=5), noise(0)
    lower, upper = -torch.ones(1, 3).double(), torch.ones(1, 3).double()
    phases = patterns(model, (3,), 7, free=0.8)
    points = lower + 2 * torch.rand(20000, 3, generator=draw, dtype=torch.float64)
    _, inputs = preactivations(model, points)
    follows = torch.ones(len(points), dtype=torch.bool)
    for name, sign in phases.items():
        follows &= ((sign <= 0) | (inputs[name] > 0)).all(1) & ((sign >= 0) | (inputs[name] <= 0)).all(1)
    assert follows.sum() > 50
    plain, cut = phase_bounds(model, lower, upper, {}), phase_bounds(model, lower, upper, phases)
    assert plain is not None and cut is not None
    for (name, wide), (_, narrow) in zip(plain.rectifiers, cut.rectifiers, strict=True):
        assert (narrow.lower >= wide.lower - 1e-12).all() and (narrow.upper <= wide.upper + 1e-12).all()
        z = inputs[name][follows]
        assert (z >= narrow.lower - 1e-9).all() and (z <= narrow.upper + 1e-9).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"phases": {"nothing": torch.zeros(4)}}, "no ReLU 'nothing'"),
        ({"phases": {"_1": torch.zeros(3)}}, "shape"),
        ({"phases": {"_1": torch.full((4,), 2)}}, "-1, 0 or 1"),
        ({"lower": torch.full((1, 2), -float("inf"))}, "finite"),
        ({"lower": 2 * torch.ones(1, 2)}, "empty as given"),
        ({"lower": torch.zeros(2, 2), "upper": torch.zeros(2, 2)}, "one region"),
        ({"label": 5}, "between 0 and 1"),
        ({"competitors": (0,)}, "competitors"),
        ({"competitors": ()}, "competitors"),
    ],
)
def test_bad_input_is_one_sentence(change, match):
    given = {"lower": torch.zeros(1, 2), "upper": torch.ones(1, 2), "label": 0} | change
    with pytest.raises(InvalidInput, match=match):
        decide_margins(net(2, 4, 2, seed=0), **given)


def test_other_nonlinearities_and_bad_limits_are_refused():
    smooth = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(UnsupportedOp, match="'_1'"):
        decide_margins(smooth, torch.zeros(1, 2), torch.ones(1, 2), 0)
    cases: list[dict[str, Any]] = [{"time_limit": 0.0}, {"tol": -1.0}, {"max_binaries": -1}, {"max_nodes": 0}]
    for bad in cases:
        with pytest.raises(InvalidInput, match=next(iter(bad))):
            Limits(**bad)


def test_nothing_of_the_callers_is_touched():
    model = joined(0).float().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    decide_margins(model, torch.zeros(1, 1, 4, 4), 0.1 * torch.ones(1, 1, 4, 4), 0)
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
