"""Repair of what quantization shifts: statistics tuning (no gradients) and bias tuning (a few parameters, distilled).

Statistics tuning puts behind every folded layer a batch-norm BN_r with frozen gamma_r = |gamma|, beta_r = beta and running
statistics (beta, gamma^2), which makes it the identity, re-estimates only the running statistics on the quantized
outputs, and folds it back:

    f = |gamma| / sqrt(var_r),   W <- f W,   b <- f (b - mean_r) + beta,   R_w <- f R_w,   z_w <- f z_w

so that the codes of the weights stay as they were and the outputs have mean beta and variance gamma^2. gamma_r must be the
absolute value: with a negative gamma the signed form reflects the output about beta. No epsilon is added to var_r, else BN_r
would not start as the identity.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.core.subject import predict
from surefoot.errors import Refused, check_at_least, check_non_negative, check_positive
from surefoot.quantization.layerwise_calibration.adaquant import calibration_inputs, holdout_size
from surefoot.quantization.layerwise_calibration.folding import QuantizedLayer, layer_inputs, quantized_layers

DEAD = 1e-4  # share of gamma^2 below which an output counts as constant: its factor would blow up what is left


def rebatchnorm(
    x: Tensor,  # [B, C, ...]
    mean: Tensor,  # [C]
    var: Tensor,  # [C]
    out_mean: Tensor,  # [C]
    out_std: Tensor,  # [C]
) -> Tensor:
    """BN_r as a function: `|gamma| (x - mean) / sqrt(var) + beta`; the identity at `mean = beta, var = gamma^2`."""
    shape = (1, -1, *([1] * (x.ndim - 2)))
    factor = _factor(var, out_std)
    return (x - mean.reshape(shape)) * factor.reshape(shape) + out_mean.reshape(shape)


def _factor(var: Tensor, out_std: Tensor) -> Tensor:
    alive = var > DEAD * out_std.square()
    return torch.where(alive, out_std / torch.where(alive, var, torch.ones_like(var)).sqrt(), torch.ones_like(var))


@torch.no_grad()
def tune_statistics(
    model: nn.Module,
    loader: Tensor | Iterable[Tensor | Sequence[Tensor]],
    passes: int = 1,
    *,
    prior: float = 4.0,
    momentum: float | None = None,
    batch_size: int = 64,
) -> nn.Module:
    """A copy of a quantized model whose folded layers have their training statistics back.

    Layers are done front to back, each on outputs of the layers already done, which equals one batch going through all
    BN_r together.

    Args:
        passes: passes over the calibration set; only a moving average gains from more than one.
        prior: weight, in examples, of the old statistics in the new ones: `n / (n + prior)` of the shift is corrected. A
            guard for small sets; 0 trusts the calibration set wholly.
        momentum: None pools all batches; else the moving average of batch statistics that a BN layer keeps.

    Raises:
        Refused: no quantized layer has a folded batch-norm.
    """
    check_at_least("passes", passes, 1)
    check_non_negative("prior", prior)
    x, _ = calibration_inputs(loader)
    model = copy.deepcopy(model)
    layers = quantized_layers(model)
    normed = [name for name in execution_order(model, list(layers), x[:1]) if layers[name].out_std is not None]
    if not normed:
        raise Refused("The model has no quantized layer with a folded batch-norm, so there are no statistics to tune.")
    for name in normed:
        layer = layers[name]
        outputs = [layer(inputs) for inputs in layer_inputs(model, name, x, batch_size)]
        _renormalise(layer, outputs, len(x), passes, prior, momentum)
    return model


def _renormalise(
    layer: QuantizedLayer, outputs: list[Tensor], n: int, passes: int, prior: float, momentum: float | None
) -> None:
    beta, deviation = layer.out_mean, layer.out_std
    assert beta is not None and deviation is not None
    if momentum is None:
        mean, var = _moments(torch.cat(outputs))
    else:
        mean, var = beta, deviation.square()
        for batch in outputs * passes:
            batch_mean, batch_var = _moments(batch)
            mean, var = mean.lerp(batch_mean, momentum), var.lerp(batch_var, momentum)
    trust = n / (n + prior)
    mean, var = beta.lerp(mean, trust), deviation.square().lerp(var, trust)
    factor = _factor(var, deviation)
    layer.bias.copy_((layer.quantized_bias() - mean) * factor + beta)
    layer.weight.mul_(factor.reshape(-1, *([1] * (layer.weight.ndim - 1))))
    layer.weight_quantizer.rescale_(factor)


def _moments(output: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel `[C]` of `[B, C, ...]`, in float64 inside."""
    rows = output.double().transpose(0, 1).flatten(1)
    return rows.mean(1).to(output.dtype), rows.var(1, correction=0).to(output.dtype)


@torch.no_grad()
def execution_order(model: nn.Module, names: Sequence[str], example: Tensor) -> list[str]:
    """The named modules in the order a forward pass reaches them first."""
    order: list[str] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, __, name=name: order.append(name))  # type: ignore[misc]
        for name in names
    ]
    try:
        predict(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(order))


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """`KL(teacher || student)` of logits `[B, C]`, the mean over examples."""
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)


def tune_biases(
    model: nn.Module,
    teacher: nn.Module,
    loader: Tensor | Iterable[Tensor | Sequence[Tensor]],
    epochs: int = 10,
    *,
    repeats: int = 20,
    lr: float = 1e-3,
    batch_size: int = 50,
    ranges: bool = False,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """A copy of a quantized model whose biases (with `ranges`, its quantizers' ranges too) follow the float teacher.

    Trained end to end by Adam on `distillation_loss`, an epoch being `repeats` passes over the samples; the epoch with the
    least loss on held-out samples is kept, the start included. Biases are few, so a few samples are enough.
    """
    check_at_least("epochs", epochs, 0)
    check_at_least("repeats", repeats, 1)
    check_at_least("batch_size", batch_size, 1)
    check_positive("lr", lr)
    x, _ = calibration_inputs(loader)
    model = copy.deepcopy(model).eval()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    tuned: list[nn.Parameter] = []
    for layer in quantized_layers(model).values():
        tuned.append(layer.layer.get_parameter("bias"))
        if ranges:
            tuned.extend(layer.weight_quantizer.parameters())
            tuned.extend(layer.input_quantizer.parameters() if layer.input_quantizer is not None else ())
    distil(model, teacher, x, tuned, epochs=epochs, repeats=repeats, lr=lr, batch_size=batch_size, generator=generator)  # fmt: skip
    for parameter, flag in zip(model.parameters(), flags):
        parameter.requires_grad_(flag)
    return model


def distil(
    model: nn.Module,
    teacher: nn.Module,
    x: Tensor,  # [N, ...]
    tuned: Sequence[nn.Parameter],
    *,
    epochs: int,
    repeats: int = 1,
    lr: float,
    batch_size: int = 50,
    generator: torch.Generator | None = None,
) -> float:
    """Train `tuned` in place by Adam to follow the teacher's logits; returns the held-out loss of the epoch kept."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    targets, n = predict(teacher, x), len(x) - holdout_size(len(x))
    held = slice(n, None) if n < len(x) else slice(None)

    def held_loss() -> float:
        return distillation_loss(predict(model, x[held]), targets[held]).item()

    optimizer = torch.optim.Adam(list(tuned), lr)
    best, best_values = held_loss(), [parameter.detach().clone() for parameter in tuned]
    for parameter in tuned:
        parameter.requires_grad_(True)
    for _ in range(epochs):
        passes = [torch.randperm(n, generator=generator, device=generator.device) for _ in range(repeats)]
        for index in (batch.to(x.device) for order in passes for batch in order.split(batch_size)):
            with torch.enable_grad():
                loss = distillation_loss(model(x[index].to(device)), targets[index.cpu()].to(device))
                gradients = torch.autograd.grad(loss, list(tuned))
            for parameter, gradient in zip(tuned, gradients):
                parameter.grad = gradient
            optimizer.step()
        now = held_loss()
        if now < best:
            best, best_values = now, [parameter.detach().clone() for parameter in tuned]
    for parameter, value in zip(tuned, best_values):
        parameter.grad = None
        parameter.data.copy_(value)
    return best
