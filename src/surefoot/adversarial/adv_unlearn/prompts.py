"""Prompts as rows of embeddings: where adversarial tokens go, and the prompts that must stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from surefoot.errors import InvalidInput, check, check_at_least

Place = Literal["prefix", "suffix", "replace", "add"]


def prompt_length(ids: Tensor, end_id: int) -> int:
    """Number of the prompt's own tokens in ids `[L]` or `[1, L]` = start, prompt, end, padding.

    Counted in tokens: a word may be several, and counting words would cut the concept's tail off.
    """
    row = ids.flatten()
    ends = (row == end_id).nonzero()
    check(len(ends) > 0, "The ids have no end token; tokenize the prompt without truncation.")
    return int(ends[0]) - 1


def spliced(
    x: Tensor,  # [L, ...] one row a token: start, n prompt tokens, end, padding
    rows: Tensor,  # [k, ...]
    n: int,
    place: Place = "prefix",
) -> Tensor:  # [L, ...]
    """Put `rows` before (prefix) or behind (suffix) the prompt's rows, in their place (replace), or add them to them (add; k = n).

    The start token stays first, an end token follows, and what the sequence gains is dropped from the padding. `InvalidInput` where it is too long.
    """
    length, k = len(x), len(rows)
    start, prompt, tail = x[:1], x[1 : 1 + n], x[1 + n :]
    if place == "add":
        check(k == n, f"place 'add' needs one row for each of the prompt's {n} tokens, got {k}.")
        return torch.cat([start, prompt + rows, tail])
    kept = 0 if place == "replace" else n
    if kept + k + 2 > length:
        raise InvalidInput(
            f"The prompt has {kept} tokens; with {k} more, start and end it exceeds the {length} that the text encoder takes."
        )
    if place == "replace":
        parts = [start, rows, tail]
        if k < n:  # the prompt's freed places become padding
            parts.append(x[-1:].expand(n - k, *x.shape[1:]))
    else:
        parts = [start, rows, prompt, tail] if place == "prefix" else [start, prompt, rows, tail]
    return torch.cat(parts)[:length]


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.casefold()).split()


def _contains(prompt: str, concept: str) -> bool:
    have, want = _words(prompt), _words(concept)
    return any(have[k : k + len(want)] == want for k in range(len(have) - len(want) + 1))


def prompts_without(prompts: Iterable[str], concepts: Iterable[str]) -> list[str]:
    """The prompts that contain none of the concepts, as whole words and whatever the case."""
    concepts = list(concepts)
    return [prompt for prompt in prompts if not any(_contains(prompt, concept) for concept in concepts)]


class RetainPrompts:
    """Draws prompts without repetition within a pass; a pass ends when fewer than a batch are left."""

    def __init__(self, prompts: Sequence[str], concepts: Sequence[str], batch: int, generator: torch.Generator) -> None:
        """`concepts` are the words that no prompt may contain: the concept and its synonyms; `InvalidInput` lists those that do."""
        check_at_least("retain_batch", batch, 1)
        check(len(set(prompts)) == len(prompts), "retain_prompts holds a prompt twice; give each once.")
        check(len(prompts) >= batch, f"retain_prompts has {len(prompts)} prompts for batches of {batch}; give more.")
        clean = set(prompts_without(prompts, concepts))
        bad = [prompt for prompt in prompts if prompt not in clean]
        check(
            not bad,
            f"retain_prompts name what is to be forgotten, take them out (`prompts_without`): {', '.join(map(repr, bad))}.",
        )
        self.prompts, self.batch, self.generator = list(prompts), batch, generator
        self.left: list[int] = []

    def draw(self) -> list[str]:
        if len(self.left) < self.batch:
            self.left = torch.randperm(
                len(self.prompts), generator=self.generator, device=self.generator.device
            ).tolist()
        taken, self.left = self.left[: self.batch], self.left[self.batch :]
        return [self.prompts[k] for k in taken]
