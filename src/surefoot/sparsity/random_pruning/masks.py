"""Random masks of given densities, and how they are kept at work while an optimizer runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.errors import InvalidInput, check, check_at_least
from surefoot.sparsity.random_pruning.densities import (
    LossFn,
    Rule,
    check_densities,
    layer_densities,
    maskable_weights,
)


def random_masks(
    model: nn.Module,
    densities: Mapping[str, float],
    exact: bool = True,
    generator: torch.Generator | None = None,
    *,
    min_per_layer: int = 1,
    min_per_unit: int = 0,
) -> dict[str, Tensor]:
    """Bool masks at random positions, of the shapes of the weights, on their device.

    Args:
        exact: `d_l n_l` ones a layer, rounded by largest remainder so that the total is `round(sum d_l n_l)`; else every
            weight is kept with probability `d_l` by itself, as in the authors' code.
        generator: the same seed gives the same masks on any device; layers are drawn in the order of their names. Without
            one a fixed seed is used.
        min_per_layer: ones that no layer goes below (a layer of none cuts the network); the excess is taken from
            the layer with most ones, so that the total stays exact unless the minima alone exceed it.
        min_per_unit: ones that no output unit goes below (exact masks only).
    """
    weights = maskable_weights(model)
    densities = check_densities({name: tuple(weight.shape) for name, weight in weights.items()}, densities)
    check_at_least("min_per_layer", min_per_layer, 0)
    check_at_least("min_per_unit", min_per_unit, 0)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    least = {name: min(max(min_per_layer, min_per_unit * len(w)), w.numel()) for name, w in weights.items()}
    counts = _exact_counts({name: w.numel() for name, w in weights.items()}, densities, least)
    masks: dict[str, Tensor] = {}
    for name in sorted(weights):
        weight = weights[name]
        draw = torch.rand(weight.numel(), generator=generator, device=generator.device, dtype=torch.float64)
        if not exact:
            kept = draw < densities[name]
            kept[draw.topk(min(min_per_layer, len(draw)), largest=False).indices] = True
        else:
            if min_per_unit:
                rows = draw.view(len(weight), -1)  # the draw is its memory: bonus ones win the top-k below
                bonus = rows.topk(min(min_per_unit, rows.shape[1]), dim=1).indices
                rows.scatter_add_(1, bonus, torch.ones_like(bonus, dtype=rows.dtype))
            kept = torch.zeros_like(draw, dtype=torch.bool)
            kept[draw.topk(counts[name]).indices] = True
        masks[name] = kept.reshape(weight.shape).to(weight.device)
    return {name: masks[name] for name in weights}


def _exact_counts(sizes: Mapping[str, int], densities: Mapping[str, float], least: Mapping[str, int]) -> dict[str, int]:
    shares = {name: densities[name] * size for name, size in sizes.items()}
    counts = {name: min(sizes[name], math.floor(share + 1e-9)) for name, share in shares.items()}
    missing = round(sum(shares.values())) - sum(counts.values())
    by_remainder = sorted(sizes, key=lambda name: (counts[name] - shares[name], name))
    for name in [name for name in by_remainder if counts[name] < sizes[name]][: max(0, missing)]:
        counts[name] += 1
    total = sum(counts.values())
    counts = {name: max(counts[name], least[name]) for name in sizes}
    for _ in range(len(sizes)):  # the largest layer pays; the next one where it cannot pay it all
        excess = sum(counts.values()) - total
        if excess <= 0:
            break
        payer = max(sizes, key=lambda name: (counts[name] - least[name], name))
        counts[payer] -= min(excess, counts[payer] - least[payer])
    return counts


def _multiply_(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """All products in one fused call: a step must cost next to nothing beside the dense one."""
    tensors, masks = [], []
    for tensor, mask in pairs:
        tensors.append(tensor)
        masks.append(mask)
    if tensors:
        torch._foreach_mul_(tensors, masks)  # type: ignore[attr-defined]


@dataclass
class MaskHandle:
    """Masks at work on a model: what `apply_masks_` returns. Masks are looked up as buffers, so they follow `.to(...)`."""

    model: nn.Module
    names: tuple[str, ...]
    hooks: list[Any] = field(default_factory=list, repr=False)

    def _pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for name in self.names:
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            weight, mask = module._parameters[leaf], module._buffers[f"{leaf}_mask"]
            assert weight is not None and mask is not None
            yield weight, mask

    @torch.no_grad()
    def mask_weights_(self) -> None:
        """`w <- w m`."""
        _multiply_(self._pairs())

    @torch.no_grad()
    def mask_gradients_(self) -> None:
        """Before the optimizer step, so that neither momentum nor weight decay reaches a pruned weight."""
        _multiply_((weight.grad, mask) for weight, mask in self._pairs() if weight.grad is not None)

    @torch.no_grad()
    def mask_state_(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero the optimizer's buffers (momentum, moments) at pruned weights."""
        _multiply_(
            (value, mask)
            for weight, mask in self._pairs()
            for value in optimizer.state.get(weight, {}).values()
            if isinstance(value, Tensor) and value.shape == weight.shape
        )

    def attach(self, optimizer: torch.optim.Optimizer) -> MaskHandle:
        """Mask gradients before and weights after every step of an optimizer; `remove` detaches.

        The optimizer's state is masked once, here: from then on it only ever sees masked gradients and zero weights.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, (weight, _) in zip(self.names, self._pairs()):
            check(id(weight) in held, f"The optimizer does not hold {name!r}; build it from this model's parameters.")
        self.hooks.append(optimizer.register_step_pre_hook(lambda *_: self.mask_gradients_()))
        self.hooks.append(optimizer.register_step_post_hook(lambda *_: self.mask_weights_()))
        self.mask_state_(optimizer)
        return self

    def masks(self) -> dict[str, Tensor]:
        return {name: mask for name, (_, mask) in zip(self.names, self._pairs())}

    def density(self) -> float:
        """The share of maskable weights that is kept."""
        kept, total = 0, 0
        for _, mask in self._pairs():
            kept, total = kept + int(mask.count_nonzero()), total + mask.numel()
        return kept / total

    def remove(self) -> nn.Module:
        """Mask the weights once more, drop hooks and mask buffers: a plain model with the same zeros."""
        self.mask_weights_()
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        for name in self.names:
            owner, _, leaf = name.rpartition(".")
            del self.model.get_submodule(owner)._buffers[f"{leaf}_mask"]
        self.names = ()
        return self.model


def apply_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> MaskHandle:
    """Set pruned weights to zero and keep the masks as buffers `<name>_mask` (they go with `state_dict`, EMA, DDP).

    Raises:
        InvalidInput: a name or shape that does not fit, or one tied weight masked under two names.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    seen: dict[int, str] = {}
    for name, mask in masks.items():
        check(name in parameters, f"The model has no parameter {name!r} to mask.")
        weight = parameters[name]
        check(
            mask.shape == weight.shape,
            f"The mask of {name!r} has shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}.",
        )
        if id(weight) in seen:
            raise InvalidInput(f"{seen[id(weight)]!r} and {name!r} are one tied weight; mask it once.")
        seen[id(weight)] = name
        check(f"{name}_mask" not in dict(model.named_buffers()), f"{name!r} is masked already; remove its masks first.")
    for name, mask in masks.items():
        owner, _, leaf = name.rpartition(".")
        weight = parameters[name]
        # In the weight's type: multiplying by a bool tensor takes a slow path.
        model.get_submodule(owner).register_buffer(f"{leaf}_mask", mask.to(weight.device, weight.dtype))
    handle = MaskHandle(model, tuple(masks))
    handle.mask_weights_()
    return handle


def finalize_(model: nn.Module) -> nn.Module:
    """Drop the mask buffers of a model whose handle is lost (loaded from a file); its zeros stay."""
    names = [name.removesuffix("_mask") for name, _ in model.named_buffers() if name.endswith("_mask")]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return MaskHandle(model, tuple(name for name in names if name in parameters)).remove()


def random_prune_(
    model: nn.Module,
    density: float,
    rule: Rule | Mapping[str, float] = "erk",
    *,
    power: float = 1.0,
    fc_density: float | None = None,
    loss_fn: LossFn | None = None,
    batch: tuple[Tensor, Tensor] | None = None,
    exact: bool = True,
    min_per_layer: int = 1,
    min_per_unit: int = 0,
    scale_init: bool = False,
    generator: torch.Generator | None = None,
) -> MaskHandle:
    """Densities, masks and their application in one call; then `handle.attach(optimizer)` and train.

    `scale_init` multiplies every weight by `1 / sqrt(d_l)`, which keeps the variance of a layer's output (off in the paper).
    The other arguments are those of `layer_densities` and `random_masks`.
    """
    densities = layer_densities(model, density, rule, power, fc_density, loss_fn, batch)
    masks = random_masks(model, densities, exact, generator, min_per_layer=min_per_layer, min_per_unit=min_per_unit)
    if scale_init:
        with torch.no_grad():
            for name, weight in maskable_weights(model).items():
                weight.div_(masks[name].double().mean().clamp(min=1e-12).sqrt().to(weight.dtype))
    return apply_masks_(model, masks)


@dataclass(frozen=True)
class SparsityReport:
    """Weights that are not zero, layer by layer and in all."""

    kept: Mapping[str, int]
    sizes: Mapping[str, int]

    @property
    def densities(self) -> dict[str, float]:
        return {name: self.kept[name] / size for name, size in self.sizes.items()}

    @property
    def density(self) -> float:
        return sum(self.kept.values()) / sum(self.sizes.values())


def sparsity_report(model: nn.Module) -> SparsityReport:
    """Count the nonzero maskable weights of a model, masked or plain."""
    weights = maskable_weights(model)
    return SparsityReport(
        {name: int(weight.count_nonzero()) for name, weight in weights.items()},
        {name: weight.numel() for name, weight in weights.items()},
    )
