"""Image repair without large weights: a small conditional diffusion model, trained from nothing on patches of this scene's own photos.

It learns to undo early renderings (and blurs and faint blobs, since the real pairs are few): a diffusion model on T = 200 cosine steps, conditioned on the
degraded patch. The net gives the *change* x_0 - degraded and its last layer starts at zero, so an untrained one returns what it was given; the loss
is the squared error of the clean patch at all noise levels alike. (Predicting the noise, as large models do, cost renderings 2 to 4 dB after the few
steps that a scene affords, and taught the noisiest levels nothing.) Repair is SDEdit: noise the rendering to `strength`, denoise by DDIM, on
overlapping patches that are blended by Hann windows. It knows this scene only; what no photo shows, it cannot invent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import InvalidInput, check, check_at_least
from surefoot.geometry.lm_gaussian.fitting import OnFit, check_repair_pairs, fit_steps
from surefoot.geometry.lm_gaussian.stages import Checkpoint
from surefoot.nn.diffusion import cosine_alphas_bar, noised


def timestep_embedding(t: Tensor, dim: int) -> Tensor:  # int64 [B] -> [B, dim]
    rate = torch.exp(-math.log(10_000.0) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t[:, None].float() * rate
    return torch.cat([angle.sin(), angle.cos()], 1)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = (
            nn.GroupNorm(8 if inputs % 8 == 0 else 1, inputs),
            nn.Conv2d(inputs, outputs, 3, padding=1),
        )
        self.time = nn.Linear(time, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class PatchUNet(nn.Module):
    """(noisy patch, degraded patch, place in the image, t) -> clean - degraded; three levels, zero at first."""

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 96), time: int = 64) -> None:
        super().__init__()
        a, b, c = widths
        self.time_dim = time
        self.embed = nn.Sequential(nn.Linear(time, time), nn.SiLU(), nn.Linear(time, time))
        self.first = nn.Conv2d(8, a, 3, padding=1)
        self.down1, self.shrink1 = _Block(a, a, time), nn.Conv2d(a, b, 3, stride=2, padding=1)
        self.down2, self.shrink2 = _Block(b, b, time), nn.Conv2d(b, c, 3, stride=2, padding=1)
        self.middle = _Block(c, c, time)
        self.grow2, self.up2 = nn.ConvTranspose2d(c, b, 2, stride=2), _Block(2 * b, b, time)
        self.grow1, self.up1 = nn.ConvTranspose2d(b, a, 2, stride=2), _Block(2 * a, a, time)
        change = nn.Conv2d(a, 3, 3, padding=1)
        nn.init.zeros_(change.weight)
        nn.init.zeros_(change.bias)  # type: ignore[arg-type]
        self.last = nn.Sequential(nn.GroupNorm(8, a), nn.SiLU(), change)

    def forward(self, noisy: Tensor, degraded: Tensor, place: Tensor, t: Tensor) -> Tensor:
        time = self.embed(timestep_embedding(t, self.time_dim).to(noisy.dtype))
        x1 = self.down1(self.first(torch.cat([noisy, degraded, place], 1)), time)
        x2 = self.down2(self.shrink1(x1), time)
        x3 = self.middle(self.shrink2(x2), time)
        y = self.up2(torch.cat([self.grow2(x3), x2], 1), time)
        return self.last(self.up1(torch.cat([self.grow1(y), x1], 1), time))


@dataclass
class PatchDenoiserRepair:
    """The embedded repair backend. `fit` takes 600 to 1200 steps; `repair` runs 10 denoiser calls a patch at most."""

    patch: int = 32
    fit_steps: int = 600
    batch: int = 32
    lr: float = 1e-3
    times: int = 200
    sample_steps: int = 10
    widths: tuple[int, int, int] = (32, 64, 96)
    on_step: OnFit | None = field(default=None, repr=False)
    net_: PatchUNet | None = field(default=None, repr=False)
    losses_: list[float] = field(default_factory=list, repr=False)
    name: str = "patch denoiser trained on this scene's photos"

    def fit(
        self,
        degraded: Tensor,  # [P, H, W, 3] in [0, 1], renderings
        clean: Tensor,  # [P, H, W, 3] in [0, 1], their photos
        *,
        generator: torch.Generator,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Learn degraded -> clean, from nothing each time; each half batch is widened by synthetic blurs and blobs.

        `checkpoint`: take up the fit that it holds, and keep this one there; the end is the same to the bit. `on_step(step, steps, loss)` may raise to
        interrupt: then the prior is what it was. Raises `InvalidInput` for pairs that do not match, pictures below 8 pixels, and a loss that diverges.
        """
        check_repair_pairs(degraded, clean)
        check_at_least("image side", min(clean.shape[1:3]), 8)
        with torch.random.fork_rng([]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator, device=generator.device)))
            net = PatchUNet(self.widths).to(clean.device)
        bad, good = (2 * t.permute(0, 3, 1, 2) - 1 for t in (degraded, clean))
        side = min(self.patch, *(4 * (s // 4) for s in good.shape[2:]))
        optimizer = torch.optim.AdamW(net.parameters(), self.lr)
        levels = cosine_alphas_bar(self.times).to(clean.device)

        def loss_at(_: int) -> Tensor:
            x, condition, place = self._batch(bad, good, side, generator)
            t = _below(self.times, len(x), x, generator)
            noise = _normal(x, generator)
            return F.mse_loss(condition + net(noised(x, t, noise, levels), condition, place, t), x)

        losses = fit_steps(
            loss_at, dict(net.named_parameters()), optimizer, steps=self.fit_steps,
            lr_at=lambda step: self.lr * 0.5 * (1 + math.cos(math.pi * step / self.fit_steps)), asked=repr(self), generator=generator,
            checkpoint=checkpoint, on_step=self.on_step,
        )  # fmt: skip
        self.net_, self.losses_ = net.eval(), losses

    def state_dict(self) -> dict[str, Any]:
        """The fitted model, for `load_state_dict` of a prior with the same settings."""
        check(self.net_ is not None, "The repair prior has not been fitted, so it has no state to save.")
        assert self.net_ is not None
        return {"net": self.net_.state_dict(), "losses": list(self.losses_)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` of a prior with the same settings gave, instead of fitting."""
        with torch.device("meta"):  # draws nothing
            net = PatchUNet(self.widths)
        net.load_state_dict(state["net"], assign=True)
        self.net_, self.losses_ = net.eval(), list(state["losses"])

    def _batch(self, bad: Tensor, good: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        height, width = good.shape[2:]
        k = _below(len(good), self.batch, good, generator)
        top = _below(height - side + 1, self.batch, good, generator)
        left = _below(width - side + 1, self.batch, good, generator)
        offset = torch.arange(side, device=good.device)
        rows, columns = (top[:, None] + offset)[:, :, None], (left[:, None] + offset)[:, None, :]
        x = good[k[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
        condition = bad[k[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
        half = self.batch // 2
        condition = torch.cat([condition[:half], degrade(x[half:], generator)])
        place = _places(rows, columns, height, width)
        flip = _uniform(x, generator, self.batch) < 0.5
        x, condition = (torch.where(flip[:, None, None, None], t.flip(3), t) for t in (x, condition))
        return x, condition, torch.where(flip[:, None, None, None], place.flip(3), place)

    @torch.no_grad()
    def repair(self, renders: Tensor, *, strength: float, generator: torch.Generator) -> Tensor:  # [V, H, W, 3]
        """SDEdit at `strength` in [0, 1]; 0 returns the renders as they are."""
        if self.net_ is None:
            raise InvalidInput("The repair prior has not been fitted; call fit with pairs of renderings and photos.")
        check(0 <= strength <= 1, f"strength must be between 0 and 1, got {strength!r}.")
        if strength == 0:
            return renders.clone()
        x = 2 * renders.permute(0, 3, 1, 2).clamp(0, 1) - 1
        height, width = x.shape[2:]
        side = min(self.patch, *(4 * (s // 4) for s in (height, width)))
        starts = [_starts(size, side) for size in (height, width)]
        window = torch.hann_window(side + 2, periodic=False, device=x.device)[1:-1]
        window = window[:, None] * window[None] + 1e-3
        noise = _normal(x, generator)
        total, weight = torch.zeros_like(x), x.new_zeros(1, 1, height, width)
        offset = torch.arange(side, device=x.device)
        for top in starts[0]:
            for left in starts[1]:
                here = (..., slice(top, top + side), slice(left, left + side))
                rows, columns = (top + offset)[None, :, None], (left + offset)[None, None, :]
                place = _places(rows, columns, height, width).expand(len(x), -1, -1, -1)
                total[here] += window * self._denoise(x[here], noise[here], place, strength)
                weight[here] += window
        return ((total / weight + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)

    def _denoise(self, x: Tensor, noise: Tensor, place: Tensor, strength: float) -> Tensor:
        assert self.net_ is not None
        net, levels = self.net_.to(x.device), cosine_alphas_bar(self.times).to(x.device)
        times = repair_times(self.times, self.sample_steps, strength)
        z = noised(x, torch.full((len(x),), times[0], device=x.device), noise, levels)
        for here, below in zip(times, [*times[1:], -1], strict=True):
            t = torch.full((len(x),), here, device=x.device)
            clean = (x + net(z, x, place, t)).clamp(-1, 1)
            eps = (z - levels[here].sqrt() * clean) / (1 - levels[here]).sqrt()
            after = levels[below] if below >= 0 else levels.new_ones(())
            z = after.sqrt() * clean + (1 - after).sqrt() * eps
        return z


def repair_times(times: int, steps: int, strength: float) -> list[int]:
    """The times that SDEdit visits, noisiest first: `steps` of them from strength x T down to 0, never one twice."""
    top = max(1, round(strength * times)) - 1
    return sorted({round(top * k / max(1, steps - 1)) for k in range(steps)}, reverse=True)


def _starts(size: int, side: int) -> list[int]:
    step = max(1, side // 2)
    return sorted({*range(0, size - side + 1, step), size - side})


def _places(rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:  # [B, 2, side, side], in [-1, 1]
    y, x = (2 * (rows + 0.5) / height - 1), (2 * (columns + 0.5) / width - 1)
    return torch.stack(torch.broadcast_tensors(y, x), 1).float()


def degrade(x: Tensor, generator: torch.Generator) -> Tensor:  # [B, 3, S, S] in [-1, 1]
    """What splats do to a picture: a blur of 0.3 to 1.2 pixels and a faint soft blob. Much stronger faults than renderings have teach the net to smooth."""
    size, side = len(x), x.shape[-1]
    sigma = 0.3 + 0.9 * _uniform(x, generator, size)
    line = torch.exp(-(torch.arange(-5.0, 6.0, device=x.device) ** 2) / (2 * sigma[:, None] ** 2))
    line = (line / line.sum(1, keepdim=True)).repeat_interleave(3, 0)
    flat = x.reshape(1, -1, *x.shape[2:])
    flat = F.conv2d(F.pad(flat, (5, 5, 0, 0), mode="replicate"), line[:, None, None, :], groups=3 * size)
    flat = F.conv2d(F.pad(flat, (0, 0, 5, 5), mode="replicate"), line[:, None, :, None], groups=3 * size)
    out, grid = flat.view_as(x), torch.arange(side, device=x.device) + 0.5
    centre = side * _uniform(x, generator, 2, size, 1)
    width = 1 + 4 * _uniform(x, generator, 2, size, 1)
    gauss = torch.exp(-(((grid - centre) / width) ** 2) / 2)
    alpha = 0.3 * _uniform(x, generator, size, 1, 1) * gauss[0][:, :, None] * gauss[1][:, None, :]
    colour = 2 * _uniform(x, generator, size, 3, 1, 1) - 1
    return out + alpha[:, None] * (colour - out)


# Drawn where the generator lives, used where the pictures are.


def _uniform(like: Tensor, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device).to(like.device)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=generator.device).to(like.device)


def _below(most: int, size: int, like: Tensor, generator: torch.Generator) -> Tensor:  # int64 [size]
    return torch.randint(most, (size,), generator=generator, device=generator.device).to(like.device)
