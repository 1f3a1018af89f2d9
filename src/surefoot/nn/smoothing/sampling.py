"""Votes under Gaussian noise: many inputs at once, buffers filled in place, every batch small enough for a core's cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from surefoot.errors import InvalidInput, Refused, check, check_at_least, check_open_unit
from surefoot.nn.modes import evaluating

Model = nn.Module | Callable[[Tensor], Tensor]
LARGE_IMAGE = 400  # pixels


def vote_counts(
    model: Model,
    x: Tensor,  # float [B, ...]
    n: int,
    *,
    sigma: float | Tensor,
    num_classes: int,
    generator: torch.Generator,
    batch_size: int | None = None,
    shared: bool = False,
) -> Tensor:  # int64 [B, num_classes], on the CPU
    """How often each class is the argmax in n noisy draws of each input."""
    options = {"sigma": sigma, "num_classes": num_classes, "generator": generator}
    return joint_vote_counts([model], x, n, batch_size=batch_size, shared=shared, **options)[0]


def joint_vote_counts(
    models: Sequence[Model],
    x: Tensor,  # float [B, ...]
    n: int,
    *,
    sigma: float | Tensor,
    num_classes: int,
    generator: torch.Generator,
    batch_size: int | None = None,
    shared: bool = False,
) -> Tensor:  # int64 [V, B, num_classes], on the CPU
    """`vote_counts` of V classifiers on the *same* noisy draws (classifiers that read disjoint parts stay independent)."""
    check_at_least("num_classes", num_classes, 2)
    votes = torch.zeros(len(models), len(x) * num_classes, dtype=torch.int64, device=x.device)
    broken = torch.zeros((), dtype=torch.bool, device=x.device)
    options = {"sigma": sigma, "generator": generator, "batch_size": batch_size, "shared": shared}
    with evaluating(*models), torch.inference_mode():
        channels_last = _prefers_channels_last(models, x)
        for rows, noisy in noisy_batches(x, n, channels_last=channels_last, **options):
            first = int(rows[0])  # count from the batch's first input on: small tables
            size = int(rows[-1]) - first + 1
            offset = ((rows - first) * num_classes).to(x.device)
            for view, model in enumerate(models):
                # a model that works in place (a first ReLU) must not change what the next one sees
                logits = model(noisy if len(models) == 1 else noisy.clone())
                _check_logits(logits, len(rows), num_classes)
                broken |= ~torch.isfinite(logits).all()
                table = torch.bincount(offset + logits.argmax(1), minlength=size * num_classes)
                votes[view, first * num_classes :][: len(table)] += table
    if bool(broken):
        raise InvalidInput("The model gives NaN or infinite logits under noise; nothing can be certified.")
    return votes.view(len(models), len(x), num_classes).cpu()


def noisy_batches(
    x: Tensor,  # float [B, ...]
    n: int,
    *,
    sigma: float | Tensor,
    generator: torch.Generator,
    batch_size: int | None = None,
    shared: bool = False,
    channels_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """n draws x + sigma e of every input: pairs (row in x, int64 `[b]` on the CPU, ascending; noisy inputs `[b, ...]`).

    The noisy tensor is a buffer that the next draw overwrites: use it at once. `sigma` may be a tensor that broadcasts
    over one input. `shared` uses the same n draws for all inputs. `channels_last` lays images out that way in memory; the
    numbers are the same.
    """
    check_at_least("n", n, 1)
    check(bool((torch.as_tensor(sigma) > 0).all()), f"sigma must be positive, got {sigma!r}.")
    check(math.isfinite(float(torch.as_tensor(sigma).max())), f"sigma must be finite, got {sigma!r}.")
    scale = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    size = min(default_batch(x) if batch_size is None else batch_size, len(x) * n)
    check_at_least("batch_size", size, 1)
    # Buffers are filled in place: fresh memory for each batch costs more than drawing the noise does.
    noise = torch.empty((size, *x.shape[1:]), dtype=x.dtype, device=generator.device)
    noisy = _images_last(x.new_empty(noise.shape)) if channels_last else x.new_empty(noise.shape)
    if not shared:
        for start in range(0, len(x) * n, size):
            rows = torch.arange(start, min(start + size, len(x) * n)).div_(n, rounding_mode="floor")
            out, e = noisy[: len(rows)], noise[: len(rows)].normal_(generator=generator)
            out.copy_(x[rows.to(x.device)]) if channels_last else torch.index_select(x, 0, rows.to(x.device), out=out)
            yield rows, out.addcmul_(e.to(x.device), scale)
        return
    draws = min(n, size)  # a batch is some draws, each added to as many inputs as fit
    inputs = size // draws
    for start in range(0, n, draws):
        e = noise[: min(draws, n - start)].normal_(generator=generator).to(x.device) * scale
        for first in range(0, len(x), inputs):
            some = x[first : first + inputs, None]
            out = noisy[: len(some) * len(e)]
            torch.add(some, e, out=out.view(len(some), *e.shape))
            yield torch.arange(first, first + len(some)).repeat_interleave(len(e)), out


def _images_last(x: Tensor) -> Tensor:
    """x `[b, C, H, W]` in memory as `[b, H, W, C]`; with strides that say so for one channel too, unlike `memory_format`."""
    batch, channels, height, width = x.shape
    return x.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2).copy_(x)


def _prefers_channels_last(models: Sequence[Model], x: Tensor) -> bool:
    """Convolutions on a CPU are faster on such images from about 20x20 pixels on (pooled ones twice), slower on tinier ones.

    Asked on two examples, because a `view` inside a model may refuse the layout.
    """
    if x.device.type != "cpu" or x.dim() != 4 or x.shape[-1] * x.shape[-2] < LARGE_IMAGE:
        return False
    if not all(isinstance(m, nn.Module) and any(isinstance(p, nn.Conv2d) for p in m.modules()) for m in models):
        return False
    few = x[:2]
    try:
        return all(torch.allclose(m(few.clone()), m(_images_last(few)), rtol=1e-3, atol=1e-4) for m in models)
    except RuntimeError:
        return False


def default_batch(x: Tensor, widest: int = 256) -> int:
    """A batch whose widest layer (so many numbers for one input) stays in a CPU core's cache: bigger ones are up to twice slower.
    Large on a GPU."""
    numbers = max(1, math.prod(x.shape[1:]))
    if x.device.type != "cpu":
        return min(max(2**23 // numbers, 64), 8192)
    return min(max(2**17 // max(numbers, widest), 8), 2048)


def check_deterministic(model: Model, x: Tensor, probes: int = 8) -> int:
    """Refuse a base classifier that answers the same input differently: its randomness has to be declared.

    Returns how many numbers its widest layer gives for one input, for `default_batch` (256 where no layers can be watched).
    """
    few = x[:probes]
    seen: list[int] = []

    def watch(_module: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, Tensor):
            seen.append(output.numel() // len(few))

    parts = list(model.modules()) if isinstance(model, nn.Module) else []
    hooks = [
        part.register_forward_hook(watch)
        for part in parts
        if not isinstance(part, torch.jit.ScriptModule) and next(part.children(), None) is None
    ]
    with evaluating(model), torch.inference_mode():
        try:
            first = model(few.clone())
        finally:
            for hook in hooks:
                hook.remove()
        second = model(few.clone())
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise Refused(
            "The model gives different logits for the same input in evaluation mode; if its draws are independent, "
            "say so with stochastic=True, else make it deterministic."
        )
    return max(seen) if len(seen) > 1 else 256


def check_request(x: Tensor, n0: int, n: int, alpha: float) -> None:
    check_at_least("n0", n0, 1)
    check_at_least("n", n, 1)
    check_open_unit("alpha", alpha)
    check(x.is_floating_point(), f"x must be floating point, got {x.dtype}; scale images to [0, 1] first.")
    check(
        x.dim() >= 2 and len(x) > 0, f"x must be a batch of at least one input, not empty, got shape {tuple(x.shape)}."
    )
    check(bool(torch.isfinite(x).all()), "x holds NaN or infinite values; clean the data first.")


def _check_logits(logits: Tensor, batch: int, num_classes: int) -> None:
    if logits.shape != (batch, num_classes):
        raise InvalidInput(f"The model must give logits [{batch}, {num_classes}], got {list(logits.shape)}; check num_classes.")  # fmt: skip
