"""Who computes the cells: this process, worker processes that pull from the store, or tasks on a Ray cluster."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from surefoot.core.cell import Measured, describe, run_cell
from surefoot.core.plan import Cells, Plan
from surefoot.core.store import MAX_DEATHS, Cell, Claim, Store
from surefoot.core.trial import Setup
from surefoot.errors import InvalidInput, MissingExtra

POLL = 0.1  # seconds between looks at the store while others work
Report = Callable[[], int]  # tells the caller's progress display; how many cells are finished
_log = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------------- pulling


def work(plan: Plan, store: Store, stop: Callable[[], bool] = lambda: False) -> Generator[None, None, None]:
    """Both phases, pulled cell by cell; yields after each, and while it waits for cells that others hold."""
    setup = plan.setup()
    yield from _pull(plan, setup, plan.tuning(setup), store, stop)
    if not stop():
        chosen, _ = plan.choose(setup, store)
        yield from _pull(plan, setup, plan.seed_cells(chosen), store, stop)


def _pull(
    plan: Plan, setup: Setup, cells: Cells, store: Store, stop: Callable[[], bool]
) -> Generator[None, None, None]:
    order = list(cells)
    while not stop():
        claim = store.claim(order)
        if claim is not None:
            _settle(plan, setup, claim, cells[claim.cell], store)
        elif unfinished(store, order):
            time.sleep(POLL)
        else:
            return
        yield


def _settle(plan: Plan, setup: Setup, claim: Claim, settings: dict[str, Any], store: Store) -> None:
    cell = claim.cell
    try:
        measured = run_cell(setup, setup.arms[cell.arm], settings, cell.seed, cell.phase, plan.data_dir)
    except (Exception, SystemExit) as error:
        _log.info("%s, arm %s, seed %d failed", cell.method, cell.arm, cell.seed, exc_info=True)
        store.fail(claim, describe(error))
    except BaseException:  # Ctrl-C: nobody need wait for this cell
        store.release(claim)
        raise
    else:
        store.finish(claim, measured.metrics, measured.seconds, measured.peak_mb)


def unfinished(store: Store, cells: Sequence[Cell]) -> list[Cell]:
    known = store.outcomes(cells)
    return [cell for cell in cells if cell not in known or known[cell].status == "claimed"]


# ---------------------------------------------------------------------------------------------------- worker processes


def check_picklable(plan: Plan) -> None:
    try:
        pickle.dumps(plan)
    except Exception as error:
        raise InvalidInput(
            "Other processes must be able to import the trial and its data: name the trial as family/slug or file.py:NAME, "
            f"and give data as a function of a module ({error})."
        ) from error


def run_workers(plan: Plan, store: Store, workers: int, report: Report) -> None:
    """Spawned processes pull cells. One that was killed is replaced; the store fails a cell that kills again and again."""
    context = torch.multiprocessing.get_context("spawn")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // workers)

    def start() -> Any:
        process = context.Process(target=_worker, args=(plan, store.path, threads, os.getpid()))
        with _threads_for_children(threads):
            process.start()
        return process

    processes = [start() for _ in range(workers)]
    finished, deaths = report(), 0
    try:
        while any(process.is_alive() for process in processes):
            time.sleep(POLL)
            finished, before = report(), finished
            deaths = 0 if finished > before else deaths
            for place, process in enumerate(processes):
                killed = process.exitcode is not None and process.exitcode < 0
                if (
                    killed and deaths < MAX_DEATHS * workers
                ):  # more without progress: they die before they get to a cell
                    processes[place] = start()
                    deaths += 1
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _worker(plan: Plan, path: Path, threads: int, parent: int) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # told to stop: give the cell back first
    with suppress(KeyboardInterrupt), Store(path) as store:
        for _ in work(plan, store, stop=lambda: os.getppid() != parent):  # an orphan stops after its cell
            pass


@contextmanager
def _threads_for_children(threads: int) -> Iterator[None]:
    """A child's thread pools are sized by its environment at the moment it imports its libraries."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


# ---------------------------------------------------------------------------------------------------- Ray


def run_ray(plan: Plan, store: Store, address: str, report: Report) -> None:
    """The same cells as Ray tasks of one CPU each. Only this process touches the store, so it need not be shared."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("ray", "cluster") from error
    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    try:
        setup = plan.setup()
        task = ray.remote(max_retries=0)(_ray_cell)
        slots = max(1, int(ray.cluster_resources().get("CPU", 1)))
        _drive_ray(ray, task, slots, plan, plan.tuning(setup), store, report)
        chosen, _ = plan.choose(setup, store)
        _drive_ray(ray, task, slots, plan, plan.seed_cells(chosen), store, report)
    finally:
        if ours:
            ray.shutdown()


def _ray_cell(plan: Plan, cell: Cell, settings: dict[str, Any]) -> Measured | str:
    """Runs on the cluster. An error comes back as its sentence."""
    torch.set_num_threads(1)  # a task holds one CPU
    try:
        setup = plan.setup()
        return run_cell(setup, setup.arms[cell.arm], settings, cell.seed, cell.phase, plan.data_dir)
    except (Exception, SystemExit) as error:
        return describe(error)


def _drive_ray(ray: Any, task: Any, slots: int, plan: Plan, cells: Cells, store: Store, report: Report) -> None:
    flying: dict[Any, Claim] = {}
    order = list(cells)
    try:
        while True:
            while len(flying) < slots and (claim := store.claim(order)) is not None:
                flying[task.remote(plan, claim.cell, cells[claim.cell])] = claim
            if not flying and not unfinished(store, order):
                return
            if not flying:
                time.sleep(POLL)
            for ready in ray.wait(list(flying), timeout=POLL)[0] if flying else ():
                try:
                    answer = ray.get(ready)
                except Exception as error:  # the task's process or its machine was lost
                    answer = describe(error)
                claim = flying.pop(ready)
                if isinstance(answer, str):
                    store.fail(claim, answer)
                else:
                    store.finish(claim, answer.metrics, answer.seconds, answer.peak_mb)
            report()
    finally:
        for reference, claim in flying.items():
            ray.cancel(reference, force=True)
            store.release(claim)
