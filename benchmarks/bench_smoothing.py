"""Certification speed: `surefoot.nn.smoothing.certify` against a plain loop of the published procedure and against ART.

First come the rows at equal n: same network, same images, same n0, n, alpha and noise level; each side uses its own random stream, so that counts differ by
sampling and the answers (class, radius up to sampling error) must agree. The plain loop is the one of the paper's code: one image at
a time, batches of 1000 repeated images, counts in a Python loop. ART runs at batch 256, better for it than its default 32.
Median of five runs of one thread's processor time, the sides in turn. Each side has a process of its own, because what one side does to
the C library's memory stays: a loop with large batches gets fresh pages from the kernel in each of them until something large was freed
in that process, which `certify` sees to, and would then be faster beside it than a person's own script with the loop is. Memory: what one
call more adds to the process's memory at its peak.

`certify` draws one set of noise for all images by default; "independent draws" is the row with fresh noise for each image, as in the
loop. A last rule changes the draws, keeps each certificate's level alpha and says so in the row: "sequential" is the plan
`Looks.geometric(n, target=0.25)`, which stops an image once it is certified at radius 0.25 and so answers "certified at 0.25 or not"
(its radii are not the largest possible). There, `quality` compares that answer.

Run: python benchmarks/bench_smoothing.py
"""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import numpy as np
import torch
from scipy.stats import beta, norm
from torch import Tensor, nn

from _timing import REPEATS, Row, memory_mb, row, seconds
from surefoot.certified.dual_smoothing import DualSmoothedClassifier
from surefoot.models.networks import mlp, small_cnn
from surefoot.nn.smoothing import Looks, certify

SIGMA, N0, ALPHA, CLASSES = 0.25, 100, 0.001, 10
TARGET = 0.25  # radius of the sequential rows
CASES = {  # network, input shape, images, n
    "mlp 1x8x8": (lambda: mlp((1, 8, 8), CLASSES, hidden=(64,)), (1, 8, 8), 20, 10_000),
    "mlp 1x28x28": (lambda: mlp((1, 28, 28), CLASSES, hidden=(64,)), (1, 28, 28), 10, 2000),
    "small_cnn 1x8x8": (lambda: small_cnn((1, 8, 8), CLASSES), (1, 8, 8), 10, 5000),
    "pooled cnn 1x28x28": (lambda: pooled_cnn(28), (1, 28, 28), 4, 1000),
    "small_cnn 3x32x32": (lambda: small_cnn((3, 32, 32), CLASSES), (3, 32, 32), 3, 1000),
}
Answer = tuple[np.ndarray, np.ndarray]  # class [B], radius [B]


def pooled_cnn(size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, CLASSES),
    )  # fmt: skip


def plain_counts(model: nn.Module, x: Tensor, n: int, batch: int) -> np.ndarray:
    counts = np.zeros(CLASSES, dtype=int)
    left = n
    while left > 0:
        size = min(batch, left)
        left -= size
        repeated = x.repeat(size, 1, 1, 1)
        guesses = model(repeated + torch.randn_like(repeated) * SIGMA).argmax(1)
        for guess in guesses.numpy():
            counts[guess] += 1
    return counts


def plain_loop(model: nn.Module, x: Tensor, n: int, batch: int = 1000) -> Answer:
    """The published procedure, one image at a time."""
    classes, radii = [], []
    with torch.no_grad():
        for image in x:
            chosen = int(plain_counts(model, image, N0, batch).argmax())
            hits = plain_counts(model, image, n, batch)[chosen]
            low = beta.ppf(ALPHA, hits, n - hits + 1) if hits else 0.0
            classes.append(chosen if low > 0.5 else -1)
            radii.append(SIGMA * norm.ppf(low) if low > 0.5 else 0.0)
    return np.array(classes), np.array(radii)


def art(model: nn.Module, x: Tensor, n: int) -> Answer:
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing  # pyright: ignore[reportMissingImports]

    smoothed = PyTorchRandomizedSmoothing(
        model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), CLASSES,
        sample_size=N0, scale=SIGMA, alpha=ALPHA, device_type="cpu",
    )  # fmt: skip
    return smoothed.certify(x.numpy(), n=n, batch_size=256)


def ours(model: nn.Module, x: Tensor, n: int) -> Answer:
    found = certify(
        model, x, sigma=SIGMA, num_classes=CLASSES, generator=torch.Generator().manual_seed(0), n0=N0, n=n, alpha=ALPHA
    )
    return found.prediction.numpy(), found.radius.numpy()


def ours_independent(model: nn.Module, x: Tensor, n: int) -> Answer:
    """Fresh draws for each image."""
    g = torch.Generator().manual_seed(0)
    found = certify(model, x, sigma=SIGMA, num_classes=CLASSES, generator=g, n0=N0, n=n, alpha=ALPHA, shared=False)
    return found.prediction.numpy(), found.radius.numpy()


def ours_sequential(model: nn.Module, x: Tensor, n: int) -> Answer:
    """A pre-declared group-sequential plan towards one radius."""
    g = torch.Generator().manual_seed(0)
    found = certify(
        model,
        x,
        sigma=SIGMA,
        num_classes=CLASSES,
        generator=g,
        n0=N0,
        alpha=ALPHA,
        looks=Looks.geometric(n, target=TARGET),
    )
    return found.prediction.numpy(), found.radius.numpy()


def dual_plain(model: nn.Module, x: Tensor, n: int) -> Answer:
    """Dual certification one image at a time, each half with its own loop and draws, as the published code does it."""
    assert isinstance(model, DualSmoothedClassifier)
    classes, radii = [], []
    with torch.no_grad():
        for image in x:
            first = sum(plain_counts(half, image, N0, 1000) for half in (model.left, model.right))
            chosen = int(np.asarray(first).argmax())
            hits = [plain_counts(half, image, n, 1000)[chosen] for half in (model.left, model.right)]
            low = [beta.ppf(ALPHA / 2, k, n - k + 1) if k else 0.0 for k in hits]
            reach = norm.ppf(low[0]) + norm.ppf(low[1])
            classes.append(chosen if reach > 0 else -1)
            radii.append(SIGMA * reach / 2**0.5 if reach > 0 else 0.0)
    return np.array(classes), np.array(radii)


def dual_ours(model: nn.Module, x: Tensor, n: int) -> Answer:
    assert isinstance(model, DualSmoothedClassifier)
    found = model.certify(x, generator=torch.Generator().manual_seed(0), n0=N0, n=n, alpha=ALPHA)
    return found.prediction.numpy(), found.radius.numpy()


WAYS: dict[str, Callable[[nn.Module, Tensor, int], Answer]] = {
    "plain loop": plain_loop, "art": art, "ours": ours, "ours, independent draws": ours_independent, "ours, sequential": ours_sequential, "dual plain loop": dual_plain, "dual ours": dual_ours,
}  # fmt: skip


def setup(case: str) -> tuple[nn.Module, Tensor, int]:
    factory, shape, images, n = CASES[case.removeprefix("dual ")]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: nn.Module = factory().eval()
    list(model.parameters())[-2].data.mul_(
        3.0
    )  # spread the classes: an untrained net should neither tie nor be constant
    x = torch.rand(images, *shape)
    if case.startswith("dual "):
        model = DualSmoothedClassifier(model, model, sigma=SIGMA, num_classes=CLASSES, shape=shape).eval()
    return model, x, n


Side = tuple[float, float, Answer] | str  # median seconds, MB, answer; or the sentence that says why there is none


def measure(case: str, way: str, pipe: Connection) -> None:
    """A side in its process: the answer, then the seconds of one call whenever asked, at last the memory of one."""
    try:
        model, x, n = setup(case)
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002  ART draws from numpy's global generator
        WAYS[way](model, x[:1], 200)  # imports and first calls are nobody's work
        pipe.send(WAYS[way](model, x, n))
    except ImportError as error:
        return pipe.send(str(error))
    while pipe.recv():
        pipe.send(seconds(lambda: WAYS[way](model, x, n)))
    pipe.send(memory_mb(lambda: WAYS[way](model, x, n)))


def sides(case: str, ways: Sequence[str]) -> dict[str, Side]:
    """Every way of one case, in turn."""
    context, pipes, answers = multiprocessing.get_context("spawn"), {}, {}
    for way in ways:
        pipes[way], theirs = context.Pipe()
        context.Process(target=measure, args=(case, way, theirs), daemon=True).start()
        answers[way] = pipes[way].recv()
    runs = [way for way in ways if not isinstance(answers[way], str)]

    def ask(way: str, more: bool) -> float:
        pipes[way].send(more)
        return pipes[way].recv()

    taken = [[ask(way, True) for way in runs] for _ in range(REPEATS)]
    times = dict(zip(runs, map(statistics.median, zip(*taken, strict=True)), strict=True))
    return answers | {way: (times[way], ask(way, False), answers[way]) for way in runs}


def rows() -> list[dict]:
    """One row a network and peer; `quality` compares the answers."""
    table = []
    for case, (_, _, _, n) in CASES.items():
        mine = ["ours"] + ["ours, independent draws"] * (case == "mlp 1x8x8") + ["ours, sequential"] * ("1x8x8" in case)
        table += compared(case, n, mine, ["plain loop", "art"])
    return table + compared(
        "dual pooled cnn 1x28x28", CASES["pooled cnn 1x28x28"][-1], ["dual ours"], ["dual plain loop"]
    )


def compared(case: str, n: int, mine: Sequence[str], peers: Sequence[str]) -> list[Row]:
    found, table = sides(case, [*mine, *peers]), []
    for way, peer in itertools.product(mine, peers):
        what = f"certify, {case}, n = {n}" + way.removeprefix("dual ").removeprefix("ours")
        ours, theirs = found[way], found[peer]
        assert not isinstance(ours, str)
        if isinstance(theirs, str):
            table.append(row(what, ours[0], peer, None, "", theirs, ours_mb=ours[1]))
        else:
            quality = agreement(ours[2], theirs[2], sequential="sequential" in way)
            table.append(row(what, ours[0], peer, theirs[0], quality, ours_mb=ours[1], peer_mb=theirs[1]))
    return table


def agreement(ours: Answer, theirs: Answer, *, sequential: bool) -> str:
    (a, r), (b, s) = ours, theirs
    if sequential:
        agree = ((r >= TARGET) == (s >= TARGET)) & ((a == b) | (r < TARGET))
        return f"the same answer at radius {TARGET} for {agree.mean():.0%}"
    return f"same class {(a == b).mean():.0%}, radii within {np.abs(r - s).max() / SIGMA:.3f} sigma (sampling)"


if __name__ == "__main__":
    for found in rows():
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()})
