"""Training under Gaussian noise: the losses of base classifiers that are to be smoothed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import check


def consistency_loss(
    logits: Tensor,  # float [M, B, K], M noisy copies of each input
    y: Tensor,  # int64 [B]
    weight: float,
    entropy_weight: float = 0.05,
) -> Tensor:  # scalar
    """CE averaged over the copies + weight (mean_m KL(p_mean || p_m) + entropy_weight H(p_mean)), p = softmax.

    Source: Jeong, Shin 2020, arXiv 2006.04062. weight 0 is Gaussian training with M draws.
    """
    check(logits.dim() == 3, f"logits must be [M, B, K], got shape {tuple(logits.shape)}.")
    log_p = logits.log_softmax(-1)
    loss = F.nll_loss(log_p.flatten(0, 1), y.repeat(len(logits)))
    if weight == 0:
        return loss
    log_mean = log_p.logsumexp(0) - math.log(len(logits))
    mean = log_mean.exp()
    divergence = (mean * (log_mean - log_p)).sum(-1).mean()
    entropy = -(mean * log_mean).sum(-1).mean()
    return loss + weight * (divergence + entropy_weight * entropy)


def noisy_loss(
    model: nn.Module,
    x: Tensor,  # float [B, ...]
    y: Tensor,  # int64 [B]
    *,
    sigma: float,
    generator: torch.Generator,
    consistency: float = 0.0,
) -> Tensor:  # scalar
    """Training under Gaussian noise: one draw and cross-entropy, or two draws and `consistency_loss`."""
    copies = 2 if consistency else 1
    noise = torch.randn((copies, *x.shape), dtype=x.dtype, device=generator.device, generator=generator)
    noisy = (x + sigma * noise.to(x.device)).flatten(0, 1)
    return consistency_loss(model(noisy).unflatten(0, (copies, len(x))), y, consistency)
