"""A few wide blocks find what the exact SVD has, and say where they cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from surefoot.nn.randomized_svd import randomized_svd
from surefoot.nn.wide_krylov import leading_triplets


def weight_of(m: int, n: int, power: float, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(side, n, generator=g, dtype=torch.float64)).Q for side in (m, n))
    return ((u * torch.arange(1, n + 1, dtype=torch.float64) ** -power) @ v.mT).to(dtype)


def excess(weight: Tensor, triplets: tuple[Tensor, Tensor, Tensor], power: float) -> float:
    u, s, vh = (t.double().cpu() for t in triplets)
    tail = (torch.arange(len(s) + 1, weight.shape[1] + 1).double() ** -power).norm()
    return float((weight.double().cpu() - (u * s) @ vh).norm() / tail - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_three_blocks_beat_four_power_iterations(power, dtype):
    """Spectra from flat to one that spans eight digits; the triplets are orthonormal to the weight's precision."""
    weight, rank = weight_of(400, 256, power, dtype=dtype), 24
    found = leading_triplets(weight, rank, block=rank, steps=3, generator=torch.Generator().manual_seed(1))
    assert found is not None
    torch.manual_seed(0)
    u, s, v = torch.svd_lowrank(weight, rank, niter=4)
    assert excess(weight, found, power) <= max(excess(weight, (u, s, v.mT), power), 1e-4)
    tight = 1e-4 if dtype == torch.float32 and power == 3.0 else 2e-6
    for side in (found[0].mT, found[2]):
        torch.testing.assert_close(side @ side.mT, torch.eye(rank, dtype=dtype), atol=tight, rtol=0)
    exact = torch.linalg.svdvals(weight.double())[:rank]
    assert float((found[1].double() / exact - 1).abs()[:8].max()) < (1e-3 if dtype == torch.float32 else 2e-3)


def test_a_weight_of_low_rank_is_left_to_narrow_blocks():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 5, generator=g) @ torch.randn(5, 128, generator=g)
    assert leading_triplets(torch.zeros(200, 128), 8, block=8, steps=3, generator=g) is None
    found = leading_triplets(weight.double(), 8, block=8, steps=3, generator=g)
    if found is not None:  # rounding may fill the block up: what is found must then be right all the same
        u, s, vh = found
        torch.testing.assert_close((u * s) @ vh, weight.double(), atol=1e-6, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", [(1024, 512), (512, 1024)])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_on_cuda_the_factors_are_as_good(shape, power):
    weight = weight_of(1024, 512, power)
    weight = weight if shape[0] > shape[1] else weight.mT
    there = randomized_svd(weight.cuda(), 32, niter=2)
    here = randomized_svd(weight, 32, niter=2)
    tail = (torch.arange(33, 513).double() ** -power).norm()
    errors = [float((weight.double() - (u * s) @ vh).norm() / tail - 1) for u, s, vh in ((t.double().cpu() for t in side) for side in (there, here))]  # fmt: skip
    assert errors[0] <= max(2 * errors[1], 4e-3)
    low = torch.randn(1024, 4) @ torch.randn(4, 512)
    u, s, vh = randomized_svd(low.cuda(), 16, niter=2)
    torch.testing.assert_close((u * s) @ vh, low.cuda(), atol=1e-3, rtol=0)
