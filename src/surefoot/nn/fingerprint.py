"""Telling one base layer from another: a short hash of a weight."""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fingerprint(layer: nn.Module) -> str:
    """A hash of a layer's weight: dtype, shape and every byte.

    SHA-256 of the words sum_j c_j w_ij mod 2^64 over rows of 1024 words, c_j odd and fixed: a row with one word changed never keeps
    its sum, another row does with probability 2^-64 or so. It tells bases apart; it is no proof against a forger. The sums are
    taken where the weight is; only they come to the CPU.
    """
    weight: Tensor = layer.weight.detach().contiguous()  # type: ignore[operator,assignment]
    octets = weight.reshape(-1).view(torch.uint8)
    words = F.pad(octets, (0, -octets.numel() % 8192)) if octets.numel() % 8192 else octets
    digest = hashlib.sha256(f"{weight.dtype}{tuple(weight.shape)}".encode())
    odd = _odd_words().to(weight.device)
    table = words.view(torch.int64).view(-1, 1024)
    if table.device.type == "cpu":  # NumPy sums the products without writing them down: a third of the time
        digest.update(np.einsum("ij,j->i", table.numpy(), odd.numpy()).data)
    else:
        for rows in table.split(8192):
            digest.update((rows * odd).sum(1).cpu().numpy().data)
    return digest.hexdigest()[:32]


@cache
def _odd_words() -> Tensor:  # [1024] int64
    """The multipliers of `fingerprint`: the same on every machine, so made without a random generator."""
    words = hashlib.shake_256(b"surefoot fingerprint").digest(8192)
    return torch.from_numpy(np.frombuffer(words, "<i8").astype(np.int64)) | 1
