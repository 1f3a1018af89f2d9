"""Memory that a loop frees stays with the process, so that its next turn takes no fresh pages."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from surefoot.nn.memory import keep_freed_memory

def turn():
    kept = [torch.ones(1 << 19) for _ in range(12)]  # 2 MB each
    del kept

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(5):  # the heap grows until a turn fits
    turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks to glibc")
def test_a_loop_that_frees_takes_no_fresh_pages():
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True).stdout)
        for way in ("plain", "keep")
    )
    assert kept < 100  # of 30,000 pages of 4 kB that five turns write
    assert plain > 10 * max(kept, 1)  # otherwise this machine's allocator needs no telling, and this test tells nothing
