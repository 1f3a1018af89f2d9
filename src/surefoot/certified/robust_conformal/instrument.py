"""Robust prediction sets as a measurement: how many labels a set needs so that an L2 attack cannot push the true one out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from surefoot.certified.robust_conformal.attack import smooth_pgd
from surefoot.certified.robust_conformal.classifier import ConformalReport, RobustConformalClassifier
from surefoot.certified.robust_conformal.scores import level_of_two_betas
from surefoot.certified.robust_conformal.sets import hoeffding_slack, noise_ratio
from surefoot.core.finding import Chart, Cost, Finding
from surefoot.core.instrument import Instrument
from surefoot.core.statistics import mean_interval, wilson_interval
from surefoot.core.subject import Subject
from surefoot.core.task import Split, Task
from surefoot.core.work import affordable, cut_note, forward_flops
from surefoot.errors import check, check_at_least, check_positive

HOLDOUT = 0.36  # share of the validation split that fits PTT, as 200 of 550
DRAWS = 256  # with many fewer, sampling error alone fills the sets
STEPS, EOT = 20, 8  # of the attack
LEAST = 25  # test examples however large the model
SAMPLING = 0.3  # of the score's range: with more lost to sampling error, full sets do not speak of the model


@dataclass
class RobustSets(Instrument):
    """Average size of RSCP+ sets with PTT (HPS score, Hoeffding's bound) at L2 attack size `eps`; calibrated on the validation split.

    The parts are the coverage of the sets, clean and under an attack that sees through the noise, and what plain conformal sets of
    the same model do under an attack of that size. `num_samples` None: 256.
    """

    slug: ClassVar[str] = "robust_sets"
    title: ClassVar[str] = "Robust prediction sets"
    fix: ClassVar[tuple[str, ...]] = ("robust_conformal",)

    eps: float = 0.125
    sigma: float = 0.25
    alpha: float = 0.1
    beta: float = 0.001
    num_samples: int | None = None

    def __post_init__(self) -> None:
        check_positive("eps", self.eps)
        check_positive("sigma", self.sigma)
        noise_ratio(self.eps, self.sigma)
        level_of_two_betas(self.alpha, self.beta)
        if self.num_samples is not None:
            check_at_least("num_samples", self.num_samples, 2)

    def unfit(self, subject: Subject, task: Task) -> str | None:
        reason = super().unfit(subject, task)
        if reason is None and (task.valid.y is None or len(task.valid) < 2):
            return "It calibrates on labelled validation examples, and the data has none."
        return reason

    def measure(self, subject: Subject, task: Task) -> Finding:
        most = task.pick(quick=50, standard=150, thorough=500)
        draws = self.num_samples or DRAWS
        held, calibration = self._calibration(task)
        test = task.sample(self.slug, self._affordable(subject, task, most, draws, len(calibration)))
        for split in (held, calibration, test):
            _check_split(split, subject)
        like = next((p for p in subject.model.parameters() if p.is_floating_point()), test.x)
        held, calibration, test = (Split(s.x.to(like.device, like.dtype), s.labels) for s in (held, calibration, test))
        g = task.generator(self.slug, test.x.device)
        robust = RobustConformalClassifier(
            subject.model, sigma=self.sigma, eps=self.eps, alpha=self.alpha, beta=self.beta, num_samples=draws, bound="hoeffding"
        )  # fmt: skip
        robust.fit_transform(held.x, held.labels, generator=g).calibrate(calibration.x, calibration.labels, generator=g)
        plain = RobustConformalClassifier(subject.model, sigma=0.0, eps=0.0, alpha=self.alpha, bound="none")
        plain.calibrate(torch.cat([held.x, calibration.x]), torch.cat([held.labels, calibration.labels]), generator=g)
        clean = robust.evaluate([(test.x, test.labels)], generator=g)
        attacked = robust.evaluate([(self._attacked(subject, task, test, self.sigma, g), test.labels)], generator=g)
        naive = plain.evaluate([(self._attacked(subject, task, test, 0.0, g), test.labels)], generator=g)
        sizes = np.asarray(clean.sizes.double().numpy())
        low, high = mean_interval(sizes, bounds=(0.0, float(subject.num_classes)))
        passes = len(held) + draws * (len(calibration) + 2 * len(test)) + STEPS * (EOT + 1) * len(test)
        passes += len(held) + len(calibration) + len(test)
        return Finding(
            instrument=self.slug, name="average robust set size", value=float(sizes.mean()), low=low, high=high,
            unit="labels", better="lower", n=len(test),
            sentence=(
                f"Sets that keep the true label with {1 - self.alpha:.0%} under every L2 attack of size {self.eps:g} hold {sizes.mean():.2f} "
                f"of {subject.num_classes} labels on average; under attack {attacked.coverage:.0%} of them did, "
                f"ordinary conformal sets {naive.coverage:.0%}."
            ),
            cost=Cost(passes=passes), samples=sizes, fix=self.fix,
            parts=(
                _coverage("coverage", clean), _coverage("coverage under attack", attacked),
                _coverage("coverage of ordinary conformal sets under attack", naive),
            ),
            pictures=(_histogram(clean.sizes, subject.num_classes),),
            warnings=(*self._warnings(clean, robust, len(calibration), draws), *cut_note(len(test), min(most, len(task.test)))),
            details={
                "eps": self.eps, "sigma": self.sigma, "alpha": self.alpha, "beta": self.beta, "draws": draws,
                "holdout": len(held), "calibration": len(calibration), "threshold": min(robust.threshold_ or 0.0, 1.0), "full": clean.full,
            },
        )  # fmt: skip

    def _affordable(self, subject: Subject, task: Task, most: int, draws: int, calibration: int) -> int:
        """The test examples that the budget's floating-point operations pay for once the calibration, which is never cut, is paid."""
        if not len(task.test):
            return most
        like = next((p for p in subject.model.parameters() if p.is_floating_point()), task.test.x)
        one = forward_flops(subject.model, task.test.x[:1].to(like.device, like.dtype))
        left = task.pick(quick=4e11, standard=3e12, thorough=1e14) - calibration * draws * one
        return affordable(most, LEAST, (2 * draws + 3 * STEPS * (EOT + 1)) * one, left)

    def _calibration(self, task: Task) -> tuple[Split, Split]:
        """PTT's holdout and the calibration set: disjoint random parts of the validation split."""
        at_most = task.pick(quick=150, standard=550, thorough=1500)
        order = torch.randperm(len(task.valid), generator=task.generator(f"{self.slug}/calibration"))[:at_most]
        cut = max(1, int(HOLDOUT * len(order)))
        return task.valid.take(order[:cut]), task.valid.take(order[cut:])

    def _attacked(self, subject: Subject, task: Task, test: Split, sigma: float, generator: torch.Generator) -> Tensor:
        return smooth_pgd(
            subject.model, test.x, test.labels.to(test.x.device), eps=self.eps, sigma=sigma, steps=STEPS, draws=EOT,
            bounds=task.bounds, generator=generator,
        )  # fmt: skip

    def _warnings(
        self, clean: ConformalReport, robust: RobustConformalClassifier, calibration: int, draws: int
    ) -> tuple[str, ...]:
        if calibration < robust.calibration_size:
            return (
                f"{calibration} calibration examples give no finite threshold, so every set is full; "
                f"at least {robust.calibration_size} are needed beside the holdout.",
            )
        lost = 2 * hoeffding_slack(draws, self.beta)
        if clean.full > 0.5 and lost > SAMPLING:
            return (
                f"{clean.full:.0%} of the sets hold every label and say nothing: {draws} draws leave {lost:.2f} of the score's range of 1 to "
                "sampling error. A larger budget draws more; this says nothing against the model.",
            )
        if clean.full > 0.5:
            return (
                f"{clean.full:.0%} of the sets hold every label and say nothing: under noise of {self.sigma:g} the model cannot tell "
                "the classes apart. It was probably not trained with noise.",
            )
        return ()


def _check_split(split: Split, subject: Subject) -> None:
    check(len(split) > 0, "There are no examples to calibrate or to test on; give more data.")
    check(bool(torch.isfinite(split.x).all()), "The examples hold NaN or infinite values; clean the data first.")
    y = split.labels
    check(bool(((y >= 0) & (y < subject.num_classes)).all()), f"Labels must lie in [0, {subject.num_classes}).")


def _coverage(name: str, report: ConformalReport) -> Finding:
    k, n = int(report.covered.sum()), len(report.covered)
    low, high = wilson_interval(k, n)
    return Finding(
        RobustSets.slug, name, k / n, low, high, "share", "higher", n, f"{k} of {n} sets hold the true label.",
        samples=np.asarray(report.covered.double().numpy()),
    )  # fmt: skip


def _histogram(sizes: Tensor, num_classes: int) -> Chart:
    counts = torch.bincount(sizes, minlength=num_classes + 1).tolist()
    layout = {
        "xaxis": {"title": {"text": "labels in the set"}, "dtick": 1 if num_classes <= 20 else None},
        "yaxis": {"title": {"text": "examples"}},
    }
    return Chart(
        {"data": [{"type": "bar", "x": list(range(num_classes + 1)), "y": counts}], "layout": layout},
        "How many labels the robust sets hold: one is an answer, all of them say nothing.",
    )
