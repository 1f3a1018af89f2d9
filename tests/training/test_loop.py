"""The one training loop: schedules, resuming, refusing, and treatments called at their moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from surefoot.core.subject import predict
from surefoot.core.task import Split, Training
from surefoot.core.treatment import Treatment
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput, Refused
from surefoot.models import mlp, seeded_build, small_cnn
from surefoot.training.loop import accuracy, fit, lr_factor


@pytest.fixture(scope="module")
def task():
    return digits(0, sizes=(300, 60, 200))


@pytest.fixture(scope="module")
def model(task):
    return seeded_build(lambda: small_cnn(task.input_shape, 10), task.generator("model"))


def test_learns(task, model):
    run = fit(model, task, Training(epochs=15, lr=5e-3))
    assert accuracy(run.model, task.test.x, task.test.labels) > 0.85
    assert accuracy(model, task.test.x, task.test.labels) < 0.4


def test_schedules():
    cosine = Training(schedule="cosine", warmup=0.1)
    assert lr_factor(cosine, 0.05) == pytest.approx(0.5)
    assert lr_factor(cosine, 0.55) == pytest.approx(0.5)
    assert lr_factor(cosine, 1.0) == pytest.approx(0.0, abs=1e-12)
    step = Training(schedule="step", milestones=(0.5, 0.75), gamma=0.1)
    assert [lr_factor(step, d) for d in (0.49, 0.5, 0.75)] == pytest.approx([1, 0.1, 0.01])


@pytest.mark.parametrize(
    ("n", "batch", "drop", "steps"), [(300, 64, False, 10), (300, 64, True, 8), (300, 300, False, 2)]
)
def test_steps(task, model, n, batch, drop, steps):
    seen = []
    fit(
        model,
        task,
        Training(epochs=2, batch_size=batch, drop_last=drop),
        progress=lambda d, t, loss: seen.append((d, t)),
    )
    assert seen[-1] == (steps, steps)


def test_fixed_steps_count_whatever_the_size(task, model):
    seen = []
    small = task.changed(train=task.train.take(slice(0, 80)))
    fit(model, small, Training(steps=7, batch_size=32), progress=lambda d, t, loss: seen.append(d))
    assert seen == [3, 6, 7]


@dataclass
class Spy(Treatment):
    slug = "spy"
    task_y: ClassVar[torch.Tensor]

    def prepare(self, model, task):
        self.calls_ = ["prepare"]
        self.indices_ = []
        return model, task

    def before_step(self, model, optimizer, batch):
        self.calls_.append("before")
        assert next(model.parameters()).grad is not None
        assert torch.equal(self.task_y[batch.index], batch.y)
        self.indices_.append(batch.index)

    def after_step(self, model, optimizer, batch):
        self.calls_.append("after")

    def finish(self, model, task):
        self.calls_.append("finish")
        assert not model.training
        return model


def test_moments_and_indices(task, model):
    spy = Spy()
    Spy.task_y = task.train.labels
    run = fit(model, task, Training(epochs=1, batch_size=100), [spy])
    (done,) = run.treatments
    assert isinstance(done, Spy)
    assert done.calls_ == ["prepare", *["before", "after"] * 3, "finish"]
    assert torch.cat(done.indices_).sort().values.tolist() == list(range(300))
    assert not hasattr(spy, "calls_")


@dataclass
class Chooser(Treatment):
    slug = "chooser"
    prepare_order: ClassVar[int] = -10

    def prepare(self, model, task):
        return model, task.changed(train=task.train.take(slice(0, 50)))


@dataclass
class Counter(Treatment):
    slug = "counter"

    def prepare(self, model, task):
        self.n_ = len(task.train)
        return model, task


def test_data_is_chosen_before_others_prepare(task, model):
    run = fit(model, task, Training(epochs=1), [Counter(), Chooser()])
    assert [t.slug for t in run.treatments] == ["counter", "chooser"]
    counter = run.treatments[0]
    assert isinstance(counter, Counter) and counter.n_ == 50


@dataclass
class OneLoss(Treatment):
    slug = "one"

    def loss(self, model, batch):
        return model(batch.x).square().mean()


@dataclass
class OtherLoss(OneLoss):
    slug = "other"


@dataclass
class Loner(Treatment):
    slug = "loner"
    excludes: ClassVar = {"one": "it will not have it."}


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        ([OneLoss(), OtherLoss()], "each bring a training loss"),
        ([Loner(), OneLoss()], "it will not"),
        ([Loner(), Loner()], "twice"),
    ],
)
def test_refusals(task, model, stack, words):
    with pytest.raises(Refused, match=words):
        fit(model, task, Training(epochs=1), stack)


def test_a_diverging_run_says_so(task):
    model = mlp(task.input_shape, 10)
    with pytest.raises(InvalidInput, match="lower the learning rate"):
        fit(model, task, Training(epochs=5, optimizer="sgd", lr=1e6, momentum=0.0))


def test_frozen_model_is_refused(task):
    frozen = small_cnn(task.input_shape, 10).requires_grad_(False)
    with pytest.raises(InvalidInput, match="requires a gradient"):
        fit(frozen, task, Training(epochs=1))


def test_augment_and_sampling(task, model):
    calls = []

    def half(x, generator):
        calls.append(torch.rand((), generator=generator).item())
        return x * 0.5

    fit(model, task.changed(augment=(half,)), Training(epochs=1, batch_size=100))
    assert len(set(calls)) == 3
    assert len(task.sample("a", 50)) == 50
    assert torch.equal(task.sample("a", 50).x, task.sample("a", 50).x)
    assert not torch.equal(task.sample("a", 50).x, task.sample("b", 50).x)
    assert torch.equal(task.for_tuning().test.x, task.valid.x)


def test_predict_matches_the_model(task, model):
    model.eval()
    with torch.no_grad():
        assert torch.allclose(predict(model, task.test.x, 33), model(task.test.x), atol=1e-6)


def test_split_refuses_integers():
    with pytest.raises(InvalidInput, match="floating"):
        Split(torch.zeros(3, 2, dtype=torch.uint8))
