"""CrossMax: worked aggregation, invariances and ties, the stochastic input, layer taps on unlike networks, both evaluations."""

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from surefoot.adversarial import crossmax as cm
from surefoot.adversarial.crossmax.ensemble import Probe
from surefoot.adversarial.crossmax.inputs import roll
from surefoot.core.task import Split, Task, Training
from surefoot.errors import InvalidInput, Refused
from surefoot.models import Normalized
from surefoot.models.networks import mlp, seeded_build, small_cnn, small_resnet
from surefoot.nn.taps import layer_names, spread, tapped
from surefoot.training.loop import fit

Z = torch.tensor([[[3.0, 1, 0], [2, 2.5, 0], [9, 0, 1], [0, 1, 0.5]]])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def net(seed=0, build=lambda: small_cnn((1, 8, 8), 4, widths=(4, 6, 6), linear=8)):
    return seeded_build(build, rng(seed)).eval()


def blobs(n=160, seed=0):
    y = torch.arange(n) % 4
    centres = torch.rand(4, 1, 8, 8, generator=rng(9))
    return (centres[y] + 0.1 * torch.randn(n, 1, 8, 8, generator=rng(seed))).clamp(0, 1), y


# --- aggregation ----------------------------------------------------------------------------------------------------


def test_worked_example():
    assert torch.equal(cm.crossmax(Z), torch.tensor([[-0.25, -1.0, -2.25]]))
    assert torch.equal(cm.crossmax(Z, k=3), torch.tensor([[-0.5, -2.0, -2.5]]))
    assert cm.crossmax(Z).argmax() == 0
    moved = Z.transpose(0, 1)
    assert torch.equal(cm.crossmax(moved, dim=0), cm.crossmax(Z))


def plain_reference(z, k):
    """Loops over numbers, in the order of the paper."""
    out = []
    for sample in z.tolist():
        rows = [[v - max(row) for v in row] for row in sample]
        top = [max(row[c] for row in rows) for c in range(len(rows[0]))]
        columns = [sorted((row[c] - top[c] for row in rows), reverse=True) for c in range(len(top))]
        n = len(rows)
        out.append(
            [c[k - 1] if k != "median" else (c[n // 2] if n % 2 else (c[n // 2 - 1] + c[n // 2]) / 2) for c in columns]
        )
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize(("count", "k"), [(3, "median"), (4, "median"), (8, 3), (8, 1), (5, 5)])
def test_matches_a_plain_reference(count, k):
    z = 3 * torch.randn(50, count, 6, generator=rng(count))
    assert torch.allclose(cm.crossmax(z, k=k).double(), plain_reference(z.double(), k), atol=1e-5)


def test_planted_mistakes_give_other_numbers():
    swapped = Z - Z.amax(1, keepdim=True)
    swapped = swapped - swapped.amax(2, keepdim=True)
    assert not torch.equal(swapped.median(1).values, cm.crossmax(Z))  # the two subtractions the other way round
    assert not torch.equal(cm.crossmax(Z.softmax(2)), cm.crossmax(Z))  # softmax first
    z = Z - Z.amax(2, keepdim=True)
    z = z - z.amax(1, keepdim=True)
    assert not torch.equal((-z).topk(3, 1).values[:, 2].neg(), cm.crossmax(Z, k=3))  # third smallest
    assert not torch.equal(z.median(1).values, cm.crossmax(Z))  # torch's median is the lower of the middle two


def test_invariances():
    z = torch.randn(40, 6, 5, generator=rng(), dtype=torch.float64)
    out, order, classes = cm.crossmax(z), torch.randperm(6, generator=rng(1)), torch.randperm(5, generator=rng(2))
    assert torch.allclose(cm.crossmax(z + torch.randn(40, 6, 1, generator=rng(3), dtype=torch.float64)), out)
    assert torch.equal(cm.crossmax(z[:, order]), out) and torch.equal(cm.crossmax(z[:, :, classes]), out[:, classes])
    louder = z.clone()
    louder[:, 0] *= 5
    assert not torch.allclose(cm.crossmax(louder), out)


def test_columns_have_their_zeros():
    z = torch.randn(40, 6, 5, generator=rng())
    step = z - z.amax(2, keepdim=True)
    step = step - step.amax(1, keepdim=True)
    assert (step <= 0).all() and (step == 0).any(1).all()
    assert (cm.crossmax(z, k=1) == 0).all()  # hence k = 1 is a tie of all classes


@pytest.mark.parametrize("k", ["median", 2, 3])
def test_one_extreme_predictor_moves_nothing(k):
    g, cases = rng(4), 1000
    z = torch.randn(cases, 5, 6, generator=g)
    best = torch.randint(6, (cases,), generator=g)
    z.scatter_(2, best[:, None, None].expand(-1, 5, 1), 6.0)
    rival = (best + 1 + torch.randint(5, (cases,), generator=g)) % 6
    z[torch.arange(cases), 2, rival] = 1e6
    assert (cm.crossmax(z, k=k).argmax(1) == best).all()
    assert (z.mean(1).argmax(1) != best).all()  # planted mistake: plain averaging of logits


def test_ties_are_told_and_broken():
    same = torch.randn(8, 1, 5, generator=rng()).expand(8, 4, 5)
    values, tie = cm.crossmax(same, return_ties=True)
    assert tie.all() and (values == 0).all()  # predictors that agree say nothing
    broken = cm.break_ties(values, same)
    assert torch.equal(broken.argmax(1), same[:, 0].argmax(1)) and torch.allclose(broken, values, atol=1e-6)
    z = torch.randn(20_000, 8, 10, generator=rng(1))
    values, tie = cm.crossmax(z, k=3, return_ties=True)
    assert abs(tie.double().mean().item() - 0.02) < 0.004  # 2 in 100 of random draws, ten classes
    assert torch.equal(cm.break_ties(values, z)[~tie], values[~tie])


def test_gradient_is_sparse_and_the_surrogates_is_not():
    z = torch.randn(1, 8, 10, generator=rng(), requires_grad=True)
    sparse = torch.autograd.grad(cm.crossmax(z, k=3)[0, 0], z)[0]
    dense = torch.autograd.grad(cm.mean_log_probs(z)[0, 0], z)[0]
    assert (sparse != 0).sum() <= 4 and (dense != 0).sum() == 80


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cm.crossmax(Z[:, :2]), "at least 3 predictors"),
        (lambda: cm.crossmax(Z, k=5), "exceed the 4 predictors"),
        (lambda: cm.crossmax(Z, k=0), "k must be"),
        (lambda: cm.crossmax(Z, dim=-1), "classes come last"),
        (lambda: cm.crossmax(Z.long()), "floating"),
        (lambda: cm.MultiResolutionInput((0,)), "resolutions"),
        (lambda: cm.MultiResolutionInput((16,))(torch.rand(1, 1, 8, 8)), "larger than the image"),
        (lambda: cm.MultiResolutionInput((8,))(2 * torch.ones(1, 1, 8, 8)), "must lie in"),
        (lambda: cm.MultiResolutionInput((8,))(torch.rand(4, 64)), "floating .B, C, H, W"),
        (lambda: cm.MultiResolutionInput((8,), grey=(0.5, 1.2)), "grey"),
        (lambda: cm.MultiResolutionInput((8,), noise="salt"), "noise"),  # type: ignore[arg-type]
        (lambda: cm.SelfEnsemble(net(), ["2"], 4, example=torch.rand(2, 1, 8, 8)), "2 layers beside the head"),
        (lambda: cm.SelfEnsemble(net(), ["2", "nine"], 4, example=torch.rand(2, 1, 8, 8)), "no layer 'nine'"),
        (lambda: cm.SelfEnsemble(net(), ["2", "5"], 4, example=torch.rand(2, 1, 8, 8), k=4), "k must lie"),
        (lambda: cm.SelfEnsemble(net(), ["2", "5"], 7, example=torch.rand(2, 1, 8, 8)), "logits"),
    ],
)
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()


# --- the stochastic input -------------------------------------------------------------------------------------------


def still(sizes, **changes):
    options = {"down_noise": 0.0, "up_noise": 0.0, "jitter": 0, "contrast": (1.0, 1.0), "grey": (1.0, 1.0)}
    return cm.MultiResolutionInput(sizes, **{**options, **changes})


def test_shape_range_and_seed():
    x = torch.rand(5, 3, 16, 12, generator=rng())
    made = [cm.MultiResolutionInput((16, 8, 4), generator=rng(1))(x) for _ in range(2)]
    assert made[0].shape == (5, 9, 16, 12) and made[0].min() >= 0 and made[0].max() <= 1
    assert torch.equal(*made)
    layer = cm.MultiResolutionInput((16, 8), generator=rng(1)).eval()
    assert not torch.equal(layer(x), layer(x))  # fresh in evaluation too
    assert layer(x.double()).dtype == torch.float64


def test_nothing_altered_gives_exact_copies():
    x = torch.rand(3, 3, 8, 8, generator=rng())
    assert torch.allclose(still((8, 8, 8))(x), x.repeat(1, 3, 1, 1), atol=1e-6)
    small = still((4,))(x)
    low = nn.functional.interpolate(x, size=(4, 4), mode="bicubic")
    assert torch.allclose(small, nn.functional.interpolate(low, size=(8, 8), mode="bicubic").clamp(0, 1), atol=1e-6)


def test_each_alteration_alone():
    x = torch.rand(4, 3, 8, 8, generator=rng()) * 0.2 + 0.4
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    mean = (x * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    assert torch.allclose(still((8,), contrast=(1.5, 1.5))(x), 1.5 * (x - mean) + mean, atol=1e-6)
    assert torch.allclose(still((8,), grey=(0.5, 0.5))(x), 0.5 * x + 0.5 * x.mean(1, keepdim=True), atol=1e-6)
    added = still((8,), up_noise=0.2, generator=rng(1))(x) - x
    assert added.min() >= 0 and added.max() <= 0.2 and abs(added.mean() - 0.1) < 0.01  # one-sided
    added = still((8,), up_noise=0.05, noise="normal", generator=rng(1))(x) - x
    assert abs(added.mean()) < 0.01 and abs(added.std() - 0.05) < 0.005


def test_notebook_contrast_equals_the_grey_weight():
    x = torch.rand(4, 1, 8, 8, generator=rng())
    made = still((8,), contrast=(2.0, 2.0), grey=(0.5, 0.5), compat=True)(x)
    assert torch.allclose(
        made, 0.5 * (x - x.mean((1, 2, 3), keepdim=True)) + x.mean((1, 2, 3), keepdim=True), atol=1e-6
    )


@pytest.mark.parametrize("shape", [(6, 3, 8, 8), (6, 1, 7, 11)])
def test_every_image_rolls_by_itself(shape):
    x = torch.rand(*shape, generator=rng(), requires_grad=True)
    shift = torch.randint(-3, 4, (6, 2), generator=rng(1))
    made = roll(x, shift)
    loop = torch.stack([torch.roll(image, tuple(s.tolist()), (-2, -1)) for image, s in zip(x, shift)])
    assert torch.equal(made, loop)
    weight = torch.rand(shape, generator=rng(2))
    ours, slow = (torch.autograd.grad((weight * out).sum(), x)[0] for out in (made, loop))
    assert torch.allclose(ours, slow)
    shifts = {tuple(s.tolist()) for s in (cm.MultiResolutionInput((8,), jitter=1)._draw(torch.rand, (500, 2), x) * 3).floor().long() - 1}  # fmt: skip
    assert len(shifts) == 9


def test_images_of_a_batch_are_altered_independently():
    x = torch.rand(1, 1, 8, 8, generator=rng()).expand(50, 1, 8, 8)
    made = still((8,), contrast=(0.5, 1.0), jitter=2, generator=rng(3))(x)
    assert len({tuple(m.flatten().tolist()) for m in made}) == 50
    alone = [still((8,), contrast=(0.5, 1.0), generator=rng(k))(x[:1]) for k in range(50)]
    spread_alone, spread_batch = (torch.cat(alone).std((1, 2, 3)).std(), made.std((1, 2, 3)).std())
    assert 0.5 < spread_alone / spread_batch < 2


def test_global_stream_is_the_callers_when_a_generator_is_given():
    state = torch.get_rng_state()
    cm.MultiResolutionInput((8, 4), generator=rng())(torch.rand(2, 1, 8, 8, generator=rng()))
    assert torch.equal(state, torch.get_rng_state())


# --- widening -------------------------------------------------------------------------------------------------------


def test_tiled_kernel_keeps_the_function():
    x = torch.rand(4, 3, 8, 8, generator=rng())
    model = Normalized(
        net(0, lambda: small_resnet((3, 8, 8), 4, widths=(4, 8))), [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    ).eval()
    wide: Any = cm.widen_first_conv(model, 3)
    assert torch.allclose(wide(x.repeat(1, 3, 1, 1)), model(x), atol=1e-5)
    fresh: Any = cm.widen_first_conv(model, 3, generator=rng(1))
    again: Any = cm.widen_first_conv(model, 3, generator=rng(1))
    first = fresh.model[0].weight
    assert (
        first.shape[1] == 9 and first.abs().max() <= 1 / math.sqrt(81) and not torch.equal(first, wide.model[0].weight)
    )
    assert torch.equal(fresh.model[0].weight, again.model[0].weight)


@pytest.mark.parametrize(
    "build", [lambda: mlp((1, 8, 8), 4), lambda: nn.Flatten(), lambda: nn.Conv2d(2, 4, 3, groups=2)]
)
def test_only_a_convolution_can_be_widened(build):
    with pytest.raises(Refused):
        cm.widen_first_conv(build(), 3)


# --- the ensemble ---------------------------------------------------------------------------------------------------


class TinyViT(nn.Module):
    def __init__(self, width=16, classes=4):
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, 2, 32, 0.1, batch_first=True) for _ in range(2))
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.blocks(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize(
    "build",
    [
        lambda: small_cnn((1, 8, 8), 4, widths=(4, 6, 6)),
        lambda: small_resnet((1, 8, 8), 4, widths=(4, 8, 8)),
        lambda: mlp((1, 8, 8), 4, hidden=(16, 16, 16)),
        TinyViT,
    ],
)
def test_any_network_becomes_an_ensemble(build):
    model, x = net(0, build), torch.rand(6, 1, 8, 8, generator=rng())
    layers = spread(layer_names(model, x), 3)
    ensemble = seeded_build(lambda: cm.SelfEnsemble(model, layers, 4, example=x), rng(1)).eval()
    predictors = ensemble.predictors(x)
    assert predictors.shape == (6, len(layers) + 1, 4) and torch.allclose(predictors[:, -1], model(x), atol=1e-5)
    assert torch.equal(ensemble(x), cm.crossmax(predictors))
    assert torch.equal(ensemble.aggregated_by(cm.mean_log_probs)(x), cm.mean_log_probs(predictors))
    assert torch.equal(ensemble(x), cm.crossmax(predictors))  # the sibling did not change this one
    _, features = tapped(model, layers, x)
    probe = ensemble.probes[0]
    assert isinstance(probe, Probe)
    assert torch.allclose(predictors[:, 0], probe.linear(probe.norm(features[0].flatten(1))), atol=1e-5)


def test_large_maps_are_averaged_before_they_are_flattened():
    model, x = net(0, lambda: small_cnn((1, 32, 32), 4, widths=(4, 6, 6))), torch.rand(2, 1, 32, 32)
    ensemble = cm.SelfEnsemble(model, ["2", "5"], 4, example=x, max_features=256)
    assert all(isinstance(p, Probe) and p.linear.in_features <= 256 for p in ensemble.probes) and ensemble.eval()(
        x
    ).shape == (2, 4)


def test_probes_learn_and_the_backbone_does_not_move():
    x, y = blobs()
    model = net()
    ensemble = seeded_build(lambda: cm.SelfEnsemble(model, ["2", "5", "12"], 4, example=x), rng(1))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    losses = cm.fit_probes(ensemble, x, y, epochs=8, lr=1e-2, batch_size=32, generator=rng(2))
    assert losses[-1] < 0.7 * losses[0] and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in ensemble.parameters())
    ensemble.train()
    assert not model.training and ensemble.probes[0].training


# --- the treatment and its evaluation -------------------------------------------------------------------------------


def task():
    x, y = blobs(200, 1)
    return Task("blobs", Split(x[:120], y[:120]), Split(x[120:140], y[120:140]), Split(x[140:], y[140:]), 4, seed=5)


TRAINING = Training(epochs=15, lr=1e-2, batch_size=32)


@pytest.fixture(scope="module")
def trained():
    data, model = task(), net(3).train()
    runs = {
        m: fit(model, data, TRAINING, [cm.CrossMax(layers=3, multi_resolution=m, probe_lr=1e-2)]) for m in (True, False)
    }
    return data, model, runs


def test_treatment_classifies_and_loads(trained):
    data, model, runs = trained
    x, y = data.test.x, data.test.labels
    for multi, run in runs.items():
        method = run.treatments[0]
        again = cm.CrossMax(layers=3, multi_resolution=multi)
        loaded = again.rebuild(copy.deepcopy(model), json.loads(json.dumps(method.structure())))
        loaded.load_state_dict(run.model.state_dict())
        first = run.model(x)
        assert torch.equal(first, loaded.eval()(x)) and (first.argmax(1) == y).double().mean() > 0.8
        assert torch.equal(first, run.model(x)) is not multi  # random exactly where inputs are drawn


def test_both_evaluations_stand_side_by_side(trained):
    data, _, runs = trained
    x, y = data.test.x[:24], data.test.labels[:24]
    report = cm.evaluate_crossmax(
        runs[True].model,
        x,
        y,
        eps=0.1,
        steps=4,
        eot=2,
        adaptive_steps=3,
        queries=20,
        draws=5,
        masking=8,
        components=(runs[False].model,),
        generator=rng(),
    )
    found = report.accuracies
    assert list(found) == ["clean", "PGD", "APGD", "rand suite", "square", "adaptive", "all together"]
    assert found["all together"] <= min(list(found.values())[:-1]) and report.overstated == pytest.approx(
        found["PGD"] - found["all together"]
    )
    stages = {"pipeline", "surrogate", "component 0", "component 1", "long", "square"}  # the head, then the one given
    assert stages <= set(report.adaptive.survivors) and "component 2" not in report.adaptive.survivors
    assert report.rand_suite.decision == "majority" and report.adaptive.draws == 5
    assert "survive everything" in report.sentence and len(report.chart().figure["data"][0]["x"]) == 7
    assert isinstance(report.masking_flags, tuple)


def test_order_statistics_mask_what_the_surrogate_finds(trained):
    """The cleanest demonstration: no randomness, and still the transfer of a smooth attack beats the attack on the real thing."""
    data, _, runs = trained
    x, y = torch.cat([data.test.x, data.train.x]), torch.cat([data.test.labels, data.train.labels])
    report = cm.evaluate_crossmax(
        runs[False].model, x, y, eps=0.12, steps=5, adaptive_steps=10, queries=20, masking=0, generator=rng()
    )
    found = report.accuracies
    assert found["adaptive"] < found["PGD"] and report.rand_suite.draws >= 1


def test_pixel_optimize_paints_the_class(trained):
    _, _, runs = trained
    target = torch.arange(4)
    made = cm.pixel_optimize(runs[True].model, target, shape=(1, 8, 8), steps=30, generator=rng())
    assert made.shape == (4, 1, 8, 8) and made.min() >= 0 and made.max() <= 1
    smooth = runs[False].model.aggregated_by(cm.mean_log_probs)
    assert torch.equal(smooth(cm.pixel_optimize(smooth, target, shape=(1, 8, 8), steps=60)).argmax(1), target)
    start = torch.full((4, 1, 8, 8), 0.5)
    near = cm.pixel_optimize(runs[False].model, target, shape=(1, 8, 8), start=start, eps=0.05, steps=5)
    assert (near - start).abs().max() <= 0.05 + 1e-6
    with pytest.raises(InvalidInput, match="resolutions"):
        cm.pixel_optimize(runs[False].model, target, shape=(1, 8, 8), resolutions=(16,))


def test_treatment_refuses_what_it_cannot_use():
    data = task()
    with pytest.raises(Refused, match="first layer"):
        fit(mlp((1, 8, 8), 4), data, TRAINING, [cm.CrossMax()])
    with pytest.raises(Refused, match="two hidden layers"):
        fit(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 4)), data, TRAINING, [cm.CrossMax()])
    with pytest.raises(Refused, match=r"images .C, H, W."):
        fit(net(), data.changed(bounds=(-1.0, 1.0)), TRAINING, [cm.CrossMax()])
    fixed = nn.Sequential(nn.BatchNorm2d(1), *net().children())
    with pytest.raises(InvalidInput, match="widened network"):
        fit(fixed, data, TRAINING, [cm.CrossMax()])
    bad: list[Any] = [{"layers": 1}, {"k": 9}, {"noise": -1.0}]
    for changes in bad:
        with pytest.raises(InvalidInput):
            cm.CrossMax(**changes)
