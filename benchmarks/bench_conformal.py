"""Split-conformal sets and averaged APS scores: `surefoot` beside torchcp 1.2, mapie 1.6 and a loop over labels in numpy.

Same probabilities, same calibration and test examples, alpha 0.1. LAC sets are deterministic and must be the same, set for set. torchcp
imports parts that need more packages (torchsort, torch_geometric) and are not used here; empty stand-ins take their places. mapie gets
the probabilities through an estimator that returns its input. The last row averages randomised APS scores over 256 noise draws, as
the robust sets need; the peer is the plain way, one label at a time. Median of five of one thread's processor time, after one
call that counts for nobody; memory is what a call adds to the process's peak, each row in a process of its own.

Run: python benchmarks/bench_conformal.py
"""

from __future__ import annotations

import functools
import multiprocessing
import statistics
import sys
import time
import types
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from _timing import memory_mb
from surefoot.certified.robust_conformal import aps_score
from surefoot.nn.conformal import conformal_quantile, lac_scores, lac_sets

ALPHA, CALIBRATION, TEST, CLASSES, DRAWS = 0.1, 5000, 10_000, 100, 256


@functools.cache
def data() -> tuple[Tensor, Tensor]:
    """Logits `[N, K]` and labels drawn from their softmax."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(CALIBRATION + TEST, CLASSES, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def stand_in(name: str, **members: object) -> None:
    """A module under that name unless the real one is there."""
    if name not in sys.modules:
        module = types.ModuleType(name)
        vars(module).update(members)
        sys.modules[name] = module


def lac_ours() -> Tensor:
    logits, y = data()
    probs = logits.softmax(1)
    threshold = conformal_quantile(lac_scores(probs[:CALIBRATION], y[:CALIBRATION]), ALPHA)
    return lac_sets(probs[CALIBRATION:], threshold)


def lac_torchcp() -> Tensor:
    def unused(*_: object) -> None:
        raise NotImplementedError

    stand_in("torchsort", soft_rank=unused, soft_sort=unused)
    stand_in("torchcp.graph")  # needs torch_geometric
    stand_in("torchcp.llm")
    from torchcp.classification.predictor import SplitPredictor  # pyright: ignore[reportMissingImports]
    from torchcp.classification.score import LAC  # pyright: ignore[reportMissingImports]

    logits, y = data()
    predictor = SplitPredictor(LAC(score_type="softmax"), alpha=ALPHA, device=torch.device("cpu"))
    predictor.calculate_threshold(logits[:CALIBRATION], y[:CALIBRATION], ALPHA)
    return torch.as_tensor(predictor.predict_with_logits(logits[CALIBRATION:])).bool()


def lac_mapie() -> Tensor:
    from mapie.classification import SplitConformalClassifier  # pyright: ignore[reportMissingImports]
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):
        def __init__(self) -> None:
            self.classes_ = np.arange(CLASSES)
            self.fitted_ = True

        def fit(self, x: np.ndarray, y: np.ndarray) -> Given:
            return self

        def predict_proba(self, x: np.ndarray) -> np.ndarray:
            return x

        def predict(self, x: np.ndarray) -> np.ndarray:
            return x.argmax(1)

    logits, y = data()
    probs = logits.double().softmax(1).numpy()  # in float32 mapie refuses rows whose sum is not 1 to 1e-5
    sets = SplitConformalClassifier(Given(), confidence_level=1 - ALPHA)
    sets.conformalize(probs[:CALIBRATION], y[:CALIBRATION].numpy())
    return torch.from_numpy(sets.predict_set(probs[CALIBRATION:])[1][:, :, 0])


@functools.cache
def noisy() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    probs = (3 * torch.randn(100, DRAWS, CLASSES, generator=generator, dtype=torch.float64)).softmax(-1)
    return probs, torch.rand(100, generator=generator, dtype=torch.float64)


def aps_ours() -> Tensor:
    probs, u = noisy()
    return aps_score(probs, u[:, None]).mean(1)


def aps_loop() -> Tensor:
    """One label and one example at a time, vectorised over the draws."""
    probs, u = (part.numpy() for part in noisy())
    means = np.empty((len(probs), CLASSES))
    for i, draws in enumerate(probs):
        for label in range(CLASSES):
            own = draws[:, label : label + 1]
            means[i, label] = ((draws * (draws > own)).sum(1) + u[i] * own[:, 0]).mean()
    return torch.from_numpy(means)


WAYS: dict[str, Callable[[], Tensor]] = {
    "lac ours": lac_ours, "lac torchcp": lac_torchcp, "lac mapie": lac_mapie, "aps ours": aps_ours, "aps loop over labels": aps_loop,
}  # fmt: skip


def measure(way: str, pipe: object) -> None:
    try:
        torch.set_num_threads(1)
        answer = WAYS[way]()
        seconds = []
        for _ in range(5):
            start = time.process_time()
            WAYS[way]()
            seconds.append(time.process_time() - start)
        pipe.send((statistics.median(seconds), memory_mb(WAYS[way]), answer.numpy()))  # type: ignore[attr-defined]
    except ImportError as error:
        pipe.send(f"{error}")  # type: ignore[attr-defined]


def alone(way: str) -> tuple[float, float, np.ndarray] | str:
    """`measure` in a fresh process, so that peaks do not mix."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(way, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def rows() -> list[dict]:
    table = []
    sizes = f"{CALIBRATION} + {TEST} examples, {CLASSES} classes"
    jobs = (
        ("lac ours", "lac torchcp", f"LAC sets, {sizes}"),
        ("lac ours", "lac mapie", f"LAC sets, {sizes}"),
        ("aps ours", "aps loop over labels", f"mean APS score, 100 examples, {DRAWS} draws, {CLASSES} classes"),
    )
    for way, peer, what in jobs:
        mine, theirs = alone(way), alone(peer)
        assert not isinstance(mine, str)
        row: dict = {"what": what, "peer": peer.split(" ", 1)[1], "ours_s": mine[0], "ours_mb": mine[1]}
        if isinstance(theirs, str):
            table.append(row | {"peer_s": None, "ratio": None, "quality": "", "peer_mb": None, "note": theirs})
            continue
        if mine[2].dtype == bool:
            quality = f"{(mine[2] == theirs[2]).all(1).mean():.2%} of the sets the same"
        else:
            quality = f"scores within {np.abs(mine[2] - theirs[2]).max():.0e}"
        table.append(
            row | {"peer_s": theirs[0], "ratio": mine[0] / theirs[0], "quality": quality, "peer_mb": theirs[1]}
        )
    return table


if __name__ == "__main__":
    for row in rows():
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
