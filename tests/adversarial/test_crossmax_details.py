"""CrossMax, where a plausible slip would go unseen: what the report asks of the attacks, the averaged stand-in, probes one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.adversarial import crossmax as cm
from surefoot.adversarial.crossmax import evaluation
from surefoot.adversarial.crossmax.inputs import brightness
from surefoot.models.networks import seeded_build, small_cnn
from surefoot.nn.attacks import AttackResult, SuiteResult
from surefoot.nn.taps import tapped


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(seed: int = 0) -> nn.Module:
    return seeded_build(lambda: small_cnn((1, 8, 8), 4, widths=(4, 6, 6), linear=8), rng(seed)).eval()


def ensemble(random: bool = False) -> cm.SelfEnsemble:
    x, model, layers = torch.rand(4, 1, 8, 8, generator=rng()), net(), ["2", "5"]
    if random:
        inputs = cm.MultiResolutionInput((8, 4), jitter=1, generator=rng(1))
        model = cm.MultiResolutionClassifier(inputs, cm.widen_first_conv(model, 2)).eval()
        layers = ["network.2", "network.5"]
    return seeded_build(lambda: cm.SelfEnsemble(model, layers, 4, example=x), rng(2)).eval()


# --- aggregation ----------------------------------------------------------------------------------------------------


def test_the_stand_in_is_the_mean_of_log_probabilities_and_not_of_logits():
    z = 3 * torch.randn(20, 5, 6, generator=rng(), dtype=torch.float64)
    assert torch.allclose(cm.mean_log_probs(z), torch.stack([z[:, n].softmax(1).log() for n in range(5)]).mean(0))
    assert not torch.allclose(cm.mean_log_probs(z), z.mean(1), atol=0.1)


def test_averaged_is_the_log_of_the_mean_probability():
    draws = 2 * torch.randn(3, 7, 5, generator=rng(), dtype=torch.float64)
    feed = iter(draws)

    class Scripted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return next(feed)

    ours = evaluation.Averaged(Scripted(), 3)(torch.zeros(7, 1))
    assert torch.allclose(ours, draws.softmax(2).mean(0).log())


# --- the input, step by step ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["uniform", "normal"])
def test_the_whole_input_against_a_loop_over_images_with_the_same_draws(noise):
    """Every alteration at once, in the paper's order, with overshoot kept until the end."""
    sizes, x = (8, 4), torch.rand(5, 3, 8, 8, generator=rng(), dtype=torch.float64)
    ours = cm.MultiResolutionInput(sizes, jitter=2, noise=noise, down_noise=0.1, up_noise=0.15, generator=rng(3))(x)
    source, kind = rng(3), torch.rand if noise == "uniform" else torch.randn

    def draw(of: Any, *shape: int) -> Tensor:
        return of(*shape, generator=source, dtype=torch.float64)

    copies, cut = [], False
    for size in sizes:
        shift = (draw(torch.rand, 5, 2) * 5).floor().long() - 2
        grey = 0.5 + 0.5 * draw(torch.rand, 5, 1, 1, 1)
        contrast = 0.7 + 0.8 * draw(torch.rand, 5, 1, 1, 1)
        below, above = draw(kind, 5, 3, size, size), draw(kind, 5, 3, 8, 8)
        made = []
        for i in range(5):
            image, mean = x[i : i + 1], brightness(x[i : i + 1])
            image = contrast[i] * (image - mean) + mean
            image = torch.roll(image, tuple(shift[i].tolist()), (2, 3))
            image = grey[i] * image + (1 - grey[i]) * image.mean(1, keepdim=True)
            image = F.interpolate(image, (size, size), mode="bicubic") if size < 8 else image
            cut = cut or bool((image < 0).any() | (image > 1).any())
            image = image + 0.1 * below[i]
            image = F.interpolate(image, (8, 8), mode="bicubic") if size < 8 else image
            made.append((image + 0.15 * above[i]).clamp(0, 1))
        copies.append(torch.cat(made))
    assert torch.allclose(ours, torch.cat(copies, 1), atol=1e-12)
    assert cut  # clipping in the middle would show


# --- probes ---------------------------------------------------------------------------------------------------------


def test_a_probes_first_step_is_adams_on_its_own_cross_entropy():
    """Features come from the backbone in evaluation mode, probes normalise by their batch, and no probe hears of another."""
    model, x, y = ensemble(), torch.rand(16, 1, 8, 8, generator=rng(4)), torch.arange(16) % 4
    before = [p.detach().clone() for p in model.probes[0].parameters()]
    probe: Any = model.probes[0]
    with torch.no_grad():
        feature = tapped(model.backbone.eval(), model.layers, x)[1][0].flatten(1)
    weight, bias = probe.linear.weight.detach().clone().requires_grad_(), probe.linear.bias.detach()
    normal = (feature - feature.mean(0)) / (feature.var(0, unbiased=False) + 1e-5).sqrt()
    loss = F.cross_entropy(normal @ weight.T + bias, y)
    (slope,) = torch.autograd.grad(loss, weight)
    cm.fit_probes(model, x, y, epochs=1, lr=1e-3, batch_size=16, generator=rng(5))
    moved = probe.linear.weight.detach() - before[2]
    clear = slope.abs() > 1e-4
    assert clear.double().mean() > 0.5
    assert torch.allclose(moved[clear], -1e-3 * slope.sign()[clear], rtol=1e-2)


# --- the report -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("random", [True, False])
def test_what_the_report_asks_of_each_attack(random, monkeypatch):
    model, x, y = ensemble(random), torch.rand(5, 1, 8, 8, generator=rng(6)), torch.arange(5) % 4
    asked: dict[str, dict[str, Any]] = {}
    nothing = AttackResult(x, torch.zeros(5, dtype=torch.bool), torch.zeros(5), 5)

    def named(name: str, answer: Any) -> Any:
        def call(model: Any, x: Tensor, y: Tensor, **settings: Any) -> Any:
            asked[name] = settings
            return answer(x)

        return call

    all_right = torch.ones(5, dtype=torch.bool)
    survivors = {"rand_suite": all_right, "adaptive_suite": torch.tensor([True, True, True, True, False])}
    for name in ("pgd_train", "apgd", "square"):
        monkeypatch.setattr(evaluation, name, named(name, lambda x, n=name: x if n == "pgd_train" else nothing))
    for name, robust in survivors.items():
        monkeypatch.setattr(evaluation, name, named(name, lambda x, r=robust: SuiteResult(x, all_right, r, {}, 0)))
    judged = []

    def decide(model: Any, points: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        judged.append(settings["draws"])
        return y, y[None]

    monkeypatch.setattr(evaluation, "decide", decide)
    other = net(3)
    report = cm.evaluate_crossmax(
        model, x, y, eps=0.1, steps=6, eot=7, adaptive_steps=9, restarts=2, queries=11, draws=5, masking=0,
        components=(other,), generator=rng(),
    )  # fmt: skip
    draws = 5 if random else 1
    assert judged == [draws] * 4  # clean, PGD, APGD, Square: each by majority
    assert asked["rand_suite"]["eot"] == asked["adaptive_suite"]["eot"] == (7 if random else 1)
    assert asked["adaptive_suite"]["draws"] == draws and asked["rand_suite"]["draws"] == max(draws, 2)
    assert asked["adaptive_suite"]["steps"] == 9 and asked["adaptive_suite"]["restarts"] == 2
    assert asked["square"]["early_stop"] is not random and asked["apgd"]["early_stop"] is False
    head, given = asked["adaptive_suite"]["components"]
    assert given is other
    assert (head.model if random else head) is model.backbone
    surrogate = asked["adaptive_suite"]["surrogate"]
    smooth = surrogate.model if random else surrogate
    assert smooth.aggregate is cm.mean_log_probs and smooth.backbone is model.backbone
    assert report.robust.tolist() == [True] * 4 + [False]
    assert report.accuracies["all together"] == 0.8
