"""An undefended stand-in for the transfer check of adversarial accuracy: a small net trained without any defence, on the same data.

Points made on it should break the audited model less than the model's own gradients do; where they break it more, its gradients
are masked (Carlini et al., 2019, arXiv 1902.06705). The stand-in need not be good: it must only have gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surefoot.audit.instruments.common import device_of, logits
from surefoot.core.subject import Subject, predict
from surefoot.core.task import Split, Task, Training
from surefoot.models import mlp, seeded_build, small_cnn, small_cnn1d
from surefoot.nn.attacks import Model
from surefoot.training.loop import fit

LARGEST = 3 * 64 * 64  # values an input; above it a useful stand-in costs more than the attacks
BATCH = 64


@dataclass(frozen=True)
class Surrogate:
    """The stand-in, or the reason why there is none."""

    model: Model | None
    reason: str = ""
    examples: int = 0
    passes: int = 0  # training examples that went forward and back
    accuracy: float = 0.0  # of the stand-in, on the validation split (the training examples where there is none)
    taught_by: str = "labels"  # or "predictions" of the audited model, or "its owner"

    def facts(self) -> dict[str, object]:
        """For the report: what the check stood on and what it cost, or why there was none."""
        if self.model is None:
            return {"skipped": f"{self.reason} The transfer check needs one: give `undefended`."}
        if not self.examples:
            return {"taught_by": self.taught_by}
        return {
            "examples": self.examples,
            "training_passes": self.passes,
            "accuracy": self.accuracy,
            "taught_by": self.taught_by,
        }


def undefended_surrogate(subject: Subject, task: Task, *, examples: int, steps: int = 300) -> Surrogate:
    """Train one on at most `examples` of the training split, `steps` Adam steps; deterministic for a given `task.seed`.

    Without labels it learns the audited model's predictions. `examples=0`, an empty split and large inputs are refused in one sentence each.
    """
    if examples == 0:
        return Surrogate(None, "The quick budget trains no undefended stand-in.")
    if len(task.train) < 2 * task.num_classes:
        return Surrogate(None, f"An undefended stand-in needs training examples; there are {len(task.train)}.")
    if task.train.x[0].numel() > LARGEST:
        return Surrogate(
            None, f"Inputs of {task.train.x[0].numel():,} values are too large to train a stand-in on the side."
        )
    order = torch.randperm(len(task.train), generator=task.generator("surrogate/examples"))[:examples]
    train, taught_by = task.train.take(order.sort().values), "labels"
    if train.y is None:
        answers = logits(subject, train.x, task.generator("surrogate/answers")).argmax(1)
        train, taught_by = Split(train.x, answers.to(train.x.device)), "predictions"
    shape, classes = task.input_shape, task.num_classes
    build = {1: mlp, 2: small_cnn1d, 3: small_cnn}.get(len(shape), mlp)
    start = seeded_build(lambda: build(shape, classes), task.generator("surrogate/model"))
    training = Training(steps=steps, batch_size=BATCH, lr=3e-3)
    with torch.enable_grad():
        model = fit(start, task.changed(train=train, augment=()), training).model
    held_out = task.valid if task.valid.y is not None and len(task.valid) else train
    held_out = held_out.take(slice(0, 1000))
    accuracy = (predict(model, held_out.x).argmax(1) == held_out.labels.cpu()).double().mean().item()
    model = model.to(device_of(subject, task.test.x))
    return Surrogate(model, "", len(train), steps * min(BATCH, len(train)), accuracy, taught_by)
