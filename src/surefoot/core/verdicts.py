"""From the numbers of a trial's arms to the verdicts on its claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from surefoot.core.cell import describe
from surefoot.core.statistics import holm, judge, paired_test
from surefoot.core.trial import Claim, Verdict
from surefoot.errors import InvalidInput, check

Arms = Mapping[str, Mapping[str, Sequence[float]]]  # arm -> metric -> one value per seed


@dataclass(frozen=True)
class ClaimResult:
    """A claim, judged. Numbers are NaN where nothing could be computed; `reason` then says why.

    An `every_seed` claim needs no statistics: its p is NaN, and `low` and `high` are the least and the greatest effect.
    """

    claim: str
    verdict: Verdict
    effect: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan  # raw
    adjusted_p: float = math.nan  # Holm over the trial's claims
    reason: str = ""


def judge_claims(
    claims: Sequence[Claim], arms: Arms, seeds: Sequence[int], why_missing: Mapping[str, str]
) -> tuple[ClaimResult, ...]:
    """Verdicts on claims; `why_missing` says of arms that failed or were not run what happened.

    A claim is judged on all seeds or not at all: leaving out the seeds in which an arm broke would favour it.
    """
    results = [_compare(claim, arms, seeds, why_missing) for claim in claims]
    tested = [place for place, result in enumerate(results) if math.isfinite(result.p)]
    for place, adjusted in zip(tested, holm([results[place].p for place in tested]), strict=True):
        claim, result = claims[place], results[place]
        verdict = judge(result.effect, adjusted, claim.at_least, within=claim.within)
        results[place] = replace(result, verdict=verdict, adjusted_p=adjusted)
    return tuple(results)


def _compare(claim: Claim, arms: Arms, seeds: Sequence[int], why_missing: Mapping[str, str]) -> ClaimResult:
    present = {arm: metrics for arm, metrics in arms.items() if arm not in why_missing}
    rows = [{arm: {m: v[place] for m, v in metrics.items()} for arm, metrics in present.items()} for place in range(len(seeds))]  # fmt: skip
    try:
        effects = [_effect(claim, row, why_missing) for row in rows]
        for seed, effect in zip(seeds, effects, strict=True):
            check(math.isfinite(effect), f"The effect is {effect} at seed {seed}.")
    except InvalidInput as error:
        return ClaimResult(claim.sentence, "inconclusive", reason=str(error))
    if not claim.every_seed:
        return ClaimResult(claim.sentence, "inconclusive", *paired_test(effects, claim.at_least, within=claim.within))
    good = [e >= claim.at_least if claim.within is None else abs(e) <= claim.within for e in effects]
    verdict: Verdict = "holds" if all(good) else "contradicted"
    return ClaimResult(claim.sentence, verdict, sum(effects) / len(effects), min(effects), max(effects))


def _effect(claim: Claim, row: Mapping[str, Mapping[str, float]], why_missing: Mapping[str, str]) -> float:
    """One seed's effect, with its sign turned where lower is better."""
    try:
        if claim.effect is not None:
            value = float(claim.effect(row))
        elif claim.over is None:
            value = row[claim.arm][claim.metric]
        else:
            value = row[claim.arm][claim.metric] - row[claim.over][claim.metric]
    except KeyError as error:
        name = error.args[0]
        raise InvalidInput(why_missing.get(name, f"The trial has no arm or metric named {name!r}.")) from error
    except Exception as error:
        raise InvalidInput(f"The effect could not be computed: {describe(error)}") from error
    return value if claim.better == "higher" else -value
