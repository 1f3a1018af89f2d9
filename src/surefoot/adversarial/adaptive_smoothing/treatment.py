"""The treatment: the run trains the accurate base, `finish` trains a robust copy and the network that mixes the two."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from surefoot.adversarial.adaptive_smoothing.network import AdaptiveSmoothingClassifier, MixingNetwork, feature_sizes
from surefoot.adversarial.adaptive_smoothing.training import AdversarialTraining, train_mixing_network
from surefoot.core.task import Task, Training
from surefoot.core.treatment import Treatment
from surefoot.errors import Refused, check, check_at_least, check_choice, check_non_negative, check_positive
from surefoot.models import seeded_build
from surefoot.nn.attacks import Norm
from surefoot.nn.modes import evaluating
from surefoot.nn.taps import layer_names, tapped


@dataclass
class AdaptiveSmoothing(Treatment):
    """Mix the trained model with a TRADES copy of itself, weighted per input within `alpha_range`.

    The copy starts from the model's weights and takes `robust_epochs` of adversarial training (about `steps` + 2 times a plain
    epoch each), the mixing network `mixing_epochs` against attacks on the whole. The result answers at both bases' cost.
    `eps` is in the scale of the data: 8/255 for colour photographs.
    """

    slug: ClassVar[str] = "adaptive_smoothing"
    excludes: ClassVar[Mapping[str, str]] = {
        "random_pruning": "training the robust copy after the run would fill the pruned weights again.",
        "crop_selection": "the robust copy is trained on whole images, and crop selection hands on crops of another size.",
        "dual_smoothing": "each trains its own copies of the model after the run, and neither certificate would hold for both.",
        "crossmax": "the mixing network reads the layers of one deterministic model, and CrossMax draws its inputs at random.",
    }
    finish_order: ClassVar[int] = 5  # after merging, before quantization: the copy still has to be trained

    eps: float = 0.1
    norm: Norm = "linf"
    beta: float = 6.0
    robust_epochs: int = 15
    steps: int = 5
    mixing_epochs: int = 3
    attack_steps: int = 10
    lr: float = 2e-3
    batch_size: int = 64
    accurate_scale: float = 1.0
    robust_scale: float = 3.0
    alpha_range: tuple[float, float] = (0.6, 0.99)

    def __post_init__(self) -> None:
        check_positive("eps", self.eps)
        check_choice("norm", self.norm, ("linf", "l2"))
        check_non_negative("beta", self.beta)
        check_at_least("robust_epochs", self.robust_epochs, 1)
        check_at_least("steps", self.steps, 1)
        check_at_least("mixing_epochs", self.mixing_epochs, 0)
        check_at_least("attack_steps", self.attack_steps, 1)
        check_positive("lr", self.lr)
        check_at_least("batch_size", self.batch_size, 2)
        check_positive("accurate_scale", self.accurate_scale)
        check_positive("robust_scale", self.robust_scale)
        self.alpha_range = (self.alpha_range[0], self.alpha_range[-1])
        check(0.5 <= self.alpha_range[0] <= self.alpha_range[1] <= 1, f"alpha_range must be (low, high) within [0.5, 1], got {self.alpha_range!r}.")  # fmt: skip
        self.layers_: tuple[str, ...] = ()
        self.channels_: tuple[int, ...] = ()

    def check(self, model: nn.Module, task: Task) -> None:
        device = next((p.device for p in model.parameters()), task.device)
        if not layer_names(model, task.train.x[:2].to(device)):
            raise Refused("adaptive_smoothing reads hidden layers of the model, and it has none.")

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        return self.mixture(model, self._robust_copy(model, task), task)

    def mixture(self, accurate: nn.Module, robust: nn.Module, task: Task) -> AdaptiveSmoothingClassifier:
        """Two nets of one architecture under a mixing network, which is trained here."""
        example = task.train.x[:2].to(task.device)
        self.layers_ = _two_stages(accurate, example)
        self.channels_ = feature_sizes(accurate, self.layers_, example)
        mixed = self._assemble(accurate, robust, self.structure(), task.generator("adaptive_smoothing/init"))
        train_mixing_network(
            mixed, task.train.x, task.train.labels, eps=self.eps, norm=self.norm, bounds=task.bounds,
            epochs=self.mixing_epochs, batch_size=self.batch_size, lr=self.lr, steps=self.attack_steps,
            generator=task.generator("adaptive_smoothing/mixing"),
        )  # fmt: skip
        return mixed

    def _robust_copy(self, model: nn.Module, task: Task) -> nn.Module:
        from surefoot.training.loop import fit  # the loop knows treatments; a method must not need it to be imported

        seed = int(torch.randint(2**31, (), generator=task.generator("adaptive_smoothing/robust")))
        training = Training(epochs=self.robust_epochs, batch_size=self.batch_size, optimizer="adam", lr=self.lr)
        trades = AdversarialTraining(self.eps, self.beta, self.steps, self.norm)
        return fit(model, task.changed(seed=seed), training, (trades,)).model

    def _assemble(
        self, accurate: nn.Module, robust: nn.Module, structure: Mapping[str, Any], generator: torch.Generator
    ) -> AdaptiveSmoothingClassifier:
        layers, channels = tuple(structure["layers"]), tuple(structure["channels"])
        check(len(layers) == 2, "adaptive_smoothing has chosen no layers yet; they are known after finish.")
        parameter = next(accurate.parameters())
        width = min(64, max(8, channels[1] // 2))  # a quarter of what the second stages bring: small beside the bases
        mixing = seeded_build(lambda: MixingNetwork(channels, channels, widths=(width,), blocks=1), generator)
        return AdaptiveSmoothingClassifier(
            accurate.eval(), robust.eval(), mixing.to(parameter.device, parameter.dtype),
            feature_modules=(layers, layers), alpha_range=self.alpha_range, momentum=0.1,
            accurate_scale=self.accurate_scale, robust_scale=self.robust_scale,
        ).to(parameter.device, parameter.dtype).eval()  # fmt: skip

    def structure(self) -> dict[str, Any]:
        return {"layers": list(self.layers_), "channels": list(self.channels_)}

    def rebuild(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        return self._assemble(model, copy.deepcopy(model), structure, torch.Generator().manual_seed(0))


def _two_stages(model: nn.Module, x: torch.Tensor) -> tuple[str, ...]:
    """The layers at one and two thirds of those with a spatial extent, or of all where the model has none."""
    names = layer_names(model, x)
    with evaluating(model), torch.no_grad():
        spatial = [n for n, f in zip(names, tapped(model, names, x)[1], strict=True) if f.dim() >= 3]
    stages = tuple(spatial) or names
    count = len(stages)
    return (stages[count // 3], stages[2 * count // 3]) if count > 2 else (stages[0], stages[count - 1])
