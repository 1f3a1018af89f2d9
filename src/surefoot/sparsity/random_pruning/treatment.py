"""The treatment that trains with a fixed random mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

import torch
from torch import nn

from surefoot.core.task import Task
from surefoot.core.treatment import Batch, Treatment
from surefoot.errors import Refused, check_at_least, check_choice, check_non_negative
from surefoot.sparsity.random_pruning.densities import Rule, layer_densities
from surefoot.sparsity.random_pruning.masks import MaskHandle, random_prune_


@dataclass
class RandomPruning(Treatment):
    """Train with a fixed random mask; the finished model is a plain one with zeros.

    The arguments are those of `random_prune_`; `score_batch` is the number of training examples on which snip and grasp
    measure their ratios.
    """

    slug: ClassVar[str] = "random_pruning"
    excludes: ClassVar[Mapping[str, str]] = {
        "dynamic_sparse": "both own the mask of the weights.",
        "pissa": "merging its dense adapters would fill the pruned weights again.",
    }

    density: float = 0.2
    rule: Rule = "erk"
    power: float = 1.0
    fc_density: float | None = None
    exact: bool = True
    min_per_layer: int = 1
    min_per_unit: int = 0
    scale_init: bool = False
    score_batch: int = 128
    handle_: MaskHandle | None = field(default=None, init=False, repr=False)
    densities_: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def check(self, model: nn.Module, task: Task) -> None:
        check_at_least("score_batch", self.score_batch, 1)
        check_non_negative("power", self.power)
        check_choice("rule", self.rule, get_args(Rule))
        rule: Rule = "uniform" if self.rule in ("snip", "grasp") else self.rule
        layer_densities(model, self.density, rule, self.power, self.fc_density)
        if any(nn.utils.parametrize.is_parametrized(module, "weight") for module in model.modules()):
            raise Refused("A weight of the model is parametrized; call remove_parametrizations before pruning.")

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        generator = task.generator("random_pruning")
        batch = None
        if self.rule in ("snip", "grasp"):
            device = next(model.parameters()).device
            index = torch.randperm(len(task.train), generator=generator)[: self.score_batch].to(task.train.x.device)
            batch = (task.train.x[index].to(device), task.train.labels[index].to(device))
        self.handle_ = random_prune_(
            model, self.density, self.rule, power=self.power, fc_density=self.fc_density, exact=self.exact,
            loss_fn=nn.functional.cross_entropy, batch=batch, min_per_layer=self.min_per_layer,
            min_per_unit=self.min_per_unit, scale_init=self.scale_init, generator=generator,
        )  # fmt: skip
        self.densities_ = {name: float(mask.double().mean()) for name, mask in self.handle_.masks().items()}
        return model, task

    def before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        if self.handle_ is not None:
            self.handle_.mask_gradients_()

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        if self.handle_ is not None:
            self.handle_.mask_weights_()

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        if self.handle_ is not None:
            self.handle_.remove()
            self.handle_ = None
        return model

    def state_dict(self) -> dict[str, Any]:
        return {"densities": dict(self.densities_)}  # the masks themselves are buffers of the model

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.densities_ = dict(state.get("densities", {}))
