"""Heads with certificates: our batched passes against plain loops that do the same the way published code does.

- Lipschitz constants of multi-modal logits: one batched vector-Jacobian product a modality, against a loop over classes with a
  retained graph (the published loop with its two faults mended, so that both give the same numbers).
- Certified radii of classification by components: all rivals of a batch at once, against a loop over examples and rivals.
- One epoch of the margin loss, 100 components, 10,000 examples of 64 numbers; wanted: under a second.

Both sides take turns (`_timing.py`). Run: python benchmarks/bench_certified_heads.py
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from _timing import in_turn, memory_mb
from surefoot.certified.crmt import estimate_lipschitz, pack, two_branch, unpack
from surefoot.certified.prototype_rbf import CBCMarginLoss, ClassificationByComponents, cbc_radius


def row(what: str, peer: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> dict:
    mine, other = in_turn(ours, theirs)
    gap = (ours() - theirs()).abs().max().item()
    return {
        "what": what, "ours_s": mine, "ours_mb": memory_mb(ours), "peer": peer, "peer_s": other, "peer_mb": memory_mb(theirs),
        "ratio": mine / other, "quality": f"largest difference {gap:.1e}",
    }  # fmt: skip


def lipschitz_row(classes: int) -> dict:
    torch.manual_seed(0)
    model = two_branch([[64], [40]], classes, width=128).eval()
    batches = [torch.rand(64, 104) for _ in range(10)]

    def class_loop() -> Tensor:
        worst = torch.zeros(2, classes)
        for x in batches:
            data = [part.clone().requires_grad_() for part in unpack(x, model.shapes)]
            uni, _ = model.both(pack(data))
            for k in range(classes):
                for m in range(2):
                    for part in data:
                        part.grad = None
                    uni[m][:, k].sum().backward(retain_graph=True)
                    grad = data[m].grad
                    assert grad is not None
                    worst[m, k] = torch.maximum(worst[m, k], grad.flatten(1).norm(dim=1).max())
        return worst.double()

    return row(f"Lipschitz pass, 640 examples, {classes} classes", "loop over classes", lambda: estimate_lipschitz(model, batches).logits, class_loop)  # fmt: skip


def radius_row() -> dict:
    head = ClassificationByComponents(64, 20, 10, scale=2.0, generator=torch.Generator().manual_seed(0)).double()
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def plain() -> Tensor:
        with torch.no_grad():
            d, y = head.detect(x), head(x).argmax(1).tolist()
            present, absent = head.reasoning.strengths()
            radii = []
            for i, own in enumerate(y):
                best = math.inf
                for c in range(10):
                    if c == own:
                        continue
                    difference = (present - absent)[:, own] - (present - absent)[:, c]
                    offset = (absent[:, own].sum() - absent[:, c].sum()).item()
                    a = (difference.clamp_min(0) * d[i]).sum().item()
                    b = ((-difference).clamp_min(0) * d[i]).sum().item()
                    best = min(best, 2.0 * math.log((offset + math.sqrt(offset**2 + 4 * a * b)) / (2 * b)))
                radii.append(best)
            return torch.tensor(radii, dtype=torch.float64)

    return row("certified radii, 300 examples, 20 components, 10 classes", "loop over examples and rivals", lambda: cbc_radius(head, x).radius, plain)  # fmt: skip


def epoch_row() -> dict:
    source = torch.Generator().manual_seed(0)
    x, y = torch.randn(10_000, 64, generator=source), torch.randint(10, (10_000,), generator=source)
    head = ClassificationByComponents(64, 100, 10, scale=8.0, generator=source)
    optimizer, loss = torch.optim.Adam(head.parameters(), 1e-3), CBCMarginLoss(0.1)

    def epoch() -> Tensor:
        for inputs, labels in zip(x.split(64), y.split(64), strict=True):
            optimizer.zero_grad()
            loss(head(inputs), labels).backward()
            optimizer.step()
        return torch.zeros(1)

    (seconds,), grown = in_turn(epoch), memory_mb(epoch)
    return {"what": "margin loss, one epoch of 10,000, 100 components", "ours_s": seconds, "ours_mb": grown, "peer": "1 s wanted", "peer_s": 1.0, "peer_mb": None, "ratio": seconds, "quality": ""}  # fmt: skip


def rows() -> list[dict]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [lipschitz_row(10), lipschitz_row(31), radius_row(), epoch_row()]
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    for entry in rows():
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in entry.items()})
