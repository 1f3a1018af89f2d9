"""MNIST, Fashion-MNIST and CIFAR-10 from local files; nothing is downloaded.

Layout under the data folder (`--data-dir` or `$SUREFOOT_DATA`): `mnist/` and `fashion_mnist/` hold the four published idx
files (gzipped or not); `cifar10/` holds `cifar10.npz`, either with plain arrays `x_train, y_train, x_test, y_test` (uint8,
`[N, 32, 32, 3]`) or with the reversible differences `d_train, d_test` described in `decode_differences`.
"""

from __future__ import annotations

import gzip
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from surefoot.core.task import Split, Task
from surefoot.datasets.embedded import seeded, stratified_split
from surefoot.errors import InvalidInput, check

FASHION = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
Sizes = tuple[int, int, int]


def data_folder(data_dir: Path | str | None) -> Path:
    """The folder of the standard data: the argument, else `$SUREFOOT_DATA`, else a clear error."""
    chosen = data_dir if data_dir is not None else os.environ.get("SUREFOOT_DATA")
    if not chosen:
        raise InvalidInput(
            "Standard data needs --data-dir or the environment variable SUREFOOT_DATA to name its folder."
        )
    folder = Path(chosen).expanduser()
    check(folder.is_dir(), f"The data folder {folder} does not exist; point --data-dir or SUREFOOT_DATA at it.")
    return folder


def read_idx(path: Path) -> np.ndarray:
    """An idx file (LeCun's format), gzipped if its name ends in .gz."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, dims = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
        array = np.frombuffer(raw, np.uint8, offset=4 + 4 * dims)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise InvalidInput(f"{path} cannot be read as an idx file ({error}); fetch it again.") from error
    if zero != 0 or kind != 8 or array.size != int(np.prod(shape)):
        raise InvalidInput(f"{path} is not a complete idx file of bytes; fetch it again.")
    return array.reshape(shape)


def _find(folder: Path, stem: str) -> Path:
    for candidate in (folder / f"{stem}.gz", folder / stem):
        if candidate.exists():
            return candidate
    raise InvalidInput(f"{folder / stem}.gz is missing; put the four published idx files of the data set there.")


def _task(
    name: str, arrays: tuple[np.ndarray, ...], seed: int, sizes: Sizes | None, class_names: tuple[str, ...]
) -> Task:
    """Train and validation are drawn from the training file, test from the test file, stratified by seed."""
    x_train, y_train, x_test, y_test = arrays
    labels, test_labels = (torch.from_numpy(a.astype(np.int64)) for a in (y_train, y_test))
    n_train, n_valid, n_test = sizes or (len(labels) - 5000, 5000, len(test_labels))
    train, valid = stratified_split(labels, (n_train, n_valid), seeded(seed, "split"))
    (test,) = stratified_split(test_labels, (n_test,), seeded(seed, "test"))

    def images(array: np.ndarray, index: Tensor) -> Tensor:
        chosen = torch.from_numpy(array[index.numpy()]).float() / 255.0
        return chosen.unsqueeze(1) if chosen.dim() == 3 else chosen.permute(0, 3, 1, 2).contiguous()

    first, second = (Split(images(x_train, i), labels[i]) for i in (train, valid))
    held = Split(images(x_test, test), test_labels[test])
    return Task(name, first, second, held, 10, class_names=class_names, seed=seed)


def _idx_task(name: str, seed: int, data_dir: Path | str | None, sizes: Sizes | None, names: tuple[str, ...]) -> Task:
    folder = data_folder(data_dir) / name
    stems = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    return _task(name, tuple(read_idx(_find(folder, stem)) for stem in stems), seed, sizes, names)


def mnist(seed: int = 0, data_dir: Path | str | None = None, *, sizes: Sizes | None = None) -> Task:
    """MNIST: grey `[1, 28, 28]` in [0, 1]. `sizes` = (train, valid, test) draws stratified subsets by seed."""
    return _idx_task("mnist", seed, data_dir, sizes, tuple(str(k) for k in range(10)))


def fashion_mnist(seed: int = 0, data_dir: Path | str | None = None, *, sizes: Sizes | None = None) -> Task:
    """Fashion-MNIST: grey `[1, 28, 28]` in [0, 1]."""
    return _idx_task("fashion_mnist", seed, data_dir, sizes, FASHION)


def decode_differences(d: np.ndarray) -> np.ndarray:
    """uint8 `[3, N, H, W]` differences (red and blue minus green, then along columns and rows, modulo 256) to `[N, H, W, 3]`."""
    x = np.cumsum(np.cumsum(d, axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
    x[0] += x[1]
    x[2] += x[1]
    return np.ascontiguousarray(x.transpose(1, 2, 3, 0))


def cifar10(seed: int = 0, data_dir: Path | str | None = None, *, sizes: Sizes | None = None) -> Task:
    """CIFAR-10: colour `[3, 32, 32]` in [0, 1]."""
    path = data_folder(data_dir) / "cifar10" / "cifar10.npz"
    if not path.exists():
        raise InvalidInput(
            f"{path} is missing; put an npz with x_train, y_train, x_test, y_test (uint8, N x 32 x 32 x 3) there."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            if "d_train" in file:
                x_train, x_test = decode_differences(file["d_train"]), decode_differences(file["d_test"])
            else:
                x_train, x_test = file["x_train"], file["x_test"]
            arrays = (x_train, file["y_train"], x_test, file["y_test"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InvalidInput(f"{path} cannot be read as CIFAR-10 ({error}); fetch it again.") from error
    return _task("cifar10", arrays, seed, sizes, CIFAR)


STANDARD = {"mnist": mnist, "fashion_mnist": fashion_mnist, "cifar10": cifar10}
