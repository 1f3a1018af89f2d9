"""Adaptive smoothing, where a plausible slip would go unseen: losses and attacks by hand, bounds of the certificate on given votes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.adversarial import adaptive_smoothing as a_s
from surefoot.adversarial.adaptive_smoothing import certificate, training
from surefoot.models.networks import seeded_build, small_cnn
from surefoot.nn.smoothing import ABSTAIN, lower_confidence_bound, upper_confidence_bound


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(seed: int = 0) -> nn.Module:
    return seeded_build(lambda: small_cnn((1, 8, 8), 5, widths=(4, 6, 6), linear=8), rng(seed)).double().eval()


def adaptive(**options: Any) -> a_s.AdaptiveSmoothingClassifier:
    mixing = seeded_build(lambda: a_s.MixingNetwork((4, 6), (4, 6), widths=(8,), blocks=1), rng(2)).double()
    names = (("2", "5"), ("2", "5"))
    return a_s.AdaptiveSmoothingClassifier(net(0), net(1), mixing, feature_modules=names, **options).double().eval()


def images(n: int = 8) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 1, 8, 8, generator=rng(), dtype=torch.float64), torch.arange(n) % 5


# --- the attack on the whole ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_attack_on_the_whole_is_its_loop(norm, decay):
    """Example by example: momentum of raw gradients, (1 - w) CE + w BCE(gamma, 1), steps of 2.5 / n, both projections."""
    model, (x, y), eps, steps, w = adaptive(), images(4), torch.tensor([0.05, 0.1, 0.2, 0.3]).double(), 6, 0.3
    eps = eps if norm == "linf" else 4 * eps
    found = a_s.attack_composite(model, x, y, eps=eps, norm=norm, steps=steps, gamma_weight=w, decay=decay, generator=rng(1))  # fmt: skip
    noise = torch.rand(x.shape, generator=rng(1), dtype=torch.float64) * 2 - 1
    for i in range(4):
        image, e = x[i : i + 1], float(eps[i])

        def project(point: Tensor, image: Tensor = image, e: float = e) -> Tensor:
            d = point - image
            d = d.clamp(-e, e) if norm == "linf" else d * min(1.0, e / max(float(d.norm()), 1e-12))
            return (image + d).clamp(0, 1)

        point, past = project(image + e * noise[i : i + 1]), torch.zeros_like(image)
        for _ in range(steps):
            leaf = point.clone().requires_grad_()
            out, gamma, _ = model.mix(leaf)
            loss = (1 - w) * F.nll_loss(out, y[i : i + 1]) - w * torch.sigmoid(gamma).log().sum()
            past = torch.autograd.grad(loss, leaf)[0] + decay * past
            point = project(point + 2.5 / steps * e * (past.sign() if norm == "linf" else past / past.norm()))
        assert torch.allclose(found[i : i + 1], point, atol=1e-8)


def test_training_attacks_are_of_random_strength_objective_and_momentum(monkeypatch):
    model, (x, y), asked = adaptive(momentum=0.1), images(64), []

    def watched(model: Any, x: Tensor, y: Tensor, **settings: Any) -> Tensor:
        asked.append(settings)
        return x

    monkeypatch.setattr(training, "attack_composite", watched)
    a_s.train_mixing_network(model, x, y, eps=0.2, epochs=6, batch_size=16, lr=1e-3, steps=7, generator=rng(3))
    assert len(asked) == 24 and all(call["steps"] == 7 for call in asked)
    radii = torch.stack([call["eps"] for call in asked]) / 0.2
    assert 0.4 <= radii.min() < 0.45 and 1.05 < radii.max() <= 1.1  # eps (0.4 + 0.7 u), one u an example
    assert bool((radii.std(1) > 0.1).all())
    for name, most in (("gamma_weight", 0.4), ("decay", 0.9)):
        drawn = torch.tensor([call[name] for call in asked]) / most
        assert drawn.min() >= 0 and drawn.max() <= 1 and drawn.std() > 0.2


def test_mixing_loss_is_its_equation():
    model, (x, _), y = adaptive(), images(), torch.arange(8) % 5
    moved = (x + 0.1).clamp(0, 1)
    model.train()
    out, gamma, alpha = model.mix(torch.cat([x, moved]))
    p = 1 / (1 + torch.exp(-gamma))
    bce = -torch.cat([(1 - p[:8]).log(), p[8:].log()])  # clean is 0, attacked 1
    ce = -out.gather(1, torch.cat([y, y])[:, None])[:, 0]
    expected = (1.5 * bce + 0.3 * ce + 0.2 * bce * ce).mean()
    loss, (clean_right, moved_right) = training._mixing_loss(model, x, moved, y, (1.5, 0.3, 0.2))
    assert torch.allclose(loss, expected)
    assert clean_right == pytest.approx((gamma[:8] <= 0.4).double().mean().item())
    assert moved_right == pytest.approx((gamma[8:] > 0.4).double().mean().item())
    assert torch.allclose(alpha, p)


def test_alpha_does_not_round_past_an_end():
    """Saturated gammas in float32: low + (high - low) * 1 exceeds high for some ends."""

    class Sure(nn.Module):
        def forward(self, g: Any, h: Any) -> Tensor:
            return torch.where(torch.arange(len(g[0])) % 2 == 0, 1e6, -1e6)[:, None]

    past = 0
    for low, high in ((0.5 + 0.007 * k, 0.9 + 0.0013 * k) for k in range(40)):
        names = (("2", "5"), ("2", "5"))
        model = a_s.AdaptiveSmoothingClassifier(net(0).float(), net(1).float(), Sure(), feature_modules=names, alpha_range=(low, high)).eval()  # fmt: skip
        alpha = model.mix(torch.rand(4, 1, 8, 8))[2]
        ends = torch.tensor([low, high])
        assert alpha.min() >= ends[0] and alpha.max() <= ends[1]
        past += bool(low + (high - low) * torch.ones(()) > ends[1])
    assert past > 0  # the case occurs


# --- TRADES ---------------------------------------------------------------------------------------------------------


def test_trades_is_its_formula_with_its_gradient(monkeypatch):
    """CE(f(x), y) + beta KL(f(x) || f(x')), both sides with gradient; the attack climbs the divergence from f(x) held fixed."""
    model, (x, y), beta, seen = net(), images(), 3.0, {}
    moved = (x + 0.1 * torch.rand(x.shape, generator=rng(4), dtype=torch.float64)).clamp(0, 1)

    def attack(model: nn.Module, x: Tensor, y: Tensor, *, loss: Any, **settings: Any) -> Tensor:
        seen.update(loss=loss, **settings)
        return moved

    monkeypatch.setattr(training, "pgd_train", attack)
    ours = a_s.trades_loss(model, x, y, eps=0.1, beta=beta, steps=4, generator=rng())
    p, q = model(x).softmax(1), model(moved).softmax(1)
    expected = -p.gather(1, y[:, None]).log().mean() + beta * (p * (p.log() - q.log())).sum(1).mean()
    assert torch.allclose(ours, expected)
    for a, b in zip(torch.autograd.grad(ours, list(model.parameters())), torch.autograd.grad(expected, list(model.parameters()))):  # fmt: skip
        assert torch.allclose(a, b, atol=1e-12)
    logits = torch.randn(8, 5, generator=rng(5), dtype=torch.float64)
    climbed = (p.detach() * (p.detach().log() - logits.log_softmax(1))).sum(1)
    assert torch.allclose(seen["loss"](logits, y), climbed) and seen["steps"] == 4


# --- the certificate ------------------------------------------------------------------------------------------------


def test_certificate_from_given_votes(monkeypatch):
    """The class from the first draws, every bound from the second ones, half of the level for the top and half for all rivals."""
    n0, n, level, alpha, sigma = 10, 1000, 0.01, 0.8, 0.5
    few = torch.tensor([[9, 1, 0, 0], [0, 9, 1, 0], [4, 3, 3, 0]])
    many = torch.tensor([[930, 30, 40, 0], [980, 10, 5, 5], [400, 300, 300, 0]])  # the second one's classes disagree
    feed = iter((few, many))
    monkeypatch.setattr(certificate, "vote_counts", lambda model, x, count, **_: next(feed))
    monkeypatch.setattr(certificate, "check_deterministic", lambda model, x: None)
    found = a_s.certify_mixed(nn.Identity(), torch.zeros(3, 4), alpha=alpha, sigma=sigma, num_classes=4, generator=rng(), n0=n0, n=n, level=level)  # fmt: skip
    chosen, rivals = torch.tensor([930, 10, 400]), torch.tensor([40, 980, 300])
    low = lower_confidence_bound(chosen, n, level / 2)
    high = upper_confidence_bound(rivals, n, level / 2 / 3)
    radius = a_s.mixed_radius(low, high, alpha, sigma=sigma)
    assert torch.allclose(found.radius, radius) and torch.allclose(found.p_lower, low)
    assert found.prediction.tolist() == [0, ABSTAIN, ABSTAIN] and radius[0] > 0 and found.draws.tolist() == [1010] * 3


# --- the premise ----------------------------------------------------------------------------------------------------


def test_the_gap_is_right_under_attack_over_wrong_on_clean():
    logits = torch.tensor([[6.0, 0.0, 0.0], [0.0, 0.5, 0.0], [2.0, 0.0, 0.0]])  # right, wrong, right
    weaker = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    y = torch.zeros(3, dtype=torch.int64)

    class Echo(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    report = a_s.confidence_gap(Echo().eval(), [(logits, y)], lambda m, x, t: weaker)

    def size(row: Tensor) -> float:
        top = row.double().softmax(0).topk(2).values
        return (top[0] - top[1]).item()

    assert report.right_clean == pytest.approx((size(logits[0]) + size(logits[2])) / 2)
    assert report.right_attacked == pytest.approx((size(weaker[0]) + size(weaker[2])) / 2)
    assert report.gap == pytest.approx(report.right_attacked / size(logits[1]))


def test_fit_alpha_takes_an_order_statistic_and_does_not_interpolate():
    """Between two margins lies no example: an interpolated quantile would spend more than the budget."""
    margins = torch.tensor([0.1, 0.5, 0.9, -0.3])
    assert a_s.fit_alpha(margins, budget=0.34) == pytest.approx(1 / 1.5)  # one of three may go
    assert a_s.fit_alpha(margins, budget=0.32) == pytest.approx(1 / 1.1)  # none may


def test_amplified_is_its_equation():
    logits = torch.randn(20, 5, generator=rng(6), dtype=torch.float64)
    model = a_s.Amplified(nn.Identity().eval(), scale=2.0, power=3.0, shift=0.3)
    z = (logits - logits.mean(1, keepdim=True)) / (logits.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() + 0.3
    c = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
    assert bool((c < 0).any()) and torch.allclose(model(logits), 2.0 * c.sign() * c.abs() ** 3)
