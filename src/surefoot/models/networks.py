"""Small reference networks. Each maps raw inputs to logits; normalisation, where wanted, is the first layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from surefoot.errors import check, check_at_least


class Normalized(nn.Module):
    """`model((x - mean) / std)`, so that everything outside works in the raw scale of the data."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, *, dims: int = 2
    ) -> None:
        """`mean`, `std`: one value a channel; `dims` is how many dimensions follow the channel (2 for images)."""
        super().__init__()
        self.model = model
        shape = (1, -1) + (1,) * dims
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.get_default_dtype()).reshape(shape))
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.get_default_dtype()).reshape(shape))
        check(bool((self.std > 0).all()), f"std must be positive in every channel, got {self.std.flatten().tolist()}.")

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - self.mean) / self.std)


def mlp(input_shape: Sequence[int], num_classes: int, *, hidden: Sequence[int] = (256, 256)) -> nn.Sequential:
    """Flatten, then linear layers with ReLU between."""
    sizes = (math.prod(input_shape), *hidden)
    layers: list[nn.Module] = [nn.Flatten()]
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))


def small_cnn(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    widths: Sequence[int] = (16, 32, 32),
    linear: int = 64,
    batch_norm: bool = True,
) -> nn.Sequential:
    """3x3 convolutions (every second one with stride 2), batch-norm, ReLU, then global average pooling and a small head.

    Takes any image size from 4x4 up, because the pooling is global.
    """
    check(len(input_shape) == 3, f"input_shape must be (channels, height, width), got {tuple(input_shape)}.")
    check_at_least("num_classes", num_classes, 2)
    layers: list[nn.Module] = []
    channels = int(input_shape[0])
    for position, width in enumerate(widths):
        layers.append(nn.Conv2d(channels, width, 3, stride=1 + position % 2, padding=1, bias=not batch_norm))
        layers += [nn.BatchNorm2d(width), nn.ReLU()] if batch_norm else [nn.ReLU()]
        channels = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if linear:
        layers += [nn.Linear(channels, linear), nn.ReLU()]
        channels = linear
    return nn.Sequential(*layers, nn.Linear(channels, num_classes))


class Residual(nn.Module):
    """`relu(x + f(x))` with a 1x1 projection where the shapes differ."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        same = stride == 1 and channels == width
        self.skip = nn.Identity() if same else nn.Conv2d(channels, width, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.skip(x) + self.branch(x))


def small_resnet(
    input_shape: Sequence[int], num_classes: int, *, widths: Sequence[int] = (16, 32, 64)
) -> nn.Sequential:
    """A stem and one residual block a width, stride 2 from the second on, global average pooling, linear head."""
    check(len(input_shape) == 3, f"input_shape must be (channels, height, width), got {tuple(input_shape)}.")
    layers: list[nn.Module] = [
        nn.Conv2d(int(input_shape[0]), widths[0], 3, padding=1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(),
    ]
    channels = widths[0]
    for position, width in enumerate(widths):
        layers.append(Residual(channels, width, stride=2 if position else 1))
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def small_cnn1d(input_shape: Sequence[int], num_classes: int, *, widths: Sequence[int] = (16, 32, 32)) -> nn.Sequential:
    """Strided 1-D convolutions for signals `[C, L]`, batch-norm, ReLU, global average pooling, linear head."""
    check(len(input_shape) == 2, f"input_shape must be (channels, length), got {tuple(input_shape)}.")
    layers: list[nn.Module] = []
    channels = int(input_shape[0])
    for width in widths:
        layers += [nn.Conv1d(channels, width, 5, stride=2, padding=2, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels, num_classes))


Net = TypeVar("Net", bound=nn.Module)


def seeded_build(factory: Callable[[], Net], generator: torch.Generator) -> Net:
    """Call `factory` with its random initialisation drawn from `generator`; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return factory()
