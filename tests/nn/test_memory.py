"""Memory that a loop frees stays with the process, so that its next turn takes few fresh pages."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from surefoot.nn.memory import keep_freed_memory

def turn():
    kept = [torch.ones(1 << 19) for _ in range(27)]  # 2 MB each
    del kept

if sys.argv[1] == "keep":
    keep_freed_memory()
turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks to glibc")
def test_the_second_turn_of_a_loop_takes_less_than_half_of_the_fresh_pages():
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True).stdout)
        for way in ("plain", "keep")
    )
    assert kept < plain / 2
