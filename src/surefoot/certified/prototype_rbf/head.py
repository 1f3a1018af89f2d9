"""The heads: components, how strongly each is detected, and what a class makes of that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from surefoot.errors import InvalidInput, check, check_at_least, check_choice, check_positive

Kernel = Literal["exp", "gaussian"]
Variant = Literal["prior", "cbc2019", "positive"]
KERNELS, VARIANTS = ("exp", "gaussian"), ("prior", "cbc2019", "positive")


@dataclass(frozen=True)
class Explanation:
    """Why each class got its probability: p = positive.sum(1) + negative.sum(1)."""

    detection: Tensor  # [B, K], d
    positive: Tensor  # [B, K, C], r+ d: evidence because the component is there
    negative: Tensor  # [B, K, C], r- (1 - d): evidence because it is not


class Reasoning(nn.Module):
    """Positive and negative reasoning of every class about every component; p is linear in the detections.

    `variant`: "prior" (one softmax over the 2K numbers of a class); "positive" (RBF-norm: r- = 0); "cbc2019" (a softmax over
    positive, negative and indefinite for each component, divided by the share that is not indefinite).
    """

    def __init__(
        self,
        num_components: int,
        num_classes: int,
        *,
        variant: Variant = "prior",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_at_least("num_components", num_components, 1)
        check_at_least("num_classes", num_classes, 2)
        check_choice("variant", variant, VARIANTS)
        self.variant: Variant = variant
        parts = {"prior": 2, "positive": 1, "cbc2019": 3}[variant]
        source = generator if generator is not None else torch.Generator().manual_seed(0)
        noise = torch.randn(parts, num_components, num_classes, generator=source, device=source.device)
        self.logits = nn.Parameter(0.6 - 0.2 * noise.to("cpu", torch.get_default_dtype()))

    def strengths(self) -> tuple[Tensor, Tensor]:  # [K, C], [K, C]
        """r+ and r-; over both and all components they sum to 1 in every class."""
        if self.variant == "cbc2019":
            present, absent, _ = self.logits.softmax(0)
            definite = (present + absent).sum(0)
            return present / definite, absent / definite
        shares = self.logits.flatten(0, 1).softmax(0).view_as(self.logits)
        return shares[0], shares[1] if self.variant == "prior" else torch.zeros_like(shares[0])

    def linear(self) -> tuple[Tensor, Tensor]:  # [K, C], [C]
        """Weights r+ - r- and bias sum_k r-: p = d @ weights + bias."""
        present, absent = self.strengths()
        return present - absent, absent.sum(0)

    @torch.no_grad()
    def favour_(self, classes: Tensor, bonus: float = 2.0) -> None:
        """Add `bonus` to the positive logit of each component's own class; `classes` int64 `[K]`."""
        self.logits[0, torch.arange(len(classes)), classes.to(self.logits.device)] += bonus

    def forward(self, detection: Tensor) -> Tensor:  # [..., K] -> [..., C]
        weights, bias = self.linear()
        return detection @ weights.to(detection.dtype) + bias.to(detection.dtype)


def _explain(reasoning: Reasoning, detection: Tensor) -> Explanation:
    present, absent = reasoning.strengths()
    d = detection.unsqueeze(-1)
    return Explanation(detection, present * d, absent * (1 - d))


class ClassificationByComponents(nn.Module):
    """Components in the space of its input vectors; `forward(x [B, F])` gives class probabilities `[B, C]`.

    The outputs are probabilities of independent classes and no logits: cross-entropy on them is wrong (`ComponentLogits` gives
    log p). `components` start the K vectors (else standard normal); `scale` is s, one for all or one a component.
    """

    def __init__(
        self,
        num_features: int,
        num_components: int,
        num_classes: int,
        *,
        kernel: Kernel = "exp",
        variant: Variant = "prior",
        components: Tensor | None = None,  # [K, F]
        scale: float | Tensor = 1.0,  # a number or [K]
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_at_least("num_features", num_features, 1)
        check_choice("kernel", kernel, KERNELS)
        self.kernel: Kernel = kernel
        source = generator if generator is not None else torch.Generator().manual_seed(0)
        self.reasoning = Reasoning(num_components, num_classes, variant=variant, generator=source)
        if components is None:
            components = torch.randn(num_components, num_features, generator=source, device=source.device).cpu()
        check(components.shape == (num_components, num_features), f"components must be [{num_components}, {num_features}], got {list(components.shape)}.")  # fmt: skip
        check(bool(torch.isfinite(components).all()), "components must be finite, got NaN or infinity.")
        widths = torch.as_tensor(scale, dtype=components.dtype).reshape(-1)
        check(bool((widths > 0).all() and torch.isfinite(widths).all()), f"scale must be positive and finite, got {scale!r}.")  # fmt: skip
        check(len(widths) in (1, num_components), f"scale must be one number or one a component ({num_components}), got {len(widths)}.")  # fmt: skip
        self.components = nn.Parameter(components.detach().clone())
        self.log_scale = nn.Parameter(widths.log())
        self.reasoning.to(components.dtype)

    @classmethod
    def from_data(
        cls,
        x: Tensor,  # [N, F]
        y: Tensor,  # int64 [N]
        num_classes: int,
        *,
        per_class: int | None = 2,
        num_components: int | None = None,
        bonus: float = 2.0,
        kernel: Kernel = "exp",
        variant: Variant = "prior",
        generator: torch.Generator | None = None,
    ) -> ClassificationByComponents:
        """Components from k-means++ in each class (`per_class`), or over all data (`num_components`, `per_class=None`).

        s is the median distance of the data to their nearest component; a component's own class gets `bonus`.
        """
        check(x.dim() == 2 and x.is_floating_point(), f"x must be floating point vectors [N, F], got {x.dtype} {list(x.shape)}; flatten images first.")  # fmt: skip
        check(bool(torch.isfinite(x).all()), "x must be finite, got NaN or infinity.")
        check(y.dtype == torch.int64 and y.shape == x.shape[:1] and bool(((y >= 0) & (y < num_classes)).all()), f"y must hold one int64 class in [0, {num_classes}) per row of x.")  # fmt: skip
        check((per_class is None) != (num_components is None), "Give per_class or num_components, one of the two.")
        source = generator if generator is not None else torch.Generator().manual_seed(0)
        if per_class is None:
            centres, owners = kmeans(x, int(num_components or 0), generator=source), None
        else:
            counts = torch.bincount(y, minlength=num_classes)
            check(bool((counts[:num_classes] > 0).all()), f"Class {int(counts.argmin())} has no training samples; every class needs some.")  # fmt: skip
            groups = [kmeans(x[y == c], per_class, generator=source) for c in range(num_classes)]
            centres, owners = torch.cat(groups), torch.arange(num_classes).repeat_interleave(per_class)
        typical = torch.cdist(x, centres).amin(1).median().item()
        if typical <= 0:  # every sample is a component
            typical = float(torch.pdist(centres).median()) if len(centres) > 1 else 1.0
        made = cls(x.shape[1], len(centres), num_classes, kernel=kernel, variant=variant, components=centres.cpu(), scale=max(typical, 1e-6), generator=source)  # fmt: skip
        if owners is not None:
            made.reasoning.favour_(owners, bonus)
        return made.to(x.device)

    @property
    def scale(self) -> Tensor:  # [1] or [K]
        return self.log_scale.exp()

    def distances(self, x: Tensor) -> Tensor:  # [B, F] -> [B, K]
        """||x - w_k||, without the cancellation of the matrix-product formula; its gradient at distance 0 is 0, not NaN."""
        if x.dim() != 2 or not x.is_floating_point() or x.shape[1] != self.components.shape[1]:
            raise InvalidInput(f"Components live in vectors [B, {self.components.shape[1]}] of floats, got {x.dtype} {list(x.shape)}; flatten images first.")  # fmt: skip
        return torch.cdist(x, self.components.to(x.dtype), compute_mode="donot_use_mm_for_euclid_dist")

    def detect(self, x: Tensor) -> Tensor:  # [B, F] -> [B, K]
        return detection(self.distances(x), self.scale.to(x.dtype), self.kernel)

    def forward(self, x: Tensor) -> Tensor:  # [B, F] -> [B, C]
        return self.reasoning(self.detect(x))

    def explain(self, x: Tensor) -> Explanation:
        return _explain(self.reasoning, self.detect(x))


def detection(distances: Tensor, scale: Tensor, kernel: Kernel) -> Tensor:
    """d = exp(-distance / s), or exp(-distance^2 / (2 s^2)); same shape as `distances`."""
    ratio = distances / scale
    return torch.exp(-ratio if kernel == "exp" else -0.5 * ratio.square())


class CBCHead(nn.Module):
    """The deep head: channels of a feature map are components. `forward(features [B, Q, H, W])` -> `[B, C]`.

    d_q = max over positions of softmax over channels; `maps` shows where. `clamp` sets detections below it to 0 in evaluation
    mode (the published inference uses 0.1); such a head is discontinuous, and certificates of it are refused.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        variant: Variant = "prior",
        clamp: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_at_least("in_channels", in_channels, 2)
        check(0.0 <= clamp < 1.0, f"clamp must lie in [0, 1), got {clamp!r}.")
        self.in_channels, self.clamp = in_channels, clamp
        self.reasoning = Reasoning(in_channels, num_classes, variant=variant, generator=generator)

    def maps(self, features: Tensor) -> Tensor:  # [B, Q, H, W] -> [B, Q, H, W]
        """Softmax over the channels: where each component is seen."""
        if features.dim() != 4 or features.shape[1] != self.in_channels:
            raise InvalidInput(f"The head takes feature maps [B, {self.in_channels}, H, W], got {list(features.shape)}; put it before the pooling.")  # fmt: skip
        return features.softmax(1)

    def detect(self, features: Tensor) -> Tensor:  # [B, Q, H, W] -> [B, Q]
        found = self.maps(features).amax((2, 3))
        return found.where(found >= self.clamp, 0.0) if self.clamp and not self.training else found

    def forward(self, features: Tensor) -> Tensor:
        return self.reasoning(self.detect(features))

    def explain(self, features: Tensor) -> Explanation:
        return _explain(self.reasoning, self.detect(features))


class ComponentLogits(nn.Module):
    """log p as logits: the same argmax, and softmax(log p) = p / sum p, so that the rest of a pipeline reads them rightly."""

    def __init__(self, head: ClassificationByComponents | CBCHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        p = self.head(x)
        return p.clamp_min(torch.finfo(p.dtype).tiny).log()


# ------------------------------------------------------------------------------------------------ deep pre-training


def alignment_loss(
    first: Tensor,  # [B, Q, H, W], softmax maps of one view
    second: Tensor,  # [B, Q, H, W], of the other; positions must correspond
    *,
    eps: float = 1e-12,
) -> Tensor:  # scalar
    """-log <z1, z2> at each position, each view pulled towards the other held fixed: two views, one component there."""
    check(first.shape == second.shape, f"The views must have one shape, got {list(first.shape)} and {list(second.shape)}.")  # fmt: skip

    def towards(moving: Tensor, fixed: Tensor) -> Tensor:
        return -((moving * fixed.detach()).sum(1) + eps).log().mean()

    return (towards(first, second) + towards(second, first)) / 2


def presence_loss(detection: Tensor, *, eps: float = 1e-12) -> Tensor:  # [B, Q] -> scalar
    """-log tanh of each component's sum over the batch, averaged: every component is seen somewhere in the batch."""
    return -(detection.sum(0).tanh() + eps).log().mean()


# ------------------------------------------------------------------------------------------------ where components begin


@torch.no_grad()
def kmeans(
    x: Tensor,  # [N, F]
    k: int,
    *,
    generator: torch.Generator,
    rounds: int = 10,
) -> Tensor:  # [k, F]
    """k-means: k-means++ seeds, then `rounds` of Lloyd's; an emptied cluster keeps its centre."""
    check_at_least("k", k, 1)
    check(len(x) >= k, f"{k} components need at least as many samples, got {len(x)}; lower the number of components.")
    check_positive("rounds", rounds)
    centres = x[_draw(torch.ones(len(x)), generator)].clone()
    for _ in range(k - 1):
        d2 = torch.cdist(x, centres).amin(1).square()
        centres = torch.cat([centres, x[_draw(d2 if bool((d2 > 0).any()) else torch.ones(len(x)), generator)]])
    for _ in range(rounds):
        nearest = torch.cdist(x, centres).argmin(1)
        count = torch.bincount(nearest, minlength=k).to(x.dtype).unsqueeze(1)
        total = torch.zeros_like(centres).index_add_(0, nearest, x)
        centres = torch.where(count > 0, total / count.clamp_min(1), centres)
    return centres


def _draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(weights.to(generator.device, torch.float64), 1, generator=generator).to(weights.device)
