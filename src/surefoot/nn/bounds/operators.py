"""Operators of bound propagation: one small class a kind, each with its value, its interval rule and its linear rule.

Boxes are held as lower/upper or as centre c and radius r. With A the coefficients of a linear form on an operator's output,

    affine          y = W x + b          c' = W c + b,  r' = |W| r          A -> A W, constant += A b
    batch-norm      y = s x + t          c' = s c + t,  r' = |s| r          s = gamma / sqrt(var + eps), hence |gamma|
    rectifier       y = max(z, a z)      l' = f(l),  u' = f(u)              one line above, one below (`Rectifier.lines`)
    monotone        tanh, max-pool, ...  l' = f(l),  u' = f(u)              none: the walk stops and takes the box

Coefficients have the shape `[Bz, R, ...]`: R rows of a specification, Bz the batch, or 1 while all examples share them.
Sources: Gowal et al. 2018, arXiv 1810.12715 (intervals); Zhang et al. 2018, arXiv 1811.00866 (CROWN).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from surefoot.nn.bounds.kernels import RectifiedPair, channels_last

# Entries of a convolution's matrix up to which many rows are multiplied by it at once: convolving thousands of tiny maps
# costs four to eight times as much (measured at 2^13 to 2^16 entries; even at about 2^18).
SMALL_MATRIX = 2**17


class Box:
    """Elementwise bounds of a tensor `[B, ...]`; the pair that was not given is computed when it is asked for."""

    __slots__ = ("_centre", "_lower", "_make", "_radius", "_shape", "_upper")

    def __init__(self, lower: Tensor | None, upper: Tensor | None) -> None:
        self._lower = lower
        self._upper = upper
        self._centre: Tensor | None = None
        self._radius: Tensor | None = None
        self._make: Callable[[], Box] | None = None
        self._shape = lower.shape if lower is not None else None

    @classmethod
    def around(cls, centre: Tensor, radius: Tensor) -> Box:
        box = cls(None, None)
        box._centre, box._radius, box._shape = centre, radius, centre.shape
        return box

    @classmethod
    def deferred(cls, make: Callable[[], Box], shape: torch.Size) -> Box:
        """A box that is computed when it is first read, if it ever is."""
        box = cls(None, None)
        box._make, box._shape = make, shape
        return box

    def _read(self, pair: str) -> Tensor | None:
        if self._make is not None:
            made, self._make = self._make(), None
            self._lower, self._upper, self._centre, self._radius = made._lower, made._upper, made._centre, made._radius
        return getattr(self, pair)

    @property
    def lower(self) -> Tensor:
        if (lower := self._read("_lower")) is None:
            lower = self._lower = self.centre - self.radius
        return lower

    @property
    def upper(self) -> Tensor:
        if (upper := self._read("_upper")) is None:
            upper = self._upper = self.centre + self.radius
        return upper

    @property
    def centre(self) -> Tensor:
        if (centre := self._read("_centre")) is None:
            centre = self._centre = torch.lerp(self.lower, self.upper, 0.5)
        return centre

    @property
    def radius(self) -> Tensor:
        if (radius := self._read("_radius")) is None:
            # one pass over memory less than (u - l) / 2, in training also backwards
            radius = self._radius = self.upper - self.centre
        return radius

    @property
    def shape(self) -> torch.Size:
        assert self._shape is not None
        return self._shape

    def minimum(self, a: Tensor) -> Tensor:
        """min of <a, x> over the box, `[B, R]`: A c - |A| r."""
        return inner(a, self.centre) - inner(a.abs(), self.radius)


def inner(a: Tensor, x: Tensor) -> Tensor:
    """<a, x> per row: a `[Bz, R, ...]`, x `[B, ...]` -> `[B, R]`."""
    rows, points = a.flatten(2), x.flatten(1)
    if len(rows) == 1:
        return points @ rows[0].mT
    return torch.bmm(points.unsqueeze(1), rows.mT).squeeze(1)  # 5 to 14 times faster than rows @ column on a CPU


def transpose_apply(linear: Callable[[Tensor], Tensor], a: Tensor, shape: Sequence[int]) -> Tensor:
    """A W for any linear map without an offset, as a vector-Jacobian product; `shape` is one example's input shape."""
    keep_graph = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        rows = a.flatten(0, 1)
        probe = rows.new_zeros((len(rows), *shape)).requires_grad_()
        (pulled,) = torch.autograd.grad(linear(probe), probe, rows, create_graph=keep_graph)
    return pulled.reshape(*a.shape[:2], *shape)


class Op:
    """Base of the operators. `affine` ones have `pull` (A -> A W for each parent) and `offset` (A b)."""

    affine = True
    weight_layers = 0  # how many weight matrices it multiplies by

    def value(self, *inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def interval(self, *boxes: Box) -> Box:
        raise NotImplementedError

    def pull(self, a: Tensor, shapes: Sequence[torch.Size]) -> Sequence[Tensor]:
        raise NotImplementedError

    def offset(self, a: Tensor) -> Tensor | float:
        return 0.0

    def scaled(self, scale: Scale) -> Op | None:
        """This operator with a per-channel scale and shift of its output folded in; None where that cannot be or does not pay."""
        return None


@dataclass(frozen=True, eq=False)
class Dense(Op):
    """y = x W^T + b along the last dimension."""

    weight: Tensor  # [out, in]
    bias: Tensor | None
    weight_layers = 1

    def value(self, *inputs: Tensor) -> Tensor:
        return F.linear(inputs[0], self.weight, self.bias)

    def interval(self, *boxes: Box) -> Box:
        return Box.around(self.value(boxes[0].centre), F.linear(boxes[0].radius, self.weight.abs()))

    def pull(self, a: Tensor, shapes: Sequence[torch.Size]) -> Sequence[Tensor]:
        return (a @ self.weight,)

    def offset(self, a: Tensor) -> Tensor | float:
        return 0.0 if self.bias is None else (a @ self.bias).flatten(2).sum(2) if a.dim() > 3 else a @ self.bias


@dataclass(frozen=True, eq=False)
class Convolution(Op):
    """A convolution of any stride, padding, dilation and groups; `apply(x, weight, bias)` runs it."""

    weight: Tensor
    bias: Tensor | None
    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    geometry: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int] | None  # None: transpose by autograd
    weight_layers = 1

    def value(self, *inputs: Tensor) -> Tensor:
        return self.apply(inputs[0], channels_last(self.weight), self.bias)

    def interval(self, *boxes: Box) -> Box:
        magnitude = channels_last(self.weight.abs())
        return Box.around(self.value(boxes[0].centre), self.apply(boxes[0].radius, magnitude, None))

    def scaled(self, scale: Scale) -> Op | None:
        """Folding costs passes over the weights, scaling over the boxes: here these are larger, behind a linear layer they are not."""
        by, shift = scale.scale, scale.shift
        per_channel = (1, len(self.weight)) + (1,) * (scale.dims - 2)
        if not isinstance(by, Tensor) or not isinstance(shift, Tensor) or not by.shape == shift.shape == per_channel:
            return None
        weight = self.weight * by.reshape(-1, *(1,) * (self.weight.dim() - 1))
        shift = shift.flatten()
        bias = shift if self.bias is None else self.bias * by.flatten() + shift
        return Convolution(weight, bias, self.apply, self.geometry)

    def pull(self, a: Tensor, shapes: Sequence[torch.Size]) -> Sequence[Tensor]:
        shape = shapes[0][1:]
        size = math.prod(shape) * math.prod(a.shape[2:])
        if size <= SMALL_MATRIX and a.shape[0] * a.shape[1] > 2 * math.prod(a.shape[2:]):
            eye = torch.eye(math.prod(a.shape[2:]), dtype=a.dtype, device=a.device)
            matrix = self._transpose(eye.reshape(1, len(eye), *a.shape[2:]), shape).reshape(len(eye), -1)
            return ((a.flatten(2) @ matrix).reshape(*a.shape[:2], *shape),)
        return (self._transpose(a, shape),)

    def _transpose(self, a: Tensor, shape: Sequence[int]) -> Tensor:
        if self.geometry is None:
            return transpose_apply(lambda x: self.apply(x, self.weight, None), a, shape)
        stride, padding, dilation, groups = self.geometry
        kernel, out = self.weight.shape[2:], a.shape[3:]
        missing = [  # rows of the input that the last stride did not reach
            n - ((o - 1) * s - 2 * p + d * (k - 1) + 1)
            for n, o, s, p, d, k in zip(shape[1:], out, stride, padding, dilation, kernel, strict=True)
        ]
        transposed = F.conv_transpose1d if len(kernel) == 1 else F.conv_transpose2d
        pulled = transposed(a.flatten(0, 1), self.weight, None, stride, padding, missing, groups, dilation)  # type: ignore[arg-type]
        return pulled.reshape(*a.shape[:2], *shape)

    def offset(self, a: Tensor) -> Tensor | float:
        return 0.0 if self.bias is None else a.flatten(3).sum(3) @ self.bias


@dataclass(frozen=True, eq=False)
class Scale(Op):
    """y = scale x + shift with constants that broadcast to x `[B, ...]`: normalisation, batch-norm, temperatures."""

    scale: Tensor | float
    shift: Tensor | float
    dims: int  # of x, batch included

    def value(self, *inputs: Tensor) -> Tensor:
        return inputs[0] * self.scale + self.shift

    def interval(self, *boxes: Box) -> Box:
        scale = self.scale.abs() if isinstance(self.scale, Tensor) else abs(self.scale)
        return Box.around(boxes[0].centre * self.scale + self.shift, boxes[0].radius * scale)

    def _beside_rows(self, constant: Tensor | float) -> Tensor | float:
        """A constant with a batch dimension gets a row dimension after it, to broadcast with `[Bz, R, ...]`."""
        return constant.unsqueeze(1) if isinstance(constant, Tensor) and constant.dim() == self.dims else constant

    def pull(self, a: Tensor, shapes: Sequence[torch.Size]) -> Sequence[Tensor]:
        return (a * self._beside_rows(self.scale),)

    def offset(self, a: Tensor) -> Tensor | float:
        if isinstance(self.shift, Tensor) or self.shift != 0:
            return (a * self._beside_rows(self.shift)).flatten(2).sum(2)
        return 0.0


@dataclass(frozen=True, eq=False)
class BatchScale(Scale):
    """Batch-norm in training mode: the scale and shift of the clean batch, whose own `output` is known already."""

    output: Tensor

    def value(self, *inputs: Tensor) -> Tensor:
        return self.output


@dataclass(frozen=True, eq=False)
class LinearMap(Op):
    """A parameter-free linear map with coefficients >= 0 that acts on each example alone: pooling, means, reshapes."""

    apply: Callable[[Tensor], Tensor]
    is_view: bool = False
    mixes: bool = True  # several inputs in one output (pooling), against a mere rearrangement

    @property
    def weight_layers(self) -> int:  # type: ignore[override]
        return int(self.mixes)

    @property
    def shares_memory(self) -> bool:
        """Whether the output may lie in the input's memory, so that a change in place of one changes the other."""
        return not self.mixes

    def value(self, *inputs: Tensor) -> Tensor:
        return self.apply(inputs[0])

    def interval(self, *boxes: Box) -> Box:
        return Box.around(self.apply(boxes[0].centre), self.apply(boxes[0].radius))

    def pull(self, a: Tensor, shapes: Sequence[torch.Size]) -> Sequence[Tensor]:
        if self.is_view and math.prod(a.shape[2:]) == math.prod(shapes[0][1:]):
            return (a.reshape(*a.shape[:2], *shapes[0][1:]),)
        return (transpose_apply(self.apply, a, shapes[0][1:]),)


@dataclass(frozen=True, eq=False)
class Sum(Op):
    """y = sum_i sign_i x_i of tensors of one shape: residual joins. Boxes add; coefficients go to every parent."""

    signs: tuple[float, ...]

    def value(self, *inputs: Tensor) -> Tensor:
        total = inputs[0] * self.signs[0] if self.signs[0] != 1 else inputs[0]
        for sign, x in zip(self.signs[1:], inputs[1:], strict=True):
            total = total + x if sign == 1 else total + sign * x
        return total

    def interval(self, *boxes: Box) -> Box:
        radius = sum(abs(sign) * box.radius for sign, box in zip(self.signs, boxes, strict=True))
        assert isinstance(radius, Tensor)
        return Box.around(self.value(*(box.centre for box in boxes)), radius)

    def pull(self, a: Tensor, shapes: Sequence[torch.Size]) -> Sequence[Tensor]:
        return [a if sign == 1 else sign * a for sign in self.signs]


@dataclass(frozen=True, eq=False)
class Concat(Op):
    """Concatenation along a dimension other than the batch; coefficients are cut apart again."""

    dim: int  # >= 1

    def value(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, self.dim)

    def interval(self, *boxes: Box) -> Box:
        return Box(self.value(*(box.lower for box in boxes)), self.value(*(box.upper for box in boxes)))

    def pull(self, a: Tensor, shapes: Sequence[torch.Size]) -> Sequence[Tensor]:
        return a.split([shape[self.dim] for shape in shapes], self.dim + 1)


@dataclass(frozen=True, eq=False)
class Rectifier(Op):
    """ReLU (slope 0) and leaky ReLU (0 <= slope <= 1)."""

    slope: float = 0.0
    affine = False

    def value(self, *inputs: Tensor) -> Tensor:
        return F.relu(inputs[0]) if self.slope == 0 else F.leaky_relu(inputs[0], self.slope)

    def interval(self, *boxes: Box) -> Box:
        if self.slope == 0 and torch.is_grad_enabled():
            return Box.around(*RectifiedPair.apply(boxes[0].centre, boxes[0].radius))
        return Box(self.value(boxes[0].lower), self.value(boxes[0].upper))

    def lines(self, box: Box) -> tuple[Tensor, Tensor, Tensor]:
        """(slope below, slope above, intercept above), each `[B, ...]`, for pre-activations in `box`.

        Above: the chord through both ends. Below: through 0 with slope 1 if u >= -l, else `self.slope` ("adaptive").
        Stable neurons (and l = u = 0) get their own line twice, and nothing is divided by u - l there.
        """
        low, high = box.lower, box.upper
        unstable = (low < 0) & (high > 0)
        one = torch.ones_like(low)  # of two Python numbers torch.where makes float32, and 0.1 would be another slope
        stable_slope = torch.where(low >= 0, one, self.slope)
        chord = (high - self.slope * low) / torch.where(unstable, high - low, one)
        above = torch.where(unstable, chord, stable_slope)
        below = torch.where(unstable, torch.where(high >= -low, one, self.slope), stable_slope)
        return below, above, torch.where(unstable, (1 - above) * high, torch.zeros_like(low))


@dataclass(frozen=True, eq=False)
class Monotone(Op):
    """A function that never falls when an input rises: tanh, sigmoid, max-pooling, clamping. Interval rule only."""

    apply: Callable[[Tensor], Tensor]
    affine = False

    def value(self, *inputs: Tensor) -> Tensor:
        return self.apply(inputs[0])

    def interval(self, *boxes: Box) -> Box:
        return Box(self.apply(boxes[0].lower), self.apply(boxes[0].upper))
