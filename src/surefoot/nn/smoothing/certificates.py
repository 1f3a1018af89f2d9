"""Certificates, sequential plans, the two-sided prediction, and the summaries of a labelled set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surefoot.errors import check, check_at_least, check_open_unit
from surefoot.nn.smoothing.bounds import (
    binomial_p_value,
    lower_confidence_bound,
    smoothing_radius,
    upper_confidence_bound,
)
from surefoot.nn.smoothing.sampling import Model, check_deterministic, check_request, default_batch, vote_counts

ABSTAIN = -1


@dataclass(frozen=True)
class Certificates:
    """What smoothing guarantees for each of B inputs. All tensors are on the CPU."""

    prediction: Tensor  # int64 [B], ABSTAIN (-1) where nothing is certified
    radius: Tensor  # float64 [B], L2, 0 where nothing is certified
    p_lower: Tensor  # float64 [B], lower confidence bound of the chosen class's probability
    draws: Tensor  # int64 [B], draws used, selection included

    @property
    def abstained(self) -> Tensor:  # bool [B]
        return self.prediction == ABSTAIN


@dataclass(frozen=True)
class Looks:
    """A group-sequential plan, declared before any draw: after `at[j]` draws look, with level `spend[j] * alpha`.

    The bounds of all looks hold together with probability 1 - alpha (union bound, the shares sum to 1), whatever makes the
    sampling stop, and the largest is reported. A look stops an input that reaches `target` (a radius) already, and, at no
    cost in alpha, gives up (abstains) on one whose probability is below 1/2 beyond doubt `give_up`.
    """

    at: tuple[int, ...]
    spend: tuple[float, ...]
    target: float = math.inf
    give_up: float = 1e-3

    def __post_init__(self) -> None:
        check(len(self.at) == len(self.spend) > 0, "looks need as many shares in spend as there are looks in at.")
        check(self.at[0] >= 1 and all(b > a for a, b in zip(self.at, self.at[1:])), f"looks must increase, got {self.at}.")  # fmt: skip
        check(min(self.spend) >= 0 and sum(self.spend) <= 1 + 1e-12, f"spend must be shares of alpha that sum to at most 1, got {self.spend}.")  # fmt: skip
        check_open_unit("give_up", self.give_up)

    @classmethod
    def geometric(cls, n: int, *, target: float = math.inf, first: int = 100, factor: int = 4) -> Looks:
        """Looks after `first`, `factor * first`, ... and `n` draws; half of alpha is kept for the last, the rest is shared evenly.

        For certified accuracy at one radius (`target`): clear inputs stop at the first look, close ones go on to n.
        """
        check_at_least("n", n, 1)
        check_at_least("first", first, 1)
        check_at_least("factor", factor, 2)
        at = []
        while first < n:
            at.append(first)
            first *= factor
        return cls((*at, n), (*([0.5 / len(at)] * len(at)), 0.5) if at else (1.0,), target)


def certify(
    model: Model,
    x: Tensor,  # float [B, ...], raw scale
    *,
    sigma: float,
    num_classes: int,
    generator: torch.Generator,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    batch_size: int | None = None,
    shared: bool = True,
    looks: Looks | None = None,
    stochastic: bool = False,
) -> Certificates:
    """Certified class and L2 radius of the smoothed classifier at each input.

    c = argmax of n0 votes; pA = lower bound from n fresh votes; (c, sigma Phi^-1(pA)) if pA > 1/2, else abstain.
    `looks` replaces n by a pre-declared plan that may stop early and keeps alpha. `generator` may live on any device;
    the noise has the dtype and device of x. The radius is at most sigma Phi^-1(alpha^(1/n)).
    One set of noise serves all inputs (each input's votes are Binomial(n, p) all the same, so each certificate keeps its level
    alpha, and does not depend on which other inputs are in the call); `shared=False` draws anew for each, for those who need
    certificates that are independent of each other too. `stochastic=True` declares a base that answers differently to the same
    input, with independent draws.
    """
    check_request(x, n0, n, alpha)
    plan = looks or Looks((n,), (1.0,))
    options = {"sigma": sigma, "num_classes": num_classes, "generator": generator}
    options |= {"batch_size": batch_size, "shared": shared}
    if not stochastic:
        widest = check_deterministic(model, x)
        options["batch_size"] = default_batch(x, widest) if batch_size is None else batch_size
    chosen = vote_counts(model, x, n0, **options).argmax(1)
    p_lower, draws = _sequential_bound(model, x, chosen, plan, alpha, options)
    radius = smoothing_radius(p_lower, sigma)
    prediction = torch.where(p_lower > 0.5, chosen, ABSTAIN)
    return Certificates(prediction, radius, p_lower, draws + n0)


def predict(
    model: Model,
    x: Tensor,  # float [B, ...]
    *,
    sigma: float,
    num_classes: int,
    generator: torch.Generator,
    n: int = 1000,
    alpha: float = 0.001,
    batch_size: int | None = None,
    stochastic: bool = False,
) -> Tensor:  # int64 [B]
    """The smoothed class, or ABSTAIN where a two-sided binomial test of the two top counts has p > alpha. One set of noise for all."""
    check_request(x, 1, n, alpha)
    options = {"sigma": sigma, "num_classes": num_classes, "generator": generator, "batch_size": batch_size}
    if not stochastic:
        widest = check_deterministic(model, x)
        options["batch_size"] = default_batch(x, widest) if batch_size is None else batch_size
    counts = vote_counts(model, x, n, shared=True, **options)
    top = counts.topk(2, dim=1)
    return torch.where(binomial_p_value(*top.values.unbind(1)) <= alpha, top.indices[:, 0], ABSTAIN)


def certified_accuracy(
    certificates: Certificates,
    y: Tensor,  # int64 [B]
    radii: Sequence[float],
) -> Tensor:  # float64 [R]
    """Share of inputs with the right class *and* radius >= r; an abstention is wrong at every r, 0 included."""
    right = certificates.prediction == y.cpu()
    reached = certificates.radius[None, :] >= torch.tensor(list(radii), dtype=torch.float64)[:, None]
    return (right & reached).double().mean(1)


def correct_radii(certificates: Certificates, y: Tensor) -> Tensor:  # float64 [B]
    """Each input's radius, 0 where the class is wrong or the classifier abstains; their mean is the ACR."""
    check(len(y) == len(certificates.radius), f"y has {len(y)} labels for {len(certificates.radius)} certificates.")
    return torch.where(certificates.prediction == y.cpu(), certificates.radius, 0.0)


def average_certified_radius(certificates: Certificates, y: Tensor) -> float:
    """ACR: the mean of `correct_radii`."""
    return correct_radii(certificates, y).mean().item()


def _sequential_bound(
    model: Model,
    x: Tensor,
    chosen: Tensor,  # int64 [B]
    looks: Looks,
    alpha: float,
    options: dict,
) -> tuple[Tensor, Tensor]:  # float64 [B], int64 [B]
    """The largest lower bound over the looks, and the draws used. One look is the published procedure."""
    hits, done = torch.zeros(len(x), dtype=torch.int64), torch.zeros(len(x), dtype=torch.int64)
    p_lower, active = torch.zeros(len(x), dtype=torch.float64), torch.arange(len(x))
    for at, share in zip(looks.at, looks.spend):
        fresh = at - int(done[active[0]])
        counts = vote_counts(model, x[active.to(x.device)], fresh, **options)
        hits[active] += counts.gather(1, chosen[active, None])[:, 0]
        done[active] = at
        if share > 0:
            p_lower[active] = p_lower[active].maximum(lower_confidence_bound(hits[active], at, share * alpha))
        hopeless = upper_confidence_bound(hits[active], at, looks.give_up) < 0.5
        reached = smoothing_radius(p_lower[active], options["sigma"]) >= looks.target
        active = active[~(hopeless | reached)]
        if len(active) == 0:
            break
    return p_lower, done
