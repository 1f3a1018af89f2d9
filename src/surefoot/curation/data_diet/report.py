"""What scoring leaves behind: one number per example, and the subsets that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surefoot.errors import InvalidInput, check


class Window(NamedTuple):
    """How many examples, from hard to easy, are skipped, kept and left out.

    The released code of the paper counts its offset from the easy end: there it is `easiest`.
    """

    hardest: int
    kept: int
    easiest: int


@dataclass(frozen=True)
class ScoreReport:
    """Scores of a training set (larger is harder): their mean over the runs, and each run.

    `norm_correlation` is Spearman's correlation of the scores with the inputs' L2 norms (None where either is constant): near
    1, the score says how bright an image is and not how hard. `weights` are the hashes of the weights that were scored.
    """

    kind: str
    scores: Tensor  # float64 [n]
    per_run: Tensor  # float64 [R, n]
    y: Tensor = field(repr=False)  # int64 [n]
    epoch: int | None = None
    norm_correlation: float | None = None
    warnings: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        bad = self.per_run.isnan().any(0).nonzero().flatten()
        if len(bad):
            shown = ", ".join(map(str, bad[:5].tolist())) + (", ..." if len(bad) > 5 else "")
            raise InvalidInput(
                f"{self.kind} is not a number for {len(bad)} examples (indices {shown}); look at their inputs."
            )

    def __len__(self) -> int:
        return len(self.scores)

    def window(self, fraction: float, offset: int = 0) -> Window:
        """The counts behind `keep_top(fraction, offset)`."""
        check(0.0 < fraction <= 1.0, f"fraction must lie in (0, 1], got {fraction!r}.")
        kept = max(1, round(fraction * len(self)))
        check(int(offset) == offset and offset >= 0, f"offset must be a whole number of examples, got {offset!r}.")
        check(
            offset + kept <= len(self),
            f"offset {offset} and {kept} kept examples exceed the {len(self)} there are; lower the offset or the fraction.",
        )
        return Window(int(offset), kept, len(self) - kept - int(offset))

    def keep_top(self, fraction: float, offset: int = 0, class_balanced: bool = False) -> Tensor:  # int64 [kept]
        """Positions of the highest-scoring share, in the order of the data set; `offset` skips so many of the very highest.

        Equal scores are taken lowest index first. `class_balanced` keeps each class's share of the data (largest remainders)
        and skips the offset in the same proportions.
        """
        window = self.window(fraction, offset)
        order = self.scores.argsort(descending=True, stable=True)
        if not class_balanced:
            return order[window.hardest : window.hardest + window.kept].sort().values
        labels, counts = self.y.unique(return_counts=True)
        keep, skip = (apportion(counts, total) for total in (window.kept, window.hardest))
        skip = torch.minimum(skip, counts - keep)  # both roundings up in one class must not ask for more than it has
        chosen = []
        for label, k, s in zip(labels.tolist(), keep.tolist(), skip.tolist(), strict=True):
            of_class = order[self.y[order] == label]
            chosen.append(of_class[s : s + k])
        return torch.cat(chosen).sort().values

    def class_counts(self, index: Tensor) -> dict[int, int]:
        """How many examples of each class a subset holds: top-score subsets are seldom balanced."""
        counts = torch.bincount(self.y[index], minlength=int(self.y.max()) + 1)
        return {label: int(count) for label, count in enumerate(counts)}

    def suspected_noise(self, fraction: float) -> Tensor:  # int64 [k]
        """The highest-scoring share, hardest first: with wrong labels about, mostly those."""
        kept = self.window(fraction).kept
        return self.scores.argsort(descending=True, stable=True)[:kept]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {
            "kind": self.kind,
            "epoch": self.epoch,
            "runs": len(self.per_run),
            "scores": self.scores.tolist(),
            "per_run": self.per_run.tolist(),
            "norm_correlation": self.norm_correlation,
            "warnings": list(self.warnings),
            "weights": list(self.weights),
        }


def apportion(
    counts: Tensor,  # int64 [K]
    total: int,
) -> Tensor:  # int64 [K]
    """`total` seats in proportion to `counts`, by largest remainders, ties to the lower index; never above `counts`."""
    exact = counts.double() * total / counts.sum()
    seats = exact.floor().long()
    order = (exact - seats).argsort(descending=True, stable=True)
    seats[order[: total - int(seats.sum())]] += 1
    return seats
