"""Layer-wise calibration: folding, AdaQuant, bit allocation, statistics, biases, pipelines, export, treatment."""

import copy
import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from surefoot.core.task import Training
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput, Refused, UnsupportedOp
from surefoot.models.networks import Normalized, mlp, seeded_build, small_cnn, small_resnet
from surefoot.nn.quantizers import RangeRule
from surefoot.quantization.layerwise_calibration import (
    LayerwiseCalibration,
    QuantizedLayer,
    Rates,
    SensitivityTable,
    adaquant,
    allocate_bits,
    calibrate_pipeline,
    export_quantized,
    fold_batchnorm,
    layer_sensitivities,
    load_export,
    measure_ranges,
    quantized_layers,
    read_layout,
    rebatchnorm,
    rebuild_quantized,
    swap_layers,
    tune_biases,
    tune_layer,
    tune_statistics,
)
from surefoot.quantization.layerwise_calibration.folding import layer_inputs
from surefoot.quantization.layerwise_calibration.pipeline import pack, unpack
from surefoot.quantization.layerwise_calibration.statistics import distillation_loss
from surefoot.training.loop import fit


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def cnn():
    return Normalized(small_cnn((1, 8, 8), 10, widths=(8, 12, 12), linear=0), [0.3], [0.4])


@pytest.fixture(scope="module")
def task():
    return digits(0, sizes=(600, 128, 300))


@pytest.fixture(scope="module")
def model(task):
    """A trained net some of whose gammas are negative: the output of that channel before the ReLU is mirrored."""
    net = seeded_build(cnn, generator())
    with torch.no_grad():
        norm = net.get_submodule("model.1")
        assert isinstance(norm, nn.BatchNorm2d)
        norm.weight[::3] *= -1
    return fit(net, task, Training(epochs=6, lr=5e-3)).model


@pytest.fixture(scope="module")
def x(task):
    return task.valid.x


def plain(model, x, bits: Any = (4, 4), rule: RangeRule = "minmax", quantize_bias=True):
    layout = read_layout(model)
    folded = fold_batchnorm(model, layout)
    widths: dict[str, Any] = dict.fromkeys(layout.layers, bits)
    quantized = swap_layers(folded, widths, quantize_bias=quantize_bias)
    measure_ranges(quantized, folded, x, rule=rule)
    return quantized, folded


def state_equal(one, two):
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- graph and folding


def test_layout_of_a_convnet(model):
    layout = read_layout(model)
    assert layout.layers == ("model.0", "model.3", "model.6", "model.11")
    assert layout.batchnorm == {"model.0": "model.1", "model.3": "model.4", "model.6": "model.7"}
    assert layout.relu == {"model.0", "model.3", "model.6"}
    assert layout.unfolded == ()


def test_layout_of_a_residual_net_with_functional_relu():
    layout = read_layout(small_resnet((1, 8, 8), 10, widths=(8, 16)))
    assert layout.batchnorm["3.branch.3"] == "3.branch.4"
    assert "3.branch.0" in layout.relu
    assert "3.branch.3" not in layout.relu  # its output is added before the ReLU
    assert "4.skip" in layout.layers and "4.skip" not in layout.batchnorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folding_keeps_the_outputs(model, x, dtype):
    net = copy.deepcopy(model).to(dtype)
    folded = fold_batchnorm(net, example=x.to(dtype))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    assert torch.allclose(folded(x.to(dtype)), net(x.to(dtype)), atol=tolerance)
    assert any(isinstance(module, nn.BatchNorm2d) for module in net.modules())  # the caller's model is untouched


def test_folding_a_residual_net_and_a_signal_net():
    net = seeded_build(lambda: small_resnet((3, 8, 8), 5, widths=(8, 16)), generator(1))
    data = torch.randn(64, 3, 8, 8, generator=generator(2))
    net.train()(data)
    net.eval()
    assert torch.allclose(fold_batchnorm(net)(data), net(data), atol=1e-5)


def test_models_that_cannot_be_folded_or_read():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(self.norm(x)).mean((2, 3))

    with pytest.raises(Refused, match="'norm' does not directly follow"):
        fold_batchnorm(PreActivation())
    kept = adaquant(PreActivation(), torch.randn(8, 3, 6, 6, generator=generator()), iters=2, keep_unfoldable=True)
    assert isinstance(kept.get_submodule("norm"), nn.BatchNorm2d)

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else x

    with pytest.raises(UnsupportedOp, match=r"cannot be traced by torch\.fx"):
        read_layout(Branches())

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(self.fc(x).relu())

    with pytest.raises(Refused, match="allow_shared=True"):
        read_layout(Shared())
    shared = adaquant(Shared(), torch.randn(8, 3, generator=generator()), iters=2, allow_shared=True)
    assert isinstance(shared.get_submodule("fc"), QuantizedLayer)
    with pytest.raises(Refused, match="no convolution or linear layer"):
        read_layout(nn.Sequential(nn.ReLU()))
    with pytest.raises(Refused, match="no running statistics"):
        fold_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)))

    class OtherDimension(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.fc(x)).mean(1)

    wrong = OtherDimension()
    with torch.no_grad():
        wrong.norm.weight.copy_(torch.tensor([1.0, 5.0, 20.0]))
    with pytest.raises(Refused, match="another dimension"):
        fold_batchnorm(wrong.eval(), example=torch.randn(4, 3, 3, generator=generator()))


# --- AdaQuant


def test_no_iterations_at_eight_bits_is_plain_minmax(model, x):
    quantized, _ = plain(model, x, (8, 8))
    untouched = adaquant(model, x, 8, 8, iters=0, ranges="minmax")
    assert torch.equal(untouched(x), quantized(x))


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_loss_never_rises_and_falls_at_few_bits(model, x, mode):
    quantized, folded = plain(model, x, (2, 3), "mse")
    name = "model.3"
    layer = quantized_layers(quantized)[name]
    source = folded if mode == "parallel" else quantized
    inputs = torch.cat(layer_inputs(source, name, x))
    targets = folded.get_submodule(name)(torch.cat(layer_inputs(folded, name, x))).detach()
    before, after = tune_layer(layer, inputs, targets, relu=True, iters=100, generator=generator())
    assert after < 0.95 * before
    # Rates far too hot: the start is kept, nothing blows up.
    layer = quantized_layers(plain(model, x, (2, 3), "mse")[0])[name]
    state = copy.deepcopy(layer.state_dict())
    before, after = tune_layer(layer, inputs, targets, relu=True, iters=20, rates=Rates(50, 50, 50, 50))
    assert after == before and all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


def test_many_bits_leave_a_linear_layer_as_it_was():
    net = seeded_build(lambda: nn.Sequential(nn.Linear(20, 10)), generator())
    data = torch.randn(100, 20, generator=generator(1))
    tuned = adaquant(net, data, 16, None, iters=100)
    assert (tuned(data) - net(data)).norm() <= 1e-3 * net(data).norm()


def test_parallel_mode_does_not_depend_on_workers_and_first_layers_agree(model, x):
    def run(mode, workers=1, target=None):
        return adaquant(model, x, 3, 3, mode, iters=30, generator=generator(7), workers=workers, target_modules=target)

    one, three = run("parallel"), run("parallel", 3)
    assert state_equal(one, three)
    sequential = run("sequential")
    first = [quantized_layers(net)["model.0"] for net in (one, sequential)]
    assert state_equal(*first)
    second = [quantized_layers(net)["model.3"] for net in (one, sequential)]
    assert not state_equal(*second)
    # A layer by itself comes out as among the others: no order matters.
    alone = run("parallel", target=["model.6"])
    assert state_equal(quantized_layers(alone)["model.6"], quantized_layers(one)["model.6"])
    assert list(quantized_layers(alone)) == ["model.6"]


def test_pruned_weights_stay_zero(model, x):
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        weight = pruned.get_submodule("model.3").weight
        weight.mul_(torch.rand(weight.shape, generator=generator()) < 0.2)
    report = calibrate_pipeline(pruned, x, bits_w=3, bits_a=4, iters=20, bias_epochs=1)
    assert bool((quantized_layers(report.model)["model.3"].weight[weight == 0] == 0).all())


def test_sequential_adaquant_beats_plain_ranges_at_few_bits(model, x, task):
    with torch.no_grad():
        reference = model(task.test.x)
        losses = {
            "minmax": distillation_loss(plain(model, x, (2, 3))[0](task.test.x), reference).item(),
            "sequential": distillation_loss(adaquant(model, x, 2, 3, iters=150)(task.test.x), reference).item(),
        }
    assert losses["sequential"] < 0.7 * losses["minmax"]


def test_bits_can_be_set_layer_by_layer(model, x):
    quantized = adaquant(model, x, 4, 4, iters=0, bits={"model.0": (8, 8), "model.11": (8, None)})
    assert {name: layer.bits for name, layer in quantized_layers(quantized).items()} == {
        "model.0": (8, 8),
        "model.3": (4, 4),
        "model.6": (4, 4),
        "model.11": (8, None),
    }
    assert quantized_layers(quantized)["model.3"].bias_bits == 8
    assert quantized_layers(quantized)["model.11"].bias_bits is None
    with pytest.raises(InvalidInput, match=r"no layer 'model\.99'"):
        adaquant(model, x, bits={"model.99": (8, 8)})


def test_bias_is_on_a_grid_of_the_summed_bits(model, x):
    layer = quantized_layers(plain(model, x, (2, 2))[0])["model.3"]
    assert len(layer.quantized_bias().unique()) <= 2**4
    assert (layer.quantized_bias() - layer.bias).abs().max() <= (layer.bias.max() - layer.bias.min().clamp(max=0)) / 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_the_model_and_the_model_is_untouched(model, x, dtype):
    net = copy.deepcopy(model).to(dtype)
    before = copy.deepcopy(net.state_dict())
    quantized = adaquant(net, x.to(dtype), 3, 3, iters=5)
    assert quantized(x.to(dtype)).dtype == dtype
    assert all(parameter.dtype == dtype for parameter in quantized.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_loaders_of_batches_and_bad_calibration_data(model, x, task):
    batches = list(zip(x.split(50), task.valid.labels.split(50)))
    assert state_equal(adaquant(model, batches, iters=3), adaquant(model, x, iters=3))
    for empty in ([], x[:0]):
        with pytest.raises(InvalidInput, match="loader is empty"):
            adaquant(model, empty)
    with pytest.raises(InvalidInput, match="NaN"):
        adaquant(model, x / 0.0)
    with pytest.raises(InvalidInput, match="mode must be one of"):
        adaquant(model, x, mode="both")  # type: ignore[arg-type]

    class Overflows(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(torch.log(x))

    with pytest.raises(InvalidInput, match="inputs of layer 'fc' hold NaN"):
        layer_inputs(Overflows(), "fc", torch.zeros(3, 2))


# --- allocation


OPTIONS = ((8, 8), (4, 4), (2, 2))
EXAMPLE = SensitivityTable(
    ("a", "b", "c"), OPTIONS, np.array([[0, 0.3, 2.0], [0, 0.1, 0.6], [0, 0.2, 1.5]]), np.array([100, 400, 200])
)


@pytest.mark.parametrize(
    ("compression", "bits", "loss", "size"),
    [
        (0.25, (8, 8, 8), 0.0, 5600),
        (0.15, (8, 4, 4), 0.3, 3200),
        (0.13, (4, 4, 4), 0.6, 2800),
        (0.10, (4, 2, 4), 1.1, 2000),
        (0.0625, (2, 2, 2), 4.1, 1400),
    ],
)
def test_worked_example_of_the_integer_programme(compression, bits, loss, size):
    found = allocate_bits(EXAMPLE, compression)
    assert tuple(weights for weights, _ in found.bits.values()) == bits
    assert found.loss == pytest.approx(loss, abs=1e-12)
    assert found.size_bits == found.cost == size


def brute_force(table, budget):
    costs, _ = table.costs("size")
    best = None
    for picked in itertools.product(range(len(table.options)), repeat=len(table.layers)):
        rows = np.arange(len(picked))
        cost, loss = costs[rows, picked].sum(), table.degradation[rows, picked].sum()
        if cost > budget:
            continue
        key = (round(float(loss), 9), int(cost), tuple(-table.options[k][0] for k in picked))
        best = key if best is None or key < best else best
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("ties", [False, True])
def test_programme_equals_brute_force_with_the_tie_rule(seed, ties):
    rng = np.random.default_rng(seed)
    layers = 8 if seed % 4 == 0 else 5
    params = rng.integers(1, 4, layers) * 50 if ties else rng.integers(20, 2000, layers)
    drop = rng.integers(1, 4, (layers, 2)) * 0.1 if ties else rng.exponential(size=(layers, 2))
    table = SensitivityTable(
        tuple(f"layer{i}" for i in range(layers)),
        OPTIONS,
        np.concatenate([np.zeros((layers, 1)), drop.cumsum(1)], 1),
        params,
    )
    for compression in (0.09, 0.13, 0.19):
        found = allocate_bits(table, compression)
        expected = brute_force(table, int(np.floor(compression * 32 * params.sum() * (1 + 1e-12))))
        assert expected is not None
        assert found.loss == pytest.approx(expected[0], abs=1e-8)
        assert found.size_bits == expected[1]
        assert tuple(-weights for weights, _ in found.bits.values()) == expected[2]


def test_dual_budget_and_bit_operations():
    found = allocate_bits(EXAMPLE, max_degradation=0.3)
    assert (found.size_bits, found.loss) == (3200, pytest.approx(0.3))
    table = SensitivityTable(EXAMPLE.layers, OPTIONS, EXAMPLE.degradation, EXAMPLE.params, np.array([9000, 100, 100]))
    found = allocate_bits(table, 16 / 1024 * 1.1, cost="bops")
    assert found.bits["a"] == (4, 4)  # the layer of most work pays, though it is the most sensitive
    assert found.cost <= 16 / 1024 * 1.1 * 1024 * 9200
    with pytest.raises(InvalidInput, match="needs the MACs"):
        allocate_bits(EXAMPLE, 0.1, cost="bops")


def test_budgets_that_cannot_be_met():
    with pytest.raises(InvalidInput, match=r"a compression of 0\.0625"):
        allocate_bits(EXAMPLE, 0.05)
    with pytest.raises(InvalidInput, match="max_degradation -1 cannot be reached"):
        allocate_bits(EXAMPLE, max_degradation=-1.0)
    with pytest.raises(InvalidInput, match="exactly one"):
        allocate_bits(EXAMPLE)
    with pytest.raises(InvalidInput, match="exactly one"):
        allocate_bits(EXAMPLE, 0.1, 0.1)
    with pytest.raises(InvalidInput, match="compression must lie"):
        allocate_bits(EXAMPLE, 1.5)


def test_sensitivities(model, x, task):
    table = layer_sensitivities(model, x)
    assert table.layers == read_layout(model).layers and table.options == ((2, 2), (4, 4), (8, 8))
    assert table.degradation.min() == 1e-6 and (table.degradation[:, 2] == 1e-6).all()
    assert table.degradation[:, 0].sum() > 10 * table.degradation[:, 1].sum()
    assert table.params.tolist() == [72, 864, 1296, 120]
    assert table.macs is not None and table.macs.tolist() == [72 * 64, 864 * 16, 1296 * 16, 120]
    tuned: dict[Any, nn.Module] = {(2, 2): adaquant(model, x, 2, 2, "parallel", iters=100)}
    better = layer_sensitivities(model, x, tuned=tuned)
    assert better.degradation[:, 0].sum() < table.degradation[:, 0].sum()
    labelled = [(x, task.valid.labels)]
    assert layer_sensitivities(model, labelled, loss="ce").degradation.shape == (4, 3)
    with pytest.raises(InvalidInput, match="needs labels"):
        layer_sensitivities(model, x, loss="ce")
    with pytest.raises(InvalidInput, match="must contain the base"):
        layer_sensitivities(model, x, options=(2, 4))


# --- statistics and biases


def test_rebatchnorm_starts_as_the_identity():
    gamma, beta = torch.tensor([1.5, -0.7, 0.01]), torch.tensor([0.3, -2.0, 0.0])
    y = torch.randn(50, 3, 4, 4, generator=generator())
    assert torch.allclose(rebatchnorm(y, beta, gamma.square(), beta, gamma.abs()), y, atol=1e-6)


@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (2, 8)])
def test_statistics_of_the_tuned_model_are_those_of_training(model, x, bits):
    quantized, _ = plain(model, x, bits, quantize_bias=False)
    tuned = tune_statistics(quantized, x, prior=0.0)
    before, after = quantized_layers(quantized), quantized_layers(tuned)
    checked = 0
    for name, layer in after.items():
        assert torch.equal(
            layer.weight_quantizer.codes(layer.weight), before[name].weight_quantizer.codes(before[name].weight)
        )
        if layer.out_std is None or layer.out_mean is None:
            continue
        rows = layer(torch.cat(layer_inputs(tuned, name, x))).double().transpose(0, 1).flatten(1)
        alive = rows.var(1, correction=0) > 1e-3 * layer.out_std.square()
        checked += int(alive.sum())
        assert torch.allclose(rows.mean(1)[alive], layer.out_mean.double()[alive], atol=1e-4)
        variance = rows.var(1, correction=0)[alive]
        assert torch.allclose(variance, layer.out_std.double().square()[alive], rtol=1e-4)
    assert checked >= 28  # of 32 channels, negative gammas among them
    assert bool((model.model[1].weight < 0).any())


def test_constant_channels_keep_their_factor():
    first = nn.Linear(4, 2, bias=False)
    net = nn.Sequential(first, nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        first.weight[0] = 0.0
    data = torch.randn(64, 4, generator=generator())
    tuned = tune_statistics(plain(net, data)[0], data, prior=0.0)
    assert all(bool(torch.isfinite(value).all()) for value in tuned.state_dict().values())
    assert bool((quantized_layers(tuned)["0"].weight[0] == 0).all())


def test_the_prior_shrinks_the_correction_and_momentum_averages(model, x):
    quantized, _ = plain(model, x, (2, 3), quantize_bias=False)
    layer = {
        prior: quantized_layers(tune_statistics(quantized, x, prior=prior))["model.0"] for prior in (0.0, 128.0, 1e9)
    }
    start = quantized_layers(quantized)["model.0"]
    assert torch.allclose(layer[1e9].bias, start.bias, atol=1e-4)
    moved = [(layer[prior].bias - start.bias).norm() for prior in (1e9, 128.0, 0.0)]
    assert moved[0] < moved[1] < moved[2]
    averaged = tune_statistics(quantized, x, passes=40, momentum=0.1, prior=0.0, batch_size=128)
    assert torch.allclose(quantized_layers(averaged)["model.0"].bias, layer[0.0].bias, atol=5e-2)


def test_statistics_need_a_folded_batchnorm(x):
    net = seeded_build(lambda: mlp((1, 8, 8), 10, hidden=(16,)), generator())
    with pytest.raises(Refused, match="no quantized layer with a folded batch-norm"):
        tune_statistics(plain(net, x)[0], x)


def test_bias_tuning_moves_biases_only_and_helps(model, x):
    quantized, folded = plain(model, x, (3, 3))
    tuned = tune_biases(quantized, folded, x, epochs=2, lr=5e-3, generator=generator())
    changed = {
        name for name, value in tuned.state_dict().items() if not torch.equal(value, quantized.state_dict()[name])
    }
    assert changed and all(name.endswith("layer.bias") for name in changed)
    with torch.no_grad():
        assert distillation_loss(tuned(x), folded(x)) < distillation_loss(quantized(x), folded(x))
    assert all(parameter.requires_grad for parameter in tuned.parameters())
    ranged = tune_biases(quantized, folded, x, epochs=3, repeats=1, ranges=True)
    assert any(
        "quantizer" in n and not torch.equal(v, quantized.state_dict()[n]) for n, v in ranged.state_dict().items()
    )


# --- pipelines, export, treatment


@pytest.mark.parametrize("kind", ["light", "advanced"])
def test_pipelines_only_get_closer_to_the_float_model(model, x, kind, task):
    report = calibrate_pipeline(model, x, kind, bits_w=2, bits_a=3, iters=80, generator=generator())
    kept = [value for stage, value in report.stages.items() if report.kept[stage]]
    assert kept == sorted(kept, reverse=True) and len(kept) > 1
    assert list(report.stages) == (
        ["minmax", "statistics"] if kind == "light" else ["minmax", "adaquant", "statistics", "biases"]
    )
    with torch.no_grad():
        start = distillation_loss(plain(model, x, (2, 3))[0](task.test.x), model(task.test.x))
        assert distillation_loss(report.model(task.test.x), model(task.test.x)) < start


@pytest.mark.parametrize("kind", ["light", "advanced"])
def test_mixed_bits_meet_the_size_that_is_reported(model, x, kind):
    report = calibrate_pipeline(model, x, kind, compression=0.13, iters=10, bias_epochs=1, generator=generator())
    assert report.allocation is not None and report.sensitivities is not None
    export = export_quantized(report.model)
    sizes = dict(zip(report.sensitivities.layers, report.sensitivities.params))
    assert report.allocation.size_bits == sum(sizes[name] * bits[0] for name, bits in report.bits.items())
    assert export.weight_bytes == report.weight_bytes == sum(-(-sizes[n] * b[0] // 8) for n, b in report.bits.items())
    assert report.weight_bytes <= 0.13 * report.float_weight_bytes
    assert {name: layer.bits for name, layer in quantized_layers(report.model).items()} == dict(report.bits)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8, 16])
def test_packing_is_exact(bits):
    codes = torch.randint(2**bits, (7, 3, 5), generator=generator(bits))
    packed = pack(codes, bits)
    assert packed.numel() == -(-7 * 3 * 5 * bits // 8)
    assert torch.equal(unpack(packed, bits, (7, 3, 5)), codes)


def test_export_goes_through_a_file_into_a_fresh_model(model, x, tmp_path):
    report = calibrate_pipeline(model, x, "light", bits_w=3, bits_a=4)
    export = export_quantized(report.model)
    save_file(dict(export.tensors), str(tmp_path / "packed.safetensors"))
    read = type(export)(load_file(str(tmp_path / "packed.safetensors")), export.bits, export.shapes)
    assert read.total_bytes == export.total_bytes < 0.5 * sum(v.nbytes for v in model.state_dict().values())
    fresh = load_export(rebuild_quantized(seeded_build(cnn, generator(9)).eval(), report.bits), read)
    assert torch.equal(fresh.eval()(x), report.model(x))
    with pytest.raises(InvalidInput, match="no quantized layer"):
        export_quantized(model)


@pytest.mark.parametrize("kind", ["light", "advanced"])
@pytest.mark.parametrize(
    "factory", [cnn, lambda: small_resnet((1, 8, 8), 10, widths=(8, 12)), lambda: mlp((1, 8, 8), 10, hidden=(24,))]
)
def test_treatment_runs_and_its_weights_load_onto_a_fresh_model(task, tmp_path, factory, kind):
    treatment = LayerwiseCalibration(kind=kind, iters=5, bias_epochs=1, samples=40)
    net = seeded_build(factory, generator())
    run = fit(net, task, Training(epochs=1), [treatment])
    again = fit(net, task, Training(epochs=1), [treatment])
    assert state_equal(run.model, again.model)
    assert treatment.bits_ == {}  # the loop works on copies
    save_file(run.model.state_dict(), str(tmp_path / "model.safetensors"))
    done = run.treatments[0]
    structure = json.loads(json.dumps(done.structure()))
    fresh = treatment.rebuild(seeded_build(factory, generator(5)), structure)
    fresh.load_state_dict(load_file(str(tmp_path / "model.safetensors")))
    assert torch.equal(fresh.eval()(task.test.x), run.model(task.test.x))
    json.dumps(treatment.settings())


def test_default_treatment_keeps_the_accuracy(task, model):
    run = LayerwiseCalibration()
    quantized = copy.deepcopy(run).finish(copy.deepcopy(model), task)
    with torch.no_grad():
        right = {
            name: (net(task.test.x).argmax(1) == task.test.labels).double().mean()
            for name, net in (("float", model), ("quantized", quantized))
        }
    assert right["quantized"] >= right["float"] - 0.02


def test_treatment_needs_no_labels_and_refuses_what_it_cannot_do(task, model):
    blind = task.changed(valid=type(task.valid)(task.valid.x))
    LayerwiseCalibration(iters=2, bias_epochs=0).finish(copy.deepcopy(model), blind)
    with pytest.raises(InvalidInput, match="validation inputs, and there are none"):
        LayerwiseCalibration().check(model, task.changed(valid=task.valid.take(slice(0, 0))))
    with pytest.raises(InvalidInput, match="bits_w must lie"):
        LayerwiseCalibration(bits_w=0).check(model, task)
    with pytest.raises(InvalidInput, match="no layer 'nowhere'"):
        LayerwiseCalibration(eight_bit=("nowhere",)).check(model, task)
    with pytest.raises(Refused, match="no convolution or linear layer"):
        LayerwiseCalibration().check(nn.Flatten(), task)


def test_nothing_is_drawn_from_the_global_generator(model, x):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    calibrate_pipeline(model, x, iters=3, bias_epochs=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_options_out_of_reach_are_no_part_of_any_solution_within_the_level() -> None:
    from surefoot.quantization.layerwise_calibration.allocation import _in_reach

    rng = np.random.default_rng(7)
    ruled_out = 0
    for _ in range(40):
        losses, weights = rng.integers(0, 9, (4, 3)) / 4, rng.integers(1, 9, (4, 3)).astype(float)
        budget = float(weights.min(1).sum() + rng.integers(0, 9))
        choices = [c for c in itertools.product(range(3), repeat=4) if weights[range(4), list(c)].sum() <= budget]
        best = min(losses[range(4), list(c)].sum() for c in choices)
        kept = _in_reach(losses, weights, budget, np.ones((4, 3), dtype=bool), best)
        ruled_out += int((~kept).sum())
        for c in choices:
            if losses[range(4), list(c)].sum() <= best:
                assert kept[range(4), list(c)].all()
    assert ruled_out > 100
