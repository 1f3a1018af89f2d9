"""Embedded, standard and own data: what is read is what was written, and malformed files give one sentence."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from surefoot.datasets import check_task, load
from surefoot.datasets.embedded import digits, mnist1d, seeded, stratified_split
from surefoot.datasets.noise import corrupt_labels, with_label_noise
from surefoot.datasets.own import read_image
from surefoot.datasets.standard import decode_differences, mnist
from surefoot.errors import InvalidInput


def test_digits_split_is_stratified_disjoint_and_seeded():
    task = digits(1, sizes=(1000, 197, 600))
    assert (len(task.train), len(task.valid), len(task.test)) == (1000, 197, 600)
    assert task.input_shape == (1, 8, 8)
    counts = torch.bincount(task.test.labels, minlength=10)
    assert counts.min() >= 57
    assert counts.max() <= 63
    rows = torch.cat([s.x.flatten(1) for s in (task.train, task.valid, task.test)])
    whole = digits(2, sizes=(1000, 197, 600))
    assert torch.allclose(
        rows.sum(0), torch.cat([s.x.flatten(1) for s in (whole.train, whole.valid, whole.test)]).sum(0)
    )
    assert torch.equal(digits(1).train.x, digits(1).train.x)
    assert not torch.equal(digits(1).train.x, digits(2).train.x)


def test_split_parts_are_disjoint():
    y = torch.arange(100) % 7
    parts = stratified_split(y, (50, 20, 30), seeded(0, "s"))
    assert torch.cat(parts).sort().values.tolist() == list(range(100))
    with pytest.raises(InvalidInput, match="101"):
        stratified_split(y, (101,), seeded(0, "s"))


def test_mnist1d_leaves_the_global_random_state():
    pytest.importorskip("mnist1d")
    np.random.seed(5)  # noqa: NPY002
    expected = np.random.rand()  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    task = mnist1d(0)
    assert np.random.rand() == expected  # noqa: NPY002
    assert task.input_shape == (1, 40)


@pytest.mark.parametrize("kind", ["symmetric", "next"])
def test_label_noise_hits_exactly_its_share(kind):
    y = torch.randint(0, 10, (500,), generator=seeded(0, "y"))
    noisy = corrupt_labels(y, 0.3, 10, kind=kind, generator=seeded(0, "n"))
    assert int((noisy != y).sum()) == 150
    if kind == "next":
        assert set(((noisy - y) % 10).tolist()) == {0, 1}


def test_permuting_noise_keeps_the_class_counts():
    y = torch.randint(0, 5, (400,), generator=seeded(1, "y"))
    noisy = corrupt_labels(y, 0.5, 5, kind="permute", generator=seeded(1, "n"))
    assert torch.equal(noisy.bincount(), y.bincount())
    changed = int((noisy != y).sum())
    assert 120 < changed < 200  # 200 permuted, about a fifth of them onto their own class


def test_noise_keeps_the_clean_labels():
    split = digits(0).train
    once = with_label_noise(split, 0.2, 10, generator=seeded(0, "a"))
    twice = with_label_noise(once, 0.2, 10, generator=seeded(0, "b"))
    assert once.true_y is not None
    assert torch.equal(once.true_y, split.labels)
    assert twice.true_y is not None
    assert torch.equal(twice.true_y, split.labels)


def _write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def test_mnist_reads_idx_files(tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 10
    images = rng.integers(0, 256, (60, 28, 28))
    for stem, n in (("train", 60), ("t10k", 20)):
        _write_idx(folder / f"{stem}-images-idx3-ubyte.gz", images[:n])
        _write_idx(folder / f"{stem}-labels-idx1-ubyte.gz", labels[:n])
    task = mnist(0, tmp_path, sizes=(30, 10, 20))
    assert task.input_shape == (1, 28, 28)
    first = (images[:20] / 255.0).astype(np.float32)
    assert np.allclose(
        np.sort(task.test.x.numpy().reshape(20, -1).sum(1)), np.sort(first.reshape(20, -1).sum(1)), rtol=1e-5
    )
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"not gzip")
    with pytest.raises(InvalidInput, match="fetch it again"):
        mnist(0, tmp_path, sizes=(30, 10, 20))
    (folder / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(InvalidInput, match="is missing"):
        mnist(0, tmp_path)


def test_standard_data_needs_its_folder(monkeypatch):
    monkeypatch.delenv("SUREFOOT_DATA", raising=False)
    with pytest.raises(InvalidInput, match="--data-dir"):
        load("mnist")


def test_differences_decode_to_the_picture():
    image = np.random.default_rng(0).integers(0, 256, (3, 5, 6, 7)).astype(np.uint8)
    coded = image.copy()
    coded[0] -= image[1]
    coded[2] -= image[1]
    coded = np.diff(coded, axis=3, prepend=np.uint8(0)).astype(np.uint8)
    coded = np.diff(coded, axis=2, prepend=np.uint8(0)).astype(np.uint8)
    assert np.array_equal(decode_differences(coded), image.transpose(1, 2, 3, 0))


# --- own data -------------------------------------------------------------------------------------------------------


def _paint(path, value, size=(12, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def test_class_folders(tmp_path):
    for k, name in enumerate(("cats", "dogs")):
        for i in range(8):
            _paint(tmp_path / name / f"{i}.png", (k * 200, 10, i))
    task = load(str(tmp_path))
    assert task.class_names == ("cats", "dogs")
    assert task.input_shape == (3, 10, 12)
    for split in (task.train, task.valid, task.test):
        assert torch.equal(split.labels, (split.x[:, 0, 0, 0] > 0.5).long())


def test_folders_named_by_index_are_the_models_classes(tmp_path):
    for k in (3, 7):
        for i in range(6):
            _paint(tmp_path / str(k) / f"{i}.png", (k, k, k))
    task = load(str(tmp_path), input_shape=(3, 16, 16))
    assert set(task.test.labels.tolist()) == {3, 7}
    assert task.input_shape == (3, 16, 16)


def test_photos_without_labels(tmp_path):
    for i in range(5):
        _paint(tmp_path / f"{i}.jpg", (i * 40, 0, 0), size=(30 + i, 20))
    task = load(str(tmp_path), input_shape=(3, 8, 8))
    assert task.test.y is None
    assert len(task.test) == 5


@pytest.mark.parametrize(("mode", "value"), [("L", 128), ("RGBA", (255, 0, 0, 0)), ("I;16", 30000), ("P", 3)])
def test_image_modes(tmp_path, mode, value):
    path = tmp_path / "a.png"
    Image.new(mode, (6, 4), value).save(path)
    pixels = read_image(path, None, 3)
    assert pixels.shape == (3, 4, 6)
    assert 0.0 <= float(pixels.min()) <= float(pixels.max()) <= 1.0
    if mode == "RGBA":
        assert float(pixels.min()) == 1.0  # fully transparent is drawn on white
    if mode == "I;16":
        assert float(pixels.mean()) == pytest.approx(30000 / 65535, abs=0.01)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg", None, 3).shape == (3, 6, 4)


def test_npz(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 9, 9), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(40) % 4)
    task = load(str(tmp_path / "a.npz"))
    assert task.input_shape == (1, 9, 9)
    assert task.num_classes == 4
    assert float(task.train.x.max()) <= 1.0
    np.savez(tmp_path / "b.npz", x_train=x, y_train=np.arange(40) % 4, x_test=x[:10], y_test=np.arange(10) % 4)
    assert len(load(str(tmp_path / "b.npz")).test) == 10


def test_tables(tmp_path):
    pytest.importorskip("pandas")
    rows = "\n".join(f"{i},{i * 0.5},{'yes' if i % 2 else 'no'}" for i in range(40))
    (tmp_path / "a.csv").write_text("a,b,target\n" + rows)
    task = load(str(tmp_path / "a.csv"))
    assert task.modality == "vector"
    assert task.class_names == ("no", "yes")
    assert torch.equal(task.train.labels, (task.train.x[:, 0] % 2).long())
    with pytest.raises(InvalidInput, match="no column 'c'"):
        load(str(tmp_path / "a.csv"), target="c")


def test_function(tmp_path):
    (tmp_path / "mine.py").write_text("import numpy as np\ndef data(seed):\n    return np.random.default_rng(seed).random((30, 5)), np.arange(30) % 3\n")  # fmt: skip
    task = load(f"{tmp_path}/mine.py:data", seed=3)
    assert task.num_classes == 3
    with pytest.raises(InvalidInput, match="no function"):
        load(f"{tmp_path}/mine.py:other")


BAD = {
    "a.npz": b"PK nonsense",
    "b.npz": b"",
    "c.csv": b"",
    "d.csv": b"a,target\nx,1\ny,0\n",
    "e.csv": b"a,target\n1,1\n,0\n",
    "f.parquet": b"nope",
    "g.csv": b"\x00\xff\xfe\x01" * 50,
}


@pytest.mark.parametrize("name", list(BAD))
def test_malformed_files_give_one_sentence(tmp_path, name):
    pytest.importorskip("pandas")
    (tmp_path / name).write_bytes(BAD[name])
    with pytest.raises(InvalidInput) as caught:
        load(str(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_pickle_inside_an_npz_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([object()], dtype=object), y=np.zeros(1))
    with pytest.raises(InvalidInput, match=r"a\.npz"):
        load(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("damage", [b"", b"not an image", None])
def test_a_broken_image_is_named(tmp_path, damage):
    for i in range(4):
        _paint(tmp_path / "k" / f"{i}.png", (i, 0, 0))
        _paint(tmp_path / "l" / f"{i}.png", (i, 0, 0))
    target = tmp_path / "k" / "2.png"
    target.write_bytes(target.read_bytes()[:40] if damage is None else damage)
    with pytest.raises(InvalidInput, match=r"2\.png"):
        load(str(tmp_path), input_shape=(3, 8, 8))


def test_nothing_there():
    with pytest.raises(InvalidInput, match="digits"):
        load("no_such_thing")


def test_task_checks():
    task = digits(0)
    with pytest.raises(InvalidInput, match="outside 0"):
        check_task(task.changed(num_classes=5))
