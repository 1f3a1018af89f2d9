"""Label noise, put in on purpose."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from surefoot.core.task import Split
from surefoot.errors import check, check_at_least, check_choice

NoiseKind = Literal["symmetric", "next", "permute"]


def corrupt_labels(
    y: Tensor,  # int64 [N]
    rate: float,
    num_classes: int,
    *,
    kind: NoiseKind = "symmetric",
    generator: torch.Generator,
) -> Tensor:  # int64 [N]
    """Replace the labels of exactly `round(rate * N)` examples.

    "symmetric": by one of the *other* classes, uniformly. "next": by class k + 1 (modulo K). "permute": the chosen
    labels are permuted among themselves, so that about 1/K of them stay right.
    """
    check(0.0 <= rate <= 1.0, f"rate must lie in [0, 1], got {rate!r}.")
    check_at_least("num_classes", num_classes, 2)
    check_choice("kind", kind, ("symmetric", "next", "permute"))
    chosen = torch.randperm(len(y), generator=generator)[: round(rate * len(y))].to(y.device)
    noisy = y.clone()
    if kind == "symmetric":
        shift = torch.randint(1, num_classes, (len(chosen),), generator=generator).to(y.device)
        noisy[chosen] = (y[chosen] + shift) % num_classes
    elif kind == "next":
        noisy[chosen] = (y[chosen] + 1) % num_classes
    else:
        noisy[chosen] = y[chosen[torch.randperm(len(chosen), generator=generator).to(y.device)]]
    return noisy


def with_label_noise(
    split: Split, rate: float, num_classes: int, *, kind: NoiseKind = "symmetric", generator: torch.Generator
) -> Split:
    """The split with corrupted `y`; the clean labels are kept in `true_y`."""
    clean = split.labels if split.true_y is None else split.true_y
    return replace(
        split, y=corrupt_labels(split.labels, rate, num_classes, kind=kind, generator=generator), true_y=clean
    )
