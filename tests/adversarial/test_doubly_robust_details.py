"""Doubly robust training, where a plausible slip would go unseen: the treatment's loss and the barrier attack, by hand."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.adversarial.doubly_robust import (
    DoublyRobust,
    KLDROLoss,
    barrier_attack,
    barrier_response,
    barrier_step,
    box,
)
from surefoot.core.treatment import Batch
from surefoot.datasets.embedded import digits
from surefoot.models import seeded_build
from surefoot.nn.attacks import pgd_train


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net() -> nn.Module:
    """With batch-norm, which tells training from evaluation mode."""

    def layers() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(96, 10))

    return seeded_build(layers, rng()).double().train()


def batch(step: int = 0, steps: int = 10) -> Batch:
    x, y = torch.rand(12, 1, 8, 8, generator=rng(1), dtype=torch.float64), torch.arange(12) % 10
    x[:3] = x[:3].round()  # pixels at the border of the range
    return Batch(x, y, torch.arange(12), 0, step, steps, steps, rng(2))


@pytest.mark.parametrize("implicit", [False, True])
def test_the_treatments_loss_and_gradient_by_hand(implicit):
    """Second batch, so that the tracker remembers; attack in evaluation mode, weights of the attacked losses, update in training mode."""
    eps, r, steps, eta = 0.1, 0.4, 3, 0.2
    method = DoublyRobust(eps, r, steps, barrier=2e-3, implicit=implicit, momentum=eta, warm=1.0)
    model, twin = net(), net()
    method.prepare(model, digits(900, sizes=(20, 10, 10)))
    log_u = None
    for _ in range(2):
        given = batch()
        shared = {"eps": eps, "steps": steps, "step_size": eps / 3, "bounds": (0.0, 1.0), "generator": given.generator}
        state = given.generator.get_state()
        model.zero_grad()
        ours = method.loss(model, given)
        ours.backward()
        given.generator.set_state(state)
        lb, ub = box(given.x, eps, (0.0, 1.0))
        if implicit:
            moved = pgd_train(twin, given.x, given.y, **shared)
            judge = copy.deepcopy(twin).eval()
            leaf = moved.clone().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(judge(leaf), given.y, reduction="sum"), leaf)
            delta = barrier_step(slope, lb, ub, 2e-3 * eps**2)
        else:
            delta = pgd_train(twin, given.x, given.y, **shared) - given.x
        point = (given.x + delta).requires_grad_()
        losses = F.cross_entropy(twin(point), given.y, reduction="none")
        now = (losses.detach() / r).logsumexp(0) - math.log(12)
        log_u = now if log_u is None else torch.logaddexp(math.log(1 - eta) + log_u, math.log(eta) + now)
        weights = (losses.detach() / r - log_u).exp().clamp(max=20.0)
        through: Tensor = torch.zeros(12, dtype=torch.float64)
        if implicit:
            (slope,) = torch.autograd.grad(losses.sum(), point, create_graph=True)
            through = (slope * barrier_response(delta, lb, ub)).flatten(1).sum(1)
        expected = torch.autograd.grad((weights * (losses + through)).mean(), list(twin.parameters()))
        assert torch.allclose(ours, (weights * losses).mean(), atol=1e-12)
        for parameter, slope in zip(model.parameters(), expected):
            assert parameter.grad is not None and torch.allclose(parameter.grad, slope, atol=1e-12)
        for a, b in zip(model.buffers(), twin.buffers()):
            assert torch.equal(a, b)


def test_the_barrier_step_ends_an_attack_made_in_evaluation_mode():
    model, given = net(), batch()
    before = copy.deepcopy(model.state_dict())
    ours = barrier_attack(model, given.x, given.y, eps=0.1, steps=2, barrier=1e-4, generator=rng(3))
    moved = pgd_train(model, given.x, given.y, eps=0.1, steps=2, generator=rng(3))
    judge, leaf = copy.deepcopy(model).eval(), moved.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(judge(leaf), given.y, reduction="sum"), leaf)
    assert torch.allclose(ours, barrier_step(slope, *box(given.x, 0.1, (0.0, 1.0)), 1e-4), atol=1e-12)
    assert model.training and all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    c = 1e-4 * torch.ones(())
    lb, ub = box(given.x, 0.1, (0.0, 1.0))
    inside = (ours - (lb + ub) / 2).abs() < 0.99 * (ub - lb) / 2
    assert inside.double().mean() > 0.5
    assert torch.allclose((c / (ub - ours) - c / (ours - lb))[inside], slope[inside], atol=1e-8)


def test_the_batch_is_weighted_after_the_tracker_took_it_in():
    loss, first, second = KLDROLoss(1.0, momentum=0.5, max_weight=1e9), torch.zeros(4), torch.full((4,), 3.0)
    loss.weights(first)
    after = 0.5 + 0.5 * math.exp(3.0)
    assert torch.allclose(loss.weights(second), torch.full((4,), math.exp(3.0) / after))


def test_a_network_that_bends_is_told_of_where_the_gradient_goes_through_the_attack():
    task = digits(900, sizes=(20, 10, 10))
    with pytest.warns(UserWarning, match="Tanh bend.*solve_response"):
        DoublyRobust(implicit=True).check(net(), task)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DoublyRobust().check(net(), task)  # no gradient through the attack, nothing left out
        DoublyRobust(implicit=True).check(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)), task
        )
