"""Work counted instead of timed: a budget that ends at the same example on every machine, however busy it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from surefoot.nn.modes import evaluating

FLOPS = 1e10  # a second of one core, in float64 or on small layers
VALUES = 4e8  # written to memory in a second


class WorkMeter(TorchDispatchMode):
    """Counts what runs inside `with meter:`; `seconds` are those of a nominal core, not of a clock.

    A pass of linear bounds is bound by arithmetic in some layers and by memory in others, so both are counted: floating-point
    operations of products and convolutions, and values written by every operation that is not a mere view.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.values = 0, 0

    @property
    def seconds(self) -> float:
        return self.flops / FLOPS + self.values / VALUES

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        if not func.is_view:
            self.values += sum(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


@torch.no_grad()
def forward_flops(model: nn.Module, example: Tensor) -> int:  # example [1, ...]
    """Floating-point operations of one forward pass, in evaluation mode; training flags and the global random state are put back."""
    devices = [example.device] if example.is_cuda else []
    with evaluating(model), torch.random.fork_rng(devices=devices), FlopCounterMode(display=False) as counter:
        model(example)
    return int(counter.get_total_flops())


def affordable(most: int, least: int, each: float, flops: float) -> int:
    """How many examples at `each` operations the budget pays: at most `most`, and `least` whatever it says."""
    return max(min(least, most), min(most, int(flops / max(each, 1.0))))


def cut_note(count: int, most: int) -> tuple[str, ...]:
    """A finding's warning where the budget paid for `count` of `most` examples; nothing where it paid for all."""
    if count >= most:
        return ()
    return (f"A model of this size is measured on {count} examples within the budget, in place of {most}; the interval says what that costs.",)  # fmt: skip
