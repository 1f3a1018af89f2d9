"""A trial, declared as data: tasks, arms, claims. The engine (`surefoot.core.engine`) runs it; nothing here runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from surefoot.core.task import Task, Training
from surefoot.core.treatment import Treatment

Metrics = Mapping[str, float]
Tier = Literal["embedded", "standard"]
Verdict = Literal["holds", "inconclusive", "contradicted"]


@dataclass(frozen=True)
class Stack:
    """Treatments that are trained together in one run, with the training recipe they use. The empty stack is the control."""

    treatments: tuple[Treatment, ...] = ()
    training: Training = field(default_factory=Training)


@dataclass(frozen=True)
class Run:
    """What one training run leaves behind, for `Setup.measure`."""

    model: nn.Module  # finished
    task: Task  # as the treatments left it
    treatments: tuple[Treatment, ...]
    history: tuple[Metrics, ...]  # what `Setup.on_epoch` returned, epoch by epoch


@dataclass(frozen=True)
class Arm:
    """One way of treating the model.

    `run` is either `stack(**settings) -> Stack`, or, with `system=True`, a whole system
    `arm(task, generator, **settings) -> metrics`. Settings come from `grid` (name -> values): every combination is run on
    the tuning seeds with the validation split in the test's place, and the best mean of `Setup.tune_on` is kept for
    all seeds. Give baselines the same grid as the method.
    """

    run: Callable[..., Any]
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    system: bool = False


@dataclass(frozen=True)
class Claim:
    """A sentence about paired differences that a trial can confirm or contradict.

    The effect per seed is `metric[arm] - metric[over]` (or `metric[arm]` alone where `over` is None), sign turned where
    lower is better, so that a positive effect is always good for the claim. It is compared with `at_least`.
    `within` instead asks for equivalence: |effect| <= within (two one-sided tests). `every_seed` is for guarantees and
    counts: the comparison must hold in each seed exactly, no statistics. `effect`, if given, replaces the
    difference: it gets one seed's `{arm: metrics}` and returns a number.
    """

    sentence: str
    metric: str = ""
    arm: str = ""
    over: str | None = None
    better: Literal["higher", "lower"] = "higher"
    at_least: float = 0.0
    within: float | None = None
    every_seed: bool = False
    effect: Callable[[Mapping[str, Metrics]], float] | None = None


@dataclass(frozen=True)
class Setup:
    """One tier of a trial.

    `task(seed, data_dir)` makes the data of a seed; `model(task, generator)` a fresh model of the task's shape and classes;
    `measure(run)` the metrics on `run.task.test`; `on_epoch(model, task, epoch)` optional metrics along training.
    System arms bring their own model and measure.
    """

    task: Callable[[int, Path | None], Task]
    arms: Mapping[str, Arm]
    claims: Sequence[Claim]
    model: Callable[[Task, torch.Generator], nn.Module] | None = None
    measure: Callable[[Run], Metrics] | None = None
    on_epoch: Callable[[nn.Module, Task, int], Metrics] | None = None
    tune_on: str = "accuracy"
    tune_better: Literal["higher", "lower"] = "higher"
    tuning_seeds: tuple[int, ...] = (1000,)


@dataclass(frozen=True)
class Trial:
    """The protocol of one method. A module `surefoot.trials.<family>.<slug>` holds one, named `TRIAL`."""

    method: str  # "family/slug"
    tiers: Mapping[Tier, Setup]
    notes: str = ""  # what a reader must know to read the verdicts
