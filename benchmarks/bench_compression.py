"""Compression side by side with peers: the integer programme, the cost of a sparse training step, 4-bit accuracy.

Run `python benchmarks/bench_compression.py`. `rows()` gives one dict a comparison; the sides take turns (`_timing.py`).
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from _timing import in_turn, memory_mb, row, seconds
from surefoot.core.subject import predict
from surefoot.core.task import Training
from surefoot.datasets.embedded import digits
from surefoot.models import mlp, seeded_build, small_cnn
from surefoot.quantization.bits import quantize_plain
from surefoot.quantization.layerwise_calibration import SensitivityTable, allocate_bits, calibrate_pipeline
from surefoot.sparsity.random_pruning import layer_densities, random_masks, random_prune_
from surefoot.training.loop import fit

REPEATS = 5


# --- the integer programme ----------------------------------------------------------------------------------------------


def random_table(seed: int, layers: int = 200, bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)) -> SensitivityTable:
    """Losses that fall about fourfold a bit, layers of 1,000 to 2 million weights."""
    rng = np.random.default_rng(seed)
    params = rng.integers(1000, 2_000_000, layers)
    scale = rng.lognormal(-3, 1.5, (layers, 1)) * rng.lognormal(0, 0.3, (layers, len(bits)))
    drop = np.maximum(scale * np.array([4.0 ** -(b - 2) for b in bits]), 1e-6)
    return SensitivityTable(tuple(f"layer{i}" for i in range(layers)), tuple((b, b) for b in bits), drop, params)


def plain_programme(table: SensitivityTable, compression: float, gap: float | None = None) -> float:
    """The same programme as one plain `scipy.optimize.milp` call, at HiGHS's default gap (1e-4) or at `gap`; returns its loss."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix, kron, vstack

    costs, full = table.costs("size")
    layers, options = table.degradation.shape
    one = kron(csr_matrix(np.eye(layers)), np.ones((1, options)))
    budget = csr_matrix(costs.reshape(1, -1) / costs.max())
    high = np.append(np.ones(layers), compression * full / costs.max())
    low = np.append(np.ones(layers), -np.inf)
    ends: list[Any] = [low, high]  # scipy declares single numbers
    found = milp(
        table.degradation.ravel(), integrality=np.ones(costs.size), bounds=Bounds(0, 1),
        constraints=LinearConstraint(vstack([one, budget], format="csr"), ends[0], ends[1]),
    )  # fmt: skip
    return float(found.fun)


def programme_rows() -> list[dict[str, Any]]:
    """Ours is the optimum and its tie rule, three programmes; the peers solve one, to a gap of zero (equal work on the optimum) and at
    the default gap."""
    tables = [random_table(seed) for seed in range(REPEATS)]
    allocate_bits(tables[0], 0.13)  # imports
    ours = [seconds(lambda t=t: allocate_bits(t, 0.13)) for t in tables]
    found = []
    for peer, gap in (("at a gap of zero", 0.0), ("at the default gap", None)):
        theirs = [seconds(lambda t=t, g=gap: plain_programme(t, 0.13, g)) for t in tables]
        worse = [plain_programme(t, 0.13, gap) / allocate_bits(t, 0.13).loss - 1 for t in tables]
        quality = f"slowest of ours {max(ours):.2f} s, of theirs {max(theirs):.2f} s; the peer's loss is up to {100 * max(worse):.4f} % above the optimum"  # fmt: skip
        found.append(
            row(
                "bit allocation, 200 layers x 6 options", statistics.median(ours), f"scipy.optimize.milp {peer}", statistics.median(theirs),
                quality, "ours closes the gap to zero and applies the tie rule (three programmes); the peers solve one",
                ours_mb=memory_mb(lambda: allocate_bits(tables[0], 0.13)), peer_mb=memory_mb(lambda gap=gap: plain_programme(tables[0], 0.13, gap)),
            )
        )  # fmt: skip
    return found


# --- a sparse training step ---------------------------------------------------------------------------------------------


def step_rows() -> list[dict[str, Any]]:
    """Batch 64 of 28x28 images; a convnet, whose step is bound by arithmetic, and an MLP, bound by its 1.9 million weights."""
    nets = {
        "convnet": lambda: small_cnn((1, 28, 28), 10, widths=(32, 64, 64)),
        "wide MLP": lambda: mlp((1, 28, 28), 10, hidden=(1024, 1024)),
    }
    return [entry for name, net in nets.items() for entry in _step_rows(name, net)]


def _step_rows(what: str, net: Callable[[], nn.Module]) -> list[dict[str, Any]]:
    """Seconds of one SGD step."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(64, 1, 28, 28, generator=generator), torch.randint(10, (64,), generator=generator)

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = seeded_build(net, torch.Generator().manual_seed(0))
        return model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)

    def stepper(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def run() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

        return run

    dense = stepper(*build())
    model, optimizer = build()
    handle = random_prune_(model, 0.1, generator=torch.Generator().manual_seed(0)).attach(optimizer)
    sparse = stepper(model, optimizer)
    peer, _ = build()
    masks = random_masks(peer, layer_densities(peer, 0.1), generator=torch.Generator().manual_seed(0))
    for name, mask in masks.items():
        prune.custom_from_mask(peer.get_submodule(name.rpartition(".")[0]), "weight", mask)
    torch_prune = stepper(peer, torch.optim.SGD(peer.parameters(), 0.05, momentum=0.9, weight_decay=5e-4))

    def hooks() -> None:
        handle.mask_gradients_()
        handle.mask_weights_()

    plain, ours, theirs, masking = in_turn(dense, sparse, torch_prune, hooks)
    grown = [memory_mb(call) for call in (dense, sparse, torch_prune)]
    quality = f"the masking by itself takes {100 * masking / plain:.2f} % of a dense step"
    return [
        row(f"step of a randomly pruned {what}", ours, "the dense net", plain, quality, ours_mb=grown[1], peer_mb=grown[0]),
        row(f"step of a randomly pruned {what}", ours, "torch.nn.utils.prune", theirs, quality, ours_mb=grown[1], peer_mb=grown[2]),
    ]  # fmt: skip


# --- 4-bit accuracy -----------------------------------------------------------------------------------------------------


def four_bit_rows() -> list[dict[str, Any]]:
    task = digits(0, sizes=(1000, 128, 669))
    net = seeded_build(lambda: small_cnn((1, 8, 8), 10, widths=(12, 24, 24)), task.generator("model"))
    model = fit(net, task, Training(epochs=20, lr=5e-3)).model
    x, y = task.test.x, task.test.labels

    def accuracy(candidate: nn.Module) -> float:
        return (predict(candidate, x).argmax(1) == y).double().mean().item()

    def calibrate() -> nn.Module:
        return calibrate_pipeline(model, task.valid.x, iters=200).model

    (ours,), calibrated, ours_mb = in_turn(calibrate), calibrate(), memory_mb(calibrate)
    quality = f"accuracy {accuracy(calibrated):.4f} (float {accuracy(model):.4f}, plain min/max {accuracy(quantize_plain(model, task.valid.x, 4, 4)[0]):.4f})"
    found = []
    for peer, call in (("optimum.quanto", quanto), ("torchao", torchao)):
        if importlib.util.find_spec(peer.split(".")[0]) is None:
            found.append(row("4-bit weights and inputs, digits convnet", ours, peer, None, quality, f"{peer} is not installed", ours_mb=ours_mb))  # fmt: skip
            continue
        try:
            (peer_s,) = in_turn(lambda call=call: call(model, task.valid.x))
            theirs = accuracy(call(model, task.valid.x))
            peer_mb = memory_mb(lambda call=call: call(model, task.valid.x))
        except Exception as error:
            found.append(row("4-bit weights and inputs, digits convnet", ours, peer, None, quality, f"{peer} failed: {error}", ours_mb=ours_mb))  # fmt: skip
            continue
        found.append(
            row(
                "4-bit weights and inputs, digits convnet",
                ours,
                peer,
                peer_s,
                f"{quality}; peer {theirs:.4f}",
                ours_mb=ours_mb,
                peer_mb=peer_mb,
            )
        )
    return found


def quanto(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """4-bit weights, 8-bit inputs: the library has no 4-bit inputs, which favours it."""
    from optimum.quanto import Calibration, freeze, qint4, qint8, quantize  # type: ignore[import-not-found]

    model = copy.deepcopy(model)
    quantize(model, weights=qint4, activations=qint8)
    with Calibration(), torch.no_grad():
        model(x)
    freeze(model)
    return model


def torchao(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """4-bit weights of linear layers only: the library leaves convolutions in floating point, which favours it."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_  # type: ignore[import-not-found]

    model = copy.deepcopy(model)
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4))  # type: ignore[attr-defined]
    return model


def rows() -> list[dict[str, Any]]:
    return [*programme_rows(), *step_rows(), *four_bit_rows()]


if __name__ == "__main__":
    for entry in rows():
        print({key: round(value, 5) if isinstance(value, float) else value for key, value in entry.items()})
