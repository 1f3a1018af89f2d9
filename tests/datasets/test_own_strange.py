"""Data as people have them: a right task or one clear sentence."""

from __future__ import annotations

import numpy as np
import pytest

from surefoot.datasets import load
from surefoot.errors import InvalidInput

X = np.linspace(0, 1, 40 * 64, dtype=np.float32).reshape(40, 8, 8)
Y = np.arange(40) % 4


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        ((X * 255 - 128).astype(np.int8), Y, "int8"),
        (((X - 0.5) / 0.25).reshape(40, 1, 8, 8), Y, "got -2 to 2; undo a normalisation"),
        ((X * 65535).astype(np.uint16), Y, "got 0 to 6.55e"),
        (np.zeros((40, 12, 40), np.float32) - 1, Y, "taken for 1 x 12 x 40 images"),
        (X * 1.3, Y, "got 0 to 1.3"),
        (X, np.eye(4)[Y], r"y has shape \(40, 4\); give one class index"),
    ],
)
def test_arrays_of_another_kind(tmp_path, x, y, words):
    np.savez(tmp_path / "a.npz", x=x, y=y)
    with pytest.raises(InvalidInput, match=words):
        load(str(tmp_path / "a.npz"))


def test_an_array_under_an_archives_name(tmp_path):
    np.save(tmp_path / "a.npy", X)
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(InvalidInput, match=r"is not an \.npz archive"):
        load(str(tmp_path / "a.npz"))


def test_scales_that_were_right_stay(tmp_path):
    for name, x in (("float", X), ("bytes", (X * 255).round().astype(np.uint8)), ("wide", X * 255)):
        np.savez(tmp_path / f"{name}.npz", x=x, y=Y)
        task = load(str(tmp_path / f"{name}.npz"))
        found = np.sort(np.concatenate([s.x.numpy().ravel() for s in (task.train, task.valid, task.test)]))
        np.testing.assert_allclose(found, np.sort(X.ravel()), atol=0.003)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1.5,2,0\n" + "3,4,1\n" * 20, "looks like data"),
        ("a;b;target\n" + "1;2;0\n" * 20, "commas between"),
    ],
)
def test_tables_of_another_kind(tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InvalidInput, match=words):
        load(str(tmp_path / "t.csv"))


@pytest.mark.parametrize("names", ["a,b,kind", "0,1,2"])
def test_the_target_that_was_taken_is_told(tmp_path, names):
    (tmp_path / "t.csv").write_text(f"{names}\n" + "1,2,0\n3,4,1\n" * 10)
    assert load(str(tmp_path / "t.csv")).facts["target column"] == names.split(",")[-1]


FUNCTIONS = """
import torch

def fails():
    raise KeyError("gone")

def asks(a):
    return a

def attached():
    return torch.rand(8, 4, requires_grad=True), torch.arange(8) % 2
"""


def test_functions(tmp_path):
    (tmp_path / "d.py").write_text(FUNCTIONS)
    for name, words in (("fails", "fails failed: KeyError"), ("asks", "asks failed: TypeError")):
        with pytest.raises(InvalidInput, match=words):
            load(f"{tmp_path}/d.py:{name}")
    assert load(f"{tmp_path}/d.py:attached").num_classes == 2


def test_images_too_large_for_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    from PIL import Image

    from surefoot.datasets import own

    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (60, 40)).save(tmp_path / name / f"{i}.png")
    monkeypatch.setattr(own, "MAX_GIGABYTES", 1e-4)
    with pytest.raises(InvalidInput, match="4 images of 40 x 60 pixels"):
        load(str(tmp_path))
    assert load(str(tmp_path), input_shape=(3, 8, 8)).input_shape == (3, 8, 8)
