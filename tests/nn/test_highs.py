"""0-1 programmes against all their points: no gap, both sides of every row, None where nothing fits."""

import itertools

import numpy as np
from scipy import sparse

from surefoot.nn.highs import binary_programme


def cheapest(cost, matrix, low, high):
    """The least cost by trying all points, None where none is allowed."""
    points = np.array(list(itertools.product((0.0, 1.0), repeat=len(cost))))
    rows = points @ matrix.T
    allowed = ((rows >= low - 1e-9) & (rows <= high + 1e-9)).all(1)
    return (points[allowed] @ cost).min() if allowed.any() else None


def test_every_answer_is_the_best_of_all_points():
    draw, seen = np.random.default_rng(0), {True: 0, False: 0}
    for _ in range(40):
        cost, matrix = draw.normal(size=8), draw.integers(-5, 6, size=(3, 8)).astype(float)
        low = draw.integers(-6, 5, size=3).astype(float)
        high = low + draw.integers(0, 4, size=3)
        best = cheapest(cost, matrix, low, high)
        found = binary_programme(cost, sparse.csr_matrix(matrix), low, high)
        seen[best is None] += 1
        if best is None:
            assert found is None
            continue
        assert found is not None and found.dtype == bool
        rows = matrix @ found
        assert (rows >= low - 1e-6).all() and (rows <= high + 1e-6).all()
        assert abs(cost @ found - best) < 1e-6
    assert min(seen.values()) >= 3


def test_a_knapsack_is_filled_without_a_gap():
    """Many nearly equal points, where a gap of 1e-4 (the solver's default) would stop early."""
    draw = np.random.default_rng(1)
    weight = draw.uniform(1, 2, 14)
    value = weight + draw.uniform(0, 1e-4, 14)
    capacity = np.array([weight.sum() / 2])
    found = binary_programme(-value, sparse.csr_matrix(weight[None]), np.array([-np.inf]), capacity)
    best = cheapest(-value, weight[None], np.array([-np.inf]), capacity)
    assert found is not None and best is not None
    assert abs(-value @ found - best) < 1e-9
