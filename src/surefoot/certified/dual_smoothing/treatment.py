"""Dual smoothing in the jobs: pre-train on noisy whole images, fine-tune a copy on each noisy half."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from surefoot.certified.dual_smoothing.classifier import DualSmoothedClassifier
from surefoot.core.task import Task, Training
from surefoot.core.treatment import Batch, Treatment
from surefoot.errors import Refused, check, check_at_least, check_choice, check_non_negative, check_positive
from surefoot.nn.masks import Fill, Partition, checkerboard_split, left_right_split, random_split
from surefoot.nn.smoothing import noisy_loss


@dataclass(frozen=True)
class _Noisy(Treatment):
    """Fine-tuning of one half: the model is a `HalfClassifier`, so noise on dropped pixels never reaches the network."""

    slug: ClassVar[str] = "dual_smoothing_half"
    sigma: float = 0.25
    consistency: float = 0.0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return noisy_loss(model, batch.x, batch.y, sigma=self.sigma, generator=batch.generator, consistency=self.consistency)  # fmt: skip


@dataclass
class DualSmoothing(Treatment):
    """Pre-train on full noisy images (the run itself), then fine-tune two copies on the noisy halves.

    The fine-tuning costs `2 * (epochs + consistency_epochs)` passes over the training data beside the run's own; the
    consistency loss (weight `consistency`, two draws a step) comes only after the cross-entropy epochs, because started
    from the full-image network it collapses.
    """

    slug: ClassVar[str] = "dual_smoothing"
    excludes: ClassVar[Mapping[str, str]] = {
        "random_pruning": "fine-tuning the two halves after training would fill the pruned weights again.",
        "crop_selection": "the halves are cut from whole images, and crop selection hands on crops of another size.",
    }
    finish_order: ClassVar[int] = 5  # after merging, before quantization: the copies still have to be trained

    sigma: float = 0.25
    partition: Partition = "checkerboard"
    fill: Fill = "neighbor"
    epochs: int = 15
    consistency_epochs: int = 0
    consistency: float = 10.0
    lr: float = 2e-3
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_positive("sigma", self.sigma)
        check_choice("partition", self.partition, ("checkerboard", "left_right", "random"))
        check_choice("fill", self.fill, ("neighbor", "max_pool", "zero"))
        check_at_least("epochs", self.epochs, 0)
        check_at_least("consistency_epochs", self.consistency_epochs, 0)
        check_non_negative("consistency", self.consistency)
        check_positive("lr", self.lr)
        check_at_least("batch_size", self.batch_size, 1)
        self.shape_: tuple[int, int] | None = None
        self.num_classes_ = 0

    def check(self, model: nn.Module, task: Task) -> None:
        if task.modality != "image" or task.train.x.dim() != 4:
            raise Refused(
                f"dual_smoothing splits the pixels of images [C, H, W]; this task has {task.modality} inputs of shape "
                f"{list(task.train.x.shape[1:])}. Build a DualSmoothedClassifier with index_split for vectors."
            )
        check(min(task.train.x.shape[-2:]) >= 2, f"Images must be at least 2x2, got {list(task.train.x.shape[-2:])}.")

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        self.shape_ = (int(task.train.x.shape[-2]), int(task.train.x.shape[-1]))
        self.num_classes_ = task.num_classes
        return model, task

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return noisy_loss(model, batch.x, batch.y, sigma=self.sigma, generator=batch.generator)

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        self.check(model, task)
        self.prepare(model, task)
        dual = self.rebuild(model, self.structure())
        for name in ("left", "right"):
            half = getattr(dual, name)
            for stage, (epochs, weight) in enumerate(((self.epochs, 0.0), (self.consistency_epochs, self.consistency))):
                half = self._fine_tune(half, task, f"dual_smoothing/{name}/{stage}", epochs, weight)
            setattr(dual, name, half)
        return dual

    def _fine_tune(self, half: nn.Module, task: Task, purpose: str, epochs: int, weight: float) -> nn.Module:
        from surefoot.training.loop import fit  # the loop knows treatments; importing a method must not need it

        if epochs == 0:
            return half
        own_stream = task.changed(seed=int(torch.randint(2**31, (), generator=task.generator(purpose))))
        training = Training(epochs=epochs, batch_size=self.batch_size, optimizer="adam", lr=self.lr, schedule="cosine")
        return fit(half, own_stream, training, (_Noisy(sigma=self.sigma, consistency=weight),)).model

    def structure(self) -> dict[str, Any]:
        return {"shape": None if self.shape_ is None else list(self.shape_), "num_classes": self.num_classes_}

    def rebuild(self, model: nn.Module, structure: Mapping[str, Any]) -> DualSmoothedClassifier:
        """The two copies and their masks; the random partition is drawn with a fixed seed (and saved with the weights)."""
        shape = structure.get("shape")
        check(shape is not None, "dual_smoothing needs the image shape; it is known after prepare or finish.")
        masks = {
            "checkerboard": checkerboard_split,
            "left_right": left_right_split,
            "random": lambda s: random_split(s, torch.Generator().manual_seed(0)),
        }[self.partition](shape)
        left, right = copy.deepcopy(model), copy.deepcopy(model)
        return DualSmoothedClassifier(
            left, right, sigma=self.sigma, num_classes=structure["num_classes"], masks=masks, fill=self.fill
        )

    def state_dict(self) -> dict[str, Any]:
        return self.structure()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.shape_ = None if state["shape"] is None else (int(state["shape"][0]), int(state["shape"][1]))
        self.num_classes_ = int(state["num_classes"])
