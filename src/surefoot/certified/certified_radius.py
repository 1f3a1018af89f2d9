"""Average certified L2 radius of a classifier by randomised smoothing: how far an attacker provably has to go.

Each test example gets the certificate of the smoothed classifier (`surefoot.nn.smoothing`): class and radius
sigma Phi^-1(pA) from n noisy votes, wrong with probability at most alpha. The headline is the mean radius, counting 0 where
the class is wrong or the vote abstains (ACR); the parts are certified accuracies (right class and radius >= r). A model that
brings its own certificate of the dual kind (`DualSmoothedClassifier`) is measured by that, with the same number of draws.

Source: Cohen, Rosenfeld, Kolter 2019, arXiv 1902.02918; the average radius: Zhai et al. 2020, arXiv 2001.02378.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from surefoot.certified.dual_smoothing import DualSmoothedClassifier, as_certificates, dual_radius
from surefoot.core.finding import Chart, Cost, Finding
from surefoot.core.instrument import Instrument
from surefoot.core.statistics import mean_interval, wilson_interval
from surefoot.core.subject import Subject
from surefoot.core.task import Task
from surefoot.core.work import affordable, cut_note, forward_flops
from surefoot.errors import check, check_at_least, check_open_unit, check_positive
from surefoot.nn.smoothing import (
    Certificates,
    Looks,
    certify,
    correct_radii,
    lower_confidence_bound,
    smoothing_radius,
)

LEAST = 25  # examples certified however large the model
NOISE_GAP = 0.15  # accuracy lost under noise beyond which we say that the model was not trained for it


@dataclass
class CertifiedRadius(Instrument):
    """Average certified L2 radius at noise `sigma`, in the units of the data. `n` None: by the budget."""

    slug: ClassVar[str] = "certified_radius"
    title: ClassVar[str] = "Certified radius"
    fix: ClassVar[tuple[str, ...]] = ("dual_smoothing", "rrcm", "zo_smoothing")

    sigma: float = 0.25
    n: int | None = None
    n0: int = 100
    alpha: float = 0.001
    radii: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_positive("sigma", self.sigma)
        check_at_least("n0", self.n0, 1)
        if self.n is not None:
            check_at_least("n", self.n, 2)
        check_open_unit("alpha", self.alpha)
        check(len(self.radii) > 0 and min(self.radii) >= 0, f"radii must be zero or positive, got {self.radii!r}.")

    def measure(self, subject: Subject, task: Task) -> Finding:
        most = task.pick(quick=50, standard=150, thorough=500)
        n = self.n or task.pick(quick=500, standard=2000, thorough=10_000)
        count = self._affordable(subject, task, most, n)
        split = task.sample(self.slug, count)
        y = split.labels
        check(len(split) > 0, "There are no test examples to certify.")
        check(
            bool(torch.isfinite(split.x).all()), "The test examples hold NaN or infinite values; clean the data first."
        )
        check(bool(((y >= 0) & (y < subject.num_classes)).all()), f"Labels must lie in [0, {subject.num_classes}).")
        like = next((p for p in subject.model.parameters() if p.is_floating_point()), split.x)
        x = split.x.to(like.device, like.dtype)
        found, sigma, cap, votes = self._certificates(subject, x, n, task.generator(self.slug, x.device))
        radii = np.asarray(correct_radii(found, y).numpy())
        clean = float((subject.logits(x).argmax(1) == y.cpu()).double().mean())
        low, high = mean_interval(radii, bounds=(0.0, cap))
        parts = tuple(self._part(found, y, r) for r in self.radii)
        return Finding(
            instrument=self.slug,
            name="average certified radius",
            value=float(radii.mean()),
            low=low,
            high=high,
            unit="L2",
            better="higher",
            n=len(y),
            sentence=(
                f"On average an attacker must change an input by {radii.mean():.3f} (L2) before the smoothed classifier's "
                f"right answer can turn; {parts[0].value:.0%} of the examples get a right, certified answer."
            ),
            cost=Cost(passes=int(found.draws.sum()) + len(y)),
            samples=radii,
            parts=parts,
            pictures=(_curve(found, y, sigma),),
            fix=self.fix,
            warnings=(*self._warnings(found, y, clean, sigma, cap, n), *cut_note(len(y), min(most, len(task.test)))),
            details={
                "sigma": sigma, "n": n, "n0": self.n0, "alpha": self.alpha, "votes": votes,
                "abstained": int(found.abstained.sum()), "clean_accuracy": clean,
            },
        )  # fmt: skip

    def _affordable(self, subject: Subject, task: Task, most: int, n: int) -> int:
        """The examples that the budget's floating-point operations pay for, so that a large model is certified on fewer."""
        if not len(task.test):
            return most
        like = next((p for p in subject.model.parameters() if p.is_floating_point()), task.test.x)
        each = (n + self.n0) * forward_flops(subject.model, task.test.x[:1].to(like.device, like.dtype))
        return affordable(most, LEAST, each, task.pick(quick=2e11, standard=2e12, thorough=1e14))

    def _certificates(
        self, subject: Subject, x: Tensor, n: int, generator: torch.Generator
    ) -> tuple[Certificates, float, float, str]:
        """The certificates, the noise they were made with, the largest radius n draws can show, and the kind of vote."""
        model = subject.model
        if isinstance(model, DualSmoothedClassifier):
            half, half0 = max(n // 2, 1), max(self.n0 // 2, 1)  # both halves together draw as often as one whole would
            dual = model.certify(x, generator=generator, n0=half0, n=half, alpha=self.alpha, batch_size=self.batch_size)
            best = lower_confidence_bound(torch.tensor(half), half, self.alpha / 2)
            cap = dual_radius(best, best, model.sigma, model.sigma_right)
            return as_certificates(dual, 2 * (half + half0)), model.sigma, _positive(cap), "dual"
        # the first look spends no alpha; it only stops sampling where the vote is lost
        looks = Looks((max(n // 10, 1), n), (0.0, 1.0)) if n > 1 else None
        found = certify(
            model, x, sigma=self.sigma, num_classes=subject.num_classes, generator=generator,
            n0=self.n0, n=n, alpha=self.alpha, batch_size=self.batch_size, looks=looks,
        )  # fmt: skip
        cap = smoothing_radius(lower_confidence_bound(torch.tensor(n), n, self.alpha), self.sigma)
        return found, self.sigma, _positive(cap), "single"

    def _part(self, found: Certificates, y: Tensor, r: float) -> Finding:
        hit = (found.prediction == y.cpu()) & (found.radius >= r)
        k, n = int(hit.sum()), len(y)
        low, high = wilson_interval(k, n)
        return Finding(
            self.slug, f"certified accuracy at {r:g}", k / n, low, high, "share", "higher", n,
            f"{k} of {n} examples keep their right class under every change of L2 size up to {r:g}.",
            samples=np.asarray(hit.double().numpy()),
        )  # fmt: skip

    def _warnings(
        self, found: Certificates, y: Tensor, clean: float, sigma: float, cap: float, n: int
    ) -> tuple[str, ...]:
        warnings = []
        certified = float((found.prediction == y.cpu()).double().mean())
        if clean - certified > NOISE_GAP:
            warnings.append(
                f"Accuracy falls from {clean:.0%} to a certified {certified:.0%} under noise of {sigma:g}: the model was "
                "probably not trained with noise, and such a model has small radii however good it is otherwise."
            )
        if sigma != self.sigma:
            warnings.append(
                f"The model brings its own noise level {sigma:g}, which was used instead of {self.sigma:g}."
            )
        if float((found.radius > 0.99 * cap).double().mean()) > 0.5:
            warnings.append(
                f"Most radii stand at the largest value that {n} draws can show ({cap:.3f}): more draws would show more."
            )
        return tuple(warnings)


def _positive(cap: Tensor) -> float:
    """A bound for the interval's scale; a hair above the cap, because equal radii may differ by rounding."""
    return max(cap.item() * (1 + 1e-9), 1e-9)


def _curve(found: Certificates, y: Tensor, sigma: float) -> Chart:
    """Certified accuracy against the radius, as a step curve."""
    right = np.sort(np.asarray(found.radius[found.prediction == y.cpu()].numpy()))
    share = np.arange(len(right), 0, -1) / len(y)
    line = {"type": "scatter", "mode": "lines", "line": {"shape": "vh"}}
    line |= {"x": [0.0, *right.tolist()], "y": [len(right) / len(y), *share.tolist()]}
    layout = {
        "xaxis": {"title": {"text": "L2 radius"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "certified accuracy"}, "range": [0, 1]},
    }
    return Chart(
        {"data": [line], "layout": layout},
        f"Share of examples whose right class is certified up to each radius (noise {sigma:g}).",
    )
