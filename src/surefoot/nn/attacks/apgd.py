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

from surefoot.errors import check, check_at_least
from surefoot.nn.attacks.ball import Ball, Bounds, Norm
from surefoot.nn.attacks.losses import Loss, get_loss, loss_note
from surefoot.nn.attacks.run import (
    AttackResult,
    Mode,
    Model,
    attacking,
    check_gradient,
    check_inputs,
    default_generator,
    loss_and_gradient,
    piece_size,
    wrong,
)

MOMENTUM = 0.75
RAISED = 0.75  # share of loss-raising steps below which eta is halved
SHRINK_AT = (
    0.1  # share of broken examples at which the batch is made smaller; copying the state at each step would cost more
)


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
    loss: str | Loss = "ce",
    target: Tensor | None = None,  # int64 [B]: use the targeted DLR loss towards these classes
    bounds: Bounds = (0.0, 1.0),
    random_start: bool = True,
    start: Tensor | None = None,  # [B, ...]
    early_stop: bool = True,
    mode: Mode = "eval",
    eot: int = 1,
    record: bool = False,  # fill AttackResult.history; needs early_stop=False
    generator: torch.Generator | None = None,
) -> AttackResult:
    """One APGD run of `steps` steps. Targeted or not, an example is broken when its prediction is not `y`.

    `eot`, `start` and callable losses as in `pgd`.
    """
    check_inputs(x, y, eps, norm, bounds)
    check_at_least("steps", steps, 1)
    check_at_least("eot", eot, 1)
    check(start is None or start.shape == x.shape, "start must have the shape of x.")
    check(target is None or (target.shape == y.shape and target.dtype == torch.int64), "target must be int64 like y.")
    check(not (record and early_stop), "record=True needs early_stop=False, so that every example takes every step.")
    generator, x = default_generator(generator), x.detach()
    early_stop = early_stop and eot == 1
    ball = Ball.around(x, eps, norm, bounds)
    if start is not None:
        point = ball.project(start.detach())
    else:
        point = ball.sample(generator) if random_start and eps > 0 else x.clone()
    function = get_loss(loss)
    best, best_loss, broken = x.clone(), x.new_full((len(x),), -torch.inf), torch.zeros_like(y, dtype=torch.bool)
    passes, trace = 0, []
    marks = checkpoints(steps)

    piece = piece_size(x, mode) if isinstance(loss, str) else len(x)
    with attacking(model, mode, generator, x.device):
        scores, value, gradient = loss_and_gradient(
            model, point, y, function, eot, goal=target, gradient=eps > 0, first=True, piece=piece
        )
        passes += eot * len(x)
        notes = loss_note(loss, scores.shape[1]) if target is None else _targeted_note(scores.shape[1])
        fooled = wrong(scores, y)
        if eps == 0:
            return AttackResult(x.clone(), fooled, value, passes, notes)
        if not bool(fooled.all()):
            check_gradient(gradient)
        flat = (len(x), *[1] * (x.dim() - 1))
        state = _State(
            torch.arange(len(x), device=x.device), y, target, point, point, gradient, value, point, gradient, value, value,
            x.new_full(flat, 2.0 * eps), torch.zeros_like(y), torch.ones_like(broken),
        )  # fmt: skip
        if eot == 1:
            _record(state, point, value, fooled, best, best_loss, broken)
        else:
            broken = fooled
        trace.append(value)
        last = 0
        for step in range(1, steps + 1):
            if early_stop:
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
                ahead = ball.project(
                    state.x + MOMENTUM * (ahead - state.x) + (1 - MOMENTUM) * (state.x - state.previous)
                )
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
            if eot == 1:
                _record(state, ahead, value, fooled, best, best_loss, broken)
            else:
                broken = torch.where(better, fooled, broken)
            trace.append(state.best_loss)
            if step in marks and step < steps:
                state.look(step - last)
                last = step
    rest = ~broken[state.index] if eot == 1 else torch.ones_like(broken[state.index])
    best[state.index[rest]], best_loss[state.index[rest]] = state.best_x[rest], state.best_loss[rest]
    return AttackResult(best, broken, best_loss, passes, notes, torch.stack(trace) if record else None)


def _record(state: _State, point: Tensor, value: Tensor, fooled: Tensor, best: Tensor, best_loss: Tensor, broken: Tensor) -> None:  # fmt: skip
    """Store the first misclassified point of each example; the last three are changed in place."""
    new = (fooled & ~broken[state.index]).nonzero()[:, 0]
    if len(new):
        at = state.index[new]
        best[at], best_loss[at], broken[at] = point[new], value[new], True


def _targeted_note(num_classes: int) -> tuple[str, ...]:
    if num_classes < 4:
        return ("Targeted DLR needs 4 classes; the difference of two logits was used instead.",)
    return ()
