"""The task: the data of a run, with its budget, device and randomness."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from surefoot.core.subject import Modality
from surefoot.errors import InvalidInput, check

BudgetName = Literal["quick", "standard", "thorough"]
T = TypeVar("T")
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Split:
    """Examples in memory. `true_y` are the clean labels where `y` was corrupted on purpose."""

    x: Tensor  # float32 [N, ...], raw scale
    y: Tensor | None = None  # int64 [N]
    true_y: Tensor | None = None  # int64 [N]

    def __post_init__(self) -> None:
        check(
            self.x.is_floating_point(), f"x must be floating point, got {self.x.dtype}; scale images to [0, 1] first."
        )
        for name, labels in (("y", self.y), ("true_y", self.true_y)):
            if labels is not None:
                check(labels.dtype == torch.int64, f"{name} must hold int64 class indices, got {labels.dtype}.")
                check(len(labels) == len(self.x), f"{name} has {len(labels)} labels for {len(self.x)} examples.")

    def __len__(self) -> int:
        return len(self.x)

    @property
    def labels(self) -> Tensor:
        """The labels, or a clear error where the split has none."""
        if self.y is None:
            raise InvalidInput("This split has no labels; give data with labels or run an instrument that needs none.")
        return self.y

    def take(self, index: Tensor | slice) -> Split:
        def pick(labels: Tensor | None) -> Tensor | None:
            return None if labels is None else labels[index]

        return Split(self.x[index], pick(self.y), pick(self.true_y))


@dataclass(frozen=True)
class Task:
    """Train, validation and test splits of one problem, and how much may be spent on it.

    Every random choice takes its own stream: `task.generator("purpose")` depends on the seed and the purpose alone, so
    adding one consumer never moves another. `augment` functions act on each training batch, in order.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    num_classes: int
    modality: Modality = "image"
    bounds: tuple[float, float] | None = (0.0, 1.0)
    class_names: tuple[str, ...] = ()
    budget: BudgetName = "standard"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    augment: tuple[Augment, ...] = ()
    facts: dict[str, object] = field(default_factory=dict)  # what the loader wants to tell the report

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.test.x.shape[1:])

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator for one purpose."""
        digest = hashlib.sha256(f"{self.seed}/{purpose}".encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))

    def pick(self, *, quick: T, standard: T, thorough: T) -> T:
        """The value for this task's budget."""
        return {"quick": quick, "standard": standard, "thorough": thorough}[self.budget]

    def sample(self, purpose: str, at_most: int) -> Split:
        """At most that many test examples, the same ones for every subject measured with this seed."""
        if len(self.test) <= at_most:
            return self.test
        order = torch.randperm(len(self.test), generator=self.generator(f"sample/{purpose}"))
        return self.test.take(order[:at_most].sort().values)

    def changed(self, **changes: object) -> Task:
        return replace(self, **changes)  # type: ignore[arg-type]

    def for_tuning(self) -> Task:
        """The same task with the validation split in the test's place: what tuning is allowed to see."""
        return replace(self, test=self.valid)


@dataclass(frozen=True)
class Training:
    """How a model is trained; the same words for every arm of a trial.

    `schedule`: "constant", "cosine" to zero, or "step" (times `gamma` at each fraction in `milestones`).
    `steps` fixes the number of optimizer steps whatever the size of the training split; else `epochs` count.
    """

    epochs: int = 20
    batch_size: int = 64
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    warmup: float = 0.0  # share of the steps with a linear ramp from zero
    clip_norm: float | None = None
    drop_last: bool = False
    steps: int | None = None

    def changed(self, **changes: object) -> Training:
        return replace(self, **changes)  # type: ignore[arg-type]
