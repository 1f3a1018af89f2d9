"""Layer-wise calibration on trial: noisy digits, a small convnet, 8 to 128 unlabelled calibration images.

Digits are standardised and carry Gaussian noise of half a standard deviation. The net (3x3 convolutions of 12, 24, 24, 24
channels with batch-norm, global mean, linear) is trained once for each seed, and all arms quantize the same one; the seconds of
the first arm of a seed therefore include its training. A metric is named by bits and what was varied: `w2a3` is the test
accuracy at 2-bit weights and 3-bit inputs from 128 images, `w2a3_bn` the same after statistics tuning, `w2a3_full` after bias
tuning too, `w2a3_n8` from 8 images, `kl_...` the divergence from the float model on the test images.

Fine-tuning, the strong rival, trains every parameter of the MSE-range model end to end against the float teacher with the same
number of steps, and chooses its learning rate among three on held-out calibration images, as AdaQuant its iterate. The
programme's arms use min/max quantization with 8-bit inputs at 3/32 and 2.5/32 of the float size.

Left out: EfficientNet-Lite0 and ResNet-20 on CIFAR-10 (hours of training on one core), W4A4 for arms other than the plain and
the sequential one (saturated here), fine-tuning at W3A3, AdaRound below 128 images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.core.subject import predict
from surefoot.core.task import Split, Task, Training
from surefoot.core.trial import Arm, Claim, Metrics, Setup, Trial
from surefoot.datasets.embedded import digits
from surefoot.models import seeded_build, small_cnn
from surefoot.nn.quantizers import AffineQuantizer
from surefoot.quantization.layerwise_calibration import (
    QuantizedLayer,
    SensitivityTable,
    allocate_bits,
    calibrate_pipeline,
    fold_batchnorm,
    layer_sensitivities,
    measure_ranges,
    quantized_layers,
    read_layout,
    swap_layers,
    tune_biases,
    tune_layers,
    tune_statistics,
)
from surefoot.quantization.layerwise_calibration.adaquant import holdout_size
from surefoot.quantization.layerwise_calibration.folding import Bits, Layout, layer_inputs
from surefoot.quantization.layerwise_calibration.statistics import distil, distillation_loss
from surefoot.training.loop import fit

TRAINING = Training(epochs=20, batch_size=64, optimizer="sgd", lr=0.05, momentum=0.9)
ITERS = 400
W4A4, W3A3, W2A3 = (4, 4), (3, 3), (2, 3)
OPTIONS: tuple[Bits, ...] = ((8, 8), (6, 8), (4, 8), (3, 8), (2, 8))
BUDGETS = {"3of32": 3 / 32, "2.5of32": 2.5 / 32}


def noisy_digits(seed: int, data_dir: Path | None) -> Task:
    task = digits(seed, sizes=(1000, 128, 669))
    mean, std = task.train.x.mean(), task.train.x.std()
    noise = task.generator("noise")

    def transform(split: Split) -> Split:
        x = (split.x - mean) / std
        return Split(x + 0.5 * torch.randn(x.shape, generator=noise), split.y)

    return task.changed(
        train=transform(task.train), valid=transform(task.valid), test=transform(task.test), bounds=None
    )


_TRAINED: dict[tuple[str, int, float], nn.Module] = {}  # the last seed's float model, for all arms of this process


def float_model(task: Task) -> nn.Module:
    key = (task.name, task.seed, task.train.x.double().sum().item())
    if key not in _TRAINED:
        _TRAINED.clear()
        shape, classes = task.input_shape, task.num_classes
        net = seeded_build(
            lambda: small_cnn(shape, classes, widths=(12, 24, 24, 24), linear=0), task.generator("model")
        )
        _TRAINED[key] = fit(net, task, TRAINING).model
    return _TRAINED[key]


# --- the bench on which all arms quantize ---------------------------------------------------------------------------------


class Bench:
    """The folded float model of a seed with its calibration images, and how a quantized model is scored."""

    def __init__(self, task: Task, n: int = 128) -> None:
        self.task, self.x = task, task.valid.x[:n]
        model = float_model(task)
        self.layout: Layout = read_layout(model)
        self.folded = fold_batchnorm(model, self.layout)
        self.reference = predict(self.folded, task.test.x)

    def plain(self, bits: Bits | Mapping[str, Bits], rule: str = "minmax") -> nn.Module:
        chosen = bits if isinstance(bits, Mapping) else dict.fromkeys(self.layout.layers, bits)
        model = swap_layers(self.folded, chosen)
        measure_ranges(model, self.folded, self.x, rule="mse" if rule == "mse" else "minmax")
        return model

    def score(self, name: str, model: nn.Module) -> Metrics:
        logits = predict(model, self.task.test.x)
        accuracy = (logits.argmax(1) == self.task.test.labels).double().mean().item()
        return {name: accuracy, f"kl_{name}": distillation_loss(logits.double(), self.reference.double()).item()}

    def generator(self) -> torch.Generator:
        return self.task.generator(f"calibration/{len(self.x)}")


Method = Callable[[Bench, Bits], nn.Module]


def minmax(bench: Bench, bits: Bits) -> nn.Module:
    return bench.plain(bits)


def mse_range(bench: Bench, bits: Bits) -> nn.Module:
    return bench.plain(bits, "mse")


def parallel(bench: Bench, bits: Bits) -> nn.Module:
    start = bench.plain(bits, "mse")
    return tune_layers(start, bench.folded, bench.layout, bench.x, mode="parallel", iters=ITERS, generator=bench.generator())  # fmt: skip


def sequential(bench: Bench, bits: Bits) -> nn.Module:
    start = bench.plain(bits, "mse")
    return tune_layers(start, bench.folded, bench.layout, bench.x, iters=ITERS, generator=bench.generator())


def finetune(bench: Bench, bits: Bits) -> nn.Module:
    batches = math.ceil((len(bench.x) - holdout_size(len(bench.x))) / 50)
    repeats = math.ceil(ITERS / (batches * 20))  # as many steps and as many looks at the held-out images as AdaQuant
    best, best_loss = None, math.inf
    for lr in (3e-4, 1e-3, 3e-3):
        model = bench.plain(bits, "mse")
        loss = distil(
            model, bench.folded, bench.x, list(model.parameters()), epochs=20, repeats=repeats, lr=lr,
            generator=bench.generator(),
        )  # fmt: skip
        if loss < best_loss:
            best, best_loss = model, loss
    assert best is not None
    return best


def adaround(bench: Bench, bits: Bits) -> nn.Module:
    """Nagel et al. 2020, arXiv 2004.10568, in its sequential form: learn up or down for every weight, with MSE ranges."""
    model = bench.plain(bits, "mse")
    source = bench.generator()
    layers = quantized_layers(model)
    for name in bench.layout.layers:
        inputs = torch.cat(layer_inputs(model, name, bench.x))
        clean = torch.cat(layer_inputs(bench.folded, name, bench.x))
        targets = bench.folded.get_submodule(name)(clean).detach()
        _round_layer(layers[name], inputs, targets, name in bench.layout.relu, source)
    return model


def _round_layer(layer: QuantizedLayer, inputs: Tensor, targets: Tensor, relu: bool, source: torch.Generator) -> None:
    quantizer: AffineQuantizer = layer.weight_quantizer
    step = quantizer.step.reshape(-1, *([1] * (layer.weight.ndim - 1)))
    weight = layer.weight.detach()
    floor, zero = (weight / step).floor(), (quantizer.low.detach().reshape(step.shape) / step).round()
    rest = (weight / step - floor).clamp(0.01, 0.99)
    v = (((rest + 0.1) / 1.2).logit()).requires_grad_(True)
    optimizer = torch.optim.Adam([v], 1e-2)
    quantized_inputs = inputs if layer.input_quantizer is None else layer.input_quantizer(inputs).detach()
    targets = targets.relu() if relu else targets
    bias = layer.quantized_bias().detach()

    def soft() -> Tensor:
        return (v.sigmoid() * 1.2 - 0.1).clamp(0, 1)

    def rounded(up: Tensor) -> Tensor:
        return (floor + up).clamp(zero, zero + 2**quantizer.bits - 1) * step

    for iteration in range(ITERS):
        index = torch.randperm(len(inputs), generator=source)[:50]
        up = soft()
        parts = {"weight": rounded(up), "bias": bias}
        output = torch.func.functional_call(layer.layer, parts, (quantized_inputs[index],))
        loss = F.mse_loss(output.relu() if relu else output, targets[index])
        done = iteration / ITERS
        if done > 0.2:
            beta = 2 + 18 * (1 - (done - 0.2) / 0.8)
            loss = loss + 0.01 * loss.detach() * (1 - (2 * up - 1).abs().pow(beta)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        layer.weight.copy_(rounded((soft() >= 0.5).to(weight.dtype)))


# --- arms -----------------------------------------------------------------------------------------------------------------


def quantizing(
    method: Method, at: tuple[Bits, ...], *, repaired: bool = False, small: bool = False
) -> Callable[[Task, torch.Generator], Metrics]:
    """An arm: one method at some bits from 128 images; with `repaired` each after BN (and, for sequential, bias) tuning too."""

    def arm(task: Task, generator: torch.Generator) -> Metrics:
        bench, found = Bench(task), {}
        for bits in at:
            name = f"w{bits[0]}a{bits[1]}"
            model = method(bench, bits)
            found |= bench.score(name, model)
            if repaired:
                model = tune_statistics(model, bench.x)
                found |= bench.score(f"{name}_bn", model)
            if repaired and method is sequential:
                model = tune_biases(model, bench.folded, bench.x, 3, generator=bench.generator())
                found |= bench.score(f"{name}_full", model)
        for n in (32, 8) if small else ():
            bench = Bench(task, n)
            model = method(bench, W2A3)
            found |= bench.score(f"w2a3_n{n}", model)
            if repaired:
                found |= bench.score(f"w2a3_n{n}_bn", tune_statistics(model, bench.x))
        return found

    return arm


def pipeline(kind: str) -> Callable[[Task, torch.Generator], Metrics]:
    def arm(task: Task, generator: torch.Generator) -> Metrics:
        found: dict[str, float] = {}
        for n, name in ((128, "w2a3"), (8, "w2a3_n8")):
            bench = Bench(task, n)
            report = calibrate_pipeline(
                float_model(task), bench.x, "light" if kind == "light" else "advanced", bits_w=2, bits_a=3, iters=ITERS,
                generator=bench.generator(),
            )  # fmt: skip
            found |= bench.score(name, report.model)
        return found

    return arm


def unquantized(task: Task, generator: torch.Generator) -> Metrics:
    """The float model under the names of the quantized ones, so that claims can compare with it."""
    bench = Bench(task)
    found: dict[str, float] = {}
    for name in ("w4a4", "w3a3", "w2a3"):
        found |= bench.score(name, bench.folded)
    return found


Allocator = Callable[[SensitivityTable, float, torch.Generator], list[dict[str, Bits]]]


def by_programme(table: SensitivityTable, compression: float, generator: torch.Generator) -> list[dict[str, Bits]]:
    return [dict(allocate_bits(table, compression).bits)]


def by_greed(table: SensitivityTable, compression: float, generator: torch.Generator) -> list[dict[str, Bits]]:
    """From 8 bits down, always the layer that loses least for each bit saved."""
    costs, full = table.costs("size")
    picked = [0] * len(table.layers)
    while sum(costs[row, k] for row, k in enumerate(picked)) > compression * full:
        prices = {
            row: (table.degradation[row, k + 1] - table.degradation[row, k]) / (costs[row, k] - costs[row, k + 1])
            for row, k in enumerate(picked)
            if k + 1 < len(table.options)
        }
        picked[min(prices, key=lambda row: prices[row])] += 1
    return [{name: table.options[k] for name, k in zip(table.layers, picked)}]


def by_chance(table: SensitivityTable, compression: float, generator: torch.Generator) -> list[dict[str, Bits]]:
    """Five random allocations that use at least nine tenths of the budget."""
    costs, full = table.costs("size")
    found: list[dict[str, Bits]] = []
    while len(found) < 5:
        picked = torch.randint(len(table.options), (len(table.layers),), generator=generator).tolist()
        share = sum(costs[row, k] for row, k in enumerate(picked)) / (compression * full)
        if 0.9 <= share <= 1:
            found.append({name: table.options[k] for name, k in zip(table.layers, picked)})
    return found


def homogeneous(table: SensitivityTable, compression: float, generator: torch.Generator) -> list[dict[str, Bits]]:
    bits: Bits = (math.floor(compression * 32), 8)
    return [dict.fromkeys(table.layers, bits)]


def allocating(allocate: Allocator) -> Callable[[Task, torch.Generator], Metrics]:
    def arm(task: Task, generator: torch.Generator) -> Metrics:
        bench, found = Bench(task), {}
        table = layer_sensitivities(float_model(task), bench.x, OPTIONS, (8, 8))
        for name, compression in BUDGETS.items():
            scores = [bench.score(name, bench.plain(bits)) for bits in allocate(table, compression, generator)]
            found |= {key: sum(score[key] for score in scores) / len(scores) for key in scores[0]}
        return found

    return arm


ARMS = {
    "float": Arm(unquantized, system=True),
    "minmax": Arm(quantizing(minmax, (W4A4, W3A3, W2A3), repaired=True, small=True), system=True),
    "mse_range": Arm(quantizing(mse_range, (W3A3, W2A3), repaired=True, small=True), system=True),
    "adaround": Arm(quantizing(adaround, (W3A3, W2A3)), system=True),
    "parallel": Arm(quantizing(parallel, (W3A3, W2A3), repaired=True), system=True),
    "sequential": Arm(quantizing(sequential, (W4A4, W3A3, W2A3), repaired=True, small=True), system=True),
    "finetune": Arm(quantizing(finetune, (W2A3,), small=True), system=True),
    "light_pipeline": Arm(pipeline("light"), system=True),
    "advanced_pipeline": Arm(pipeline("advanced"), system=True),
    "programme": Arm(allocating(by_programme), system=True),
    "greedy": Arm(allocating(by_greed), system=True),
    "random": Arm(allocating(by_chance), system=True),
    "homogeneous": Arm(allocating(homogeneous), system=True),
}

CLAIMS = (
    Claim("At 4 bits sequential AdaQuant is within one point of the float model.", "w4a4", "sequential", "float", within=0.01),
    Claim("At 2/3 bits parallel AdaQuant beats min/max ranges by ten points.", "w2a3", "parallel", "minmax", at_least=0.1),
    Claim("At 2/3 bits parallel AdaQuant beats MSE ranges by ten points.", "w2a3", "parallel", "mse_range", at_least=0.1),
    Claim("At 2/3 bits sequential AdaQuant beats parallel.", "w2a3", "sequential", "parallel"),
    Claim("At 3 bits sequential AdaQuant beats parallel.", "w3a3", "sequential", "parallel"),
    Claim("At 2/3 bits weights that may reach any level (AdaQuant) beat up-or-down rounding (AdaRound).", "w2a3", "sequential", "adaround"),
    Claim("At 2/3 bits statistics tuning alone lifts the min/max model by three points.", at_least=0.03, effect=lambda a: a["minmax"]["w2a3_bn"] - a["minmax"]["w2a3"]),
    Claim("At 3 bits statistics tuning adds to sequential AdaQuant.", effect=lambda a: a["sequential"]["w3a3_bn"] - a["sequential"]["w3a3"]),
    Claim("From 128 images at 2/3 bits sequential AdaQuant beats end-to-end fine-tuning.", "w2a3", "sequential", "finetune"),
    Claim("From 8 images at 2/3 bits sequential AdaQuant beats end-to-end fine-tuning.", "w2a3_n8", "sequential", "finetune"),
    Claim("From 8 images at 2/3 bits the guarded pipeline is no worse than min/max by more than a point.", "w2a3_n8", "advanced_pipeline", "minmax", at_least=-0.01),
    Claim("At 2.5/32 of the size the programme is closer to the float model than random allocations.", "kl_2.5of32", "programme", "random", better="lower"),
    Claim("At 2.5/32 of the size the programme is closer to the float model than greedy allocation.", "kl_2.5of32", "programme", "greedy", better="lower"),
    Claim("At 3/32 of the size the programme is closer to the float model than 3 bits everywhere.", "kl_3of32", "programme", "homogeneous", better="lower"),
)  # fmt: skip

TRIAL = Trial(
    "quantization/layerwise_calibration",
    {"embedded": Setup(noisy_digits, ARMS, CLAIMS)},
    notes=(
        "Five layers of one kind leave an integer programme little to win over greedy or equal bits, and additive sensitivities "
        "are only a model. At 8 images every method that fits statistics suffers; the pipeline keeps the plain model there."
    ),
)
