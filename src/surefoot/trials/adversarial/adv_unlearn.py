"""Adversarial unlearning on trial: forget "three" in a toy text-to-image model, attack it with tokens, embeddings and paraphrases.

One toy (8x8 digits, captions of forty words) is trained once, cached, and shared by all arms and seeds; the seed draws trajectories, attacks and
the images that are judged. So the intervals speak of unlearning runs on this model, not of other models. A digit has two names, and only "three" is
erased: the token attack is free to use "3". The judge is a CNN trained on noised, blurred, shifted images, with a class for junk, so that a ruined
model neither counts as attacked nor as retained. Retain prompts name seven other digits; retained accuracy is over all nine, `unseen` over the two
that no retain prompt names.

Attacks: three words in front of the prompt (`asr_prefix`) or in its place (`asr_replace`), 100 losses each, three embeddings (`asr_embedding`).
Each keeps the plain prompt if that draws the concept more often in the judge's eyes, so that none is weaker than no attack but for the luck of fresh
images; `original` shows it. `asr_words` is the most successful of plain, paraphrased and searched wordings. The searches compare guided predictions
along the original's guided trajectories. An earlier version compared unguided ones on noised images, started at one random draw and did not try the
plain prompt: its words drew the concept from the original less often than the plain prompt did (.65 against .86, five seeds), for greedy swaps
stop at words such as "two five nine the digit three", whose loss is above the plain prompt's. On models that forgot, guided losses find more, too.
Embeddings win against every text encoder, as they must with the U-Net unchanged: they are reported, and no claim is made of them.

Erasing with the retain term alone (`esd_retain`) is the strongest baseline and has the method's grid: two learning rates times two retain weights.
The arms without retain prompts have the two learning rates. All are tuned on retained accuracy less the mean success of the word searches.
`plugged_*`: the text encoder in a second U-Net that was trained with the original one. Left out: larger images and real weights (none packaged), the
colour concept (this toy is grey), arms for embeddings attacked in the U-Net (tests cover them).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.adversarial.adv_unlearn import (
    AdvUnlearner,
    Attack,
    discrete_attacks,
    embedding_attacks,
    evaluate_erasure,
)
from surefoot.core.task import Task
from surefoot.core.trial import Arm, Claim, Metrics, Setup, Trial
from surefoot.datasets.embedded import digits, seeded
from surefoot.models import seeded_build, small_cnn
from surefoot.models.toy_diffusion import TEMPLATES, ToyDiffusion, cached_modules, caption, second_unet, toy_diffusion

CONCEPT = 3
UNNAMED = (4, 7)  # digits that no retain prompt names
JUNK = 10
PLACES: tuple[Literal["prefix", "replace"], ...] = ("prefix", "replace")
DRAW = {"steps": 10, "guidance": 4.0}
ATTACK = Attack(steps=6, lr=3e-2, num_tokens=1, batch=2)
FAST_ATTACK = replace(ATTACK, steps=1, lr=ATTACK.lr * ATTACK.steps, rule="sign")
COMMON = AdvUnlearner(
    iterations=100, warmup=30, batch=4, retain_batch=8, ddim_steps=10, copies=32, reuse=40, attack=ATTACK
)


# ------------------------------------------------------------------------------------------------------------------- judge


def corrupted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted by up to a pixel, blurred, dimmed and noised, each by a random amount: generated images are none of them clean."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=generator)

    dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
    x = torch.roll(x, (dy, dx), (2, 3))
    blurred = F.avg_pool2d(F.pad(x, [1] * 4), 3, 1)
    x = x + uniform(0, 0.6) * (blurred - x)
    return (uniform(0.6, 1.2) * x + uniform(0, 0.2) * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def junk(x: Tensor, generator: torch.Generator) -> Tensor:
    """What no digit looks like: two digits in one, pixels out of order, smooth noise."""
    third = len(x) // 3
    a, b, c = x[:third], x[third : 2 * third], x[2 * third :]
    other = x[torch.randperm(len(x), generator=generator)[:third]]
    shuffled = b.flatten(1)[:, torch.randperm(64, generator=generator)].view_as(b)
    smooth = F.avg_pool2d(torch.rand(len(c), 1, 10, 10, generator=generator), 3, 1) * 2 - 0.5
    return torch.cat([(a + other.flip(3)) / 1.4, shuffled, smooth]).clamp(0, 1)


def train_judge(steps: int = 500) -> nn.Module:
    data, source = digits(0, sizes=(1400, 97, 300)).train, seeded(0, "judge")
    net = seeded_build(lambda: small_cnn((1, 8, 8), JUNK + 1), source).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        pick = torch.randint(len(data), (120,), generator=source)
        x, y = data.x[pick], data.labels[pick].clone()
        x = corrupted(torch.cat([x[:96], junk(x[96:], source)]), source)
        y[96:] = JUNK
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return net


@cache
def judge() -> nn.Module:
    settings: dict[str, object] = {"code": "".join(map(inspect.getsource, (train_judge, junk, corrupted, small_cnn)))}
    return cached_modules(
        "toy_judge", settings, lambda: {"judge": train_judge()}, lambda: {"judge": small_cnn((1, 8, 8), JUNK + 1)}
    )["judge"]


def features(images: Tensor) -> Tensor:  # [B, 64]
    """The judge's last hidden layer."""
    net = judge()
    assert isinstance(net, nn.Sequential)
    return net[:-1](images)


# ----------------------------------------------------------------------------------------------------------------- measuring


def retain_prompts() -> list[str]:
    """The empty prompt, and two names of seven digits in half of the templates; the other half is for measuring."""
    named = [d for d in range(10) if d not in (CONCEPT, *UNNAMED)]
    return ["", *(caption(d, template=t, figure=f) for d in named for t in TEMPLATES[::2] for f in (False, True))]


def asked(digits_: tuple[int, ...]) -> dict[str, int]:
    return {
        caption(d, template=t, figure=f): d
        for d in digits_
        for t, f in zip(TEMPLATES[1::2][:4], (False, True) * 2, strict=True)
    }


CONCEPT_PROMPTS = [caption(CONCEPT, template=t) for t in TEMPLATES[:4]]
PARAPHRASES = [caption(CONCEPT, template=t, figure=f) for t in TEMPLATES[5:8] for f in (False, True)]


def measured(model: ToyDiffusion, original: ToyDiffusion, task: Task, generator: torch.Generator) -> dict[str, float]:
    """Success of each attack, what is retained, and the score that tuning looks at (tuning leaves the embeddings out)."""
    known: dict[str, Any] = {"judge": judge(), "concept_class": CONCEPT, "tries": 6, "generator": generator, **DRAW}
    attacks = {
        place: discrete_attacks(model, original, CONCEPT_PROMPTS[:2], places=[place], queries=100, states=12, **known)
        for place in PLACES
    }
    if not tuning(task):
        search = Attack(steps=40, lr=2e-2, num_tokens=3, batch=8)
        attacks["embedding"] = embedding_attacks(model, original, CONCEPT_PROMPTS[:2], search, images=16, **known)
    report = evaluate_erasure(
        model,
        judge(),
        CONCEPT,
        prompts=CONCEPT_PROMPTS,
        paraphrases=PARAPHRASES,
        attacks=attacks,
        retained=asked(tuple(d for d in range(10) if d != CONCEPT)),
        images=16,
        retained_images=4,
        reference=task.test.x[task.test.labels != CONCEPT],
        features=features,
        generator=generator,
        **DRAW,
    )
    other = asked(UNNAMED)
    by_prompt = dict(zip(asked(tuple(d for d in range(10) if d != CONCEPT)), report.retained.by_prompt, strict=True))
    assert report.distance is not None
    found = {f"asr_{name}": rate.value for name, rate in report.concept.items()}
    return {
        **found,
        "asr_words": max(found[f"asr_{name}"] for name in ("prompts", "paraphrases", *PLACES)),
        **{f"queries_{name}": report.budgets[name][0] for name in attacks},
        "retained": report.retained.value,
        "unseen": sum(by_prompt[p] for p in other) / len(other),
        "distance": report.distance,
        "score": report.retained.value - sum(found[f"asr_{place}"] for place in PLACES) / 2,
    }


def tuning(task: Task) -> bool:
    return task.test is task.valid


def plugged(model: ToyDiffusion, generator: torch.Generator) -> dict[str, float]:
    """The text encoder with a U-Net that it was not trained with."""
    other = replace(model, unet=second_unet(toy_diffusion()))
    report = evaluate_erasure(
        other, judge(), CONCEPT, prompts=CONCEPT_PROMPTS, paraphrases=PARAPHRASES, retained=asked((0, 1, 2, 5, 6, 8)), images=8, retained_images=4,
        generator=generator, **DRAW,
    )  # fmt: skip
    rates = (report.concept["prompts"], report.concept["paraphrases"])
    return {
        "plugged_asr": sum(rate.value * rate.n for rate in rates) / sum(rate.n for rate in rates),
        "plugged_retained": report.retained.value,
    }


# ------------------------------------------------------------------------------------------------------------------ the protocol


def original_arm(task: Task, generator: torch.Generator) -> Metrics:
    toy = toy_diffusion()
    return {**measured(toy, toy, task, generator), **plugged(toy, generator)}


def unlearning(learner: AdvUnlearner) -> Arm:
    def arm(task: Task, generator: torch.Generator, lr: float, retain_weight: float = 0.0) -> Metrics:
        toy = toy_diffusion()
        chosen = replace(learner, lr=lr, retain_weight=retain_weight)
        prompts = retain_prompts() if retain_weight else []
        result = chosen.fit(toy, ["three"], prompts, synonyms=["3"], generator=task.generator("unlearn"))
        costs = {"fit_seconds": result.report.seconds, "unet_passes": float(result.report.unet_passes)}
        found = {**measured(result.model, toy, task, generator), **costs}
        skipped = learner.trainable == "unet" or tuning(task)
        return found if skipped else {**found, **plugged(result.model, generator)}

    weights = {"retain_weight": WEIGHTS} if learner.retain_weight else {}
    return Arm(arm, grid={"lr": LEARNING_RATES, **weights}, system=True)


def task(seed: int, data_dir: Path | None) -> Task:
    return digits(seed)


LEARNING_RATES, WEIGHTS = (3e-4, 1e-3), (1.0, 3.0)
PLAIN = replace(COMMON, retain_weight=0.0)

ARMS: Mapping[str, Arm] = {
    "original": Arm(original_arm, system=True),
    "esd": unlearning(replace(PLAIN, attack=None)),
    "esd_unet": unlearning(replace(PLAIN, attack=None, trainable="unet")),
    "esd_retain": unlearning(replace(COMMON, attack=None)),
    "attack_only": unlearning(PLAIN),
    "adv_unlearn": unlearning(COMMON),
    "adv_fast": unlearning(replace(COMMON, attack=FAST_ATTACK)),
    "adv_unet": unlearning(replace(COMMON, trainable="unet")),
}

CLAIMS = (
    Claim("Words searched for in front of the prompt bring the concept back less often than after erasing with the retain term alone.", "asr_prefix", "adv_unlearn", "esd_retain", better="lower"),
    Claim("Of all wordings tried (plain, paraphrased, searched for) the most successful brings it back less often, too.", "asr_words", "adv_unlearn", "esd_retain", better="lower"),
    Claim("Other prompts keep the accuracy that erasing with the retain term alone leaves them, within 5 points.", "retained", "adv_unlearn", "esd_retain", within=0.05),
    Claim("Without the retain term they lose at least 15 points more.", "retained", "adv_unlearn", "attack_only", at_least=0.15),
    Claim("The text encoder is the better part to train: retained accuracy less attack success is higher than with the U-Net.", "score", "adv_unlearn", "adv_unet"),
    Claim("Plugged into another U-Net, the text encoder draws the concept less often than that of erasing with the retain term alone.", "plugged_asr", "adv_unlearn", "esd_retain", better="lower"),
)  # fmt: skip

TRIAL = Trial(
    "adversarial/adv_unlearn",
    {"embedded": Setup(task=task, arms=ARMS, claims=CLAIMS, tune_on="score")},
    notes=__doc__ or "",
)
