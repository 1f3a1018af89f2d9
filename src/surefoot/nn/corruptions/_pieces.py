"""What the corruptions are made of: strengths by severity and image size, draws, blurs, displacements, random fields."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

Levels = tuple[float, float, float, float, float]


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


def uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def mirror_pad(x: Tensor, reach: int) -> Tensor:
    """Mirror at the edge; where the image is smaller than the reach, repeat the edge."""
    return F.pad(x, (reach,) * 4, mode="reflect" if reach < side(x) else "replicate")


def fine_positions(reach: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Ten positions a pixel from -reach to reach, and the weights that spread them over whole pixels by linear interpolation.

    A kernel taken at whole pixels would do nothing at all below half a pixel; one spread from fine positions fades in.
    """
    most = math.ceil(reach)
    fine = torch.arange(-10 * most, 10 * most + 1, device=like.device, dtype=like.dtype) / 10
    whole = torch.arange(-most, most + 1, device=like.device, dtype=like.dtype)
    return fine, (1 - (whole[:, None] - fine).abs()).clamp_min(0)


def smooth(x: Tensor, sigma: float) -> Tensor:
    """Separable blur as two matrix products, which is faster on a CPU than a convolution with one channel."""
    fine, spread = fine_positions(4 * sigma, x)
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


def cell_means(x: Tensor, k: int) -> Tensor:
    means = F.avg_pool2d(x, k, ceil_mode=True) if k > 1 else x
    return means.repeat_interleave(k, 2).repeat_interleave(k, 3)[..., : x.shape[2], : x.shape[3]]


def pixel_grid(x: Tensor) -> Tensor:  # [1, H, W, 2], pixel centres, (-1, -1) and (1, 1) are the outer corners
    h, w = x.shape[2:]
    rows = (torch.arange(h, device=x.device, dtype=x.dtype) * 2 + 1) / h - 1
    columns = (torch.arange(w, device=x.device, dtype=x.dtype) * 2 + 1) / w - 1
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)[None]


def sample(x: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), padding_mode="reflection", align_corners=False)


def warp(x: Tensor, offset: Tensor) -> Tensor:
    """Fetch each pixel from `offset` `[B, 2 (right, down), H, W]` pixels away."""
    scale = x.new_tensor([2 / x.shape[3], 2 / x.shape[2]])
    return sample(x, pixel_grid(x) + offset.permute(0, 2, 3, 1) * scale)


def fractal_noise(x: Tensor, decay: float, generator: torch.Generator) -> Tensor:  # [B, 1, H, W]
    """Noise whose amplitude falls with frequency as f^-decay."""
    h, w = x.shape[2:]
    f = torch.sqrt(torch.fft.fftfreq(h, device=x.device)[:, None] ** 2 + torch.fft.rfftfreq(w, device=x.device) ** 2)
    f[0, 0] = torch.inf  # no constant part
    spectrum = torch.fft.rfft2(normal((len(x), 1, h, w), x, generator)) * f.pow(-decay).to(x.dtype)
    return torch.fft.irfft2(spectrum, s=(h, w))


def coarse_noise(x: Tensor, grain: float, generator: torch.Generator) -> Tensor:  # [B, 1, H, W]
    """Normal noise with cells of `grain` pixels."""
    size = [max(math.ceil(n / grain), 2) for n in x.shape[2:]]
    noise = normal((len(x), 1, *size), x, generator)
    return F.interpolate(noise, size=x.shape[2:], mode="bilinear", align_corners=False)


def normal_score(field: Tensor) -> Tensor:
    """Mean 0 and deviation 1 per image, so that a threshold covers the same share everywhere."""
    return (field - field.mean((2, 3), keepdim=True)) / field.std((2, 3), keepdim=True)


def normal_quantile(share: float) -> float:
    """The value a standard normal exceeds with probability `share`."""
    return math.sqrt(2) * torch.erfinv(torch.tensor(1 - 2 * share, dtype=torch.float64)).item()
