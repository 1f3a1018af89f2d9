"""The fixed mixture, the choice of its weight, and the measurement of the premise it rests on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.core.finding import Chart
from surefoot.core.subject import predict
from surefoot.errors import InvalidInput, Refused, check, check_open_unit, check_positive


def mix_log_probs(
    accurate: Tensor,  # logits [B, K]
    robust: Tensor,  # logits [B, K]
    alpha: float | Tensor,  # in [0, 1]; a tensor broadcasts against [B, K]
) -> Tensor:  # [B, K] log-probabilities
    """ln((1 - a) softmax(g) + a softmax(h)) in log space: finite, and with finite gradients, for logits of any size.

    At a = 0 or 1 exactly it is the log-softmax of the one base that is left, as the other's log weight is minus infinity.
    """
    _check_pair(accurate, robust)
    log_g, log_h = accurate.log_softmax(-1), robust.log_softmax(-1)
    if not isinstance(alpha, Tensor):
        _check_alpha(alpha)
        if alpha in (0, 1):
            return log_h if alpha else log_g
        return torch.logaddexp(math.log1p(-alpha) + log_g, math.log(alpha) + log_h)
    inside = (alpha > 0) & (alpha < 1)
    weight = torch.where(inside, alpha, 0.5)  # keeps the gradient of the branch not taken finite
    mixed = torch.logaddexp(torch.log1p(-weight) + log_g, weight.log() + log_h)
    return torch.where(inside, mixed, torch.where(alpha > 0, log_h, log_g))


def _check_alpha(alpha: float) -> None:
    check(0 <= alpha <= 1, f"alpha must lie in [0, 1], got {alpha!r}.")


def _check_pair(accurate: Tensor, robust: Tensor) -> None:
    if accurate.dim() != 2 or accurate.shape != robust.shape:
        raise InvalidInput(f"Both bases must give logits [B, K] over the same classes, got {list(accurate.shape)} and {list(robust.shape)}.")  # fmt: skip
    for name, logits in (("accurate", accurate), ("robust", robust)):
        check(bool(torch.isfinite(logits).all()), f"The {name} base gives NaN or infinite logits; look at its weights and input range.")  # fmt: skip


class Composite(nn.Module):
    """Two bases that stay in evaluation mode whatever `train()` says: they are not what is trained."""

    def __init__(
        self, accurate: nn.Module, robust: nn.Module, *, accurate_scale: float = 1.0, robust_scale: float = 1.0
    ) -> None:
        super().__init__()
        check_positive("accurate_scale", accurate_scale)
        check_positive("robust_scale", robust_scale)
        for name, base in (("accurate", accurate), ("robust", robust)):
            training = any(module.training for module in base.modules())
            check(not training, f"The {name} base is in training mode; call .eval() on it first.")
        self.accurate, self.robust = accurate, robust
        self.accurate_scale, self.robust_scale = accurate_scale, robust_scale

    def train(self, mode: bool = True) -> Composite:
        super().train(mode)
        self.accurate.eval()
        self.robust.eval()
        return self

    def check_mode(self) -> None:
        if self.accurate.training or self.robust.training:
            raise Refused("A base of the mixture was put into training mode, which changes what it predicts; call .eval().")  # fmt: skip


class MixedClassifier(Composite):
    """The mixture with a fixed weight: log-probabilities `[B, K]`, usable as logits. Each base keeps its own preprocessing."""

    def __init__(
        self,
        accurate: nn.Module,
        robust: nn.Module,
        *,
        alpha: float = 0.8,
        accurate_scale: float = 1.0,
        robust_scale: float = 1.0,
    ) -> None:
        super().__init__(accurate, robust, accurate_scale=accurate_scale, robust_scale=robust_scale)
        _check_alpha(alpha)
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        self.check_mode()
        return mix_log_probs(self.accurate_scale * self.accurate(x), self.robust_scale * self.robust(x), self.alpha)


class Amplified(nn.Module):
    """MixedNUTS's transform of the robust base, which makes sure answers surer before they are mixed; nothing is trained.

        z -> s |c(z)|^p sgn(c(z)),   c(z) = gelu((z - mean z) / std z + b)

    over each example's logits. To be mixed like any base: `MixedClassifier(g, Amplified(h), alpha=...)`.
    """

    def __init__(self, model: nn.Module, *, scale: float = 3.0, power: float = 2.0, shift: float = 0.0) -> None:
        super().__init__()
        check_positive("scale", scale)
        check_positive("power", power)
        self.model, self.scale, self.power, self.shift = model, scale, power, shift
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        clamped = F.gelu(F.layer_norm(logits, logits.shape[-1:]) + self.shift)
        size = clamped.abs().clamp_min(torch.finfo(logits.dtype).tiny)  # |0|^p has no gradient for p < 1
        return self.scale * clamped.sign() * size**self.power


class Resized(nn.Module):
    """A base that wants images of another size, with a resize that gradients pass through."""

    def __init__(self, model: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.size = model, size
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(F.interpolate(x, size=self.size, mode="bilinear", align_corners=False))


def check_bases(accurate: nn.Module, robust: nn.Module, x: Tensor) -> None:
    """Refuse bases that do not both take these inputs and give the same number of classes."""
    found = []
    for name, base in (("accurate", accurate), ("robust", robust)):
        try:
            found.append(predict(base, x[:2]))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise InvalidInput(f"The {name} base does not take inputs of shape {list(x.shape[1:])}; wrap it in Resized(...) or give it its own preprocessing.") from error  # fmt: skip
    _check_pair(*found)


# --- the weight and the premise -------------------------------------------------------------------------------------


def probability_margins(
    logits: Tensor,  # [B, K]
    y: Tensor,  # int64 [B]
    *,
    scale: float = 1.0,
) -> Tensor:  # [B], positive exactly where the prediction is right
    """p_y minus the largest other probability."""
    p = (scale * logits).softmax(-1)
    own = p.gather(1, y[:, None])[:, 0]
    return own - p.scatter(1, y[:, None], -1.0).amax(1)


def fit_alpha(
    margins: Tensor,  # [n] probability margins of the robust base at its attacked validation points
    *,
    budget: float = 0.05,
) -> float:
    """The smallest weight at which at most the share `budget` of the points that h holds can be lost to any g.

    a = 1 / (1 + m), m the order statistic of the positive margins with at most `budget` of them below it; never below 1/2.
    A start: attack the mixture itself before believing it, and never choose on test data.
    """
    check_open_unit("budget", budget)
    held = margins[margins > 0].double().sort().values
    check(len(held) > 0, "The robust base holds none of these points under attack; there is nothing to protect.")
    return max(1.0 / (1.0 + held[math.floor(budget * len(held))].item()), 0.5)


@dataclass(frozen=True)
class GapReport:
    """Median probability margins |p1 - p2| of a net by case; `gap` is right under attack over wrong on clean inputs."""

    right_clean: float
    wrong_clean: float
    right_attacked: float
    wrong_attacked: float
    gap: float
    margins: dict[str, Tensor]

    def chart(self) -> Chart:
        data = [{"type": "box", "name": name, "y": values.tolist()} for name, values in self.margins.items()]
        layout = {"yaxis": {"title": {"text": "margin p1 - p2"}, "range": [0, 1.02]}, "showlegend": False}
        return Chart({"data": data, "layout": layout}, "A base worth mixing is sure where it is right under attack and unsure where it is wrong on clean inputs.")  # fmt: skip


def confidence_gap(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor],  # (model, x, y) -> attacked x
    *,
    scale: float = 1.0,
) -> GapReport:
    """Whether the net is surer when right than when wrong; medians are NaN where a case does not occur."""
    cases: dict[str, list[Tensor]] = {f"{how}, {on}": [] for on in ("clean", "attacked") for how in ("right", "wrong")}
    for x, y in batches:
        for on, inputs in (("clean", x), ("attacked", attack(model, x, y))):
            margin = probability_margins(predict(model, inputs).double(), y.cpu(), scale=scale)
            top = (scale * predict(model, inputs).double()).softmax(1).topk(2).values
            size = top[:, 0] - top[:, 1]
            cases[f"right, {on}"].append(size[margin > 0])
            cases[f"wrong, {on}"].append(size[margin <= 0])
    check(any(len(part) for part in cases.values()), "There is nothing to measure: no batches were given.")
    margins = {name: torch.cat(parts) for name, parts in cases.items()}
    median = {name: v.quantile(0.5).item() if len(v) else math.nan for name, v in margins.items()}
    gap = median["right, attacked"] / max(median["wrong, clean"], 1e-12)
    return GapReport(
        median["right, clean"], median["wrong, clean"], median["right, attacked"], median["wrong, attacked"], gap, margins
    )  # fmt: skip
