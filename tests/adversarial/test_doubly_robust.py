"""Doubly robust training: worst-case weights, their tracker, the barrier attack, and the gradient through it."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.adversarial.doubly_robust import (
    DoublyRobust,
    KLDROLoss,
    barrier_attack,
    barrier_hessian,
    barrier_response,
    barrier_step,
    box,
    implicit_correction,
    kl_objective,
    kl_weights,
    solve_response,
    tail_robust_accuracy,
)
from surefoot.core.task import Training
from surefoot.core.treatment import Batch, Treatment
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput, Refused
from surefoot.models import seeded_build, small_cnn
from surefoot.nn.attacks import pgd_train
from surefoot.training.loop import fit


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def same(a: Tensor, b: Tensor, atol: float = 1e-9) -> bool:
    return torch.allclose(a.double(), torch.as_tensor(b).double(), rtol=0, atol=atol)


def net() -> nn.Module:
    return seeded_build(lambda: small_cnn((1, 8, 8), 10), generator())


# ------------------------------------------------------------------------------------------------------------- weights


def test_weights_and_objective_of_the_worked_example():
    losses = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    assert same(kl_weights(losses, 1.0), torch.tensor([0.09003, 0.24473, 0.66524]), 1e-5)
    assert kl_objective(losses, 1.0).item() == pytest.approx(1.3089937, abs=1e-7)
    assert same(kl_weights(losses, 0.5), torch.tensor([0.01588, 0.11731, 0.86681]), 1e-5)
    assert kl_objective(losses, 0.5).item() == pytest.approx(1.5221597, abs=1e-7)
    assert same(kl_weights(losses, 1e6), torch.full((3,), 1 / 3), 1e-6)
    assert kl_objective(losses, 1e6).item() == pytest.approx(1.0, abs=1e-6)


def test_weights_solve_the_inner_maximum():
    """sum w l - r sum w ln(M w) at the closed form is the objective, and no other point of the simplex does better."""
    losses, r = draws(12).abs(), 0.3

    def payoff(w: Tensor) -> Tensor:
        return (w * losses).sum(-1) - r * torch.xlogy(w, len(losses) * w).sum(-1)

    best = payoff(kl_weights(losses, r))
    assert same(best, kl_objective(losses, r))
    others = (3 * draws(2000, 12, seed=1)).softmax(1)
    assert (payoff(others) < best).all()
    near = kl_weights(losses, r) * (1 + 0.01 * draws(2000, 12, seed=2))
    assert (payoff(near / near.sum(1, keepdim=True)) < best).all()


def test_objective_is_convex_bounded_and_shifts_with_its_losses():
    for r in (0.1, 1.0, 10.0):
        a, b = draws(20, seed=1).requires_grad_(), draws(20, seed=2)
        (slope,) = torch.autograd.grad(kl_objective(a, r), a)
        assert same(slope, kl_weights(a.detach(), r))
        a = a.detach()
        assert a.mean() < kl_objective(a, r) < a.max()
        assert same(kl_objective(a + 3.0, r), kl_objective(a, r) + 3.0)
        assert kl_objective((a + b) / 2, r) <= (kl_objective(a, r) + kl_objective(b, r)) / 2
    assert kl_objective(draws(20), 1e-3) == pytest.approx(draws(20).max().item(), abs=1e-2)
    assert torch.isfinite(kl_objective(1e4 * draws(20), 1e-3))


# ------------------------------------------------------------------------------------------------------------- tracker


def test_whole_batch_with_full_momentum_is_the_gradient_of_the_objective():
    model, x, y = nn.Linear(6, 4).double(), draws(30, 6), torch.arange(30) % 4
    loss = KLDROLoss(0.5, momentum=1.0, max_weight=1e6)
    for _ in range(2):  # the second time a tracker of 0 < eta < 1 would remember the first
        losses = F.cross_entropy(model(x), y, reduction="none")
        ours = torch.autograd.grad(loss(losses), list(model.parameters()), retain_graph=True)
        exact = torch.autograd.grad(kl_objective(losses, 0.5), list(model.parameters()))
        assert all(same(a, b, 1e-12) for a, b in zip(ours, exact))
        with torch.no_grad():
            model.weight.add_(0.3)


def test_log_tracker_equals_the_naive_one():
    loss, r, eta, u = KLDROLoss(0.7, momentum=0.3, max_weight=1e9), 0.7, 0.3, None
    for step in range(20):
        losses = draws(16, seed=step).abs()
        now = (losses / r).exp()
        u = now.mean() if u is None else (1 - eta) * u + eta * now.mean()
        assert same(loss.weights(losses), now / u, 1e-10)
    assert loss.log_u.exp().item() == pytest.approx(float(u), rel=1e-12)  # type: ignore[arg-type]


def test_huge_losses_stay_finite_and_the_cut_is_counted():
    loss = KLDROLoss(1e-3, max_weight=5.0)
    weights = loss.weights(torch.tensor([0.0, 10.0]))  # l / r = 1e4; exp of it overflows
    assert same(weights, torch.tensor([0.0, 2.0]), 1e-6)
    assert same(loss.weights(torch.tensor([0.0, 12.0])), torch.tensor([0.0, 5.0]))  # 20 before the cut, 2 / 0.1
    assert loss.clipped.item() == 1
    assert math.isfinite(loss.log_u.item())


def test_tracker_takes_the_bias_of_small_batches_away():
    """E over batches of the weighted losses, against the whole set's: batch softmax is too low by the ratio's bias."""
    losses, r, source = 2 * draws(4000, seed=3).abs(), 2.0, generator(4)
    exact = (kl_weights(losses, r) * losses).sum()
    errors = []
    for momentum in (0.01, 1.0):  # 1: the batch's softmax
        loss, kept = KLDROLoss(r, momentum=momentum, max_weight=1e9), []
        loss.weights(losses)  # starts at the whole set
        for _ in range(4000):
            kept.append(loss(losses[torch.randint(4000, (8,), generator=source)]))
        error = (torch.stack(kept).mean() - exact) / exact
        errors.append((error.item(), (torch.stack(kept).std() / 4000**0.5 / exact).item()))
    (tracked, deviation), (softmax, _) = errors
    assert abs(tracked) < 3 * deviation
    assert softmax < -3 * deviation


def test_evaluation_and_infinite_temperature_write_nothing():
    loss, losses = KLDROLoss(1.0), draws(8).abs()
    loss(losses)
    before = loss.log_u.clone()
    loss.eval()
    loss(losses + 5.0)
    assert torch.equal(loss.log_u, before)
    plain = KLDROLoss(math.inf)
    assert torch.equal(plain(losses), losses.mean())
    assert math.isnan(plain.log_u.item())


def test_weights_are_of_the_gradient_once():
    losses = draws(8).abs().requires_grad_()
    loss = KLDROLoss(0.5, momentum=0.1)
    (slope,) = torch.autograd.grad(loss(losses), losses)
    assert same(slope, kl_weights(losses.detach(), 0.5))


def test_change_of_temperature_keeps_the_mean_weight():
    """Without the rescaling every weight would be wrong by orders of magnitude."""
    loss, losses = KLDROLoss(5.0, max_weight=1e9), 2 + 0.3 * draws(256).abs()
    for _ in range(30):
        loss.weights(losses)
    stale = copy.deepcopy(loss)
    stale.temperature = 0.5
    loss.change_temperature(0.5)
    assert 0.3 < loss.weights(losses).mean() < 3.0
    assert stale.weights(losses).mean() > 8.0  # 10 is the most that a tracker with eta = 0.1 allows
    plain = KLDROLoss(math.inf)
    plain.weights(losses)
    plain.change_temperature(1.0)
    assert same(plain.weights(losses).mean(), torch.tensor(1.0))


# ------------------------------------------------------------------------------------------------------------- barrier


def test_barrier_step_is_stationary_and_inside():
    gradient, x = 0.3 * draws(200, 5), torch.rand(200, 5, generator=generator(), dtype=torch.float64)
    x[:20], x[20:40] = 0.0, 1.0
    lb, ub = box(x, 0.1, (0.0, 1.0))
    assert (lb[:20] == 0).all()
    assert (ub[20:40] == 0).all()
    for c in (1e-2, 1e-3):
        d = barrier_step(gradient, lb, ub, c)
        assert ((d > lb) & (d < ub)).all()
        inside = (d - (lb + ub) / 2).abs() < 0.998 * (ub - lb) / 2
        assert inside.float().mean() > 0.9
        assert same((c / (ub - d) - c / (d - lb))[inside], gradient[inside], 1e-8)
        response = gradient / barrier_hessian(d, lb, ub, c)
        assert same(barrier_response(d, lb, ub)[inside], response[inside], 1e-10)
    zero = barrier_step(torch.zeros(3), *box(torch.full((3,), 0.5), 0.1, None), 1e-5)
    assert torch.equal(zero, torch.zeros(3))


def test_barrier_hessian_and_response_of_the_symmetric_box():
    lb, ub = torch.tensor(-0.1, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    assert barrier_hessian(torch.zeros((), dtype=torch.float64), lb, ub, 1e-3).item() == pytest.approx(0.2)
    assert barrier_hessian(torch.zeros((), dtype=torch.float64), lb, ub, 1e-3, ridge=2.0).item() == pytest.approx(2.2)
    d = torch.linspace(-0.1, 0.1, 20_001, dtype=torch.float64)
    v = barrier_response(d, lb, ub)
    assert same(v, d * (0.01 - d**2) / (0.01 + d**2), 1e-12)
    assert v.abs().max().item() == pytest.approx(0.3003 * 0.1, abs=1e-5)
    assert barrier_response(torch.zeros(1), torch.zeros(1), torch.zeros(1)).item() == 0.0  # no room at all


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attack_is_strictly_inside_and_about_as_strong_as_pgd(dtype):
    task = digits(900, sizes=(300, 50, 200))
    model = fit(net(), task, Training(epochs=6, batch_size=32, lr=4e-3), [DoublyRobust(steps=2)]).model.to(dtype)
    x, y = task.test.x.to(dtype), task.test.labels
    assert (x == 0).any()
    state = torch.get_rng_state()
    delta = barrier_attack(model, x, y, eps=0.1, steps=5, step_size=0.1 / 3, generator=generator())
    lb, ub = box(x, 0.1, (0.0, 1.0))
    assert ((delta > lb) & (delta < ub)).all()
    assert torch.isfinite(delta).all()
    assert delta.dtype == dtype
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        clean, ours = F.cross_entropy(model(x), y), F.cross_entropy(model(x + delta), y)
        theirs = F.cross_entropy(model(pgd_train(model, x, y, eps=0.1, steps=6, generator=generator())), y)
    assert ours > clean + 0.8 * (theirs - clean)


# ---------------------------------------------------------------------------------------------------- implicit gradient


def test_toy_bilevel():
    """l = theta d, attack -theta d + lambda d^2 / 2: d* = theta / lambda and dl/dtheta = 2 theta / lambda."""
    theta, ridge = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), 2.0
    point = (theta.detach() / ridge).view(1, 1).requires_grad_()
    losses = (theta * point).flatten()
    flat = torch.zeros_like(point)
    hessian = barrier_hessian(flat, flat - 1, flat + 1, 0.0, ridge)
    for response in (theta.detach() / hessian, solve_response(losses, point, hessian)):
        total = losses + implicit_correction(losses, point, response)
        assert same(total, losses)  # the correction has no value
        (slope,) = torch.autograd.grad(total.sum(), theta, retain_graph=True)
        assert slope.item() == pytest.approx(2 * 0.7 / ridge)
    (first_order,) = torch.autograd.grad(losses.sum(), theta)
    assert first_order.item() == pytest.approx(0.7 / ridge)


def test_implicit_gradient_against_finite_differences_of_the_whole_bilevel_value():
    x, y, eps, c = 0.5 + 0.05 * draws(1, 4), torch.tensor([1]), 0.1, 1e-3
    lb, ub = box(x, eps, (0.0, 1.0))

    def losses_of(theta: Tensor, d: Tensor) -> Tensor:
        hidden = torch.tanh((x + d) @ theta[:20].view(5, 4).T)
        return F.cross_entropy(hidden @ theta[20:].view(3, 5).T, y, reduction="none")

    def attack(theta: Tensor) -> Tensor:
        def objective(d: Tensor) -> Tensor:
            return -losses_of(theta, d.view(1, 4)).sum() - c * ((ub - d).log() + (d - lb).log()).sum()

        d = torch.zeros(4, dtype=torch.float64)
        for _ in range(60):
            leaf = d.clone().requires_grad_()
            (slope,) = torch.autograd.grad(objective(leaf), leaf)
            step = torch.linalg.solve(torch.autograd.functional.hessian(objective, d), slope)  # type: ignore[arg-type]
            while bool(((d - step) <= lb).any() | ((d - step) >= ub).any()):
                step = step / 2
            d = d - step
        assert slope.abs().max() < 1e-10
        return d.view(1, 4)

    theta = 0.8 * draws(35, seed=5)
    d = attack(theta)
    direction = F.normalize(draws(35, seed=6), dim=0)
    h = 1e-5
    truth = (losses_of(theta + h * direction, attack(theta + h * direction)) - losses_of(theta - h * direction, attack(theta - h * direction))).item() / (2 * h)  # fmt: skip

    leaf, point = theta.clone().requires_grad_(), d.clone().requires_grad_()
    losses = losses_of(leaf, point)
    hessian = barrier_hessian(d, lb, ub, c)
    responses = {
        "full": solve_response(losses, point, hessian, steps=12),
        "diagonal": barrier_response(d, lb, ub),
        "none": torch.zeros_like(d),
    }
    error = {}
    for name, response in responses.items():
        total = (losses + implicit_correction(losses, point, response)).sum()
        (slope,) = torch.autograd.grad(total, leaf, retain_graph=True)
        error[name] = abs((slope @ direction).item() - truth)
    assert error["full"] < 1e-7
    assert error["diagonal"] < 5e-3
    assert error["none"] > 5 * error["diagonal"]
    (turned,) = torch.autograd.grad((losses + implicit_correction(losses, point, -responses["full"])).sum(), leaf)
    assert abs((turned @ direction).item() - truth) > 10 * error["diagonal"]  # the sign of the mixed derivative


def test_implicit_step_moves_batch_norm_once():
    task = digits(900, sizes=(64, 20, 20))
    model, x, y = net().train(), task.train.x, task.train.labels
    batch = Batch(x, y, torch.arange(64), 0, 0, 1, 10, generator())
    method = DoublyRobust(implicit=True)
    _, _ = method.prepare(model, task)
    method.loss(model, batch).backward()
    norms = [m.num_batches_tracked for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    counts = [int(count) for count in norms if count is not None]
    assert counts == [1, 1, 1]
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert model.training


# ----------------------------------------------------------------------------------------------------------- treatment


def test_infinite_temperature_is_pgd_training_parameter_for_parameter():
    class PGDTraining(Treatment):
        slug = "test_pgd"

        def loss(self, model: nn.Module, batch: Batch) -> Tensor:
            moved = pgd_train(model, batch.x, batch.y, eps=0.1, steps=3, step_size=0.1 / 3, generator=batch.generator)
            return F.cross_entropy(model(moved), batch.y)

    task, training = digits(900, sizes=(200, 20, 20)), Training(epochs=2, batch_size=50, lr=2e-3)
    ours = fit(net(), task, training, [DoublyRobust(temperature=math.inf, steps=3, barrier=0.0)]).model
    plain = fit(net(), task, training, [PGDTraining()]).model
    assert all(same(a, b, 1e-6) for a, b in zip(ours.parameters(), plain.parameters()))
    weighted = fit(net(), task, training, [DoublyRobust(temperature=0.2, steps=3, warm=1.0)]).model
    assert not all(same(a, b, 1e-3) for a, b in zip(weighted.parameters(), plain.parameters()))


def test_temperature_goes_down_after_the_first_phase_and_never_to_zero():
    method = DoublyRobust(temperature=0.5, warm=10.0, warm_share=0.1)
    assert [method._temperature(t) for t in (0.0, 0.05, 0.1)] == [5.0, 5.0, 5.0]
    assert method._temperature(0.15) == pytest.approx(2.75)
    assert [method._temperature(t) for t in (0.2, 1.0)] == pytest.approx([0.5, 0.5])
    assert DoublyRobust(warm_share=0.0)._temperature(0.0) == 0.5


def test_training_raises_robust_accuracy():
    task, training = digits(901, sizes=(500, 100, 200)), Training(epochs=8, batch_size=50, lr=4e-3)
    x, y = task.test.x, task.test.labels
    right = []
    for stack in ((), (DoublyRobust(),), (DoublyRobust(implicit=True),)):
        model = fit(net(), task, training, stack).model
        moved = pgd_train(model, x, y, eps=0.1, steps=10, generator=generator())
        with torch.no_grad():
            right.append((model(moved).argmax(1) == y).double().mean().item())
    assert right[1] > right[0] + 0.15  # five standard errors of a difference of two accuracies over 200 images
    assert right[2] > right[0] + 0.15


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_tail_is_of_the_weakest_classes_known():
    accuracies = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.9, 0.9, 0.9, 0.9])
    assert tail_robust_accuracy(accuracies) == pytest.approx(0.2)
    assert tail_robust_accuracy(accuracies, 1.0) == pytest.approx(accuracies.mean().item())
    assert tail_robust_accuracy(accuracies, 0.01) == pytest.approx(0.1)  # at least one class
    assert tail_robust_accuracy(torch.tensor([0.4, math.nan, 0.6]), 0.5) == pytest.approx(0.4)


BAD = {
    "temperature": lambda: KLDROLoss(0.0),
    "temperature must be positive": lambda: kl_weights(torch.ones(3), -1.0),
    "must not reach zero": lambda: KLDROLoss(1.0).change_temperature(0.0),
    "momentum": lambda: KLDROLoss(1.0, momentum=0.0),
    "momentum must": lambda: KLDROLoss(1.0, momentum=1.1),
    "max_weight": lambda: KLDROLoss(1.0, max_weight=0.0),
    "non-empty": lambda: KLDROLoss(1.0)(torch.zeros(0)),
    "finite": lambda: kl_objective(torch.tensor([1.0, math.nan]), 1.0),
    "eps": lambda: barrier_attack(nn.Linear(2, 2), torch.rand(1, 2), torch.zeros(1, dtype=torch.int64), eps=0.0),
    "barrier": lambda: barrier_attack(
        nn.Linear(2, 2), torch.rand(1, 2), torch.zeros(1, dtype=torch.int64), eps=0.1, barrier=0.0
    ),
    "curved attack": lambda: solve_response(torch.ones(1), torch.ones(1, 1), torch.zeros(1, 1)),
    "require a gradient": lambda: implicit_correction(torch.ones(1), torch.ones(1, 1), torch.ones(1, 1)),
    "one value for each": lambda: implicit_correction(torch.ones(2), torch.ones(1, 1), torch.ones(1, 1)),
    "fraction": lambda: tail_robust_accuracy(torch.ones(3), 0.0),
    "fraction must": lambda: tail_robust_accuracy(torch.ones(3), 1.5),
    "two classes": lambda: tail_robust_accuracy(torch.tensor([0.5, math.nan])),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_sentence(message):
    with pytest.raises(InvalidInput, match=message) as caught:
        BAD[message]()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 0.0}, "eps"),
        ({"temperature": 0.0}, "temperature"),
        ({"steps": 0}, "steps"),
        ({"momentum": 2.0}, "momentum"),
        ({"warm": 0.0}, "warm"),
        ({"warm_share": 1.0}, "warm_share"),
        ({"barrier": -1.0}, "barrier"),
        ({"barrier": 0.0, "implicit": True}, "needs a positive barrier"),
    ],
)
def test_treatment_refuses_settings(settings, message):
    task = digits(900, sizes=(20, 10, 10))
    with pytest.raises(InvalidInput, match=message):
        DoublyRobust(**settings).check(net(), task)
    with pytest.raises(Refused, match="no bounds"):
        DoublyRobust().check(net(), task.changed(bounds=None))
