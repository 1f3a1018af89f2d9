"""The trial engine: runs a declared `Trial` cell by cell through the store, then judges its claims.

Phase 1 tunes: each arm's grid on the tuning seeds, with the validation split in the test's place; the best mean of
`Setup.tune_on` wins, the first of equals. Phase 2 runs every (arm, seed) with those settings. A cell depends on its key alone,
so it does not matter who computes it (`surefoot.core.pool`). Arms are stacks or whole systems; no method is known by name.

All arms share a seed's data and, for equal shapes, its initial weights and batch order: differences are paired.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surefoot.core.environment import environment
from surefoot.core.fingerprint import code_fingerprint
from surefoot.core.plan import Cells, Failure, Plan, TaskFactory, load_trial
from surefoot.core.pool import check_picklable, run_ray, run_workers, unfinished, work
from surefoot.core.store import Outcome, Store
from surefoot.core.task import Task
from surefoot.core.trial import Setup, Tier, Trial
from surefoot.core.verdicts import Arms, ClaimResult, judge_claims
from surefoot.errors import InvalidInput, check, check_at_least, check_choice

Progress = Callable[[int, int, str], None]  # (cells done, cells in all, which one was finished last)


@dataclass(frozen=True)
class TrialResult:
    """What a trial found. `arms[arm][metric]` holds one value per seed, NaN where that cell failed."""

    method: str
    tier: str  # "embedded", "standard" or "own"
    data: str
    seeds: tuple[int, ...]
    arms: Arms
    settings: Mapping[str, Mapping[str, Any]]  # what tuning chose
    claims: tuple[ClaimResult, ...]
    failures: tuple[Failure, ...]
    environment: Mapping[str, Any]
    notes: str = ""
    complete: bool = True  # False where only some arms were asked for

    def failed(self, arm: str, seed: int) -> bool:
        return any(failure.arm == arm and failure.seed in (None, seed) for failure in self.failures)


def run_trial(
    trial: Trial | str,
    *,
    tier: Tier = "embedded",
    seeds: int | Sequence[int] = 5,
    data: TaskFactory | None = None,
    data_dir: Path | str | None = None,
    workers: int = 1,
    ray_address: str | None = None,
    store: Path | str | None = None,
    progress: Progress | None = None,
    only_arms: Sequence[str] | None = None,
) -> TrialResult:
    """Run a trial, or what is left of it, and judge its claims.

    Finished cells are taken from the store (`$SUREFOOT_HOME/trials.db` or `~/.cache/surefoot/trials.db` unless named), failed
    ones are tried again: kill it whenever you like and call it again. `trial` is a `Trial`, "family/slug" or "file.py:NAME".
    `seeds` is a number (0, 1, ...) or the seeds themselves. `data(seed, data_dir) -> Task` replaces the tier's data; its arms
    and claims stay. `workers` > 1 spawns that many processes; `ray_address` ("auto", "local" or an address) uses Ray
    instead. `only_arms` runs some arms; claims about others are then inconclusive.
    """
    source = _by_name(trial)
    known = load_trial(source) if isinstance(source, str) else source
    check_choice("tier", tier, tuple(known.tiers))
    check_at_least("workers", workers, 1)
    setup = known.tiers[tier]
    for arm in only_arms or ():
        check_choice("only_arms", arm, tuple(setup.arms))
    arms = tuple(arm for arm in setup.arms if only_arms is None or arm in only_arms)
    numbers = _check_seeds(seeds, setup)
    folder = None if data_dir is None else Path(data_dir)
    first = (data or setup.task)(numbers[0], folder)  # absent or malformed data is one error, not one per cell
    data_name = "tier" if data is None else _data_name(first)  # the tier's own data are part of the code
    del first
    code = code_fingerprint(known)
    plan = Plan(source, tier, numbers, arms, data, folder, data_name, f"{code[:16]}/torch {torch.__version__}")
    with Store(store) as opened:
        _compute(plan, setup if data is None else plan.setup(), opened, workers, ray_address, progress)
        values, settings, failures = _collect(plan, opened)
    missing = {arm: f"Arm {arm} was not run." for arm in setup.arms if arm not in arms}
    missing |= {f.arm: f"Arm {f.arm} failed ({f.where}): {f.error}" for f in failures}
    return TrialResult(
        method=known.method,
        tier=tier if data is None else "own",
        data=data_name,
        seeds=numbers,
        arms=values,
        settings=settings,
        claims=judge_claims(setup.claims, values, numbers, missing),
        failures=tuple(failures),
        environment={**environment(), "code": code},
        notes=known.notes,
        complete=len(arms) == len(setup.arms),
    )


def _by_name(trial: Trial | str) -> Trial | str:
    """The name of a trial of the house, as other processes find it by name; any other trial as it is."""
    if isinstance(trial, str):
        return trial
    try:
        return trial.method if load_trial(trial.method) is trial else trial
    except InvalidInput:
        return trial


def _check_seeds(seeds: int | Sequence[int], setup: Setup) -> tuple[int, ...]:
    if isinstance(seeds, int):
        check_at_least("seeds", seeds, 1)
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(int(seed) for seed in seeds)
    check(0 < len(numbers) == len(set(numbers)), f"seeds must be distinct and at least one, got {seeds!r}.")
    shared = set(numbers) & set(setup.tuning_seeds)
    check(not shared, f"Seeds {sorted(shared)} are the trial's tuning seeds; take others.")
    return numbers


def _data_name(task: Task) -> str:
    """The user's data: the name alone would take other contents for the same data, so a digest stands with it."""
    from surefoot.datasets import check_task

    check_task(task)
    digest = hashlib.sha256()
    for split in (task.train, task.valid, task.test):
        for tensor in (split.x, split.y, split.true_y):
            if tensor is not None:
                digest.update(f"{tuple(tensor.shape)}".encode() + tensor.cpu().contiguous().numpy().tobytes())
    return f"{task.name}#{digest.hexdigest()[:12]}"


def _compute(
    plan: Plan, setup: Setup, store: Store, workers: int, ray_address: str | None, progress: Progress | None
) -> None:
    if workers > 1 or ray_address is not None:
        check_picklable(plan)
    store.retry([*plan.tuning(setup), *plan.possible_seed_cells(setup)])
    report = _Reporter(plan, setup, store, progress)
    report()
    if ray_address is not None:
        run_ray(plan, store, ray_address, report)
    elif workers > 1:
        run_workers(plan, store, workers, report)
    with closing(work(plan, store)) as steps:  # alone; or whatever the workers could not do
        for _ in steps:
            report()
    report()


class _Reporter:
    """Turns newly finished cells into progress calls, and counts them."""

    def __init__(self, plan: Plan, setup: Setup, store: Store, progress: Progress | None) -> None:
        self._plan, self._setup, self._store, self._progress = plan, setup, store, progress
        self._cells: Cells = plan.tuning(setup)
        self._total = len(self._cells) + len(plan.arms) * len(plan.seeds)
        self._tuned = False
        self._seen: set[Any] = set()

    def __call__(self) -> int:
        if not self._tuned and not unfinished(self._store, list(self._cells)):
            chosen, _ = self._plan.choose(self._setup, self._store)
            self._total -= (len(self._plan.arms) - len(chosen)) * len(self._plan.seeds)
            self._cells = {**self._cells, **self._plan.seed_cells(chosen)}
            self._tuned = True
        for cell, outcome in self._store.outcomes([cell for cell in self._cells if cell not in self._seen]).items():
            if outcome.status == "claimed":
                continue
            self._seen.add(cell)
            if self._progress is not None:
                what = f"{cell.arm}, {'tuning' if cell.phase == 'tuning' else f'seed {cell.seed}'}"
                what += " failed" if outcome.status == "failed" else ""
                self._progress(len(self._seen), self._total, what)
        return len(self._seen)


def _collect(plan: Plan, store: Store) -> tuple[dict[str, dict[str, list[float]]], dict[str, Any], list[Failure]]:
    """`arms[arm][metric]` over the seeds, the tuned settings, and what failed."""
    chosen, failures = plan.choose(plan.setup(), store)
    known = store.outcomes(list(plan.seed_cells(chosen)))
    arms: dict[str, dict[str, list[float]]] = {}
    for arm in plan.arms:
        rows: list[dict[str, float | None]] = []
        for seed in plan.seeds:
            outcome = known.get(plan.cell("seed", arm, chosen[arm], seed)) if arm in chosen else None
            rows.append(_row(outcome))
            if arm in chosen and not rows[-1]:
                error = outcome.error if outcome is not None and outcome.error else "It was not finished."
                failures.append(Failure(arm, f"seed {seed}", error, seed))
        metrics = dict.fromkeys((*itertools.chain.from_iterable(rows), "seconds", "peak_mb"))
        arms[arm] = {metric: [_number(row.get(metric)) for row in rows] for metric in metrics}
    return arms, chosen, failures


def _row(outcome: Outcome | None) -> dict[str, float | None]:
    if outcome is None or outcome.status != "done":
        return {}
    return {**(outcome.metrics or {}), "seconds": outcome.seconds, "peak_mb": outcome.peak_mb}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
