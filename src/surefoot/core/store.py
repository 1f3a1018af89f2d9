"""The store of trial cells: one SQLite file in which every (arm, settings, seed) is claimed, computed once, and kept.

A cell is absent, *claimed* by a living process, *done* or *failed*. Each change is one immediate transaction, so any number
of processes and trials may share the file, and a process killed at any instant leaves either its claim or its result.
A claim carries its owner (host, pid, start time of that process): a dead owner's claim is taken over, and a new process
that got the same pid does not pass for the old one. A result is accepted only from the claim that is in the row,
so nothing is counted twice. This module does not import torch.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import sqlite3
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from surefoot.errors import InvalidInput

Phase = Literal["tuning", "seed"]
Status = Literal["claimed", "done", "failed"]

VERSION = 1  # of the table's layout
MAX_DEATHS = 3  # a cell that has killed that many processes within one run is failed, not tried for ever
FOREIGN_PATIENCE = 3600.0  # seconds: whether a process of another host lives cannot be seen, so its claim lapses


@dataclass(frozen=True)
class Cell:
    """The key of one computation. `settings` is canonical JSON (`settings_key`); `code` the fingerprint of the sources."""

    method: str
    tier: str
    data: str
    code: str
    phase: Phase
    arm: str
    settings: str
    seed: int


@dataclass(frozen=True)
class Claim:
    """The right to compute a cell; `token` tells this claim from any later one."""

    cell: Cell
    token: str


@dataclass(frozen=True)
class Outcome:
    status: Status
    metrics: Mapping[str, float] | None = None
    seconds: float | None = None
    peak_mb: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Owner:
    host: str
    pid: int
    started: str  # boot and clock ticks on Linux; never compared but for equality


def settings_key(settings: Mapping[str, Any]) -> str:
    return json.dumps(dict(settings), sort_keys=True, separators=(",", ":"), default=str)


def default_path() -> Path:
    home = os.environ.get("SUREFOOT_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "surefoot") / "trials.db"


def this_process() -> Owner:
    return Owner(platform.node(), os.getpid(), process_start(os.getpid()) or "unknown")


def process_start(pid: int) -> str | None:
    """When that process of this machine started, as an opaque string; None where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None if Path("/proc/self/stat").exists() else _process_start_by_ps(pid)
    state, *rest = stat.rpartition(")")[2].split()  # the command's name may hold spaces and parentheses
    return None if state in "ZX" else f"{_boot()}/{rest[18]}"


def _process_start_by_ps(pid: int) -> str | None:  # macOS and other systems without /proc
    answer = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


@cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


_KEY = tuple(field.name for field in fields(Cell))
_WHERE = " AND ".join(f"{name} = ?" for name in _KEY)
_TABLE = f"""
CREATE TABLE IF NOT EXISTS cells (
    method TEXT NOT NULL, tier TEXT NOT NULL, data TEXT NOT NULL, code TEXT NOT NULL, phase TEXT NOT NULL,
    arm TEXT NOT NULL, settings TEXT NOT NULL, seed INTEGER NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('claimed', 'done', 'failed')),
    metrics TEXT, seconds REAL, peak_mb REAL, error TEXT,
    host TEXT NOT NULL, pid INTEGER NOT NULL, started TEXT NOT NULL, token TEXT NOT NULL,
    deaths INTEGER NOT NULL DEFAULT 0, changed REAL NOT NULL,
    PRIMARY KEY ({", ".join(_KEY)})
) WITHOUT ROWID
"""


class Store:
    """An open store. Cheap to open; one per process (never carry one through a fork)."""

    def __init__(self, path: Path | str | None = None, *, busy_timeout: float = 60.0) -> None:
        self.path = Path(path) if path is not None else default_path()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=busy_timeout, isolation_level=None)
            self._use_wal(busy_timeout)
            self._db.execute("PRAGMA synchronous = FULL")  # what was reported as done survives a power cut
            with self._transaction():
                version = self._db.execute("PRAGMA user_version").fetchone()[0]
                if version not in (0, VERSION):
                    raise InvalidInput(
                        f"{self.path} is a trial store of layout {version}, not {VERSION}; name another."
                    )
                self._db.execute(_TABLE)
                self._db.execute(f"PRAGMA user_version = {VERSION}")
        except (sqlite3.DatabaseError, OSError) as error:
            raise InvalidInput(f"{self.path} cannot be used as a trial store ({error}); name another file.") from error

    def _use_wal(self, patience: float) -> None:
        """Switching a new file to WAL ignores the busy timeout, so two processes that create one store must retry."""
        deadline = time.monotonic() + patience
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.005)

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")  # writers queue here, before they have read anything
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def claim(self, cells: Sequence[Cell]) -> Claim | None:
        """Claim the first cell that is neither finished nor in the hands of a living process; None where there is none."""
        with self._transaction():
            for cell in cells:
                row = self._db.execute(
                    f"SELECT status, host, pid, started, deaths, changed FROM cells WHERE {_WHERE}", astuple(cell)
                ).fetchone()
                if row is None:
                    return self._take(cell, deaths=0)
                status, host, pid, started, deaths, changed = row
                if status != "claimed" or _alive(Owner(host, pid, started), changed):
                    continue
                if deaths + 1 < MAX_DEATHS:
                    return self._take(cell, deaths + 1)
                self._db.execute(
                    f"UPDATE cells SET status = 'failed', error = ?, changed = ? WHERE {_WHERE}",
                    (f"Its process died {MAX_DEATHS} times (out of memory?).", time.time(), *astuple(cell)),
                )
        return None

    def _take(self, cell: Cell, deaths: int) -> Claim:
        owner, token = this_process(), secrets.token_hex(8)
        self._db.execute(
            f"INSERT OR REPLACE INTO cells ({', '.join(_KEY)}, status, host, pid, started, token, deaths, changed) "
            f"VALUES ({', '.join('?' * len(_KEY))}, 'claimed', ?, ?, ?, ?, ?, ?)",
            (*astuple(cell), owner.host, owner.pid, owner.started, token, deaths, time.time()),
        )
        return Claim(cell, token)

    def finish(self, claim: Claim, metrics: Mapping[str, float], seconds: float, peak_mb: float | None) -> bool:
        """Record a result. False, and nothing changed, where the claim was taken over meanwhile."""
        text = json.dumps({name: float(value) for name, value in metrics.items()})  # repr of floats: exact both ways
        return self._settle(claim, "status = 'done', metrics = ?, seconds = ?, peak_mb = ?", (text, seconds, peak_mb))

    def fail(self, claim: Claim, error: str) -> bool:
        return self._settle(claim, "status = 'failed', error = ?", (error,))

    def _settle(self, claim: Claim, assignment: str, values: tuple[Any, ...]) -> bool:
        with self._transaction():
            done = self._db.execute(
                f"UPDATE cells SET {assignment}, changed = ? WHERE {_WHERE} AND status = 'claimed' AND token = ?",
                (*values, time.time(), *astuple(claim.cell), claim.token),
            )
        return done.rowcount == 1

    def release(self, claim: Claim) -> None:
        """Give a claim back unfinished, as after Ctrl-C."""
        with self._transaction():
            self._db.execute(
                f"DELETE FROM cells WHERE {_WHERE} AND status = 'claimed' AND token = ?",
                (*astuple(claim.cell), claim.token),
            )

    def retry(self, cells: Sequence[Cell]) -> None:
        """Before a new run: forget failures and dead claims among these cells, and with them how often they killed."""
        with self._transaction():
            for cell in cells:
                row = self._db.execute(
                    f"SELECT status, host, pid, started, changed FROM cells WHERE {_WHERE}", astuple(cell)
                ).fetchone()
                if row and (row[0] == "failed" or (row[0] == "claimed" and not _alive(Owner(*row[1:4]), row[4]))):
                    self._db.execute(f"DELETE FROM cells WHERE {_WHERE}", astuple(cell))

    def outcomes(self, cells: Sequence[Cell]) -> dict[Cell, Outcome]:
        """What is known of these cells; absent ones are left out."""
        found: dict[Cell, Outcome] = {}
        for cell in cells:
            row = self._db.execute(
                f"SELECT status, metrics, seconds, peak_mb, error FROM cells WHERE {_WHERE}", astuple(cell)
            ).fetchone()
            if row is not None:
                status, metrics, seconds, peak_mb, error = row
                found[cell] = Outcome(status, json.loads(metrics) if metrics else None, seconds, peak_mb, error)
        return found


def _alive(owner: Owner, changed: float) -> bool:
    if owner.host != platform.node():
        return time.time() - changed < FOREIGN_PATIENCE
    return process_start(owner.pid) == owner.started
