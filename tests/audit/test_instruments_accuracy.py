"""Accuracy: the number, its parts and its picture on answers that are known."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from surefoot.audit.instruments.accuracy import Accuracy, confusion
from surefoot.contracts import check_instrument
from surefoot.core.finding import Chart
from surefoot.core.statistics import wilson_interval
from surefoot.core.subject import Subject
from surefoot.core.task import Split, Task
from surefoot.errors import InvalidInput


class Table(nn.Module):
    """Answers the class written in the first feature."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * nn.functional.one_hot(x[:, 0].long(), self.classes).to(x.dtype)


def world(answers: list[int], truth: list[int], classes: int = 3, **changes: object) -> tuple[Subject, Task]:
    x = torch.tensor(answers, dtype=torch.float32)[:, None].repeat(1, 2)
    split = Split(x, torch.tensor(truth))
    task = Task("toy", split, split, split, classes, "vector", None).changed(**changes)
    return Subject(Table(classes), "toy", "vector", (2,), classes, None, ("ant", "bee", "cat")[:classes]), task


def test_known_answers():
    subject, task = world([0, 0, 0, 1, 1, 2, 0, 0], [0, 0, 0, 1, 1, 2, 2, 2])
    found = Accuracy().measure(subject, task)
    assert found.value == 6 / 8
    assert (found.low, found.high) == wilson_interval(6, 8)
    assert found.n == 8
    np.testing.assert_array_equal(found.samples, [1, 1, 1, 1, 1, 1, 0, 0])
    assert [(p.name, p.value, p.n) for p in found.parts] == [("class ant", 1, 3), ("class bee", 1, 2), ("class cat", pytest.approx(1 / 3), 3)]  # fmt: skip
    assert found.details["balanced_accuracy"] == pytest.approx((1 + 1 + 1 / 3) / 3)
    assert "worst class is cat with 33.3 %" in found.sentence
    (chart,) = found.pictures
    assert isinstance(chart, Chart)
    assert chart.figure["data"][0]["text"] == [[3, 0, 0], [0, 2, 0], [2, 0, 1]]


def test_confusion_counts_every_pair():
    prediction, y = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 2])
    assert confusion(prediction, y, 3).tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_of_many_classes_what_goes_to_the_others_is_drawn():
    """Else the picture of the worst of a thousand classes is empty, and its labels are every second one."""
    n = 40
    subject, task = world([(k + 20) % n for k in range(n)], list(range(n)), classes=n)
    (chart,) = Accuracy().measure(subject, task).pictures
    assert isinstance(chart, Chart)
    heat, layout = chart.figure["data"][0], chart.figure["layout"]
    assert heat["x"] == [*heat["y"], "others"]
    assert all(sum(row) == 1.0 for row in heat["z"])
    assert layout["yaxis"]["dtick"] == 1
    assert layout["height"] > 400


def test_a_constant_answer_is_pointed_out():
    subject, task = world([0] * 30, [0] * 20 + [1] * 10)
    assert "most frequent class" in Accuracy().measure(subject, task).warnings[0]


def test_many_classes_show_the_worst():
    labels = list(range(40)) * 2
    answers = [k if k >= 10 else (k + 1) % 40 for k in labels]
    subject, task = world(answers, labels, 40)
    found = Accuracy().measure(subject, task)
    assert len(found.parts) == 20
    assert sum(part.value == 0 for part in found.parts) == 10
    assert "worst classes" in found.pictures[0].caption


def test_bad_input_is_one_clear_sentence():
    subject, task = world([0, 1], [0, 1])
    with pytest.raises(InvalidInput, match="no test examples"):
        Accuracy().measure(subject, task.changed(test=Split(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))))
    with pytest.raises(InvalidInput, match=r"must return logits \[2, 5\]"):
        Accuracy().measure(Subject(Table(3), "toy", "vector", (2,), 5, None), task)
    assert "labels" in (Accuracy().unfit(subject, task.changed(test=Split(torch.zeros(2, 2)))) or "")


def test_contract():
    from surefoot.datasets.embedded import digits
    from surefoot.models import small_cnn

    task = digits(0, sizes=(64, 32, 64)).changed(budget="quick")
    check_instrument(
        Accuracy(), Subject(small_cnn(task.input_shape, 10), "digits", "image", task.input_shape, 10), task
    )
