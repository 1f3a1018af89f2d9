"""Lipschitz constants of networks with respect to the L2 norm: a product bound that holds everywhere, and its pieces.

||f(x) - f(x')||_2 <= L ||x - x'||_2 for all x, x'. Along the graph of the model in evaluation mode,

    affine map      L_out = ||W||_2 L_in          exact in float64 from the matrix of the map, for a convolution the whole
                                                  (small) matrix, else sqrt(||W||_1 ||W||_inf) >= ||W||_2
    activation      L_out = L_in                  ReLU, leaky ReLU, tanh, sigmoid, clamping: slopes of at most 1
    max-pooling     L_out = sqrt(m) L_in          m windows at most hold one input
    join, cat       sum L_i,  sqrt(sum L_i^2)

The product is sound and loose: a few layers cost orders of magnitude. A gradient norm seen on data is not a bound at all.
Source of the product bound: Szegedy et al. 2014, arXiv 1312.6199, section 4.3.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from surefoot.errors import UnsupportedOp, check
from surefoot.nn.bounds import Box, Program, propagate
from surefoot.nn.bounds.operators import (
    Concat,
    Convolution,
    Dense,
    LinearMap,
    Monotone,
    Op,
    Rectifier,
    Scale,
    Sum,
    transpose_apply,
)
from surefoot.nn.modes import evaluating

MATRIX_ENTRIES = 2**22  # a convolution's matrix of up to 32 MB in float64 is written out, and its norm is exact
ROUNDING = 1 + 1e-9  # on top of every computed norm
MAX_POOLED = 2**14  # inputs of a max-pooling whose windows are counted one by one


def lipschitz_bound(
    model: nn.Module,
    example: Tensor,  # [B, ...], for the shapes
) -> float:
    """An upper bound of the model's L2 Lipschitz constant over all inputs, in evaluation mode and float64.

    The model is copied and left as it was. Raises `UnsupportedOp` where an operator has no known constant.
    """
    check(example.is_floating_point() and len(example) > 0, "example must hold at least one floating point input.")
    wide = copy.deepcopy(model).double()
    start = example[:1].double()
    with torch.no_grad(), evaluating(wide):
        steps = propagate(Program(wide), Box(start, start))
        constants: list[float] = []
        for step in steps.steps:
            inputs = [constants[parent] for parent in step.parents]
            shapes = [steps.steps[parent].box.shape for parent in step.parents]
            constants.append(1.0 if step.op is None else _through(step.op, inputs, shapes, start))
    return constants[steps.end]


def _through(op: Op, inputs: Sequence[float], shapes: Sequence[torch.Size], like: Tensor) -> float:
    """The constant of an operator's output from those of its inputs."""
    if isinstance(op, Sum):
        return sum(abs(sign) * constant for sign, constant in zip(op.signs, inputs, strict=True))
    if isinstance(op, Concat):
        return math.sqrt(sum(constant**2 for constant in inputs))
    return inputs[0] * _own(op, shapes[0], like)


def _own(op: Op, shape: torch.Size, like: Tensor) -> float:
    if isinstance(op, Rectifier):
        return max(1.0, abs(op.slope))
    if isinstance(op, Dense):
        return float(torch.linalg.matrix_norm(op.weight, 2)) * ROUNDING
    if isinstance(op, Scale):
        return float(op.scale.abs().amax()) if isinstance(op.scale, Tensor) else abs(op.scale)
    if isinstance(op, Convolution):
        return map_norm(
            lambda x: op.apply(x, op.weight, None), shape, like, absolute=lambda x: op.apply(x, op.weight.abs(), None)
        )
    if isinstance(op, LinearMap):
        return 1.0 if op.is_view else map_norm(op.apply, shape, like, absolute=op.apply)
    if isinstance(op, Monotone):  # of slope at most 1 where it acts on each number alone, else a maximum over windows
        return 1.0 if _elementwise(op, shape, like) else math.sqrt(_overlap(op, shape, like))
    raise UnsupportedOp(f"{type(op).__name__} has no known Lipschitz constant; bound it by hand.")


def map_norm(
    linear: Callable[[Tensor], Tensor],
    shape: Sequence[int],  # of the input, batch included
    like: Tensor,
    *,
    absolute: Callable[[Tensor], Tensor],
) -> float:
    """||W||_2 of a linear map without offset: exact where its matrix is small, else sqrt(||W||_1 ||W||_inf).

    `absolute` applies |W|, whose row and column sums the bound needs.
    """
    inside = tuple(shape[1:])
    out = linear(like.new_zeros((1, *inside))).shape
    n_in, n_out = math.prod(inside), math.prod(out[1:])
    if n_in * n_out <= MATRIX_ENTRIES:
        eye = torch.eye(n_in, dtype=like.dtype, device=like.device).reshape(n_in, *inside)
        return float(torch.linalg.matrix_norm(linear(eye).reshape(n_in, n_out), 2)) * ROUNDING
    rows = absolute(like.new_ones((1, *inside))).amax()
    columns = transpose_apply(absolute, like.new_ones((1, 1, *out[1:])), inside).amax()
    return math.sqrt(float(rows) * float(columns)) * ROUNDING


def _elementwise(op: Monotone, shape: Sequence[int], like: Tensor) -> bool:
    """Whether the function commutes with a permutation of its numbers, which no maximum over windows does."""
    n = math.prod(shape[1:])
    source = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=source, dtype=torch.float64).to(like)
    order = torch.randperm(n, generator=source).to(like.device)
    y, permuted = (op.apply(v.reshape(1, *shape[1:])) for v in (x, x[order]))
    return y.numel() == n and torch.equal(y.flatten()[order], permuted.flatten())


def _overlap(op: Monotone, shape: Sequence[int], like: Tensor) -> int:
    """At most how many windows hold one input: outputs that a single raised input moves."""
    n = math.prod(shape[1:])
    if n > MAX_POOLED:
        raise UnsupportedOp(f"Max-pooling over {n} inputs is too large to count its windows; bound it by hand.")
    rest = op.apply(like.new_zeros((1, *shape[1:])))
    most = 1
    for rows in torch.arange(n, device=like.device).split(max(1, MATRIX_ENTRIES // n)):
        single = torch.zeros(len(rows), n, dtype=like.dtype, device=like.device).scatter_(1, rows[:, None], 1.0)
        moved = (op.apply(single.reshape(len(rows), *shape[1:])) != rest).flatten(1).sum(1)
        most = max(most, int(moved.amax()))
    return most
