"""AdaQuant: tune one layer at a time so that its quantized output meets the float one.

    min over V, b, R_w, z_w, R_x, z_x   mean || act(W x + b) - act(Q_w(W + V) Q_x(x') + Q_b(b)) ||^2

with `act` the ReLU that follows the layer, if one does. V has the full shape of W, so a weight may move to any level of
its grid. PARALLEL: x' = x comes from the float model, so that layers are independent. SEQUENTIAL: x' comes from the model
whose earlier layers are quantized and tuned already, the target stays the float output, so that errors made before are
corrected. No labels are needed.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import InvalidInput, check, check_at_least, check_choice
from surefoot.nn.quantizers import RangeRule
from surefoot.quantization.layerwise_calibration.folding import (
    Bits,
    Layout,
    QuantizedLayer,
    fold_batchnorm,
    layer_inputs,
    measure_ranges,
    quantized_layers,
    read_layout,
    swap_layers,
)

Mode = Literal["sequential", "parallel"]
HOLDOUT = 0.2  # share of the calibration samples on which iterates and stages are chosen


@dataclass(frozen=True)
class Rates:
    """Adam learning rates. Relative ones are multiples of the quantizer's step (bias: of the output's deviation)."""

    weight: float = 5e-3
    bias: float = 1e-3
    weight_range: float = 5e-3
    input_range: float = 5e-3
    relative: bool = True


PAPER_RATES = Rates(weight=1e-5, bias=1e-3, weight_range=1e-3, input_range=1e-1, relative=False)


def calibration_inputs(loader: Tensor | Iterable[Tensor | Sequence[Tensor]]) -> tuple[Tensor, Tensor | None]:
    """Inputs `[N, ...]` and, where the batches carry them, labels `[N]`, from a tensor or an iterable of batches."""
    if isinstance(loader, Tensor):
        x, y = loader, None
    else:
        batches = [(batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1] if len(batch) > 1 else None) for batch in loader]  # fmt: skip
        check(len(batches) > 0, "The calibration loader is empty; give it at least one batch of inputs.")
        x = torch.cat([inputs for inputs, _ in batches])
        labels = [labels for _, labels in batches if labels is not None]
        y = torch.cat(labels) if len(labels) == len(batches) else None
    check(len(x) > 0, "The calibration loader is empty; give it at least one batch of inputs.")
    check(bool(torch.isfinite(x).all()), "The calibration inputs hold NaN or infinite values.")
    return x, y


def holdout_size(n: int, share: float = HOLDOUT) -> int:
    """How many of the last samples are held out; none where there are fewer than four."""
    return 0 if n < 4 else math.ceil(share * n)


def adaquant(
    model: nn.Module,
    calib_loader: Tensor | Iterable[Tensor | Sequence[Tensor]],
    bits_w: int = 4,
    bits_a: int | None = 4,
    mode: Mode = "sequential",
    iters: int = 1000,
    batch_size: int = 50,
    target_modules: Iterable[str] | None = None,
    generator: torch.Generator | None = None,
    *,
    bits: Mapping[str, Bits] | None = None,
    rates: Rates | None = None,
    ranges: RangeRule = "mse",
    quantize_bias: bool = True,
    workers: int = 1,
    keep_unfoldable: bool = False,
    allow_shared: bool = False,
) -> nn.Module:
    """A quantized copy of a float model, every layer tuned on a few unlabelled inputs.

    Args:
        calib_loader: inputs `[N, ...]`, or batches of them (labels are ignored).
        bits_w, bits_a: bits of weights and layer inputs; `bits_a=None` leaves inputs in floating point.
        mode: "sequential" for the final bits, "parallel" where layers must not depend on each other.
        target_modules: names of the layers to quantize; all by default.
        bits: `{layer: (weights, inputs)}`, overriding `bits_w` and `bits_a` layer by layer.
        rates: learning rates; `PAPER_RATES` are the authors' absolute ones.
        ranges: where the search starts, "mse" or "minmax".
        workers: threads for the parallel mode; the result does not depend on it.

    Raises:
        UnsupportedOp, Refused: see `read_layout` and `fold_batchnorm`.
    """
    check_choice("mode", mode, ("sequential", "parallel"))
    x, _ = calibration_inputs(calib_loader)
    layout = read_layout(model, allow_shared=allow_shared)
    folded = fold_batchnorm(model, layout, example=x[:8], keep_unfoldable=keep_unfoldable)
    chosen = choose_bits(layout, bits_w, bits_a, target_modules, bits)
    quantized = swap_layers(folded, chosen, quantize_bias=quantize_bias)
    measure_ranges(quantized, folded, x, rule=ranges)
    return tune_layers(
        quantized, folded, layout, x, mode=mode, iters=iters, batch_size=batch_size, rates=rates, generator=generator,
        workers=workers,
    )  # fmt: skip


def choose_bits(
    layout: Layout,
    bits_w: int,
    bits_a: int | None,
    target_modules: Iterable[str] | None = None,
    bits: Mapping[str, Bits] | None = None,
) -> dict[str, Bits]:
    """`{layer: (weights, inputs)}` in forward order; unknown names are an error."""
    named = set(layout.layers) if target_modules is None else set(target_modules)
    overrides = dict(bits or {})
    for name in sorted((named | set(overrides)) - set(layout.layers)):
        raise InvalidInput(f"There is no layer {name!r} to quantize; the layers are {', '.join(layout.layers)}.")
    return {name: overrides.get(name, (bits_w, bits_a)) for name in layout.layers if name in named or name in overrides}


def tune_layers(
    quantized: nn.Module,
    folded: nn.Module,
    layout: Layout,
    x: Tensor,  # [N, ...]
    *,
    mode: Mode = "sequential",
    iters: int = 1000,
    batch_size: int = 50,
    rates: Rates | None = None,
    generator: torch.Generator | None = None,
    workers: int = 1,
) -> nn.Module:
    """AdaQuant on a copy of a quantized model whose ranges are measured; see `adaquant`."""
    check_at_least("iters", iters, 0)
    check_at_least("batch_size", batch_size, 1)
    check_at_least("workers", workers, 1)
    quantized = copy.deepcopy(quantized)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    layers = quantized_layers(quantized)
    names = [name for name in layout.layers if name in layers]

    def tune(name: str, source: nn.Module, reference: nn.Module) -> None:
        inputs = torch.cat(layer_inputs(source, name, x))
        clean = inputs if source is reference else torch.cat(layer_inputs(reference, name, x))
        with torch.no_grad():
            targets = torch.cat([reference.get_submodule(name)(batch) for batch in clean.split(256)])
        tune_layer(
            layers[name], inputs, targets, relu=name in layout.relu, iters=iters, batch_size=batch_size, rates=rates,
            generator=layer_generator(int(seed), name),
        )  # fmt: skip
        layers[name].freeze_()

    if mode == "sequential" or workers == 1:
        for name in names:
            tune(name, quantized if mode == "sequential" else folded, folded)
    else:
        copies = {name: copy.deepcopy(folded) for name in names}  # the hooks of two threads must not meet in one model
        with ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
        ) as pool:
            list(pool.map(lambda name: tune(name, copies[name], copies[name]), names))
    return quantized


def layer_generator(seed: int, name: str) -> torch.Generator:
    """A stream of its own for each layer, so that neither the order nor the number of workers matters."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def tune_layer(
    layer: QuantizedLayer,
    inputs: Tensor,  # [N, ...] what the layer will see
    targets: Tensor,  # [N, C, ...] its float output, before the ReLU
    *,
    relu: bool = False,
    iters: int = 1000,
    batch_size: int = 50,
    rates: Rates | None = None,
    generator: torch.Generator | None = None,
    checks: int = 20,
) -> tuple[float, float]:
    """Tune weight, bias and both ranges of one layer in place; returns its loss on all samples before and after.

    Of `checks` iterates the best on held-out samples is kept, among those (and the start) whose loss on the tuning samples
    is no higher than at the start.
    """
    rates = rates or Rates()
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    held = holdout_size(len(inputs))
    fit = slice(0, len(inputs) - held)
    test = slice(len(inputs) - held, None) if held else fit
    if relu:
        targets = targets.relu()
    groups = _parameter_groups(layer, targets, rates)
    fused = inputs.device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam([{"params": parameters, "lr": lr} for parameters, lr in groups], fused=fused)
    tuned = [parameter for parameters, _ in groups for parameter in parameters]
    flags = [parameter.requires_grad for parameter in layer.parameters()]
    layer.requires_grad_(False)

    def loss_on(rows: slice) -> float:
        with torch.no_grad():
            pairs = zip(inputs[rows].split(256), targets[rows].split(256))
            return sum(_loss(layer, x, y, relu).item() * len(x) for x, y in pairs) / max(len(inputs[rows]), 1)

    start, before = loss_on(fit), loss_on(slice(None))
    best, best_values = loss_on(test), [parameter.detach().clone() for parameter in tuned]
    alive = (layer.weight.detach() != 0).to(layer.weight.dtype)  # an exact zero was pruned, and stays so
    every = max(1, iters // checks)
    n = len(inputs) - held
    for parameter in tuned:
        parameter.requires_grad_(True)
    for step in range(iters):
        index = torch.randperm(n, generator=generator, device=generator.device)[:batch_size].to(inputs.device)
        with torch.enable_grad():
            gradients = torch.autograd.grad(_loss(layer, inputs[index], targets[index], relu), tuned)
        for parameter, gradient in zip(tuned, gradients):
            parameter.grad = gradient * alive if parameter is layer.weight else gradient
        optimizer.step()
        _keep_in_range(layer)
        if (step + 1) % every == 0 or step + 1 == iters:
            now = loss_on(test)
            if now < best and loss_on(fit) <= start:
                best, best_values = now, [parameter.detach().clone() for parameter in tuned]
    for parameter, value in zip(tuned, best_values):
        parameter.grad = None
        parameter.data.copy_(value)
    for parameter, flag in zip(layer.parameters(), flags):
        parameter.requires_grad_(flag)
    return before, loss_on(slice(None))


def _loss(layer: nn.Module, x: Tensor, y: Tensor, relu: bool) -> Tensor:
    output = layer(x)
    return F.mse_loss(output.relu() if relu else output, y)  # never in place: the targets are cached


def _parameter_groups(layer: QuantizedLayer, targets: Tensor, rates: Rates) -> list[tuple[list[nn.Parameter], float]]:
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    weight_unit = weights.step.mean().item() if rates.relative else 1.0
    bias_unit = max(targets.std().item(), 1e-8) if rates.relative and targets.numel() > 1 else 1.0
    groups: list[tuple[list[nn.Parameter], float]] = [
        ([layer.layer.weight], rates.weight * weight_unit),  # type: ignore[list-item]
        ([layer.layer.bias], rates.bias * bias_unit),  # type: ignore[list-item]
        ([weights.width, weights.low], rates.weight_range * weight_unit),
    ]
    if inputs is not None:
        input_unit = inputs.step.item() if rates.relative else 1.0
        groups.append(([inputs.width, inputs.low], rates.input_range * input_unit))
    return groups


@torch.no_grad()
def _keep_in_range(layer: QuantizedLayer) -> None:
    """Straight-through weights drift past the range without effect; hold them at its ends, and ranges above zero."""
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        if quantizer is not None:
            quantizer.width.clamp_(min=torch.finfo(quantizer.width.dtype).tiny ** 0.25)
            quantizer.low.copy_(
                torch.minimum(torch.maximum(quantizer.low, -quantizer.width), torch.zeros_like(quantizer.low))
            )
    width, low = layer.weight_quantizer.width, layer.weight_quantizer.low
    margin = 0.5 * layer.weight_quantizer.step
    shape = (-1, *([1] * (layer.weight.ndim - 1)))
    layer.weight.clamp_((low - margin).reshape(shape), (low + width + margin).reshape(shape))
