"""Fine-tuning at one noise level: the base classifier that randomised smoothing certifies."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.certified.rrcm.encoders import NoiseEncoder
from surefoot.certified.rrcm.pretraining import Augment, augmented, cpu_stream
from surefoot.certified.rrcm.schedule import karras_sigmas, nearest_time
from surefoot.errors import check, check_at_least, check_non_negative, check_positive
from surefoot.models.networks import seeded_build


class SmoothableClassifier(nn.Module):
    """`head(encoder(2 x - 1, t))` with t fixed: raw [0, 1] images (noise already on them) to logits, one pass.

    `sigma` is the smoothing noise on [0, 1] pixels that it was made for; t is the grid point nearest to 2 sigma.
    """

    time: Tensor
    encoder: NoiseEncoder

    def __init__(self, encoder: NoiseEncoder, num_classes: int, *, sigma: float, time: float) -> None:
        super().__init__()
        check(isinstance(encoder, NoiseEncoder), f"The encoder must be a NoiseEncoder that takes (x, t), got {type(encoder).__name__}.")  # fmt: skip
        check_at_least("num_classes", num_classes, 2)
        check_positive("sigma", sigma)
        like = next((p for p in encoder.parameters()), torch.zeros(()))
        self.encoder, self.sigma, self.num_classes = encoder, sigma, num_classes
        self.head = nn.Linear(encoder.embed_dim, num_classes).to(like)
        nn.init.normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("time", torch.tensor(time, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, K]
        return self.head(self.encoder(2.0 * x - 1.0, self.time))


def consistency_tuning_loss(
    logits: Tensor,  # float [M, B, K], M noisy copies of each input
    y: Tensor,  # int64 [B]
    *,
    lbd: float,
    eta: float = 0.5,
) -> Tensor:  # scalar
    """CE over all copies + lbd mean_m KL(p_mean || p_m) + eta H(p_mean); lbd = eta = 0 is Gaussian-augmented training.

    Source: Jeong, Shin 2020, arXiv 2006.04062.
    """
    check(logits.dim() == 3, f"logits must be [M, B, K], got shape {tuple(logits.shape)}.")
    check_non_negative("lbd", lbd)
    check_non_negative("eta", eta)
    log_p = logits.log_softmax(-1)
    loss = F.nll_loss(log_p.flatten(0, 1), y.repeat(len(logits)))
    log_mean = log_p.logsumexp(0) - math.log(len(logits))
    mean = log_mean.exp()
    divergence = (mean * (log_mean - log_p)).sum(-1).mean()
    entropy = -(mean * log_mean).sum(-1).mean()
    return loss + lbd * divergence + eta * entropy


def noisy_logits(model: nn.Module, x: Tensor, *, sigma: float, generator: torch.Generator, copies: int = 2) -> Tensor:
    """Logits `[copies, B, K]` of independent noisy copies x + sigma e (deviation exactly 2 sigma on [-1, 1] pixels)."""
    noise = torch.randn((copies, *x.shape), dtype=x.dtype, device=generator.device, generator=generator).to(x.device)
    return model((x + sigma * noise).flatten(0, 1)).unflatten(0, (copies, len(x)))


def finetune_rrcm(
    encoder: NoiseEncoder,
    x: Tensor,  # [N, C, H, W] in [0, 1]
    y: Tensor,  # int64 [N], every class at least once
    *,
    sigma: float,
    num_classes: int,
    steps: int,
    generator: torch.Generator,
    grid: Tensor | None = None,
    lbd: float = 10.0,
    eta: float = 0.5,
    lr: float = 2e-4,
    backbone_lr: float | None = None,
    layer_decay: float = 0.65,
    batch_size: int = 128,
    augment: Sequence[Augment] = (),
) -> SmoothableClassifier:
    """A linear head on a copy of the encoder, tuned under noise `sigma` (on [0, 1] pixels) with two noisy copies a step.

    AdamW without decay, cosine. `backbone_lr` (default: `lr`) is the rate of the encoder's last stage; each earlier stage gets
    `layer_decay` times the next one's; 0 freezes the encoder. `grid` is the pre-training's final noise grid. The encoder is
    in training mode meanwhile, so that its batch statistics, if any, become those of this noise level.
    """
    check(x.dim() == 4 and len(x) == len(y) > 0, f"x and y must be [N, C, H, W] and [N], got {list(x.shape)} and {list(y.shape)}.")  # fmt: skip
    check(bool(((x >= 0) & (x <= 1)).all()), "Images must lie in [0, 1] without NaN: the noise grid is in that scale.")
    check_labels(y, num_classes)
    check_at_least("steps", steps, 1)
    check_positive("lr", lr)
    check(0 < layer_decay <= 1, f"layer_decay must lie in (0, 1], got {layer_decay!r}.")
    time = nearest_time(karras_sigmas(81) if grid is None else grid, sigma)
    model = seeded_build(
        lambda: SmoothableClassifier(copy.deepcopy(encoder), num_classes, sigma=sigma, time=time), cpu_stream(generator)
    )
    assert isinstance(model, SmoothableClassifier)
    like = model.head.weight
    x, y = x.to(like), y.to(like.device)
    top = lr if backbone_lr is None else backbone_lr
    check_non_negative("backbone_lr", top)
    stages = model.encoder.stages()
    groups: list[dict] = [{"params": list(model.head.parameters()), "lr": lr}]
    model.encoder.requires_grad_(top > 0)
    if top > 0:
        groups += [{"params": p, "lr": top * layer_decay ** (len(stages) - 1 - i)} for i, p in enumerate(stages)]
    optimizer = torch.optim.AdamW(groups, lr, weight_decay=0.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        pick = torch.randperm(len(x), generator=generator, device=generator.device)[:batch_size].to(x.device)
        images = augmented(x[pick], augment, generator)
        logits = noisy_logits(model, images, sigma=sigma, generator=generator)
        optimizer.zero_grad(set_to_none=True)
        consistency_tuning_loss(logits, y[pick], lbd=lbd, eta=eta).backward()
        optimizer.step()
        cosine.step()
    optimizer.zero_grad(set_to_none=True)
    return model.requires_grad_(True).eval()


def check_labels(y: Tensor, num_classes: int) -> None:
    """Every class must have a label: a few-label split that misses one can never predict it."""
    check(y.dtype == torch.int64 and y.dim() == 1, f"Labels must be int64 [N], got {y.dtype} {list(y.shape)}.")
    check(len(y) > 0 and int(y.min()) >= 0 and int(y.max()) < num_classes, f"Labels must lie in [0, {num_classes}).")
    missing = [k for k, count in enumerate(torch.bincount(y, minlength=num_classes).tolist()) if count == 0]
    check(not missing, f"No label of class {', '.join(map(str, missing))} is given; label at least one example of each class.")  # fmt: skip
