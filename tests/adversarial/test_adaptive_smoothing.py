"""Adaptive smoothing: exact radii, mixing in log space, the margin that no accurate base can move, the mixing network, the treatment."""

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from surefoot.adversarial import adaptive_smoothing as a_s
from surefoot.core.task import Split, Task, Training
from surefoot.errors import InvalidInput, Refused
from surefoot.models.networks import mlp, seeded_build, small_cnn, small_resnet
from surefoot.nn.attacks import margin, pgd, standard_suite
from surefoot.nn.smoothing import ABSTAIN
from surefoot.nn.taps import layer_names
from surefoot.training.loop import fit


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def net(seed=0, build=lambda: small_cnn((1, 8, 8), 5, widths=(4, 6, 6), linear=8)):
    return seeded_build(build, rng(seed)).eval()


class Table(nn.Module):
    """A base that answers with the logits it is fed."""

    def __init__(self, first, last):
        super().__init__()
        self.first, self.last = first, last

    def forward(self, x):
        return x[:, self.first : self.last]


def adaptive(seed=0, **options):
    g, h = net(seed), net(seed + 1)
    mixing = seeded_build(lambda: a_s.MixingNetwork((4, 6), (4, 6), widths=(8,), blocks=1), rng(seed + 2))
    return a_s.AdaptiveSmoothingClassifier(g, h, mixing, feature_modules=(("2", "5"), ("2", "5")), **options).eval()


# --- certificates ---------------------------------------------------------------------------------------------------


def test_worked_radii():
    assert a_s.required_margin(0.8) == pytest.approx(0.25)
    p = (0.85, 0.05, 0.8)
    assert a_s.mixed_radius(*p, lipschitz=math.sqrt(2 / math.pi)).item() == pytest.approx(0.344661, abs=1e-6)
    assert a_s.mixed_radius(*p, sigma=1.0, method="lipschitz").item() == pytest.approx(0.689323, abs=1e-6)
    assert a_s.mixed_radius(*p, sigma=1.0, method="rs").item() == pytest.approx(0.587001, abs=1e-6)
    assert a_s.mixed_radius(*p, sigma=1.0).item() == pytest.approx(1.006939, abs=1e-6)


def random_cases(n, seed=3):
    g = rng(seed)
    alpha = (0.5 + 0.499 * torch.rand(n, generator=g, dtype=torch.float64)).tolist()
    top = torch.rand(n, generator=g, dtype=torch.float64)
    second = torch.rand(n, generator=g, dtype=torch.float64) * torch.minimum(top, 1 - top)
    return alpha, top, second


def test_tight_is_never_below_the_others_and_rs_sometimes_is_below_lipschitz():
    alphas, top, second = random_cases(10_000)
    rs_loses = positive = 0
    for a in [*dict.fromkeys(round(v, 2) for v in alphas)]:
        tight, rs, lip = (a_s.mixed_radius(top, second, a, sigma=0.7, method=m) for m in ("tight", "rs", "lipschitz"))
        paper = a_s.mixed_radius(top, second, a, lipschitz=math.sqrt(2 / math.pi) / 0.7)
        assert (tight >= torch.maximum(rs, lip) - 1e-9).all() and (rs >= paper - 1e-9).all()
        rs_loses, positive = rs_loses + int((rs < lip - 1e-9).sum()), positive + int((lip > 0).sum())
    assert rs_loses > 0.1 * positive  # the tight constant is a real competitor: rs alone is not the best radius


def test_the_margin_is_met_exactly_at_the_tight_radius():
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    _, top, second = random_cases(500)
    r = a_s.mixed_radius(top, second, 0.7, sigma=2.0) / 2.0
    left = normal.cdf(normal.icdf(top) - r) - normal.cdf(normal.icdf(second) + r)
    need = a_s.required_margin(0.7)
    assert (left[r > 0] - need).abs().max() < 1e-9 and (top - second)[r == 0].max() <= need + 1e-12


def test_radii_at_the_ends():
    assert a_s.mixed_radius(1.0, 0.0, 0.8, sigma=1.0).item() == math.inf
    assert a_s.mixed_radius(0.9, 0.1, 1.0, sigma=1.0).item() == pytest.approx(1.2815516, abs=1e-6)  # plain smoothing
    capped = a_s.mixed_radius(0.9, 0.6, 0.8, sigma=1.0)
    assert capped.item() == a_s.mixed_radius(0.9, 0.1, 0.8, sigma=1.0).item()  # p_second cannot exceed 1 - p_top


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: a_s.mixed_radius(0.9, 0.1, 0.4, sigma=1.0), "alpha in"),
        (lambda: a_s.mixed_radius(0.9, 0.1, 0.8), "exactly one"),
        (lambda: a_s.mixed_radius(0.9, 0.1, 0.8, sigma=1.0, lipschitz=1.0), "exactly one"),
        (lambda: a_s.mixed_radius(1.1, 0.1, 0.8, sigma=1.0), "p_top"),
        (lambda: a_s.mixed_radius(0.9, -0.1, 0.8, sigma=1.0), "p_second"),
        (lambda: a_s.mixed_radius(0.9, 0.1, 0.8, lipschitz=1.0, method="rs"), "give sigma"),
    ],
)
def test_bad_certificates_are_refused(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()


class HalfSpace(nn.Module):
    """Three classes: 0 where the first coordinate exceeds a threshold, else 1; 2 never."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold = threshold

    def forward(self, x):
        z = x.flatten(1)[:, 0] - self.threshold
        return torch.stack([z, -z, torch.full_like(z, -100.0)], 1)


def test_no_attack_and_no_accurate_base_break_a_certificate():
    """5,000 points, each moved by 0.999 r straight at the boundary; g puts all its weight on the runner-up."""
    normal, alpha, sigma = torch.distributions.Normal(0.0, 1.0), 0.75, 0.5
    x = torch.randn(5000, 4, generator=rng(1))
    found = a_s.certify_mixed(HalfSpace(-0.2), x, alpha=alpha, sigma=sigma, num_classes=3, generator=rng(2), n=2000)
    sure = found.prediction != ABSTAIN
    way = torch.where(found.prediction == 0, -1.0, 1.0)
    first = normal.cdf((x[:, 0] + 0.2 + way * 0.999 * found.radius.float()) / sigma)  # true share of class 0 there
    p = torch.stack([first, 1 - first, torch.zeros_like(first)], 1)
    rival = 1 - found.prediction.clamp_min(0)
    mixed = alpha * p + (1 - alpha) * nn.functional.one_hot(rival, 3)
    assert sure.sum() > 3000
    assert (mixed.argmax(1) == found.prediction)[sure].all()
    # planted mistake: h's own radius, which forgets what g can do
    plain = a_s.mixed_radius(found.p_lower, 1 - found.p_lower, 1.0, sigma=sigma).float()
    first = normal.cdf((x[:, 0] + 0.2 + way * 0.999 * plain) / sigma)
    mixed = alpha * torch.stack([first, 1 - first, 0 * first], 1) + (1 - alpha) * nn.functional.one_hot(rival, 3)
    assert not (mixed.argmax(1) == found.prediction)[sure].all()


# --- the mixture ----------------------------------------------------------------------------------------------------


def test_the_ends_are_the_bases():
    g, h = torch.randn(2, 50, 5, generator=rng())
    assert torch.equal(a_s.mix_log_probs(g, h, 0.0), g.log_softmax(1))
    assert torch.equal(a_s.mix_log_probs(g, h, 1.0), h.log_softmax(1))
    weights = torch.tensor([[0.0], [1.0]]).expand(2, 1)
    both = a_s.mix_log_probs(g[:2], h[:2], weights)
    assert torch.equal(both[0], g.log_softmax(1)[0]) and torch.equal(both[1], h.log_softmax(1)[1])


def test_probabilities_are_mixed_and_sum_to_one():
    g, h = torch.randn(2, 50, 5, generator=rng(), dtype=torch.float64) * 3
    mixed = a_s.mix_log_probs(g, h, 0.7).exp()
    assert torch.allclose(mixed, 0.3 * g.softmax(1) + 0.7 * h.softmax(1), atol=1e-14)
    assert torch.allclose(mixed.sum(1), torch.ones(50, dtype=torch.float64))
    single = a_s.mix_log_probs(g.float(), h.float(), 0.7)
    assert torch.allclose(single.double(), mixed.log(), atol=2e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, torch.tensor([[0.0], [0.4], [1.0]])])
def test_huge_logits_stay_finite_with_their_gradients(alpha):
    g = torch.tensor([[1e4, -1e4, 0.0], [0.0, 1e4, -1e4], [-1e4, 0.0, 1e4]], requires_grad=True)
    h = g.detach().roll(1, 0).requires_grad_(True)
    if isinstance(alpha, torch.Tensor):
        alpha = alpha.clone().requires_grad_(True)
    out = a_s.mix_log_probs(g, h, alpha)
    out.clamp_min(-1e3).sum().backward()
    assert torch.isfinite(out).all()
    for leaf in (g, h, *([alpha] if isinstance(alpha, torch.Tensor) else [])):
        assert leaf.grad is None or torch.isfinite(leaf.grad).all()
    naive = (0.7 * g.softmax(1) + 0.3 * h.softmax(1)).log()
    assert torch.isinf(naive).any()  # planted mistake: the published log of a sum underflows


def margin_cases(n=100_000):
    h = torch.randn(n, 6, generator=rng(5), dtype=torch.float64) * 3
    p = h.softmax(1)
    top, order = p.topk(2)
    return h, p, top[:, 0] - top[:, 1], order


@pytest.mark.parametrize("alpha", [0.5, 0.7, 0.9])
def test_the_margin_protects_against_every_accurate_base(alpha):
    h, _, gap, order = margin_cases()
    g = 1e3 * nn.functional.one_hot(torch.randint(6, (len(h),), generator=rng(6)), 6).double()
    worst = 1e3 * nn.functional.one_hot(order[:, 1], 6).double()
    need = a_s.required_margin(alpha)
    for accurate in (g, worst):
        kept = a_s.mix_log_probs(accurate, h, alpha).argmax(1) == order[:, 0]
        assert kept[gap > need + 1e-9].all()
    lost = a_s.mix_log_probs(worst, h, alpha).argmax(1) != order[:, 0]
    assert lost[gap < need - 1e-9].all()


def test_mixing_logits_protects_nothing():
    """Planted mistake: the average of logits, which one large logit of g decides."""
    h, _, gap, order = margin_cases(1000)
    g = 1e3 * nn.functional.one_hot(order[:, 1], 6).double()
    assert ((0.1 * g + 0.9 * h).argmax(1) == order[:, 0])[gap > a_s.required_margin(0.9)].sum() == 0


def test_classifier_matches_the_formula_and_keeps_bases_in_evaluation_mode():
    g, h = net(0), net(1)
    model = a_s.MixedClassifier(g, h, alpha=0.8, accurate_scale=2.0, robust_scale=3.0)
    x = torch.rand(7, 1, 8, 8, generator=rng())
    assert torch.equal(model(x), a_s.mix_log_probs(2 * g(x), 3 * h(x), 0.8))
    before = copy.deepcopy(model.state_dict())
    model.train()
    model(x)
    assert model.training and not g.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    g.train()
    with pytest.raises(Refused, match="training mode"):
        model(x)


def test_resize_inside_the_composite_carries_gradients():
    g = a_s.Resized(net(0, lambda: mlp((1, 16, 16), 5, hidden=(8,))), (16, 16))
    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    a_s.check_bases(g, net(1), x.detach())
    a_s.MixedClassifier(g, net(1), alpha=0.0 + 1e-6)(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_amplified_makes_sure_answers_surer():
    h = Table(0, 5).eval()
    logits = torch.randn(200, 5, generator=rng(4), dtype=torch.float64)
    plain, strong = logits.softmax(1), a_s.Amplified(h, scale=4.0, power=2.0, shift=0.5)(logits)
    top = plain.topk(2).values
    sure = (top[:, 0] - top[:, 1]) > 0.5
    after = strong.softmax(1).topk(2).values
    assert (strong.argmax(1) == logits.argmax(1)).all()
    assert (after[:, 0] - after[:, 1])[sure].mean() > (top[:, 0] - top[:, 1])[sure].mean()
    x = logits.clone().requires_grad_(True)
    a_s.Amplified(h, power=0.5)(x).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_fit_alpha_spends_its_budget_and_no_more():
    margins = torch.rand(400, generator=rng(), dtype=torch.float64) * 1.2 - 0.2
    held = margins[margins > 0]
    previous = 1.0
    for budget in (0.01, 0.05, 0.2):
        alpha = a_s.fit_alpha(margins, budget=budget)
        lost = (held < a_s.required_margin(alpha) - 1e-12).double().mean().item()
        assert lost <= budget and (held < a_s.required_margin(alpha - 0.01)).double().mean().item() > lost
        assert alpha < previous
        previous = alpha
    with pytest.raises(InvalidInput, match="nothing to protect"):
        a_s.fit_alpha(-margins.abs())


def test_confidence_gap_counts_by_case():
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.2, 0.0], [0.1, 0.0, 0.0], [0.0, 0.0, 3.0]])
    y = torch.tensor([0, 0, 0, 2])
    report = a_s.confidence_gap(Table(0, 3).eval(), [(logits, y)], lambda m, x, t: -x)
    p = logits.double().softmax(1)
    top = p.topk(2).values
    gaps = (top[:, 0] - top[:, 1])[torch.tensor([0, 2, 3])]
    assert report.right_clean == pytest.approx(gaps.median().item()) and len(report.margins["wrong, clean"]) == 1
    assert math.isnan(report.right_attacked) and len(report.chart().figure["data"]) == 4
    with pytest.raises(InvalidInput, match="no batches"):
        a_s.confidence_gap(Table(0, 3), [], lambda m, x, t: x)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: a_s.MixedClassifier(net(), net(), alpha=1.2), "alpha"),
        (lambda: a_s.MixedClassifier(net(), net(), robust_scale=0.0), "robust_scale"),
        (lambda: a_s.MixedClassifier(net(), net().train()), "robust base is in training mode"),
        (lambda: a_s.MixedClassifier(net(), net(1, lambda: mlp((1, 8, 8), 4)))(torch.rand(2, 1, 8, 8)), "same classes"),
        (lambda: a_s.mix_log_probs(torch.full((1, 3), math.nan), torch.zeros(1, 3), 0.5), "accurate base gives NaN"),
        (lambda: a_s.check_bases(net(), net(1, lambda: mlp((1, 16, 16), 5)), torch.rand(2, 1, 8, 8)), "robust base does not"),
        (lambda: adaptive(alpha_range=(0.9, 1.1)), "alpha_range"),
        (lambda: adaptive(alpha_range=(0.3, 0.9)), "below 1/2"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()


# --- the adaptive weight --------------------------------------------------------------------------------------------


def test_alpha_stays_in_its_range_whatever_comes():
    model = adaptive()
    for scale in (1.0, 1e3, 1e6):
        alpha = model.mix(scale * torch.randn(200, 1, 8, 8, generator=rng()))[2]
        assert alpha.min() >= 0.84 and alpha.max() <= 0.99
    adaptive(alpha_range=(0.3, 0.9), certify=False)


def test_gamma_follows_the_published_normalisation():
    model = adaptive()
    x = torch.rand(16, 1, 8, 8, generator=rng())
    both = [list(m.children()) for m in (model.accurate, model.robust)]
    g, h = (layers[:3] for layers in both)
    first = [nn.Sequential(*g)(x), nn.Sequential(*h)(x)]
    second = [nn.Sequential(*layers[3:6])(f) for layers, f in zip(both, first)]
    model.train()
    features = [(first[k], second[k]) for k in (0, 1)]
    raw = copy.deepcopy(model.mixing)(*features)
    cut = raw.clamp(raw.mean() - 0.6 * raw.std(), raw.mean() + 0.6 * raw.std())
    expected = 2.0 * (cut - cut.mean()) / (cut.var(unbiased=False) + 1e-5).sqrt() + 0.4
    gamma, alpha = model.mix(x)[1:]
    assert torch.allclose(gamma, expected[:, 0], atol=1e-4) and torch.allclose(alpha, gamma.sigmoid())
    model.eval()
    gamma, alpha = model.mix(x)[1:]
    assert torch.allclose(alpha, 0.84 + 0.15 * gamma.sigmoid())


def test_attack_goes_through_the_mixing_network():
    """Planted mistake: with the mixing network detached the gradient is another one."""
    model, x, y = adaptive(), torch.rand(4, 1, 8, 8, generator=rng()), torch.tensor([0, 1, 2, 3])

    def slope(detached):
        point = x.clone().requires_grad_(True)
        alpha = model.mix(point)[2]
        alpha = alpha.detach() if detached else alpha
        out = a_s.mix_log_probs(model.accurate(point), model.robust(point), alpha[:, None])
        return torch.autograd.grad(nn.functional.cross_entropy(out, y), point)[0]

    point = x.clone().requires_grad_(True)
    own = torch.autograd.grad(nn.functional.cross_entropy(model(point), y), point)[0]
    assert torch.allclose(own, slope(False), atol=1e-7) and not torch.allclose(own, slope(True), atol=1e-7)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attack_stays_in_each_examples_ball_and_hides(norm):
    model, x, y = adaptive(), torch.rand(12, 1, 8, 8, generator=rng()), torch.arange(12) % 5
    eps = torch.linspace(0.05, 0.3, 12) * (1 if norm == "linf" else 4)
    moved = a_s.attack_composite(model, x, y, eps=eps, norm=norm, steps=8, generator=rng(1))
    delta = (moved - x).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (size <= eps + 1e-6).all() and moved.min() >= 0 and moved.max() <= 1
    ce = [nn.functional.cross_entropy(model(p), y).item() for p in (x, moved)]
    assert ce[1] > ce[0]
    hidden = a_s.attack_composite(model, x, y, eps=eps, norm=norm, steps=8, gamma_weight=1.0, generator=rng(1))
    assert model.mix(hidden)[1].mean() < model.mix(moved)[1].mean()


def blobs(n=200, seed=0):
    g = rng(seed)
    y = torch.arange(n) % 4
    centres = torch.rand(4, 1, 8, 8, generator=rng(9))
    return (centres[y] + 0.1 * torch.randn(n, 1, 8, 8, generator=g)).clamp(0, 1), y


@pytest.fixture(scope="module")
def hardened():
    """A plain net and the treated one, on blobs that both learn."""
    task, training = small_task(), Training(epochs=30, lr=1e-2, batch_size=32)
    model = net(2, lambda: small_cnn((1, 8, 8), 4, widths=(8, 8, 8), linear=0)).train()
    return task, model, fit(model, task, training).model, fit(model, task, training, [quick()])


def test_training_moves_the_mixing_network_alone_and_separates(hardened):
    _, _, _, run = hardened
    x, y = blobs()
    mixing = seeded_build(lambda: a_s.MixingNetwork((8, 8), (8, 8), widths=(8,), blocks=1), rng(3))
    names = (("2", "5"), ("2", "5"))
    model = a_s.AdaptiveSmoothingClassifier(
        copy.deepcopy(run.model.accurate), copy.deepcopy(run.model.robust), mixing, feature_modules=names, momentum=0.1
    ).eval()
    bases = copy.deepcopy({k: v for k, v in model.state_dict().items() if k.startswith(("accurate", "robust"))})
    mixing = copy.deepcopy(model.mixing.state_dict())
    state = torch.get_rng_state()
    history = a_s.train_mixing_network(model, x, y, eps=0.15, epochs=8, lr=1e-2, steps=4, generator=rng(1))
    now = model.state_dict()
    assert all(torch.equal(now[k], v) for k, v in bases.items()) and torch.equal(state, torch.get_rng_state())
    assert all(p.requires_grad and p.grad is None for p in model.robust.parameters())
    assert any(not torch.equal(v, mixing[k]) for k, v in model.mixing.state_dict().items())
    assert not model.training and history[-1]["loss"] < history[0]["loss"]
    moved = a_s.attack_composite(model, x, y, eps=0.15, steps=4, generator=rng(2))
    assert model.mix(moved)[2].mean() > model.mix(x)[2].mean()


@pytest.mark.parametrize(
    "build", [lambda: mlp((1, 8, 8), 5, hidden=(16, 16)), lambda: small_resnet((1, 8, 8), 5, widths=(4, 8, 8))]
)
def test_any_two_networks_can_be_mixed(build):
    """An MLP or a residual net with a CNN: features of unlike shapes are brought together."""
    g, h, x = net(0, build), net(1), torch.rand(6, 1, 8, 8)
    names = layer_names(g, x)[:2]
    sizes = a_s.feature_sizes(g, names, x), a_s.feature_sizes(h, ("2", "5"), x)
    mixing = seeded_build(lambda: a_s.MixingNetwork(*sizes), rng())
    model = a_s.AdaptiveSmoothingClassifier(g, h, mixing, feature_modules=(names, ("2", "5"))).eval()
    assert model(x).shape == (6, 5) and torch.isfinite(model.train()(x)).all()


def test_trades_is_its_formula_at_radius_zero_and_grows_with_beta():
    model, (x, y) = net(0), blobs(40)
    clean = nn.functional.cross_entropy(model(x), y)
    options = {"eps": 0.1, "steps": 3, "generator": rng()}
    assert a_s.trades_loss(model, x, y, beta=0.0, **options).item() == pytest.approx(clean.item(), rel=1e-5)
    assert a_s.trades_loss(model, x, y, beta=6.0, **options) > clean


# --- the treatment --------------------------------------------------------------------------------------------------


def small_task():
    x, y = blobs(160, 1)
    train, valid, test = Split(x[:96], y[:96]), Split(x[96:112], y[96:112]), Split(x[112:], y[112:])
    return Task("blobs", train, valid, test, 4, seed=5)


def quick(**changes):
    return a_s.AdaptiveSmoothing(
        eps=0.15, robust_epochs=12, mixing_epochs=2, steps=3, attack_steps=3, lr=1e-2, **changes
    )


def test_treatment_returns_a_composite_that_is_harder_to_attack(hardened):
    task, model, plain, run = hardened
    assert isinstance(run.model, a_s.AdaptiveSmoothingClassifier)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), run.model.accurate.state_dict().values()))
    x, y = task.test.x, task.test.labels
    robust = [standard_suite(m, x, y, eps=0.15, steps=10, queries=50).robust_accuracy for m in (plain, run.model)]
    assert robust[1] > robust[0] + 0.1
    structure = json.loads(json.dumps(run.treatments[0].structure()))
    rebuilt = quick().rebuild(copy.deepcopy(model), structure)
    rebuilt.load_state_dict(run.model.state_dict())
    assert torch.equal(rebuilt.eval()(x), run.model(x))


def test_end_to_end_attack_beats_transfer_from_the_robust_base(hardened):
    """The cheap evaluation to refuse: points that fool h alone leave the mixture right more often."""
    task, _, _, run = hardened
    x, y = torch.cat([task.test.x, task.train.x]), torch.cat([task.test.labels, task.train.labels])
    model = run.model.fixed(0.55)
    options = {"eps": 0.25, "steps": 20, "early_stop": False, "loss": "margin"}
    right = [(margin(model(pgd(m, x, y, **options).x), y) < 0).double().mean().item() for m in (model.robust, model)]
    assert right[1] < right[0]


def test_treatment_refuses_what_it_cannot_use():
    task = small_task()
    with pytest.raises(Refused, match="hidden layers"):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), task, Training(epochs=1), [quick()])
    bad: list[Any] = [{"alpha_range": (0.4, 0.9)}, {"eps": 0.0}, {"norm": "l3"}, {"robust_epochs": 0}]
    for changes in bad:
        with pytest.raises(InvalidInput):
            a_s.AdaptiveSmoothing(**changes)


def test_the_trial_compares_at_equal_robust_accuracy():
    """Between trained nets the frontier is a line; beyond the most robust one its accuracy counts."""
    from surefoot.trials.adversarial.adaptive_smoothing import above_trades

    frontier = {"accurate": (0.0, 0.95), "trades": (0.3, 0.9), "robust": (0.4, 0.8)}
    for robust, accuracy, expected in ((0.3, 0.92, 0.02), (0.375, 0.825, 0.0), (0.15, 0.9, -0.025), (0.5, 0.8, 0.0)):
        arms = {name: {"robust": r, "accuracy": a} for name, (r, a) in frontier.items()}
        arms["adaptive"] = {"robust": robust, "accuracy": accuracy}
        assert above_trades(arms) == pytest.approx(expected, abs=1e-12)
