"""Low-rank adapters: one type, one way to wrap, merge, undo, save and export them, whatever made their starting point.

A layer with weight `W [m, n]` becomes `x W_base^T + s (x A^T) B^T + b` with `A [r, n]`, `B [m, r]`, scaling `s` and `W_base` either `W`
(LoRA) or a residual `W - s B0 A0` (PiSSA, LoRA-GA, CorDA). Linear stores W as (m, n), transformers' Conv1D as (n, m), Conv2d as
m x (c k_h k_w): its adapter is a convolution to r channels, then a 1x1 convolution.

An adapter on a residual belongs to the *changed* base; what it changed since is `s (B A - B0 A0) = s [B, -B0] [A; A0]`, a plain LoRA of
rank 2r on the original one (`Adapter.update`; `truncate` of `surefoot.nn.randomized_svd` for a smaller rank). Files:
`surefoot.nn.lowrank_io`.

Source: Hu et al., LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import UninitializedParameter

from surefoot.errors import InvalidInput, Refused, UnsupportedOp, check
from surefoot.nn.fingerprint import fingerprint
from surefoot.nn.randomized_svd import all_finite

M = TypeVar("M", bound=nn.Module)
Kind = Literal["linear", "conv1d", "conv2d"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LowRank:
    """`scaling * B @ A`, on top of `residual` (None: on top of the weight itself)."""

    A: Tensor  # [r, n]
    B: Tensor  # [m, r]
    scaling: float = 1.0
    residual: Tensor | None = None  # [m, n]

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def delta(self) -> Tensor:  # [m, n]
        return self.scaling * (self.B @ self.A)


# --- layers -----------------------------------------------------------------------------------------------------------


def layer_kind(layer: nn.Module) -> Kind | None:
    """Which of the three layouts a layer has; None for what cannot carry an adapter (a grouped convolution, for one)."""
    if isinstance(layer, nn.Linear):
        return "linear"
    if type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers."):
        return "conv1d"
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return "conv2d"
    return None


def to_matrix(kind: Kind, weight: Tensor) -> Tensor:  # [m, n], a view
    return weight.mT if kind == "conv1d" else weight.flatten(1)


def from_matrix(kind: Kind, matrix: Tensor, shape: torch.Size) -> Tensor:
    return matrix.mT.contiguous() if kind == "conv1d" else matrix.reshape(shape)


def weight_matrix(layer: nn.Module) -> Tensor:  # [m, n]
    """A layer's weight as the matrix that multiplies from the left, float32 at least."""
    kind = layer_kind(layer)
    assert kind is not None
    weight = to_matrix(kind, layer.weight.detach())  # type: ignore[arg-type,operator]
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


class Adapter(nn.Module):
    """A frozen layer and its trainable `A [r, n]`, `B [m, r]`; `A0`, `B0` are where they started.

    `weight` and `bias` read like the plain layer's (the merged ones), so code that reaches into the layer, as
    `nn.MultiheadAttention` and the fused transformer layers do, computes the adapted function. `drift` is
    max |W - (W_base + s B0 A0)| / max |W| where W_base had to be rounded to a narrower type than the factors', else 0.
    """

    A0: Tensor
    B0: Tensor
    kind: Kind
    scaling: float

    def __init__(
        self,
        base: nn.Module,
        factors: LowRank,
        *,
        method: str = "lora",
        start: tuple[Tensor, Tensor] | None = None,
        print_of_base: str | None = None,
        keep_base_fp32: bool = False,
        keep_original: bool = False,
        exact: bool = True,
    ) -> None:
        """`base` still holds W. `start` are A0, B0 where the factors have been trained since. `exact=False`: the residual is not
        W - s B0 A0 (it was quantized), so W itself is kept on the CPU."""
        super().__init__()
        kind = layer_kind(base)
        assert kind is not None
        self.kind, self.scaling, self.method, self.exact = kind, float(factors.scaling), method, exact
        self.on_residual = factors.residual is not None
        self.fingerprint = fingerprint(base) if print_of_base is None else print_of_base
        weight: nn.Parameter = base.weight  # type: ignore[assignment]
        self.original = weight.detach().cpu().clone() if keep_original or not exact else None
        a0, b0 = start or (factors.A, factors.B)
        self.drift = 0.0
        if factors.residual is not None:
            original = weight_matrix(base)
            stored = from_matrix(kind, factors.residual, weight.shape).to(weight.dtype)
            if keep_base_fp32:
                base.float()
                stored = from_matrix(kind, factors.residual, weight.shape).float()
            weight.data = stored
            if exact and stored.dtype != factors.residual.dtype:
                scale = original.abs().max().clamp_min(torch.finfo(original.dtype).tiny)
                at_start = torch.addmm(to_matrix(kind, stored).to(original.dtype), b0, a0, alpha=self.scaling)
                self.drift = ((at_start - original).abs().max() / scale).item()
        self.base = base.requires_grad_(False)
        rows = torch.contiguous_format
        self.A = nn.Parameter(factors.A.detach().clone(memory_format=rows))
        self.B = nn.Parameter(factors.B.detach().clone(memory_format=rows))
        self.register_buffer("A0", a0.detach().clone(memory_format=rows))
        self.register_buffer("B0", b0.detach().clone(memory_format=rows))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base" or name.startswith("__"):
                raise
            return getattr(self.base, name)  # in_features, kernel_size, nf, ...

    @property
    def weight(self) -> Tensor:
        plain: Tensor = self.base.weight  # type: ignore[assignment]
        return plain + from_matrix(self.kind, self.scaling * (self.B @ self.A), plain.shape).to(plain.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        given = x.dtype
        y = self.base(x.to(self.base.weight.dtype))  # type: ignore[arg-type]
        x = x.to(self.A.dtype)
        if self.kind == "conv2d":
            down = self.A.unflatten(1, self.base.weight.shape[1:])  # type: ignore[arg-type]
            update = F.conv2d(self.base._conv_forward(x, down, None), self.B[:, :, None, None])  # type: ignore[operator]
        else:
            update = F.linear(F.linear(x, self.A), self.B)
        y = y + (self.scaling * update).to(y.dtype)
        return y.to(given) if given != self.base.weight.dtype else y  # type: ignore[union-attr]

    @torch.no_grad()
    def plain(self, *, merged: bool) -> nn.Module:
        """The layer without the adapter: W_base + s B A, or (`merged=False`) the original W."""
        base = self.base
        weight: nn.Parameter = base.weight  # type: ignore[assignment]
        if not merged and self.original is not None:
            weight.data = self.original.to(weight.device)
        elif merged or self.on_residual:
            a, b = (self.A, self.B) if merged else (self.A0, self.B0)
            whole = torch.addmm(weight_matrix(base).to(a.dtype), b, a, alpha=self.scaling)
            weight.data = from_matrix(self.kind, whole, weight.shape).to(weight.dtype)
        return base

    def update(self) -> LowRank:
        """What training changed, as factors on the *original* weight: `s (B A - B0 A0)`, rank 2r on a residual, else `s B A`."""
        if not self.on_residual:
            return LowRank(self.A.detach(), self.B.detach(), self.scaling)
        return LowRank(torch.cat([self.A.detach(), self.A0]), torch.cat([self.B.detach(), -self.B0], 1), self.scaling)


@dataclass(frozen=True)
class AdapterInfo:
    """One line of `adapter_summary`."""

    name: str
    kind: Kind
    shape: tuple[int, int]  # (m, n)
    rank: int
    scaling: float
    trainable: int  # r (m + n)
    drift: float


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by the name of the layer they sit on; an error where there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}
    if not found:
        raise InvalidInput("The model carries no adapter; apply one first.")
    return found


def adapter_summary(model: nn.Module) -> tuple[AdapterInfo, ...]:
    """What was adapted, layer by layer: rank after clamping, scaling, trainable numbers, rounding drift at the start."""
    return tuple(
        AdapterInfo(name, a.kind, (a.B.shape[0], a.A.shape[1]), a.A.shape[0], a.scaling, a.A.numel() + a.B.numel(), a.drift)
        for name, a in adapters(model).items()
    )  # fmt: skip


# --- choosing layers --------------------------------------------------------------------------------------------------


def check_base(name: str, layer: nn.Module) -> None:
    """Refuse, by name, a layer whose weight cannot be factored."""
    weight = layer._parameters.get("weight")
    if weight is None:
        raise Refused(
            f"The weight of {name!r} is computed (weight norm or another parametrization); remove that first."
        )
    check(
        not isinstance(weight, UninitializedParameter),
        f"Layer {name!r} is lazy; run one batch through the model first.",
    )
    check(weight.device.type != "meta", f"The weight of {name!r} is on the meta device; load its values first.")
    check(
        weight.dtype.is_floating_point and weight.element_size() > 1,
        f"The weight of {name!r} is {weight.dtype}, quantized or not real; dequantize it to float first.",
    )
    check(
        weight.numel() == 0 or all_finite(weight),
        f"The weight of {name!r} holds NaN or infinite values; load a sound checkpoint.",
    )


def match_layers(
    model: nn.Module, target_modules: str | Sequence[str] = "all-linear", *, exclude: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """The layers to adapt: a regular expression (full match), a sequence of name suffixes, or "all-linear"; none inside the
    modules named in `exclude`.

    "all-linear" is every Linear, Conv1D and ungrouped Conv2d but tied ones and a transformers model's output head.
    """
    places = dict(model.named_modules())
    for name, module in places.items():
        if isinstance(module, Adapter) or hasattr(module, "lora_A"):
            raise Refused(f"Layer {name!r} already carries an adapter; merge or unapply it first.")
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    everything = target_modules == "all-linear"
    chosen: dict[str, nn.Module] = {}
    for name, module in places.items():
        if everything or isinstance(target_modules, str):
            wanted = everything or re.fullmatch(str(target_modules), name) is not None
        else:
            wanted = any(name == target or name.endswith(f".{target}") for target in target_modules)
        if not wanted or any(name == e or name.startswith(f"{e}.") for e in exclude):
            continue
        if layer_kind(module) is None:
            if not isinstance(target_modules, str) or (isinstance(module, nn.Conv2d) and not everything):
                raise UnsupportedOp(
                    f"Layer {name!r} ({type(module).__name__}) cannot carry an adapter; "
                    "Linear, Conv1D and ungrouped Conv2d can (not the joint in_proj_weight of MultiheadAttention)."
                )
            continue
        if uses.get(id(module._parameters.get("weight")), 1) > 1:
            if everything:
                continue
            raise Refused(f"The weight of {name!r} is tied to another layer; leave it out or untie it.")
        if not (everything and module is head):
            chosen[name] = module
    if not chosen:
        raise InvalidInput(
            f"target_modules {target_modules!r} matches no layer; see model.named_modules() for the names."
        )
    log.info("adapting %d layers: %s", len(chosen), ", ".join(chosen))
    return chosen


def replace_layer(model: M, name: str, layer: nn.Module) -> M:
    """Put `layer` at `name`; the model itself where the name is empty."""
    if not name:
        return layer  # type: ignore[return-value]
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
    return model


def overwritable(model: nn.Module) -> set[nn.Module]:
    """The layers whose weight owns its memory alone: no second layer, no view of it in a `state_dict`, a graph or an array, no other
    process. A residual may be written over such a weight; fresh pages for it cost a fifth of a whole start."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {layer for layer in model.modules() if _held_alone(layer) and uses[id(layer._parameters["weight"])] == 1}


def _held_alone(layer: nn.Module) -> bool:
    count = getattr(torch._C, "_storage_Use_Count", None)  # private: without it nothing is overwritten
    weight = layer._parameters.get("weight")
    if count is None or weight is None or weight.device.type == "meta" or isinstance(weight, UninitializedParameter):
        return False
    storage = weight.untyped_storage()
    own = (
        storage.resizable() and count(storage._cdata) == 2
    )  # the weight and `storage`; arrays and files lend memory of fixed size
    whole = storage.nbytes() == weight.numel() * weight.element_size()
    return own and whole and not weight.is_shared() and not weight.is_inference()


def attach_(
    model: M,
    layers: Iterable[str],
    factor: Callable[[str, Tensor], LowRank],
    *,
    trainable: Sequence[str] = (),
    **options: Any,
) -> M:
    """Adapt the layers of these names in place, one at a time, by `factor(name, W [m, n])` (which may write the residual over a W of
    `overwritable`, unless the original is to be kept); everything else is frozen but the modules (by name) in `trainable`. `options` go to `Adapter`."""
    places = dict(model.named_modules())
    layers = list(layers)
    for name in layers:
        check_base(name, places[name])
    for name in trainable:
        check(name in places, f"trainable names {name!r}, which is not a module of the model.")
    frozen = [name for name, p in model.named_parameters() if p.requires_grad]
    model.requires_grad_(False)
    for name in layers:
        layer = places[name]
        # taken before W can become a residual
        mark = {} if "print_of_base" in options else {"print_of_base": fingerprint(layer)}
        model = replace_layer(model, name, Adapter(layer, factor(name, weight_matrix(layer)), **mark, **options))
    for name in trainable:
        model.get_submodule(name).requires_grad_(True)
    model._lowrank_froze = tuple(frozen)  # type: ignore[assignment]
    return model


def detach_(model: M, *, merged: bool) -> M:
    """Plain layers again, in place, merged or as they were before; what `attach_` froze trains again."""
    for name, adapter in adapters(model).items():
        frozen = getattr(model, "_lowrank_froze", ())
        model = replace_layer(model, name, adapter.plain(merged=merged))
        model._lowrank_froze = frozen  # type: ignore[assignment]
    parameters = dict(model.named_parameters())
    for name in model.__dict__.pop("_lowrank_froze", ()):
        if name in parameters:
            parameters[name].requires_grad_(True)
    return model
