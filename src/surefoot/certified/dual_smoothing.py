"""Dual randomised smoothing: split the image into two halves, smooth each in its own lower dimension, add the votes.

Each 2x2 block of pixels is split along its diagonal (checkerboard masks M_l + M_r = 1), so that either half alone still
shows the whole image. Base classifiers f_l, f_r see only their own noisy half (the other half is filled in from it), and

    G(x)_c = P[f_l(x_l + e_l) = c] + P[f_r(x_r + e_r) = c],   e ~ N(0, sigma^2 I),   prediction argmax_c G(x)_c.

With lower bounds a <= P_l(c), b <= P_r(c), each at level alpha/2, A = Phi^-1(a), B = Phi^-1(b):

    R = (A + B) / sqrt(1/sigma_l^2 + 1/sigma_r^2)       (= sigma (A + B)/sqrt(2) for one sigma), if A + B > 0, else abstain.

Why: an attack of norms (s, t) on the halves leaves G(c) >= Phi(A - s/sigma_l) + Phi(B - t/sigma_r), which beats every other
class (they get at most 2 - G(c)) iff s/sigma_l + t/sigma_r < A + B; R is the distance of that line from the origin. A half
with B < 0 counts with its sign. At a = b = p the radius is sqrt(2) times plain smoothing's: the gain shows where plain
smoothing is near its cap sigma Phi^-1(alpha^(1/n)), i.e. on redundant images at small sigma; at large sigma half the
evidence per network costs more. (Not "Dual Randomized Smoothing" of arXiv 2512.01782, which varies sigma by input.)

Shapes: x `[B, C, H, W]` in raw scale; masks bool, broadcastable to one input; logits `[B, K]`.
Source: Xia, Yu, Ding, Jiang, Chen 2024 (ICLR), arXiv 2404.09586.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from surefoot.core.task import Task, Training
from surefoot.core.treatment import Batch, Treatment
from surefoot.errors import (
    InvalidInput,
    Refused,
    check,
    check_at_least,
    check_choice,
    check_non_negative,
    check_positive,
)
from surefoot.nn.masks import (
    Fill,
    Masks,
    Partition,
    check_masks,
    checkerboard_split,
    fill_half,
    kept_neighbours,
    left_right_split,
    random_split,
)
from surefoot.nn.smoothing import (
    ABSTAIN,
    Certificates,
    average_certified_radius,
    certified_accuracy,
    check_deterministic,
    check_request,
    joint_vote_counts,
    lower_confidence_bound,
    noisy_loss,
    upper_confidence_bound,
)


@dataclass(frozen=True)
class DualCertificate:
    """What dual smoothing guarantees for each of B inputs. All tensors are on the CPU."""

    prediction: Tensor  # int64 [B], ABSTAIN (-1) where nothing is certified
    radius: Tensor  # float64 [B], L2, 0 where nothing is certified
    p_left: Tensor  # float64 [B], lower bound of the left half's probability of the chosen class, level alpha/2
    p_right: Tensor  # float64 [B]
    abstained: Tensor  # bool [B]


@dataclass(frozen=True)
class SmoothingReport:
    """Certificates of a labelled set, with the two usual summaries."""

    certificate: DualCertificate
    average_radius: float  # ACR: mean radius, wrong and abstained count 0
    radii: tuple[float, ...]
    certified_accuracy: tuple[float, ...]  # share with the right class and radius >= r


# --- certificate ----------------------------------------------------------------------------------------------------


def dual_radius(
    p_left: Tensor | float,
    p_right: Tensor | float,
    sigma_left: float,
    sigma_right: float | None = None,
) -> Tensor:  # float64 [...]
    """R = (Phi^-1(a) + Phi^-1(b)) / sqrt(1/sigma_l^2 + 1/sigma_r^2) where positive, else 0 (abstain).

    Not sqrt(r_l^2 + r_r^2), which is larger and broken by an attack; a half below 1/2 is not clipped at 0.
    """
    check_positive("sigma_left", sigma_left)
    sigma_right = sigma_left if sigma_right is None else sigma_right
    check_positive("sigma_right", sigma_right)
    a, b = (torch.as_tensor(p, dtype=torch.float64) for p in (p_left, p_right))
    for p in (a, b):
        check(bool(((p >= 0) & (p <= 1)).all()), "Probabilities must lie in [0, 1].")
    reach = torch.special.ndtri(a) + torch.special.ndtri(b)  # NaN for (0, 1): nothing is known, abstain
    return torch.where(reach > 0, reach / math.hypot(1.0 / sigma_left, 1.0 / sigma_right), 0.0)


# --- the classifier -------------------------------------------------------------------------------------------------


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
        return self.model(fill_half(x, self.mask, self.weight, self.fill))


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
        self, x: Tensor, n: int, *, generator: torch.Generator, batch_size: int | None = None
    ) -> Tensor:  # int64 [2, B, K]
        """Votes of the left and right half in n draws each.

        One full-size draw serves both: its two halves are independent because the masks are disjoint.
        """
        self._check_shape(x)
        sigma = torch.where(self.left.mask, self.sigma, self.sigma_right) if self.sigma != self.sigma_right else self.sigma  # fmt: skip
        return joint_vote_counts(
            [self.left, self.right], x, n, sigma=sigma, num_classes=self.num_classes, generator=generator, batch_size=batch_size
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
    ) -> DualCertificate:
        """Class and L2 radius; n0 draws of both halves choose the class, n fresh draws of each bound it at alpha/2."""
        chosen, counts = self._two_stages(x, generator, n0, n, alpha, batch_size)
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
    ) -> Tensor:  # int64 [B]
        """argmax_c G(x)_c with error probability <= alpha, or ABSTAIN.

        The binomial test of plain smoothing is not exact for a sum of two different probabilities. Instead the class chosen
        by n0 draws must, on fresh draws, have lower bounds that add up to more than any other class's upper bounds (four
        bounds are at stake between the chosen and the true top class, alpha/4 each).
        """
        chosen, counts = self._two_stages(x, generator, n0, n, alpha, batch_size)
        low = lower_confidence_bound(counts, n, alpha / 4).sum(0)
        high = upper_confidence_bound(counts, n, alpha / 4).sum(0).scatter(1, chosen[:, None], -1.0)
        return torch.where(low.gather(1, chosen[:, None])[:, 0] > high.amax(1), chosen, ABSTAIN)

    def _two_stages(
        self, x: Tensor, generator: torch.Generator, n0: int, n: int, alpha: float, batch_size: int | None
    ) -> tuple[Tensor, Tensor]:  # int64 [B], int64 [2, B, K]
        check_request(x, n0, n, alpha)
        check_deterministic(self, x)
        options: dict[str, Any] = {"generator": generator, "batch_size": batch_size}
        return self.vote_counts(x, n0, **options).sum(0).argmax(1), self.vote_counts(x, n, **options)

    def _check_shape(self, x: Tensor) -> None:
        mask = self.left.mask
        check(x.is_floating_point(), f"x must be floating point, got {x.dtype}; scale images to [0, 1] first.")
        spatial = mask.shape[1:] if mask.dim() >= 2 else mask.shape
        if x.dim() <= len(spatial) or x.shape[-len(spatial) :] != spatial:
            raise InvalidInput(f"The masks split inputs of {list(spatial)}, got a batch of shape {list(x.shape)}.")


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


def as_certificates(dual: DualCertificate, draws: int = 0) -> Certificates:
    """The same certificates in the shape of plain smoothing's; `p_lower` is the mean of the two bounds (half of G's)."""
    p = (dual.p_left + dual.p_right) / 2
    return Certificates(dual.prediction, dual.radius, p, torch.full_like(dual.prediction, draws))


# --- the treatment --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Noisy(Treatment):
    """Fine-tuning of one half: the model is a `HalfClassifier`, so noise on dropped pixels never reaches the network."""

    slug: ClassVar[str] = "dual_smoothing_half"
    sigma: float = 0.25
    consistency: float = 0.0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return noisy_loss(model, batch.x, batch.y, sigma=self.sigma, generator=batch.generator, consistency=self.consistency)  # fmt: skip


@dataclass
class DualSmoothing(Treatment):
    """Pre-train on full noisy images (the run itself), then fine-tune two copies on the noisy halves.

    The fine-tuning costs `2 * (epochs + consistency_epochs)` passes over the training data beside the run's own; the
    consistency loss (weight `consistency`, two draws a step) comes only after the cross-entropy epochs, because started
    from the full-image network it collapses.
    """

    slug: ClassVar[str] = "dual_smoothing"
    excludes: ClassVar[Mapping[str, str]] = {
        "random_pruning": "fine-tuning the two halves after training would fill the pruned weights again.",
        "crop_selection": "the halves are cut from whole images, and crop selection hands on crops of another size.",
    }
    finish_order: ClassVar[int] = 5  # after merging, before quantization: the copies still have to be trained

    sigma: float = 0.25
    partition: Partition = "checkerboard"
    fill: Fill = "neighbor"
    epochs: int = 15
    consistency_epochs: int = 0
    consistency: float = 10.0
    lr: float = 2e-3
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_positive("sigma", self.sigma)
        check_choice("partition", self.partition, ("checkerboard", "left_right", "random"))
        check_choice("fill", self.fill, ("neighbor", "max_pool", "zero"))
        check_at_least("epochs", self.epochs, 0)
        check_at_least("consistency_epochs", self.consistency_epochs, 0)
        check_non_negative("consistency", self.consistency)
        check_positive("lr", self.lr)
        check_at_least("batch_size", self.batch_size, 1)
        self.shape_: tuple[int, int] | None = None
        self.num_classes_ = 0

    def check(self, model: nn.Module, task: Task) -> None:
        if task.modality != "image" or task.train.x.dim() != 4:
            raise Refused(
                f"dual_smoothing splits the pixels of images [C, H, W]; this task has {task.modality} inputs of shape "
                f"{list(task.train.x.shape[1:])}. Build a DualSmoothedClassifier with index_split for vectors."
            )
        check(min(task.train.x.shape[-2:]) >= 2, f"Images must be at least 2x2, got {list(task.train.x.shape[-2:])}.")

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        self.shape_ = (int(task.train.x.shape[-2]), int(task.train.x.shape[-1]))
        self.num_classes_ = task.num_classes
        return model, task

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return noisy_loss(model, batch.x, batch.y, sigma=self.sigma, generator=batch.generator)

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        self.check(model, task)
        self.prepare(model, task)
        dual = self.rebuild(model, self.structure())
        for name in ("left", "right"):
            half = getattr(dual, name)
            for stage, (epochs, weight) in enumerate(((self.epochs, 0.0), (self.consistency_epochs, self.consistency))):
                half = self._fine_tune(half, task, f"dual_smoothing/{name}/{stage}", epochs, weight)
            setattr(dual, name, half)
        return dual

    def _fine_tune(self, half: nn.Module, task: Task, purpose: str, epochs: int, weight: float) -> nn.Module:
        from surefoot.training.loop import fit  # the loop knows treatments; importing a method must not need it

        if epochs == 0:
            return half
        own_stream = task.changed(seed=int(torch.randint(2**31, (), generator=task.generator(purpose))))
        training = Training(epochs=epochs, batch_size=self.batch_size, optimizer="adam", lr=self.lr, schedule="cosine")
        return fit(half, own_stream, training, (_Noisy(sigma=self.sigma, consistency=weight),)).model

    def structure(self) -> dict[str, Any]:
        return {"shape": None if self.shape_ is None else list(self.shape_), "num_classes": self.num_classes_}

    def rebuild(self, model: nn.Module, structure: Mapping[str, Any]) -> DualSmoothedClassifier:
        """The two copies and their masks; the random partition is drawn with a fixed seed (and saved with the weights)."""
        shape = structure.get("shape")
        check(shape is not None, "dual_smoothing needs the image shape; it is known after prepare or finish.")
        masks = {
            "checkerboard": checkerboard_split,
            "left_right": left_right_split,
            "random": lambda s: random_split(s, torch.Generator().manual_seed(0)),
        }[self.partition](shape)
        left, right = copy.deepcopy(model), copy.deepcopy(model)
        return DualSmoothedClassifier(
            left, right, sigma=self.sigma, num_classes=structure["num_classes"], masks=masks, fill=self.fill
        )

    def state_dict(self) -> dict[str, Any]:
        return self.structure()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.shape_ = None if state["shape"] is None else (int(state["shape"][0]), int(state["shape"][1]))
        self.num_classes_ = int(state["num_classes"])
