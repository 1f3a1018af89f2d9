"""A model behind a wall: answers for rows of input, each one counted, up to a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import InvalidInput, Refused, check, check_at_least
from surefoot.nn.modes import evaluating

HARD_AFTER = 32  # so many answers of zeros and ones alone are hard labels and not confidence
LEAST_PROBABILITY = 1e-6  # a forest answers exact zeros, and the loss must stay finite


class Queried:
    """`fn` of a batch, asked without gradients. An `nn.Module` gets tensors (evaluation mode), anything else numpy arrays.

    `queries` counts rows asked for. A call that would exceed `budget` is refused before anything is spent. Answers are
    tensors on the device of the question, in the precision that `fn` answers in. `batch_size` cuts large questions up.
    """

    def __init__(
        self,
        fn: Callable[[Any], Any],
        output_shape: Sequence[int],
        *,
        budget: int | None = None,
        batch_size: int = 4096,
    ) -> None:
        check(callable(fn), f"fn must be callable, got {type(fn).__name__}.")
        check_at_least("batch_size", batch_size, 1)
        if budget is not None:
            check_at_least("budget", budget, 0)
        self.fn, self.output_shape, self.budget, self.batch_size = fn, tuple(output_shape), budget, batch_size
        self.queries = 0

    @property
    def remaining(self) -> float:
        return math.inf if self.budget is None else self.budget - self.queries

    def require(self, rows: int, what: str) -> None:
        """Refuse, before anything is spent, what needs more queries than are left."""
        if rows > self.remaining:
            raise Refused(f"{what} needs {rows} queries, and {self.remaining} of the budget of {self.budget} are left; raise the budget, or use a smaller latent_dim, batch or num_queries.")  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:  # [B, ...] -> [B, *output_shape]
        self.require(len(x), "This call")
        return torch.cat([self._ask(part) for part in x.detach().split(self.batch_size)]) if len(x) else self._ask(x)

    @torch.no_grad()
    def _ask(self, x: Tensor) -> Tensor:
        self.queries += len(x)
        if isinstance(self.fn, nn.Module):
            with evaluating(self.fn):
                answer = self.fn(x)
        else:
            answer = self.fn(x.cpu().numpy())
        answer = torch.as_tensor(answer if isinstance(answer, Tensor) else np.asarray(answer)).to(x.device)
        self._check_answer(answer, len(x))
        return answer if answer.is_floating_point() else answer.to(x.dtype)

    def _check_answer(self, answer: Tensor, rows: int) -> None:
        expected = (rows, *self.output_shape)
        check(answer.shape == expected, f"The black box must answer {list(expected)}, got {list(answer.shape)}.")
        check(bool(torch.isfinite(answer.float()).all()), "The black box answers NaN or infinite values; nothing can be learnt from it.")  # fmt: skip


class BlackBox(Queried):
    """A classifier that answers scores `[B, num_classes]`: logits, or probabilities (told by rows that sum to one)."""

    def __init__(
        self, fn: Callable[[Any], Any], num_classes: int, *, budget: int | None = None, batch_size: int = 4096
    ) -> None:
        check_at_least("num_classes", num_classes, 2)
        super().__init__(fn, (num_classes,), budget=budget, batch_size=batch_size)
        self.num_classes = num_classes
        self.probabilities: bool | None = None  # known after the first answer
        self._graded = False  # whether a score other than 0 and 1 was ever seen

    def _check_answer(self, answer: Tensor, rows: int) -> None:
        if answer.dim() == 1:
            raise InvalidInput(
                f"The black box must answer scores [{rows}, {self.num_classes}], got {list(answer.shape)}: hard labels give no "
                "gradient estimate; use an interface that returns probabilities or logits."
            )
        super()._check_answer(answer, rows)
        self._graded |= bool(((answer != 0) & (answer != 1)).any())
        simplex = bool((answer >= 0).all()) and bool(((answer.float().sum(1) - 1).abs() < 1e-3).all())
        self.probabilities = simplex if self.probabilities is None else self.probabilities and simplex

    def targets(self, x: Tensor) -> Tensor:  # int64 [B]
        """The classes it names; one query a row."""
        return self(x).argmax(1)

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:  # [B]
        """Cross-entropy of each row, not averaged; one query a row. Answers that are hard labels are refused."""
        scores = self(x)
        if not self._graded and self.queries >= HARD_AFTER:
            raise Refused("The black box answers hard labels (all scores are 0 or 1), and their differences vanish: no gradient can be estimated; use an interface that returns probabilities or logits.")  # fmt: skip
        if self.probabilities:
            picked = scores.gather(1, targets[:, None])[:, 0]
            return -picked.clamp(min=LEAST_PROBABILITY).log()
        return F.cross_entropy(scores, targets, reduction="none")


class BlackBoxMap(Queried):
    """A map that answers images (or anything) of `output_shape`, such as x -> measurement -> reconstruction."""

    def targets(self, x: Tensor) -> Tensor:  # [B, *output_shape]
        """What it makes of clean inputs; one query a row."""
        return self(x)

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:  # [B]
        """Mean squared error of each row; one query a row."""
        return (self(x) - targets).flatten(1).square().mean(1)
