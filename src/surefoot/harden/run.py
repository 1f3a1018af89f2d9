"""Harden: compose treatments, train once, audit before and after on the same examples, save what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from surefoot.audit.run import Audit, audit
from surefoot.audit.run import Progress as AuditProgress
from surefoot.core.cost import Meter
from surefoot.core.finding import Cost, Finding
from surefoot.core.instrument import Instrument
from surefoot.core.statistics import paired_difference
from surefoot.core.subject import Subject
from surefoot.core.task import Task, Training
from surefoot.core.treatment import Treatment, check_stack
from surefoot.datasets import check_task
from surefoot.errors import check
from surefoot.models.loading import save_subject
from surefoot.nn.modes import evaluating
from surefoot.training.loop import Progress, fit


@dataclass(frozen=True)
class Comparison:
    """One number before and after on the same examples. `low`/`high` bound the paired difference `after - before`.

    Both are None where the number is no mean over examples (then only the two values are known).
    """

    name: str
    instrument: str
    unit: str
    better: str
    before: float
    after: float
    difference: float
    low: float | None
    high: float | None
    n: int
    headline: bool = True  # False for the parts behind a headline

    @property
    def outcome(self) -> str:
        """`improved`, `worsened` or `unclear`: whether the interval of the difference excludes zero, and on which side."""
        if self.low is None or self.high is None or self.better == "neither" or self.low <= 0 <= self.high:
            return "unclear"
        return "improved" if (self.low > 0) == (self.better == "higher") else "worsened"


@dataclass(frozen=True)
class Hardened:
    """What `harden` did: the new subject, both audits, the paired differences, and what training cost."""

    subject: Subject
    before: Audit
    after: Audit
    comparisons: tuple[Comparison, ...]
    treatments: tuple[dict[str, Any], ...]
    training: dict[str, Any]
    cost: Cost
    folder: Path | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "treatments": list(self.treatments),
            "training": self.training,
            "cost": asdict(self.cost),
            "comparisons": [vars(c) | {"outcome": c.outcome} for c in self.comparisons],
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "model": None if self.folder is None else str(self.folder),
        }


def compare(before: Audit, after: Audit) -> tuple[Comparison, ...]:
    """Pair the findings of two audits on the same examples, headline and parts alike."""
    rows = []
    for first in before.findings:
        second = after.finding(first.instrument)
        if second is not None:
            rows.append(_pair(first, second))
            named = {part.name: part for part in second.parts}
            rows += [replace(_pair(p, named[p.name]), headline=False) for p in first.parts if p.name in named]
    return tuple(rows)


def _pair(first: Finding, second: Finding) -> Comparison:
    low = high = None
    if first.samples is not None and second.samples is not None and len(first.samples) == len(second.samples) > 1:
        _, low, high, _ = paired_difference(np.asarray(first.samples), np.asarray(second.samples), first.level)
    difference = second.value - first.value
    n = min(first.n, second.n)
    return Comparison(first.name, first.instrument, first.unit, first.better, first.value, second.value, difference, low, high, n)  # fmt: skip


def check_hardenable(model: nn.Module, task: Task, treatments: Sequence[Treatment]) -> None:
    """Refuse, with the reason and before anything is trained, what cannot be trained with these treatments."""
    check_task(task)
    check(
        len(task.train) > 0, f"{task.name} has no labelled training examples, and hardening trains; give labelled data."
    )
    check(len(treatments) > 0, "treatments is empty; name at least one.")
    check_stack(treatments, model, task)
    parameter = next((p for p in model.parameters() if p.requires_grad), None)
    if parameter is not None:
        with torch.enable_grad(), evaluating(model):
            follows = model(task.train.x[:2].to(parameter.device)).requires_grad
        check(follows, "The model's logits carry no gradient, so nothing can be trained; take no_grad or detach out of its forward.")  # fmt: skip


def harden(
    subject: Subject,
    task: Task,
    treatments: Sequence[Treatment],
    *,
    training: Training | None = None,
    start: Subject | None = None,
    recipe: Mapping[str, Any] | None = None,
    out: Path | None = None,
    instruments: Sequence[Instrument] | None = None,
    before: Audit | None = None,
    progress: Progress | None = None,
    audit_progress: AuditProgress | None = None,
    checkpoint: Path | None = None,
) -> Hardened:
    """Train a stack of treatments in one run and report what changed.

    `subject` is the model before. Training starts from its weights, or from `start` (an untrained copy, say) where given.
    A refused stack raises before anything is trained. With `out` and `recipe` the new model is saved there, loadable by
    `surefoot.models.load_saved(out)` and by `surefoot audit out`. The subject given is left as it was.
    """
    begin = start if start is not None else subject
    check_hardenable(begin.model, task, treatments)  # refuse before the first audit is paid for
    if before is None:
        before = audit(subject, task, instruments, progress=audit_progress)
    with Meter() as meter:
        run = fit(begin.model, task, training or Training(), treatments, progress=progress, checkpoint=checkpoint)
    hardened = subject.with_model(run.model)
    folder = None
    if out is not None and recipe is not None:
        folder = save_subject(hardened, out, recipe, run.treatments)
    after = audit(hardened, task, instruments, progress=audit_progress)
    return Hardened(
        hardened,
        before,
        after,
        compare(before, after),
        tuple({"slug": t.slug, "settings": t.settings()} for t in treatments),
        asdict(training or Training()),
        meter.cost,
        folder,
    )
