"""The instrument must count proofs only, name what it cannot bound, and agree with brute force where that is possible."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from surefoot.certified.verified_accuracy import VerifiedAccuracy, neuron_count
from surefoot.contracts import check_instrument
from surefoot.core import work
from surefoot.core.statistics import wilson_interval
from surefoot.core.subject import Subject, predict
from surefoot.core.task import Split, Task, Training
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput
from surefoot.models import mlp, seeded_build
from surefoot.nn.bounds import verified
from surefoot.training.loop import fit


@pytest.fixture(scope="module")
def digits_subject() -> tuple[Subject, Task]:
    task = digits(0, sizes=(600, 100, 200)).changed(budget="quick")
    model = seeded_build(lambda: mlp((1, 8, 8), 10, hidden=(32, 32)), torch.Generator().manual_seed(0))
    run = fit(model, task, Training(epochs=8, lr=3e-3))
    return Subject(run.model, "mlp", "image", (1, 8, 8), 10), task


def test_finding(digits_subject):
    subject, task = digits_subject
    finding = VerifiedAccuracy(eps=0.03).measure(subject, task)
    count = round(finding.value * finding.n)
    assert finding.n == 32
    assert (finding.low, finding.high) == wilson_interval(count, finding.n)
    assert finding.samples is not None
    assert finding.samples.mean() == finding.value
    assert finding.fix == ("fast_ibp",)
    assert f"{count} of 32" in finding.sentence
    clean, *curve, by_ibp, broken = (part.value for part in finding.parts)
    assert clean >= curve[0] >= curve[1] >= curve[2] == finding.value >= by_ibp
    assert 0 < finding.value < 1
    assert broken <= clean - finding.value + 1e-12  # nobody is both proven and broken
    assert finding.details["tolerance"] == 1e-12


def test_complete_verification_only_adds_proofs_and_leaves_little_open(digits_subject):
    subject, task = digits_subject
    eps = 0.04
    bounds_only = VerifiedAccuracy(eps=eps, complete_neurons=0).measure(subject, task)
    complete = VerifiedAccuracy(eps=eps).measure(subject, task)
    assert (np.asarray(complete.samples) >= np.asarray(bounds_only.samples)).all()
    clean, broken = complete.parts[0].value, complete.parts[-1].value
    assert complete.value + broken > clean - 0.1
    assert complete.value + broken > bounds_only.value
    assert len(complete.parts) == len(bounds_only.parts)


def test_no_proven_image_is_broken_by_an_attack(digits_subject):
    subject, task = digits_subject
    eps = 0.03
    finding = VerifiedAccuracy(eps=eps).measure(subject, task)
    split = task.sample("verified_accuracy", 32)
    assert finding.samples is not None
    proven = torch.from_numpy(finding.samples).bool()
    x, y = split.x[proven], split.labels[proven]
    noise = torch.Generator().manual_seed(0)
    tried = 0
    for _ in range(60):
        point = (x + eps * (2 * torch.rand(x.shape, generator=noise) - 1)).clamp(0, 1)
        for _ in range(10):
            point.requires_grad_()
            (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(subject.model(point), y), point)
            point = (point + 0.3 * eps * gradient.sign()).detach().clamp(x - eps, x + eps).clamp(0, 1)
            assert (predict(subject.model, point).argmax(1) == y).all()
            tried += len(point)
    assert tried >= 10_000


class Gate(nn.Module):
    """Class 1 exactly where the first pixel exceeds one half: the verified radius is the distance from it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2, bias=True)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
            self.fc.bias.copy_(torch.tensor([0.5, 0.0]))

    def forward(self, x):
        return self.fc(x.flatten(1))


def test_exact_shares_and_ties():
    pixels = torch.tensor([0.75, 0.625, 0.5625, 0.25, 0.9])  # powers of two: eps 0.125 meets 0.625 exactly
    x = torch.stack([pixels, torch.zeros(5)], 1).reshape(5, 1, 1, 2)
    y = torch.tensor([1, 1, 1, 0, 0])
    split = Split(x, y)
    task = Task("gate", split, split, split, 2)
    subject = Subject(Gate(), "gate", "image", (1, 1, 2), 2)
    finding = VerifiedAccuracy(eps=0.125).measure(subject, task)
    assert finding.samples is not None
    assert finding.samples.tolist() == [1, 0, 0, 1, 0]  # the tie at 0.625 is no proof; the last one is wrong anyway
    assert finding.parts[0].value == 0.8
    assert finding.parts[1].samples is not None
    assert finding.parts[1].samples.tolist() == [1, 1, 1, 1, 0]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        flat = x.flatten(1)
        return self.fc(flat * torch.softmax(flat, 1))


def test_unsupported_models_are_named(digits_subject):
    subject, task = digits_subject
    odd = subject.with_model(Attention())
    reason = VerifiedAccuracy().unfit(odd, task)
    assert reason is not None
    assert "softmax" in reason
    with pytest.raises(InvalidInput, match="softmax"):
        VerifiedAccuracy().measure(odd, task)
    assert VerifiedAccuracy().unfit(subject, task) is None


def test_large_nets_get_crown_ibp_and_a_warning(digits_subject):
    subject, task = digits_subject
    task = task.changed(budget="standard")
    assert neuron_count(subject.model, task.test.x[:1]) == 64
    full = VerifiedAccuracy(eps=0.05, complete_neurons=0).measure(subject, task)
    cheap = VerifiedAccuracy(eps=0.05, crown_neurons=10, complete_neurons=0).measure(subject, task)
    assert full.warnings == ()
    assert "64 ReLU neurons" in cheap.warnings[0]
    assert cheap.details["method"] == "alpha-crown-ibp"
    assert cheap.value <= full.value


def test_contracts(digits_subject):
    check_instrument(VerifiedAccuracy(), *digits_subject)


@pytest.mark.parametrize(
    "settings", [{"eps": 0.0}, {"eps": float("nan")}, {"crown_neurons": -1}, {"complete_neurons": -1}, {"nodes": 0}]
)
def test_bad_settings(settings):
    with pytest.raises(InvalidInput, match=next(iter(settings))):
        VerifiedAccuracy(**settings)


def test_a_spent_budget_leaves_images_open_and_says_how_many(digits_subject, monkeypatch):
    subject, task = digits_subject
    task = task.changed(budget="standard")
    whole = VerifiedAccuracy(eps=0.05, complete_neurons=0).measure(subject, task)
    assert whole.details["not_reached"] == 0
    asked = whole.details["tried_with_dear_bounds"]
    monkeypatch.setattr(work, "VALUES", 1.0)  # a slow nominal machine: the first image takes all of its minute
    some = VerifiedAccuracy(eps=0.05, complete_neurons=0).measure(subject, task)
    assert some.details["tried_with_dear_bounds"] == 1
    assert some.details["not_reached"] == asked - 1
    assert f"{asked - 1} of {asked} open images" in some.warnings[-1]
    assert some.n == whole.n
    assert some.samples is not None
    assert whole.samples is not None
    assert (some.samples <= whole.samples).all()


def test_radii_are_nested_and_nothing_is_proven_and_broken(digits_subject):
    subject, task = digits_subject
    finding = VerifiedAccuracy(eps=0.08, complete_neurons=0).measure(subject, task.changed(budget="standard"))
    clean, *curve, by_ibp, broken = (np.asarray(part.samples) for part in finding.parts)
    for larger, smaller in itertools.pairwise([by_ibp, *reversed(curve), clean]):
        assert (larger <= smaller).all()
    assert not (broken * curve[-1]).any()
    assert broken.any()
    assert 0 < curve[0].mean() < 1


def test_the_cheap_ladder_misses_no_proof(digits_subject):
    """Attack and nested radii only spare work: the answers are those of the dear bounds on every image at every radius."""
    subject, task = digits_subject
    task = task.changed(budget="standard")
    finding = VerifiedAccuracy(eps=0.08, complete_neurons=0).measure(subject, task)
    split = task.sample("verified_accuracy", 128)
    for part, share in zip(finding.parts[1:4], (0.25, 0.5, 1.0), strict=True):
        plain = verified(subject.model, split.x, split.labels, share * 0.08, method="crown")
        assert part.samples is not None
        assert part.samples.astype(bool).tolist() == plain.tolist()


def test_work_is_counted_the_same_each_time_and_knows_views():
    a, b = torch.rand(20, 30), torch.rand(30, 40)

    def counted() -> work.WorkMeter:
        with work.WorkMeter() as meter:
            (a @ b).relu().expand(5, 20, 40).transpose(0, 1)
        return meter

    meter = counted()
    assert meter.flops == 2 * 20 * 30 * 40
    assert meter.values == 2 * 20 * 40  # the product and the ReLU; expand and transpose write nothing
    assert counted().seconds == meter.seconds == meter.flops / work.FLOPS + meter.values / work.VALUES


def test_affordable_counts():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert work.forward_flops(model.train(), torch.zeros(1, 1, 8, 8)) == 2 * 64 * 10
    assert model.training
    assert work.affordable(150, 25, 1e3, 1e6) == 150
    assert work.affordable(150, 25, 1e4, 1e6) == 100
    assert work.affordable(150, 25, 1e6, 1e6) == 25
    assert work.affordable(10, 25, 1e6, 1e6) == 10
