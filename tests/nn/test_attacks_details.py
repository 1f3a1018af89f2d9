"""What a plausible slip inside an attack would change: each test here goes red for one, and robust accuracies alone would not show it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.nn.attacks import (
    AttackResult,
    adaptive_suite,
    apgd,
    attacking,
    checkpoints,
    decide,
    margin,
    masking_diagnostics,
    pgd,
    pgd_train,
    rand_suite,
    square,
    standard_suite,
)
from surefoot.nn.attacks.ball import Ball
from surefoot.nn.attacks.run import loss_and_gradient, sign_draw
from surefoot.nn.attacks.square import _move, _oriented, _stripes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64)


def net(features: int = 6, classes: int = 4) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(features, 20), nn.Tanh(), nn.Linear(20, classes)).double()
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator(k), dtype=torch.float64))
    return model.eval()


class Watched(nn.Module):
    """Keeps every batch that it is shown."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return self.model(x)


# --- PGD ------------------------------------------------------------------------------------------------------------


def plain_descent(model: nn.Module, x: Tensor, y: Tensor, eps: float, size: float, steps: int, norm: str) -> list[Tensor]:  # fmt: skip
    """Every iterate of the textbook loop, one example after another."""
    found = []
    for image, label in zip(x.split(1), y.split(1)):
        point, path = image, [image]
        for _ in range(steps):
            leaf = point.clone().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(model(leaf), label), leaf)
            moved = point + size * (slope.sign() if norm == "linf" else slope / slope.norm()) - image
            moved = moved.clamp(-eps, eps) if norm == "linf" else moved * min(1.0, eps / float(moved.norm()))
            point = (image + moved).clamp(0, 1)
            path.append(point)
        found.append(torch.cat(path))
    return list(torch.stack(found, 1))  # [steps + 1] of [B, ...]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_training_attack_is_the_textbook_loop(norm):
    """Step count, direction and projection: 5 steps that leave the ball and the bounds."""
    model, x, y = net(), rand(12, 6), torch.arange(12) % 4
    path = plain_descent(model, x, y, 0.2, 0.09, 5, norm)
    watched = Watched(model)
    found = pgd_train(watched, x, y, eps=0.2, step_size=0.09, steps=5, norm=norm, random_start=False)
    np.testing.assert_allclose(found, path[-1], atol=1e-12)
    assert len(watched.seen) == 5
    away = path[-1] - x
    size = away.abs().amax(1) if norm == "linf" else away.norm(dim=1)
    assert bool((size > 0.19).any()) and bool(((path[-1] == 0) | (path[-1] == 1)).any())
    watched.seen.clear()
    pgd_train(watched, x, y, eps=0.2, step_size=0.09, steps=5, norm=norm, generator=generator(3))
    start = watched.seen[0] - x
    assert bool((start.abs().amax(1) > 1e-3).all())  # random, and inside
    assert bool(((start.abs().amax(1) if norm == "linf" else start.norm(dim=1)) <= 0.2 + 1e-12).all())


def test_training_attack_sees_the_model_in_the_mode_it_is_told():
    model = nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 4)).double().train()
    for k, parameter in enumerate(model.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator(k), dtype=torch.float64)
    x, y = rand(12, 6), torch.arange(12) % 4
    settings: dict[str, Any] = {"eps": 0.1, "steps": 3, "norm": "l2", "generator": None}
    usual, told = pgd_train(model, x, y, **settings), pgd_train(model, x, y, mode="train", **settings)
    assert model.training
    assert torch.equal(usual, pgd_train(copy.deepcopy(model).eval(), x, y, **settings))
    assert not torch.allclose(usual, told, atol=1e-4)


def test_pgd_keeps_the_first_misclassified_iterate_whether_or_not_it_stops():
    model, x = net(), 0.3 + 0.4 * rand(40, 6)
    with torch.no_grad():
        y = model(x).argmax(1)
    path = plain_descent(model, x, y, 0.3, 0.02, 15, "linf")
    with torch.no_grad():
        wrong = torch.stack([model(point).argmax(1) != y for point in path])
    first = torch.where(wrong.any(0), wrong.double().argmax(0), -1)
    late = (first >= 0) & (first < 15)
    assert late.sum() >= 10
    for early_stop in (True, False):
        found = pgd(model, x, y, eps=0.3, step_size=0.02, steps=15, random_start=False, early_stop=early_stop)
        assert torch.equal(found.broken, first >= 0)
        for k in late.nonzero()[:, 0].tolist():
            np.testing.assert_allclose(found.x[k], path[int(first[k])][k], atol=1e-9)


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_with_several_draws_a_gradient_the_strongest_point_counts_and_not_the_first_wrong_one(attack):
    """On a model without randomness, several draws are one draw with `keep="strongest"`."""
    model, x = net(), 0.3 + 0.4 * rand(40, 6)
    with torch.no_grad():
        y = model(x).argmax(1)
    shared = {"eps": 0.3, "steps": 12, "random_start": False}
    many = attack(model, x, y, eot=2, **shared)
    strongest = attack(model, x, y, keep="strongest", early_stop=False, **shared)
    first = attack(model, x, y, early_stop=False, **shared)
    np.testing.assert_allclose(many.x, strongest.x, atol=1e-12)
    assert torch.equal(many.broken, strongest.broken)
    assert (strongest.x - first.x).abs().amax(1).gt(1e-6).sum() >= 10
    with torch.no_grad():  # broken is said of the point that is returned
        assert torch.equal(strongest.broken, model(strongest.x).argmax(1) != y)


def test_the_strongest_point_is_not_called_broken_because_a_weaker_one_was():
    """The loss here is not the margin: its highest point is right, one on the way is wrong."""
    line = lambda z: torch.stack([torch.zeros_like(z[:, 0]), (z[:, 0] - 0.2).square() - 0.01], 1)  # noqa: E731
    x, y = torch.zeros(3, 1, dtype=torch.float64), torch.ones(3, dtype=torch.int64)  # wrong for 0.1 < z < 0.3
    upward = lambda logits, y: logits[:, 1]  # noqa: E731
    for attack in (pgd, apgd):
        found = attack(line, x + 0.12, y, eps=0.6, steps=20, loss=upward, random_start=False, early_stop=False, keep="strongest", bounds=None)  # fmt: skip
        with torch.no_grad():
            assert torch.equal(found.broken, line(found.x).argmax(1) != y)
        assert not bool(found.broken.any())  # it began at a wrong point


@pytest.mark.parametrize("attack", [pgd, apgd])
@pytest.mark.parametrize("random_start", [True, False])
def test_every_restart_begins_at_a_random_point_of_its_own(attack, random_start):
    watched, x, y = Watched(net()), 0.3 + 0.4 * rand(5, 6), torch.arange(5) % 4
    attack(watched, x, y, eps=0.1, steps=2, restarts=3, random_start=random_start, early_stop=False)
    starts = [watched.seen[k] - x for k in (0, 3, 6)]
    assert torch.equal(starts[0], torch.zeros_like(x)) is not random_start
    assert all(bool((s.abs() <= 0.1 + 1e-12).all()) and bool(s.abs().amax(1).gt(0.01).all()) for s in starts[1:])
    assert not torch.equal(starts[1], starts[2]) and not torch.equal(starts[0], starts[1])


def test_draws_inside_an_attack_are_not_those_of_the_next_one():
    """Attacker and judge share a generator; with one seed for both the judge would repeat the attacker's draws."""
    source, seen = generator(5), []
    for _ in range(3):
        with attacking(nn.Identity(), "eval", source, torch.device("cpu")):
            seen.append(torch.rand(4))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    with attacking(nn.Identity(), "eval", generator(5), torch.device("cpu")):
        assert torch.equal(torch.rand(4), seen[0])


# --- APGD's rule, on losses made up for it ------------------------------------------------------------------------------


def plain_rule(values: list[float], slopes: Tensor, x0: Tensor, eps: float, mistake: str = "") -> Tensor:
    """The iterates of one example whose k-th loss and gradient are given, from the paper's algorithm; or with a mistake planted."""
    steps, marks = len(values) - 1, checkpoints(len(values) - 1)
    project = lambda x: x0 + (x - x0).clamp(-eps, eps)  # noqa: E731
    eta, x, previous, f, g = 2 * eps, x0, x0, values[0], slopes[0]
    best, best_x, best_g, path = f, x, g, [x]
    last, raised, halved, at_mark = 0, 0, mistake != "second rule at the first checkpoint", f
    for k in range(1, steps + 1):
        z = project(x + eta * g.sign())
        previous, x = x, z if k == 1 else project(x + 0.75 * (z - x) + 0.25 * (x - previous))
        path.append(x)
        raised += values[k] > f
        f, g = values[k], slopes[k]
        if f > best:
            best, best_x, best_g = f, x, g
        if k in marks:
            stuck = best == at_mark and (not halved or mistake == "second rule after a halving")
            halved = raised < 0.75 * (k - last) or (stuck and mistake != "no second rule")
            if halved:
                eta, x, previous, f = eta / 2, best_x, best_x, best
                g = g if mistake == "gradient not taken back" else best_g
            at_mark, last, raised = best, k, 0
    return torch.stack(path)


MISTAKES = ("no second rule", "second rule after a halving", "second rule at the first checkpoint", "gradient not taken back")  # fmt: skip


def test_apgd_follows_both_rules_on_losses_that_tell_them_apart():
    """Losses that climb slowly after a fall raise most steps without a new best; smooth nets hardly ever show them."""
    n, steps, eps, source = 96, 50, 0.3, generator(2)
    fall = torch.rand(steps + 1, n, generator=source, dtype=torch.float64) < 0.08
    fall[1, : n // 2] = True
    climbs = 0.1 * torch.rand(steps + 1, n, generator=source, dtype=torch.float64)
    values = torch.where(fall, -2.0, climbs).cumsum(0)
    slopes = torch.randn(steps + 1, n, 3, generator=source, dtype=torch.float64)
    x, y, calls = rand(n, 3, seed=7), torch.zeros(n, dtype=torch.int64), iter(range(steps + 1))
    watched = Watched(nn.Identity())

    def scripted(logits: Tensor, y: Tensor) -> Tensor:
        k = next(calls)
        tilt = (slopes[k] * logits).sum(1)
        return values[k] + (tilt - tilt.detach())

    apgd(watched, x, y, eps=eps, steps=steps, loss=scripted, bounds=None, random_start=False, early_stop=False)
    path = torch.stack(watched.seen)
    differs = dict.fromkeys(MISTAKES, 0)
    for i in range(n):
        of_one = values[:, i].tolist(), slopes[:, i], x[i], eps
        np.testing.assert_allclose(path[:, i], plain_rule(*of_one), atol=1e-12)
        for mistake in MISTAKES:
            differs[mistake] += not torch.allclose(path[:, i], plain_rule(*of_one, mistake), atol=1e-9)
    assert min(differs.values()) >= 2, differs


# --- Square ---------------------------------------------------------------------------------------------------------


def test_square_begins_with_stripes_of_signs_for_each_channel_and_paints_each_channel_by_itself():
    x = torch.full((40, 3, 6, 6), 0.5)
    stripes = (_stripes(Ball.around(x, 0.1, "linf", (0, 1)), generator()) - 0.5).sign()
    assert bool((stripes == stripes[:, :, :1]).all())  # vertical
    assert 0.4 < (stripes[:, 0, 0] == stripes[:, 1, 0]).double().mean() < 0.6
    watched = Watched(nn.Sequential(nn.Flatten(), nn.Linear(108, 2)))
    with torch.no_grad():
        y = watched.model(x).argmax(1)
    square(watched, x, y, eps=0.1, queries=1, early_stop=False, generator=generator(1))
    first, second = (seen.view_as(x) for seen in watched.seen)
    patterns = set()
    for k in range(len(x)):
        changed = (first[k] != second[k]).any(0)
        if bool(changed.any()):
            row, column = changed.nonzero()[0].tolist()
            patterns.add(tuple((second[k, :, row, column] - 0.5).sign().tolist()))
    assert len(patterns) > 2  # one sign for all channels gives two


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.15)])
def test_square_returns_the_best_of_all_it_asked_for(norm, eps):
    model = nn.Sequential(nn.Flatten(), *net(64, 4).children())
    watched, x = Watched(model), 0.2 + 0.6 * rand(20, 1, 8, 8)
    with torch.no_grad():
        y = model(x).argmax(1)
    found = square(watched, x, y, eps=eps, norm=norm, queries=40, early_stop=False, generator=generator(2))
    with torch.no_grad():
        asked = torch.stack([margin(model(seen.view_as(x)), y) for seen in watched.seen])
        ours = model(found.x)
    assert len(asked) == 41 and bool((asked[1:].argmax(0) > 3).any())
    np.testing.assert_allclose(margin(ours, y), asked.amax(0), atol=1e-12)
    np.testing.assert_allclose(found.loss, asked.amax(0), atol=1e-12)
    assert torch.equal(found.broken, ours.argmax(1) != y) and 0 < found.broken.sum() < 20


def test_square_in_l2_moves_the_budget_as_algorithm_3_says():
    """Example by example and channel by channel, on the same draws."""
    b, c, h, w, share, side, eps = 6, 2, 9, 8, 0.12, 3, 0.7
    x = torch.full((b, c, h, w), 0.5, dtype=torch.float64)
    delta = torch.randn(b, c, h, w, generator=generator(1), dtype=torch.float64)
    delta = 0.8 * eps * delta / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)  # some budget is unused
    ball = Ball.around(x, eps, "l2", None)
    ours = _move(ball, x + delta, share, generator(4)) - x
    source = generator(4)
    r1, c1, r2, c2 = (torch.randint(n - side + 1, (b,), generator=source) for n in (h, w, h, w))
    sign = torch.where(sign_draw((b, c, 1, 1), x, source), 1.0, -1.0)
    eta = _oriented(side, x, source)
    for i in range(b):
        new = delta[i].clone()
        one, two = torch.zeros(h, w, dtype=torch.bool), torch.zeros(h, w, dtype=torch.bool)
        one[r1[i] : r1[i] + side, c1[i] : c1[i] + side] = True
        two[r2[i] : r2[i] + side, c2[i] : c2[i] + side] = True
        unused = eps**2 - delta[i].square().sum()
        new[:, two] = 0
        for k in range(c):
            old = delta[i, k][one].view(side, side)
            available = (delta[i, k][one | two].square().sum() + unused / c).sqrt()
            bump = sign[i, k, 0, 0] * eta[i, 0] + old / old.norm()
            new[k][one] = (bump / bump.norm() * available).flatten()
        np.testing.assert_allclose(ours[i], eps * new / new.norm(), atol=1e-12)


# --- suites: what they ask of the attacks -----------------------------------------------------------------------------


class Log:
    """Stands in for `apgd` in a module: keeps what it was called with and breaks nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Tensor], dict[str, Any]]] = []

    def __call__(self, model: Callable[..., Tensor], x: Tensor, y: Tensor, **settings: Any) -> AttackResult:
        self.calls.append((model, {**settings, "x": x, "y": y}))
        moved = (x + 0.01 * len(self.calls)).clamp(0, 1)
        return AttackResult(moved, torch.zeros_like(y, dtype=torch.bool), torch.zeros(len(x)), len(x))


def easy() -> tuple[nn.Module, Tensor, Tensor]:
    """A model that no small change fools, so that every stage sees every example."""
    layer = nn.Linear(64, 5)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([5.0, 1.0, 3.0, 2.0, 4.0]))
    return (
        nn.Sequential(nn.Flatten(), layer),
        torch.rand(6, 1, 8, 8, generator=generator()),
        torch.zeros(6, dtype=torch.int64),
    )


def test_targets_are_the_classes_ranked_second_third_and_so_on_by_the_clean_logits(monkeypatch):
    from surefoot.nn.attacks import suite

    log, (model, x, y) = Log(), easy()
    monkeypatch.setattr(suite, "apgd", log)
    standard_suite(model, x, y, eps=0.1, attacks=("apgd-t",), targets=3)
    assert [int(call["target"][0]) for _, call in log.calls] == [4, 2, 3]
    assert all(bool((call["start"] - x).abs().amax((1, 2, 3)).gt(0.01).all()) for _, call in log.calls)  # its own start
    other, log.calls = easy()[0], []
    standard_suite(model, x, y, eps=0.1, attacks=("apgd-ce",), attack_target=other, restarts=2)
    assert len(log.calls) == 2 and not torch.equal(*(call["start"] for _, call in log.calls))
    for gradient_of, call in log.calls:
        assert gradient_of is other and call["keep"] == "strongest" and call["early_stop"] is False
    log.calls = []
    rand_suite(model, x, y, eps=0.1, eot=7, steps=11, draws=2)
    assert [(call["loss"], call["eot"], call["steps"], call["keep"]) for _, call in log.calls] == [("ce", 7, 11, "strongest"), ("dlr", 7, 11, "strongest")]  # fmt: skip


class Shaky(nn.Module):
    """Random, and never wrong."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + 0.01 * torch.randn(len(x), 5)


def test_the_adaptive_protocol_asks_for_all_its_stages(monkeypatch):
    from surefoot.nn.attacks import adaptive

    log, (model, x, y) = Log(), easy()
    pipeline, surrogate, parts = Shaky(model), easy()[0], (easy()[0], easy()[0])
    monkeypatch.setattr(adaptive, "apgd", log)
    shared = {"eps": 0.1, "steps": 4, "restarts": 3, "queries": 2, "draws": 5, "surrogate": surrogate, "components": parts}  # fmt: skip
    found = adaptive_suite(pipeline, x, y, **shared)
    assert found.draws == 5 and found.decision == "majority"
    asked = [call for of, call in log.calls if of is pipeline]
    assert all(call["eot"] == 20 for call in asked)
    assert [call["steps"] for call in asked] == [4, 4, 4, 4, 20, 20, 20]  # alone, from three transfers, three long runs
    assert [call.get("start") is not None for call in asked] == [False, True, True, True, False, False, False]
    others = [(of, call) for of, call in log.calls if of is not pipeline]
    assert [of for of, _ in others] == [surrogate, *parts]
    assert all(call["keep"] == "strongest" and call["early_stop"] is False for _, call in others)
    for number, (of, call) in enumerate(log.calls):  # a transfer's own points are where the next one starts
        if of is not pipeline:
            np.testing.assert_allclose(log.calls[number + 1][1]["start"], (call["x"] + 0.01 * (number + 1)).clamp(0, 1))
    log.calls = []
    assert adaptive_suite(model, x, y, **shared).draws == 1  # no randomness: one pass says it
    assert log.calls[0][1].get("eot") == 1


def test_majority_mean_probability_and_nothing_else_decide():
    """Draws on which the majority, the mean probability and the mean logit all differ."""
    lead = torch.tensor([[2.0, 1.0], [2.0, 1.0], [-10.0, -20.0]])  # [draws, B] of class 0 over class 1
    for decision, expected in (("majority", [0, 0]), ("mean", [0, 1])):
        calls = iter(lead)
        model = lambda x: torch.stack([(z := next(calls)), torch.zeros_like(z)], 1)  # noqa: B023, E731
        answer, votes = decide(model, torch.zeros(2, 1), draws=3, decision=decision)  # type: ignore[arg-type]
        assert answer.tolist() == expected
        assert votes.tolist() == [[0, 0], [0, 0], [1, 1]]


def test_several_draws_are_put_together_as_probabilities_and_their_gradients_as_they_are():
    leads = torch.tensor([[2.0, 1.0], [2.0, 1.0], [-10.0, -20.0]])  # [draws, B]
    calls, x, y = iter(leads), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)

    def model(z: Tensor) -> Tensor:
        lead = next(calls)
        return torch.stack([lead + lead.exp().clamp(max=5) * z[:, 0], torch.zeros_like(lead)], 1)

    scores, value, slope = loss_and_gradient(model, x, y, lambda logits, y: logits[:, 0], eot=3)
    np.testing.assert_allclose(scores[:, 0], leads.sigmoid().mean(0), rtol=1e-6)
    np.testing.assert_allclose(value, leads.mean(0), rtol=1e-6)
    np.testing.assert_allclose(slope[:, 0], leads.exp().clamp(max=5).mean(0), rtol=1e-6)


def test_every_point_of_a_random_model_is_judged_by_fresh_draws(monkeypatch):
    """An attack that calls everything broken convinces nobody."""
    from surefoot.nn.attacks import adaptive, suite

    model, x, y = easy()
    claims = lambda model, x, y, **_: AttackResult(x, torch.ones_like(y, dtype=torch.bool), torch.zeros(len(x)), 0)  # noqa: E731
    for module in (adaptive, suite):
        monkeypatch.setattr(module, "apgd", claims)
    settings = {"eps": 0.1, "draws": 3}
    assert rand_suite(Shaky(model), x, y, **settings).robust_accuracy == 1.0
    assert adaptive_suite(Shaky(model), x, y, restarts=1, queries=1, **settings).robust_accuracy == 1.0
    errs = lambda z: model(z).roll(1, 1)  # noqa: E731  a stand-in that is wrong everywhere
    target = standard_suite(model, x, y, eps=0.1, attacks=("apgd-ce",), attack_target=errs)
    assert target.robust_accuracy == 1.0


# --- masking checks that nothing else raises ----------------------------------------------------------------------------


def test_a_moat_that_one_step_leaps_is_called_masking():
    """Small steps stop in a hollow of the margin; the one long step lands behind it."""
    eps = 0.2

    def moat(z: Tensor) -> Tensor:
        t = (z[:, 0] - 0.5) / eps
        lead = 1.0 - 0.5 * torch.sin(3 * torch.pi * t) - 3 * t.clamp_min(0) ** 8
        return torch.stack([lead, torch.zeros_like(lead)], 1)

    x, y = torch.full((30, 2), 0.5, dtype=torch.float64), torch.zeros(30, dtype=torch.int64)
    report = masking_diagnostics(moat, x, y, eps=eps, queries=5, generator=generator())
    found = {check.name: check for check in report.checks}
    assert found["single_step"].suspicious
    assert found["single_step"].numbers == {"single": 0.0, "multi": 1.0}
    assert any("One gradient step breaks more" in line for line in report.warnings)


def test_a_gradient_counts_as_zero_only_where_every_coordinate_is():
    """Half of the inputs do not matter, which is no masking; where nothing matters at three of thirty examples, it is."""
    x, y = 0.2 + 0.6 * rand(30, 4), torch.zeros(30, dtype=torch.int64)

    def half(z: Tensor) -> Tensor:
        return torch.stack([z[:, 0] - z[:, 1], torch.zeros_like(z[:, 0])], 1)

    def dead(z: Tensor) -> Tensor:
        lead = (z[:, 0] - z[:, 1]) * (torch.arange(len(z)) >= 3)
        return torch.stack([lead, torch.zeros_like(lead)], 1)

    for model, share in ((half, 0.0), (dead, 0.1)):
        report = masking_diagnostics(model, x, y, eps=0.05, queries=2, generator=generator())
        (check,) = (check for check in report.checks if check.name == "zero_gradient")
        assert check.numbers["share"] == pytest.approx(share) and check.suspicious == (share > 0.05)
