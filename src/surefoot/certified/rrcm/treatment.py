"""rRCM in the training loop: pre-training in `prepare`, consistency tuning as the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from surefoot.certified.rrcm.encoders import ClassifierEncoder, last_linear
from surefoot.certified.rrcm.finetuning import (
    SmoothableClassifier,
    check_labels,
    consistency_tuning_loss,
    noisy_logits,
)
from surefoot.certified.rrcm.pretraining import pretrain_rrcm
from surefoot.certified.rrcm.schedule import RRCMSchedule, karras_sigmas, nearest_time
from surefoot.core.task import Task
from surefoot.core.treatment import Batch, Treatment
from surefoot.errors import Refused, check, check_at_least, check_non_negative, check_positive
from surefoot.models.networks import seeded_build


@dataclass
class RRCM(Treatment):
    """Pre-train the classifier's body along the noise trajectory, then let the run tune it under noise `sigma`.

    Defaults are for small images and minutes, not the paper's 300,000 steps: grid up to tmax 5 with 10 to 40 scales, target
    rates .9 to .99. The pre-training takes `pretrain_epochs` passes over the training images, six network passes each. In the run the
    body learns at `backbone_rate` times the run's rate, because at the full rate the tuning overwrites what it learnt.
    """

    slug: ClassVar[str] = "rrcm"
    excludes: ClassVar[Mapping[str, str]] = {
        "crop_selection": "pre-training sees whole images, and crop selection hands on crops of another size.",
        "pissa": "the adapters would be laid out before the model is rebuilt as an encoder.",
        "layerwise_calibration": "it traces the finished model, and the noise-conditioned encoder cannot be traced.",
    }
    finish_order: ClassVar[int] = -5  # rebuilt first: later treatments act on the encoder

    sigma: float = 0.25
    pretrain_epochs: int = 60
    batch_size: int = 128
    lr: float = 1e-3
    tau: float = 0.2
    tmax: float = 5.0
    start_scales: int = 10
    end_scales: int = 40
    lbd: float = 5.0
    eta: float = 0.5
    backbone_rate: float = 0.3
    num_classes_: int = field(default=0, init=False, repr=False, compare=False)
    shape_: tuple[int, ...] = field(default=(), init=False, repr=False, compare=False)
    before_: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_at_least("pretrain_epochs", self.pretrain_epochs, 0)
        check_at_least("batch_size", self.batch_size, 2)
        for name in ("lr", "tau", "sigma"):
            check_positive(name, getattr(self, name))
        for name in ("lbd", "eta", "backbone_rate"):
            check_non_negative(name, getattr(self, name))
        nearest_time(self._grid(), self.sigma)

    def _grid(self) -> Tensor:
        return karras_sigmas(self.end_scales + 1, tmax=self.tmax)

    def check(self, model: nn.Module, task: Task) -> None:
        if task.modality != "image" or task.train.x.dim() != 4:
            raise Refused(f"rrcm contrasts views of images [C, H, W]; this task has {task.modality} inputs of shape {list(task.train.x.shape[1:])}.")  # fmt: skip
        check(len(task.train) >= 2, "rrcm needs at least two training images: the others are its negatives.")
        x = task.train.x
        check(bool(((x >= 0) & (x <= 1)).all()), "rrcm needs images in [0, 1] without NaN; scale them first.")
        last_linear(model, task.num_classes)
        check_labels(task.train.labels, task.num_classes)

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        self.num_classes_, self.shape_ = task.num_classes, tuple(task.train.x.shape[1:])
        generator = task.generator("rrcm/pretrain", task.device)
        tuned = seeded_build(lambda: self.rebuild(model, self.structure()), task.generator("rrcm/model"))
        assert isinstance(tuned, SmoothableClassifier)
        steps = self.pretrain_epochs * max(len(task.train) // self.batch_size, 1)
        if steps > 0:
            state = pretrain_rrcm(
                tuned.encoder, task.train.x.to(task.device), steps=steps, generator=generator,
                batch_size=self.batch_size, lr=self.lr, tau=self.tau, tmax=self.tmax, augment=task.augment or None,
                schedule=RRCMSchedule(steps, self.start_scales, self.end_scales, ema_start=0.9, ema_end=0.99),
                hidden_dim=2 * tuned.encoder.embed_dim, output_dim=tuned.encoder.embed_dim,
            )  # fmt: skip
            tuned.encoder.load_state_dict(state.encoder.state_dict())
        return tuned, task

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = noisy_logits(model, batch.x, sigma=self.sigma, generator=batch.generator)
        return consistency_tuning_loss(logits, batch.y, lbd=self.lbd, eta=self.eta)

    def before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        if self.backbone_rate != 1.0:
            self.before_ = [p.detach().clone() for p in _body(model)]

    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        """A smaller step of the body equals a smaller learning rate: the run has one rate for all parameters."""
        if self.backbone_rate != 1.0:
            for p, old in zip(_body(model), self.before_, strict=True):
                p.copy_(torch.lerp(old, p, self.backbone_rate))

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        self.before_ = []
        return model

    def structure(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes_, "shape": list(self.shape_)}

    def rebuild(self, model: nn.Module, structure: Mapping[str, Any]) -> SmoothableClassifier:
        """The encoder and head that `prepare` makes, on a fresh copy of the classifier."""
        check(bool(structure.get("shape")), "rrcm needs the image shape; it is known after prepare.")
        encoder = ClassifierEncoder(model, structure["num_classes"], structure["shape"])
        time = nearest_time(self._grid(), self.sigma)
        return SmoothableClassifier(encoder, structure["num_classes"], sigma=self.sigma, time=time)

    def state_dict(self) -> dict[str, Any]:
        return self.structure()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_classes_, self.shape_ = int(state["num_classes"]), tuple(state["shape"])


def _body(model: nn.Module) -> list[nn.Parameter]:
    assert isinstance(model, SmoothableClassifier)
    return list(model.encoder.parameters())
