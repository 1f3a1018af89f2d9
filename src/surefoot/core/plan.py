"""Which cells a trial consists of, and how any process finds the trial again: the part of a run that is data."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import itertools
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surefoot.core.store import Cell, Phase, Store, settings_key
from surefoot.core.task import Task
from surefoot.core.trial import Arm, Setup, Tier, Trial
from surefoot.errors import InvalidInput, check

TaskFactory = Callable[[int, Path | None], Task]
Cells = Mapping[Cell, dict[str, Any]]  # each cell with its settings, in the order in which to compute them


@dataclass(frozen=True)
class Failure:
    """A cell, or with `seed` None a whole arm, that gave no result."""

    arm: str
    where: str  # "seed 3", "tuning"
    error: str
    seed: int | None = None


def load_trial(method: str) -> Trial:
    """The trial of a "family/slug", or of a "file.py:NAME" of the user's own (whose code is then run)."""
    if ".py:" in method:
        return _load_from_file(method)
    family, _, slug = method.partition("/")
    check(bool(family and slug), f"A trial is named family/slug or file.py:NAME, got {method!r}.")
    name = f"surefoot.trials.{family}.{slug}".replace("-", "_")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # something that the trial imports is missing, and that is another sentence
        raise InvalidInput(f"There is no trial for {method!r}; `surefoot list` names the methods.") from error
    return _trial_in(module, "TRIAL", method)


def _load_from_file(source: str) -> Trial:
    file, _, attribute = source.rpartition(":")
    path = Path(file).expanduser().resolve()
    check(path.is_file(), f"{path} does not exist; name the file that holds the trial.")
    name = f"_surefoot_trial_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return _trial_in(sys.modules[name], attribute or "TRIAL", source)


def _trial_in(module: Any, attribute: str, source: str) -> Trial:
    trial = getattr(module, attribute, None)
    if not isinstance(trial, Trial):
        raise InvalidInput(f"{source!r} does not lead to a Trial: its module has no Trial named {attribute}.")
    return trial


def combinations(arm: Arm) -> list[dict[str, Any]]:
    """Every setting of an arm's grid, the last name varying fastest; one empty setting where there is no grid."""
    for name, values in arm.grid.items():
        check(len(values) > 0, f"The grid of {name} is empty; give it a value.")
    return [dict(zip(arm.grid, values, strict=True)) for values in itertools.product(*arm.grid.values())]


@dataclass(frozen=True)
class Plan:
    """What every process needs to know to compute any cell of a run. Small and picklable where `source` and `data` are."""

    source: Trial | str
    tier: Tier
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    data: TaskFactory | None
    data_dir: Path | None
    data_name: str
    code: str

    def trial(self) -> Trial:
        return self.source if isinstance(self.source, Trial) else load_trial(self.source)

    def setup(self) -> Setup:
        setup = self.trial().tiers[self.tier]
        return setup if self.data is None else replace(setup, task=self.data)

    def cell(self, phase: Phase, arm: str, settings: Mapping[str, Any], seed: int) -> Cell:
        method = self.trial().method
        return Cell(method, self.tier, self.data_name, self.code, phase, arm, settings_key(settings), seed)

    def tuning(self, setup: Setup) -> dict[Cell, dict[str, Any]]:
        """The cells of phase 1, with their settings. An arm with a single setting needs no tuning."""
        grids = {name: combinations(setup.arms[name]) for name in self.arms}
        return {
            self.cell("tuning", name, settings, seed): settings
            for name, grid in grids.items()
            for settings in (grid if len(grid) > 1 else ())
            for seed in setup.tuning_seeds
        }

    def choose(self, setup: Setup, store: Store) -> tuple[dict[str, dict[str, Any]], list[Failure]]:
        """The best setting of each arm by the finished tuning cells, and the arms that have none."""
        known, chosen, failures = store.outcomes(list(self.tuning(setup))), {}, []
        for name in self.arms:
            grid = combinations(setup.arms[name])
            if len(grid) == 1:
                chosen[name] = grid[0]
                continue
            best, error = -math.inf, f"No setting of its grid gave a finite {setup.tune_on}."
            for settings in grid:
                outcomes = [known[self.cell("tuning", name, settings, seed)] for seed in setup.tuning_seeds]
                error = next((outcome.error for outcome in outcomes if outcome.error), error)
                values = [(outcome.metrics or {}).get(setup.tune_on, math.nan) for outcome in outcomes]
                score = sum(values) / len(values) * (1 if setup.tune_better == "higher" else -1)
                if score > best:  # false for NaN: a failed setting cannot win
                    best, chosen[name] = score, settings
            if name not in chosen:
                failures.append(Failure(name, "tuning", error))
        return chosen, failures

    def possible_seed_cells(self, setup: Setup) -> list[Cell]:
        """The cells of phase 2, whatever tuning will choose."""
        grids = {name: combinations(setup.arms[name]) for name in self.arms}
        return [self.cell("seed", a, settings, s) for a, grid in grids.items() for settings in grid for s in self.seeds]

    def seed_cells(self, chosen: Mapping[str, dict[str, Any]]) -> dict[Cell, dict[str, Any]]:
        """The cells of phase 2, seed by seed, so that an interrupted run has whole pairs."""
        return {self.cell("seed", name, chosen[name], seed): chosen[name] for seed in self.seeds for name in chosen}
