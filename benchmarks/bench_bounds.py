"""Speed of bound propagation beside auto-lirpa 0.3: interval margins, CROWN, and a training step on interval bounds.

Same weights, same images, same elided margins, one process, one thread; calls alternate between the two sides (`_timing.py`).
Tracing the model (auto-lirpa's `BoundedModule`, our `Program`), the region and the rows of the margins are made outside the timing on both
sides. The margins must agree before a time is reported: for CROWN that is our plain form (`intersect=False`); the default,
which cuts with IBP and works on unstable neurons only, is the second row and must be at least as tight.
A training step also stands beside a clean step of the same net, the price of certified training, with the pieces that explain it: the clean
step once more with the model in channels-last memory, which is how our walk runs on a CPU and what a user could do as well, and the matrix
products and convolutions alone, forwards and backwards: two streams (centre and radius), and with batch-norm the clean batch as the third.

Run: python benchmarks/bench_bounds.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import _lirpa
from _timing import Row, in_turn, memory_mb, row
from surefoot.certified.fast_ibp import cnn7
from surefoot.models import mlp, small_resnet
from surefoot.nn.bounds import (
    Box,
    Program,
    crown_refiner,
    interval_margins,
    margin_rows,
    propagate,
    region_around,
    robust_cross_entropy,
    specification_bound,
)

Call = Callable[[], Tensor]


def small_net() -> nn.Module:
    convs = [nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, float]] = {  # net, input, batch, eps
    "mlp 64-128-128-10": (lambda: mlp((1, 8, 8), 10, hidden=(128, 128)), (1, 8, 8), 64, 0.02),
    "cnn 1x8x8": (small_net, (1, 8, 8), 64, 0.02),
    "residual net 1x8x8": (lambda: small_resnet((1, 8, 8), 10, widths=(4, 8)), (1, 8, 8), 8, 0.01),
}


def batch(name: str) -> tuple[nn.Module, Tensor, Tensor, float]:
    factory, shape, size, eps = NETS[name]
    torch.manual_seed(0)
    model = factory()
    with torch.no_grad():
        for _ in range(20):  # running statistics
            model(torch.rand(64, *shape))
    return model.eval(), torch.rand(size, *shape) * 0.8 + 0.1, torch.randint(10, (size,)), eps


def margins_of(model: nn.Module, x: Tensor, y: Tensor, eps: float, method: str, plain: bool) -> Call:
    program, region, rows = Program(model), region_around(x, eps), margin_rows(y, 10)

    @torch.no_grad()
    def call() -> Tensor:
        refine = crown_refiner(region, intersect=not plain) if method == "crown" else None
        walked = propagate(program, Box(region.box.lower, region.box.upper), refine=refine)
        return specification_bound(walked, region, rows, method=method, intersect=not plain)  # type: ignore[arg-type]

    return call


def lirpa_margins(model: nn.Module, x: Tensor, y: Tensor, eps: float, method: str) -> Call | None:
    package = _lirpa.load()
    if package is None:
        return None
    bounded = package.BoundedModule(model, x, bound_opts={"relu": "adaptive"})
    norm = package.PerturbationLpNorm(norm=float("inf"), x_L=(x - eps).clamp(0, 1), x_U=(x + eps).clamp(0, 1))
    image, rows = package.BoundedTensor(x, norm), margin_rows(y, 10)

    @torch.no_grad()
    def call() -> Tensor:
        return bounded.compute_bounds(x=(image,), C=rows, method=method, bound_upper=False)[0]

    return call


def margin_rows_of_table() -> list[Row]:
    table = []
    for name in NETS:
        model, x, y, eps = batch(name)
        for method, label in (("ibp", "IBP"), ("crown", "CROWN")):
            ours = margins_of(model, x, y, eps, method, plain=True)
            what = f"{label} margins, {name}, batch {len(x)}"
            theirs = lirpa_margins(model, x, y, eps, label)
            if theirs is None:
                table.append(row(what, in_turn(ours)[0], "auto-lirpa 0.3", None, "", "auto-lirpa is not installed", ours_mb=memory_mb(ours)))  # fmt: skip
                continue
            gap = agreement(ours(), theirs())
            table.append(row(what, *spread(in_turn(ours, theirs)), f"equal to {gap:.0e} of the scale", ours_mb=memory_mb(ours), peer_mb=memory_mb(theirs)))  # fmt: skip
            if method == "crown":
                cut = margins_of(model, x, y, eps, method, plain=False)
                loosest = float((cut() - theirs()).min())
                if loosest < -1e-3:
                    raise RuntimeError(f"{what}: the default is looser than auto-lirpa by {-loosest:.2g}")
                gain = float((cut() - theirs()).mean())
                table.append(row(f"{what}, default", *spread(in_turn(cut, theirs)), f"tighter by {gain:.2g} on average", ours_mb=memory_mb(cut), peer_mb=memory_mb(theirs)))  # fmt: skip
    return table


def spread(seconds: list[float]) -> tuple[float, str, float]:
    return seconds[0], "auto-lirpa 0.3", seconds[1]


def agreement(ours: Tensor, theirs: Tensor) -> float:
    gap = float((ours - theirs).abs().max() / theirs.abs().max())
    if gap > 1e-4:
        raise RuntimeError(f"the bounds differ by {gap:.2g} of their scale; times would compare different work")
    return gap


def training_rows() -> list[Row]:
    """A step (forward, backward) on CNN-7 of width 8, 28x28, batch 64: interval margins, beside auto-lirpa, clean steps, and its own products."""
    table = []
    for batch_norm in (False, True):
        torch.manual_seed(0)
        model = cnn7(1, 28, width=8, linear_size=128, batch_norm=batch_norm).train()
        x, y, eps = torch.rand(64, 1, 28, 28), torch.randint(10, (64,)), 0.1
        kind = "with batch-norm (clean pass included)" if batch_norm else "without batch-norm"
        what = f"IBP training step, CNN-7 width 8, 28x28, batch 64, {kind}"
        ours, clean = robust_step(model, x, y, eps), clean_step(model, x, y)
        planar = clean_step(laid_out(model, torch.channels_last), x.to(memory_format=torch.channels_last), y)
        streams = 3 if batch_norm else 2
        bare = products(model, x, streams)
        grown, theirs = memory_mb(ours), lirpa_step(model, x, y, eps)
        if theirs is None:
            mine, plain, plain_planar, alone = in_turn(ours, clean, planar, bare)
            table.append(row(what, mine, "auto-lirpa 0.3", None, "", "auto-lirpa is not installed", ours_mb=grown))  # fmt: skip
        else:
            gap = agreement(ours(), theirs())
            mine, other, plain, plain_planar, alone = in_turn(ours, theirs, clean, planar, bare)
            table.append(row(what, mine, "auto-lirpa 0.3", other, f"same loss to {gap:.0e}", ours_mb=grown, peer_mb=memory_mb(theirs)))  # fmt: skip
        table.append(row(what, mine, "clean step", plain, f"{mine / plain:.2f} clean steps", ours_mb=grown, peer_mb=memory_mb(clean)))  # fmt: skip
        note = f"a model in channels-last memory has a clean step of {plain_planar / plain:.2f} of the plain one"
        table.append(row(what, mine, "channels-last clean step", plain_planar, f"{mine / plain_planar:.2f} such steps", note, ours_mb=grown, peer_mb=memory_mb(planar)))  # fmt: skip
        note = f"a part of the step above: {alone / mine:.0%} of it"
        table.append(row(f"the convolutions and products of {streams} streams alone, {kind}", alone, "clean step", plain, f"{alone / plain:.2f} clean steps", note))  # fmt: skip
    return table


def robust_step(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Call:
    program = Program(model)

    def call() -> Tensor:
        model.zero_grad(set_to_none=True)
        walked = propagate(program, region_around(x, eps).box, clean=x if program.needs_clean else None)
        loss = robust_cross_entropy(interval_margins(walked, y))
        loss.backward()
        return loss.detach()

    return call


def laid_out(module: Any, layout: torch.memory_format) -> nn.Module:
    """A copy in this memory layout; torch's stubs know `to(memory_format=...)` of tensors only, hence Any."""
    return copy.deepcopy(module).to(memory_format=layout)


def clean_step(model: nn.Module, x: Tensor, y: Tensor) -> Call:
    def call() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    return call


def products(model: nn.Module, x: Tensor, streams: int) -> Call:
    """Every convolution and linear layer of the net on its own, in channels-last memory, forwards and backwards, `streams` times."""
    jobs: list[tuple[nn.Module, Tensor, Tensor]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        given, layout = inputs[0].detach(), torch.channels_last if output.dim() == 4 else torch.contiguous_format
        given = given.clone(memory_format=layout).requires_grad_(bool(jobs))  # the images need no gradient
        jobs.append((laid_out(module, layout), given, torch.randn_like(output, memory_format=layout)))

    twin = copy.deepcopy(model)
    layers = [m for m in twin.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(record)
    with torch.no_grad():
        twin(x)
    for layer, _, _ in jobs:
        layer._forward_hooks.clear()

    def call() -> Tensor:
        made = x
        for layer, given, gradient in jobs:
            for _ in range(streams):
                made = layer(given)
                torch.autograd.grad(made, [given, *layer.parameters()] if given.requires_grad else [*layer.parameters()], gradient)  # fmt: skip
        return made

    return call


def lirpa_step(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Call | None:
    package = _lirpa.load()
    if package is None:
        return None
    bounded = package.BoundedModule(
        model.eval(), x, bound_opts={"relu": "adaptive"}
    )  # it cannot convert in training mode
    bounded.train()
    model.train()
    rows = margin_rows(y, 10)

    def call() -> Tensor:
        model.zero_grad(set_to_none=True)
        norm = package.PerturbationLpNorm(norm=float("inf"), x_L=(x - eps).clamp(0, 1), x_U=(x + eps).clamp(0, 1))
        image = package.BoundedTensor(x, norm)
        bounded(image)  # the clean pass: shapes, and batch-norm's statistics
        low = bounded.compute_bounds(x=(image,), C=rows, method="IBP", bound_upper=False)[0]
        loss = robust_cross_entropy(low)
        loss.backward()
        return loss.detach()

    return call


def rows() -> list[Row]:
    torch.set_num_threads(1)
    return margin_rows_of_table() + training_rows()


if __name__ == "__main__":
    for entry in rows():
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in entry.items()})
