"""The operator table: which operator of `operators.py` stands for which module, function or method of a traced model.

A rule is called like the torch function it stands for, with a `Ref` wherever a bounded tensor goes, and returns the
operator with its operands, or a `Ref` where nothing changes. A new operator is one more rule; no other file knows it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import InvalidInput, UnsupportedOp
from surefoot.nn.bounds.kernels import BatchStatistics, contiguous
from surefoot.nn.bounds.operators import (
    BatchScale,
    Box,
    Concat,
    Convolution,
    Dense,
    LinearMap,
    Monotone,
    Op,
    Rectifier,
    Scale,
    Sum,
)  # fmt: skip


@dataclass(frozen=True)
class Ref:
    """A bounded tensor while the graph is walked: the step that made it, its box, and its clean value if there is one."""

    index: int
    box: Box
    value: Tensor | None

    @property
    def shape(self) -> torch.Size:
        return self.box.shape


Operands = tuple[Ref, ...]
Rule = Callable[..., tuple[Op, Operands] | Ref]
RULES: dict[Any, Rule] = {}


def rule(*keys: Any) -> Callable[[Rule], Rule]:
    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(keys, function))
        return function

    return enter


def module_rule(module: nn.Module) -> Rule | None:
    """The rule of a torch module; subclasses count only while they keep the forward the rule was written for."""
    for kind in type(module).__mro__:
        if kind in RULES:
            return RULES[kind] if type(module).forward is kind.forward else None
    return None


# ------------------------------------------------------------------------------------------------ weights


@rule(nn.Linear)
def _linear_module(m: nn.Linear, x: Ref):
    return Dense(m.weight, m.bias), (x,)


@rule(F.linear)
def _linear(input: Any, weight: Any, bias: Any = None):
    _constants(weight, bias)
    return Dense(weight, bias), (input,)


@rule(nn.Conv1d, nn.Conv2d)
def _conv_module(m: nn.Conv1d | nn.Conv2d, x: Ref):
    plain = m.padding_mode == "zeros" and not isinstance(m.padding, str)
    geometry = (m.stride, m.padding, m.dilation, m.groups) if plain else None
    return Convolution(m.weight, m.bias, m._conv_forward, geometry), (x,)  # type: ignore[arg-type]


def _functional_conv(function: Callable[..., Tensor]) -> None:
    @rule(function)
    def _conv(input: Any, weight: Any, bias: Any = None, *geometry: Any, **named: Any):
        _constants(weight, bias)
        return Convolution(weight, bias, lambda x, w, b: function(x, w, b, *geometry, **named), None), (input,)


_functional_conv(F.conv1d)
_functional_conv(F.conv2d)


@rule(nn.BatchNorm1d, nn.BatchNorm2d)
def _batch_norm(m: nn.BatchNorm1d | nn.BatchNorm2d, x: Ref):
    """Evaluation: running statistics. Training: statistics of the clean batch, which moves the running ones, once."""
    if m.training:
        output, scale, shift = _clean_statistics(m, x)
        return BatchScale(scale, shift, len(x.shape), output), (x,)
    if m.running_mean is None or m.running_var is None:
        raise UnsupportedOp("it has no running statistics, so that every example's output depends on the whole batch")
    shape, scale = (1, -1) + (1,) * (len(x.shape) - 2), torch.rsqrt(m.running_var + m.eps)
    scale = scale if m.weight is None else scale * m.weight
    shift = -m.running_mean * scale if m.bias is None else m.bias - m.running_mean * scale
    return Scale(scale.reshape(shape), shift.reshape(shape), len(x.shape)), (x,)


def _clean_statistics(m: nn.BatchNorm1d | nn.BatchNorm2d, x: Ref) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised clean batch, the scale and shift that do it)."""
    if x.value is None:
        raise InvalidInput("Batch-norm in training mode needs the clean batch: pass clean=x, or call model.eval().")
    if x.value.numel() // x.value.shape[1] < 2:
        raise InvalidInput(
            "Batch-norm in training mode needs a batch of at least 2 examples, got 1; drop the last batch."
        )
    pace = m.momentum
    if m.running_mean is not None and m.num_batches_tracked is not None:
        m.num_batches_tracked += 1
        pace = 1.0 / float(m.num_batches_tracked) if pace is None else pace
    running = m.running_mean, m.running_var
    return BatchStatistics.apply(x.value, m.weight, m.bias, *running, pace or 0.0, m.eps)


# ------------------------------------------------------------------------------------------------ activations


@rule(nn.ReLU)
def _relu_module(m: nn.ReLU, x: Ref):
    return Rectifier(), (x,)


@rule(F.relu, torch.relu, F.relu_, torch.relu_, "relu", "relu_")
def _relu(input: Ref, inplace: bool = False):
    return Rectifier(), (input,)


@rule(nn.LeakyReLU)
def _leaky_module(m: nn.LeakyReLU, x: Ref):
    return _leaky(x, m.negative_slope)


@rule(F.leaky_relu)
def _leaky(input: Ref, negative_slope: float = 0.01, inplace: bool = False):
    if not 0 <= negative_slope <= 1:
        raise UnsupportedOp(f"a leaky ReLU needs a slope between 0 and 1, got {negative_slope}")
    return Rectifier(float(negative_slope)), (input,)


@rule(nn.Tanh, nn.Sigmoid, nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid, nn.Softplus)
def _monotone_module(m: nn.Module, x: Ref):
    inplace_free = {nn.ReLU6: F.relu6, nn.Hardsigmoid: F.hardsigmoid}.get(type(m))
    if isinstance(m, nn.Hardtanh) and inplace_free is None:
        return Monotone(lambda t: t.clamp(m.min_val, m.max_val)), (x,)
    return Monotone(inplace_free or m.forward), (x,)


@rule(torch.tanh, F.tanh, "tanh")
def _tanh(input: Ref):
    return Monotone(torch.tanh), (input,)


@rule(torch.sigmoid, F.sigmoid, "sigmoid")
def _sigmoid(input: Ref):
    return Monotone(torch.sigmoid), (input,)


@rule(torch.clamp, torch.clip, "clamp", "clip")
def _clamp(input: Ref, min: Any = None, max: Any = None):
    _constants(min, max)
    return Monotone(lambda t: t.clamp(min, max)), (input,)


# ------------------------------------------------------------------------------------------------ pooling


@rule(nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
def _average_module(m: nn.Module, x: Ref):
    return LinearMap(m.forward), (x,)


@rule(nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)
def _max_module(m: Any, x: Ref):
    if m.return_indices:
        raise UnsupportedOp("it returns indices")
    return Monotone(m.forward), (x,)


def _functional_pool(kind: type[LinearMap] | type[Monotone], *functions: Callable[..., Any]) -> None:
    for function in functions:

        def _pool(input: Ref, *args: Any, _f: Callable[..., Any] = function, **kwargs: Any):
            if kwargs.get("return_indices"):
                raise UnsupportedOp("it returns indices")
            return kind(lambda t: _f(t, *args, **kwargs)), (input,)

        RULES[function] = _pool


_functional_pool(LinearMap, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d)
_functional_pool(Monotone, F.max_pool1d, F.max_pool2d, F.adaptive_max_pool1d, F.adaptive_max_pool2d)


def _reduction(function: Callable[..., Tensor], *keys: Any) -> None:
    @rule(*keys)
    def _reduce(input: Ref, dim: Any = None, keepdim: bool = False):
        dims = (dim,) if isinstance(dim, int) else dim
        if dims is None or any(d % len(input.shape) == 0 for d in dims):
            raise UnsupportedOp("it mixes the examples of a batch")
        kept = tuple(d % len(input.shape) for d in dims)
        return LinearMap(lambda t: function(t, kept, keepdim)), (input,)


_reduction(torch.mean, torch.mean, "mean")
_reduction(torch.sum, torch.sum, "sum")


# ------------------------------------------------------------------------------------------------ shapes


def _reshape(x: Ref, function: Callable[[Tensor], Tensor]):
    shape = function(torch.empty(x.shape, device="meta")).shape
    if not shape or shape[0] != x.shape[0]:
        raise UnsupportedOp("it changes the batch dimension")
    rest = tuple(shape[1:])
    return LinearMap(lambda t: contiguous(t).reshape(len(t), *rest), is_view=True, mixes=False), (x,)


@rule(nn.Flatten, nn.Unflatten)
def _flatten_module(m: nn.Module, x: Ref):
    return _reshape(x, m.forward)


def _reshaping(*names: str) -> None:
    for name in names:

        def _shape(input: Ref, *args: Any, _name: str = name, **kwargs: Any):
            return _reshape(input, lambda t: getattr(t, _name)(*args, **kwargs))

        RULES[name] = _shape
        if hasattr(torch, name):
            RULES[getattr(torch, name)] = _shape


_reshaping("flatten", "unflatten", "reshape", "view", "squeeze", "unsqueeze")


@rule(torch.permute, "permute")
def _permute(input: Ref, *dims: Any):
    order = tuple(dims[0]) if dims and isinstance(dims[0], Sequence) else dims
    if order[0] % len(input.shape) != 0:
        raise UnsupportedOp("it moves the batch dimension")
    return LinearMap(lambda t: t.permute(order), mixes=False), (input,)


@rule(torch.transpose, "transpose")
def _transpose(input: Ref, dim0: int, dim1: int):
    if 0 in (dim0 % len(input.shape), dim1 % len(input.shape)):
        raise UnsupportedOp("it moves the batch dimension")
    return LinearMap(lambda t: t.transpose(dim0, dim1), mixes=False), (input,)


@rule(operator.getitem)
def _getitem(x: Ref, index: Any):
    index = index if isinstance(index, tuple) else (index,)
    plain = all(i is Ellipsis or isinstance(i, int | slice) for i in index)
    whole_batch = index[0] == slice(None) or (index[0] is Ellipsis and len(index) <= len(x.shape) - 1)
    if not plain or not whole_batch:
        raise UnsupportedOp("only slices and integers that keep the whole batch are understood")
    return LinearMap(lambda t: t[index], mixes=False), (x,)


@rule(torch.cat, torch.concat)
def _cat(tensors: Sequence[Any], dim: int = 0):
    if not all(isinstance(t, Ref) for t in tensors):
        raise UnsupportedOp("one of its operands does not depend on the input")
    axis = dim % len(tensors[0].shape)
    if axis == 0:
        raise UnsupportedOp("it changes the batch dimension")
    return Concat(axis), tuple(tensors)


@rule(nn.Identity)
def _same(m: nn.Identity, x: Ref):
    return x


@rule("clone", torch.clone)
def _clone(input: Ref, *, memory_format: Any = None):
    return _scaled(input, 1.0, 0.0)  # a step of its own: what then happens in place to one does not happen to the other


@rule("contiguous")
def _contiguous(x: Ref, memory_format: Any = None):
    return LinearMap(lambda t: t, is_view=True, mixes=False), (x,)  # a copy or not


@rule(nn.Dropout, nn.Dropout1d, nn.Dropout2d)
def _dropout_module(m: Any, x: Ref):
    return _dropout(x, m.p, m.training)


@rule(F.dropout, F.dropout1d, F.dropout2d)
def _dropout(input: Ref, p: float = 0.5, training: bool = True, inplace: bool = False):
    if training and p > 0:
        raise UnsupportedOp("dropout has no bounds in training mode; set its p to 0 or call model.eval()")
    return input


# ------------------------------------------------------------------------------------------------ arithmetic


def _constants(*values: Any) -> None:
    if any(isinstance(v, Ref) for v in values):
        raise UnsupportedOp("one of its weights or limits depends on the input")


def _scaled(x: Ref, scale: Any, shift: Any):
    for constant in (scale, shift):
        if isinstance(constant, Tensor) and torch.broadcast_shapes(constant.shape, x.shape) != x.shape:
            raise UnsupportedOp(f"a constant of shape {tuple(constant.shape)} widens its operand {tuple(x.shape)}")
    return Scale(scale, shift, len(x.shape)), (x,)


def _sum(a: Any, b: Any, sign: float):
    if isinstance(a, Ref) and isinstance(b, Ref):
        if a.shape != b.shape:
            raise UnsupportedOp(f"its operands have different shapes {tuple(a.shape)} and {tuple(b.shape)}")
        return Sum((1.0, sign)), (a, b)
    return _scaled(a, 1.0, sign * b) if isinstance(a, Ref) else _scaled(b, sign, a)


@rule(operator.add, operator.iadd, torch.add, "add", "add_")
def _add(input: Any, other: Any, *, alpha: float = 1.0):
    return _sum(input, other, float(alpha))


@rule(operator.sub, operator.isub, torch.sub, "sub", "sub_")
def _sub(input: Any, other: Any, *, alpha: float = 1.0):
    return _sum(input, other, -float(alpha))


@rule(operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_")
def _mul(input: Any, other: Any):
    if isinstance(input, Ref) and isinstance(other, Ref):
        raise UnsupportedOp("it multiplies two tensors that both depend on the input")
    return _scaled(input, other, 0.0) if isinstance(input, Ref) else _scaled(other, input, 0.0)


@rule(operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_")
def _div(input: Any, other: Any):
    if isinstance(other, Ref):
        raise UnsupportedOp("it divides by a tensor that depends on the input")
    return _scaled(input, 1.0 / other, 0.0)


@rule(operator.neg, torch.neg, "neg")
def _neg(input: Ref):
    return _scaled(input, -1.0, 0.0)
