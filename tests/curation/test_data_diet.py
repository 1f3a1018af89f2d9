"""Data diet: scores against hand calculation and the single-example loop, guards, and the treatment's contracts."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from surefoot.core.task import Split, Training
from surefoot.curation.data_diet import (
    DataDiet,
    ForgettingTracker,
    ScoreReport,
    el2n_scores,
    gradient_norms,
    grand_scores,
    layer_norms,
    loop_norms,
    rank_correlation,
    score,
    score_runs,
    vmap_norms,
    weight_hash,
)
from surefoot.curation.data_diet.gradients import pick_engine
from surefoot.curation.data_diet.report import apportion
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput, Refused
from surefoot.models import seeded_build, small_cnn, small_resnet
from surefoot.training.loop import fit


class Logits(nn.Module):
    """Returns its input as logits (times a trainable one)."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale


class Tied(nn.Module):
    """One linear layer applied twice, and its weight used once more by hand."""

    def __init__(self, by_hand):
        super().__init__()
        self.inner, self.head, self.by_hand = nn.Linear(6, 6), nn.Linear(6, 4), by_hand

    def forward(self, x):
        x = torch.tanh(self.inner(torch.tanh(self.inner(x))))
        return self.head(F.linear(x, self.inner.weight) if self.by_hand else x)


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.mix = nn.Embedding(11, 6, padding_idx=0), nn.LayerNorm(6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(F.gelu(self.mix(self.norm(self.embed(x)))).mean(1))


def build(factory, seed=0, dtype=torch.float64):
    model = seeded_build(factory, torch.Generator().manual_seed(seed)).to(dtype)
    source = torch.Generator().manual_seed(seed + 1)
    for module in model.modules():  # statistics as after training, so that evaluation mode differs from training mode
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=source))
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=source) + 0.5)
    return model


def batch(n, *shape, classes=10, seed=0, dtype=torch.float64):
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=source, dtype=dtype)
    return x, torch.randint(classes, (n,), generator=source)


def odd():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, dilation=2, groups=3), nn.GroupNorm(2, 6), nn.ReLU(inplace=True),
        nn.Flatten(2), nn.LayerNorm(16), nn.Linear(16, 5), nn.Flatten(), nn.Linear(30, 10),
    )  # fmt: skip


def conv1d():
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 10)
    )  # fmt: skip


MODELS = {
    "cnn with batch norm": (lambda: small_cnn((3, 8, 8), 10, widths=(4, 6)), (3, 8, 8)),
    "residual": (lambda: small_resnet((3, 8, 8), 10, widths=(4, 6)), (3, 8, 8)),
    "groups, dilation, group and layer norm": (odd, (3, 9, 9)),
    "one-dimensional": (conv1d, (2, 12)),
    "shared layer": (lambda: Tied(False), (6,)),
}


# Exact values -----------------------------------------------------------------------------------------------------------


def test_el2n_known_values():
    logits = torch.tensor([[0.0] * 10, [200.0] + [0.0] * 9, [0.0] + [200.0] + [0.0] * 8], dtype=torch.float64)
    scores = el2n_scores(Logits(), Split(logits, torch.zeros(3, dtype=torch.int64))).scores
    torch.testing.assert_close(
        scores, torch.tensor([0.948683, 0.0, math.sqrt(2)], dtype=torch.float64), atol=1e-6, rtol=0
    )
    x, y = batch(200, 10)
    scores = el2n_scores(Logits(), Split(9 * x, y)).scores
    assert scores.min() >= 0
    assert scores.max() <= math.sqrt(2)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_softmax_grand_is_el2n_times_input_length(bias):
    model = build(lambda: nn.Linear(7, 5, bias=bias))
    x, y = batch(40, 7, classes=5)
    data = Split(x, y)
    expected = el2n_scores(model, data).scores * (x.square().sum(1) + float(bias)).sqrt()
    for mode in ("full", "last_layer"):
        torch.testing.assert_close(grand_scores(model, data, mode=mode).scores, expected)


def test_at_zero_weights_grand_is_a_function_of_the_input_norm():
    model = nn.Linear(7, 5).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    x, y = batch(60, 7, classes=5)
    report = grand_scores(model, Split(x, y))
    torch.testing.assert_close(report.scores, math.sqrt(0.8) * (x.square().sum(1) + 1).sqrt())
    assert report.norm_correlation == pytest.approx(1.0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_full_grand_equals_the_loop(name, dtype, tolerance):
    factory, shape = MODELS[name]
    model = build(factory, dtype=dtype).eval()
    x, y = batch(9, *shape, classes=4, dtype=dtype)
    truth = loop_norms(model, x, y)
    assert pick_engine(model, x, y) is layer_norms
    for answer in (layer_norms(model, x, y), vmap_norms(model, x, y), gradient_norms(model, x, y, chunk_size=4)):
        assert answer.dtype == dtype
        torch.testing.assert_close(answer, truth, rtol=tolerance, atol=tolerance)


def test_full_grand_of_token_sequences():
    model = build(Sequence).eval()
    x = torch.randint(11, (8, 5), generator=torch.Generator().manual_seed(0))
    x[:, 4], x[:, 3] = 0, x[:, 2]  # padding, and a token that occurs twice
    y = batch(8, 1, classes=3)[1]
    torch.testing.assert_close(layer_norms(model, x, y), loop_norms(model, x, y))


def test_engines_fall_back_where_layers_do_not_tell_all():
    x, y = batch(9, 6, classes=4)
    tied = build(lambda: Tied(True)).eval()  # a weight used outside its layer: the layer engine disagrees with autograd
    assert pick_engine(tied, x, y) is vmap_norms
    torch.testing.assert_close(gradient_norms(tied, x, y), loop_norms(tied, x, y))

    class Branching(Logits):
        def forward(self, x):
            return x * self.scale if x.sum().item() > 0 else x * self.scale**2  # vmap cannot trace this

    branching = Branching().double()
    assert pick_engine(branching, x, y) is loop_norms
    torch.testing.assert_close(gradient_norms(branching, x, y), loop_norms(branching, x, y))


def test_frozen_parameters_do_not_count():
    model = build(MODELS["cnn with batch norm"][0]).eval()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    x, y = batch(6, 3, 8, 8)
    part = gradient_norms(model, x, y)
    torch.testing.assert_close(part, loop_norms(model, x, y))
    for parameter in model[0].parameters():
        parameter.requires_grad_(True)
    assert (part < gradient_norms(model, x, y)).all()


def test_sketch_estimates_the_full_norm():
    model = build(MODELS["cnn with batch norm"][0])
    x, y = batch(20, 3, 8, 8)
    sketches = 400
    squares = (
        gradient_norms(model, x, y, mode="sketch", sketches=sketches).square() / gradient_norms(model, x, y).square()
    )
    # each square is chi-square(400) / 400: standard deviation sqrt(2 / 400) = .071; five of them cover 20 examples
    assert (squares - 1).abs().max() < 5 * math.sqrt(2 / sketches)


# Invariances ------------------------------------------------------------------------------------------------------------


def test_scores_ignore_batching_order_and_neighbours_and_leave_the_model_alone():
    model = build(MODELS["residual"][0]).train()
    model[3].eval()
    x, y = batch(23, 3, 8, 8)
    flags = [m.training for m in model.modules()]
    before, rng = weight_hash(model), torch.get_rng_state()
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    for function in (el2n_scores, grand_scores):
        few: dict[str, Any] = {"batch_size" if function is el2n_scores else "chunk_size": 5}
        base = function(model, Split(x, y)).scores
        torch.testing.assert_close(function(model, Split(x, y), **few).scores, base)
        torch.testing.assert_close(function(model, Split(x[order], y[order])).scores, base[order])
        torch.testing.assert_close(function(model, Split(x[:3], y[:3])).scores, base[:3])
        loader = [(x[part], y[part], part) for part in order.split(6)]
        torch.testing.assert_close(function(model, loader).scores, base)
    assert flags == [m.training for m in model.modules()]
    assert weight_hash(model) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_class_permutation_and_duplicates():
    model: Any = build(lambda: nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 5)))
    permuted: Any = build(lambda: nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 5)))
    order = torch.tensor([3, 1, 4, 0, 2])
    with torch.no_grad():
        permuted[2].weight.copy_(model[2].weight[order])
        permuted[2].bias.copy_(model[2].bias[order])
    x, y = batch(30, 7, classes=5)
    x, y = torch.cat([x, x[:4]]), torch.cat([y, y[:4]])
    for function in (el2n_scores, grand_scores):
        base = function(model, Split(x, y)).scores
        torch.testing.assert_close(function(permuted, Split(x, order.argsort()[y])).scores, base)
        torch.testing.assert_close(base[30:], base[:4])


def test_scores_are_averaged_and_not_probabilities():
    says_1, says_2 = (nn.Linear(1, 3).double() for _ in range(2))
    for model, k in ((says_1, 1), (says_2, 2)):
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        with torch.no_grad():
            model.bias[k] = 100.0
    data = Split(torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))
    report = el2n_scores([says_1, says_2], data)
    assert report.scores.item() == pytest.approx(1.414214, abs=1e-6)
    mean_p = torch.tensor([0.0, 0.5, 0.5])
    assert torch.linalg.vector_norm(mean_p - torch.tensor([1.0, 0, 0])).item() == pytest.approx(1.224745, abs=1e-6)
    assert report.per_run.shape == (2, 1)


@pytest.mark.parametrize("kind", ["l1", "max_margin", "sum_margin"])
def test_other_scores_rank_the_wrong_ones_highest(kind):
    logits = torch.tensor([[5.0, 0, 0], [0.0, 0, 0], [0.0, 5, 0]])
    assert score(Logits(), Split(logits, torch.zeros(3, dtype=torch.int64)), kind=kind).scores.argsort().tolist() == [
        0,
        1,
        2,
    ]


# The report -------------------------------------------------------------------------------------------------------------


def report_of(scores, y=None):
    scores = torch.tensor(scores, dtype=torch.float64)
    y = torch.zeros(len(scores), dtype=torch.int64) if y is None else torch.tensor(y)
    return ScoreReport("el2n", scores, scores[None], y)


def test_keep_top():
    report = report_of([0.1, 0.9, 0.5, 0.5, 0.5, 0.2])
    assert report.keep_top(0.5).tolist() == [1, 2, 3]  # ties: lowest index first
    assert report.keep_top(0.5, offset=1).tolist() == [2, 3, 4]
    assert report.window(0.5, 1) == (1, 3, 2)  # the released code's offset is 2 = n - kept - ours
    assert report.suspected_noise(1 / 3).tolist() == [1, 2]
    assert report.keep_top(1.0).tolist() == list(range(6))
    with pytest.raises(InvalidInput, match="offset 4 and 3 kept examples exceed the 6"):
        report.keep_top(0.5, offset=4)
    for fraction in (0.0, 1.5, float("nan")):
        with pytest.raises(InvalidInput, match="fraction must lie in"):
            report.keep_top(fraction)


def test_keep_top_class_balanced():
    y = [0] * 6 + [1] * 4 + [2] * 2
    report = report_of([0.9] * 6 + [0.1, 0.2, 0.3, 0.4] + [0.0, 0.05], y)
    index = report.keep_top(0.5, class_balanced=True)
    assert report.class_counts(index) == {0: 3, 1: 2, 2: 1}
    assert index.tolist() == [0, 1, 2, 8, 9, 11]
    assert report.class_counts(report.keep_top(0.5)) == {0: 6, 1: 0, 2: 0}
    skipped = report.keep_top(0.5, offset=6, class_balanced=True)
    assert skipped.tolist() == [3, 4, 5, 6, 7, 10]
    assert apportion(torch.tensor([5, 3, 2]), 4).tolist() == [2, 1, 1]


def test_report_is_plain_and_names_bad_scores():
    import json

    report = el2n_scores([Logits(), Logits()], Split(*batch(5, 4, classes=4)))
    assert json.loads(json.dumps(report.to_dict()))["runs"] == 2
    with pytest.raises(InvalidInput, match="indices 1"):
        report_of([0.1, float("nan")])


def test_rank_correlation():
    a = torch.tensor([1.0, 2, 3, 4])
    assert rank_correlation(a, a**3) == pytest.approx(1.0)
    assert rank_correlation(a, -a) == pytest.approx(-1.0)
    assert rank_correlation(a, torch.ones(4)) is None


# Forgetting -------------------------------------------------------------------------------------------------------------


def test_forgetting_counts():
    tracker = ForgettingTracker(3)
    for step in range(4):
        correct = torch.tensor([step % 2 == 0, False, True])
        tracker.update(torch.arange(3), correct)
    assert tracker.scores.tolist() == [2.0, math.inf, 0.0]
    copy = ForgettingTracker(3)
    copy.load_state_dict(tracker.state_dict())
    assert torch.equal(copy.scores, tracker.scores)
    with pytest.raises(InvalidInput, match="2 indices came with 1 outcomes"):
        tracker.update(torch.arange(2), torch.tensor([True]))


# Runs and the checkpoint guard --------------------------------------------------------------------------------------------


def make(generator):
    return seeded_build(lambda: nn.Linear(7, 5).double(), generator)


def train(model, epoch, generator):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * epoch * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def test_score_runs_guards_the_initialisation(caplog):
    data = Split(*batch(30, 7, classes=5))
    report = score_runs(make, train, data, runs=3, epoch=0, kind="grand")
    assert len(set(report.weights)) == 3
    assert "norm of the input" in report.warnings[0]
    assert "epoch 0" in caplog.text
    source = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=source)))
    assert report.weights[0] == weight_hash(make(own))
    later = score_runs(make, train, data, runs=3, epoch=2, kind="grand")
    assert not later.warnings
    assert not set(later.weights) & set(report.weights)
    assert torch.equal(later.scores, score_runs(make, train, data, runs=3, epoch=2, kind="grand").scores)
    with pytest.raises(Refused, match="differ from the initialisation at epoch 0"):
        score_runs(make, lambda m, e, g: train(m, 10, g), data, runs=1, epoch=0)  # the bug of 2021
    with pytest.raises(Refused, match="initialisation's after epoch 3"):
        score_runs(make, lambda m, e, g: m, data, runs=1, epoch=3)


# Bad input --------------------------------------------------------------------------------------------------------------


def test_bad_input():
    model, (x, y) = make(torch.Generator()), batch(12, 7, classes=5)
    index = torch.arange(12)

    class Shuffling:
        def __init__(self):
            self.source = torch.Generator().manual_seed(0)

        def __iter__(self):
            order = torch.randperm(12, generator=self.source)
            return iter([(x[order], y[order], order)])

    cases = [
        (lambda: el2n_scores(model, Shuffling()), "switch its shuffling and augmentation off"),
        (lambda: el2n_scores(model, [(x, y)]), r"\(x, y, index\)"),  # type: ignore[arg-type]
        (lambda: el2n_scores(model, iter([(x, y, index)])), "read only once"),
        (lambda: el2n_scores(model, []), "loader is empty"),
        (lambda: el2n_scores(model, [(x, y, index % 6)]), "0 to n - 1, each once"),
        (lambda: el2n_scores(model, Split(x, y + 1)), "Labels run from 1 to 5, outside the 5 logits"),
        (lambda: el2n_scores(model, [(x, y.double(), index)]), "scores are for classification"),
        (lambda: el2n_scores([], Split(x, y)), "models is empty"),
        (lambda: el2n_scores(model, Split(x[:0], y[:0])), "split is empty"),
        (lambda: el2n_scores(model, Split(x, None)), "no labels"),
        (lambda: el2n_scores(model, Split(x.where(index[:, None] != 3, torch.nan), y)), "NaN or infinity for examples 3"),
        (lambda: grand_scores(model, Split(x, y), mode="half"), "mode must be one of"),  # type: ignore[arg-type]
        (lambda: grand_scores(nn.Sequential(model, nn.ReLU()), Split(x, y), mode="last_layer"), "last step is an nn.Linear"),
        (lambda: grand_scores(make(torch.Generator()).requires_grad_(False), Split(x, y)), "frozen"),
        (lambda: DataDiet(fraction=0), "fraction"),
        (lambda: DataDiet(fraction=0.8, offset=0.3), "offset"),
        (lambda: DataDiet(score="loss"), "score must be one of"),  # type: ignore[arg-type]
        (lambda: DataDiet(runs=0), "runs"),
        (lambda: DataDiet(score="forgetting", epochs=0), "epochs"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(InvalidInput, match=message):
            call()
    coupled = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5, track_running_stats=False)).double()
    with pytest.raises(Refused, match="depend on its neighbours"):
        el2n_scores(coupled, Split(x, y))


# The treatment ----------------------------------------------------------------------------------------------------------

SIZES = (200, 50, 100)


def small_task(seed=0):
    return digits(seed, sizes=SIZES)


def small_model(dtype=torch.float32):
    return build(lambda: small_cnn((1, 8, 8), 10, widths=(4, 8), linear=0), dtype=dtype)


@pytest.mark.parametrize("kind", ["el2n", "grand", "forgetting"])
def test_treatment_keeps_the_hard_part(kind):
    task, model = small_task(), small_model()
    diet = DataDiet(fraction=0.4, offset=0.1, runs=2, epochs=2, score=kind)
    before = weight_hash(model)
    run = fit(model, task, Training(steps=5), (diet,))
    assert weight_hash(model) == before
    assert diet.kept_ is None
    done = run.treatments[0]
    assert isinstance(done, DataDiet) and done.kept_ is not None and done.scores_ is not None
    assert len(run.task.train) == 80
    assert torch.equal(run.task.train.x, task.train.x[done.kept_])
    assert torch.equal(run.task.train.labels, task.train.labels[done.kept_])
    ranks = done.scores_.argsort(descending=True, stable=True).argsort()[done.kept_]
    assert ranks.sort().values.tolist() == list(range(20, 100))
    again: Any = fit(model, task, Training(steps=5), (diet,))
    assert torch.equal(again.treatments[0].scores_, done.scores_)
    assert weight_hash(again.model) == weight_hash(run.model)
    fresh = DataDiet()
    fresh.load_state_dict(done.state_dict())
    assert fresh.kept_ is not None and torch.equal(fresh.kept_, done.kept_)


def test_treatment_runs_start_from_different_weights_unless_told():
    task, model = small_task(), small_model()
    _, first = DataDiet(epochs=0, runs=2).prepare(model, task)
    assert len(first.train) == 140
    diet = DataDiet(epochs=0, runs=2)
    diet.prepare(model, task)
    assert diet.report_ is not None and len(set(diet.report_.weights)) == 2
    assert "epoch 0" in diet.report_.warnings[0]
    same = DataDiet(epochs=0, runs=2, fresh=False)
    same.prepare(model, task)
    assert same.report_ is not None and set(same.report_.weights) == {weight_hash(model)}


def test_treatment_finds_wrong_labels():
    from surefoot.datasets.noise import with_label_noise

    task = digits(0, sizes=(400, 50, 100))
    noisy = with_label_noise(task.train, 0.1, 10, generator=torch.Generator().manual_seed(0))
    diet = DataDiet(runs=2, epochs=12, lr=5e-3, batch_size=32)
    diet.prepare(
        build(lambda: small_cnn((1, 8, 8), 10, widths=(8, 16)), dtype=torch.float32), task.changed(train=noisy)
    )
    wrong = noisy.y != noisy.true_y
    assert diet.report_ is not None
    found = wrong[diet.report_.suspected_noise(0.1)].double().mean().item()
    assert found > 0.5  # chance: .1 with standard error .05


def test_treatment_refuses_what_it_cannot_score():
    task = small_task()
    with pytest.raises(InvalidInput, match="frozen"):
        fit(small_model().requires_grad_(False), task, Training(steps=1), (DataDiet(),))
    with pytest.raises(InvalidInput, match="labels"):
        fit(small_model(), task.changed(train=Split(task.train.x)), Training(steps=1), (DataDiet(),))
    empty = Split(task.train.x[:0], task.train.labels[:0])
    with pytest.raises(InvalidInput, match="empty"):
        fit(small_model(), task.changed(train=empty), Training(steps=1), (DataDiet(),))
