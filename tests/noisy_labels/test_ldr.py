import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from surefoot.core.task import Training
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput, Refused
from surefoot.models import mlp, seeded_build
from surefoot.noisy_labels.elr import ELR
from surefoot.noisy_labels.ldr import (
    LDR,
    ALDRKLLoss,
    LDRKLLoss,
    adapted_temperature,
    label_suspicion,
    ldr_kl_loss,
    normalize_logits,
)
from surefoot.noisy_labels.losses import CSLoss, margin_differences
from surefoot.training.loop import fit

DOUBLE = torch.float64
LOGITS = torch.tensor([[1.0, 2.0, 0.5]], dtype=DOUBLE)
LABEL, FIRST = torch.tensor([0]), torch.tensor([0])


def random_batch(rows=20, classes=6, seed=0, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=generator, dtype=dtype)
    return logits, torch.randint(0, classes, (rows,), generator=generator), torch.arange(rows)


# --- LDR-KL ----------------------------------------------------------------------------------------------------------------


def test_worked_value_and_limits():
    def at(lam):
        return ldr_kl_loss(LOGITS, LABEL, lam=lam, margin=1.0).item()

    assert at(0.5) == pytest.approx(1.483636, abs=1e-6)
    assert at(1e7) == pytest.approx(0.833333, abs=1e-6)
    assert at(1e-4) == pytest.approx(2.0, abs=1e-3)
    assert LDRKLLoss(0.5, 1.0)(LOGITS, LABEL).item() == at(0.5)


def test_lam_one_without_margin_is_cross_entropy():
    loss = ldr_kl_loss(LOGITS, LABEL, margin=0.0).item()
    assert loss + math.log(3) == pytest.approx(1.464369, abs=1e-6)
    assert loss + math.log(3) == pytest.approx(F.cross_entropy(LOGITS, LABEL).item(), abs=1e-12)


def test_falls_in_lam_between_mean_and_max():
    logits, y, _ = random_batch()
    d = margin_differences(logits, y, 0.3)
    values = [ldr_kl_loss(logits, y, lam=lam, margin=0.3, reduction="none") for lam in (0.05, 0.2, 1.0, 5.0, 50.0)]
    for steep, soft in itertools.pairwise(values):
        assert (steep >= soft).all()
    for value in values:
        assert (d.mean(1) - 1e-12 <= value).all() and (value <= d.amax(1) + 1e-12).all()
    hinge = CSLoss(0.3, reduction="none")(logits, y)
    torch.testing.assert_close(ldr_kl_loss(logits, y, lam=1e-5, margin=0.3, reduction="none"), hinge, rtol=0, atol=1e-4)


def test_convex_with_gradient_softmax_minus_onehot():
    logits, y, _ = random_batch(rows=5, classes=4)
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(ldr_kl_loss(logits, y, lam=0.7, margin=0.3, reduction="sum"), logits)
    p = (margin_differences(logits.detach(), y, 0.3) / 0.7).softmax(1)
    torch.testing.assert_close(grad, p - F.one_hot(y, 4))
    for row in range(5):
        hessian = torch.autograd.functional.hessian(
            lambda f, row=row: ldr_kl_loss(f[None], y[row : row + 1], lam=0.7, margin=0.3), logits[row].detach()
        )
        assert torch.linalg.eigvalsh(hessian).min() > -1e-12


def test_shift_scale_and_permutation():
    logits, y, _ = random_batch()
    loss = ldr_kl_loss(logits, y, lam=0.5, reduction="none")
    torch.testing.assert_close(ldr_kl_loss(logits + 7.0, y, lam=0.5, reduction="none"), loss)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ldr_kl_loss(logits[:, order], order.argsort()[y], lam=0.5, reduction="none"), loss)
    scaled = ldr_kl_loss(13.0 * logits, y, normalize="l1")
    torch.testing.assert_close(scaled, ldr_kl_loss(logits, y, normalize="l1"))
    assert normalize_logits(logits, "softplus").mean(1).tolist() == pytest.approx([1.0] * 20)
    assert normalize_logits(logits, "l1").abs().mean(1).tolist() == pytest.approx([1.0] * 20)


# --- ALDR-KL ---------------------------------------------------------------------------------------------------------------


def test_first_update_and_fixed_point():
    loss = ALDRKLLoss(1, 3, margin=1.0, normalize="none")
    p = margin_differences(LOGITS, LABEL, 1.0).softmax(1)
    assert p[0].tolist() == pytest.approx([0.099624, 0.736125, 0.164252], abs=1e-6)
    assert ((p * p.log()).sum() + math.log(3)).item() == pytest.approx(0.346632, abs=1e-6)
    first = loss(LOGITS, LABEL, FIRST).item()
    assert first == pytest.approx(1.243033, abs=1e-6)
    assert loss.temperatures.item() == pytest.approx(0.842241, abs=1e-6)
    values = [first] + [loss(LOGITS, LABEL, FIRST).item() for _ in range(60)]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))  # block ascent
    assert values[-1] == pytest.approx(1.247220, abs=1e-6)
    lam = loss.temperatures.item()
    assert lam == pytest.approx(0.762341, abs=1e-6)
    assert (1 - lam) * 2 * math.log(3) == pytest.approx(0.522190, abs=1e-6)


def test_uniform_differences_and_bounds_of_the_temperature():
    loss = ALDRKLLoss(1, 3, margin=0.0, normalize="none", lam0=2.0)
    assert loss(torch.full((1, 3), 5.0, dtype=DOUBLE), LABEL, FIRST).item() == pytest.approx(0.0, abs=1e-12)
    assert loss.temperatures.item() == pytest.approx(2.0, abs=1e-12)
    logits, y, index = random_batch(rows=200)
    for alpha in (1.1, 2.0, 10.0):
        loss = ALDRKLLoss(200, 6, alpha=alpha, lam0=3.0, normalize="none")
        for scale in (0.1, 1.0, 100.0):
            loss(scale * logits, y, index)
            assert (loss.temperatures >= 3 * (1 - 1 / alpha) - 1e-12).all() and (loss.temperatures <= 3 + 1e-12).all()


def test_large_alpha_is_ldr_and_so_are_frozen_temperatures():
    logits, y, index = random_batch()
    fixed = ldr_kl_loss(logits, y, lam=0.5, margin=0.1)
    stiff = ALDRKLLoss(20, 6, lam0=0.5, alpha=1e9, normalize="none")
    assert abs((stiff(logits, y, index) - fixed).item()) < 1e-6
    frozen = ALDRKLLoss(20, 6, lam0=0.5, normalize="none", adapt=False)
    torch.testing.assert_close(frozen(logits, y, index), fixed)
    assert (frozen.temperatures == 0.5).all()


@pytest.mark.parametrize("normalize", ["none", "l1", "softplus"])
@pytest.mark.parametrize("margin", [0.0, 0.1, 5.0])
def test_fast_path_equals_the_plain_functions(normalize, margin):
    logits, y, index = random_batch(rows=40, classes=9)
    logits.requires_grad_()
    loss = ALDRKLLoss(40, 9, lam0=0.8, margin=margin, normalize=normalize, reduction="none")
    lam = torch.full((40,), 0.8, dtype=DOUBLE)
    weights = torch.linspace(0.1, 2.0, 40, dtype=DOUBLE)
    for _ in range(3):
        values = normalize_logits(logits, normalize)
        lam = adapted_temperature(margin_differences(values.detach(), y, margin), lam, 0.8, 2.0)
        pull = 2 * math.log(9) / (2 * 0.8) * (lam - 0.8) ** 2
        plain = ldr_kl_loss(values, y, lam=lam, margin=margin, reduction="none") - pull
        fast = loss(logits, y, index)
        torch.testing.assert_close(loss.temperatures, lam)
        torch.testing.assert_close(fast, plain)
        grads = [torch.autograd.grad((weights * value).sum(), logits)[0] for value in (fast, plain)]
        torch.testing.assert_close(*grads)


def test_envelope_gradient_at_the_fixed_point():
    """Gradient with the temperature detached = gradient of the maximum over (p, lam), by central differences."""
    logits, y, index = random_batch(rows=4, classes=5, seed=2)

    def maximum(f):
        loss = ALDRKLLoss(4, 5, margin=0.5, normalize="none")
        for _ in range(400):
            value = loss(f, y, index)
        return value

    leaf = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(maximum(leaf), leaf)
    numeric, step = torch.zeros_like(logits), 1e-5
    for place in torch.cartesian_prod(torch.arange(4), torch.arange(5)).tolist():
        bump = torch.zeros_like(logits)
        bump[tuple(place)] = step
        numeric[tuple(place)] = (maximum(logits + bump) - maximum(logits - bump)) / (2 * step)
    torch.testing.assert_close(grad, numeric, rtol=0, atol=1e-7)


def test_extreme_float32():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 1e4]], requires_grad=True)
    y = torch.tensor([0, 0, 1])
    for loss in (
        LDRKLLoss(1e-2, 0.1),
        lambda z, t: ALDRKLLoss(3, 3, lam0=1e-2, normalize="none")(z, t, torch.arange(3)),
        lambda z, t: ALDRKLLoss(3, 3, lam0=1e-2)(z, t, torch.arange(3)),
    ):
        value = loss(logits, y)
        (grad,) = torch.autograd.grad(value, logits)
        assert value.isfinite() and grad.isfinite().all()


def test_state_round_trip_eval_mode_and_scale_invariance():
    logits, y, index = random_batch(dtype=torch.float32)
    loss = ALDRKLLoss(20, 6)
    loss(logits, y, index)
    copied = ALDRKLLoss(20, 6)
    copied.load_state_dict(loss.state_dict())
    assert torch.equal(copied(logits, y, index), loss(logits, y, index))
    before = loss.temperatures.clone()
    loss.eval()(3 * logits, y, index)
    assert torch.equal(loss.temperatures, before)
    other = ALDRKLLoss(20, 6)
    torch.testing.assert_close(other(64 * logits, y, index), ALDRKLLoss(20, 6)(logits, y, index))
    loss.reset()
    assert (loss.temperatures == 1).all()
    low = ALDRKLLoss(20, 6)(logits.bfloat16(), y, index)
    assert low.dtype == torch.float32 and low.isfinite()


def test_released_update_leaves_out_the_margin():
    logits, y, index = random_batch(rows=3, classes=4)
    loss = ALDRKLLoss(3, 4, margin=1.0, paper_code=True)
    loss(logits, y, index)
    p = normalize_logits(logits, "l1").softmax(1) + 1e-5
    p = p / p.sum(1, keepdim=True)
    expected = 1 - ((p * p.log()).sum(1) + math.log(4)) / (2 * math.log(4))
    torch.testing.assert_close(loss.temperatures, expected)


def test_label_suspicion_ranks_by_loss_and_breaks_ties_by_temperature():
    losses, lam = torch.tensor([2.0, 0.5, 0.5, 3.0]), torch.tensor([0.1, 0.9, 0.2, 0.1])
    assert label_suspicion(losses, lam).tolist() == [0.75, 0.5, 0.25, 1.0]
    assert label_suspicion(torch.ones(2), torch.ones(2)).tolist() == [0.75, 0.75]
    with pytest.raises(InvalidInput, match=r"\[N\]"):
        label_suspicion(losses, lam[:2])


# --- bad input -------------------------------------------------------------------------------------------------------------


def test_bad_input():
    logits, y, index = torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([0, 1])
    bad: list[Any] = [{"lam0": 0.0}, {"alpha": 1.0}, {"margin": -1.0}, {"normalize": "l2"}, {"reduction": "median"}]
    for settings in bad:
        with pytest.raises(InvalidInput):
            ALDRKLLoss(2, 3, **settings)
    with pytest.raises(InvalidInput, match="lam must be positive"):
        LDRKLLoss(0.0)
    with pytest.raises(InvalidInput, match="num_classes"):
        ALDRKLLoss(2, 1)
    loss = ALDRKLLoss(2, 3)
    for arguments, says in (
        ((logits, y, None), "index is missing"),
        ((logits, y, torch.tensor([0, 2])), r"index must lie in \[0, 2\)"),
        ((torch.zeros(2, 4), y, index), "4 classes, and the loss was made for 3"),
        ((logits, y.float(), index), "int64"),
        ((torch.full((2, 3), torch.nan), y, index), "row 0"),
        ((torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), y, index), "Row 1 of the logits is all zero"),
    ):
        with pytest.raises(InvalidInput, match=says):
            loss(*arguments)
    with pytest.raises(InvalidInput, match=r"3 samples.*2 samples"):
        loss.load_state_dict(ALDRKLLoss(3, 3).state_dict())


# --- the treatment ---------------------------------------------------------------------------------------------------------


def small(seed=0):
    task = digits(seed, sizes=(400, 50, 400))
    return task, seeded_build(lambda: mlp((1, 8, 8), 10, hidden=(64,)), task.generator("model"))


@pytest.mark.parametrize("treatment", [LDR(), LDR(adaptive=False), LDR(lam0=1.0, normalize="softplus")])
def test_treatment_trains_and_keeps_the_contract(treatment, tmp_path):
    task, model = small()
    weights, training = copy.deepcopy(model.state_dict()), Training(epochs=30, lr=5e-3)
    first, second = (fit(model, task, training, (treatment,)) for _ in range(2))
    assert (first.model(task.test.x).argmax(1) == task.test.y).float().mean() > 0.85
    assert treatment.loss_ is None
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])
        assert torch.equal(model.state_dict()[name], weights[name])
    path = tmp_path / "run.pt"
    short = Training(epochs=2)
    with pytest.raises(KeyboardInterrupt):
        fit(model, task, short, (treatment,), checkpoint=path, progress=interrupt)
    resumed, whole = fit(model, task, short, (treatment,), checkpoint=path), fit(model, task, short, (treatment,))
    assert torch.equal(temperatures(resumed), temperatures(whole))


def temperatures(run) -> torch.Tensor:
    """What a run of the treatment alone has learned."""
    (treatment,) = run.treatments
    assert isinstance(treatment, LDR) and treatment.loss_ is not None
    return treatment.loss_.temperatures


def interrupt(done, steps, loss):
    raise KeyboardInterrupt


def test_treatment_refuses():
    task, model = small(1)
    with pytest.raises(Refused, match="each bring a training loss"):
        fit(model, task, Training(epochs=1), (ELR(), LDR()))
    with pytest.raises(InvalidInput, match="alpha"):
        fit(model, task, Training(epochs=1), (LDR(alpha=1.0),))
    with pytest.raises(InvalidInput, match="training examples with labels"):
        LDR().check(model, task.changed(train=task.train.take(slice(0, 0))))
    few = replace(task.train.take(slice(0, 64)), x=task.train.x[:64].double())
    run = fit(model.double(), task.changed(train=few), Training(epochs=1), (LDR(),))
    assert temperatures(run).dtype == torch.float64
    assert LDR().settings() == {"lam0": 10.0, "alpha": 2.0, "margin": 0.1, "normalize": "l1", "adaptive": True}
