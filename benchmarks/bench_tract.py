"""TrAct side by side with its authors' `torch_tract`: what a training step costs above plain SGD.

Run `python benchmarks/bench_tract.py`. `ours_s` and `peer_s` are the seconds a step takes *above* the plain step, the sides in turn
(`_timing.py`); `quality` gives the plain step and both overheads in percent. The tiny nets show the cost where it weighs most; the two
ResNet-18 (CIFAR form, and ImageNet form at 64 x 64) are of the size the paper's claim of a few percent is about.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from _timing import in_turn, memory_mb
from _timing import seconds as once
from surefoot.init.tract import apply_tract, tract_weight_grad
from surefoot.models import seeded_build, small_cnn, small_resnet


def stepper(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def stem7(channels: int) -> nn.Sequential:
    head = [nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]  # fmt: skip
    return nn.Sequential(nn.Conv2d(channels, 32, 7, stride=2, padding=3, bias=False), *head)


class Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.skip(x))


def resnet18(stem: nn.Module, *after: nn.Module) -> nn.Sequential:
    widths = (
        (64, 64, 1),
        (64, 64, 1),
        (64, 128, 2),
        (128, 128, 1),
        (128, 256, 2),
        (256, 256, 1),
        (256, 512, 2),
        (512, 512, 1),
    )
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(stem, nn.BatchNorm2d(64), nn.ReLU(), *after, *(Block(*w) for w in widths), *head)


def cifar_resnet18() -> nn.Sequential:
    return resnet18(nn.Conv2d(3, 64, 3, 1, 1, bias=False))


def imagenet_resnet18() -> nn.Sequential:
    return resnet18(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1))


CASES: tuple[tuple[str, Callable[[], nn.Module], tuple[int, ...]], ...] = (
    ("small CNN, 3x3 on 1x28x28, batch 64", lambda: small_cnn((1, 28, 28), 10), (64, 1, 28, 28)),
    ("small CNN, 3x3 on 3x32x32, batch 64", lambda: small_cnn((3, 32, 32), 10), (64, 3, 32, 32)),
    ("small ResNet, 3x3 on 3x32x32, batch 64", lambda: small_resnet((3, 32, 32), 10), (64, 3, 32, 32)),
    ("7x7 stem on 3x64x64, batch 32", lambda: stem7(3), (32, 3, 64, 64)),
    ("ResNet-18 of CIFAR form, 3x3 on 3x32x32, batch 16", cifar_resnet18, (16, 3, 32, 32)),
    ("ResNet-18 of ImageNet form, 7x7 on 3x64x64, batch 16", imagenet_resnet18, (16, 3, 64, 64)),
    ("MLP on 784 inputs, batch 128", lambda: nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)), (128, 784)),
)  # fmt: skip


def same_gradient(ours: nn.Module, peer: nn.Module) -> float:
    """Relative difference of the first layer's gradients after one backward pass from equal weights."""
    first, second = (next(model.parameters()).grad for model in (ours, peer))
    assert first is not None and second is not None
    return ((first - second).norm() / second.norm()).item()


def case(what: str, build: Callable[[], nn.Module], shape: tuple[int, ...]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    plain = seeded_build(build, generator)
    x, y = torch.randn(shape, generator=generator), torch.randint(10, shape[:1], generator=generator)
    ours = apply_tract(plain, layer="0")
    models, note = [plain, ours], ""
    if importlib.util.find_spec("torch_tract") is not None:
        import torch_tract  # type: ignore[import-not-found]

        peer = copy.deepcopy(plain)
        peer[0] = torch_tract.TrAct(peer[0])  # type: ignore[operator,index]
        models.append(peer)
        for model in (ours, peer):
            F.cross_entropy(model(x), y).backward()
        note = f"; first-layer gradients differ by {same_gradient(ours, peer):.1e}"
    steps = [stepper(model, x, y) for model in models]
    base, *with_tract = in_turn(*steps, repeats=3 if "ResNet-18" in what else 9)
    grown = [memory_mb(step) for step in steps[1:]]
    above = [max(t - base, 0.0) for t in with_tract]
    shares = " and ".join(f"{100 * a / base:.1f} %" for a in above)
    peer_s = above[1] if len(above) > 1 else None
    result = {
        "what": f"overhead of a step: {what}", "ours_s": above[0], "peer": "torch_tract", "peer_s": peer_s,
        "ratio": above[0] / peer_s if peer_s else None, "ours_mb": grown[0], "peer_mb": grown[1] if len(grown) > 1 else None,
        "quality": f"plain step {1e3 * base:.2f} ms; above it {shares} (ours, peer){note}",
    }  # fmt: skip
    return result if peer_s is not None else {**result, "note": "torch_tract is not installed"}


def formula() -> dict[str, Any]:
    """The linear formula alone on few rows: 64 rows of 3,072 numbers, where the N side is the cheap one."""
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(64, 3072, generator=generator), torch.randn(64, 256, generator=generator)
    naive = lambda: g.T @ x @ torch.linalg.inv(x.T @ x / 64 + 0.1 * torch.eye(3072))  # noqa: E731
    ours_s, naive_s = in_turn(lambda: tract_weight_grad(x, g))[0], once(naive)
    exact = tract_weight_grad(x.double(), g.double())
    error = ((tract_weight_grad(x, g).double() - exact).norm() / exact.norm()).item()
    other = ((naive().double() - exact).norm() / exact.norm()).item()
    return {
        "what": "weight gradient alone: 64 rows, 3,072 inputs", "ours_s": ours_s, "peer": "the n x n inverse", "peer_s": naive_s,
        "ratio": ours_s / naive_s, "quality": f"relative error {error:.1e} and {other:.1e}",
        "ours_mb": memory_mb(lambda: tract_weight_grad(x, g)), "peer_mb": memory_mb(naive),
    }  # fmt: skip


def rows() -> list[dict[str, Any]]:
    return [*(case(*c) for c in CASES), formula()]


if __name__ == "__main__":
    for row in rows():
        print(row)
