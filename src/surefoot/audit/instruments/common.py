"""What the instruments of the audit share: checked logits, and numbers and pictures in one style."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from surefoot.core.finding import Finding
from surefoot.core.statistics import mean_interval
from surefoot.core.subject import Subject, predict
from surefoot.errors import check
from surefoot.nn.attacks.run import attacking


def device_of(subject: Subject, x: Tensor) -> torch.device:
    parameter = next(subject.model.parameters(), None)
    return x.device if parameter is None else parameter.device


def logits(
    subject: Subject,
    x: Tensor,  # [N, ...] raw scale
    generator: torch.Generator,
) -> Tensor:  # float64 [N, K] on the CPU
    """Logits in evaluation mode, refused where they are NaN or of another shape; a random model draws from `generator`."""
    check(len(x) > 0, "There are no test examples to measure on; give more data.")
    with attacking(subject.model, "eval", generator, device_of(subject, x)):
        found = predict(subject.model, x)
    shape = (len(x), subject.num_classes)
    check(tuple(found.shape) == shape, f"The model must return logits {list(shape)}, got {list(found.shape)}.")
    check(not bool(found.isnan().any()), "The model returns NaN logits; look at its weights and input range first.")
    return found.double()


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def between(finding_low: float, finding_high: float) -> str:
    return f"95 % interval {100 * finding_low:.1f} to {100 * finding_high:.1f} %"


def share(
    instrument: str,
    name: str,
    samples: Tensor,  # [n] in [0, 1]
    sentence: str,
) -> Finding:
    """A part: the mean of values in [0, 1], higher is better."""
    values = samples.double().cpu().numpy()
    low, high = mean_interval(values, bounds=(0.0, 1.0))
    return Finding(
        instrument, name, float(values.mean()), low, high, "accuracy", "higher", len(values), sentence, samples=values
    )


def class_name(subject: Subject, label: int) -> str:
    return subject.class_names[label] if label < len(subject.class_names) else str(label)


def can_show(x: Tensor) -> bool:
    return x.dim() == 4 and x.shape[1] in (1, 3)


def to_pixels(
    x: Tensor,  # [N, C, H, W], C = 1 or 3
    bounds: tuple[float, float] | None,
) -> np.ndarray:  # uint8 [N, H, W, 3] or [N, H, W]
    low, high = bounds or (float(x.min()), float(x.max()) + 1e-9)
    pixels = ((x.detach().cpu().double() - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels[:, 0].numpy() if x.shape[1] == 1 else pixels.permute(0, 2, 3, 1).contiguous().numpy()
