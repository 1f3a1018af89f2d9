"""`more_steps` must stay silent on an honest undefended net and speak on one that hides its gradient in noise or ripples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surefoot.core.task import Training
from surefoot.datasets.embedded import digits
from surefoot.models import seeded_build, small_cnn
from surefoot.nn.attacks import masking_diagnostics, pgd
from surefoot.nn.attacks.diagnostics import COARSE, FALSE_ALARM, POINT
from surefoot.nn.smoothing import lower_confidence_bound
from surefoot.training.loop import fit


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def undefended() -> tuple[nn.Module, Tensor, Tensor]:
    task = digits(0, sizes=(1000, 197, 600))
    start = seeded_build(lambda: small_cnn((1, 8, 8), 10), generator())
    model = fit(start, task, Training(epochs=10, lr=3e-3)).model.eval()
    return model, task.test.x[:100], task.test.labels[:100]


def checks(model: Any, x: Tensor, y: Tensor, eps: float) -> dict[str, Any]:
    report = masking_diagnostics(model, x, y, eps=eps, queries=20, generator=generator(1))
    return {check.name: check for check in report.checks}


@pytest.mark.parametrize("eps", [0.02, 0.05, 0.08, 0.1, 0.15])
def test_an_honest_undefended_net_raises_no_alarm(undefended: tuple[nn.Module, Tensor, Tensor], eps: float):
    model, x, y = undefended
    found = checks(model, x, y, eps)
    assert not found["more_steps"].suspicious
    lengths = found["more_steps"].numbers
    assert lengths["steps 20"] >= lengths["steps 100"]


def test_coarse_steps_leave_some_honest_examples_over(undefended):
    """What a threshold of two examples in a hundred would call masking: 100 steps break more than 20 on this very net."""
    model, x, y = undefended
    accuracy = {
        steps: 1 - pgd(model, x, y, eps=0.1, steps=steps, random_start=False).broken.double().mean().item()
        for steps in (20, 100)
    }
    assert accuracy[20] - accuracy[100] >= 0.02
    assert not checks(model, x, y, 0.1)["more_steps"].suspicious


class Shattered(torch.autograd.Function):
    """The identity, with a gradient ten times as loud as the true one laid over it: the same noise at the same point."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        seed = int(gradient.abs().sum().item() * 1e6) % 2**31
        return gradient + 10 * gradient.abs().mean() * torch.randn(gradient.shape, generator=generator(seed))


def test_a_shattered_gradient_raises_it(undefended):
    model, x, y = undefended
    found = checks(lambda z: model(Shattered.apply(z)), x, y, 0.15)["more_steps"]
    assert found.suspicious
    assert not checks(model, x, y, 0.15)["more_steps"].suspicious


def test_ripples_in_the_input_raise_it(undefended):
    model, x, y = undefended
    found = checks(lambda z: model(z + 0.05 * torch.sin(300 * z)), x, y, 0.15)["more_steps"]
    assert found.suspicious
    assert found.numbers["steps 20"] - found.numbers["steps 100"] > 0.2


@pytest.mark.parametrize(("late", "alarm"), [(11, False), (12, True)])
def test_the_marks_are_those_of_the_exact_limit(late, alarm, monkeypatch):
    """`late` of 100 examples fall at the first lengthening: 12 is the least count whose exact limit exceeds five points."""
    import surefoot.nn.attacks.diagnostics as module

    def attack(model: Any, x: Tensor, y: Tensor, *, steps: int, **_: Any) -> Any:
        moved = x.clone()
        if steps == 80:
            moved[:, 1] = torch.where(x[:, 0] < late / 100, 1.0, x[:, 1])
        result = pgd(lambda z: z, x, y, eps=0.0, steps=1, bounds=None)
        return type(result)(moved, result.broken, result.loss, 0)

    monkeypatch.setattr(module, "pgd", attack)
    x = torch.stack([torch.arange(100) / 100, torch.zeros(100)], 1)
    lab = module._Lab(lambda z: torch.stack([0.5 - z[:, 1], z[:, 1] - 0.5], 1), x, torch.zeros(100, dtype=torch.int64),
                      {"norm": "linf", "bounds": None, "generator": generator()})  # fmt: skip
    lengths, hidden = lab.lengthened(0.1, 20)
    assert hidden is alarm
    assert lengths[100] == pytest.approx(1 - late / 100)
    assert (lower_confidence_bound(torch.tensor(late), 100, FALSE_ALARM).item() > COARSE) is alarm


def test_a_true_gain_of_one_point_is_called_masking_at_most_once_in_a_hundred():
    """The second mark by the binomial law itself: the chance of a limit above the point, when the point is the truth."""
    for n in (50, 100, 200, 500):
        counts = torch.arange(n + 1)
        raised = lower_confidence_bound(counts, n, FALSE_ALARM) > POINT
        law = torch.distributions.Binomial(n, torch.tensor(POINT, dtype=torch.float64))
        chance = law.log_prob(counts.double()).exp()[raised].sum().item()
        assert 0 < chance <= FALSE_ALARM


def test_what_is_wrong_without_an_attack_stays_wrong() -> None:
    """A net that errs on the examples as they are and nowhere else: a random start repairs them all, and no attack may be credited with that."""
    x, y = torch.full((12, 1, 6, 6), 0.5), torch.zeros(12, dtype=torch.int64)

    def model(z: Tensor) -> Tensor:
        moved = ((z - 0.5).abs().flatten(1).amax(1) > 1e-4).to(z)
        return torch.stack([moved, 0.5 + 0 * z.flatten(1).sum(1)], 1)

    report = masking_diagnostics(model, x, y, eps=0.1, steps=4, queries=20, generator=torch.Generator().manual_seed(0))
    numbers = {check.name: check.numbers for check in report.checks}
    assert numbers["black_box"]["square"] == 0.0 and numbers["large_radius"]["accuracy"] == 0.0
    assert not next(check for check in report.checks if check.name == "large_radius").suspicious
