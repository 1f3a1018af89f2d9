"""Projected gradient descent (Madry, Makelov, Schmidt, Tsipras & Vladu, 2018, arXiv 1706.06083).

    x_{k+1} = P(x_k + a sign(g))        Linf          g = d loss / d x_k
    x_{k+1} = P(x_k + a g / ||g||_2)    L2            P projects onto the eps-ball around x and the bounds

`pgd` is for evaluation: per example it keeps the first misclassified iterate, else the one of highest loss, and drops
broken examples from the batch. `pgd_train` is for the inside of a training loop: fixed steps, last iterate, no bookkeeping.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surefoot.errors import check_positive
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
    check_not_nan,
    default_generator,
    input_gradient,
    loss_and_gradient,
    piece_size,
    wrong,
)


def pgd(
    model: Model,
    x: Tensor,  # [B, ...] within bounds
    y: Tensor,  # int64 [B]
    *,
    eps: float = 8 / 255,
    norm: Norm = "linf",
    steps: int = 20,
    step_size: float | None = None,  # 2.5 eps / steps
    restarts: int = 1,
    loss: str | Loss = "ce",
    bounds: Bounds = (0.0, 1.0),
    random_start: bool = True,
    start: Tensor | None = None,  # [B, ...]: begin the first restart here, e.g. at another attack's points
    early_stop: bool = True,
    keep: Keep = "first",  # "strongest": the point of highest loss, for transfer to another model
    mode: Mode = "eval",
    eot: int = 1,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """The strongest of `restarts` runs of `steps` gradient steps, per example.

    With `eot` > 1 each gradient is the mean over that many draws of a random model; an example then counts as broken
    when the mean probabilities at its highest-loss iterate are wrong (stopping at the first wrong draw would find
    "breaks" that the next draw takes back), and nothing is dropped. The same holds for the loss of one draw with
    `keep="strongest"`. A callable `loss` that closes over per-example
    tensors needs `early_stop=False`, which keeps the batch whole and in order.
    """
    check_attack(x, y, eps, norm, bounds, steps=steps, restarts=restarts, eot=eot, start=start, keep=keep)
    size, first = _step_size(step_size, eps, steps), eot == 1 and keep == "first"
    generator, function = default_generator(generator), get_loss(loss)
    x = x.detach()
    best, best_loss = x.clone(), x.new_full((len(x),), -torch.inf)
    broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    piece = piece_size(x, mode) if isinstance(loss, str) else len(x)
    passes, notes = 0, ()
    with attacking(model, mode, generator, x.device):
        for restart in range(restarts):
            index = (~broken).nonzero()[:, 0] if early_stop and first else torch.arange(len(x), device=x.device)
            if len(index) == 0:
                break
            ball, labels = Ball.around(x[index], eps, norm, bounds), y[index]
            point = ball.sample(generator) if random_start or restart > 0 else ball.centre.clone()
            if start is not None and restart == 0:
                point = ball.project(start.detach()[index])
            for step in range(steps + 1):
                scores, value, gradient = loss_and_gradient(
                    model, point, labels, function, eot, gradient=step < steps and eps > 0, first=step == 0, piece=piece
                )
                passes += eot * len(point)
                fooled = wrong(scores, labels)
                if step == 0:
                    notes = loss_note(loss, scores.shape[1])
                    if eps > 0 and not bool(fooled.all()):
                        check_gradient(gradient)
                _keep(index, point, value, fooled, best, best_loss, broken, first=first)
                if step == steps or eps == 0:
                    break
                if early_stop and first and bool(fooled.any()):
                    alive = (~fooled).nonzero()[:, 0]
                    if len(alive) == 0:
                        break
                    index, labels, ball = index[alive], labels[alive], ball.take(alive)
                    point, gradient = point[alive], gradient[alive]
                point = ball.project(torch.add(point, ball.direction(gradient), alpha=size))
            if eps == 0:
                break
    return AttackResult(best, broken, best_loss, passes, notes)


def pgd_train(
    model: Model,
    x: Tensor,  # [B, ...] within bounds
    y: Tensor,  # int64 [B]
    *,
    eps: float = 8 / 255,
    norm: Norm = "linf",
    steps: int = 10,
    step_size: float | None = None,  # 2.5 eps / steps: 2/255 at the defaults
    loss: str | Loss = "ce",
    bounds: Bounds = (0.0, 1.0),
    random_start: bool = True,
    mode: Mode = "eval",
    generator: torch.Generator | None = None,
) -> Tensor:  # [B, ...]
    """The last iterate after exactly `steps` forward and backward passes: what adversarial training trains on."""
    check_attack(x, y, eps, norm, bounds, steps=steps)
    size = _step_size(step_size, eps, steps)
    generator, function = default_generator(generator), get_loss(loss)
    x = x.detach()
    if eps == 0:
        return x.clone()
    piece = piece_size(x, mode) if isinstance(loss, str) else len(x)
    with attacking(model, mode, generator, x.device):
        ball = Ball.around(x, eps, norm, bounds)
        point = ball.sample(generator) if random_start else x
        _, _, gradient = loss_and_gradient(model, point, y, function, first=True, piece=piece)
        point, totals = ball.project(torch.add(point, ball.direction(gradient), alpha=size)), []
        for _ in range(steps - 1):
            gradient, total = input_gradient(model, point, y, function, piece=piece)
            point = ball.project(torch.add(point, ball.direction(gradient), alpha=size))
            totals.append(total)
        if totals:
            check_not_nan(torch.stack(totals))
    return point


def _step_size(step_size: float | None, eps: float, steps: int) -> float:
    if step_size is None:
        return min(2.5 * eps / steps, eps)
    check_positive("step_size", step_size)
    return step_size


def _keep(
    index: Tensor,  # int64 [A] positions of the active examples
    point: Tensor,  # [A, ...]
    value: Tensor,  # [A]
    fooled: Tensor,  # bool [A]
    best: Tensor,  # [B, ...] changed in place, as are the next two
    best_loss: Tensor,  # [B]
    broken: Tensor,  # bool [B]
    *,
    first: bool,
) -> None:
    """Record the first misclassified point (`first`), else the point of highest loss."""
    better = value > best_loss[index]
    if first:
        better = (better | fooled) & ~broken[index]
    where = better.nonzero()[:, 0]
    target = index[where]
    best[target], best_loss[target], broken[target] = point[where], value[where], fooled[where]
