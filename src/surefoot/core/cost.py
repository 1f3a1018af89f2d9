"""What a piece of work took: wall time and peak memory."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from types import TracebackType

import torch

from surefoot.core.finding import Cost


class Meter:
    """`with Meter() as meter: ...`, then `meter.cost`: seconds, and the peak memory of the process meanwhile in MB.

    On Linux the kernel's high-water mark is reset at entry, so the peak is that of the block (the memory the process held
    already included); elsewhere it is the peak since the process began. On CUDA the allocator's peak counts.
    """

    def __enter__(self) -> Meter:
        _reset_peak()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._start = time.perf_counter()
        self.cost = Cost()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._start
        peak = peak_mb()
        if torch.cuda.is_available():
            peak = max(peak, torch.cuda.max_memory_allocated() / 2**20)
        self.cost = Cost(seconds, None if math.isnan(peak) else round(peak, 1))


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_mb() -> float:
    """The process's peak resident memory in MB since the last reset."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024
