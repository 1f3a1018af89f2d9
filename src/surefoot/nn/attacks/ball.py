"""The set an attack may search: an Linf or L2 ball around each example, cut with the valid range of inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]
Bounds = tuple[float, float] | None


@dataclass(frozen=True)
class Ball:
    """`{x' : ||x' - centre|| <= eps, bounds[0] <= x' <= bounds[1]}`, one per example."""

    centre: Tensor  # [B, ...]
    eps: float
    norm: Norm
    low: Tensor  # [B, ...], or a scalar for L2
    high: Tensor

    @classmethod
    def around(cls, x: Tensor, eps: float, norm: Norm, bounds: Bounds) -> Ball:
        low, high = (-torch.inf, torch.inf) if bounds is None else bounds
        if norm == "linf":
            return cls(x, eps, norm, (x - eps).clamp_(min=low), (x + eps).clamp_(max=high))
        return cls(x, eps, norm, x.new_tensor(low), x.new_tensor(high))

    def take(self, index: Tensor) -> Ball:
        if self.norm == "linf":
            return Ball(self.centre[index], self.eps, self.norm, self.low[index], self.high[index])
        return Ball(self.centre[index], self.eps, self.norm, self.low, self.high)

    def project(self, x: Tensor) -> Tensor:
        """Back into the ball and the bounds. Clipping to bounds that hold the centre never lengthens a perturbation."""
        if self.norm == "l2":
            delta = x - self.centre
            length = l2_norm(delta)
            x = self.centre + delta * (self.eps / length.clamp_min(self.eps))
        return torch.clamp(x, self.low, self.high)

    def direction(self, gradient: Tensor) -> Tensor:
        """Steepest ascent per unit of the norm: sign(g), or g / ||g||; zero where the gradient is zero."""
        if self.norm == "linf":
            return gradient.sign()
        return gradient / l2_norm(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)

    def sample(self, generator: torch.Generator) -> Tensor:
        """Uniform in the ball, then cut to the bounds."""
        x = self.centre
        if self.norm == "linf":
            noise = draw(torch.rand, x.shape, x, generator).mul_(2.0).sub_(1.0)
            return self.project(noise.mul_(self.eps).add_(x))
        noise = draw(torch.randn, x.shape, x, generator)
        share = draw(torch.rand, (len(x),), x, generator) ** (1.0 / max(x[0].numel(), 1))
        noise = noise / l2_norm(noise) * (self.eps * share).view(-1, *[1] * (x.dim() - 1))
        return self.project(x + noise)


def l2_norm(x: Tensor) -> Tensor:
    """Euclidean norm per example, shaped `[B, 1, ...]` to divide by."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True)


def draw(kind, shape, like: Tensor, generator: torch.Generator) -> Tensor:
    """`torch.rand` or `torch.randn` on the generator's device, brought to that of `like`."""
    return kind(shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)
