"""The audit: every instrument that fits, on the same examples, each with its cost, worst news first in the report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from surefoot.core.cost import Meter
from surefoot.core.environment import environment
from surefoot.core.finding import Finding
from surefoot.core.instrument import Instrument
from surefoot.core.subject import Subject
from surefoot.core.task import Task
from surefoot.datasets import check_task
from surefoot.errors import SurefootError

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # (title of the instrument about to run, how many are done, how many in all)


@dataclass(frozen=True)
class Skipped:
    """An instrument that did not run, and why."""

    instrument: str
    title: str
    reason: str


@dataclass(frozen=True)
class Audit:
    """All findings on one subject. `findings` stand in the order in which they were measured."""

    subject: str
    task: str
    findings: tuple[Finding, ...]
    skipped: tuple[Skipped, ...]
    facts: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=environment)

    def finding(self, instrument: str) -> Finding | None:
        return next((f for f in self.findings if f.instrument == instrument), None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "subject": self.subject,
            "data": self.task,
            "facts": self.facts,
            "findings": [f.to_dict() for f in self.findings],
            "skipped": [vars(s) for s in self.skipped],
            "environment": self.environment,
        }


def all_instruments() -> list[Instrument]:
    from surefoot.catalog import instruments, load_plug

    return [load_plug(entry.plug)() for entry in instruments()]


def audit(
    subject: Subject, task: Task, instruments: Sequence[Instrument] | None = None, *, progress: Progress | None = None
) -> Audit:
    """Run the instruments (default: all in the catalogue) that fit the subject and the data.

    An instrument that does not fit, or that meets input it cannot use, is listed with the reason and the others go on.
    The subject is left as it was.
    """
    check_task(task)
    chosen = list(instruments) if instruments is not None else all_instruments()
    findings: list[Finding] = []
    skipped: list[Skipped] = []
    for done, instrument in enumerate(chosen):
        if progress is not None:
            progress(instrument.title, done, len(chosen))
        reason = instrument.unfit(subject, task)
        if reason is None:
            try:
                with Meter() as meter:
                    finding = instrument.measure(subject, task)
                cost = replace(meter.cost, passes=finding.cost.passes)
                findings.append(replace(finding, cost=cost))
            except SurefootError as error:
                reason = str(error)
            except Exception as error:  # one broken instrument must not lose what the others found
                logger.exception("The instrument %s failed.", instrument.slug)
                reason = f"It failed: {type(error).__name__}: {error}."
        if reason is not None:
            skipped.append(Skipped(instrument.slug, instrument.title, reason))
    return Audit(subject.name, task.name, tuple(findings), tuple(skipped), _facts(subject, task))


def _facts(subject: Subject, task: Task) -> dict[str, Any]:
    return {
        "modality": subject.modality,
        "input_shape": list(subject.input_shape),
        "num_classes": subject.num_classes,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "examples": {"train": len(task.train), "valid": len(task.valid), "test": len(task.test)},
        "budget": task.budget,
        "seed": task.seed,
        "device": str(task.device),
        **{str(k): v for k, v in task.facts.items()},
    }
