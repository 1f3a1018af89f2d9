"""How close two pictures are: PSNR, SSIM and their multi-scale and learned relatives, for images in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import check

MS_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def psnr(a: Tensor, b: Tensor) -> float:
    """-10 log10 of the mean squared error, in dB."""
    return float(-10 * torch.log10((a - b).square().mean().clamp_min(1e-12)))


def ssim(
    a: Tensor,  # [H, W, C] or [B, C, H, W]
    b: Tensor,
) -> Tensor:  # scalar
    """Structural similarity with the usual 11 x 11 Gaussian window of sigma 1.5 and zero padding (Wang et al., 2004); differentiable."""
    similarity, _ = _ssim_maps(_batched(a), _batched(b))
    return similarity.mean()


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Multi-scale SSIM (Wang, Simoncelli, Bovik, 2003) over as many of its five scales as an 11-pixel window fits in."""
    a, b = _batched(a), _batched(b)
    result, scales = a.new_ones(()), []
    while min(a.shape[-2:]) >= 11 and len(scales) < len(MS_WEIGHTS):
        similarity, contrast = _ssim_maps(a, b)
        scales.append((similarity.mean().clamp_min(0), contrast.mean().clamp_min(0)))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    check(bool(scales), "Images must be at least 11 pixels wide and high for MS-SSIM.")
    weights = torch.tensor(MS_WEIGHTS[: len(scales)]) / sum(MS_WEIGHTS[: len(scales)])
    for level, (similarity, contrast) in enumerate(scales):
        result = result * (similarity if level == len(scales) - 1 else contrast) ** float(weights[level])
    return result


def _batched(image: Tensor) -> Tensor:
    return image if image.dim() == 4 else image.permute(2, 0, 1)[None]


def _ssim_maps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    check(a.shape == b.shape, f"The images must have one shape, got {list(a.shape)} and {list(b.shape)}.")
    channels = a.shape[1]
    line = torch.exp(-((torch.arange(11, dtype=a.dtype, device=a.device) - 5) ** 2) / (2 * 1.5**2))
    line = line / line.sum()

    def blur(x: Tensor) -> Tensor:
        count = x.shape[1]
        x = F.conv2d(x, line.view(1, 1, 1, 11).expand(count, 1, 1, 11), padding=(0, 5), groups=count)
        return F.conv2d(x, line.view(1, 1, 11, 1).expand(count, 1, 11, 1), padding=(5, 0), groups=count)

    blurred = blur(torch.cat([a, b, a * a, b * b, a * b], 1)).split(channels, 1)
    mean_a, mean_b = blurred[0], blurred[1]
    var_a, var_b = blurred[2] - mean_a**2, blurred[3] - mean_b**2
    covariance = blurred[4] - mean_a * mean_b
    contrast = (2 * covariance + 0.03**2) / (var_a + var_b + 0.03**2)
    return (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2) * contrast, contrast


class FeatureDistance:
    """A perceptual distance by the features of a trained network, 0 for equal images. It is not LPIPS: name the network beside the number.

    Images are brought to `size` pixels; the outputs of the modules `layers` are normalised along the channels, and the mean squared
    differences of the layers are added.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], size: int = 96) -> None:
        known = dict(model.named_modules())
        missing = [name for name in layers if name not in known]
        check(
            bool(layers) and not missing,
            f"layers must name modules of the network; it has no {', '.join(missing) or 'empty list'}.",
        )
        self.model, self.layers, self.size = model.eval(), tuple(layers), size

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> float:  # [H, W, 3] twice, in [0, 1]
        pair = torch.cat([_batched(a), _batched(b)]).float().cpu()
        x = F.interpolate(pair, size=(self.size, self.size), mode="bilinear", antialias=True)
        found: list[Tensor] = []

        def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
            found.append(F.normalize(output, dim=1))

        handles = [self.model.get_submodule(name).register_forward_hook(keep) for name in self.layers]
        try:
            self.model(x)
        finally:
            for handle in handles:
                handle.remove()
        return float(sum((f[0] - f[1]).square().sum(0).mean() for f in found))


EFFNET = "EfficientNet-Lite0 (ImageNet), blocks 0, 2, 4 and 10"


@cache
def _effnet_distance() -> FeatureDistance:
    from surefoot.models.loading import efficientnet_lite0

    blocks = tuple(f"model._blocks.{k}" for k in (0, 2, 4, 10))  # the ends of the stages at 1/2, 1/4, 1/8 and 1/16
    return FeatureDistance(efficientnet_lite0(pretrained=True).requires_grad_(False), blocks)


def effnet_feature_distance(a: Tensor, b: Tensor) -> float:  # [H, W, 3] twice, in [0, 1]
    """`FeatureDistance` by the packaged EfficientNet-Lite0 with its ImageNet weights, pictures brought to 96 pixels.

    0 for equal pictures, 16 at most (four blocks, two unit vectors each). It is not LPIPS: another network, and no weights fitted to what people
    see; compare its numbers with its own only. Needs the extra `vision` (`MissingExtra` says so).
    """
    return _effnet_distance()(a, b)
