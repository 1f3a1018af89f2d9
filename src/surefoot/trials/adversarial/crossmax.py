"""Trial of CrossMax: the published evaluation beside the adaptive one, on the same models and images.

Digits at 16x16, eps 0.1 (L-infinity). Every arm goes through `evaluate_crossmax`: PGD with one draw a gradient (`pgd`), the suite for random models with
averaging over draws (`rand`, the published kind), and adaptive attacks (averaged draws, a smooth surrogate in place of the order statistic, transfer
from the backbone, longer runs, random search); `robust` survives all of them together. The budget is the same for every arm and small: EOT 4 x 15
steps, adaptive 20 and 100 steps, 200 queries, majority of 5 draws, 120 images. A larger budget can only lower the numbers.

Arms: a plain net; the same net adversarially trained after that (PGD, two learning rates to choose from); CrossMax as published (random multi-resolution input, probes on
the layers, median); `layers` (probes and median without the random input); `mean` (as published, averaging log-probabilities in place of the
order statistic). Left out: light adversarial training of CrossMax, ensembles of independent nets, transfer attacks on large models, CIFAR.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from surefoot.adversarial.adaptive_smoothing import AdversarialTraining
from surefoot.adversarial.crossmax import CrossMax, SelfEnsemble, evaluate_crossmax, mean_log_probs
from surefoot.core.task import Task, Training
from surefoot.core.trial import Arm, Claim, Metrics, Setup, Trial
from surefoot.datasets.embedded import digits
from surefoot.models import seeded_build, small_cnn
from surefoot.nn.attacks import pgd
from surefoot.training.loop import fit

EPS = 0.1
ATTACKED = 120
TRAINING = Training(epochs=12, lr=3e-3)


def digits_task(seed: int, data_dir: Path | None) -> Task:
    return digits(seed, sizes=(1000, 197, 600), image_size=16)


def net(task: Task) -> nn.Module:
    build = lambda: small_cnn(task.input_shape, task.num_classes, widths=(16, 16, 16))  # noqa: E731
    return seeded_build(build, task.generator("trial/net"))


def measured(model: nn.Module, task: Task, generator: torch.Generator) -> dict[str, float]:
    x, y = task.test.x[:ATTACKED], task.test.labels[:ATTACKED]
    report = evaluate_crossmax(model, x, y, eps=EPS, steps=15, eot=4, adaptive_steps=20, restarts=1, queries=200, draws=5, masking=0, generator=generator)  # fmt: skip
    found = report.accuracies
    return {
        "clean": found["clean"], "pgd": found["PGD"], "rand": found["rand suite"], "square": found["square"],
        "adaptive": found["adaptive"], "robust": found["all together"], "overstated": report.overstated,
    }  # fmt: skip


def plain_arm(task: Task, generator: torch.Generator) -> Metrics:
    return measured(fit(net(task), task, TRAINING).model.eval(), task, generator)


def trained_arm(task: Task, generator: torch.Generator, lr: float) -> Metrics:
    """From the plain net on: from random weights it stays near chance for long at this size."""
    plain = fit(net(task), task, TRAINING).model
    model = fit(plain, task, TRAINING.changed(epochs=20, lr=lr), (AdversarialTraining(EPS, None, steps=5),)).model
    return measured(model.eval(), task, generator)


def ensemble(task: Task, method: CrossMax) -> SelfEnsemble:
    model = fit(net(task), task, TRAINING.changed(epochs=20), (method,)).model.eval()
    assert isinstance(model, SelfEnsemble)
    return model


def crossmax_arm(task: Task, generator: torch.Generator) -> Metrics:
    return measured(ensemble(task, CrossMax(jitter=1)), task, generator)


def mean_arm(task: Task, generator: torch.Generator) -> Metrics:
    return measured(ensemble(task, CrossMax(jitter=1)).aggregated_by(mean_log_probs), task, generator)


def layers_arm(task: Task, generator: torch.Generator) -> Metrics:
    """Also how the layers stand an attack on the head: the mean accuracy of their probes less the head's."""
    model = ensemble(task, CrossMax(multi_resolution=False))
    x, y = task.test.x[:ATTACKED], task.test.labels[:ATTACKED]
    attacked = pgd(model.backbone, x, y, eps=EPS, steps=15, generator=generator).x
    with torch.no_grad():
        right = (model.predictors(attacked).argmax(2) == y[:, None]).double().mean(0)
    return {**measured(model, task, generator), "layers_less_head": float(right[:-1].mean() - right[-1])}


def promised(arms: Mapping[str, Metrics]) -> float:
    """What the published kind of suite credits CrossMax with, beyond what survives everything."""
    return arms["crossmax"]["rand"] - arms["crossmax"]["robust"]


EMBEDDED = Setup(
    task=digits_task,
    tune_on="robust",
    arms={
        "plain": Arm(plain_arm, system=True),
        "adversarial_training": Arm(trained_arm, grid={"lr": (5e-3, 1e-2)}, system=True),
        "crossmax": Arm(crossmax_arm, system=True),
        "layers": Arm(layers_arm, system=True),
        "mean": Arm(mean_arm, system=True),
    },
    claims=(
        Claim("Under PGD with one draw a gradient CrossMax is more accurate than the plain net.", "pgd", "crossmax", "plain"),
        Claim("The published kind of suite credits CrossMax with more than survives all attacks together.", effect=promised),
        Claim("After adaptive attacks CrossMax still keeps more than the plain net.", "robust", "crossmax", "plain"),
        Claim("After adaptive attacks adversarial training keeps more than CrossMax.", "robust", "adversarial_training", "crossmax"),
        Claim("Attacks on the head fool the layers before it less.", "layers_less_head", "layers"),
        Claim("The order statistic keeps more than averaging log-probabilities does.", "robust", "crossmax", "mean"),
    ),
)  # fmt: skip

TRIAL = Trial("adversarial/crossmax", {"embedded": EMBEDDED}, notes=__doc__ or "")
