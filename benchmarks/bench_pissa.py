"""PiSSA's decomposition side by side with peft's, at equal or better reconstruction error.

Run `python benchmarks/bench_pissa.py [--large]`. Both sides do the whole start of one linear layer: factors, residual, installation.
`quality` gives the excess of |W_res| over the optimum of the exact SVD, ours and the peer's: a faster start
with a larger excess is no win. Only the start itself is timed, not the copy of the weight; medians of 11 runs in turn (the exact peer:
one; the whole model: three).

Ours runs with the least niter that leaves no larger error than the peer's (`equal`), so that times are compared at equal reconstruction:
few iterations where the spectrum decays, more for flat ones (Gaussian noise). The exact peer meets niter=4.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from _timing import memory_mb
from surefoot.peft.pissa import apply_pissa_
from surefoot.trials.peft.pissa import minilm_weights

REPEATS = 11


def spectrum(m: int, n: int, power: float) -> Tensor:
    """An m x n weight (m >= n) with singular values i^-power and random directions."""
    return turned(m, torch.arange(1, n + 1).float() ** -power)


def turned(m: int, values: Tensor) -> Tensor:
    n, generator = len(values), torch.Generator().manual_seed(len(values))
    u, v = (torch.linalg.qr(torch.randn(side, n, generator=generator)).Q for side in (m, n))
    return (u * values) @ v.T


def others() -> Iterator[tuple[str, Tensor]]:
    """Weights of other kinds."""
    n, noise = 1024, torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1)) / 32
    yield "spectrum i^-0.25", spectrum(n, n, 0.25)
    yield "spectrum 0.99^i", turned(n, 0.99 ** torch.arange(n).float())
    low = turned(n, torch.cat([torch.linspace(10.0, 2.0, 40), torch.zeros(n - 40)]))
    yield "rank 40 and noise", low + noise
    yield "Gaussian", noise
    for name, weight in minilm_weights(3).items():
        if name.endswith("intermediate.dense.weight"):
            yield "trained (MiniLM)", weight


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


def for_peft(model: nn.Sequential, rank: int, start_name: Any) -> Any:
    """peft's configuration of its own start of all layers; its type for the name lists `pissa_niter_[number of iters]` literally."""
    from peft import LoraConfig

    names = [name for name, _ in model.named_children()]
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=names, init_lora_weights=start_name)


def peer(weight: Tensor, rank: int, start_name: str) -> tuple[float, Tensor]:
    from peft import get_peft_model

    torch.manual_seed(0)
    model: Any = holder(weight)
    config = for_peft(model, rank, start_name)
    start = time.process_time()
    adapted: Any = get_peft_model(model, config)
    return time.process_time() - start, adapted.base_model.model[0].base_layer.weight.detach()


def equal(mine: Callable[[int], tuple[float, Tensor]], theirs: Callable[[], tuple[float, Tensor]]) -> int:
    """The least niter with which ours leaves no larger error than the peer."""
    wanted = theirs()[1].norm()
    return next((niter for niter in (*range(5), 6, 8, 12) if mine(niter)[1].norm() <= wanted), 16)


def median(calls: list[Callable[[], tuple[float, Tensor]]], repeats: int) -> list[tuple[float, float]]:
    """Median seconds and |W_res| of each call, in turn."""
    runs = [[(s, residual.norm().item()) for s, residual in (call() for call in calls)] for _ in range(repeats)]
    return [tuple(map(statistics.median, zip(*column, strict=True))) for column in zip(*runs, strict=True)]  # type: ignore[misc]


def case(weight: Tensor, values: Tensor, kind: str, rank: int, name: str = "pissa_niter_4") -> dict[str, Any]:
    (m, n), tail = weight.shape, values[rank:].norm().item()
    niter, peers = 4, [lambda: peer(weight, rank, name)] if importlib.util.find_spec("peft") is not None else []
    if peers and name != "pissa":
        niter = equal(lambda k: ours(weight, rank, k), peers[0])
    calls: list[Callable[[], tuple[float, Tensor]]] = [lambda: ours(weight, rank, niter), *peers]
    timed = median(calls, REPEATS if name != "pissa" else 1)
    excess = ", ".join(f"{100 * (error / tail - 1):.2f} %" for _, error in timed)
    grown = [memory_mb(call) for call in calls]
    return summary(
        f"start of a {m} x {n} layer, rank {rank}, {kind}, ours with niter={niter}",
        timed,
        name,
        f"excess error {excess} (ours, peer)",
        grown,
    )


def best(weight: Tensor) -> Tensor:
    """The singular values, in double precision."""
    return torch.linalg.svdvals(weight.double())


def summary(what: str, timed: list[tuple[float, float]], name: str, quality: str, grown: list[float]) -> dict[str, Any]:
    entry = {
        "what": what, "ours_s": timed[0][0], "peer": f"peft {name}", "peer_s": timed[1][0] if len(timed) > 1 else None,
        "ratio": timed[0][0] / timed[1][0] if len(timed) > 1 else None,
        "quality": quality, "ours_mb": grown[0], "peer_mb": grown[1] if len(timed) > 1 else None,
    }  # fmt: skip
    return entry if len(timed) > 1 else {**entry, "note": "peft is not installed"}


def whole_model(rank: int) -> dict[str, Any]:
    """The 72 linear layers of a BERT-base: in each block four of 768 x 768 and two of 3072 x 768, spectrum i^-0.5."""
    kinds = [spectrum(768, 768, 0.5)] * 4 + [spectrum(3072, 768, 0.5), spectrum(3072, 768, 0.5).T.contiguous()]
    tails = [best(w)[rank:].square().sum().item() for w in kinds]

    def model() -> nn.Sequential:
        layers = [holder(w)[0] for _ in range(12) for w in kinds]
        return nn.Sequential(*layers)

    def start(begin: Callable[[nn.Sequential], list[Tensor]]) -> tuple[float, Tensor]:
        fresh = model()
        began = time.process_time()
        residuals = begin(fresh)
        return time.process_time() - began, torch.stack([w.norm() for w in residuals])

    def with_ours(fresh: Any) -> list[Tensor]:
        apply_pissa_(fresh, rank, niter=2)
        return [layer.base.weight.detach() for layer in fresh]

    def with_peer(fresh: Any) -> list[Tensor]:
        from peft import get_peft_model

        adapted: Any = get_peft_model(fresh, for_peft(fresh, rank, "pissa_niter_4"))
        return [layer.base_layer.weight.detach() for layer in adapted.base_model.model]

    sides = [with_ours, with_peer] if importlib.util.find_spec("peft") is not None else [with_ours]
    calls = [lambda side=side: start(side) for side in sides]
    timed, optimum = median(calls, 3), (12 * sum(tails)) ** 0.5
    excess = ", ".join(f"{100 * (error / optimum - 1):.2f} %" for _, error in timed)
    what = f"start of the 72 linear layers of a BERT-base, rank {rank}, spectrum i^-0.5, ours with niter=2"
    return summary(
        what, timed, "pissa_niter_4", f"excess error {excess} (ours, peer)", [memory_mb(call) for call in calls]
    )


def rows(*, large: bool = False) -> list[dict[str, Any]]:
    result = []
    for m, n in ((1024, 1024), (4096, 1024), *([(4096, 4096)] if large else [])):
        weights = {power: spectrum(m, n, power) for power in (1.0, 0.5)}
        values = {power: torch.arange(1, n + 1).double() ** -power for power in weights}
        for rank in (16, 64, 128):
            result += [case(w, values[p], f"spectrum i^-{p}", rank) for p, w in weights.items()]
        result.append(case(weights[1.0], values[1.0], "spectrum i^-1.0", 128, "pissa"))
    for kind, weight in others():
        values = best(weight)
        result += [case(weight, values, kind, rank) for rank in (16, 64)]
    return [*result, whole_model(16)]


if __name__ == "__main__":
    for row in rows(large="--large" in sys.argv):
        print(row)
