"""What NaTra asks of a generator, and how it composes several codes inside one.

A generator is any module `z [B, d] -> images [B, C, H, W]`. For several codes an image it must also be cut in two: an
`nn.Sequential` is cut before position `layer`; any other object brings `split(layer) -> (head, tail)` with
`tail(head(z)) == generator(z)`. With head features F_n = head(z_n) and channel weights a_n:

    image = tail( sum_n a_n * F_n )                F_n [C', ...], a_n [C'], the same a_n at every position
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.errors import InvalidInput, check
from surefoot.nn.attacks.run import attacking

Map = Callable[[Tensor], Tensor]


def split_generator(generator_net: Map, layer: int | None = None) -> tuple[Map, Map]:
    """(head, tail) around `layer`. By default an `nn.Sequential` is cut where its features first have positions [B, C, H, W]."""
    splitter = getattr(generator_net, "split", None)
    if splitter is not None:
        head, tail = splitter(layer)
        return head, tail
    if not isinstance(generator_net, nn.Sequential):
        raise InvalidInput(
            "Several codes an image need a generator that can be cut: give an nn.Sequential, or an object with "
            "split(layer) -> (head, tail)."
        )
    layer = resolve_layer(generator_net, layer)
    assert layer is not None
    check(0 < layer < len(generator_net), f"layer must lie in 1..{len(generator_net) - 1} to cut this generator in two, got {layer}.")  # fmt: skip
    parts = list(generator_net)  # a slice would call a subclass's own constructor
    return nn.Sequential(*parts[:layer]), nn.Sequential(*parts[layer:])


def resolve_layer(generator_net: Map, layer: int | None) -> int | None:
    """The default cut of an `nn.Sequential` as a number, so that it is searched once; anything else as it is."""
    if layer is not None or not isinstance(generator_net, nn.Sequential) or hasattr(generator_net, "split"):
        return layer
    return _first_spatial(generator_net)


def _first_spatial(net: nn.Sequential) -> int:
    flow = zeros_for(net)
    with frozen(net), torch.no_grad():
        for position, module in enumerate(list(net)[:-1]):
            flow = module(flow)
            if flow.dim() == 4:
                return position + 1
    raise InvalidInput("No layer of this generator has features [B, C, H, W]; name the layer at which to cut it.")


def compose(
    generator_net: Map,
    codes: Tensor,  # [B, N, d]
    weights: Tensor | None = None,  # [B, N, C'], None: one code, taken as it is
    layer: int | None = None,
) -> Tensor:  # [B, C, H, W]
    """The images of N codes each."""
    if weights is None:
        check(codes.shape[1] == 1, f"{codes.shape[1]} codes an image need channel weights.")
        return generator_net(codes[:, 0])
    head, tail = split_generator(generator_net, layer)
    features = head(codes.flatten(0, 1)).unflatten(0, codes.shape[:2])
    return tail((features * weights.reshape(*weights.shape, *(1,) * (features.dim() - 3))).sum(1))


def first_affine(generator_net: Any) -> Tensor:  # [outputs, d]
    """The matrix A of the first affine layer: what a step in z does to its outputs."""
    modules = generator_net.modules() if isinstance(generator_net, nn.Module) else ()
    for module in modules:
        if isinstance(module, nn.Linear):
            return module.weight.detach()
        if isinstance(module, nn.ConvTranspose2d) and module.groups == 1:
            return module.weight.detach().flatten(1).T
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            return module.weight.detach().movedim(1, -1).flatten(0, -2)
    raise InvalidInput("This generator has no linear or convolution layer to take directions from; use method='pca'.")


def latent_dim_of(generator_net: Any) -> int:
    """`generator_net.latent_dim` where it says so, else the inputs of its first affine layer."""
    said = getattr(generator_net, "latent_dim", None)
    return int(said) if isinstance(said, int) else first_affine(generator_net).shape[1]


def zeros_for(generator_net: Any, count: int = 1) -> Tensor:  # [count, d]
    parameter = next(generator_net.parameters(), None) if isinstance(generator_net, nn.Module) else None
    zeros = torch.zeros(count, latent_dim_of(generator_net))
    return zeros if parameter is None else zeros.to(parameter.device, parameter.dtype)


@contextmanager
def frozen(*networks: object) -> Iterator[None]:
    """Gradients on, every network in evaluation mode (batch statistics must not follow an inversion); flags put back after."""
    seed = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        for network in networks:
            if isinstance(network, nn.Module):
                parameter = next(network.parameters(), None)
                device = torch.device("cpu") if parameter is None else parameter.device
                stack.enter_context(attacking(network, "eval", seed, device))
        yield


def check_images(x: Tensor, bounds: tuple[float, float] | None) -> None:
    check(x.dim() == 4 and len(x) > 0, f"x must be a non-empty batch of images [B, C, H, W], got shape {tuple(x.shape)}.")  # fmt: skip
    check(x.is_floating_point() and bool(torch.isfinite(x).all()), "x must hold finite floating point values.")
    if bounds is not None:
        low, high = float(x.min()), float(x.max())
        inside = bounds[0] - 1e-6 <= low and high <= bounds[1] + 1e-6
        check(inside, f"x must lie in {bounds} like the generator's images, got [{low:.4g}, {high:.4g}]; rescale it or give bounds.")  # fmt: skip
