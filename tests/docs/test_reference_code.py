"""The numbers of the page "What the reference code gets wrong": each is computed both ways here, and `says` finds it in the page."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from scipy.stats.mstats import mquantiles
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.adversarial import adaptive_smoothing as mixing
from surefoot.adversarial.adv_unlearn import AdvUnlearner
from surefoot.adversarial.adv_unlearn.prompts import prompt_length, spliced
from surefoot.adversarial.crossmax import MultiResolutionInput
from surefoot.certified import crmt, fast_ibp, nap
from surefoot.certified import robust_conformal as rc
from surefoot.certified.ibp_tightness import TightnessReport, propagation_tightness
from surefoot.certified.prototype_rbf import CBCHead
from surefoot.certified.zo_smoothing import zo_gradient, zo_queries
from surefoot.core.statistics import wilson_interval
from surefoot.core.task import Split, Task
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput
from surefoot.models import seeded_build, small_cnn
from surefoot.nn.attacks import decide
from surefoot.nn.attacks.apgd import RAISED, checkpoints
from surefoot.nn.bounds import Program, interval_margins, propagate, region_around, verified
from surefoot.nn.conformal import conformal_index, conformal_quantile
from surefoot.nn.masks import checkerboard_split
from surefoot.nn.smoothing import lower_confidence_bound

ROOT = Path(__file__).parents[2]
PAGE = " ".join((ROOT / "docs" / "guides" / "reference_code.md").read_text().split())
F64 = torch.float64


def says(*words: str) -> None:
    for part in words:
        assert part in PAGE, f"the page does not say {part!r}"


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=F64)


def binomial(n: int, p: float, trials: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).binomial(n, p, trials))


def linear(*weights: Tensor, relu: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.zero_()
        layers += [layer, nn.ReLU()] if relu else [layer]
    return nn.Sequential(*(layers[:-1] if relu else layers))


def test_every_test_that_the_page_names_exists():
    names = set(re.findall(r"`(test_\w+)`", PAGE))
    here = {name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}  # fmt: skip
    assert len(names) > 30
    assert names <= here
    for path in re.findall(r"`(tests/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path


# --- several repositories -------------------------------------------------------------------------------------------


def test_the_best_of_equal_epochs_on_the_test_set():
    """78 epochs of one true error; a fifth of 10,000 images changes sides by chance at each: the lowest error read off is optimistic."""
    wrong = binomial(2000, 0.5, 400 * 78).view(400, 78) / 10_000
    optimism = 100 * (wrong.mean(1) - wrong.amin(1)).mean().item()
    assert optimism == pytest.approx(0.54, abs=0.01)
    says("0.54 points")


# --- fast_ibp ---------------------------------------------------------------------------------------------------------


def test_a_net_that_says_nothing_has_no_verified_error_where_ties_count():
    net: Any = linear(normal(4, 3), torch.zeros(3, 4, dtype=F64), relu=True).eval()
    x, y = torch.rand(60, 3, generator=rng(), dtype=F64), torch.arange(60) % 3
    margins = interval_margins(propagate(Program(net), region_around(x, 0.1).box), y)
    assert (margins < 0).any(1).sum() == 0  # "an error needs a negative margin": 0 % verified error
    assert not verified(net, x, y, 0.1, method="ibp").any()  # strictly positive margins or nothing: 100 %
    says("0 % where ours says 100 %")


class Scaled(nn.Module):
    """Normalisation by .2, an identity layer, ReLU."""

    def __init__(self):
        super().__init__()
        self.same, self.out = nn.Linear(6, 6), nn.Linear(6, 2)
        with torch.no_grad():
            self.same.weight.copy_(torch.eye(6))
            self.same.bias.zero_()

    def forward(self, x):
        return self.out(torch.relu(self.same((x - 0.5) / 0.2)))


def test_the_input_radius_of_the_tightness_term_is_in_raw_pixels():
    walked = propagate(Program(Scaled().eval()), region_around(torch.full((2, 6), 0.5), 0.1).box)
    normalised = walked.input.radius.mean() / 0.2
    theirs = [F.relu(0.5 - normalised / box.radius.mean()).item() / 0.5 for _, box in walked.rectifiers]
    assert fast_ibp.tightness_loss(walked).item() == pytest.approx(0.6, abs=1e-5)
    assert theirs == pytest.approx([0], abs=1e-5)
    says("0.6 where theirs is 0")


def test_a_layer_without_active_neurons_pays_a_constant():
    lower, upper = torch.tensor([[-0.5, -0.2]]), torch.tensor([[-0.3, -0.1]])
    centre, tol = (lower + upper) / 2, 0.5
    on, off = lower > 0, upper < 0
    spread = (centre - centre.mean()) ** 2
    ratios = (centre * on).mean() / -(centre * off).mean(), (spread * on).sum() / (spread * off).sum()
    theirs = sum(F.relu(tol - torch.minimum(r, 1 / r.clamp(min=1e-12))) / tol for r in ratios)
    assert float(theirs) == 2.0
    ours = [valid for _, valid in fast_ibp._balance_ratios(lower, upper)]
    assert not any(bool(valid) for valid in ours)  # passed over
    says("2/m")


# --- ibp_tightness ----------------------------------------------------------------------------------------------------


def floored(report: TightnessReport) -> float:
    """Both radii raised to 1e-8 in float32 before they are divided, and every row counted."""
    optimal, layerwise = (r.float().clamp(min=1e-8) for r in (report.optimal_radius, report.ibp_radius))
    return (optimal / layerwise).mean().item()


def test_a_floor_under_both_radii_makes_dead_rows_tight():
    half_dead = linear(normal(4, 3), torch.tensor([[1.0, 2.0, -1.0, 0.5], [0.0] * 4]))
    report = propagation_tightness(half_dead, torch.zeros(1, 3, dtype=F64), eps=0.1, data_range=None)
    assert report.mean == pytest.approx(0.777, abs=1e-3) and floored(report) == pytest.approx(0.888, abs=1e-3)
    deep = linear(*(1e-4 * normal(8, 8, seed=s) for s in range(12)))
    report = propagation_tightness(deep, torch.zeros(1, 8, dtype=F64), eps=0.1, data_range=None)
    assert report.mean == pytest.approx(7.5e-5, rel=0.01) and floored(report) == 1.0
    says("0.888 instead of 0.777", "1 instead of 0.000075")


def test_a_box_of_no_size_gives_the_tightness_term_no_gradient():
    net = seeded_build(lambda: small_cnn((1, 8, 8), 10), rng())
    x = digits(0).train.x[:32]

    def term(eps: float) -> tuple[float, float]:
        net.zero_grad()
        value = fast_ibp.tightness_loss(propagate(Program(net), region_around(x, eps).box, clean=x))
        value.backward()
        return value.item(), max(p.grad.abs().max().item() for p in net.parameters() if p.grad is not None)

    assert term(0.0) == (1.0, 0.0)
    value, gradient = term(fast_ibp.NATURAL_EPS)
    assert 0.85 < value < 0.97 and gradient > 1e-3
    steps = 20 * 235  # 20 epochs of MNIST, up to a radius of .2
    assert sum(fast_ibp.smoothed_eps(t, steps, 0.2) < 1e-6 for t in range(steps)) == 106
    says("106 of 4,700 steps")


# --- robust_conformal -------------------------------------------------------------------------------------------------


def test_the_interpolated_quantile_at_the_adjusted_level():
    """Level (1 - a)(1 + 1/n) between order statistics: a little more on smooth scores, no promise on uneven ones."""
    alpha, trials = 0.1, 5000
    drawn = np.random.default_rng(0)
    scores = drawn.random((trials, 100))
    theirs = mquantiles(scores, prob=0.9 * 1.01, axis=1)[:, 0].mean()  # of uniform scores, the value is the coverage
    ours = conformal_quantile(torch.from_numpy(scores), alpha).mean().item()
    error = 4 * 0.03 / math.sqrt(trials)
    assert theirs == pytest.approx(0.9058, abs=error) and ours == pytest.approx(91 / 101, abs=error)
    u = drawn.random((trials, 17)).clip(0.05)
    uneven = -(u**-200.0)  # increasing in u: P[new score <= q] = (-q)^(-1/200)
    covered = (-mquantiles(uneven, prob=0.9 * 18 / 17, axis=1)[:, 0]) ** (-1 / 200)
    assert conformal_index(17, alpha) / 18 == pytest.approx(0.944, abs=1e-3)
    assert covered.mean() == pytest.approx(0.896, abs=0.002)  # and the promise was .9
    says("0.906 against 0.901 at n = 100", "0.896 against 0.944 at n = 17")


def test_numpys_default_quantile_falls_short():
    scores = np.random.default_rng(0).random((20_000, 19))
    covered = np.quantile(scores, 0.9, axis=1).mean()
    assert covered == pytest.approx(0.86, abs=0.003)
    assert conformal_quantile(torch.from_numpy(scores), 0.1).mean().item() == pytest.approx(0.9, abs=0.003)
    says("0.86 instead of 0.90 at n = 19")


def test_a_bare_ceil_asks_for_one_rank_more():
    pairs = [(n, t) for n in range(1, 2000) for t in range(1, 10)]
    off = [(n, t) for n, t in pairs if math.ceil((n + 1) * (1 - t / 10)) != conformal_index(n, t / 10)]
    assert len(off) == 200 and off[0] == (9, 7) and {t for _, t in off} == {7}
    assert math.ceil(10 * (1 - 0.7)) == 4 and conformal_index(9, 0.7) == 3
    says("the 4th of 9 scores instead of the 3rd")


def test_one_number_a_label_makes_no_other_sets():
    """The label of rank r has its score between the sums of the first r - 1 and r probabilities, whichever number it drew."""
    probs = normal(20_000, 6).softmax(1).sort(1, descending=True).values
    above = probs.cumsum(1) - probs
    per_label = above + torch.rand(probs.shape, generator=rng(1), dtype=F64) * probs
    per_example = rc.aps_score(probs, torch.rand(len(probs), generator=rng(2), dtype=F64))
    assert (per_label.diff(dim=1) >= 0).all() and (per_example.diff(dim=1) >= -1e-12).all()
    a, b = ((s <= 0.9).sum(1).double() for s in (per_label, per_example))
    assert abs((a - b).mean().item()) < 4 * (a - b).std().item() / math.sqrt(len(a))
    certain = (above + probs <= 0.9) | (above > 0.9)  # only the label that holds the threshold is left to chance
    assert ((per_label <= 0.9) == (per_example <= 0.9))[certain].all()


# --- rrcm -------------------------------------------------------------------------------------------------------------


def test_the_first_five_hundred_of_a_sorted_folder_are_ten_classes():
    labels = torch.arange(1000).repeat_interleave(50)
    assert len(labels[:500].unique()) == 10 and len(labels[::100].unique()) == 500
    split = Split(torch.zeros(50_000, 1), labels)
    task = Task("sorted", split, split, split, 1000, modality="vector")
    drawn = len(task.sample("certify", 500).labels.unique())
    assert 370 < drawn < 420  # 1000 (1 - .999^500) = 394
    says("10 classes of 1,000", "about 394")


# --- zo_smoothing -----------------------------------------------------------------------------------------------------


def test_averaging_over_coordinates_divides_the_gradient_and_multiplies_the_decay():
    q = 192
    a = normal(q, q)
    a, z = a @ a.T / q, normal(2, q, seed=3)
    exact = zo_gradient(lambda p, _: (p @ a * p).sum(1) / 2, z, mu=1e-2).gradient
    assert torch.allclose(exact, z @ a, atol=1e-8)
    averaged = exact / q  # one coordinate of each probe's vector is not zero, and the mean is over q probes
    assert (exact.norm() / averaged.norm()).item() == pytest.approx(192)

    def adam(scale: float, decay: float) -> Tensor:
        w = torch.ones(5, dtype=F64, requires_grad=True)
        optimizer = torch.optim.Adam([w], 1e-2, weight_decay=decay, eps=0)
        for g in 0.01 * normal(30, 5, seed=5) + 0.05:
            w.grad = scale * g
            optimizer.step()
        return w.detach()

    assert torch.allclose(adam(1 / q, 1e-4), adam(1, 0.0192), atol=1e-12)
    assert not torch.allclose(adam(1 / q, 1e-4), adam(1, 1e-4), atol=1e-4)
    says("1/192", "0.0192 instead of 0.0001")


def test_queries_a_step():
    q = 192
    assert zo_queries(1, q) == 384 and zo_queries(1, q, "rge", q) == 193
    theirs = 2 * q + 3, q + 3  # the label twice, the loss for the log once
    assert theirs == (387, 195)
    says("387 against 384", "195 against 193", "384 and not 193")


# --- nap --------------------------------------------------------------------------------------------------------------


def test_empty_regions_would_count_as_proofs():
    net: Any = linear(normal(4, 2, seed=1), normal(2, 4, seed=3), relu=True)
    with torch.no_grad():
        net[0].bias.copy_(0.3 * normal(4, seed=2))
        net[2].bias.copy_(0.1 * normal(2, seed=4))
    domain = torch.zeros(1, 2, dtype=F64), torch.ones(1, 2, dtype=F64)
    count = {"verified": 0, "falsified": 0, "empty_region": 0, "unknown": 0}
    for phases in itertools.product((-1, 0, 1), repeat=4):
        pattern = nap.ActivationPattern.from_phases({"_1": torch.tensor(phases, dtype=torch.int8)})
        count[nap.verify_nap(net, pattern, 0, domain=domain).status] += 1
    assert count == {"verified": 8, "falsified": 24, "empty_region": 49, "unknown": 0}
    says("49 of 81", "57 proofs, 8 of them real")


def test_a_tie_on_the_edge_of_the_pattern_is_no_counterexample():
    net: Any = linear(torch.eye(2, dtype=F64), torch.tensor([[1.0, 0.0], [0.0, 0.0]]), relu=True)
    with torch.no_grad():
        net[0].bias.copy_(torch.tensor([-0.5, 0.0]))
    x = torch.tensor([[0.9, 0.5], [0.7, 0.2]], dtype=F64)
    pattern = nap.mine_naps(net, x, torch.zeros(2, dtype=torch.int64), delta=1.0, classes=[0])[0]
    edge = torch.tensor(
        [[0.5, 0.5]], dtype=F64
    )  # z = 0 at a neuron that must be active, and there alone both logits are equal
    values = nap.neuron_values(net, edge)[1]
    assert (values["_1"][:, pattern.active["_1"]] >= -1e-6).all() and net(edge)[0, 1] >= net(edge)[0, 0] - 1e-6
    assert not pattern.follows(values).any()
    assert nap.verify_nap(net, pattern, 0, witness=x).status == "unknown"
    says("“unknown” instead of a counterexample")


# --- prototype_rbf ----------------------------------------------------------------------------------------------------


def test_clamped_detections_jump():
    head = CBCHead(2, 2).double().eval()
    with torch.no_grad():
        head.reasoning.logits.zero_()
        head.reasoning.logits[1, 0, 0] = 60  # class 0: "component 0 is absent"
    d = torch.tensor([[0.1, 0.9], [0.0999999, 0.9000001]], dtype=F64)
    plain, clamped = head.reasoning(d)[:, 0], head.reasoning(d.where(d >= 0.1, 0.0))[:, 0]
    assert abs(plain[1] - plain[0]).item() < 1e-6
    assert (clamped[1] - clamped[0]).item() == pytest.approx(0.1, abs=1e-6)
    says("from 0.9 to 1.0")


# --- crmt -------------------------------------------------------------------------------------------------------------


def worked() -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    z = [torch.tensor([[2.0, 0.5]]), torch.tensor([[1.0, 0.2]])]
    return z, torch.full((2, 2), 0.1), torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([0]), torch.tensor([1])


def test_gradients_that_are_never_cleared_are_sums_over_classes():
    """The loop of the published pass on linear logits x, x, -2x of the first input and 3y of the second."""
    x, y = torch.ones(1, 1, requires_grad=True), torch.ones(1, 1, requires_grad=True)
    out = torch.cat([x, x, -2 * x], 1) + 3 * y
    first, second = [], []
    for k in range(3):
        out[:, k].sum().backward(retain_graph=True)
        for data, found in ((x, first), (y, second)):
            assert data.grad is not None and y.grad is not None
            kept = data.grad.clone()
            y.grad.zero_()
            found.append(kept.abs().item())
    assert first == [1, 2, 0] and second == [0, 0, 0]
    says("1, 2, 0 where 1, 1, 2 is true")


def test_weights_that_enter_twice_multiply_the_radius():
    z, a, constants, y, rival = worked()
    once = crmt.published_radius(z, a, torch.zeros(2), constants, y, rival).item()
    twice = crmt.published_radius(z, a, torch.zeros(2), a * constants, y, rival).item()
    assert once == pytest.approx(0.514, abs=1e-3) and twice == pytest.approx(5.14, abs=1e-2)
    with pytest.raises(InvalidInput, match="positive"):  # the zero constants of the other modality
        crmt.published_radius(z, a, torch.zeros(2), constants * torch.tensor([[1.0], [0.0]]), y, rival)
    says("5.14 instead of 0.514")


def test_centred_unit_rows_are_not_orthogonal():
    rows = torch.tensor([[1.0, -1.0, 0.0, 0.0], [-1.0, 1.0, 0.0, 0.0]])
    theirs = F.normalize(rows - rows.mean(1, keepdim=True), dim=1)
    assert (theirs @ theirs.T)[0, 1].item() == pytest.approx(-1)
    assert (theirs[0] - theirs[1]).norm().item() == pytest.approx(2)
    assert math.hypot(1, 1) == pytest.approx(1.414, abs=1e-3)
    wide = normal(31, 512, seed=1)
    wide = F.normalize(wide - wide.mean(1, keepdim=True), dim=1)
    assert (wide @ wide.T - torch.eye(31)).abs().max().item() == pytest.approx(0.16, abs=0.005)
    says("cosines up to 0.16", "2 where it is taken for 1.414")


def test_logits_subtracted_from_exponentials_stop_the_margin():
    z, y = torch.tensor([[8.0, 0.0, 0.0]], dtype=F64), torch.tensor([0])
    ours = crmt.mixed_margin_term([z], y, y, 0.5).item()
    theirs = math.log((math.exp(8) + 2 - 8) * math.exp(-8))
    assert ours == pytest.approx(-7.29, abs=0.01) and theirs == pytest.approx(-0.002, abs=2e-4)
    says("−0.002 instead of −7.29")


def test_running_statistics_of_the_second_step():
    norm_layer = nn.BatchNorm1d(1).train()
    assert norm_layer.running_mean is not None
    for _ in range(44):
        norm_layer(torch.tensor([[0.0], [2.0]]))
    assert norm_layer.running_mean.item() == pytest.approx(0.99, abs=1e-3)  # of the batch mean 1
    says("after 44 batches 99 %")


# --- dual_smoothing ---------------------------------------------------------------------------------------------------


def test_counts_multiplied_to_a_hundred_thousand_lose_the_level():
    hits, p, alpha = binomial(1000, 0.9, 20_000), 0.9, 0.001
    honest = (lower_confidence_bound(hits, 1000, alpha) > p).double().mean().item()
    multiplied = (lower_confidence_bound(100 * hits, 100_000, alpha) > p).double().mean().item()
    assert honest <= alpha + 3 * math.sqrt(alpha / 20_000)
    assert multiplied == pytest.approx(0.40, abs=0.015)
    caps = [norm.ppf(lower_confidence_bound(torch.tensor([n]), n, alpha).item()) for n in (1000, 100_000)]
    assert caps == pytest.approx([2.46, 3.81], abs=0.005)
    says("40 % of the bounds", "3.81σ instead of 2.46σ")


def test_two_bounds_at_the_full_level():
    hits, p = torch.stack([binomial(1000, q, 20_000, seed) for seed, q in enumerate((0.8, 0.7))], 1), torch.tensor([0.8, 0.7], dtype=F64)  # fmt: skip
    joint = [(lower_confidence_bound(hits, 1000, level) > p).any(1).double().mean().item() for level in (0.05, 0.025)]
    assert joint == pytest.approx([0.09, 0.05], abs=0.006)
    says("9 % instead of 5 %")


def test_a_fill_that_lands_on_the_kept_pixels():
    left, _ = checkerboard_split((1, 4, 4))
    kept = torch.rand(1, 1, 4, 4, generator=rng()) * left
    pooled = F.interpolate(F.max_pool2d(kept, 2), scale_factor=2, mode="nearest")
    theirs = kept + pooled * left
    assert (theirs * ~left).abs().max() == 0  # the dropped pixels stay empty
    assert theirs.max() == pytest.approx(2 * kept.max().item())
    says("up to twice their value")


# --- adaptive_smoothing -----------------------------------------------------------------------------------------------


def test_frequencies_in_place_of_confidence_bounds():
    n, p, alpha = 10_000, 0.9, 0.76
    hits = binomial(n, p, 20_000, 2)

    def radius(top: Tensor) -> Tensor:
        return mixing.mixed_radius(top, 1 - top, alpha, sigma=1.0, method="rs")

    true = radius(torch.tensor(p, dtype=F64))
    assert (radius(hits / n) > true).double().mean().item() == pytest.approx(0.50, abs=0.012)
    assert (radius(lower_confidence_bound(hits, n, 0.001)) > true).double().mean().item() <= 0.001 + 3 * math.sqrt(0.001 / 20_000)  # fmt: skip
    one, bound = torch.ones(1, dtype=F64), lower_confidence_bound(torch.tensor([n]), n, 0.001)
    assert mixing.mixed_radius(one, 1 - one, 1.0, sigma=1.0, method="rs").isinf().all()
    assert mixing.mixed_radius(bound, 1 - bound, 1.0, sigma=1.0, method="rs").item() == pytest.approx(3.20, abs=0.005)
    says("in 50 % of the draws", "3.20σ instead of infinity")


def test_the_log_of_a_sum_underflows():
    g = torch.tensor([[0.0, -120.0, -120.0]], requires_grad=True)
    naive = (0.2 * g.softmax(1) + 0.8 * g.softmax(1)).log()
    assert naive.tolist()[0][1] == -math.inf
    naive[0, 1].backward()
    assert g.grad is not None and not torch.isfinite(g.grad).all()
    ours = mixing.mix_log_probs(g.detach(), g.detach(), 0.8)
    assert ours[0, 1].item() == pytest.approx(-120)
    says("−∞ and a gradient of NaN", "−120")


# --- crossmax and the attack suites -----------------------------------------------------------------------------------


def test_contrast_of_the_notebook():
    def mean(compat: bool) -> float:
        made = MultiResolutionInput((8,), compat=compat, jitter=0, down_noise=0, up_noise=0, grey=(0.5, 1.0), generator=rng())  # fmt: skip
        x = (
            torch.linspace(0.45, 0.55, 64).view(1, 1, 8, 8).repeat(4000, 1, 1, 1)
        )  # grey already: the grey mix does nothing
        return (made(x).flatten(1).std(1) / x.flatten(1).std(1)).mean().item()

    assert mean(True) == pytest.approx(0.75, abs=0.01)
    assert mean(False) == pytest.approx(1.1, abs=0.015)
    says("0.75 instead of 1.1")


def test_thirty_two_images():
    low, high = wilson_interval(23, 32)
    assert (low, high) == pytest.approx((0.546, 0.844), abs=1e-3)
    says("0.55 to 0.84")


class Coin(nn.Module):
    """Right on the clean image, a coin on any other; K = 2, labels 0."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.source = generator

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.rand(len(x), generator=self.source) < 0.5
        wrong = ((x.flatten(1).amax(1) > 0) & heads).long()
        return F.one_hot(wrong, 2).double()


def test_one_draw_decides_and_another_reports():
    """Two attacks in turn, a point is given up after one wrong draw; then accuracy of one more draw, the rest at its clean image."""
    n = 20_000
    clean, moved, model = torch.zeros(n, 1), torch.ones(n, 1), Coin(rng())
    robust, kept = torch.ones(n, dtype=torch.bool), clean.clone()
    for _ in ("apgd-ce", "apgd-dlr"):
        broken = robust & (model(moved).argmax(1) == 1)
        robust &= ~broken
        kept[broken] = moved[broken]
    reported = (model(kept).argmax(1) == 0).double().mean().item()
    assert robust.double().mean().item() == pytest.approx(0.25, abs=0.012)
    assert reported == pytest.approx(0.625, abs=0.012)
    answers, votes = decide(model, moved[:4000], draws=11, generator=rng(1))
    assert votes.eq(0).double().mean().item() == pytest.approx(0.5, abs=0.01)
    assert answers.eq(0).double().mean().item() == pytest.approx(0.5, abs=0.03)
    says("0.25 in AutoAttack's log, 0.625 in that of `benchmark`, 0.5 in truth")


def truncated(steps: int) -> list[int]:
    """Intervals of int(.22 N), each int(.03 N) shorter, at least int(.06 N)."""
    length, least, less = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    at, found = 0, []
    while at + length <= steps:
        at += length
        found.append(at)
        length = max(length - less, least)
    return found


def test_checkpoints_of_truncated_intervals():
    assert truncated(100) == checkpoints(100)
    assert truncated(50) == [11, 21, 30, 38, 45] and len(checkpoints(50)) == 8
    assert len(truncated(20)) == 14 and len(checkpoints(20)) == 8
    says("5 instead of 8 at 50 steps and 14 instead of 8 at 20")


def test_the_first_interval_is_compared_with_a_zero():
    losses = np.zeros(100)
    losses[:22] = np.linspace(-0.9, -0.1, 22)  # DLR while the point holds: negative, and every step raises it

    def rises(values: np.ndarray) -> int:
        return sum(values[21 - c] > values[21 - c - 1] for c in range(22))

    assert rises(losses) == 21
    losses[:22] = np.linspace(2.0, 1.0, 22)  # cross-entropy that falls from the first step on
    assert rises(losses) == 1
    assert RAISED * 16 == 12  # “fewer than 75 %” leaves such a run alone, “at most” halves its step
    says("21 of 22", "12 of 16")


# --- adv_unlearn ------------------------------------------------------------------------------------------------------


def test_gradients_that_add_up_overshoot():
    def loss_left(clear: bool) -> float:
        v = torch.tensor([0.01], dtype=F64, requires_grad=True)  # the best row is at 0
        optimizer = torch.optim.Adam([v], 1e-3)
        for _ in range(30):
            if clear:
                optimizer.zero_grad()
            v.square().sum().backward()
            optimizer.step()
        return (v.item() / 0.01) ** 2

    assert loss_left(True) == pytest.approx(0.001, abs=5e-4)
    assert loss_left(False) == pytest.approx(1.24, abs=0.02)
    says("124 % of the start's loss", "0.1 %")


def test_words_are_not_tokens():
    """One word of two tokens and one adversarial row: counted in words, the second token falls out."""
    ids = torch.tensor([0, 7, 8, 1, 1, 1])  # start, the word's tokens, end, padding
    words, k = 1, 1
    start, prompt, _, tail = ids[None].split([1, words, k, len(ids) - 1 - words - k], 1)
    theirs = torch.cat([start, torch.tensor([[9]]), prompt, tail], 1)[0]
    assert theirs.tolist() == [0, 9, 7, 1, 1, 1]
    assert spliced(ids, torch.tensor([9]), prompt_length(ids, 1)).tolist() == [0, 9, 7, 8, 1, 1]
    says("1 of 2 tokens")


def test_a_learning_rate_is_no_integer():
    with pytest.raises(ValueError, match="invalid literal"):
        int("2e-5")
    assert AdvUnlearner(lr=2e-5).lr == 2e-5
