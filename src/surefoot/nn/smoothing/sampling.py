"""Votes under Gaussian noise: many inputs at once, buffers filled in place, shared noise taken through a linear first step once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from surefoot.errors import InvalidInput, Refused, check, check_at_least, check_open_unit
from surefoot.nn.memory import keep_freed_memory
from surefoot.nn.modes import evaluating
from surefoot.nn.smoothing.lean import Model, Split, lean, split

LARGE_IMAGE = 400  # pixels
MOST_FEATURES = 2**22  # numbers that may be held of all inputs' first features


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
    if x.device.type == "cpu":
        keep_freed_memory()
    with evaluating(*models), torch.inference_mode():
        layout = _prefers_channels_last(models, x)
        views = [Split(_same, None, lean(model, x)) for model in models]
        if shared:
            views = [_small_split(view.rest, x) for view in views]
        for view, first, rows, noisy in _batches(x, n, views, sigma, generator, batch_size, shared, layout):
            logits = views[view].rest(noisy)
            _check_logits(logits, len(noisy), num_classes)
            broken |= ~torch.isfinite(torch.stack(logits.aminmax())).all()
            # a batch of one input needs no offsets; a table starts at the batch's first input and is small
            guesses = logits.argmax(1) if rows is None else logits.argmax(1) + rows.to(x.device) * num_classes
            table = torch.bincount(guesses, minlength=num_classes)
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
    views = [Split(_same, None, _same)]
    for _, first, rows, noisy in _batches(x, n, views, sigma, generator, batch_size, shared, channels_last):
        yield (torch.full((len(noisy),), first) if rows is None else first + rows), noisy


Batch = tuple[int, int, Tensor | None, Tensor]  # view, first input f, each row's input - f (None: all are f's), noisy


def _batches(
    x: Tensor,  # float [B, ...]
    n: int,
    views: Sequence[Split],
    sigma: float | Tensor,
    generator: torch.Generator,
    batch_size: int | None,
    shared: bool,
    channels_last: bool,
) -> Iterator[Batch]:
    """For every view of every batch what its `rest` takes, in a buffer that `rest` may overwrite."""
    check_at_least("n", n, 1)
    check(bool((torch.as_tensor(sigma) > 0).all()), f"sigma must be positive, got {sigma!r}.")
    check(math.isfinite(float(torch.as_tensor(sigma).max())), f"sigma must be finite, got {sigma!r}.")
    scale = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    size = min(default_batch(x) if batch_size is None else batch_size, len(x) * n)
    check_at_least("batch_size", size, 1)
    # Buffers are filled in place: fresh memory for each batch costs more than drawing the noise does.
    noise = torch.empty((min(size, n) if shared else size, *x.shape[1:]), dtype=x.dtype, device=generator.device)
    laid = _new_images_last(x, noise.shape) if channels_last else x.new_empty(noise.shape)

    def draw(count: int, onto: Tensor | None = None) -> Tensor:
        """sigma e, or onto + sigma e, `[count, ...]`; the next draw overwrites it."""
        e = noise[:count].normal_(generator=generator).to(x.device)
        out = laid[:count]
        return torch.mul(e, scale, out=out) if onto is None else torch.addcmul(onto, e, scale, out=out)

    yield from _shared_noise(x, n, views, size, draw) if shared else _fresh_noise(x, n, views, size, draw)


def _fresh_noise(
    x: Tensor, n: int, views: Sequence[Split], size: int, draw: Callable[[int, Tensor], Tensor]
) -> Iterator[Batch]:
    """Draws of its own for every input; a batch is `size` rows of the inputs' n rows each."""
    for start in range(0, len(x) * n, size):
        stop = min(start + size, len(x) * n)
        first, last = start // n, (stop - 1) // n
        rows = None if first == last else torch.arange(start, stop).div_(n, rounding_mode="floor").sub_(first)
        clean = x[first, None] if rows is None else x[first : last + 1][rows.to(x.device)]
        noisy = draw(stop - start, clean)
        for view in range(len(views)):  # a model that works in place must not change what the next one sees
            yield view, first, rows, noisy if view == len(views) - 1 else noisy.clone()


def _shared_noise(
    x: Tensor, n: int, views: Sequence[Split], size: int, draw: Callable[[int], Tensor]
) -> Iterator[Batch]:
    """The same draws for all inputs; a batch is some draws, each added to as many inputs as fit, behind the view's linear part."""
    draws, buffers = min(size, n), dict[int, Tensor]()
    inputs = min(size // draws, len(x))
    clean = [v.linear(x) if v.bias is None else v.linear(x) + v.bias for v in views]
    for start in range(0, n, draws):
        drawn = draw(min(draws, n - start))
        for view, split_view in enumerate(views):
            e = split_view.linear(drawn)
            if view not in buffers:
                strides = (e[0].numel(), *e.stride()[1:])  # laid out as the noise's features are
                buffers[view] = e.new_empty_strided((inputs * draws, *e.shape[1:]), strides)
            for first in range(0, len(x), inputs):
                some = clean[view][first : first + inputs, None]
                out = buffers[view][: len(some) * len(e)]
                torch.add(some, e, out=out.view(len(some), *e.shape))
                yield view, first, None if len(some) == 1 else torch.arange(len(some)).repeat_interleave(len(e)), out


def _small_split(model: Model, x: Tensor) -> Split:
    """`split`, unless the inputs' first features would take too much memory."""
    view = split(model, x)
    return view if view.linear(x[:1]).numel() * len(x) <= MOST_FEATURES else Split(_same, None, model)


def _same(x: Tensor) -> Tensor:
    return x


def _new_images_last(x: Tensor, shape: Sequence[int]) -> Tensor:
    batch, channels, height, width = shape
    return x.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)


def _images_last(x: Tensor) -> Tensor:
    """x `[b, C, H, W]` in memory as `[b, H, W, C]`; with strides that say so for one channel too, unlike `memory_format`."""
    return _new_images_last(x, x.shape).copy_(x)


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
    """A batch whose widest layer (so many numbers for one input) gives half a million numbers: less pays for calls, more for memory.
    Large on a GPU."""
    numbers = max(1, math.prod(x.shape[1:]))
    if x.device.type != "cpu":
        return min(max(2**23 // numbers, 64), 8192)
    return min(max(2**19 // max(numbers, widest), 8), 2048)


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
