"""How often does moving the camera by one pixel change the decision? The measurement, and its instrument.

From a frame larger than the network's input, windows are cut at an offset o and at o + delta: new pixels enter on one side, old ones
leave on the other. No zero padding, no wrap-around, no interpolation; a resize, if any, comes before the cutting.

    consistency_i = mean over delta of [f(window(o)) = f(window(o + delta))]         fooled_i = [some delta changes f]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.core.finding import Chart, Finding, Thumbnails
from surefoot.core.instrument import Instrument
from surefoot.core.statistics import mean_interval
from surefoot.core.subject import Subject, predict
from surefoot.core.task import Task
from surefoot.errors import check, check_at_least, check_choice
from surefoot.shift.crop_selection.selection import Mode, Size, as_pair

Neighbourhood = Literal["4", "8"]
Shift = tuple[int, int]


@dataclass(frozen=True)
class TranslationReport:
    """Per example: agreement of the shifted windows with the centre one, and the cosine of their outputs."""

    shifts: tuple[Shift, ...]  # D of them, (dy, dx)
    agrees: Tensor  # bool [n, D]
    cosine: Tensor  # float64 [n, D]
    centre: Tensor  # [n, K], the outputs for the centre windows
    accuracy: float | None = None  # of the centre windows
    changed: Tensor | None = None  # bool [n, D], with embedding=True: cosine below the threshold

    @property
    def consistency(self) -> Tensor:  # float64 [n]
        return self.agrees.double().mean(1)

    @property
    def fooled(self) -> Tensor:  # bool [n]
        return ~self.agrees.all(1)


def shifts_within(max_shift: int, neighbourhood: Neighbourhood = "8") -> tuple[Shift, ...]:
    """All (dy, dx) other than (0, 0) of at most `max_shift` an axis; "4" only along the axes."""
    check_at_least("max_shift", max_shift, 1)
    check_choice("neighbourhood", neighbourhood, ("4", "8"))
    span = range(-max_shift, max_shift + 1)
    return tuple(
        (dy, dx) for dy in span for dx in span if (dy, dx) != (0, 0) and (neighbourhood == "8" or 0 in (dy, dx))
    )


def windows(
    frames: Tensor,  # [N, C, H', W']
    window: Size,
    shift: Shift = (0, 0),
    mode: Mode = "realistic",
) -> Tensor:  # [N, C, H, W]
    """The centre window moved by `shift`; "cyclic" rolls the centre window instead."""
    height, width = as_pair("window", window)
    top, left = (frames.shape[2] - height) // 2, (frames.shape[3] - width) // 2
    if mode == "cyclic":
        return frames[:, :, top : top + height, left : left + width].roll((-shift[0], -shift[1]), (2, 3))
    check(
        0 <= top + shift[0] <= frames.shape[2] - height and 0 <= left + shift[1] <= frames.shape[3] - width,
        f"The frame {frames.shape[2]}x{frames.shape[3]} is smaller than the window {height}x{width} moved by {shift}; give larger frames.",
    )
    return frames[:, :, top + shift[0] : top + shift[0] + height, left + shift[1] : left + shift[1] + width]


def translation_robustness(
    model: nn.Module,
    frames: Tensor,  # [N, C, H', W'], at least window + 2 * max_shift (realistic)
    labels: Tensor | None = None,  # int64 [N]
    *,
    window: Size,
    max_shift: int = 1,
    mode: Mode = "realistic",
    neighbourhood: Neighbourhood = "8",
    embedding: bool = False,
    threshold: float = 0.95,
    batch_size: int = 512,
) -> TranslationReport:
    """Compare the model's outputs on the centre window of each frame with those on the windows around it.

    `embedding=True` says that the outputs are embeddings: a cosine below `threshold` counts as a change, top-1 means nothing then.
    The model is left as it was. Errors: `InvalidInput` for frames too small, not finite or without examples.
    """
    check_choice("mode", mode, ("realistic", "cyclic"))
    check(frames.dim() == 4 and len(frames) > 0, f"frames must be [N, C, H, W] with N > 0, got {list(frames.shape)}.")
    check(bool(frames.isfinite().all()), "frames must be finite, got NaN or infinity.")
    check(labels is None or len(labels) == len(frames), f"There are {len(frames)} frames and {0 if labels is None else len(labels)} labels.")  # fmt: skip
    height, width = as_pair("window", window)
    need = 0 if mode == "cyclic" else 2 * max_shift
    check(
        frames.shape[2] >= height + need and frames.shape[3] >= width + need,
        f"Frames of {frames.shape[2]}x{frames.shape[3]} are too small for windows of {height}x{width} and shifts of {max_shift}; "
        f"{height + need}x{width + need} is needed.",
    )
    shifts = shifts_within(max_shift, neighbourhood)
    centre = predict(model, windows(frames, window, mode=mode), batch_size)
    check(centre.dim() == 2, f"The model must return [B, K], got {list(centre.shape)}.")
    top = centre.argmax(1)
    agrees, cosines = [], []
    for shift in shifts:
        moved = predict(model, windows(frames, window, shift, mode), batch_size)
        agrees.append(moved.argmax(1) == top)
        cosines.append(F.cosine_similarity(moved.double(), centre.double(), dim=1))
    cosine = torch.stack(cosines, 1)
    accuracy = None if labels is None or embedding else (top == labels.cpu()).double().mean().item()
    changed = cosine < threshold if embedding else None
    return TranslationReport(shifts, torch.stack(agrees, 1), cosine, centre, accuracy, changed)


@dataclass
class TranslationConsistency(Instrument):
    """Share of 1-pixel camera motions (8 directions) that leave the decision as it was.

    Test images larger than the model's input serve as frames; others are enlarged by 2 * max_shift pixels first, and windows
    of the model's size are cut from that, so that every shift brings in real pixels.
    """

    max_shift: int = 1
    batch_size: int = 512

    slug = "translation_consistency"
    title = "Consistency under one-pixel shifts"
    needs_labels = False
    modalities = ("image",)
    fix = ("crop_selection",)

    def __post_init__(self) -> None:
        check_at_least("max_shift", self.max_shift, 1)
        check_at_least("batch_size", self.batch_size, 1)

    def measure(self, subject: Subject, task: Task) -> Finding:
        sample = task.sample(self.slug, task.pick(quick=128, standard=500, thorough=2000))
        check(len(sample) > 0, "test is empty; translation_consistency needs at least one image.")
        check(sample.x.dim() == 4, f"translation_consistency needs images [N, C, H, W], got {list(sample.x.shape)}.")
        window = (subject.input_shape[1], subject.input_shape[2])
        frames, enlarged = frames_of(sample.x, window, self.max_shift)
        report = translation_robustness(
            subject.model, frames, window=window, max_shift=self.max_shift, batch_size=self.batch_size
        )
        values = report.consistency.numpy()
        n, value = len(values), float(values.mean())
        low, high = mean_interval(values, bounds=(0.0, 1.0))
        fooled = self._part("Fooled by some shift", report.fooled.double().numpy(), "lower", (0.0, 1.0), "share of images whose decision some one-pixel shift changes")  # fmt: skip
        cosine = self._part("Cosine of the logits", report.cosine.mean(1).clamp(-1, 1).numpy(), "higher", (-1.0, 1.0), "mean cosine of the logits before and after a shift")  # fmt: skip
        pixels = "one pixel" if self.max_shift == 1 else f"up to {self.max_shift} pixels"
        return Finding(
            self.slug, self.title, value, low, high, "share", "higher", n,
            f"{value:.1%} of camera motions by {pixels} leave the decision as it was; some motion changes it for {fooled.value:.1%} of images.",
            samples=values, parts=(fooled, cosine), pictures=_pictures(report, frames, window, subject),
            fix=self.fix, details={"max_shift": self.max_shift, "shifts": len(report.shifts), "enlarged": enlarged},
        )  # fmt: skip

    def _part(self, name: str, values: np.ndarray, better: Literal["higher", "lower"], bounds: tuple[float, float], what: str) -> Finding:  # fmt: skip
        low, high = mean_interval(values, bounds=bounds)
        value = float(values.mean())
        unit = "share" if better == "lower" else "cosine"
        return Finding(
            self.slug, name, value, low, high, unit, better, len(values), f"{value:.3f} {what}.", samples=values
        )


def frames_of(x: Tensor, window: tuple[int, int], max_shift: int) -> tuple[Tensor, bool]:
    """Images as frames: as they are where there is room for the shifts, else enlarged (bilinear) to just that."""
    size = (window[0] + 2 * max_shift, window[1] + 2 * max_shift)
    if x.shape[2] >= size[0] and x.shape[3] >= size[1]:
        return x, False
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False), True


def _pictures(
    report: TranslationReport, frames: Tensor, window: tuple[int, int], subject: Subject
) -> tuple[Chart | Thumbnails, ...]:
    """Kept decisions by direction, and the images that change most often."""
    kept = report.agrees.double().mean(0).tolist()
    labels = [f"{dy:+d}, {dx:+d}" for dy, dx in report.shifts]
    layout = {
        "xaxis": {"title": {"text": "shift (down, right) in pixels"}},
        "yaxis": {"title": {"text": "decisions kept"}},
    }
    chart = Chart(
        {"data": [{"type": "bar", "x": labels, "y": kept}], "layout": layout}, "Decisions kept, by direction."
    )
    worst = [i for i in report.consistency.argsort(stable=True)[:6].tolist() if not bool(report.agrees[i].all())]
    if not worst or frames.shape[1] not in (1, 3):
        return (chart,)
    low, high = subject.bounds or (float(frames.min()), float(frames.max()))
    shown = ((windows(frames[worst], window) - low) / max(high - low, 1e-12)).clamp(0, 1).mul(255).round().byte()
    images = shown[:, 0] if shown.shape[1] == 1 else shown.permute(0, 2, 3, 1)
    names = subject.class_names or tuple(map(str, range(report.centre.shape[1])))
    decided = report.centre.argmax(1)
    captions = tuple(
        f"{names[int(decided[i])]}: {int((~report.agrees[i]).sum())} of {len(report.shifts)} shifts change it"
        for i in worst
    )
    return chart, Thumbnails(images.cpu().numpy(), captions, "The images whose decision changes most often.")
