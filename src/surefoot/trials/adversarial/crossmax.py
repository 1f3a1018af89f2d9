"""Trial of CrossMax: the published evaluation beside the adaptive one, on the same models and images.

Digits at their own 8x8, eps 0.1 (L-infinity), 500 attacked images. Every arm goes through `evaluate_crossmax`. The columns, from weak to strong:
`pgd` (one draw a gradient), `published` (the suite for random models, averaged over draws: the kind of evaluation that the paper reports), and
`adaptive`: averaged draws on the whole pipeline, a smooth surrogate in place of the order statistic, the head alone, transfer from the plain and from
the adversarially trained net, each as it is and as a start for the pipeline, five times the steps, random search. What survives all of these is
attacked adaptively once more, on cross-entropy in place of the margin and with four times the draws; `left` survives that too.

The budget is the same for every arm: EOT 4 and 10 steps, adaptive 8 and 40 steps, then EOT 16 with 8 and 40 steps, 100 queries, majority of 9 draws.
An attack with EOT 64 on up to 100 images of what is left beside the same with 16 shows whether still more draws would find more: `more_draws` is the
difference, as a share of the images.

Arms: a plain net; one adversarially trained from there (three learning rates to choose from); CrossMax as published (random multi-resolution input,
probes on four layers and the head, median). Its parts, most of them on the same trained net: `second` and `fourth` (the second and fourth largest of
the five in place of the third, which is the median; the authors' notebook takes the third of eight), `mean` (log-probabilities averaged), `multires`
(the random input and the head alone), `layers` (probes and median without the random input), `nets` (median over four independent plain nets).
Left out: light adversarial training of CrossMax, transfer attacks on large models, CIFAR, EOT 20-40 x 200 steps x 3 restarts (hours on one core).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from surefoot.adversarial.adaptive_smoothing import AdversarialTraining
from surefoot.adversarial.crossmax import (
    CrossMax,
    MultiResolutionClassifier,
    SelfEnsemble,
    crossmax,
    evaluate_crossmax,
    mean_log_probs,
)
from surefoot.adversarial.crossmax.evaluation import Averaged
from surefoot.core.task import Task, Training
from surefoot.core.trial import Arm, Claim, Metrics, Setup, Trial
from surefoot.datasets.embedded import digits
from surefoot.models import seeded_build, small_cnn
from surefoot.nn.attacks import adaptive_suite, apgd, decide, is_random, pgd
from surefoot.training.loop import fit

EPS = 0.1
ATTACKED, EOT, MORE, DRAWS = 500, 4, 16, 9
TRAINING = Training(epochs=12, lr=3e-3)
METHOD = CrossMax(jitter=1)
LRS = (1e-2, 2e-2, 4e-2)


def digits_task(seed: int, data_dir: Path | None) -> Task:
    return digits(seed, sizes=(1000, 197, 600))


_trained: dict[tuple[object, ...], nn.Module] = {}  # of this process, by data, seed and recipe


def once(task: Task, recipe: str, train: Callable[[], nn.Module]) -> nn.Module:
    key = (task.name, task.seed, float(task.train.x.double().sum()), recipe)
    if key not in _trained:
        _trained[key] = train().eval()
    return _trained[key]


def net(task: Task, purpose: str = "trial/net") -> nn.Module:
    build = lambda: small_cnn(task.input_shape, task.num_classes, widths=(16, 16, 16))  # noqa: E731
    return seeded_build(build, task.generator(purpose))


def plain_net(task: Task, member: int = 0) -> nn.Module:
    purpose = f"trial/net{member or ''}"
    return once(task, purpose, lambda: fit(net(task, purpose), task, TRAINING).model)


def trained_net(task: Task, lr: float) -> nn.Module:
    """From the plain net on: from random weights it stays near chance for long."""
    method = AdversarialTraining(EPS, None, steps=5)
    return once(task, f"trained {lr}", lambda: fit(plain_net(task), task, TRAINING.changed(epochs=20, lr=lr), (method,)).model)  # fmt: skip


def ensemble(task: Task, method: CrossMax) -> SelfEnsemble:
    recipe = f"ensemble {method.multi_resolution}"
    model = once(task, recipe, lambda: fit(net(task), task, TRAINING.changed(epochs=20), (method,)).model)
    assert isinstance(model, SelfEnsemble)
    if isinstance(model.backbone, MultiResolutionClassifier) and model.backbone.inputs.generator is not None:
        model.backbone.inputs.generator.manual_seed(task.seed)  # no arm goes on in a stream that another began
    return model


def measured(
    model: nn.Module,
    task: Task,
    generator: torch.Generator,
    surrogate: nn.Module | None = None,
    components: tuple[nn.Module, ...] = (),
) -> tuple[dict[str, float], torch.Tensor]:
    """The columns from weak to strong; what survives them is attacked once more with four times the draws."""
    x, y = task.test.x[:ATTACKED], task.test.labels[:ATTACKED]
    shared = {"eps": EPS, "restarts": 1, "queries": 100, "draws": DRAWS, "generator": generator}
    report = evaluate_crossmax(
        model, x, y, steps=10, eot=EOT, adaptive_steps=8, masking=0, surrogate=surrogate,
        components=(*components, plain_net(task), trained_net(task, LRS[0])), **shared,
    )  # fmt: skip
    found, left = report.accuracies, report.robust.clone()
    if bool(left.any()):
        draws = MORE if is_random(model, x[:16], generator) else 1
        again = adaptive_suite(
            model, x[left], y[left], steps=8, loss="ce", eot=draws, surrogate=surrogate or smooth(model, draws), **shared,
        )  # fmt: skip
        left[report.robust] = again.robust
    final = float(left.double().mean())
    return {
        "clean": found["clean"],
        "pgd": found["PGD"],
        "published": found["rand suite"],
        "square": found["square"],
        "adaptive": found["adaptive"],
        "left": final,
        "overstated": found["rand suite"] - final,
    }, left


def smooth(model: nn.Module, draws: int) -> nn.Module:
    """What an attack climbs in the model's place: no order statistic, and the mean probability over draws."""
    return Averaged(model.aggregated_by(mean_log_probs) if isinstance(model, SelfEnsemble) else model, draws)


def plain_arm(task: Task, generator: torch.Generator) -> Metrics:
    return measured(plain_net(task), task, generator)[0]


def trained_arm(task: Task, generator: torch.Generator, lr: float) -> Metrics:
    return measured(trained_net(task, lr), task, generator)[0]


def after(model: nn.Module, x: torch.Tensor, y: torch.Tensor, eot: int, generator: torch.Generator) -> float:
    """Accuracy after the surrogate and then the pipeline are climbed with `eot` draws a gradient."""
    shared = {"eps": EPS, "steps": 10, "loss": "ce", "early_stop": False, "keep": "strongest", "generator": generator}
    start = apgd(smooth(model, eot), x, y, **shared).x
    found = apgd(model, x, y, eot=eot, start=start, **shared).x
    return float((decide(model, found, draws=25, generator=generator)[0] == y).double().mean())


def crossmax_arm(task: Task, generator: torch.Generator) -> Metrics:
    model = ensemble(task, METHOD)
    metrics, left = measured(model, task, generator)
    index = left.nonzero().squeeze(1)[:100]
    x, y = task.test.x[index], task.test.labels[index]
    again, more = (after(model, x, y, eot, generator) if len(x) else 0.0 for eot in (MORE, 4 * MORE))
    return {**metrics, "again": again, "again_more_draws": more, "more_draws": (more - again) * metrics["left"]}


def second_arm(task: Task, generator: torch.Generator) -> Metrics:
    return measured(ensemble(task, METHOD).aggregated_by(partial(crossmax, k=2)), task, generator)[0]


def fourth_arm(task: Task, generator: torch.Generator) -> Metrics:
    return measured(ensemble(task, METHOD).aggregated_by(partial(crossmax, k=4)), task, generator)[0]


def mean_arm(task: Task, generator: torch.Generator) -> Metrics:
    return measured(ensemble(task, METHOD).aggregated_by(mean_log_probs), task, generator)[0]


def multires_arm(task: Task, generator: torch.Generator) -> Metrics:
    return measured(ensemble(task, METHOD).backbone, task, generator)[0]


def layers_arm(task: Task, generator: torch.Generator) -> Metrics:
    """Also how the layers stand an attack on the head: the mean accuracy of their probes less the head's."""
    model = ensemble(task, CrossMax(multi_resolution=False))
    x, y = task.test.x[:ATTACKED], task.test.labels[:ATTACKED]
    attacked = pgd(model.backbone, x, y, eps=EPS, steps=15, generator=generator).x
    with torch.no_grad():
        right = (model.predictors(attacked).argmax(2) == y[:, None]).double().mean(0)
    return {**measured(model, task, generator)[0], "layers_less_head": float(right[:-1].mean() - right[-1])}


class Nets(nn.Module):
    """Whole networks as predictors."""

    def __init__(self, members: Iterable[nn.Module], aggregate: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.members, self.aggregate = nn.ModuleList(members), aggregate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.aggregate(torch.stack([member(x) for member in self.members], 1))


def nets_arm(task: Task, generator: torch.Generator) -> Metrics:
    members = tuple(plain_net(task, member) for member in range(4))
    median, mean = (Nets(members, aggregate).eval() for aggregate in (crossmax, mean_log_probs))
    return measured(median, task, generator, mean, members[1:])[0]


def promised(arms: Mapping[str, Metrics]) -> float:
    """What the published kind of suite credits CrossMax with, beyond what survives everything."""
    return arms["crossmax"]["published"] - arms["crossmax"]["left"]


def beyond_parts(arms: Mapping[str, Metrics]) -> float:
    """What CrossMax keeps beyond the better of averaging and the random input alone."""
    return arms["crossmax"]["left"] - max(arms["mean"]["left"], arms["multires"]["left"])


EMBEDDED = Setup(
    task=digits_task,
    tune_on="left",
    arms={
        "plain": Arm(plain_arm, system=True),
        "adversarial_training": Arm(trained_arm, grid={"lr": LRS}, system=True),
        "crossmax": Arm(crossmax_arm, system=True),
        "second": Arm(second_arm, system=True),
        "fourth": Arm(fourth_arm, system=True),
        "mean": Arm(mean_arm, system=True),
        "multires": Arm(multires_arm, system=True),
        "layers": Arm(layers_arm, system=True),
        "nets": Arm(nets_arm, system=True),
    },
    claims=(
        Claim("The published kind of suite credits CrossMax with more than survives all attacks together.", effect=promised),
        Claim("Sixty-four draws a gradient in place of sixteen change what is left by at most 2 points.", "more_draws", "crossmax", within=0.02),
        Claim("After adaptive attacks CrossMax still keeps more than the plain net.", "left", "crossmax", "plain"),
        Claim("After adaptive attacks adversarial training keeps more than CrossMax.", "left", "adversarial_training", "crossmax"),
        Claim("What CrossMax keeps is more than averaging the predictors, or the random input alone, keeps.", effect=beyond_parts),
        Claim("Attacks on the head fool the layers before it less.", "layers_less_head", "layers"),
    ),
)  # fmt: skip

TRIAL = Trial("adversarial/crossmax", {"embedded": EMBEDDED}, notes=__doc__ or "")
