"""Random pruning on trial: noisy digits at widths 8, 32 and 64 (embedded), Fashion-MNIST at widths 8 and 32 (standard).

The net is three 3x3 convolutions of w, 2w, 2w channels with batch-norm, a global mean and a linear layer; one recipe (SGD,
momentum 0.9, rate 0.1 cut by 10 at one half and three quarters, weight decay 5e-4) serves every arm, dense or sparse. An arm is
named rule_width_percent. `small` is a dense net of the weight count of the widest at 10 % (20 % in the standard tier), the
baseline that a sparse net must be read against. Outliers are the test images under one fixed permutation of their pixels (embedded)
or MNIST (standard), scored by the largest softmax value; FGSM moves every pixel by 0.3 standard deviations (8/255 in the standard tier).

Left out: width 16, the MNIST-1D net, D = .2 on digits and the GraSP ratio (they fall between what is shown), ResNets on CIFAR-10
for 160 epochs (a GPU day), and a second rate for all arms: the dense and sparse nets agreed on 0.1 in the recipe's source.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.core.subject import predict
from surefoot.core.task import Split, Task, Training
from surefoot.core.treatment import Treatment
from surefoot.core.trial import Arm, Claim, Metrics, Setup, Trial
from surefoot.datasets.embedded import digits
from surefoot.datasets.standard import fashion_mnist, mnist
from surefoot.models import seeded_build
from surefoot.sparsity.random_pruning import RandomPruning, apply_masks_, maskable_weights, score_masks, weight_scores
from surefoot.training.loop import fit

TRAINING = Training(epochs=20, batch_size=64, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4, schedule="step")
STANDARD_TRAINING = TRAINING.changed(epochs=8)


def noisy_digits(seed: int, data_dir: Path | None) -> Task:
    task = digits(seed, sizes=(900, 97, 800))
    mean, std = task.train.x.mean(), task.train.x.std()
    noise = task.generator("noise")

    def transform(split: Split) -> Split:
        x = (split.x - mean) / std
        return Split(x + 0.5 * torch.randn(x.shape, generator=noise), split.y)

    shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    test = transform(task.test)
    outliers = test.x.flatten(1)[:, shuffle].view_as(test.x)
    facts = {"outliers": outliers, "fgsm": 0.3}
    return task.changed(train=transform(task.train), valid=transform(task.valid), test=test, bounds=None, facts=facts)


def fashion(seed: int, data_dir: Path | None) -> Task:
    """Standardised, so that the recipe's rate fits; `fgsm` is 8/255 in that scale."""
    task = fashion_mnist(seed, data_dir, sizes=(4000, 500, 2000))
    mean, std = task.train.x.mean(), task.train.x.std()

    def transform(x: Tensor) -> Tensor:
        return (x - mean) / std

    train, valid, test = (Split(transform(split.x), split.y) for split in (task.train, task.valid, task.test))
    outliers = transform(mnist(seed, data_dir, sizes=(10, 10, 2000)).test.x)
    facts = {"outliers": outliers, "fgsm": 8 / 255 / std.item()}
    return task.changed(train=train, valid=valid, test=test, bounds=None, facts=facts)


def network(task: Task, width: int, generator: torch.Generator) -> nn.Module:
    """Strides 1, 2, 2 on images of 8 pixels, 2, 2, 2 on larger ones."""
    first = 1 if task.input_shape[-1] <= 8 else 2
    layers: list[nn.Module] = []

    def build() -> nn.Module:
        channels = task.input_shape[0]
        for out, stride in ((width, first), (2 * width, 2), (2 * width, 2)):
            layers.extend([nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()])
            channels = out
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, task.num_classes))

    return seeded_build(build, generator)


def suite(model: nn.Module, task: Task) -> Metrics:
    """Accuracy, expected calibration error (15 bins), negative log-likelihood, outlier AUC, accuracy under FGSM."""
    x, y = task.test.x, task.test.labels
    logits = predict(model, x)
    log_prob = logits.double().log_softmax(1)
    confidence, predicted = log_prob.exp().max(1)
    right = (predicted == y).double()
    bins = (confidence * 15).long().clamp(max=14)
    gaps = torch.zeros(15, dtype=torch.float64).index_add_(0, bins, right - confidence)
    found = {
        "accuracy": right.mean().item(),
        "ece": gaps.abs().sum().item() / len(y),
        "nll": F.nll_loss(log_prob, y).item(),
    }
    outliers, eps = task.facts.get("outliers"), task.facts.get("fgsm")
    if isinstance(outliers, Tensor):
        outside = predict(model, outliers).double().softmax(1).amax(1)
        truth = torch.cat([torch.ones(len(x)), torch.zeros(len(outliers))])
        found["ood_auc"] = float(roc_auc_score(truth.numpy(), torch.cat([confidence, outside]).numpy()))
    if isinstance(eps, float):
        moved = x.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(moved), y), moved)
        attacked = predict(model, x + eps * gradient.sign())
        found["fgsm_accuracy"] = (attacked.argmax(1) == y).double().mean().item()
    return found


@dataclass
class Snip(RandomPruning):
    """SNIP itself: the positions of the largest scores, where the `snip` rule keeps only their ratio per layer."""

    slug: ClassVar[str] = "snip"

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        index = torch.randperm(len(task.train), generator=task.generator("random_pruning"))[: self.score_batch]
        scores = weight_scores(model, F.cross_entropy, (task.train.x[index], task.train.labels[index]), "snip")
        self.handle_ = apply_masks_(model, score_masks(scores, self.density))
        return model, task


@dataclass
class Magnitude(RandomPruning):
    """The largest weights of a dense net, trained again by the whole recipe (twice the budget of the other arms)."""

    slug: ClassVar[str] = "magnitude"

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        weights = maskable_weights(model)
        self.handle_ = apply_masks_(model, score_masks({n: w.detach().abs() for n, w in weights.items()}, self.density))
        return model, task


Run = Callable[[Task, torch.Generator], Metrics]


def trained(width: int, *treatments: Treatment, training: Training = TRAINING) -> Run:
    def arm(task: Task, generator: torch.Generator) -> Metrics:
        model = network(task, width, task.generator(f"model/{width}"))
        return suite(fit(model, task, training, [copy.deepcopy(t) for t in treatments]).model, task)

    return arm


def magnitude(width: int, density: float) -> Run:
    def arm(task: Task, generator: torch.Generator) -> Metrics:
        dense = fit(network(task, width, task.generator(f"model/{width}")), task, TRAINING).model
        return suite(fit(dense, task, TRAINING, [Magnitude(density)]).model, task)

    return arm


def arms(runs: Mapping[str, Run]) -> dict[str, Arm]:
    return {name: Arm(run, system=True) for name, run in runs.items()}


ARMS = arms(
    {
        **{f"dense_{w}": trained(w) for w in (8, 32, 64)},
        **{f"erk_{w}_10": trained(w, RandomPruning(0.1)) for w in (8, 64)},
        **{f"{rule}_8_5": trained(8, RandomPruning(0.05, rule)) for rule in ("uniform", "er", "erk", "snip")},
        "uniform_plus_8_5": trained(8, RandomPruning(0.05, "uniform_plus")),
        "own_snip_8_5": trained(8, Snip(0.05)),
        "magnitude_8_5": magnitude(8, 0.05),
        **{f"{rule}_32_5": trained(32, RandomPruning(0.05, rule)) for rule in ("uniform", "erk", "snip")},
        "own_snip_32_5": trained(32, Snip(0.05)),
        **{f"{rule}_64_5": trained(64, RandomPruning(0.05, rule)) for rule in ("uniform", "erk")},
        "small": trained(20),
    }
)

STANDARD_ARMS = arms(
    {
        **{f"dense_{w}": trained(w, training=STANDARD_TRAINING) for w in (8, 32)},
        **{f"erk_{w}_20": trained(w, RandomPruning(0.2), training=STANDARD_TRAINING) for w in (8, 32)},
        **{
            f"{rule}_32_5": trained(32, RandomPruning(0.05, rule), training=STANDARD_TRAINING)
            for rule in ("uniform", "er", "erk")
        },
        "small": trained(14, training=STANDARD_TRAINING),
    }
)


def gap(arms: Mapping[str, Metrics], width: int, percent: int) -> float:
    """How much accuracy ERK loses to the dense net."""
    return arms[f"dense_{width}"]["accuracy"] - arms[f"erk_{width}_{percent}"]["accuracy"]


def better_than_dense(sparse: str, dense: str) -> tuple[Claim, ...]:
    return (
        Claim("The wide sparse net is better calibrated than the dense one.", "ece", sparse, dense, better="lower"),
        Claim("The wide sparse net has a lower negative log-likelihood than the dense one.", "nll", sparse, dense, better="lower"),
        Claim("The wide sparse net tells outliers better than the dense one.", "ood_auc", sparse, dense),
        Claim("The wide sparse net is more accurate under FGSM than the dense one.", "fgsm_accuracy", sparse, dense),
    )  # fmt: skip


CLAIMS = (
    Claim("At 10 % the loss against dense shrinks more than threefold from width 8 to 64.", effect=lambda a: gap(a, 8, 10) - 3 * gap(a, 64, 10)),
    Claim("At width 64 and 10 % random pruning is within two points of dense.", "accuracy", "erk_64_10", "dense_64", within=0.02),
    Claim("The wide net at 10 % is at least as accurate as a dense net of the same weight count.", "accuracy", "erk_64_10", "small"),
    Claim("At width 8 and 5 % ERK beats uniform densities by ten points.", "accuracy", "erk_8_5", "uniform_8_5", at_least=0.1),
    Claim("At width 8 and 5 % ERK beats ER.", "accuracy", "erk_8_5", "er_8_5"),
    Claim("At width 8 and 5 % ERK beats uniform_plus.", "accuracy", "erk_8_5", "uniform_plus_8_5"),
    Claim("At width 32 and 5 % ERK beats uniform densities.", "accuracy", "erk_32_5", "uniform_32_5"),
    Claim("At width 64 and 5 % ERK beats uniform densities.", "accuracy", "erk_64_5", "uniform_64_5"),
    Claim("Positions do not matter: at width 32 and 5 % SNIP's ratio at random positions is not two points below SNIP.", "accuracy", "snip_32_5", "own_snip_32_5", at_least=-0.02),
    Claim("At width 8 and 5 % pruning by magnitude after dense training, at twice the cost, beats random pruning.", "accuracy", "magnitude_8_5", "erk_8_5"),
    *better_than_dense("erk_64_10", "dense_64"),
)  # fmt: skip

STANDARD_CLAIMS = (
    Claim("At 20 % the loss against dense shrinks from width 8 to 32.", effect=lambda a: gap(a, 8, 20) - gap(a, 32, 20)),
    Claim("At width 32 and 20 % random pruning is within two points of dense.", "accuracy", "erk_32_20", "dense_32", within=0.02),
    Claim("The wide net at 20 % is at least as accurate as a dense net of the same weight count.", "accuracy", "erk_32_20", "small"),
    Claim("At width 32 and 5 % ERK beats uniform densities.", "accuracy", "erk_32_5", "uniform_32_5"),
    Claim("At width 32 and 5 % ERK beats ER.", "accuracy", "erk_32_5", "er_32_5"),
    *better_than_dense("erk_32_20", "dense_32"),
)  # fmt: skip

TRIAL = Trial(
    "sparsity/random_pruning",
    {"embedded": Setup(noisy_digits, ARMS, CLAIMS), "standard": Setup(fashion, STANDARD_ARMS, STANDARD_CLAIMS)},
    notes=(
        "The ranking of rules is an effect of small nets: quote the width. Beside every headline stands `small`, the dense net of "
        "equal weight count, which is the stronger baseline."
    ),
)
