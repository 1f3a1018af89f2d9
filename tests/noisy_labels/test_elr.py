import copy
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from surefoot.core.task import Training
from surefoot.datasets.embedded import digits
from surefoot.datasets.noise import with_label_noise
from surefoot.errors import InvalidInput, Refused
from surefoot.models import mlp, seeded_build
from surefoot.noisy_labels.elr import ELR, ELRLoss, ELRPlusLoss, memorization_curve, sigmoid_rampup, suspected
from surefoot.noisy_labels.elr_plus import train_elr_plus, update_ema
from surefoot.noisy_labels.ldr import ALDRKLLoss
from surefoot.noisy_labels.losses import RobustLoss
from surefoot.training.loop import fit

DOUBLE = torch.float64


def close(actual, expected):
    assert actual.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def random_batch(rows=16, classes=5, seed=0, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=generator, dtype=dtype)
    return logits, torch.randint(0, classes, (rows,), generator=generator), torch.arange(rows)


# --- exact numbers ---------------------------------------------------------------------------------------------------------


def test_one_step():
    z = torch.tensor([[2.0, 0.0, 0.0]], dtype=DOUBLE, requires_grad=True)
    loss = ELRLoss(4, 3, state_dtype=DOUBLE)
    value = loss(z, torch.tensor([1]), torch.tensor([2]))
    close(loss.targets[2], [0.236096, 0.031952, 0.031952])
    assert loss.targets[[0, 1, 3]].abs().sum() == 0
    close(value, [1.597698])
    close(F.cross_entropy(z, torch.tensor([1])), [2.239545])
    (grad,) = torch.autograd.grad(value, z)
    close(grad, [0.659826, -0.829913, 0.170087])
    plain = torch.autograd.grad(F.cross_entropy(z, torch.tensor([1])), z)[0]
    close((grad - plain) / 3, [-0.042387, 0.021193, 0.021193])


def test_false_label_is_overruled_by_the_target():
    z = torch.tensor([[1.0, 0.5, -0.5]], dtype=DOUBLE, requires_grad=True)
    loss = ELRLoss(1, 3, state_dtype=DOUBLE).eval()
    loss.targets.copy_(torch.tensor([[0.8, 0.1, 0.1]]))
    value = loss(z, torch.tensor([2]), torch.tensor([0]))
    plain = F.cross_entropy(z, torch.tensor([2]))
    close((value - plain) / 3, [-0.658909])
    close(value, [0.127403])
    close(torch.autograd.grad(value, z)[0], [-0.459315, 1.066845, -0.607530])
    assert torch.autograd.grad(plain, z)[0][0, 0].item() == pytest.approx(0.546549, abs=1e-6)


def test_lam_zero_is_cross_entropy_bit_for_bit():
    for dtype in (torch.float32, DOUBLE):
        logits, y, index = random_batch(rows=100, classes=13, dtype=dtype)
        for reduction in ("mean", "sum", "none"):
            loss = ELRLoss(100, 13, lam=0.0, reduction=reduction)
            assert torch.equal(loss(logits, y, index), F.cross_entropy(logits, y, reduction=reduction))


def test_never_visited_in_eval_is_cross_entropy_and_writes_nothing():
    logits, y, index = random_batch()
    loss = ELRLoss(16, 5).eval()
    assert torch.equal(loss(logits, y, index), F.cross_entropy(logits, y))
    assert loss.targets.abs().sum() == 0


def test_targets_warm_up_with_the_visits():
    logits, y, index = random_batch()
    loss = ELRLoss(16, 5, beta=0.9)
    p = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
    p = p / p.sum(1, keepdim=True)
    for visit in range(1, 6):
        loss(logits, y, index)
        torch.testing.assert_close(loss.targets, (1 - 0.9**visit) * p)
        torch.testing.assert_close(loss.targets.sum(1), torch.full((16,), 1 - 0.9**visit, dtype=DOUBLE))


def test_three_visits():
    """The recursion by hand: T = .3 (q3 + .7 q2 + .49 q1)."""
    loss = ELRLoss(1, 3)
    zs = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, -1.0]], dtype=DOUBLE)
    for z in zs:
        loss(z[None], torch.tensor([1]), torch.tensor([0]))
    q = zs.softmax(1)
    torch.testing.assert_close(loss.targets[0], 0.3 * (q[2] + 0.7 * q[1] + 0.49 * q[0]))


def test_gradient_is_the_formula_and_none_reaches_the_targets():
    logits, y, index = random_batch()
    loss = ELRLoss(16, 5, state_dtype=DOUBLE, reduction="none").eval()
    loss.targets.copy_(0.9 * random_batch(seed=1)[0].softmax(1))
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, y, index), logits)
    regulariser = (loss(logits, y, index) - F.cross_entropy(logits, y, reduction="none")) / 3
    (grad,) = torch.autograd.grad(regulariser.sum(), logits)
    p, t = logits.detach().softmax(1), loss.targets
    agreement = (p * t).sum(1, keepdim=True)
    torch.testing.assert_close(grad, p / (1 - agreement) * (agreement - t))  # sum_k (t_k - t_c) p_k = <t, p> - t_c
    loss.train()(logits, y, index).sum().backward()
    assert not loss.targets.requires_grad and loss.targets.grad_fn is None


def test_state_dict_round_trip_batch_order_and_reduction():
    logits, y, index = random_batch()
    first, second = ELRLoss(16, 5), ELRLoss(16, 5)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    first(logits, y, index)
    second(logits[order], y[order], index[order])
    assert torch.equal(first.targets, second.targets)
    copied = ELRLoss(16, 5)
    copied.load_state_dict(first.state_dict())
    assert torch.equal(copied(logits, y, index), first(logits, y, index))
    none, mean = ELRLoss(16, 5, reduction="none"), ELRLoss(16, 5)
    torch.testing.assert_close(none(logits, y, index).mean(), mean(logits, y, index))
    first.reset()
    assert first.targets.abs().sum() == 0


def test_bounded_where_the_model_and_its_target_are_sure():
    loss = ELRLoss(1, 3, beta=0.0)
    z = torch.tensor([[1e4, 0.0, 0.0]], requires_grad=True)
    value = loss(z, torch.tensor([0]), torch.tensor([0]))
    value.backward()
    assert z.grad is not None and value.isfinite() and z.grad.isfinite().all()
    assert value.item() >= 3 * torch.tensor(1e-4).log().item() - 1.0


def test_a_sample_twice_in_a_batch_counts_as_one_visit_with_its_mean():
    logits, y, _ = random_batch(rows=3)
    loss = ELRLoss(2, 5)
    loss(logits, y, torch.tensor([1, 0, 1]))
    p = logits.softmax(1)
    torch.testing.assert_close(loss.targets, 0.3 * torch.stack([p[1], (p[0] + p[2]) / 2]))
    assert loss(logits, y, torch.tensor([1, 0, 1])).isfinite()


def test_half_precision_logits_and_state():
    logits, y, index = random_batch(dtype=torch.float32)
    full, half = ELRLoss(16, 5), ELRLoss(16, 5, state_dtype=torch.float16)
    reference = full(logits, y, index)
    torch.testing.assert_close(half(logits, y, index), reference, rtol=1e-2, atol=1e-3)
    assert half.targets.dtype == torch.float16
    low = ELRLoss(16, 5)
    assert low(logits.bfloat16(), y, index).dtype == torch.float32 and low.targets.dtype == torch.float32


def test_suspected_lists_the_largest_margins_first():
    targets = torch.tensor([[0.6, 0.2, 0.1], [0.1, 0.8, 0.0], [0.0, 0.0, 0.0], [0.3, 0.5, 0.1]])
    labels = torch.tensor([0, 0, 1, 0])
    assert suspected(targets, labels).tolist() == [1, 3]
    assert suspected(targets, labels, k=1).tolist() == [1]
    with pytest.raises(InvalidInput, match="each of the 4 samples"):
        suspected(targets, labels[:2])


def test_memorization_curve():
    labels, true = torch.tensor([1, 1, 0, 2]), torch.tensor([0, 2, 0, 2])
    predictions = torch.tensor([[0, 2, 0, 1], [1, 2, 0, 2], [1, 1, 0, 2]])
    curve = memorization_curve(predictions, labels, true)
    assert curve.memorized.tolist() == [0.0, 0.5, 1.0]
    assert curve.recovered.tolist() == [1.0, 0.5, 0.0]
    assert curve.learned.tolist() == [0.5, 1.0, 1.0]


# --- ELR+ ------------------------------------------------------------------------------------------------------------------


def test_elr_plus_without_mixup_and_with_itself_as_teacher_is_elr():
    logits, y, index = random_batch()
    plain, plus = ELRLoss(16, 5), ELRPlusLoss(16, 5)
    onehot = F.one_hot(y, 5).to(DOUBLE)
    for _ in range(3):
        plus.update_targets(logits, index)
        assert abs((plus(logits, onehot) - plain(logits, y, index)).item()) < 1e-6


def test_elr_plus_mixes_targets_ramps_and_filters():
    logits, y, index = random_batch(rows=4)
    perm = torch.tensor([1, 0, 3, 2])
    plus = ELRPlusLoss(4, 5, beta=0.0)
    q = plus.update_targets(logits, index, perm, 0.75)
    p = logits.softmax(1)
    torch.testing.assert_close(q, 0.75 * p + 0.25 * p[perm])
    soft = 0.75 * F.one_hot(y, 5).to(DOUBLE) + 0.25 * F.one_hot(y[perm], 5).to(DOUBLE)
    cross_entropy = -(soft * p.log()).sum(1).mean()
    regulariser = (1 - (q * p).sum(1)).log().mean()
    torch.testing.assert_close(plus(logits, soft), cross_entropy + 3 * regulariser)
    plus.coef_step = 100
    torch.testing.assert_close(plus(logits, soft, 0), cross_entropy + 3 * 2.718281828459045**-5 * regulariser)
    torch.testing.assert_close(plus(logits, soft, 100), cross_entropy + 3 * regulariser)
    plus.filter_labels = True
    filtered = soft * q / (soft * q).sum(1, keepdim=True)
    expected = -(filtered * p.log()).sum(1).mean() + 3 * regulariser
    torch.testing.assert_close(plus(logits, soft, 100), expected)
    assert sigmoid_rampup(7, 0) == 1.0


def test_update_ema_of_weights_and_buffers():
    linear, norm = nn.Linear(2, 3), nn.BatchNorm1d(3)
    net = nn.Sequential(linear, norm)
    ema = copy.deepcopy(net)
    slow, slow_norm = ema
    assert isinstance(slow, nn.Linear) and isinstance(slow_norm, nn.BatchNorm1d)
    before = slow.weight.clone()
    with torch.no_grad():
        linear.weight.add_(1.0)
    net(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
    update_ema(ema, net, 0.9)
    torch.testing.assert_close(slow.weight, before + 0.1)
    assert norm.running_mean is not None
    torch.testing.assert_close(slow_norm.running_mean, 0.1 * norm.running_mean)
    assert slow_norm.num_batches_tracked == 1


def plus_run(path=None, epochs=4, stop=None, seed=0, progress=None):
    task = digits(seed, sizes=(300, 100, 200))
    y = with_label_noise(task.train, 0.3, 10, generator=torch.Generator().manual_seed(seed)).labels
    nets = [seeded_build(lambda: mlp((1, 8, 8), 10, hidden=(32,)), task.generator(name)) for name in "ab"]
    optimizers = [torch.optim.SGD(net.parameters(), 0.05, momentum=0.9) for net in nets]
    data = torch.utils.data.TensorDataset(task.train.x, y, torch.arange(len(y)))
    source = torch.Generator().manual_seed(seed)
    loader = torch.utils.data.DataLoader(data, 50, shuffle=True, generator=source)
    settings: Any = {"num_samples": 300, "num_classes": 10, "ema_step": 0, "ema_alpha": 0.9}
    generator = torch.Generator().manual_seed(seed)
    result = train_elr_plus(nets[0], nets[1], loader, optimizers[0], optimizers[1], epochs=stop or epochs, generator=generator, checkpoint=path, progress=progress, **settings)  # fmt: skip
    return result, task


def test_train_elr_plus_learns_resumes_and_reports(tmp_path):
    calls = []
    state = torch.random.get_rng_state()
    whole, task = plus_run(progress=lambda *call: calls.append(call[:2]))
    assert torch.equal(state, torch.random.get_rng_state())
    assert calls == [(6, 24), (12, 24), (18, 24), (24, 24)]
    path = tmp_path / "plus.pt"
    plus_run(path, stop=2)
    resumed, _ = plus_run(path)
    assert resumed.history == whole.history and len(whole.history) == 4
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values()):
        assert torch.equal(a, b)
    longer, _ = plus_run(epochs=25)
    accuracy = (longer.model(task.test.x).argmax(1) == task.test.y).float().mean().item()
    assert accuracy > 0.7
    assert longer.losses[0].targets.sum(1).min() > 0.99  # every sample was visited, at its own index


def test_train_elr_plus_bad_input():
    net, other = nn.Linear(4, 3), nn.Linear(4, 3)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (net, other)]
    batch = (torch.zeros(2, 4), torch.tensor([0, 1]), torch.tensor([0, 5]))
    with pytest.raises(InvalidInput, match=r"index must lie in \[0, 4\)"):
        train_elr_plus(net, other, [batch], *optimizers, num_samples=4, num_classes=3, epochs=1)
    with pytest.raises(InvalidInput, match="two networks"):
        train_elr_plus(net, net, [batch], *optimizers, num_samples=9, num_classes=3, epochs=1)
    with pytest.raises(InvalidInput, match="no batch"):
        train_elr_plus(net, other, [], *optimizers, num_samples=9, num_classes=3, epochs=1)
    with pytest.raises(InvalidInput, match="ema_alpha"):
        train_elr_plus(net, other, [batch], *optimizers, num_samples=9, num_classes=3, epochs=1, ema_alpha=1.0)
    with pytest.raises(InvalidInput, match="update_targets"):
        ELRPlusLoss(4, 3)(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(InvalidInput, match="partner"):
        ELRPlusLoss(4, 3).update_targets(torch.zeros(2, 3), torch.tensor([0, 1]), l=0.7)


# --- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "target", "index", "says"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 1]), None, "index is missing"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([0.0, 1.0]), "integer"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), [0, 1], "integer tensor"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([0, 4]), r"\[0, 4\)"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([-1, 0]), r"\[0, 4\)"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([0]), "each of the 2 rows"),
        (torch.zeros(2, 5), torch.tensor([0, 1]), torch.tensor([0, 1]), "5 classes, and the loss was made for 3"),
        (torch.zeros(2, 3, 1), torch.tensor([0, 1]), torch.tensor([0, 1]), r"\[B, K\]"),
        (torch.full((2, 3), torch.nan), torch.tensor([0, 1]), torch.tensor([0, 1]), "row 0"),
        (torch.tensor([[0, 0, 0], [0, 0, torch.inf]]), torch.tensor([0, 1]), torch.tensor([0, 1]), "row 1"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), torch.tensor([0, 1]), r"target must lie in \[0, 3\)"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), torch.tensor([0, 1]), "target must be int64"),
    ],
)
def test_bad_batches(logits, target, index, says):
    loss = ELRLoss(4, 3)
    with pytest.raises(InvalidInput, match=says):
        loss(logits, target, index)
    assert loss.targets.abs().sum() == 0  # a refused batch leaves no trace


def test_bad_settings_and_states():
    bad: list[Any] = [{"beta": 1.0}, {"beta": -0.1}, {"lam": -1.0}, {"clamp": 0.0}, {"reduction": "median"}]
    for settings in bad:
        with pytest.raises(InvalidInput):
            ELRLoss(4, 3, **settings)
    with pytest.raises(InvalidInput, match="num_samples"):
        ELRLoss(0, 3)
    with pytest.raises(InvalidInput, match=r"5 samples and 3 classes.*4 samples and 3 classes"):
        ELRLoss(4, 3).load_state_dict(ELRLoss(5, 3).state_dict())
    with pytest.raises(InvalidInput, match=r"4 samples and 2 classes.*4 samples and 3 classes"):
        ELRLoss(4, 3).load_state_dict(ELRLoss(4, 2).state_dict())
    with pytest.raises(InvalidInput, match=r"torch\.distributed"):
        ELRLoss(4, 3, all_ranks=True)(torch.zeros(1, 3), torch.tensor([0]), torch.tensor([0]))


# --- the treatment ---------------------------------------------------------------------------------------------------------


def noisy_digits(seed, rate=0.4):
    task = digits(seed, sizes=(600, 100, 600))
    train = with_label_noise(task.train, rate, 10, generator=task.generator("noise"))
    model = seeded_build(lambda: mlp((1, 8, 8), 10, hidden=(128, 128)), task.generator("model"))
    return task.changed(train=train), model


def accuracy(model, split):
    return (model(split.x).argmax(1) == split.y).float().mean().item()


def loss_of(run) -> ELRLoss:
    """What a run of the treatment alone has learned of the labels."""
    (treatment,) = run.treatments
    assert isinstance(treatment, ELR) and treatment.loss_ is not None
    return treatment.loss_


@pytest.mark.slow
def test_treatment_keeps_what_cross_entropy_loses():
    """40 % symmetric noise, 600 test images: one standard error of either accuracy is below 2 points."""
    task, model = noisy_digits(0)
    training = Training(epochs=80, optimizer="sgd", lr=0.02, schedule="constant")
    plain, treated = fit(model, task, training), fit(model, task, training, (ELR(),))
    assert accuracy(treated.model, task.test) - accuracy(plain.model, task.test) > 0.1
    found = loss_of(treated).suspected(task.train.labels)
    false = task.train.y != task.train.true_y
    assert false[found].float().mean() > 0.8 and len(found) > 0.7 * false.sum()


def test_treatment_contract(tmp_path):
    task, model = noisy_digits(1)
    training = Training(epochs=2)
    treatment, weights = ELR(), copy.deepcopy(model.state_dict())
    first, second = (fit(model, task, training, (treatment,)) for _ in range(2))
    assert treatment.loss_ is None and ELR(lam=1.0).settings() == {"lam": 1.0, "beta": 0.7}
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
        assert torch.equal(first.model.state_dict()[name], second.model.state_dict()[name])
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(model, task, training, (treatment,), checkpoint=path, progress=interrupt)
    resumed = fit(model, task, training, (treatment,), checkpoint=path)
    assert torch.equal(loss_of(resumed).targets, loss_of(first).targets)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])


def test_treatment_follows_a_double_model():
    task, model = noisy_digits(1)
    few = replace(task.train.take(slice(0, 64)), x=task.train.x[:64].double())
    run = fit(model.double(), task.changed(train=few), Training(epochs=1), (ELR(),))
    assert loss_of(run).targets.dtype == torch.float64


def interrupt(done, steps, loss):
    raise KeyboardInterrupt


def test_treatment_refuses_a_second_loss_and_bad_settings():
    task, model = noisy_digits(2)
    with pytest.raises(Refused, match="each bring a training loss"):
        fit(model, task, Training(epochs=1), (ELR(), RobustLoss()))
    with pytest.raises(InvalidInput, match="beta"):
        fit(model, task, Training(epochs=1), (ELR(beta=1.0),))
    with pytest.raises(InvalidInput, match="lam"):
        fit(model, task, Training(epochs=1), (ELR(lam=-1.0),))
    unlabelled = task.changed(train=task.train.take(slice(0, 0)))
    with pytest.raises(InvalidInput, match="training examples with labels"):
        ELR().check(model, unlabelled)


RANKS = """
import os, sys, torch, torch.distributed as dist
from surefoot.noisy_labels.elr import ELRLoss
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
y, index = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([4, 1, 0, 1, 4, 0])
together, alone = ELRLoss(5, 3, all_ranks=True), ELRLoss(5, 3)
own = slice(3 * rank, 3 * rank + 3)
for _ in range(2):
    value = together(z[own], y[own], index[own])
    alone(z, y, index)
assert torch.equal(together.recall(index[own], z), alone.recall(index[own], z))
mine = torch.nn.functional.cross_entropy(z[own], y[own]) + 3 * torch.log1p(-(alone.recall(index[own], z) * z[own].softmax(1)).sum(1)).mean()
torch.testing.assert_close(value, mine)
torch.testing.assert_close(together.targets, alone.targets)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_that_share_visits_agree_with_one_process(tmp_path):
    command = [sys.executable, "-c", RANKS]
    runs = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")]) for rank in range(2)]
    assert [run.wait(60) for run in runs] == [0, 0]


# --- without looking at values ---------------------------------------------------------------------------------------------


def test_unvalidated_values_give_the_same_loss_and_are_not_looked_at():
    logits, target, index = random_batch()
    index[3] = index[7]
    losses = [ELRLoss(16, 5, state_dtype=DOUBLE, validate=validate) for validate in (True, False)]
    first, second = (loss(logits, target, index) for loss in losses)
    assert torch.equal(first, second)
    assert torch.equal(losses[0].targets, losses[1].targets)
    logits[0, 0] = torch.nan
    assert bool(losses[1](logits, target, index).isnan())
    with pytest.raises(InvalidInput, match="row 0"):
        losses[0](logits, target, index)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_unvalidated_losses_never_wait_for_the_device():
    logits, target, index = (t.cuda() for t in random_batch())
    index[3] = index[7]
    elr = ELRLoss(16, 5, state_dtype=DOUBLE, validate=False).cuda()
    ldr = ALDRKLLoss(16, 5, normalize="l1", validate=False).cuda().double()
    logits.requires_grad_()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (elr(logits, target, index) + ldr(logits, target, index)).backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert logits.grad is not None and bool(torch.isfinite(logits.grad).all())
