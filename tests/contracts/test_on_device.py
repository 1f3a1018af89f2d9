"""Away from the CPU: every treatment and instrument on a second device, and on CUDA where there is one."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from surefoot import catalog

NAMES = (
    [m.slug for m in catalog.methods() if m.treatment]
    + [f"instrument {i.slug}" for i in catalog.instruments()]
    + ["reconstruct"]
)


@cache
def complaints(*device: str) -> dict[str, str | None]:
    script = Path(__file__).parent / "on_device.py"
    done = subprocess.run([sys.executable, str(script), *device], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_on_a_second_device(name):
    assert complaints()[name] is None


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_on_cuda(name):
    assert complaints("cuda:0")[name] is None


STRAYS = {
    "a tensor of the CPU": ("torch.ones(3, device=d) + torch.ones(3)", "RuntimeError"),
    "an index into the CPU": ("torch.arange(3)[torch.tensor([0, 1], device=d)]", "RuntimeError"),
    "a generator of the CPU": ("torch.rand(3, generator=torch.Generator(), device=d)", "RuntimeError"),
    "a generator of the device": ("torch.rand(3, generator=torch.Generator(d))", "RuntimeError"),
    "numpy": ("torch.ones(3, device=d).numpy()", "TypeError"),
    "a number": ("(torch.ones(3, device=d) * torch.tensor(2.0)).sum().item()", "6.0"),
    "an index of the CPU": ("torch.arange(3, device=d)[torch.tensor([0, 2])].tolist()", "[0, 2]"),
    "a view written to": ("(lambda x: (x[:, 0].fill_(5), x.cpu().sum().item())[1])(torch.zeros(2, 2, device=d))", "10.0"),
    "a copy": ("torch.zeros(2).copy_(torch.ones(2, device=d)).sum().item()", "2.0"),
    "a gradient": ("(lambda w: (w.square().sum().backward(), w.grad.device == d)[1])(torch.ones(3, device=d).requires_grad_())", "True"),
}  # fmt: skip


@cache
def said() -> dict[str, str]:
    code = f"""
import json, os, torch
from surefoot.core.second_device import second_device
said = {{}}
with second_device() as d:
    for name, (line, _) in {STRAYS!r}.items():
        try:
            said[name] = str(eval(line))
        except Exception as error:
            said[name] = type(error).__name__
print(json.dumps(said), flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("what", STRAYS)
def test_the_second_device_refuses_what_a_gpu_refuses(what):
    assert said()[what] == STRAYS[what][1]
