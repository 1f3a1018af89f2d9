"""Splitting an input into two parts, and filling each part up to a full-size image that depends on that part alone.

A partition is two bool masks, disjoint and complete, that broadcast over one input: `[1, H, W]` for images (all channels of
a pixel go together), `[F]` for vectors. `fill_half` makes the image that a network sees of one part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from surefoot.errors import InvalidInput, check

Masks = tuple[Tensor, Tensor]
Fill = Literal["neighbor", "max_pool", "zero"]
Partition = Literal["checkerboard", "left_right", "random"]


def checkerboard_split(shape: Sequence[int]) -> Masks:
    """Masks bool `[1, H, W]` that split every 2x2 block on its diagonal: left where row + column is even."""
    if len(shape) < 2:
        raise InvalidInput(f"A checkerboard needs an image [..., H, W], got shape {tuple(shape)}; use index_split for vectors.")  # fmt: skip
    rows, columns = torch.arange(shape[-2])[:, None], torch.arange(shape[-1])[None, :]
    left = ((rows + columns) % 2 == 0)[None]
    return left, ~left


def left_right_split(shape: Sequence[int]) -> Masks:
    """The left and the right part of the image: sound, but neither half shows the whole."""
    check(len(shape) >= 2, f"A left-right split needs an image [..., H, W], got shape {tuple(shape)}.")
    left = (torch.arange(shape[-1]) < (shape[-1] + 1) // 2).expand(1, shape[-2], shape[-1]).clone()
    return left, ~left


def random_split(shape: Sequence[int], generator: torch.Generator) -> Masks:
    """A random half of the pixels (the same in all channels) and the rest."""
    check(len(shape) >= 2, f"A random pixel split needs an image [..., H, W], got shape {tuple(shape)}.")
    pixels = shape[-2] * shape[-1]
    left = torch.zeros(pixels, dtype=torch.bool)
    left[torch.randperm(pixels, generator=generator)[: (pixels + 1) // 2]] = True
    left = left.view(1, shape[-2], shape[-1])
    return left, ~left


def index_split(length: int, left: Sequence[int]) -> Masks:
    """Masks bool `[length]` for vectors: the listed entries and the rest (use them with fill="zero")."""
    mask = torch.zeros(length, dtype=torch.bool)
    check(all(0 <= i < length for i in left), f"left must hold positions in [0, {length}).")
    mask[torch.as_tensor(list(left), dtype=torch.int64)] = True
    check_masks(mask, ~mask)
    return mask, ~mask


def check_masks(left: Tensor, right: Tensor) -> None:
    """Raise unless the masks are a partition: disjoint, complete, neither empty."""
    check(left.dtype == right.dtype == torch.bool and left.shape == right.shape, "masks must be two bool tensors of one shape.")  # fmt: skip
    check(not bool((left & right).any()), "The masks overlap; each pixel belongs to exactly one half.")
    check(bool((left | right).all()), "The masks leave pixels out; each pixel belongs to exactly one half.")
    check(bool(left.any()) and bool(right.any()), "One mask is empty; each half needs at least one pixel.")


def kept_neighbours(mask: Tensor) -> Tensor:  # float [..., H, W]
    """1 / (number of kept 4-neighbours) at dropped pixels, 0 at kept pixels and at those without a kept neighbour."""
    count = _cross_sum(mask.to(torch.get_default_dtype()))
    return torch.where(mask | (count == 0), 0.0, 1.0 / count.clamp(min=1.0))


def fill_half(
    x: Tensor,  # float [B, ...]
    mask: Tensor,  # bool, True where kept
    weight: Tensor | None = None,  # kept_neighbours(mask), for "neighbor"
    fill: Fill = "neighbor",
) -> Tensor:  # float [B, ...]
    """The full-size image made from the kept pixels alone: it is bit-identical whatever stands in the dropped ones.

    Dropped pixels get the mean of their kept 4-neighbours, or the maximum of the kept pixels of their 2x2 block (0 counts
    as kept, as published), or 0.
    """
    kept = torch.where(mask, x, 0.0)  # not x * mask: a NaN in a dropped pixel must not leak
    if fill == "zero":
        return kept
    if fill == "neighbor":
        weight = kept_neighbours(mask).to(x) if weight is None else weight.to(x.dtype)
        return torch.addcmul(kept, _cross_sum(kept), weight)
    pooled = F.max_pool2d(kept, 2, ceil_mode=True).repeat_interleave(2, -2).repeat_interleave(2, -1)
    return torch.where(mask, x, pooled[..., : x.shape[-2], : x.shape[-1]])


def _cross_sum(x: Tensor) -> Tensor:
    """Sum of the four neighbours, zero outside the image."""
    out = torch.zeros_like(x)
    out[..., 1:, :] += x[..., :-1, :]
    out[..., :-1, :] += x[..., 1:, :]
    out[..., :, 1:] += x[..., :, :-1]
    out[..., :, :-1] += x[..., :, 1:]
    return out
