"""Models of several inputs: how the inputs travel, the fusion heads, and a classifier made of encoders and a head."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from surefoot.errors import InvalidInput, Refused, check, check_at_least, check_choice

Shapes = tuple[tuple[int, ...], ...]


@runtime_checkable
class TwoBranch(Protocol):
    """A model of several inputs packed into one tensor; `shapes` says how to cut it."""

    shapes: Shapes

    def __call__(self, x: Tensor) -> Tensor: ...


def pack(inputs: Sequence[Tensor]) -> Tensor:  # M of [B, ...] -> [B, n_1 + ... + n_M]
    """The inputs of all modalities in one tensor: flattened, one after the other."""
    check(len(inputs) > 0 and len({len(x) for x in inputs}) == 1, "pack needs the inputs of the same examples, one tensor a modality.")  # fmt: skip
    return torch.cat([x.flatten(1) for x in inputs], 1)


def unpack(x: Tensor, shapes: Shapes) -> list[Tensor]:
    """The counterpart of `pack`."""
    sizes = [math.prod(shape) for shape in shapes]
    if x.dim() != 2 or x.shape[1] != sum(sizes):
        raise InvalidInput(f"{len(shapes)} modalities of shapes {shapes} are packed as [B, {sum(sizes)}], got {list(x.shape)}; use pack.")  # fmt: skip
    return [part.reshape(-1, *shape) for part, shape in zip(x.split(sizes, 1), shapes, strict=True)]


def _as_shapes(shapes: Iterable[Sequence[int]]) -> Shapes:
    return tuple(tuple(int(n) for n in shape) for shape in shapes)


class Packed(nn.Module):
    """Your own `model(a, b, ...)` behind the packed form."""

    def __init__(self, model: nn.Module, shapes: Iterable[Sequence[int]]) -> None:
        super().__init__()
        self.model, self.shapes = model, _as_shapes(shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(*unpack(x, self.shapes))


# ------------------------------------------------------------------------------------------------ heads


class ConcatFusion(nn.Module):
    """The usual head: one linear layer on the concatenated features. z^m is its share W^m phi_m, a^m = 1."""

    def __init__(self, in_dims: Sequence[int], num_classes: int) -> None:
        super().__init__()
        check(len(in_dims) > 0, "in_dims must name at least one modality.")
        check_at_least("num_classes", num_classes, 2)
        self.in_dims = tuple(in_dims)
        self.linear = nn.Linear(sum(in_dims), num_classes)

    @property
    def bias(self) -> Tensor:
        return self.linear.bias

    def weights(self) -> list[Tensor]:  # M of [K, D_m]
        return list(self.linear.weight.split(self.in_dims, 1))

    def integration(self) -> Tensor:  # [M, K]
        return self.linear.weight.new_ones(len(self.in_dims), self.linear.out_features)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:  # M of [B, K], [B, K]
        uni = [phi @ w.T for phi, w in zip(features, self.weights(), strict=True)]
        return uni, torch.stack(uni).sum(0) + self.bias


class _InverseRoot(torch.autograd.Function):
    """G^(-1/2) of a symmetric positive matrix; its derivative by divided differences is finite for equal eigenvalues too."""

    @staticmethod
    def forward(ctx: Any, gram: Tensor) -> Tensor:  # type: ignore[override]
        values, vectors = torch.linalg.eigh(gram)
        least = torch.finfo(values.dtype).eps * values[-1]  # dependent rows stay finite; they cannot be orthonormal
        root = values.clamp_min(least).clamp_min(torch.finfo(values.dtype).tiny).sqrt()
        ctx.save_for_backward(root, vectors)
        return (vectors / root) @ vectors.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        root, vectors = ctx.saved_tensors
        slopes = -1 / (root[:, None] * root * (root[:, None] + root))
        inner = vectors.T @ gradients[0] @ vectors
        return vectors @ (slopes * (inner + inner.T) / 2) @ vectors.T


def orthonormal_rows(weight: Tensor) -> Tensor:  # [K, D] -> [K, D]
    """The nearest matrix with orthonormal rows (polar factor); unlike Gram-Schmidt it does not depend on the order of rows."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    root = _InverseRoot.apply(wide @ wide.T)
    assert isinstance(root, Tensor)
    return (root @ wide).to(weight.dtype)


def unit_rows(weight: Tensor) -> Tensor:  # [K, D] -> [K, D]
    """The published code's "orthogonal" weight: every row centred and of length 1, rows not orthogonal to each other."""
    return nn.functional.normalize(weight - weight.mean(1, keepdim=True), dim=1)


class OrthogonalFusion(nn.Module):
    """h = sum_m a^m * (W^m phi_m) + b with W^m of orthonormal rows ("full") or of centred rows of length 1 ("row", as published)."""

    def __init__(
        self,
        in_dims: Sequence[int],
        num_classes: int,
        *,
        orthogonal: Literal["full", "row"] = "full",
        a_init: float = 0.1,  # for features the size of a ResNet's; 1 suits small encoders
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check(len(in_dims) > 0, "in_dims must name at least one modality.")
        check_at_least("num_classes", num_classes, 2)
        check_choice("orthogonal", orthogonal, ("full", "row"))
        least = num_classes if orthogonal == "full" else 2
        check(min(in_dims) >= least, f'orthogonal="{orthogonal}" needs at least {least} features a modality for {num_classes} classes, got {min(in_dims)}.')  # fmt: skip
        self.in_dims, self.orthogonal = tuple(in_dims), orthogonal
        source = generator if generator is not None else torch.Generator().manual_seed(0)
        draws = [torch.randn(num_classes, d, generator=source, device=source.device).cpu() / math.sqrt(d) for d in in_dims]  # fmt: skip
        self.raw = nn.ParameterList(nn.Parameter(draw.to(torch.get_default_dtype())) for draw in draws)
        self.a = nn.Parameter(torch.full((len(in_dims), num_classes), float(a_init)))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def weights(self) -> list[Tensor]:  # M of [K, D_m]
        shape = orthonormal_rows if self.orthogonal == "full" else unit_rows
        return [shape(raw) for raw in self.raw]

    def integration(self) -> Tensor:  # [M, K]
        return self.a

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:  # M of [B, K], [B, K]
        uni = [phi @ w.to(phi.dtype).T for phi, w in zip(features, self.weights(), strict=True)]
        return uni, sum((a * z for a, z in zip(self.a, uni, strict=True)), self.bias)  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ the classifier


class MultiModalClassifier(nn.Module):
    """One encoder a modality, `[B, *shape_m]` -> `[B, D_m]`, and a fusion head. `forward` takes packed inputs."""

    def __init__(
        self, encoders: Sequence[nn.Module], fusion: ConcatFusion | OrthogonalFusion, shapes: Iterable[Sequence[int]]
    ) -> None:
        super().__init__()
        self.shapes = _as_shapes(shapes)
        check(len(encoders) == len(self.shapes) == len(fusion.in_dims), f"{len(encoders)} encoders, {len(self.shapes)} shapes and a head for {len(fusion.in_dims)} modalities do not fit; give one of each a modality.")  # fmt: skip
        self.encoders, self.fusion = nn.ModuleList(encoders), fusion

    def features(self, x: Tensor) -> list[Tensor]:  # [B, n] -> M of [B, D_m]
        parts = unpack(x, self.shapes)
        return [encoder(part).flatten(1) for encoder, part in zip(self.encoders, parts, strict=True)]

    def both(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Uni-modal logits z^m (M of `[B, K]`) and logits h `[B, K]`."""
        return self.fusion(self.features(x))

    def forward(self, x: Tensor) -> Tensor:  # [B, n] -> [B, K]
        return self.both(x)[1]


def shapes_of(model: nn.Module, input_shape: Sequence[int]) -> Shapes:
    """How the model's packed input is cut; `Refused` for a model of one input."""
    for module in model.modules():
        shapes = getattr(module, "shapes", None)
        if isinstance(shapes, tuple) and shapes and all(isinstance(shape, tuple) for shape in shapes):
            if tuple(input_shape) == (sum(math.prod(shape) for shape in shapes),):
                return shapes
            raise Refused(f"The model's modalities {shapes} do not add up to inputs of shape {tuple(input_shape)}; pack them (surefoot.certified.crmt.pack).")  # fmt: skip
    raise Refused("This model has one input; a model of two is a MultiModalClassifier, or your own in surefoot.certified.crmt.Packed(model, shapes), on packed data.")  # fmt: skip


def classifier_in(model: nn.Module) -> tuple[str, MultiModalClassifier]:
    """Name and module of the `MultiModalClassifier` in a model; `Refused` where there is none."""
    for name, module in model.named_modules():
        if isinstance(module, MultiModalClassifier):
            return name, module
    raise Refused("crmt needs to see encoders and head apart: build the model as surefoot.certified.crmt.MultiModalClassifier(encoders, fusion, shapes); a model of one input has nothing to balance.")  # fmt: skip
