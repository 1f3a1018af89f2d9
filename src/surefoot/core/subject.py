"""The subject: what is measured or changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from surefoot.nn.modes import evaluating

Modality = Literal["image", "vector", "signal"]


@dataclass(frozen=True)
class Subject:
    """A classifier with what is needed to feed it.

    `model` maps *raw* inputs (images in [0, 1], tables as they come) to logits `[B, num_classes]`: normalisation is
    its first layer (`surefoot.models.Normalized`), so radii and budgets are always in the scale of the data.
    `bounds` is the valid range of an input, None where there is none.
    """

    model: nn.Module
    name: str
    modality: Modality
    input_shape: tuple[int, ...]  # without the batch: (C, H, W), (F,) or (C, L)
    num_classes: int
    bounds: tuple[float, float] | None = (0.0, 1.0)
    class_names: tuple[str, ...] = ()

    def with_model(self, model: nn.Module) -> Subject:
        return replace(self, model=model)

    @torch.no_grad()
    def logits(self, x: Tensor, batch_size: int = 512) -> Tensor:
        """Logits in evaluation mode, batch by batch, on the model's device; the training flag is put back."""
        return predict(self.model, x, batch_size)


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, batch_size: int = 512) -> Tensor:
    """Logits of `model` in evaluation mode, on the CPU; every module's training flag is put back afterwards."""
    parameter = next(model.parameters(), None)
    device = x.device if parameter is None else parameter.device
    with evaluating(model):
        return torch.cat([model(chunk.to(device)).detach().cpu() for chunk in x.split(batch_size)])
