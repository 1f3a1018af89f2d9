"""The instrument: how far a model with this head is certified, and pictures of what its components are and say."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from surefoot.certified.prototype_rbf.certificate import RadiusReport, cbc_radius, unwrap
from surefoot.certified.prototype_rbf.head import ClassificationByComponents, Reasoning
from surefoot.certified.prototype_rbf.training import find_head, without
from surefoot.core.finding import Chart, Cost, Finding, Thumbnails
from surefoot.core.instrument import Instrument
from surefoot.core.statistics import mean_interval, wilson_interval
from surefoot.core.subject import Subject, predict
from surefoot.core.task import Split, Task
from surefoot.errors import InvalidInput, UnsupportedOp, check
from surefoot.nn.lipschitz import lipschitz_bound

SHOWN = 40  # components drawn
AGREE = 1e-4  # what the split model may differ from the whole, on the scale of probabilities


@dataclass
class Components(Instrument):
    """Mean certified L2 radius of a model whose last module is `ComponentLogits`, its components and its reasoning.

    The radius is one of inputs where the backbone has a known Lipschitz constant, else of features, and the finding says which.
    Radii are cut at the diameter of the data, beyond which nothing lies. `radii` None: quarters of the largest one seen.
    """

    radii: Sequence[float] | None = None

    slug: ClassVar[str] = "components"
    title: ClassVar[str] = "Components and certified radius"
    fix: ClassVar[tuple[str, ...]] = ("prototype_rbf",)

    def __post_init__(self) -> None:
        check(self.radii is None or (len(self.radii) > 0 and min(self.radii) > 0), f"radii must be positive, got {self.radii!r}.")  # fmt: skip

    def unfit(self, subject: Subject, task: Task) -> str | None:
        reason = super().unfit(subject, task)
        if reason is not None:
            return reason
        found = find_head(subject.model)
        if found is None:
            return "It reads models with a head of components (the treatment prototype_rbf puts one on), and this one has none."
        try:
            same = _split_agrees(subject, task.test.x[:2], *found)
        except (RuntimeError, ValueError, TypeError):
            same = False
        return (
            None
            if same
            else "Something stands behind the model's head of components, so its answers are not the head's alone."
        )

    def measure(self, subject: Subject, task: Task) -> Finding:
        reason = self.unfit(subject, task)
        if reason is not None:
            raise InvalidInput(reason)
        split = task.sample(self.slug, task.pick(quick=100, standard=500, thorough=2000))
        check(len(split) > 0, "There are no test examples to certify.")
        logits = predict(subject.model, split.x)
        check(bool(torch.isfinite(logits).all()), "The model's logits must be finite, got NaN or infinity.")
        found = find_head(subject.model)
        assert found is not None
        name, head = found[0], copy.deepcopy(found[1]).cpu()  # like the backbone: float64 is on every CPU
        backbone = without(subject.model, name).cpu().double()
        backbone.eval()
        known = unwrap(head)
        x, y = split.x.cpu(), split.labels.cpu()
        try:
            constant: float | None = lipschitz_bound(backbone, x[:1])
        except UnsupportedOp:
            constant = None
        exponential = isinstance(known, ClassificationByComponents) and known.kernel == "exp"
        report = cbc_radius(
            head, x, y, backbone=backbone, feature_space=constant is None, lipschitz=constant,
            method="closed" if exponential or not isinstance(known, ClassificationByComponents) else "bisect",
        )  # fmt: skip
        cap = _diameter(subject, split) if constant is not None else math.inf
        return self._finding(subject, split, report, cap, constant, head, backbone)

    def _finding(
        self, subject: Subject, split: Split, report: RadiusReport, cap: float, constant: float | None,
        head: nn.Module, backbone: nn.Module,
    ) -> Finding:  # fmt: skip
        finite = report.radius[report.radius.isfinite()]
        cap = min(cap, 2 * float(finite.amax()) if len(finite) and float(finite.amax()) > 0 else 1.0)
        radii = np.asarray(report.radius.clamp(max=cap).numpy())
        low, high = mean_interval(radii, bounds=(0.0, cap))
        n, unit = len(radii), "L2" if constant is not None else "L2 of features"
        ticks = tuple(self.radii) if self.radii is not None else tuple(float(radii.max()) * q for q in (0.25, 0.5, 0.75))  # fmt: skip
        parts = (_share(self.slug, "accuracy", report.correct), *(_at(self.slug, report, r) for r in ticks if r > 0))
        warnings = () if constant is not None else (
            "The backbone has no known Lipschitz constant, so these are radii in features: they say nothing about inputs.",
        )  # fmt: skip
        known = unwrap(head)
        shown = known.reasoning
        with torch.no_grad():
            features = backbone(split.x.cpu().double())
            detected = copy.deepcopy(known).cpu().double().eval().detect(features)
        return Finding(
            instrument=self.slug,
            name="mean certified radius",
            value=float(radii.mean()),
            low=low,
            high=high,
            unit=unit,
            better="higher",
            n=n,
            sentence=(
                f"A change has to be {radii.mean():.3g} long on average ({unit}) before a right answer can turn; "
                f"{report.correct.double().mean():.0%} of the answers are right, and {shown.logits.shape[1]} components give them."
            ),
            cost=Cost(passes=2 * n),
            samples=radii,
            parts=parts,
            pictures=(
                *_drawn(subject, split, head, backbone, detected),
                _reasoning_chart(subject, shown),
                _curve(report, unit),
            ),
            fix=self.fix,
            warnings=warnings,
            details={
                "components": int(shown.logits.shape[1]), "lipschitz": constant, "median": report.median,
                "infinite": report.infinite, "space": "input" if constant is not None else "feature", "arithmetic": "float64",
                "mean_radius_paper": None if report.radius_paper is None else float(report.radius_paper.clamp(max=cap).mean()),
            },
        )  # fmt: skip


def _split_agrees(subject: Subject, x: Tensor, name: str, head: nn.Module) -> bool:
    """Whether head(backbone(x)) is what the model says."""
    backbone = without(subject.model, name)
    like = next(head.parameters())
    x = x.to(like.device, like.dtype)
    pieces = predict(nn.Sequential(backbone, head), x).exp()
    return bool(torch.allclose(pieces, predict(subject.model, x).exp(), atol=AGREE, equal_nan=True))


def _diameter(subject: Subject, split: Split) -> float:
    """The longest change there can be: the diagonal of the valid range, or of the range seen."""
    if subject.bounds is not None:
        return (subject.bounds[1] - subject.bounds[0]) * math.sqrt(math.prod(split.x.shape[1:]))
    return float((split.x.amax(0) - split.x.amin(0)).double().norm()) or 1.0


def _share(slug: str, name: str, right: Tensor) -> Finding:
    k, n = int(right.sum()), len(right)
    low, high = wilson_interval(k, n)
    return Finding(slug, name, k / n, low, high, "share", "higher", n, f"{k} of {n} answers are right.", samples=np.asarray(right.double().numpy()))  # fmt: skip


def _at(slug: str, report: RadiusReport, r: float) -> Finding:
    hit = report.correct & (report.radius >= r)
    k, n = int(hit.sum()), len(hit)
    low, high = wilson_interval(k, n)
    return Finding(
        slug, f"certified accuracy at {r:.3g}", k / n, low, high, "share", "higher", n,
        f"{k} of {n} examples keep their right class under every change shorter than {r:.3g}.", samples=np.asarray(hit.double().numpy()),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ pictures


def _names(subject: Subject) -> list[str]:
    return list(subject.class_names) or [str(c) for c in range(subject.num_classes)]


def _drawn(
    subject: Subject, split: Split, head: nn.Module, backbone: nn.Module, detected: Tensor
) -> tuple[Thumbnails, ...]:
    """The components as images where they live in pixels, else the example each is seen in most."""
    shape = tuple(split.x.shape[1:])
    if subject.modality != "image" or len(shape) != 3 or shape[0] not in (1, 3):
        return ()
    known = unwrap(head)
    pixels = _as_pixels(known, backbone, split.x) if isinstance(known, ClassificationByComponents) else None
    present, absent = (part.detach() for part in known.reasoning.strengths())
    most = (present + absent).amax(1).argsort(descending=True)[:SHOWN].cpu()
    names = _names(subject)
    captions = tuple(
        f"for {names[int(present[k].argmax())]}, against {names[int(absent[k].argmax())]}" for k in most.tolist()
    )
    images = pixels[most] if pixels is not None else split.x.cpu()[detected.argmax(0).cpu()[most]]
    array = (images.double().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    what = "The components themselves, in pixels" if pixels is not None else "For each component, the test image it is seen in most"  # fmt: skip
    return (Thumbnails(array[..., 0] if shape[0] == 1 else array, captions, f"{what}, the most important first."),)


def _as_pixels(head: ClassificationByComponents, backbone: nn.Module, x: Tensor) -> Tensor | None:
    """Components mapped back through the backbone where that only scales and shifts single pixels."""
    shape = x.shape[1:]
    if head.components.shape[1] != math.prod(shape):
        return None
    with torch.no_grad():
        probe = x[:1].double()
        shift = backbone(torch.zeros_like(probe))[0]
        factor = backbone(torch.ones_like(probe))[0] - shift
        if not torch.allclose(backbone(probe)[0], probe.flatten() * factor + shift, atol=1e-9) or bool((factor == 0).any()):  # fmt: skip
            return None
        return ((head.components.cpu().double() - shift) / factor).reshape(-1, *shape)


def _reasoning_chart(subject: Subject, reasoning: Reasoning) -> Chart:
    weights = reasoning.linear()[0].detach().cpu().double()  # [K, C]
    most = weights.abs().amax(1).argsort(descending=True)[:SHOWN]
    limit = float(weights.abs().amax())
    data = {
        "type": "heatmap", "z": weights[most].T.tolist(), "x": [f"component {k}" for k in most.tolist()], "y": _names(subject),
        "colorscale": "RdBu", "zmid": 0, "zmin": -limit, "zmax": limit, "colorbar": {"title": {"text": "for − against"}},
    }  # fmt: skip
    layout = {"xaxis": {"showticklabels": False, "title": {"text": "components"}}, "yaxis": {"type": "category"}}
    return Chart({"data": [data], "layout": layout}, "What each class makes of each component: its presence speaks for the class (positive) or against it.")  # fmt: skip


def _curve(report: RadiusReport, unit: str) -> Chart:
    right = np.sort(np.asarray(report.radius[report.correct & report.radius.isfinite()].numpy()))
    n = len(report.radius)
    endless = int((report.correct & report.radius.isinf()).sum())
    share = (np.arange(len(right), 0, -1) + endless) / n
    line = {"type": "scatter", "mode": "lines", "line": {"shape": "vh"}}
    line |= {"x": [0.0, *right.tolist()], "y": [(len(right) + endless) / n, *share.tolist()]}
    layout = {
        "xaxis": {"title": {"text": f"{unit} radius"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "certified accuracy"}, "range": [0, 1]},
    }
    return Chart({"data": [line], "layout": layout}, "Share of examples whose right class is certified up to each radius.")  # fmt: skip
