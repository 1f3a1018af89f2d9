"""Model files of each kind, read safely: weights, exported programs, TorchScript, and pickles only where they are trusted.

What cannot be read is one sentence that names the file. `surefoot.models.loading` decides which kind a file is.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from surefoot.errors import InvalidInput, check


def read_weights(path: Path, *, trust: bool = False) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a torch file that holds only tensors; a pickle needs `trust`."""
    check(path.is_file(), f"The weights file {path} does not exist; check --weights.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns at length of pickles that it then refuses
            state = torch.load(path, map_location="cpu", weights_only=not trust)
    except SafetensorError as error:
        raise InvalidInput(f"{path} is not a valid safetensors file ({error}); save it again.") from error
    except pickle.UnpicklingError as error:
        raise InvalidInput(
            f"{path} is a pickle that may run code when opened; convert it to safetensors, or pass --trust if you trust it."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InvalidInput(f"{path} cannot be read as model weights ({first_line(error)}); save it again.") from error
    if isinstance(state, nn.Module):
        state = state.state_dict()
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InvalidInput(f"{path} does not hold a state dict of tensors; save model.state_dict() with safetensors.")
    return dict(state)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict strictly, with one sentence about what does not fit; tied weights may be stored once."""
    own = model.state_dict()
    extra = sorted(set(state) - set(own))
    shared: dict[int, list[str]] = {}
    for key, value in own.items():
        shared.setdefault(value.data_ptr(), []).append(key)
    tied = {k for keys in shared.values() if len(keys) > 1 and any(k in state for k in keys) for k in keys}
    missing = sorted(k for k in own if k not in state and k not in tied)
    misshapen = [k for k in state if k in own and own[k].shape != state[k].shape]
    if missing or extra or misshapen:
        problems = [f"lacks {k}" for k in missing[:1]] + [f"has an unknown {k}" for k in extra[:1]]
        problems += [
            f"has {k} of shape {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in misshapen[:1]
        ]
        raise InvalidInput(
            f"{where} does not fit the model: it {' and '.join(problems)}; check the factory and its arguments."
        )
    model.load_state_dict(dict(state), strict=False)


class Frozen(nn.Module):
    """An exported or scripted model: no training mode, and batches cut to the size it was exported for."""

    def __init__(self, program: nn.Module, batch_size: int | None = None) -> None:
        super().__init__()
        self.program = program
        self.batch_size = batch_size

    def train(self, mode: bool = True) -> Frozen:
        self.training = mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_size is None:
            return self.program(x)
        parts = []
        for part in x.split(self.batch_size):
            short = self.batch_size - len(part)
            padded = torch.cat([part, part[-1:].expand(short, *part.shape[1:])]) if short else part
            answer = self.program(padded)
            if not isinstance(answer, Tensor):
                return answer  # a tuple, say: whoever asks for logits says what is wrong with it
            parts.append(answer[: len(part)])
        return torch.cat(parts)


def load_exported(path: Path) -> tuple[nn.Module, tuple[int, ...]]:
    """A `torch.export` program and the shape of one input."""
    try:
        program = torch.export.load(path)
        placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        names = set(program.graph_signature.user_inputs)
        inputs = [n.meta["val"] for n in placeholders if n.name in names]
    except Exception as error:  # torch.export.load raises whatever its parts raise on a malformed archive
        raise InvalidInput(
            f"{path} cannot be read as a torch.export program ({first_line(error)}); export it again."
        ) from error
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].dim() < 1:
        raise InvalidInput(f"{path} takes {len(inputs)} inputs; a classifier takes one, a batch of examples.")
    _check_evaluating(path, {part for n in program.graph.nodes if (part := _trains(n))})
    example = inputs[0]
    batch = example.shape[0]
    module = Frozen(program.module(), batch if isinstance(batch, int) else None)
    return module, tuple(int(s) for s in example.shape[1:])


def _trains(node: Any) -> str | None:
    """What an exported operation does as in training, if anything: dropping at random, or normalising by the batch."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return None
    given = dict(zip((a.name for a in schema.arguments), node.args)) | dict(node.kwargs)
    return _training_part(
        schema.name, given.get("train", given.get("training")), given.get("p"), given.get("running_mean")
    )


def _training_part(operation: str, training: object, p: object, running_mean: object) -> str | None:
    if training is not True:
        return None
    if "dropout" in operation and p != 0:
        return "dropout"
    return "batch norm" if "batch_norm" in operation and running_mean is not None else None


def _check_evaluating(path: Path, parts: set[str]) -> None:
    """A program frozen in training mode answers at random, or by its batch; no flag can put that right."""
    check(not parts, f"{path} was frozen in training mode ({' and '.join(sorted(parts))} still at work); call model.eval() and export it again.")  # fmt: skip


def _scripted_in_training(program: Any) -> set[str]:
    """The same for TorchScript: constants that a trace of a training model leaves behind."""
    graph, found = program.inlined_graph, set()
    for operation in ("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout"):
        for _, p, training in (list(node.inputs()) for node in graph.findAllNodes(operation)):
            found.add(_training_part(operation, training.toIValue(), p.toIValue(), None))
    for node in graph.findAllNodes("aten::batch_norm"):
        _, _, _, running_mean, _, training, *_ = node.inputs()
        mean = None if running_mean.node().mustBeNone() else running_mean
        found.add(_training_part("aten::batch_norm", training.toIValue(), None, mean))
    return found - {None}


def load_script(path: Path, *, trust: bool) -> nn.Module:
    """A TorchScript archive; with `trust` also a pickled model."""
    try:
        with zipfile.ZipFile(path) as archive:
            scripted = any("/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        if trust:
            return _load_pickle(path)
        raise InvalidInput(f"{path} is neither TorchScript nor another archive of torch's; if it is a pickle you trust, pass --trust.") from error  # fmt: skip
    if scripted:
        try:
            program = torch.jit.load(path, map_location="cpu").eval()
        except (RuntimeError, OSError) as error:
            raise InvalidInput(f"{path} cannot be read as TorchScript ({first_line(error)}); save it again.") from error
        _check_evaluating(path, _scripted_in_training(program))
        return Frozen(program)
    if trust:
        return _load_pickle(path)
    raise InvalidInput(
        f"{path} is a pickled model or a bare state dict; give file.py:factory with --weights, or pass --trust to unpickle it."
    )


def _load_pickle(path: Path) -> nn.Module:
    try:
        model = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise InvalidInput(f"{path} cannot be unpickled ({first_line(error)}); save it again.") from error
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"{path} holds {type(model).__name__}, not a model; give file.py:factory with --weights.")
    return model


def first_line(error: BaseException) -> str:
    """What the error says first, short enough for the middle of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
