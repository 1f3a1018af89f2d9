"""Nothing prints from the library: HiGHS has a banner of its own, which complete verification and specifications must not let out."""

import subprocess
import sys

PROGRAM = """
import torch
from surefoot.nn.bounds import decide_margins
torch.manual_seed(1)
net = torch.nn.Sequential(torch.nn.Linear(3, 12), torch.nn.ReLU(), torch.nn.Linear(12, 12), torch.nn.ReLU(), torch.nn.Linear(12, 3))
x = torch.rand(1, 3)
for eps in (0.05, 0.2, 0.5, 1.0):
    decide_margins(net, x - eps, x + eps, int(net(x).argmax()))
import sys
sys.exit(0 if "highspy" in sys.modules else 3)
"""


INTEGERS = """
import numpy, scipy.optimize
scipy.optimize.milp(numpy.ones(3), integrality=numpy.ones(3), bounds=scipy.optimize.Bounds(0.5, 3))
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)


def test_complete_verification_is_silent():
    found = run(PROGRAM)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_the_integer_programme_of_bit_allocation_is_silent():
    found = run(INTEGERS)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_the_banner_is_real():
    """Otherwise the test above could not fail: the plain constructor does print, from HiGHS 1.16 on."""
    from importlib.metadata import version

    if tuple(map(int, version("highspy").split(".")[:2])) >= (1, 16):
        assert "HiGHS" in run("import highspy; highspy.Highs()").stdout
