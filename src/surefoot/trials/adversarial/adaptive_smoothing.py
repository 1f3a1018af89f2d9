"""Trial of adaptive smoothing: does mixing an accurate and a robust net keep most of both, attacked as a whole?

MNIST-1D (signals of 40 values, deviation 1) at eps 0.25 (L-infinity). The method's premise is that the plain net is clearly more accurate: at least 5
points, `premise`. On digits it is absent (2 points at eps 0.2: an earlier version of this trial was held there, and could gain nothing); here robust
training costs more. All nets have one architecture; the robust base is trained by TRADES with weight 6. Nets are trained once a seed and shared by
the arms, so the seconds of the first arm that needs one hold its cost. The first 500 test signals are attacked, in every arm by the same suite on
its whole (APGD-CE, APGD-T, Square), mixtures by attacks that start from their components and transfer as well; `robust` counts what survives
everything.

Scales and weights of the mixtures, the weight of the TRADES baseline and the share of eps that the adversarially trained one (`at`) sees are
chosen on validation by the mean of clean and robust accuracy (`balance`). `adaptive` trains its mixing network for four epochs against attacks on
the whole. Mixtures with the same odds of the robust part, a s / (1 - a), are near each other: the grids' best lie within in those odds.
`mixednuts` is the training-free follow-up (Bai et al., 2024). Another way to trade accuracy for robustness is to give TRADES less weight: the
line through the plain net, the TRADES net tuned for the mean and the robust base says how accurate such a net is at the mixture's own robust accuracy.

`certified` is the version with a guarantee: the robust base is a net trained under Gaussian noise (0.5) and answers with its vote shares, the weight is
fixed at 0.8, and the first 200 test signals are certified in L2 with 1,000 draws each. `certified` is the share right and sure at radius 0.25 by the
radius used here, `by_rs` and `by_lipschitz` by the paper's two, `base_certified` that of the smoothed base alone (weight 1); `accuracy` and
`base_accuracy` are without any radius. What the mixture gains there, and what it pays in certificates, are to be read together; no claim rests on it.

Left out: retrained ensembles, IAT, HAT and SCORE, other radii, CIFAR-10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from surefoot.adversarial.adaptive_smoothing import (
    AdaptiveSmoothing,
    AdversarialTraining,
    Amplified,
    MixedClassifier,
    certify_mixed,
    confidence_gap,
    probability_margins,
)
from surefoot.adversarial.adaptive_smoothing.certificate import Method
from surefoot.core.subject import predict
from surefoot.core.task import Task, Training
from surefoot.core.trial import Arm, Claim, Metrics, Setup, Trial
from surefoot.datasets.embedded import mnist1d
from surefoot.models import seeded_build, small_cnn, small_cnn1d
from surefoot.nn.attacks import adaptive_suite, pgd, standard_suite
from surefoot.nn.smoothing import vote_counts
from surefoot.training.loop import fit

EPS = 0.25
ATTACKED = 500
SIGMA, RADIUS, CERTIFIED, VOTES = 0.5, 0.25, 200, 1000
TRAINING = Training(epochs=25, batch_size=100, lr=1e-2)
Net = nn.Module


def signals(seed: int, data_dir: Path | None) -> Task:
    return mnist1d(seed, sizes=(2000, 500, 1000))


_trained: dict[tuple[object, ...], Net] = {}  # nets of this process, by data, seed and recipe


def trained(task: Task, method: AdversarialTraining | None) -> Net:
    key = (task.name, task.seed, float(task.train.x.double().sum()), None if method is None else (method.eps, method.beta))  # fmt: skip
    if key not in _trained:
        build = small_cnn if len(task.input_shape) == 3 else small_cnn1d
        purpose = "accurate" if method is None else "robust"
        net = seeded_build(lambda: build(task.input_shape, task.num_classes), task.generator(purpose))
        _trained[key] = fit(net, task, TRAINING, () if method is None else (method,)).model.eval()
    return _trained[key]


def trades(task: Task, beta: float) -> Net:
    return trained(task, AdversarialTraining(EPS, beta, steps=4))


def bases(task: Task) -> tuple[Net, Net]:
    """The accurate and the robust net."""
    return trained(task, None), trades(task, 6.0)


def accuracy(model: Net, task: Task) -> float:
    return float((predict(model, task.test.x).argmax(1) == task.test.labels).double().mean())


def measured(model: Net, task: Task, generator: torch.Generator, components: Sequence[Net] = ()) -> dict[str, float]:
    """Clean accuracy on all test examples, robust accuracy on the first 500 under everything."""
    x, y = task.test.x[:ATTACKED], task.test.labels[:ATTACKED]
    shared = {"eps": EPS, "bounds": task.bounds, "generator": generator}
    suite = standard_suite(model, x, y, steps=25, targets=3, queries=300, attacks=("apgd-ce", "apgd-t", "square"), **shared)  # fmt: skip
    robust = suite.robust
    if components and bool(robust.any()):
        rest = robust.nonzero().squeeze(1)
        more = adaptive_suite(model, x[rest], y[rest], components=components, steps=20, restarts=1, queries=100, **shared)  # fmt: skip
        robust = robust.clone()
        robust[rest] = more.robust
    clean, found = accuracy(model, task), float(robust.double().mean())
    return {"accuracy": clean, "robust": found, "suite_alone": suite.robust_accuracy, "balance": (clean + found) / 2}


def accurate_arm(task: Task, generator: torch.Generator) -> Metrics:
    return measured(bases(task)[0], task, generator)


def robust_arm(task: Task, generator: torch.Generator) -> Metrics:
    accurate, robust = bases(task)

    def attack(model: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return pgd(model, x, y, eps=EPS, steps=20, bounds=task.bounds, generator=generator).x

    gap = confidence_gap(robust, [(task.test.x[:ATTACKED], task.test.labels[:ATTACKED])], attack)
    margins = probability_margins(predict(robust, task.test.x), task.test.labels)
    premise = accuracy(accurate, task) - accuracy(robust, task)
    return {**measured(robust, task, generator), "premise": premise, "gap": gap.gap, "mean_margin": float(margins.mean())}  # fmt: skip


class LogitMixture(nn.Module):
    """(1 - a) g + a s h on logits: the obvious mixture, whose accurate part can outvote any margin."""

    def __init__(self, accurate: Net, robust: Net, alpha: float, robust_scale: float) -> None:
        super().__init__()
        self.accurate, self.robust, self.alpha, self.robust_scale = accurate, robust, alpha, robust_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.lerp(self.accurate(x), self.robust_scale * self.robust(x), self.alpha)


def logits_arm(task: Task, generator: torch.Generator, alpha: float, robust_scale: float) -> Metrics:
    model = LogitMixture(*bases(task), alpha, robust_scale).eval()
    return measured(model, task, generator, bases(task))


def mixed_arm(task: Task, generator: torch.Generator, alpha: float, robust_scale: float) -> Metrics:
    model = MixedClassifier(*bases(task), alpha=alpha, robust_scale=robust_scale).eval()
    return measured(model, task, generator, bases(task))


def mixednuts_arm(task: Task, generator: torch.Generator, alpha: float, scale: float) -> Metrics:
    accurate, robust = bases(task)
    model = MixedClassifier(accurate, Amplified(robust, scale=scale), alpha=alpha).eval()
    return measured(model, task, generator, bases(task))


def adaptive_arm(task: Task, generator: torch.Generator, low: float, robust_scale: float) -> Metrics:
    """The treatment's own composition and training, on the shared bases."""
    method = AdaptiveSmoothing(
        eps=EPS, robust_scale=robust_scale, alpha_range=(low, 0.99), mixing_epochs=4, attack_steps=5, batch_size=100
    )
    return measured(method.mixture(*bases(task), task), task, generator, bases(task))


def trades_arm(task: Task, generator: torch.Generator, beta: float) -> Metrics:
    return measured(trades(task, beta), task, generator)


def at_arm(task: Task, generator: torch.Generator, share: float) -> Metrics:
    """Adversarial training at a smaller radius than the one it is judged at."""
    return measured(trained(task, AdversarialTraining(share * EPS, None, steps=4)), task, generator)


def noisy(task: Task) -> Net:
    """A net trained under the noise that smooths it."""

    def noise(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return x + SIGMA * torch.randn(x.shape, generator=generator, device=generator.device).to(x)

    net = seeded_build(lambda: small_cnn1d(task.input_shape, task.num_classes), task.generator("smoothed"))
    return fit(net, task.changed(augment=(*task.augment, noise)), TRAINING, ()).model.eval()


def certified_arm(task: Task, generator: torch.Generator) -> Metrics:
    """The certified version in L2: fixed weight, smoothed robust base, every kind of radius on the same kind of draws."""
    accurate, robust, alpha = bases(task)[0], noisy(task), 0.8
    x, y = task.test.x[:CERTIFIED], task.test.labels[:CERTIFIED]
    draws = {"sigma": SIGMA, "num_classes": task.num_classes, "generator": generator}

    def share(weight: float, method: Method) -> float:
        found = certify_mixed(robust, x, alpha=weight, n=VOTES, method=method, **draws)
        return float(((found.prediction == y) & (found.radius >= RADIUS)).double().mean())

    votes = vote_counts(robust, x, VOTES, **draws).double() / VOTES
    mixed = (1 - alpha) * predict(accurate, x).softmax(1).double() + alpha * votes
    return {
        "accuracy": float((mixed.argmax(1) == y).double().mean()),
        "base_accuracy": float((votes.argmax(1) == y).double().mean()),
        "certified": share(alpha, "tight"),
        "by_rs": share(alpha, "rs"),
        "by_lipschitz": share(alpha, "lipschitz"),
        "base_certified": share(1.0, "tight"),
    }


def above_trades(arms: Mapping[str, Metrics]) -> float:
    """Clean accuracy of the adaptive mixture less that at the same robust accuracy on the line through the plain, the tuned and the robust net."""
    nets = sorted((arms[name] for name in ("accurate", "trades", "robust")), key=lambda net: net["robust"])  # fmt: skip
    robust, clean = ([net[metric] for net in nets] for metric in ("robust", "accuracy"))
    return arms["adaptive"]["accuracy"] - float(np.interp(arms["adaptive"]["robust"], robust, clean))


MIXTURES = {"alpha": (0.6, 0.75, 0.9), "robust_scale": (1.0, 3.0, 9.0)}

EMBEDDED = Setup(
    task=signals,
    tune_on="balance",
    arms={
        "accurate": Arm(accurate_arm, system=True),
        "robust": Arm(robust_arm, system=True),
        "trades": Arm(trades_arm, grid={"beta": (0.3, 1.0, 3.0)}, system=True),
        "at": Arm(at_arm, grid={"share": (0.5, 0.75, 1.0)}, system=True),
        "logits": Arm(logits_arm, grid=MIXTURES, system=True),
        "mixed": Arm(mixed_arm, grid=MIXTURES, system=True),
        "mixednuts": Arm(mixednuts_arm, grid={"alpha": (0.75, 0.9, 0.97), "scale": (0.3, 1.0, 3.0)}, system=True),
        "adaptive": Arm(adaptive_arm, grid={"low": (0.8, 0.9, 0.95), "robust_scale": (0.3, 1.0, 3.0)}, system=True),
        "certified": Arm(certified_arm, system=True),
    },
    claims=(
        Claim("The premise: the plain net is at least 5 points more accurate than the robust one.", "premise", "robust", at_least=0.05),
        Claim("The robust net is surer where it is right under attack than where it is wrong on clean inputs, by half.", "gap", "robust", at_least=1.5),
        Claim("Mixing probabilities keeps more robust accuracy than mixing logits.", "robust", "mixed", "logits"),
        Claim("The adaptive mixture gains more clean accuracy over the robust net than it loses robust accuracy.", "balance", "adaptive", "robust"),
        Claim("Its mean of clean and robust accuracy is higher than that of a TRADES net with its weight tuned for it.", "balance", "adaptive", "trades"),
        Claim("It is more accurate than TRADES nets of less weight are at the same robust accuracy.", effect=above_trades),
    ),
)  # fmt: skip

TRIAL = Trial("adversarial/adaptive_smoothing", {"embedded": EMBEDDED}, notes=__doc__ or "")
