"""Trial of propagation tightness: what training, radius and width do to what interval bounds lose.

8x8 digits, ReLU nets of three hidden layers of 64 (256 in `ibp_wide`), default initialisation, no batch-norm; every arm has the same
recipe (Adam, batches of 64, 20 epochs) and the same three learning rates, chosen by the mean of clean and certified accuracy at 0.05.
`standard` trains on clean images, `pgd` on ten-step attacks at 0.1, `ibp_*` on intervals at 0.02, 0.05 and 0.1, after one clean epoch
and a ramp of eight, `sabr` (small boxes: intervals of radius 0.4 eps around an attack of radius 0.6 eps) at 0.1. Tightness is that of
the margins on test images; certified accuracy is by CROWN in float64. `init_slope` (in `standard`) is the slope of log tightness over
log width, 16 to 128, of fresh nets with three hidden layers; random weights give about -1.5.

Left out of the embedded tier: the grid over depths (theory and its tests cover it) and CNNs; the paper's orders of magnitude between
standard and IBP nets need depth and width beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.certified.fast_ibp import FastIBP
from surefoot.certified.ibp_tightness import propagation_tightness
from surefoot.core.subject import predict
from surefoot.core.task import Task, Training
from surefoot.core.treatment import Batch, Treatment
from surefoot.core.trial import Arm, Claim, Metrics, Run, Setup, Stack, Trial
from surefoot.datasets.embedded import digits
from surefoot.models import mlp, seeded_build
from surefoot.nn.attacks import pgd_train
from surefoot.nn.bounds import verified

EPOCHS = 20
RECIPE = Training(epochs=EPOCHS, batch_size=64)
GRID = {"lr": (3e-3, 1e-2, 3e-2)}
RADII = (0.02, 0.05, 0.1)
SMALL = 0.4  # SABR's lambda
WIDTH, WIDE = 64, 256


@dataclass
class PGDTraining(Treatment):
    """Cross-entropy at the end of a ten-step attack."""

    eps: float = 0.1
    slug: ClassVar[str] = "pgd_training"

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        attacked = pgd_train(model, batch.x, batch.y, eps=self.eps, steps=10, generator=batch.generator)
        return F.cross_entropy(model(attacked), batch.y)


@dataclass
class SmallBoxes(FastIBP):
    """SABR: `eps` is the radius of the box, `reach` that of the attack which chooses its centre."""

    reach: float = 0.06

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        share = self.eps_at(batch.step, batch.steps) / self.eps
        if share > 0:
            centre = pgd_train(model, batch.x, batch.y, eps=share * self.reach, steps=8, generator=batch.generator)
            batch = replace(batch, x=centre)
        return super().loss(model, batch)


@dataclass
class Wider(Treatment):
    """A fresh net of another width in the place of the one given."""

    width: int = WIDE
    slug: ClassVar[str] = "wider"
    prepare_order: ClassVar[int] = -10

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        return net(task, task.generator("trial/wider"), self.width), task


def net(task: Task, generator: torch.Generator, width: int = WIDTH) -> nn.Module:
    return seeded_build(lambda: mlp((1, 8, 8), task.num_classes, hidden=(width,) * 3), generator)


def arm(*treatments: Treatment) -> Arm:
    return Arm(lambda lr: Stack(treatments, RECIPE.changed(lr=lr)), GRID)


def plain_ibp(eps: float) -> dict[str, float | bool]:
    return {"eps": eps, "natural": 1 / EPOCHS, "ramp": 8 / EPOCHS, "strength": 0.0, "ibp_init": False, "batch_norm": False}  # fmt: skip


def digits_task(seed: int, data_dir: Path | None) -> Task:
    return digits(seed, sizes=(1000, 197, 600))


def measure(run: Run) -> Metrics:
    x, y = run.task.test.x, run.task.test.labels
    accuracy = (predict(run.model, x).argmax(1) == y).double().mean().item()
    metrics = {"accuracy": accuracy, "tightness": tightness(run.model, run.task)}
    for eps in RADII[1:]:
        proven = verified(run.model, x, y, eps, method="crown", bounds=run.task.bounds, batch_size=64)
        metrics[f"certified_{eps:g}"] = proven.double().mean().item()
    metrics["selection"] = (accuracy + metrics["certified_0.05"]) / 2
    if not run.treatments:
        metrics["init_slope"] = init_slope(run.task)
    return metrics


def tightness(model: nn.Module, task: Task) -> float:
    report = propagation_tightness(model, task.test.x, task.test.labels, eps=0.01, data_range=task.bounds, prefix_rows=0)  # fmt: skip
    return report.mean


def init_slope(task: Task, widths: tuple[int, ...] = (16, 32, 64, 128)) -> float:
    """Least-squares slope of log tightness over log width, fresh nets."""
    generator = task.generator("trial/init")
    logs = torch.tensor([math.log(tightness(net(task, generator, width), task)) for width in widths])
    steps = torch.tensor([math.log(width) for width in widths])
    centred = steps - steps.mean()
    return (centred @ logs / (centred @ centred)).item()


def gain(arms: Mapping[str, Metrics], arm: str, over: str) -> float:
    """Tightness of one arm over another's, in powers of ten."""
    return math.log10(arms[arm]["tightness"] / arms[over]["tightness"])


def ibp_over_standard(arms: Mapping[str, Metrics]) -> float:
    return min(gain(arms, name, "standard") for name in ("ibp_0.02", "ibp_0.05", "ibp_0.1"))


def grows_with_radius(arms: Mapping[str, Metrics]) -> float:
    """The smaller of the two steps, 0.02 to 0.05 to 0.1."""
    return min(gain(arms, "ibp_0.05", "ibp_0.02"), gain(arms, "ibp_0.1", "ibp_0.05"))


def pgd_over_standard(arms: Mapping[str, Metrics]) -> float:
    return gain(arms, "pgd", "standard")


SETUP = Setup(
    task=digits_task,
    model=net,
    measure=measure,
    tune_on="selection",
    arms={
        "standard": arm(),
        "pgd": arm(PGDTraining(0.1)),
        **{f"ibp_{eps:g}": arm(FastIBP(**plain_ibp(eps))) for eps in RADII},  # type: ignore[arg-type]
        "sabr": arm(SmallBoxes(**plain_ibp(SMALL * 0.1), reach=(1 - SMALL) * 0.1)),  # type: ignore[arg-type]
        "ibp_wide": arm(Wider(), FastIBP(**plain_ibp(0.1))),  # type: ignore[arg-type]
    },
    claims=(
        Claim("Training on intervals makes a net at least 3 times as tight as standard training, at each of three radii.", at_least=math.log10(3), effect=ibp_over_standard),
        Claim("Tightness after interval training grows with the radius, at both steps of three radii.", effect=grows_with_radius),
        Claim("Adversarial training leaves tightness within a factor of 2 of standard training's.", within=math.log10(2), effect=pgd_over_standard),
        Claim("Small boxes (SABR) give looser nets than intervals at the same radius 0.1.", "tightness", "sabr", "ibp_0.1", "lower"),
        Claim("Small boxes (SABR), though looser, are more accurate than intervals at the same radius 0.1.", "accuracy", "sabr", "ibp_0.1"),
        Claim("Four times the width raises the certified accuracy of interval training at its radius 0.1.", "certified_0.1", "ibp_wide", "ibp_0.1"),
    ),
)  # fmt: skip

TRIAL = Trial(
    method="certified/ibp_tightness",
    tiers={"embedded": SETUP},
    notes="Tightness is the mean over margins and test images of the exact over the interval radius at the image's own activation "
    "pattern; ratios of it are compared in powers of ten. Certified accuracy is by CROWN, so that loose nets are not judged by the "
    "bounds they are loose for.",
)
