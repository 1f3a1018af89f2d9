"""A person's own data: folders of images, .npz, tables, or a function in a Python file.

Every reader gives a `Task`; whatever is wrong with a file is said in one sentence that names it.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surefoot.core.task import Task
from surefoot.datasets.embedded import from_arrays, seeded
from surefoot.errors import InvalidInput, MissingExtra, SurefootError, check

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
MAX_IMAGES = 20_000  # a folder is held in memory; beyond this a random subset is taken and the report says so

MAX_GIGABYTES = 8.0  # of float32 pixels, held twice while they are stacked


# --- images ---------------------------------------------------------------------------------------------------------


def read_image(path: Path, size: tuple[int, int] | None, channels: int) -> Tensor:
    """One image as float32 `[C, H, W]` in [0, 1]: EXIF rotation applied, alpha dropped on white, 16-bit scaled.

    With `size` (H, W) the shorter side is scaled to fit and the centre is cut out.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError) as error:
        raise InvalidInput(f"{path} cannot be read as an image ({error}); replace or remove it.") from error
    if image.mode in ("I", "I;16", "I;16B", "F"):
        values = np.asarray(image, dtype=np.float32)
        image = Image.fromarray(np.uint8(np.clip(values / (65535.0 if values.max() > 255 else 255.0), 0, 1) * 255))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    image = image.convert("RGB" if channels == 3 else "L")
    if size is not None:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).float() / 255.0
    return pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()


def _images_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def _common_size(paths: Sequence[Path]) -> tuple[int, int]:
    """The images' own size if they all share it (from the headers), else 224 x 224."""
    from PIL import Image

    sizes = set()
    for path in paths[:200]:
        try:
            with Image.open(path) as image:
                sizes.add((image.height, image.width))
        except (OSError, SyntaxError, ValueError) as error:
            raise InvalidInput(f"{path} cannot be read as an image ({error}); replace or remove it.") from error
    return sizes.pop() if len(sizes) == 1 else (224, 224)


def from_folder(folder: Path, *, seed: int, input_shape: tuple[int, ...] | None, class_names: Sequence[str]) -> Task:
    """A folder of class folders of images, or (no class folders) an unlabelled folder of photos.

    Class folders named by integers are taken as class indices of the model; folders named like the model's
    `class_names` get those indices; anything else is numbered in sorted order.
    """
    class_folders = sorted(p for p in folder.iterdir() if p.is_dir() and _images_in(p))
    loose = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    check(
        bool(class_folders or loose), f"{folder} holds no images; put images, or one folder of images a class, there."
    )
    labelled = not loose
    found = [(p, c) for c in class_folders for p in _images_in(c)] if labelled else [(p, None) for p in loose]
    facts: dict[str, object] = {"images found": len(found)}
    if len(found) > MAX_IMAGES:
        keep = torch.randperm(len(found), generator=seeded(seed, "folder"))[:MAX_IMAGES].sort().values.tolist()
        found, facts["images used"] = [found[i] for i in keep], MAX_IMAGES
    channels, size = (3, None) if input_shape is None else (input_shape[0], (input_shape[1], input_shape[2]))
    size = size or _common_size([p for p, _ in found])
    gigabytes = 4e-9 * len(found) * channels * size[0] * size[1]
    check(gigabytes <= MAX_GIGABYTES, f"{folder} holds {len(found)} images of {size[0]} x {size[1]} pixels, {gigabytes:.0f} GB in memory; scale them down, or use fewer.")  # fmt: skip
    x = torch.stack([read_image(p, size, channels) for p, _ in found])
    if not labelled:
        task = from_arrays(
            x, None, name=folder.name, seed=seed, modality="image", bounds=(0.0, 1.0), class_names=class_names
        )
        return task.changed(facts=facts)
    names = [c.name for c in class_folders]
    if all(name.isdigit() for name in names):
        index_of, known = {name: int(name) for name in names}, tuple(class_names)
    elif class_names and set(names) <= set(class_names):
        index_of, known = {name: list(class_names).index(name) for name in names}, tuple(class_names)
    else:
        index_of, known = {name: i for i, name in enumerate(names)}, tuple(names)
    y = torch.tensor([index_of[c.name] for _, c in found if c is not None])
    task = from_arrays(x, y, name=folder.name, seed=seed, modality="image", bounds=(0.0, 1.0), class_names=known)
    return task.changed(facts=facts)


# --- arrays and tables ----------------------------------------------------------------------------------------------


def _as_inputs(array: np.ndarray, where: str) -> tuple[Tensor, str, tuple[float, float] | None]:
    """Float inputs with modality and bounds: uint8 images are scaled, channels-last images are turned."""
    check(
        array.dtype != np.int8,
        f"{where} holds int8, which starts below black; give uint8 (0..255) or floats in [0, 1].",
    )
    check(
        array.dtype.kind in "fiub" and array.size > 0,
        f"{where} must be a non-empty numeric array, got {array.dtype} {array.shape}.",
    )
    x = torch.from_numpy(np.ascontiguousarray(array)).float()
    check(bool(torch.isfinite(x).all()), f"{where} holds NaN or infinite values; clean them first.")
    if x.dim() == 2:
        return x, "vector", None
    if x.dim() == 3:
        if x.shape[1] >= 8 and x.shape[2] >= 8:
            x = x.unsqueeze(1)
        else:
            return x, "signal", None
    check(x.dim() == 4, f"{where} must have 2, 3 or 4 dimensions (table, signals or images), got shape {array.shape}.")
    if x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.permute(0, 3, 1, 2).contiguous()
    low, high = float(x.min()), float(x.max())
    shape = " x ".join(map(str, x.shape[1:]))
    check(low >= 0.0 and (high <= 1.0 or 1.5 < high <= 255.0), f"{where} was taken for {shape} images, and these must lie in [0, 1] or 0..255, got {low:.3g} to {high:.3g}; undo a normalisation (it belongs into the model), or give other data as a Task by file.py:function.")  # fmt: skip
    return (x / 255.0 if array.dtype == np.uint8 or high > 1.5 else x), "image", (0.0, 1.0)


def _as_labels(array: np.ndarray, where: str, n: int) -> Tensor:
    flat = np.asarray(array).reshape(-1)
    check(len(flat) == n or len(flat) % n != 0, f"{where} has shape {np.shape(array)}; give one class index an example (argmax of one-hot labels).")  # fmt: skip
    check(len(flat) == n, f"{where} has {len(flat)} labels for {n} examples.")
    check(flat.dtype.kind in "iufb", f"{where} must hold integer class indices, got {flat.dtype}.")
    check(
        bool(np.isfinite(flat.astype(np.float64)).all()) and bool((flat == flat.astype(np.int64)).all()),
        f"{where} must hold whole numbers.",
    )
    check(int(flat.min()) >= 0, f"{where} must hold classes from 0 up, got {int(flat.min())}.")
    return torch.from_numpy(flat.astype(np.int64))


def _task_from_mapping(arrays: Mapping[str, np.ndarray], where: str, seed: int, name: str) -> Task:
    """Keys x, y (y may be missing) or x_train, y_train, x_test, y_test; optional class_names."""
    names = tuple(str(s) for s in np.asarray(arrays["class_names"]).reshape(-1)) if "class_names" in arrays else ()
    if "x_train" in arrays:
        missing = [k for k in ("y_train", "x_test", "y_test") if k not in arrays]
        check(not missing, f"{where} has x_train but lacks {', '.join(missing)}; give all four arrays.")
        x, modality, bounds = _as_inputs(arrays["x_train"], f"{where}:x_train")
        x_test, _, _ = _as_inputs(arrays["x_test"], f"{where}:x_test")
        check(
            x.shape[1:] == x_test.shape[1:],
            f"{where}: x_train has shape {tuple(x.shape[1:])} and x_test {tuple(x_test.shape[1:])}.",
        )
        y = _as_labels(arrays["y_train"], f"{where}:y_train", len(x))
        y_test = _as_labels(arrays["y_test"], f"{where}:y_test", len(x_test))
        return from_arrays(
            x, y, name=name, seed=seed, modality=modality, bounds=bounds, class_names=names, test=(x_test, y_test)
        )
    check(
        "x" in arrays,
        f"{where} holds {', '.join(sorted(arrays)) or 'nothing'}; it needs x and y, or x_train, y_train, x_test, y_test.",
    )
    x, modality, bounds = _as_inputs(arrays["x"], f"{where}:x")
    y = _as_labels(arrays["y"], f"{where}:y", len(x)) if "y" in arrays else None
    return from_arrays(x, y, name=name, seed=seed, modality=modality, bounds=bounds, class_names=names)


def from_npz(path: Path, *, seed: int) -> Task:
    """Arrays in an .npz: `x` and `y`, or `x_train, y_train, x_test, y_test`; object arrays (pickles) are refused."""
    check(zipfile.is_zipfile(path), f"{path} is not an .npz archive; write it again with numpy.savez.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        raise InvalidInput(
            f"{path} cannot be read as an .npz file ({error}); write it again with numpy.savez."
        ) from error
    return _task_from_mapping(arrays, path.name, seed, path.stem)


def from_table(path: Path, *, seed: int, target: str | None = None) -> Task:
    """A .csv or .parquet of numbers with a target column (`target`, else one named target, label or y, else the last)."""
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingExtra("pandas", "tables") from error
    try:
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except ImportError as error:
        raise MissingExtra("pyarrow", "tables") from error
    except Exception as error:  # pandas and pyarrow raise dozens of types for a malformed file
        raise InvalidInput(
            f"{path} cannot be read as a table ({str(error).splitlines()[0]}); check the file."
        ) from error
    check(len(frame) > 0 and frame.shape[1] > 1, f"{path} has {len(frame)} rows and {frame.shape[1]} columns; a table needs rows, a target column, and commas between the columns.")  # fmt: skip
    columns = [str(c) for c in frame.columns]
    check(len(set(columns)) == len(columns), f"{path} has two columns of one name; rename one.")
    numbered = columns == [str(i) for i in range(len(columns))]
    check(numbered or not all(_is_number(c) for c in columns), f"{path} begins with {', '.join(columns[:3])}, which looks like data; put the columns' names into the first row.")  # fmt: skip
    table = {str(c): np.asarray(frame[c]) for c in frame.columns}
    usual = next((c for c in columns if c.lower() in ("target", "label", "class", "y")), columns[-1])
    chosen = target if target is not None else usual
    check(chosen in columns, f"{path} has no column {chosen!r}; its columns are {', '.join(columns[:20])}.")
    labels = table.pop(chosen)
    for column, values in table.items():
        numeric = values.dtype.kind in "iufb"
        check(numeric, f"Column {column!r} of {path} holds {values.dtype}, not numbers; encode or drop it.")
        gaps = int((~np.isfinite(values.astype(np.float64))).sum())
        check(gaps == 0, f"Column {column!r} of {path} has {gaps} missing or infinite values; fill or drop them.")
    gaps = sum(v is None or v != v for v in labels.tolist())
    check(gaps == 0, f"The target column {chosen!r} of {path} has {gaps} missing values; drop those rows.")
    classes, indices = np.unique(labels.astype(str) if labels.dtype.kind == "O" else labels, return_inverse=True)
    most = max(50, len(labels) // 20)
    check(
        len(classes) <= most,
        f"The target column {chosen!r} has {len(classes)} different values; give a column of classes.",
    )
    x = torch.from_numpy(np.stack([v.astype(np.float32) for v in table.values()], axis=1))
    y = torch.from_numpy(indices.astype(np.int64).reshape(-1))
    names = [str(c) for c in classes.tolist()]
    task = from_arrays(x, y, name=path.stem, seed=seed, modality="vector", bounds=None, class_names=names)
    return task.changed(facts={"target column": chosen})


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# --- a function in a Python file ------------------------------------------------------------------------------------


def load_module(path: Path) -> ModuleType:
    """Run a Python file of the user's and return it as a module. This runs the user's own code, and says so."""
    check(path.is_file(), f"{path} does not exist; give the path of a Python file.")
    logger.warning("Running code from %s.", path)
    spec = importlib.util.spec_from_file_location(f"_surefoot_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SurefootError:
        raise
    except Exception as error:
        raise InvalidInput(f"{path} failed while it was run: {type(error).__name__}: {error}.") from error
    return module


def load_callable(reference: str) -> Callable[..., Any]:
    """The callable behind `file.py:name`."""
    file, _, name = reference.rpartition(":")
    found = getattr(load_module(Path(file).expanduser()), name, None)
    check(callable(found), f"{file} defines no function {name!r}; check the part after the colon.")
    return found  # type: ignore[return-value]


def call_with_known(function: Callable[..., Any], **known: Any) -> Any:
    """Call with those of `known` that the function's signature takes."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return function(**known)
    return function(**{k: v for k, v in known.items() if k in parameters})


def from_function(reference: str, *, seed: int) -> Task:
    """`file.py:function`: the function (which may take `seed`) returns a `Task`, a pair (x, y) or a mapping of arrays."""
    function = load_callable(reference)
    try:
        result = call_with_known(function, seed=seed)
    except SurefootError:
        raise
    except Exception as error:
        first = next(iter(str(error).splitlines()), "no message")
        raise InvalidInput(f"{reference} failed: {type(error).__name__}: {first}.") from error
    if isinstance(result, Task):
        return result
    name = reference.rpartition(":")[2]
    if isinstance(result, tuple) and len(result) == 2:
        result = {"x": result[0], "y": result[1]}
    if not isinstance(result, Mapping):
        raise InvalidInput(
            f"{reference} returned {type(result).__name__}; return a Task, (x, y) or a mapping of arrays."
        )
    arrays = {k: v.detach().cpu().numpy() if isinstance(v, Tensor) else np.asarray(v) for k, v in result.items()}
    return _task_from_mapping(arrays, reference, seed, name)
