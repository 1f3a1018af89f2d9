"""Verified accuracy: the share of test images that provably keep their right class for every L-infinity change up to eps.

An image counts if every margin f_y - f_j has a positive lower bound over the box of radius eps, cut off at the valid
range: by intervals (IBP) first, then by linear bounds (CROWN) for what is still open, and, where the net is small, by complete
verification, which also finds the images that an attack does break. It is a proof, in float64; an image that does not count may
still be safe. Accuracy at eps 0 is the plain accuracy.

Source: Gowal et al. 2018, arXiv 1810.12715 (IBP); Zhang et al. 2018, arXiv 1811.00866 (CROWN); Tjeng et al. 2019, arXiv
1711.07356 (the mixed-integer program).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from surefoot.core.finding import Chart, Direction, Finding
from surefoot.core.instrument import Instrument
from surefoot.core.statistics import wilson_interval
from surefoot.core.subject import Modality, Subject, predict
from surefoot.core.task import Task
from surefoot.errors import InvalidInput, UnsupportedOp, check, check_at_least, check_positive
from surefoot.nn.bounds import (
    TOLERANCE,
    Box,
    Limits,
    Method,
    Program,
    decide_margins,
    propagate,
    region_around,
    supported,
    verified,
)

SHARES = (0.25, 0.5, 1.0)  # of eps, for the curve


def neuron_count(model: torch.nn.Module, example: Tensor) -> int:
    """Neurons before ReLUs, a measure of what CROWN costs; `example` is `[B, ...]`."""
    exact = copy.deepcopy(model).eval()
    with torch.no_grad():
        walked = propagate(Program(exact), Box(example, example))
    return sum(box.shape[1:].numel() for _, box in walked.rectifiers)


@dataclass
class VerifiedAccuracy(Instrument):
    """`eps` is in the scale of the data; 0.1 suits small grey images, 8/255 or less larger ones.

    `crown_neurons`: nets with more ReLU neurons get the last layer's CROWN only (CROWN-IBP, with optimised slopes), as full CROWN
    grows with the square of that number; so does every net on the quick budget. `complete_neurons`: nets with at most so many
    are decided completely where bounds leave an image open, up to `nodes` branch-and-bound nodes a class (a count, so that every
    machine finds the same).
    """

    eps: float = 0.1
    crown_neurons: int = 12_000
    complete_neurons: int = 150
    nodes: int = 200

    slug: ClassVar[str] = "verified_accuracy"
    title: ClassVar[str] = "Verified accuracy"
    modalities: ClassVar[tuple[Modality, ...]] = ("image",)
    fix: ClassVar[tuple[str, ...]] = ("fast_ibp",)

    def __post_init__(self) -> None:
        check_positive("eps", self.eps)
        check(self.crown_neurons >= 0, f"crown_neurons must not be negative, got {self.crown_neurons!r}.")
        check(self.complete_neurons >= 0, f"complete_neurons must not be negative, got {self.complete_neurons!r}.")
        check_at_least("nodes", self.nodes, 1)

    def unfit(self, subject: Subject, task: Task) -> str | None:
        reason = super().unfit(subject, task)
        if reason is not None:
            return reason
        parameter = next(subject.model.parameters(), None)
        example = task.test.x[:1] if parameter is None else task.test.x[:1].to(parameter.device, parameter.dtype)
        reason = supported(subject.model, example)
        return None if reason is None else f"No proof is possible for this model: {reason}"

    def measure(self, subject: Subject, task: Task) -> Finding:
        split = task.sample(self.slug, task.pick(quick=32, standard=128, thorough=500))
        check(len(split) > 0, "The test split is empty; give labelled test examples.")
        reason = self.unfit(subject, task)
        if reason is not None:
            raise InvalidInput(reason)
        x, y = split.x, split.labels
        logits = predict(subject.model, x)
        check(bool(torch.isfinite(logits).all()), "The model's logits must be finite, got NaN or infinity.")
        clean = logits.argmax(1) == y
        parameter = next(subject.model.parameters(), None)
        place = torch.device("cpu") if parameter is None else parameter.device
        wide = copy.deepcopy(subject.model).double()
        neurons = neuron_count(wide, x[:1].to(place, torch.float64))
        full = neurons <= self.crown_neurons and task.budget != "quick"
        method: Method = "crown" if full else "alpha-crown-ibp"

        def proven(eps: float, among: Tensor, how: Method) -> Tensor:
            """Only right answers can be proven, and what holds at a larger radius holds at a smaller one."""
            result = torch.zeros_like(clean)
            index = among.nonzero().flatten()
            if len(index):
                chosen = (x[index].to(place), y[index].to(place))
                result[index] = verified(wide, *chosen, eps, method=how, bounds=subject.bounds).cpu()
            return result

        at_eps = proven(self.eps, clean, method)
        broken = torch.zeros_like(clean)
        if neurons <= self.complete_neurons:
            for i in (clean & ~at_eps).nonzero().flatten().tolist():
                status = self._decide(wide, x[i : i + 1].to(place), int(y[i]), subject.bounds)
                at_eps[i], broken[i] = status == "verified", status == "falsified"
        curve = [at_eps]
        for share in reversed(SHARES[:-1]):
            curve.insert(0, curve[0] | proven(share * self.eps, clean & ~curve[0], method))
        by_ibp = proven(self.eps, at_eps, "ibp")
        return self._finding(clean, by_ibp, broken, curve, method, neurons)

    def _decide(self, model: torch.nn.Module, x: Tensor, y: int, bounds: tuple[float, float] | None) -> str:
        box = region_around(x.double(), self.eps, bounds=bounds).box
        limits = Limits(time_limit=600.0, max_nodes=self.nodes)
        try:
            return decide_margins(model, box.lower, box.upper, y, limits=limits).status
        except UnsupportedOp:  # bounds know more operators than the program does
            return "unknown"

    def _finding(
        self, clean: Tensor, by_ibp: Tensor, broken: Tensor, curve: list[Tensor], method: Method, neurons: int
    ) -> Finding:
        at_eps = curve[-1]
        n, count = len(clean), int(at_eps.sum())
        parts = [self._share("Clean accuracy (same images)", clean)]
        parts += [
            self._share(f"Verified accuracy at eps {share * self.eps:.4g}", right)
            for share, right in zip(SHARES, curve, strict=True)
        ]
        parts.append(self._share(f"Verified by intervals alone at eps {self.eps:.4g}", by_ibp))
        decided = neurons <= self.complete_neurons
        if decided:
            parts.append(self._share(f"Broken by a replayed counterexample at eps {self.eps:.4g}", broken, "lower"))
        open_ = int((clean & ~at_eps & ~broken).sum())
        limited = f"Full CROWN was left out for a net of {neurons} ReLU neurons; {open_} images stay open, and the true share may be higher."
        low, high = wilson_interval(count, n)
        return Finding(
            instrument=self.slug,
            name=f"Verified accuracy (L-infinity, eps {self.eps:.4g})",
            value=count / n,
            low=low,
            high=high,
            unit="share",
            better="higher",
            n=n,
            sentence=f"{count} of {n} images are proven to keep their right class for every change of at most "
            f"{self.eps:.4g} per pixel; {int(clean.sum())} are right without a change.",
            samples=at_eps.numpy().astype(np.float64),
            parts=tuple(parts),
            pictures=(self._chart(clean, curve),),
            fix=self.fix,
            warnings=(limited,) if method != "crown" and open_ else (),
            details={
                "eps": self.eps,
                "method": method,
                "arithmetic": "float64",
                "tolerance": TOLERANCE,
                "relu_neurons": neurons,
                "complete": decided,
            },
        )

    def _share(self, name: str, right: Tensor, better: Direction = "higher") -> Finding:
        n, count = len(right), int(right.sum())
        low, high = wilson_interval(count, n)
        return Finding(
            instrument=self.slug,
            name=name,
            value=count / n,
            low=low,
            high=high,
            unit="share",
            better=better,
            n=n,
            sentence=f"{name}: {count} of {n}.",
            samples=right.numpy().astype(np.float64),
        )

    def _chart(self, clean: Tensor, curve: list[Tensor]) -> Chart:
        radii = [0.0, *(share * self.eps for share in SHARES)]
        shares = [100 * right.double().mean().item() for right in (clean, *curve)]
        figure = {
            "data": [{"type": "scatter", "mode": "lines+markers", "x": radii, "y": shares, "name": "verified"}],
            "layout": {
                "xaxis": {"title": {"text": "radius eps (L-infinity)"}},
                "yaxis": {"title": {"text": "proven correct, %"}, "range": [0, 100]},
            },
        }
        return Chart(figure, "Share of images that provably keep their right class, by the radius of the change.")
