"""The instrument: what is left of a model of several inputs when one of them is attacked or missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from surefoot.certified.crmt.model import classifier_in, shapes_of
from surefoot.certified.crmt.robustness import (
    Lipschitz,
    MultiModalReport,
    PreferenceReport,
    estimate_lipschitz,
    evaluate_multimodal,
    modality_preference,
    multimodal_radius,
)
from surefoot.core.finding import Chart, Cost, Finding
from surefoot.core.instrument import Instrument
from surefoot.core.statistics import wilson_interval
from surefoot.core.subject import Modality, Subject
from surefoot.core.task import Task
from surefoot.errors import InvalidInput, Refused, UnsupportedOp, check, check_at_least, check_positive

SHARES = (0.5, 1.0, 2.0)  # of the radius, on the curve
STEPS = 20


@dataclass
class Modalities(Instrument):
    """Accuracy when the worse modality is attacked within an L2 `radius`, and when one is missing.

    `radius` None: a tenth of the mean distance of the packed inputs to their mean. Any `TwoBranch` is measured; margins,
    preference and certificates need a `MultiModalClassifier`.
    """

    radius: float | None = None
    restarts: int = 2

    slug: ClassVar[str] = "modalities"
    title: ClassVar[str] = "One input attacked or missing"
    modalities: ClassVar[tuple[Modality, ...]] = ("vector",)
    fix: ClassVar[tuple[str, ...]] = ("crmt",)

    def __post_init__(self) -> None:
        if self.radius is not None:
            check_positive("radius", self.radius)
        check_at_least("restarts", self.restarts, 1)

    def unfit(self, subject: Subject, task: Task) -> str | None:
        try:
            shapes_of(subject.model, task.input_shape)
        except Refused as refusal:
            return str(refusal)
        return super().unfit(subject, task)

    def measure(self, subject: Subject, task: Task) -> Finding:
        reason = self.unfit(subject, task)
        if reason is not None:
            raise InvalidInput(reason)
        split = task.sample(self.slug, task.pick(quick=100, standard=300, thorough=1000))
        check(len(split) > 0, "There are no test examples to attack.")
        check(bool(torch.isfinite(split.x).all()), "The test examples hold NaN or infinite values; clean the data first.")  # fmt: skip
        like = next((p for p in subject.model.parameters() if p.is_floating_point()), split.x)
        x, y = split.x.to(like.device, like.dtype), split.labels.to(like.device)
        radius = self.radius or 0.1 * float((x - x.mean(0)).norm(dim=1).mean())
        radii = tuple(share * radius for share in SHARES)
        report = evaluate_multimodal(
            subject.model, x, y, radii, steps=STEPS, restarts=self.restarts, bounds=subject.bounds,
            generator=task.generator(self.slug, x.device),
        )  # fmt: skip
        return self._finding(report, radius, radii, self._theory(subject, x, y, radius))

    def _theory(self, subject: Subject, x: Tensor, y: Tensor, radius: float) -> _Theory | None:
        """Preference and certificates, where encoders and head are seen apart and nothing stands before them."""
        try:
            name, known = classifier_in(subject.model)
        except Refused:
            return None
        if name:  # normalisation in front: constants of the encoders are not in the scale of the data
            return None
        empirical = estimate_lipschitz(known, list(x.split(64)))
        if not bool((empirical.logits > 0).all()):
            return None
        preference = modality_preference(known, x, y, empirical)
        try:
            product: Lipschitz | None = estimate_lipschitz(known, [x[:1]], "product")
        except UnsupportedOp:
            product = None
        proven = None if product is None else [
            multimodal_radius(known, x, y, product, [m]).radius >= radius for m in range(len(known.shapes))
        ]  # fmt: skip
        return _Theory(preference, proven)

    def _finding(
        self, report: MultiModalReport, radius: float, radii: tuple[float, ...], theory: _Theory | None
    ) -> Finding:
        count, n = len(report.missing), len(report.clean)
        by_target = {str(m): report.attacked[str(m), radius] for m in range(count)}
        worst = min(by_target, key=lambda name: by_target[name].double().mean().item())
        right = by_target[worst]
        k = int(right.sum())
        low, high = wilson_interval(k, n)
        parts = [self._share("no attack", report.clean)]
        parts += [self._share(f"modality {m} attacked", by_target[str(m)]) for m in range(count)]
        parts += [self._share("all attacked together", report.attacked["all", radius])]
        parts += [self._share(f"modality {m} missing", gone) for m, gone in enumerate(report.missing)]
        details: dict[str, object] = {"radius": radius, "worst_modality": int(worst), "restarts": self.restarts, "steps": STEPS}  # fmt: skip
        if theory is not None:
            parts += [
                self._share(f"certified against attacks on modality {m}", p & report.clean)
                for m, p in enumerate(theory.proven or [])
            ]
            details |= {f"preference_{name}": getattr(theory.preference, name) for name in ("accuracy", "margin", "vulnerability")}  # fmt: skip
        lost = min(report.missing, key=lambda gone: gone.double().mean().item()).double().mean().item()
        warnings = ("The model has one modality, so none can stand in for another.",) if count == 1 else ()
        return Finding(
            instrument=self.slug,
            name="accuracy with the worse modality attacked",
            value=k / n,
            low=low,
            high=high,
            unit="share",
            better="higher",
            n=n,
            sentence=(
                f"{report.clean.double().mean():.0%} of the answers are right; {k / n:.0%} stay right when modality {worst} is changed "
                f"by at most {radius:.3g} (L2), and {lost:.0%} are right when one modality is missing."
            ),
            cost=Cost(passes=n * (1 + count + (count + 1) * len(radii) * self.restarts * (STEPS + 1))),
            samples=np.asarray(right.double().numpy()),
            parts=tuple(parts),
            pictures=(_bars(report, radius), _curves(report, radii)),
            fix=self.fix,
            warnings=warnings,
            details=details,
        )

    def _share(self, name: str, right: Tensor) -> Finding:
        k, n = int(right.sum()), len(right)
        low, high = wilson_interval(k, n)
        return Finding(
            self.slug, name, k / n, low, high, "share", "higher", n, f"{k} of {n} answers are right: {name}.",
            samples=np.asarray(right.double().numpy()),
        )  # fmt: skip


@dataclass(frozen=True)
class _Theory:
    preference: PreferenceReport
    proven: list[Tensor] | None  # bool [B], one a modality


def _bars(report: MultiModalReport, radius: float) -> Chart:
    count = len(report.missing)
    names = ["no attack", *(f"{m} attacked" for m in range(count)), "all attacked", *(f"{m} missing" for m in range(count))]  # fmt: skip
    rights = [
        report.clean,
        *(report.attacked[str(m), radius] for m in range(count)),
        report.attacked["all", radius],
        *report.missing,
    ]
    bars = {"type": "bar", "x": names, "y": [right.double().mean().item() for right in rights]}
    layout = {"yaxis": {"title": {"text": "accuracy"}, "range": [0, 1]}}
    return Chart({"data": [bars], "layout": layout}, f"What is left of the accuracy when a modality is attacked (L2, {radius:.3g}) or missing.")  # fmt: skip


def _curves(report: MultiModalReport, radii: tuple[float, ...]) -> Chart:
    clean = report.clean.double().mean().item()
    lines = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": "all" if name == "all" else f"modality {name}",
            "x": [0.0, *radii],
            "y": [clean, *(report.accuracy(name, r) for r in radii)],
        }
        for name in [*(str(m) for m in range(len(report.missing))), "all"]
    ]
    layout = {
        "xaxis": {"title": {"text": "L2 size of the change"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "accuracy"}, "range": [0, 1]},
    }
    return Chart({"data": lines, "layout": layout}, "Accuracy under attack, by modality: the lower line is what the model leans on.")  # fmt: skip
