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

from _timing import Row, in_turn, memory_mb, row
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

    return _pair("ELR: training step of a small CNN, batch 128", loss, lambda: step(lambda z: loss(z, y, index)), lambda: step(lambda z: F.cross_entropy(z, y)), "target: below 1.05")  # fmt: skip


def elr_alone() -> Row:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(128, 100, generator=generator, requires_grad=True)
    y, index = torch.randint(0, 100, (128,), generator=generator), torch.randperm(50000, generator=generator)[:128]
    loss = ELRLoss(50000, 100)
    ours, theirs = _backward(lambda z: loss(z, y, index), logits), _backward(lambda z: F.cross_entropy(z, y), logits)
    found = _pair("ELR: loss and gradient alone, batch 128, K = 100", loss, ours, theirs, "")
    return found | {"quality": f"{1e6 * (found['ours_s'] - found['peer_s']):.0f} microseconds more{found['quality']}"}


def aldr_alone() -> Row:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1024, 1000, generator=generator, requires_grad=True)
    y, index = torch.randint(0, 1000, (1024,), generator=generator), torch.arange(1024)
    loss = ALDRKLLoss(50000, 1000)
    ours, theirs = _backward(lambda z: loss(z, y, index), logits), _backward(lambda z: F.cross_entropy(z, y), logits)
    return _pair("ALDR-KL: loss and gradient, batch 1024, K = 1000", loss, ours, theirs, "target: at most 1.3")


def _pair(what: str, loss: nn.Module, ours: Callable[[], None], theirs: Callable[[], None], quality: str) -> Row:
    """Memory is that of a call; what the loss keeps from batch to batch is told beside it."""
    mine, peer = in_turn(ours, theirs)
    state = sum(b.numel() * b.element_size() for b in loss.buffers()) / 2**20
    return row(what, mine, "F.cross_entropy", peer, f"{quality}; keeps {state:.1f} MB", ours_mb=memory_mb(ours), peer_mb=memory_mb(theirs))  # fmt: skip


def detection() -> Row:
    """AUROC for flipped labels, digits with 40 % symmetric noise: one ELR run's losses against five-fold self-confidence."""
    task = digits(0)
    task = task.changed(train=with_label_noise(task.train, 0.4, 10, generator=task.generator("noise")))
    y, wrong = task.train.labels, task.train.labels != task.train.true_y
    training = Training(steps=400, lr=2e-3, batch_size=64)
    what = "Wrong labels found by the loss of one ELR run"

    def ours() -> float:
        run = fit(proxy_network(task, task.generator("model")), task, training, (ELR(),))
        losses = F.cross_entropy(predict(run.model, task.train.x), y, reduction="none")
        return float(roc_auc_score(wrong.numpy(), label_suspicion(losses, torch.ones_like(losses)).numpy()))

    mine, mine_mb, auroc = _once(ours)
    try:
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return row(what, mine, "cleanlab", None, f"AUROC {auroc:.3f}", "cleanlab is not installed; pip install 'surefoot[peers]'.", ours_mb=mine_mb)  # fmt: skip

    def theirs() -> float:
        logits = cross_fitted_logits(task, folds=5, repeats=1, training=training)[0]
        quality = get_label_quality_scores(y.numpy(), logits.double().softmax(1).numpy(), method="self_confidence")
        return float(roc_auc_score(wrong.numpy(), -quality))

    other, other_mb, peer = _once(theirs)
    return row(what, mine, "cleanlab self-confidence, 5 folds", other, f"AUROC {auroc:.3f} against {peer:.3f}", ours_mb=mine_mb, peer_mb=other_mb)  # fmt: skip


def _once(call: Callable[[], float]) -> tuple[float, float, float]:
    """Seconds, memory and answer of one run: too long to repeat."""
    answers, start = [], time.process_time()
    grown = memory_mb(lambda: answers.append(call()))
    return time.process_time() - start, grown, answers[0]


def rows() -> list[Row]:
    """All rows; a missing peer gives a row with `peer_s` None and a `note`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [elr_in_a_training_step(), elr_alone(), aldr_alone(), detection()]
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    for entry in rows():
        print(json.dumps(entry))
