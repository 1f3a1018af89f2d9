"""How the benchmarks time: one thread, its processor time, the sides in turn, so that a busy machine is unfair to none.

A repeat is a block in which the sides alternate, A B A B ..., until each has run for some 50 ms; its number for a side is the block's
median, and the median of five blocks is what counts. Two calls of one millisecond each can be told apart that way.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from surefoot.core.cost import Meter

Row = dict[str, Any]
REPEATS, BLOCK, MOST = 5, 0.05, 30  # blocks, seconds a block, calls a block


def in_turn(*calls: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    """Median seconds of processor time of each call, after two untimed ones."""
    slowest = max(min(seconds(call), seconds(call)) for call in calls)
    length = min(MOST, max(1, math.ceil(BLOCK / max(slowest, 1e-6))))
    blocks = [_block(calls, length) for _ in range(repeats)]
    return [statistics.median(side) for side in zip(*blocks, strict=True)]


def seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _block(calls: Sequence[Callable[[], Any]], length: int) -> list[float]:
    taken = [[seconds(call) for call in calls] for _ in range(length)]
    return [statistics.median(side) for side in zip(*taken, strict=True)]


def timed(*calls: Callable[[], Any]) -> list[tuple[float, Any]]:
    """Median seconds of each call and what it gave."""
    given = [call() for call in calls]
    return list(zip(in_turn(*calls), given, strict=True))


def row(
    what: str, ours: float, peer: str, theirs: float | None, quality: str, note: str = "", *, ours_mb: float | None = None, peer_mb: float | None = None
) -> Row:  # fmt: skip
    """What `run.py` prints and keeps; `ratio` below 1 is faster than the peer."""
    entry = {"what": what, "ours_s": ours, "peer": peer, "peer_s": theirs, "ratio": None if theirs is None else ours / theirs, "quality": quality, "ours_mb": ours_mb, "peer_mb": peer_mb}  # fmt: skip
    return entry | ({"note": note} if note else {})


def memory_mb(call: Callable[[], Any]) -> float:
    """What one call adds to the resident memory of the process, at its peak.

    Memory that earlier calls freed is given back first: the allocator keeps it, and a call that fits into it would seem to need none.
    """
    gc.collect()
    with suppress(AttributeError, OSError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    with Meter() as idle:
        pass
    with Meter() as meter:
        call()
    return max((meter.cost.peak_mb or 0.0) - (idle.cost.peak_mb or 0.0), 0.0)
