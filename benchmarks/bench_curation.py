"""Data diet and crop selection against the plain way of getting the same numbers, on one thread.

`rows()` gives one dictionary a comparison: seconds of ours and of the peer (processor time, median of five, in turns, so that a busy
machine does not count), their ratio, and how far the answers agree. Run as a script, it prints them.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from _timing import memory_mb
from surefoot.core.task import Split
from surefoot.curation.data_diet import el2n_scores, gradient_norms, loop_norms
from surefoot.shift.crop_selection import CropSelection, grey_levels, score_map

REPEATS = 5


def median_seconds(*calls: Callable[[], Any]) -> list[float]:
    """Median of five of each, taken in turns, so that a busy machine slows all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(REPEATS + 1):
        for call, kept in zip(calls, times, strict=True):
            start = time.process_time()
            call()
            if repeat:  # the first is to warm up
                kept.append(time.process_time() - start)
    return [statistics.median(kept) for kept in times]


def row(what: str, ours: Callable[[], Any], peer: str, theirs: Callable[[], Any] | None, quality: str, note: str = "") -> dict[str, Any]:  # fmt: skip
    ours_s, *rest = median_seconds(ours, *([] if theirs is None else [theirs]))
    memory = [memory_mb(call) for call in (ours, theirs) if call is not None]
    answer = {
        "what": what, "ours_s": ours_s, "peer": peer, "peer_s": rest[0] if rest else None, "ratio": ours_s / rest[0] if rest else None,
        "quality": quality, "ours_mb": memory[0], "peer_mb": memory[1] if rest else None,
    }  # fmt: skip
    return {**answer, "note": note} if note else answer


def cnn(side: int) -> nn.Module:
    """About 0.3 million parameters."""
    inner = side // 4
    width = 280_000 // (64 * inner * inner)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * inner * inner, width), nn.ReLU(), nn.Linear(width, 10),
    ).eval()  # fmt: skip


def images(n: int, *shape: int) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


def labels(n: int) -> Tensor:
    return torch.arange(n) % 10


def grand_rows() -> list[dict[str, Any]]:
    """The loop is linear in the number of examples, so that 500 of them stand for 10,000."""
    found = []
    for side in (8, 28):
        model, n = cnn(side), 500
        x, y = images(n, 1, side, side), labels(n)
        size = sum(p.numel() for p in model.parameters())
        ours, truth = gradient_norms(model, x, y, chunk_size=128), loop_norms(model, x, y)
        agreement = f"largest relative difference {float((ours / truth - 1).abs().max()):.1e}"
        found.append(
            row(
                f"full GraNd, {n} images {side}x{side}, {size:,} parameters",
                lambda model=model, x=x, y=y: gradient_norms(model, x, y, chunk_size=128),
                "loop of batch size 1 (autograd)",
                lambda model=model, x=x, y=y: loop_norms(model, x, y),
                agreement,
            )
        )
        plain = batched_backward(model, x, y)
        found.append(
            row(
                f"full GraNd, {n} images {side}x{side}: floor",
                lambda model=model, x=x, y=y: gradient_norms(model, x, y, chunk_size=128),
                "one batched backward pass (gives the mean gradient only)",
                plain,
                "not the same number",
                "what no exact method can beat by much",
            )
        )
    note = "" if find_spec("opacus") else "opacus is not installed"
    found.append(
        row(
            "full GraNd, 500 images 28x28",
            lambda: gradient_norms(model, x, y),
            "opacus",
            None,
            "",
            note or "not compared",
        )
    )
    return found


def batched_backward(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    def call() -> None:
        for a, b in zip(x.split(128), y.split(128), strict=True):
            torch.autograd.grad(nn.functional.cross_entropy(model(a), b), list(model.parameters()))

    return call


def el2n_row() -> dict[str, Any]:
    model, x, y = cnn(28), images(4000, 1, 28, 28), labels(4000)

    def inference() -> None:
        with torch.no_grad():
            for chunk in x.split(512):
                model(chunk)

    split = Split(x, y)
    return row(
        "EL2N, 4000 images 28x28", lambda: el2n_scores(model, split), "plain inference", inference, "one forward pass"
    )


def crop_rows() -> list[dict[str, Any]]:
    grey = grey_levels((images(1, 3, 224, 224) * 255).byte())
    crop = (186, 186)
    found = [
        row(
            "score map of one 224x224 image, all crops of 112",
            lambda: score_map(grey, (112, 112)),
            "none",
            None,
            "exact",
            "bar: 2 ms",
        ),
    ]
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
        nn.Conv2d(128, 256, 3, stride=2, padding=1), nn.BatchNorm2d(256), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10),
    ).eval()  # fmt: skip
    x = images(8, 3, 224, 224)
    native, resized = CropSelection(net, 224, crop), CropSelection(net, 224, crop, output_size=224)

    def forward(model: nn.Module) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                return model(x)

        return call

    for name, wrapped in (("as it is", native), ("resized to 224", resized)):
        found.append(
            row(
                f"CropSelection, 8 images, crop 186 {name}",
                forward(wrapped),
                "one plain forward at 224",
                forward(net),
                "same net",
            )
        )
    return found


def rows() -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*grand_rows(), el2n_row(), *crop_rows()]
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    for found in rows():
        sys.stdout.write(json.dumps(found) + "\n")
