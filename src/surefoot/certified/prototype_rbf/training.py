"""The two losses, and the treatment that puts the head in place of a model's last linear layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from surefoot.certified.prototype_rbf.certificate import rbf_radius, unwrap
from surefoot.certified.prototype_rbf.head import (
    KERNELS,
    VARIANTS,
    ClassificationByComponents,
    ComponentLogits,
    Kernel,
    Variant,
)
from surefoot.core.task import Task
from surefoot.core.treatment import Batch, Treatment
from surefoot.errors import Refused, check, check_at_least, check_choice, check_non_negative, check_positive
from surefoot.nn.modes import evaluating


class CBCMarginLoss(nn.Module):
    """max(0, best other p - p_y + margin), averaged; takes class probabilities `[B, C]`, not logits."""

    def __init__(self, margin: float = 0.1) -> None:
        super().__init__()
        check(0 < margin <= 1, f"margin must lie in (0, 1], got {margin!r}.")
        self.margin = margin

    def forward(self, probabilities: Tensor, y: Tensor) -> Tensor:
        own = probabilities.gather(1, y.unsqueeze(1)).squeeze(1)
        mine = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, y.unsqueeze(1), True)
        return (probabilities.masked_fill(mine, -torch.inf).amax(1) - own + self.margin).clamp_min(0).mean()


class CBCRobustLoss(nn.Module):
    """mean max(0, target_radius - radius(x)), plus the margin loss of the points that are still wrong.

    The radius of a wrong point is negative and unbounded below, and one far outlier would outweigh the batch: it is cut at
    -target_radius, where the gradient ends, and the margin loss goes on.
    """

    def __init__(self, target_radius: float, *, margin: float = 0.1) -> None:
        super().__init__()
        check_positive("target_radius", target_radius)
        self.target_radius, self.margin = target_radius, CBCMarginLoss(margin)

    def forward(
        self,
        head: nn.Module,  # ClassificationByComponents with the exponential kernel
        x: Tensor,  # [B, F]
        y: Tensor,  # int64 [B]
    ) -> Tensor:
        known = unwrap(head)
        if not isinstance(known, ClassificationByComponents) or known.kernel != "exp":
            raise Refused('The robustness loss needs the closed form: a ClassificationByComponents with kernel="exp".')
        distances = known.distances(x)
        weights, bias = known.reasoning.linear()
        signed = rbf_radius(distances, weights.to(x.dtype), bias.to(x.dtype), known.scale.to(x.dtype), y)
        reached = signed.clamp(-self.target_radius, self.target_radius)
        p = known.reasoning(torch.exp(-distances / known.scale.to(x.dtype)))
        wrong = signed <= 0
        loss = (self.target_radius - reached).mean()
        if bool(wrong.any()):
            loss = loss + self.margin(p[wrong], y[wrong]) * wrong.to(p.dtype).mean()
        return loss


# ------------------------------------------------------------------------------------------------ on a person's model


def last_linear(model: nn.Module, example: Tensor) -> str:
    """Name of the linear layer whose output is the model's output; `Refused` where there is none."""
    seen: list[tuple[str, Tensor]] = []

    def listen(name: str, module: nn.Module) -> RemovableHandle:
        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append((name, output))

        return module.register_forward_hook(note)

    handles = [listen(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    try:
        with torch.no_grad(), evaluating(model):
            logits = model(example)
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, out in seen if out.shape == logits.shape and torch.equal(out, logits)]
    if not names or names[-1] == "":
        raise Refused("prototype_rbf replaces the linear layer that gives the logits, and this model's output is not that of one inside it.")  # fmt: skip
    return names[-1]


def without(model: nn.Module, name: str) -> nn.Module:
    """A copy of the model that stops before the module `name` (the empty name: the model itself): its backbone."""
    if name == "":
        return nn.Identity()
    backbone = copy.deepcopy(model)
    backbone.set_submodule(name, nn.Identity())
    return backbone


@torch.no_grad()
def _training_features(backbone: nn.Module, x: Tensor) -> Tensor:  # [N, F]
    """Features as the training loop will see them: batch-norm by its batches, as running statistics mean nothing yet."""
    with evaluating(backbone):
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.training = True
        return torch.cat([backbone(part) for part in x.tensor_split(max(1, len(x) // 256))])


def find_head(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of the first head of components in a model."""
    for name, module in model.named_modules():
        if isinstance(module, ComponentLogits):
            return name, module
    return None


@dataclass
class PrototypeRBF(Treatment):
    """Components in the features before the last linear layer, which they replace; trained end to end by the margin loss.

    `per_class` components start at k-means++ centres of each class's features. `target_radius` > 0 adds the robustness loss in
    the last `robust` share of the steps; only for models that have nothing trainable before that layer, as a trained
    backbone would earn the radius by growing its features.
    """

    excludes: ClassVar[Mapping[str, str]] = {
        "random_pruning": "the last linear layer, whose weights are masked, is replaced by the head.",
    }

    per_class: int = 2
    margin: float = 0.1
    target_radius: float = 0.0
    robust: float = 0.5
    kernel: Kernel = "exp"
    variant: Variant = "prior"
    bonus: float = 2.0
    layer_: str | None = field(default=None, init=False, repr=False, compare=False)
    features_: int = field(default=0, init=False, repr=False, compare=False)

    slug: ClassVar[str] = "prototype_rbf"
    prepare_order: ClassVar[int] = 5  # after whatever initialises the backbone

    def __post_init__(self) -> None:
        check_at_least("per_class", self.per_class, 1)
        CBCMarginLoss(self.margin)
        check_non_negative("target_radius", self.target_radius)
        check(0 < self.robust <= 1, f"robust must lie in (0, 1], got {self.robust!r}.")
        check_choice("kernel", self.kernel, KERNELS)
        check_choice("variant", self.variant, VARIANTS)
        check(self.target_radius == 0 or self.kernel == "exp", 'target_radius needs the closed form: kernel="exp".')

    def check(self, model: nn.Module, task: Task) -> None:
        device = next(model.parameters()).device
        name = last_linear(model, task.train.x[:2].to(device))
        before = [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith(f"{name}.")]
        if self.target_radius > 0 and before:
            raise Refused(f"prototype_rbf's robustness loss would be met by larger features, as {before[0]} is trained too; use target_radius=0, or a model whose only trainable layer is the last.")  # fmt: skip
        counts = torch.bincount(task.train.labels, minlength=task.num_classes)
        check(int(counts.min()) >= self.per_class, f"Class {int(counts.argmin())} has {int(counts.min())} training samples, fewer than per_class = {self.per_class}.")  # fmt: skip

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        name = self.layer_ = last_linear(model, task.train.x[:2].to(next(model.parameters()).device))
        source = task.generator("prototype_rbf")
        order = torch.randperm(len(task.train), generator=source)
        features = _training_features(without(model, name), task.train.x[order].to(task.device))
        self.features_ = features.shape[1]
        head = ClassificationByComponents.from_data(
            features, task.train.labels[order].to(task.device), task.num_classes, per_class=self.per_class,
            kernel=self.kernel, variant=self.variant, bonus=self.bonus, generator=source,
        )  # fmt: skip
        model.set_submodule(name, ComponentLogits(head))
        return model, task

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        assert self.layer_ is not None
        wrapped = model.get_submodule(self.layer_)
        assert isinstance(wrapped, ComponentLogits)
        if self.target_radius > 0 and batch.step >= (1 - self.robust) * batch.steps:
            caught: list[Tensor] = []
            handle = wrapped.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
            try:
                model(batch.x)
            finally:
                handle.remove()
            return CBCRobustLoss(self.target_radius, margin=self.margin)(wrapped, caught[0], batch.y)
        return CBCMarginLoss(self.margin)(model(batch.x).exp(), batch.y)

    def structure(self) -> dict[str, Any]:
        return {"layer": self.layer_, "features": self.features_}

    def rebuild(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        replaced = model.get_submodule(structure["layer"])
        assert isinstance(replaced, nn.Linear)
        classes = replaced.out_features
        head = ClassificationByComponents(
            structure["features"], self.per_class * classes, classes, kernel=self.kernel, variant=self.variant
        )
        model.set_submodule(structure["layer"], ComponentLogits(head))
        return model
