"""Adversarial accuracy: share of examples right without and under every attack of a suite (see `surefoot.nn.attacks`).

The number is an upper bound on the true robust accuracy: a stronger attack can only lower it. Signs that gradients are
masked, which would make it too high, are reported as warnings; one of them is that points made on an undefended net, trained
here on the task's training split, break more than the model's own gradients. Models that draw random numbers are attacked in expectation
and judged by majority over draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from surefoot.audit.instruments.common import (
    between,
    can_show,
    class_name,
    device_of,
    logits,
    percent,
    share,
    to_pixels,
)
from surefoot.audit.instruments.surrogate import Surrogate, undefended_surrogate
from surefoot.core.finding import Chart, Cost, Finding, Thumbnails
from surefoot.core.instrument import Instrument
from surefoot.core.statistics import wilson_interval
from surefoot.core.subject import Subject
from surefoot.core.task import Split, Task
from surefoot.core.work import affordable, cut_note, forward_flops
from surefoot.errors import check_choice
from surefoot.nn.attacks import (
    MaskingReport,
    Model,
    Norm,
    SuiteResult,
    ZeroGradient,
    apgd,
    is_random,
    masking_diagnostics,
    rand_suite,
    standard_suite,
)

LEAST = 50  # examples attacked however large the model


@dataclass(frozen=True)
class Effort:
    """How hard to attack; `flops` bounds the worst case, so that a large model is attacked on fewer examples."""

    examples: int
    steps: int
    targets: int
    fab_steps: int
    queries: int
    masking: int  # examples for the masking checks
    curve: int  # examples for the curve
    surrogate: int  # training examples of the undefended net for the transfer check
    flops: float


EFFORT = {
    "quick": Effort(128, 20, 2, 5, 100, 50, 64, 0, 3e11),
    "standard": Effort(500, 50, 4, 10, 500, 100, 200, 2000, 2e12),
    "thorough": Effort(2000, 100, 9, 50, 5000, 200, 500, 10_000, 3e14),
}


@dataclass(frozen=True)
class AdversarialAccuracy(Instrument):
    """Accuracy under APGD-CE, APGD-T, FAB-T and Square at one radius.

    `eps=None` means, as a share of the range of the inputs, 8/255 in Linf (0.5 in L2) for colour images of at least 32 pixels and
    0.1 in Linf (1.0 in L2) for everything else. `attack_target`: a smooth stand-in to take gradients of, for a pipeline that hides its own.
    `undefended`: a model for the transfer check; without it a small one is trained on the side (not on the quick budget).
    """

    slug: ClassVar[str] = "adversarial"
    title: ClassVar[str] = "Adversarial accuracy"
    fix: ClassVar[tuple[str, ...]] = ("fast_ibp", "doubly_robust", "adaptive_smoothing", "crossmax")

    eps: float | None = None
    norm: Norm = "linf"
    attack_target: Model | None = field(default=None, repr=False, compare=False)  # gradients of this model instead
    undefended: Model | None = field(default=None, repr=False, compare=False)

    def unfit(self, subject: Subject, task: Task) -> str | None:
        reason = super().unfit(subject, task)
        if reason is None and task.bounds is None:
            reason = "An attack needs the valid range of the inputs to say how large a small change is; the data has no bounds."
        return reason

    def radius(self, task: Task) -> float:
        if self.eps is not None:
            return self.eps
        low, high = task.bounds or (0.0, 1.0)
        shape = task.input_shape
        large = len(shape) == 3 and shape[0] == 3 and min(shape[1:]) >= 32
        share_of_range = {"linf": (0.1, 8 / 255), "l2": (1.0, 0.5)}[self.norm][large]
        return share_of_range * (high - low)

    def measure(self, subject: Subject, task: Task) -> Finding:
        check_choice("norm", self.norm, ("linf", "l2"))
        effort, eps = EFFORT[task.budget], self.radius(task)
        device = device_of(subject, task.test.x)
        first = task.test.x[:1].to(device)
        logits(subject, first, task.generator(self.slug))  # a clear sentence first where the model answers nonsense
        n = self._affordable(subject, first, effort, task)
        split = task.sample(self.slug, n)
        x, y = split.x.to(device), split.labels.to(device)
        random = is_random(subject.model, x[:16], task.generator(f"{self.slug}/random"))
        result = self._suite(subject, task, x, y, eps, effort, random)
        helper = self._helper(subject, task, effort)
        masking = masking_diagnostics(
            subject.model, x[: effort.masking], y[: effort.masking], eps=eps, norm=self.norm, bounds=task.bounds,
            queries=effort.queries // 2, undefended=helper.model,
            generator=task.generator(f"{self.slug}/masking"),
        )  # fmt: skip
        curve, passes = ({}, 0) if random else self._curve(subject, task, x[: effort.curve], y[: effort.curve], eps)
        passes += result.passes + masking.passes + helper.passes
        return self._finding(subject, task, split, result, masking, helper, curve, passes)

    def _helper(self, subject: Subject, task: Task, effort: Effort) -> Surrogate:
        """The model that the transfer check makes its points on."""
        if self.undefended is not None:
            return Surrogate(self.undefended, taught_by="its owner")
        return undefended_surrogate(subject, task, examples=effort.surrogate)

    def _affordable(self, subject: Subject, first: Tensor, effort: Effort, task: Task) -> int:
        targets = min(effort.targets, subject.num_classes - 1)
        passes = 3 * effort.steps * (1 + targets) + 4 * effort.fab_steps * targets + effort.queries
        return affordable(effort.examples, LEAST, passes * forward_flops(subject.model, first), effort.flops)

    def _suite(
        self, subject: Subject, task: Task, x: Tensor, y: Tensor, eps: float, effort: Effort, random: bool
    ) -> SuiteResult:
        shared = {
            "eps": eps,
            "norm": self.norm,
            "bounds": task.bounds,
            "generator": task.generator(f"{self.slug}/suite"),
            "attack_target": self.attack_target,
        }
        if random:
            return rand_suite(subject.model, x, y, steps=effort.steps // 2, eot=10, **shared)
        return standard_suite(
            subject.model,
            x,
            y,
            steps=effort.steps,
            fab_steps=effort.fab_steps,
            targets=effort.targets,
            queries=effort.queries,
            **shared,
        )

    def _curve(self, subject: Subject, task: Task, x: Tensor, y: Tensor, eps: float) -> tuple[dict[float, float], int]:
        """Accuracy under one short APGD at several radii, largest last; what breaks at one radius is not tried at the next."""
        alive, curve, passes = torch.ones_like(y, dtype=torch.bool), {}, 0
        for factor in (0.0, 0.25, 0.5, 1.0, 1.5, 2.0):
            index = alive.nonzero()[:, 0]
            if len(index) > 0:
                try:
                    found = apgd(
                        subject.model, x[index], y[index], eps=factor * eps, norm=self.norm, steps=20, loss="margin",
                        bounds=task.bounds, generator=task.generator(f"{self.slug}/curve"),
                    )  # fmt: skip
                    alive[index[found.broken]] = False
                    passes += found.passes
                except ZeroGradient:
                    break
            curve[factor * eps] = alive.double().mean().item()
        return curve, passes

    def _finding(
        self,
        subject: Subject,
        task: Task,
        split: Split,
        result: SuiteResult,
        masking: MaskingReport,
        helper: Surrogate,
        curve: dict[float, float],
        passes: int,
    ) -> Finding:
        eps = self.radius(task)
        robust, clean = result.robust.cpu(), result.clean.cpu()
        n, value = len(robust), result.robust_accuracy
        low, high = wilson_interval(int(robust.sum()), n)
        norm = {"linf": "Linf", "l2": "L2"}[self.norm]
        parts = [share(self.slug, "clean", clean, f"Without attack {percent(result.clean_accuracy)} are right.")]
        alive = clean.clone()
        for name in result.survivors:
            alive &= torch.tensor([by != name for by in result.broken_by])
            parts.append(share(self.slug, f"after {name}", alive.clone(), f"After {name} {percent(alive.double().mean().item())} are still right."))  # fmt: skip
        sentence = (
            f"Changes of at most {eps:.3g} ({norm}) leave the model right on {percent(value)} of {n:,} examples "
            f"({between(low, high)}), against {percent(result.clean_accuracy)} without attack."
        )
        y = split.labels.cpu()
        per_class = [robust[y == k].double().mean().item() for k in y.unique().tolist()]
        details = {
            "eps": eps, "norm": self.norm, "survivors": dict(result.survivors), "notes": list(result.notes),
            "decision": result.decision, "draws": result.draws, "clean_error_over_draws": result.clean_error,
            "balanced_robust_accuracy": sum(per_class) / len(per_class),
            "curve": {f"{k:.4g}": v for k, v in curve.items()},
            "masking": {c.name: {"suspicious": c.suspicious, **c.numbers} for c in masking.checks},
            "transfer": helper.facts(),
        }  # fmt: skip
        pictures = tuple(p for p in (_chart(curve, eps, value, low, high, norm), self._examples(subject, task, split, result)) if p)  # fmt: skip
        raised = sum(check.suspicious for check in masking.checks)
        doubt = f"Do not believe this accuracy: {raised} of {len(masking.checks)} checks say that gradients are hidden; attack a smooth stand-in (attack_target)."  # fmt: skip
        warnings = (
            *((doubt,) if raised else ()),
            *masking.warnings,
            *(note for note in result.notes if "gradient" in note),
            *cut_note(n, min(EFFORT[task.budget].examples, len(task.test))),
        )
        if result.decision != "single":
            warnings += (
                f"The model draws random numbers: predictions are the {result.decision} over {result.draws} draws.",
            )
        return Finding(
            self.slug, self.title, value, low, high, "accuracy", "higher", n, sentence, cost=Cost(passes=passes),
            samples=robust.double().numpy(), parts=tuple(parts), pictures=pictures, fix=self.fix, warnings=warnings,
            details=details,
        )  # fmt: skip

    def _examples(self, subject: Subject, task: Task, split: Split, result: SuiteResult) -> Thumbnails | None:
        """Up to six examples, clean and attacked side by side."""
        broken = (result.clean & ~result.robust).nonzero()[:, 0].cpu()[:6]
        if not can_show(split.x) or len(broken) == 0:
            return None
        attacked = result.x.cpu()[broken]
        taken = logits(subject, attacked, task.generator(self.slug)).argmax(1).tolist()
        images = torch.stack([split.x.cpu()[broken], attacked], 1).flatten(0, 1)
        captions = []
        for k, other in zip(broken.tolist(), taken):
            captions += [class_name(subject, int(split.labels[k])), f"taken for {class_name(subject, other)}"]
        return Thumbnails(to_pixels(images, task.bounds), tuple(captions), "Examples before and after the attack.")


def _chart(curve: dict[float, float], eps: float, value: float, low: float, high: float, norm: str) -> Chart | None:
    if len(curve) < 2:
        return None
    line = {"type": "scatter", "mode": "lines+markers", "name": "APGD, 20 steps", "x": list(curve), "y": list(curve.values())}  # fmt: skip
    bars = {"type": "data", "symmetric": False, "array": [high - value], "arrayminus": [value - low]}
    point = {"type": "scatter", "mode": "markers", "name": "whole suite", "x": [eps], "y": [value], "error_y": bars}
    layout = {
        "xaxis": {"title": {"text": f"largest change ({norm})"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "accuracy"}, "range": [0, 1.02]},
    }
    return Chart(
        {"data": [line, point], "layout": layout},
        "Accuracy against the size of the change; the curve is one short attack.",
    )
