"""Which crop: integer scores and an order of contents, both blind to where a crop lies; and the bounds that follow.

Binomial filters are made of repeated pair sums (weights 1 1), the 5x5 on the way to the 9x9: additions of integers, exact on every
device, below 2^24 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from surefoot.errors import check, check_at_least, check_choice

Size = int | tuple[int, int]
Mode = Literal["realistic", "cyclic"]
Score = Literal["dog", "center", "random"] | Callable[[Tensor, tuple[int, int]], Tensor]


def as_pair(name: str, size: Size) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    check(len(pair) == 2 and all(int(s) == s and s >= 1 for s in pair), f"{name} must be one or two positive integers, got {size!r}.")  # fmt: skip
    return int(pair[0]), int(pair[1])


# Bounds ---------------------------------------------------------------------------------------------------------------


def grid_size(image_size: Size, crop_size: Size) -> tuple[int, int]:
    """Positions (a, b) that a crop can take: H - h + 1 rows and W - w + 1 columns."""
    (height, width), (h, w) = as_pair("image_size", image_size), as_pair("crop_size", crop_size)
    check(h <= height and w <= width, f"The crop {h}x{w} is larger than the image {height}x{width}.")
    return height - h + 1, width - w + 1


def crop_change_bound(image_size: Size, crop_size: Size, shift: tuple[int, int] = (0, 1)) -> float:
    """P(another crop is selected after `shift` = (dy, dx)) is at most 2 (N - M) / (2N - M), for a uniform argmax."""
    a, b = grid_size(image_size, crop_size)
    total = a * b
    shared = max(0, a - abs(shift[0])) * max(0, b - abs(shift[1]))
    return 2 * (total - shared) / (2 * total - shared)


def crop_fooled_bound(image_size: Size, crop_size: Size) -> float:
    """P(some 1-pixel shift of the 8 selects another crop) is at most 1 - (a - 2)(b - 2) / ((a + 2)(b + 2))."""
    a, b = grid_size(image_size, crop_size)
    return 1 - max(0, a - 2) * max(0, b - 2) / ((a + 2) * (b + 2))


def crop_size_for_consistency(image_size: int, target: float, shift: int = 1) -> int:
    """The largest crop of which a sideways shift by `shift` pixels keeps the choice with probability at least `target`."""
    check_at_least("image_size", image_size, 1)
    check_at_least("shift", shift, 1)
    check(0.0 <= target < 1.0, f"target must lie in [0, 1), got {target!r}; only mode='cyclic' reaches 1.")
    positions = math.ceil(2 * shift / (1 - target) - shift - 1e-9)  # 2s / (b + s) <= 1 - target
    crop = image_size - max(1, positions) + 1
    check(crop >= 3, f"A consistency of {target} needs {positions} positions, too many for an image of {image_size}.")
    return crop


# Scores: integers, so that a crop's score does not depend on where it lies ----------------------------------------------


def grey_levels(
    x: Tensor,  # [B, C, H, W], uint8, or floating in [0, 1]
) -> Tensor:  # int32 [B, H, W]
    """Grey levels 0..255. Floating images are rounded to bytes first; colour is weighted (77, 150, 29) / 256."""
    levels = to_bytes(x).int()
    if levels.shape[1] == 3:
        return (77 * levels[:, 0] + 150 * levels[:, 1] + 29 * levels[:, 2]) >> 8
    return levels[:, 0] if levels.shape[1] == 1 else levels.sum(1, dtype=torch.int32) // levels.shape[1]


def check_pixels(x: Tensor) -> None:
    check(
        x.dtype == torch.uint8 or x.is_floating_point(),
        f"Images must be uint8 or floating point in [0, 1], got {x.dtype}.",
    )
    if x.is_floating_point():  # a sum is finite only if each term is, and is much cheaper than looking at each
        check(bool(x.detach().sum().isfinite()), "Images must be finite, got NaN or infinity.")


def to_bytes(x: Tensor) -> Tensor:  # uint8
    """Bytes as they are; floating images in [0, 1] rounded to 255ths and cut to the range."""
    if x.dtype == torch.uint8:
        return x
    check_pixels(x)
    return (x.detach() * 255).round().clamp(0, 255).to(torch.uint8)


def _binomial(x: Tensor, order: int) -> Tensor:
    """`order` pair sums along each axis: weights (1, order, ...) of sum 2^order an axis, `order` pixels smaller."""
    for _ in range(order):
        x = x[:, 1:] + x[:, :-1]
    for _ in range(order):
        x = x[:, :, 1:] + x[:, :, :-1]
    return x


def dog_orders(crop_size: tuple[int, int]) -> tuple[int, int]:
    """Orders of the two binomial filters, (4, 8) for 5x5 and 9x9, narrower for crops that those do not fit in."""
    side = min(crop_size)
    check(side >= 3, f"A crop of {crop_size[0]}x{crop_size[1]} is too small to score; take at least 3x3.")
    return (4, 8) if side >= 9 else (2, 4) if side >= 5 else (0, 2)


def score_map(
    grey: Tensor,  # int32 [B, H, W]
    crop_size: tuple[int, int],
    score: Score = "dog",
) -> Tensor:  # [B, H - h + 1, W - w + 1]
    """The score of every crop, read at its centre pixel.

    "dog": |difference of binomials|; "center": 3x3 binomial; "random": a fixed filter of random integers; or a function
    `score(grey, crop_size)`, which must depend on nothing but each crop's content.
    """
    a, b = grid_size((grey.shape[1], grey.shape[2]), crop_size)
    if callable(score):
        answer = score(grey, crop_size)
        expected = (len(grey), a, b)
        check(tuple(answer.shape) == expected, f"score must return a map {list(expected)}, got {list(answer.shape)}.")
        check(bool(answer.isfinite().all()), "score returned NaN or infinity.")
        return answer
    return _responses(_scored_part(grey, crop_size, score), crop_size, score)


def _reach(crop_size: tuple[int, int], score: str) -> int:
    check_choice("score", score, ("dog", "center", "random"))
    return 1 if score == "center" else dog_orders(crop_size)[1] // 2


def _scored_part(x: Tensor, crop_size: tuple[int, int], score: str) -> Tensor:
    """The pixels, of `[..., H, W]`, that the filters read: about as many as there are positions."""
    reach = _reach(crop_size, score)
    rows, columns = (
        slice(c // 2 - reach, c // 2 + side - c + 1 + reach) for side, c in zip(x.shape[-2:], crop_size, strict=True)
    )
    return x[..., rows, columns]


def _responses(part: Tensor, crop_size: tuple[int, int], score: str) -> Tensor:
    if score == "center":
        return _binomial(part, 2)
    narrow, wide = dog_orders(crop_size)
    a, b = part.shape[1] - wide, part.shape[2] - wide
    if score == "random":
        return _random_filter(part, wide + 1, a, b)
    small = _binomial(part, narrow)
    large = _binomial(small, wide - narrow)
    margin = (wide - narrow) // 2
    scale = 4 ** (wide - narrow)  # both kernels then have the sum 4^wide, and flat regions score zero
    return (scale * small[:, margin : margin + a, margin : margin + b] - large).abs()


def _random_filter(part: Tensor, side: int, a: int, b: int) -> Tensor:
    weights = torch.randint(-16, 17, (side, side), generator=torch.Generator().manual_seed(0)).tolist()
    total = torch.zeros((len(part), a, b), dtype=part.dtype, device=part.device)
    for i, row in enumerate(weights):
        for j, weight in enumerate(row):
            total += weight * part[:, i : i + a, j : j + b]
    return total


def content_ranks(
    x: Tensor,  # uint8 [B, C, H, W]
    crop_size: tuple[int, int],
) -> Tensor:  # int64 [B, H - h + 1, W - w + 1]
    """Ranks of all crops in an order of their bytes.

    Equal ranks are equal crops, and which of two crops comes first depends on the two alone.

    Names of squares twice as large are made from pairs of names (Karp, Miller and Rosenberg 1972): log2(h) + log2(w) sorts of
    the whole map in place of comparing crops pixel by pixel.
    """
    name = x[:, 0].long()
    for channel in range(1, x.shape[1]):
        name = _pair_name(name, x[:, channel].long())
    for axis, size in ((1, crop_size[0]), (2, crop_size[1])):
        length = 1
        while length < size:
            step = min(length, size - length)  # the last pair overlaps to end at the exact size
            count = name.shape[axis] - step
            name = _pair_name(name.narrow(axis, 0, count), name.narrow(axis, step, count))
            length += step
    return name


def _pair_name(first: Tensor, second: Tensor) -> Tensor:
    """Order-preserving names of pairs of names."""
    width = int(second.max()) + 1
    return torch.unique(first * width + second, return_inverse=True)[1]


def select_positions(
    x: Tensor,  # [B, C, H, W], uint8, or floating in [0, 1]
    crop_size: tuple[int, int],
    score: Score = "dog",
) -> Tensor:  # int64 [B, 2], top-left corners
    """The best-scoring crop of each image; among equal scores the one whose bytes come first, wherever it lies."""
    grid_size((x.shape[2], x.shape[3]), crop_size)
    check_pixels(x)
    if callable(score):
        scores = score_map(grey_levels(x), crop_size, score)
    else:
        scores = _responses(grey_levels(_scored_part(x, crop_size, score)), crop_size, score)
    width = scores.shape[2]
    best = scores.flatten(1) == scores.flatten(1).amax(1, keepdim=True)
    place = torch.arange(best.shape[1], device=x.device)
    first = torch.where(best, place, best.shape[1]).amin(1)
    tied = (best.sum(1) > 1).nonzero().flatten()
    if len(tied):
        ranks = content_ranks(to_bytes(x[tied]), crop_size).flatten(1)
        key = torch.where(best[tied], ranks * best.shape[1] + place, torch.iinfo(torch.int64).max)
        first[tied] = key.amin(1) % best.shape[1]
    return torch.stack([first // width, first % width], 1)


def cut(
    x: Tensor,  # [B, C, H, W]
    positions: Tensor,  # int64 [B, 2]
    crop_size: tuple[int, int],
) -> Tensor:  # [B, C, h, w]
    """One crop an image, at its own position."""
    device = x.device
    sample = torch.arange(len(x), device=device)[:, None, None, None]
    channel = torch.arange(x.shape[1], device=device)[None, :, None, None]
    rows = positions[:, 0, None] + torch.arange(crop_size[0], device=device)
    columns = positions[:, 1, None] + torch.arange(crop_size[1], device=device)
    return x[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def wrap_around(x: Tensor, crop_size: tuple[int, int]) -> Tensor:
    """The image continued cyclically, so that a crop may start at each of its pixels."""
    x = torch.cat([x, x[:, :, : crop_size[0] - 1]], 2)
    return torch.cat([x, x[:, :, :, : crop_size[1] - 1]], 3)
