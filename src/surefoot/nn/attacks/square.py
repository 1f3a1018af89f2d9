"""Square attack: random search without gradients (Andriushchenko, Croce, Flammarion & Hein, 2020, arXiv 1912.00049).

Linf: begin with vertical stripes of +-eps; each query paints one square of side h at a random place with +-eps per channel
and keeps it where the margin loss falls. L2: begin with a 5 x 5 grid of bumps; each query moves the budget of one square to
another as a bump eta added to what is there. The side follows h = sqrt(p H W), p from `p_init` down on the paper's schedule,
which is stated for 10,000 queries and stretched to `queries`. The place is drawn per example.

A vector `[B, F]` is one row of F pixels and a signal `[B, C, L]` is C rows (Linf only; L2 needs images of 5 x 5 or more).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from surefoot.errors import check, check_at_least, check_open_unit
from surefoot.nn.attacks.ball import Ball, Bounds, Norm, l2_norm
from surefoot.nn.attacks.losses import margin
from surefoot.nn.attacks.run import (
    AttackResult,
    Mode,
    Model,
    attacking,
    check_inputs,
    check_logits,
    default_generator,
    in_pieces,
    piece_size,
    sign_draw,
    wrong,
)

HALVE_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries


def square_share(query: int, queries: int, p_init: float = 0.8) -> float:
    """Share p of the image's area that the square of this query covers."""
    scaled = query * 10_000 // queries
    return p_init / 2 ** sum(scaled > at for at in HALVE_AT)


@torch.no_grad()
def square(
    model: Model,
    x: Tensor,  # [B, C, H, W], [B, C, L] or [B, F], within bounds
    y: Tensor,  # int64 [B]
    *,
    eps: float = 8 / 255,
    norm: Norm = "linf",
    queries: int = 5000,
    p_init: float = 0.8,
    bounds: Bounds = (0.0, 1.0),
    early_stop: bool = True,
    mode: Mode = "eval",
    generator: torch.Generator | None = None,
) -> AttackResult:
    """Random search with at most `queries` forward passes per example; broken examples leave the batch."""
    check_inputs(x, y, eps, norm, bounds)
    check_at_least("queries", queries, 1)
    check_open_unit("p_init", p_init)
    generator, shape = default_generator(generator), x.shape
    image = _as_image(x.detach())
    check(norm == "linf" or min(image.shape[2:]) >= 5, "Square in L2 needs images of at least 5 x 5; use norm='linf' or another attack.")  # fmt: skip
    ball = Ball.around(image, eps, norm, bounds)
    out, out_loss = image.clone(), image.new_empty(len(x))
    broken = torch.zeros_like(y, dtype=torch.bool)
    piece = piece_size(x, mode)
    index, passes = torch.arange(len(x), device=x.device), len(x)
    with attacking(model, mode, generator, x.device), torch.no_grad():
        best = image.clone() if eps == 0 else (_stripes if norm == "linf" else _bumps)(ball, generator)
        logits = check_logits(model(best.view(shape)), y)
        loss, fooled = margin(logits, y), wrong(logits, y)
        for query in range(queries if eps > 0 else 0):
            if early_stop and bool(fooled.any()):
                done = index[fooled]
                out[done], out_loss[done], broken[done] = best[fooled], loss[fooled], True
                alive = (~fooled).nonzero()[:, 0]
                index, y, best, loss, fooled = index[alive], y[alive], best[alive], loss[alive], fooled[alive]
                if len(alive) == 0:
                    break
                ball = ball.take(alive)
            share = square_share(query, queries, p_init)
            trial = (_paint if norm == "linf" else _move)(ball, best, share, generator)
            logits = in_pieces(model, piece, trial.view(-1, *shape[1:]))
            value = margin(logits, y)
            passes += len(trial)
            better = value > loss
            loss = torch.where(better, value, loss)
            best = torch.where(better.view(-1, 1, 1, 1), trial, best)
            fooled = torch.where(better, wrong(logits, y), fooled)
    out[index], out_loss[index], broken[index] = best, loss, fooled
    return AttackResult(out.view(shape), broken, out_loss, passes)


def _as_image(x: Tensor) -> Tensor:
    if x.dim() == 4:
        return x
    if x.dim() == 3:
        return x.unsqueeze(2)
    return x.reshape(len(x), 1, 1, -1)


def _randint(most: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in 0..most, int64 [B]."""
    return torch.randint(most + 1, (len(like),), generator=generator, device=generator.device).to(like.device)


def _inside(start: Tensor, side: int, length: int) -> Tensor:
    """Which of `length` positions lie in [start, start + side), bool [B, length]."""
    at = torch.arange(length, device=start.device)
    return (at >= start[:, None]) & (at < start[:, None] + side)


def _window(row: Tensor, column: Tensor, height: int, width: int, like: Tensor) -> Tensor:  # bool [B, 1, H, W]
    rows, columns = _inside(row, height, like.shape[2]), _inside(column, width, like.shape[3])
    return (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)


def _stripes(ball: Ball, generator: torch.Generator) -> Tensor:
    b, c, _, w = ball.centre.shape
    return torch.where(sign_draw((b, c, 1, w), ball.centre, generator), ball.high, ball.low)


def _paint(ball: Ball, best: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """One square per example at the edge of the ball, a sign per channel."""
    b, c, h, w = best.shape
    side = max(round(math.sqrt(share * h * w)), 1)
    height, width = (side, side) if h > 1 else (1, max(round(share * w), 1))
    height, width = min(height, h), min(width, w)
    row, column = _randint(h - height, best, generator), _randint(w - width, best, generator)
    edge = torch.where(sign_draw((b, c, 1, 1), best, generator), ball.high, ball.low)
    return torch.where(_window(row, column, height, width, best), edge, best)


def _bump(height: int, width: int, like: Tensor) -> Tensor:  # [height, width]
    """eta(r, s) = sum_{k=0}^{M} 1 / (n + 1 - k)^2, n = floor(height / 2), M = n - max(|r - n|, |s - floor(width / 2)|)."""
    n, m = height // 2, width // 2
    rows = (torch.arange(height, device=like.device) - n).abs()
    columns = (torch.arange(width, device=like.device) - m).abs()
    depth = n - torch.maximum(rows[:, None], columns[None, :])
    terms = torch.tensor([1.0 / (n + 1 - k) ** 2 for k in range(n + 1)], dtype=like.dtype, device=like.device)
    sums = torch.cat([like.new_zeros(1), terms.cumsum(0)])
    return sums[(depth + 1).clamp(0, n + 1)]


def _double_bump(side: int, like: Tensor) -> Tensor:  # [side, side] of norm 1
    """A bump above its negative."""
    half = side // 2
    eta = torch.cat([_tall_bump(half, side, like), -_tall_bump(side - half, side, like)])
    return eta / eta.norm()


def _tall_bump(height: int, width: int, like: Tensor) -> Tensor:
    """The bump of the longer side, so that a flat window is covered to its ends."""
    return _bump(height, width, like) if height >= width else _bump(width, height, like).T


def _oriented(side: int, like: Tensor, generator: torch.Generator) -> Tensor:  # [B, 1, side, side]
    eta = _double_bump(side, like)
    return torch.where(sign_draw((len(like), 1, 1, 1), like, generator), eta, eta.T)


def _bumps(ball: Ball, generator: torch.Generator) -> Tensor:
    b, c, h, w = ball.centre.shape
    side = min(h, w) // 5
    delta = torch.zeros_like(ball.centre)
    eta = _double_bump(side, delta) if side > 1 else delta.new_ones(1, 1)
    top, left = (h - h // side * side) // 2, (w - w // side * side) // 2
    signs = torch.where(sign_draw((b, c, h // side, w // side), delta, generator), 1.0, -1.0).to(delta.dtype)
    tiles = signs[:, :, :, None, :, None] * eta[None, None, None, :, None, :]
    delta[:, :, top : top + h // side * side, left : left + w // side * side] = tiles.reshape(
        b, c, h // side * side, -1
    )
    return _scaled(ball, delta)


def _scaled(ball: Ball, delta: Tensor) -> Tensor:
    length = l2_norm(delta).clamp_min(torch.finfo(delta.dtype).tiny)
    return ball.project(ball.centre + delta * (ball.eps / length))


def _move(ball: Ball, best: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Algorithm 3 of the paper: empty window 2, give its norm and the unused budget to window 1 as a bump."""
    b, c, h, w = best.shape
    most = min(h, w)
    side = min(max(round(math.sqrt(share * h * w)), 3) | 1, most - (most + 1) % 2)
    r1, c1, r2, c2 = (_randint(n - side, best, generator) for n in (h, w, h, w))
    delta = best - ball.centre
    second = _window(r2, c2, side, side, best)
    either = second | _window(r1, c1, side, side, best)
    unused = (ball.eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp_min(0.0)
    available = ((delta * either).square().sum((2, 3), keepdim=True) + unused / c).sqrt()
    reach = torch.arange(side, device=best.device)
    rows, columns = (r1[:, None] + reach)[:, None, :, None], (c1[:, None] + reach)[:, None, None, :]
    at = (torch.arange(b, device=best.device).view(-1, 1, 1, 1), torch.arange(c, device=best.device).view(1, -1, 1, 1), rows, columns)  # fmt: skip
    old = delta[at]
    tiny = torch.finfo(best.dtype).tiny
    sign = torch.where(sign_draw((b, c, 1, 1), best, generator), 1.0, -1.0).to(best.dtype)
    new = sign * _oriented(side, best, generator) + old / old.square().sum((2, 3), keepdim=True).sqrt().clamp_min(tiny)
    new = new / new.square().sum((2, 3), keepdim=True).sqrt().clamp_min(tiny)
    delta = torch.where(second, 0.0, delta)
    delta[at] = new * available
    return _scaled(ball, delta)
