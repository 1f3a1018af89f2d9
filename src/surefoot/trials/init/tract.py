"""TrAct on trial: digits at 16x16 (embedded) and 5,000 MNIST images (standard), each image with a contrast and an offset of its own.

TrAct undoes the dependence of a first layer's step on the contrast of its inputs, so the data must have contrasts: log-uniform from 0.1
to 1.5, offset within 0.5, pixel noise 0.02, then one mean and deviation for the whole set (normalising each image would remove
the effect). Every arm tunes its learning rate on the same grid, by the accuracy averaged over the epochs, because the claim is about
the early part of the curve; `e01`, `e02`, ... are the accuracies after each epoch.

`whitened` multiplies the first layer's gradient by the ridge inverse of the second moment taken once from the training set: on data
that stay as they are it *is* TrAct up to batch noise, and the trial expects that tie. The `drift` arms tell them apart: contrast falls a
hundredfold and the offset grows along training, and the test data with them. `vit` arms train a tiny vision transformer with Adam.

Left out: the same data without contrasts (saturated at half the run), normalising each patch (removes what is studied), ResNets on CIFAR-10
(GPU days).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from surefoot.core.subject import predict
from surefoot.core.task import Split, Task, Training
from surefoot.core.treatment import Batch, Treatment
from surefoot.core.trial import Arm, Claim, Metrics, Run, Setup, Stack, Trial
from surefoot.datasets.embedded import digits
from surefoot.datasets.standard import mnist
from surefoot.init.tract import TrAct, apply_tract_, first_layer, tract, unapply_tract
from surefoot.models import seeded_build
from surefoot.nn.patches import patch_moment

TRAINING = Training(epochs=16, batch_size=64, optimizer="sgd", momentum=0.9, schedule="cosine")
STANDARD_TRAINING = TRAINING.changed(epochs=8)
GRID: Mapping[str, tuple[float, ...]] = {"lr": (0.01, 0.03, 0.1, 0.3)}
ADAM = TRAINING.changed(optimizer="adam")
ADAM_GRID: Mapping[str, tuple[float, ...]] = {"lr": (1e-3, 3e-3, 1e-2, 3e-2)}


# --- data and networks ------------------------------------------------------------------------------------------------


def with_contrasts(task: Task) -> Task:
    """Each image its own contrast and offset, then one mean and deviation, those of the training images."""

    def jitter(split: Split, name: str) -> Tensor:
        generator, shape = task.generator(f"contrast/{name}"), (len(split), 1, 1, 1)
        contrast = 0.1 * 15.0 ** torch.rand(shape, generator=generator)
        offset = torch.rand(shape, generator=generator) - 0.5
        return contrast * split.x + offset + 0.02 * torch.randn(split.x.shape, generator=generator)

    parts = {"train": task.train, "valid": task.valid, "test": task.test}
    images = {name: jitter(split, name) for name, split in parts.items()}
    mean, std = images["train"].mean(), images["train"].std()
    changed = {name: Split((images[name] - mean) / std, split.y) for name, split in parts.items()}
    return task.changed(**changed, bounds=None)


def contrast_digits(seed: int, data_dir: Path | None) -> Task:
    return with_contrasts(digits(seed, sizes=(1200, 197, 400), image_size=16))


def contrast_mnist(seed: int, data_dir: Path | None) -> Task:
    return with_contrasts(mnist(seed, data_dir, sizes=(5000, 1000, 2000)))


def network(task: Task, generator: torch.Generator) -> nn.Module:
    size = (((task.input_shape[-1] - 5) // 2 + 1) - 3) // 2 + 1
    return seeded_build(
        lambda: nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(32 * size * size, 64), nn.ReLU(), nn.Linear(64, task.num_classes),
        ),
        generator,
    )  # fmt: skip


class TinyViT(nn.Module):
    """Patches of 4x4, two transformer blocks of width 32, mean pooling."""

    def __init__(self, image_size: int, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 32, 4, stride=4)
        self.position = nn.Parameter(0.02 * torch.randn(1, (image_size // 4) ** 2, 32))
        block = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x).flatten(2).mT + self.position).mean(1))


@dataclass
class AsViT(Treatment):
    """Not a method: trains a tiny ViT in the place of the setup's network."""

    slug: ClassVar[str] = "as_vit"

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        return seeded_build(lambda: TinyViT(task.input_shape[-1], task.num_classes), task.generator("vit")), task


# --- baselines and ablations ------------------------------------------------------------------------------------------


@dataclass
class FirstLayerRate(Treatment):
    """The strong cheap baseline: the first layer learns `times` as fast (for SGD a factor on its gradients)."""

    slug: ClassVar[str] = "first_layer_rate"
    times: float = 10.0
    layer_: str = field(default="", init=False)

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        self.layer_ = first_layer(model, task.train.x[:2])
        return model, task

    def before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        for parameter in model.get_submodule(self.layer_).parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self.times)


@dataclass
class FixedWhitening(Treatment):
    """TrAct's formula with the second moment of the training set, taken once before training."""

    slug: ClassVar[str] = "fixed_whitening"
    lam: float = 0.1
    layer_: str = field(default="", init=False)
    inverse_: Tensor | None = field(default=None, init=False)

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        self.layer_ = first_layer(model, task.train.x[:2])
        layer: Any = tract(model.get_submodule(self.layer_), self.lam)
        x = task.train.x
        for augment in task.augment:
            x = augment(x, task.generator("whitening"))
        total, count = patch_moment(x, layer.patches())
        self.inverse_ = torch.linalg.inv(total[0] / count + self.lam * torch.eye(total.shape[-1]))
        return model, task

    def before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        grad = model.get_submodule(self.layer_).get_parameter("weight").grad
        assert grad is not None and self.inverse_ is not None
        grad.copy_((grad.flatten(1) @ self.inverse_).reshape(grad.shape))


@dataclass
class TrActEverywhere(Treatment):
    """The ablation: every layer gets the TrAct gradient."""

    slug: ClassVar[str] = "tract_everywhere"
    lam: float = 0.1

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear | nn.Conv2d):
                apply_tract_(model, layer=name, lam=self.lam)
        return model, task

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        return unapply_tract(model)


def drifted(x: Tensor, done: float) -> Tensor:
    """The stream after a share `done` of the training: contrast falls a hundredfold, the offset rises to one deviation."""
    return 100.0**-done * x + done


@dataclass
class Drift(Treatment):
    """Not a method: training batches drift along the run."""

    slug: ClassVar[str] = "drift"
    done_: float = field(default=0.0, init=False)

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        def along(x: Tensor, generator: torch.Generator) -> Tensor:
            return drifted(x, self.done_)

        return model, task.changed(augment=(*task.augment, along), facts={**task.facts, "drift": True})

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        self.done_ = (batch.step + 1) / batch.steps


# --- measuring --------------------------------------------------------------------------------------------------------


def _after_epoch(epochs: int):
    def along_training(model: nn.Module, task: Task, epoch: int) -> Metrics:
        x = drifted(task.test.x, (epoch + 1) / epochs) if task.facts.get("drift") else task.test.x
        return {"accuracy": (predict(model, x).argmax(1) == task.test.labels).double().mean().item()}

    return along_training


def measure(run: Run) -> Metrics:
    curve = [metrics["accuracy"] for metrics in run.history]
    shares = {f"accuracy_{percent}": curve[len(curve) * percent // 100 - 1] for percent in (25, 50)}
    epochs = {f"e{epoch:02d}": value for epoch, value in enumerate(curve, 1)}
    return {"accuracy": curve[-1], "accuracy_mean": sum(curve) / len(curve), **shares, **epochs}


def _fewer_epochs(arms: Mapping[str, Metrics]) -> float:
    """How many times fewer epochs TrAct needs to get to where plain SGD ends."""
    goal = arms["sgd"]["accuracy"]
    curve = [value for name, value in sorted(arms["tract"].items()) if name.startswith("e") and name[1:].isdigit()]
    needed = next((epoch for epoch, value in enumerate(curve, 1) if value >= goal), 2 * len(curve))
    return len(curve) / needed


def _time_ratio(arms: Mapping[str, Metrics]) -> float:
    return arms["tract"]["seconds"] / arms["sgd"]["seconds"]


def _arm(*treatments: Treatment, training: Training = TRAINING) -> Arm:
    grid = GRID if training.optimizer == "sgd" else ADAM_GRID
    return Arm(lambda lr: Stack(treatments, training.changed(lr=lr)), grid)


CLAIMS = (
    Claim("TrAct is ahead of plain SGD after a quarter of the epochs.", "accuracy_25", "tract", "sgd"),
    Claim("TrAct is ahead of plain SGD after half of the epochs.", "accuracy_50", "tract", "sgd"),
    Claim("TrAct is ahead of plain SGD on average over the epochs.", "accuracy_mean", "tract", "sgd"),
    Claim("TrAct gets to plain SGD's final accuracy in at least 1.25 times fewer epochs.", effect=_fewer_epochs, at_least=1.25),
    Claim("TrAct ends no worse than plain SGD by more than a point.", "accuracy", "tract", "sgd", at_least=-0.01),
    Claim("TrAct is ahead of a tenfold first-layer rate after a quarter of the epochs.", "accuracy_25", "tract", "first_x10"),
)  # fmt: skip

TRIAL = Trial(
    "init/tract",
    {
        "embedded": Setup(
            contrast_digits,
            {
                "sgd": _arm(),
                "first_x3": _arm(FirstLayerRate(3.0)),
                "first_x10": _arm(FirstLayerRate(10.0)),
                "whitened": _arm(FixedWhitening()),
                "tract": _arm(TrAct()),
                "tract_lam_0.05": _arm(TrAct(0.05)),
                "tract_lam_0.2": _arm(TrAct(0.2)),
                "tract_everywhere": _arm(TrActEverywhere()),
                "drift_sgd": _arm(Drift()),
                "drift_whitened": _arm(Drift(), FixedWhitening()),
                "drift_tract": _arm(Drift(), TrAct()),
                "vit_adam": _arm(AsViT(), training=ADAM),
                "vit_tract": _arm(AsViT(), TrAct(), training=ADAM),
            },
            (
                *CLAIMS,
                Claim("lambda 0.05 and 0.2 are alike along the run.", "accuracy_mean", "tract_lam_0.05", "tract_lam_0.2", within=0.02),
                Claim("On stationary data fixed whitening ties with TrAct.", "accuracy_mean", "tract", "whitened", within=0.02),
                Claim("On a drifting stream TrAct ends ahead of fixed whitening.", "accuracy", "drift_tract", "drift_whitened"),
                Claim("On a drifting stream TrAct ends ahead of plain SGD.", "accuracy", "drift_tract", "drift_sgd"),
                Claim("A tiny ViT with TrAct and Adam is ahead of plain Adam after half of the epochs.", "accuracy_50", "vit_tract", "vit_adam"),
                Claim("A run with TrAct takes at most twice the time on this very small net.", effect=_time_ratio, better="lower", at_least=-2.0),
            ),
            model=network,
            measure=measure,
            on_epoch=_after_epoch(TRAINING.epochs),
            tune_on="accuracy_mean",
            tuning_seeds=(1000, 1001),
        ),
        "standard": Setup(
            contrast_mnist,
            {
                "sgd": _arm(training=STANDARD_TRAINING),
                "first_x10": _arm(FirstLayerRate(10.0), training=STANDARD_TRAINING),
                "tract": _arm(TrAct(), training=STANDARD_TRAINING),
            },
            CLAIMS,
            model=network,
            measure=measure,
            on_epoch=_after_epoch(STANDARD_TRAINING.epochs),
            tune_on="accuracy_mean",
            tuning_seeds=(1000, 1001),
        ),
    },
    notes="Accuracies are of single runs at equal learning-rate grids; `drift` arms are scored on the data as they are at that moment. The "
    "strength of the drift and the optimizer of the ViT were chosen on seeds 0 to 4; the evidence is therefore from seeds 5 to 9.",
)  # fmt: skip
