"""Bit allocation: how much each layer loses at each number of bits, and the best choice under a budget.

    min   sum_lk I_lk dL_lk     I_lk in {0, 1},  sum_k I_lk = 1 for every layer l
    s.t.  sum_lk I_lk cost_lk <= c * cost of the 32-bit model         (`compression`)
or    min sum_lk I_lk cost_lk   s.t.  sum_lk I_lk dL_lk <= budget       (`max_degradation`)

with cost = n_l b_w (size in bits) or MACs_l b_w b_a ("bops"), and dL_lk = max(L(only layer l at k) - L(base), 1e-6). That
degradations add up is the model's assumption. The programme is solved to optimality by HiGHS; where solutions tie, the one
of fewer bits is taken, then the one with higher bits in earlier layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.core.subject import predict
from surefoot.errors import InvalidInput, check, check_choice
from surefoot.nn.highs import binary_programme
from surefoot.quantization.layerwise_calibration.adaquant import calibration_inputs
from surefoot.quantization.layerwise_calibration.folding import (
    Bits,
    fold_batchnorm,
    measure_ranges,
    quantized_layers,
    read_layout,
    set_module,
    swap_layers,
)

Cost = Literal["size", "bops"]
FLOOR = 1e-6  # below this a measured gain is noise, which the programme would abuse


@dataclass(frozen=True)
class SensitivityTable:
    """`degradation[l, k]`: the loss of the model with only layer `l` at option `k`, less that of the base model."""

    layers: tuple[str, ...]
    options: tuple[Bits, ...]
    degradation: np.ndarray  # float64 [L, K]
    params: np.ndarray  # int64 [L], weights of each layer
    macs: np.ndarray | None = None  # int64 [L], multiplications per example

    def __post_init__(self) -> None:
        shape = (len(self.layers), len(self.options))
        check(self.degradation.shape == shape, f"degradation must be {shape}, got {self.degradation.shape}.")
        check(len(self.params) == len(self.layers), f"params must have {len(self.layers)} entries.")
        check(bool(np.isfinite(self.degradation).all()), "degradation holds NaN or infinite values.")

    def costs(self, cost: Cost) -> tuple[np.ndarray, int]:
        """Cost of each choice `[L, K]`, and of the 32-bit model; whole numbers."""
        if cost == "size":
            bits = np.array([weights for weights, _ in self.options], dtype=np.int64)
            return np.outer(self.params, bits), 32 * int(self.params.sum())
        if self.macs is None:
            raise InvalidInput('cost="bops" needs the MACs of every layer; this table has none.')
        bits = np.array(
            [weights * (32 if inputs is None else inputs) for weights, inputs in self.options], dtype=np.int64
        )
        return np.outer(self.macs, bits), 1024 * int(self.macs.sum())


@dataclass(frozen=True)
class BitAllocation:
    bits: Mapping[str, Bits]
    loss: float  # predicted: the sum of the chosen degradations
    size_bits: int  # of all weights
    cost: int  # in the units of the budget


def as_options(options: Iterable[int | Bits]) -> tuple[Bits, ...]:
    """`4` stands for `(4, 4)`."""
    return tuple((option, option) if isinstance(option, int) else (option[0], option[1]) for option in options)


@torch.no_grad()
def layer_sensitivities(
    model: nn.Module,
    loader: Tensor | Iterable[Tensor | Sequence[Tensor]],
    options: Iterable[int | Bits] = (2, 4, 8),
    base: int | Bits = 8,
    loss: Literal["kl", "ce"] = "kl",
    *,
    tuned: Mapping[Bits, nn.Module] | None = None,
    quantize_bias: bool = True,
    keep_unfoldable: bool = False,
    allow_shared: bool = False,
) -> SensitivityTable:
    """Measure every layer at every option, the others at `base`; accuracy would be too coarse on small sets.

    Args:
        loss: "kl" from the float model's prediction to the quantized one's, or "ce" against labels in the loader.
        tuned: for each option a model with all layers quantized so, AdaQuant'ed in parallel mode (the advanced
            pipeline); plain min/max quantization where there is none.
    """
    check_choice("loss", loss, ("kl", "ce"))
    x, y = calibration_inputs(loader)
    chosen, (base_bits,) = as_options(options), as_options([base])
    if base_bits not in chosen:
        raise InvalidInput(f"options {chosen} must contain the base {base_bits}.")
    if loss == "ce" and y is None:
        raise InvalidInput('loss="ce" needs labels in the calibration loader; use loss="kl", which needs none.')
    layout = read_layout(model, allow_shared=allow_shared)
    folded = fold_batchnorm(model, layout, example=x[:8], keep_unfoldable=keep_unfoldable)
    models: dict[Bits, nn.Module] = dict(tuned or {})
    for option in chosen:
        if option not in models:
            models[option] = swap_layers(folded, dict.fromkeys(layout.layers, option), quantize_bias=quantize_bias)
            measure_ranges(models[option], folded, x)
    reference = predict(folded, x).double().log_softmax(1)

    def measured(candidate: nn.Module) -> float:
        log_prob = predict(candidate, x).double().log_softmax(1)
        if loss == "ce":
            return F.nll_loss(log_prob, y if y is not None else x.new_zeros(0)).item()
        return F.kl_div(log_prob, reference, reduction="batchmean", log_target=True).item()

    mixed = swap_layers(folded, {})
    parts = {option: quantized_layers(candidate) for option, candidate in models.items()}
    for name in layout.layers:
        set_module(mixed, name, parts[base_bits][name])
    start = measured(mixed)
    table = np.zeros((len(layout.layers), len(chosen)))
    for row, name in enumerate(layout.layers):
        for column, option in enumerate(chosen):
            set_module(mixed, name, parts[option][name])
            table[row, column] = max(measured(mixed) - start, FLOOR)
        set_module(mixed, name, parts[base_bits][name])
    table[:, chosen.index(base_bits)] = FLOOR
    params = np.array([parts[base_bits][name].weight.numel() for name in layout.layers], dtype=np.int64)
    return SensitivityTable(layout.layers, chosen, table, params, count_macs(folded, layout.layers, x[:1]))


@torch.no_grad()
def count_macs(model: nn.Module, layers: Sequence[str], example: Tensor) -> np.ndarray:
    """Multiplications of each layer for one example, int64 `[L]`."""
    macs = dict.fromkeys(layers, 0)

    def count(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            weight = module.get_parameter("weight")
            positions = output[0].numel() // weight.shape[0]
            macs[name] += positions * weight.numel()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(count(name)) for name in layers]
    try:
        predict(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return np.array([macs[name] for name in layers], dtype=np.int64)


def allocate_bits(
    table: SensitivityTable,
    compression: float | None = None,
    max_degradation: float | None = None,
    cost: Cost = "size",
) -> BitAllocation:
    """The allocation of least predicted loss within a budget, or of least cost within a predicted loss.

    Args:
        compression: budget as a share of the 32-bit model's cost, e.g. 0.13.
        max_degradation: budget of summed degradations; exactly one of the two is given.
        cost: "size" or "bops".

    Raises:
        InvalidInput: the budget is below what the smallest options reach (the message names it).
    """
    check_choice("cost", cost, ("size", "bops"))
    if (compression is None) == (max_degradation is None):
        raise InvalidInput("Give exactly one of compression and max_degradation.")
    costs, full = table.costs(cost)
    losses = table.degradation.astype(np.float64)
    if compression is not None:
        check(0 < compression <= 1, f"compression must lie in (0, 1], got {compression!r}.")
        budget = int(np.floor(compression * full * (1 + 1e-12)))
        least = int(costs.min(1).sum())
        if least > budget:
            raise InvalidInput(
                f"compression {compression:g} cannot be reached: the smallest options take {least} of {full} "
                f"({'bits' if cost == 'size' else 'bit operations'}), a compression of {least / full:.4g}."
            )
        picked = _choose(losses, costs, budget)
    else:
        allowed = float(max_degradation or 0.0)
        least_loss = float(losses.min(1).sum())
        if not least_loss <= allowed * (1 + 1e-12):
            raise InvalidInput(
                f"max_degradation {allowed:g} cannot be reached: the best options add up to {least_loss:.4g}."
            )
        picked = _choose(costs.astype(np.float64), losses, allowed * (1 + 1e-12))
    rows = np.arange(len(table.layers))
    weight_bits = np.array([weights for weights, _ in table.options], dtype=np.int64)[picked]
    return BitAllocation(
        bits={name: table.options[k] for name, k in zip(table.layers, picked)},
        loss=float(losses[rows, picked].sum()),
        size_bits=int((table.params * weight_bits).sum()),
        cost=int(costs[rows, picked].sum()),
    )


# --- the integer programme ---------------------------------------------------------------------------------------------


def _choose(objective: np.ndarray, weights: np.ndarray, budget: float) -> np.ndarray:
    """Option index per layer `[L]`: least objective within the budget; ties: least weight, then earlier layers higher."""
    undominated = _undominated(objective, weights)
    first = _solve(objective, _in_reach(objective, weights, budget, undominated), [(weights, budget)])
    assert first is not None
    rows = np.arange(len(objective))
    best = float(objective[rows, first].sum())
    # Ties: values are sums of floats, equal up to rounding.
    level = best + 1e-9 * max(abs(best), float(objective.max()) * 1e-3)
    keep = _in_reach(objective, weights, budget, undominated, level)
    lightest = _solve(weights.astype(np.float64), keep, [(weights, budget), (objective, level)])
    picked = first if lightest is None or weights[rows, lightest].sum() > weights[rows, first].sum() else lightest
    limit = float(weights[rows, picked].sum()) * (1 + 1e-12)
    return _lexicographic(picked, keep, weights, [(weights, limit), (objective, level)])


def _undominated(objective: np.ndarray, weights: np.ndarray) -> Any:
    """Options that no other option of the layer beats in one respect and equals or beats in the other, bool `[L, K]`."""
    no_worse = (objective[:, None, :] <= objective[:, :, None]) & (weights[:, None, :] <= weights[:, :, None])
    better = (objective[:, None, :] < objective[:, :, None]) | (weights[:, None, :] < weights[:, :, None])
    return np.logical_not((no_worse & better).any(axis=2, keepdims=False))


def _in_reach(
    objective: np.ndarray, weights: np.ndarray, budget: float, keep: np.ndarray, level: float = math.inf
) -> np.ndarray:
    """The kept options that a solution with an objective of at most `level` can use, bool `[L, K]`; most are ruled out.

    For every price p >= 0 the sum of the cheapest options by objective + p weight, less p budget, is a lower bound; taking another
    option in a layer raises it by that option's surplus. p is bisected to where the cheapest options just fit the budget, which also
    gives a solution, whose objective replaces a larger `level`.
    """
    values, rows = np.where(keep, objective, np.inf), np.arange(len(objective))

    def cheapest(price: float) -> np.ndarray:
        return (values + price * weights).argmin(1)

    def fits(price: float) -> bool:
        return float(weights[rows, cheapest(price)].sum()) <= budget

    low, price = 0.0, float(objective.max()) / max(float(weights.max()), 1e-300)
    for _ in range(200):
        if fits(price):
            break
        low, price = price, 4 * price
    else:
        return keep  # only the lightest options fit, whatever they lose
    for _ in range(50):
        middle = (low + price) / 2
        low, price = (low, middle) if fits(middle) else (middle, price)
    level = min(level, float(objective[rows, cheapest(price)].sum()))
    total = values + price * weights
    bound = total.min(1).sum() - price * budget
    room = level - bound + 1e-8 * max(abs(level), abs(price * budget), float(objective.max()) * 1e-3)
    return keep & (total - total.min(1, keepdims=True) <= room)


def _lexicographic(
    picked: np.ndarray, keep: np.ndarray, weights: np.ndarray, limits: list[tuple[np.ndarray, float]]
) -> np.ndarray:
    """Among solutions within the limits, the one with the heaviest options first, layer by layer."""
    layers = len(picked)
    if _solve(np.zeros_like(weights, dtype=np.float64), keep, limits, other_than=picked) is None:
        return picked  # the usual case: no tie
    keep = keep.copy()
    for layer in range(layers):
        heavier = keep[layer] & (weights[layer] > weights[layer, picked[layer]])
        while heavier.any():
            trial = keep.copy()
            trial[layer] = heavier
            found = _solve(np.zeros_like(weights, dtype=np.float64), trial, limits)
            if found is None:
                break
            picked = found
            heavier = keep[layer] & (weights[layer] > weights[layer, picked[layer]])
        keep[layer] = False
        keep[layer, picked[layer]] = True
    return picked


def _solve(
    objective: np.ndarray,
    keep: np.ndarray,
    limits: list[tuple[np.ndarray, float]],
    other_than: np.ndarray | None = None,
) -> np.ndarray | None:
    """One 0-1 programme over the kept options by HiGHS with no gap; None where nothing is feasible."""
    from scipy.sparse import csr_matrix, vstack

    layer, option = np.nonzero(keep)
    count = len(layer)
    rows = [csr_matrix((np.ones(count), (layer, np.arange(count))), shape=(len(keep), count))]
    low, high = [np.ones(len(keep))], [np.ones(len(keep))]
    for weights, limit in limits:
        values = weights[layer, option].astype(np.float64)
        unit = max(values.max(), 1e-300)  # HiGHS tolerances are absolute
        rows.append(csr_matrix(values / unit))
        low.append(np.array([-np.inf]))
        high.append(np.array([limit / unit]))
    if other_than is not None:
        rows.append(csr_matrix((option == other_than[layer]).astype(np.float64)))
        low.append(np.array([-np.inf]))
        high.append(np.array([len(keep) - 1.0]))
    values = objective[layer, option].astype(np.float64)
    unit = max(np.abs(values).max(), 1e-300)
    chosen = binary_programme(
        values / unit * 1e3, vstack(rows, format="csr"), np.concatenate(low), np.concatenate(high)
    )
    if chosen is None:
        return None
    picked = np.zeros(len(keep), dtype=np.int64)
    picked[layer[chosen]] = option[chosen]
    tightened = [(weights, limit - 2 * max(0.0, float(weights[np.arange(len(keep)), picked].sum()) - limit)) for weights, limit in limits]  # fmt: skip
    if any(new < old for (_, new), (_, old) in zip(tightened, limits)):  # within the solver's tolerance, not ours
        return _solve(objective, keep, tightened, other_than)
    return picked
