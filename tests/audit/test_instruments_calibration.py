"""Calibration: exact values by hand, and an interval whose coverage is measured."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from surefoot.audit.instruments.calibration import PER_BIN, Calibration, calibration_error
from surefoot.contracts import check_instrument
from surefoot.core.finding import Chart
from surefoot.core.subject import Subject
from surefoot.core.task import Split, Task
from surefoot.errors import InvalidInput


def test_two_bins_by_hand():
    confidence = np.r_[np.full(40, 0.6), np.full(40, 0.9)]
    correct = np.r_[np.ones(20), np.zeros(20), np.ones(38), np.zeros(2)]
    found = calibration_error(confidence, correct, bins=2)
    assert found.value == pytest.approx(0.5 * abs(0.6 - 0.5) + 0.5 * abs(0.9 - 0.95))
    assert found.counts.tolist() == [40, 40]
    np.testing.assert_allclose(found.accuracy, [0.5, 0.95])
    deviation = np.sqrt([22 / 44 * 22 / 44 / 40, 40 / 44 * 4 / 44 / 40])
    spread = 0.5 * np.sqrt((deviation**2).sum())
    assert found.high == pytest.approx(found.value + 1.959964 * spread)
    assert found.low == 0.0
    assert found.chance == pytest.approx(np.sqrt(2 / np.pi) * 0.5 * (np.sqrt(0.24 / 40) + np.sqrt(0.09 / 40)))


def test_a_systematic_gap_is_bounded_from_below_by_itself():
    n = 4000
    found = calibration_error(np.full(n, 0.95), np.r_[np.ones(n * 8 // 10), np.zeros(n * 2 // 10)][np.random.default_rng(0).permutation(n)])  # fmt: skip
    assert found.low > 0.15 - 2.3 * (0.16 / n) ** 0.5
    assert found.low <= 0.15 <= found.high


def test_small_samples_have_fewer_bins():
    for n, bins in ((5, 1), (PER_BIN * 3, 3), (10_000, 15)):
        assert len(calibration_error(np.full(n, 0.5), np.ones(n)).counts) == bins


def _worlds():
    """Confidences and the true chance of being right: calibrated, too sure, nearly perfect, and wrong in both directions."""
    return {
        "calibrated": lambda r, n: (c := 0.3 + 0.7 * r.beta(4, 1, n), c),
        "too sure": lambda r, n: (c := 0.3 + 0.7 * r.beta(4, 1, n), c**2),
        "nearly perfect": lambda r, n: (c := 1 - 0.05 * r.beta(1, 3, n), 1 - 0.4 * (1 - c)),
        "both ways": lambda r, n: (c := r.uniform(0.3, 1, n), np.clip(c + 0.1 * np.sign(c - 0.65), 0, 1)),
        "saturated": lambda r, n: (np.ones(n), np.full(n, 0.985)),
        "coin": lambda r, n: (np.full(n, 0.55), np.full(n, 0.5)),
    }


def _coverage(world: str, n: int, repeats: int) -> tuple[float, float, float]:
    """Share of intervals that hold the true binned error of their confidences; share of misses above and below."""
    random, above, below = np.random.default_rng(n), 0, 0
    for _ in range(repeats):
        confidence, chance = _worlds()[world](random, n)
        found = calibration_error(confidence, (random.random(n) < chance).astype(float))
        groups = np.array_split(np.argsort(confidence, kind="stable"), len(found.counts))
        truth = sum(len(g) / n * abs((confidence[g] - chance[g]).mean()) for g in groups)
        above += truth > found.high
        below += truth < found.low
    return 1 - (above + below) / repeats, above / repeats, below / repeats


@pytest.mark.slow
@pytest.mark.parametrize("n", [60, 300, 2000])
@pytest.mark.parametrize("world", _worlds())
def test_interval_covers(world, n):
    repeats = 1500
    covered, above, below = _coverage(world, n, repeats)
    assert covered >= 0.95 - 3 * (0.95 * 0.05 / repeats) ** 0.5
    assert max(above, below) <= 0.025 + 3 * (0.025 * 0.975 / repeats) ** 0.5


def test_the_usual_bootstrap_would_not_cover():
    """What the interval is for: around a calibrated model the plug-in estimate lies above the truth nearly always."""
    random, high = np.random.default_rng(0), 0
    for _ in range(100):
        confidence = 0.3 + 0.7 * random.beta(4, 1, 300)
        correct = (random.random(300) < confidence).astype(float)
        found = calibration_error(confidence, correct)
        groups = np.array_split(np.argsort(confidence, kind="stable"), 15)
        boot = [
            sum(
                len(g) / 300 * abs((confidence[s] - correct[s]).mean())
                for g in groups
                for s in [random.choice(g, len(g))]
            )
            for _ in range(60)
        ]
        high += np.quantile(boot, 0.025) > 0.0  # the truth is exactly 0
        assert found.low == 0.0
    assert high > 90


class Two(nn.Module):
    """Logits (x, 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.one * x[:, 0], torch.zeros_like(x[:, 0])], 1)


def test_parts_by_hand():
    x = torch.log(torch.tensor([9.0, 9.0, 9.0, 0.25]))[:, None]  # p = .9, .9, .9, .2
    split = Split(x, torch.tensor([0, 0, 1, 1]))
    task = Task("toy", split, split, split, 2, "vector", None)
    found = Calibration().measure(Subject(Two(), "toy", "vector", (1,), 2, None), task)
    gap, loss, brier = found.parts
    assert gap.samples is not None
    np.testing.assert_allclose(gap.samples, [-0.1, -0.1, 0.9, -0.2], atol=1e-6)
    assert gap.value == pytest.approx((0.9 * 3 + 0.8) / 4 - 0.75)
    assert loss.value == pytest.approx(-np.mean(np.log([0.9, 0.9, 0.1, 0.8])), abs=1e-6)
    assert brier.value == pytest.approx(np.mean([0.02, 0.02, 1.62, 0.08]), abs=1e-6)
    assert found.value == pytest.approx(gap.value)  # one bin
    assert found.better == "lower"
    chart = found.pictures[0]
    assert isinstance(chart, Chart) and chart.figure["data"][1]["y"] == [0.75]


def test_bad_input_is_one_clear_sentence():
    with pytest.raises(InvalidInput, match="one length"):
        calibration_error(np.ones(3), np.ones(2))
    with pytest.raises(InvalidInput, match=r"\[0, 1\]"):
        calibration_error(np.full(3, 1.2), np.ones(3))
    with pytest.raises(InvalidInput, match="bins"):
        calibration_error(np.ones(3), np.ones(3), bins=0)
    with pytest.raises(InvalidInput, match="level"):
        calibration_error(np.ones(3), np.ones(3), level=1.0)


def test_contract():
    from surefoot.datasets.embedded import digits
    from surefoot.models import small_cnn

    task = digits(0, sizes=(64, 32, 64)).changed(budget="quick")
    check_instrument(
        Calibration(), Subject(small_cnn(task.input_shape, 10), "digits", "image", task.input_shape, 10), task
    )
