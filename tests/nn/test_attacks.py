"""Attacks: exact values on linear models, the checkpoint rule, honesty of the suites, and what is refused."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from surefoot.errors import InvalidInput
from surefoot.nn.attacks import (
    ZeroGradient,
    adaptive_suite,
    apgd,
    checkpoints,
    decide,
    dlr,
    fab,
    is_random,
    margin,
    masking_diagnostics,
    pgd,
    pgd_train,
    plane_step,
    rand_suite,
    square,
    standard_suite,
    targeted_dlr,
)
from surefoot.nn.attacks.ball import Ball
from surefoot.nn.attacks.square import square_share


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    """A CNN trained against PGD for a few epochs, and 300 test images it has not seen."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)
    order, noise = torch.randperm(len(x), generator=generator()), generator(1)
    train, test = order[:1000], order[1000:1300]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Dropout(0.1), nn.Linear(512, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for _ in range(8):
            for index in train[torch.randperm(len(train), generator=noise)].split(64):
                moved = pgd_train(model, x[index], y[index], eps=0.1, steps=4, generator=noise)
                loss = nn.functional.cross_entropy(model(moved), y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval(), x[test], y[test]


class Linear2(nn.Module):
    """Two logits (0, w.x + b): the margin of class 1 moves by exactly eps ||w||_dual."""

    def __init__(self, features: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(features, generator=generator(3), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1) @ self.w
        return torch.stack([torch.zeros_like(z), z], 1)


ATTACKS = {
    "pgd": lambda *a, **k: pgd(*a, steps=20, **k),
    "apgd": lambda *a, **k: apgd(*a, steps=20, **k),
    "apgd-dlr": lambda *a, **k: apgd(*a, steps=20, loss="dlr", **k),
    "square": lambda *a, **k: square(*a, queries=60, **k),
    "fab": lambda *a, **k: fab(*a, steps=10, restarts=2, **k),
    "fab-t": lambda m, x, y, **k: fab(m, x, y, steps=10, target=(y + 1) % 10, **k),
    "apgd-t": lambda m, x, y, **k: apgd(m, x, y, steps=20, target=(y + 1) % 10, **k),
}


def test_checkpoints():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(20) == [5, 9, 12, 14, 16, 18, 19, 20]
    assert checkpoints(1) == [1]


def test_dlr_does_not_see_shift_or_scale():
    logits, y = (
        torch.randn(64, 6, generator=generator(), dtype=torch.float64),
        torch.randint(6, (64,), generator=generator()),
    )
    target = (y + 1) % 6
    for loss in (dlr, lambda z, y: targeted_dlr(z, y, target)):
        np.testing.assert_allclose(loss(7.5 * logits - 3.0, y), loss(logits, y), rtol=1e-9)
    wrong = logits.argmax(1) != y
    assert ((dlr(logits, y) > 0) == wrong).all()
    assert ((margin(logits, y) > 0) == wrong).all()


def test_losses_by_hand():
    logits, y = torch.tensor([[4.0, 1.0, 2.0, -1.0]]), torch.tensor([0])
    assert margin(logits, y).item() == -2.0
    assert dlr(logits, y).item() == pytest.approx(-2.0 / 3.0)
    assert targeted_dlr(logits, y, torch.tensor([1])).item() == pytest.approx(-3.0 / (4.0 - 0.0))
    two, three = logits[:, :2], logits[:, :3]
    assert dlr(two, y).item() == margin(two, y).item() == -3.0
    assert targeted_dlr(three, y, torch.tensor([2])).item() == -2.0


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ["pgd", "apgd"])
def test_linear_model_is_attacked_exactly(attack, norm):
    model = Linear2(16)
    x, y = torch.full((8, 16), 0.5, dtype=torch.float64), torch.tensor([0, 1] * 4)
    x = x + 0.05 * torch.randn(x.shape, generator=generator(5), dtype=x.dtype)
    found = ATTACKS[attack](model, x, y, eps=0.1, norm=norm, loss="margin", early_stop=False, random_start=False)
    dual = model.w.norm(p=1 if norm == "linf" else 2).item()
    with torch.no_grad():
        clean = margin(model(x), y)
        robust = (clean + 0.1 * dual) <= 0  # those that cannot be broken keep their best-loss point
        np.testing.assert_allclose(margin(model(found.x), y)[robust], (clean + 0.1 * dual)[robust], atol=1e-6)
    assert (found.broken == ~robust).all()
    far = ATTACKS[attack](model, x, y, eps=1e-3, norm=norm, loss="margin", random_start=False)
    with torch.no_grad():
        np.testing.assert_allclose(margin(model(far.x), y)[~far.broken], (clean + 1e-3 * dual)[~far.broken], atol=1e-8)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ATTACKS)
def test_stays_in_ball_and_bounds_and_leaves_the_model_alone(digits, name, norm):
    model, x, y = copy.deepcopy(digits[0]), digits[1][:64], digits[2][:64]
    model.train()
    model[0].eval()  # a mixed flag must come back too
    flags = [module.training for module in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seed, given = torch.get_rng_state(), x.clone()
    eps = 0.1 if norm == "linf" else 0.5
    with torch.no_grad():
        found = ATTACKS[name](model, x, y, eps=eps, norm=norm, generator=generator())
    delta = (found.x - x).flatten(1)
    length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert length.max() <= eps + 1e-6
    assert found.x.min() >= 0
    assert found.x.max() <= 1
    assert found.broken.any()
    assert found.passes > len(x)
    assert torch.equal(torch.get_rng_state(), seed)
    assert torch.equal(x, given)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.eval()
    with torch.no_grad():  # what is called broken is broken for anybody who looks
        assert ((model(found.x).argmax(1) != y) == found.broken).float().mean() > 0.98
        np.testing.assert_allclose(found.loss.isfinite().float().mean(), 1.0)
    again = ATTACKS[name](model, x, y, eps=eps, norm=norm, generator=generator())
    assert torch.equal(again.x, found.x)


@pytest.mark.parametrize("name", ATTACKS)
def test_eps_zero_returns_the_input(digits, name):
    model, x, y = digits
    found = ATTACKS[name](model, x[:8], y[:8], eps=0.0, generator=generator())
    assert torch.equal(found.x, x[:8])
    assert torch.equal(pgd_train(model, x[:8], y[:8], eps=0.0), x[:8])


def test_train_mode_puts_batch_norm_back(digits):
    model, x, y = copy.deepcopy(digits[0]), digits[1][:32], digits[2][:32]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    a = pgd(model, x, y, eps=0.1, steps=3, mode="train", early_stop=False, generator=generator())
    b = pgd(model, x, y, eps=0.1, steps=3, mode="eval", early_stop=False, generator=generator())
    assert not torch.equal(a.x, b.x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", [pgd, apgd, fab])
def test_order_of_the_batch_does_not_matter(digits, attack, norm):
    model, x, y = digits
    model, x = copy.deepcopy(model).double(), x.double()[:50]
    order = torch.randperm(50, generator=generator())
    settings = {"eps": 0.1 if norm == "linf" else 0.5, "norm": norm, "steps": 15, "random_start": False}
    plain = attack(model, x, y[:50], **settings)
    mixed = attack(model, x[order], y[:50][order], **settings)
    np.testing.assert_allclose(mixed.x, plain.x[order], atol=1e-9)
    assert torch.equal(mixed.broken, plain.broken[order])


def test_apgd_best_loss_never_falls_and_the_early_stop_changes_no_verdict(digits):
    model, x, y = digits
    whole = apgd(model, x, y, eps=0.1, steps=30, early_stop=False, record=True, generator=generator())
    assert whole.history is not None
    assert whole.history.shape == (31, len(x))
    assert (whole.history.diff(dim=0) >= 0).all()
    assert (whole.history[-1] > whole.history[0]).float().mean() > 0.9
    short = apgd(model, x, y, eps=0.1, steps=30, generator=generator())
    assert (short.broken != whole.broken).sum() <= 1  # float rounding of another batch size may move one
    assert short.passes < whole.passes


def test_apgd_step_rule_against_a_plain_loop():
    """One example at a time, straight from the paper's algorithm, must give what the batched code gives."""
    net = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4)).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator(i), dtype=p.dtype))
    x, y = torch.rand(5, 6, generator=generator(9), dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    found = apgd(net, x, y, eps=0.3, steps=50, random_start=False, early_stop=False, record=True)
    assert found.history is not None
    for i in range(5):
        history = _plain_apgd(net, x[i : i + 1], y[i : i + 1], 0.3, 50)
        np.testing.assert_allclose(found.history[:, i], history, rtol=1e-9)


def _plain_apgd(net: nn.Module, x0: Tensor, y: Tensor, eps: float, steps: int) -> list[float]:
    def look(x: Tensor) -> tuple[float, Tensor]:
        x = x.clone().requires_grad_()
        value = nn.functional.cross_entropy(net(x), y)
        return value.item(), torch.autograd.grad(value, x)[0]

    def project(x: Tensor) -> Tensor:
        return (x0 + (x - x0).clamp(-eps, eps)).clamp(0, 1)

    eta, x, previous, (f, g) = 2 * eps, x0, x0, look(x0)
    best, best_x, best_g, history = f, x, g, [f]
    marks, last, raised, halved, at_mark = checkpoints(steps), 0, 0, True, f
    for k in range(1, steps + 1):
        z = project(x + eta * g.sign())
        new = z if k == 1 else project(x + 0.75 * (z - x) + 0.25 * (x - previous))
        previous, x, old = x, new, f
        f, g = look(x)
        raised += f > old
        if f > best:
            best, best_x, best_g = f, x, g
        history.append(best)
        if k in marks:
            halved = raised < 0.75 * (k - last) or (not halved and best == at_mark)
            if halved:
                eta, x, previous, f, g = eta / 2, best_x, best_x, best, best_g
            at_mark, last, raised = best, k, 0
    return history


def test_start_is_used_and_projected(digits):
    model, x, y = digits
    start = x + 0.5
    found = apgd(model, x, y, eps=0.05, steps=1, start=start, early_stop=False, record=True)
    with torch.no_grad():
        first = nn.functional.cross_entropy(model((x + 0.05).clamp(0, 1)), y, reduction="none")
    assert found.history is not None
    np.testing.assert_allclose(found.history[0], first, rtol=1e-4, atol=1e-6)


def test_random_points_fill_the_ball():
    x = torch.full((4000, 6), 0.5)
    linf = Ball.around(x, 0.2, "linf", (0, 1)).sample(generator()) - 0.5
    assert linf.abs().max() <= 0.2 + 1e-6
    assert linf.std().item() == pytest.approx(0.2 / 3**0.5, rel=0.03)
    l2 = (Ball.around(x, 0.2, "l2", (0, 1)).sample(generator()) - 0.5).norm(dim=1) / 0.2
    assert l2.max() <= 1 + 1e-5
    assert (l2**6).mean().item() == pytest.approx(0.5, abs=0.02)  # radius^d is uniform


def test_square_schedule_is_the_papers():
    shares = [square_share(i, 10_000) for i in (0, 10, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)]
    assert shares == [0.8, 0.8, *(0.8 / 2**k for k in range(1, 10))]
    assert square_share(401, 1000) == square_share(4010, 10_000)


@pytest.mark.parametrize("shape", [(12,), (2, 9)])
def test_square_and_apgd_on_vectors_and_signals(shape):
    model = Linear2(int(np.prod(shape)), torch.float32)
    x, y = torch.rand((40, *shape), generator=generator()), torch.randint(2, (40,), generator=generator())
    for attack in (square, apgd):
        more: dict[str, Any] = {"queries": 300} if attack is square else {}
        found = attack(model, x, y, eps=0.2, bounds=None, generator=generator(), **more)
        with torch.no_grad():
            reachable = margin(model(x), y) + 0.2 * model.w.abs().sum() > 0
        assert (found.broken & ~reachable).sum() == 0
        assert found.broken.sum() >= 0.9 * reachable.sum()


def test_suite_is_no_kinder_than_any_attack_in_it(digits):
    model, x, y = digits
    x, y = x[:120], y[:120]
    suite = standard_suite(model, x, y, eps=0.1, steps=20, queries=200, generator=generator())
    assert suite.clean_accuracy > 0.9
    assert 0.05 < suite.robust_accuracy < suite.clean_accuracy
    assert list(suite.survivors) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(suite.survivors.values()) == sorted(suite.survivors.values(), reverse=True)
    assert suite.survivors["square"] == suite.robust.sum()
    assert suite.notes == ()
    for name in suite.survivors:
        alone = standard_suite(model, x, y, eps=0.1, attacks=(name,), steps=20, queries=200, generator=generator())
        # the same starts for APGD; one example of slack for the float rounding of other batch sizes and Square's own luck
        assert suite.robust.sum() <= alone.robust.sum() + 1
    with torch.no_grad():
        right = model(suite.x).argmax(1) == y
    assert (right == suite.robust).float().mean() > 0.99
    assert (np.array(suite.broken_by) != "").sum() == (suite.clean & ~suite.robust).sum()


def test_suite_cuts_targets_and_records_fallbacks():
    model, x = Linear2(8, torch.float32), torch.rand(30, 8, generator=generator())
    with torch.no_grad():
        y = model(x).argmax(1)
    suite = standard_suite(model, x, y, eps=0.02, steps=10, queries=20, generator=generator())
    assert any("only 1 other" in note for note in suite.notes)
    assert any("4 classes" in note for note in suite.notes)
    with torch.no_grad():
        robust = margin(model(x), y) + 0.02 * model.w.abs().sum() < 0
    assert abs(int(suite.robust.sum()) - int(robust.sum())) <= 1  # bounds may protect a pixel or two
    assert apgd(model, x, y, loss="dlr", eps=0.01, steps=2).notes == (
        "DLR needs 3 classes; the margin was used instead.",
    )


class Noisy(nn.Module):
    """A random model: noise from torch's global state on the input."""

    def __init__(self, model: nn.Module, sigma: float) -> None:
        super().__init__()
        self.model, self.sigma = model, sigma

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + self.sigma * torch.randn_like(x))


def test_random_models(digits):
    model, x, y = digits
    noisy = Noisy(model, 0.1)
    assert is_random(noisy, x[:4])
    assert not is_random(model, x[:4])
    seed = torch.get_rng_state()
    suite = rand_suite(noisy, x[:60], y[:60], eps=0.1, steps=10, eot=4, draws=5, generator=generator())
    assert torch.equal(torch.get_rng_state(), seed)
    assert suite.decision == "majority"
    assert suite.draws == 5
    assert 0 < suite.clean_error < 0.05
    assert 0 < suite.robust_accuracy < suite.clean_accuracy - 0.1
    answer, votes = decide(noisy, x[:60], draws=9, decision="mean", generator=generator())
    assert votes.shape == (9, 60)
    assert ((votes == answer).double().mean() > 0.8).item()
    again = rand_suite(noisy, x[:60], y[:60], eps=0.1, steps=10, eot=4, draws=5, generator=generator())
    assert torch.equal(again.robust, suite.robust)


def test_averaged_gradients_beat_single_draws(digits):
    model, x, y = digits
    noisy = Noisy(model, 0.25)
    one, many = (
        decide(noisy, pgd(noisy, x, y, eps=0.1, steps=10, eot=m, early_stop=False, generator=generator(1)).x, draws=15,
               generator=generator(2))[0].ne(y).sum()
        for m in (1, 10)
    )  # fmt: skip
    assert many > one


class Quantized(nn.Module):
    """Hides its gradient: the input is rounded, so that the true gradient is zero, and any attack by gradient finds nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x * 16).round() / 16)


def test_adaptive_suite_sees_through_a_masked_model(digits):
    model, x, y = digits
    masked, x, y = Quantized(model), x[:100], y[:100]
    naive = standard_suite(masked, x, y, eps=0.1, attacks=("apgd-ce", "apgd-t"), steps=10, generator=generator())
    assert naive.robust_accuracy == naive.clean_accuracy
    assert any("zero" in note for note in naive.notes)
    honest = adaptive_suite(
        masked,
        x,
        y,
        surrogate=model,
        components=(model,),
        eps=0.1,
        steps=10,
        restarts=1,
        queries=50,
        generator=generator(),
    )
    true = standard_suite(model, x, y, eps=0.1, attacks=("apgd-ce", "apgd-t"), steps=10, generator=generator())
    assert honest.robust_accuracy < naive.robust_accuracy - 0.1
    assert abs(honest.robust_accuracy - true.robust_accuracy) < 0.1
    assert {"pipeline", "surrogate", "component 0", "long", "square"} <= set(honest.survivors)


def test_masking_diagnostics_tell_honest_from_masked(digits):
    model, x, y = digits
    honest = masking_diagnostics(model, x[:100], y[:100], eps=0.1, queries=200, undefended=model, generator=generator())
    assert not honest.suspicious
    assert honest.warnings == ()
    assert len(honest.checks) == 8
    masked = masking_diagnostics(Quantized(model), x[:100], y[:100], eps=0.1, queries=200, undefended=model, generator=generator())  # fmt: skip
    raised = {check.name for check in masked.checks if check.suspicious}
    assert {"zero_gradient", "black_box", "large_radius", "transfer", "noise"} <= raised
    assert len(masked.warnings) == len(raised)
    sparse = lambda z: model(nn.functional.dropout(z, 0.9))  # noqa: E731  a tenth of the pixels, drawn anew at each call
    noisy = masking_diagnostics(sparse, x[:60], y[:60], eps=0.1, queries=20, generator=generator())
    assert "gradient_noise" in {check.name for check in noisy.checks if check.suspicious}


def test_saturated_softmax_is_called_masking():
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.bias)
    nn.init.eye_(layer.weight)
    sharp = nn.Sequential(layer, nn.Softmax(1))
    x, y = torch.eye(4)[:3], torch.arange(3)
    with pytest.raises(ZeroGradient, match="masked"):
        pgd(lambda z: sharp(1e4 * z), x, y, eps=0.1, steps=2, random_start=False)
    with pytest.raises(ZeroGradient, match="no gradient"):
        pgd(lambda z: sharp(z).detach(), x, y, eps=0.1, steps=2)


BAD = {
    "within bounds": {"x": torch.full((4, 3), 1.5)},
    "eps must be": {"eps": -0.1},
    "norm must be": {"norm": "l1"},
    "float32 or float64": {"x": torch.rand(4, 3).half()},
    "int64": {"y": torch.zeros(4)},
    "shape": {"y": torch.zeros(3, dtype=torch.int64)},
    "finite": {"x": torch.full((4, 3), torch.nan)},
    "non-empty": {"x": torch.rand(0, 3), "y": torch.zeros(0, dtype=torch.int64)},
    "return logits": {"model": lambda x: x[:, 0]},
    "two classes": {"model": lambda x: x[:, :1], "y": torch.zeros(4, dtype=torch.int64)},
    "NaN": {"model": lambda x: x * torch.nan},
    "lie in 0": {"y": torch.full((4,), 7)},
    "mode must be": {"mode": "training"},
    "bounds must be": {"bounds": (1.0, 0.0)},
}


@pytest.mark.parametrize("attack", [pgd, pgd_train, apgd, fab, square, standard_suite])
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_sentence(attack, message):
    given = {"model": nn.Linear(3, 3), "x": torch.rand(4, 3), "y": torch.zeros(4, dtype=torch.int64), "eps": 0.1} | BAD[
        message
    ]
    with pytest.raises(InvalidInput, match=message):
        attack(given.pop("model"), given.pop("x"), given.pop("y"), **given)


def test_more_bad_input(digits):
    model, x, y = digits
    with torch.inference_mode(), pytest.raises(InvalidInput, match="inference_mode"):
        pgd(model, x.clone(), y, eps=0.1)
    with pytest.raises(InvalidInput, match="steps"):
        pgd(model, x, y, steps=0)
    with pytest.raises(InvalidInput, match="loss must be one of"):
        apgd(model, x, y, loss="hinge")
    with pytest.raises(InvalidInput, match="attacks must be one of"):
        standard_suite(model, x, y, attacks=("fab",))
    with pytest.raises(InvalidInput, match="keep must be one of"):
        pgd(model, x, y, keep="best")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="5 x 5"):
        square(nn.Linear(3, 2), torch.rand(2, 3), torch.zeros(2, dtype=torch.int64), norm="l2")
    with pytest.raises(InvalidInput, match="record"):
        apgd(model, x, y, record=True)


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.5)])
def test_agrees_with_torchattacks(digits, norm, eps):
    """Within half a point, or two standard deviations of what another random start moves (about 1 of 300 examples)."""
    peer = pytest.importorskip("torchattacks")
    model, x, y = digits
    shared, name = {"eps": eps, "norm": norm}, {"linf": "Linf", "l2": "L2"}[norm]
    ours = {
        "APGD": apgd(model, x, y, steps=50, **shared).broken,
        "APGDT": ~standard_suite(model, x, y, attacks=("apgd-t",), steps=20, **shared).robust,
        "FAB": fab(model, x, y, steps=20, **shared).broken,
        "Square": square(model, x, y, queries=300, **shared).broken,
    }
    attacks = {
        "APGD": peer.APGD(model, norm=name, eps=eps, steps=50),
        "APGDT": peer.APGDT(model, norm=name, eps=eps, steps=20, n_classes=10),
        "FAB": peer.FAB(model, norm=name, eps=eps, steps=20, n_classes=10),
        "Square": peer.Square(model, norm=name, eps=eps, n_queries=300),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for kind, attack in attacks.items():
            moved = attack(x, y)
            length = (moved - x).flatten(1).norm(dim=1) if norm == "l2" else (moved - x).flatten(1).abs().amax(1)
            with torch.no_grad():
                theirs = ((model(moved).argmax(1) != y) & (length <= eps + 1e-5)) | (model(x).argmax(1) != y)
            # a short random search ends where its luck takes it; it may only not be weaker
            gap = theirs.double().mean().item() - ours[kind].double().mean().item()
            slack = max(0.005, 2 / len(x)) + 1e-9 if kind != "Square" else 0.02
            assert gap <= slack, kind
            assert kind == "Square" or gap >= -slack, kind
    suite = standard_suite(model, x, y, steps=20, queries=300, **shared)
    assert all(suite.robust_accuracy <= 1 - broken.double().mean().item() + 2 / len(x) for broken in ours.values())


def test_suite_goes_on_when_nothing_is_left():
    """Once every example is broken, or none was right, the later attacks have nothing to do."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    worst = model(x).argmin(1)
    result = standard_suite(model, x, worst, eps=0.1, steps=3, queries=5)
    assert result.robust_accuracy == 0.0
    assert set(result.survivors.values()) == {0}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("bounded", [True, False])
def test_projection_on_a_plane_within_the_box_is_exact(norm, bounded):
    """Against bisection on the step's time, and where the plane is out of reach, the corner."""
    source = generator(4)
    x, w = torch.rand(300, 12, generator=source, dtype=torch.float64), torch.randn(300, 12, generator=source, dtype=torch.float64)  # fmt: skip
    w[:, 0] = 0.0
    c = 4 * torch.randn(300, generator=source, dtype=torch.float64)
    low, high = (0.0, 1.0) if bounded else (-torch.inf, torch.inf)
    step = plane_step(x, w, c, low, high, norm)
    room = torch.where((w > 0) == (c >= 0)[:, None], high - x, x - low)
    speed = w.abs() if norm == "l2" else torch.ones_like(w)
    least, most = torch.zeros(300, 1, dtype=torch.float64), torch.full((300, 1), 1e6, dtype=torch.float64)
    for _ in range(200):
        time = (least + most) / 2
        short = (w.abs() * torch.minimum(time * speed, room)).sum(1, keepdim=True) < c.abs()[:, None]
        least, most = torch.where(short, time, least), torch.where(short, most, time)
    expected = torch.minimum(most * speed, room) * torch.where(c >= 0, 1.0, -1.0)[:, None] * w.sign()
    np.testing.assert_allclose(step, expected, atol=1e-9)
    reachable = (w.abs() * room).nan_to_num(0.0, posinf=torch.inf).sum(1) >= c.abs()
    np.testing.assert_allclose((w * step).sum(1)[reachable], c[reachable], atol=1e-9)
    assert bool(reachable.all()) != bounded


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targeted", [True, False])
def test_fab_finds_the_smallest_change_of_a_linear_model(norm, targeted):
    """|f(x)| / ||w||_dual, where the bounds are far."""
    model = Linear2(16)
    x = 0.5 + 0.05 * torch.randn(8, 16, generator=generator(5), dtype=torch.float64)
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(1)
    exact = margin(logits, y).abs() / model.w.norm(p=1 if norm == "linf" else 2).item()
    found = fab(model, x, y, norm=norm, steps=30, target=1 - y if targeted else None, bounds=None)
    assert found.distance is not None
    assert (found.distance >= exact).all()
    np.testing.assert_allclose(found.distance, exact, rtol=0.02)
    assert found.broken.all()
    with torch.no_grad():
        assert (model(found.x).argmax(1) != y).all()
    middle = exact.median().item()
    within = fab(model, x, y, eps=middle * 1.1, norm=norm, steps=30, bounds=None)
    assert (within.broken == (exact <= middle * 1.1 / 1.001)).all()
    assert torch.equal(within.x[~within.broken], x[~within.broken])


def test_restarts_never_hurt(digits):
    model, x, y = digits
    for norm in ("linf", "l2"):
        one, three = (fab(model, x, y, norm=norm, steps=15, restarts=n) for n in (1, 3))
        assert one.distance is not None
        assert three.distance is not None
        assert (three.distance <= one.distance).all()
        assert (three.distance < one.distance - 1e-5).sum() >= 5
        with torch.no_grad():
            assert (model(three.x).argmax(1) != y).all()
        length = (three.x - x).flatten(1).norm(dim=1) if norm == "l2" else (three.x - x).flatten(1).abs().amax(1)
        np.testing.assert_allclose(length, three.distance, atol=1e-5)
    one, three = (apgd(model, x, y, eps=0.1, steps=5, restarts=n, generator=generator()).broken for n in (1, 3))
    assert (one <= three).all()
    few, more = (standard_suite(model, x[:100], y[:100], eps=0.1, steps=5, attacks=("apgd-ce",), restarts=n, generator=generator()) for n in (1, 2))  # fmt: skip
    assert (more.robust <= few.robust).all()
    assert more.passes > few.passes


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_restarts_begin_halfway_to_what_is_known(norm):
    """At min(eps, nearest so far) / 2 from the clean point."""
    model, x, seen = Linear2(6), torch.full((3, 6), 0.5, dtype=torch.float64), []

    def watched(z: Tensor) -> Tensor:
        seen.append((z.detach() - 0.5).flatten(1))
        return model(z)

    with torch.no_grad():
        logits = model(x)
    y, far = logits.argmax(1), 1.05 * logits.diff(dim=1).abs()[0] / model.w.norm(p=1 if norm == "linf" else 2)
    for eps in (0.5 * far.item(), None):
        seen.clear()
        fab(watched, x, y, eps=eps, norm=norm, steps=1, restarts=2, bounds=None, early_stop=False)
        start = seen[6]  # after the clean point, a start there, its step and three halvings
        away = start.norm(dim=1) if norm == "l2" else start.abs().amax(1)
        np.testing.assert_allclose(away, far.item() / (2 if eps is None else 4), rtol=1e-6)
        assert not torch.equal(start[0], start[1])


def test_attack_target_sees_through_a_masked_model(digits):
    """Gradients of the bare network, points judged by the pipeline that hides them."""
    model, x, y = digits[0], digits[1][:100], digits[2][:100]
    masked = Quantized(model)
    settings = {"eps": 0.1, "attacks": ("apgd-ce", "apgd-t", "fab-t"), "steps": 15}
    naive = standard_suite(masked, x, y, generator=generator(), **settings)
    seen = standard_suite(masked, x, y, attack_target=model, generator=generator(), **settings)
    true = standard_suite(model, x, y, generator=generator(), **settings)
    assert naive.robust_accuracy == naive.clean_accuracy
    assert seen.robust_accuracy < naive.robust_accuracy - 0.1
    assert abs(seen.robust_accuracy - true.robust_accuracy) < 0.1
    assert any("stand-in" in note for note in seen.notes)
    assert "FAB-T was left out." in seen.notes
    with torch.no_grad():
        assert ((masked(seen.x).argmax(1) == y) == seen.robust).all()  # judged by the real model, not by the target
    noisy = rand_suite(Noisy(masked, 0.02), x, y, attack_target=Noisy(model, 0.02), eps=0.1, steps=10, eot=3, draws=5, generator=generator())  # fmt: skip
    assert noisy.robust_accuracy < naive.robust_accuracy - 0.1


def test_strongest_point_transfers_further_than_the_first(digits):
    model, x, y = digits
    first, strongest = (apgd(model, x, y, eps=0.1, steps=20, early_stop=False, loss="margin", keep=k) for k in ("first", "strongest"))  # fmt: skip
    assert (strongest.loss >= first.loss - 1e-5).all()
    assert (strongest.loss > first.loss + 0.1).float().mean() > 0.05
    other = pgd(model, x, y, eps=0.1, steps=10, keep="strongest", loss="margin")
    with torch.no_grad():
        np.testing.assert_allclose(margin(model(other.x), y), other.loss, atol=1e-3)


def test_fab_refuses_what_it_cannot_use(digits):
    model, x, y = digits
    with pytest.raises(InvalidInput, match="must differ"):
        fab(model, x, y, target=y)
    with pytest.raises(InvalidInput, match="alpha_max"):
        fab(model, x, y, alpha_max=2.0)
    with pytest.raises(InvalidInput, match="beta"):
        fab(model, x, y, beta=1.0)
    with pytest.raises(InvalidInput, match="restarts"):
        fab(model, x, y, restarts=0)


def test_training_attack_tells_of_nan_that_comes_in_a_later_step() -> None:
    calls = []

    def model(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        logits = torch.stack([x.sum(1), -x.sum(1)], 1)
        return logits * torch.nan if len(calls) == 3 else logits

    x, y = torch.full((4, 3), 0.5), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(InvalidInput, match="NaN"):
        pgd_train(model, x, y, eps=0.1, steps=5)
