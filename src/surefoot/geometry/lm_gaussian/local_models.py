"""Large models from a person's own disk: folders as `save_pretrained` of diffusers writes them, and single files of exported networks.

Nothing is downloaded, weights are read from safetensors only, and a part that is missing is named before gigabytes are read.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surefoot.errors import InvalidInput, MissingExtra, SurefootError, check

CONFIGS = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer.json", "vocab.json"),
}  # others: config.json


def diffusers_library() -> Any:
    try:
        import diffusers  # type: ignore[import-not-found]
        import transformers  # type: ignore[import-not-found]  # noqa: F401  # text encoders and tokenizers
    except ImportError as error:
        raise MissingExtra("diffusers", "diffusion") from error
    return diffusers


@contextmanager
def without_bars() -> Iterator[None]:
    """The libraries' own progress bars off while a model is read."""
    from diffusers.utils import logging as one  # type: ignore[import-not-found]
    from transformers.utils import logging as two  # type: ignore[import-not-found]

    shown = [library for library in (one, two) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def check_folder(folder: Path | str, parts: Sequence[str]) -> Path:
    """The folder, or one sentence about what it lacks."""
    path = Path(folder).expanduser()
    check(path.is_dir(), f"{path} is not a folder; give the folder of a model that you have on disk (nothing is downloaded).")  # fmt: skip
    missing = [p for p in parts if not any((path / p / c).is_file() for c in CONFIGS.get(p, ("config.json",)))]
    if missing:
        raise InvalidInput(f"{path} lacks {', '.join(missing)}; a diffusers folder with {', '.join(parts)} is needed, as save_pretrained writes it.")  # fmt: skip
    bare = [p for p in parts if p not in CONFIGS and not list((path / p).glob("*.safetensors"))]
    if bare:
        raise InvalidInput(f"{path} holds no safetensors weights for {', '.join(bare)}; other formats may run code when opened, so convert them first.")  # fmt: skip
    return path


def variant_of(part: Path) -> str | None:
    """ "fp16" where a folder holds only weights named so."""
    names = [p.name for p in part.glob("*.safetensors")]
    return "fp16" if names and all(".fp16." in name for name in names) else None


def _dtype_option(dtype: torch.dtype) -> dict[str, Any]:
    """How diffusers of this version is told a type other than float32; told so, it keeps in float32 the layers that need it."""
    from diffusers.utils import deprecation_utils  # type: ignore[import-not-found]

    if dtype == torch.float32:
        return {}
    return {"dtype" if hasattr(deprecation_utils, "_TORCH_DTYPE_DEPRECATION_MESSAGE") else "torch_dtype": dtype}


def _of_type(model: Any, dtype: torch.dtype) -> Any:
    """Cast, unless the first weight is of that type: transformers keep the type of the file."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return model if first is None or first.dtype == dtype else model.to(dtype)


def load_part(kind: Any, part: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """One model of a pipeline, frozen, every weight of it from the file: what a file lacks would be random numbers."""
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    if (variant := variant_of(part)) is not None:
        options["variant"] = variant
    if kind.__module__.startswith("diffusers."):
        options |= _dtype_option(dtype)
    try:
        with without_bars():
            model, info = kind.from_pretrained(str(part), **options)
    except Exception as error:  # whatever a malformed file makes the library raise
        raise InvalidInput(
            f"{part} cannot be read as {kind.__name__} ({_first_line(error)}); save it again."
        ) from error
    lost = [*info.get("missing_keys", ()), *(str(k) for k in info.get("mismatched_keys", ()))]
    if lost:
        raise InvalidInput(f"{part} lacks the weights {', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}; its config.json and its weights do not belong together.")  # fmt: skip
    return _of_type(model.to(device), dtype).eval().requires_grad_(False)


def pipeline_class(folder: Path | str) -> str:
    """The class that a folder's model_index.json names."""
    path = Path(folder).expanduser()
    check(path.is_dir(), f"{path} is not a folder; give the folder of a model that you have on disk (nothing is downloaded).")  # fmt: skip
    try:
        name = json.loads((path / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{path} holds no model_index.json that names a pipeline; give a folder that save_pretrained of diffusers wrote.") from error  # fmt: skip
    return str(name)


def load_pipeline(
    folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, kind: Any = None
) -> Any:
    """A whole diffusers pipeline; `kind` is the pipeline class, default the one that the folder names."""
    path = Path(folder).expanduser()
    library = diffusers_library()
    named = pipeline_class(path)
    kind = getattr(library, named, None) if kind is None else kind
    check(kind is not None, f"{path} names the pipeline {named}, which diffusers {library.__version__} does not have; save it with a version that it has.")  # fmt: skip
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    present = [k for k, v in index.items() if isinstance(v, list) and v[0] is not None and k not in CONFIGS]
    models = [k for k in present if k not in ("safety_checker", "feature_extractor") and not k.startswith("tokenizer")]
    check_folder(path, [k for k in models if k != "image_processor"])
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True} | _dtype_option(dtype)
    if all(variant_of(path / k) == "fp16" for k in models):
        options["variant"] = "fp16"
    if "safety_checker" in index:  # it would blank frames of a scene
        options |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        with without_bars():
            pipeline = kind.from_pretrained(str(path), **options).to(device)
    except SurefootError:
        raise
    except Exception as error:
        raise InvalidInput(
            f"{path} cannot be read as {kind.__name__} ({_first_line(error)}); save it again."
        ) from error
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            _of_type(part, dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_network(path: Path | str, *, trust: bool = False) -> Callable[..., Any]:
    """A network from `file.py:factory` (called without arguments), a `.pt2` of torch.export, or TorchScript; a pickle needs `trust`."""
    if ".py:" in str(path):
        from surefoot.datasets.own import load_callable

        network = load_callable(str(path))()
        check(callable(network), f"{path} returned {type(network).__name__}; return a network that can be called.")
        return network.eval() if isinstance(network, nn.Module) else network
    file = Path(path).expanduser()
    check(file.is_file(), f"{file} does not exist; give a TorchScript file, a .pt2 of torch.export or file.py:factory (nothing is downloaded).")  # fmt: skip
    try:
        if file.suffix == ".pt2":
            return torch.export.load(file).module()
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                scripted = any("/code/" in name for name in archive.namelist())
            if scripted:
                return torch.jit.load(file, map_location="cpu").eval()
    except Exception as error:  # whatever a malformed archive makes torch raise
        raise InvalidInput(f"{file} cannot be read as an exported network ({_first_line(error)}); export it again.") from error  # fmt: skip
    if not trust:
        raise InvalidInput(f"{file} is a pickle or bare weights; opening a pickle may run code, so give file.py:factory, export the network, or pass --trust if you trust it.")  # fmt: skip
    try:
        network = torch.load(file, map_location="cpu", weights_only=False)
    except Exception as error:
        raise InvalidInput(f"{file} cannot be unpickled ({_first_line(error)}); export the network.") from error
    check(isinstance(network, nn.Module), f"{file} holds {type(network).__name__}, not a network; give file.py:factory that loads these weights.")  # fmt: skip
    return network.eval()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
