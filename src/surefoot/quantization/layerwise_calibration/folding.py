"""Reading a model's graph, folding batch-norm, and swapping layers for quantized ones.

Folding   y = gamma (W x + b - mu) / sqrt(var + eps) + beta = W' x + b',   W' = f W,  b' = f (b - mu) + beta,
          f = gamma / sqrt(var + eps) per output channel; beta and |gamma| are kept, they are the mean and deviation that
          the output had in training, which statistics tuning restores.
Quantized layer   y_hat = Q_w(W') Q_x(x) + Q_b(b')   with weights per output channel, inputs per tensor, the bias per
          tensor at b_w + b_a bits.

The model keeps its class and its module names; only layers are replaced in place, so a fresh copy folded the same way
takes the weights of a calibrated one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from surefoot.core.subject import predict
from surefoot.errors import Refused, UnsupportedOp, check
from surefoot.nn.quantizers import AffineQuantizer, RangeRule, minmax_range, quantize

Bits: TypeAlias = tuple[int, int | None]  # (weights, inputs); None leaves the inputs in floating point
QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Layout:
    """What the graph says, in forward order."""

    layers: tuple[str, ...]  # quantizable layers
    batchnorm: Mapping[str, str]  # layer -> the batch-norm that follows it and can be folded
    relu: frozenset[str]  # layers whose (folded) output goes through a ReLU and nowhere else
    unfolded: tuple[str, ...]  # batch-norms that follow no layer of their own


def read_layout(model: nn.Module, *, allow_shared: bool = False) -> Layout:
    """Trace `model` with torch.fx and find its layers, batch-norms and ReLUs.

    Raises:
        UnsupportedOp: the model cannot be traced.
        Refused: there is nothing to quantize, or a layer is used twice and `allow_shared` is off.
    """
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedOp(
            f"The model cannot be traced by torch.fx ({reason}); its forward must not branch on the values of tensors."
        ) from error
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    layers = [node for node in calls if isinstance(modules[str(node.target)], QUANTIZABLE)]
    names = [str(node.target) for node in layers]
    if not names:
        raise Refused("The model has no convolution or linear layer to quantize.")
    for name in names:
        if nn.utils.parametrize.is_parametrized(modules[name]):
            raise Refused(f"Layer {name!r} is parametrized; call remove_parametrizations on it before quantizing.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice and not allow_shared:
        raise Refused(
            f"Layer {twice[0]!r} is used more than once, with inputs that need not share a range; "
            "pass allow_shared=True to give them one range all the same."
        )
    batchnorm: dict[str, str] = {}
    relu: set[str] = set()
    for node in layers:
        name = str(node.target)
        if name in twice:
            continue
        following = _only_user(node)
        if (
            following is not None
            and _is_batchnorm(following, modules)
            and sum(other.target == following.target for other in calls) == 1
        ):
            batchnorm[name] = str(following.target)
            following = _only_user(following)
        if following is not None and _is_relu(following, modules):
            relu.add(name)
    norms = dict.fromkeys(str(node.target) for node in calls if _is_batchnorm(node, modules))
    folded = set(batchnorm.values())
    return Layout(
        tuple(dict.fromkeys(names)), batchnorm, frozenset(relu), tuple(norm for norm in norms if norm not in folded)
    )


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_batchnorm(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules[str(node.target)], BATCHNORMS)


def _is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], nn.ReLU)
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target in (F.relu, F.relu_, torch.relu, torch.relu_)


class QuantizedLayer(nn.Module):
    """A convolution or linear layer whose weight, input and bias are quantized in every forward pass.

    `layer.weight` stays a floating point tensor (the one that calibration tunes); `freeze_` puts it on the grid.
    `out_mean` and `out_std` `[C]` are beta and |gamma| of the folded batch-norm, where there was one.
    """

    out_mean: Tensor | None
    out_std: Tensor | None

    def __init__(self, layer: nn.Module, bits: Bits, *, quantize_bias: bool = True) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, Tensor)
        self.layer = layer
        if layer.bias is None:  # calibration repairs a shift of the mean there
            layer.bias = nn.Parameter(weight.new_zeros(weight.shape[0]))
        self.weight_quantizer = AffineQuantizer(bits[0], weight.shape[0], dtype=weight.dtype, device=weight.device)
        self.input_quantizer = (
            None if bits[1] is None else AffineQuantizer(bits[1], dtype=weight.dtype, device=weight.device)
        )
        self.quantize_bias = quantize_bias
        self.register_buffer("out_mean", getattr(layer, "folded_mean", None))
        self.register_buffer("out_std", getattr(layer, "folded_std", None))

    @property
    def bits(self) -> Bits:
        return self.weight_quantizer.bits, None if self.input_quantizer is None else self.input_quantizer.bits

    @property
    def bias_bits(self) -> int | None:
        """`b_w + b_a`, or None where the bias stays in floating point: no bits for inputs, or more than 16 in sum."""
        weights, inputs = self.bits
        return weights + inputs if self.quantize_bias and inputs is not None and weights + inputs <= 16 else None

    @property
    def weight(self) -> Tensor:
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor:
        bias = self.layer.bias
        assert isinstance(bias, Tensor)
        return bias

    def quantized_bias(self) -> Tensor:
        return self.bias if self.bias_bits is None else quantize(self.bias, *minmax_range(self.bias), self.bias_bits)

    def float_forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        parts = {"weight": self.weight_quantizer(self.weight), "bias": self.quantized_bias()}
        return torch.func.functional_call(self.layer, parts, (x,))

    @torch.no_grad()
    def freeze_(self) -> None:
        """Replace the weight by its quantized value; the layer computes the same as before."""
        self.weight.copy_(self.weight_quantizer(self.weight))


@torch.no_grad()
def fold_batchnorm(
    model: nn.Module, layout: Layout | None = None, *, example: Tensor | None = None, keep_unfoldable: bool = False
) -> nn.Module:
    """A copy of `model` in evaluation mode with its batch-norms folded into the layers before them.

    Args:
        example: inputs `[B, ...]` on which the folded model must agree with the given one.
        keep_unfoldable: leave a batch-norm that follows no layer (a pre-activation net) in floating point.

    Raises:
        Refused: a batch-norm cannot be folded and `keep_unfoldable` is off, or the two models disagree.
    """
    layout = read_layout(model) if layout is None else layout
    if layout.unfolded and not keep_unfoldable:
        raise Refused(
            f"Batch-norm {layout.unfolded[0]!r} does not directly follow a layer of its own and cannot be folded; "
            "pass keep_unfoldable=True to leave it in floating point."
        )
    folded = copy.deepcopy(model).eval()
    for layer_name, norm_name in layout.batchnorm.items():
        _fold_pair(folded.get_submodule(layer_name), folded.get_submodule(norm_name), norm_name)
        set_module(folded, norm_name, nn.Identity())
    if example is not None:
        before, after = predict(model, example), predict(folded, example)
        gap = (before - after).abs().max().item() if before.shape == after.shape else float("inf")
        if not gap <= 1e-2 * (1.0 + before.abs().max().item()):
            raise Refused(
                f"Folding batch-norm changed the outputs by {gap:.3g}; a batch-norm acts on another dimension."
            )
    return folded


def _fold_pair(layer: Any, norm: Any, name: str) -> None:
    if norm.running_mean is None:
        raise Refused(f"Batch-norm {name!r} keeps no running statistics, so there is nothing to fold.")
    weight = layer.weight
    if norm.num_features != weight.shape[0]:
        raise Refused(f"Batch-norm {name!r} has {norm.num_features} features for {weight.shape[0]} output channels.")
    gamma = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight.detach()
    beta = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias.detach()
    factor = gamma / (norm.running_var + norm.eps).sqrt()
    bias = torch.zeros_like(norm.running_mean) if layer.bias is None else layer.bias
    # New parameters, not in place: a weight tied to another layer must not change there.
    layer.weight = nn.Parameter(weight * factor.reshape(-1, *([1] * (weight.ndim - 1))))
    layer.bias = nn.Parameter((bias - norm.running_mean) * factor + beta)
    layer.register_buffer("folded_mean", beta.clone(), persistent=False)
    layer.register_buffer("folded_std", gamma.abs(), persistent=False)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of a model by name, in the order of registration."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def swap_layers(folded: nn.Module, bits: Mapping[str, Bits], *, quantize_bias: bool = True) -> nn.Module:
    """A copy of a folded model with the named layers quantized; ranges are still to be measured."""
    model = copy.deepcopy(folded)
    if not dict(model.named_children()):  # the model is one layer
        check(set(bits) <= {""}, f"The model has no layers named {', '.join(sorted(bits))}.")
    for name, layer_bits in bits.items():
        layer = QuantizedLayer(model.get_submodule(name), layer_bits, quantize_bias=quantize_bias)
        if not name:
            return layer
        set_module(model, name, layer)
    return model


@torch.no_grad()
def measure_ranges(
    model: nn.Module, folded: nn.Module, x: Tensor, *, rule: RangeRule = "minmax", batch_size: int = 64
) -> None:
    """Set the ranges of all quantized layers: weights from the weights, inputs from the float model run on `x`.

    Min/max of the inputs is averaged over batches; the squared-error rule looks at all batches together.
    """
    layers = quantized_layers(model)
    for layer in layers.values():
        layer.weight_quantizer.measure(layer.weight, rule)
    for name, layer in layers.items():
        if layer.input_quantizer is None:
            continue
        inputs = layer_inputs(folded, name, x, batch_size)
        if rule == "mse":
            layer.input_quantizer.measure(torch.cat(inputs), rule)
            continue
        ranges = [minmax_range(batch) for batch in inputs]
        layer.input_quantizer.width.copy_(torch.stack([width for width, _ in ranges]).mean())
        layer.input_quantizer.low.copy_(torch.stack([low for _, low in ranges]).mean())


@torch.no_grad()
def layer_inputs(model: nn.Module, name: str, x: Tensor, batch_size: int = 64) -> list[Tensor]:
    """The inputs `[B, ...]` that layer `name` sees, batch by batch, on the model's device (each use of a shared layer)."""
    caught: list[Tensor] = []
    device = next(model.parameters()).device

    def catch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0].detach().clone())  # a later in-place ReLU must not reach the cache

    handle = model.get_submodule(name).register_forward_pre_hook(catch)
    try:
        for batch in x.split(batch_size):
            model(batch.to(device))
    finally:
        handle.remove()
    check(bool(caught), f"Layer {name!r} was not reached by a forward pass.")
    finite = all(bool(torch.isfinite(batch).all()) for batch in caught)
    check(finite, f"The inputs of layer {name!r} hold NaN or infinite values; look at the calibration data.")
    return caught
