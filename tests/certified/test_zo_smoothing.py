"""Zeroth-order smoothing: gradient estimates, query counts and budgets, pipelines, certificates, refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.certified.zo_smoothing import (
    Autoencoder,
    BlackBox,
    BlackBoxMap,
    LatentAutoencoder,
    RobustifiedModel,
    ZOSmoothing,
    mnist_autoencoder,
    pretrain_autoencoder,
    reconstruction_stability,
    ssim,
    surrogate,
    train_fo_denoiser,
    train_zo_denoiser,
    zo_gradient,
    zo_queries,
)
from surefoot.core.task import Task, Training
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput, Refused
from surefoot.models.networks import small_cnn
from surefoot.nn.denoisers import DnCNN, denoising_loss, train_denoiser
from surefoot.nn.smoothing import certify, upper_confidence_bound, vote_counts
from surefoot.training.loop import fit


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tanh_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))


def front(q: int = 6) -> tuple[DnCNN, LatentAutoencoder]:
    torch.manual_seed(1)
    return DnCNN(1, depth=3, width=4), LatentAutoencoder((1, 8, 8), q, width=4)


# --- estimates (dossier checks 1, 2, 3, 7) --------------------------------------------------------------------------


def quadratic(dim: int, dtype: torch.dtype) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    a = torch.randn(dim, dim, generator=rng(1), dtype=torch.float64) / dim
    a, b = (a + a.T).to(dtype), torch.randn(dim, generator=rng(2), dtype=torch.float64).to(dtype)
    z = torch.randn(3, dim, generator=rng(3), dtype=torch.float64).to(dtype)
    return lambda p, rows: ((p @ a) * p).sum(1) / 2 + p @ b, z, z @ a + b


@pytest.mark.parametrize(("dtype", "mu", "error"), [(torch.float32, 1e-2, 1e-3), (torch.float32, 0.1, 1e-4), (torch.float64, 1e-4, 1e-8), (torch.float64, 0.005, 1e-8), (torch.float64, 1.0, 1e-8)])  # fmt: skip
def test_cge_is_exact_on_a_quadratic(dtype, mu, error):
    loss, z, gradient = quadratic(7, dtype)
    found = zo_gradient(loss, z, mu=mu)
    assert found.gradient.dtype == dtype and found.queries == 2 * 7 * 3 == zo_queries(3, 7)
    assert (found.gradient - gradient).abs().max().item() < error


def test_rge_is_unbiased_on_a_linear_loss():
    g = torch.randn(12, generator=rng(1), dtype=torch.float64)
    n = 20_000
    found = zo_gradient(lambda p, rows: p @ g, torch.zeros(1, 12, dtype=torch.float64), method="rge", num_queries=n, generator=rng())  # fmt: skip
    off = (found.gradient[0] - g).square().sum().item() / ((12 - 1) / n * g.square().sum().item())
    assert off < 1 + 3 * math.sqrt(2 / 11)  # about chi-squared over its degrees of freedom
    forgotten = found.gradient[0] / 12  # the factor d left out
    assert (forgotten - g).square().sum() / ((12 - 1) / n * g.square().sum()) > 1000


def test_rge_variance_law():
    """One direction: E|g^ - g|^2 = (d - 1)|g|^2; 3072 against 192 dimensions is 16.08."""
    spread = {}
    for d in (192, 3072):
        g = torch.randn(d, generator=rng(1))
        z = torch.zeros(4000, d)
        found = zo_gradient(lambda p, rows, g=g: p.double() @ g.double(), z, method="rge", mu=1.0, num_queries=1, generator=rng(d))  # fmt: skip
        spread[d] = ((found.gradient - g).square().sum(1).mean() / g.square().sum()).item()
        assert spread[d] == pytest.approx(d - 1, rel=4 * 1.42 / math.sqrt(4000))
    assert spread[3072] / spread[192] == pytest.approx(16.08, rel=4 * 2.0 / math.sqrt(4000))


def test_surrogate_has_the_gradient_of_cross_entropy():
    """Against autograd through the same network made white-box, in every parameter of the front."""
    f, y = tanh_net().double(), torch.arange(8) % 10
    front = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(128, 5)).double()
    decoder = nn.Sequential(nn.Linear(5, 64), nn.Sigmoid()).double()
    x = torch.rand(8, 1, 8, 8, generator=rng(), dtype=torch.float64)
    box = BlackBox(f, 10)
    z = front(x)
    found = zo_gradient(lambda p, rows: box.losses(decoder(p), y[rows]), z, mu=1e-3)
    surrogate(z, found.gradient).backward()
    mine = torch.cat([p.grad.flatten() for p in front.parameters() if p.grad is not None])
    true = torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(f(decoder(front(x))), y), list(front.parameters()))])  # fmt: skip
    assert (mine - true).norm() / true.norm() < 1e-3
    assert F.cosine_similarity(mine, true, dim=0).item() > 0.999
    assert found.loss.mean().item() == pytest.approx(F.cross_entropy(f(decoder(z)), y).item(), abs=1e-4)
    assert all(p.grad is None for p in f.parameters())

    def batch_mean(
        p: Tensor, rows: Tensor
    ) -> Tensor:  # the loss averaged before differencing: all samples get one number
        return box.losses(decoder(p), y[rows]).mean().expand(len(p))

    mixed = zo_gradient(batch_mean, z, mu=1e-3).gradient
    assert F.cosine_similarity(mixed.flatten(), found.gradient.flatten(), dim=0).abs() < 0.5
    assert (found.gradient / 5 - found.gradient).norm() > 0.5 * found.gradient.norm()  # a mean over coordinates: 1/q


def looped_cge(loss: Callable[[Tensor, Tensor], Tensor], z: Tensor, mu: float) -> Tensor:
    """Plain reference: one coordinate of all samples at a time."""
    rows, out = torch.arange(len(z)), torch.zeros_like(z)
    for k in range(z.shape[1]):
        e = torch.zeros_like(z)
        e[:, k] = mu
        out[:, k] = (loss(z + e, rows).double() - loss(z - e, rows).double()).to(z.dtype) / (2 * mu)
    return out


@pytest.mark.parametrize("chunk", [1, 7, 64, 4096])
def test_batched_cge_equals_the_loop(chunk):
    f, y = tanh_net().double(), torch.arange(5)
    z = torch.rand(5, 64, generator=rng(), dtype=torch.float64)
    loss = lambda p, rows: F.cross_entropy(f(p), y[rows], reduction="none")  # noqa: E731
    with torch.no_grad():
        assert (zo_gradient(loss, z, chunk=chunk).gradient - looped_cge(loss, z, 0.005)).abs().max() < 1e-6


def test_images_keep_their_shape_and_chunks_stay_small():
    sizes = []

    def loss(p: Tensor, rows: Tensor) -> Tensor:
        sizes.append(len(p))
        return p.square().flatten(1).sum(1)

    z = torch.rand(3, 1, 4, 4, generator=rng(), dtype=torch.float64)
    assert (zo_gradient(loss, z, chunk=10).gradient - 2 * z).abs().max() < 1e-9
    found = zo_gradient(loss, z, method="rge", num_queries=25, chunk=10, generator=rng())
    assert max(sizes) <= 10 and found.queries == 3 * 26
    assert (found.loss - z.square().flatten(1).sum(1)).abs().max() < 1e-12


# --- the black box (4) ----------------------------------------------------------------------------------------------


def test_queries_are_counted_exactly():
    task = digits(911, sizes=(70, 20, 20))
    x, (denoiser, ae) = task.train.x, front()
    for options, step in (({"method": "cge"}, 2 * 6 * 32), ({"method": "rge", "num_queries": 9}, 10 * 32)):
        seen = [0]

        def count(images: np.ndarray, seen: list[int] = seen) -> np.ndarray:
            seen[0] += len(images)
            return np.tile(np.arange(10.0, dtype=np.float32), (len(images), 1)) * images.mean((1, 2, 3))[:, None]

        box = BlackBox(count, 10)
        report = train_zo_denoiser(box, denoiser, x, sigma=0.25, generator=rng(), encoder=ae.encoder, decoder=ae.decoder, epochs=3, batch_size=32, **options)  # type: ignore[arg-type]  # fmt: skip
        assert report.steps == 6 and not report.stopped and len(report.loss_curve) == 3
        assert seen[0] == box.queries == report.queries == 70 + 6 * step
    labelled = BlackBox(lambda a: np.eye(10)[:1].repeat(len(a), 0) * a.mean((1, 2, 3))[:, None], 10)
    report = train_zo_denoiser(labelled, denoiser, x, y=task.train.labels, sigma=0.25, generator=rng(), encoder=ae.encoder, decoder=ae.decoder, epochs=1, batch_size=32)  # fmt: skip
    assert report.queries == 2 * 2 * 6 * 32  # labels given: no query for the targets


def test_numpy_and_torch_boxes_agree():
    """The same function as module and as a callable that knows nothing of torch; the front comes out the same."""
    f = tanh_net()
    w = [p.detach().numpy().copy() for p in f.parameters()]

    def plain(images: np.ndarray) -> np.ndarray:
        assert isinstance(images, np.ndarray)
        return np.tanh(images.reshape(len(images), -1) @ w[0].T + w[1]) @ w[2].T + w[3]

    x, (denoiser, ae) = digits(912, sizes=(64, 20, 20)).train.x, front()
    one, two = (
        train_zo_denoiser(BlackBox(fn, 10), denoiser, x, sigma=0.25, generator=rng(), encoder=ae.encoder, decoder=ae.decoder, epochs=2, batch_size=32, mu=0.05)
        for fn in (f, plain)
    )  # fmt: skip
    assert one.loss_curve == pytest.approx(two.loss_curve, rel=1e-4)
    for p, q in zip(one.denoiser.parameters(), two.denoiser.parameters(), strict=True):
        assert (p - q).abs().max() < 2e-3  # Adam turns rounding into at most steps of lr


def test_a_module_is_asked_without_gradients_and_in_evaluation_mode():
    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_cnn((1, 8, 8), 10)

        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled() and not self.inner.training and not x.requires_grad
            return self.inner(x)

    f = Spy().train()
    kept, (denoiser, ae) = copy.deepcopy(f.state_dict()), front()
    decoder = copy.deepcopy(ae.decoder.state_dict())
    x = digits(913, sizes=(40, 20, 20)).train.x
    report = train_zo_denoiser(BlackBox(f, 10), denoiser, x, sigma=0.25, generator=rng(), encoder=ae.encoder, decoder=ae.decoder, epochs=1, batch_size=20)  # fmt: skip
    assert f.training and all(p.grad is None for p in f.parameters())
    assert all(torch.equal(v, kept[k]) for k, v in f.state_dict().items())
    assert report.decoder is not None and report.encoder is not None
    assert all(torch.equal(v, decoder[k]) for k, v in report.decoder.state_dict().items())
    assert any(not torch.equal(a, b) for a, b in zip(report.encoder.parameters(), ae.encoder.parameters(), strict=True))
    part = train_zo_denoiser(BlackBox(f, 10), denoiser, x, sigma=0.25, generator=rng(), encoder=ae.encoder, decoder=ae.decoder, epochs=1, batch_size=20, trains="part")  # fmt: skip
    assert part.encoder is not None
    assert all(torch.equal(a, b) for a, b in zip(part.encoder.parameters(), ae.encoder.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(part.denoiser.parameters(), denoiser.parameters(), strict=True))


def test_training_stops_at_the_budget_and_never_beyond():
    x, (denoiser, ae) = digits(914, sizes=(64, 20, 20)).train.x, front()
    step = 2 * 6 * 32
    box = BlackBox(tanh_net(), 10, budget=64 + 3 * step + 5)
    run = lambda b: train_zo_denoiser(b, denoiser, x, sigma=0.25, generator=rng(), encoder=ae.encoder, decoder=ae.decoder, epochs=9, batch_size=32)  # noqa: E731  # fmt: skip
    report = run(box)
    assert report.stopped and report.steps == 3 and box.queries == report.queries == 64 + 3 * step
    small = BlackBox(tanh_net(), 10, budget=64 + step - 1)
    with pytest.raises(Refused, match=f"needs {64 + step} queries"):
        run(small)
    assert small.queries == 0  # raised before spending
    with pytest.raises(Refused, match="of the budget of 447"):
        small(torch.rand(448, 1, 8, 8))


def test_probabilities_and_logits_give_the_same_loss():
    f, x, y = tanh_net(), torch.rand(40, 1, 8, 8, generator=rng()), torch.arange(40) % 10
    logits, probabilities = BlackBox(f, 10), BlackBox(lambda a: f(torch.as_tensor(a)).softmax(1).detach().numpy(), 10)
    assert torch.allclose(logits.losses(x, y), probabilities.losses(x, y), atol=1e-5)
    assert probabilities.probabilities and not logits.probabilities


# --- pipelines (6) --------------------------------------------------------------------------------------------------


def test_identity_front_is_the_black_box():
    f, x = tanh_net(), torch.rand(9, 1, 8, 8, generator=rng())
    for model in (f, BlackBox(f, 10)):
        assert torch.equal(RobustifiedModel(model, nn.Identity(), nn.Identity(), nn.Identity())(x), f(x))
    assert torch.equal(
        RobustifiedModel(f, DnCNN(1, depth=4, width=4).eval())(x), f(x)
    )  # an untrained D is the identity


def test_certificates_cost_what_they_say_and_include_the_autoencoder():
    f, (denoiser, ae) = tanh_net(), front()
    box = BlackBox(f, 10)
    model = RobustifiedModel(box, denoiser, ae.encoder, ae.decoder)
    assert not any(k.startswith("model.") for k in model.state_dict())
    x = torch.rand(12, 1, 8, 8, generator=rng())
    found = certify(model, x, sigma=0.25, num_classes=10, generator=rng(), n0=20, n=100)
    assert box.queries == 12 * 120 + 16  # 16: the check that it is deterministic, on 8 inputs
    inside = RobustifiedModel(f, denoiser, ae.encoder, ae.decoder)
    same = certify(inside, x, sigma=0.25, num_classes=10, generator=rng(), n0=20, n=100)
    assert torch.equal(found.prediction, same.prediction) and torch.equal(found.p_lower, same.p_lower)
    bare = certify(RobustifiedModel(f, denoiser), x, sigma=0.25, num_classes=10, generator=rng(), n0=20, n=100)
    assert not torch.equal(bare.p_lower, same.p_lower)  # leaving the autoencoder out certifies another classifier


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 7), (1, 28, 28)])
def test_autoencoder_shapes(shape):
    ae = LatentAutoencoder(shape, 5, width=4)
    x = torch.rand(2, *shape, generator=rng())
    assert ae.encoder(x).shape == (2, 5) and ae(x).shape == x.shape
    assert torch.isfinite(ae.decoder(-10 * torch.ones(2, 5))).all()


def test_the_papers_mnist_autoencoder():
    ae = mnist_autoencoder()
    x = torch.rand(2, 1, 28, 28)
    assert ae.encoder(x).shape == (2, 192) and ae(x).shape == x.shape
    assert ae.decoder(torch.full((1, 192), -0.005)).shape == (1, 1, 28, 28)  # z - mu below a ReLU's zero


def test_pretraining_an_autoencoder_asks_nothing_and_helps():
    x = digits(915, sizes=(300, 50, 50)).train.x
    torch.manual_seed(1)
    ae = LatentAutoencoder((1, 8, 8), 12, width=12)
    kept = copy.deepcopy(ae.state_dict())
    trained = pretrain_autoencoder(ae, x, epochs=60, generator=rng(), lr=5e-3)
    assert F.mse_loss(trained(x), x) < 0.6 * F.mse_loss(ae(x), x)
    assert all(torch.equal(v, kept[k]) for k, v in ae.state_dict().items())
    assert isinstance(trained, Autoencoder) and not trained.training


def test_denoiser_removes_noise():
    x = digits(916, sizes=(300, 50, 100)).train.x
    torch.manual_seed(0)
    start = DnCNN(1, depth=4, width=8)
    trained = train_denoiser(start, x, sigma=0.25, epochs=20, generator=rng(), lr=3e-3)
    with torch.no_grad():
        assert denoising_loss(trained, x, sigma=0.25, generator=rng(1)) < 0.6 * 0.25**2
        assert denoising_loss(start.eval(), x, sigma=0.25, generator=rng(1)).item() == pytest.approx(0.25**2, rel=0.05)
    with pytest.raises(InvalidInput, match=r"images \[B, 1, H, W\]"):
        start(torch.rand(2, 3, 8, 8))


# --- learning -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def victim() -> tuple[nn.Module, Task]:
    task = digits(917, sizes=(700, 50, 200))
    torch.manual_seed(3)
    return fit(small_cnn((1, 8, 8), 10, batch_norm=False), task, Training(epochs=25, lr=3e-3)).model, task


def test_treatment_makes_a_trained_model_certifiable_without_touching_it(victim):
    model, task = victim
    kept, budget = copy.deepcopy(model.state_dict()), 700 + 2 * 16 * 64 * 50
    treatment = ZOSmoothing(epochs=6, autoencoder_epochs=60, depth=3, width=8, query_budget=budget)  # not 60 steps, 50
    treatment.prepare(model, task)
    whole = treatment.finish(model, task)
    assert isinstance(whole, RobustifiedModel) and treatment.queries_ == budget
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    right = {}
    for name, net in (("alone", model), ("behind the front", whole)):
        found = certify(net, task.test.x[:120], sigma=0.25, num_classes=10, generator=rng(), n0=50, n=300)
        right[name] = ((found.prediction == task.test.labels[:120]) & (found.radius >= 0.25)).double().mean().item()
    assert right["behind the front"] > right["alone"] + 0.1


def test_first_order_twin(victim):
    model, task = victim
    model.train()
    kept, (denoiser, ae) = copy.deepcopy(model.state_dict()), front()
    report = train_fo_denoiser(model, denoiser, task.train.x[:256], sigma=0.25, generator=rng(), encoder=ae.encoder, decoder=ae.decoder, epochs=6, batch_size=64, lr=3e-3, trains="whole_plus")  # fmt: skip
    assert report.queries == 0 and report.loss_curve[-1] < report.loss_curve[0]
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    assert report.decoder is not None
    assert any(not torch.equal(a, b) for a, b in zip(report.decoder.parameters(), ae.decoder.parameters(), strict=True))
    model.eval()


def test_reconstruction_of_a_black_box_map():
    """The inverse operator is asked only; training lowers its instability, and a stronger attack does more harm."""
    x = digits(918, sizes=(300, 50, 60)).train.x
    torch.manual_seed(0)
    measure = nn.Linear(64, 40, bias=False)

    class Inverse(nn.Module):  # x -> measurement -> least-squares image
        def forward(self, images: Tensor) -> Tensor:
            a = measure.weight.detach().to(images.dtype)
            return (images.flatten(1) @ a.T @ torch.linalg.pinv(a).T).view_as(images)

    box, (denoiser, _) = BlackBoxMap(Inverse(), (1, 8, 8)), front()
    report = train_zo_denoiser(box, denoiser, x, sigma=0.25, generator=rng(), epochs=6, batch_size=50, lr=5e-3)
    assert report.loss_curve[-1] < 0.9 * report.loss_curve[0]
    assert box.queries == 300 + report.steps * 2 * 64 * 50
    whole = RobustifiedModel(Inverse(), report.denoiser)
    found = reconstruction_stability(whole, x[:20], generator=rng(), radii=(0.0, 1.0, 3.0), steps=10)
    assert found.rmse[0] < found.rmse[1] < found.rmse[2] and found.ssim[0] > found.ssim[1] > found.ssim[2]
    with pytest.raises(InvalidInput, match="no gradients"):
        reconstruction_stability(BlackBoxMap(Inverse(), (1, 8, 8)), x[:4], generator=rng(), radii=(1.0,))


def test_ssim_matches_the_common_implementation():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = (torch.rand(2, 1, 20, 20, generator=rng(s), dtype=torch.float64) for s in (0, 1))
    ours = ssim(a, b)
    for i in range(2):
        full = metrics.structural_similarity(a[i, 0].numpy(), b[i, 0].numpy(), data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True)[1]  # fmt: skip
        assert ours[i].item() == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-9)
    assert torch.allclose(ssim(a, a), torch.ones(2, dtype=torch.float64))


def attack(model: nn.Module, x: Tensor, chosen: Tensor, size: Tensor, seed: int) -> Tensor:
    """From the inside, through denoiser and autoencoder and averaged over noise, to the sphere of that size (at most)."""
    g, z = rng(seed), x + 1e-3 * torch.randn(x.shape, generator=rng(100 + seed))
    for _ in range(3):
        z.requires_grad_(True)
        noise = 0.25 * torch.randn((4, *z.shape), generator=g)
        p = model((z + noise).flatten(0, 1)).softmax(1).unflatten(0, (4, len(z))).mean(0)
        (grad,) = torch.autograd.grad(F.nll_loss(p.clamp(min=1e-9).log(), chosen, reduction="sum"), z)
        with torch.no_grad():
            z = z + 0.5 * size * grad / grad.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
            norm = (z - x).flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
            z = x + (z - x) * (size / norm).clamp(max=1.0)
    return z.detach()


def broken(model: nn.Module, z: Tensor, chosen: Tensor, seed: int, n: int = 200) -> int:
    """Points where the certified class has probability below 1/2 beyond doubt (1e-6)."""
    votes = vote_counts(model, z, n, sigma=0.25, num_classes=10, generator=rng(seed))
    hits = votes.gather(1, chosen[:, None])[:, 0]
    return int((upper_confidence_bound(hits, n, 1e-6) < 0.5).sum())


@pytest.mark.slow
def test_certificates_survive_an_attack(victim):
    """Thousands of white-box attacks within the radius turn no certified point, and three times the radius turns many."""
    model, task = victim
    treatment = ZOSmoothing(epochs=5, autoencoder_epochs=40, depth=3, width=8)
    treatment.prepare(model, task)
    whole, x = treatment.finish(model, task), task.test.x
    found = certify(whole, x, sigma=0.25, num_classes=10, generator=rng(1), n0=50, n=500)
    sure = ~found.abstained
    x, chosen, radius = x[sure], found.prediction[sure], found.radius[sure].float().view(-1, 1, 1, 1)
    tried = 0
    for seed in range(8):
        assert broken(whole, attack(whole, x, chosen, 0.999 * radius, seed), chosen, seed) == 0
        tried += len(x)
    assert tried >= 1000
    assert broken(whole, attack(whole, x, chosen, 3 * radius, 9), chosen, 9) > 10


# --- bad input ------------------------------------------------------------------------------------------------------

X = torch.rand(40, 1, 8, 8, generator=rng())


def train(fn: Callable, **options) -> object:
    denoiser, ae = front()
    settings = {"sigma": 0.25, "generator": rng(), "encoder": ae.encoder, "decoder": ae.decoder, "epochs": 1, "batch_size": 40}  # fmt: skip
    return train_zo_denoiser(BlackBox(fn, 10), denoiser, X, **(settings | options))


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "wrong shape": (lambda: train(lambda a: np.zeros((len(a), 3), np.float32)), r"must answer \[40, 10\], got \[40, 3\]"),
    "NaN": (lambda: train(lambda a: np.full((len(a), 10), np.nan)), "NaN or infinite"),
    "labels": (lambda: train(lambda a: np.zeros(len(a), np.int64)), "hard labels give no gradient"),
    "one-hot": (lambda: train(lambda a: np.eye(10)[np.arange(len(a)) % 10]), "answers hard labels"),
    "latent too large": (lambda: LatentAutoencoder((1, 4, 4), 17), "larger than the input"),
    "mu zero": (lambda: train(tanh_net(), mu=0.0), "mu must be positive"),
    "negative sigma": (lambda: train(tanh_net(), sigma=-0.1), "sigma must be zero or positive"),
    "a mean as loss": (lambda: zo_gradient(lambda p, r: p.mean(), torch.rand(2, 3)), "mixes samples"),
    "rge without generator": (lambda: zo_gradient(lambda p, r: p.sum(1), torch.rand(2, 3), method="rge"), "generator"),
    "encoder alone": (lambda: train(tanh_net(), decoder=None), "together"),
    "a function unwrapped": (lambda: RobustifiedModel(lambda x: x, nn.Identity()), "wrap a function in BlackBox"),  # type: ignore[arg-type]
    "first order through a wall": (
        lambda: train_fo_denoiser(BlackBox(tanh_net(), 10), nn.Identity(), X, sigma=0.1, generator=rng()),  # type: ignore[arg-type]
        "needs an nn.Module",
    ),
    "treatment latent": (lambda: ZOSmoothing(latent_dim=65).check(tanh_net(), digits(0, sizes=(40, 20, 20))), "latent_dim 65"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, sentence = BAD[case]
    with pytest.raises((InvalidInput, Refused), match=sentence):
        call()


# --- what a plausible slip would change -------------------------------------------------------------------------------


def smooth_front() -> tuple[nn.Module, nn.Module, nn.Module]:
    """Denoiser with batch-norm, encoder to 5 numbers, decoder with batch-norm: the parts of a pipeline that have modes."""
    torch.manual_seed(2)
    denoiser = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Tanh(), nn.Conv2d(2, 1, 3, padding=1))
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    decoder = nn.Sequential(nn.Linear(5, 64), nn.BatchNorm1d(64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
    return denoiser.double(), encoder.double(), decoder.double()


@pytest.mark.parametrize("labelled", [False, True])
def test_training_by_queries_is_the_loop_of_the_paper(labelled):
    """Targets from clean images, fresh noise, per-sample central differences, chain rule, Adam with decay, cosine."""
    f, x = tanh_net().double(), torch.rand(30, 1, 8, 8, generator=rng(8), dtype=torch.float64)
    denoiser, encoder, decoder = smooth_front()
    y = (torch.arange(30) * 7) % 10 if labelled else None
    start = [copy.deepcopy(m.state_dict()) for m in (denoiser, encoder, decoder)]
    report = train_zo_denoiser(BlackBox(f, 10), denoiser, x, y=y, sigma=0.3, generator=rng(5), encoder=encoder, decoder=decoder, epochs=2, batch_size=12, lr=0.01, weight_decay=0.05, mu=1e-3)  # fmt: skip
    for module, kept in zip((denoiser, encoder, decoder), start, strict=True):
        assert all(torch.equal(v, kept[k]) for k, v in module.state_dict().items())
    g = rng(5)
    d, e, fixed = copy.deepcopy(denoiser).train(), copy.deepcopy(encoder).train(), copy.deepcopy(decoder).eval()
    targets = f(x).argmax(1) if y is None else y
    weights = [*d.parameters(), *e.parameters()]
    adam, curve = torch.optim.Adam(weights, 0.01, weight_decay=0.05), []
    for k in range(4):
        if k % 2 == 0:
            order = torch.randperm(30, generator=g)
            curve.append([])
        index = order[12 * (k % 2) : 12 * (k % 2) + 12]
        z = e(d(x[index] + 0.3 * torch.randn(12, 1, 8, 8, generator=g, dtype=torch.float64)))
        with torch.no_grad():
            probes = [F.cross_entropy(f(fixed(z + s * 1e-3 * unit)), targets[index], reduction="none") for unit in torch.eye(5).double() for s in (1, -1)]  # fmt: skip
            curve[-1].append(torch.stack(probes).mean())
            slope = torch.stack([(probes[2 * j] - probes[2 * j + 1]) / 2e-3 for j in range(5)], 1)
        for p, v in zip(weights, torch.autograd.grad((z * slope).sum() / 12, weights), strict=True):
            p.grad = v
        adam.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * k / 4)) / 2
        adam.step()
    assert report.encoder is not None and report.decoder is not None
    for mine, plain in zip([*report.denoiser.parameters(), *report.encoder.parameters()], weights, strict=True):
        assert torch.allclose(mine, plain, rtol=1e-5, atol=1e-6)
    assert report.loss_curve == pytest.approx([torch.stack(c).mean().item() for c in curve])
    assert all(not m.training for part in (report.denoiser, report.encoder, report.decoder) for m in part.modules())
    assert all(torch.equal(v, start[2][k]) for k, v in report.decoder.state_dict().items())  # and its statistics stand


def test_defaults_are_the_published_ones():
    import inspect

    defaults = {k: p.default for k, p in inspect.signature(train_zo_denoiser).parameters.items()}
    published = {"method": "cge", "mu": 0.005, "lr": 1e-3, "weight_decay": 1e-4, "batch_size": 256, "epochs": 200}
    assert {k: defaults[k] for k in published} == published


def test_random_directions_lie_on_the_sphere_and_every_sample_asks_about_itself():
    seen: list[tuple[Tensor, Tensor]] = []
    z = torch.randn(7, 6, generator=rng(1), dtype=torch.float64)
    slopes = torch.randn(7, 6, generator=rng(2), dtype=torch.float64)

    def loss(p: Tensor, rows: Tensor) -> Tensor:
        seen.append((p, rows))
        return (p * slopes[rows]).sum(1)

    found = zo_gradient(loss, z, method="rge", mu=0.1, num_queries=2000, chunk=5000, generator=rng())
    assert F.cosine_similarity(found.gradient, slopes).min() > 0.9  # chunks of two samples each
    points, rows = torch.cat([p for p, _ in seen]), torch.cat([r for _, r in seen])
    distance = (points - z[rows]).norm(dim=1)
    assert torch.allclose(distance[distance > 0], torch.tensor(0.1, dtype=torch.float64))
    assert torch.allclose(found.loss, (z * slopes).sum(1))
    central = zo_gradient(loss, z, mu=0.1)
    assert torch.allclose(central.loss, (z * slopes).sum(1))  # of each sample, not of the batch


def test_the_surrogate_passes_nothing_to_the_estimate():
    z, estimate = (torch.randn(3, 4, generator=rng(s)).requires_grad_() for s in (0, 1))
    surrogate(z, estimate).backward()
    assert estimate.grad is None and z.grad is not None and torch.allclose(z.grad, estimate.detach() / 3)


def test_a_box_of_arrays_takes_tensors_that_want_gradients():
    box = BlackBox(lambda a: a.reshape(len(a), -1)[:, :10] * 2.0, 10)
    assert not box(torch.rand(3, 1, 8, 8).requires_grad_()).requires_grad


def test_differences_of_losses_are_taken_in_float64():
    """Losses near 1e4 in float32 move in steps of 1e-3; those a black box answers in float64 do not."""
    z = torch.zeros(1, 2)
    found = zo_gradient(lambda p, rows: p.double().sum(1) + 1e4, z, mu=1e-4)
    assert torch.allclose(found.gradient, torch.ones(1, 2), rtol=1e-4)


def test_a_probability_of_exactly_zero_has_a_finite_loss():
    answers = np.tile(np.array([[0.75, 0.25, 0.0]]), (2, 1))
    loss = BlackBox(lambda a: answers, 3).losses(torch.rand(2, 4), torch.tensor([2, 0]))
    assert loss.tolist() == pytest.approx([-math.log(1e-6), -math.log(0.75)])


def test_reconstruction_error_is_a_mean_over_images_of_roots():
    x = torch.zeros(2, 1, 4, 4)
    off = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    found = reconstruction_stability(lambda v: v + off, x, generator=rng(), radii=(0.0,))
    assert found.rmse[0] == pytest.approx(2.0)
    grown = reconstruction_stability(lambda v: 2 * v, x[:1] + 0.5, generator=rng(), radii=(0.0, 2.0), steps=30)
    assert 1.35 < grown.rmse[1] <= 0.5 + 2 * 2.0 / 4 + 1e-5  # nearly along the error, and never beyond the radius
    box = BlackBoxMap(lambda a: a, (1, 4, 4))
    assert box.losses(x + 2.0, x).tolist() == [4.0, 4.0]  # a mean over pixels


def test_the_treatment_trains_at_its_own_noise_and_returns_all_it_trained(monkeypatch):
    from surefoot.certified.zo_smoothing import treatment as module

    seen: dict[str, object] = {}
    real = module.train_zo_denoiser

    def spy(*args, **options):
        seen.update(options)
        seen["report"] = report = real(*args, **options)
        return report

    monkeypatch.setattr(module, "train_zo_denoiser", spy)
    task, model = digits(919, sizes=(64, 20, 20)), tanh_net()
    whole = ZOSmoothing(sigma=0.4, epochs=1, autoencoder_epochs=1, depth=2, width=2).finish(model, task)
    assert isinstance(whole, RobustifiedModel) and seen["sigma"] == 0.4 and seen.get("y") is None
    report = seen["report"]
    assert (whole.denoiser, whole.encoder, whole.decoder) == (report.denoiser, report.encoder, report.decoder)  # type: ignore[attr-defined]  # fmt: skip
    assert whole.model is model


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.0}, "lr"),
        ({"mu": 0.0}, "mu"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"num_queries": 3}, "num_queries"),
        ({"y": torch.full((40,), 10)}, r"\[0, 10\)"),
        ({"y": torch.arange(9)}, "9 labels for 40"),
    ],
)
def test_wrong_settings_cost_no_query(options, words):
    denoiser, ae = front()
    box = BlackBox(tanh_net(), 10)
    settings = {"sigma": 0.25, "generator": rng(), "encoder": ae.encoder, "decoder": ae.decoder, "epochs": 1}
    with pytest.raises(InvalidInput, match=words):
        train_zo_denoiser(box, denoiser, X, **(settings | options))
    assert box.queries == 0
    with pytest.raises(InvalidInput, match="NaN"):
        pretrain_autoencoder(ae, X * math.nan, epochs=1, generator=rng())
    with pytest.raises(InvalidInput, match="9 labels"):
        train_fo_denoiser(tanh_net(), denoiser, X, y=torch.arange(9), sigma=0.1, generator=rng(), epochs=1)


def test_a_decoder_that_is_trained_keeps_its_statistics():
    denoiser, encoder, decoder = smooth_front()
    kept = copy.deepcopy(decoder.state_dict())
    x = torch.rand(12, 1, 8, 8, generator=rng(8), dtype=torch.float64)
    report = train_fo_denoiser(tanh_net().double(), denoiser, x, sigma=0.3, generator=rng(), encoder=encoder, decoder=decoder, epochs=1, batch_size=6, trains="whole_plus")  # fmt: skip
    assert report.decoder is not None
    after = report.decoder.state_dict()
    assert torch.equal(after["1.running_mean"], kept["1.running_mean"]) and not torch.equal(after["0.weight"], kept["0.weight"])  # fmt: skip
