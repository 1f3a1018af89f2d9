"""The robustified pipeline as a base classifier, and how stable a reconstruction is under attack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.certified.zo_smoothing.blackbox import Queried
from surefoot.errors import InvalidInput, check, check_at_least


class RobustifiedModel(nn.Module):
    """f(dec(enc(D(x)))) for raw x: the base classifier that `surefoot.nn.smoothing.certify` is given.

    Around a `BlackBox` it answers f's own scores, asks once a row, and its state is the front alone; around an `nn.Module` it
    holds that module and gradients flow through, so that it can be attacked from the inside.
    """

    def __init__(
        self,
        model: Queried | nn.Module,
        denoiser: nn.Module,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check((encoder is None) == (decoder is None), "Give encoder and decoder together, or neither.")
        check(isinstance(model, Queried | nn.Module), f"model must be a BlackBox or an nn.Module, got {type(model).__name__}; wrap a function in BlackBox.")  # fmt: skip
        self.denoiser, self.encoder, self.decoder, self.model = denoiser, encoder, decoder, model

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, K]
        seen = self.denoiser(x)
        if self.encoder is not None and self.decoder is not None:
            seen = self.decoder(self.encoder(seen))
        return self.model(seen)


@dataclass(frozen=True)
class ReconstructionStability:
    """Mean error of reconstructions under the worst change found of each L2 size."""

    radii: tuple[float, ...]
    rmse: tuple[float, ...]  # root of the mean squared error an image, averaged over images
    ssim: tuple[float, ...]


def reconstruction_stability(
    pipeline: Callable[[Tensor], Tensor],
    x: Tensor,  # [B, C, H, W] in [0, 1], what a perfect pipeline gives back
    *,
    generator: torch.Generator,
    radii: Sequence[float] = (0.0, 1.0, 2.0, 3.0, 4.0),
    steps: int = 40,
) -> ReconstructionStability:
    """RMSE and SSIM of pipeline(x + delta) against x, delta by projected gradient ascent on the squared error, |delta|_2 <= radius.

    The attacker sees inside: `pipeline` must be differentiable from end to end (a `RobustifiedModel` around modules).
    """
    check_at_least("steps", steps, 1)
    check(len(radii) > 0 and min(radii) >= 0, f"radii must be zero or positive, got {tuple(radii)}.")
    rmse, similar = [], []
    for radius in radii:
        attacked = _worst_change(pipeline, x, float(radius), steps, generator)
        with torch.no_grad():
            out = pipeline(attacked)
        rmse.append((out - x).flatten(1).square().mean(1).sqrt().mean().item())
        similar.append(ssim(out, x).mean().item())
    return ReconstructionStability(tuple(float(r) for r in radii), tuple(rmse), tuple(similar))


def _worst_change(
    pipeline: Callable[[Tensor], Tensor], x: Tensor, radius: float, steps: int, generator: torch.Generator
) -> Tensor:
    if radius == 0:
        return x
    noise = torch.randn(x.shape, dtype=x.dtype, device=generator.device, generator=generator).to(x.device)
    delta = radius * _unit(noise)
    for _ in range(steps):
        delta.requires_grad_(True)
        error = (pipeline(x + delta) - x).square().sum()
        if not error.requires_grad:
            raise InvalidInput("The pipeline gives no gradients; build it around modules to attack it from the inside.")
        (grad,) = torch.autograd.grad(error, delta)
        with torch.no_grad():
            delta = delta + 2.5 * radius / steps * _unit(grad)
            norm = delta.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, *[1] * (x.dim() - 1))
            delta = delta * (radius / norm).clamp(max=1.0)
    return x + delta.detach()


def _unit(x: Tensor) -> Tensor:
    return x / x.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, *[1] * (x.dim() - 1))


def ssim(
    a: Tensor,  # [B, C, H, W] in [0, 1]
    b: Tensor,
) -> Tensor:  # [B]
    """Structural similarity with a Gaussian window (11 wide or what fits, deviation 1.5). Source: Wang et al. 2004."""
    check(a.shape == b.shape and a.dim() == 4, f"ssim compares images of one shape, got {list(a.shape)} and {list(b.shape)}.")  # fmt: skip
    width = min(11, *a.shape[-2:])
    offset = torch.arange(width, dtype=a.dtype, device=a.device) - (width - 1) / 2
    line = torch.exp(-offset.square() / (2 * 1.5**2))
    line = line / line.sum()
    window = (line[:, None] * line).expand(a.shape[1], 1, width, width)
    maps = torch.cat([a, b, a * a, b * b, a * b])
    means = F.conv2d(maps, window, groups=a.shape[1]).chunk(5)
    mu_a, mu_b, aa, bb, ab = means
    var_a, var_b, cov = aa - mu_a**2, bb - mu_b**2, ab - mu_a * mu_b
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return index.flatten(1).mean(1)
