"""Calibration: how far the confidence of the top class is from how often it is right.

The examples are put into B bins of equal size by confidence (15, fewer for small samples), and

    g_b = mean confidence - accuracy in bin b,     w_b = n_b / n
    ECE = sum_b w_b |g_b|                                          (Naeini et al., 2015; Guo et al., 2017, arXiv 1706.04599)

The estimate T from n examples is biased upwards: every |g_b| carries the noise of its bin, and a perfectly calibrated
model shows sqrt(2/pi) sum_b w_b s_b. A bootstrap around T inherits the bias and covers badly near zero. The interval here
holds for the ECE of these confidences under the true chances of being right, and follows from two inequalities. With s_b^2
the variance of g_b and s^2 = sum_b w_b^2 s_b^2:

    ECE <= E[T] (Jensen), sd(T) <= s                          high = T + z s
    E[T] - ECE <= sqrt(2/pi) sum_b w_b s_b                    low  = max(T - sqrt(2/pi) sum_b w_b s_b - z' s, |gap| - z' s, 0)

since |sum_b w_b g_b| = |gap| <= ECE as well; z' splits the lower error between its two bounds. s_b^2 uses (k + 2)/(n_b + 4)
for the accuracy of a bin, so that a bin without errors is not taken for certain. Coverage is at least nominal (tested by
simulation), and more than that for well calibrated models, where the bias term is an upper bound on the bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from surefoot.audit.instruments.common import logits, percent
from surefoot.core.finding import Chart, Cost, Finding
from surefoot.core.instrument import Instrument
from surefoot.core.statistics import mean_interval, wilson_interval
from surefoot.core.subject import Subject
from surefoot.core.task import Task
from surefoot.errors import check, check_at_least, check_open_unit

Floats = NDArray[np.float64]
PER_BIN = 20  # examples a bin needs at least, else there are fewer bins


@dataclass(frozen=True)
class CalibrationError:
    """Expected calibration error in equal-mass bins, bin by bin and in all."""

    value: float
    low: float
    high: float
    chance: float  # what a perfectly calibrated model with these confidences would show on average
    confidence: Floats  # [B] mean per bin
    accuracy: Floats  # [B]
    counts: NDArray[np.int64]  # [B]


def calibration_error(
    confidence: Floats,  # [n] in [0, 1]
    correct: Floats,  # [n] 0 or 1
    *,
    bins: int = 15,
    level: float = 0.95,
) -> CalibrationError:
    """Equal-mass ECE with an interval that covers; equations above."""
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    check_at_least("bins", bins, 1)
    check_open_unit("level", level)
    check(confidence.shape == correct.shape and confidence.ndim == 1 and len(confidence) > 0, "confidence and correct must be two lists of one length.")  # fmt: skip
    check(bool(((confidence >= 0) & (confidence <= 1)).all()), "confidence must lie in [0, 1].")
    n = len(confidence)
    order = np.argsort(confidence, kind="stable")
    groups = np.array_split(order, min(bins, max(n // PER_BIN, 1)))
    counts = np.array([len(g) for g in groups])
    mean = np.array([confidence[g].mean() for g in groups])
    hits = np.array([correct[g].sum() for g in groups])
    weight, accuracy = counts / n, hits / counts
    gap = mean - accuracy
    cautious = (hits + 2) / (counts + 4)
    deviation = np.sqrt(cautious * (1 - cautious) / counts)
    spread = math.sqrt(float(((weight * deviation) ** 2).sum()))
    noise = math.sqrt(2 / math.pi) * float((weight * deviation).sum())
    value, total = float((weight * np.abs(gap)).sum()), abs(float((weight * gap).sum()))
    z, z_split = (NormalDist().inv_cdf(1 - (1 - level) / k) for k in (2, 4))
    own = np.array([math.sqrt((confidence[g] * (1 - confidence[g])).sum()) / len(g) for g in groups])
    return CalibrationError(
        value,
        max(value - noise - z_split * spread, total - z_split * spread, 0.0),
        min(value + z * spread, 1.0),
        math.sqrt(2 / math.pi) * float((weight * own).sum()),
        mean,
        accuracy,
        counts,
    )


@dataclass(frozen=True)
class Calibration(Instrument):
    """Expected calibration error; beside it the signed confidence gap, log loss and Brier score, which pair example by example."""

    slug: ClassVar[str] = "calibration"
    title: ClassVar[str] = "Calibration error"

    bins: int = 15

    def measure(self, subject: Subject, task: Task) -> Finding:
        split = task.sample(self.slug, task.pick(quick=2000, standard=50_000, thorough=10**9))
        y, n = split.labels.cpu(), len(split)
        log_p = logits(subject, split.x, task.generator(self.slug)).log_softmax(1)
        top, prediction = log_p.exp().max(1)
        right = (prediction == y).double().numpy()
        confidence = top.clamp(0, 1).numpy()
        found = calibration_error(confidence, right, bins=self.bins)
        one_hot = np.eye(subject.num_classes)[y.numpy()]
        parts = (
            self._part("confidence gap", confidence - right, "neither", (-1.0, 1.0), "Mean confidence exceeds accuracy by {:+.3f}."),
            self._part("log loss", -log_p.gather(1, y[:, None])[:, 0].numpy(), "lower", None, "The true class costs {:.3f} nats on average."),
            self._part("Brier score", ((log_p.exp().numpy() - one_hot) ** 2).sum(1), "lower", (0.0, 2.0), "The squared error of the probabilities is {:.3f}."),
        )  # fmt: skip
        gap = parts[0].value
        lean = (
            "too sure"
            if parts[0].low > 0
            else "not sure enough"
            if parts[0].high < 0
            else "neither too sure nor too unsure"
        )
        sentence = (
            f"Confidence and accuracy differ by {percent(found.value)} on average over {len(found.counts)} bins "
            f"(95 % interval {100 * found.low:.1f} to {100 * found.high:.1f} %; chance alone would show {percent(found.chance)}); "
            f"over all the model is {lean} ({100 * gap:+.1f} points)."
        )
        details = {"bins": len(found.counts), "chance_level": found.chance, "mean_confidence": float(confidence.mean()), "accuracy": float(right.mean())}  # fmt: skip
        warnings = ()
        if found.low == 0.0:
            warnings = (f"On {n:,} examples this cannot be told from perfect calibration by its size alone.",)
        return Finding(
            self.slug, self.title, found.value, found.low, found.high, "calibration error", "lower", n, sentence,
            cost=Cost(passes=n), parts=parts, pictures=(_reliability(found),), fix=self.fix, warnings=warnings, details=details,
        )  # fmt: skip

    def _part(self, name: str, samples: Floats, better, bounds: tuple[float, float] | None, sentence: str) -> Finding:
        low, high = mean_interval(samples, bounds=bounds)
        value = float(samples.mean())
        unit = {"confidence gap": "confidence - accuracy", "log loss": "nats"}.get(name, "squared error")
        return Finding(
            self.slug, name, value, low, high, unit, better, len(samples), sentence.format(value), samples=samples
        )


def _reliability(found: CalibrationError) -> Chart:
    limits = [wilson_interval(a * c, int(c)) for a, c in zip(found.accuracy, found.counts)]
    bars = {
        "type": "data",
        "symmetric": False,
        "array": [high - a for (_, high), a in zip(limits, found.accuracy.tolist())],
        "arrayminus": [a - low for (low, _), a in zip(limits, found.accuracy.tolist())],
    }
    points = {"type": "scatter", "mode": "markers+lines", "name": "model", "x": found.confidence.tolist()}
    points |= {"y": found.accuracy.tolist(), "error_y": bars}
    ideal = {"type": "scatter", "mode": "lines", "name": "perfect", "x": [0, 1], "y": [0, 1], "line": {"dash": "dot"}}
    layout = {
        "xaxis": {"title": {"text": "confidence"}, "range": [0, 1.02]},
        "yaxis": {"title": {"text": "accuracy"}, "range": [0, 1.02]},
    }
    return Chart(
        {"data": [ideal, points], "layout": layout},
        f"Accuracy against confidence in {len(found.counts)} bins of equal size, with 95 % intervals.",
    )
