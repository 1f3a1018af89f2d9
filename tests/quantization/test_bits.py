"""How many bits a model survives."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from surefoot.core.subject import Subject
from surefoot.core.task import Split, Training
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput
from surefoot.models.networks import seeded_build, small_cnn
from surefoot.quantization.bits import BitsSurvived, lost, quantize_plain
from surefoot.quantization.layerwise_calibration import adaquant, quantized_layers
from surefoot.training.loop import fit


@pytest.fixture(scope="module")
def task():
    return digits(0, sizes=(600, 128, 300))


@pytest.fixture(scope="module")
def subject(task):
    net = seeded_build(lambda: small_cnn((1, 8, 8), 10, widths=(8, 12)), torch.Generator().manual_seed(0))
    return Subject(fit(net, task, Training(epochs=8, lr=5e-3)).model, "cnn", "image", (1, 8, 8), 10)


def test_finding_is_the_paired_drop(subject, task):
    finding = BitsSurvived().measure(subject, task)
    quantized, folded = quantize_plain(subject.model, task.valid.x, 4, 4)
    assert folded
    with torch.no_grad():
        right = [
            (net(task.test.x).argmax(1) == task.test.labels).double().numpy() for net in (subject.model, quantized)
        ]
    assert finding.samples is not None
    assert np.array_equal(finding.samples, right[0] - right[1])
    assert finding.value == pytest.approx(finding.samples.mean(), abs=1e-12)
    assert finding.low <= finding.value <= finding.high and finding.n == 300 and finding.better == "lower"
    assert [part.name for part in finding.parts] == [f"Accuracy lost at {b} bits" for b in (8, 6, 5, 4, 3, 2)]
    assert [row["bits"] for row in finding.details["sweep"]] == [8, 6, 5, 4, 3, 2]
    assert finding.fix == ("layerwise_calibration",)


def test_fewer_bits_cost_more_and_the_smallest_width_follows_from_the_sweep(subject, task):
    finding = BitsSurvived().measure(subject, task)
    drops = {row["bits"]: row["drop"] for row in finding.details["sweep"]}
    assert abs(drops[8]) <= 0.01 and drops[2] > 0.2
    smallest = finding.details["smallest_bits"]
    assert all(drops[bits] <= 0.01 for bits in drops if bits >= smallest)
    assert drops[max(bits for bits in drops if bits < smallest)] > 0.01
    assert f"{smallest} bits are the fewest" in finding.sentence
    none = BitsSurvived(bits=2, sweep=(2,)).measure(subject, task)
    assert none.details["smallest_bits"] is None and "no width of the sweep" in none.sentence


def test_the_interval_does_not_vanish_where_nothing_changed():
    same = np.ones(200)
    result = lost(same, same)
    assert result.effect == 0.0 and -0.05 < result.low < 0 < result.high < 0.05
    worse = same.copy()
    worse[:20] = 0
    assert lost(same, worse).effect == pytest.approx(0.1) and lost(same, worse).low > 0.04


def test_without_labels_it_counts_changed_predictions(subject, task):
    blind = task.changed(test=Split(task.test.x), valid=Split(task.valid.x))
    finding = BitsSurvived().measure(subject, blind)
    assert BitsSurvived().unfit(subject, blind) is None
    assert finding.samples is not None and set(np.unique(finding.samples)) <= {0.0, 1.0}
    assert finding.details["float"] == 1.0 and not finding.details["labels"]
    assert 0 <= finding.low <= finding.value <= finding.high
    assert "agreement with the float model" in finding.sentence


def test_calibration_lowers_it(subject, task):
    plain = BitsSurvived(bits=3).measure(subject, task)
    better = adaquant(subject.model, task.valid.x, 3, 3, iters=100)
    with torch.no_grad():
        tuned = (better(task.test.x).argmax(1) == task.test.labels).double().mean().item()
    assert plain.details["float"] - tuned <= plain.value


def test_weights_alone_and_graphs_that_cannot_be_read(subject, task):
    weights = BitsSurvived(activations=False).measure(subject, task)
    both = BitsSurvived().measure(subject, task)
    assert weights.parts[-1].value != both.parts[-1].value

    class Branches(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) if bool(x.isfinite().all()) else x

    wrapped = subject.with_model(Branches(subject.model))
    finding = BitsSurvived().measure(wrapped, task)
    assert "batch-norm stayed in floating point" in finding.warnings[0]
    assert len(quantized_layers(quantize_plain(wrapped.model, task.valid.x, 4, 4)[0])) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_subject_and_the_global_generator_are_left_alone(subject, task, dtype):
    model = copy.deepcopy(subject.model).to(dtype).train()
    double = task.changed(
        **{name: Split(getattr(task, name).x.to(dtype), getattr(task, name).y) for name in ("train", "valid", "test")}
    )
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = BitsSurvived().measure(subject.with_model(model), double)
    second = BitsSurvived().measure(subject.with_model(model), double)
    assert first.value == second.value
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input(subject, task):
    with pytest.raises(InvalidInput, match="bits must be one of the sweep"):
        BitsSurvived(bits=7).measure(subject, task)
    with pytest.raises(InvalidInput, match="test split is empty"):
        BitsSurvived().measure(subject, task.changed(test=task.test.take(slice(0, 0))))
    with pytest.raises(InvalidInput, match="NaN"):
        BitsSurvived().measure(subject, task.changed(test=Split(task.test.x * float("nan"), task.test.y)))
    with pytest.raises(InvalidInput, match="NaN"):
        BitsSurvived().measure(subject, task.changed(valid=Split(task.valid.x * float("nan"), task.valid.y)))
    reason = BitsSurvived().unfit(subject.with_model(nn.Sequential(nn.Flatten())), task)
    assert reason is not None and "has none" in reason
    without = task.changed(train=Split(task.train.x[:0]), valid=Split(task.valid.x[:0]))
    assert "measured on test inputs" in BitsSurvived().measure(subject, without).warnings[0]
