"""Side by side: ELR and ALDR-KL against cross-entropy, and loss-based detection of wrong labels against cleanlab.

Run `python benchmarks/bench_noisy_labels.py`; every row is one dictionary. Both sides take turns (`_timing.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

from _timing import Row, in_turn, row
from surefoot.audit.instruments.label_errors import cross_fitted_logits, proxy_network
from surefoot.core.subject import predict
from surefoot.core.task import Training
from surefoot.datasets.embedded import digits
from surefoot.datasets.noise import with_label_noise
from surefoot.models import seeded_build, small_cnn
from surefoot.noisy_labels.elr import ELR, ELRLoss
from surefoot.noisy_labels.ldr import ALDRKLLoss, label_suspicion
from surefoot.training.loop import fit


def _backward(loss: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        logits.grad = None
        loss(logits).backward()

    return run


def elr_in_a_training_step() -> Row:
    """SGD steps of a small CNN on 32 x 32 colour images, 10 classes, batch 128, 50,000 samples in the state."""
    model = seeded_build(lambda: small_cnn((3, 32, 32), 10, widths=(32, 64, 64)), torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(128, 3, 32, 32, generator=generator), torch.randint(0, 10, (128,), generator=generator)
    index = torch.randperm(50000, generator=generator)[:128]
    loss = ELRLoss(50000, 10)

    def step(criterion: Callable[[torch.Tensor], torch.Tensor]) -> None:
        optimizer.zero_grad()
        criterion(model(x)).backward()
        optimizer.step()

    ours, peer = in_turn(lambda: step(lambda z: loss(z, y, index)), lambda: step(lambda z: F.cross_entropy(z, y)))
    return row("ELR: training step of a small CNN, batch 128", ours, "F.cross_entropy", peer, "target: below 1.05", ours_mb=_state_mb(loss), peer_mb=0.0)  # fmt: skip


def elr_alone() -> Row:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(128, 100, generator=generator, requires_grad=True)
    y, index = torch.randint(0, 100, (128,), generator=generator), torch.randperm(50000, generator=generator)[:128]
    loss = ELRLoss(50000, 100)
    ours, peer = in_turn(
        _backward(lambda z: loss(z, y, index), logits), _backward(lambda z: F.cross_entropy(z, y), logits)
    )
    note = f"{1e6 * (ours - peer):.0f} microseconds more"
    return row("ELR: loss and gradient alone, batch 128, K = 100", ours, "F.cross_entropy", peer, note, ours_mb=_state_mb(loss), peer_mb=0.0)  # fmt: skip


def aldr_alone() -> Row:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1024, 1000, generator=generator, requires_grad=True)
    y, index = torch.randint(0, 1000, (1024,), generator=generator), torch.arange(1024)
    loss = ALDRKLLoss(50000, 1000)
    ours, peer = in_turn(
        _backward(lambda z: loss(z, y, index), logits), _backward(lambda z: F.cross_entropy(z, y), logits)
    )
    return row("ALDR-KL: loss and gradient, batch 1024, K = 1000", ours, "F.cross_entropy", peer, "target: at most 1.3", ours_mb=_state_mb(loss), peer_mb=0.0)  # fmt: skip


def _state_mb(loss: nn.Module) -> float:
    return sum(b.numel() * b.element_size() for b in loss.buffers()) / 2**20


def detection() -> Row:
    """AUROC for flipped labels, digits with 40 % symmetric noise: one ELR run's losses against five-fold self-confidence."""
    task = digits(0)
    task = task.changed(train=with_label_noise(task.train, 0.4, 10, generator=task.generator("noise")))
    y, wrong = task.train.labels, task.train.labels != task.train.true_y
    training = Training(steps=400, lr=2e-3, batch_size=64)
    start = time.process_time()
    run = fit(proxy_network(task, task.generator("model")), task, training, (ELR(),))
    losses = F.cross_entropy(predict(run.model, task.train.x), y, reduction="none")
    suspicion = label_suspicion(losses, torch.ones_like(losses))
    ours = time.process_time() - start
    auroc = roc_auc_score(wrong.numpy(), suspicion.numpy())
    what = "Wrong labels found by the loss of one ELR run"
    try:
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return row(
            what,
            ours,
            "cleanlab",
            None,
            f"AUROC {auroc:.3f}",
            "cleanlab is not installed; pip install 'surefoot[peers]'.",
        )
    start = time.process_time()
    logits = cross_fitted_logits(task, folds=5, repeats=1, training=training)[0]
    quality = get_label_quality_scores(y.numpy(), logits.double().softmax(1).numpy(), method="self_confidence")
    theirs = time.process_time() - start
    peer = roc_auc_score(wrong.numpy(), -quality)
    return row(what, ours, "cleanlab self-confidence, 5 folds", theirs, f"AUROC {auroc:.3f} against {peer:.3f}")  # fmt: skip


def rows() -> list[Row]:
    """All rows; a missing peer gives a row with `peer_s` None and a `note`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [elr_in_a_training_step(), elr_alone(), aldr_alone(), detection()]
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row))
