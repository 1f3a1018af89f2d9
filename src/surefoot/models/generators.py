"""A small generative model of images, trained in seconds: decoder z -> image, encoder image -> z.

The variational autoencoder (Kingma & Welling, 2014, arXiv 1312.6114) with the best noise variance for each batch
(Rybkin, Daniilidis & Levine, 2021, arXiv 2006.13202), so that no weight between the two terms needs tuning. With D pixels:

    q(z | x) = N(mean(x), diag(exp(log_var(x)))),    p(z) = N(0, I)
    loss     = D/2 log( mean (G(z) - x)^2 ) + KL(q || p)            per image

The decoder is an `nn.Sequential` that ends in the range of the data, so that it can be split at any layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surefoot.errors import check, check_at_least, check_positive
from surefoot.models.networks import seeded_build

WARM_UP = 0.6  # share of the steps over which the divergence gains its weight


class IntoRange(nn.Module):
    """Squash to (low, high)."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * torch.sigmoid(x)


def _he_init_(network: nn.Module) -> None:
    """PyTorch's own initial weights let so little through that the first hundreds of steps learn nothing."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)


class Corner(nn.Module):
    """The top left `height` x `width` of larger maps."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.height, : self.width]


def image_decoder(
    latent_dim: int,
    image_shape: Sequence[int],  # (C, H, W)
    *,
    width: int = 32,
    hidden: int = 256,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> nn.Sequential:
    """Two linear layers to `width` maps of a quarter of the image's side, then two sub-pixel convolutions that double it.

    A sub-pixel convolution (3x3 to four times the channels, which become 2x2 pixels) works at the small resolution: a third of
    the time of upsampling first.
    """
    check_at_least("latent_dim", latent_dim, 1)
    check_at_least("width", width, 2)
    channels, height, rest = _check_shape(image_shape)
    quarter = (math.ceil(height / 4), math.ceil(rest / 4))
    layers: list[nn.Module] = [
        nn.Linear(latent_dim, hidden),
        nn.ReLU(),
        nn.Linear(hidden, width * quarter[0] * quarter[1]),
        nn.Unflatten(1, (width, *quarter)),
        nn.ReLU(),
        nn.Conv2d(width, width // 2 * 4, 3, padding=1),
        nn.PixelShuffle(2),
        nn.ReLU(),
        nn.Conv2d(width // 2, channels * 4, 3, padding=1),
        nn.PixelShuffle(2),
    ]
    if height % 4 or rest % 4:
        layers.append(Corner(height, rest))
    net = nn.Sequential(*layers, *([IntoRange(*bounds)] if bounds is not None else []))
    _he_init_(net)
    return net


class ImageEncoder(nn.Module):
    """Strided convolutions and a hidden layer (`features`), then the mean of z; `log_var` beside it for training a VAE."""

    def __init__(self, image_shape: Sequence[int], latent_dim: int, *, width: int = 16, hidden: int = 128) -> None:
        super().__init__()
        check_at_least("latent_dim", latent_dim, 1)
        channels, height, rest = _check_shape(image_shape)
        flat = 2 * width * math.ceil(height / 4) * math.ceil(rest / 4)
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(),
        )  # fmt: skip
        self.mean, self.log_var = nn.Linear(hidden, latent_dim), nn.Linear(hidden, latent_dim)
        _he_init_(self)
        with torch.no_grad():
            self.log_var.weight.mul_(0.1)
            self.log_var.bias.fill_(-3.0)  # little noise at first: the decoder learns what the codes say

    def forward(self, x: Tensor) -> Tensor:
        return self.mean(self.features(x))


@dataclass(frozen=True)
class ImageVAE:
    """A trained pair. `variance` is the mean squared error of the last tenth of the training, per pixel."""

    decoder: nn.Sequential  # [B, d] -> [B, C, H, W]
    encoder: ImageEncoder  # [B, C, H, W] -> [B, d]
    latent_dim: int
    variance: float


def train_vae(
    x: Tensor,  # [N, C, H, W]
    *,
    latent_dim: int = 16,
    steps: int = 600,
    batch_size: int = 64,
    lr: float = 3e-3,
    width: int = 32,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator,
) -> ImageVAE:
    """Train on unlabelled images, on their device and in their precision; both networks come back in evaluation mode."""
    check(x.dim() == 4 and len(x) > 1, f"x must be at least two images [N, C, H, W], got shape {tuple(x.shape)}.")
    check(bool(torch.isfinite(x).all()), "x must be finite, got NaN or infinity.")
    check_at_least("steps", steps, 1)
    check_at_least("batch_size", batch_size, 2)
    check_positive("lr", lr)
    shape = tuple(x.shape[1:])
    decoder = seeded_build(lambda: image_decoder(latent_dim, shape, width=width, bounds=bounds), generator).to(x)
    encoder = seeded_build(lambda: ImageEncoder(shape, latent_dim), generator).to(x)
    assert isinstance(decoder, nn.Sequential) and isinstance(encoder, ImageEncoder)
    optimizer = torch.optim.Adam([*decoder.parameters(), *encoder.parameters()], lr)
    tail, pixels = [], math.prod(shape)
    with torch.enable_grad():
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, 2 * (1 - step / steps))  # constant, then linear to zero
            batch = x[torch.randint(len(x), (batch_size,), generator=generator).to(x.device)]
            hidden = encoder.features(batch)
            mean, log_var = encoder.mean(hidden), encoder.log_var(hidden).clamp(-12, 6)
            noise = torch.randn(mean.shape, generator=generator, dtype=x.dtype).to(x.device)
            error = (decoder(mean + (log_var / 2).exp() * noise) - batch).square().mean()
            divergence = (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean() / 2
            warm = min(1.0, step / (WARM_UP * steps))  # at full weight from the start the codes collapse to the prior
            loss = pixels / 2 * error.clamp(min=1e-6).log() + warm * divergence
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if step >= steps - max(1, steps // 10):
                tail.append(error.detach())
    optimizer.zero_grad(set_to_none=True)
    variance = float(torch.stack(tail).mean())
    check(math.isfinite(variance), f"The autoencoder's error became {variance}; lower lr ({lr}).")
    return ImageVAE(decoder.eval(), encoder.eval(), latent_dim, variance)


def _check_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    check(len(shape) == 3 and min(shape) >= 1, f"image_shape must be (channels, height, width), got {tuple(shape)}.")
    channels, height, width = (int(n) for n in shape)
    return channels, height, width
