"""Trial of NaTra: does training on latent natural changes help where pixel attacks and ordinary augmentation do not?

Drawn 16 x 16 shapes and digits. 500 labelled images with narrow nuisances (brightness, background gradient, tilt, stroke
width), 3,000 unlabelled ones with wide nuisances for the generator, and a wide test set. All arms train the same small network
for the same steps with the same weight decay (it helped plain training on a seed of its own), with two settings each,
chosen on 300 wide validation images: of the learning rate for plain training and the oracle, of the method's own strength for the
others. Generator, inversion and filter are trained anew in every cell, so that "seconds" counts them.

`natra_adv` is the method (worst amounts by sign ascent), `natra_random` draws the amounts, `natra_no_lce` has one code an image,
`natra_no_filter` keeps all directions at full reach, `reconstruction` trains on G(z) at a = 0 beside x (inversion error without any move).
`oracle` draws the true factors anew for each labelled image: the upper bound. The corruptions (blur and noise at severity 3 on
the wide test set) are made by code that the drawing knows nothing of, so that the renderer is not the only judge.

Left out: mixup with other than the tuned weights, consistency terms, directions in closed form, and the standard tier (its
StyleGAN-class generators are not trained in minutes; bring one through `NaTra().using(generator_net=..., encoder=...)`).
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.adversarial.natra import NaTra, invert_batch, realism
from surefoot.core.subject import predict
from surefoot.core.task import Task, Training
from surefoot.core.treatment import Batch, Treatment
from surefoot.core.trial import Arm, Claim, Metrics, Run, Setup, Trial
from surefoot.datasets.shapes import NARROW, NUISANCES, WIDE, Factors, draw, render, sample_factors, shapes
from surefoot.models import seeded_build
from surefoot.models.generators import train_vae
from surefoot.nn.attacks import pgd_train
from surefoot.nn.corruptions import corrupt
from surefoot.training.loop import fit

POOL, TEST, BINS = 3000, 1000, 4
TRAINING = Training(steps=320, batch_size=64, lr=1e-2, weight_decay=1e-3)


def task_of(seed: int, data_dir: Path | None) -> Task:
    return shapes(seed, sizes=(500, 300, TEST))


def pool_of(task: Task) -> Tensor:
    """Unlabelled images that show every nuisance; drawn from a stream of their own, so that none is a test image."""
    return draw(POOL, WIDE, task.generator("trial/pool"))[0]


def network(task: Task) -> nn.Module:
    def layers() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, task.num_classes),
        )  # fmt: skip

    return seeded_build(layers, task.generator("model"))


def measure(run: Run, task: Task) -> Metrics:
    x, y = task.test.x, task.test.labels
    right = (predict(run.model, x).argmax(1) == y).double()
    narrow, made = draw(TEST, NARROW, task.generator("trial/narrow"))
    held_out = [corrupt(x, name, 3, task.generator(f"trial/{name}")) for name in ("gaussian_blur", "gaussian_noise")]
    metrics = {
        "accuracy": right.mean().item(),
        "narrow": (predict(run.model, narrow).argmax(1) == made.label).double().mean().item(),
        "corrupted": sum((predict(run.model, z).argmax(1) == y).double().mean().item() for z in held_out) / 2,
    }
    if len(y) == TEST:  # the factors of the test split; validation, in tuning, has others
        factors = sample_factors(TEST, WIDE, generator=_stream(task))
        metrics["worst_bin"] = min(accuracy for name in NUISANCES for accuracy in _by_bin(right, factors, name))
    return metrics


def _stream(task: Task) -> torch.Generator:
    return task.generator("shapes/test")


def _by_bin(right: Tensor, factors: Factors, name: str) -> list[float]:
    """Accuracy in equal parts of a nuisance's range."""
    low, high = getattr(WIDE, name)
    place = ((getattr(factors, name) - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
    return [right[place == b].mean().item() for b in range(BINS)]


# ------------------------------------------------------------------------------------------------ the arms


def natra(**options: Any) -> Arm:
    def run(task: Task, generator: torch.Generator, alpha_max: float) -> Metrics:
        pool = pool_of(task)
        settings: dict[str, Any] = {"k": 12, "generator_steps": 600, "alpha_max": alpha_max}
        method = NaTra(**(settings | options)).using(pool=pool)
        done = fit(network(task), task, TRAINING, [method])
        (left,) = done.treatments
        assert isinstance(left, NaTra) and left.transform_ is not None and left.report_ is not None
        whole = left.transform_
        moved = whole(whole.draw(task.generator("trial/realism")))
        facts = {
            "psnr": whole.codes.psnr.double().median().item(),
            "dropped": float(left.dropped_),
            "directions": float(len(whole.directions)),
            "joint_label_change": left.report_.joint_label_change,
            "artefacts": realism(moved, pool[: POOL // 2], pool[POOL // 2 :]).ratio,
        }
        return {**measure(done, task), **facts}

    return Arm(run, {"alpha_max": (1.0, 2.0)}, system=True)


class Replaced(Treatment):
    """Cross-entropy on another batch than the loop's, made by `change(model, batch) -> (x, soft or hard labels)`."""

    slug = "trial_replaced"

    def __init__(self, change: Any) -> None:
        self.change = change

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        x, y = self.change(model, batch)
        return F.cross_entropy(model(x), y)


def plain(task: Task, generator: torch.Generator, lr: float) -> Metrics:
    return measure(fit(network(task), task, TRAINING.changed(lr=lr)), task)


def augmentation(task: Task, generator: torch.Generator, degrees: float) -> Metrics:
    """Turns, scales, shifts and a factor on brightness, beside the clean images: what one would try without a generator."""

    def change(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return torch.cat([batch.x, jitter(batch.x, degrees, batch.generator)]), batch.y.repeat(2)

    return measure(fit(network(task), task, TRAINING, [Replaced(change)]), task)


def jitter(x: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    draws = 2 * torch.rand(5, len(x), generator=generator) - 1
    angle, scale = torch.deg2rad(degrees * draws[0]), 1 + 0.15 * draws[1]
    cos, sin, shift = angle.cos() / scale, angle.sin() / scale, 0.1 * draws[2:4]
    matrix = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    turned = F.grid_sample(x, F.affine_grid(matrix, list(x.shape), align_corners=False), align_corners=False)
    return (turned * (1 + 0.4 * draws[4]).reshape(-1, 1, 1, 1)).clamp(0, 1)


def _beta(alpha: float, generator: torch.Generator) -> float:
    """One draw of Beta(alpha, alpha), with numpy's generator seeded from ours (torch's takes no generator)."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def mixup(task: Task, generator: torch.Generator, alpha: float) -> Metrics:
    """Zhang et al., 2018, arXiv 1710.09412: convex pairs of images and labels, one weight a batch."""

    def change(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        share = _beta(alpha, batch.generator)
        other = torch.randperm(len(batch.x), generator=batch.generator)
        hot = F.one_hot(batch.y, task.num_classes).to(batch.x)
        return torch.lerp(batch.x[other], batch.x, share), torch.lerp(hot[other], hot, share)

    return measure(fit(network(task), task, TRAINING, [Replaced(change)]), task)


def adversarial_training(task: Task, generator: torch.Generator, eps: float) -> Metrics:
    """Pixel PGD (Linf, 3 steps) beside the clean images: NaTra's loss and steps with pixels in the amounts' place."""

    def change(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        attacked = pgd_train(model, batch.x, batch.y, eps=eps, steps=3, generator=batch.generator)
        return torch.cat([batch.x, attacked]), batch.y.repeat(2)

    return measure(fit(network(task), task, TRAINING, [Replaced(change)]), task)


def reconstruction(task: Task, generator: torch.Generator, steps: int) -> Metrics:
    vae = train_vae(pool_of(task), steps=600, generator=task.generator("natra/vae"))
    codes = invert_batch(vae.decoder, vae.encoder, task.train.x, steps=steps, num_codes=4, generator=task.generator("natra/codes"))  # fmt: skip
    with torch.no_grad():
        rebuilt = codes.images(vae.decoder)

    def change(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return torch.cat([batch.x, rebuilt[batch.index]]), batch.y.repeat(2)

    return measure(fit(network(task), task, TRAINING, [Replaced(change)]), task)


def oracle(task: Task, generator: torch.Generator, lr: float) -> Metrics:
    narrow = sample_factors(len(task.train), NARROW, generator=task.generator("shapes/train"))

    def change(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        fresh = sample_factors(len(batch.x), WIDE, generator=batch.generator)
        kept = narrow.take(batch.index)
        moved = replace(kept, **{f.name: getattr(fresh, f.name) for f in fields(Factors) if f.name in (*NUISANCES, "direction")})  # fmt: skip
        return torch.cat([batch.x, render(moved)]), batch.y.repeat(2)

    return measure(fit(network(task), task, TRAINING.changed(lr=lr), [Replaced(change)]), task)


EMBEDDED = Setup(
    task=task_of,
    arms={
        "erm": Arm(plain, {"lr": (3e-3, 1e-2)}, system=True),
        "augmentation": Arm(augmentation, {"degrees": (15.0, 30.0)}, system=True),
        "mixup": Arm(mixup, {"alpha": (0.2, 1.0)}, system=True),
        "pgd_at": Arm(adversarial_training, {"eps": (0.05, 0.15)}, system=True),
        "reconstruction": Arm(reconstruction, {"steps": (20, 60)}, system=True),
        "natra_adv": natra(),
        "natra_random": natra(mode="random"),
        "natra_no_lce": natra(num_codes=1),
        "natra_no_filter": natra(filter=False),
        "oracle": Arm(oracle, {"lr": (3e-3, 1e-2)}, system=True),
    },
    claims=(
        Claim("NaTra is at least 5 points more accurate than plain training under wide natural changes.", "accuracy", "natra_adv", "erm", at_least=0.05),
        Claim("It is at least 2 points more accurate there than pixel adversarial training.", "accuracy", "natra_adv", "pgd_at", at_least=0.02),
        Claim("It is more accurate there than ordinary augmentation (turns, scales, shifts, brightness).", "accuracy", "natra_adv", "augmentation"),
        Claim("Adversarial amounts beat random ones.", "accuracy", "natra_adv", "natra_random"),
        Claim("Several codes an image (LCE) beat one.", "accuracy", "natra_adv", "natra_no_lce"),
        Claim("The label-preservation filter keeps accuracy on images like the training ones.", "narrow", "natra_adv", "natra_no_filter"),
    ),
)  # fmt: skip

TRIAL = Trial(
    method="adversarial/natra",
    tiers={"embedded": EMBEDDED},
    notes="The generator's 3,000 unlabelled images show the wide nuisances; without such images the method has nothing to add. "
    "Ordinary augmentation is given the two nuisances it can imitate (tilt, brightness) by its design, and the oracle all four. "
    "Validation images are wide, 300, for every arm alike. 'artefacts' is the nearest-neighbour distance of randomly moved images "
    "to the pool over that of fresh real ones (about 1 is good).",
)
