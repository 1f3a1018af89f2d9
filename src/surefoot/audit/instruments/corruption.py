"""Corruption robustness: accuracy under common corruptions of five severities (see `surefoot.nn.corruptions`).

    value = mean over examples of the mean over kinds and severities of [the corrupted example is recognised]

The interval is over examples, each of which carries the mean over its corruptions, so that it says what another test
set would give; kinds and severities are fixed. Hendrycks & Dietterich, 2019, arXiv 1903.12261 report errors relative to a
reference network; here accuracies stand as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from surefoot.audit.instruments.common import between, device_of, logits, percent, share, to_pixels
from surefoot.core.finding import Chart, Cost, Finding, Thumbnails
from surefoot.core.instrument import Instrument
from surefoot.core.statistics import mean_interval
from surefoot.core.subject import Modality, Subject
from surefoot.core.task import Task
from surefoot.errors import check, check_choice
from surefoot.nn.corruptions import SEVERITIES, corrupt, kinds

BATCH = 128

BAD_TO_GOOD = [[0.0, "#b4434f"], [0.5, "#f0d78c"], [1.0, "#2e8b57"]]  # plotly.js knows few scales by name


@dataclass(frozen=True)
class CorruptionRobustness(Instrument):
    """Mean accuracy over all corruptions that fit the images; `only` and `severities` restrict them."""

    slug: ClassVar[str] = "corruptions"
    title: ClassVar[str] = "Accuracy under corruptions"
    modalities: ClassVar[tuple[Modality, ...]] = ("image",)
    fix: ClassVar[tuple[str, ...]] = ("weight_signatures", "robustify_pretrained")

    only: tuple[str, ...] | None = None
    severities: tuple[int, ...] = SEVERITIES

    def unfit(self, subject: Subject, task: Task) -> str | None:
        reason = super().unfit(subject, task)
        if reason is not None:
            return reason
        shape = task.input_shape
        if len(shape) != 3 or shape[0] not in (1, 3):
            return f"Corruptions are defined for images of 1 or 3 channels, not for inputs of shape {list(shape)}."
        if min(shape[1:]) < 4:
            return f"Corruptions need images of at least 4 x 4 pixels, not {shape[1]} x {shape[2]}."
        if task.bounds is None:
            return "It needs the range of the pixels, and the data has no bounds."
        return None

    def measure(self, subject: Subject, task: Task) -> Finding:
        split = task.sample(self.slug, task.pick(quick=200, standard=1000, thorough=5000))
        names: tuple[str, ...] = self.only if self.only is not None else kinds(task.input_shape[0])
        check(len(names) > 0 and len(self.severities) > 0, "There is no corruption to measure; name one in `only`.")
        for severity in self.severities:
            check_choice("severities", severity, SEVERITIES)
        clean = self._right(subject, task, split.x, split.labels)
        right = torch.stack(
            [
                torch.stack([self._corrupted(subject, task, split.x, split.labels, name, s) for s in self.severities])
                for name in names
            ]
        ).double()  # [kinds, severities, n]
        samples = right.mean((0, 1)).numpy()
        n, value = len(samples), float(samples.mean())
        low, high = mean_interval(samples, bounds=(0.0, 1.0))
        table = right.mean(2)
        parts = tuple(
            share(
                self.slug,
                name,
                row.mean(0),
                f"Under {name.replace('_', ' ')} {percent(row.mean().item())} are recognised.",
            )
            for name, row in zip(names, right)
        )
        worst = min(parts, key=lambda part: part.value)
        sentence = (
            f"Under {len(names)} corruptions the model is right on {percent(value)} ({between(low, high)}), "
            f"against {percent(clean.double().mean().item())} on the same clean images; "
            f"{worst.name.replace('_', ' ')} harms it most ({percent(worst.value)})."
        )
        details = {
            "clean_accuracy": clean.double().mean().item(),
            "severities": list(self.severities),
            "accuracy": {name: row.tolist() for name, row in zip(names, table)},
        }
        pictures = (_heat(names, self.severities, table), self._thumbnails(task, split.x, names))
        return Finding(
            self.slug, self.title, value, low, high, "accuracy", "higher", n, sentence,
            cost=Cost(passes=n * (1 + len(names) * len(self.severities))), samples=samples, parts=parts,
            pictures=pictures, fix=self.fix, details=details,
        )  # fmt: skip

    def _right(self, subject: Subject, task: Task, x: Tensor, y: Tensor) -> Tensor:
        return logits(subject, x, task.generator(f"{self.slug}/model")).argmax(1) == y.cpu()

    def _corrupted(self, subject: Subject, task: Task, x: Tensor, y: Tensor, name: str, severity: int) -> Tensor:
        """One generator for a kind: the five severities show the same scenes."""
        device = device_of(subject, x)
        generator = task.generator(f"{self.slug}/{name}")
        pieces = [
            self._right(subject, task, self._apply(task, a.to(device), name, severity, generator), b)
            for a, b in zip(x.split(BATCH), y.split(BATCH))
        ]
        return torch.cat(pieces)

    def _apply(self, task: Task, x: Tensor, name: str, severity: int, generator: torch.Generator) -> Tensor:
        low, high = task.bounds or (0.0, 1.0)
        unit = (x - low) / (high - low) if (low, high) != (0.0, 1.0) else x
        return corrupt(unit, name, severity, generator) * (high - low) + low

    def _thumbnails(self, task: Task, x: Tensor, names: tuple[str, ...]) -> Thumbnails:
        severity = self.severities[len(self.severities) // 2]
        first = x[:1].cpu()
        images = [first, *(self._apply(task, first, n, severity, task.generator(f"{self.slug}/{n}")) for n in names)]
        captions = ("clean", *(name.replace("_", " ") for name in names))
        return Thumbnails(to_pixels(torch.cat(images), task.bounds), captions, f"One image under each corruption, severity {severity} of 5.")  # fmt: skip


def _heat(names: tuple[str, ...], severities: Sequence[int], table: Tensor) -> Chart:
    order = table.mean(1).argsort(descending=True).tolist()
    rows = [names[k].replace("_", " ") for k in order]
    cells = table[order]
    heat = {"type": "heatmap", "z": cells.tolist(), "x": [str(s) for s in severities], "y": rows, "zmin": 0, "zmax": 1}
    heat |= {"text": (100 * cells).round().int().tolist(), "texttemplate": "%{text}", "colorscale": BAD_TO_GOOD}
    layout = {
        "xaxis": {"title": {"text": "severity"}, "type": "category"},
        "yaxis": {"type": "category", "automargin": True},
        "height": 120 + 24 * len(rows),
    }
    return Chart(
        {"data": [heat], "layout": layout}, "Accuracy in percent by corruption and severity; the worst kind on top."
    )
