"""Auto-PGD: projected gradient descent that chooses its own step size (Croce & Hein, 2020, arXiv 2003.01690).

    z       = P(x_k + eta d(g_k))                       d(g) = sign(g), or g / ||g||_2;  eta starts at 2 eps
    x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))       the first step has no momentum

At the checkpoints w_j = ceil(p_j N), p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), eta is halved and
the run goes back to its best point if fewer than 75 % of the steps since the last checkpoint raised the loss, or if eta was
not halved at the last checkpoint and the best loss has not moved since. All of this per example. A restart begins
without momentum: the difference to the iterate before it belongs to a path that was given up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surefoot.errors import check
from surefoot.nn.attacks.ball import Ball, Bounds, Norm
from surefoot.nn.attacks.losses import Loss, get_loss, loss_note
from surefoot.nn.attacks.run import (
    AttackResult,
    Keep,
    Mode,
    Model,
    attacking,
    check_attack,
    check_gradient,
    default_generator,
    loss_and_gradient,
    piece_size,
    wrong,
)

MOMENTUM = 0.75
RAISED = 0.75  # share of loss-raising steps below which eta is halved
SHRINK_AT = 0.1  # share of broken examples at which the batch is made smaller; copying at each step would cost more


def checkpoints(steps: int) -> list[int]:
    """The steps after which the step size is looked at; in hundredths, as float sums miss the rounding (58 for 57)."""
    last, current, found = 0, 22, []
    while (at := -(-current * steps // 100)) <= steps:
        found.append(at)
        last, current = current, current + max(current - last - 3, 6)
    return sorted(set(found))


@dataclass
class _State:
    """Everything that moves with an example; `take` drops the others."""

    index: Tensor  # int64 [A]
    y: Tensor
    target: Tensor | None
    x: Tensor
    previous: Tensor
    gradient: Tensor
    loss: Tensor
    best_x: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    best_at_check: Tensor
    eta: Tensor  # [A, 1, ...]
    raised: Tensor  # int64 [A]
    halved: Tensor  # bool [A]

    def take(self, alive: Tensor) -> None:
        for name, tensor in vars(self).items():
            setattr(self, name, None if tensor is None else tensor[alive])

    def look(self, since: int) -> None:
        """The checkpoint rule; `since` steps were made since the last one."""
        few = self.raised < RAISED * since
        stuck = ~self.halved & (self.best_loss == self.best_at_check)
        self.halved = few | stuck
        wide = self.halved.view(self.eta.shape)
        self.eta = torch.where(wide, self.eta / 2, self.eta)
        self.x = torch.where(wide, self.best_x, self.x)
        self.previous = torch.where(wide, self.best_x, self.previous)
        self.gradient = torch.where(wide, self.best_gradient, self.gradient)
        self.loss = torch.where(self.halved, self.best_loss, self.loss)
        self.best_at_check = self.best_loss
        self.raised = torch.zeros_like(self.raised)


def apgd(
    model: Model,
    x: Tensor,  # [B, ...] within bounds
    y: Tensor,  # int64 [B]
    *,
    eps: float = 8 / 255,
    norm: Norm = "linf",
    steps: int = 100,
    restarts: int = 1,
    loss: str | Loss = "ce",
    target: Tensor | None = None,  # int64 [B]: use the targeted DLR loss towards these classes
    bounds: Bounds = (0.0, 1.0),
    random_start: bool = True,  # restarts after the first begin at random in any case
    start: Tensor | None = None,  # [B, ...]: where the first one begins
    early_stop: bool = True,
    keep: Keep = "first",
    mode: Mode = "eval",
    eot: int = 1,
    record: bool = False,  # fill AttackResult.history; needs early_stop=False and one restart
    generator: torch.Generator | None = None,
) -> AttackResult:
    """The strongest of `restarts` runs of `steps` steps. Targeted or not, an example is broken when its prediction is not `y`.

    `eot`, `keep`, `start` and callable losses as in `pgd`.
    """
    check_attack(
        x, y, eps, norm, bounds, steps=steps, restarts=restarts, eot=eot, start=start, target=target, keep=keep
    )
    check(not record or (not early_stop and restarts == 1), "record=True needs early_stop=False and one restart, so that every example takes every step.")  # fmt: skip
    generator, x = default_generator(generator), x.detach()
    function, first = get_loss(loss), eot == 1 and keep == "first"
    piece = piece_size(x, mode) if isinstance(loss, str) else len(x)
    whole = Ball.around(x, eps, norm, bounds)
    best, best_loss, broken = x.clone(), x.new_full((len(x),), -torch.inf), torch.zeros_like(y, dtype=torch.bool)
    passes, notes, history = 0, (), None
    with attacking(model, mode, generator, x.device):
        for restart in range(restarts if eps > 0 else 1):
            alive = ~broken if early_stop and first else torch.ones_like(broken)
            index = alive.nonzero()[:, 0]
            if len(index) == 0:
                break
            ball = whole if len(index) == len(x) else whole.take(index)
            if start is not None and restart == 0:
                point = ball.project(start.detach()[index])
            else:
                point = ball.sample(generator) if (random_start or restart > 0) and eps > 0 else ball.centre.clone()
            goal = None if target is None else target[index]
            found = _run(model, ball, point, y[index], goal, function, steps, eot, piece, early_stop and first, first, record)  # fmt: skip
            passes, history, classes = passes + found.passes, found.history, found.classes
            notes = loss_note(loss, classes) if target is None else _targeted_note(classes)
            better = found.loss > best_loss[index]
            if first:
                better = (better | found.broken) & ~broken[index]
            hit = better.nonzero()[:, 0]
            at = index[hit]
            best[at], best_loss[at], broken[at] = found.x[hit], found.loss[hit], found.broken[hit]
    return AttackResult(best, broken, best_loss, passes, notes, history)


@dataclass(frozen=True)
class _Found:
    x: Tensor
    broken: Tensor
    loss: Tensor
    passes: int
    classes: int
    history: Tensor | None


def _run(
    model: Model,
    ball: Ball,
    point: Tensor,  # [B, ...] where to begin
    y: Tensor,
    target: Tensor | None,
    function: Loss,
    steps: int,
    eot: int,
    piece: int,
    drop: bool,  # broken examples leave
    first: bool,  # keep the first misclassified point, else the one of highest loss
    record: bool,
) -> _Found:
    eps, n = ball.eps, len(y)
    scores, value, gradient = loss_and_gradient(
        model, point, y, function, eot, goal=target, gradient=eps > 0, first=True, piece=piece
    )
    passes, classes, fooled = eot * n, scores.shape[1], wrong(scores, y)
    if eps == 0:
        return _Found(ball.centre.clone(), fooled, value, passes, classes, None)
    if not bool(fooled.all()):
        check_gradient(gradient)
    best, best_loss, broken = point.clone(), value.clone(), fooled
    state = _State(
        torch.arange(n, device=y.device), y, target, point, point, gradient, value, point, gradient, value, value,
        point.new_full((n, *[1] * (point.dim() - 1)), 2.0 * eps), torch.zeros_like(y), torch.ones_like(broken),
    )  # fmt: skip
    trace, marks, last = [value], checkpoints(steps), 0
    for step in range(1, steps + 1):
        if drop:
            gone = broken[state.index]
            count = int(gone.sum())
            if count == len(gone):
                break
            if count > SHRINK_AT * len(gone):
                alive = (~gone).nonzero()[:, 0]
                state.take(alive)
                ball = ball.take(alive)
        ahead = ball.project(state.x + state.eta * ball.direction(state.gradient))
        if step > 1:
            moved = torch.lerp(state.x, ahead, MOMENTUM)
            ahead = ball.project(moved.add_(state.x - state.previous, alpha=1 - MOMENTUM))
        state.previous, state.x = state.x, ahead
        scores, value, state.gradient = loss_and_gradient(
            model, ahead, state.y, function, eot, goal=state.target, gradient=step < steps, piece=piece
        )
        passes += eot * len(ahead)
        state.raised = state.raised + (value > state.loss)
        state.loss = value
        better = value > state.best_loss
        wide = better.view(state.eta.shape)
        state.best_x = torch.where(wide, ahead, state.best_x)
        state.best_loss = torch.where(better, value, state.best_loss)
        if step < steps:
            state.best_gradient = torch.where(wide, state.gradient, state.best_gradient)
        fooled = wrong(scores, state.y)
        if first:
            new = (fooled & ~broken[state.index]).nonzero()[:, 0]
            at = state.index[new]
            best[at], best_loss[at], broken[at] = ahead[new], value[new], True
        else:
            broken = torch.where(better, fooled, broken)
        if record:
            trace.append(state.best_loss)
        if step in marks and step < steps:
            state.look(step - last)
            last = step
    rest = ~broken[state.index] if first else torch.ones_like(broken[state.index])
    best[state.index[rest]], best_loss[state.index[rest]] = state.best_x[rest], state.best_loss[rest]
    return _Found(best, broken, best_loss, passes, classes, torch.stack(trace) if record else None)


def _targeted_note(num_classes: int) -> tuple[str, ...]:
    if num_classes < 4:
        return ("Targeted DLR needs 4 classes; the difference of two logits was used instead.",)
    return ()
