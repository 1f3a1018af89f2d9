"""Flags inside a block and after it, also after an error."""

import pytest
import torch
from torch import nn

from surefoot.nn.modes import evaluating, frozen


def mixed() -> nn.Sequential:
    """One part in evaluation mode, one parameter frozen: what the blocks must put back, not switch on."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)).train()
    net[1].eval()
    net[2].bias.requires_grad_(False)
    return net


def flags(net: nn.Module) -> list[bool]:
    return [m.training for m in net.modules()] + [p.requires_grad for p in net.parameters()]


@pytest.mark.parametrize("block", [evaluating, frozen])
def test_flags_are_put_back_even_after_an_error(block):
    first, second = mixed(), mixed()
    before = flags(first)

    def fail_inside() -> None:
        with block(first, second):
            assert flags(first) != before and flags(first) == flags(second)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail_inside()
    assert flags(first) == flags(second) == before


def test_what_each_block_switches_off():
    net = mixed()
    with evaluating(net, torch.relu):  # a plain function has no mode
        assert not any(m.training for m in net.modules()) and next(net.parameters()).requires_grad
    with frozen(net):
        assert net.training and not any(p.requires_grad for p in net.parameters())
