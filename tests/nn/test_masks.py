"""Partitions of an image and the fills that never look at the other part."""

import math

import pytest
import torch
from torch.nn import functional as F

from surefoot.errors import InvalidInput
from surefoot.nn import masks


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 9), (4, 5), (1, 2, 3), (1, 16, 1)])
def test_checkerboard_is_a_partition_with_two_pixels_a_block(shape):
    left, right = masks.checkerboard_split(shape)
    assert left.shape == right.shape == (1, *shape[-2:])
    assert not (left & right).any()
    assert (left | right).all()
    h, w = shape[-2] // 2 * 2, shape[-1] // 2 * 2
    blocks = F.avg_pool2d(left[:, :h, :w].float(), 2) if h and w else torch.full((1,), 0.5)
    assert (blocks == 0.5).all()
    # no two neighbours in one half: an index pattern off by one in a row's first column fails here
    assert (left[0, :, 1:] != left[0, :, :-1]).all()
    assert (left[0, 1:] != left[0, :-1]).all()


def test_other_partitions_and_index_sets():
    for left, right in (
        masks.left_right_split((1, 5, 7)),
        masks.random_split((3, 5, 7), rng()),
        masks.index_split(6, [0, 2, 5]),
    ):
        masks.check_masks(left, right)
    assert masks.left_right_split((1, 2, 4))[0].int().tolist() == [[[1, 1, 0, 0], [1, 1, 0, 0]]]
    assert int(masks.random_split((1, 6, 6), rng())[0].sum()) == 18


@pytest.mark.parametrize("fill", ["neighbor", "max_pool", "zero"])
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_fill_never_looks_at_the_other_half(fill, size):
    """Bit-identical whatever stands in the dropped pixels, NaN and infinity included."""
    x = torch.rand(3, 2, *size, generator=rng())
    for kept in (*masks.checkerboard_split(size), *masks.random_split(size, rng(1)), *masks.left_right_split(size)):
        base = masks.fill_half(x, kept, fill=fill)
        assert torch.equal(base[:, :, kept[0]], x[:, :, kept[0]])
        for other in (
            torch.randn(x.shape, generator=rng(2)),
            torch.full_like(x, math.nan),
            torch.full_like(x, math.inf),
        ):
            changed = masks.fill_half(torch.where(kept, x, other), kept, fill=fill)
            assert torch.equal(base, changed)
            assert not torch.isnan(changed).any()


def test_neighbour_fill_is_the_mean_of_the_kept_neighbours():
    x = torch.arange(12.0, dtype=torch.float64).view(1, 1, 3, 4)
    left, _ = masks.checkerboard_split((3, 4))
    filled = masks.fill_half(x, left)[0, 0]
    assert filled[0, 0] == 0.0
    assert filled[0, 1].item() == pytest.approx((0 + 2 + 5) / 3)
    assert filled[1, 2].item() == pytest.approx((2 + 5 + 7 + 10) / 4)
    assert filled[2, 3].item() == pytest.approx((7 + 10) / 2)
    lonely = torch.zeros(1, 3, 3, dtype=torch.bool)
    lonely[0, 0, 0] = True
    assert masks.fill_half(torch.ones(1, 1, 3, 3), lonely)[0, 0, 2, 2] == 0.0  # no kept neighbour: 0, not NaN


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: masks.check_masks(*(torch.ones(1, 2, 2, dtype=torch.bool),) * 2), "overlap"),
        (lambda: masks.check_masks(*(torch.tensor([True, False]), torch.tensor([False, False]))), "leave pixels out"),
        (lambda: masks.check_masks(torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)), "empty"),
        (lambda: masks.checkerboard_split((7,)), "index_split"),
        (lambda: masks.index_split(3, [3]), "positions"),
    ],
)
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()
