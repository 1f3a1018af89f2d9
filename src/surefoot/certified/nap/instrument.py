"""The audit instrument: how far the activation patterns of the classes carry as specifications of this model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from surefoot.certified.nap.patterns import ActivationPattern, NAPCoverage, mine_naps, nap_coverage
from surefoot.certified.nap.verification import verify_nap
from surefoot.core.finding import Chart, Direction, Finding
from surefoot.core.instrument import Instrument
from surefoot.core.statistics import wilson_interval
from surefoot.core.subject import Modality, Subject, predict
from surefoot.core.task import Split, Task
from surefoot.errors import InvalidInput, SurefootError, check, check_at_least, check_positive
from surefoot.nn.bounds import Limits, rectifier_shapes


@dataclass
class NeuralSpecification(Instrument):
    """Share of test images that follow their class's pattern and keep their class, provably, for whatever follows it within `eps`.

    Patterns are mined from the training split at `delta`. Nets with more than `max_neurons` ReLU neurons are not decided
    completely in reasonable time and are left out. `nodes` of branch and bound an image and class: a count, so that every
    machine finds the same.
    """

    eps: float = 0.05
    delta: float = 0.9
    max_neurons: int = 150
    nodes: int = 100

    slug: ClassVar[str] = "nap"
    title: ClassVar[str] = "Activation patterns as specifications"
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "vector", "signal")
    fix: ClassVar[tuple[str, ...]] = ("fast_ibp",)

    def __post_init__(self) -> None:
        check_positive("eps", self.eps)
        check(0.5 < self.delta <= 1, f"delta must lie in (0.5, 1], got {self.delta!r}.")
        check_at_least("max_neurons", self.max_neurons, 1)
        check_at_least("nodes", self.nodes, 1)

    def unfit(self, subject: Subject, task: Task) -> str | None:
        reason = super().unfit(subject, task)
        if reason is not None or not len(task.test):
            return reason
        if task.train.y is None or not len(task.train):
            return "Patterns are mined from labelled training data, and there are none."
        place = next(subject.model.parameters(), task.test.x).device
        try:
            shapes = rectifier_shapes(subject.model, task.test.x[:1].to(place))
        except SurefootError as error:
            return f"No proof is possible for this model: {error}"
        neurons = sum(shape.numel() for shape in shapes.values())
        if not neurons:
            return "The model has no ReLU, so that there are no activation patterns to speak of."
        if neurons > self.max_neurons:
            return f"Its {neurons} ReLU neurons are too many to decide completely in seconds; the limit is {self.max_neurons} (max_neurons)."
        return None

    def measure(self, subject: Subject, task: Task) -> Finding:
        split = task.sample(self.slug, task.pick(quick=16, standard=64, thorough=300))
        check(len(split) > 0, "The test split is empty; give labelled test examples.")
        logits = predict(subject.model, split.x)
        check(bool(torch.isfinite(logits).all()), "The model's logits must be finite, got NaN or infinity.")
        reason = self.unfit(subject, task)
        if reason is not None:
            raise InvalidInput(reason)
        model = copy.deepcopy(subject.model).double().eval()
        place = next(model.parameters(), split.x).device
        train = task.train.take(slice(None, 20_000))
        present = sorted(set(train.labels.tolist()))
        naps = mine_naps(model, train.x.to(place), train.labels.to(place), delta=self.delta, classes=present)
        coverage = nap_coverage(model, naps, split.x.to(place), split.labels.to(place))
        right = logits.argmax(1) == split.labels
        plain = self._proven(model, dict.fromkeys(naps), split, right, subject.bounds, place)
        inside = plain & coverage.own
        inside |= self._proven(model, naps, split, right & coverage.own & ~plain, subject.bounds, place)
        return self._finding(coverage, naps, inside, plain)

    def _proven(
        self, model: torch.nn.Module, naps: dict[int, ActivationPattern] | dict[int, None], split: Split, among: Tensor,
        bounds: tuple[float, float] | None, place: torch.device,
    ) -> Tensor:  # fmt: skip
        """bool [N]: verified in the ball around an image, within its class's pattern if there is one."""
        proven = torch.zeros(len(split), dtype=torch.bool)
        limits = Limits(time_limit=600.0, max_nodes=self.nodes)
        for i in among.nonzero().flatten().tolist():
            x, y = split.x[i : i + 1].to(place, torch.float64), int(split.labels[i])
            domain = bounds or (x - self.eps, x + self.eps)
            proven[i] = verify_nap(
                model, naps.get(y), y, domain=domain, center=x, eps=self.eps, witness=x, limits=limits
            ).verified
        return proven

    def _finding(
        self, coverage: NAPCoverage, naps: dict[int, ActivationPattern], inside: Tensor, plain: Tensor
    ) -> Finding:
        n, count = len(inside), int(inside.sum())
        low, high = wilson_interval(count, n)
        spilled = coverage.followed.sum(1) > coverage.own.long()
        parts = (
            self._share("Follows the pattern of its class", coverage.own),
            self._share("Follows the pattern of another class", spilled, "lower"),
            self._share("Proven in the whole ball, without a pattern", plain),
        )
        sizes = {str(c): naps[c].num_constrained for c in coverage.classes}
        return Finding(
            instrument=self.slug,
            name=f"Proven within activation patterns (eps {self.eps:.4g})",
            value=count / n,
            low=low,
            high=high,
            unit="share",
            better="higher",
            n=n,
            sentence=f"{count} of {n} images follow the activation pattern of their class and provably keep the class for every "
            f"change of at most {self.eps:.4g} that stays in the pattern; {int(plain.sum())} need no pattern.",
            samples=inside.numpy().astype(np.float64),
            parts=parts,
            pictures=(_chart(coverage),),
            fix=self.fix,
            details={"eps": self.eps, "delta": self.delta, "constrained_neurons": sizes, "arithmetic": "float64"},
        )

    def _share(self, name: str, holds: Tensor, better: Direction = "higher") -> Finding:
        n, count = len(holds), int(holds.sum())
        low, high = wilson_interval(count, n)
        return Finding(
            instrument=self.slug, name=name, value=count / n, low=low, high=high, unit="share", better=better, n=n,
            sentence=f"{name}: {count} of {n}.", samples=holds.numpy().astype(np.float64),
        )  # fmt: skip


def _chart(coverage: NAPCoverage) -> Chart:
    def bars(name: str, values: Tensor) -> dict[str, object]:
        shares = [None if v != v else 100 * v for v in values.tolist()]
        return {"type": "bar", "name": name, "x": [str(c) for c in coverage.classes], "y": shares}

    figure = {
        "data": [bars("recall", coverage.recall), bars("spill", coverage.spill)],
        "layout": {
            "xaxis": {"title": {"text": "class"}},
            "yaxis": {"title": {"text": "share of images, %"}, "range": [0, 100]},
        },
    }
    return Chart(
        figure, "Test images that follow a class's pattern: of the class itself (recall) and of all others (spill)."
    )
