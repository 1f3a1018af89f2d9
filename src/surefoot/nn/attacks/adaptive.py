"""The adaptive protocol, for every defence that is more than a trained network (Tramer, Carlini, Brendel & Madry, 2020,
arXiv 2002.08347): attack the real pipeline, and attack it with knowledge of how it works.

1. `pipeline`: APGD with gradients averaged over `eot` draws (Athalye et al., 2018, arXiv 1802.00420)
2. `surrogate`: APGD on a smooth stand-in (order statistics replaced by the mean of logits or log-probabilities), its points
   transferred as they are and as the start of an attack on the pipeline
3. `component i`: each part attacked by itself and transferred
4. `long`: five times the steps, five starts
5. `square`: without any gradient

An example is robust if no stage breaks it: the minimum over all, per example.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from surefoot.errors import check_choice
from surefoot.nn.attacks.apgd import apgd
from surefoot.nn.attacks.ball import Bounds, Norm
from surefoot.nn.attacks.run import AttackResult, Model, check_attack, default_generator
from surefoot.nn.attacks.square import square
from surefoot.nn.attacks.suite import Cascade, Decision, SuiteResult, decide, is_random


def adaptive_suite(
    pipeline: Model,
    x: Tensor,  # [N, ...] within bounds
    y: Tensor,  # int64 [N]
    *,
    surrogate: Model | None = None,
    components: Sequence[Model] = (),
    eps: float = 8 / 255,
    norm: Norm = "linf",
    bounds: Bounds = (0.0, 1.0),
    steps: int = 40,
    eot: int | None = None,  # 20 for a random pipeline, else 1
    restarts: int = 5,
    queries: int = 1000,
    draws: int = 10,
    decision: Decision = "majority",
    loss: str = "margin",
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> SuiteResult:
    """The five stages in cascade; `survivors` names them. A pipeline that draws no random numbers is judged by one pass."""
    check_attack(x, y, eps, norm, bounds, steps=steps, restarts=restarts)
    check_choice("decision", decision, ("majority", "mean"))
    generator, x = default_generator(generator), x.detach()
    random = is_random(pipeline, x[: min(len(x), 16)], generator)
    eot = (20 if random else 1) if eot is None else eot
    draws = draws if random else 1

    def judge(at: Tensor, labels: Tensor) -> Tensor:
        return decide(
            pipeline, at, draws=draws, decision=decision, generator=generator, batch_size=batch_size
        )[0].ne(labels)  # fmt: skip

    state = Cascade(x, y, ~judge(x, y), batch_size, judge, draws)
    shared = {"eps": eps, "norm": norm, "bounds": bounds, "generator": generator}

    def attack(index: Tensor, count: int, start: Tensor | None = None) -> AttackResult:
        return apgd(pipeline, x[index], y[index], steps=count, eot=eot, loss=loss, start=start, **shared)

    def transfer(index: Tensor, part: Model, points: Tensor) -> AttackResult:
        found = apgd(part, x[index], y[index], steps=steps, loss=loss, early_stop=False, keep="strongest", **shared)
        points[index] = found.x
        return found

    if surrogate is None:
        state.note("No surrogate was given: stage 2 of the adaptive protocol was left out.")
    parts = [] if surrogate is None else [("surrogate", surrogate)]
    parts += [(f"component {k}", part) for k, part in enumerate(components)]
    if eps > 0:
        state.run("pipeline", lambda i: attack(i, steps))
        for name, part in parts:
            points = x.clone()
            state.run(name, lambda i: transfer(i, part, points))  # noqa: B023
            state.run(f"{name}, continued", lambda i: attack(i, steps, points[i]))  # noqa: B023
        for _ in range(restarts):
            state.run("long", lambda i: attack(i, 5 * steps))
        if norm == "l2" and (x.dim() != 4 or min(x.shape[2:]) < 5):
            state.note("Square was left out: in L2 it needs images of at least 5 x 5.")
        else:
            state.run(
                "square", lambda i: square(pipeline, x[i], y[i], queries=queries, early_stop=not random, **shared)
            )
    return state.result(decision=decision if random else "single", draws=draws)
