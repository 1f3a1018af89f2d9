"""Embedded, standard and own data behind one `load`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from surefoot.core.task import BudgetName, Split, Task
from surefoot.datasets import embedded, own, standard
from surefoot.errors import InvalidInput, check

EMBEDDED = {"digits": embedded.digits, "mnist1d": embedded.mnist1d}


def load(
    data: str,
    *,
    seed: int = 0,
    data_dir: Path | str | None = None,
    target: str | None = None,
    input_shape: tuple[int, ...] | None = None,
    class_names: Sequence[str] = (),
    budget: BudgetName = "standard",
    device: torch.device | str = "cpu",
) -> Task:
    """The task behind a DATA argument.

    `data`: an embedded name (digits, mnist1d), a standard name (mnist, fashion_mnist, cifar10 under `data_dir` or
    `$SUREFOOT_DATA`), a folder of class folders of images, an unlabelled folder of photos, an .npz, a .csv or
    .parquet with a `target` column, or `file.py:function`. `input_shape` (C, H, W) resizes images from folders.
    """
    path = Path(data).expanduser()
    if data in EMBEDDED:
        task = EMBEDDED[data](seed)
    elif data in standard.STANDARD:
        task = standard.STANDARD[data](seed, data_dir)
    elif ".py:" in data:
        task = own.from_function(data, seed=seed)
    elif path.is_dir():
        task = own.from_folder(path, seed=seed, input_shape=input_shape, class_names=class_names)
    elif path.suffix == ".npz" and path.exists():
        task = own.from_npz(path, seed=seed)
    elif path.suffix in (".csv", ".parquet") and path.exists():
        task = own.from_table(path, seed=seed, target=target)
    else:
        names = ", ".join([*EMBEDDED, *standard.STANDARD])
        raise InvalidInput(
            f"DATA {data!r} is neither a known name ({names}) nor an existing folder, .npz, .csv, .parquet or file.py:function."
        )
    return task.changed(budget=budget, device=torch.device(device), seed=seed)


def check_task(task: Task) -> None:
    """The checks every run makes on its data: something there, finite, labels within the classes, shapes alike."""
    check(len(task.test) > 0, f"The test split of {task.name} is empty; give more data.")
    for name, split in (("train", task.train), ("valid", task.valid), ("test", task.test)):
        if len(split) == 0:
            continue
        shape = tuple(split.x.shape[1:])
        check(
            shape == task.input_shape,
            f"The {name} split has inputs of shape {shape}, the test split {task.input_shape}.",
        )
        finite = bool(torch.isfinite(split.x).all())
        check(finite, f"The {name} split of {task.name} holds NaN or infinite values; clean them.")
        if split.y is not None:
            low, high = int(split.y.min()), int(split.y.max())
            inside = low >= 0 and high < task.num_classes
            check(
                inside,
                f"Labels of the {name} split lie in [{low}, {high}], outside 0..{task.num_classes - 1}; mend them.",
            )


__all__ = ["EMBEDDED", "Split", "Task", "check_task", "embedded", "load", "own", "standard"]
