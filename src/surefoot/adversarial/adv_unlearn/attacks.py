"""Prompt attacks: embeddings by gradient steps, and real tokens by a gradient-guided search. Neither touches the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from surefoot.adversarial.adv_unlearn.backend import TextToImage, condition, frozen
from surefoot.adversarial.adv_unlearn.prompts import Place, prompt_length, spliced
from surefoot.adversarial.adv_unlearn.states import States
from surefoot.errors import InvalidInput, check, check_at_least, check_choice, check_non_negative, check_positive
from surefoot.nn.diffusion import guided


@dataclass(frozen=True)
class Attack:
    """How adversarial embeddings are searched. `batch`: states a step. `init="latest"` goes on from the rows of the last attack."""

    steps: int = 30
    lr: float = 1e-3
    rule: Literal["adam", "sign"] = "adam"  # what Adam is given: the gradient, or its sign
    num_tokens: int = 1
    place: Place = "prefix"
    init: Literal["random", "latest"] = "random"
    space: Literal["word", "condition"] = "word"  # rows before, or behind the text encoder
    batch: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "num_tokens", "batch"):
            check_at_least(name, getattr(self, name), 1)
        check_positive("attack lr", self.lr)
        check_choice("rule", self.rule, ("adam", "sign"))
        check_choice("place", self.place, ("prefix", "suffix", "replace", "add"))
        check_choice("init", self.init, ("random", "latest"))
        check_choice("space", self.space, ("word", "condition"))


FAST = Attack(steps=1, lr=3e-2, rule="sign")  # one signed step as long as thirty of `Attack()`


@dataclass(frozen=True)
class AdversarialPrompt:
    """A prompt with rows inserted, or none. `tokens` are set where the rows are words of the vocabulary, `text` then spells the whole prompt."""

    prompt: str
    rows: Tensor  # [k, D] word embeddings, or [k, E] text states
    place: Place = "prefix"
    space: Literal["word", "condition"] = "word"
    losses: tuple[float, ...] = field(default=(), repr=False)  # along the search
    tokens: Tensor | None = None  # int64 [k]
    text: str = ""
    queries: int = 0  # losses evaluated on full prompts
    gradients: int = 0

    def condition(self, model: TextToImage) -> Tensor:  # [1, L, E]
        """The text states that `model`, any with the same tokenizer, gives this prompt."""
        ids = model.token_ids([self.prompt])
        n = prompt_length(ids, model.end_id)
        if self.space == "condition":
            states = condition(model, [self.prompt])[0]
            return spliced(states, self.rows.to(states), n, self.place)[None]
        embeds = model.embed_tokens(ids)[0]
        rows = self.rows.to(embeds) if self.tokens is None else model.embed_tokens(self.tokens)
        return model.encode(spliced(embeds, rows, n, self.place)[None], self._ids(ids[0], n)[None])

    def _ids(self, ids: Tensor, n: int) -> Tensor:
        """Ids that go with the rows; an embedding that is no word borrows the prompt's first one, for it must not pass for an end."""
        if self.place == "add":
            return ids
        filler = ids[1] if n else ids[0]
        return spliced(ids, filler.expand(len(self.rows)) if self.tokens is None else self.tokens, n, self.place)


def plain_prompt(model: TextToImage, prompt: str) -> AdversarialPrompt:
    """The prompt with nothing inserted: the candidate that every attack has to beat."""
    _check_attackable(prompt)
    none = torch.empty(0, dtype=torch.long, device=model.device)
    with torch.no_grad():
        rows = model.embed_tokens(none)
    return AdversarialPrompt(prompt, rows, tokens=none, text=model.words(model.token_ids([prompt])))


def prompt_loss(
    model: TextToImage,
    text: Tensor,  # [1, L, E]
    states: States,
    *,
    guidance: float = 1.0,
    empty: Tensor | None = None,  # [N, ...] the model's own predictions of the empty prompt, if at hand
) -> Tensor:  # scalar
    """Mean squared distance of the model's noise predictions under `text` from those aimed at.

    1 compares e(c) itself, as training does. A sampler follows e('') + w (e(c) - e('')): give its w, with states that aim at guided predictions, to
    compare what is drawn.
    """
    predicted = model.predict_noise(states.z, states.t, text.expand(len(states), -1, -1))
    if guidance != 1.0:
        predicted = guided(empty_predictions(model, states) if empty is None else empty, predicted, guidance)
    return F.mse_loss(predicted.float(), states.given.float())


@torch.no_grad()
def empty_predictions(model: TextToImage, states: States) -> Tensor:  # [N, ...]
    """The model's own noise predictions of the empty prompt."""
    return model.predict_noise(states.z, states.t, condition(model, [""]).expand(len(states), -1, -1))


def soft_prompt_attack(
    model: TextToImage,
    prompt: str,
    draw: Callable[[int], States],  # number of states -> states, with what the concept's prediction is
    attack: Attack = Attack(),
    *,
    generator: torch.Generator,
    start: Tensor | None = None,  # [k, D]
    guidance: float = 1.0,
) -> AdversarialPrompt:
    """Embeddings that make `model` predict what `draw` aims at: `steps` of Adam on fresh states each.

    Starts at random vocabulary embeddings unless `start` is given; `guidance` is that of `prompt_loss`. Gradients are taken with respect to the rows only and are fresh at every
    step; modules are in evaluation mode meanwhile, and parameters, flags and modes are as before afterwards.
    """
    _check_attackable(prompt)
    check_non_negative("guidance", guidance)
    with frozen(model.unet, model.text_encoder), torch.enable_grad():
        n = prompt_length(model.token_ids([prompt]), model.end_id)
        rows = _initial_rows(model, prompt, n, attack, generator) if start is None else start
        rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32)).clone().requires_grad_(True)
        optimizer = torch.optim.Adam([rows], lr=attack.lr)
        losses = []
        for _ in range(attack.steps):
            guess = AdversarialPrompt(prompt, rows, attack.place, attack.space)
            loss = prompt_loss(model, guess.condition(model), draw(attack.batch), guidance=guidance)
            (gradient,) = torch.autograd.grad(loss, rows)
            rows.grad = gradient.sign() if attack.rule == "sign" else gradient
            optimizer.step()
            losses.append(float(loss.detach()))
    return AdversarialPrompt(
        prompt, rows.detach(), attack.place, attack.space, tuple(losses), queries=attack.steps, gradients=attack.steps
    )


def _check_attackable(prompt: str) -> None:
    check(bool(prompt.strip()), "The concept is empty; name what to attack.")
    check(
        not torch.is_inference_mode_enabled(),
        "A prompt attack needs gradients; call it outside of torch.inference_mode().",
    )


@torch.no_grad()
def _initial_rows(model: TextToImage, prompt: str, n: int, attack: Attack, generator: torch.Generator) -> Tensor:
    k = n if attack.place == "add" else attack.num_tokens
    if attack.space == "condition":
        states = condition(model, [prompt])[0]
        return states[
            torch.randint(1, len(states), (k,), generator=generator, device=generator.device).to(states.device)
        ]
    return model.embed_tokens(_random_words(model, k, generator))


def _random_words(model: TextToImage, k: int, generator: torch.Generator) -> Tensor:
    words = model.word_ids
    return words[torch.randint(len(words), (k,), generator=generator, device=generator.device).cpu()].to(model.device)


def discrete_prompt_attack(
    model: TextToImage,
    prompt: str,
    states: States,
    *,
    num_tokens: int = 3,
    queries: int = 200,
    swaps: int = 16,
    top: int = 8,
    place: Literal["prefix", "suffix", "replace"] = "prefix",
    guidance: float = 1.0,
    generator: torch.Generator,
) -> AdversarialPrompt:
    """Real tokens that bring the concept back: greedy coordinate gradient on fixed `states`, `queries` losses in all.

    The first query is the plain prompt's, and where nothing that was tried beats it the plain prompt comes back, without tokens: a greedy search often
    stops at words that are worse than none. It starts at the best of up to `swaps` random draws; `guidance` is that of `prompt_loss`. A round takes the gradient of the loss with respect to the inserted embeddings, lists for each place the `top` words whose embedding lowers
    the loss to first order, tries up to `swaps` single changes drawn from these lists, and keeps the best if it is better.
    """
    _check_attackable(prompt)
    for name, value in (("num_tokens", num_tokens), ("queries", queries), ("swaps", swaps), ("top", top)):
        check_at_least(name, value, 1)
    check_choice("place", place, ("prefix", "suffix", "replace"))
    words = model.word_ids.to(model.device)
    if len(words) < 2:
        raise InvalidInput("The vocabulary has fewer than two words; there is nothing to search.")
    check_non_negative("guidance", guidance)
    with frozen(model.unet, model.text_encoder), torch.enable_grad():
        table = model.embed_tokens(words).detach()
        ids = model.token_ids([prompt])
        n = prompt_length(ids, model.end_id)
        empty = empty_predictions(model, states) if guidance != 1.0 else None

        def loss_of(found: AdversarialPrompt) -> Tensor:
            return prompt_loss(model, found.condition(model), states, guidance=guidance, empty=empty)

        plain = plain_prompt(model, prompt)
        losses = [float(loss_of(plain).detach())]
        count = min(swaps, (queries - 1) // 4 or queries - 1)
        best, used, gradients, tokens = float("inf"), 1, 0, words[:0]
        if count:
            trials = _random_words(model, count * num_tokens, generator).view(count, num_tokens)
            values = _losses(model, ids[0], trials, n, place, states, guidance, empty)
            best, tokens, used = float(values.min()), trials[int(values.argmin())], 1 + count
            losses.append(min(best, losses[0]))
        while used < queries:
            rows = model.embed_tokens(tokens).detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(loss_of(AdversarialPrompt(prompt, rows, place)), rows)
            gradients += 1
            trials = _swaps(tokens, words, table, slope, rows.detach(), top, min(swaps, queries - used), generator)
            values = _losses(model, ids[0], trials, n, place, states, guidance, empty)
            used += len(trials)
            if float(values.min()) < best:
                best, tokens = float(values.min()), trials[int(values.argmin())]
            losses.append(min(best, losses[-1]))
    if best >= losses[0]:
        return replace(plain, losses=tuple(losses), queries=used, gradients=gradients)
    whole = model.words(spliced(ids[0], tokens, n, place))
    return AdversarialPrompt(
        prompt, model.embed_tokens(tokens).detach(), place, "word", tuple(losses), tokens, whole, used, gradients
    )


def _swaps(
    tokens: Tensor,
    words: Tensor,
    table: Tensor,
    slope: Tensor,
    rows: Tensor,
    top: int,
    count: int,
    generator: torch.Generator,
) -> Tensor:  # int64 [<= count, k]
    """Distinct single changes of `tokens`, drawn from the words that promise most at each place."""
    gain = (rows * slope).sum(1, keepdim=True) - slope @ table.T  # [k, V] what a swap takes off the loss to first order
    gain = gain.masked_fill(words[None] == tokens[:, None], -torch.inf)
    kept = min(top, len(words) - 1)
    ranked = words[gain.topk(kept, dim=1).indices]  # [k, top]
    order = torch.randperm(ranked.numel(), generator=generator, device=generator.device)[:count].to(tokens.device)
    trials = tokens.repeat(len(order), 1)
    trials[torch.arange(len(order), device=tokens.device), order // kept] = ranked.flatten()[order]
    return trials


@torch.no_grad()
def _losses(
    model: TextToImage,
    ids: Tensor,  # int64 [L]
    trials: Tensor,  # int64 [B, k]
    n: int,
    place: Place,
    states: States,
    guidance: float,
    empty: Tensor | None,  # [N, ...]
    batch_size: int = 256,
) -> Tensor:  # [B]
    """The loss of each row of tokens on all states."""
    full = torch.stack([spliced(ids, row, n, place) for row in trials])
    text = model.encode(model.embed_tokens(full), full)
    found = []
    for part in text.split(max(1, batch_size // len(states))):

        def many(x: Tensor, part: Tensor = part) -> Tensor:
            return x.repeat(len(part), *[1] * (x.dim() - 1))

        predicted = model.predict_noise(many(states.z), many(states.t), part.repeat_interleave(len(states), 0))
        if empty is not None:
            predicted = guided(many(empty), predicted, guidance)
        error = (predicted.float() - many(states.given).float()).pow(2)
        found.append(error.flatten(1).mean(1).view(len(part), -1).mean(1))
    return torch.cat(found)
