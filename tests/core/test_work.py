"""Work counted in place of time: exact counts, and what a budget pays for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from surefoot.core.work import FLOPS, VALUES, WorkMeter, affordable, cut_note, forward_flops


def test_products_and_written_values_are_counted():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with WorkMeter() as meter:
        c = a @ b
        view = c.T  # writes nothing
        _ = view + 1
    assert (meter.flops, meter.values) == (2 * 3 * 4 * 5, 15 + 15)
    assert meter.seconds == pytest.approx(120 / FLOPS + 30 / VALUES)
    _ = torch.ones(9) + 1  # after the block
    assert meter.values == 30


def test_a_forward_pass_is_counted_and_leaves_no_trace():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    model[1].eval()
    state = torch.get_rng_state()
    assert forward_flops(model, torch.ones(1, 6)) == 2 * (6 * 8 + 8 * 2)
    assert [m.training for m in model] == [True, False, True]

    class Random(nn.Module):
        def forward(self, x):
            return x @ torch.rand(6, 3)

    assert forward_flops(Random(), torch.ones(1, 6)) == 2 * 6 * 3
    assert torch.equal(state, torch.get_rng_state())


def test_what_a_budget_pays_for():
    assert affordable(100, 25, each=10.0, flops=500.0) == 50
    assert affordable(100, 25, each=10.0, flops=1e9) == 100
    assert affordable(100, 25, each=10.0, flops=1.0) == 25
    assert affordable(10, 25, each=10.0, flops=1.0) == 10
    assert cut_note(50, 50) == ()
    (note,) = cut_note(25, 100)
    assert "25 examples" in note
    assert "of 100" in note
    assert note.endswith(".")
