"""The one training loop. Treatments act on it at three moments; it knows none of them by name."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from surefoot.core.task import Task, Training
from surefoot.core.treatment import Batch, Treatment, check_stack
from surefoot.core.trial import Metrics, Run
from surefoot.datasets import check_task
from surefoot.errors import InvalidInput, check, check_at_least, check_positive

Progress = Callable[[int, int, float], None]  # (steps done, steps in all, mean loss of the epoch)


def make_optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InvalidInput("The model has no parameter that requires a gradient; unfreeze what is to be trained.")
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, training.lr, training.momentum, weight_decay=training.weight_decay, nesterov=training.nesterov
        )
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, training.lr, weight_decay=training.weight_decay)


def lr_factor(training: Training, done: float) -> float:
    """The learning rate's factor after a share `done` in [0, 1] of the steps."""
    if done < training.warmup:
        return done / training.warmup
    if training.schedule == "cosine":
        rest = (done - training.warmup) / max(1.0 - training.warmup, 1e-12)
        return 0.5 * (1.0 + math.cos(math.pi * min(rest, 1.0)))
    if training.schedule == "step":
        return training.gamma ** sum(done >= milestone for milestone in training.milestones)
    return 1.0


def fit(
    model: nn.Module,
    task: Task,
    training: Training,
    treatments: Sequence[Treatment] = (),
    *,
    on_epoch: Callable[[nn.Module, Task, int], Metrics] | None = None,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> Run:
    """Train `model` on `task.train` with a stack of treatments; the model and the treatments given are left as they were.

    The empty stack is plain cross-entropy. `checkpoint` names a file that is rewritten after each epoch and picked up
    again if it exists, so that a killed run goes on where it stopped. Deterministic on the CPU for a given `task.seed`.
    """
    check_at_least("training.batch_size", training.batch_size, 1)
    check_positive("training.lr", training.lr)
    check_task(task)
    check(len(task.train) > 0, f"The training split of {task.name} is empty; give labelled training data.")
    check_stack(treatments, model, task)
    model = copy.deepcopy(model).to(task.device)
    stack = [copy.deepcopy(t) for t in treatments]
    for treatment in sorted(stack, key=lambda t: t.prepare_order):
        model, task = treatment.prepare(model, task)
    model = model.to(task.device)
    history = _train(model, task, training, stack, on_epoch, progress, checkpoint)
    model.eval()
    for treatment in sorted(stack, key=lambda t: t.finish_order):
        model = treatment.finish(model, task)
    model.eval()
    return Run(model, task, tuple(stack), tuple(history))


def _train(
    model: nn.Module,
    task: Task,
    training: Training,
    stack: list[Treatment],
    on_epoch: Callable[[nn.Module, Task, int], Metrics] | None,
    progress: Progress | None,
    checkpoint: Path | None,
) -> list[Metrics]:
    n = len(task.train)
    per_epoch = n // training.batch_size if training.drop_last else math.ceil(n / training.batch_size)
    if per_epoch < 1:
        raise InvalidInput(f"train has {n} examples, fewer than one batch of {training.batch_size}; lower batch_size.")
    steps = training.steps if training.steps is not None else training.epochs * per_epoch
    history: list[Metrics] = []
    if steps == 0:
        return history
    optimizer = make_optimizer(model, training)
    order_source, noise = task.generator("order"), task.generator("train", task.device)
    x, y = task.train.x.to(task.device), task.train.labels.to(task.device)
    loss_owner = next((t for t in stack if t.brings_loss), Treatment())
    step = 0
    if checkpoint is not None and checkpoint.exists():
        step, history = _restore(checkpoint, model, optimizer, stack, (order_source, noise))
    while step < steps:
        model.train()
        order = torch.randperm(n, generator=order_source).to(task.device)
        total = torch.zeros((), device=task.device)
        for start in range(0, per_epoch * training.batch_size, training.batch_size):
            index = order[start : start + training.batch_size]
            inputs = x[index]
            for augment in task.augment:
                inputs = augment(inputs, noise)
            batch = Batch(inputs, y[index], index, step // per_epoch, step, per_epoch, steps, noise)
            for group in optimizer.param_groups:
                group["lr"] = training.lr * lr_factor(training, (step + 1 if training.warmup else step) / steps)
            loss = loss_owner.loss(model, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for treatment in stack:
                treatment.before_step(model, optimizer, batch)
            if training.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
            optimizer.step()
            for treatment in stack:
                treatment.after_step(model, optimizer, batch)
            total += loss.detach()
            step += 1
            if step >= steps:
                break
        mean_loss = total.item() / (((step - 1) % per_epoch) + 1)
        if not math.isfinite(mean_loss):
            raise InvalidInput(
                f"The training loss became {mean_loss} in epoch {(step - 1) // per_epoch}; lower the learning rate {training.lr}."
            )
        if on_epoch is not None:
            model.eval()
            history.append(dict(on_epoch(model, task, (step - 1) // per_epoch)))
        if checkpoint is not None:
            _save(checkpoint, model, optimizer, stack, (order_source, noise), step, history)
        if progress is not None:
            progress(step, steps, mean_loss)
    optimizer.zero_grad(set_to_none=True)
    return history


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, stack: list[Treatment], generators: tuple[torch.Generator, ...], step: int, history: list[Metrics]) -> None:  # fmt: skip
    state = {
        "step": step,
        "history": [dict(h) for h in history],
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "treatments": [dict(t.state_dict()) for t in stack],
        "generators": [g.get_state() for g in generators],
        "saved_at": time.time(),
    }
    partial = path.with_suffix(path.suffix + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, stack: list[Treatment], generators: tuple[torch.Generator, ...]) -> tuple[int, list[Metrics]]:  # fmt: skip
    state = torch.load(path, weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for treatment, saved in zip(stack, state["treatments"], strict=True):
        treatment.load_state_dict(saved)
    for generator, saved in zip(generators, state["generators"], strict=True):
        generator.set_state(saved)
    return int(state["step"]), list(state["history"])


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 512) -> float:
    """Share of correct top-1 predictions in evaluation mode."""
    from surefoot.core.subject import predict

    return (predict(model, x, batch_size).argmax(1) == y.cpu()).double().mean().item()
