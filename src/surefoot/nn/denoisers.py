"""A small denoiser and its first-order training: what stands before a classifier that was not trained for noise.

`DnCNN` predicts the noise and subtracts it, D(x) = x - net(x). Its last convolution starts at zero, so that an untrained D
is the identity exactly. `denoising_loss` is its usual objective, E ||D(x + sigma e) - x||^2 a pixel; `train_denoiser` the loop.
Put before a classifier, `nn.Sequential(D, f)` is denoised smoothing's base classifier: two network calls a noise sample.

Source: Zhang, Zuo, Chen, Meng, Zhang 2017, arXiv 1608.03981; before a fixed classifier: Salman et al. 2020, arXiv 2003.01908.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import check, check_at_least, check_non_negative, check_positive


class DnCNN(nn.Module):
    """`depth` 3x3 convolutions of `width` channels, ReLU between, batch-norm inside; returns x minus the predicted noise.

    Any image size; nothing is clipped. The paper's size is depth 17, width 64.
    """

    def __init__(self, channels: int, *, depth: int = 17, width: int = 64, batch_norm: bool = True) -> None:
        super().__init__()
        check_at_least("channels", channels, 1)
        check_at_least("depth", depth, 2)
        check_at_least("width", width, 1)
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers.append(nn.Conv2d(width, width, 3, padding=1, bias=not batch_norm))
            layers += [nn.BatchNorm2d(width), nn.ReLU()] if batch_norm else [nn.ReLU()]
        last = nn.Conv2d(width, channels, 3, padding=1, bias=False)
        self.channels = channels
        self.noise = nn.Sequential(*layers, last)
        for module in self.noise:
            if isinstance(module, nn.Conv2d):
                nn.init.orthogonal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> the same
        check(x.dim() == 4 and x.shape[1] == self.channels, f"This denoiser takes images [B, {self.channels}, H, W], got {list(x.shape)}.")  # fmt: skip
        return x - self.noise(x)


def denoising_loss(
    denoiser: nn.Module,
    x: Tensor,  # float [B, ...]
    *,
    sigma: float,
    generator: torch.Generator,
) -> Tensor:  # scalar
    """Mean squared error of D(x + sigma e) against x."""
    check_non_negative("sigma", sigma)
    noise = torch.randn(x.shape, dtype=x.dtype, device=generator.device, generator=generator).to(x.device)
    return F.mse_loss(denoiser(x + sigma * noise), x)


def train_denoiser(
    denoiser: nn.Module,
    x: Tensor,  # float [N, ...]
    *,
    sigma: float,
    epochs: int,
    generator: torch.Generator,
    batch_size: int = 64,
    lr: float = 1e-3,
) -> nn.Module:
    """A trained copy of `denoiser` (Adam, cosine), in evaluation mode; it needs no labels and no classifier."""
    check(len(x) > 1, f"x holds {len(x)} images; a denoiser needs at least two to train on.")
    check_at_least("epochs", epochs, 1)
    check_positive("lr", lr)
    trained = copy.deepcopy(denoiser).train()
    size = min(batch_size, len(x))
    optimizer = torch.optim.Adam(trained.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(x) // size))
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator, device=generator.device).to(x.device)
        for start in range(0, len(x) - size + 1, size):
            loss = denoising_loss(trained, x[order[start : start + size]], sigma=sigma, generator=generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad(set_to_none=True)
    return trained.eval()
