"""Plain LoRA on Linear, Conv2d and Embedding layers, on a copy that shares the model's weights: adapt, train, merge, or throw it away.

    W' = W + s B A,   A [r, n] uniform in +-1 / sqrt(n),   B [m, r] zero at first,   s = alpha / r

Linear and Conv2d carry `surefoot.nn.lowrank.Adapter`; an embedding `[m words, n]` looks its words up in `B` and multiplies by `A`. With B = 0 the
adapted model computes what the model computes, bit for bit.

Source: Hu et al., LoRA, 2021, arXiv 2106.09685.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import Refused, check, check_at_least, check_positive
from surefoot.nn.lowrank import Adapter, LowRank, attach_, check_base, detach_, layer_kind, replace_layer

M = TypeVar("M", bound=nn.Module)


class EmbeddingAdapter(nn.Module):
    """A frozen embedding and its trainable `A [r, n]`, `B [m, r]`; `weight` reads like the plain layer's, merged."""

    def __init__(self, base: nn.Embedding, factors: LowRank) -> None:
        super().__init__()
        if base.max_norm is not None:
            raise Refused(
                "An embedding with max_norm changes its own weight when read; remove max_norm before adapting it."
            )
        self.base = base.requires_grad_(False)
        self.scaling = float(factors.scaling)
        self.A = nn.Parameter(factors.A.detach().clone())
        self.B = nn.Parameter(factors.B.detach().clone())

    @property
    def weight(self) -> Tensor:
        return self.base.weight + (self.scaling * (self.B @ self.A)).to(self.base.weight.dtype)

    def forward(self, words: Tensor) -> Tensor:  # int64 [...] -> [..., n]
        y = self.base(words)
        update = F.embedding(words, self.B, padding_idx=self.base.padding_idx) @ self.A
        return y + (self.scaling * update).to(y.dtype)

    @torch.no_grad()
    def plain(self, *, merged: bool) -> nn.Embedding:
        if merged:
            self.base.weight.data = self.weight
        return self.base


def shared_copy(model: M) -> M:
    """A frozen copy of the modules over the same storage, in evaluation mode: adapting and merging it leaves `model` as it is."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, memo).eval()


def lora_layers(model: nn.Module, within: str | None = None) -> list[str]:
    """Names of the Linear, ungrouped Conv2d and Embedding layers; with `within`, those below a module of that name (`transformer_blocks`)."""
    return [
        name
        for name, layer in model.named_modules()
        if (isinstance(layer, nn.Embedding) or layer_kind(layer) is not None)
        and (within is None or within in name.split("."))
    ]


def add_lora_(
    model: M, layers: Sequence[str], *, rank: int, alpha: float | None = None, generator: torch.Generator
) -> M:
    """Adapt the named layers in place and freeze the rest; `rank` is cut to what a weight has, `alpha` (default: rank) over `rank` scales.

    The trainable parameters are those that require a gradient. Factors are float32 at least, whatever the weights are.
    """
    check_at_least("rank", rank, 1)
    check_positive("alpha", rank if alpha is None else alpha)
    check(bool(layers), "There is no layer to adapt; see model.named_modules() for the names.")
    scaling = 1.0 if alpha is None else alpha / rank

    def factors(name: str, weight: Tensor) -> LowRank:  # [m, n]
        (m, n), bound = weight.shape, 1 / math.sqrt(weight.shape[1])
        dtype = torch.promote_types(weight.dtype, torch.float32)
        width = min(rank, m, n)
        drawn = torch.rand(width, n, generator=generator, device=generator.device, dtype=dtype).to(weight.device)
        return LowRank(bound * (2 * drawn - 1), weight.new_zeros(m, width, dtype=dtype), scaling)

    places = dict(model.named_modules())
    words = [name for name in layers if isinstance(places[name], nn.Embedding)]
    for name in words:
        check_base(name, places[name])
    model = attach_(model, [name for name in layers if name not in words], factors, print_of_base="")
    for name in words:
        layer: nn.Embedding = places[name]  # type: ignore[assignment]
        model = replace_layer(model, name, EmbeddingAdapter(layer, factors(name, layer.weight.detach())))
    return model


def remove_lora_(model: M, *, merged: bool) -> M:
    """Plain layers again, in place: with the update in their weights, or as they were."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, EmbeddingAdapter):
            model = replace_layer(model, name, layer.plain(merged=merged))
    if any(isinstance(layer, Adapter) for layer in model.modules()):
        model = detach_(model, merged=merged)
    return model
