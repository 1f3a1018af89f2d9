"""Patterns against hooks and hand-worked examples, verdicts against brute force, proofs against attacks, and every kind of answer."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from surefoot.certified.nap import (
    ActivationPattern,
    NeuralSpecification,
    check_ambiguity,
    instance_pattern,
    max_verified_eps,
    mine_naps,
    nap_coverage,
    neuron_values,
    verify_nap,
    verify_pairs,
)
from surefoot.core.statistics import wilson_interval
from surefoot.core.subject import Subject
from surefoot.core.task import Split, Task, Training
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput, UnsupportedOp
from surefoot.models import mlp, seeded_build, small_cnn
from surefoot.nn.bounds import Limits, phase_bounds, rectifier_shapes
from surefoot.training.loop import fit


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(*sizes: int, seed: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).double()
    draw = noise(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return model


def random_pattern(model: nn.Module, shape: tuple[int, ...], seed: int, free: float = 0.5) -> ActivationPattern:
    draw = noise(seed)
    return ActivationPattern.from_phases(
        {
            name: (torch.randint(0, 2, size, generator=draw) * 2 - 1) * (torch.rand(size, generator=draw) > free)
            for name, size in rectifier_shapes(model, torch.zeros(1, *shape)).items()
        }
    )


def worked() -> tuple[nn.Sequential, Tensor, Tensor]:
    """z = [x1 + x2 - 1, x1 - x2]; class 0 at (1, 1), (1, .5), (.9, .8)."""
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        model[0].bias.copy_(torch.tensor([-1.0, 0.0]))
        model[2].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        model[2].bias.copy_(torch.tensor([0.5, 0.0]))
    return model, torch.tensor([[1.0, 1.0], [1.0, 0.5], [0.9, 0.8]]), torch.zeros(3, dtype=torch.int64)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Task]:
    task = digits(0, sizes=(1000, 197, 600)).changed(budget="quick")
    model = seeded_build(lambda: mlp((1, 8, 8), 10, hidden=(32, 32)), noise(0))
    return fit(model, task, Training(epochs=8, lr=3e-3, weight_decay=1e-4)).model, task


# --- mining and coverage --------------------------------------------------------------------------------------------


def test_worked_example():
    model, x, y = worked()
    z = neuron_values(model, x)[1]["_1"]
    torch.testing.assert_close(z, torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.7, 0.1]], dtype=torch.float64), atol=1e-6, rtol=0)  # fmt: skip
    z2_states = (z[:, 1] > 0).tolist()
    assert z2_states == [False, True, True]  # zero counts as inactive
    for delta, active in ((0.6, [True, True]), (0.7, [True, False]), (1.0, [True, False])):
        nap = mine_naps(model, x, y, delta=delta, classes=[0])[0]
        assert nap.active["_1"].tolist() == active
        assert nap.inactive["_1"].tolist() == [False, False]


def test_a_share_of_exactly_delta_counts_on_both_sides():
    """18 of 20 and 2 of 20 at delta 0.9: 1 - 0.9 is a rounding below 0.1, which must not matter."""
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.zero_()
    x = torch.ones(20, 2)
    x[:2, 0], x[2:, 1] = -1.0, -1.0
    nap = mine_naps(model, x, torch.zeros(20, dtype=torch.int64), delta=0.9, classes=[0])[0]
    assert nap.active["_1"].tolist() == [True, False]
    assert nap.inactive["_1"].tolist() == [False, True]


def test_delta_orders_patterns_and_recall(trained):
    model, task = trained
    x, y = task.train.x, task.train.labels
    deltas = (0.6, 0.8, 0.9, 0.99, 1.0)
    mined = [mine_naps(model, x, y, delta=delta) for delta in deltas]
    recalls = [nap_coverage(model, naps, task.test.x, task.test.labels).recall for naps in mined]
    for (strict, low), (loose, high) in itertools.pairwise(zip(mined, recalls, strict=True)):
        assert all(strict[c] <= loose[c] for c in strict)
        assert all(strict[c].num_constrained >= loose[c].num_constrained for c in strict)
        assert (low <= high).all()
    assert mined[0][0].num_constrained > mined[-1][0].num_constrained > 0
    assert not mined[-1][0] <= mined[0][0]
    assert (nap_coverage(model, mined[-1], x, y).recall == 1).all()
    assert nap_coverage(model, mined[0], x, y).recall.mean() < 0.9


class Nested(nn.Module):
    """Functional ReLUs, a convolution, batch-norm with negative gammas and a residual branch."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.branch, self.head = nn.Conv2d(3, 3, 1), nn.Linear(3 * 16, 4)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([1.0, -0.7, 0.4]))
            assert self.norm.running_mean is not None
            self.norm.running_mean.fill_(0.1)

    def inputs(self, x: Tensor) -> list[Tensor]:
        first = self.norm(self.conv(x))
        return [first, torch.relu(first) + self.branch(torch.relu(first))]

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(h + self.branch(h)).flatten(1))


def test_following_agrees_with_the_layers_themselves():
    model = seeded_build(Nested, noise(3)).eval()
    x = torch.rand(64, 1, 4, 4, generator=noise(4))
    _, values = neuron_values(model, x, batch_size=10)
    wide = model.double()
    expected = [z.detach() for z in wide.inputs(x.double())]
    assert len(values) == 2
    for mine, theirs in zip(values.values(), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    seen = set()
    for seed in range(30):
        nap = random_pattern(model, (1, 4, 4), seed, free=0.97)
        by_hand = torch.ones(64, dtype=torch.bool)
        for z, (name, on) in zip(expected, nap.active.items(), strict=True):
            by_hand &= ((z > 0) | ~on).flatten(1).all(1) & ((z <= 0) | ~nap.inactive[name]).flatten(1).all(1)
        batch = nap.follows(values)
        assert torch.equal(batch, by_hand)
        loop = [bool(nap.follows(neuron_values(model, x[i : i + 1])[1])) for i in range(8)]
        assert batch[:8].tolist() == loop
        seen |= set(batch.tolist())
    assert seen == {True, False}


def test_labels_choose_the_inputs():
    model, x, _ = worked()
    x = torch.cat([x, torch.tensor([[0.2, 0.1], [1.0, 0.0]])])
    y = torch.tensor([0, 1, 0, 1, 1])
    answer = model(x.double()).argmax(1)
    assert answer.tolist() == [0, 0, 0, 0, 1]

    def states(**options) -> list[list[bool]]:
        naps = mine_naps(model, x, y, delta=1.0, **options)
        return [naps[1].active["_1"].tolist(), naps[1].inactive["_1"].tolist()]

    assert states() == [[False, True], [False, False]]  # inputs 1, 3, 4
    assert (
        states(labels="correct") == states(labels="predicted") == [[False, True], [True, False]]
    )  # input 4: z = (0, 1)


def test_coverage_counts():
    model, x, y = worked()
    naps = mine_naps(model, x, y, delta=0.6, classes=[0])
    points = torch.tensor([[1.0, 0.5], [1.0, 1.0], [0.9, 0.5], [0.1, 0.2]])
    found = nap_coverage(model, naps, points, torch.tensor([0, 0, 1, 1]))
    assert found.followed[:, 0].tolist() == [True, False, True, False]
    assert (found.recall.item(), found.spill.item(), found.precision.item()) == (0.5, 0.5, 0.5)
    assert found.own.tolist() == [True, False, False, False]


def test_other_activations_can_be_mined_but_not_verified():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 2))
    x, y = torch.rand(20, 2, generator=noise(0)), torch.arange(20) % 2
    with pytest.raises(UnsupportedOp, match="no ReLU"):
        mine_naps(model, x, y)
    naps = mine_naps(model, x, y, threshold=0.2, delta=0.8)
    z = model[0](x)[y == 0]
    assert naps[0].active["_1"].tolist() == ((z > 0.2).double().mean(0) >= 0.8).tolist()
    assert nap_coverage(model, naps, x, y, threshold=0.2).recall.shape == (2,)
    with pytest.raises((UnsupportedOp, InvalidInput)):
        verify_nap(model, naps[0], 0, witness=x)


# --- verification ---------------------------------------------------------------------------------------------------


def brute_force(model: nn.Sequential, nap: ActivationPattern) -> float:
    """Minimum of f_0 - f_1 over [-1, 1]^2 and the closed pattern, by one exact LP for each of the 16 activation regions."""
    w1, b1, w2, b2 = (p.detach().numpy() for p in model.parameters())
    row, sign, best = np.array([1.0, -1.0]), nap.phases["_1"].numpy(), math.inf
    for states in itertools.product((True, False), repeat=len(b1)):
        on = np.array(states)
        if ((sign == 1) & ~on).any() or ((sign == -1) & on).any():
            continue
        side = np.where(on, -1.0, 1.0)
        found = linprog(row @ w2 @ (on[:, None] * w1), side[:, None] * w1, -side * b1, bounds=[(-1, 1)] * 2)
        if found.status == 0:
            best = min(best, found.fun + row @ (w2 @ (on * b1) + b2))
    return best


@pytest.mark.parametrize("seeds", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_verdicts_equal_brute_force_over_activation_regions(seeds):
    seen = {"verified": 0, "falsified": 0, "empty_region": 0}
    domain = (-torch.ones(1, 2), torch.ones(1, 2))
    for seed in range(seeds):
        model = net(2, 4, 2, seed=seed)
        nap = random_pattern(model, (2,), seed)
        truth = brute_force(model, nap)
        if abs(truth) < 1e-4:
            continue
        found = verify_nap(model, nap, 0, domain=domain)
        expected = "empty_region" if truth == math.inf else "verified" if truth > 0 else "falsified"
        assert found.status == expected, (seed, truth, found)
        seen[expected] += 1
        if found.counterexample is not None:
            assert bool(nap.follows(neuron_values(model, found.counterexample)[1]))
            assert model(found.counterexample).argmax(1).item() == 1 == found.confused_with
    assert min(seen.values()) >= seeds // 15


def test_all_neurons_fixed_needs_no_binaries(trained):
    model, task = trained
    x = task.test.x[:1]
    nap = instance_pattern(model, x)
    assert nap.num_constrained == 64
    found = verify_nap(model, nap, int(task.test.labels[0]), center=x, eps=0.3, witness=x)
    assert found.decision.binaries == 0 and found.decision.by in ("bounds", "lp")
    assert found.status in ("verified", "falsified")


def test_bounds_of_a_pattern_are_tighter_and_hold_for_all_that_follows(trained):
    model, task = trained
    nap = mine_naps(model, task.train.x, task.train.labels, delta=0.9)[3]
    lower, upper = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    plain, cut = phase_bounds(model, lower, upper, {}), phase_bounds(model, lower, upper, nap.phases)
    assert plain is not None and cut is not None
    logits, values = neuron_values(model, torch.cat([task.train.x, task.test.x]))
    inside = nap.follows(values)
    assert int(inside.sum()) > 100
    for (name, wide), (_, tight) in zip(plain.rectifiers, cut.rectifiers, strict=True):
        assert (tight.lower >= wide.lower - 1e-9).all() and (tight.upper <= wide.upper + 1e-9).all()
        z = values[name][inside]
        assert (z >= tight.lower - 1e-9).all() and (z <= tight.upper + 1e-9).all()
    assert (logits[inside] >= cut.output.lower - 1e-9).all() and (logits[inside] <= cut.output.upper + 1e-9).all()
    assert (cut.output.radius < 0.99 * plain.output.radius).any()


def test_no_proof_is_broken_by_sampling_or_gradients(trained):
    model, task = trained
    naps = mine_naps(model, task.train.x, task.train.labels, delta=0.7)
    own = nap_coverage(model, naps, task.test.x, task.test.labels).own
    wide, tried, proofs = model.double(), 0, 0
    draw = noise(1)
    for i in own.nonzero().flatten()[:12].tolist():
        x, y = task.test.x[i : i + 1].double(), int(task.test.labels[i])
        eps = 0.06
        if not verify_nap(model, naps[y], y, center=x, eps=eps, witness=x, limits=Limits(max_nodes=30)).verified:
            continue
        proofs += 1
        point = (x + eps * (2 * torch.rand(2000, 1, 8, 8, generator=draw) - 1)).clamp(0, 1)
        for _ in range(6):
            inside = naps[y].follows(neuron_values(model, point)[1])
            assert (wide(point[inside]).argmax(1) == y).all()
            tried += int(inside.sum())
            leaf = point.requires_grad_()
            logits = wide(leaf)
            loss = logits[:, y] - logits.masked_fill(torch.arange(10) == y, -math.inf).amax(1)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            point = (point - 0.02 * gradient.sign()).detach().clamp(x - eps, x + eps).clamp(0, 1)
    model.float()
    assert proofs >= 4 and tried > 5_000


def test_a_pattern_that_the_domain_excludes_is_empty_not_verified():
    model, _, _ = worked()
    both = {"_1": torch.tensor([1, 1])}
    low = (torch.zeros(1, 2), torch.full((1, 2), 0.4))  # x1 + x2 < 1 throughout
    assert verify_nap(model, ActivationPattern.from_phases(both), 0, domain=low).status == "empty_region"
    wide = (torch.zeros(1, 2), torch.ones(1, 2))
    second_off = ActivationPattern.from_phases({"_1": torch.tensor([0, -1])})  # f_1 = 0 < 1/2 <= f_0
    assert verify_nap(model, second_off, 0, domain=wide).status == "verified"
    # f_0 = z1 + 1/2 against f_1 = z2 with z1 <= 0: (1, 0) has f = (1/2, 1)
    off = verify_nap(model, ActivationPattern.from_phases({"_1": torch.tensor([-1, 0])}), 0, domain=wide)
    assert (off.status, off.confused_with) == ("falsified", 1)


def test_pairs_agree_with_the_whole(trained):
    model, task = trained
    naps = mine_naps(model, task.train.x, task.train.labels, delta=0.6, classes=[0, 6])
    limits = Limits(max_nodes=5, time_limit=5.0)
    pairs = verify_pairs(model, naps, witness=task.train.x[:200], limits=limits)
    assert set(pairs) == {(c, k) for c in naps for k in range(10) if k != c}
    statuses = {found.status for found in pairs.values()}
    assert "falsified" in statuses and "empty_region" not in statuses
    for (c, k), found in pairs.items():
        if found.counterexample is not None:
            logits, values = neuron_values(model, found.counterexample)
            assert logits[0, k] >= logits[0, c] and bool(naps[c].follows(values)) and found.confused_with == k


def test_too_many_open_neurons_and_no_time_are_unknown_and_say_so():
    domain = (-torch.ones(1, 2), torch.ones(1, 2))
    reasons = []
    for seed in range(40):
        model = net(2, 6, 6, 2, seed=seed)
        found = verify_nap(model, None, 0, domain=domain, limits=Limits(max_binaries=0))
        if found.status == "unknown":
            reasons.append(found.decision.reason)
    assert reasons and all("max_binaries" in reason for reason in reasons)
    model = net(2, 6, 6, 2, seed=0)
    late = verify_nap(model, random_pattern(model, (2,), 0, 0.9), 0, domain=domain, limits=Limits(time_limit=1e-9))
    assert late.status == "unknown" and "time" in late.decision.reason


def test_ambiguity_equals_brute_force():
    seen = {"disjoint": 0, "ambiguous": 0}
    domain, by_search = (-torch.ones(1, 2), torch.ones(1, 2)), 0
    for seed in range(60):
        model = net(2, 4, 2, seed=seed)
        one, two = (random_pattern(model, (2,), seed + k, free=0.8) for k in (0, 1000))
        found = check_ambiguity(model, one, two, domain=domain)
        points = 2 * torch.rand(4000, 2, generator=noise(seed)) - 1
        values = neuron_values(model, points)[1]
        overlap = bool((one.follows(values) & two.follows(values)).any())
        if found.conflicts:
            assert found.status == "disjoint" and not overlap
            continue
        if overlap:
            assert found.status == "ambiguous"
            again = check_ambiguity(model, one, two, domain=domain, witness=points)
            assert again.status == "ambiguous" and again.example is not None and again.example.shape == (1, 2)
        if found.status == "ambiguous":
            assert found.example is not None
            inside = neuron_values(model, found.example)[1]
            assert bool(one.follows(inside)) and bool(two.follows(inside))
        by_search += 1
        seen[found.status] += 1
    assert by_search >= 30 and min(seen.values()) >= 3


def test_the_largest_ball_lies_between_what_is_proven_and_refuted():
    """f_0 > f_1 for x1 < 1/2, from the centre 0.2: radius 0.3; with the pattern "x1 <= 0.4" every ball is proven."""
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([0.0, -0.4]))
        model[2].weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
        model[2].bias.copy_(torch.tensor([0.5, 0.0]))
    x = torch.tensor([[0.2, 0.5]])
    plain = max_verified_eps(model, x, 0, upper=0.8, steps=10)
    assert plain.verified < 0.3 <= plain.falsified and plain.falsified - plain.verified <= 0.8 / 2**10 + 1e-12
    assert plain.last is not None and plain.last.confused_with == 1
    nap = ActivationPattern.from_phases({"_1": torch.tensor([0, -1])})
    assert max_verified_eps(model, x, 0, nap, upper=0.8).verified == 0.8
    wrong = max_verified_eps(model, x, 1, upper=0.8, steps=4)
    assert wrong.verified == 0 and wrong.falsified == 0.8 / 16
    with pytest.raises(InvalidInput, match="follow the pattern"):
        max_verified_eps(model, torch.tensor([[0.6, 0.5]]), 1, nap)


def test_the_ball_is_cut_with_the_domain(trained):
    model, task = trained
    x = task.test.x[:1]  # digits have many pixels at 0: the ball without the domain is larger
    found = verify_nap(model, None, int((task.test.labels[0] + 1) % 10), center=x, eps=0.1)
    assert found.status == "falsified"
    assert found.counterexample is not None
    assert found.counterexample.min() >= 0 and found.counterexample.max() <= 1
    assert (found.counterexample - x).abs().max() <= 0.1 + 1e-7


# --- bad input ------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_clear_sentence(trained):
    model, task = trained
    x, y = task.train.x, task.train.labels
    for delta in (0.5, 1.1, float("nan")):
        with pytest.raises(InvalidInput, match="delta must lie"):
            mine_naps(model, x, y, delta=delta)
    with pytest.raises(InvalidInput, match="Class 3 has no inputs"):
        mine_naps(model, x[y != 3], y[y != 3])
    with pytest.raises(InvalidInput, match="layers"):
        mine_naps(model, x, y, layers=["nothing"])
    with pytest.raises(InvalidInput, match="int64"):
        mine_naps(model, x, y[:5])
    with pytest.raises(InvalidInput, match="finite"):
        mine_naps(model, torch.full_like(x[:2], math.nan), y[:2])
    nap = mine_naps(model, x, y)[0]
    other = mlp((1, 8, 8), 10, hidden=(16, 32))
    with pytest.raises(InvalidInput, match="shape"):
        verify_nap(other, nap, 0, witness=x[:1])
    with pytest.raises(InvalidInput, match="shape"):
        nap_coverage(other, {0: nap}, x, y)
    with pytest.raises(InvalidInput, match="domain is empty"):
        verify_nap(model, nap, 0, domain=(1.0, 0.0), witness=x[:1])
    with pytest.raises(InvalidInput, match="input's shape"):
        verify_nap(model, nap, 0)
    with pytest.raises(InvalidInput, match="together"):
        verify_nap(model, nap, 0, center=x[:1])
    with pytest.raises(InvalidInput, match="lie in the domain"):
        verify_nap(model, nap, 0, center=x[:1] + 2, eps=0.1)
    with pytest.raises(InvalidInput, match="both active and inactive"):
        ActivationPattern({"a": torch.ones(2, dtype=torch.bool)}, {"a": torch.ones(2, dtype=torch.bool)})


# --- the instrument -------------------------------------------------------------------------------------------------


def test_finding(trained):
    model, task = trained
    subject = Subject(model, "mlp", "image", (1, 8, 8), 10)
    instrument = NeuralSpecification(eps=0.04, delta=0.7)
    finding = instrument.measure(subject, task)
    count = round(finding.value * finding.n)
    assert finding.n == 16 and (finding.low, finding.high) == wilson_interval(count, 16)
    own, _, plain = (part.samples for part in finding.parts)
    assert finding.samples is not None and own is not None and plain is not None
    assert (finding.samples <= own).all()
    assert (finding.samples >= plain * own).all()  # a pattern never loses a proof
    assert 0 < finding.value < 1
    assert len(finding.pictures) == 1


def test_a_large_net_is_left_out_with_the_reason(trained):
    _, task = trained
    subject = Subject(small_cnn((1, 8, 8), 10), "cnn", "image", (1, 8, 8), 10)
    reason = NeuralSpecification().unfit(subject, task)
    assert reason is not None and "too many" in reason
    with pytest.raises(InvalidInput, match="too many"):
        NeuralSpecification().measure(subject, task)
    bare = task.changed(train=Split(task.train.x, None))
    mlp_subject = Subject(trained[0], "mlp", "image", (1, 8, 8), 10)
    assert "labelled training data" in (NeuralSpecification().unfit(mlp_subject, bare) or "")


def test_the_instrument_keeps_its_contract(trained):
    from surefoot.contracts import check_instrument

    model, task = trained
    check_instrument(NeuralSpecification(eps=0.03, delta=0.7, nodes=10), Subject(model, "mlp", "image", (1, 8, 8), 10), task)  # fmt: skip


# --- what a plausible slip would change -------------------------------------------------------------------------------


def test_the_model_is_read_in_evaluation_mode_and_left_alone():
    model = seeded_build(Nested, noise(3)).train()
    x = torch.rand(8, 1, 4, 4, generator=noise(4))
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    logits, _ = neuron_values(model, x)
    assert model.training and next(model.parameters()).dtype == torch.float32
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(logits.float(), model.eval()(x))


def test_an_instance_pattern_counts_zero_as_inactive():
    model, x, _ = worked()
    nap = instance_pattern(model, x[:1].double())  # z = (1, 0)
    assert nap.phases["_1"].tolist() == [1, -1]
    assert bool(nap.follows(neuron_values(model, x[:1])[1]))


def test_a_conflict_in_either_direction_is_a_proof():
    one, two = (ActivationPattern.from_phases({"_1": torch.tensor(p)}) for p in ([1, 0], [-1, 1]))
    assert one.conflicts(two) == two.conflicts(one) == 1


def test_patterns_of_other_layers_are_joined():
    """The second pattern's free neurons must not free those of the first."""
    model = worked()[0]
    domain = (torch.zeros(1, 2), torch.ones(1, 2))
    on, free = (ActivationPattern.from_phases({"_1": torch.tensor(p)}) for p in ([1, 0], [0, 1]))
    found = check_ambiguity(model, on, free, domain=domain)
    assert found.status == "ambiguous" and found.example is not None
    values = neuron_values(model, found.example)[1]
    assert bool(on.follows(values)) and bool(free.follows(values))
    corner = (torch.tensor([[0.0, 0.4]]), torch.tensor([[0.3, 0.5]]))  # x1 + x2 < 1: nothing follows the first there
    outside = check_ambiguity(model, on, free, domain=corner, witness=torch.tensor([[1.0, 0.5]]))
    shut = ActivationPattern.from_phases({"_1": torch.tensor([0, -1])})  # x1 <= x2, as everywhere in the corner
    assert check_ambiguity(model, on, shut, domain=corner).status == "disjoint"
    assert check_ambiguity(model, shut, on, domain=corner).status == "disjoint"
    assert outside.status == "disjoint"  # a witness counts inside the domain only


def test_what_is_undecided_is_neither_proven_nor_refuted():
    model, undecided = net(2, 6, 6, 2, seed=0), 0
    for seed in range(30):
        x = 2 * torch.rand(1, 2, generator=noise(seed), dtype=torch.float64) - 1
        target = int(model(x).argmax())
        found = max_verified_eps(model, x, target, domain=(-1.0, 1.0), upper=1.0, steps=3, limits=Limits(max_binaries=0))  # fmt: skip
        if found.last is None or found.last.status != "unknown":
            continue
        undecided += 1
        truth = max_verified_eps(model, x, target, domain=(-1.0, 1.0), upper=1.0, steps=3)
        assert found.verified <= truth.verified and found.falsified >= truth.falsified
    assert undecided >= 3


def test_an_undecided_overlap_is_unknown():
    domain = (-torch.ones(1, 2), torch.ones(1, 2))
    seen = set()
    for seed in range(30):
        model = net(2, 6, 6, 2, seed=seed)
        one, two = (random_pattern(model, (2,), seed + k, free=0.85) for k in (0, 1000))
        if not one.conflicts(two):
            late = check_ambiguity(model, one, two, domain=domain, limits=Limits(time_limit=1e-9))
            seen.add(late.status)
            if late.status == "disjoint":
                assert check_ambiguity(model, one, two, domain=domain).status == "disjoint"
    assert "unknown" in seen


def test_the_instrument_counts_what_its_pieces_find(trained, monkeypatch):
    """Mined from training data, own pattern and right answer, ball of eps in the subject's range: image by image."""
    model, task = trained
    instrument = NeuralSpecification(eps=0.05, delta=0.7, nodes=30)
    subject = Subject(model, "mlp", "image", (1, 8, 8), 10)
    asked: list[tuple[int, ActivationPattern | None]] = []

    def spy(net: nn.Module, nap: ActivationPattern | None, target: int, **options: Any):
        asked.append((target, nap))
        return verify_nap(net, nap, target, **options)

    monkeypatch.setattr("surefoot.certified.nap.instrument.verify_nap", spy)
    finding = instrument.measure(subject, task)
    monkeypatch.undo()
    split = task.sample("nap", 16)
    wide = copy.deepcopy(model).double()
    naps = mine_naps(wide, task.train.x, task.train.labels, delta=0.7)
    coverage = nap_coverage(wide, naps, split.x, split.labels)
    inside, plain, spilled = [], [], []
    for i in range(16):
        x, y = split.x[i : i + 1].double(), int(split.labels[i])
        options: dict[str, Any] = {"center": x, "eps": 0.05, "witness": x, "limits": Limits(max_nodes=30)}
        right = int(wide(x).argmax()) == y
        plain.append(right and verify_nap(wide, None, y, **options).verified)
        own = bool(coverage.own[i])
        inside.append(right and own and (plain[-1] or verify_nap(wide, naps[y], y, **options).verified))
        others = [c for c in naps if c != y and bool(coverage.followed[i, list(naps).index(c)])]
        spilled.append(len(others) > 0)
    assert finding.samples is not None
    assert finding.samples.tolist() == [float(v) for v in inside]
    parts = [part.samples.tolist() for part in finding.parts if part.samples is not None]
    assert parts == [coverage.own.double().tolist(), [float(v) for v in spilled], [float(v) for v in plain]]
    within = [(target, nap) for target, nap in asked if nap is not None]
    assert len(asked) > len(within) > 0  # the plain ball first, and the pattern for what is left
    assert all(nap <= naps[target] <= nap for target, nap in within)
    tampered = copy.deepcopy(model).train()
    assert instrument.measure(subject.with_model(tampered), task).value == finding.value and tampered.training
