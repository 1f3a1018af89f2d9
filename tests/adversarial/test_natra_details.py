"""NaTra, where a plausible slip would go unseen: the attack's path, the filter's two reasons, what inversion is pulled to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.adversarial.natra import (
    DirectionReport,
    Directions,
    LatentCodes,
    NaturalTransformation,
    compose,
    filter_directions,
    invert_batch,
    natural_attack,
    train_encoder,
)
from surefoot.adversarial.natra.inversion import JITTER
from surefoot.models import mlp, seeded_build
from surefoot.models.generators import image_decoder


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decoder() -> nn.Sequential:
    net = seeded_build(lambda: image_decoder(5, (1, 8, 8), width=4, hidden=16), rng())
    assert isinstance(net, nn.Sequential)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
    return net.double().eval()


def moves(n: int = 9) -> NaturalTransformation:
    codes = torch.randn(n, 1, 5, generator=rng(1), dtype=torch.float64)
    made = LatentCodes(codes, None, torch.full((n,), 50.0), torch.full((n,), 50.0))
    eye = torch.eye(5, dtype=torch.float64)[:3]
    return NaturalTransformation(
        decoder(), made, Directions(eye, torch.tensor([0.5, 1.0, 2.0]).double(), torch.ones(3)), 1.2
    )


# --- the attack -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "draws"), [(1, 1), (3, 2)])
def test_the_attack_is_its_loop(steps, draws):
    """The worst of a = 0 and the draws, then sign ascent from there; every point on the way counts, the last one too."""
    transform, y = moves(), torch.arange(9) % 3
    model = seeded_build(lambda: mlp((1, 8, 8), 3, hidden=(16,)), rng(2)).double()
    ours = natural_attack(model, transform, y, steps=steps, draws=draws, generator=rng(3))
    source = rng(3)
    torch.randint(2**62, (1,), generator=source)  # seeds the model's own draws
    tried = [transform.amounts(), *(transform.draw(source) for _ in range(draws))]

    def loss_at(a: Tensor) -> Tensor:
        return F.cross_entropy(model(transform(a)), y, reduction="none")

    with torch.no_grad():
        values = torch.stack([loss_at(a) for a in tried])
    best = values.argmax(0)
    point = torch.stack([tried[int(k)][i] for i, k in enumerate(best)])
    assert torch.allclose(ours.clean_loss, values[0]) and torch.allclose(ours.drawn_loss, values.amax(0))
    path = [point]
    for _ in range(steps):
        leaf = point.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss_at(leaf).sum(), leaf)
        point = (point + 0.6 * slope.sign()).clamp(-1.2, 1.2)
        path.append(point)
    with torch.no_grad():
        values = torch.stack([loss_at(a) for a in path])
    assert torch.allclose(ours.loss, values.amax(0))
    last = values[-1] > values[:-1].amax(0)
    assert bool(last.any())  # the point after the last step wins somewhere
    assert torch.allclose(ours.a[last], path[-1][last])


# --- the filter -----------------------------------------------------------------------------------------------------


def pixels(z: Tensor) -> Tensor:  # [B, 2] -> [B, 1, 1, 2]
    return z[:, None, None]


def test_the_filter_drops_for_a_changed_label_and_for_lost_confidence_each_alone():
    """Along e0 the answer leans, along e1 nothing is asked; the limits decide which reason counts."""
    z = torch.tensor([[1.5, 0.5], [-1.5, 0.5]]).repeat(10, 1)
    codes = LatentCodes(z.unsqueeze(1), None, torch.full((20,), 50.0), torch.full((20,), 50.0))
    both = Directions(torch.eye(2), torch.ones(2), torch.ones(2))

    def judge(x: Tensor) -> Tensor:
        return torch.stack([x[:, 0, 0, 0], -x[:, 0, 0, 0]], 1)

    class Pixels(nn.Module):
        latent_dim = 2

        def forward(self, z: Tensor) -> Tensor:
            return pixels(z)

    def report(reach: float, **limits: Any) -> DirectionReport:
        return filter_directions(judge, NaturalTransformation(Pixels(), codes, both, reach, bounds=None), **limits)

    small = report(1.0, max_confidence_drop=0.02)  # no label changes, confidence does
    assert small.label_change.tolist() == [0.0, 0.0] and small.kept.tolist() == [False, True]
    p = [torch.sigmoid(torch.tensor(2 * (1.5 + a))).item() for a in (-1.0, -0.5, 0.5, 1.0)]
    drop = torch.sigmoid(torch.tensor(3.0)).item() - sum(p) / 4
    assert float(small.confidence_drop[0]) == pytest.approx(drop, abs=1e-6)
    wide = report(2.0, max_confidence_drop=10.0)  # one of four amounts turns each image over
    assert float(wide.label_change[0]) == pytest.approx(0.25) and wide.kept.tolist() == [False, True]
    assert report(1.0, max_confidence_drop=10.0).kept.tolist() == [True, True]
    assert wide.image_change.tolist() == pytest.approx([2 / 2**0.5] * 2)


# --- inversion --------------------------------------------------------------------------------------------------------


def test_codes_are_pulled_to_the_encoders_and_not_to_zero():
    net, x = decoder(), torch.rand(4, 1, 8, 8, generator=rng(4), dtype=torch.float64)
    start = torch.randn(4, 5, generator=rng(5), dtype=torch.float64)
    held = invert_batch(net, lambda images: start, x, steps=300, lr=0.05, code_weight=1e4, shift=False)
    assert torch.allclose(held.codes[:, 0], start, atol=1e-2)
    free = invert_batch(net, lambda images: start, x, steps=300, lr=0.05, code_weight=0.0, shift=False)
    assert not torch.allclose(free.codes[:, 0], start, atol=0.1)
    common = torch.full((5,), 0.3, dtype=torch.float64)
    given = invert_batch(net, lambda images: start, x, steps=0, shift=common)
    assert torch.equal(given.codes[:, 0], start + common)  # z = E(x) + s + d


def test_the_best_of_several_starts_is_kept_for_each_image():
    net, x = decoder(), torch.rand(6, 1, 8, 8, generator=rng(4), dtype=torch.float64)
    start = torch.randn(6, 5, generator=rng(5), dtype=torch.float64)
    found = invert_batch(net, lambda images: start, x, steps=0, restarts=7, shift=False, code_weight=0.0, generator=rng(6))  # fmt: skip
    spread = JITTER * torch.randn(7, 1, 5, generator=rng(6), dtype=torch.float64)
    spread[0] = 0
    with torch.no_grad():
        errors = torch.stack([(compose(net, start.unsqueeze(1) + s) - x).flatten(1).square().mean(1) for s in spread])
    best = errors.argmin(0)
    assert len(best.unique()) > 1
    assert torch.allclose(found.codes, start.unsqueeze(1) + spread[best])


def test_the_encoder_also_learns_to_rebuild_real_images():
    """Real images outside of what z ~ N(0, I) draws: without the second term the encoder never sees them."""
    net = decoder().float()
    with torch.no_grad():
        x = net(2 + 0.3 * torch.randn(64, 5, generator=rng(7)))
    errors = []
    for reconstruction in (0.0, 20.0):
        encoder = train_encoder(net, x, steps=120, reconstruction=reconstruction, generator=rng(8))
        with torch.no_grad():
            errors.append(float((net(encoder(x)) - x).square().mean()))
    assert errors[1] < 0.7 * errors[0]
