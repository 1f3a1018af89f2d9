"""The instrument: what it reports, on models whose truth is known, and that it leaves them alone."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from surefoot.certified.certified_radius import CertifiedRadius
from surefoot.certified.dual_smoothing import DualSmoothedClassifier
from surefoot.contracts import check_instrument
from surefoot.core.finding import Chart
from surefoot.core.subject import Subject
from surefoot.core.task import Split, Task
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput
from surefoot.models.networks import mlp, seeded_build, small_cnn


class Bright(nn.Module):
    """Class 1 where the mean pixel is above 1/2: the smoothed classifier's radius is |sum - d/2| / sqrt(d)."""

    def forward(self, x):
        score = x.flatten(1).mean(1) - 0.5
        return torch.stack([-score, score], 1)


def task_of(x, y, classes=2, **changes):
    split = Split(x, y)
    return Task("made up", split, split, split, classes, **changes)


def bright_task(n=60, **changes):
    g = torch.Generator().manual_seed(0)
    level = torch.linspace(0.1, 0.9, n)
    x = (level.view(-1, 1, 1, 1) + 0.02 * torch.randn(n, 1, 6, 6, generator=g)).clamp(0, 1)
    return task_of(x, (x.flatten(1).mean(1) > 0.5).long(), **changes)


def subject_of(model, task):
    return Subject(model, "it", task.modality, task.input_shape, task.num_classes)


def test_radii_stay_below_the_truth_and_near_it():
    task = bright_task(budget="standard")
    finding = CertifiedRadius(sigma=0.25, n=4000).measure(subject_of(Bright(), task), task)
    truth = (task.test.x.flatten(1).sum(1) - 18).abs().double().numpy() / 6
    cap = 0.25 * stats.norm.ppf(0.001 ** (1 / 4000))
    assert finding.samples is not None
    assert (finding.samples <= truth).all()  # 60 certificates at alpha = .001
    close = truth < 0.8 * cap
    assert close.any()
    assert (finding.samples[close] > truth[close] - 0.12).all()
    assert finding.value == pytest.approx(finding.samples.mean())
    assert finding.low <= finding.value <= finding.high
    assert finding.n == 60
    assert finding.fix[0] == "dual_smoothing"


def test_wrong_and_abstained_count_zero():
    task = bright_task()
    flipped = task.changed(test=Split(task.test.x, 1 - task.test.labels))
    finding = CertifiedRadius().measure(subject_of(Bright(), flipped), flipped)
    assert finding.value == 0.0
    assert (finding.samples == 0).all()
    assert all(part.value == 0 for part in finding.parts)


def test_parts_and_curve_agree_with_the_samples():
    task = bright_task()
    finding = CertifiedRadius(radii=(0.0, 0.3, 0.6)).measure(subject_of(Bright(), task), task)
    assert finding.samples is not None
    for part, r in zip(finding.parts, (0.0, 0.3, 0.6)):
        hits = (finding.samples >= r) & (finding.samples > 0)
        assert part.value == pytest.approx(hits.mean())
        assert part.low <= part.value <= part.high
        np.testing.assert_array_equal(part.samples, hits.astype(float))
    assert [p.value for p in finding.parts] == sorted((p.value for p in finding.parts), reverse=True)
    chart = finding.pictures[0]
    assert isinstance(chart, Chart)
    line = chart.figure["data"][0]
    assert line["y"][0] == finding.parts[0].value
    assert line["x"][-1] == finding.samples.max()
    assert line["y"][-1] == pytest.approx(1 / len(finding.samples))
    json.dumps(finding.to_dict())
    json.dumps(chart.figure)


def test_same_seed_same_finding_and_nothing_is_touched():
    task = bright_task(budget="quick")
    net = small_cnn((1, 6, 6), 2).train()
    net[0].eval()
    flags = [m.training for m in net.modules()]
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    one, two = (CertifiedRadius(n=200).measure(subject_of(net, task), task) for _ in range(2))
    np.testing.assert_array_equal(one.samples, two.samples)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert flags == [m.training for m in net.modules()]
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_float64_model():
    task = bright_task()
    finding = CertifiedRadius(n=100).measure(subject_of(small_cnn((1, 6, 6), 2).double(), task), task)
    assert math.isfinite(finding.value)


def test_a_model_that_cannot_stand_noise_gets_a_warning():
    class Fragile(nn.Module):
        """Right on clean images (the last bit of the mean), noise under noise."""

        def forward(self, x):
            clean = ((x * 255).round() / 255 - x).abs().flatten(1).amax(1) < 1e-4
            label = torch.where(clean, x[:, 0, 0, 0] > 0.5, x[:, 0, 0, 0] * 1000 % 2 > 1)
            return nn.functional.one_hot(label.long(), 2).to(x.dtype)

    x = torch.randint(0, 256, (50, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 255
    task = task_of(x, (x[:, 0, 0, 0] > 0.5).long())
    finding = CertifiedRadius().measure(subject_of(Fragile(), task), task)
    assert finding.details["clean_accuracy"] == 1.0
    assert any("not trained with noise" in w for w in finding.warnings)
    calm = CertifiedRadius().measure(subject_of(Bright(), bright_task()), bright_task())
    assert not any("not trained with noise" in w for w in calm.warnings)


def test_dual_models_bring_their_own_certificate_at_the_same_cost():
    task = bright_task()
    dual = DualSmoothedClassifier(Bright(), Bright(), sigma=0.1, num_classes=2, shape=task.input_shape)
    finding = CertifiedRadius(n=1000, n0=100).measure(subject_of(dual, task), task)
    assert finding.details["votes"] == "dual"
    assert finding.details["sigma"] == 0.1
    assert finding.cost.passes == 60 * (1100 + 1)
    assert any("own noise level 0.1" in w for w in finding.warnings)
    own = dual.certify(task.test.x, generator=task.generator("certified_radius"), n0=50, n=500)
    right = own.prediction == task.test.labels
    np.testing.assert_array_equal(finding.samples, torch.where(right, own.radius, 0.0).numpy())


def test_saturated_radii_get_a_warning():
    task = task_of(torch.ones(50, 1, 6, 6), torch.ones(50, dtype=torch.int64))
    finding = CertifiedRadius(sigma=0.05, n=100).measure(subject_of(Bright(), task), task)
    assert any("more draws would show more" in w for w in finding.warnings)


@pytest.mark.parametrize("dual", [False, True])
def test_contracts(dual):
    task = bright_task(budget="quick")
    net = small_cnn((1, 6, 6), 2, widths=(4,)).eval()
    if dual:
        net = DualSmoothedClassifier(net, small_cnn((1, 6, 6), 2, widths=(4,)), sigma=0.25, num_classes=2, shape=(6, 6))
    check_instrument(CertifiedRadius(n=100), subject_of(net.eval(), task), task)


def test_bad_input_is_one_sentence():
    task = bright_task()
    subject = subject_of(Bright(), task)
    cases: list[tuple[Any, str]] = [
        ({"sigma": 0.0}, "sigma"),
        ({"alpha": 2.0}, "alpha"),
        ({"n": 0}, "n must"),
        ({"radii": ()}, "radii"),
    ]
    for change, words in cases:
        with pytest.raises(InvalidInput, match=words):
            CertifiedRadius(**change)
    empty = task.changed(test=task.test.take(slice(0, 0)))
    with pytest.raises(InvalidInput, match="no test examples"):
        CertifiedRadius().measure(subject, empty)
    broken = task.changed(test=Split(torch.full_like(task.test.x, math.nan), task.test.y))
    with pytest.raises(InvalidInput, match="NaN"):
        CertifiedRadius().measure(subject, broken)
    labels = task.changed(test=Split(task.test.x, task.test.labels + 5))
    with pytest.raises(InvalidInput, match="Labels"):
        CertifiedRadius().measure(subject, labels)
    unlabelled = task.changed(test=Split(task.test.x))
    assert CertifiedRadius().unfit(subject, unlabelled) is not None


def test_a_large_model_is_certified_on_fewer_examples_and_says_so(monkeypatch):
    import surefoot.certified.certified_radius as module

    task = digits(0, sizes=(100, 50, 200)).changed(budget="quick")
    model = seeded_build(lambda: mlp((1, 8, 8), 10, hidden=(8,)), torch.Generator().manual_seed(0))
    subject = Subject(model, "mlp", "image", (1, 8, 8), 10)
    small = CertifiedRadius(n=20, n0=5).measure(subject, task)
    assert small.n == 50
    monkeypatch.setattr(
        module, "forward_flops", lambda *_: 2e11 / 25 / 30
    )  # the budget pays for 30 examples of 25 draws
    large = CertifiedRadius(n=20, n0=5).measure(subject, task)
    assert large.n == 30
    assert any("30 examples" in w and "in place of 50" in w for w in large.warnings)
    assert not any("in place of" in w for w in small.warnings)
