"""The treatment: score the training split by short runs, keep the hard part of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.core.task import Split, Task, Training
from surefoot.core.treatment import Batch, Treatment
from surefoot.curation.data_diet.report import ScoreReport
from surefoot.curation.data_diet.runs import GRADIENTS, SCORES, ForgettingTracker, rank_correlation, score, weight_hash
from surefoot.errors import InvalidInput, check, check_at_least, check_choice, check_positive
from surefoot.models import seeded_build
from surefoot.training.loop import fit


def reinitialised(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy of the model whose layers have drawn their weights anew (every module with `reset_parameters`)."""

    def build() -> nn.Module:
        fresh = copy.deepcopy(model)
        for module in fresh.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        return fresh

    return seeded_build(build, generator)


@dataclass
class WatchForgetting(Treatment):
    """Plain cross-entropy that tells a `ForgettingTracker` what each batch got right."""

    num_samples: int
    tracker_: ForgettingTracker = field(init=False, repr=False)

    slug = "watch_forgetting"

    def __post_init__(self) -> None:
        self.tracker_ = ForgettingTracker(self.num_samples)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch.x)
        self.tracker_.update(batch.index.cpu(), (logits.argmax(1) == batch.y).cpu())
        return F.cross_entropy(logits, batch.y)


@dataclass
class DataDiet(Treatment):
    """Train on the hard part of the data only.

    `prepare` trains `runs` copies for `epochs` epochs, scores every training example without augmentation, and keeps the
    highest-scoring `fraction`; `offset` is the share of the very hardest that is dropped as suspected noise. An example's
    `batch.index` is then its position in the *smaller* split (`kept_` maps back); `prepare` comes before that of the other
    treatments of a stack, which therefore hold one value per example that is left. Copies are initialised anew;
    `fresh=False` keeps the given weights, for fine-tuning, so that the runs differ by batch order only.

    The paper compares at equal numbers of *steps*: set `Training.steps` to what the full set would take
    (epochs * ceil(n / batch_size)), or fewer examples mean fewer steps, cheaper and a little worse.
    """

    slug = "data_diet"
    prepare_order: ClassVar[int] = -10

    fraction: float = 0.7
    score: Literal["el2n", "l1", "max_margin", "sum_margin", "grand", "grand_last_layer", "grand_sketch", "forgetting"] = "el2n"  # fmt: skip
    offset: float = 0.0
    class_balanced: bool = False
    runs: int = 5
    epochs: int = 10
    lr: float = 2e-3
    batch_size: int = 64
    fresh: bool = True
    kept_: Tensor | None = field(default=None, init=False, repr=False)  # int64 [kept], positions in the full split
    scores_: Tensor | None = field(default=None, init=False, repr=False)  # float64 [n]
    report_: ScoreReport | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check(0.0 < self.fraction <= 1.0, f"fraction must lie in (0, 1], got {self.fraction!r}.")
        check(self.offset >= 0 and self.offset + self.fraction <= 1 + 1e-9, f"offset must lie in [0, 1 - fraction], got {self.offset!r}.")  # fmt: skip
        check_choice("score", self.score, (*SCORES, *GRADIENTS, "forgetting"))
        check_at_least("runs", self.runs, 1)
        check_at_least("epochs", self.epochs, 1 if self.score == "forgetting" else 0)
        check_at_least("batch_size", self.batch_size, 1)
        check_positive("lr", self.lr)

    def check(self, model: nn.Module, task: Task) -> None:
        check(len(task.train) > 0, "train is empty; data_diet needs examples to choose from.")
        _ = task.train.labels
        if not any(p.requires_grad for p in model.parameters()):
            raise InvalidInput("Every parameter of the model is frozen; data_diet trains copies to score the examples.")

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        report = self.report_ = score_task(self, model, task)
        n = len(task.train)
        kept = max(1, round(self.fraction * n))
        index = report.keep_top(self.fraction, min(round(self.offset * n), n - kept), self.class_balanced)
        self.kept_, self.scores_ = index, report.scores
        return model, task.changed(train=task.train.take(index.to(task.train.x.device)))

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept_, "scores": self.scores_}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kept_, self.scores_ = state["kept"], state["scores"]


def score_task(diet: DataDiet, model: nn.Module, task: Task) -> ScoreReport:
    """Scores of `task.train` by the short runs that the treatment's settings describe."""
    n = len(task.train)
    recipe = Training(diet.epochs, diet.batch_size, "adam", diet.lr, schedule="constant")
    split = Split(task.train.x, task.train.labels)
    models, per_run = [], []
    for run in range(diet.runs):
        source = task.generator(f"data_diet/{run}")
        seed = int(torch.randint(2**31, (), generator=source))
        start = reinitialised(model, source) if diet.fresh else model
        watch = (WatchForgetting(n),) if diet.score == "forgetting" else ()
        done = fit(start, task.changed(seed=seed, train=split), recipe, watch)
        models.append(done.model)
        per_run.extend(t.tracker_.scores for t in done.treatments if isinstance(t, WatchForgetting))
    if diet.score != "forgetting":
        return score(models, split, kind=diet.score, batch_size=256, epoch=diet.epochs)
    each = torch.stack(per_run)
    mean, length = each.mean(0), torch.linalg.vector_norm(split.x.flatten(1).double(), dim=1)
    weights = tuple(map(weight_hash, models))
    return ScoreReport(
        "forgetting", mean, each, split.labels.cpu(), diet.epochs, rank_correlation(mean, length), (), weights
    )
