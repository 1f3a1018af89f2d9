"""Propagation tightness: how much interval bounds (IBP) lose in a network, layer by layer, and what width, depth and training do to it.

At an input, with the activation pattern D fixed and a box of radius r around it,

    tau_j = r*_j / r_IBP,j,     r* = |C W_L D ... D W_1| r,     r_IBP = |C W_L| D ... D |W_1| r

per row of C: margins f_y - f_j if labels are given, else the logits. 1: intervals are exact there; 0: all paths cancel. The mean is of
ratios, over rows and samples. tau says what IBP costs; it is neither needed nor enough for a high certified accuracy.

Theory as functions: `expected_init_tightness` (Gaussian weights: tau = prod over hidden widths of sqrt(pi / 2n), so it falls with width
and exponentially with depth), `is_propagation_invariant` (two linear layers are exact iff no two paths between an input and an
output have opposite signs), `linear_autoencoder_ibp` (keeping information costs tightness: tau ~ sqrt(pi / 2k) at bottleneck k).

Source: Mao, Mueller, Fischer & Vechev, "Understanding Certified Training with Interval Bound Propagation", ICLR 2024, arXiv 2306.10426.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from surefoot.core.finding import Chart, Finding
from surefoot.core.instrument import Instrument
from surefoot.core.statistics import mean_interval
from surefoot.core.subject import Modality, Subject, predict
from surefoot.core.task import Task
from surefoot.errors import (
    InvalidInput,
    SurefootError,
    check,
    check_at_least,
    check_choice,
    check_non_negative,
    check_positive,
)
from surefoot.nn.bounds import Program, margin_rows, region_around
from surefoot.nn.bounds.tightness import Gated, Pattern, gated, weight_layers
from surefoot.nn.modes import evaluating

DEAD = "rows have no path from the input at all (both radii are 0); they are left out of the mean."


@dataclass(frozen=True, eq=False)
class TightnessReport:
    """`mean` is over `per_sample`, which is over live rows; NaN where a sample has none."""

    mean: float
    per_sample: Tensor  # [B]
    per_output: Tensor  # [B, R], NaN for dead rows
    optimal_radius: Tensor  # [B, R]
    ibp_radius: Tensor  # [B, R]
    per_layer_prefix: tuple[tuple[str, float], ...]  # of the net up to each ReLU's input, and of all of it
    dead: int  # rows


@torch.no_grad()
def propagation_tightness(
    model: nn.Module,
    x: Tensor,  # [B, ...]
    target: Tensor | None = None,  # int64 [B]; None: tightness of the logits
    *,
    eps: float,
    data_range: tuple[float, float] | None = (0.0, 1.0),
    pattern: Pattern | None = "local",
    prefix_rows: int = 64,
    batch_size: int = 64,
) -> TightnessReport:
    """Tightness in evaluation mode and float64, on a copy of the model.

    `pattern`: "local" at `x`, "center" at the centre of the clipped box, None for the weights alone (every ReLU the identity).
    `prefix_rows`: neurons (evenly spaced) that stand for a layer in `per_layer_prefix`; 0 leaves it out. Raises `UnsupportedOp` for
    nonlinearities other than ReLUs, `InvalidInput` for a bad input.
    """
    check_positive("eps", eps)
    check(
        pattern is None or pattern in ("local", "center"),
        f"pattern must be 'local', 'center' or None, got {pattern!r}.",
    )
    check(prefix_rows >= 0, f"prefix_rows must not be negative, got {prefix_rows!r}.")
    region_around(x, eps, bounds=data_range)
    check(target is None or len(target) == len(x), f"target and x must be of one length, x has {len(x)} examples.")
    exact = copy.deepcopy(model).double().eval()
    program = Program(exact)
    radii, prefixes = [], []
    for start in range(0, len(x), batch_size):
        part = x[start : start + batch_size].double()
        net = _gated(program, part, eps, data_range, pattern)
        labels = None if target is None else target[start : start + batch_size]
        radii.append(net.radii(net.end, _rows(net, labels)))
        if prefix_rows:
            prefixes.append(
                [_tau(*net.radii(i, net.entries(i, prefix_rows))) for i in weight_layers(net.steps, net.end)[:-1]]
            )
    optimal, layerwise = (torch.cat([pair[k] for pair in radii]) for k in (0, 1))
    check(
        bool(torch.isfinite(layerwise).all()), "The model's weights must be finite, got NaN or infinity in the radii."
    )
    per_output = _tau(optimal, layerwise)
    names = [net.steps[i].name for i in weight_layers(net.steps, net.end)]
    means = (
        [torch.cat([layers[k] for layers in prefixes]).nanmean().item() for k in range(len(names) - 1)]
        if prefix_rows
        else []
    )
    per_sample = per_output.nanmean(1)
    whole = per_sample.nanmean().item()
    chain = tuple(zip(names, [*means, whole], strict=True)) if prefix_rows else ()
    return TightnessReport(whole, per_sample, per_output, optimal, layerwise, chain, int(per_output.isnan().sum()))


def _gated(
    program: Program, x: Tensor, eps: float, limits: tuple[float, float] | None, pattern: Pattern | None
) -> Gated:
    box = region_around(x, eps, bounds=limits).box
    return gated(program, box, {"local": x, "center": box.centre, None: None}[pattern])


def _rows(net: Gated, target: Tensor | None) -> Tensor:
    """Margins for labels, else the logits, `[B or 1, R, K]`."""
    last = net.steps[net.end].box
    check(len(last.shape) == 2, f"The model must return logits [B, K], got the shape {tuple(last.shape)}.")
    if target is not None:
        return margin_rows(target.to(last.radius.device), last.shape[1], last.radius.dtype)
    return torch.eye(last.shape[1], dtype=last.radius.dtype, device=last.radius.device).unsqueeze(0)


def _tau(optimal: Tensor, layerwise: Tensor) -> Tensor:
    dead = layerwise == 0
    return (optimal / layerwise.masked_fill(dead, 1.0)).masked_fill(dead, math.nan)


# ------------------------------------------------------------------------------------------------ theory


def expected_init_tightness(widths: Sequence[int]) -> float:
    """Tightness of a deep linear net with independent Gaussian weights; `widths` from input to output.

    tau = prod over hidden n of sqrt(pi / (2 n)), exact for large n; about sqrt(pi / n) a layer for ReLU nets, half of whose
    neurons are active.
    """
    check(len(widths) >= 2, f"widths must name the input and the output at least, got {tuple(widths)}.")
    for width in widths:
        check_at_least("widths", width, 1)
    return math.prod(math.sqrt(math.pi / (2 * n)) for n in widths[1:-1])


def invariant_rows(
    w1: Tensor,  # [H, I]
    w2: Tensor,  # [O, H]
    tol: float = 0.0,
) -> Tensor:  # bool [O]
    """Outputs of W2 W1 at which intervals are exact: no input reaches them by paths of both signs.

    The paths of either sign from input j to output i weigh P = W2+ W1+ + W2- W1- and N = W2+ W1- + W2- W1+ (parts >= 0), and
    exactness is min(P, N) <= tol.
    """
    check(
        w1.dim() == w2.dim() == 2 and w2.shape[1] == w1.shape[0],
        f"w2 {tuple(w2.shape)} must follow w1 {tuple(w1.shape)}.",
    )
    check_non_negative("tol", tol)
    up1, down1, up2, down2 = w1.clamp(min=0), (-w1).clamp(min=0), w2.clamp(min=0), (-w2).clamp(min=0)
    return (torch.minimum(up2 @ up1 + down2 @ down1, up2 @ down1 + down2 @ up1) <= tol).all(1)


def is_propagation_invariant(w1: Tensor, w2: Tensor, tol: float = 0.0) -> bool:
    """Whether IBP is exact for x -> W2 W1 x at every output and for every box."""
    return bool(invariant_rows(w1, w2, tol).all())


@dataclass(frozen=True)
class AutoencoderBounds:
    optimal_radius: float  # means over outputs
    ibp_radius: float
    tightness: float  # mean of ratios
    reconstruction_error: float  # mean squared, of the data


def linear_autoencoder_ibp(
    x: Tensor,  # [N, D] data
    width: int,
    eps: float,
) -> AutoencoderBounds:
    """Radii through the best linear autoencoder W2 W1 = U U^T, U `[D, width]` the leading right singular vectors of the data.

    For data without a preferred direction, IBP's radius is near 2 width eps / pi and the exact one near sqrt(2 width / pi) eps.
    """
    check(x.dim() == 2 and x.is_floating_point(), f"x must be floating point [N, D], got {x.dtype} {tuple(x.shape)}.")
    check(1 <= width <= min(x.shape), f"width must lie between 1 and {min(x.shape)}, got {width!r}.")
    check(bool(torch.isfinite(x).all()), "x must be finite, got NaN or infinity.")
    check_positive("eps", eps)
    wide = x.double()
    basis = torch.linalg.svd(wide, full_matrices=False).Vh[:width].mT
    product = basis @ basis.mT
    optimal, layerwise = eps * product.abs().sum(1), eps * (basis.abs() @ basis.abs().mT).sum(1)
    error = (wide - wide @ product).square().mean().item()
    return AutoencoderBounds(
        optimal.mean().item(), layerwise.mean().item(), _tau(optimal, layerwise).nanmean().item(), error
    )


@dataclass
class TightnessRegularizer:
    """Mean of -log tau over margins and samples, differentiable: an extra of ours, to be added to a loss with a weight.

    Batch-norm in training mode takes its statistics from `x` itself. Rows without a path count nothing.
    """

    eps: float
    data_range: tuple[float, float] | None = (0.0, 1.0)
    floor: float = 1e-8  # of tau: where paths cancel the logarithm would be infinite

    def __post_init__(self) -> None:
        check_positive("eps", self.eps)
        check_positive("floor", self.floor)

    def __call__(self, model: nn.Module | Program, x: Tensor, target: Tensor | None = None) -> Tensor:
        program = model if isinstance(model, Program) else Program(model)
        net = _gated(program, x, self.eps, self.data_range, "local")
        optimal, layerwise = net.radii(net.end, _rows(net, target))
        alive = layerwise > 0
        tau = optimal.where(alive, 1.0) / layerwise.where(alive, 1.0)
        return -tau.clamp(min=self.floor).log().sum() / alive.sum().clamp(min=1)


# ------------------------------------------------------------------------------------------------ the plug


@dataclass
class IBPTightness(Instrument):
    """Mean tightness of the margins on test images, and of the net up to each layer. tau hardly depends on `eps`."""

    eps: float = 0.01
    rows: Literal["margins", "logits"] = "margins"

    slug: ClassVar[str] = "ibp_tightness"
    title: ClassVar[str] = "Tightness of interval bounds"
    needs_labels: ClassVar[bool] = False
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "vector", "signal")
    fix: ClassVar[tuple[str, ...]] = ("fast_ibp",)

    def __post_init__(self) -> None:
        check_positive("eps", self.eps)
        check_choice("rows", self.rows, ("margins", "logits"))

    def unfit(self, subject: Subject, task: Task) -> str | None:
        reason = super().unfit(subject, task)
        if reason is not None or not len(task.test):
            return reason
        try:
            place = next(subject.model.parameters(), task.test.x).device
            propagation_tightness(
                subject.model, task.test.x[:1].to(place), eps=self.eps, data_range=subject.bounds, prefix_rows=0
            )
        except SurefootError as error:
            return f"Tightness cannot be measured here: {error}"
        return None

    def measure(self, subject: Subject, task: Task) -> Finding:
        split = task.sample(self.slug, task.pick(quick=32, standard=128, thorough=500))
        check(len(split) > 0, "The test split is empty; give test examples.")
        logits = predict(subject.model, split.x)
        check(bool(torch.isfinite(logits).all()), "The model's logits must be finite, got NaN or infinity.")
        reason = self.unfit(subject, task)
        if reason is not None:
            raise InvalidInput(reason)
        place = next(subject.model.parameters(), split.x).device
        target = None
        if self.rows == "margins":
            target = (logits.argmax(1) if split.y is None else split.labels).to(place)
        with evaluating(subject.model):
            report = propagation_tightness(
                subject.model, split.x.to(place), target, eps=self.eps, data_range=subject.bounds
            )
        alive = ~report.per_sample.isnan()
        check(
            bool(alive.any()), "No output of the model depends on its input, so that there is no tightness to measure."
        )
        return self._finding(report, report.per_sample[alive].cpu().numpy().astype(np.float64))

    def _finding(self, report: TightnessReport, samples: np.ndarray) -> Finding:
        value = float(samples.mean())
        low, high = mean_interval(samples, bounds=(0.0, 1.0))
        lost = 1 / value if value > 0 else math.inf
        layers = {f"{k}: {name}": tau for k, (name, tau) in enumerate(report.per_layer_prefix, 1)}
        return Finding(
            instrument=self.slug,
            name=f"Tightness of interval bounds ({self.rows})",
            value=value,
            low=low,
            high=high,
            unit="share",
            better="higher",
            n=len(samples),
            sentence=f"Interval bounds of the {self.rows} are about {lost:.3g} times as wide as what the net can reach while its active "
            f"neurons stay the same, on average over {len(samples)} inputs.",
            samples=samples,
            pictures=(_chart(layers),),
            fix=self.fix,
            warnings=(f"{report.dead} {DEAD}",) if report.dead else (),
            details={"eps": self.eps, "rows": self.rows, "arithmetic": "float64", "up_to_layer": layers},
        )


def _chart(layers: dict[str, float]) -> Chart:
    figure = {
        "data": [{"type": "bar", "x": list(layers), "y": list(layers.values())}],
        "layout": {
            "xaxis": {"title": {"text": "net up to this layer"}},
            "yaxis": {"title": {"text": "tightness"}, "type": "log"},
        },
    }
    return Chart(
        figure,
        "Exact over interval radius of the net up to each ReLU's input and of the margins; 1 is exact, the scale is logarithmic.",
    )
