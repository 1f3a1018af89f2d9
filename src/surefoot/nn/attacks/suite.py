"""Robust accuracy by several attacks together: a number that one unlucky attack cannot flatter.

    robust accuracy = share of examples right on the clean input and under every attack

`standard_suite` is the AutoAttack class (Croce & Hein, 2020, arXiv 2003.01690): APGD-CE, then towards the classes ranked 2nd,
3rd, ... by the clean logits APGD-T and FAB-T, then Square, each on the examples that are still robust, so that the dearer
ones see few. `rand_suite` is for models that draw random numbers: APGD-CE and APGD-DLR with gradients
averaged over `eot` draws, judged over `draws` fresh ones.

`attack_target` names another model to take gradients of: a smooth stand-in for a pipeline that hides its gradients, or a
separately trained model (transfer). APGD then runs to its highest loss on the target, and `model` judges the points; Square, which needs no
gradient, queries `model` itself; FAB, whose points lie at the target's own boundary, is left out. The protocol that
combines both ways is `adaptive_suite`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from surefoot.errors import check, check_at_least, check_choice
from surefoot.nn.attacks.apgd import apgd
from surefoot.nn.attacks.ball import Ball, Bounds, Norm
from surefoot.nn.attacks.fab import fab
from surefoot.nn.attacks.run import (
    AttackResult,
    Mode,
    Model,
    ZeroGradient,
    attacking,
    check_attack,
    check_logits,
    default_generator,
    wrong,
)
from surefoot.nn.attacks.square import square

Decision = Literal["single", "majority", "mean"]
ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
STRAIGHT = "Gradients were taken of another model than the one judged: the accuracy is as good as that stand-in."


@dataclass(frozen=True)
class SuiteResult:
    """`survivors` counts, attack by attack, the examples robust so far; `x` holds the points that broke the others."""

    x: Tensor  # [N, ...]
    clean: Tensor  # bool [N] right without attack
    robust: Tensor  # bool [N] right without attack and under every attack
    survivors: Mapping[str, int]
    passes: int
    notes: tuple[str, ...] = ()
    decision: Decision = "single"  # how a prediction is made: one pass, or majority or mean probability over draws
    draws: int = 1
    clean_error: float = 0.0  # standard error over draws of a random model's clean accuracy
    broken_by: tuple[str, ...] = field(default=(), repr=False)  # [N] name of the attack, "" where none

    @property
    def clean_accuracy(self) -> float:
        return self.clean.double().mean().item()

    @property
    def robust_accuracy(self) -> float:
        return self.robust.double().mean().item()


def standard_suite(
    model: Model,
    x: Tensor,  # [N, ...] within bounds
    y: Tensor,  # int64 [N]
    *,
    eps: float = 8 / 255,
    norm: Norm = "linf",
    bounds: Bounds = (0.0, 1.0),
    attacks: Sequence[str] = ATTACKS,
    attack_target: Model | None = None,
    steps: int = 100,
    fab_steps: int | None = None,  # as `steps`
    targets: int = 9,
    queries: int = 5000,
    restarts: int = 1,
    batch_size: int = 256,
    mode: Mode = "eval",
    generator: torch.Generator | None = None,
) -> SuiteResult:
    """The cascade. More `targets` than other classes are cut, and an attack that cannot run is left out; both are noted.

    A restart repeats every attack on what it left; those of APGD-T go through all targets again.
    """
    check_attack(x, y, eps, norm, bounds, steps=steps, restarts=restarts)
    for name in attacks:
        check_choice("attacks", name, ATTACKS)
    check_at_least("batch_size", batch_size, 1)
    check_at_least("targets", targets, 1)
    generator, x = default_generator(generator), x.detach()
    logits = _logits(model, x, y, mode, generator, batch_size)
    classes, order = logits.shape[1], logits.argsort(dim=1, descending=True, stable=True)
    judge = None if attack_target is None else _single_judge(model, mode, generator, batch_size)
    state = Cascade(x, y, ~wrong(logits, y), batch_size, judge)
    state.passes += len(x)
    if mode == "train":
        state.note("The model was attacked in training mode.")
    if "fab-t" not in attacks or attack_target is not None:
        state.note("FAB-T was left out.")
    if attack_target is not None:
        state.note(STRAIGHT)
    if {"apgd-t", "fab-t"} & set(attacks) and targets > classes - 1:
        state.note(f"{targets} targets were asked for; there are only {classes - 1} other classes.")
    gradient_of = model if attack_target is None else attack_target
    keep = {"keep": "first" if attack_target is None else "strongest", "early_stop": attack_target is None}
    shared = {"eps": eps, "norm": norm, "bounds": bounds, "mode": mode, "generator": generator}
    untargeted: list[Tensor | None] = [None]
    goals = [order[:, rank] for rank in range(1, min(targets, classes - 1) + 1)]
    for name in attacks if eps > 0 else ():
        for restart in range(restarts):
            if name.startswith("apgd"):
                starts = Ball.around(x, eps, norm, bounds).sample(generator)
                for goal in untargeted if name == "apgd-ce" else goals:
                    state.run(name, lambda i: apgd(gradient_of, x[i], y[i], steps=steps, target=_at(goal, i), start=starts[i], **keep, **shared))  # noqa: B023  # fmt: skip
            elif name == "fab-t" and attack_target is None:
                for aim in goals:
                    state.run(name, lambda i: fab(model, x[i], y[i], steps=fab_steps or steps, target=aim[i], random_start=restart > 0, **shared))  # noqa: B023  # fmt: skip
            elif name == "square" and norm == "l2" and (x.dim() != 4 or min(x.shape[2:]) < 5):
                state.note("Square was left out: in L2 it needs images of at least 5 x 5.")
            elif name == "square":
                state.run(name, lambda i: square(model, x[i], y[i], queries=queries, **shared))
    return state.result()


def rand_suite(
    model: Model,
    x: Tensor,  # [N, ...] within bounds
    y: Tensor,  # int64 [N]
    *,
    eps: float = 8 / 255,
    norm: Norm = "linf",
    bounds: Bounds = (0.0, 1.0),
    attack_target: Model | None = None,
    steps: int = 100,
    eot: int = 20,
    draws: int = 10,
    restarts: int = 1,
    decision: Decision = "majority",
    batch_size: int = 256,
    mode: Mode = "eval",
    generator: torch.Generator | None = None,
) -> SuiteResult:
    """APGD-CE and APGD-DLR with expectation over transformations, for a model whose answer changes from call to call.

    Clean and attacked predictions are both made by `decision` over `draws` fresh draws. `clean_error` is the standard
    error over those draws of the accuracy of one draw.
    """
    check_attack(x, y, eps, norm, bounds, steps=steps, restarts=restarts, eot=eot)
    check_choice("decision", decision, ("majority", "mean"))
    check_at_least("draws", draws, 2)
    generator, x = default_generator(generator), x.detach()
    _logits(model, x[:1], y[:1], mode, generator, 1)
    poll = {"draws": draws, "decision": decision, "mode": mode, "generator": generator, "batch_size": batch_size}
    answer, votes = decide(model, x, **poll)
    right = (votes == y).double().mean(1)
    state = Cascade(x, y, answer == y, batch_size, lambda at, labels: decide(model, at, **poll)[0].ne(labels), draws)
    state.passes += draws * len(x)
    if attack_target is not None:
        state.note(STRAIGHT)
    gradient_of = model if attack_target is None else attack_target
    shared = {"eps": eps, "norm": norm, "bounds": bounds, "mode": mode, "generator": generator, "eot": eot, "steps": steps}  # fmt: skip
    for loss in ("ce", "dlr") if eps > 0 else ():
        for _ in range(restarts):
            state.run(f"apgd-{loss}", lambda i: apgd(gradient_of, x[i], y[i], loss=loss, keep="strongest", **shared))  # noqa: B023  # fmt: skip
    error = (right.std() / draws**0.5).item()
    return state.result(decision=decision, draws=draws, clean_error=error)


class Cascade:
    """Attacks one after the other, each on the examples that are still right; the bookkeeping of every suite."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        clean: Tensor,
        batch_size: int,
        judge: Callable[[Tensor, Tensor], Tensor] | None = None,  # (x, y) -> bool wrong, for random models
        draws: int = 1,
    ) -> None:
        self.x, self.y, self.clean, self.batch_size, self.judge, self.draws = (
            x.clone(),
            y,
            clean,
            batch_size,
            judge,
            draws,
        )
        self.robust, self.passes, self.notes = clean.clone(), 0, dict[str, None]()
        self.survivors: dict[str, int] = {}
        self.broken_by = [""] * len(x)

    def note(self, sentence: str) -> None:
        self.notes[sentence] = None

    def run(self, name: str, attack: Callable[[Tensor], AttackResult]) -> None:
        """`attack(index)` works on the examples at `index`; a batch without any gradient is noted, not fatal."""
        alive = self.robust.nonzero()[:, 0]
        for index in alive.split(self.batch_size) if len(alive) else ():
            try:
                found = attack(index)
            except ZeroGradient as error:
                self.note(f"{name}: {error}")
                continue
            self.notes.update(dict.fromkeys(found.notes))
            self.passes += found.passes
            self.break_by(name, index, found.x, found.broken)
        self.survivors[name] = int(self.robust.sum())

    def break_by(self, name: str, index: Tensor, points: Tensor, broken: Tensor) -> None:
        """Count `points` against the examples at `index`, after the judge where there is one."""
        if self.judge is not None:
            broken = self.judge(points, self.y[index])
            self.passes += self.draws * len(index)
        hit = index[broken]
        self.x[hit], self.robust[hit] = points[broken], False
        for at in hit.tolist():
            self.broken_by[at] = name

    def result(self, *, decision: Decision = "single", draws: int = 1, clean_error: float = 0.0) -> SuiteResult:
        return SuiteResult(
            self.x, self.clean, self.robust, dict(self.survivors), self.passes, tuple(self.notes), decision, draws,
            clean_error, tuple(self.broken_by),
        )  # fmt: skip


@torch.no_grad()
def decide(
    model: Model,
    x: Tensor,  # [N, ...]
    *,
    draws: int = 10,
    decision: Decision = "majority",
    mode: Mode = "eval",
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # int64 [N], int64 [draws, N]
    """A random model's prediction over fresh draws, and the prediction of every draw."""
    check(draws >= 1, f"draws must be at least 1, got {draws}.")
    votes, total = [], None
    with attacking(model, mode, default_generator(generator), x.device), torch.no_grad():
        for _ in range(draws):
            logits = torch.cat([model(chunk) for chunk in x.split(batch_size)])
            votes.append(logits.argmax(1))
            mark = logits.softmax(1) if decision == "mean" else torch.nn.functional.one_hot(votes[-1], logits.shape[1])
            total = mark if total is None else total + mark
    assert total is not None
    return total.argmax(1), torch.stack(votes)


def _at(goal: Tensor | None, index: Tensor) -> Tensor | None:
    return None if goal is None else goal[index]


def _single_judge(model: Model, mode: Mode, generator: torch.Generator, batch_size: int) -> Callable[[Tensor, Tensor], Tensor]:  # fmt: skip
    return lambda at, labels: wrong(_logits(model, at, labels, mode, generator, batch_size), labels)


@torch.no_grad()
def is_random(model: Model, x: Tensor, generator: torch.Generator | None = None, mode: Mode = "eval") -> bool:
    """Whether two calls on the same input give different logits."""
    with attacking(model, mode, default_generator(generator), x.device), torch.no_grad():
        return not torch.allclose(model(x), model(x), rtol=1e-4, atol=1e-5, equal_nan=True)


@torch.no_grad()
def _logits(model: Model, x: Tensor, y: Tensor, mode: Mode, generator: torch.Generator, batch_size: int) -> Tensor:
    with attacking(model, mode, generator, x.device), torch.no_grad():
        pieces = [check_logits(model(a), b) for a, b in zip(x.split(batch_size), y.split(batch_size))]
    return torch.cat(pieces)
