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

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from surefoot.errors import check, check_choice

Corruption = Callable[[Tensor, int, torch.Generator], Tensor]
SEVERITIES = (1, 2, 3, 4, 5)
Levels = tuple[float, float, float, float, float]


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


def side(x: Tensor) -> int:
    return min(x.shape[2:])


def strength(x: Tensor, severity: int, small: Levels, large: Levels) -> float:
    """A dimensionless strength: `small` at 32 pixels and less, `large` at 224 and more, geometric in between."""
    share = min(max(math.log(side(x) / 32) / math.log(224 / 32), 0.0), 1.0)
    return small[severity - 1] ** (1 - share) * large[severity - 1] ** share


def length(x: Tensor, severity: int, small: Levels, large: Levels) -> float:
    """A length in pixels, given at 32 and 224 pixels; proportional to the side outside, of 16 pixels at least."""
    pixels = max(side(x), 16)
    factor = pixels / 32 if pixels < 32 else max(pixels / 224, 1.0)
    return factor * strength(x, severity, small, large)


# --- noise ------------------------------------------------------------------------------------------------------------


def gaussian_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    sigma = strength(x, severity, (0.04, 0.06, 0.08, 0.10, 0.12), (0.08, 0.12, 0.18, 0.26, 0.38))
    return x + sigma * _randn(x.shape, x, generator)


def shot_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Counting noise: Poisson(photons x) / photons."""
    photons = strength(x, severity, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3))
    counts = torch.poisson((x.clamp_min(0) * photons).to(generator.device), generator=generator).to(x.device)
    return counts / photons


def impulse_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Salt and pepper on a share of the values."""
    share = strength(x, severity, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27))
    lot = _rand(x.shape, x, generator)
    return torch.where(lot < share / 2, 0.0, torch.where(lot > 1 - share / 2, 1.0, x))


def speckle_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Noise in proportion to the value."""
    sigma = strength(x, severity, (0.06, 0.10, 0.12, 0.16, 0.20), (0.15, 0.20, 0.35, 0.45, 0.60))
    return x + x * sigma * _randn(x.shape, x, generator)


# --- blur -------------------------------------------------------------------------------------------------------------


def gaussian_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    return _gaussian(x, length(x, severity, (0.4, 0.55, 0.7, 0.85, 1.1), (1, 2, 3, 4, 6)))


def defocus_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A lens out of focus: the mean over a disc."""
    radius = length(x, severity, (0.5, 0.7, 0.9, 1.2, 1.6), (3, 4, 6, 8, 10))
    fine, spread = _fine(radius, x)
    disc = (fine[:, None] ** 2 + fine**2 <= radius**2).to(x.dtype)
    kernel = spread @ disc @ spread.T
    return F.conv2d(_pad(x, len(kernel) // 2).flatten(0, 1)[:, None], (kernel / kernel.sum())[None, None]).view(x.shape)


def glass_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Each pixel is fetched from a random place nearby, between two faint blurs."""
    shake = length(x, severity, (0.6, 0.8, 1.0, 1.25, 1.6), (1.0, 1.5, 2.0, 3.0, 4.0))
    offset = _rand((len(x), 2, *x.shape[2:]), x, generator) * 2 - 1
    return _gaussian(_warp(_gaussian(x, 0.3 * shake), shake * offset), 0.3 * shake)


def motion_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """The mean along a line at an angle of each image's own, within 45 degrees of the horizontal."""
    reach = length(x, severity, (2.0, 2.5, 3.2, 4.0, 5.0), (10, 14, 18, 23, 28)) / 2
    angle = (_rand((len(x), 1, 1), x, generator) - 0.5) * (math.pi / 2)
    count = 2 * math.ceil(reach) + 1
    total = torch.zeros_like(x)
    for step in torch.linspace(-reach, reach, count).tolist():
        shift = torch.stack([angle.cos() * step, angle.sin() * step], 1)  # [B, 2, 1, 1]
        total += _warp(x, shift.expand(-1, -1, *x.shape[2:]))
    return total / count


def zoom_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """The mean over a zoom into the middle of the image."""
    most = strength(x, severity, (0.06, 0.11, 0.16, 0.21, 0.26), (0.11, 0.16, 0.21, 0.26, 0.33))
    grid = _grid(x)
    zooms = torch.linspace(0.0, most, 9).tolist()
    return sum(_sample(x, grid / (1 + zoom)) for zoom in zooms) / len(zooms)  # type: ignore[return-value]


# --- weather ----------------------------------------------------------------------------------------------------------


def snow(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Flakes driven by the wind, on a picture gone pale."""
    cover, pale = ((0.03, 0.10), (0.05, 0.16), (0.08, 0.22), (0.11, 0.28), (0.14, 0.35))[severity - 1]
    grain = max(side(x) / 75, 1.0)
    field = _normal_score(_coarse_noise(x, grain, generator))
    flakes = ((field - _quantile(cover)) / 0.6 + 0.5).clamp(0, 1)
    angle = (_rand((len(x), 1, 1), x, generator) * 0.5 + 0.25) * math.pi  # mostly downwards
    drift = [
        _warp(flakes, (torch.stack([angle.cos(), angle.sin()], 1) * (step * grain)).expand(-1, -1, *x.shape[2:]))
        for step in (-1.0, -0.5, 0.0, 0.5, 1.0)
    ]
    grey = x.mean(1, keepdim=True) * 0.5 + 0.5
    return torch.lerp(x, torch.maximum(x, grey), pale) + 0.9 * torch.stack(drift).mean(0)


def frost(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Ice on the pane: bright ridges of a fractal field, denser towards the edge."""
    keep, ice = ((0.95, 0.35), (0.88, 0.45), (0.80, 0.55), (0.74, 0.65), (0.66, 0.75))[severity - 1]
    field = _normal_score(_fractal(x, 1.6, generator))
    ridges = (1 - field.abs() / 1.2).clamp_min(0).square()
    edge = _grid(x).abs().amax(-1)[:, None]  # 0 in the middle, 1 at the edge
    return keep * x + ice * (ridges * (0.4 + 0.6 * edge) + 0.15 * edge)


def fog(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Haze as a fractal field in [0, 1]; the picture is scaled so that its brightest point stays where it was."""
    density = strength(x, severity, (0.2, 0.5, 0.75, 1.0, 1.5), (1.5, 2.0, 2.5, 3.0, 3.5))
    field = _fractal(x, 1.8, generator)
    low, high = field.amin((2, 3), keepdim=True), field.amax((2, 3), keepdim=True)
    most = x.amax((1, 2, 3), keepdim=True).clamp_min(1e-3)
    return (x + density * (field - low) / (high - low)) * most / (most + density)


def spatter(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Drops of water on the lens: the blobs of a smooth random field, opaque to a growing share."""
    cover, opacity = ((0.03, 0.5), (0.06, 0.6), (0.10, 0.65), (0.15, 0.7), (0.22, 0.8))[severity - 1]
    field = _normal_score(_gaussian(_randn((len(x), 1, *x.shape[2:]), x, generator), max(side(x) / 40, 0.8)))
    drops = opacity * ((field - _quantile(cover)) / 0.3 + 0.5).clamp(0, 1)
    water = x.new_tensor((0.69, 0.93, 0.93) if x.shape[1] == 3 else (0.88,)).view(1, -1, 1, 1)
    return torch.lerp(x, water.expand_as(x), drops.expand_as(x))


def brightness(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """More light: the value of the HSV colour rises, hue and saturation stay."""
    more = strength(x, severity, (0.05, 0.10, 0.15, 0.20, 0.30), (0.1, 0.2, 0.3, 0.4, 0.5))
    value = x.amax(1, keepdim=True)
    lifted = (value + more).clamp_max(1.0)
    return torch.where(value > 0, x * (lifted / value.clamp_min(1e-6)), lifted)


# --- digital ----------------------------------------------------------------------------------------------------------


def contrast(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    keep = strength(x, severity, (0.75, 0.50, 0.40, 0.30, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05))
    mean = x.mean((2, 3), keepdim=True)
    return mean + keep * (x - mean)


def saturate(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Stronger colours: the distance of each channel from the luma grows."""
    factor = (1.5, 2.0, 3.0, 5.0, 10.0)[severity - 1]
    luma = (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    return luma + factor * (x - luma)


def elastic_transform(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Each point moves by a smooth random field; severity is the root mean square of the move."""
    move = length(x, severity, (0.45, 0.65, 0.85, 1.1, 1.4), (2.5, 3.5, 4.5, 6.0, 8.0))
    noise = _randn((len(x), 2, *x.shape[2:]), x, generator)
    field = _gaussian(noise, max(side(x), 16) / 16)
    return _warp(x, move * field / field.square().mean((1, 2, 3), keepdim=True).sqrt())


def pixelate(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Fewer pixels: the mean over cells of k x k; a cell side between two integers mixes both."""
    cell = strength(x, severity, (1.25, 1.4, 1.6, 1.8, 2.2), (1.7, 2.0, 2.5, 3.3, 4.0))
    return torch.lerp(_cells(x, math.floor(cell)), _cells(x, math.floor(cell) + 1), cell % 1)


def jpeg_compression(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    return jpeg(x, round(strength(x, severity, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7))))


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


# --- pieces -----------------------------------------------------------------------------------------------------------


def _rand(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def _randn(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def _pad(x: Tensor, reach: int) -> Tensor:
    """Mirror at the edge; where the image is smaller than the reach, repeat the edge."""
    return F.pad(x, (reach,) * 4, mode="reflect" if reach < side(x) else "replicate")


def _fine(reach: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Ten positions a pixel from -reach to reach, and the weights that spread them over whole pixels by linear interpolation.

    A kernel taken at whole pixels would do nothing at all below half a pixel; one spread from fine positions fades in.
    """
    most = math.ceil(reach)
    fine = torch.arange(-10 * most, 10 * most + 1, device=like.device, dtype=like.dtype) / 10
    whole = torch.arange(-most, most + 1, device=like.device, dtype=like.dtype)
    return fine, (1 - (whole[:, None] - fine).abs()).clamp_min(0)


def _gaussian(x: Tensor, sigma: float) -> Tensor:
    """Separable blur as two matrix products, which is faster on a CPU than a convolution with one channel."""
    fine, spread = _fine(4 * sigma, x)
    kernel = spread @ (-0.5 * (fine / sigma) ** 2).softmax(0)
    rows, columns = (_blur_matrix(kernel, n) for n in x.shape[2:])
    return rows @ x @ columns.T


def _blur_matrix(kernel: Tensor, n: int) -> Tensor:  # [n, n]
    """Row i holds the weights of output pixel i; what falls outside is mirrored at the edge."""
    reach = len(kernel) // 2
    at = torch.arange(n, device=kernel.device)[:, None] + torch.arange(-reach, reach + 1, device=kernel.device)
    at = at.remainder(2 * n)
    at = torch.minimum(at, 2 * n - 1 - at)
    return kernel.new_zeros(n, n).scatter_add_(1, at, kernel.expand(n, -1))


def _cells(x: Tensor, k: int) -> Tensor:
    means = F.avg_pool2d(x, k, ceil_mode=True) if k > 1 else x
    return means.repeat_interleave(k, 2).repeat_interleave(k, 3)[..., : x.shape[2], : x.shape[3]]


def _grid(x: Tensor) -> Tensor:  # [1, H, W, 2], pixel centres, (-1, -1) and (1, 1) are the outer corners
    h, w = x.shape[2:]
    rows = (torch.arange(h, device=x.device, dtype=x.dtype) * 2 + 1) / h - 1
    columns = (torch.arange(w, device=x.device, dtype=x.dtype) * 2 + 1) / w - 1
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)[None]


def _sample(x: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), padding_mode="reflection", align_corners=False)


def _warp(x: Tensor, offset: Tensor) -> Tensor:
    """Fetch each pixel from `offset` `[B, 2 (right, down), H, W]` pixels away."""
    scale = x.new_tensor([2 / x.shape[3], 2 / x.shape[2]])
    return _sample(x, _grid(x) + offset.permute(0, 2, 3, 1) * scale)


def _fractal(x: Tensor, decay: float, generator: torch.Generator) -> Tensor:  # [B, 1, H, W]
    """Noise whose amplitude falls with frequency as f^-decay."""
    h, w = x.shape[2:]
    f = torch.sqrt(torch.fft.fftfreq(h, device=x.device)[:, None] ** 2 + torch.fft.rfftfreq(w, device=x.device) ** 2)
    f[0, 0] = torch.inf  # no constant part
    spectrum = torch.fft.rfft2(_randn((len(x), 1, h, w), x, generator)) * f.pow(-decay).to(x.dtype)
    return torch.fft.irfft2(spectrum, s=(h, w))


def _coarse_noise(x: Tensor, grain: float, generator: torch.Generator) -> Tensor:  # [B, 1, H, W]
    """Normal noise with cells of `grain` pixels."""
    size = [max(math.ceil(n / grain), 2) for n in x.shape[2:]]
    noise = _randn((len(x), 1, *size), x, generator)
    return F.interpolate(noise, size=x.shape[2:], mode="bilinear", align_corners=False)


def _normal_score(field: Tensor) -> Tensor:
    """Mean 0 and deviation 1 per image, so that a threshold covers the same share everywhere."""
    return (field - field.mean((2, 3), keepdim=True)) / field.std((2, 3), keepdim=True)


def _quantile(share: float) -> float:
    """The value a standard normal exceeds with probability `share`."""
    return math.sqrt(2) * torch.erfinv(torch.tensor(1 - 2 * share, dtype=torch.float64)).item()


CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function
    for function in (
        gaussian_noise, shot_noise, impulse_noise, speckle_noise, gaussian_blur, defocus_blur, glass_blur, motion_blur,
        zoom_blur, snow, frost, fog, spatter, brightness, contrast, saturate, elastic_transform, pixelate, jpeg_compression,
    )
}  # fmt: skip
