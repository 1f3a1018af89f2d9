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
import numpy as np
from surefoot.quantization.layerwise_calibration import SensitivityTable, allocate_bits
bits = (2, 3, 4, 5, 6, 8)
for seed in range(3):
    rng = np.random.default_rng(seed)
    params = rng.integers(1000, 2_000_000, 200)
    scale = rng.lognormal(-3, 1.5, (200, 1)) * rng.lognormal(0, 0.3, (200, len(bits)))
    loss = np.maximum(scale * np.array([4.0 ** -(b - 2) for b in bits]), 1e-6)
    table = SensitivityTable(tuple(f"layer{i}" for i in range(200)), tuple((b, b) for b in bits), loss, params)
    allocate_bits(table, 0.13)
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
