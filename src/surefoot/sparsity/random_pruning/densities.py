"""How many weights each layer keeps: the rules of random pruning, and the scores whose ratios two of them borrow."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from surefoot.errors import InvalidInput, check, check_choice

Rule = Literal["uniform", "uniform_plus", "er", "erk", "erk_plus", "snip", "grasp"]
Shapes = Mapping[str, Sequence[int]]
LossFn = Callable[[Tensor, Tensor], Tensor]
MASKABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


def maskable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of convolution and linear layers by parameter name, in the order of registration, tied ones once.

    Raises:
        InvalidInput: the model has none.
    """
    weights: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, MASKABLE) else None
        if weight is not None and id(weight) not in seen:
            seen.add(id(weight))
            weights[f"{name}.weight" if name else "weight"] = weight
    check(bool(weights), "The model has no convolution or linear weight to prune.")
    return weights


def layer_densities(
    model_or_shapes: nn.Module | Shapes,
    density: float,
    rule: Rule | Mapping[str, float] = "erk",
    power: float = 1.0,
    fc_density: float | None = None,
    loss_fn: LossFn | None = None,
    batch: tuple[Tensor, Tensor] | None = None,
) -> dict[str, float]:
    """The share of weights each layer keeps; `sum d_l n_l = density * sum n_l` (snip and grasp: to one weight).

    Args:
        model_or_shapes: a model, or weight shapes `(out, in, ...)` by name in forward order.
        density: share of all maskable weights that is kept, in (0, 1].
        rule: see the module's text, or a density for every name.
        power: exponent on the raw ratio of er, erk and erk_plus.
        fc_density: density of the last linear layer under erk_plus, 1 by default.
        loss_fn, batch: `loss_fn(logits, y) -> scalar` and `(x, y)`, for snip and grasp.

    Raises:
        InvalidInput: a density outside (0, 1], an unknown rule, fixed layers beyond the budget (the message names the
            smallest feasible density), snip or grasp without model, batch and loss.
    """
    check(0 < density <= 1, f"density must lie in (0, 1], got {density!r}.")
    if isinstance(model_or_shapes, nn.Module):
        shapes = {name: tuple(weight.shape) for name, weight in maskable_weights(model_or_shapes).items()}
    else:
        shapes = {name: tuple(shape) for name, shape in model_or_shapes.items()}
        check(bool(shapes), "There are no shapes to give densities to.")
    if isinstance(rule, Mapping):
        return check_densities(shapes, rule)
    check_choice("rule", rule, get_args(Rule))
    if rule in ("snip", "grasp"):
        if not isinstance(model_or_shapes, nn.Module) or loss_fn is None or batch is None:
            raise InvalidInput(f"rule {rule!r} scores weights on data; give it a model, a batch (x, y) and a loss_fn.")
        masks = score_masks(weight_scores(model_or_shapes, loss_fn, batch, rule), density)
        return {name: float(mask.double().mean()) for name, mask in masks.items()}
    if rule == "uniform":
        return dict.fromkeys(shapes, float(density))
    fixed = _fixed_layers(shapes, density, rule, fc_density)
    rest = {name: shape for name, shape in shapes.items() if name not in fixed}
    budget = _rest_budget(shapes, fixed, rest, density, rule)
    if rule == "uniform_plus":
        share = budget / sum(math.prod(shape) for shape in rest.values())
        free = dict.fromkeys(rest, share)
    else:
        free = _capped(rest, budget, {name: _ratio(shape, rule) ** power for name, shape in rest.items()})
    return {name: fixed.get(name, free.get(name, 0.0)) for name in shapes}


def check_densities(shapes: Shapes, given: Mapping[str, float]) -> dict[str, float]:
    for name in sorted(set(shapes) ^ set(given)):
        raise InvalidInput(
            f"Densities must name every maskable weight and no other; {name!r} is in one of the two only."
        )
    for name, value in given.items():
        check(0 <= value <= 1, f"The density of {name!r} must lie in [0, 1], got {value!r}.")
    return {name: float(given[name]) for name in shapes}


def _ratio(shape: Sequence[int], rule: str) -> float:
    dims = shape[:2] if rule == "er" else shape
    return sum(dims) / math.prod(dims)


def _fixed_layers(shapes: Shapes, density: float, rule: str, fc_density: float | None) -> dict[str, float]:
    linear = [name for name, shape in shapes.items() if len(shape) == 2]
    fixed: dict[str, float] = {}
    if rule == "uniform_plus":
        convolutions = [name for name, shape in shapes.items() if len(shape) > 2]
        fixed = dict.fromkeys(convolutions[:1], 1.0)
        fixed |= dict.fromkeys(linear[-1:], max(0.2, density))
    elif rule == "erk_plus":
        share = 1.0 if fc_density is None else fc_density
        check(0 < share <= 1, f"fc_density must lie in (0, 1], got {share!r}.")
        fixed = dict.fromkeys(linear[-1:], share)
    return fixed


def _rest_budget(shapes: Shapes, fixed: Mapping[str, float], rest: Shapes, density: float, rule: str) -> float:
    """How many weights the layers that are not fixed may keep in sum."""
    total = sum(math.prod(shape) for shape in shapes.values())
    taken = sum(share * math.prod(shapes[name]) for name, share in fixed.items())
    budget = density * total - taken
    if not rest:
        if density < 1:
            raise InvalidInput(f"rule {rule!r} fixes every layer of this model, so no density but 1 can be met.")
        return 0.0
    if budget <= 0:
        least = taken / total
        if rule == "uniform_plus" and least > 0.2:  # there the linear layer's share grows with the density
            last = sum(math.prod(shapes[name]) for name, share in fixed.items() if len(shapes[name]) == 2)
            least = (taken - max(0.2, density) * last) / (total - last)
            least = max(0.2, least)
        raise InvalidInput(
            f"density {density:g} is below what the fixed layers of rule {rule!r} take; it must be above {least:.4g}."
        )
    if budget > total - sum(math.prod(shapes[name]) for name in fixed) + 1e-9 * total:
        raise InvalidInput(f"density {density:g} cannot be met with fc_density this low; raise fc_density.")
    return budget


def _capped(shapes: Shapes, budget: float, ratios: Mapping[str, float]) -> dict[str, float]:
    """`d = min(1, eps r)` with eps such that `sum d n = budget`: layers that would exceed 1 become dense, largest ratio first."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        open_ = [name for name in sizes if name not in dense]
        if not open_:
            return dict.fromkeys(sizes, 1.0)
        left = budget - sum(sizes[name] for name in dense)
        eps = left / sum(ratios[name] * sizes[name] for name in open_)
        top = max(ratios[name] for name in open_)
        if top * eps <= 1.0:
            return {name: 1.0 if name in dense else eps * ratios[name] for name in sizes}
        dense |= {name for name in open_ if ratios[name] == top}


def weight_scores(
    model: nn.Module, loss_fn: LossFn, batch: tuple[Tensor, Tensor], rule: Literal["snip", "grasp"]
) -> dict[str, Tensor]:
    """Scores of all maskable weights, larger is kept: `|w g|` (snip) or `w (H g)` (grasp), on one batch `(x, y)`.

    Works on a copy in training mode (dropout off); the model keeps its gradients and statistics.
    """
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()  # it would draw from the global generator
    weights = maskable_weights(model)
    parameters = [weight.requires_grad_(True) for weight in weights.values()]
    with torch.enable_grad():
        loss = loss_fn(model(batch[0]), batch[1])
        gradients = torch.autograd.grad(loss, parameters, create_graph=rule == "grasp")
        if rule == "grasp":
            energy = sum((gradient * gradient.detach()).sum() for gradient in gradients)
            assert isinstance(energy, Tensor)
            products = torch.autograd.grad(energy, parameters)
            scores = [weight * product for weight, product in zip(parameters, products)]
        else:
            scores = [(weight * gradient).abs() for weight, gradient in zip(parameters, gradients)]
    found = {name: score.detach() for name, score in zip(weights, scores)}
    check(all(bool(torch.isfinite(score).all()) for score in found.values()), "The scores hold NaN or infinite values.")
    return found


def score_masks(scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Masks of the `round(density n)` largest scores over all layers together: SNIP itself, GraSP itself."""
    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.topk(max(1, round(density * len(flat)))).indices] = True
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.reshape(score.shape) for (name, score), part in zip(scores.items(), parts)}
