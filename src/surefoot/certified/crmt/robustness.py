"""What is known about a multi-modal model: Lipschitz constants, certified radii, its preference, and how attacks fare."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from surefoot.certified.crmt.model import MultiModalClassifier, Shapes, classifier_in, shapes_of, unpack
from surefoot.core.subject import predict
from surefoot.errors import InvalidInput, Refused, check, check_at_least, check_choice, check_positive
from surefoot.nn.attacks import pgd
from surefoot.nn.lipschitz import lipschitz_bound
from surefoot.nn.modes import evaluating

Source = Literal["empirical", "product"]


@dataclass(frozen=True)
class Lipschitz:
    """Constants of one model: T^m_k of z^m_k in x_m, and, from the product bound, L_m of the encoders."""

    logits: Tensor  # float64 [M, K], T
    encoders: Tensor | None  # float64 [M], L; None where nothing but gradients on data was looked at
    method: Source
    model: str  # digest of the encoders and the head's matrices


def fingerprint(model: MultiModalClassifier) -> str:
    """A digest of what T depends on: encoders and the matrices W, neither a nor b."""
    digest = hashlib.sha256()
    for tensor in [*model.encoders.state_dict().values(), *model.fusion.weights()]:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def estimate_lipschitz(
    model: nn.Module,
    batches: Iterable[Tensor | tuple[Tensor, Tensor]],  # packed [B, n], or (x, y)
    method: Source = "empirical",
) -> Lipschitz:
    """T^m_k in evaluation mode: "empirical", the largest ||d z^m_k / d x_m|| on the data, which certifies nothing; "product",

    spectral norms multiplied along the encoder, which holds everywhere. One batched vector-Jacobian product a batch and modality.
    """
    check_choice("method", method, ("empirical", "product"))
    _, known = classifier_in(model)
    parts = [batch[0] if isinstance(batch, tuple | list) else batch for batch in batches]
    check(len(parts) > 0, "There are no batches to estimate Lipschitz constants on.")
    if method == "product":
        return _product(known, parts[0])
    worst: Tensor | None = None
    with evaluating(known):
        weights = [w.detach() for w in known.fusion.weights()]
        for x in parts:
            seen = torch.stack([_gradient_norms(*args) for args in zip(known.encoders, weights, unpack(x, known.shapes), strict=True)])  # fmt: skip
            worst = seen if worst is None else torch.maximum(worst, seen)
    assert worst is not None
    return Lipschitz(worst.double().cpu(), None, "empirical", fingerprint(known))


def _gradient_norms(encoder: nn.Module, weight: Tensor, x: Tensor) -> Tensor:  # [K]
    """Largest gradient norm over the batch of each row of W phi(x)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        z = encoder(x).flatten(1) @ weight.T
        rows = torch.eye(z.shape[1], dtype=z.dtype, device=z.device).unsqueeze(1).expand(-1, len(z), -1)
        (gradients,) = torch.autograd.grad(z, x, rows, is_grads_batched=True)
    return gradients.flatten(2).norm(dim=2).amax(1)


def _product(model: MultiModalClassifier, x: Tensor) -> Lipschitz:
    examples = unpack(x[:1], model.shapes)
    bounds = [lipschitz_bound(encoder, part) for encoder, part in zip(model.encoders, examples, strict=True)]
    encoders = torch.tensor(bounds, dtype=torch.float64)
    rows = torch.stack([w.detach().double().norm(dim=1).cpu() for w in model.fusion.weights()])
    return Lipschitz(encoders[:, None] * rows, encoders, "product", fingerprint(model))


# ------------------------------------------------------------------------------------------------ radii


@dataclass(frozen=True)
class MultiModalRadius:
    """Radii of B examples in the joint L2 norm of the modalities that may change; float64 on the CPU."""

    radius: Tensor  # [B], 0 where the answer is wrong
    signed: Tensor  # [B]
    rival: Tensor  # int64 [B], the class that is nearest
    certified: bool  # False: an estimate from gradients on data
    modalities: tuple[int, ...]


def published_radius(
    uni_logits: Sequence[Tensor],  # M of [B, K], z
    integration: Tensor,  # [M, K], a
    bias: Tensor,  # [K]
    constants: Tensor,  # [M, K], T
    y: Tensor,  # int64 [B]
    rival: Tensor,  # int64 [B]
) -> Tensor:  # [B]
    """rho = (sum_m a_y z_y - a_j z_j + b_y - b_j) / sqrt(sum_m (|a_y| T_y + |a_j| T_j)^2), differentiable in a."""
    z = torch.stack(list(uni_logits))
    _check_constants(constants, z.shape[0], z.shape[2])
    scaled = integration.unsqueeze(1) * z
    rows = torch.arange(len(y), device=y.device)
    numerator = (scaled[:, rows, y] - scaled[:, rows, rival]).sum(0) + bias[y] - bias[rival]
    reach = integration.abs() * constants.to(integration)
    return numerator / (reach[:, y] + reach[:, rival]).square().sum(0).sqrt()


@torch.no_grad()
def multimodal_radius(
    model: nn.Module,
    x: Tensor,  # packed [B, n]
    y: Tensor,  # int64 [B]
    lipschitz: Lipschitz,
    modalities: Sequence[int] | None = None,
    *,
    tight_pairs: bool | None = None,
) -> MultiModalRadius:
    """How far the given modalities (default: all) may change together before the answer can turn, the minimum over rivals.

    `tight_pairs` (default where encoder constants are known) takes ||a_y W_y - a_j W_j|| from the weights themselves, so that it
    is as sound for rows that are not orthogonal; without it the published sum of T. In evaluation mode and float64.
    """
    _, known = classifier_in(model)
    wide = copy.deepcopy(known).double()
    count, classes = len(known.shapes), known.fusion.bias.shape[0]
    chosen = tuple(range(count)) if modalities is None else tuple(dict.fromkeys(modalities))
    check(len(chosen) > 0 and set(chosen) <= set(range(count)), f"modalities must be among 0..{count - 1}, got {chosen}.")  # fmt: skip
    _check_labels(y, x, classes)
    check(bool(torch.isfinite(x).all()), "x must be finite, got NaN or infinity.")
    check_lipschitz(lipschitz, known)
    tight = lipschitz.encoders is not None if tight_pairs is None else tight_pairs
    if tight and lipschitz.encoders is None:
        raise Refused('tight_pairs needs the encoders\' constants; use estimate_lipschitz(..., method="product").')
    with evaluating(wide):
        logits = wide(x.double()).cpu()
        weights, a = [w.cpu() for w in wide.fusion.weights()], wide.fusion.integration().cpu()
    reach = torch.zeros(classes, classes, dtype=torch.float64)
    for m in chosen:
        if tight:
            assert lipschitz.encoders is not None
            rows = a[m, :, None] * weights[m]
            apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") * lipschitz.encoders[m]
        else:
            each = a[m].abs() * lipschitz.logits[m]
            apart = each[:, None] + each
        reach += apart.square()
    target = y.cpu()
    margins = logits.gather(1, target[:, None]) - logits
    ratio = (margins / reach.sqrt().clamp_min(1e-300)[target]).scatter(1, target[:, None], torch.inf)
    signed, rival = ratio.min(1)
    return MultiModalRadius(signed.clamp_min(0), signed, rival, lipschitz.method == "product", chosen)


def check_lipschitz(lipschitz: Lipschitz, model: MultiModalClassifier) -> None:
    """The constants must be of this model's encoders and matrices, and usable."""
    _check_constants(lipschitz.logits, len(model.shapes), model.fusion.bias.shape[0])
    if lipschitz.model != fingerprint(model):
        raise Refused("These Lipschitz constants belong to other weights; estimate them again for this model.")


def _check_labels(y: Tensor, x: Tensor, classes: int) -> None:
    good = y.dtype == torch.int64 and y.shape == x.shape[:1] and bool(((y >= 0) & (y < classes)).all())
    check(good, f"y must be int64 [B] with classes in [0, {classes}).")


def _check_constants(constants: Tensor, modalities: int, classes: int) -> None:
    check(constants.shape == (modalities, classes), f"Lipschitz constants must be [{modalities}, {classes}], got {list(constants.shape)}.")  # fmt: skip
    check(bool((constants > 0).all() and torch.isfinite(constants).all()), "Lipschitz constants must be positive and finite.")  # fmt: skip


@dataclass(frozen=True)
class PreferenceReport:
    """What each of M modalities contributes; `vulnerability` sums to 1, and 1/M each is balance."""

    accuracy: tuple[float, ...]  # of z^m alone
    margin: tuple[float, ...]  # mean of a_y z_y - a_j z_j, j the rival of the whole model
    vulnerability: tuple[float, ...]  # mean share of (|a_y| T_y + |a_j| T_j): where an attack gets furthest
    preferred: int  # the modality of the largest vulnerability
    warnings: tuple[str, ...] = ()


@torch.no_grad()
def modality_preference(model: nn.Module, x: Tensor, y: Tensor, lipschitz: Lipschitz) -> PreferenceReport:
    """Margins and the indicator eta^m = a^m T^m of each modality, on a labelled set `[B, n]`."""
    _, known = classifier_in(model)
    check_lipschitz(lipschitz, known)
    _check_labels(y, x, known.fusion.bias.shape[0])
    with evaluating(known):
        uni, logits = known.both(x)
    rival = logits.scatter(1, y[:, None], -torch.inf).argmax(1)
    a, rows = known.fusion.integration(), torch.arange(len(y), device=y.device)
    z = torch.stack(uni)
    scaled = a.unsqueeze(1) * z
    margin = (scaled[:, rows, y] - scaled[:, rows, rival]).mean(1)
    reach = a.abs() * lipschitz.logits.to(a)
    reach = reach[:, y] + reach[:, rival]
    share = (reach / reach.sum(0)).mean(1)
    right = (z.argmax(2) == y).double().mean(1)
    warnings = ("There is one modality, so nothing to prefer.",) if len(uni) == 1 else ()
    return PreferenceReport(tuple(right.tolist()), tuple(margin.tolist()), tuple(share.tolist()), int(share.argmax()), warnings)  # fmt: skip


# ------------------------------------------------------------------------------------------------ attacks


class Held(nn.Module):
    """The model with all but some modalities out of an attack's reach: no gradient gets there, so they stay as they are."""

    reach: Tensor

    def __init__(self, model: nn.Module, shapes: Shapes, modalities: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        sizes = torch.tensor([int(torch.Size(shape).numel()) for shape in shapes])
        owner = torch.arange(len(shapes)).repeat_interleave(sizes)
        self.register_buffer("reach", torch.isin(owner, torch.tensor(list(modalities))))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(torch.where(self.reach.to(x.device), x, x.detach()))


def attack_modalities(
    model: nn.Module,
    x: Tensor,  # packed [B, n]
    y: Tensor,  # int64 [B]
    modalities: Sequence[int],
    radius: float,
    *,
    steps: int = 20,
    restarts: int = 1,
    bounds: tuple[float, float] | None = None,
    generator: torch.Generator,
) -> Tensor:  # bool [B]
    """Which examples PGD (L2, over the given modalities together) turns wrong; those wrong already count. `steps=1` is FGM.

    The first start is the input itself; the cross-entropy and the margin are tried in turn.
    """
    check_positive("radius", radius)
    check_at_least("restarts", restarts, 1)
    shapes = shapes_of(model, x.shape[1:])
    check(len(modalities) > 0 and set(modalities) <= set(range(len(shapes))), f"modalities must be among 0..{len(shapes) - 1}, got {tuple(modalities)}.")  # fmt: skip
    held = Held(model, shapes, modalities)
    broken = torch.zeros(len(x), dtype=torch.bool)
    for restart in range(restarts):
        start = x
        if restart:
            noise = torch.randn(x.shape, generator=generator, device=generator.device).to(x) * held.reach.to(x.device)
            start = x + radius * noise / noise.norm(dim=1, keepdim=True)
        left = (~broken).nonzero()[:, 0].to(x.device)
        if len(left) == 0:
            break
        size = radius if steps == 1 else None
        found = pgd(
            held, x[left], y[left], eps=radius, norm="l2", steps=steps, step_size=size, loss="margin" if restart % 2 else "ce",
            bounds=bounds, random_start=False, start=start[left], generator=generator,
        )  # fmt: skip
        broken[left.cpu()] |= found.broken.cpu()
    return broken


@dataclass(frozen=True)
class MultiModalReport:
    """Right answers (bool `[B]`) without a change, with one modality missing, and under attack by target and radius."""

    clean: Tensor
    missing: tuple[Tensor, ...]  # one a modality
    attacked: dict[tuple[str, float], Tensor]  # ("0", r), ..., ("all", r)

    def accuracy(self, target: str, radius: float) -> float:
        return self.attacked[target, radius].double().mean().item()

    def worst(self, radius: float) -> float:
        """Accuracy when the worse single modality is attacked."""
        return min(self.accuracy(str(m), radius) for m in range(len(self.missing)))

    @property
    def worst_missing(self) -> float:
        return min(right.double().mean().item() for right in self.missing)


def evaluate_multimodal(
    model: nn.Module,
    x: Tensor,  # packed [B, n]
    y: Tensor,  # int64 [B]
    radii: Sequence[float],
    *,
    steps: int = 20,
    restarts: int = 1,
    bounds: tuple[float, float] | None = None,
    fill: float | Tensor = 0.0,  # what stands for a missing modality: a number, or a packed [n] such as the mean
    generator: torch.Generator,
) -> MultiModalReport:
    """Clean, missing-modality and robust accuracies of any `TwoBranch`, attacked on each modality and on all together."""
    shapes = shapes_of(model, x.shape[1:])
    check(len(x) > 0, "There are no examples to evaluate.")
    logits = predict(model, x)
    if not bool(torch.isfinite(logits).all()):
        raise InvalidInput("The model's logits must be finite, got NaN or infinity.")
    _check_labels(y, x, logits.shape[1])
    reach = [Held(model, shapes, [m]).reach.to(x.device) for m in range(len(shapes))]
    filling = torch.as_tensor(fill, dtype=x.dtype, device=x.device).expand(x.shape[1])
    missing = tuple(predict(model, torch.where(mask, filling, x)).argmax(1) == y.cpu() for mask in reach)
    targets = {str(m): (m,) for m in range(len(shapes))} | {"all": tuple(range(len(shapes)))}
    attacked = {
        (name, r): ~attack_modalities(
            model, x, y, chosen, r, steps=steps, restarts=restarts, bounds=bounds, generator=generator
        )
        for name, chosen in targets.items()
        for r in radii
    }
    return MultiModalReport(logits.argmax(1) == y.cpu(), missing, attacked)
