"""Methods without an installed peer beside their plain formula: zeroth-order gradients, activation-pattern proofs, one-pass smoothing.

- zo_smoothing: `zo_gradient` (CGE and RGE) against the same estimate in a loop over samples and directions, one query at a time;
  equal query counts, gradients equal (CGE) or of equal expected error (RGE)
- nap: `verify_nap`, which tries bounds and the LP first, against the mixed-integer program alone with big-M from intervals; same verdicts
- rrcm: what one noise sample costs the encoder in one pass, against denoise-then-classify with a denoiser of the same widths

Both sides take turns (`_timing.py`). Run: python benchmarks/bench_queries.py
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from _timing import in_turn, memory_mb
from surefoot.certified.nap import mine_naps, verify_nap
from surefoot.certified.rrcm import ClassifierEncoder, SmoothableClassifier
from surefoot.certified.zo_smoothing import zo_gradient
from surefoot.models import seeded_build, small_cnn
from surefoot.nn.smoothing import certify


def row(
    what: str, ours: Callable[[], Any], peer: str, theirs: Callable[[], Any], quality: Callable[[Any, Any], str]
) -> dict:
    mine, other = in_turn(ours, theirs)
    return {
        "what": what,
        "ours_s": mine,
        "peer": peer,
        "peer_s": other,
        "ratio": mine / other,
        "quality": quality(ours(), theirs()),
        "ours_mb": memory_mb(ours),
        "peer_mb": memory_mb(theirs),
    }


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- zeroth-order gradients ------------------------------------------------------------------------------------------


def plain_cge(loss: Callable[[Tensor], Tensor], z: Tensor, mu: float) -> Tensor:
    found = torch.zeros_like(z)
    for b in range(len(z)):
        for k in range(z.shape[1]):
            step = torch.zeros_like(z[b])
            step[k] = mu
            found[b, k] = (loss((z[b] + step)[None]) - loss((z[b] - step)[None])).item() / (2 * mu)
    return found


def plain_rge(loss: Callable[[Tensor], Tensor], z: Tensor, mu: float, count: int, g: torch.Generator) -> Tensor:
    found, dim = torch.zeros_like(z), z.shape[1]
    for b in range(len(z)):
        base = loss(z[b : b + 1])
        for _ in range(count):
            u = torch.randn(dim, generator=g, dtype=z.dtype)
            u /= u.norm()
            found[b] += (loss((z[b] + mu * u)[None]) - base).item() * dim / mu * u / count
    return found


def zeroth_order() -> list[dict]:
    net = seeded_build(lambda: small_cnn((1, 8, 8), 10), rng()).eval()
    z, mu = torch.rand(8, 64, generator=rng(1)), 0.005

    @torch.no_grad()
    def loss(points: Tensor) -> Tensor:
        return -net(points.view(-1, 1, 8, 8)).log_softmax(1)[:, 0]

    leaf = z.clone().requires_grad_()
    true = torch.autograd.grad(-net(leaf.view(-1, 1, 8, 8)).log_softmax(1)[:, 0].sum(), leaf)[0]

    def errors(a: Tensor, b: Tensor) -> str:
        return "error of the true gradient " + " | ".join(
            f"{((v - true).norm() / true.norm()).item():.3f}" for v in (a, b)
        )

    def ask(points: Tensor, rows: Tensor) -> Tensor:
        return loss(points)

    def cge() -> Tensor:
        return zo_gradient(ask, z, mu=mu).gradient

    def rge() -> Tensor:
        return zo_gradient(ask, z, method="rge", mu=mu, generator=rng(2)).gradient

    return [
        row("CGE, 8 x 64, 1,024 queries", cge, "plain loop", lambda: plain_cge(loss, z, mu), errors),
        row("RGE, 8 x 64, 520 queries", rge, "plain loop", lambda: plain_rge(loss, z, mu, 64, rng(2)), errors),
    ]


# --- proofs of activation patterns -----------------------------------------------------------------------------------


def plain_milp(net: nn.Sequential, phases: dict[str, Tensor], point: Tensor, eps: float, label: int) -> bool:
    """Every margin minimised to optimality by one mixed-integer program; big-M from intervals, which do not know the pattern."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    low, high = ((point + s * eps).clamp(0, 1)[0].double().numpy() for s in (-1, 1))
    layers = [
        (m.weight.detach().double().numpy(), m.bias.detach().double().numpy()) for m in net if isinstance(m, nn.Linear)
    ]
    names = [f"_{i}" if f"_{i}" in phases else str(i) for i, m in enumerate(net) if isinstance(m, nn.ReLU)]
    sizes = [len(low), *(n for w, _ in layers[:-1] for n in (len(w), len(w), len(w)))]  # x, then z, y, d of each layer
    starts = np.cumsum([0, *sizes])
    total, lower, upper = starts[-1], [low], [high]
    rows, least, most = [], [], []

    def add(entries: list[tuple[int, float]], a: float, b: float) -> None:
        line = np.zeros(total)
        for column, value in entries:
            line[column] += value
        for kept, value in ((rows, line), (least, a), (most, b)):
            kept.append(value)

    source, below, above = starts[0], low, high
    for k, (w, b) in enumerate(layers[:-1]):
        centre, radius = w @ (below + above) / 2 + b, np.abs(w) @ (above - below) / 2
        zl, zu = centre - radius - 1e-6, centre + radius + 1e-6
        sign = phases[names[k]].flatten().tolist()
        z0, y0, d0 = starts[1 + 3 * k : 4 + 3 * k]
        lower += [np.where(np.array(sign) > 0, 0.0, -np.inf), np.zeros(len(w)), np.zeros(len(w))]
        upper += [np.where(np.array(sign) < 0, 0.0, np.inf), np.full(len(w), np.inf), np.ones(len(w))]
        for i in range(len(w)):
            add([(z0 + i, 1.0), *((source + j, -w[i, j]) for j in range(w.shape[1]))], b[i], b[i])
            add([(y0 + i, 1.0), (z0 + i, -1.0)], 0.0, np.inf)
            add([(y0 + i, 1.0), (d0 + i, -max(zu[i], 0.0))], -np.inf, 0.0)
            add([(y0 + i, 1.0), (z0 + i, -1.0), (d0 + i, -min(zl[i], 0.0))], -np.inf, -min(zl[i], 0.0))
        source, below, above = y0, np.maximum(zl, 0), np.maximum(zu, 0)
    whole = np.concatenate([np.zeros(sizes[0]), *(np.repeat([0.0, 0.0, 1.0], len(w)) for w, _ in layers[:-1])])
    w, b = layers[-1]
    ends: list[Any] = [np.concatenate(lower), np.concatenate(upper), np.array(least), np.array(most)]
    within, lines = Bounds(ends[0], ends[1]), LinearConstraint(np.array(rows), ends[2], ends[3])
    for rival in range(len(w)):
        if rival != label:
            cost = np.zeros(total)
            cost[source : source + w.shape[1]] = w[label] - w[rival]
            found = milp(cost, integrality=whole, bounds=within, constraints=lines)
            if not (found.x is not None and found.fun + b[label] - b[rival] > 0):
                return False
    return True


def patterns() -> list[dict]:
    g = rng(3)
    centres = torch.rand(3, 6, generator=g)
    y = torch.randint(3, (600,), generator=g)
    x = (centres[y] + 0.15 * torch.randn(600, 6, generator=g)).clamp(0, 1)

    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    net = seeded_build(build, rng(4))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.eval()
    naps = mine_naps(net, x, y, delta=0.8)
    chosen = [(x[i : i + 1], int(y[i])) for i in range(12) if int(net(x[i : i + 1]).argmax()) == int(y[i])]

    def ours() -> list[bool]:
        return [verify_nap(net, naps[c], c, center=p, eps=0.2, witness=p).status == "verified" for p, c in chosen]

    def theirs() -> list[bool]:
        return [plain_milp(net, naps[c].phases, p, 0.2, c) for p, c in chosen]

    def same(a: list[bool], b: list[bool]) -> str:
        equal = sum(v == w for v, w in zip(a, b, strict=True))
        return f"{sum(a)} | {sum(b)} of {len(a)} proven, {equal} verdicts equal"

    return [row("nap, balls of 0.2, 32 neurons", ours, "the program alone", theirs, same)]


# --- one pass a noise sample -------------------------------------------------------------------------------------------


class DenoiseThenClassify(nn.Module):
    """A convolutional denoiser as wide as the classifier, at full resolution, and the classifier after it."""

    def __init__(self, classifier: nn.Module, width: int = 32) -> None:
        super().__init__()
        sides = (1, width, width, width, 1)
        layers: list[nn.Module] = []
        for a, b in pairwise(sides):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
        self.denoiser, self.classifier = nn.Sequential(*layers[:-1]), classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x - self.denoiser(x))


def one_pass() -> list[dict]:
    inner = seeded_build(lambda: small_cnn((1, 8, 8), 10), rng(5)).eval()
    single = seeded_build(lambda: SmoothableClassifier(ClassifierEncoder(inner, 10, (1, 8, 8)), 10, sigma=0.25, time=0.5), rng(6)).eval()  # fmt: skip
    double = seeded_build(lambda: DenoiseThenClassify(inner), rng(7)).eval()
    x, n, n0 = torch.rand(10, 1, 8, 8, generator=rng(8)), 1000, 100
    ask = {"sigma": 0.25, "num_classes": 10, "n": n, "n0": n0}
    passes = len(x) * (n + n0)

    def quality(a: Any, b: Any) -> str:
        return f"forward passes {passes:,} of one net | {passes:,} of each of two"

    return [row(f"rrcm, certify {len(x)} images, n = {n}", lambda: certify(single, x, generator=rng(9), **ask), "denoise then classify", lambda: certify(double, x, generator=rng(9), **ask), quality)]  # fmt: skip


def rows() -> list[dict]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return zeroth_order() + patterns() + one_pass()
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    for entry in rows():
        print(entry)
