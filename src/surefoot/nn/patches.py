"""The second moment of a convolution's inputs: what a curvature or a preconditioner of its weight needs, without unfolding all patches at once."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

CHUNK, WIDE = 1 << 22, 1 << 26  # elements of unfolded patches held at once: on a CPU, on what has launches to save
SMALL = 1 << 18  # elements of unfolded patches up to which one plain product is fastest


class Patches(NamedTuple):
    """How a convolution cuts its input: plain numbers, so that a compiled graph can hold them."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    pad: tuple[int, ...]  # as F.pad takes it
    pad_mode: str


def patch_moment(
    x: Tensor,  # [B, C, H, W]
    patches: Patches,
) -> tuple[Tensor, int]:  # [groups, n, n] and N = B H' W'
    """Sum of the outer products of all patches, exact for every option of Conv2d, a few images at a time."""
    (kh, kw), (sh, sw), (dh, dw) = patches.kernel, patches.stride, patches.dilation
    if any(patches.pad):
        x = F.pad(x, patches.pad, mode=patches.pad_mode)
    height, width = x.shape[2:]
    rows, columns = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    count = len(x) * rows * columns
    apart = (kh <= sh and kw <= sw) or count * x.shape[1] * kh * kw <= SMALL
    moment = _whole_moment if apart else _row_moment
    per_image = x.shape[1] * columns * kw * (rows * kh if apart else height)
    first, *others = x.split(max(1, (CHUNK if x.device.type == "cpu" else WIDE) // max(1, per_image)))
    total = moment(first, patches, rows, columns)
    for part in others:
        total += moment(part, patches, rows, columns)
    return total, count


def _whole_moment(x: Tensor, patches: Patches, rows: int, columns: int) -> Tensor:
    """One product over full patches: for little data, and for patches that do not overlap."""
    (kh, kw), (sh, sw), (dh, dw), groups = patches.kernel, patches.stride, patches.dilation, patches.groups
    channels, (b, c, h, w) = x.shape[1] // groups, x.stride()
    shape = (groups, channels, kh, kw, len(x), rows, columns)
    full = x.as_strided(shape, (channels * c, c, dh * h, dw * w, b, sh * h, sw * w)).reshape(
        groups, channels * kh * kw, -1
    )
    return full @ full.mT


def _row_moment(x: Tensor, patches: Patches, rows: int, columns: int) -> Tensor:
    """Patches unfolded along the image rows only; kernel rows i, i' meet in one batched product per distance i' - i.

    The k_h^2 / 2 block products over full patches become k_h, and the unfolded copy is k_w times the input, not k_h k_w.
    """
    (kh, kw), (sh, sw), (dh, dw), groups = patches.kernel, patches.stride, patches.dilation, patches.groups
    channels, height, (b, c, h, w) = x.shape[1] // groups, x.shape[2], x.stride()
    shape = (groups, height, channels, kw, len(x), columns)
    lines = x.as_strided(shape, (channels * c, h, c, dw * w, b, sw * w)).reshape(groups, height, channels * kw, -1)
    total = x.new_zeros(groups, kh, kh, channels * kw, channels * kw)
    for apart in range(kh):
        met = lines[:, : height - apart * dh] @ lines[:, apart * dh :].mT  # [groups, H - apart, c k_w, c k_w]
        group, line, *inner = met.stride()
        windows = (groups, kh - apart, rows, *met.shape[2:])
        pairs = met.as_strided(windows, (group, dh * line, sh * line, *inner)).sum(2)
        total.diagonal(apart, 1, 2).add_(pairs.permute(0, 2, 3, 1))  # kernel rows i, i + apart
        if apart:
            total.diagonal(-apart, 1, 2).add_(pairs.permute(0, 3, 2, 1))
    blocks = total.reshape(groups, kh, kh, channels, kw, channels, kw).permute(0, 3, 1, 4, 5, 2, 6)
    return blocks.reshape(groups, channels * kh * kw, channels * kh * kw)
