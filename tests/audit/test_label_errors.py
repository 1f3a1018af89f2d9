import math

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from surefoot.audit.instruments.label_errors import (
    LabelErrors,
    cross_fitted_logits,
    sure_disagreement,
    unrelated_share,
)
from surefoot.contracts import check_instrument
from surefoot.core.finding import Thumbnails
from surefoot.core.subject import Modality, Subject
from surefoot.core.task import Split, Training
from surefoot.datasets.embedded import digits
from surefoot.datasets.noise import NoiseKind, with_label_noise
from surefoot.errors import InvalidInput
from surefoot.models import mlp, seeded_build
from surefoot.nn.scores import el2n


def planted(rate, kind: NoiseKind = "symmetric", seed=0):
    task = digits(seed).changed(budget="quick")
    return task.changed(train=with_label_noise(task.train, rate, 10, kind=kind, generator=task.generator("noise")))


def subject_of(task):
    model = seeded_build(lambda: mlp(task.input_shape, task.num_classes, hidden=(8,)), task.generator("subject"))
    return Subject(model, "subject", task.modality, task.input_shape, task.num_classes)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4])
def test_planted_share_is_found(rate):
    """1,000 labels: two standard errors of the tail count are below 5 points at 40 % and 3 points at 10 %."""
    task = planted(rate)
    finding = LabelErrors().measure(subject_of(task), task)
    assert abs(finding.value - rate) < (0.05 if rate == 0.4 else 0.03)
    assert finding.low <= rate <= finding.high
    assert finding.fix == (() if rate == 0 else ("elr", "ldr", "data_diet"))


def test_suspects_name_wrong_labels_and_right_classes():
    task = planted(0.1)
    finding = LabelErrors().measure(subject_of(task), task)
    suspects = finding.details["suspects"]
    index = torch.tensor([s["index"] for s in suspects])
    assert [s["given"] for s in suspects] == task.train.labels[index].tolist()
    wrong = (task.train.y != task.train.true_y)[index]
    assert wrong[:50].double().mean() > 0.9
    suggested = torch.tensor([s["suggested"] for s in suspects])
    assert task.train.true_y is not None
    assert (suggested == task.train.true_y[index])[wrong].double().mean() > 0.85
    scores = [s["score"] for s in suspects]
    assert scores == sorted(scores, reverse=True) and max(scores) <= math.sqrt(2) + 1e-6
    (pictures,) = finding.pictures
    assert isinstance(pictures, Thumbnails)
    assert pictures.images.shape == (24, 8, 8) and len(pictures.captions) == 24
    assert pictures.captions[0] == f"given {suspects[0]['given']}, looks like {suspects[0]['suggested']}"


def test_systematic_confusions_show_in_the_upper_end_and_the_warning():
    task = planted(0.3, "next")
    finding = LabelErrors().measure(subject_of(task), task)
    assert finding.low <= 0.3 <= finding.high
    assert any("systematically" in warning for warning in finding.warnings)


def test_scores_come_from_networks_that_did_not_see_the_label():
    """Flipping labels of the held-out fold cannot change its own logits; and the detection is near that of an oracle."""
    task = planted(0.4)
    logits = cross_fitted_logits(task, folds=2, repeats=1, training=Training(steps=300, lr=2e-3))
    order = torch.randperm(1000, generator=task.generator("label_errors/folds/0"))
    first = order[::2]  # positions 0, 2, ... of the order form fold 0
    y = task.train.labels.clone()
    y[first] = (y[first] + 3) % 10
    changed = task.changed(train=Split(task.train.x, y))
    again = cross_fitted_logits(changed, folds=2, repeats=1, training=Training(steps=300, lr=2e-3))
    assert torch.equal(logits[:, first], again[:, first])
    assert not torch.equal(logits, again)
    wrong = task.train.y != task.train.true_y
    assert roc_auc_score(wrong.numpy(), el2n(logits, task.train.labels).mean(0).numpy()) > 0.95


def test_shares_on_made_up_probabilities():
    """Perfect proxies: the estimates are the planted share up to sampling."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randint(0, 5, (20000,), generator=generator)
    p = torch.rand(20000, 5, generator=generator) * 0.1
    p = p.scatter(1, true.unsqueeze(1), 1.0)
    p = p / p.sum(1, keepdim=True)
    y = true.clone()
    y[:5000] = (true[:5000] + torch.randint(1, 5, (5000,), generator=generator)) % 5
    share, (low, high) = unrelated_share(p, y)
    assert low <= 0.25 <= high and abs(share - 0.25) < 0.02
    disagreement, interval, n = sure_disagreement(p, y)
    assert n == pytest.approx(4000, abs=5) and interval.low <= 0.25 <= interval.high and disagreement > 0


@pytest.mark.slow
def test_interval_covers_in_most_draws():
    """Ten planted draws at 20 %: at 95 % coverage eight or more are inside with probability 0.988."""
    inside = 0
    for seed in range(10):
        task = planted(0.2, seed=seed)
        finding = LabelErrors().measure(subject_of(task), task)
        inside += finding.low <= 0.2 <= finding.high
    assert inside >= 8


def test_contracts():
    task = planted(0.1)
    task = task.changed(train=task.train.take(slice(0, 300)))
    check_instrument(LabelErrors(), subject_of(task), task)


def test_vectors_signals_and_unlike_scales():
    generator = torch.Generator().manual_seed(0)
    kinds: tuple[tuple[tuple[int, ...], Modality], ...] = (((6,), "vector"), ((1, 40), "signal"))
    for shape, modality in kinds:
        true = torch.randint(0, 3, (300,), generator=generator)
        x = torch.randn(300, *shape, generator=generator)
        x = (x + 4 * torch.randn(3, *shape, generator=generator)[true]) * torch.logspace(0, 3, shape[-1])
        train = with_label_noise(Split(x, true), 0.2, 3, generator=generator)
        task = planted(0.0).changed(train=train, valid=train, test=train, num_classes=3, class_names=(), modality=modality)  # fmt: skip
        subject = Subject(nn.Flatten(), "any", modality, shape, 3, None)
        finding = LabelErrors().measure(subject, task)
        assert abs(finding.value - 0.2) < 0.1 and not finding.pictures


def test_unfit_and_bad_input():
    task = planted(0.0)
    subject, instrument = subject_of(task), LabelErrors()
    assert instrument.unfit(subject, task) is None
    assert "no training examples" in (instrument.unfit(subject, task.changed(train=task.train.take(slice(0, 0)))) or "")
    assert "has none" in (instrument.unfit(subject, task.changed(train=Split(task.train.x))) or "")
    few = task.changed(train=task.train.take(slice(0, 50)))
    assert "too few" in (instrument.unfit(subject, few) or "")
    with pytest.raises(InvalidInput, match="too few"):
        instrument.measure(subject, few)
    with pytest.raises(InvalidInput, match="NaN"):
        instrument.measure(subject, task.changed(train=Split(task.train.x * math.nan, task.train.y)))
    with pytest.raises(InvalidInput, match=r"\[0, 10\)"):
        instrument.measure(subject, task.changed(train=Split(task.train.x, task.train.labels + 1)))
