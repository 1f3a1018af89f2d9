"""TrAct: the first layer learns as if its activations were what is trained.

A first layer's update depends on the contrast of its inputs: `dz = x dW^T` scales with `|x|^2`. TrAct asks instead for the weights
that best move the pre-activations along their own gradient. With `z = x W^T + b`, rows `x [N, n]` and `g = dL/dz [N, m]`,

    min_dW |x dW^T + eta g|^2 + N lam |dW|^2      =>      grad_W := g^T x (x^T x / N + lam I)^-1        (n side)
                                                                  = g^T (x x^T / N + lam I)^-1 x        (N side, N < n)

replaces `g^T x` in `W.grad`. Forward, bias gradient, input gradient, optimizer and inference are those of the plain layer.
For a convolution x are all N = B H' W' patches, one second moment per group. The N-side form here is the push-through identity: it
equals the paper's Woodbury form without its cancellation of 1/lam digits.

In your own loop: `model = apply_tract(model, example_input=batch)`, make the optimizer, train, `model = unapply_tract(model)`.
Inputs should be standardised (lam = 0.1 is meant for variance one). Good to know: the statistics are the present batch's, so two
half batches accumulate two TrAct gradients, not that of their union; with few rows (N not much above n) the step is noisy, so drop a
small last batch; clipping by the global norm after TrAct shifts the balance, because the first layer's gradient is larger
(`TrAct.grad_norms_`); with DDP each rank uses its own second moment unless `sync=True`.

Source: Petersen, Borgelt, Ermon, "TrAct: Making First-layer Pre-Activations Trainable", NeurIPS 2024, arXiv 2410.23970.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.core.task import Task
from surefoot.core.treatment import Batch, Treatment
from surefoot.errors import InvalidInput, Refused, UnsupportedOp, check, check_positive
from surefoot.nn.patches import Patches, patch_moment

M = TypeVar("M", bound=nn.Module)


def tract_weight_grad(
    x: Tensor,  # [N, n]
    grad_output: Tensor,  # [N, m]
    lam: float = 0.1,
) -> Tensor:  # [m, n]
    """The TrAct weight gradient of a linear layer, by whichever side has the smaller system.

    `grad_output` is dL/dz as autograd gives it: of a mean loss it carries its 1/N already, and is not rescaled here.
    """
    check_positive("lam", lam)
    check(
        x.dim() == 2 and grad_output.dim() == 2 and len(x) == len(grad_output) > 0,
        f"x and grad_output must be [N, n] and [N, m], got {tuple(x.shape)} and {tuple(grad_output.shape)}.",
    )
    _check_real(x)
    if len(x) < x.shape[1]:
        return _ridge_solve(x @ x.mT / len(x), lam, grad_output).mT @ x
    return _ridge_solve(x.mT @ x / len(x), lam, x.mT @ grad_output).mT


def _ridge_solve(moment: Tensor, lam: float, right: Tensor) -> Tensor:
    """`(moment + lam I)^-1 right`, Cholesky, batched; overwrites `moment`. The floor keeps it positive definite where rounding would not: inputs so
    large that lam is below the resolution of the moment."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    diagonal += torch.finfo(moment.dtype).eps * diagonal.sum(-1, keepdim=True) + lam
    factor = torch.linalg.cholesky_ex(moment)[0]
    return torch.cholesky_inverse(factor) @ right  # faster than cholesky_solve, which takes columns one by one


def _check_real(x: Tensor) -> None:
    if not x.is_floating_point():
        raise UnsupportedOp(f"TrAct needs real floating-point inputs, got {x.dtype}; cast and standardise them first.")


class _Precondition(torch.autograd.Function):
    """The identity on the weight, whose backward turns the ordinary weight gradient `G` into `G (C + lam I)^-1`.

    Sitting between the weight and the plain operator it leaves everything else to autograd: forward, bias and input gradients,
    autocast, hooks, DDP buckets.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, lam: float, patches: Patches | None, sync: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.lam, ctx.patches, ctx.sync = lam, patches, sync
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        _refuse_create_graph()
        (x,) = ctx.saved_tensors
        with _no_autocast(x):
            wide = _wide(x, grad)
            result = _preconditioned(grad.to(wide), x.to(wide), ctx.lam, ctx.patches, ctx.sync)
        return result.to(grad.dtype), None, None, None, None


class _FewRows(torch.autograd.Function):
    """A linear layer with fewer rows than inputs, none of which takes a gradient: the N side straight from the upstream gradient,
    in the place of the ordinary product and not on top of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lam: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.lam, ctx.dtypes = lam, (weight.dtype, None if bias is None else bias.dtype)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, Tensor | None, None]:  # type: ignore[override]
        _refuse_create_graph()
        (x,) = ctx.saved_tensors
        with _no_autocast(x):
            g, wide = g.reshape(-1, g.shape[-1]), _wide(x, g)
            rows = x.reshape(-1, x.shape[-1]).to(wide)
            grad = _ridge_solve(rows @ rows.mT / len(rows), ctx.lam, g.to(wide)).mT @ rows
        of_weight, of_bias = ctx.dtypes
        return None, grad.to(of_weight), None if of_bias is None else g.sum(0).to(of_bias), None


def _refuse_create_graph() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise UnsupportedOp(
            "TrAct's weight gradient is not the gradient of a function, so create_graph=True has no meaning here; "
            "unapply TrAct where second derivatives are needed."
        )


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _wide(x: Tensor, grad: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, grad.dtype), torch.float32)


def _preconditioned(grad: Tensor, x: Tensor, lam: float, patches: Patches | None, sync: bool) -> Tensor:
    if patches is None:
        x = x.reshape(-1, x.shape[-1])
        if len(x) < x.shape[1] and not sync:
            # N side from G alone: its rows lie in the row space of x, so solve in an orthonormal basis of that space.
            basis, r = torch.linalg.qr(x.mT)
            return _ridge_solve(r @ r.mT / max(len(x), 1), lam, (grad @ basis).mT).mT @ basis.mT
        total, count = (x.mT @ x).unsqueeze(0), len(x)
    else:
        total, count = patch_moment(x if x.dim() == 4 else x.unsqueeze(0), patches)
    if sync and torch.distributed.is_available() and torch.distributed.is_initialized():
        packed = torch.cat([total.flatten(), total.new_tensor([float(count)])])
        torch.distributed.all_reduce(packed)
        total, count = packed[:-1].view_as(total), packed[-1]
    flat = grad.reshape(total.shape[0], -1, total.shape[-1])  # [groups, m / groups, n]
    return _ridge_solve(total / count, lam, flat.mT).mT.reshape(grad.shape)


class _TrActLayer:
    """What the two layers share: the settings, and when to act (in training, where the weight takes a gradient)."""

    lam: float
    sync: bool
    training: bool
    weight: Tensor

    def _acts(self, x: Tensor) -> bool:
        _check_real(x)
        return self.training and torch.is_grad_enabled() and self.weight.requires_grad and x.numel() > 0

    def _weight(self, x: Tensor, patches: Patches | None) -> Tensor:
        if not self._acts(x):
            return self.weight
        return _Precondition.apply(self.weight, x.detach(), self.lam, patches, self.sync)  # type: ignore[no-any-return]


class TrActLinear(_TrActLayer, nn.Linear):
    """`nn.Linear` with the TrAct weight gradient; same arguments, parameters and state_dict."""

    def __init__(self, *args: Any, lam: float = 0.1, sync: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lam, self.sync = _checked(lam), sync

    def forward(self, input: Tensor) -> Tensor:  # [..., n] -> [..., m]
        few = input.numel() < input.shape[-1] ** 2 and not self.sync
        if few and not input.requires_grad and self._acts(input):
            return _FewRows.apply(input, self.weight, self.bias, self.lam)  # type: ignore[no-any-return]
        return F.linear(input, self._weight(input, None), self.bias)


class TrActConv2d(_TrActLayer, nn.Conv2d):
    """`nn.Conv2d` with the TrAct weight gradient; same arguments, parameters and state_dict, every padding, dilation and group."""

    def __init__(self, *args: Any, lam: float = 0.1, sync: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lam, self.sync = _checked(lam), sync

    def forward(self, input: Tensor) -> Tensor:  # [B, C, H, W] -> [B, m, H', W']
        return self._conv_forward(input, self._weight(input, self.patches()), self.bias)

    def patches(self) -> Patches:
        pad = tuple(self._reversed_padding_repeated_twice)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return Patches(self.kernel_size, self.stride, self.dilation, self.groups, pad, mode)


PLAIN: Mapping[type[nn.Module], type[nn.Module]] = {nn.Linear: TrActLinear, nn.Conv2d: TrActConv2d}


def _checked(lam: float) -> float:
    check_positive("lam", lam)
    return float(lam)


def _with_class(layer: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """The same layer (parameters, buffers, hooks and options shared) under another class."""
    twin = kind.__new__(kind)
    twin.__dict__.update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(layer).items()})
    return twin


def tract(layer: nn.Module, lam: float = 0.1, *, sync: bool = False) -> nn.Module:
    """One layer with the TrAct gradient, its Parameters shared with `layer`. Raises `UnsupportedOp` for other kinds of layer."""
    _checked(lam)
    if type(layer) not in PLAIN:
        raise UnsupportedOp(
            f"TrAct handles nn.Linear and nn.Conv2d, not {type(layer).__name__}; name such a layer with layer=."
        )
    weight = layer.weight
    check(isinstance(weight, Tensor) and not weight.is_complex(), "TrAct needs real weights; this layer's are complex.")
    twin = _with_class(layer, PLAIN[type(layer)])
    twin.lam, twin.sync = float(lam), sync  # type: ignore[assignment]
    return twin


def first_layer(model: nn.Module, example_input: Tensor) -> str:
    """Name of the first Linear or Conv layer that a forward pass executes *on the input* (not the first in `modules()`).

    `example_input` `[B, ...]` is a small batch. Runs once in evaluation mode with the parameters detached; layers that see
    only constants (position tables, say) are passed over. Training flags are put back.
    """
    _check_real(example_input)
    seen: list[tuple[str, bool]] = []
    kinds = (nn.Linear, nn.modules.conv._ConvNd)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: seen.append((name, args[0].requires_grad))

    hooks = [m.register_forward_pre_hook(watch(name)) for name, m in model.named_modules() if isinstance(m, kinds)]
    flags = [(module, module.training) for module in model.modules()]
    fixed = {name: p.detach() for name, p in model.named_parameters()}
    model.eval()
    try:
        with torch.enable_grad():
            torch.func.functional_call(model, fixed, (example_input.detach().clone().requires_grad_(),))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in flags:
            module.training = training
    name = next((name for name, on_input in seen if on_input), next((name for name, _ in seen), None))
    if name is None:
        raise UnsupportedOp("TrAct found no nn.Linear or nn.Conv2d executed on the input; name one with layer=.")
    return name


def apply_tract_(
    model: M,
    *,
    layer: str | nn.Module | None = None,
    lam: float = 0.1,
    example_input: Tensor | None = None,
    sync: bool = False,
) -> M:
    """Wrap the first layer in place (or `layer`, by name or as a module of the model). A model that is itself a layer is returned
    wrapped. Make the optimizer before or after: the Parameters stay the same objects."""
    if isinstance(layer, nn.Module):
        named = next((name for name, module in model.named_modules() if module is layer), None)
        if named is None:
            raise InvalidInput("layer is not a module of the model; give one of its modules or a name.")
        layer = named
    if layer is None:
        if example_input is None:
            raise InvalidInput("TrAct must know the first layer: give example_input (a small batch) or layer (a name).")
        layer = first_layer(model, example_input)
    places = dict(model.named_modules())
    check(
        layer in places,
        f"The model has no layer named {layer!r}; its first are {', '.join(filter(None, list(places)[:6]))}.",
    )
    target = places[layer]
    if isinstance(target, _TrActLayer):
        raise Refused(f"Layer {layer!r} is already wrapped by TrAct; unapply it first.")
    weight = getattr(target, "weight", None)
    uses = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(uses) > 1:
        raise Refused(f"The weight of {layer!r} is shared ({', '.join(uses)}); TrAct needs a layer with one place.")
    if not any(p.requires_grad for p in target.parameters()):
        raise InvalidInput(f"No parameter of layer {layer!r} requires a gradient; unfreeze it or leave TrAct out.")
    wrapped = tract(target, lam, sync=sync)
    return _replace(model, layer, wrapped)


def apply_tract(
    model: M,
    *,
    layer: str | nn.Module | None = None,
    lam: float = 0.1,
    example_input: Tensor | None = None,
    sync: bool = False,
) -> M:
    """`apply_tract_` on a copy of the model."""
    if isinstance(layer, nn.Module):
        layer = next((name for name, module in model.named_modules() if module is layer), layer)
    return apply_tract_(copy.deepcopy(model), layer=layer, lam=lam, example_input=example_input, sync=sync)


def unapply_tract(model: M) -> M:
    """Plain layers again, in place; the Parameters stay the same objects. A plain model comes back untouched."""
    for name, module in list(model.named_modules()):
        if isinstance(module, _TrActLayer) and isinstance(module, nn.Module):
            plain = _with_class(module, nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d)
            del plain.lam, plain.sync
            model = _replace(model, name, plain)
    return model


def _replace(model: M, name: str, layer: nn.Module) -> M:
    if not name:
        return layer  # type: ignore[return-value]
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
    return model


@torch.no_grad()
def _rows_per_example(model: nn.Module, name: str, example: Tensor) -> float:
    """How many rows (positions of a convolution, tokens of a linear layer) one example gives the layer `name`."""
    seen: list[int] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output.numel()))
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()(example)
    finally:
        handle.remove()
        for module, training in flags:
            module.training = training
    return seen[0] / (layer.weight.shape[0] * len(example))  # type: ignore[union-attr, index]


@dataclass
class TrAct(Treatment):
    """Trains the first layer by TrAct, gives plain layers back. `layer` names it where the automatic choice is not wanted.

    After training `layer_` is its name, `rows_per_input_` is N / n of the first batch (below about 2 the statistics are noisy), and
    `grad_norms_` the gradient norms (first layer, all the rest) of the first step.
    """

    slug: ClassVar[str] = "tract"

    lam: float = 0.1
    layer: str | None = None
    sync: bool = False
    layer_: str = field(default="", init=False)
    rows_per_example_: float = field(default=0.0, init=False)
    rows_per_input_: float = field(default=0.0, init=False)
    grad_norms_: tuple[float, float] = field(default=(0.0, 0.0), init=False)

    def check(self, model: nn.Module, task: Task) -> None:
        check_positive("lam", self.lam)

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        parameter = next(model.parameters(), None)
        check(parameter is not None and len(task.train) > 0, "TrAct needs a model with parameters and training data.")
        example = task.train.x[:2].to(parameter)  # type: ignore[arg-type]
        self.layer_ = first_layer(model, example) if self.layer is None else self.layer
        model = apply_tract_(model, layer=self.layer_, lam=self.lam, sync=self.sync)
        self.rows_per_example_ = _rows_per_example(model, self.layer_, example)
        return model, task

    def before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        if batch.step == 0:
            inputs = model.get_submodule(self.layer_).weight[0].numel()  # type: ignore[index, union-attr]
            self.rows_per_input_ = len(batch.x) * self.rows_per_example_ / inputs
            norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
            first = norms.pop(f"{self.layer_}.weight".lstrip("."), 0.0)
            self.grad_norms_ = (first, sum(v * v for v in norms.values()) ** 0.5)

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        return unapply_tract(model)

    def state_dict(self) -> dict[str, Any]:
        return {"grad_norms_": list(self.grad_norms_), "rows_per_input_": self.rows_per_input_}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.grad_norms_ = (float(state["grad_norms_"][0]), float(state["grad_norms_"][1]))
        self.rows_per_input_ = float(state["rows_per_input_"])
