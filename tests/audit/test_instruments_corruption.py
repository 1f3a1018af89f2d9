"""Corruption robustness: what is averaged, what is shown, and when it does not run."""

import numpy as np
import pytest
import torch

from surefoot.audit.instruments.corruption import CorruptionRobustness
from surefoot.contracts import check_instrument
from surefoot.core.finding import Chart, Thumbnails
from surefoot.core.subject import Subject
from surefoot.core.task import Split, Task, Training
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput
from surefoot.models import small_cnn
from surefoot.nn.corruptions import corrupt
from surefoot.training.loop import fit


@pytest.fixture(scope="module")
def trained() -> tuple[Subject, Task]:
    task = digits(0, sizes=(400, 50, 100)).changed(budget="quick")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_cnn(task.input_shape, 10)
    run = fit(model, task, Training(epochs=8, lr=3e-3))
    return Subject(run.model, "digits", "image", task.input_shape, 10), task


def test_value_parts_and_samples_agree(trained):
    subject, task = trained
    found = CorruptionRobustness().measure(subject, task)
    assert len(found.parts) == 18
    assert found.value == pytest.approx(np.mean([part.value for part in found.parts]))
    samples = [part.samples for part in found.parts if part.samples is not None]
    assert found.samples is not None and len(samples) == 18
    np.testing.assert_allclose(found.samples, np.mean(samples, 0))
    assert found.value < found.details["clean_accuracy"]
    assert all(part.low <= part.value <= part.high for part in found.parts)
    table = np.array(list(found.details["accuracy"].values()))
    assert table.shape == (18, 5)
    assert table[:, 0].mean() > table[:, 4].mean()
    chart, images = found.pictures
    assert isinstance(chart, Chart)
    assert len(chart.figure["data"][0]["z"]) == 18
    assert isinstance(images, Thumbnails)
    assert images.images.shape == (19, 8, 8)
    assert images.images.dtype == np.uint8
    assert images.captions[0] == "clean"


def test_one_corruption_by_hand(trained):
    subject, task = trained
    found = CorruptionRobustness(only=("contrast",), severities=(3,)).measure(subject, task)
    x = corrupt(task.test.x, "contrast", 3, torch.Generator())
    right = subject.logits(x).argmax(1) == task.test.y
    np.testing.assert_array_equal(found.samples, right.double())


def test_other_bounds_are_rescaled(trained):
    subject, task = trained
    wide = Split(task.test.x * 2 - 1, task.test.y)

    class Back(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = subject.model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model((x + 1) / 2)

    only = CorruptionRobustness(only=("brightness", "contrast"))
    here = only.measure(subject, task)
    there = only.measure(subject.with_model(Back()), task.changed(test=wide, bounds=(-1.0, 1.0)))
    assert there.value == pytest.approx(here.value, abs=0.005)


def test_where_it_does_not_fit(trained):
    subject, task = trained
    instrument = CorruptionRobustness()
    assert instrument.unfit(subject, task) is None

    def reason(shape: tuple[int, ...], **changes: object) -> str:
        split = Split(torch.rand(3, *shape), torch.zeros(3, dtype=torch.int64))
        return instrument.unfit(subject, task.changed(test=split, **changes)) or ""

    assert "1 or 3 channels" in reason((4, 8, 8))
    assert "4 x 4" in reason((1, 2, 8))
    assert "bounds" in reason((1, 8, 8), bounds=None)
    vector = Subject(subject.model, "v", "vector", (64,), 10)
    assert "image models" in (instrument.unfit(vector, task) or "")
    with pytest.raises(InvalidInput, match="name must be one of"):
        CorruptionRobustness(only=("rain",)).measure(subject, task)
    with pytest.raises(InvalidInput, match="severities"):
        CorruptionRobustness(severities=(7,)).measure(subject, task)
    with pytest.raises(InvalidInput, match="no corruption"):
        CorruptionRobustness(only=()).measure(subject, task)


def test_contract(trained):
    subject, task = trained
    check_instrument(CorruptionRobustness(only=("fog", "shot_noise", "motion_blur"), severities=(1, 5)), subject, task)
