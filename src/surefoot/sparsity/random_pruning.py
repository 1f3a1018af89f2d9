"""Random pruning before training: draw a mask once, with well-chosen densities per layer, and train sparse from the start.

It is the honest baseline of every other pruning method, and on wide networks often as good as the dense model.

    w <- w * m after every optimizer step, gradients and momentum times m before it, the mask m fixed for good

With global density D, layer sizes n_l and raw ratios r_l the densities d_l = min(1, eps r_l) meet sum d_l n_l = D sum n_l:

    uniform        d_l = D                              ER    r_l = (n_out + n_in) / (n_out n_in)
    uniform_plus   first convolution dense, last linear layer at max(.2, D), the rest share one density
    ERK            r_l = sum(shape) / prod(shape)       ERK_plus   ERK, the last linear layer at a density of its own
    snip, grasp    shares of the largest |w dL/dw|, or the smallest -w (H dL/dw), on one batch; positions drawn anew

(ERK makes depthwise convolutions nearly dense, as their n_in is 1.) Maskable are the weights of convolution and linear layers;
biases and norms never are. Masks are buffers `<name>_mask` beside their weights while training and are gone afterwards.

Source: Shiwei Liu, Tianlong Chen, Xiaohan Chen, Li Shen, Decebal Constantin Mocanu, Zhangyang Wang, Mykola Pechenizkiy, "The
Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training", ICLR 2022,
arXiv 2202.02643. ER: Mocanu et al. 2018, arXiv 1707.04780. ERK: Evci et al. 2020, arXiv 1911.11134. SNIP: Lee et al. 2019,
arXiv 1810.02340. GraSP: Wang et al. 2020, arXiv 2002.07376.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from surefoot.core.task import Task
from surefoot.core.treatment import Batch, Treatment
from surefoot.errors import InvalidInput, Refused, check, check_at_least, check_choice, check_non_negative

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


# --- densities ---------------------------------------------------------------------------------------------------------


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
        return _given_densities(shapes, rule)
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


def _given_densities(shapes: Shapes, given: Mapping[str, float]) -> dict[str, float]:
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


# --- masks -------------------------------------------------------------------------------------------------------------


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
    densities = _given_densities({name: tuple(weight.shape) for name, weight in weights.items()}, densities)
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

    def after_step_(self, optimizer: torch.optim.Optimizer) -> None:
        self.mask_weights_()
        self.mask_state_(optimizer)

    def attach(self, optimizer: torch.optim.Optimizer) -> MaskHandle:
        """Mask gradients before and weights and state after every step of an optimizer; `remove` detaches."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, (weight, _) in zip(self.names, self._pairs()):
            check(id(weight) in held, f"The optimizer does not hold {name!r}; build it from this model's parameters.")
        self.hooks.append(optimizer.register_step_pre_hook(lambda *_: self.mask_gradients_()))
        self.hooks.append(optimizer.register_step_post_hook(lambda *_: self.after_step_(optimizer)))
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


# --- the treatment -----------------------------------------------------------------------------------------------------


@dataclass
class RandomPruning(Treatment):
    """Train with a fixed random mask; the finished model is a plain one with zeros.

    The arguments are those of `random_prune_`; `score_batch` is the number of training examples on which snip and grasp
    measure their ratios.
    """

    slug: ClassVar[str] = "random_pruning"
    excludes: ClassVar[Mapping[str, str]] = {"dynamic_sparse": "both own the mask of the weights."}

    density: float = 0.2
    rule: Rule = "erk"
    power: float = 1.0
    fc_density: float | None = None
    exact: bool = True
    min_per_layer: int = 1
    min_per_unit: int = 0
    scale_init: bool = False
    score_batch: int = 128
    handle_: MaskHandle | None = field(default=None, init=False, repr=False)
    densities_: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def check(self, model: nn.Module, task: Task) -> None:
        check_at_least("score_batch", self.score_batch, 1)
        check_non_negative("power", self.power)
        check_choice("rule", self.rule, get_args(Rule))
        rule: Rule = "uniform" if self.rule in ("snip", "grasp") else self.rule
        layer_densities(model, self.density, rule, self.power, self.fc_density)
        if any(nn.utils.parametrize.is_parametrized(module, "weight") for module in model.modules()):
            raise Refused("A weight of the model is parametrized; call remove_parametrizations before pruning.")

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        generator = task.generator("random_pruning")
        batch = None
        if self.rule in ("snip", "grasp"):
            device = next(model.parameters()).device
            index = torch.randperm(len(task.train), generator=generator)[: self.score_batch].to(task.train.x.device)
            batch = (task.train.x[index].to(device), task.train.labels[index].to(device))
        self.handle_ = random_prune_(
            model, self.density, self.rule, power=self.power, fc_density=self.fc_density, exact=self.exact,
            loss_fn=nn.functional.cross_entropy, batch=batch, min_per_layer=self.min_per_layer,
            min_per_unit=self.min_per_unit, scale_init=self.scale_init, generator=generator,
        )  # fmt: skip
        self.densities_ = {name: float(mask.double().mean()) for name, mask in self.handle_.masks().items()}
        return model, task

    def before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        if self.handle_ is not None:
            self.handle_.mask_gradients_()

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        if self.handle_ is not None:
            self.handle_.after_step_(optimizer)

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        if self.handle_ is not None:
            self.handle_.remove()
            self.handle_ = None
        return model

    def state_dict(self) -> dict[str, Any]:
        return {"densities": dict(self.densities_)}  # the masks themselves are buffers of the model

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.densities_ = dict(state.get("densities", {}))
