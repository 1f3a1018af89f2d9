"""The treatment: train on multi-resolution inputs, then probe the layers and aggregate by CrossMax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from surefoot.adversarial.crossmax.ensemble import SelfEnsemble, fit_probes
from surefoot.adversarial.crossmax.inputs import (
    MultiResolutionClassifier,
    MultiResolutionInput,
    check_widened,
    widen_first_conv,
)
from surefoot.core.task import Task
from surefoot.core.treatment import Treatment
from surefoot.errors import Refused, check, check_at_least, check_non_negative, check_positive
from surefoot.models import seeded_build
from surefoot.nn.taps import layer_names, spread


@dataclass
class CrossMax(Treatment):
    """The published system. Do not expect worst-case robustness from it: see the module, and attack it adaptively.

    The finished model answers at random, from a stream of its own that begins anew when it is loaded. `resolutions` are the image side
    and its halves down to 4 (two at least), `jitter` about a tenth of the side. `multi_resolution=False` keeps the network as it
    is and aggregates its layers alone, without randomness.
    """

    slug: ClassVar[str] = "crossmax"
    excludes: ClassVar[Mapping[str, str]] = {
        "fast_ibp": "interval bounds do not pass through random resizing, and its batch-norm layers would move the probes.",
        "crop_selection": "both decide at which size and place the network sees the image.",
        "dual_smoothing": "it votes over draws of a deterministic network, and CrossMax draws its inputs at random.",
        "adaptive_smoothing": "its mixing network reads the layers of one deterministic model, and CrossMax draws its inputs at random.",
        "random_pruning": "the first layer is replaced by a wider one, whose weights have no mask.",
        "layerwise_calibration": "it calibrates on the activations of fixed inputs, and the network behind CrossMax sees random ones.",
    }
    prepare_order: ClassVar[int] = -5  # before others remember the network's layers by name
    finish_order: ClassVar[int] = 20

    resolutions: tuple[int, ...] | None = None
    jitter: int | None = None
    noise: float = 0.2
    multi_resolution: bool = True
    layers: int = 4
    k: int | Literal["median"] = "median"
    probe_epochs: int = 6
    probe_lr: float = 1e-3
    batch_size: int = 64

    def __post_init__(self) -> None:
        self.resolutions = None if self.resolutions is None else tuple(self.resolutions)
        check_non_negative("noise", self.noise)
        check_at_least("layers", self.layers, 2)
        check(self.k == "median" or 1 <= int(self.k) <= self.layers + 1, f"k must be 'median' or lie in 1..{self.layers + 1}, got {self.k!r}.")  # fmt: skip
        check_at_least("probe_epochs", self.probe_epochs, 0)
        check_positive("probe_lr", self.probe_lr)
        check_at_least("batch_size", self.batch_size, 2)
        self.inputs_: MultiResolutionInput | None = None
        self.structure_: dict[str, Any] = {}

    def check(self, model: nn.Module, task: Task) -> None:
        if len(task.input_shape) != 3 or task.bounds != (0.0, 1.0):
            raise Refused(f"crossmax resizes images [C, H, W] in [0, 1]; these inputs have shape {list(task.input_shape)} and bounds {task.bounds}.")  # fmt: skip
        parameter = next(model.parameters(), None)
        if parameter is None:
            raise Refused("crossmax probes hidden layers of the model, and it has none.")
        example = task.train.x[:2].to(parameter.device)
        if self.multi_resolution:
            check_widened(self._wrapped(model, self._facts(task), torch.Generator()), example)
        if len(layer_names(model, example)) < 2:
            raise Refused("crossmax needs at least two hidden layers to probe beside the head.")

    def _facts(self, task: Task) -> dict[str, Any]:
        side = max(task.input_shape[1:])
        halves = [side >> k for k in range(3) if side >> k >= 4] or [side]
        sizes = self.resolutions or tuple(halves if len(halves) > 1 else [side, max(1, side // 2)])
        jitter = round(3 * side / 32) if self.jitter is None else self.jitter
        seed = int(torch.randint(2**31, (), generator=task.generator("crossmax/draws")))
        return {"resolutions": list(sizes), "jitter": jitter, "seed": seed, "input_shape": list(task.input_shape), "num_classes": task.num_classes}  # fmt: skip

    def _wrapped(
        self, model: nn.Module, facts: Mapping[str, Any], generator: torch.Generator
    ) -> MultiResolutionClassifier:
        sizes = tuple(int(size) for size in facts["resolutions"])
        inputs = MultiResolutionInput(
            sizes, down_noise=self.noise, up_noise=self.noise, jitter=int(facts["jitter"]),
            generator=torch.Generator().manual_seed(int(facts["seed"])),
        )  # fmt: skip
        return MultiResolutionClassifier(inputs, widen_first_conv(model, len(sizes), generator=generator))

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        self.structure_ = self._facts(task)
        if not self.multi_resolution:
            return model, task
        wrapped = self._wrapped(model, self.structure_, task.generator("crossmax/widen"))
        self.inputs_ = wrapped.inputs
        return wrapped, task

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        example = task.train.x[:2].to(task.device)
        names = spread(layer_names(model, example), self.layers)
        self.structure_ = {**self.structure_, "layers": list(names)}
        ensemble = seeded_build(lambda: self._ensemble(model, example), task.generator("crossmax/probes"))
        assert isinstance(ensemble, SelfEnsemble)
        fit_probes(
            ensemble, task.train.x, task.train.labels, epochs=self.probe_epochs, lr=self.probe_lr,
            batch_size=self.batch_size, generator=task.generator("crossmax/fit"),
        )  # fmt: skip
        if self.inputs_ is not None:
            self.inputs_.generator = torch.Generator().manual_seed(int(self.structure_["seed"]))
        return ensemble

    def _ensemble(self, model: nn.Module, example: torch.Tensor) -> SelfEnsemble:
        names, classes = self.structure_["layers"], int(self.structure_["num_classes"])
        return SelfEnsemble(model.eval(), names, classes, example=example, k=self.k)

    def structure(self) -> dict[str, Any]:
        return dict(self.structure_)

    def rebuild(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        check("layers" in structure, "crossmax has chosen no layers yet; they are known after finish.")
        self.structure_ = dict(structure)
        parameter = next(model.parameters())
        example = torch.zeros(2, *structure["input_shape"], device=parameter.device, dtype=parameter.dtype)
        if self.multi_resolution:
            wrapped = self._wrapped(model, structure, torch.Generator())
            ensemble = self._ensemble(wrapped, example)
            wrapped.inputs.generator = torch.Generator().manual_seed(int(structure["seed"]))
            return ensemble
        return self._ensemble(model, example)

    def state_dict(self) -> dict[str, Any]:
        generator = None if self.inputs_ is None else self.inputs_.generator
        return {"draws": None if generator is None else generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["draws"] is not None and self.inputs_ is not None and self.inputs_.generator is not None:
            self.inputs_.generator.set_state(state["draws"])
