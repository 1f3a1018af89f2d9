"""Data that is always there: scikit-learn's digits, and the procedural MNIST-1D where its package is installed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from surefoot.core.task import Split, Task
from surefoot.errors import InvalidInput, MissingExtra, check, check_at_least


def seeded(seed: int, purpose: str) -> torch.Generator:
    """A generator for one purpose of one seed; the same streams as `Task.generator`."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def stratified_split(y: Tensor, sizes: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    """Disjoint index sets of the given sizes, each with the classes in (nearly) the same proportions.

    Examples are shuffled, then ordered by their relative rank within the class, so that every prefix is balanced.
    """
    check(sum(sizes) <= len(y), f"sizes {tuple(sizes)} ask for {sum(sizes)} examples, and there are {len(y)}.")
    order = torch.randperm(len(y), generator=generator)
    labels = y[order]
    rank = torch.empty(len(y), dtype=torch.float64)
    for label in labels.unique().tolist():
        of_class = (labels == label).nonzero().flatten()
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        rank[of_class] = (torch.arange(len(of_class), dtype=torch.float64) + offset) / len(of_class)
    order = order[rank.argsort(stable=True)]
    return [part.sort().values for part in order[: sum(sizes)].split(list(sizes))]


def digits(seed: int = 0, *, sizes: tuple[int, int, int] = (1000, 197, 600), image_size: int = 8) -> Task:
    """scikit-learn's handwritten digits: 1,797 grey images `[1, 8, 8]` in [0, 1], 10 classes, split by seed, stratified.

    `image_size` other than 8 scales the images bilinearly.
    """
    from sklearn.datasets import load_digits

    check_at_least("image_size", image_size, 1)
    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(np.asarray(pixels, dtype=np.float32) / 16.0).reshape(-1, 1, 8, 8)
    y = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    if image_size != 8:
        x = F.interpolate(x, size=(image_size, image_size), mode="bilinear", align_corners=False)
    train, valid, test = (Split(x[i], y[i]) for i in stratified_split(y, sizes, seeded(seed, "split")))
    names = tuple(str(k) for k in range(10))
    return Task("digits", train, valid, test, 10, class_names=names, seed=seed)


def mnist1d(seed: int = 0, *, sizes: tuple[int, int, int] = (3200, 800, 1000)) -> Task:
    """MNIST-1D (Greydanus 2020, arXiv 2011.14439): 5,000 signals `[1, 40]`, 10 classes, drawn by the package `mnist1d`.

    The data are those of the package's own seed 42; `seed` decides the split.
    """
    try:
        from mnist1d.data import get_dataset_args, make_dataset  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingExtra("mnist1d", "signal") from error
    state = np.random.get_state()  # noqa: NPY002  the package draws from numpy's global generator: put it back
    import random

    python_state = random.getstate()
    try:
        data = make_dataset(get_dataset_args())
    finally:
        np.random.set_state(state)  # noqa: NPY002
        random.setstate(python_state)
    x = torch.from_numpy(np.concatenate([data["x"], data["x_test"]]).astype(np.float32)).unsqueeze(1)
    y = torch.from_numpy(np.concatenate([data["y"], data["y_test"]]).astype(np.int64))
    train, valid, test = (Split(x[i], y[i]) for i in stratified_split(y, sizes, seeded(seed, "split")))
    return Task("mnist1d", train, valid, test, 10, modality="signal", bounds=None, seed=seed)


def from_arrays(
    x: Tensor,
    y: Tensor | None,
    *,
    name: str,
    seed: int,
    modality: str,
    bounds: tuple[float, float] | None,
    class_names: Sequence[str] = (),
    test: tuple[Tensor, Tensor | None] | None = None,
    shares: tuple[float, float] = (0.15, 0.25),
) -> Task:
    """A task from arrays: validation (and, without `test`, test) shares are split off, stratified, by seed."""
    if y is None:
        empty = Split(x[:0], None)
        return Task(name, empty, empty, Split(x, None), 0, modality, bounds, tuple(class_names), seed=seed)  # type: ignore[arg-type]
    num_classes = max(
        len(class_names), int(y.max()) + 1, 0 if test is None or test[1] is None else int(test[1].max()) + 1
    )
    if num_classes < 2:
        raise InvalidInput(f"{name} has {num_classes} class; a classifier needs at least two.")
    n = len(x)
    n_valid, n_test = math.ceil(shares[0] * n), 0 if test is not None else math.ceil(shares[1] * n)
    check(n - n_valid - n_test > 0, f"{name} has {n} examples, too few to split; give at least four.")
    parts = stratified_split(y, (n - n_valid - n_test, n_valid, n_test), seeded(seed, "split"))
    train, valid, held = (Split(x[i], y[i]) for i in parts)
    return Task(name, train, valid, held if test is None else Split(*test), num_classes, modality, bounds, tuple(class_names), seed=seed)  # type: ignore[arg-type]  # fmt: skip
