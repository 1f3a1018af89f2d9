"""Models as people have them: frozen in training mode, in another precision, writing into their input, named by half."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from surefoot.core.task import Split
from surefoot.errors import InvalidInput
from surefoot.models.loading import as_subject, load_model, read_weights

FACTORY = """
from torch import nn

made = nn.Linear(2, 2)

def needs(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

def has_default(num_classes=7):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def dropping():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, 10))


def normalising():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10))


def freeze(model, path):
    x = torch.rand(2, 1, 8, 8)
    if path.suffix == ".pt2":
        torch.export.save(torch.export.export(model, (x,)), path)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.trace(model, x, check_trace=False), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".pt2", ".pt"])
@pytest.mark.parametrize(("build", "part"), [(dropping, "dropout"), (normalising, "batch norm")])
def test_a_program_frozen_in_training_mode_is_refused(tmp_path, task, build, part, suffix):
    """It would answer at random, or by its batch, and the audit would believe it."""
    with pytest.raises(InvalidInput, match=rf"training mode \({part} still"):
        load_model(freeze(build().train(), tmp_path / f"m{suffix}"), task=task)
    model, _, _ = load_model(freeze(build().eval(), tmp_path / f"ok{suffix}"), task=task)
    assert as_subject(model, "m", task).num_classes == 10


@pytest.mark.parametrize("suffix", [".pt2", ".pt"])
def test_what_trains_nothing_is_not_refused(tmp_path, task, suffix):
    """Dropout of nothing, and batch norm without statistics, which uses the batch in evaluation, too."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.Dropout(0.0), nn.Flatten(), nn.Linear(72, 10))  # fmt: skip
    load_model(freeze(model.train(), tmp_path / f"m{suffix}"), task=task)


def test_scripted_dropout_follows_the_mode(tmp_path, task):
    torch.jit.script(dropping().train()).save(tmp_path / "m.pt")
    model, _, _ = load_model(str(tmp_path / "m.pt"), task=task)
    subject = as_subject(model, "m", task)
    assert torch.equal(subject.logits(task.test.x), subject.logits(task.test.x))


class Two(nn.Module):
    def forward(self, a, b):
        return a.flatten(1) + b.flatten(1)


class Pair(nn.Module):
    def forward(self, x):
        return x.flatten(1), x


def test_exports_of_another_kind(tmp_path, task):
    x = torch.rand(2, 1, 8, 8)
    torch.export.save(torch.export.export(Two(), (x, x)), tmp_path / "two.pt2")
    with pytest.raises(InvalidInput, match="takes 2 inputs"):
        load_model(str(tmp_path / "two.pt2"), task=task)
    torch.export.save(torch.export.export(Pair(), (x,)), tmp_path / "pair.pt2")
    model, _, _ = load_model(str(tmp_path / "pair.pt2"), task=task)
    with pytest.raises(InvalidInput, match="returns tuple"):
        as_subject(model, "m", task)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_another_precision_is_named(task, dtype):
    with pytest.raises(InvalidInput, match=f"holds {str(dtype)[6:]} weights and the data are float32"):
        as_subject(linear().to(dtype), "m", task)


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = linear()

    def forward(self, x):
        return self.inner(x.sub_(0.5).div_(0.25))


def test_a_model_that_writes_into_its_input_is_refused_and_harms_nothing(task):
    before = task.test.x.clone()
    with pytest.raises(InvalidInput, match="writes into its input"):
        as_subject(Writes(), "m", task)
    assert torch.equal(task.test.x, before)


def test_labels_that_start_at_one(task):
    def up(split):
        return Split(split.x, split.labels + 1)

    moved = task.changed(train=up(task.train), valid=up(task.valid), test=up(task.test), num_classes=11)
    with pytest.raises(InvalidInput, match="labels run from 1 to 10; count classes from 0"):
        as_subject(linear(), "m", moved)


def test_half_named_models(task, factory, tmp_path):
    with pytest.raises(InvalidInput, match=r"name the function in it .*net\.py:NAME"):
        load_model(factory, task=task)
    with pytest.raises(InvalidInput, match="is a model itself"):
        load_model(f"{factory}:made", task=task)
    unlabelled = task.changed(test=Split(task.test.x), num_classes=0)
    with pytest.raises(InvalidInput, match="needs num_classes, and data without labels"):
        load_model(f"{factory}:needs", task=unlabelled)
    model, _, _ = load_model(f"{factory}:has_default", task=unlabelled)
    assert as_subject(model, "m", unlabelled).num_classes == 7


@pytest.mark.parametrize("model", ["efficientnet_lite0", "m.pt2", "m.pt"])
def test_weights_that_would_be_ignored_are_refused(model, task, tmp_path):
    save_file(linear().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(InvalidInput, match="brings its own weights"):
        load_model(model, weights=tmp_path / "w.safetensors", task=task)


def test_a_refused_pickle_is_one_sentence(tmp_path):
    import pickle

    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"a": print}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InvalidInput, match="pass --trust"):
            read_weights(tmp_path / "w.pkl")
