"""The store: claims, takeovers, and many processes at once."""

import math
import multiprocessing as mp
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from surefoot.core import store as store_module
from surefoot.core.store import Cell, Store, default_path, process_start, settings_key, this_process
from surefoot.errors import InvalidInput

CELL = Cell("family/slug", "embedded", "digits", "abc", "seed", "control", "{}", 0)
CELLS = [replace(CELL, seed=seed) for seed in range(6)]


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "trials.db") as opened:
        yield opened


def test_a_cell_is_claimed_once_and_kept(store):
    claim = store.claim(CELLS[:1])
    assert claim.cell == CELLS[0]
    assert store.claim(CELLS[:1]) is None  # its owner, this process, lives
    assert store.finish(claim, {"accuracy": 0.1 + 0.2, "odd": math.inf}, 1.5, 300.0)
    assert not store.finish(claim, {"accuracy": 0.0}, 9.0, 9.0)  # nothing is counted twice
    outcome = store.outcomes(CELLS)[CELLS[0]]
    assert outcome.metrics == {"accuracy": 0.1 + 0.2, "odd": math.inf}  # bit for bit
    assert (outcome.status, outcome.seconds, outcome.peak_mb) == ("done", 1.5, 300.0)
    assert store.claim(CELLS[:1]) is None
    store.retry(CELLS)
    assert store.outcomes(CELLS)[CELLS[0]] == outcome


@pytest.mark.parametrize("field", ["method", "tier", "data", "code", "phase", "arm", "settings", "seed"])
def test_every_part_of_the_key_counts(store, field):
    store.finish(store.claim([CELL]), {"accuracy": 1.0}, 0.0, None)
    assert store.claim([replace(CELL, **{field: 7 if field == "seed" else "other"})]) is not None


def test_failures_are_kept_until_retried_and_releases_forgotten(store):
    claim = store.claim([CELL])
    store.fail(claim, "ValueError: no")
    assert store.outcomes([CELL])[CELL].error == "ValueError: no"
    assert store.claim([CELL]) is None
    store.retry([CELL])
    again = store.claim([CELL])
    store.release(claim)  # an old claim has no power over a new one
    assert store.outcomes([CELL])[CELL].status == "claimed"
    store.release(again)
    assert store.outcomes([CELL]) == {}


def claim_in_another_process(path):
    """A process that claims CELL and is killed with SIGKILL."""
    code = (
        "import sys, time; sys.path[:0] = [sys.argv[2]]\n"
        "from surefoot.core.store import Cell, Store\n"
        "store = Store(sys.argv[1]); claim = store.claim([Cell('family/slug', 'embedded', 'digits', 'abc', 'seed', 'control', '{}', 0)])\n"
        "print(claim.token, flush=True); time.sleep(60)\n"
    )
    source = str(Path(store_module.__file__).parents[2])
    child = subprocess.Popen([sys.executable, "-c", code, str(path), source], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    token = child.stdout.readline().strip()
    return child, token


def test_a_killed_process_loses_its_claim_and_a_living_one_keeps_it(store):
    child, token = claim_in_another_process(store.path)
    try:
        assert store.outcomes([CELL])[CELL].status == "claimed"
        assert store.claim([CELL]) is None
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    mine = store.claim([CELL])
    assert mine is not None
    assert not store.finish(store_module.Claim(CELL, token), {"accuracy": 0.0}, 0.0, None)  # the late result is refused
    assert store.finish(mine, {"accuracy": 1.0}, 0.0, None)


def test_a_zombie_is_dead(store):
    child, _ = claim_in_another_process(store.path)
    child.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while process_start(child.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.claim([CELL]) is not None  # not yet waited for, still in the process table
    child.wait()


def test_a_reused_pid_does_not_pass_for_the_owner(store, monkeypatch):
    owner = this_process()
    monkeypatch.setattr(store_module, "this_process", lambda: replace(owner, started="an earlier boot/123"))
    assert store.claim([CELL]) is not None
    monkeypatch.undo()
    assert store.claim([CELL]) is not None  # same pid, alive, but started at another time


def test_a_cell_that_kills_its_processes_is_failed(store, monkeypatch):
    owner = this_process()
    monkeypatch.setattr(store_module, "this_process", lambda: replace(owner, started="dead"))
    for _ in range(store_module.MAX_DEATHS):
        assert store.claim([CELL]) is not None
    assert store.claim([CELL]) is None
    assert "died 3 times" in store.outcomes([CELL])[CELL].error
    store.retry([CELL])
    assert store.claim([CELL]) is not None


def test_a_foreign_claim_lapses(store, monkeypatch):
    owner = this_process()
    monkeypatch.setattr(store_module, "this_process", lambda: replace(owner, host="elsewhere"))
    assert store.claim([CELL]) is not None
    assert store.claim([CELL]) is None
    monkeypatch.setattr(store_module, "FOREIGN_PATIENCE", 0.0)
    assert store.claim([CELL]) is not None


def pull(path, cells, log):
    with Store(path) as store:
        while (claim := store.claim(cells)) is not None:
            with open(log, "a") as file:
                file.write(f"{claim.cell.seed}\n")
            assert store.finish(claim, {"seed": claim.cell.seed}, 0.0, None)


def test_processes_share_the_cells(tmp_path):
    cells = [replace(CELL, seed=seed) for seed in range(60)]
    context = mp.get_context("fork" if sys.platform == "linux" else "spawn")
    pullers = [context.Process(target=pull, args=(tmp_path / "s.db", cells, tmp_path / "log")) for _ in range(4)]
    for process in pullers:
        process.start()
    for process in pullers:
        process.join()
    assert [process.exitcode for process in pullers] == [0] * 4
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(60))
    with Store(tmp_path / "s.db") as store:
        found = {cell.seed: (outcome.metrics or {})["seed"] for cell, outcome in store.outcomes(cells).items()}
        assert found == {seed: float(seed) for seed in range(60)}


def test_a_transaction_that_fails_leaves_nothing(store):
    def interrupted():
        with store._transaction():
            store._take(CELL, 0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert store.outcomes([CELL]) == {}


def test_files_that_are_no_store_are_named(tmp_path):
    (tmp_path / "notes.db").write_text("hello, I am a text file and long enough to be looked at" * 20)
    with pytest.raises(InvalidInput, match=r"notes\.db cannot be used as a trial store"):
        Store(tmp_path / "notes.db")
    with sqlite3.connect(tmp_path / "new.db") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(InvalidInput, match="layout 99"):
        Store(tmp_path / "new.db")
    with pytest.raises(InvalidInput, match="trial store"):
        Store(tmp_path / "notes.db" / "below")


def test_default_path_and_settings_key(monkeypatch, tmp_path):
    monkeypatch.setenv("SUREFOOT_HOME", str(tmp_path))
    assert default_path() == tmp_path / "trials.db"
    monkeypatch.delenv("SUREFOOT_HOME")
    assert default_path() == Path.home() / ".cache" / "surefoot" / "trials.db"
    assert settings_key({"b": 1, "a": (1, 2)}) == settings_key({"a": [1, 2], "b": 1}) == '{"a":[1,2],"b":1}'
    assert process_start(os.getpid()) == this_process().started
