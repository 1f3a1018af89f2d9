"""A finding: a number with its confidence interval, unit, direction, sample size, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Direction = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Chart:
    """A picture as a plotly figure in plain dictionaries (`{"data": [...], "layout": {...}}`); nothing heavy is imported to make one."""

    figure: Mapping[str, Any]
    caption: str


@dataclass(frozen=True)
class Thumbnails:
    """Small images with a caption each, drawn in rows by the report."""

    images: np.ndarray  # uint8 [N, H, W, 3] or [N, H, W]
    captions: tuple[str, ...]
    caption: str


@dataclass(frozen=True)
class Cost:
    """What a finding or a treatment took. `passes` counts forward passes of single examples."""

    seconds: float = 0.0
    peak_mb: float | None = None
    passes: int | None = None


@dataclass(frozen=True)
class Finding:
    """One measured number.

    `samples` holds one value per example (float64 `[n]`) whenever `value` is their mean: two findings by the same
    instrument on the same examples can then be compared in pairs. `low`/`high` bound `value` at `level`.
    `fix` names treatments (slugs) known to move the number in the good direction. `parts` are the numbers behind
    the headline (one corruption each, one radius each), findings themselves.
    """

    instrument: str
    name: str
    value: float
    low: float
    high: float
    unit: str
    better: Direction
    n: int
    sentence: str
    level: float = 0.95
    cost: Cost = field(default_factory=Cost)
    samples: np.ndarray | None = field(default=None, repr=False, compare=False)
    parts: tuple[Finding, ...] = ()
    pictures: tuple[Chart | Thumbnails, ...] = field(default=(), repr=False)
    fix: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON twin: everything but the pictures and the per-example values."""
        return {
            "instrument": self.instrument,
            "name": self.name,
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "level": self.level,
            "unit": self.unit,
            "better": self.better,
            "n": self.n,
            "sentence": self.sentence,
            "cost": {"seconds": self.cost.seconds, "peak_mb": self.cost.peak_mb, "passes": self.cost.passes},
            "fix": list(self.fix),
            "warnings": list(self.warnings),
            "details": dict(self.details),
            "parts": [part.to_dict() for part in self.parts],
        }
