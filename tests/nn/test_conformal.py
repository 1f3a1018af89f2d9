"""Split-conformal quantile: the index, coverage, and the interpolated quantile shown to fall short."""

import math

import numpy as np
import pytest
import torch

from surefoot.errors import InvalidInput
from surefoot.nn.conformal import conformal_index, conformal_quantile, lac_scores, lac_sets, set_coverage


@pytest.mark.parametrize(
    ("n", "alpha", "index"),
    [(1000, 0.1, 901), (1000, 0.1 - 2 * 0.001, 903), (9, 0.1, 9), (99, 0.1, 90), (19, 0.05, 19), (8, 0.1, 9), (1, 0.5, 1), (999, 0.3, 700), (9, 0.0999999, 10)],
)  # fmt: skip
def test_index(n, alpha, index):
    assert conformal_index(n, alpha) == index


def test_guard_against_binary_rounding_matters():
    """Planted mistake: a bare ceil turns some exact integers into the next one."""
    off = 0
    for n in range(1, 2000):
        for tenths in range(1, 10):
            exact = -(-(n + 1) * (10 - tenths) // 10)
            assert conformal_index(n, tenths / 10) == exact
            off += math.ceil((n + 1) * (1 - tenths / 10)) != exact
    assert off > 0


def test_order_statistic_and_infinity():
    scores = torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0], [0.5, 0.1, 0.4, 0.2, 0.3]], dtype=torch.float64)
    assert conformal_quantile(scores, 0.5).tolist() == [3.0, 0.3]
    assert conformal_quantile(scores, 1 / 6).tolist() == [5.0, 0.5]
    assert conformal_quantile(scores, 0.1).tolist() == [math.inf, math.inf]
    assert conformal_quantile(scores.float(), 0.5).dtype == torch.float32


def test_mean_coverage_over_splits_and_the_interpolated_quantile_falls_short():
    generator = torch.Generator().manual_seed(0)
    n, alpha, splits, test = 19, 0.1, 20_000, 20
    scores = torch.randn(splits, n + test, generator=generator, dtype=torch.float64)
    threshold = conformal_quantile(scores[:, :n], alpha)
    coverage = (scores[:, n:] <= threshold[:, None]).double().mean(1)
    error = 3 * coverage.std().item() / math.sqrt(splits)
    # ceil(20 * .9) / 20 = .9 exactly
    assert abs(coverage.mean().item() - 0.9) <= error
    interpolated = torch.from_numpy(np.quantile(scores[:, :n].numpy(), 1 - alpha, axis=1))
    short = (scores[:, n:] <= interpolated[:, None]).double().mean()
    assert short.item() < 0.9 - 5 * error


def test_coverage_band_of_the_lac_sets():
    """200 splits: mean coverage in [1 - a - .01, 1 - a + 1/(n + 1) + .01]."""
    generator = torch.Generator().manual_seed(1)
    n, alpha, total = 300, 0.1, 1500
    logits = 2 * torch.randn(total, 5, generator=generator, dtype=torch.float64)
    probabilities = logits.softmax(1)
    y = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    covered = []
    for _ in range(200):
        order = torch.randperm(total, generator=generator)
        calibration, test = order[:n], order[n:]
        q = conformal_quantile(lac_scores(probabilities[calibration], y[calibration]), alpha)
        covered.append(set_coverage(lac_sets(probabilities[test], q), y[test]).double().mean().item())
    assert 1 - alpha - 0.01 <= np.mean(covered) <= 1 - alpha + 1 / (n + 1) + 0.01


def test_sets_hold_ties_and_nest_in_alpha():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]], dtype=torch.float64)
    y = torch.tensor([1, 2])
    scores = lac_scores(probabilities, y)
    assert scores.tolist() == pytest.approx([0.8, 0.75])
    assert lac_sets(probabilities, scores[0]).tolist() == [[True, True, False], [True, True, True]]
    assert lac_sets(probabilities, math.inf).all()
    small, big = (lac_sets(probabilities, t) for t in (0.5, 0.7))
    assert (small <= big).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_calibration_example_at_its_own_threshold_is_a_member(dtype):
    """p >= 1 - q instead of 1 - p <= q loses ties by rounding."""
    probabilities = torch.rand(5000, 3, generator=torch.Generator().manual_seed(2), dtype=dtype) * 0.3
    y = torch.zeros(5000, dtype=torch.int64)
    scores = lac_scores(probabilities, y)
    assert lac_sets(probabilities, scores[:, None])[:, 0].all()
    assert not (probabilities[:, 0] >= 1.0 - scores).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: conformal_quantile(torch.tensor([]), 0.1), "empty"),
        (lambda: conformal_quantile(torch.tensor([1.0, float("nan")]), 0.1), "NaN"),
        (lambda: conformal_quantile(torch.tensor([1, 2]), 0.1), "floating-point"),
        (lambda: conformal_quantile(torch.tensor([1.0]), 1.0), "alpha"),
        (lambda: lac_scores(torch.tensor([[3.0, -2.0]]), torch.tensor([0])), "softmax"),
        (lambda: lac_scores(torch.tensor([[0.5, 0.5]]), torch.tensor([2])), "y must lie"),
        (lambda: lac_sets(torch.tensor([0.5, 0.5]), 0.3), r"\[N, K\]"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()
