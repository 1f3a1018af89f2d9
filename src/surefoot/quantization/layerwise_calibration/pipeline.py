"""The two pipelines, the export, and the treatment.

light      min/max ranges -> integer programme on plain sensitivities -> statistics tuning; no gradients
advanced   AdaQuant in parallel at each option -> integer programme -> sequential AdaQuant at the chosen bits -> statistics
           tuning -> bias tuning

(The integer programme runs only where a `compression` is asked for; else the given bits are used.) Each stage is kept only
if it brings the model closer to the float one on held-out calibration samples, so that on very few samples the plain min/max
model is what remains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from surefoot.core.subject import predict
from surefoot.core.task import Task
from surefoot.core.treatment import Treatment
from surefoot.errors import InvalidInput, check, check_at_least, check_choice
from surefoot.quantization.layerwise_calibration.adaquant import (
    Rates,
    calibration_inputs,
    choose_bits,
    holdout_size,
    tune_layers,
)
from surefoot.quantization.layerwise_calibration.allocation import (
    BitAllocation,
    SensitivityTable,
    allocate_bits,
    as_options,
    layer_sensitivities,
)
from surefoot.quantization.layerwise_calibration.folding import (
    Bits,
    fold_batchnorm,
    measure_ranges,
    quantized_layers,
    read_layout,
    swap_layers,
)
from surefoot.quantization.layerwise_calibration.statistics import distillation_loss, tune_biases, tune_statistics

Kind = Literal["advanced", "light"]


@dataclass(frozen=True)
class CalibrationReport:
    """`stages` holds the held-out KL to the float model after each stage tried; `kept` whether the stage stayed."""

    model: nn.Module
    bits: Mapping[str, Bits]
    stages: Mapping[str, float]
    kept: Mapping[str, bool]
    weight_bytes: int
    float_weight_bytes: int
    sensitivities: SensitivityTable | None = None
    allocation: BitAllocation | None = None


def calibrate_pipeline(
    model: nn.Module,
    loader: Tensor | Iterable[Tensor | Sequence[Tensor]],
    kind: Kind = "advanced",
    *,
    bits_w: int = 4,
    bits_a: int | None = 4,
    bits: Mapping[str, Bits] | None = None,
    compression: float | None = None,
    options: Iterable[int | Bits] = (2, 4, 8),
    base: int | Bits = 8,
    iters: int = 400,
    bias_epochs: int = 3,
    prior: float = 4.0,
    batch_size: int = 50,
    rates: Rates | None = None,
    quantize_bias: bool = True,
    generator: torch.Generator | None = None,
    keep_unfoldable: bool = False,
    allow_shared: bool = False,
) -> CalibrationReport:
    """Quantize a float model on a few unlabelled inputs; see the module's text for the stages.

    Args:
        kind: "light" takes no gradients; "advanced" does everything.
        bits_w, bits_a, bits: the bits, where no `compression` is asked for; `bits` names single layers, e.g. depthwise
            convolutions or the first and last layer at 8.
        compression: size of the weights as a share of 32 bits; the integer programme chooses among `options`.
    """
    check_choice("kind", kind, ("advanced", "light"))
    x, _ = calibration_inputs(loader)
    layout = read_layout(model, allow_shared=allow_shared)
    folded = fold_batchnorm(model, layout, example=x[:8], keep_unfoldable=keep_unfoldable)
    n_held = holdout_size(len(x))
    held, fit = (x[-n_held:], x[:-n_held]) if n_held else (x, x)

    def plain(chosen: Mapping[str, Bits], rule: Literal["minmax", "mse"]) -> nn.Module:
        quantized = swap_layers(folded, chosen, quantize_bias=quantize_bias)
        measure_ranges(quantized, folded, x, rule=rule)
        return quantized

    def tuned(start: nn.Module, mode: Literal["sequential", "parallel"]) -> nn.Module:
        return tune_layers(
            start, folded, layout, x, mode=mode, iters=iters, batch_size=batch_size, rates=rates, generator=generator
        )

    table, allocation = None, None
    chosen = choose_bits(layout, bits_w, bits_a, None, bits)
    if compression is not None:
        candidates: dict[Bits, nn.Module] = {}
        if kind == "advanced":
            for option in as_options(options):
                candidates[option] = tuned(plain(dict.fromkeys(layout.layers, option), "mse"), "parallel")
        table = layer_sensitivities(
            model, x, options, base, tuned=candidates, quantize_bias=quantize_bias, keep_unfoldable=keep_unfoldable,
            allow_shared=allow_shared,
        )  # fmt: skip
        allocation = allocate_bits(table, compression)
        chosen = dict(allocation.bits)

    targets = predict(folded, held)
    current = plain(chosen, "minmax")
    stages = {"minmax": distillation_loss(predict(current, held), targets).item()}
    kept = {"minmax": True}

    def offer(stage: str, candidate: nn.Module) -> None:
        nonlocal current
        stages[stage] = distillation_loss(predict(candidate, held), targets).item()
        kept[stage] = stages[stage] < min(stages[s] for s in kept if kept[s])
        current = candidate if kept[stage] else current

    if kind == "advanced":
        offer("adaquant", tuned(plain(chosen, "mse"), "sequential"))
    if layout.batchnorm:
        offer("statistics", tune_statistics(current, fit, prior=prior))
    if kind == "advanced":
        offer("biases", tune_biases(current, folded, x, bias_epochs, batch_size=batch_size, generator=generator))
    layers = quantized_layers(current)
    for layer in layers.values():
        layer.freeze_()
    weight_bytes = sum(packed_bytes(layer.weight.numel(), layer.bits[0]) for layer in layers.values())
    float_bytes = 4 * sum(layer.weight.numel() for layer in layers.values())
    return CalibrationReport(current, chosen, stages, kept, weight_bytes, float_bytes, table, allocation)


# --- export ------------------------------------------------------------------------------------------------------------


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes of `bits` bits each, without a gap between codes."""
    return math.ceil(count * bits / 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes in `[0, 2^bits)` of any shape as a stream of bits, uint8 `[ceil(n bits / 8)]`, highest bit first."""
    flat = codes.reshape(-1).cpu().numpy().astype(np.uint32)
    planes = (flat[:, None] >> np.arange(bits - 1, -1, -1, dtype=np.uint32)) & 1
    return torch.from_numpy(np.packbits(planes.astype(np.uint8)))


def unpack(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """The counterpart of `pack`: int64 codes of `shape`."""
    count = math.prod(shape)
    planes = np.unpackbits(packed.cpu().numpy(), count=count * bits).reshape(count, bits).astype(np.int64)
    return torch.from_numpy(planes @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))).reshape(tuple(shape))


@dataclass(frozen=True)
class QuantizedExport:
    """A quantized model as tensors: packed weight codes (`<layer>.codes`), everything else as in its state.

    `weight_bytes` is the size of all packed weights, `total_bytes` that of all tensors.
    """

    tensors: Mapping[str, Tensor]
    bits: Mapping[str, Bits]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for name, tensor in self.tensors.items() if name.endswith(".codes"))

    @property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@torch.no_grad()
def export_quantized(model: nn.Module) -> QuantizedExport:
    """Pack a quantized model; `load_export` puts it into a model of the same structure, bit for bit."""
    layers = quantized_layers(model)
    if not layers:
        raise InvalidInput("The model has no quantized layer; quantize it before exporting.")
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        del tensors[f"{prefix}layer.weight"]
        tensors[f"{prefix}codes"] = pack(layer.weight_quantizer.codes(layer.weight), layer.bits[0])
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    return QuantizedExport(tensors, {name: layer.bits for name, layer in layers.items()}, shapes)


@torch.no_grad()
def load_export(model: nn.Module, export: QuantizedExport) -> nn.Module:
    """Load an export into a quantized model of the same structure (see `rebuild_quantized`), in place."""
    state = dict(export.tensors)
    for name, bits in export.bits.items():
        prefix = f"{name}." if name else ""
        codes = unpack(state.pop(f"{prefix}codes"), bits[0], export.shapes[name])
        width, low = state[f"{prefix}weight_quantizer.width"], state[f"{prefix}weight_quantizer.low"]
        shape = (-1, *([1] * (codes.ndim - 1)))
        step = width.reshape(shape) / (2 ** bits[0] - 1)
        state[f"{prefix}layer.weight"] = codes * step + (low.reshape(shape) / step).round() * step
    model.load_state_dict(state)
    return model


def rebuild_quantized(
    model: nn.Module, bits: Mapping[str, Bits], *, quantize_bias: bool = True, keep_unfoldable: bool = False,
    allow_shared: bool = False,
) -> nn.Module:  # fmt: skip
    """The architecture of a calibrated model from a fresh float one: folded, layers swapped, ranges not yet set."""
    layout = read_layout(model, allow_shared=allow_shared)
    folded = fold_batchnorm(model, layout, keep_unfoldable=keep_unfoldable)
    return swap_layers(folded, bits, quantize_bias=quantize_bias)


# --- the treatment -----------------------------------------------------------------------------------------------------


@dataclass
class LayerwiseCalibration(Treatment):
    """Quantize the trained model on unlabelled validation inputs.

    Args:
        bits_w, bits_a: bits of weights and of layer inputs (None: inputs stay floating point).
        kind: "advanced" or "light" (no gradients).
        compression: size of the weights as a share of 32 bits; mixed 2/4/8 bits by integer programme. None: uniform.
        iters: AdaQuant steps a layer.
        bias_epochs: epochs of bias tuning, of 20 passes over the samples each.
        samples: at most that many validation inputs are used.
        eight_bit: names of layers kept at 8 bits.
        keep_unfoldable: leave batch-norms that follow no layer in floating point instead of refusing the model.
    """

    slug: ClassVar[str] = "layerwise_calibration"
    finish_order: ClassVar[int] = 10
    excludes: ClassVar[Mapping[str, str]] = {
        "gradient_ptq": "both quantize the finished model.",
        "ofq": "the model is quantized in training already.",
    }

    bits_w: int = 4
    bits_a: int | None = 4
    kind: Kind = "advanced"
    compression: float | None = None
    iters: int = 200
    bias_epochs: int = 3
    samples: int = 256
    eight_bit: tuple[str, ...] = ()
    keep_unfoldable: bool = False
    bits_: dict[str, Bits] = field(default_factory=dict, init=False, repr=False)
    report_: CalibrationReport | None = field(default=None, init=False, repr=False)

    def check(self, model: nn.Module, task: Task) -> None:
        check_choice("kind", self.kind, ("advanced", "light"))
        check_at_least("samples", self.samples, 1)
        check_at_least("iters", self.iters, 0)
        check_at_least("bias_epochs", self.bias_epochs, 0)
        for name, bits in (("bits_w", self.bits_w), ("bits_a", self.bits_a)):
            check(bits is None or 1 <= bits <= 16, f"{name} must lie between 1 and 16, got {bits!r}.")
        check(len(task.valid) > 0, "layerwise_calibration calibrates on validation inputs, and there are none.")
        layout = read_layout(model)
        fold_batchnorm(model, layout, keep_unfoldable=self.keep_unfoldable)
        choose_bits(layout, self.bits_w, self.bits_a, None, dict.fromkeys(self.eight_bit, (8, 8)))

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        check(len(task.valid) > 0, "layerwise_calibration calibrates on validation inputs, and there are none.")
        generator = task.generator("layerwise_calibration")
        x = task.valid.x
        if len(x) > self.samples:
            x = x[torch.randperm(len(x), generator=generator)[: self.samples].sort().values.to(x.device)]
        report = calibrate_pipeline(
            model, x, self.kind, bits_w=self.bits_w, bits_a=self.bits_a, compression=self.compression, iters=self.iters,
            bits=dict.fromkeys(self.eight_bit, (8, 8)), bias_epochs=self.bias_epochs, generator=generator,
            keep_unfoldable=self.keep_unfoldable,
        )  # fmt: skip
        self.report_, self.bits_ = report, dict(report.bits)
        return report.model

    def structure(self) -> dict[str, Any]:
        return {"bits": {name: list(bits) for name, bits in self.bits_.items()}}

    def rebuild(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        bits: dict[str, Bits] = {name: (pair[0], pair[1]) for name, pair in structure["bits"].items()}
        return rebuild_quantized(model, bits, keep_unfoldable=self.keep_unfoldable)

    def state_dict(self) -> dict[str, Any]:
        return self.structure()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.bits_ = {name: (pair[0], pair[1]) for name, pair in state.get("bits", {}).items()}
