"""What all attacks share: input checks, a model that is left as it was, losses with gradients, and the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from surefoot.errors import InvalidInput, Refused, check, check_at_least, check_choice
from surefoot.nn.attacks.ball import Bounds, draw
from surefoot.nn.attacks.losses import Loss, TargetedLoss, targeted_dlr

Model = Callable[[Tensor], Tensor]  # an nn.Module or any function from inputs to logits
Mode = Literal["eval", "train"]
Keep = Literal["first", "strongest"]
CACHE_FLOATS = 2**16  # input values in one piece


class ZeroGradient(Refused):
    """The gradient is exactly zero at every example, so that a gradient attack would prove nothing."""


@dataclass(frozen=True)
class AttackResult:
    """`x` is the first misclassified point found per example, else the one of highest loss.

    FAB: the nearest misclassified point, else the input. `keep="strongest"`: the point of highest loss, broken or not.
    """

    x: Tensor  # [B, ...]
    broken: Tensor  # bool [B]
    loss: Tensor  # [B], at x
    passes: int  # forward passes of single examples
    notes: tuple[str, ...] = ()
    history: Tensor | None = None  # [steps + 1, B] best loss so far, where it was asked for
    distance: Tensor | None = None  # [B] size of the smallest change found (FAB)


@contextmanager
def attacking(model: Model, mode: Mode, generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Gradients on, the model in `mode`, its own random draws seeded from `generator`; everything put back afterwards.

    Dropout or noise inside the model takes torch's global random state; it is forked and seeded here, so that an attack
    is reproducible and its draws are not those of a later evaluation.
    """
    if torch.is_inference_mode_enabled():
        raise InvalidInput(
            "An attack needs gradients: call it outside torch.inference_mode() (torch.no_grad() is fine)."
        )
    check_choice("mode", mode, ("eval", "train"))
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    flags = [module.training for module in modules]
    buffers = [(b, b.clone()) for b in model.buffers()] if isinstance(model, nn.Module) and mode == "train" else []
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    for module, training in zip(modules, flags):
        if training != (mode == "train"):
            module.training = mode == "train"
    torch.default_generator.manual_seed(seed)
    if cuda is not None:
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        for module, training in zip(modules, flags):
            module.training = training
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)


def check_inputs(x: Tensor, y: Tensor, eps: float, norm: str, bounds: Bounds) -> None:
    check_choice("norm", norm, ("linf", "l2"))
    check(eps >= 0 and eps < float("inf"), f"eps must be zero or positive and finite, got {eps!r}.")
    check(x.dtype in (torch.float32, torch.float64), f"x must be float32 or float64 for an attack, got {x.dtype}; convert it and the model.")  # fmt: skip
    check(x.dim() >= 2 and len(x) > 0, f"x must be a non-empty batch [B, ...], got shape {tuple(x.shape)}.")
    check(y.dtype == torch.int64, f"y must hold int64 class indices, got {y.dtype}.")
    check(y.shape == (len(x),), f"y must have shape [{len(x)}] for {len(x)} inputs, got {tuple(y.shape)}.")
    check(bool(torch.isfinite(x).all()), "x must be finite, got NaN or infinity.")
    if bounds is not None:
        low, high = bounds
        check(low < high, f"bounds must be (low, high) with low < high, got {bounds!r}.")
        least, most = float(x.min()), float(x.max())
        check(least >= low - 1e-6 and most <= high + 1e-6, f"x must lie within bounds {bounds}, got [{least:.4g}, {most:.4g}]; give bounds= or rescale.")  # fmt: skip


def check_attack(
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str,
    bounds: Bounds,
    *,
    steps: int = 1,
    restarts: int = 1,
    eot: int = 1,
    start: Tensor | None = None,
    target: Tensor | None = None,
    keep: str = "first",
) -> None:
    """The arguments that attacks share."""
    check_inputs(x, y, eps, norm, bounds)
    for name, value in (("steps", steps), ("restarts", restarts), ("eot", eot)):
        check_at_least(name, value, 1)
    check(start is None or start.shape == x.shape, "start must have the shape of x.")
    check(target is None or (target.shape == y.shape and target.dtype == torch.int64), "target must be int64 like y.")
    check_choice("keep", keep, ("first", "strongest"))


def check_logits(logits: Tensor, y: Tensor) -> Tensor:
    check(logits.dim() == 2 and len(logits) == len(y), f"The model must return logits [B, K], got {tuple(logits.shape)} for {len(y)} inputs.")  # fmt: skip
    classes = logits.shape[1]
    check(classes >= 2, "An attack needs at least two classes, the model returns one logit; stack it as [0, z].")
    check(int(y.max()) < classes and int(y.min()) >= 0, f"y must lie in 0..{classes - 1}, got {int(y.min())}..{int(y.max())}.")  # fmt: skip
    check(not bool(logits.isnan().any()), "The model returns NaN logits; look at its weights and input range first.")
    return logits


def default_generator(generator: torch.Generator | None) -> torch.Generator:
    return torch.Generator().manual_seed(0) if generator is None else generator


def wrong(logits: Tensor, y: Tensor) -> Tensor:
    return logits.argmax(1) != y


def piece_size(x: Tensor, mode: Mode) -> int:
    """How many examples to send through the model at once.

    On a CPU the backward pass of a convolution runs up to three times faster when its activations stay in the cache;
    where the model's answer may hang on its batch (training mode), and on a GPU, the batch stays whole. A batch is cut
    into the even pieces nearest this size: another call costs more than a cache overrun by half.
    """
    if x.device.type != "cpu" or mode == "train" or x.dim() != 4:
        return len(x)
    return max(16, min(192, CACHE_FLOATS // x[0].numel()))


def in_pieces(function: Callable[..., Tensor], piece: int, *tensors: Tensor) -> Tensor:
    """`function` over even pieces of about `piece` examples, put together again."""
    count = max(1, round(len(tensors[0]) / piece))
    if count == 1:
        return function(*tensors)
    return torch.cat([function(*part) for part in zip(*(t.chunk(count) for t in tensors))])


def loss_and_gradient(
    model: Model,
    x: Tensor,  # [B, ...]
    y: Tensor,  # int64 [B]
    loss: Loss,
    eot: int = 1,
    *,
    goal: Tensor | None = None,  # int64 [B]: the loss `toward` these classes, in place of `loss`
    toward: TargetedLoss = targeted_dlr,
    gradient: bool = True,
    first: bool = False,
    piece: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Class scores [B, K], loss [B] and its input gradient, each the mean over `eot` draws of the model's randomness.

    Scores are logits for one draw and mean probabilities for several. The gradient is taken for the input alone, so
    parameters collect none. With `gradient=False` the returned gradient is empty. `first` looks at the logits closely.
    """
    if piece is not None and (count := round(len(x) / piece)) > 1:
        goals = [None] * count if goal is None else goal.chunk(count)
        parts = [
            loss_and_gradient(model, a, b, loss, eot, goal=c, toward=toward, gradient=gradient, first=first)
            for a, b, c in zip(x.chunk(count), y.chunk(count), goals)
        ]
        return tuple(map(torch.cat, zip(*parts)))  # type: ignore[return-value]
    scores, total, slope = None, None, None
    for _ in range(eot):
        with torch.set_grad_enabled(gradient):
            point = x.detach().requires_grad_(gradient)
            logits = check_logits(model(point), y) if first else model(point)
            value = loss(logits, y) if goal is None else toward(logits, y, goal)
        if gradient:
            if not value.requires_grad:
                raise ZeroGradient("The model's output has no gradient with respect to its input; attack a differentiable surrogate or use square().")  # fmt: skip
            (part,) = torch.autograd.grad(value.sum(), point)
            slope = part if slope is None else slope + part
        logits, value = logits.detach(), value.detach()
        score = logits if eot == 1 else logits.softmax(1)
        scores = score if scores is None else scores + score
        total = value if total is None else total + value
    assert scores is not None and total is not None
    slope = x.new_zeros(0) if slope is None else slope
    check_not_nan(total)
    return (scores, total, slope) if eot == 1 else (scores / eot, total / eot, slope / eot)


def input_gradient(
    model: Model,
    x: Tensor,  # [B, ...]
    y: Tensor,  # int64 [B]
    loss: Loss,
    *,
    piece: int | None = None,
) -> tuple[Tensor, Tensor]:  # [B, ...], scalar
    """The gradient of `loss_and_gradient` alone, and the sum of the losses: for the later steps of a training loop's attack.

    Nothing waits for the device. The caller gives the sums to `check_not_nan` in the end: the sign of a NaN gradient is 0, so nothing else tells.
    """
    if piece is not None and (count := round(len(x) / piece)) > 1:
        parts = [input_gradient(model, a, b, loss) for a, b in zip(x.chunk(count), y.chunk(count))]
        return torch.cat([gradient for gradient, _ in parts]), torch.stack([total for _, total in parts]).sum()
    point = x.detach().requires_grad_()
    total = loss(model(point), y).sum()
    return torch.autograd.grad(total, point)[0], total.detach()


def check_not_nan(found: Tensor) -> None:
    if bool(found.isnan().any()):
        raise InvalidInput("The attack's loss is NaN: the model returns NaN or infinite logits; look at its weights.")


def check_gradient(gradient: Tensor) -> None:
    if not bool(gradient.any()):
        raise ZeroGradient(
            "The gradient is exactly zero at every example: softmax is saturated or gradients are masked; "
            "try loss='dlr' or 'margin', a differentiable surrogate, or square()."
        )


def sign_draw(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """True or False with equal chance, bool `shape` on the device of `like`."""
    return draw(torch.rand, shape, like, generator) < 0.5
