"""Trial of activation patterns as specifications: what a class's pattern covers, and what it buys in provable radius.

One ReLU net of two hidden layers of 32 on 8x8 digits a seed, the same net in every arm (Adam 3e-3, weight decay 1e-4, 40 epochs).
`plain` is the ball alone; `nap_*` the ball within the pattern mined at that delta; `random` a pattern of as many neurons as the
class's at delta 0.6, chosen at random and fixed as the image has them; `instance` all neurons as the image has them, the
most that patterns can give. Radii are by bisection (7 steps on [0, 0.2]) on the same 8 test images in every arm: right answers that follow
the pattern of their class at delta 0.6, and so at every other. Recall and spill are on 600 test images; `box_proven` and
`box_falsified` are shares of the classes whose pattern, in the whole input box, was proven or refuted by a replayed
counterexample; `disjoint` the share of the 45 pairs of patterns that provably no input follows at once.

There is nothing to tune, so that no arm has a grid. Left out of the embedded tier: nets of 2x64 and all 90 ordered pairs
(refuting a class refutes a pair), and the convex hull box of a class (its corners are no digits, and it fails like the input box).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from surefoot.certified.nap import (
    ActivationPattern,
    check_ambiguity,
    instance_pattern,
    max_verified_eps,
    mine_naps,
    nap_coverage,
    verify_nap,
)
from surefoot.core.subject import predict
from surefoot.core.task import Task, Training
from surefoot.core.trial import Arm, Claim, Metrics, Setup, Trial
from surefoot.datasets.embedded import digits
from surefoot.models import mlp, seeded_build
from surefoot.nn.bounds import Limits
from surefoot.training.loop import fit

RECIPE = Training(epochs=40, batch_size=64, lr=3e-3, weight_decay=1e-4)
DELTAS = (0.99, 0.9, 0.7, 0.6)
STRICTEST = DELTAS[-1]
IMAGES, LARGEST, STEPS = 8, 0.2, 7
LIMITS = Limits(time_limit=600.0, max_nodes=30)  # nodes, so that every machine decides alike

Kind = Literal["plain", "nap", "random", "instance"]


def digits_task(seed: int, data_dir: Path | None) -> Task:
    return digits(seed, sizes=(1000, 197, 600))


def trained_net(task: Task) -> nn.Module:
    """The same net for all arms of a seed."""
    model = seeded_build(lambda: mlp((1, 8, 8), task.num_classes, hidden=(32, 32)), task.generator("trial/net"))
    return fit(model, task, RECIPE).model


def system(kind: Kind, delta: float = STRICTEST) -> Arm:
    def run(task: Task, generator: torch.Generator) -> Metrics:
        model = trained_net(task)
        naps = {d: mine_naps(model, task.train.x, task.train.labels, delta=d) for d in {delta, STRICTEST}}
        metrics = {"accuracy": (predict(model, task.test.x).argmax(1) == task.test.labels).double().mean().item()}
        if kind == "nap":
            metrics.update(specification(model, naps[delta], task))
        metrics.update(radii(model, kind, naps[delta], naps[STRICTEST], task, generator))
        return metrics

    return Arm(run, system=True)


def specification(model: nn.Module, naps: Mapping[int, ActivationPattern], task: Task) -> Metrics:
    """What the patterns cover, and what holds for everything that follows them in the input box."""
    x, y = task.train.x, task.train.labels
    coverage = nap_coverage(model, naps, task.test.x, task.test.labels)
    found = [verify_nap(model, nap, c, witness=x[y == c], limits=LIMITS).status for c, nap in naps.items()]
    pairs = itertools.combinations(naps.values(), 2)
    apart = [check_ambiguity(model, a, b, witness=x, limits=LIMITS).status for a, b in pairs]
    return {
        "recall": coverage.recall.mean().item(),
        "spill": coverage.spill.mean().item(),
        "constrained": sum(nap.num_constrained for nap in naps.values()) / len(naps),
        "box_proven": found.count("verified") / len(found),
        "box_falsified": found.count("falsified") / len(found),
        "disjoint": apart.count("disjoint") / len(apart),
    }


def radii(
    model: nn.Module,
    kind: Kind,
    naps: Mapping[int, ActivationPattern],
    strictest: Mapping[int, ActivationPattern],
    task: Task,
    generator: torch.Generator,
) -> Metrics:
    test = task.test
    usable = nap_coverage(model, strictest, test.x, test.labels).own & (predict(model, test.x).argmax(1) == test.labels)
    chosen, found = usable.nonzero().flatten()[:IMAGES].tolist(), []
    for i in chosen:
        x, c = test.x[i : i + 1], int(test.labels[i])
        nap = None if kind == "plain" else naps[c]
        if kind == "instance":
            nap = instance_pattern(model, x)
        if kind == "random":
            nap = random_part(instance_pattern(model, x), naps[c].num_constrained, generator)
        found.append(max_verified_eps(model, x, c, nap, upper=LARGEST, steps=STEPS, limits=LIMITS).verified)
    return {"radius": sum(found) / len(found), "images": float(len(found))}


def random_part(pattern: ActivationPattern, size: int, generator: torch.Generator) -> ActivationPattern:
    """`size` of the neurons of a pattern that fixes all of them."""
    order = torch.randperm(pattern.num_constrained, generator=generator)
    kept: dict[str, Tensor] = {}
    start = 0
    for name, sign in pattern.phases.items():
        place = order[start : start + sign.numel()].reshape(sign.shape)
        kept[name], start = torch.where(place < size, sign, 0), start + sign.numel()
    return ActivationPattern.from_phases(kept)


def smallest_step(metric: str, arms: Mapping[str, Metrics]) -> float:
    """The smallest fall of a metric from one delta to the next lower one."""
    values = [arms[f"nap_{delta:g}"][metric] for delta in DELTAS]
    return min(high - low for high, low in itertools.pairwise(values))


def recall_falls(arms: Mapping[str, Metrics]) -> float:
    return smallest_step("recall", arms)


def gain(arm: str, over: str, arms: Mapping[str, Metrics]) -> float:
    """Logarithm of the ratio of two mean radii."""
    return math.log(arms[arm]["radius"] / arms[over]["radius"])


def strict_over_plain(arms: Mapping[str, Metrics]) -> float:
    return gain("nap_0.6", "plain", arms)


def strict_over_loose(arms: Mapping[str, Metrics]) -> float:
    return gain("nap_0.6", "nap_0.9", arms)


def strict_over_random(arms: Mapping[str, Metrics]) -> float:
    return gain("nap_0.6", "random", arms)


SETUP = Setup(
    task=digits_task,
    arms={
        "plain": system("plain"),
        **{f"nap_{delta:g}": system("nap", delta) for delta in DELTAS},
        "random": system("random"),
        "instance": system("instance"),
    },
    claims=(
        Claim("In the whole input box the patterns of at least half of the classes are proven, at delta 0.9.", "box_proven", "nap_0.9", at_least=0.5),
        Claim("No input follows two classes' patterns, for at least half of the pairs, at delta 0.9.", "disjoint", "nap_0.9", at_least=0.5),
        Claim("Recall falls at every step of delta from 0.99 to 0.6.", every_seed=True, effect=recall_falls),
        Claim("Patterns at delta 0.6 raise the provable radius over the plain ball's.", effect=strict_over_plain),
        Claim("The provable radius grows as delta falls, from 0.9 to 0.6.", effect=strict_over_loose),
        Claim("A class's pattern at delta 0.6 raises the radius more than as many neurons chosen at random.", effect=strict_over_random),
    ),
)  # fmt: skip

TRIAL = Trial(
    method="certified/nap",
    tiers={"embedded": SETUP},
    notes="Radii are L-infinity, in pixels of [0, 1], means over the same images in every arm; what was neither proven nor refuted "
    "within 30 nodes of branch and bound counts as not proven. The paper's factors (a median of 2, up to 10) are for larger nets.",
)
