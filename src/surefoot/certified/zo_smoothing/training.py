"""Training the denoiser (and encoder) against a black box by queries, and its first-order twin."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.certified.zo_smoothing.blackbox import BlackBox, BlackBoxMap
from surefoot.certified.zo_smoothing.gradients import Method, surrogate, zo_gradient, zo_queries
from surefoot.errors import (
    InvalidInput,
    check,
    check_at_least,
    check_choice,
    check_non_negative,
    check_positive,
)
from surefoot.nn.modes import evaluating

Trains = Literal["part", "whole"]
Step = Callable[
    [Tensor, Tensor], tuple[Tensor, Tensor]
]  # (noisy, index) -> scalar to differentiate, float64 [B] losses


@dataclass(frozen=True)
class FrontReport:
    """The trained front of the pipeline, and what it cost. `encoder` and `decoder` are None without an autoencoder."""

    denoiser: nn.Module
    encoder: nn.Module | None
    decoder: nn.Module | None
    queries: int  # asked of the black box, those for the targets included; 0 for first-order training
    loss_curve: tuple[float, ...]  # mean loss of each epoch, from the training's own queries
    steps: int
    stopped: bool  # by the query budget


def train_zo_denoiser(
    black_box: BlackBox | BlackBoxMap,
    denoiser: nn.Module,
    x: Tensor,  # [N, C, H, W]
    *,
    sigma: float,
    generator: torch.Generator,
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
    y: Tensor | None = None,
    method: Method = "cge",
    mu: float = 0.005,
    num_queries: int | None = None,
    trains: Trains = "whole",
    epochs: int = 200,
    batch_size: int = 256,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    chunk: int = 4096,
) -> FrontReport:
    """Train copies of denoiser and encoder with zeroth-order gradients; black box and decoder stay as they are.

    Targets are the black box's own answers to the clean images (one query each, once), or the labels `y`. Each step asks
    2 q B (CGE) or (num_queries + 1) B (RGE) times, nothing else. Training stops before the step that the black box's budget
    does not cover; if not even the targets and one step fit, nothing is spent and it is refused. `trains="part"` keeps the
    encoder. Adam with L2 `weight_decay`, cosine over the steps that fit.
    """
    check_choice("trains", trains, ("part", "whole"))
    check((encoder is None) == (decoder is None), "Give encoder and decoder together, or neither (estimation at the pixels).")  # fmt: skip
    _check_images(x, sigma)
    size, per_epoch = _batching(len(x), batch_size, epochs)
    for name, value in (("mu", mu), ("lr", lr)):  # all that can be wrong is found before a query is spent
        check_positive(name, value)
    check_non_negative("weight_decay", weight_decay)
    check(num_queries is None or method == "rge", "cge asks along every coordinate; num_queries is for rge.")
    if num_queries is not None:
        check_at_least("num_queries", num_queries, 1)
    _check_targets(y, x, black_box.num_classes if isinstance(black_box, BlackBox) else None)
    latent = _latent_shape(denoiser, encoder, x)
    cost = zo_queries(size, latent.numel(), method, num_queries)
    first = 0 if y is not None else len(x)
    black_box.require(first + cost, f"Training with {method} ({'the targets and ' if first else ''}one step)")
    spent = black_box.queries
    targets = (black_box.targets(x) if y is None else y).to(x.device)
    planned = epochs * per_epoch
    affordable = planned if black_box.budget is None else min(planned, int(black_box.remaining) // cost)
    front = nn.ModuleDict({"denoiser": copy.deepcopy(denoiser)})
    if encoder is not None and decoder is not None:
        front["encoder"] = copy.deepcopy(encoder)
        decoder = copy.deepcopy(decoder).eval().requires_grad_(False)
    fixed = decoder

    def step(noisy: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        z, wanted = _represent(front, noisy), targets[index]

        def losses(points: Tensor, rows: Tensor) -> Tensor:
            return black_box.losses(points if fixed is None else fixed(points), wanted[rows])

        found = zo_gradient(losses, z, method=method, mu=mu, num_queries=num_queries, chunk=chunk, generator=generator)
        return surrogate(z, found.gradient), found.loss

    curve = _train(front, x, step, affordable, per_epoch, size, sigma, lr, weight_decay, trains, generator)
    asked = black_box.queries - spent
    return FrontReport(
        front["denoiser"], _part(front, "encoder"), decoder, asked, curve, affordable, affordable < planned
    )


def train_fo_denoiser(
    model: nn.Module,
    denoiser: nn.Module,
    x: Tensor,  # [N, C, H, W]
    *,
    sigma: float,
    generator: torch.Generator,
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
    y: Tensor | None = None,
    trains: Literal["part", "whole", "whole_plus"] = "whole",
    epochs: int = 200,
    batch_size: int = 256,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
) -> FrontReport:
    """The same objective with true gradients through a model that gives them (FO-DS, FO-AE-DS); the model stays as it is.

    "whole_plus" trains the decoder too, which zeroth-order training cannot: there it counts as part of the black box.
    """
    check_choice("trains", trains, ("part", "whole", "whole_plus"))
    check(isinstance(model, nn.Module), f"First-order training needs an nn.Module that gives gradients, got {type(model).__name__}; use train_zo_denoiser.")  # fmt: skip
    check((encoder is None) == (decoder is None), "Give encoder and decoder together, or neither.")
    _check_images(x, sigma)
    size, per_epoch = _batching(len(x), batch_size, epochs)
    _check_targets(y, x, None)
    with evaluating(model), torch.no_grad():
        targets = y.to(x.device) if y is not None else torch.cat([model(part).argmax(1) for part in x.split(1024)])
    front = nn.ModuleDict({"denoiser": copy.deepcopy(denoiser)})
    if encoder is not None and decoder is not None:
        front["encoder"] = copy.deepcopy(encoder)
        decoder = copy.deepcopy(decoder).eval().requires_grad_(trains == "whole_plus")
        if trains == "whole_plus":
            front["decoder"] = decoder

    def step(noisy: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        z = _represent(front, noisy)
        losses = F.cross_entropy(model(z if decoder is None else decoder(z)), targets[index], reduction="none")
        return losses.mean(), losses.detach().double()

    steps = epochs * per_epoch
    with evaluating(model):
        curve = _train(front, x, step, steps, per_epoch, size, sigma, lr, weight_decay, trains, generator)
    return FrontReport(front["denoiser"], _part(front, "encoder"), decoder, 0, curve, steps, False)


def _train(
    front: nn.ModuleDict,
    x: Tensor,
    step: Step,
    steps: int,
    per_epoch: int,
    size: int,
    sigma: float,
    lr: float,
    weight_decay: float,
    trains: str,
    generator: torch.Generator,
) -> tuple[float, ...]:
    """The loop both share: noise, step, Adam. Gradients are taken in the front's parameters alone."""
    front.train()
    if trains == "part" and "encoder" in front:
        front["encoder"].eval().requires_grad_(False)
    if "decoder" in front:
        front["decoder"].eval()  # its statistics stay those of the pre-training
    trained = [p for p in front.parameters() if p.requires_grad]
    check(len(trained) > 0, "Neither the denoiser nor the encoder has a parameter to train.")
    check_positive("lr", lr)
    optimizer = torch.optim.Adam(trained, lr, weight_decay=weight_decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    sums, order = torch.zeros(-(-steps // per_epoch), 2, dtype=torch.float64), torch.empty(0)
    for k in range(steps):
        if k % per_epoch == 0:
            order = torch.randperm(len(x), generator=generator, device=generator.device).to(x.device)
        index = order[k % per_epoch * size :][:size]
        clean = x[index]
        noise = torch.randn(clean.shape, dtype=x.dtype, device=generator.device, generator=generator).to(x.device)
        value, losses = step(clean + sigma * noise, index)
        for p, grad in zip(trained, torch.autograd.grad(value, trained), strict=True):
            p.grad = grad
        optimizer.step()
        cosine.step()
        sums[k // per_epoch] += torch.stack([losses.sum(), losses.new_tensor(len(index))]).cpu()
    optimizer.zero_grad(set_to_none=True)
    front.eval().requires_grad_(True)
    curve = (sums[:, 0] / sums[:, 1]).tolist()
    if not all(value == value and abs(value) != float("inf") for value in curve):
        raise InvalidInput(f"The training loss became NaN or infinite; lower the learning rate {lr}.")
    return tuple(curve)


def _part(front: nn.ModuleDict, name: str) -> nn.Module | None:
    return front[name] if name in front else None  # noqa: SIM401  a ModuleDict has no get


def _represent(front: nn.ModuleDict, noisy: Tensor) -> Tensor:
    """enc(D(x)), or D(x) without an encoder."""
    denoised = front["denoiser"](noisy)
    return front["encoder"](denoised) if "encoder" in front else denoised


@torch.no_grad()
def _latent_shape(denoiser: nn.Module, encoder: nn.Module | None, x: Tensor) -> torch.Size:
    with evaluating(*(m for m in (denoiser, encoder) if m is not None)):
        z = denoiser(x[:2])
        return (z if encoder is None else encoder(z)).shape[1:]


def _batching(n: int, batch_size: int, epochs: int) -> tuple[int, int]:
    check_at_least("batch_size", batch_size, 1)
    check_at_least("epochs", epochs, 1)
    size = min(batch_size, n)
    return size, n // size


def _check_targets(y: Tensor | None, x: Tensor, num_classes: int | None) -> None:
    check(y is None or len(y) == len(x), f"y has {0 if y is None else len(y)} labels for {len(x)} images.")
    if y is not None and num_classes is not None:
        good = y.dtype == torch.int64 and y.dim() == 1 and bool(((y >= 0) & (y < num_classes)).all())
        check(good, f"y must hold int64 labels in [0, {num_classes}).")


def _check_images(x: Tensor, sigma: float) -> None:
    check_non_negative("sigma", sigma)
    check(x.dim() == 4 and x.is_floating_point() and len(x) > 0, f"x must be floating-point images [N, C, H, W], got {x.dtype} {list(x.shape)}.")  # fmt: skip
    check(bool(torch.isfinite(x).all()), "x holds NaN or infinite values; clean the data first.")
