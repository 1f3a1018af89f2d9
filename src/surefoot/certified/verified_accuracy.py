"""Verified accuracy: the share of test images that provably keep their right class for every L-infinity change up to eps.

An image counts if every margin f_y - f_j has a positive lower bound over the box of radius eps, cut off at the valid
range: by intervals (IBP) and the last layer's linear bounds first, then, for what is still open and what a short attack does not
break, by the dear linear bounds (CROWN), and, where the net is small, by complete verification. It is a proof, in float64; an image that does
not count may still be safe. Accuracy at eps 0 is the plain accuracy.

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
from surefoot.core.work import WorkMeter
from surefoot.errors import InvalidInput, UnsupportedOp, check, check_at_least, check_positive
from surefoot.nn.attacks import ZeroGradient, pgd
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
STEPS = 20  # of the attack that spares proofs which cannot succeed
# Of the dear bounds: their coefficients are read often, so they should stay near the processor.
BATCH, MEMORY_MB = 16, 32.0


def neuron_count(model: torch.nn.Module, example: Tensor) -> int:
    """Neurons before ReLUs, a measure of what CROWN costs; `example` is `[B, ...]`."""
    exact = copy.deepcopy(model).eval()
    with torch.no_grad():
        walked = propagate(Program(exact), Box(example, example))
    return sum(box.shape[1:].numel() for _, box in walked.rectifiers)


@dataclass
class _Search:
    """What is known of every image at every radius of the curve: proven, broken, or open."""

    model: torch.nn.Module  # float64
    x: Tensor  # [N, ...] float64, on the model's device
    y: Tensor
    clean: Tensor  # bool [N], on the CPU like the other answers
    eps: float
    bounds: tuple[float, float] | None
    method: Method  # the dear one
    asked: int = 0  # images that only the dear bounds could prove
    missed: int = 0  # those of them that the budget did not reach
    spent: float = 0.0  # nominal seconds

    def __post_init__(self) -> None:
        self.proven = torch.zeros(len(SHARES), len(self.y), dtype=torch.bool)  # rows by rising radius
        self.broken = self.proven.clone()
        self.by_ibp = self.proven[0].clone()

    def prove(
        self, among: Tensor, share: float, method: Method, *, batch_size: int = 64, memory_mb: float = 256.0
    ) -> Tensor:
        """bool [N]: which of the images `among` (bool [N]) are proven at this share of eps."""
        found = torch.zeros_like(self.clean)
        index = among.nonzero().flatten()
        if len(index):
            at = index.to(self.x.device)
            found[index] = verified(
                self.model, self.x[at], self.y[at], share * self.eps, method=method, bounds=self.bounds, batch_size=batch_size, memory_mb=memory_mb
            ).cpu()  # fmt: skip
        return found

    def cheap(self) -> None:
        """IBP and CROWN-IBP, largest radius first: what holds there holds at the smaller ones."""
        self.by_ibp = self.prove(self.clean, 1.0, "ibp")
        known = self.by_ibp
        for row in reversed(range(len(SHARES))):
            known = known | self.prove(self.clean & ~known, SHARES[row], "crown-ibp")
            self.proven[row] = known

    def attack(self, generator: torch.Generator) -> None:
        """PGD, smallest radius first: what breaks there breaks at the larger ones, and no proof of it is tried."""
        known = torch.zeros_like(self.clean)
        for row, share in enumerate(SHARES):
            index = (self.clean & ~self.proven[row] & ~known).nonzero().flatten()
            if len(index):
                at = index.to(self.x.device)
                try:
                    found = pgd(self.model, self.x[at], self.y[at], eps=share * self.eps, steps=STEPS, loss="margin", bounds=self.bounds, generator=generator)  # fmt: skip
                    known[index] = found.broken.cpu()
                except ZeroGradient:  # then every image goes to the proofs
                    pass
            self.broken[row] = known

    def dear(self, budget: float) -> None:
        """The dear bounds, a few images at a time: each from its smallest open radius up, until one fails or is broken."""
        waiting = (self.clean & (~self.proven & ~self.broken).any(0)).nonzero().flatten()
        self.asked, step = len(waiting), 1
        while len(waiting) and self.spent < budget:
            batch, waiting = waiting[:step], waiting[step:]
            among = torch.zeros_like(self.clean).index_fill_(0, batch, True)
            with WorkMeter() as meter:
                for row, share in enumerate(SHARES):
                    among &= ~self.broken[row]
                    self.proven[row] |= self.prove(among & ~self.proven[row], share, self.method, batch_size=BATCH, memory_mb=MEMORY_MB)  # fmt: skip
                    among &= self.proven[row]
            self.spent += meter.seconds
            step = int(max(1.0, min(BATCH, (budget - self.spent) / max(meter.seconds / len(batch), 1e-9))))
        self.missed = len(waiting)


@dataclass
class VerifiedAccuracy(Instrument):
    """`eps` is in the scale of the data; 0.1 suits small grey images, 8/255 or less larger ones.

    `crown_neurons`: nets with more ReLU neurons get the last layer's CROWN only (CROWN-IBP, with optimised slopes), as full CROWN
    grows with the square of that number; so does every net on the quick budget. `complete_neurons`: nets with at most so many
    are decided completely where bounds leave an image open, up to `nodes` branch-and-bound nodes a class (a count, so that every
    machine finds the same).

    The dear bounds go image by image from the smallest radius up and stop at the first that fails. They may take `task.budget`'s nominal
    seconds (15, 60, 1500; counted work, not time); images that they did not reach stay open, and the finding says how many.
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
        wide = copy.deepcopy(subject.model).double().eval()
        x, y = x.to(place, torch.float64), y.to(place)
        neurons = neuron_count(wide, x[:1])
        full = neurons <= self.crown_neurons and task.budget != "quick"
        search = _Search(wide, x, y, clean, self.eps, subject.bounds, "crown" if full else "alpha-crown-ibp")
        search.cheap()
        search.attack(task.generator(self.slug, place))
        search.dear(task.pick(quick=15.0, standard=60.0, thorough=1500.0))
        if neurons <= self.complete_neurons:
            for i in (clean & ~search.proven[-1] & ~search.broken[-1]).nonzero().flatten().tolist():
                status = self._decide(wide, x[i : i + 1], int(y[i]), subject.bounds)
                search.proven[:, i] |= status == "verified"
                search.broken[-1, i] = status == "falsified"
        return self._finding(search, neurons)

    def _decide(self, model: torch.nn.Module, x: Tensor, y: int, bounds: tuple[float, float] | None) -> str:
        box = region_around(x, self.eps, bounds=bounds).box
        limits = Limits(time_limit=600.0, max_nodes=self.nodes)
        try:
            return decide_margins(model, box.lower, box.upper, y, limits=limits).status
        except UnsupportedOp:  # bounds know more operators than the program does
            return "unknown"

    def _finding(self, search: _Search, neurons: int) -> Finding:
        clean, curve, broken, method = search.clean, list(search.proven), search.broken[-1], search.method
        at_eps = curve[-1]
        n, count = len(clean), int(at_eps.sum())
        parts = [self._share("Clean accuracy (same images)", clean)]
        parts += [
            self._share(f"Verified accuracy at eps {share * self.eps:.4g}", right)
            for share, right in zip(SHARES, curve, strict=True)
        ]
        parts.append(self._share(f"Verified by intervals alone at eps {self.eps:.4g}", search.by_ibp))
        parts.append(self._share(f"Broken by a replayed counterexample at eps {self.eps:.4g}", broken, "lower"))
        open_ = int((clean & ~at_eps & ~broken).sum())
        warnings = []
        if method != "crown" and open_:
            warnings.append(
                f"Full CROWN was left out for a net of {neurons} ReLU neurons; {open_} images stay open, and the true share may be higher."
            )
        if search.missed:
            warnings.append(
                f"The budget's work was spent before {search.missed} of {search.asked} open images were tried with {method}; they count as not "
                "proven, and the true share may be higher."
            )
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
            warnings=tuple(warnings),
            details={
                "eps": self.eps,
                "method": method,
                "arithmetic": "float64",
                "tolerance": TOLERANCE,
                "relu_neurons": neurons,
                "complete": neurons <= self.complete_neurons,
                "open": open_,
                "tried_with_dear_bounds": search.asked - search.missed,
                "not_reached": search.missed,
                "work_seconds": round(search.spent, 3),
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
