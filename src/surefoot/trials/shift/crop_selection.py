"""Crop selection on trial: where choosing a crop by its content pays, and, with equal weight, where it does not.

(a) Gratings: eight orientations in noise (amplitude .08 under pixel noise of .2; at .12 every net is near its ceiling), 66x66
frames of bytes, windows of 64x64, so that each crop tells nearly as much as its window and there are many positions.
(a2) The counter-example, arms `digits_*`: digit strokes on textured 44x44 frames, windows of 40x40, where the best-scoring
crop cuts the digit and positions are few.

Every net sees windows (or crops) at random places in training. `center_*` metrics are of the *same* net on the fixed centre
crop: the paired control. All gratings stacks share one grid of learning rates; the digit arms use 3e-3 throughout.
Left out: larger shifts than one pixel, and natural photographs (no packaged network for them here).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.core.task import Split, Task, Training
from surefoot.core.treatment import Treatment
from surefoot.core.trial import Arm, Claim, Metrics, Run, Setup, Stack, Trial
from surefoot.datasets.embedded import digits, seeded, stratified_split
from surefoot.models import seeded_build
from surefoot.shift.crop_selection import (
    CropSelection,
    CropSelectionTreatment,
    RandomCrop,
    TranslationReport,
    crop_change_bound,
    crop_fooled_bound,
    translation_robustness,
    windows,
)
from surefoot.training.loop import fit

WINDOW, STROKES_WINDOW = 64, 40
AMPLITUDE = 0.08
OFFSETS = 4
TRAINING = Training(epochs=5, batch_size=32, lr=3e-3)  # 5 x 4 windows of each training frame


# Data -----------------------------------------------------------------------------------------------------------------


def gratings(n: int, side: int, generator: torch.Generator, amplitude: float = AMPLITUDE) -> tuple[Tensor, Tensor]:
    """Byte-valued frames `[n, 1, side, side]` in [0, 1] and the class of orientation, pi k / 8 + N(0, .06)."""

    def uniform() -> Tensor:
        return torch.rand(n, 1, 1, generator=generator)

    y = torch.arange(n) % 8
    angle = (math.pi * y / 8).view(-1, 1, 1) + 0.06 * torch.randn(n, 1, 1, generator=generator)
    period, phase = 5 + 3 * uniform(), 2 * math.pi * uniform()
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    wave = torch.sin(2 * math.pi * (columns * angle.cos() + rows * angle.sin()) / period + phase)
    return to_byte_levels(0.5 + amplitude * wave + 0.2 * torch.randn(n, side, side, generator=generator)), y


def to_byte_levels(grey: Tensor) -> Tensor:  # [n, 1, H, W]
    return (grey.unsqueeze(1) * 255).round().clamp(0, 255) / 255


def strokes(seed: int, side: int = 44) -> tuple[Tensor, Tensor]:
    """Digits enlarged three times at a random place of a textured frame."""
    source, known = seeded(seed, "strokes"), digits(seed, sizes=(1300, 100, 397))
    x = torch.cat([split.x for split in (known.train, known.valid, known.test)])
    y = torch.cat([split.labels for split in (known.train, known.valid, known.test)])
    large = F.interpolate(x, size=(24, 24), mode="bilinear", align_corners=False)[:, 0]
    texture = F.avg_pool2d(torch.rand(len(x), 1, side + 2, side + 2, generator=source), 3, 1)[:, 0]
    frames = 0.5 * texture
    for k, (top, left) in enumerate(torch.randint(6, side - 30, (len(x), 2), generator=source).tolist()):
        frames[k, top : top + 24, left : left + 24] += 0.7 * large[k]
    return to_byte_levels(frames), y


def framed(name: str, frames: Tensor, y: Tensor, sizes: tuple[int, int, int], window: int, seed: int) -> Task:
    """Each training frame gives windows at four random places, validation and test the centre window."""
    train, valid, test = stratified_split(y, sizes, seeded(seed, "split"))
    cutter, source = RandomCrop((window, window)), seeded(seed, "windows")
    x = torch.cat([cutter(frames[train], source) for _ in range(OFFSETS)])
    held = [Split(windows(frames[index], window).contiguous(), y[index]) for index in (valid, test)]
    facts: dict[str, object] = {"valid": frames[valid], "test": frames[test]}
    classes = int(y.max()) + 1
    return Task(name, Split(x, y[train].repeat(OFFSETS)), held[0], held[1], classes, seed=seed, facts=facts)


def grating_task(seed: int, data_dir: Path | None) -> Task:
    frames, y = gratings(1200, WINDOW + 2, seeded(seed, "gratings"))
    return framed("gratings", frames, y, (700, 200, 300), WINDOW, seed)


def stroke_task(seed: int) -> Task:
    frames, y = strokes(seed)
    return framed("strokes", frames, y, (1200, 100, 497), STROKES_WINDOW, seed)


# Nets and what they are compared with -------------------------------------------------------------------------------------


def grating_net(task: Task, generator: torch.Generator) -> nn.Module:
    """conv5 stride 2, pool, conv, pool, conv, global max: takes any size."""
    return seeded_build(lambda: strided_net(task.num_classes), generator)


def strided_net(classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 12, 5, stride=2, padding=2), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(24, classes),
    )  # fmt: skip


class Blur(nn.Module):
    """A 3x3 binomial filter with stride 2 (BlurPool: Zhang 2019, arXiv 1904.11486)."""

    kernel: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", torch.outer(row, row).expand(channels, 1, 3, 3).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, [1] * 4, mode="reflect"), self.kernel, stride=2, groups=x.shape[1])


@dataclass
class AntiAliased(Treatment):
    """Each stride of `strided_net` as: dense, then blurred on the way down."""

    slug = "anti_aliased"

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        assert isinstance(model, nn.Sequential)
        layers: list[nn.Module] = []
        for layer in model:
            if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2):
                layer.stride = (1, 1)
                layers += [layer, Blur(layer.out_channels)]
            elif isinstance(layer, nn.MaxPool2d):
                layers += [nn.MaxPool2d(2, stride=1), Blur(24 if len(layers) > 6 else 12)]
            else:
                layers.append(layer)
        return nn.Sequential(*layers), task


class FiveCrops(nn.Module):
    """Mean probability over the four corner crops and the centre one."""

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, x: Tensor) -> Tensor:
        far = x.shape[-1] - self.size
        places = ((0, 0), (0, far), (far, 0), (far, far), (far // 2, far // 2))
        crops = [x[:, :, top : top + self.size, left : left + self.size] for top, left in places]
        return torch.stack([self.model(crop).softmax(1) for crop in crops]).mean(0).log()


@dataclass
class FiveCropAverage(Treatment):
    size: int
    slug = "five_crops"

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        return model, task.changed(augment=(*task.augment, RandomCrop((self.size, self.size))))

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        return FiveCrops(model, self.size)


class CentreCrop(nn.Module):
    """The same net on the fixed centre crop."""

    def __init__(self, model: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, x: Tensor) -> Tensor:
        return self.model(windows(x, self.size).contiguous())


# Measuring --------------------------------------------------------------------------------------------------------------


def measure(run: Run) -> Metrics:
    """Over the frames of the test split (of the validation split when tuning): accuracy, consistency, fooled rate, bound."""
    frames = run.task.facts["valid" if run.task.test is run.task.valid else "test"]
    assert isinstance(frames, Tensor)
    labels, window = run.task.test.labels, run.task.test.x.shape[-1]

    def numbers(model: nn.Module, prefix: str = "") -> dict[str, float]:
        report = translation_robustness(model, frames, labels, window=window)
        return {prefix + key: value for key, value in summary(report).items()}

    found = numbers(run.model)
    if not isinstance(run.model, CropSelection):
        return found
    selected, size = run.model, run.model.crop_size
    found |= numbers(CentreCrop(selected.model, size), "center_")
    diagonal, side = (crop_change_bound(window, size, shift) for shift in ((1, 1), (0, 1)))
    certified = selected.certify(frames)
    assert certified is not None
    return {
        **found,
        "bound_consistency": 1 - (diagonal + side) / 2,  # four of the eight shifts are diagonal
        "bound_fooled": crop_fooled_bound(window, size),
        "border_share": selected.border_share(run.task.test.x),
        "uniform_border_share": selected.uniform_border_share(),
        "certified": float(certified.double().mean()),
        "certified_but_fooled": float(translation_robustness(selected, frames, window=window).fooled[certified].sum()),
    }


def summary(report: TranslationReport) -> dict[str, float]:
    assert report.accuracy is not None
    return {
        "accuracy": report.accuracy,
        "consistency": float(report.consistency.mean()),
        "fooled": float(report.fooled.double().mean()),
    }


# The protocol -------------------------------------------------------------------------------------------------------------

GRID = {"lr": (1e-3, 3e-3)}


def stack(*treatments: Treatment) -> Arm:
    return Arm(lambda lr: Stack(treatments, TRAINING.changed(lr=lr)), grid=GRID)


def on_strokes(*treatments: Treatment) -> Arm:
    """An arm of the counter-example."""

    def arm(task: Task, generator: torch.Generator) -> Metrics:
        other = stroke_task(task.seed)
        return measure(fit(grating_net(other, generator), other, TRAINING, treatments))

    return Arm(arm, system=True)


def cyclic(task: Task, generator: torch.Generator) -> Metrics:
    """Cyclic selection: 16 random rolls of each test window must give the very same logits."""
    run = fit(
        grating_net(task, generator),
        task,
        TRAINING.changed(epochs=3),
        (CropSelectionTreatment(crop_size=32, mode="cyclic"),),
    )
    x = task.test.x
    rolls = torch.randint(WINDOW, (16, 2), generator=generator).tolist()
    with torch.no_grad():
        base = run.model(x)
        same = torch.stack([(run.model(x.roll((dy, dx), (2, 3))) == base).all(1) for dy, dx in rolls])
    return {
        "consistency": float(same.double().mean()),
        "accuracy": float((base.argmax(1) == task.test.labels).double().mean()),
    }


def over_center(arm: str, metric: str, sign: float = 1.0) -> Callable[[Mapping[str, Metrics]], float]:
    """The arm's metric minus that of its own net on the centre crop."""
    return lambda arms: sign * (arms[arm][metric] - arms[arm][f"center_{metric}"])


ARMS = {
    "plain": stack(),
    "anti_aliased": stack(AntiAliased()),
    "five_crops_32": stack(FiveCropAverage(32)),
    "selected_32": stack(CropSelectionTreatment(crop_size=32)),
    "selected_24": stack(CropSelectionTreatment(crop_size=24)),
    "cyclic_32": Arm(cyclic, system=True),
    "digits_plain": on_strokes(),
    "digits_selected_32": on_strokes(CropSelectionTreatment(crop_size=32)),
    "digits_selected_26": on_strokes(CropSelectionTreatment(crop_size=26)),
}
CLAIMS = [
    Claim("Crop selection (crop 24) keeps at least 98.5 % of decisions under one-pixel shifts.", "consistency", "selected_24", at_least=0.985),
    Claim("Its consistency is above the bound on the crop's choice.", effect=lambda arms: arms["selected_24"]["consistency"] - arms["selected_24"]["bound_consistency"]),
    Claim("Crop 24: fooled less often than the same net on the centre crop.", effect=over_center("selected_24", "fooled", -1.0)),
    Claim("Crop 32: fooled less often than the same net on the centre crop.", effect=over_center("selected_32", "fooled", -1.0)),
    Claim("Crop 24: accuracy at most 3 points below the same net on the centre crop.", at_least=-0.03, effect=over_center("selected_24", "accuracy")),
    Claim("Crop 24: fooled no more often than the plain net on whole windows (one point).", "fooled", "selected_24", "plain", better="lower", at_least=-0.01),
    Claim("Crop 24: fooled less often than the anti-aliased net.", "fooled", "selected_24", "anti_aliased", better="lower"),
    Claim("Crop 32: accuracy at most 8 points below the plain net.", "accuracy", "selected_32", "plain", at_least=-0.08),
    Claim("No certified image is fooled.", "certified_but_fooled", "selected_24", better="lower", every_seed=True),
    Claim("Cyclic selection is exactly invariant to cyclic shifts.", "consistency", "cyclic_32", at_least=1.0, every_seed=True),
    Claim("Counter-example, digit strokes: crop 26 is fooled less often than the plain net.", "fooled", "digits_selected_26", "digits_plain", better="lower"),
    Claim("Counter-example, digit strokes: crop 26 costs at most 1 point of accuracy.", "accuracy", "digits_selected_26", "digits_plain", at_least=-0.01),
]  # fmt: skip

TRIAL = Trial(
    method="shift/crop_selection",
    tiers={"embedded": Setup(grating_task, ARMS, CLAIMS, grating_net, measure)},
    notes=(
        "The bound is about the selected crop and not about accuracy, and assumes that every position is equally likely to be the best "
        "(compare border_share with uniform_border_share). Crop selection pays when there are many positions and a crop is nearly as "
        "informative as the window; the digit strokes show what happens otherwise."
    ),
)
