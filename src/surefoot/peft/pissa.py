"""PiSSA: fine-tune the principal part of each weight and freeze the rest.

LoRA's parameters and file format, another start: with the SVD `W = U S V^T` (S descending), rank r and scaling s = alpha / r,

    B0 = U_r diag(sqrt(S_r / s))  [m, r],   A0 = diag(sqrt(S_r / s)) V_r^T  [r, n],   W_res = W - s B0 A0  [m, n],

and the layer computes `x W_res^T + s (x A^T) B^T + b`: the identity at the start, and both factors train from the first step along the
directions that matter (LoRA's A has no gradient there). W_res is made from the factors as stored, so the identity holds however
rough the SVD. Directions with S_i = 0 get a random row of A and a zero column of B, as in LoRA: two zeros would never train.
QPiSSA quantizes W_res instead of W: `R <- W; repeat: (A, B) = top_r(R), W_q = Q(W - s B A), R <- W - W_q`.

Fine-tune a pretrained model in your own loop:

    model = apply_pissa(pretrained, rank=8)         # adapters train, everything else is frozen
    ...                                             # AdamW without weight decay on the parameters that require a gradient
    to_peft(model, "adapter/")                      # plain LoRA for the original base, or: model = merge_pissa(model)

or with ours: `fit(pretrained, task, training, [PiSSA(rank=8)])`, which gives plain layers back. An adapter started here only fits the
*residual* base: ship it by `to_peft`, `merge_pissa` or `save_adapter`. Batch-norm statistics are not weights and keep moving in training
mode. Neighbours: LoRA-GA and CorDA choose other directions; OLoRA takes them from a QR of W.

Source: Meng, Wang, Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models", NeurIPS 2024,
arXiv 2404.02948. NF4 levels: Dettmers et al., QLoRA, arXiv 2305.14314.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.core.task import Task
from surefoot.core.treatment import Treatment
from surefoot.errors import InvalidInput, MissingExtra, check, check_at_least, check_positive
from surefoot.nn.lowrank import (
    LowRank,
    attach_,
    detach_,
    layer_kind,
    match_layers,
    overwritable,
    to_matrix,
)
from surefoot.nn.lowrank_io import from_peft, load_adapter_, save_adapter, start_peft_, to_peft
from surefoot.nn.randomized_svd import all_finite, randomized_svd

if TYPE_CHECKING:
    import peft

M = TypeVar("M", bound=nn.Module)
Quantize = Callable[[Tensor], Tensor]  # a weight [m, n] to what its quantized form decodes to


def pissa_factors(
    weight: Tensor,  # [m, n]
    rank: int,
    *,
    scaling: float = 1.0,
    niter: int | None = None,
    generator: torch.Generator | None = None,
) -> LowRank:
    """A0 `[r, n]`, B0 `[m, r]` and the residual `[m, n]` of one weight.

    `niter=None` is the exact SVD, `niter=k` the randomized one with k power iterations (4 is near exact). Computed in float32, float64 for
    a float64 weight. Raises `InvalidInput` for a rank outside 1..min(m, n), a scaling that is not positive, NaN or infinite weights.
    """
    check(weight.dim() == 2 and weight.is_floating_point(), f"weight must be a float matrix, got {weight.dtype} {tuple(weight.shape)}.")  # fmt: skip
    check(weight.device.type != "meta", "weight is on the meta device; load its values first.")
    check_at_least("rank", rank, 1)
    check_positive("scaling", scaling)
    check(all_finite(weight), "weight holds NaN or infinite values; load a sound checkpoint.")
    return _start(weight.detach().to(torch.promote_types(weight.dtype, torch.float32)), rank, scaling, niter, generator)


def _start(
    weight: Tensor, rank: int, scaling: float, niter: int | None, generator: torch.Generator | None, *, out: Tensor | None = None
) -> LowRank:  # fmt: skip
    a, b = _principal(weight, rank, scaling, niter, generator)
    return LowRank(a, b, scaling, torch.addmm(weight, b, a, alpha=-scaling, out=out))


def _principal(
    weight: Tensor, rank: int, scaling: float, niter: int | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    u, s, vh = randomized_svd(weight, rank, niter=niter, generator=generator)
    root = (s / scaling).sqrt()
    a, b = root[:, None] * vh, u * root
    nil = s <= torch.finfo(s.dtype).eps * max(weight.shape) * s[0]
    if bool(nil.any()):
        draw = torch.Generator(weight.device).manual_seed(0) if generator is None else generator
        rows = torch.rand(a.shape, generator=draw, device=draw.device, dtype=a.dtype).to(a.device)
        a = torch.where(nil[:, None], (2 * rows - 1) / math.sqrt(a.shape[1]), a)
        b = torch.where(nil, torch.zeros_like(b), b)
    return a, b


def qpissa_factors(
    weight: Tensor,  # [m, n]
    rank: int,
    quantize: Quantize,
    iters: int = 5,
    *,
    scaling: float = 1.0,
    niter: int | None = None,
    generator: torch.Generator | None = None,
) -> LowRank:
    """QPiSSA: `residual` is the decoded `W_q`, and `W_q + s B A` is closer to W than `quantize(W)`.

    `iters=1` is PiSSA and then quantization; the authors use 5. The factors returned are those that went into the last `W_q`.
    """
    check_at_least("iters", iters, 1)
    low = pissa_factors(weight, rank, scaling=scaling, niter=niter, generator=generator)
    weight = weight.detach().to(low.A.dtype)
    assert low.residual is not None
    quantized = quantize(low.residual).to(low.A.dtype)
    for _ in range(iters - 1):
        a, b = _principal(weight - quantized, rank, scaling, niter, generator)
        low = LowRank(a, b, scaling)
        quantized = quantize(torch.addmm(weight, b, a, alpha=-scaling)).to(a.dtype)
    return LowRank(low.A, low.B, scaling, quantized)


def nf4(weight: Tensor, block: int = 64) -> Tensor:
    """What NF4 with one absmax a block decodes to. Blocks run along the flattened rows; the last one is padded with zeros."""
    # The 16 levels: normal quantiles scaled to [-1, 1], with an exact zero (QLoRA, appendix E).
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    positive = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    return _blockwise(weight, (levels / levels.abs().max()).to(weight), block)


def int4(weight: Tensor, block: int = 64) -> Tensor:
    """What symmetric 4-bit integers (-7 .. 7) with one absmax a block decode to; blocks as in `nf4`."""
    return _blockwise(weight, torch.linspace(-1.0, 1.0, 15, dtype=weight.dtype, device=weight.device), block)


def _blockwise(weight: Tensor, levels: Tensor, block: int) -> Tensor:
    check_at_least("block", block, 1)
    flat = weight.detach().flatten()
    blocks = F.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    nearest = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scale).flatten()[: len(flat)].reshape(weight.shape)


def apply_pissa_(
    model: M,
    rank: int,
    *,
    alpha: float | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    niter: int | None = 4,
    rslora: bool = False,
    quantize: Quantize | None = None,
    iters: int = 5,
    trainable: Sequence[str] = (),
    keep_base_fp32: bool = False,
    keep_original: bool = False,
    generator: torch.Generator | None = None,
) -> M:
    """Adapt `model` in place: the chosen layers get adapters, everything else is frozen but the modules named in `trainable`. The
    residual is written over a weight that owns its memory alone; what others see of a weight (a `state_dict`, an array) stays as it was.

    - `alpha`: scaling is alpha / rank, or alpha / sqrt(rank) with `rslora`; default alpha = rank.
    - `target_modules`: "all-linear" (Linear, Conv1D, ungrouped Conv2d), a regular expression, or name suffixes. The rank is clamped to
      thin layers, as `adapter_summary` shows, but refused if it is too large for a layer named by suffix.
    - `quantize`: makes it QPiSSA with `iters` iterations.
    - `keep_base_fp32`: hold half-precision residuals in float32 (exact start); otherwise their rounding is reported as `drift`.
    - `keep_original`: hold W on the CPU, so that `unapply_pissa` is exact to the bit.
    """
    check_at_least("rank", rank, 1)
    check_positive("alpha", rank if alpha is None else alpha)
    scaling = (rank if alpha is None else alpha) / (math.sqrt(rank) if rslora else rank)
    layers = match_layers(model, target_modules, exclude=trainable)
    thin = {name: _thin_side(layer) for name, layer in layers.items()}
    if not isinstance(target_modules, str):
        for name, side in thin.items():
            check(rank <= side, f"rank {rank} is larger than layer {name!r} allows ({side}); lower it or leave the layer out.")  # fmt: skip

    free = set() if keep_original else overwritable(model)

    def factor(name: str, weight: Tensor) -> LowRank:
        r = min(rank, thin[name])
        if quantize is not None:
            return qpissa_factors(weight, r, quantize, iters, scaling=scaling, niter=niter, generator=generator)
        out = weight if layers[name] in free else None
        return _start(weight, r, scaling, niter, generator, out=out)  # `attach_` has looked at every weight

    method = "pissa" if quantize is None else "qpissa"
    options = {"keep_base_fp32": keep_base_fp32, "keep_original": keep_original, "exact": quantize is None}
    return attach_(model, layers, factor, trainable=trainable, method=method, **options)


def _thin_side(layer: nn.Module) -> int:
    kind = layer_kind(layer)
    assert kind is not None
    return min(to_matrix(kind, layer.weight).shape)  # type: ignore[arg-type]


def apply_pissa(model: M, rank: int, **options: Any) -> M:
    """`apply_pissa_` on a copy of the model."""
    return apply_pissa_(copy.deepcopy(model), rank, **options)


def merge_pissa(model: M) -> M:
    """A copy with plain layers that compute what the adapted ones do."""
    return detach_(copy.deepcopy(model), merged=True)


def unapply_pissa(model: M) -> M:
    """A copy with the original layers: the adapters are dropped, and W = W_res + s B0 A0 again."""
    return detach_(copy.deepcopy(model), merged=False)


def pissa_lora_config(
    rank: int, *, alpha: float | None = None, rslora: bool = False, **options: Any
) -> peft.LoraConfig:
    """A `peft.LoraConfig` for `get_peft_model` followed by `initialize_peft_`: alpha = rank, all linear layers, no dropout, and an
    `init_lora_weights` that decomposes nothing at load time. `options` override."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingExtra("peft", "llm") from error
    check_at_least("rank", rank, 1)
    check_positive("alpha", rank if alpha is None else alpha)
    given = {"target_modules": "all-linear", "lora_dropout": 0.0, "init_lora_weights": True} | options
    return LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, use_rslora=rslora, **given)  # type: ignore[arg-type]


def initialize_peft_(
    peft_model: M, adapter: str = "default", *, niter: int | None = 4, generator: torch.Generator | None = None
) -> M:
    """Give an existing peft (or diffusers) model with ordinary LoRA layers the PiSSA start, in place; see `start_peft_`."""

    def factor(name: str, weight: Tensor, rank: int, scaling: float) -> LowRank:
        try:
            return pissa_factors(weight, rank, scaling=scaling, niter=niter, generator=generator)
        except InvalidInput as error:
            raise InvalidInput(f"Layer {name!r}: {error}") from error

    return start_peft_(peft_model, factor, adapter=adapter, method="pissa")


@dataclass
class PiSSA(Treatment):
    """Trains principal adapters on a frozen residual, and merges them into plain layers at the end.

    Meant for a pretrained model; `trainable` names modules (a fresh head) that train fully beside the adapters.
    """

    slug: ClassVar[str] = "pissa"

    rank: int = 8
    alpha: float | None = None
    target_modules: str | Sequence[str] = "all-linear"
    niter: int | None = 4
    rslora: bool = False
    trainable: Sequence[str] = ()

    def check(self, model: nn.Module, task: Task) -> None:
        check_at_least("rank", self.rank, 1)
        check_positive("alpha", self.rank if self.alpha is None else self.alpha)
        match_layers(model, self.target_modules, exclude=self.trainable)

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        adapted = apply_pissa_(
            model,
            self.rank,
            alpha=self.alpha,
            target_modules=self.target_modules,
            niter=self.niter,
            rslora=self.rslora,
            trainable=self.trainable,
            generator=task.generator("pissa"),
        )
        return adapted, task

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        return detach_(model, merged=True)


__all__ = [
    "PiSSA",
    "apply_pissa",
    "apply_pissa_",
    "from_peft",
    "initialize_peft_",
    "int4",
    "load_adapter_",
    "merge_pissa",
    "nf4",
    "pissa_factors",
    "pissa_lora_config",
    "qpissa_factors",
    "save_adapter",
    "to_peft",
    "unapply_pissa",
]
