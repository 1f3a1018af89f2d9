"""Proofs and counterexamples in the region of a pattern: one class, pairs of classes, two patterns, the largest ball."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from surefoot.certified.nap.patterns import ActivationPattern, neuron_values
from surefoot.errors import InvalidInput, check, check_at_least, check_non_negative, check_positive
from surefoot.nn.bounds import Decision, Limits, Status, decide, decide_margins

Domain = tuple[float, float] | tuple[Tensor, Tensor]  # numbers, or tensors [1, ...]


@dataclass(frozen=True, eq=False)
class NAPVerification:
    """Whether `target` beats every one of `competitors` wherever the region's inputs follow the pattern.

    "verified": proven, and the region holds an input. "falsified": `counterexample` `[1, ...]` lies in the region, follows the
    pattern and is not classified as `target`, by the torch model in float64. "empty_region": no input follows. "unknown": `decision.reason`.
    """

    target: int
    competitors: tuple[int, ...]
    decision: Decision

    @property
    def status(self) -> Status:
        return self.decision.status

    @property
    def verified(self) -> bool:
        return self.decision.verified

    @property
    def counterexample(self) -> Tensor | None:
        return self.decision.counterexample

    @property
    def confused_with(self) -> int | None:
        """The competitor that the counterexample prefers to `target`, or ties with."""
        return None if self.decision.row is None else self.competitors[self.decision.row]


def verify_nap(
    model: nn.Module,
    nap: ActivationPattern | None,  # None: the plain region
    target: int,
    *,
    domain: Domain = (0.0, 1.0),
    center: Tensor | None = None,  # [1, ...]
    eps: float | None = None,
    competitors: tuple[int, ...] | None = None,
    witness: Tensor
    | None = None,  # [N, ...] inputs that may follow the pattern: a quick proof that the region is not empty
    limits: Limits | None = None,
) -> NAPVerification:
    """Is everything of the domain, or of the ball around `center` in it, that follows the pattern classified as `target`?

    Ties are violations; `competitors` None means all other classes. `limits` bounds time, branch-and-bound nodes and open neurons;
    beyond it the answer is "unknown". Raises `UnsupportedOp` for activations other than ReLUs, `InvalidInput` for another
    architecture's pattern or an empty domain.
    """
    lower, upper = _region(domain, center, eps, witness)
    phases = None if nap is None else nap.phases
    decision = decide_margins(
        model, lower, upper, target, competitors=competitors, phases=phases, witness=witness, limits=limits
    )
    if competitors is None:
        competitors = tuple(k for k in range(len(decision.margins) + 1) if k != target)
    return NAPVerification(target, competitors, decision)


def verify_pairs(
    model: nn.Module,
    naps: Mapping[int, ActivationPattern],
    *,
    domain: Domain = (0.0, 1.0),
    witness: Tensor,  # [N, ...]
    limits: Limits | None = None,
) -> dict[tuple[int, int], NAPVerification]:
    """For every pattern's class c and every other class k, by itself: is nothing that follows the pattern of c taken for k?

    `limits` hold for each pair.
    """
    classes = _classes(model, witness)
    return {
        (c, k): verify_nap(model, nap, c, domain=domain, competitors=(k,), witness=witness, limits=limits)
        for c, nap in naps.items()
        for k in range(classes)
        if k != c
    }


@dataclass(frozen=True, eq=False)
class Ambiguity:
    """Whether an input follows two patterns at once: "disjoint" is proven, "ambiguous" comes with an input, `[1, ...]`."""

    status: Literal["disjoint", "ambiguous", "unknown"]
    conflicts: int  # neurons of opposite states; any proves "disjoint"
    example: Tensor | None = None
    reason: str = ""


def check_ambiguity(
    model: nn.Module,
    first: ActivationPattern,
    second: ActivationPattern,
    *,
    domain: Domain = (0.0, 1.0),
    witness: Tensor | None = None,  # [N, ...], tried first
    limits: Limits | None = None,
) -> Ambiguity:
    """Does any input of the domain follow both patterns?"""
    conflicts = first.conflicts(second)
    if conflicts:
        return Ambiguity("disjoint", conflicts)
    lower, upper = _region(domain, None, None, witness)
    if witness is not None:
        _, values = neuron_values(model, witness)
        both = first.follows(values) & second.follows(values) & _inside(witness, lower, upper).to(lower.device)
        if bool(both.any()):
            return Ambiguity("ambiguous", 0, witness[int(both.nonzero()[0])].unsqueeze(0))
    merged = {**first.phases}
    for name, sign in second.phases.items():
        merged[name] = torch.where(sign != 0, sign, merged.get(name, torch.zeros_like(sign)))
    classes = _classes(model, lower)
    unit = torch.zeros(1, classes, dtype=torch.float64, device=lower.device)
    unit[0, 0] = 1.0
    # f_0 > 0 and -f_0 > 0 cannot both hold anywhere, so that any input of the region is a counterexample
    decision = decide(model, lower, upper, torch.cat([unit, -unit]), phases=merged, limits=limits)
    if decision.status == "empty_region":
        return Ambiguity("disjoint", 0)
    if decision.status == "falsified":
        return Ambiguity("ambiguous", 0, decision.counterexample)
    return Ambiguity("unknown", 0, reason=decision.reason)


@dataclass(frozen=True, eq=False)
class VerifiedEps:
    """`verified`: the largest radius that was proven; `falsified`: the smallest one that was refuted, infinity if none."""

    verified: float
    falsified: float
    last: NAPVerification | None  # of the smallest radius that was not proven; None if all were


def max_verified_eps(
    model: nn.Module,
    center: Tensor,  # [1, ...]
    target: int,
    nap: ActivationPattern | None = None,
    *,
    domain: Domain = (0.0, 1.0),
    upper: float = 0.2,
    steps: int = 8,
    limits: Limits | None = None,
) -> VerifiedEps:
    """By bisection on [0, `upper`], the largest ball around `center` in which everything that follows the pattern is `target`.

    What holds in a ball holds in smaller ones; "unknown" counts as not proven. `center` must follow the pattern.
    """
    check_positive("upper", upper)
    check_at_least("steps", steps, 1)
    if nap is not None:
        follows = bool(nap.follows(neuron_values(model, center)[1]).all())
        check(follows, "center must follow the pattern; elsewhere small balls are empty and prove nothing.")

    low, high, refuted, last, eps = 0.0, upper, float("inf"), None, upper
    for _ in range(steps + 1):
        found = verify_nap(model, nap, target, domain=domain, center=center, eps=eps, witness=center, limits=limits)
        if found.verified:
            low = eps
            if eps == upper:
                break
        else:
            high, last = eps, found
            refuted = eps if found.status == "falsified" else refuted
        eps = (low + high) / 2
    return VerifiedEps(low, refuted, last)


def _region(domain: Domain, center: Tensor | None, eps: float | None, witness: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bounds `[1, ...]` of the domain, cut with the ball if there is one."""
    low, high = domain
    check((center is None) == (eps is None), "center and eps must be given together.")
    if isinstance(low, Tensor) != isinstance(high, Tensor):
        raise InvalidInput("domain must be two numbers or two tensors.")
    if not isinstance(low, Tensor) or not isinstance(high, Tensor):
        like = center if center is not None else witness
        if like is None or not len(like):
            raise InvalidInput("Give center, witness or a domain of tensors [1, ...]: numbers do not tell the input's shape.")  # fmt: skip
        one = torch.ones_like(like[:1], dtype=torch.float64)
        low, high = one * low, one * high
    check(low.shape == high.shape and len(low) == 1, "domain must hold tensors [1, ...] of one shape.")
    check(bool((low <= high).all()), "The domain is empty: its lower bound exceeds the upper one somewhere.")
    if center is None or eps is None:
        return low, high
    check_non_negative("eps", eps)
    check(center.shape == low.shape, f"center must have the shape {tuple(low.shape)}, got {tuple(center.shape)}.")
    check(bool(_inside(center, low, high).all()), "center must lie in the domain.")
    point = center.double()
    # a centre on the domain's edge may miss it by its own rounding, and must stay inside the ball
    return torch.minimum((point - eps).clamp(min=low), point), torch.maximum((point + eps).clamp(max=high), point)


def _inside(points: Tensor, low: Tensor, high: Tensor) -> Tensor:  # bool [N]
    return ((points >= low) & (points <= high)).flatten(1).all(1)


def _classes(model: nn.Module, example: Tensor) -> int:
    return neuron_values(model, example[:1])[0].shape[1]
