"""A treatment: a published method with its settings, acting on a model before, during and after training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from surefoot.core.task import Task
from surefoot.errors import Refused


@dataclass(frozen=True)
class Batch:
    """One training batch. `index` are positions in `task.train`, whatever the shuffling; `step` counts from 0 to `steps`."""

    x: Tensor  # [B, ...]
    y: Tensor  # int64 [B]
    index: Tensor  # int64 [B]
    epoch: int
    step: int
    steps_per_epoch: int
    steps: int
    generator: torch.Generator


class Treatment:
    """Base of every treatment; subclasses are dataclasses whose fields are the method's settings.

    A subclass overrides only the moments it acts at. State learned in a run (targets, masks, temperatures) lives on the
    instance in attributes ending in `_`; runs work on copies, so one instance may serve many runs.

    - `prepare(model, task) -> model, task`: surgery, initialisation, data selection. May change the model given (a copy).
      Lower `prepare_order` goes first.
    - `loss(model, batch) -> scalar`: replaces cross-entropy. At most one treatment of a stack brings a loss.
    - `before_step` / `after_step`: around the optimizer step (masks, gradient surgery, schedules, moving averages).
    - `finish(model, task) -> model`: wrappers, calibration, quantization, merging. Lower `finish_order` goes first.
    - `rebuild(model, structure) -> model`: the same architecture as `finish` returned, on a fresh model and without data,
      so that saved weights fit; `structure()` gives the JSON facts it needs beside the settings.
    """

    slug: ClassVar[str]
    excludes: ClassVar[Mapping[str, str]] = {}  # slug -> why the two cannot be combined
    prepare_order: ClassVar[int] = 0  # -10: choose the data, before others keep something per example
    finish_order: ClassVar[int] = 0  # 0: unwrap and merge, 10: quantize and calibrate, 20: inference-time wrappers

    def check(self, model: nn.Module, task: Task) -> None:
        """Raise `Refused` or `InvalidInput` if this treatment cannot act on that model and task."""

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        return model, task

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch.x), batch.y)

    def before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        """After the backward pass, before the optimizer step."""

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        """After the optimizer step."""

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        return model

    def structure(self) -> dict[str, Any]:
        return {}

    def rebuild(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        return model

    def state_dict(self) -> dict[str, Any]:
        """What a killed run needs to go on: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `state_dict`, called after `prepare`."""

    @property
    def brings_loss(self) -> bool:
        return type(self).loss is not Treatment.loss

    def settings(self) -> dict[str, Any]:
        """The constructor arguments, as plain values."""
        if not dataclasses.is_dataclass(self):
            return {}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}


def check_stack(treatments: Sequence[Treatment], model: nn.Module, task: Task) -> None:
    """Refuse, with the reason, a stack that cannot be trained in one run."""
    losses = [t.slug for t in treatments if t.brings_loss]
    if len(losses) > 1:
        raise Refused(f"{' and '.join(losses)} each bring a training loss, and a run has one; keep one of them.")
    slugs = [t.slug for t in treatments]
    for slug in slugs:
        if slugs.count(slug) > 1:
            raise Refused(f"{slug} is named twice in the stack; name it once.")
    for treatment in treatments:
        for other in slugs:
            if other in treatment.excludes:
                raise Refused(f"{treatment.slug} and {other} cannot be combined: {treatment.excludes[other]}")
        treatment.check(model, task)
