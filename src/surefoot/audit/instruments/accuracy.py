"""Accuracy: how often the top class is right, over all and class by class, and what is taken for what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from surefoot.audit.instruments.common import between, class_name, logits, percent, share
from surefoot.core.finding import Chart, Cost, Finding
from surefoot.core.instrument import Instrument
from surefoot.core.statistics import wilson_interval
from surefoot.core.subject import Subject
from surefoot.core.task import Task

MOST_CLASSES = 20  # shown; of more, the worst


def confusion(
    prediction: Tensor,  # int64 [N]
    y: Tensor,  # int64 [N]
    num_classes: int,
) -> Tensor:  # int64 [K, K], rows are true classes
    return torch.bincount(y * num_classes + prediction, minlength=num_classes**2).view(num_classes, num_classes)


@dataclass(frozen=True)
class Accuracy(Instrument):
    """Share of test examples whose highest logit is the right class, with Wilson's interval."""

    slug: ClassVar[str] = "accuracy"
    title: ClassVar[str] = "Accuracy"

    def measure(self, subject: Subject, task: Task) -> Finding:
        split = task.sample(self.slug, task.pick(quick=2000, standard=50_000, thorough=10**9))
        y = split.labels.cpu()
        prediction = logits(subject, split.x, task.generator(self.slug)).argmax(1)
        right = prediction == y
        n, hits = len(y), int(right.sum())
        low, high = wilson_interval(hits, n)
        table = confusion(prediction, y, subject.num_classes)
        counts = table.sum(1)
        by_class = table.diagonal() / counts.clamp_min(1)
        present = counts.nonzero()[:, 0].tolist()
        shown = sorted(sorted(present, key=lambda k: float(by_class[k]))[:MOST_CLASSES])
        parts = tuple(self._part(subject, k, right[y == k]) for k in shown)
        worst = min(present, key=lambda k: float(by_class[k]))
        majority = int(counts.max()) / n
        sentence = (
            f"The model is right on {percent(hits / n)} of {n:,} test examples ({between(low, high)}); "
            f"its worst class is {class_name(subject, worst)} with {percent(float(by_class[worst]))}."
        )
        details = {
            "balanced_accuracy": float(by_class[present].mean()),
            "majority_class_share": majority,
            "classes_present": len(present),
        }
        warnings = ()
        if low <= majority:
            warnings = (f"Always answering the most frequent class would be right on {percent(majority)}.",)
        return Finding(
            self.slug, self.title, hits / n, low, high, "accuracy", "higher", n, sentence, cost=Cost(passes=n),
            samples=right.double().numpy(), parts=parts, pictures=(self._chart(subject, table, shown),), fix=self.fix,
            warnings=warnings, details=details,
        )  # fmt: skip

    def _part(self, subject: Subject, label: int, right: Tensor) -> Finding:
        name = class_name(subject, label)
        sentence = f"Of {len(right):,} examples of {name}, {percent(right.double().mean().item())} are recognised."
        return share(self.slug, f"class {name}", right, sentence)

    def _chart(self, subject: Subject, table: Tensor, shown: list[int]) -> Chart:
        names = [class_name(subject, k) for k in shown]
        part, columns = table[shown][:, shown], names
        if len(shown) < len(table):  # the worst of many classes are mostly taken for others
            rest = table[shown].sum(1, keepdim=True) - part.sum(1, keepdim=True)
            part, columns = torch.cat([part, rest], 1), [*names, "others"]
        rows = (part / table[shown].sum(1, keepdim=True).clamp_min(1)).tolist()
        heat = {"type": "heatmap", "z": rows, "x": columns, "y": names, "text": part.tolist(), "zmin": 0, "zmax": 1}
        heat |= {
            "texttemplate": "%{text}" if len(names) <= 12 else "",
            "colorscale": [[0.0, "#f5f7f9"], [1.0, "#2563a6"]],
            "showscale": False,
        }
        layout = {
            "xaxis": {"title": {"text": "predicted"}, "type": "category", "dtick": 1},
            "yaxis": {"title": {"text": "true"}, "type": "category", "autorange": "reversed", "dtick": 1},
            "height": max(320, 100 + 19 * len(names)),
        }
        few = "" if len(shown) == int((table.sum(1) > 0).sum()) else f" The {len(shown)} worst classes."
        return Chart({"data": [heat], "layout": layout}, f"What is taken for what: each row is one true class.{few}")
