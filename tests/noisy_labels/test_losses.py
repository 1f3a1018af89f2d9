import math

import pytest
import torch
from torch.nn import functional as F

from surefoot.core.task import Training
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput
from surefoot.models import mlp, seeded_build
from surefoot.noisy_labels.losses import (
    LOSSES,
    BootstrapLoss,
    CSLoss,
    GCELoss,
    JSLoss,
    MAELoss,
    NCERCELoss,
    RLLLoss,
    RobustLoss,
    SCELoss,
    WWLoss,
    margin_differences,
)
from surefoot.training.loop import fit

LOGITS = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64)
LABEL = torch.tensor([0])
P = LOGITS.softmax(1)[0]


def batch(rows=20, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, classes, (rows,), generator=generator)


def test_values_from_the_definitions():
    p, onehot = P, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert MAELoss()(LOGITS, LABEL).item() == pytest.approx((p - onehot).abs().sum().item())
    assert GCELoss(0.7)(LOGITS, LABEL).item() == pytest.approx(((1 - p[0] ** 0.7) / 0.7).item())
    reverse = -(p * torch.tensor([0.0, -4.0, -4.0])).sum()
    assert SCELoss(0.1, 1.0)(LOGITS, LABEL).item() == pytest.approx((-0.1 * p[0].log() + reverse).item())
    assert NCERCELoss()(LOGITS, LABEL).item() == pytest.approx((p[0].log() / p.log().sum() + reverse).item())
    mixed = 0.5 * onehot + 0.5 * p
    js = 0.5 * (torch.xlogy(onehot, onehot / mixed).sum() + (p * (p / mixed).log()).sum()) / (0.5 * math.log(2))
    assert JSLoss(0.5)(LOGITS, LABEL).item() == pytest.approx(js.item())
    rll = math.log(1.01 / 0.01) - (0.01 + p[0]).log() + 0.5 * ((0.01 + p[1]).log() + (0.01 + p[2]).log())
    assert RLLLoss()(LOGITS, LABEL).item() == pytest.approx(rll.item())
    soft = 0.95 * onehot + 0.05 * p
    assert BootstrapLoss()(LOGITS, LABEL).item() == pytest.approx(-(soft * p.log()).sum().item())
    assert margin_differences(LOGITS, LABEL, 1.0)[0].tolist() == [0.0, 2.0, 0.5]
    assert CSLoss()(LOGITS, LABEL).item() == 2.0
    assert WWLoss()(LOGITS, LABEL).item() == 2.5


def test_limits():
    logits, y = batch()
    torch.testing.assert_close(GCELoss(1e-6)(logits, y), F.cross_entropy(logits, y), rtol=1e-4, atol=0)
    torch.testing.assert_close(GCELoss(1.0)(logits, y), MAELoss()(logits, y) / 2)
    torch.testing.assert_close(BootstrapLoss(1.0)(logits, y), F.cross_entropy(logits, y))
    assert torch.equal(LOSSES["ce"]()(logits, y), F.cross_entropy(logits, y, reduction="none").mean())
    sure = 50 * torch.eye(4, dtype=torch.float64)
    for name in ("ce", "mae", "gce", "sce", "rll", "js", "cs", "ww", "nce_rce"):
        assert abs(LOSSES[name]()(sure, torch.arange(4)).item()) < 1e-9, name


@pytest.mark.parametrize("name", ["mae", "rll"])
def test_symmetric_losses_sum_to_a_constant_over_the_labels(name):
    logits, _ = batch(rows=30)
    loss = LOSSES[name](reduction="none")
    total = torch.stack([loss(logits, torch.full((30,), k)) for k in range(5)]).sum(0)
    torch.testing.assert_close(total, total[:1].expand(30))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_reductions_and_extreme_logits(name):
    logits, y = batch(rows=6)
    loss = LOSSES[name]()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, y), logits)
    each = LOSSES[name](reduction="none")(logits, y)
    torch.testing.assert_close(each.mean(), loss(logits, y))
    torch.testing.assert_close(each.sum(), LOSSES[name](reduction="sum")(logits, y))
    extreme = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    value = loss(extreme, torch.tensor([0, 0]))
    value.backward()
    assert extreme.grad is not None and value.isfinite() and extreme.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_bad_input_is_one_sentence(name):
    loss, y = LOSSES[name](), torch.tensor([0, 1])
    with pytest.raises(InvalidInput, match="int64"):
        loss(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(InvalidInput, match=r"target must lie in \[0, 3\), got values from 0 to 3"):
        loss(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(InvalidInput, match="at least 2 classes"):
        loss(torch.zeros(2, 1), y * 0)
    with pytest.raises(InvalidInput, match="row 1"):
        loss(torch.tensor([[0.0, 1.0], [0.0, math.inf]]), y)
    with pytest.raises(InvalidInput, match="1 labels for 2 rows"):
        loss(torch.zeros(2, 3), y[:1])
    with pytest.raises(InvalidInput, match="empty batch"):
        loss(torch.zeros(0, 3), y[:0])
    with pytest.raises(InvalidInput, match="reduction"):
        LOSSES[name](reduction="median")


def test_bad_settings():
    for make in (
        lambda: GCELoss(0.0),
        lambda: JSLoss(1.0),
        lambda: RLLLoss(0.0),
        lambda: SCELoss(log_zero=1.0),
        lambda: CSLoss(-1.0),
        lambda: RobustLoss("hinge"),
    ):
        with pytest.raises(InvalidInput):
            make()


def test_robust_loss_trains_and_reports_its_settings():
    task = digits(0, sizes=(200, 50, 100))
    model = seeded_build(lambda: mlp((1, 8, 8), 10, hidden=(32,)), task.generator("model"))
    run = fit(model, task, Training(epochs=60, lr=5e-3), (RobustLoss("gce", {"q": 0.5}),))
    correct = (run.model(task.test.x).argmax(1) == task.test.y).float().mean()
    assert correct > 0.8
    assert RobustLoss("gce", {"q": 0.5}).settings() == {"name": "gce", "options": {"q": 0.5}}
