"""Two half classifiers whose noisy votes are added, and certificates of a labelled set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.certified.dual_smoothing.certificate import DualCertificate, as_certificates, dual_radius
from surefoot.errors import InvalidInput, check, check_at_least, check_choice, check_positive
from surefoot.nn.masks import Fill, Masks, check_masks, checkerboard_split, fill_half, kept_neighbours
from surefoot.nn.smoothing import (
    ABSTAIN,
    average_certified_radius,
    certified_accuracy,
    check_deterministic,
    check_request,
    default_batch,
    joint_vote_counts,
    lower_confidence_bound,
    upper_confidence_bound,
)


def _filled(x: Tensor, mask: Tensor, weight: Tensor, fill: Fill) -> Tensor:
    filled = fill_half(x, mask, weight, fill)
    one_channel = x.dim() == 4 and x.shape[1] == 1 and x.is_contiguous() and filled.is_contiguous()
    # the same places in memory, but where() forgets that strides said channels last, which convolutions go by
    return filled.as_strided(x.shape, x.stride()) if one_channel and x.stride() != filled.stride() else filled


class _Fill(nn.Module):
    """One half filled up to a full-size image, as a step."""

    def __init__(self, mask: Tensor, weight: Tensor, fill: Fill) -> None:
        super().__init__()
        self.options = mask, weight, fill
        self.is_linear_map = fill != "max_pool"

    def forward(self, x: Tensor) -> Tensor:
        return _filled(x, *self.options)


class HalfClassifier(nn.Module):
    """`model(fill(x on its half))`: takes the full image, reads only the kept pixels."""

    mask: Tensor
    weight: Tensor

    def __init__(self, model: nn.Module, mask: Tensor, fill: Fill = "neighbor") -> None:
        super().__init__()
        self.model = model
        self.fill: Fill = fill
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        weight = kept_neighbours(mask) if mask.dim() >= 2 else torch.zeros(mask.shape)
        self.register_buffer("mask", mask.to(like.device))
        self.register_buffer("weight", weight.to(like))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(_filled(x, self.mask, self.weight, self.fill))

    def lean_steps(self) -> tuple[nn.Module, nn.Module]:
        """What `forward` does, one after the other, for `nn.smoothing.lean`."""
        return _Fill(self.mask, self.weight, self.fill), self.model


class DualSmoothedClassifier(nn.Module):
    """Two half classifiers whose noisy votes are added.

    `forward(x)` gives deterministic, differentiable logits without noise, log of the mean of the halves' softmax: for
    accuracy, calibration and attacks. What carries the guarantee is `certify`, and `predict` names the voted class.
    """

    def __init__(
        self,
        model_l: nn.Module,
        model_r: nn.Module,
        *,
        sigma: float,
        num_classes: int,
        masks: Masks | None = None,
        shape: Sequence[int] | None = None,
        fill: Fill = "neighbor",
        sigma_right: float | None = None,
    ) -> None:
        """`masks` is the partition; None makes the checkerboard of `shape` (..., H, W)."""
        super().__init__()
        check_positive("sigma", sigma)
        check_positive("sigma_right", sigma if sigma_right is None else sigma_right)
        check_at_least("num_classes", num_classes, 2)
        check_choice("fill", fill, ("neighbor", "max_pool", "zero"))
        if masks is None:
            check(shape is not None, "Give masks, or the shape (C, H, W) of an image for the checkerboard.")
            masks = checkerboard_split(shape or ())
        check_masks(*masks)
        check(fill == "zero" or masks[0].dim() >= 2, 'A vector has no neighbours; use fill="zero" with index_split.')
        self.left, self.right = HalfClassifier(model_l, masks[0], fill), HalfClassifier(model_r, masks[1], fill)
        self.sigma, self.sigma_right = sigma, sigma if sigma_right is None else sigma_right
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:  # [B, K]
        self._check_shape(x)
        left, right = self.left(x), self.right(x)
        if left.shape != right.shape or left.shape[-1] != self.num_classes:
            raise InvalidInput(f"Both halves must give {self.num_classes} classes, got {list(left.shape)} and {list(right.shape)}.")  # fmt: skip
        return torch.logaddexp(left.log_softmax(-1), right.log_softmax(-1)) - math.log(2.0)

    def vote_counts(
        self, x: Tensor, n: int, *, generator: torch.Generator, batch_size: int | None = None, shared: bool = True
    ) -> Tensor:  # int64 [2, B, K]
        """Votes of the left and right half in n draws each.

        One full-size draw serves both: its two halves are independent because the masks are disjoint (and the union bound over
        the halves would not even need that). `shared` as in `certify`.
        """
        self._check_shape(x)
        sigma = torch.where(self.left.mask, self.sigma, self.sigma_right) if self.sigma != self.sigma_right else self.sigma  # fmt: skip
        return joint_vote_counts(
            [self.left, self.right], x, n, sigma=sigma, num_classes=self.num_classes, generator=generator, batch_size=batch_size, shared=shared
        )  # fmt: skip

    def certify(
        self,
        x: Tensor,  # float [B, ...], raw scale
        *,
        generator: torch.Generator,
        n0: int = 100,
        n: int = 10_000,
        alpha: float = 0.001,
        batch_size: int | None = None,
        shared: bool = True,
    ) -> DualCertificate:
        """Class and L2 radius; n0 draws of both halves choose the class, n fresh draws of each bound it at alpha/2.

        One set of noise serves all inputs: each certificate keeps its level alpha and does not depend on which other inputs are in
        the call. `shared=False` draws anew for each, for those who need certificates that are independent of each other too.
        """
        chosen, counts = self._two_stages(x, generator, n0, n, alpha, batch_size, shared)
        hits = counts.gather(2, chosen[None, :, None].expand(2, -1, 1))[..., 0]
        p_left, p_right = lower_confidence_bound(hits, n, alpha / 2)
        radius = dual_radius(p_left, p_right, self.sigma, self.sigma_right)
        return DualCertificate(torch.where(radius > 0, chosen, ABSTAIN), radius, p_left, p_right, radius <= 0)

    def predict(
        self,
        x: Tensor,  # float [B, ...]
        *,
        generator: torch.Generator,
        n0: int = 100,
        n: int = 1000,
        alpha: float = 0.001,
        batch_size: int | None = None,
        shared: bool = True,
    ) -> Tensor:  # int64 [B]
        """argmax_c G(x)_c with error probability <= alpha, or ABSTAIN.

        The binomial test of plain smoothing is not exact for a sum of two different probabilities. Instead the class chosen
        by n0 draws must, on fresh draws, have lower bounds that add up to more than any other class's upper bounds (four
        bounds are at stake between the chosen and the true top class, alpha/4 each).
        """
        chosen, counts = self._two_stages(x, generator, n0, n, alpha, batch_size, shared)
        low = lower_confidence_bound(counts, n, alpha / 4).sum(0)
        high = upper_confidence_bound(counts, n, alpha / 4).sum(0).scatter(1, chosen[:, None], -1.0)
        return torch.where(low.gather(1, chosen[:, None])[:, 0] > high.amax(1), chosen, ABSTAIN)

    def _two_stages(
        self, x: Tensor, generator: torch.Generator, n0: int, n: int, alpha: float, batch_size: int | None, shared: bool
    ) -> tuple[Tensor, Tensor]:  # int64 [B], int64 [2, B, K]
        check_request(x, n0, n, alpha)
        widest = check_deterministic(self, x)
        size = default_batch(x, widest) if batch_size is None else batch_size
        options: dict[str, Any] = {"generator": generator, "batch_size": size, "shared": shared}
        return self.vote_counts(x, n0, **options).sum(0).argmax(1), self.vote_counts(x, n, **options)

    def _check_shape(self, x: Tensor) -> None:
        mask = self.left.mask
        check(x.is_floating_point(), f"x must be floating point, got {x.dtype}; scale images to [0, 1] first.")
        spatial = mask.shape[1:] if mask.dim() >= 2 else mask.shape
        if x.dim() <= len(spatial) or x.shape[-len(spatial) :] != spatial:
            raise InvalidInput(f"The masks split inputs of {list(spatial)}, got a batch of shape {list(x.shape)}.")


@dataclass(frozen=True)
class SmoothingReport:
    """Certificates of a labelled set, with the two usual summaries."""

    certificate: DualCertificate
    average_radius: float  # ACR: mean radius, wrong and abstained count 0
    radii: tuple[float, ...]
    certified_accuracy: tuple[float, ...]  # share with the right class and radius >= r


def certify_dual(
    model: DualSmoothedClassifier,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    generator: torch.Generator,
    radii: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    batch_size: int | None = None,
) -> SmoothingReport:
    """Certify a labelled set given as (x, y) batches (a DataLoader, or `[(x, y)]`)."""
    parts, labels = [], []
    for x, y in batches:
        parts.append(model.certify(x, generator=generator, n0=n0, n=n, alpha=alpha, batch_size=batch_size))
        check(bool(((y >= 0) & (y < model.num_classes)).all()), f"y must lie in [0, {model.num_classes}).")
        labels.append(y.cpu())
    check(len(parts) > 0, "There is nothing to certify: no batches were given.")
    fields = DualCertificate.__dataclass_fields__
    certificate = DualCertificate(**{name: torch.cat([getattr(p, name) for p in parts]) for name in fields})
    y = torch.cat(labels)
    accuracy = certified_accuracy(as_certificates(certificate), y, radii)
    acr = average_certified_radius(as_certificates(certificate), y)
    return SmoothingReport(certificate, acr, tuple(radii), tuple(accuracy.tolist()))
