"""PiSSA's decomposition side by side with peft's, at equal or better reconstruction error.

Run `python benchmarks/bench_pissa.py [--large]`. Both sides do the whole start of one linear layer: factors, residual, installation.
`quality` gives the excess of |W_res| over the optimum of the exact SVD, ours and the peer's: a faster start
with a larger excess is no win. Only the start itself is timed, not the copy of the weight; medians of 15 runs in turn (the exact peer:
one).
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from _timing import memory_mb
from surefoot.peft.pissa import apply_pissa_

REPEATS = 15


def spectrum(m: int, n: int, power: float) -> Tensor:
    """An m x n weight (m >= n) with singular values i^-power and random directions."""
    generator = torch.Generator().manual_seed(n)
    u, v = (torch.linalg.qr(torch.randn(side, n, generator=generator)).Q for side in (m, n))
    return (u * torch.arange(1, n + 1).float() ** -power) @ v.T


def holder(weight: Tensor) -> nn.Sequential:
    m, n = weight.shape
    model = nn.Sequential(nn.Linear(n, m, bias=False, device="meta"))
    model[0].weight = nn.Parameter(weight.clone())
    return model


def ours(weight: Tensor, rank: int, niter: int | None) -> tuple[float, Tensor]:
    model: Any = holder(weight)
    start = time.process_time()
    apply_pissa_(model, rank, niter=niter)
    return time.process_time() - start, model[0].base.weight.detach()


def peer(weight: Tensor, rank: int, start_name: str) -> tuple[float, Tensor]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=start_name)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = holder(weight)
    start = time.process_time()
    adapted: Any = get_peft_model(model, config)
    return time.process_time() - start, adapted.base_model.model[0].base_layer.weight.detach()


def median(calls: list[Callable[[], tuple[float, Tensor]]], repeats: int) -> list[tuple[float, float]]:
    """Median seconds and |W_res| of each call, in turn."""
    runs = [[(s, residual.norm().item()) for s, residual in (call() for call in calls)] for _ in range(repeats)]
    return [tuple(map(statistics.median, zip(*column, strict=True))) for column in zip(*runs, strict=True)]  # type: ignore[misc]


def case(m: int, n: int, rank: int, power: float, name: str, niter: int | None) -> dict[str, Any]:
    weight, tail = spectrum(m, n, power), (torch.arange(rank + 1, n + 1).double() ** -power).norm().item()
    installed = importlib.util.find_spec("peft") is not None
    calls: list[Callable[[], tuple[float, Tensor]]] = [lambda: ours(weight, rank, niter)]
    if installed:
        calls.append(lambda: peer(weight, rank, name))
    timed = median(calls, REPEATS if name != "pissa" else 1)
    excess = ", ".join(f"{100 * (error / tail - 1):.2f} %" for _, error in timed)
    peer_s = timed[1][0] if installed else None
    grown = [memory_mb(call) for call in calls]
    row = {
        "what": f"start of a {m} x {n} layer, rank {rank}, spectrum i^-{power}, ours with niter={niter}", "ours_s": timed[0][0],
        "peer": f"peft {name}", "peer_s": peer_s, "ratio": None if peer_s is None else timed[0][0] / peer_s,
        "quality": f"excess error {excess} (ours, peer)", "ours_mb": grown[0], "peer_mb": grown[1] if installed else None,
    }  # fmt: skip
    return row if installed else {**row, "note": "peft is not installed"}


def rows(*, large: bool = False) -> list[dict[str, Any]]:
    result = []
    for m, n in ((1024, 1024), (4096, 1024), *([(4096, 4096)] if large else [])):
        result += [case(m, n, rank, power, "pissa_niter_4", 2) for rank in (16, 64, 128) for power in (1.0, 0.5)]
        result.append(case(m, n, 128, 1.0, "pissa", 4))
    return result


if __name__ == "__main__":
    for row in rows(large="--large" in sys.argv):
        print(row)
