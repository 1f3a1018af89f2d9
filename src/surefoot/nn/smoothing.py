"""Randomised smoothing: what a classifier says under Gaussian noise, and the L2 radius within which that cannot change.

For a base classifier f, the smoothed one is g(x) = argmax_c P[f(x + sigma e) = c], e ~ N(0, I). If class c has probability
at least pA > 1/2 there, then g is constant in the open L2 ball of radius sigma Phi^-1(pA) around x. `certify` picks c from
n0 draws, bounds pA from below with n *fresh* draws (Clopper-Pearson, one-sided level alpha), and abstains where the bound
does not exceed 1/2; every certificate alone is wrong with probability at most alpha. `predict` only names the class.

Noise is added to the raw input, before any normalisation, and is not clipped. Models run in evaluation mode (flags are
switched and put back). Many inputs are worked on at once; no input is repeated in memory beyond one batch.

Source: Cohen, Rosenfeld, Kolter 2019, arXiv 1902.02918.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special
from torch import Tensor, nn

from surefoot.errors import InvalidInput, Refused, check, check_at_least, check_open_unit, check_positive

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


def lower_confidence_bound(
    count: Tensor,  # int [...]
    n: int | Tensor,
    alpha: float,
) -> Tensor:  # float64 [...], on the CPU
    """Clopper-Pearson: p_low = BetaInv(alpha; k, n - k + 1), 0 for k = 0; P[p < p_low] <= alpha, one-sided."""
    k, total = _counts(count, n, alpha)
    inner = special.betaincinv(np.maximum(k, 1.0), total - k + 1.0, alpha)
    return torch.from_numpy(np.asarray(np.where(k == 0, 0.0, inner)))


def upper_confidence_bound(
    count: Tensor,  # int [...]
    n: int | Tensor,
    alpha: float,
) -> Tensor:  # float64 [...], on the CPU
    """Clopper-Pearson: p_up = BetaInv(1 - alpha; k + 1, n - k), 1 for k = n; P[p > p_up] <= alpha, one-sided."""
    k, total = _counts(count, n, alpha)
    return 1.0 - lower_confidence_bound(torch.from_numpy(np.asarray(total - k)), torch.from_numpy(total), alpha)


def smoothing_radius(p_lower: Tensor, sigma: float) -> Tensor:
    """sigma Phi^-1(p) where p > 1/2, else 0."""
    check_positive("sigma", sigma)
    p = p_lower.double()
    return torch.where(p > 0.5, sigma * torch.special.ndtri(p.clamp(0.5, 1.0)), 0.0)


def binomial_p_value(top: Tensor, runner_up: Tensor) -> Tensor:  # float64, on the CPU
    """Two-sided p-value of `top` successes in `top + runner_up` fair coin tosses, top >= runner_up."""
    k, rest = (np.asarray(t.cpu().double().numpy()) for t in (top, runner_up))
    tail = special.betainc(np.maximum(k, 1.0), rest + 1.0, 0.5)  # P[X >= k]
    return torch.from_numpy(np.asarray(np.where(k == 0, 1.0, np.minimum(1.0, 2.0 * tail))))


def certify(
    model: nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,  # float [B, ...], raw scale
    *,
    sigma: float,
    num_classes: int,
    generator: torch.Generator,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    batch_size: int | None = None,
    shared: bool = False,
    looks: Looks | None = None,
    stochastic: bool = False,
) -> Certificates:
    """Certified class and L2 radius of the smoothed classifier at each input.

    c = argmax of n0 votes; pA = lower bound from n fresh votes; (c, sigma Phi^-1(pA)) if pA > 1/2, else abstain.
    `looks` replaces n by a pre-declared plan that may stop early and keeps alpha. `generator` may live on any device;
    the noise has the dtype and device of x. The radius is at most sigma Phi^-1(alpha^(1/n)).
    `shared=True` draws one set of noise for all inputs (up to twice as fast on small networks): each certificate keeps its
    level, but they are no longer independent of each other. `stochastic=True` declares a base that answers differently to the same input, with independent draws.
    """
    n = looks.at[-1] if looks is not None else n
    _check_request(x, n0, n, alpha)
    options = {"sigma": sigma, "num_classes": num_classes, "generator": generator}
    options |= {"batch_size": batch_size, "shared": shared}
    if not stochastic:
        check_deterministic(model, x)
    chosen = vote_counts(model, x, n0, **options).argmax(1)
    p_lower, draws = _sequential_bound(model, x, chosen, looks or Looks((n,), (1.0,)), alpha, options)
    radius = smoothing_radius(p_lower, sigma)
    prediction = torch.where(p_lower > 0.5, chosen, ABSTAIN)
    return Certificates(prediction, radius, p_lower, draws + n0)


def predict(
    model: nn.Module | Callable[[Tensor], Tensor],
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
    """The smoothed class, or ABSTAIN where a two-sided binomial test of the two top counts has p > alpha."""
    _check_request(x, 1, n, alpha)
    if not stochastic:
        check_deterministic(model, x)
    counts = vote_counts(model, x, n, sigma=sigma, num_classes=num_classes, generator=generator, batch_size=batch_size)
    top = counts.topk(2, dim=1)
    return torch.where(binomial_p_value(*top.values.unbind(1)) <= alpha, top.indices[:, 0], ABSTAIN)


def vote_counts(
    model: nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,  # float [B, ...]
    n: int,
    *,
    sigma: float | Tensor,
    num_classes: int,
    generator: torch.Generator,
    batch_size: int | None = None,
    shared: bool = False,
) -> Tensor:  # int64 [B, num_classes], on the CPU
    """How often each class is the argmax in n noisy draws of each input."""
    options = {"sigma": sigma, "num_classes": num_classes, "generator": generator}
    return joint_vote_counts([model], x, n, batch_size=batch_size, shared=shared, **options)[0]


def joint_vote_counts(
    models: Sequence[nn.Module | Callable[[Tensor], Tensor]],
    x: Tensor,  # float [B, ...]
    n: int,
    *,
    sigma: float | Tensor,
    num_classes: int,
    generator: torch.Generator,
    batch_size: int | None = None,
    shared: bool = False,
) -> Tensor:  # int64 [V, B, num_classes], on the CPU
    """`vote_counts` of V classifiers on the *same* noisy draws (classifiers that read disjoint parts stay independent)."""
    check_at_least("num_classes", num_classes, 2)
    votes = torch.zeros(len(models), len(x) * num_classes, dtype=torch.int64, device=x.device)
    broken = torch.zeros((), dtype=torch.bool, device=x.device)
    with evaluating(*models), torch.inference_mode():
        for rows, noisy in noisy_batches(x, n, sigma=sigma, generator=generator, batch_size=batch_size, shared=shared):
            first, size = (
                int(rows[0]),
                int(rows[-1] - rows[0]) + 1,
            )  # count from the batch's first input on: small tables
            offset = ((rows - first) * num_classes).to(x.device)
            for view, model in enumerate(models):
                # a model that works in place (a first ReLU) must not change what the next one sees
                logits = model(noisy if len(models) == 1 else noisy.clone())
                _check_logits(logits, len(rows), num_classes)
                broken |= ~torch.isfinite(logits).all()
                table = torch.bincount(offset + logits.argmax(1), minlength=size * num_classes)
                votes[view, first * num_classes :][: len(table)] += table
    if bool(broken):
        raise InvalidInput("The model gives NaN or infinite logits under noise; nothing can be certified.")
    return votes.view(len(models), len(x), num_classes).cpu()


def noisy_batches(
    x: Tensor,  # float [B, ...]
    n: int,
    *,
    sigma: float | Tensor,
    generator: torch.Generator,
    batch_size: int | None = None,
    shared: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """n draws x + sigma e of every input: pairs (row in x, int64 `[b]` on the CPU, ascending; noisy inputs `[b, ...]`).

    The noisy tensor is a buffer that the next draw overwrites: use it at once. `sigma` may be a tensor that broadcasts
    over one input. `shared` uses the same n draws for all inputs.
    """
    check_at_least("n", n, 1)
    check(bool((torch.as_tensor(sigma) > 0).all()), f"sigma must be positive, got {sigma!r}.")
    check(math.isfinite(float(torch.as_tensor(sigma).max())), f"sigma must be finite, got {sigma!r}.")
    scale = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    size = min(batch_size or default_batch(x), len(x) * n)
    check_at_least("batch_size", size, 1)
    # Buffers are filled in place: fresh memory for each batch costs more than drawing the noise does.
    noisy = x.new_empty(size, *x.shape[1:])
    noise = torch.empty(noisy.shape, dtype=x.dtype, device=generator.device)
    if not shared:
        for start in range(0, len(x) * n, size):
            rows = torch.arange(start, min(start + size, len(x) * n)).div_(n, rounding_mode="floor")
            out, e = noisy[: len(rows)], noise[: len(rows)].normal_(generator=generator)
            torch.index_select(x, 0, rows.to(x.device), out=out)
            yield rows, out.addcmul_(e.to(x.device), scale)
        return
    draws = min(n, size)  # a batch is some draws, each added to as many inputs as fit
    inputs = size // draws
    for start in range(0, n, draws):
        e = noise[: min(draws, n - start)].normal_(generator=generator).to(x.device) * scale
        for first in range(0, len(x), inputs):
            some = x[first : first + inputs, None]
            out = noisy[: len(some) * len(e)]
            torch.add(some, e, out=out.view(len(some), *e.shape))
            yield torch.arange(first, first + len(some)).repeat_interleave(len(e)), out


def default_batch(x: Tensor) -> int:
    """A batch whose activations stay in a CPU core's cache (bigger ones are up to twice slower), large on a GPU."""
    numbers = max(1, math.prod(x.shape[1:]))
    return min(max(2**17 // numbers, 128), 512) if x.device.type == "cpu" else min(max(2**23 // numbers, 64), 8192)


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


@contextmanager
def evaluating(*models: nn.Module | Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Evaluation mode inside the block; every module's own training flag is put back afterwards."""
    flags = [(part, part.training) for m in models if isinstance(m, nn.Module) for part in m.modules()]
    for model in models:
        if isinstance(model, nn.Module):
            model.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def check_deterministic(model: nn.Module | Callable[[Tensor], Tensor], x: Tensor, probes: int = 8) -> None:
    """Refuse a base classifier that answers the same input differently: its randomness has to be declared."""
    with evaluating(model), torch.inference_mode():
        first, second = model(x[:probes].clone()), model(x[:probes].clone())
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise Refused(
            "The model gives different logits for the same input in evaluation mode; if its draws are independent, "
            "say so with stochastic=True, else make it deterministic."
        )


def _sequential_bound(
    model: nn.Module | Callable[[Tensor], Tensor],
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


def _counts(count: Tensor, n: int | Tensor, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    check_open_unit("alpha", alpha)
    k = torch.as_tensor(count).cpu().double()
    total = torch.as_tensor(n).cpu().double().expand_as(k)
    check(bool((total >= 1).all()), f"n must be an integer of at least 1, got {n!r}.")
    check(bool(((k >= 0) & (k <= total)).all()), "counts must lie between 0 and n.")
    return np.asarray(k.numpy()), np.asarray(total.numpy()).copy()


def _check_request(x: Tensor, n0: int, n: int, alpha: float) -> None:
    check_at_least("n0", n0, 1)
    check_at_least("n", n, 1)
    check_open_unit("alpha", alpha)
    check(x.is_floating_point(), f"x must be floating point, got {x.dtype}; scale images to [0, 1] first.")
    check(x.dim() >= 2 and len(x) > 0, f"x must be a batch of at least one input, got shape {tuple(x.shape)}.")
    check(bool(torch.isfinite(x).all()), "x holds NaN or infinite values; clean the data first.")


def _check_logits(logits: Tensor, batch: int, num_classes: int) -> None:
    if logits.shape != (batch, num_classes):
        raise InvalidInput(f"The model must give logits [{batch}, {num_classes}], got {list(logits.shape)}; check num_classes.")  # fmt: skip
