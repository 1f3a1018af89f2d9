"""How many bits a model survives: accuracy under plain quantization at 8, 6, 5, 4, 3 and 2 bits.

Weights are rounded per output channel and layer inputs per tensor, to uniform min/max grids (`surefoot.nn.quantizers`)
measured on unlabelled inputs; batch-norms are folded first where the graph allows. Nothing is tuned, so this is what a
deployment gets without effort. The headline is the accuracy lost at `bits` bits, float minus quantized on the same
examples; without labels it is the share of predictions that change.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from surefoot.core.finding import Chart, Finding
from surefoot.core.instrument import Instrument
from surefoot.core.statistics import Result, mean_interval, paired_difference
from surefoot.core.subject import Subject, predict
from surefoot.core.task import Task
from surefoot.errors import Refused, UnsupportedOp, check, check_at_least, check_positive
from surefoot.quantization.layerwise_calibration.folding import (
    QUANTIZABLE,
    Bits,
    fold_batchnorm,
    measure_ranges,
    read_layout,
    swap_layers,
)


def quantize_plain(
    model: nn.Module,
    x: Tensor,  # [N, ...] calibration inputs
    bits_w: int,
    bits_a: int | None,
) -> tuple[nn.Module, bool]:
    """A copy with min/max quantization of every layer, and whether batch-norms could be folded (else they stay)."""
    try:
        layout = read_layout(model, allow_shared=True)
        folded, layers = fold_batchnorm(model, layout, example=x[:8], keep_unfoldable=True), layout.layers
    except (Refused, UnsupportedOp):
        folded = copy.deepcopy(model).eval()
        layers = reached_layers(folded, x[:1])
        if not layers:
            raise
        return _swap(folded, layers, (bits_w, bits_a), x), False
    return _swap(folded, layers, (bits_w, bits_a), x), True


def _swap(folded: nn.Module, layers: tuple[str, ...], bits: Bits, x: Tensor) -> nn.Module:
    quantized = swap_layers(folded, dict.fromkeys(layers, bits))
    measure_ranges(quantized, folded, x)
    return quantized


@torch.no_grad()
def reached_layers(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Convolution and linear layers that a forward pass calls, in the order of registration."""
    reached: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda _, __, name=name: reached.add(name))  # type: ignore[misc]
        for name, module in model.named_modules()
        if isinstance(module, QUANTIZABLE) and not nn.utils.parametrize.is_parametrized(module)
    ]
    try:
        predict(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(name for name, _ in model.named_modules() if name in reached)


def lost(float_right: np.ndarray, quantized_right: np.ndarray) -> Result:
    """Mean of float minus quantized over 0/1 outcomes `[n]`, with its paired interval."""
    return paired_difference(quantized_right, float_right)


@dataclass
class BitsSurvived(Instrument):
    """Accuracy lost at `bits` bits, and the fewest bits within `tolerance` of float.

    Args:
        bits: the width of the headline, for weights and, with `activations`, for layer inputs.
        sweep: the widths measured.
        activations: quantize layer inputs too.
        tolerance: loss of accuracy that counts as survived, as a share.
        calibration: how many validation inputs (training inputs where there are none) the ranges are measured on.
    """

    slug: ClassVar[str] = "bits"
    title: ClassVar[str] = "Bits survived"
    needs_labels: ClassVar[bool] = False
    fix: ClassVar[tuple[str, ...]] = ("layerwise_calibration",)

    bits: int = 4
    sweep: tuple[int, ...] = (8, 6, 5, 4, 3, 2)
    activations: bool = True
    tolerance: float = 0.01
    calibration: int = 256

    def unfit(self, subject: Subject, task: Task) -> str | None:
        reason = super().unfit(subject, task)
        if reason is None and not any(isinstance(module, QUANTIZABLE) for module in subject.model.modules()):
            return "It quantizes convolution and linear layers, and the model has none."
        return reason

    def measure(self, subject: Subject, task: Task) -> Finding:
        check_at_least("calibration", self.calibration, 1)
        check_positive("tolerance", self.tolerance)
        check(self.bits in self.sweep, f"bits must be one of the sweep {self.sweep}, got {self.bits!r}.")
        sample = task.sample(self.slug, task.pick(quick=256, standard=1000, thorough=5000))
        check(len(sample) > 0, "The test split is empty; there is nothing to measure on.")
        inputs, warnings = self._calibration_inputs(task)
        plain = subject.logits(sample.x)
        check(bool(torch.isfinite(plain).all()), "The model's logits hold NaN or infinite values on the test inputs.")
        labels = plain.argmax(1) if sample.y is None else sample.y.cpu()
        right = (plain.argmax(1) == labels).double().numpy()
        outcomes: dict[int, np.ndarray] = {}
        folded = True
        for bits in self.sweep:
            model, folded = quantize_plain(subject.model, inputs, bits, bits if self.activations else None)
            outcomes[bits] = (predict(model, sample.x).argmax(1) == labels).double().numpy()
        if not folded:
            warnings.append("The model's graph could not be read, so batch-norm stayed in floating point.")
        parts = {bits: self._part(bits, right, outcomes[bits], sample.y is not None) for bits in self.sweep}
        return self._finding(parts, right, outcomes, warnings, sample.y is not None)

    def _calibration_inputs(self, task: Task) -> tuple[Tensor, list[str]]:
        for split, warning in (
            (task.valid, None),
            (task.train, None),
            (task.test, "The ranges were measured on test inputs, as the data has no others."),
        ):
            if len(split) > 0:
                order = torch.randperm(len(split), generator=task.generator("bits/calibration"))[: self.calibration]
                return split.x[order.to(split.x.device)], [] if warning is None else [warning]
        raise Refused("The data has no inputs to measure ranges on.")

    def _part(self, bits: int, right: np.ndarray, outcome: np.ndarray, labelled: bool) -> Finding:
        drop = lost(right, outcome)
        low, high = (drop.low, drop.high) if labelled else mean_interval(right - outcome)
        what = "accuracy lost" if labelled else "predictions changed"
        return Finding(
            instrument=self.slug, name=f"{what.capitalize()} at {bits} bits", value=drop.effect, low=low, high=high,
            unit="share", better="lower", n=len(right), samples=right - outcome,
            sentence=f"At {bits} bits: {100 * drop.effect:.1f} points {what} ({100 * low:.1f} to {100 * high:.1f}).",
        )  # fmt: skip

    def _finding(
        self, parts: dict[int, Finding], right: np.ndarray, outcomes: dict[int, np.ndarray], warnings: list[str], labelled: bool
    ) -> Finding:  # fmt: skip
        survived = self._smallest(parts)
        head = parts[self.bits]
        what = "accuracy" if labelled else "agreement with the float model"
        ends = "no width of the sweep stays" if survived is None else f"{survived} bits are the fewest that stay"
        sentence = (
            f"Plain {self.bits}-bit quantization costs {100 * head.value:.1f} points of {what} "
            f"({100 * head.low:.1f} to {100 * head.high:.1f}); {ends} within {100 * self.tolerance:g} point of floating point."
        )
        rows = [
            {
                "bits": bits,
                "accuracy": float(outcomes[bits].mean()),
                "drop": part.value,
                "low": part.low,
                "high": part.high,
            }
            for bits, part in parts.items()
        ]
        return Finding(
            instrument=self.slug, name=head.name, value=head.value, low=head.low, high=head.high, unit=head.unit,
            better="lower", n=head.n, sentence=sentence, samples=head.samples, parts=tuple(parts.values()),
            pictures=(self._chart(rows, float(right.mean()), what),), fix=self.fix, warnings=tuple(warnings),
            details={"smallest_bits": survived, "float": float(right.mean()), "labels": labelled, "sweep": rows},
        )  # fmt: skip

    def _smallest(self, parts: dict[int, Finding]) -> int | None:
        """The fewest bits within the tolerance, all wider ones of the sweep being within it too."""
        survived = None
        for bits in sorted(self.sweep, reverse=True):
            if parts[bits].value > self.tolerance:
                break
            survived = bits
        return survived

    def _chart(self, rows: list[dict[str, Any]], reference: float, what: str) -> Chart:
        rows = sorted(rows, key=lambda row: row["bits"])
        bits, values = [row["bits"] for row in rows], [row["accuracy"] for row in rows]
        figure = {
            "data": [
                {
                    "type": "scatter", "mode": "lines+markers", "name": "quantized", "x": bits, "y": values,
                    "error_y": {
                        "type": "data", "symmetric": False,
                        "array": [max(0.0, row["drop"] - row["low"]) for row in rows],
                        "arrayminus": [max(0.0, row["high"] - row["drop"]) for row in rows],
                    },
                },
                {"type": "scatter", "mode": "lines", "name": "float", "x": bits, "y": [reference] * len(bits), "line": {"dash": "dot"}},
            ],
            "layout": {"xaxis": {"title": {"text": "bits"}, "dtick": 1}, "yaxis": {"title": {"text": what}, "tickformat": ".0%"}},
        }  # fmt: skip
        return Chart(
            figure, f"{what.capitalize()} against bits; bars are 95 % intervals of the paired difference to float."
        )
