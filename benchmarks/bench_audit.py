"""The audit's promise: every certified and adversarial instrument on a CNN for MNIST within five minutes of two cores.

Needs `SUREFOOT_DATA`; without it there are no rows. One run, on the clock, as a person waits for it.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import save_file

from surefoot.core.subject import predict
from surefoot.core.task import Training
from surefoot.datasets.standard import mnist
from surefoot.models import seeded_build
from surefoot.training.loop import fit

FACTORY = """
from torch import nn


def net():
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 49, 100), nn.ReLU(), nn.Linear(100, 10)
    )
"""
WANTED = 300.0  # seconds


def rows() -> list[dict]:
    if not os.environ.get("SUREFOOT_DATA"):
        return []
    task = mnist(0, sizes=(10_000, 1000, 1000))
    table = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "nets.py").write_text(FACTORY)
        build = runpy.run_path(str(folder / "nets.py"))["net"]
        model = fit(seeded_build(build, task.generator("model")), task, Training(steps=400, lr=2e-3)).model
        right = float((predict(model, task.test.x).argmax(1) == task.test.labels).double().mean())
        save_file(model.state_dict(), folder / "net.safetensors")
        for budget in ("quick", "standard"):
            command = [
                sys.executable, "-m", "surefoot.cli", "audit", f"{folder / 'nets.py'}:net", "--weights", str(folder / "net.safetensors"), "--data", "mnist",
                "--only", "certified,adversarial", "--budget", budget, "--out", str(folder / budget),
            ]  # fmt: skip
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
            table.append(
                {"what": f"audit --only certified,adversarial --budget {budget}, MNIST, 4,804 ReLUs", "ours_s": time.perf_counter() - start,
                 "peer": "wanted", "peer_s": WANTED, "quality": f"accuracy {right:.3f}"}
            )  # fmt: skip
    return table
