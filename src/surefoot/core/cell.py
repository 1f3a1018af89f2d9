"""One cell of a trial: one arm with one setting on one seed, trained, measured and metered."""

from __future__ import annotations

import ctypes
import gc
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surefoot.core.cost import Meter
from surefoot.core.store import Phase
from surefoot.core.task import Task
from surefoot.core.trial import Arm, Metrics, Setup, Stack
from surefoot.errors import InvalidInput, SurefootError
from surefoot.training.loop import fit


@dataclass(frozen=True)
class Measured:
    metrics: dict[str, float]
    seconds: float
    peak_mb: float | None  # of the GPU where the task is on one, else resident memory of the process


def run_cell(
    setup: Setup, arm: Arm, settings: Mapping[str, Any], seed: int, phase: Phase, data_dir: Path | None
) -> Measured:
    """Compute one cell. Its time and memory count from when the data are there."""
    task = setup.task(seed, data_dir).changed(seed=seed)
    task = task.for_tuning() if phase == "tuning" else task
    on_gpu = task.device.type == "cuda"
    _trim_heap()
    with torch.random.fork_rng([task.device] if on_gpu else []), Meter() as meter:
        torch.manual_seed(seed)  # no code of ours draws from the global generator; a user's model might
        if arm.system:
            metrics: Metrics = arm.run(task, task.generator("system"), **settings)
        else:
            metrics = _run_stack(setup, arm.run(**settings), task)
    peak = torch.cuda.max_memory_allocated(task.device) / 2**20 if on_gpu else meter.cost.peak_mb
    if meter.cost.seconds > 1.0:  # drop what cycles keep alive; a full collection costs 0.1 s, too much for tiny cells
        gc.collect()
    numbers = {str(name): float(value) for name, value in metrics.items()}
    if phase == "tuning" and setup.tune_on not in numbers:
        raise InvalidInput(f"The arm gives no {setup.tune_on}, on which it is tuned; it gives {', '.join(numbers)}.")
    return Measured(numbers, meter.cost.seconds, peak)


def _run_stack(setup: Setup, stack: Stack, task: Task) -> Metrics:
    if setup.model is None or setup.measure is None:
        raise InvalidInput("A stack arm needs Setup.model and Setup.measure; give both or make it a system arm.")
    model = setup.model(task, task.generator("model"))
    return setup.measure(fit(model, task, stack.training, stack.treatments, on_epoch=setup.on_epoch))


def _trim_heap() -> None:
    """Give freed memory back to the system, so that a small cell after a big one does not inherit its peak (glibc)."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def describe(error: BaseException) -> str:
    """One sentence for the record: a clear error as it is, a bug with its place."""
    if isinstance(error, SurefootError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
