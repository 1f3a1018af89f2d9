"""Data diet on trial: which part of the training set can go, and what the score at initialisation really measures.

Embedded: scikit-learn's digits (1,200 for training) and, where its package is there, MNIST-1D; small CNNs, the same number of
optimizer steps for every arm (40 epochs of the full set), cosine schedule. Scores: five runs of ten epochs, none augmented.
No arm is tuned: subsets are all that differs. The learning rate on digits is the best of 1e-3, 2e-3 and 5e-3 for the full set
*and* for random subsets (five other runs: .963, .977, .979 and .952, .961, .967). Left out for the budget: fractions other than 40 and 80 % pruned (60 % on MNIST-1D), linear mode
connectivity, and transfer of scores to other networks.

Standard: Fashion-MNIST (4,000 for training, as many as a processor trains in the time), 30 and 50 % pruned, two scoring runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from surefoot.core.task import Split, Task, Training
from surefoot.core.treatment import Treatment
from surefoot.core.trial import Arm, Claim, Metrics, Run, Setup, Stack, Trial
from surefoot.curation.data_diet import DataDiet, rank_correlation
from surefoot.datasets.embedded import digits, mnist1d
from surefoot.datasets.noise import with_label_noise
from surefoot.datasets.standard import fashion_mnist
from surefoot.models import seeded_build, small_cnn, small_cnn1d
from surefoot.training.loop import accuracy, fit

TRAINING = Training(steps=760, batch_size=64, lr=5e-3)  # 40 epochs of 1,200 digits
SIGNALS = Training(steps=2520, batch_size=64, lr=2e-3)  # 40 epochs of 4,000 signals
FASHION = Training(steps=756, batch_size=64, lr=2e-3)  # 12 epochs of 4,000 images


@dataclass
class Keep(Treatment):
    """Keep a random part, or the inputs of largest norm: what a score has to beat."""

    fraction: float
    rule: Literal["random", "norm"] = "random"
    slug = "keep"

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        n = len(task.train)
        key = torch.rand(n, generator=task.generator("keep"))
        key = norms(task.train.x) if self.rule == "norm" else key
        index = key.argsort(descending=True, stable=True)[: round(self.fraction * n)].sort().values
        return model, task.changed(train=task.train.take(index))


@dataclass
class KeepLowest(DataDiet):
    """The same scores, read from the wrong end."""

    slug = "keep_lowest"

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        super().prepare(model, task)
        assert self.scores_ is not None
        index = self.scores_.argsort(stable=True)[: round(self.fraction * len(task.train))].sort().values
        return model, task.changed(train=task.train.take(index))


def norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1).double(), dim=1)


def digit_task(seed: int, data_dir: Path | None) -> Task:
    return digits(seed, sizes=(1200, 97, 500))


def signal_task(seed: int) -> Task:
    return mnist1d(seed, sizes=(4000, 100, 900))


def fashion_task(seed: int, data_dir: Path | None) -> Task:
    return fashion_mnist(seed, data_dir, sizes=(4000, 500, 4000))


def digit_net(task: Task, generator: torch.Generator) -> nn.Module:
    return seeded_build(lambda: small_cnn(task.input_shape, task.num_classes, widths=(8, 16, 16), linear=0), generator)


def signal_net(task: Task, generator: torch.Generator) -> nn.Module:
    return seeded_build(lambda: small_cnn1d(task.input_shape, task.num_classes), generator)


def fashion_net(task: Task, generator: torch.Generator) -> nn.Module:
    def build() -> nn.Module:
        return nn.Sequential(nn.AvgPool2d(2), small_cnn(task.input_shape, task.num_classes, widths=(16, 32, 32)))

    return seeded_build(build, generator)


def measure(run: Run) -> Metrics:
    counts = torch.bincount(run.task.train.labels, minlength=run.task.num_classes).double()
    test = run.task.test
    return {
        "accuracy": accuracy(run.model, test.x, test.labels),
        "kept": float(len(run.task.train)),
        "smallest_class_share": float(counts.min() / counts.sum()),
    }


# Whole systems: other data, or scores alone -------------------------------------------------------------------------------


def signals(treatments: tuple[Treatment, ...]) -> Arm:
    """An arm on MNIST-1D in place of the digits."""

    def arm(task: Task, generator: torch.Generator) -> Metrics:
        other = signal_task(task.seed)
        return measure(fit(signal_net(other, generator), other, SIGNALS, treatments))

    return Arm(arm, system=True)


def noisy(treatments: tuple[Treatment, ...]) -> Arm:
    """An arm on digits of which 10 % have permuted labels (about one in ten of those stays right); the test set is clean."""

    def arm(task: Task, generator: torch.Generator) -> Metrics:
        train = with_label_noise(task.train, 0.1, 10, kind="permute", generator=task.generator("noise"))
        run = fit(digit_net(task, generator), task.changed(train=train), TRAINING, treatments)
        wrong = train.labels != train.true_y
        found = {}
        for diet in run.treatments:
            if isinstance(diet, DataDiet) and diet.scores_ is not None:
                found = {"auroc": float(roc_auc_score(wrong.numpy(), diet.scores_.numpy()))}
        kept = run.task.train
        return {**measure(run), **found, "wrong_labels_kept": float((kept.labels != kept.true_y).double().mean())}

    return Arm(arm, system=True)


def early_detection(task: Task, generator: torch.Generator) -> Metrics:
    """AUROC for labels that really changed, by epoch and score. l1 is twice cleanlab's (one minus) self-confidence."""
    train = with_label_noise(task.train, 0.1, 10, kind="permute", generator=task.generator("noise"))
    wrong = (train.labels != train.true_y).numpy()
    model, found = digit_net(task, generator), {}
    for kind, epochs in (("el2n", 1), ("el2n", 5), ("l1", 5)):
        diet = DataDiet(score=kind, epochs=epochs)  # type: ignore[arg-type]
        diet.prepare(model, task.changed(train=train))
        assert diet.scores_ is not None
        found[f"{kind}_{epochs}"] = float(roc_auc_score(wrong, diet.scores_.numpy()))
    return found


def at_initialisation(task: Task, generator: torch.Generator) -> Metrics:
    """What GraNd at epoch 0 ranks by: rank correlations with the input's norm and with EL2N after ten epochs.

    Raw digits have nearly equal norms, so each image is also multiplied by a factor U(.5, 2).
    """
    factor = 0.5 + 1.5 * torch.rand(len(task.train), 1, 1, 1, generator=generator)
    sets = {"raw": (task, digit_net(task, generator)), "scaled": (brighter(task, factor), digit_net(task, generator))}
    if HAVE_SIGNALS:
        other = signal_task(task.seed)
        sets["mnist1d"] = (other, signal_net(other, generator))
    found = {}
    for name, (data, model) in sets.items():
        initial, later = DataDiet(score="grand", epochs=0), DataDiet(runs=2)
        for diet in (initial, later):
            diet.prepare(model, data)
        assert initial.scores_ is not None
        assert later.scores_ is not None
        found[f"norm_{name}"] = rank_correlation(initial.scores_, norms(data.train.x)) or 0.0
        found[f"el2n_{name}"] = rank_correlation(initial.scores_, later.scores_) or 0.0
    return found


def brighter(task: Task, factor: Tensor) -> Task:
    return task.changed(train=Split(task.train.x * factor, task.train.y), bounds=None)


# The protocol -------------------------------------------------------------------------------------------------------------

HAVE_SIGNALS = importlib.util.find_spec("mnist1d") is not None


def stack(*treatments: Treatment, training: Training = TRAINING) -> Arm:
    return Arm(lambda: Stack(treatments, training))


ARMS = {
    "full": stack(),
    "random_40": stack(Keep(0.6)),
    "random_80": stack(Keep(0.2)),
    "el2n_40": stack(DataDiet(0.6)),
    "el2n_80": stack(DataDiet(0.2)),
    "el2n_80_balanced": stack(DataDiet(0.2, class_balanced=True)),
    "lowest_40": stack(KeepLowest(0.6)),
    "grand_40": stack(DataDiet(0.6, score="grand")),
    "forgetting_40": stack(DataDiet(0.6, score="forgetting")),
    "grand_at_0_40": stack(DataDiet(0.6, score="grand", epochs=0)),
    "grand_at_0_40_balanced": stack(DataDiet(0.6, score="grand", epochs=0, class_balanced=True)),
    "norm_40": stack(Keep(0.6, "norm")),
    "noisy_full": noisy(()),
    "noisy_random_40": noisy((Keep(0.6),)),
    "noisy_el2n_40": noisy((DataDiet(0.6),)),
    "noisy_offset_40": noisy((DataDiet(0.6, offset=0.1),)),
    "early_detection": Arm(early_detection, system=True),
    "at_initialisation": Arm(at_initialisation, system=True),
}
CLAIMS = [
    Claim("EL2N at epoch 10 lets 40 % of the digits go for at most half a point.", "accuracy", "el2n_40", "full", at_least=-0.005),
    Claim("At 40 % pruned, EL2N is at least level with random (half a point).", "accuracy", "el2n_40", "random_40", at_least=-0.005),
    Claim("The hard part teaches more than the easy part.", "accuracy", "el2n_40", "lowest_40"),
    Claim("GraNd at epoch 10 also lets 40 % go for at most half a point.", "accuracy", "grand_40", "full", at_least=-0.005),
    Claim("At 80 % pruned the order turns: random beats EL2N.", "accuracy", "random_80", "el2n_80"),
    Claim("GraNd at initialisation prunes worse than random (Kirsch 2023).", "accuracy", "random_40", "grand_at_0_40"),
    Claim("Nor does it gain over random (half a point) when each class keeps its share.", "accuracy", "random_40", "grand_at_0_40_balanced", at_least=-0.005),
    Claim("Much of the loss at 80 % is lost classes: keeping each class's share helps EL2N there.", "accuracy", "el2n_80_balanced", "el2n_80"),
    Claim("GraNd at initialisation follows the input's norm where norms vary: rank correlation of at least .6 on rescaled digits.", "norm_scaled", "at_initialisation", at_least=0.6),
    Claim("EL2N finds changed labels from epoch 5 on: AUROC of at least .9.", "el2n_5", "early_detection", at_least=0.9),
    Claim("With wrong labels about, skipping the hardest tenth beats keeping it.", "accuracy", "noisy_offset_40", "noisy_el2n_40"),
]  # fmt: skip
if HAVE_SIGNALS:
    ARMS |= {
        "mnist1d_full": signals(()),
        "mnist1d_random_60": signals((Keep(0.4),)),
        "mnist1d_el2n_60": signals((DataDiet(0.4),)),
    }
    CLAIMS += [
        Claim("On MNIST-1D too, EL2N beats random, at 60 % pruned.", "accuracy", "mnist1d_el2n_60", "mnist1d_random_60"),
        Claim("On MNIST-1D, GraNd at initialisation follows the input's norm: rank correlation of at least .6.", "norm_mnist1d", "at_initialisation", at_least=0.6),
    ]  # fmt: skip


def fashion(*treatments: Treatment) -> Arm:
    return stack(*treatments, training=FASHION)


FASHION_ARMS: Mapping[str, Arm] = {
    "full": fashion(),
    "random_30": fashion(Keep(0.7)),
    "random_50": fashion(Keep(0.5)),
    "el2n_30": fashion(DataDiet(0.7, runs=2)),
    "el2n_50": fashion(DataDiet(0.5, runs=2)),
    "el2n_50_window": fashion(DataDiet(0.5, runs=2, offset=0.1, class_balanced=True)),
    "grand_at_0_30": fashion(DataDiet(0.7, score="grand", epochs=0, runs=2)),
}
FASHION_CLAIMS = [
    Claim("EL2N at epoch 10 lets half of the data go for at most one point.", "accuracy", "el2n_50", "full", at_least=-0.01),
    Claim("At 50 % pruned, EL2N beats random.", "accuracy", "el2n_50", "random_50"),
    Claim("At 30 % pruned, EL2N beats random.", "accuracy", "el2n_30", "random_30"),
    Claim("Skipping the hardest tenth and keeping the classes' shares helps EL2N at 50 %.", "accuracy", "el2n_50_window", "el2n_50"),
    Claim("GraNd at initialisation prunes no better than random: it gains less than half a point.", "accuracy", "random_30", "grand_at_0_30", at_least=-0.005),
]  # fmt: skip

TRIAL = Trial(
    method="curation/data_diet",
    tiers={
        "embedded": Setup(digit_task, ARMS, CLAIMS, digit_net, measure),
        "standard": Setup(fashion_task, FASHION_ARMS, FASHION_CLAIMS, fashion_net, measure),
    },
    notes=(
        "All arms take the same number of optimizer steps, so fewer examples mean more visits to each, as in the paper's scripts. "
        "MNIST-1D is the counter-example: 4,000 examples of a task the network has not mastered hold no redundancy. "
        "Top scores empty some classes (smallest_class_share): GraNd at initialisation loses by that above all, and keeping each class's "
        "share brings it back to random's level. "
        "Time for scoring counts in the arm's seconds; with five runs of ten epochs it exceeds the training it saves."
    ),
)
