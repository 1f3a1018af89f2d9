"""Norms of per-example gradients: how strongly each example would move the weights.

    GraNd(x, y) = || grad_w CE(f_w(x), y) ||_2        over every trainable parameter, one example at a time

A layer's gradient for one example is the product of what goes in and what comes back, so that its norm needs no gradient
in memory. With inputs `A [I, L]` and output gradients `G [O, L]` (L positions: 1 for a plain linear layer, the pixels for
a convolution) the weight gradient is `G A^T`, and

    || G A^T ||^2 = sum((A^T A) * (G^T G))            L x L numbers instead of O x I, whichever are fewer

Three ways to the number, each exact, the fastest that fits is taken by `gradient_norms(mode="full")`:
*layers* (linear, convolution, normalisation, embedding: one batched backward pass to the layer outputs), `torch.func`'s
*vmap* for any other module, and a *loop* of single examples where vmap cannot trace the model. "last_layer" is the exact norm
of the final linear layer's part, || p - y || sqrt(||h||^2 + 1), from a forward pass; "sketch" estimates the full norm by forward-mode
derivatives along random directions.

Sources: Paul, Ganguli and Dziugaite 2021 (arXiv 2107.07075), GraNd; Goodfellow 2015 (arXiv 1510.01799), norms from layer
inputs and output gradients; Rochette et al. 2019 (arXiv 1912.06015), the same for convolutions.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F

from surefoot.errors import InvalidInput, Refused, check, check_at_least, check_choice
from surefoot.nn.modes import evaluating
from surefoot.nn.scores import el2n

GradientMode = Literal["full", "last_layer", "sketch"]
Engine = Callable[[nn.Module, Tensor, Tensor], Tensor]  # (model in evaluation mode, x, y) -> norms [B]

logger = logging.getLogger(__name__)

PROBE = 4  # examples on which the layer engine must agree with plain autograd before it is trusted


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's training flag put back after. Refuses layers that couple examples even then."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise Refused(
                f"{name or 'The model'} normalises with batch statistics even in evaluation mode, so that an example's score would "
                "depend on its neighbours; use track_running_stats=True."
            )
    with evaluating(model):
        yield


def gradient_norms(
    model: nn.Module,
    x: Tensor,  # [B, ...]
    y: Tensor,  # int64 [B]
    *,
    mode: GradientMode = "full",
    chunk_size: int = 64,
    sketches: int = 64,
    generator: torch.Generator | None = None,
    engine: Engine | None = None,
) -> Tensor:  # [B]
    """|| grad_w CE(f(x), y) ||_2 of each example, in evaluation mode; the model is left as it was.

    "full": all trainable parameters, exact. "last_layer": the final `nn.Linear` only, exact. "sketch": an unbiased
    estimate of the squared full norm from `sketches` Gaussian directions (relative error of the square sqrt(2 / sketches)), for models
    whose layers are unknown and whose vmap is too slow. `chunk_size` bounds the memory: nothing larger than that many examples' layer
    outputs (or gradients, under vmap) is held at a time. `engine` (from `pick_engine`) saves choosing again for each batch of
    a stream. Raises `InvalidInput` where no parameter is trainable.
    """
    check_choice("mode", mode, ("full", "last_layer", "sketch"))
    check_at_least("chunk_size", chunk_size, 1)
    check(len(x) > 0, "x is empty; give at least one example.")
    check_trainable(model)
    with evaluation(model):
        if mode == "last_layer":
            return torch.cat([last_layer_norms(model, *pair) for pair in _chunks(x, y, chunk_size)])
        if mode == "sketch":
            return _sketched_norms(model, x, y, chunk_size, sketches, generator)
        way = engine or pick_engine(model, x, y)
        return torch.cat([way(model, *pair) for pair in _chunks(x, y, chunk_size)])


def check_trainable(model: nn.Module) -> None:
    check(
        any(p.requires_grad for p in model.parameters()),
        "Every parameter of the model is frozen, so that the gradient norm would be 0; unfreeze those to be scored.",
    )


def _chunks(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(x.split(size), y.split(size), strict=True)


def pick_engine(model: nn.Module, x: Tensor, y: Tensor) -> Engine:
    """The fastest of the three exact engines that agrees with plain autograd on the first examples."""
    probe = x[:PROBE], y[:PROBE]
    truth = loop_norms(model, *probe)
    if not torch.isfinite(truth).all():
        return loop_norms  # nothing to compare with; the caller names the examples
    tolerance = 1e-3 * truth.max().clamp_min(torch.finfo(truth.dtype).tiny)
    for engine in (layer_norms, vmap_norms):
        try:
            answer = engine(model, *probe)
        except (RuntimeError, NotImplementedError, InvalidInput) as error:
            logger.info("%s does not take this model (%s).", engine.__name__, error)
            continue
        if (answer - truth).abs().max() <= tolerance:
            return engine
        logger.info("%s disagrees with autograd on this model; trying the next way.", engine.__name__)
    return loop_norms


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loop_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The definition: one example at a time. Works on every model, and is what the faster ways are compared with."""
    parameters = list(trainable(model).values())
    norms = []
    for k in range(len(x)):
        loss = F.cross_entropy(model(x[k : k + 1]), y[k : k + 1])
        parts = torch.autograd.grad(loss, parameters, allow_unused=True)
        norms.append(torch.stack([part.square().sum() for part in parts if part is not None]).sum().sqrt())
    return torch.stack(norms)


def vmap_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """`vmap(grad)` of the functional model; only norms leave the mapped function."""
    parameters = {name: p.detach() for name, p in trainable(model).items()}
    rest = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad} | dict(
        model.named_buffers()
    )

    def loss(weights: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights | rest, (one.unsqueeze(0),)), label.unsqueeze(0))

    def norm(one: Tensor, label: Tensor) -> Tensor:
        parts = grad(loss)(parameters, one, label)
        return torch.stack([part.square().sum() for part in parts.values()]).sum().sqrt()

    return vmap(norm)(x, y)


def _sketched_norms(
    model: nn.Module, x: Tensor, y: Tensor, chunk_size: int, sketches: int, generator: torch.Generator | None
) -> Tensor:
    """sqrt(mean over v ~ N(0, I) of (grad . v)^2): a forward-mode derivative gives grad . v for a whole batch at once."""
    check_at_least("sketches", sketches, 1)
    parameters = {name: p.detach() for name, p in trainable(model).items()}
    source = generator if generator is not None else torch.Generator().manual_seed(0)
    total = torch.zeros(len(x), device=x.device, dtype=next(iter(parameters.values())).dtype)

    def losses(weights: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (inputs,)), labels, reduction="none")

    for _ in range(sketches):
        direction = {
            name: torch.randn(p.shape, generator=source, device=source.device, dtype=p.dtype).to(p.device)
            for name, p in parameters.items()
        }
        slopes = [
            jvp(lambda w, a=a, b=b: losses(w, a, b), (parameters,), (direction,))[1]
            for a, b in _chunks(x, y, chunk_size)
        ]
        total += torch.cat(slopes).detach().square()
    return (total / sketches).sqrt()


@torch.no_grad()
def last_layer_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """|| p - onehot(y) || sqrt(||h||^2 + 1), h the input of the final `nn.Linear` (without the + 1 if it has no bias)."""
    calls: list[tuple[Any, Tensor, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((module, inputs[0], output))

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        logits = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    if not calls or calls[-1][2] is not logits:
        raise InvalidInput(
            "mode='last_layer' needs a model whose last step is an nn.Linear; use mode='full' for this one."
        )
    head, hidden, _ = calls[-1]
    length = hidden.square().sum(1) + (0.0 if head.bias is None else 1.0)
    return el2n(logits, y) * length.sqrt()


# The layer engine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """A weight gradient kept as its factors: `G A^T`, per example and group."""

    a: Tensor  # [B, groups, I, L]
    g: Tensor  # [B, groups, O, L]

    def square_norm(self) -> Tensor:  # [B]
        i, positions, o = self.a.shape[2], self.a.shape[3], self.g.shape[2]
        if positions == 1:
            return (self.a.square().sum((2, 3)) * self.g.square().sum((2, 3))).sum(1)
        if positions * (i + o) < i * o:
            return ((self.a.mT @ self.a) * (self.g.mT @ self.g)).sum((1, 2, 3))
        return (self.g @ self.a.mT).square().sum((1, 2, 3))

    def explicit(self) -> Tensor:  # [B, P]
        return (self.g @ self.a.mT).flatten(1)


@dataclass(frozen=True)
class Plain:
    """A gradient as it is."""

    value: Tensor  # [B, P]

    def square_norm(self) -> Tensor:
        return self.value.square().sum(1)

    def explicit(self) -> Tensor:
        return self.value


Part = tuple[nn.Parameter | None, Product | Plain]


def _linear(module: nn.Module, a: Tensor, g: Tensor) -> list[Part]:
    a, g = (t.reshape(len(t), -1, t.shape[-1]).mT.unsqueeze(1) for t in (a, g))
    return [(module.weight, Product(a, g)), (module.bias, Plain(g.sum(3).flatten(1)))]  # type: ignore[list-item]


def _convolution(module: Any, a: Tensor, g: Tensor) -> list[Part]:
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        raise NotImplementedError(f"a convolution with padding {module.padding!r} in mode {module.padding_mode!r}")
    flat = a.dim() == 3  # one-dimensional: unfold as an image of height 1
    geometry = (module.kernel_size, module.dilation, module.padding, module.stride)
    if flat:
        a = a.unsqueeze(2)
        geometry = tuple((edge, *size) for edge, size in zip((1, 1, 0, 1), geometry, strict=True))
    patches = F.unfold(a, *geometry)
    product = Product(patches.unflatten(1, (module.groups, -1)), g.flatten(2).unflatten(1, (module.groups, -1)))
    return [(module.weight, product), (module.bias, Plain(g.flatten(2).sum(2)))]


def _batch_norm(module: Any, a: Tensor, g: Tensor) -> list[Part]:
    shape = (1, -1) + (1,) * (a.dim() - 2)
    normed = (a - module.running_mean.view(shape)) * torch.rsqrt(module.running_var.view(shape) + module.eps)
    rest = (len(a), a.shape[1], -1)
    return [
        (module.weight, Plain((g * normed).reshape(rest).sum(2))),
        (module.bias, Plain(g.reshape(rest).sum(2))),
    ]


def _layer_norm(module: Any, a: Tensor, g: Tensor) -> list[Part]:
    normed = F.layer_norm(a, module.normalized_shape, eps=module.eps)
    size = module.weight.numel() if module.weight is not None else 1
    return [(p, Plain(v.reshape(len(v), -1, size).sum(1))) for p, v in ((module.weight, g * normed), (module.bias, g))]


def _group_norm(module: Any, a: Tensor, g: Tensor) -> list[Part]:
    normed = F.group_norm(a, module.num_groups, eps=module.eps)
    rest = (len(a), a.shape[1], -1)
    return [(p, Plain(v.reshape(rest).sum(2))) for p, v in ((module.weight, g * normed), (module.bias, g))]


def _embedding(module: Any, a: Tensor, g: Tensor) -> list[Part]:
    value = g.new_zeros(len(a), module.num_embeddings, module.embedding_dim)
    index = a.reshape(len(a), -1)
    keep = index != (-1 if module.padding_idx is None else module.padding_idx)
    rows = index.unsqueeze(2).expand(-1, -1, module.embedding_dim)
    value.scatter_add_(1, rows, g.reshape(len(a), -1, module.embedding_dim) * keep.unsqueeze(2))
    return [(module.weight, Plain(value.flatten(1)))]


LAYERS: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], list[Part]]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.Embedding: _embedding,
}


def layer_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One forward pass, one backward pass to the outputs of the layers, and a norm per layer from its two factors.

    Parameters used more than once (weight sharing, a layer called twice) have their per-example gradients summed first.
    Raises `NotImplementedError` for a trainable parameter outside the layers of `LAYERS`.
    """
    calls: list[tuple[nn.Module, Tensor, Any]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not inputs:
            raise NotImplementedError(f"{type(module).__name__} is called with keyword arguments only")
        if output.requires_grad:  # the edge is taken now: an in-place ReLU may move the tensor to another node
            calls.append((module, inputs[0].detach(), torch.autograd.graph.get_gradient_edge(output)))

    hooks = []
    for name, module in model.named_modules():
        if not any(p.requires_grad for p in module.parameters(recurse=False)):
            continue
        if type(module) not in LAYERS:
            raise NotImplementedError(f"{name or 'the model'} ({type(module).__name__}) has parameters of its own")
        hooks.append(module.register_forward_hook(note))
    try:
        with torch.enable_grad():
            loss = F.cross_entropy(model(x), y, reduction="sum")
    finally:
        for hook in hooks:
            hook.remove()
    backs = torch.autograd.grad(loss, [edge for _, _, edge in calls], allow_unused=True)
    parts: dict[nn.Parameter, list[Product | Plain]] = defaultdict(list)
    for (module, a, _), g in zip(calls, backs, strict=True):
        if g is None:
            continue
        check(len(a) == len(g) == len(x), "A layer merges examples or positions into its batch dimension.")
        for parameter, part in LAYERS[type(module)](module, a, g):
            if parameter is not None and parameter.requires_grad:
                parts[parameter].append(part)
    total = torch.zeros(len(x), device=x.device, dtype=loss.dtype)
    for uses in parts.values():
        if len(uses) == 1:
            total += uses[0].square_norm()
        else:
            total += torch.stack([use.explicit() for use in uses]).sum(0).square().sum(1)
    return total.sqrt()
