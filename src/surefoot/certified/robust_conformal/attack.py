"""The attack that robust sets have to survive: it sees through the noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from surefoot.errors import check, check_at_least, check_non_negative
from surefoot.nn.attacks.ball import Ball, draw
from surefoot.nn.modes import evaluating


def smooth_pgd(
    model: nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,  # [B, ...]
    y: Tensor,  # int64 [B]
    *,
    eps: float,
    sigma: float,
    steps: int = 20,
    draws: int = 8,
    step_size: float | None = None,  # eps / 4
    bounds: tuple[float, float] | None = None,
    generator: torch.Generator,
    batch_size: int = 512,
) -> Tensor:  # [B, ...]
    """L2 attack on the smoothed score of the true label: ascend the mean of 1 - p_y over fresh noise, normalised steps.

    A label leaves a set when its score rises; every score of this family rises when p_y falls under noise. `draws` noisy copies
    a step estimate the gradient (EOT). sigma = 0 attacks the network itself (one copy). The last iterate is returned: under
    fresh noise no single loss value says which iterate is the strongest.
    """
    check_non_negative("eps", eps)
    check_non_negative("sigma", sigma)
    check_at_least("steps", steps, 1)
    check_at_least("draws", draws, 1)
    check(len(x) == len(y), f"x and y must be pairs, got {len(x)} and {len(y)}.")
    if eps == 0:
        return x.clone()
    copies = draws if sigma > 0 else 1
    chunk = max(1, batch_size // copies)
    with evaluating(model), torch.enable_grad():
        parts = [
            _ascend(model, a.detach(), b, eps, sigma, steps, copies, eps / 4 if step_size is None else step_size, bounds, generator)
            for a, b in zip(x.split(chunk), y.split(chunk))
        ]  # fmt: skip
    return torch.cat(parts)


def _ascend(
    model: nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    eps: float,
    sigma: float,
    steps: int,
    copies: int,
    step_size: float,
    bounds: tuple[float, float] | None,
    generator: torch.Generator,
) -> Tensor:
    ball = Ball.around(x, eps, "l2", bounds)
    labels = y.to(x.device).repeat(copies)[:, None]
    point = x
    for step in range(steps):
        point = point.detach().requires_grad_()
        noisy = point.expand(copies, *x.shape)
        if sigma > 0:
            noisy = noisy + sigma * draw(torch.randn, noisy.shape, x, generator)
        probs = model(noisy.flatten(0, 1)).double().softmax(-1)  # float64: 1 - p of a sure network is not 0
        if step == 0:
            check(
                bool((labels < probs.shape[1]).all() and (labels >= 0).all()), f"y must lie in [0, {probs.shape[1]})."
            )
        (gradient,) = torch.autograd.grad(-probs.gather(1, labels).sum(), point)
        point = ball.project(point.detach() + step_size * ball.direction(gradient))
    return point.detach()
