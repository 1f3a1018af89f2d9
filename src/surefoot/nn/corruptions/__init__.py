"""Common corruptions of images, five severities each: what cameras, weather and files do to a picture.

    corrupt(x, "motion_blur", 3, generator)      x [B, C, H, W] in [0, 1], C = 1 or 3 -> the same shape, in [0, 1]

The kinds and their meaning follow ImageNet-C and CIFAR-10-C (Hendrycks & Dietterich, 2019, arXiv 1903.12261); the code is
written from their definitions as tensor operations over the whole batch. Two things differ, so numbers are not comparable
to the published benchmark images:

- *Size.* The benchmark states strengths for 224 pixels and for 32. Here each strength moves between the two lists with the
  logarithm of the shorter side and stays constant outside. Lengths (blur radii, drops, flakes) are given at 224 and at 32 pixels
  likewise and are proportional to the side outside that range, so that 28 x 28 and 512 x 512 are harmed about alike. Below 16
  pixels a length is that of 16 pixels: a blur of a tenth of a pixel would do nothing.
- *Monotone severity.* The mean distance to the clean image grows with severity, image kinds with two directions or two
  materials in the benchmark keep one (saturate: more colour; spatter: water). Frost photographs are replaced by procedural ice.

Draws come from `generator` alone, and their shape does not depend on the severity: the same seed gives the same scene, stronger.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from surefoot.errors import check, check_choice
from surefoot.nn.corruptions._blur import defocus_blur, gaussian_blur, glass_blur, motion_blur, zoom_blur
from surefoot.nn.corruptions._digital import contrast, elastic_transform, jpeg_compression, pixelate, saturate
from surefoot.nn.corruptions._jpeg import jpeg
from surefoot.nn.corruptions._noise import gaussian_noise, impulse_noise, shot_noise, speckle_noise
from surefoot.nn.corruptions._weather import brightness, fog, frost, snow, spatter

__all__ = ["CORRUPTIONS", "SEVERITIES", "Corruption", "corrupt", "jpeg", "kinds"]

Corruption = Callable[[Tensor, int, torch.Generator], Tensor]
SEVERITIES = (1, 2, 3, 4, 5)

CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function
    for function in (
        gaussian_noise, shot_noise, impulse_noise, speckle_noise, gaussian_blur, defocus_blur, glass_blur, motion_blur,
        zoom_blur, snow, frost, fog, spatter, brightness, contrast, saturate, elastic_transform, pixelate, jpeg_compression,
    )
}  # fmt: skip


def corrupt(
    x: Tensor,  # [B, C, H, W] in [0, 1], C = 1 or 3
    name: str,
    severity: int,
    generator: torch.Generator,
) -> Tensor:  # [B, C, H, W] in [0, 1]
    """The images of a batch under one corruption; `name` is a key of `CORRUPTIONS`, `severity` 1 to 5."""
    check_choice("name", name, CORRUPTIONS)
    check_choice("severity", severity, SEVERITIES)
    check(
        x.dim() == 4 and len(x) > 0, f"x must be a non-empty batch of images [B, C, H, W], got shape {tuple(x.shape)}."
    )
    check(x.shape[1] in (1, 3), f"Corruptions are defined for 1 or 3 channels, got {x.shape[1]}.")
    check(min(x.shape[2:]) >= 4, f"Corruptions need images of at least 4 x 4, got {x.shape[2]} x {x.shape[3]}.")
    check(x.dtype in (torch.float32, torch.float64), f"x must be float32 or float64 in [0, 1], got {x.dtype}.")
    least, most = float(x.min()), float(x.max())
    check(least >= -1e-6 and most <= 1 + 1e-6, f"x must lie in [0, 1], got [{least:.4g}, {most:.4g}].")  # NaN fails too
    check(name in kinds(x.shape[1]), f"{name} changes colours, and the images are grey.")
    return CORRUPTIONS[name](x, severity, generator).clamp(0.0, 1.0)


def kinds(channels: int) -> tuple[str, ...]:
    """The corruptions that act on images of so many channels: saturate needs colour."""
    return tuple(name for name in CORRUPTIONS if channels == 3 or name != "saturate")
