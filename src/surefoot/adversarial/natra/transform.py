"""Moving images along attribute directions, choosing how far, and training on the result.

x(a) = G-compose(z + sum_k a_k scale_k v_k)              |a_k| <= alpha_max_k, the same shift for all codes of an image
x(a) = clip(x + G(z + ..) - G(z))                        residual: keeps the detail that inversion lost (this library's)

min_theta  CE(f(x), y) + lambda CE(f(x(a*)), y)          a* uniform in the box ("random"), the worst of R draws ("best"), or
           + c KL(f(x) || f(x(a*)))                      steps of sign ascent from that worst draw ("pgd")
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.adversarial.natra.backend import Map, check_images, frozen
from surefoot.adversarial.natra.directions import Directions
from surefoot.adversarial.natra.inversion import LatentCodes, psnr
from surefoot.errors import InvalidInput, check, check_at_least, check_choice, check_non_negative, check_positive
from surefoot.nn.attacks import attacking, pgd_train

Mode = Literal["random", "best", "pgd"]
TOLERANCE_DB = 6.0  # by how much the PSNR of a batch may fall below its codes' before the two cannot belong together


@dataclass(frozen=True)
class NaturalTransformation:
    """Images of cached codes as functions of the amounts `a` [M, k], in standard deviations of the codes.

    `alpha_max` is one number or one for each direction. `residual` needs `x`, the images that the codes are of.
    """

    generator_net: Map
    codes: LatentCodes
    directions: Directions
    alpha_max: float | Tensor = 2.0
    residual: bool = False
    x: Tensor | None = None  # [M, C, H, W]
    bounds: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        limits = torch.as_tensor(self.alpha_max)
        check(bool(torch.isfinite(limits).all() and (limits > 0).all()), f"alpha_max must be positive and finite, got {limits.tolist()}.")  # fmt: skip
        k, d = len(self.directions), self.codes.codes.shape[-1]
        check(limits.dim() == 0 or tuple(limits.shape) == (k,), f"alpha_max must be one number or one for each of {k} directions, got shape {tuple(limits.shape)}.")  # fmt: skip
        check(self.directions.vectors.shape[1] == d, f"The directions have {self.directions.vectors.shape[1]} entries and the codes {d}; they come from different generators.")  # fmt: skip
        check(not self.residual or self.x is not None, "residual=True needs x, the images that were inverted.")
        if self.x is not None:
            check_images(self.x, self.bounds)
            self.check_size(len(self.x))

    def __len__(self) -> int:
        return len(self.codes)

    def check_size(self, count: int) -> None:
        check(count == len(self), f"The codes are of {len(self)} images and the data set has {count}; invert it again.")

    @property
    def limits(self) -> Tensor:  # [k]
        vectors = self.directions.vectors
        return torch.as_tensor(self.alpha_max, dtype=vectors.dtype, device=vectors.device).expand(len(vectors))

    def amounts(self) -> Tensor:  # [M, k]
        """a = 0."""
        return self.codes.codes.new_zeros(len(self), len(self.directions))

    def draw(self, generator: torch.Generator) -> Tensor:  # [M, k]
        """Uniform in the box."""
        zero = self.amounts()
        return (2 * torch.rand(zero.shape, generator=generator, dtype=zero.dtype, device=generator.device).to(zero) - 1) * self.limits  # fmt: skip

    def take(self, index: Tensor | slice) -> NaturalTransformation:
        """The transformation of some of the images, by their position in the data set."""
        return replace(self, codes=self.codes.take(index), x=None if self.x is None else self.x[index])

    @cached_property
    def base(self) -> Tensor:  # [M, C, H, W]
        """The reconstructions, a = 0."""
        with torch.no_grad():
            return self.codes.images(self.generator_net)

    def __call__(self, a: Tensor) -> Tensor:  # [M, k] -> [M, C, H, W]
        check(tuple(a.shape) == (len(self), len(self.directions)), f"a must be {[len(self), len(self.directions)]}, got {list(a.shape)}.")  # fmt: skip
        moved = self.codes.images(self.generator_net, (a * self.directions.scale) @ self.directions.vectors)
        if self.residual and self.x is not None:
            moved = self.x + (moved - self.base)
        return moved if self.bounds is None else moved.clamp(*self.bounds)


@dataclass(frozen=True)
class NaturalAttack:
    """The amounts of highest loss per image, the images, and the losses on the way."""

    a: Tensor  # [M, k]
    x: Tensor  # [M, C, H, W]
    loss: Tensor  # [M]
    clean_loss: Tensor  # [M], at a = 0
    drawn_loss: Tensor  # [M], the worst random draw
    passes: int  # forward passes of single examples


def natural_attack(
    model: Map,
    transform: NaturalTransformation,
    y: Tensor,  # int64 [M], of the transform's images
    *,
    mode: Mode = "pgd",
    steps: int = 3,
    draws: int = 4,
    generator: torch.Generator | None = None,
) -> NaturalAttack:
    """Maximise cross-entropy over the box of amounts, per image. The model is used in evaluation mode and left as it was.

    "random": one draw, whatever its loss. "best": the worst of `draws` draws and a = 0. "pgd": from there `steps` of sign
    ascent with steps of 1/2 alpha_max, keeping the worst point seen, so that the loss never falls below the start's.
    """
    check_choice("mode", mode, ("random", "best", "pgd"))
    check_at_least("steps", steps, 1)
    check_at_least("draws", draws, 1)
    check(y.dtype == torch.int64 and y.shape == (len(transform),), f"y must hold {len(transform)} int64 labels, one for each image, got {y.dtype} of shape {tuple(y.shape)}.")  # fmt: skip
    source = generator if generator is not None else torch.Generator().manual_seed(0)

    def loss_at(a: Tensor) -> tuple[Tensor, Tensor]:
        images = transform(a)
        return images, F.cross_entropy(model(images), y, reduction="none")

    with attacking(model, "eval", source, y.device), frozen(transform.generator_net):
        with torch.no_grad():
            best = transform.amounts() if mode != "random" else transform.draw(source)
            images, loss = loss_at(best)
            clean = loss if mode != "random" else loss_at(transform.amounts())[1]
            for _ in range(draws if mode != "random" else 0):
                best, images, loss = _worse((best, images, loss), (a := transform.draw(source), *loss_at(a)))
        check(not bool(loss.isnan().any()), "The model returns NaN logits; look at its weights and input range first.")
        drawn, passes = loss, (draws + 1 if mode != "random" else 2) * len(y)
        point = best
        for _ in range(steps if mode == "pgd" else 0):
            point = point.detach().requires_grad_()
            found, value = loss_at(point)
            (slope,) = torch.autograd.grad(value.sum(), point)
            best, images, loss = _worse((best, images, loss), (point.detach(), found.detach(), value.detach()))
            point = torch.clamp(point.detach() + 0.5 * transform.limits * slope.sign(), -transform.limits, transform.limits)  # fmt: skip
            passes += len(y)
        if mode == "pgd":
            with torch.no_grad():
                best, images, loss = _worse((best, images, loss), (point, *loss_at(point)))
            passes += len(y)
    return NaturalAttack(best, images, loss, clean, drawn, passes)


def _worse(old: tuple[Tensor, Tensor, Tensor], new: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    better = new[2] > old[2]
    a, images, loss = (torch.where(better.reshape(-1, *(1,) * (o.dim() - 1)), n, o) for o, n in zip(old, new))
    return a, images, loss


def natra_loss(
    model: nn.Module,
    x: Tensor,  # [B, C, H, W], clean or with ordinary augmentation
    y: Tensor,  # int64 [B]
    transform: NaturalTransformation,  # of these images
    *,
    weight: float = 1.0,  # lambda
    mode: Mode = "pgd",
    steps: int = 3,
    draws: int = 4,
    consistency: float = 0.0,  # c
    usable: Tensor | None = None,  # bool [B]: images that were inverted well enough to be moved
    pixel_eps: float = 0.0,  # then pixel PGD of this Linf radius on the moved images: NaTra with adversarial training
    augment: Callable[[Tensor], Tensor] | None = None,  # ordinary augmentation of the moved images
    generator: torch.Generator,
) -> Tensor:
    """Clean and moved images in one forward pass, so that batch-norm sees both."""
    check_non_negative("weight", weight)
    check_non_negative("consistency", consistency)
    moved = natural_attack(model, transform, y, mode=mode, steps=steps, draws=draws, generator=generator).x
    moved = moved if augment is None else augment(moved)
    if pixel_eps > 0:
        bounds = transform.bounds or (float("-inf"), float("inf"))
        moved = pgd_train(model, moved, y, eps=pixel_eps, steps=3, bounds=bounds, generator=generator)
    if usable is not None:
        moved, moved_y = moved[usable], y[usable]
    else:
        moved_y = y
    check(moved.shape[1:] == x.shape[1:], f"The moved images are {list(moved.shape[1:])} and the batch {list(x.shape[1:])}; augmentation must keep the size.")  # fmt: skip
    logits = model(torch.cat([x, moved]))
    clean, shifted = logits[: len(x)], logits[len(x) :]
    loss = F.cross_entropy(clean, y)
    if len(moved) == 0:
        return loss
    loss = loss + weight * F.cross_entropy(shifted, moved_y)
    if consistency > 0:
        paired = clean if usable is None else clean[usable]
        loss = loss + consistency * F.kl_div(shifted.log_softmax(1), paired.softmax(1), reduction="batchmean")
    return loss


def train_natra(
    model: nn.Module,
    loader: Iterable[
        tuple[Tensor, Tensor, Tensor]
    ],  # batches (x, y, index), the index in the data set that was inverted
    transform: NaturalTransformation,  # of the whole data set
    *,
    weight: float = 1.0,
    mode: Mode = "pgd",
    epochs: int = 20,
    lr: float = 1e-3,
    steps: int = 3,
    draws: int = 4,
    consistency: float = 0.0,
    psnr_floor: float = 0.0,
    generator: torch.Generator,
) -> nn.Module:
    """Train a copy of `model` on clean and naturally moved images with Adam; it comes back in evaluation mode.

    The loader's images must be those that were inverted: the first batch's reconstruction is compared with it.
    """
    check_at_least("epochs", epochs, 1)
    check_positive("lr", lr)
    size = getattr(loader, "dataset", None)
    if size is not None and hasattr(size, "__len__"):
        transform.check_size(len(size))
    usable = transform.codes.usable(psnr_floor)
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    checked = False
    for _ in range(epochs):
        for batch in loader:
            x, y, index = _unpack(batch)
            here = transform.take(index.to(transform.codes.codes.device))
            if not checked:
                check_belongs(x, here)
                checked = True
            loss = natra_loss(model, x, y, here, weight=weight, mode=mode, steps=steps, draws=draws, consistency=consistency, usable=usable[index], generator=generator)  # fmt: skip
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


def _unpack(batch: object) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(batch, list | tuple) or len(batch) != 3:
        raise InvalidInput("The loader must give (x, y, index): the codes are kept by index in the data set, and a shuffled batch without it would meet the codes of others.")  # fmt: skip
    x, y, index = batch
    check(index.dtype == torch.int64 and index.shape == y.shape, "index must hold one int64 position in the data set for each example.")  # fmt: skip
    return x, y, index


def check_belongs(x: Tensor, transform: NaturalTransformation) -> None:
    """Refuse a batch whose images are not those the codes were found for (an index into another order, or augmented images)."""
    check(len(x) == len(transform), f"The batch has {len(x)} images and {len(transform)} codes; the index must name one code each.")  # fmt: skip
    found = psnr(transform.base, x, transform.bounds).median().item()
    expected = transform.codes.psnr.median().item()
    check(found >= expected - TOLERANCE_DB, f"The codes at these indices rebuild the batch with {found:.1f} dB, and {expected:.1f} dB when they were made: the index does not follow the data set, or the loader augments.")  # fmt: skip


@dataclass(frozen=True)
class Realism:
    """How far moved images lie from real ones, beside how far other real ones lie: medians of nearest-neighbour distances."""

    moved: float
    real: float

    @property
    def ratio(self) -> float:
        """About 1 where the moved images are as near to real ones as fresh real ones; large at artefacts."""
        return self.moved / max(self.real, 1e-12)


def realism(
    moved: Tensor,  # [M, C, H, W]
    pool: Tensor,  # [N, C, H, W], real images
    held_out: Tensor,  # [P, C, H, W], real images outside the pool
) -> Realism:
    """The distance of each image to its nearest neighbour in `pool` (L2 in pixels)."""
    check(min(len(moved), len(pool), len(held_out)) > 0, "realism needs moved, pool and held-out images.")
    flat = pool.flatten(1)
    near = [torch.cdist(images.detach().flatten(1).to(flat), flat).amin(1).median().item() for images in (moved, held_out)]  # fmt: skip
    return Realism(*near)
