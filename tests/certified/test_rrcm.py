"""rRCM: the noise grid and schedules, the two contrastive terms, encoders, fine-tuning, certificates, refusals."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.certified.rrcm import (
    RRCM,
    ClassifierEncoder,
    NoiseEncoder,
    RRCMEncoder,
    RRCMLoss,
    RRCMSchedule,
    SmoothableClassifier,
    affine_jitter,
    consistency_tuning_loss,
    finetune_rrcm,
    input_scale,
    karras_sigmas,
    nce,
    nearest_time,
    pretrain_rrcm,
    projection_head,
)
from surefoot.certified.rrcm.encoders import time_features
from surefoot.certified.rrcm.finetuning import noisy_logits
from surefoot.core.task import Split, Task, Training
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput, Refused
from surefoot.models.networks import Normalized, seeded_build, small_cnn, small_resnet
from surefoot.nn.smoothing import certify, upper_confidence_bound, vote_counts
from surefoot.training.loop import fit


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def encoder(seed: int = 0) -> ClassifierEncoder:
    return ClassifierEncoder(tiny(seed), 10, (1, 8, 8))


def vit() -> RRCMEncoder:
    torch.manual_seed(0)
    return RRCMEncoder(8, 2, 1, 16, 2, 2)


# --- grid and schedules (dossier checks 1, 4, 5, 6) -----------------------------------------------------------------


def test_grid_values():
    t = karras_sigmas(21)
    for i, value in ((0, 80.0), (10, 2.5152), (13, 0.5666), (20, 0.002)):
        assert t[i].item() == pytest.approx(value, abs=6e-5)
    assert bool((t.diff() < 0).all())


@pytest.mark.parametrize(("sigma", "index", "value"), [(0.25, 53, 0.49271), (0.5, 48, 0.96542), (1.0, 42, 2.00365)])
def test_nearest_time_is_twice_sigma(sigma, index, value):
    grid = karras_sigmas(81)
    assert nearest_time(grid, sigma) == grid[index].item()
    assert grid[index].item() == pytest.approx(value, abs=6e-6)


def test_number_of_scales():
    plan = RRCMSchedule(300_000)
    assert plan.num_scales(0) == 21
    assert plan.num_scales(1) == plan.num_scales(129_203) == 41
    assert plan.num_scales(129_204) == plan.num_scales(300_000) == 81
    assert RRCMSchedule(400, 10, 40).num_scales(0) == 11


def test_target_rate():
    plan = RRCMSchedule(1000)
    rates = [plan.target_rate(k) for k in range(1001)]
    assert rates[0] == pytest.approx(0.99, abs=1e-12)
    assert all(b >= a for a, b in itertools.pairwise(rates))
    assert rates[-1] == pytest.approx(0.9999, abs=1e-6)


def test_input_scale_gives_unit_second_moment():
    x = 0.5 * torch.randn(200_000, generator=rng(1), dtype=torch.float64)
    e = torch.randn(200_000, generator=rng(2), dtype=torch.float64)
    for t in (0.002, 0.5, 5.0, 80.0):
        scaled = input_scale(torch.tensor(t, dtype=torch.float64)) * (x + t * e)
        assert scaled.square().mean().item() == pytest.approx(1.0, abs=4 * math.sqrt(2 / 200_000))


# --- losses (2, 3) --------------------------------------------------------------------------------------------------


def test_nce_worked_numbers():
    eye = torch.eye(4, dtype=torch.float64)
    assert nce(3 * eye, eye, 0.2).item() == pytest.approx(math.log(1 + 3 * math.exp(-5)), abs=1e-12)
    assert math.log(1 + 3 * math.exp(-5)) == pytest.approx(0.0200123, abs=1e-7)
    same = torch.ones(4, 5, dtype=torch.float64)
    assert nce(same, same).item() == pytest.approx(1.386294, abs=1e-6)


def test_nce_float32_matches_a_float64_reference():
    f, g = torch.randn(6, 9, generator=rng()), torch.randn(8, 9, generator=rng(1))
    total = 0.0
    for i in range(6):
        s = [F.cosine_similarity(f[i].double(), g[j].double(), dim=0).item() / 0.2 for j in range(8)]
        total += -s[i] + math.log(sum(math.exp(v) for v in s))
    assert nce(f, g).item() == pytest.approx(total / 6, rel=1e-6)


def test_no_gradient_reaches_a_target():
    """Gradients equal those with the target replaced by a constant, in both terms; the slow network gets none."""
    loss, net, slow = RRCMLoss(), encoder(0).double(), encoder(1).double()
    project, slow_project = projection_head(64, 16, 8).double(), projection_head(64, 16, 8).double()
    x, x2 = (2 * torch.rand(6, 1, 8, 8, generator=rng(s), dtype=torch.float64) - 1 for s in (0, 1))
    e = torch.randn(x.shape, generator=rng(2), dtype=torch.float64)

    def gradients(value: Tensor) -> list[Tensor]:
        return [g for g in torch.autograd.grad(value, list(net.parameters()), allow_unused=True) if g is not None]

    plain = gradients(loss.consistency(net, x, e, 1.0, 0.8))
    constant = net(x + 0.8 * e, 0.8).detach().clone()
    f = F.normalize(net(x + 1.0 * e, 1.0), dim=1) @ F.normalize(constant, dim=1).T / 0.2
    by_hand = gradients(F.cross_entropy(f, torch.arange(6)))
    leaky = F.normalize(net(x + 1.0 * e, 1.0), dim=1) @ F.normalize(net(x + 0.8 * e, 0.8), dim=1).T / 0.2
    wrong = gradients(F.cross_entropy(leaky, torch.arange(6)))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(plain, by_hand, strict=True))
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(plain, wrong, strict=True))  # a forgotten stop-gradient shows

    value = loss.contrast(lambda v, t: project(net(v, t)), lambda v, t: slow_project(slow(v, t)), x, x2, e, 0.002)
    value.backward()
    assert all(p.grad is None for p in [*slow.parameters(), *slow_project.parameters()])
    assert all(p.grad is not None for p in project.parameters())


def test_views_share_noise_and_levels_share_noise():
    """What the encoder sees: one e for both views at tmin, and one e, one index for the whole batch in the other term."""
    seen: list[tuple[Tensor, float]] = []

    def spy(x: Tensor, t: float) -> Tensor:
        seen.append((x, t))
        return x.flatten(1) + t

    x, x2 = (torch.rand(5, 1, 4, 4, generator=rng(s), dtype=torch.float64) for s in (0, 1))
    e = torch.randn(x.shape, generator=rng(2), dtype=torch.float64)
    RRCMLoss().contrast(spy, spy, x, x2, e, 0.002)
    assert torch.allclose(seen[0][0] - x, seen[1][0] - x2) and {t for _, t in seen} == {0.002}
    seen.clear()
    RRCMLoss().consistency(spy, x, e, 2.0, 1.5)
    (clean, t_clean), (noisy, t_noisy) = seen
    assert torch.allclose((clean - x) / 1.5, (noisy - x) / 2.0) and (t_clean, t_noisy) == (1.5, 2.0)


def test_consistency_tuning_loss():
    logits, y = torch.randn(2, 6, 4, generator=rng(), dtype=torch.float64), torch.arange(6) % 4
    plain = F.cross_entropy(logits.flatten(0, 1), y.repeat(2))
    assert consistency_tuning_loss(logits, y, lbd=0.0, eta=0.0).item() == pytest.approx(plain.item(), abs=1e-12)
    twice = logits[:1].expand(2, -1, -1)
    once = F.cross_entropy(twice[0], y).item()
    assert consistency_tuning_loss(twice, y, lbd=20.0, eta=0.0).item() == pytest.approx(once, abs=1e-12)  # KL is 0
    p = logits.softmax(-1)
    mean = p.mean(0)
    kl = sum((mean * (mean / q).log()).sum(-1).mean() for q in p) / 2
    entropy = -(mean * mean.log()).sum(-1).mean()
    expected = plain + 10 * kl + 0.5 * entropy  # eta is not multiplied by lbd
    assert consistency_tuning_loss(logits, y, lbd=10.0).item() == pytest.approx(expected.item(), abs=1e-12)
    assert consistency_tuning_loss(logits.float(), y, lbd=10.0).item() == pytest.approx(expected.item(), rel=1e-5)


# --- encoders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [encoder, vit])
def test_encoders_use_the_time(make: Callable[[], NoiseEncoder]):
    net: Any = make()
    x = torch.rand(3, 1, 8, 8, generator=rng()) * 2 - 1
    if isinstance(net, ClassifierEncoder):
        nn.init.normal_(
            net.get_parameter("time.2.weight"), std=0.1
        )  # zero at the start: then t acts through the input scale only
    z = net(x, 0.5)
    assert z.shape == (3, net.embed_dim)
    assert torch.equal(z, net(x, torch.full((3,), 0.5)))
    level = input_scale(torch.tensor(0.5)) * x
    other = net.represent(level, torch.full((3,), 2.0))
    assert (other - z).abs().max() > 1e-3  # the same scaled input, another t
    found = sum(p.numel() for stage in net.stages() for p in stage)
    assert found == sum(p.numel() for p in net.parameters())
    assert make().double()(x.double(), 0.5).dtype == torch.float64


def test_time_features_in_float32_match_float64():
    t = karras_sigmas(41)
    reference = time_features(t, 32)
    assert (time_features(t.float(), 32).double() - reference).abs().max() < 1e-4
    angle = 250 * math.log(t[3].item())
    assert reference[3, 0].item() == pytest.approx(math.cos(angle), abs=1e-9)
    assert reference[3, 16].item() == pytest.approx(math.sin(angle), abs=1e-9)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: Normalized(m, [0.3], [0.4])])
@pytest.mark.parametrize("make", [tiny, lambda: small_resnet((1, 8, 8), 10), lambda: small_cnn((1, 8, 8), 10)])
def test_a_classifier_becomes_an_encoder_of_its_features(make, wrap):
    torch.manual_seed(0)
    model = wrap(make()).eval()
    kept = copy.deepcopy(model.state_dict())
    net = ClassifierEncoder(model, 10, (1, 8, 8)).eval()
    x = torch.rand(4, 1, 8, 8, generator=rng())
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    assert torch.allclose(head(net(2 * x - 1, 1e-7)), model(x), atol=1e-4)  # t -> 0: the classifier itself
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    assert len(net.stages()) >= 1


def test_functional_and_bare_models():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x.flatten(1))))

    assert ClassifierEncoder(Functional(), 10, (1, 8, 8)).embed_dim == 32
    assert ClassifierEncoder(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 10, (1, 8, 8)).embed_dim == 64
    with pytest.raises(Refused, match="not that layer's output"):
        ClassifierEncoder(nn.Sequential(Functional(), nn.Sigmoid()), 10, (1, 8, 8))
    with pytest.raises(Refused, match="has none"):
        ClassifierEncoder(nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), 10, (1, 8, 8))


def test_projection_head_has_no_bias_and_no_last_norm():
    head = projection_head(8, 16, 4)
    assert [type(m).__name__ for m in head] == [
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
    ]
    assert all(m.bias is None for m in head if isinstance(m, nn.Linear))


# --- pixels, noise and time at the classifier (8) -------------------------------------------------------------------


def test_sigma_on_pixels_is_t_on_the_encoder_scale():
    x, e = torch.rand(5, 1, 8, 8, generator=rng()), torch.randn(5, 1, 8, 8, generator=rng(1))
    model = SmoothableClassifier(encoder(), 10, sigma=0.25, time=0.5)
    seen = []
    model.encoder.register_forward_hook(lambda m, args, out: seen.append(args))
    model(x + 0.25 * e)
    assert torch.allclose(seen[0][0], (2 * x - 1) + 0.5 * e, atol=1e-6)
    assert seen[0][1].item() == 0.5
    noisy = noisy_logits(nn.Identity(), torch.zeros(50, 1, 8, 8), sigma=0.25, generator=rng())
    assert noisy.std().item() == pytest.approx(0.25, abs=4 * 0.25 / math.sqrt(2 * noisy.numel()))


def test_head_reads_the_representation():
    model = SmoothableClassifier(encoder(), 10, sigma=0.25, time=0.5)
    assert model.head.in_features == 64 and model.head.weight.std() < 4e-5 and bool((model.head.bias == 0).all())


# --- training -------------------------------------------------------------------------------------------------------


def small_task() -> Task:
    return digits(901, sizes=(200, 50, 100))


def pretrain(net: NoiseEncoder, x: Tensor, steps: int = 12, seed: int = 0, **options):
    plan = RRCMSchedule(steps, 10, 40, 0.9, 0.99)
    return pretrain_rrcm(net, x, steps=steps, generator=rng(seed), batch_size=64, lr=1e-3, tmax=5.0, schedule=plan, hidden_dim=64, output_dim=32, **options)  # fmt: skip


def test_pretraining_is_seeded_and_leaves_the_encoder_alone():
    x, net = small_task().train.x, encoder()
    kept, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    a, b, c = pretrain(net, x), pretrain(net, x), pretrain(net, x, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, kept[k]) for k, v in net.state_dict().items())
    assert torch.equal(a.losses, b.losses) and not torch.equal(a.losses, c.losses)
    assert a.passes == 12 * 64 * 6 and len(a.grid) == 41
    assert all(p.grad is None for p in a.encoder.parameters())


def test_pretraining_counts_its_passes():
    """`passes` is what the encoders really see."""
    count = [0]

    class Counted(ClassifierEncoder):
        def represent(self, x: Tensor, t: Tensor) -> Tensor:
            count[0] += len(x)
            return super().represent(x, t)

    cases: list[tuple[dict[str, Any], int]] = [({}, 6), ({"consistency": 0.0}, 4), ({"contrast": 0.0}, 2)]
    for weights, expected in cases:
        net = Counted(tiny(), 10, (1, 8, 8))
        count[0] = 0
        state = pretrain(net, small_task().train.x, steps=3, **weights)
        assert count[0] == state.passes == 3 * 64 * expected


def test_pretraining_ties_the_levels_of_a_trajectory_together():
    """After training, neighbours on a trajectory recognise each other among strangers; without the term, less so."""
    x = small_task().train.x
    fresh = 2 * small_task().test.x - 1
    e = torch.randn(fresh.shape, generator=rng(5))
    values = {}
    for name, weight in (("with", 1.0), ("without", 0.0)):
        net = pretrain(encoder(), x, steps=120, consistency=weight).encoder
        with torch.no_grad():
            values[name] = nce(net(fresh + 1.0 * e, 1.0), net(fresh + 0.01 * e, 0.01)).item()
    assert values["with"] < values["without"] - 0.2


def test_ema_target_changes_the_run():
    x = small_task().train.x
    assert not torch.equal(pretrain(encoder(), x).losses, pretrain(encoder(), x, target="ema").losses)


def test_vit_trains_and_finetunes_with_layer_decay():
    task = small_task()
    state = pretrain(vit(), task.train.x, steps=4)
    model = finetune_rrcm(state.encoder, task.train.x, task.train.labels, sigma=0.25, num_classes=10, steps=3, generator=rng(), grid=state.grid, lr=1e-3, layer_decay=0.5)  # fmt: skip
    assert isinstance(model.encoder, RRCMEncoder)
    moved = [
        torch.cat([(a - b).abs().flatten() for a, b in zip(new, old, strict=True)]).max().item()
        for new, old in zip(model.encoder.stages(), state.encoder.stages(), strict=True)
    ]
    assert moved[0] < moved[-1] * 0.5  # early stages move less
    assert model.time.item() == pytest.approx(nearest_time(state.grid, 0.25))


def test_frozen_finetuning_keeps_the_encoder():
    task = small_task()
    net = encoder()
    model = finetune_rrcm(net, task.train.x, task.train.labels, sigma=0.25, num_classes=10, steps=5, generator=rng(), backbone_lr=0.0, lr=1e-2)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(model.encoder.parameters(), net.parameters(), strict=True))
    assert model.head.weight.abs().max() > 1e-3


def test_finetuning_runs_in_training_mode():
    """Batch-norm statistics must become those of the noise level (an evaluation-mode fine-tune would keep the old ones)."""
    torch.manual_seed(0)
    task, net = small_task(), ClassifierEncoder(small_cnn((1, 8, 8), 10), 10, (1, 8, 8))
    model = finetune_rrcm(net, task.train.x, task.train.labels, sigma=0.5, num_classes=10, steps=2, generator=rng(), backbone_lr=0.0)  # fmt: skip
    pairs = zip(model.encoder.named_buffers(), net.named_buffers(), strict=True)
    assert any("running_mean" in k and not torch.equal(a, b) for (k, a), (_, b) in pairs)
    assert not model.training


def test_jitter_is_within_its_range_and_identity_at_zero():
    x = torch.rand(6, 1, 8, 8, generator=rng())
    assert torch.allclose(affine_jitter(0.0, 0.0, 0.0)(x, rng()), x, atol=1e-6)
    blob = torch.zeros(200, 1, 9, 9)
    blob[:, :, 4, 4] = 1.0
    moved = affine_jitter(0.0, 0.0, 1.0)(blob, rng())
    rows = (moved.sum((1, 3)) * torch.arange(9.0)).sum(1) / moved.sum((1, 2, 3))
    assert rows.min() >= 3.0 - 1e-4 and rows.max() <= 5.0 + 1e-4 and rows.std() > 0.4
    assert affine_jitter()(x, rng()).shape == x.shape


# --- the treatment and its certificates -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hardened() -> tuple[SmoothableClassifier, Task]:
    task = digits(902, sizes=(600, 50, 200))
    run = fit(tiny(), task, Training(epochs=15, batch_size=64, lr=3e-3), [RRCM(sigma=0.25, pretrain_epochs=10)])
    assert isinstance(run.model, SmoothableClassifier)
    return run.model, task


def test_treatment_gives_a_certifiable_classifier(hardened):
    model, task = hardened
    found = certify(model, task.test.x[:100], sigma=0.25, num_classes=10, generator=rng(), n0=50, n=300)
    right = (found.prediction == task.test.labels[:100]).double().mean().item()
    assert right > 0.6
    assert sum(isinstance(m, NoiseEncoder) for m in model.modules()) == 1  # one network, one pass a noise sample


def test_backbone_rate_is_a_learning_rate():
    """Scaling the body's step by r equals training it with r times the learning rate."""
    task = digits(903, sizes=(64, 20, 20))
    start = SmoothableClassifier(encoder(), 10, sigma=0.25, time=0.5)
    treatment = RRCM(backbone_rate=0.25)
    a, b = copy.deepcopy(start), copy.deepcopy(start)
    one = torch.optim.Adam(a.parameters(), 1e-2)
    two = torch.optim.Adam([{"params": b.head.parameters(), "lr": 1e-2}, {"params": b.encoder.parameters(), "lr": 2.5e-3}])  # fmt: skip
    for _ in range(3):
        for model, optimizer, use in ((a, one, True), (b, two, False)):
            optimizer.zero_grad()
            F.cross_entropy(model(task.train.x), task.train.labels).backward()
            if use:
                treatment.before_step(model, optimizer, None)  # type: ignore[arg-type]
            optimizer.step()
            if use:
                treatment.after_step(model, optimizer, None)  # type: ignore[arg-type]
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def attack(model: nn.Module, x: Tensor, chosen: Tensor, size: Tensor, seed: int) -> Tensor:
    """Gradient ascent averaged over noise, to the sphere of that size (at most)."""
    g, z = rng(seed), x + 1e-3 * torch.randn(x.shape, generator=rng(100 + seed))
    for _ in range(6):
        z.requires_grad_(True)
        noise = 0.25 * torch.randn((8, *z.shape), generator=g)
        p = model((z + noise).flatten(0, 1)).softmax(1).unflatten(0, (8, len(z))).mean(0)
        (grad,) = torch.autograd.grad(F.nll_loss(p.clamp(min=1e-9).log(), chosen, reduction="sum"), z)
        with torch.no_grad():
            z = z + 0.5 * size * grad / grad.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
            norm = (z - x).flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
            z = x + (z - x) * (size / norm).clamp(max=1.0)
    return z.detach()


def broken(model: nn.Module, z: Tensor, chosen: Tensor, seed: int, n: int = 400) -> int:
    """Points where the certified class has probability below 1/2 beyond doubt (1e-6)."""
    votes = vote_counts(model, z, n, sigma=0.25, num_classes=10, generator=rng(seed))
    hits = votes.gather(1, chosen[:, None])[:, 0]
    return int((upper_confidence_bound(hits, n, 1e-6) < 0.5).sum())


@pytest.mark.slow
def test_certificates_survive_an_attack(hardened):
    """Over a thousand attacks within the certified radius turn no certified point; three times the radius turns many."""
    model, task = hardened
    found = certify(model, task.test.x, sigma=0.25, num_classes=10, generator=rng(1), n0=50, n=500)
    sure = ~found.abstained
    x, chosen, radius = task.test.x[sure], found.prediction[sure], found.radius[sure].float().view(-1, 1, 1, 1)
    tried = 0
    for seed in range(9):
        assert broken(model, attack(model, x, chosen, 0.999 * radius, seed), chosen, seed) == 0
        tried += len(x)
    assert tried >= 1000
    assert broken(model, attack(model, x, chosen, 3 * radius, 9), chosen, 9) > 10


def test_the_factor_two_confusion_is_caught():
    """Training noise sigma on the [-1, 1] scale is half the noise that is certified: the encoder would see t = sigma."""
    x = torch.full((400, 1, 8, 8), 0.5)
    seen: list[Tensor] = []
    model = SmoothableClassifier(encoder(), 10, sigma=0.25, time=nearest_time(karras_sigmas(81), 0.25))
    model.encoder.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    noisy_logits(model, x, sigma=0.25, generator=rng())
    assert seen[0].std().item() == pytest.approx(0.5, rel=0.01)
    assert seen[0].std().item() == pytest.approx(model.time.item(), rel=0.05)


# --- bad input ------------------------------------------------------------------------------------------------------

X, Y = torch.rand(20, 1, 8, 8, generator=rng()), torch.arange(20) % 10
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "sigma outside the grid": (lambda: nearest_time(karras_sigmas(41, tmax=5.0), 3.0), "half the noise grid"),
    "one image a batch": (lambda: pretrain_rrcm(encoder(), X, steps=1, generator=rng(), batch_size=1), "batch_size"),
    "pixels beyond 1": (lambda: pretrain_rrcm(encoder(), 3 * X, steps=1, generator=rng()), r"\[0, 1\]"),
    "NaN pixels": (lambda: pretrain_rrcm(encoder(), X * math.nan, steps=1, generator=rng()), r"\[0, 1\]"),
    "one grid point": (lambda: karras_sigmas(1), "n must be an integer of at least 2"),
    "tmin above tmax": (lambda: karras_sigmas(5, tmin=2.0, tmax=1.0), "tmin must be smaller"),
    "tau zero": (lambda: RRCMLoss(0.0), "tau must be positive"),
    "a class without label": (
        lambda: finetune_rrcm(encoder(), X[:9], Y[:9], sigma=0.25, num_classes=10, steps=1, generator=rng()),
        "No label of class 9",
    ),
    "labels that are no integers": (
        lambda: finetune_rrcm(encoder(), X, Y.float(), sigma=0.25, num_classes=10, steps=1, generator=rng()),
        "int64",
    ),
    "a label beyond the classes": (
        lambda: finetune_rrcm(encoder(), X, Y + 1, sigma=0.25, num_classes=10, steps=1, generator=rng()),
        r"\[0, 10\)",
    ),
    "no time input": (lambda: pretrain_rrcm(tiny(), X, steps=1, generator=rng()), "no time input"),  # type: ignore[arg-type]
    "both terms off": (
        lambda: pretrain_rrcm(encoder(), X, steps=1, generator=rng(), contrast=0.0, consistency=0.0),
        "nothing to train on",
    ),
    "other image size": (lambda: vit()(torch.zeros(1, 1, 6, 6), 1.0), "images of 8x8"),
    "treatment sigma": (lambda: RRCM(sigma=9.0), "half the noise grid"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, sentence = BAD[case]
    with pytest.raises(InvalidInput, match=sentence):
        call()


def test_signals_are_refused():
    split = Split(torch.rand(20, 1, 40), Y)
    task = Task("s", split, split, split, 10, "signal")
    with pytest.raises(Refused, match="images"):
        RRCM().check(tiny(), task)


def test_smaller_last_batch_is_dropped():
    sizes = []

    class Spy(ClassifierEncoder):
        def represent(self, x: Tensor, t: Tensor) -> Tensor:
            sizes.append(len(x))
            return super().represent(x, t)

    pretrain_rrcm(Spy(tiny(), 10, (1, 8, 8)), X, steps=4, generator=rng(), batch_size=8, hidden_dim=8, output_dim=4)
    assert set(sizes) == {8}


# --- both loops against plain ones ------------------------------------------------------------------------------------


def alive(seed: int = 0) -> ClassifierEncoder:
    """Without features that are 0 everywhere: Adam makes steps of lr out of the rounding of their gradients."""
    net = encoder(seed).double()
    with torch.no_grad():
        net.get_parameter("time.2.bias").copy_(0.3 * torch.randn(130, generator=rng(3), dtype=torch.float64))
    return net


def reference_pretraining(net: ClassifierEncoder, x: Tensor, steps: int, target: str) -> tuple[list[Tensor], list[Tensor], list[list[float]]]:  # fmt: skip
    """The dossier's loop written out: same draws, nothing shared but the grid, the schedule and the augmentation."""
    g, plan, lr, warmup = rng(0), RRCMSchedule(steps, 10, 40, 0.9, 0.99), 1e-3, 0.3 * steps
    online = copy.deepcopy(net).train()
    seed = int(torch.randint(2**62, (), generator=g))
    head = seeded_build(lambda: projection_head(64, 64, 32), rng(seed)).double()
    slow, slow_head, average = copy.deepcopy(online), copy.deepcopy(head), copy.deepcopy(online)
    weights = [*online.parameters(), *head.parameters()]
    adam, jitter, losses = torch.optim.Adam(weights), affine_jitter(), []
    order = torch.randperm(len(x), generator=g)
    chunks = list(order[:128].split(64))

    def info(f: Tensor, targets: Tensor) -> Tensor:
        s = (f / f.norm(dim=1, keepdim=True)) @ (targets / targets.norm(dim=1, keepdim=True)).T / 0.2
        return (s.logsumexp(1) - s.diagonal()).mean()

    for k in range(steps):
        if not chunks:
            chunks = list(torch.randperm(len(x), generator=g)[:128].split(64))
        images = x[chunks.pop(0)]
        v1, v2 = (2 * jitter(images, g) - 1 for _ in range(2))
        grid = karras_sigmas(plan.num_scales(k), 0.002, 5.0).tolist()
        i = int(torch.randint(len(grid) - 1, (), generator=g))
        e = torch.randn(v1.shape, dtype=x.dtype, generator=g)
        t = grid[-1]
        with torch.no_grad():
            g1, g2 = slow_head(slow(v1 + t * e, t)), slow_head(slow(v2 + t * e, t))
        contrast = info(head(online(v1 + t * e, t)), g2) + info(head(online(v2 + t * e, t)), g1)
        with torch.no_grad():
            fixed = (online if target == "online" else slow)(v1 + grid[i + 1] * e, grid[i + 1])
        consistency = info(online(v1 + grid[i] * e, grid[i]), fixed)
        losses.append([contrast.item(), consistency.item()])
        for p, d in zip(weights, torch.autograd.grad(contrast + consistency, weights), strict=True):
            p.grad = d
        done = (k - warmup) / (steps - warmup)
        adam.param_groups[0]["lr"] = lr * ((k + 1) / (warmup + 1) if k < warmup else (1 + math.cos(math.pi * done)) / 2)
        if k >= warmup:
            size = math.sqrt(sum(p.grad.square().sum().item() for p in weights if p.grad is not None))
            for p in weights:
                assert p.grad is not None
                p.grad *= min(1.0, 0.5 / (size + 1e-6))
        adam.step()
        for old, new, rate in ((slow, online, plan.target_rate(k)), (slow_head, head, plan.target_rate(k)), (average, online, min(0.9999, (1 + k) / (10 + k)))):  # fmt: skip
            with torch.no_grad():
                for a, b in zip(old.parameters(), new.parameters(), strict=True):
                    a.copy_(rate * a + (1 - rate) * b)
                for a, b in zip(old.buffers(), new.buffers(), strict=True):
                    a.copy_(b)
    return list(average.parameters()), list(head.parameters()), losses


@pytest.mark.parametrize("target", ["online", "ema"])
def test_pretraining_is_the_loop_of_the_paper(target):
    x = small_task().train.x[:150].double()
    net = alive()
    options: dict[str, Any] = {"warmup": 0.3, "clip_norm": 0.5, "target": target}
    state = pretrain(net, x, steps=10, **options)
    average, head, losses = reference_pretraining(net, x, 10, target)
    assert torch.allclose(state.losses.double(), torch.tensor(losses).double(), rtol=1e-5)
    for mine, plain in zip([*state.encoder.parameters(), *state.projector.parameters()], [*average, *head], strict=True):  # fmt: skip
        assert torch.allclose(mine, plain, rtol=1e-5, atol=1e-6)
    assert torch.allclose(state.grid, karras_sigmas(41, 0.002, 5.0))


def test_the_average_takes_over_the_statistics_of_batch_norm():
    torch.manual_seed(0)
    net = ClassifierEncoder(small_cnn((1, 8, 8), 10), 10, (1, 8, 8))
    state = pretrain(net, small_task().train.x, steps=2)
    pairs = zip(state.encoder.named_buffers(), net.named_buffers(), strict=True)
    assert all(not torch.equal(a, b) for (k, a), (_, b) in pairs if "running" in k)


def test_no_gradient_reaches_the_targets_of_nce():
    f, targets = (torch.randn(4, 5, generator=rng(s)).requires_grad_() for s in (0, 1))
    nce(f, targets).backward()
    assert f.grad is not None and targets.grad is None


def test_finetuning_is_the_loop_of_the_paper():
    """Two noisy copies at exactly sigma, augmentation, AdamW without decay on head and stages, cosine; against a plain loop."""
    task, sigma, steps = small_task(), 0.3, 4
    x, y, jitter = task.train.x[:60].double(), task.train.labels[:60], affine_jitter()
    net = alive()
    model = finetune_rrcm(net, x, y, sigma=sigma, num_classes=10, steps=steps, generator=rng(4), lbd=7.0, lr=3e-3, backbone_lr=2e-3, layer_decay=0.5, batch_size=32, augment=[jitter])  # fmt: skip
    g = rng(4)
    seed = int(torch.randint(2**62, (), generator=g))
    time = nearest_time(karras_sigmas(81), sigma)
    plain: Any = seeded_build(lambda: SmoothableClassifier(copy.deepcopy(net), 10, sigma=sigma, time=time), rng(seed))
    stages = plain.encoder.stages()
    assert len(stages) == 2
    rates = [(plain.head.parameters(), 3e-3), (stages[0], 1e-3), (stages[1], 2e-3)]
    adam = torch.optim.Adam([{"params": list(p), "lr": r} for p, r in rates])
    for k in range(steps):
        pick = torch.randperm(60, generator=g)[:32]
        images = jitter(x[pick], g)
        noise = torch.randn((2, *images.shape), dtype=torch.float64, generator=g)
        a, b = plain(images + sigma * noise[0]), plain(images + sigma * noise[1])
        mean = (a.softmax(1) + b.softmax(1)) / 2
        kl = sum((mean * (mean.log() - v.log_softmax(1))).sum(1).mean() for v in (a, b)) / 2
        loss = (F.cross_entropy(a, y[pick]) + F.cross_entropy(b, y[pick])) / 2 + 7 * kl - 0.5 * (mean * mean.log()).sum(1).mean()  # fmt: skip
        adam.zero_grad()
        loss.backward()
        for group, (_, r) in zip(adam.param_groups, rates, strict=True):
            group["lr"] = r * (1 + math.cos(math.pi * k / steps)) / 2
        adam.step()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-6)


def test_a_frozen_encoder_costs_no_gradient():
    seen: list[bool] = []

    class Spy(ClassifierEncoder):
        def represent(self, x: Tensor, t: Tensor) -> Tensor:
            z = super().represent(x, t)
            seen.append(z.requires_grad)
            return z

    task = small_task()
    finetune_rrcm(Spy(tiny(), 10, (1, 8, 8)), task.train.x, task.train.labels, sigma=0.25, num_classes=10, steps=1, generator=rng(), backbone_lr=0.0)  # fmt: skip
    assert seen == [False]


def test_the_vit_answers_with_its_class_token_after_the_norm():
    net: Any = vit()
    seen: list[Tensor] = []
    net.norm.register_forward_hook(lambda m, args, out: seen.append(out))
    x = torch.rand(3, 1, 8, 8, generator=rng())
    z = net(x, 0.5)
    assert torch.equal(z, seen[0][:, 0])
    with torch.no_grad():
        tokens: list[Tensor] = []
        net.blocks[0].register_forward_pre_hook(lambda m, args: tokens.append(args[0]))
        net(x, 0.5)
        expected = net.class_token + net.positions[:, :1]
        assert torch.allclose(tokens[0][:, :1], expected.expand(3, -1, -1))  # the first token is the class token
        time = net.time(time_features(torch.full((3,), 0.5), 16)) + net.positions[:, 1]
        assert torch.allclose(tokens[0][:, 1], time, atol=1e-6)


def test_time_scales_and_shifts_input_and_representation():
    net: Any = encoder().double()
    with torch.no_grad():
        net.time[-1].bias.copy_(torch.randn(130, generator=rng(), dtype=torch.float64))
    x = torch.rand(2, 1, 8, 8, generator=rng(), dtype=torch.float64)
    bias = net.time[-1].bias
    z = net.backbone((0.5 + 0.25 * x) * (1 + bias[0]) + bias[1]) * (1 + bias[2:66]) + bias[66:]
    assert torch.allclose(net.represent(x, torch.full((2,), 0.7).double()), z)


def test_jitter_turns_and_resizes_both_ways():
    bar = torch.zeros(300, 1, 17, 17)
    bar[:, :, 8, 2:15] = 1.0
    turned = affine_jitter(0.25, 0.0, 0.0)(bar, rng())
    rows = torch.arange(17.0)
    left, right = ((turned[:, 0, :, c] * rows).sum(1) / turned[:, 0, :, c].sum(1) for c in (4, 12))
    slope = torch.atan2(right - left, torch.tensor(8.0))
    assert slope.max() == pytest.approx(0.25, abs=0.03) and slope.min() == pytest.approx(-0.25, abs=0.03)
    disc = torch.zeros(300, 1, 17, 17)
    disc[:, :, 5:12, 5:12] = 1.0
    area = affine_jitter(0.0, 0.15, 0.0)(disc, rng()).sum((1, 2, 3)) / 49
    assert area.min() == pytest.approx(0.85**2, abs=0.05) and area.max() == pytest.approx(1.15**2, abs=0.05)


def test_the_treatment_uses_what_it_pretrained_at_its_own_noise_level():
    task, treatment = digits(904, sizes=(96, 20, 20)), RRCM(sigma=0.5, pretrain_epochs=3, batch_size=32)
    model: Any = treatment.prepare(tiny(), task)[0]
    bare: Any = RRCM(sigma=0.5, pretrain_epochs=0).prepare(tiny(), task)[0]
    assert any(not torch.equal(a, b) for a, b in zip(model.encoder.parameters(), bare.encoder.parameters(), strict=True))  # fmt: skip
    assert model.time.item() == pytest.approx(nearest_time(karras_sigmas(41, tmax=5.0), 0.5), rel=1e-6)
    spread: list[float] = []
    model.encoder.register_forward_hook(lambda m, args, out: spread.append(args[0].std().item()))
    batch: Any = type("B", (), {"x": torch.full((400, 1, 8, 8), 0.5), "y": torch.arange(400) % 10, "generator": rng()})()  # fmt: skip
    treatment.loss(model, batch)
    assert spread[0] == pytest.approx(2 * 0.5, rel=0.02)


def test_the_treatments_views_are_the_tasks_own_augmentation():
    asked: list[int] = []

    def mine(x: Tensor, generator: torch.Generator) -> Tensor:
        asked.append(len(x))
        return x

    task = digits(905, sizes=(40, 20, 20)).changed(augment=(mine,))
    RRCM(pretrain_epochs=1, batch_size=20).prepare(tiny(), task)
    assert asked == [20] * 4  # two views a step
