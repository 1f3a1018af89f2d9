"""An instrument: measures a subject and never changes it."""

from __future__ import annotations

from typing import ClassVar

from surefoot.core.finding import Finding
from surefoot.core.subject import Modality, Subject
from surefoot.core.task import Task


class Instrument:
    """Base of every instrument; a subclass is a dataclass whose fields are its settings.

    `measure` works on `task.sample(self.slug, task.pick(quick=..., standard=..., thorough=...))`, draws all randomness from
    `task.generator(...)`, leaves weights, buffers, gradients and training flags as they were, and reports
    `samples` (one value per example) whenever the headline is their mean. The caller times it.
    """

    slug: ClassVar[str]
    title: ClassVar[str]
    needs_labels: ClassVar[bool] = True
    reads_model: ClassVar[bool] = True  # False where only the data are examined
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "vector", "signal")
    fix: ClassVar[tuple[str, ...]] = ()  # treatments known to move the number

    def unfit(self, subject: Subject, task: Task) -> str | None:
        """Why this instrument does not run here, as one sentence; None where it does."""
        if subject.modality not in self.modalities:
            return f"It measures {' and '.join(self.modalities)} models; this is a {subject.modality} model."
        if self.needs_labels and task.test.y is None:
            return "It needs labels, and the data has none."
        return None

    def measure(self, subject: Subject, task: Task) -> Finding:
        raise NotImplementedError
