"""Reading what a network computes in between: outputs of named submodules, collected in one forward pass.

Forward hooks are put on for the one call and taken off afterwards, so that any CNN, transformer or mixture of both can be
tapped without being rewritten, gradients flow through what is read, and the model is left as it was. A tensor is given as the
rest of the network leaves it: where a later layer works in place, its result is what one sees.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surefoot.errors import InvalidInput, check, check_at_least
from surefoot.nn.modes import evaluating


def tapped(
    model: nn.Module,
    names: Sequence[str],
    x: Tensor,  # [B, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The model's output, and the outputs of the submodules `names` in that order (a shared one: of its last call)."""
    check_names(model, names)
    found: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not isinstance(output, Tensor):
                raise InvalidInput(f"{name} returns {type(output).__name__}, not a tensor; tap a layer inside or after it.")  # fmt: skip
            found[name] = output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in dict.fromkeys(names)]
    try:
        output = model(x)
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        check(name in found, f"{name} takes no part in the forward pass; `layer_names` lists the layers that do.")
    return output, tuple(found[name] for name in names)


def check_names(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse names that are no submodules, with the nearest that are."""
    known = {name for name, _ in model.named_modules()} - {""}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), 3, 0.0)
            raise InvalidInput(
                f"{type(model).__name__} has no layer {name!r}; near names: {', '.join(near) or 'none'}."
            )


@torch.no_grad()
def layer_names(
    model: nn.Module,
    x: Tensor,  # [B, ...], any inputs that fit
) -> tuple[str, ...]:
    """The hidden layers in the order of the forward pass, each named after the last module before the next one begins.

    A layer begins at a module with a weight matrix or kernel and takes in the normalisation, activation and pooling behind
    it, or ends with the residual block that it closes. The layer that gives the output is not among them.
    """
    order: list[tuple[str, nn.Module, Tensor | None]] = []

    def keep(name: str):
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            readable = isinstance(output, Tensor) and output.is_floating_point() and output.dim() >= 2 and len(output) == len(x)  # fmt: skip
            order.append((name, module, output if readable else None))  # type: ignore[arg-type]

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    try:
        with evaluating(model), torch.random.fork_rng(devices=[]):
            output = model(x)
    finally:
        for handle in handles:
            handle.remove()
    layers: list[tuple[str, Tensor | None]] = []
    for name, module, out in order:
        if layers and out is layers[-1][1]:
            continue  # a container that ends with what it contains, or dropout at rest
        if any(p.dim() >= 2 for p in module.parameters(recurse=False)):
            layers.append((name, out))
        elif layers and out is not None:
            layers[-1] = (name, out)
    return tuple(dict.fromkeys(name for name, out in layers if out is not None and out is not output))


def spread(names: Sequence[str], count: int) -> tuple[str, ...]:
    """`count` of the names, evenly spaced and with the last one; all of them where there are fewer."""
    check_at_least("count", count, 1)
    count = min(count, len(names))
    return tuple(names[(i + 1) * len(names) // count - 1] for i in range(count))
