"""Freed memory that the C library should keep: fresh pages can cost as much as the arithmetic done on them."""

from __future__ import annotations

import torch

LARGE = 31 << 20  # bytes; just below 32 MB, where glibc stops learning


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step or batch. What frees some ten mid-sized tensors at its end otherwise hands them back
    to the system at once and takes them page by page again: a fifth of a training step on bounds, up to half of a batch under noise.

    The library sets its limits by the largest block it has seen freed, so one untouched block is enough (microseconds; no memory
    is used). It then holds for the whole process, as it would after any tensor of that size: up to 64 MB stay with the process.
    Elsewhere than on glibc nothing happens.
    """
    torch.empty(LARGE, dtype=torch.uint8, device="cpu")
