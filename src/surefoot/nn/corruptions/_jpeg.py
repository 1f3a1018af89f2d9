"""JPEG as tensor operations: what a file of some quality decodes to."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)
_LUMA_TABLE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87,
    80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101, 72, 92,
    95, 98, 112, 100, 103, 99,
)  # fmt: skip
_CHROMA_TABLE = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99, 99,
    99, 99, *[99] * 32,
)  # fmt: skip


def jpeg(
    x: Tensor,  # [B, C, H, W] in [0, 1], C = 1 or 3
    quality: int,  # 1 to 100, the scale of libjpeg
) -> Tensor:
    """What a baseline JPEG file of that quality decodes to: 8 x 8 DCT, Annex K tables, chroma at half the resolution.

    Entropy coding loses nothing and is left out. ITU-T T.81.
    """
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    h, w = x.shape[2:]
    pixels = (x * 255).round()
    if x.shape[1] == 1:
        return _through_dct(pixels, _LUMA_TABLE, scale)[..., :h, :w].round().clamp(0, 255) / 255
    red, green, blue = pixels.split(1, 1)
    y = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    chroma = torch.cat([(blue - y) / 1.772, (red - y) / 1.402], 1) + 128
    half = F.avg_pool2d(F.pad(chroma, (0, w % 2, 0, h % 2), mode="replicate"), 2)
    y = _through_dct(y.round(), _LUMA_TABLE, scale)[..., :h, :w]
    half = _through_dct(half.round(), _CHROMA_TABLE, scale)[..., : half.shape[2], : half.shape[3]]
    cb, cr = (F.interpolate(half, scale_factor=2, mode="bilinear")[..., :h, :w] - 128).split(1, 1)
    rgb = torch.cat([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], 1)
    return rgb.round().clamp(0, 255) / 255


def _through_dct(plane: Tensor, table: tuple[int, ...], scale: float) -> Tensor:
    """Quantise the DCT coefficients of every 8 x 8 block of `[B, C, H, W]`; padded to whole blocks."""
    plane = F.pad(plane, (0, -plane.shape[3] % 8, 0, -plane.shape[2] % 8), mode="replicate") - 128
    b, c, h, w = plane.shape
    k = torch.arange(8, device=plane.device, dtype=plane.dtype)
    dct = torch.cos((2 * k + 1) * k[:, None] * math.pi / 16) / 2
    dct[0] /= math.sqrt(2)
    steps = ((plane.new_tensor(table) * scale + 50) / 100).floor().clamp(1, 255).view(8, 8)
    blocks = plane.view(b, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    levels = ((dct @ blocks @ dct.T) / steps).round()
    return (dct.T @ (levels * steps) @ dct).transpose(3, 4).reshape(b, c, h, w) + 128
