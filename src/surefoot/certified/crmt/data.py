"""Two views of the digits, one of them as informative as you like, and a small model of two branches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from surefoot.certified.crmt.model import ConcatFusion, MultiModalClassifier
from surefoot.core.task import Split, Task
from surefoot.datasets.embedded import digits, seeded
from surefoot.errors import check_at_least, check_non_negative


def two_view_digits(
    seed: int = 0, *, code_noise: float = 0.8, sizes: tuple[int, int, int] = (1000, 197, 600), length: int = 40
) -> Task:
    """Digit images `[64]`, and signals of their class `[length]`: tanh(map(code of the class + N(0, code_noise^2))).

    Codes (8 numbers a class) and map are fixed by the seed; signals have deviation 0.3. Packed `[104]`, modality "vector".
    """
    check_non_negative("code_noise", code_noise)
    check_at_least("length", length, 1)
    images, source = digits(seed, sizes=sizes), seeded(seed, "two_view")
    codes, linear = torch.randn(10, 8, generator=source), torch.randn(8, length, generator=source) / math.sqrt(8)

    def packed(split: Split) -> Split:
        noisy = codes[split.labels] + code_noise * torch.randn(len(split), 8, generator=source)
        return Split(torch.cat([split.x.flatten(1), (noisy @ linear).tanh()], 1), split.y)

    train, valid, test = (packed(split) for split in (images.train, images.valid, images.test))
    scale = 0.3 / train.x[:, 64:].std().item()
    for split in (train, valid, test):
        split.x[:, 64:] *= scale
    return Task(
        "two_view_digits", train, valid, test, 10, modality="vector", bounds=None, class_names=images.class_names,
        seed=seed, facts={"shapes": [[64], [length]]},
    )  # fmt: skip


def two_branch(shapes: Sequence[Sequence[int]], num_classes: int, *, width: int = 64) -> MultiModalClassifier:
    """Two hidden layers of ReLU a modality, and the usual linear head on the concatenated features."""

    def encoder(size: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())

    encoders = [encoder(math.prod(shape)) for shape in shapes]
    return MultiModalClassifier(encoders, ConcatFusion([width] * len(shapes), num_classes), shapes)
