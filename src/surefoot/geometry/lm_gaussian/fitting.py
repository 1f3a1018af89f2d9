"""Fitting a model to one scene, step by step: stopped or killed, the next process goes on from the last checkpoint and ends at the same bits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from surefoot.errors import check
from surefoot.geometry.lm_gaussian.stages import Checkpoint

OnFit = Callable[[int, int, float], None]  # step, steps, loss


def check_repair_pairs(degraded: Tensor, clean: Tensor) -> None:
    """Renderings and their photos, [P, H, W, 3] both."""
    fits = degraded.shape == clean.shape and degraded.dim() == 4 and degraded.shape[-1] == 3 and len(clean) > 0
    check(fits, f"degraded and clean must both be [P, H, W, 3], got {tuple(degraded.shape)} and {tuple(clean.shape)}.")


def fit_steps(
    loss_at: Callable[[int], Tensor],  # step -> loss []; draws from the generator
    parameters: Mapping[str, Tensor],  # all that the fit changes, by name
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    lr_at: Callable[[int], float],
    asked: str,  # the settings in words: what another fit left is not taken up
    generator: torch.Generator,
    checkpoint: Checkpoint | None = None,
    on_step: OnFit | None = None,
) -> list[float]:
    """Take `steps` steps of the optimiser on `loss_at`, in place; the loss of each.

    A checkpoint keeps parameters, the optimiser's state, losses and where the generator stands. `on_step(step, steps, loss)` may raise to interrupt.
    Raises `InvalidInput` where the loss is no longer finite.
    """
    fingerprint = hashlib.sha256(repr((asked, steps, [(n, tuple(p.shape)) for n, p in parameters.items()])).encode()).hexdigest()  # fmt: skip
    saved = None if checkpoint is None else _fitting_state(checkpoint, fingerprint, generator)
    losses = [] if saved is None else _take_up(saved, parameters, optimizer)
    for step in range(len(losses), steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        loss = loss_at(step)
        losses.append(float(loss.detach()))
        check(math.isfinite(losses[-1]), "The repair model's loss became NaN or infinite; lower lr, or use bfloat16 or float32 weights.")  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if checkpoint is not None and step + 1 < steps and checkpoint.due():
            now = {name: p.detach() for name, p in parameters.items()}
            checkpoint.save({"fit": fingerprint, "parameters": now, "optimizer": optimizer.state_dict(), "losses": losses}, generator)  # fmt: skip
        if on_step is not None:
            on_step(step + 1, steps, losses[-1])
    return losses


def _fitting_state(checkpoint: Checkpoint, fingerprint: str, generator: torch.Generator) -> dict[str, Any] | None:
    """What a fit of the same settings left; another's is passed over, and the generator stays where it is."""
    before = generator.get_state()
    saved = checkpoint.load(generator)
    if saved is None or saved.get("fit") != fingerprint:
        generator.set_state(before)
        return None
    return saved


@torch.no_grad()
def _take_up(
    saved: Mapping[str, Any], parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> list[float]:
    for name, p in parameters.items():
        p.copy_(saved["parameters"][name])
    optimizer.load_state_dict(saved["optimizer"])
    return list(saved["losses"])
