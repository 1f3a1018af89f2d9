"""The two contrastive terms, and the loop that trains an encoder with them. No labels are used."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.certified.rrcm.encoders import NoiseEncoder, projection_head
from surefoot.certified.rrcm.schedule import RRCMSchedule, karras_sigmas
from surefoot.errors import InvalidInput, check, check_at_least, check_choice, check_non_negative, check_positive
from surefoot.models.networks import seeded_build

Augment = Callable[[Tensor, torch.Generator], Tensor]
Target = Literal["online", "ema"]


def nce(
    f: Tensor,  # [B, D], with gradient
    g: Tensor,  # [M, D], M >= B targets, the first B belong to f
    tau: float = 0.2,
) -> Tensor:  # scalar
    """Mean over i of -s_ii/tau + logsumexp_j s_ij/tau, s the cosine similarities. No gradient reaches g."""
    check_positive("tau", tau)
    check(f.dim() == g.dim() == 2 and f.shape[1] == g.shape[1] and len(g) >= len(f), f"f and g must be [B, D] and [M, D] with M >= B, got {list(f.shape)} and {list(g.shape)}.")  # fmt: skip
    s = F.normalize(f, dim=1) @ F.normalize(g.detach(), dim=1).T / tau
    return F.cross_entropy(s, torch.arange(len(f), device=f.device))


@dataclass(frozen=True)
class RRCMLoss:
    """Both terms at temperature `tau`. Multi-process users gather the targets and call `nce` themselves."""

    tau: float = 0.2

    def __post_init__(self) -> None:
        check_positive("tau", self.tau)

    def contrast(
        self,
        online: Callable[[Tensor, float], Tensor],
        target: Callable[[Tensor, float], Tensor],
        v1: Tensor,  # [B, C, H, W] in [-1, 1], one view of each image
        v2: Tensor,  # the other view
        noise: Tensor,  # standard normal, shared by both views
        t: float,  # tmin
    ) -> Tensor:  # scalar
        """nce(online(v1), target(v2)) + nce(online(v2), target(v1)); both are projection(encoder(., t))."""
        first, second = v1 + t * noise, v2 + t * noise
        with torch.no_grad():
            g1, g2 = target(first, t), target(second, t)
        return nce(online(first, t), g2, self.tau) + nce(online(second, t), g1, self.tau)

    def consistency(
        self,
        encoder: Callable[[Tensor, float], Tensor],
        x: Tensor,  # [B, C, H, W] in [-1, 1]
        noise: Tensor,  # standard normal, the same at both levels
        t: float,  # t_i, one for the batch: negatives of other levels would be told apart by their noise alone
        t_next: float,  # t_{i+1} < t_i
        target: Callable[[Tensor, float], Tensor] | None = None,
    ) -> Tensor:  # scalar
        """nce(z(x_t), sg z(x_t_next)) on representations, not projections. `target` None: the encoder itself."""
        with torch.no_grad():
            g = (target or encoder)(x + t_next * noise, t_next)
        return nce(encoder(x + t * noise, t), g, self.tau)


@dataclass(frozen=True)
class RRCMState:
    """What pre-training leaves."""

    encoder: NoiseEncoder  # the weight average, evaluation mode
    projector: nn.Module  # not needed any more, except to go on
    grid: Tensor  # float64 [N], the final noise grid
    losses: Tensor  # float32 [steps, 2]: contrast, consistency
    passes: int  # single-example forward passes


def affine_jitter(rotation: float = 0.25, scale: float = 0.15, shift: float = 1.0) -> Augment:
    """Augmentation: rotation within +-`rotation` rad, size within +-`scale`, shift within +-`shift` pixels; bilinear, zeros outside."""

    def jitter(x: Tensor, generator: torch.Generator) -> Tensor:  # [B, C, H, W] -> the same
        draw = torch.rand((4, len(x)), generator=generator, device=generator.device).to(x) * 2 - 1
        angle, size = draw[0] * rotation, 1 + draw[1] * scale
        cos, sin = angle.cos() / size, angle.sin() / size
        dx, dy = draw[2] * 2 * shift / x.shape[-1], draw[3] * 2 * shift / x.shape[-2]
        theta = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)
        return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)

    return jitter


def pretrain_rrcm(
    encoder: NoiseEncoder,
    x: Tensor,  # [N, C, H, W] in [0, 1], no labels
    *,
    steps: int,
    generator: torch.Generator,
    batch_size: int = 128,
    lr: float = 1e-4,
    warmup: float = 0.03,
    clip_norm: float = 2.0,
    tau: float = 0.2,
    tmin: float = 0.002,
    tmax: float = 80.0,
    schedule: RRCMSchedule | None = None,
    augment: Sequence[Augment] | None = None,
    hidden_dim: int = 2048,
    output_dim: int = 256,
    contrast: float = 1.0,
    consistency: float = 1.0,
    target: Target = "online",
    ema_decay: float = 0.9999,
) -> RRCMState:
    """Pre-train a copy of `encoder` on unlabelled images: Adam, linear warm-up, cosine, gradient norm cut after the warm-up.

    Six passes of each image a step (three with gradient). The last, smaller batch of an epoch is dropped, because the number
    of negatives sets the scale of the loss. `augment` makes the views (default: `affine_jitter`). `contrast` and `consistency`
    weight the terms, `target` is the consistency term's ("online" as published): ablations. The returned encoder is the
    average of the weights at rate min(`ema_decay`, (1 + k)/(10 + k)), so that short runs do not average their start.
    """
    _check_request(encoder, x, steps, batch_size)
    check_choice("target", target, ("online", "ema"))
    check_non_negative("contrast", contrast)
    check_non_negative("consistency", consistency)
    check(contrast + consistency > 0, "contrast and consistency are both zero; there is nothing to train on.")
    like = next(encoder.parameters())
    x, loss = x.to(like), RRCMLoss(tau)
    plan = schedule or RRCMSchedule(steps)
    views = tuple(augment) if augment is not None else (affine_jitter(),)
    online = copy.deepcopy(encoder).train()
    projector = seeded_build(
        lambda: projection_head(encoder.embed_dim, hidden_dim, output_dim), cpu_stream(generator)
    ).to(like)
    slow, slow_projector = (copy.deepcopy(m).requires_grad_(False) for m in (online, projector))
    averaged = copy.deepcopy(online).requires_grad_(False)
    parameters = [*online.parameters(), *projector.parameters()]
    optimizer = torch.optim.Adam(parameters, lr)
    record, batches = torch.zeros(steps, 2), _batches(len(x), min(batch_size, len(x)), generator)
    for step in range(steps):
        images = x[next(batches).to(x.device)]
        v1, v2 = (2 * augmented(images, views, generator) - 1 for _ in range(2))
        grid = karras_sigmas(plan.num_scales(step), tmin, tmax).tolist()
        i = int(torch.randint(len(grid) - 1, (), generator=generator, device=generator.device))
        noise = torch.randn(v1.shape, dtype=x.dtype, generator=generator, device=generator.device).to(x.device)
        first = second = torch.zeros((), dtype=x.dtype, device=x.device)
        if contrast > 0:
            fast, ema = _chain(online, projector), _chain(slow, slow_projector)
            first = loss.contrast(fast, ema, v1, v2, noise, grid[-1])
        if consistency > 0:
            teacher = slow if target == "ema" else None
            second = loss.consistency(online, v1, noise, grid[i], grid[i + 1], teacher)
        optimizer.zero_grad(set_to_none=True)
        (contrast * first + consistency * second).backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * _factor(step, steps, warmup)
        if step >= warmup * steps:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        _average(slow, online, plan.target_rate(step))
        _average(slow_projector, projector, plan.target_rate(step))
        _average(averaged, online, min(ema_decay, (1 + step) / (10 + step)))
        record[step] = torch.stack([first, second]).detach().float().cpu()
    if not bool(torch.isfinite(record).all()):
        raise InvalidInput(f"The pre-training loss became NaN or infinite; lower the learning rate {lr}.")
    passes = steps * min(batch_size, len(x)) * (4 * (contrast > 0) + 2 * (consistency > 0))
    final = karras_sigmas(plan.num_scales(steps), tmin, tmax)
    return RRCMState(averaged.requires_grad_(True).eval(), projector.eval(), final, record, passes)


def _check_request(encoder: NoiseEncoder, x: Tensor, steps: int, batch_size: int) -> None:
    check(isinstance(encoder, NoiseEncoder), f"The encoder must be a NoiseEncoder that takes (x, t); {type(encoder).__name__} has no time input. Wrap a classifier in ClassifierEncoder.")  # fmt: skip
    check_at_least("steps", steps, 1)
    check_at_least("batch_size", batch_size, 2)
    check(x.dim() == 4 and len(x) >= 2, f"x must be at least two images [N, C, H, W], got shape {list(x.shape)}.")
    check(bool(((x >= 0) & (x <= 1)).all()), "Images must lie in [0, 1] without NaN: the noise grid is in that scale.")


def augmented(x: Tensor, augment: Sequence[Augment], generator: torch.Generator) -> Tensor:
    for step in augment:
        x = step(x, generator)
    return x


def _batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:  # int64 [size], without end
    while True:
        order = torch.randperm(n, generator=generator, device=generator.device)
        yield from order[: n - n % size].split(size)


def _chain(encoder: nn.Module, projector: nn.Module) -> Callable[[Tensor, float], Tensor]:
    return lambda x, t: projector(encoder(x, t))


def cpu_stream(generator: torch.Generator) -> torch.Generator:
    """A CPU stream split off a generator of any device."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator().manual_seed(seed)


def _factor(step: int, steps: int, warmup: float) -> float:
    if step < warmup * steps:
        return (step + 1) / (warmup * steps + 1)
    done = (step - warmup * steps) / max(steps - warmup * steps, 1)
    return 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def _average(slow: nn.Module, fast: nn.Module, rate: float) -> None:
    for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
        old.lerp_(new, 1.0 - rate)
    for old, new in zip(slow.buffers(), fast.buffers(), strict=True):
        old.copy_(new)
