"""Unsupervised attribute directions (UADM): where in the latent space images change without changing class.

With A the matrix of the generator's first affine layer and S the square root of the codes' covariance (I without codes):

    closed form    u_j = eigenvectors of S A^T A S, largest eigenvalue first;   v_j = S u_j / ||S u_j||,  scale_j = ||S u_j||
    pca            components c_j of features h(z) over many z, each of unit variance; least squares z ~ c B;  v_j, scale_j from row j of B

`scale_j` is one standard deviation along v_j, so that amounts `a` are in standard deviations and not in units of a latent
space whose axes differ. `filter_directions` keeps a direction only if a reference classifier keeps its answer along it while
the image moves. The two constructions are those of SeFa (Shen & Zhou, 2021, arXiv 2007.06600) and GANSpace (Haerkoenen et al.,
2020, arXiv 2004.02546); the filter is this library's reading of the paper's "attributes independent of the class".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from surefoot.adversarial.natra.backend import (
    Map,
    first_affine,
    frozen,
    latent_dim_of,
    split_generator,
    zeros_for,
)
from surefoot.errors import InvalidInput, check, check_at_least, check_choice, check_open_unit, check_positive

if TYPE_CHECKING:
    from surefoot.adversarial.natra.transform import NaturalTransformation

Method = Literal["closed_form", "pca"]
NOTHING = 1e-10  # of the largest variance: below lies rounding


@dataclass(frozen=True)
class Directions:
    """`vectors` are unit rows, their largest entry positive; `scale` is one standard deviation of the codes along each."""

    vectors: Tensor  # [k, d]
    scale: Tensor  # [k]
    values: Tensor  # [k], eigenvalues

    def __len__(self) -> int:
        return len(self.vectors)

    def take(self, index: Tensor) -> Directions:
        return Directions(self.vectors[index], self.scale[index], self.values[index])


def attribute_directions(
    generator_net: Map,
    *,
    method: Method = "closed_form",
    k: int,
    codes: Tensor | None = None,  # [M, d], codes of data: their covariance replaces the prior's I
    layer: int | None = None,  # pca: where the features are taken
    samples: int = 10_000,
    generator: torch.Generator | None = None,
) -> Directions:
    """The k directions that change the generator's features most. See the module for the equations."""
    check_choice("method", method, ("closed_form", "pca"))
    d = latent_dim_of(generator_net)
    check_at_least("k", k, 1)
    check(k <= d, f"k = {k} directions do not fit into {d} latent dimensions; lower k.")
    if codes is not None:
        check(codes.dim() == 2 and codes.shape[1] == d and len(codes) > 1, f"codes must be [M, {d}] with M > 1, got {tuple(codes.shape)}.")  # fmt: skip
    if method == "closed_form":
        steps, values = _closed_form(first_affine(generator_net), codes)
    else:
        steps, values = _pca(generator_net, d, k, codes, layer, samples, generator)
    steps, values = steps[:k], values[:k]
    scale = steps.norm(dim=1)
    check(bool((scale > 0).all()), f"Fewer than k = {k} directions change the generator's features; lower k.")
    vectors = steps / scale.unsqueeze(1)
    peak = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    like = zeros_for(generator_net)
    return Directions((vectors * peak.sign()).to(like), scale.to(like), values.to(like))


def _closed_form(matrix: Tensor, codes: Tensor | None) -> tuple[Tensor, Tensor]:
    a = matrix.double()
    root = torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    if codes is not None:
        spread, basis = torch.linalg.eigh(torch.cov(codes.double().T.to(a.device)).reshape(a.shape[1], a.shape[1]))
        root = (basis * spread.clamp(min=0).sqrt()) @ basis.T
    values, vectors = torch.linalg.eigh(root @ a.T @ a @ root)
    return (root @ vectors).flip(1).T, values.flip(0)


def _pca(generator_net: Map, d: int, k: int, codes: Tensor | None, layer: int | None, samples: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_at_least("samples", samples, 2 * d)
    like = zeros_for(generator_net)
    if codes is None:
        source = generator if generator is not None else torch.Generator().manual_seed(0)
        z = torch.randn(samples, d, generator=source, dtype=like.dtype).to(like.device)
    else:
        z = codes[:samples].to(like)
    head = split_generator(generator_net, layer)[0]
    with frozen(generator_net), torch.no_grad():
        features = torch.cat([head(part).flatten(1) for part in z.split(1000)])
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    centred, moved = features.sub_(features.mean(0)), (z.double() - z.double().mean(0)) / math.sqrt(len(z) - 1)
    leading = centred @ _leading(centred, min(2 * k, *centred.shape))  # [M, q]: all that is left to do is small
    leading = leading.double() / math.sqrt(len(z) - 1)
    values, basis = torch.linalg.eigh(leading.T @ leading)
    values, basis = values.flip(0)[:k], basis.flip(1)[:, :k]
    # least squares on whitened components, whose Gram matrix is I; one that does not vary moves nothing
    steps = basis.T @ (leading.T @ moved) / values.clamp(min=1e-300).sqrt().unsqueeze(1)
    return torch.where((values > NOTHING * values[:1]).unsqueeze(1), steps, 0.0), values


def _leading(centred: Tensor, count: int) -> Tensor:  # [F, count], orthonormal
    """The principal axes of rows `[M, F]`, from the covariance of the shorter side in the rows' own precision.

    The caller solves for the components within their span in float64, so that rounding here counts by its square.
    """
    rows, columns = centred.shape
    if rows < columns:
        thin = torch.linalg.eigh(centred @ centred.T)[1][:, -count:]
        return torch.linalg.qr(centred.T @ thin)[0]
    gram, width = centred.new_empty(columns, columns), -(-columns // 4)
    for first in range(0, columns, width):  # it is symmetric: of sixteen blocks six need not be computed
        part = slice(first, first + width)
        torch.mm(centred[:, part].T, centred[:, first:], out=gram[part, first:])
    return torch.linalg.eigh(gram, UPLO="U")[1][:, -count:]


@dataclass(frozen=True)
class DirectionReport:
    """What each direction does to a reference classifier's answers and to the images, at its `reach`."""

    directions: Directions
    kept: Tensor  # bool [k]
    reach: Tensor  # [k] the largest amount tried last, in standard deviations
    label_change: Tensor  # [k] share of images whose class changes
    confidence_drop: Tensor  # [k] mean loss of the first class's probability
    image_change: Tensor  # [k] root mean square over pixels, mean over images
    joint_label_change: float  # of random points of the box over the kept directions

    def select(self) -> tuple[Directions, Tensor]:
        """The kept directions and their reach, or an error with the table where there is none."""
        if not bool(self.kept.any()):
            raise InvalidInput(f"No direction keeps the class while it changes the image: {self.table()}.")
        return self.directions.take(self.kept), self.reach[self.kept]

    def table(self, rows: int = 4) -> str:
        """One line: reach, label change, confidence drop and image change of the first directions."""
        columns = zip(self.reach.tolist(), self.label_change.tolist(), self.confidence_drop.tolist(), self.image_change.tolist())  # fmt: skip
        lines = [f"{k}: at {r:.2g} labels {c:.0%}, confidence -{p:.2f}, image {i:.3f}" for k, (r, c, p, i) in enumerate(columns)]  # fmt: skip
        return "; ".join(lines[:rows]) + (f"; and {len(lines) - rows} more" if len(lines) > rows else "")


def filter_directions(
    reference: Callable[[Tensor], Tensor],  # images -> logits [B, K]
    transform: NaturalTransformation,
    *,
    max_label_change: float = 0.05,
    max_confidence_drop: float = 0.1,
    min_image_change: float = 0.02,
    halvings: int = 0,
    generator: torch.Generator | None = None,
) -> DirectionReport:
    """Test each direction alone at +-1/2 and +-1 times its `alpha_max`, against the images at a = 0.

    `halvings` lets a direction that fails come back with half its reach, so many times (0: keep or drop). The joint check
    draws one random point of the box for each image; the box of kept directions shrinks alike, if halvings are allowed.
    """
    check_open_unit("max_label_change", max_label_change)
    check_positive("max_confidence_drop", max_confidence_drop)
    check_positive("min_image_change", min_image_change)
    check_at_least("halvings", halvings, 0)
    with frozen(reference, transform.generator_net), torch.no_grad():
        base = transform(transform.amounts())
        before = reference(base).softmax(1)
        reach, rows = transform.limits.clone(), []
        for j in range(len(transform.directions)):
            for trial in range(halvings + 1):
                row = _along(reference, transform, j, float(reach[j]), base, before)
                if (row[0] <= max_label_change and row[1] <= max_confidence_drop) or trial == halvings:
                    break
                reach[j] /= 2
            rows.append(row)
        changed, drop, moved = torch.tensor(rows, dtype=torch.float64).T
        kept = (changed <= max_label_change) & (drop <= max_confidence_drop) & (moved >= min_image_change)
        source = generator if generator is not None else torch.Generator().manual_seed(0)
        joint = 0.0
        for trial in range(halvings + 1 if bool(kept.any()) else 0):
            a = transform.draw(source) / transform.limits * reach * kept.to(reach)
            joint = float((reference(transform(a)).argmax(1) != before.argmax(1)).double().mean())
            if joint <= max_label_change or trial == halvings:
                break
            reach = reach * torch.where(kept.to(reach.device), 0.7, 1.0)
    return DirectionReport(transform.directions, kept, reach, changed, drop, moved, joint)


def _along(reference: Callable[[Tensor], Tensor], transform: NaturalTransformation, j: int, reach: float, base: Tensor, before: Tensor) -> tuple[float, float, float]:  # fmt: skip
    """Label change, confidence drop and image change along direction j: the means over four amounts, the image change over two."""
    taken = before.argmax(1, keepdim=True)
    changed, drop, moved = [], [], []
    for share in (-1.0, -0.5, 0.5, 1.0):
        a = transform.amounts()
        a[:, j] = share * reach
        images = transform(a)
        after = reference(images).softmax(1)
        changed.append((after.argmax(1, keepdim=True) != taken).double().mean())
        drop.append((before - after).gather(1, taken).double().mean())
        if abs(share) == 1.0:
            moved.append((images - base).flatten(1).square().mean(1).sqrt().double().mean())
    return float(sum(changed) / 4), max(0.0, float(sum(drop) / 4)), float(sum(moved) / 2)


def restrict(report: DirectionReport) -> DirectionReport:
    """The same report with every direction kept: what training without the filter uses."""
    return replace(report, kept=torch.ones_like(report.kept))
