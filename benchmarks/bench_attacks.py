"""Attacks beside torchattacks and foolbox: same network, same images, same steps, equal robust accuracy.

An adversarially trained CNN on digits (8 x 8) and one on digits blown up to 28 x 28, each above 90 % clean accuracy. Ours and the peer run in turn in one process
(`_timing.py`). `quality` gives the robust accuracy of both: a time
counts only if ours is no more than half a point, or three examples, above the peer's (random starts move each by one or two). Memory: what the call adds to the resident memory of the process.

FAB is asked whether a change of at most eps exists, which is what the peer's returns; FAB-T goes through all nine other classes.
The suites are APGD-CE, APGD-T and FAB-T with 10 steps and Square with 300 queries, each on what the one before it left (the
peer's `MultiAttack`; its `AutoAttack` is the same with 5000 queries).

Run: python benchmarks/bench_attacks.py
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from _timing import in_turn, memory_mb
from surefoot.core.task import Training
from surefoot.core.treatment import Batch, Treatment
from surefoot.datasets.embedded import digits
from surefoot.models import seeded_build
from surefoot.nn.attacks import apgd, fab, pgd, pgd_train, square, standard_suite
from surefoot.training.loop import fit

EPS, STEPS = 0.1, 20
Attack = Callable[[], Tensor]  # -> [N, ...] attacked images


class AdversarialTraining(Treatment):
    slug = "pgd_training"

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        moved = pgd_train(model, batch.x, batch.y, eps=EPS, steps=4, generator=batch.generator)
        return nn.functional.cross_entropy(model(moved), batch.y)


def network() -> nn.Module:
    return nn.Sequential(
        nn.LazyConv2d(16, 3, 2, 1), nn.ReLU(), nn.LazyConv2d(32, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(64), nn.ReLU(), nn.LazyLinear(10)
    )  # fmt: skip


def subject(size: int, n: int, epochs: int) -> tuple[nn.Module, Tensor, Tensor]:
    task = digits(0, sizes=(1000, 197, 600), image_size=size)

    def build() -> nn.Module:
        model = network()
        model(task.train.x[:1])
        return model

    model = seeded_build(build, task.generator("model"))
    run = fit(model, task, Training(epochs=epochs, batch_size=64, lr=4e-3), (AdversarialTraining(),))
    x, y = task.test.x, task.test.labels
    with torch.no_grad():
        accuracy = (run.model(x).argmax(1) == y).double().mean().item()
    assert accuracy > 0.9, f"The {size} x {size} network is at {accuracy:.2f}; attacks on it say nothing."
    return run.model.eval(), x[:n], y[:n]


def row(what: str, ours: Attack, peer: str, theirs: Attack | None, model: nn.Module, y: Tensor) -> dict:
    def robust(x: Tensor) -> float:
        with torch.no_grad():
            return (model(x).argmax(1) == y).double().mean().item()

    sides = [ours] if theirs is None else [ours, theirs]
    seconds, memory, accuracy = in_turn(*sides), [memory_mb(side) for side in sides], [robust(side()) for side in sides]
    found = {"what": what, "ours_s": seconds[0], "peer": peer, "peer_s": None, "ratio": None, "ours_mb": memory[0], "peer_mb": None}  # fmt: skip
    if theirs is None:
        return found | {"quality": f"robust accuracy {accuracy[0]:.3f}", "note": f"{peer} is not installed"}
    quality = f"robust accuracy {accuracy[0]:.3f} | {accuracy[1]:.3f}"
    if accuracy[0] > accuracy[1] + max(0.005, 3 / len(y)):
        quality += " NOT EQUAL"
    return found | {"peer_s": seconds[1], "peer_mb": memory[1], "ratio": seconds[0] / seconds[1], "quality": quality}


def _peer(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _foolbox(model: nn.Module, x: Tensor, y: Tensor) -> Attack | None:
    foolbox = _peer("foolbox")
    if foolbox is None:
        return None
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    attack = foolbox.attacks.LinfPGD(steps=STEPS, abs_stepsize=2.5 * EPS / STEPS, random_start=True)
    return lambda: attack(wrapped, x, y, epsilons=EPS)[1]


def compare(size: int, n: int) -> list[dict]:
    model, x, y = subject(size, n, 20 if size == 8 else 8)
    peer, name = _peer("torchattacks"), f"{n} digits {size}x{size}"

    def theirs(kind: str, most: int = n, **settings) -> Attack | None:
        if peer is None:
            return None
        attack = getattr(peer, kind)(model, eps=EPS, **settings)
        return lambda: attack(x[:most], y[:most])

    def fresh() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def suite() -> dict:
        return {"eps": EPS, "batch_size": n, "generator": fresh()}

    own_pgd = lambda: pgd(model, x, y, eps=EPS, steps=STEPS, generator=fresh()).x  # noqa: E731
    own_apgd = lambda: apgd(model, x, y, eps=EPS, steps=25, generator=fresh()).x  # noqa: E731
    own_fab = lambda: fab(model, x, y, eps=EPS, steps=5, generator=fresh()).x  # noqa: E731
    own_fab_targeted = lambda: standard_suite(model, x, y, attacks=("fab-t",), steps=5, **suite()).x  # noqa: E731
    own_targeted = lambda: standard_suite(model, x, y, attacks=("apgd-t",), steps=5, **suite()).x  # noqa: E731
    own_square = lambda: square(model, x, y, eps=EPS, queries=300, generator=fresh()).x  # noqa: E731
    rows = [
        row(f"PGD-{STEPS}, {name}", own_pgd, "torchattacks", theirs("PGD", alpha=2.5 * EPS / STEPS, steps=STEPS), model, y),
        row(f"PGD-{STEPS} of a training loop, {name}", lambda: pgd_train(model, x, y, eps=EPS, steps=STEPS, generator=fresh()),
            "torchattacks", theirs("PGD", alpha=2.5 * EPS / STEPS, steps=STEPS), model, y),
        row(f"APGD-CE 25, {name}", own_apgd, "torchattacks", theirs("APGD", steps=25), model, y),
        row(f"FAB 5, {name}", own_fab, "torchattacks", theirs("FAB", steps=5, n_classes=10), model, y),
    ]  # fmt: skip
    if size == 8:
        few = 32
        parts = {"APGD": {"steps": 10}, "APGDT": {"steps": 10, "n_classes": 10}, "FAB": {"steps": 10, "multi_targeted": True, "n_classes": 10}, "Square": {"n_queries": 300}}  # fmt: skip
        cascade = None if peer is None else peer.MultiAttack([getattr(peer, k)(model, eps=EPS, **v) for k, v in parts.items()])  # fmt: skip
        own_suite = lambda: standard_suite(model, x[:few], y[:few], steps=10, queries=300, **suite()).x  # noqa: E731
        rows += [
            row(f"PGD-{STEPS}, {name}", own_pgd, "foolbox", _foolbox(model, x, y), model, y),
            row(f"APGD-T 5, {name}", own_targeted, "torchattacks", theirs("APGDT", steps=5, n_classes=10), model, y),
            row(f"FAB-T 5, {name}", own_fab_targeted, "torchattacks", theirs("FAB", steps=5, multi_targeted=True, n_classes=10), model, y),
            row(f"Square 300, {name}", own_square, "torchattacks", theirs("Square", n_queries=300), model, y),
            row(f"suite, {few} digits", own_suite, "torchattacks", None if cascade is None else lambda: cascade(x[:few], y[:few]), model, y[:few]),
        ]  # fmt: skip
    return rows


def rows() -> list[dict]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return compare(8, 200) + compare(28, 32)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    for entry in rows():
        print(entry)
