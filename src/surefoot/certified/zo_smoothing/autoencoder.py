"""Small autoencoders that bring an image down to a latent vector in which coordinate-wise estimation is affordable."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import check, check_at_least, check_positive


class Autoencoder(nn.Module):
    """`decoder(encoder(x))`, with z `[B, q]` between."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class LatentAutoencoder(Autoencoder):
    """Two strided convolutions and a linear layer to `latent_dim` numbers, mirrored; images in [0, 1] come out (sigmoid)."""

    def __init__(self, image_shape: Sequence[int], latent_dim: int, *, width: int = 16) -> None:
        check(len(image_shape) == 3, f"image_shape must be (C, H, W), got {tuple(image_shape)}.")
        check_at_least("latent_dim", latent_dim, 1)
        check(latent_dim <= math.prod(image_shape), f"latent_dim {latent_dim} is larger than the input of {math.prod(image_shape)} numbers; an autoencoder must make it smaller.")  # fmt: skip
        channels, *size = (int(s) for s in image_shape)
        half = [-(-s // 2) for s in size]
        quarter = [-(-s // 2) for s in half]
        cells = 2 * width * math.prod(quarter)
        encoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(cells, latent_dim),
        )  # fmt: skip
        up = [(b[0] - 2 * s[0] + 1, b[1] - 2 * s[1] + 1) for b, s in ((half, quarter), (size, half))]
        decoder = nn.Sequential(
            nn.Linear(latent_dim, cells), nn.ReLU(), nn.Unflatten(1, (2 * width, *quarter)),
            nn.ConvTranspose2d(2 * width, width, 3, stride=2, padding=1, output_padding=up[0]), nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 3, stride=2, padding=1, output_padding=up[1]), nn.Sigmoid(),
        )  # fmt: skip
        super().__init__(encoder, decoder)
        self.latent_dim = latent_dim


def mnist_autoencoder() -> Autoencoder:
    """The paper's for 1x28x28: 12 x 4 x 4 = 192 latent numbers, not negative (ReLU); the decoder takes negative ones too."""
    encoder = nn.Sequential(
        nn.Conv2d(1, 3, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 12, 5, stride=3), nn.ReLU(), nn.Flatten()
    )
    decoder = nn.Sequential(
        nn.Unflatten(1, (12, 4, 4)), nn.ConvTranspose2d(12, 3, 5, stride=3), nn.ReLU(),
        nn.ConvTranspose2d(3, 1, 4, stride=2, padding=1), nn.Sigmoid(),
    )  # fmt: skip
    return Autoencoder(encoder, decoder)


def pretrain_autoencoder(
    autoencoder: Autoencoder,
    x: Tensor,  # [N, C, H, W] in [0, 1], clean images, no labels
    *,
    epochs: int,
    generator: torch.Generator,
    batch_size: int = 64,
    lr: float = 2e-3,
) -> Autoencoder:
    """A copy trained to reproduce clean images (MSE, Adam, cosine), in evaluation mode. The black box is not asked."""
    check_at_least("epochs", epochs, 1)
    check_positive("lr", lr)
    check(len(x) > 0, "x is empty; give images to train the autoencoder on.")
    check(bool(torch.isfinite(x).all()), "x holds NaN or infinite values; clean the data first.")
    trained = copy.deepcopy(autoencoder).train()
    size = min(batch_size, len(x))
    optimizer = torch.optim.Adam(trained.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(x) // size))
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator, device=generator.device).to(x.device)
        for start in range(0, len(x) - size + 1, size):
            part = x[order[start : start + size]]
            optimizer.zero_grad(set_to_none=True)
            F.mse_loss(trained(part), part).backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad(set_to_none=True)
    return trained.eval()
