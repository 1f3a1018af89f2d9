"""Multi-modal robustness: heads, the margin term, Lipschitz constants, certified radii under attack, both training steps, the plugs."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import pytest
import torch
from torch import nn

from surefoot.certified import crmt
from surefoot.certified.crmt import CRMT, ConcatFusion, CRMTLoss, MultiModalClassifier, OrthogonalFusion
from surefoot.certified.crmt.model import orthonormal_rows, unit_rows
from surefoot.certified.crmt.robustness import Held
from surefoot.contracts import check_instrument, check_treatment
from surefoot.core.subject import Subject
from surefoot.core.task import Training
from surefoot.errors import InvalidInput, Refused
from surefoot.models import Normalized, mlp, seeded_build
from surefoot.training.loop import accuracy, fit

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def random_model(seed: int, *, orthogonal: Literal["full", "row"] = "full", classes: int = 4) -> MultiModalClassifier:
    """Two small encoders of ReLU layers and an orthogonal head with integration weights of both signs."""

    def build() -> MultiModalClassifier:
        encoders = [nn.Sequential(nn.Linear(n, 8), nn.ReLU(), nn.Linear(8, 6)) for n in (5, 3)]
        return MultiModalClassifier(encoders, OrthogonalFusion([6, 6], classes, orthogonal=orthogonal, generator=generator(seed)), [[5], [3]])  # fmt: skip

    model = seeded_build(build, generator(seed)).double().eval()
    fusion = model.fusion
    assert isinstance(fusion, OrthogonalFusion)
    fusion.a.data = normal(2, classes, seed=seed + 1) * 0.5 + 1.0
    fusion.bias.data = 0.2 * normal(classes, seed=seed + 2)
    return model


# --------------------------------------------------------------------------------------------------- how inputs travel


def test_pack_and_unpack_are_inverse():
    a, b = normal(4, 2, 3), normal(4, 5)
    x = crmt.pack([a, b])
    assert x.shape == (4, 11)
    for got, expected in zip(crmt.unpack(x, ((2, 3), (5,))), (a, b), strict=True):
        assert torch.equal(got, expected)
    with pytest.raises(InvalidInput, match="packed as"):
        crmt.unpack(x[:, 1:], ((2, 3), (5,)))


class Mine(nn.Module):
    """A person's own model of two inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 10), nn.Linear(40, 10)

    def forward(self, image, signal):
        return self.a(image.flatten(1)) + self.b(signal)


def test_a_persons_own_model_is_a_two_branch():
    own = crmt.Packed(Mine(), [[1, 8, 8], [40]])
    assert isinstance(own, crmt.TwoBranch)
    image, signal = torch.rand(3, 1, 8, 8), torch.rand(3, 40)
    assert torch.equal(own(crmt.pack([image, signal])), own.model(image, signal))
    assert crmt.shapes_of(nn.Sequential(own), (104,)) == ((1, 8, 8), (40,))
    with pytest.raises(Refused, match="one input"):
        crmt.shapes_of(mlp((104,), 10), (104,))
    with pytest.raises(Refused, match="add up"):
        crmt.shapes_of(own, (103,))


# --------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rows_are_orthonormal_and_gradients_finite(dtype):
    raw = normal(5, 9).to(dtype).requires_grad_()
    rows = orthonormal_rows(raw)
    assert torch.allclose(rows @ rows.T, torch.eye(5, dtype=dtype), atol=1e-5)
    square = orthonormal_rows(normal(5, 5).to(dtype))
    assert torch.allclose(square @ square.T, torch.eye(5, dtype=dtype), atol=1e-5)
    (rows * normal(5, 9, seed=1).to(dtype)).sum().backward()
    assert raw.grad is not None and torch.isfinite(raw.grad).all()
    already = torch.eye(4, 7, dtype=dtype, requires_grad=True)  # all eigenvalues of the Gram matrix equal
    orthonormal_rows(already).square().sum().backward()
    assert already.grad is not None and torch.isfinite(already.grad).all()


def test_the_polar_derivative_is_that_of_finite_differences():
    assert torch.autograd.gradcheck(orthonormal_rows, normal(3, 5, seed=4).requires_grad_(), atol=1e-6)
    near = torch.eye(3, 5, dtype=F64) + 1e-9 * normal(3, 5)
    assert torch.autograd.gradcheck(orthonormal_rows, near.requires_grad_(), atol=1e-5)


def test_what_the_two_modes_are_invariant_to():
    raw, positive = normal(4, 7), torch.tensor([0.3, 1.0, 2.0, 7.0], dtype=F64)
    assert torch.allclose(unit_rows(positive[:, None] * raw), unit_rows(raw))
    assert not torch.allclose(orthonormal_rows(positive[:, None] * raw), orthonormal_rows(raw), atol=1e-2)
    order = torch.tensor([2, 0, 3, 1])  # no class comes first, which Gram-Schmidt would make a difference
    assert torch.allclose(orthonormal_rows(raw[order]), orthonormal_rows(raw)[order])
    rows = unit_rows(raw)
    assert torch.allclose(rows.norm(dim=1), torch.ones(4, dtype=F64))
    assert (rows @ rows.T - torch.eye(4, dtype=F64)).abs().max() > 0.1  # the published "orthogonal" rows are not


def test_the_head_is_the_sum_it_says():
    model: Any = random_model(0)
    x = normal(6, 8)
    uni, logits = model.both(x)
    expected = sum(model.fusion.a[m] * uni[m] for m in range(2)) + model.fusion.bias
    assert torch.allclose(logits, expected)
    concat = ConcatFusion([6, 6], 4).double()
    features = model.features(x)
    uni, logits = concat(features)
    assert torch.allclose(logits, concat.linear(torch.cat(features, 1)))
    assert torch.allclose(uni[0] + uni[1] + concat.bias, logits)


# --------------------------------------------------------------------------------------------------- the margin term


def test_margin_term_of_uniform_logits():
    for m, k in ((1, 3), (2, 2), (2, 10)):
        value = crmt.margin_term([torch.zeros(1, k, dtype=F64)] * m, torch.tensor([0])).item()
        assert value == pytest.approx(math.log(m * (k - 1) + 1e-5), abs=1e-12)
    assert crmt.margin_term([torch.zeros(1, 2)] * 2, torch.tensor([1])).item() == pytest.approx(0.693152, abs=1e-5)


def test_margin_term_is_the_plain_formula_and_does_not_overflow():
    z, y = [3 * normal(20, 5, seed=s) for s in (1, 2)], torch.arange(20) % 5
    plain = torch.stack([(one - one.gather(1, y[:, None])).exp().sum(1) - 1 for one in z]).sum(0)
    assert torch.allclose(crmt.margin_term(z, y), (plain + 1e-5).log(), atol=1e-9)
    huge = [torch.tensor([[900.0, 0.0]]), torch.tensor([[0.0, 900.0]])]
    assert crmt.margin_term(huge, torch.tensor([0])).item() == pytest.approx(900.0)
    assert math.isfinite(crmt.margin_term(huge, torch.tensor([1])).item())


def test_the_gradient_goes_to_the_weaker_modality():
    z = [torch.tensor([[4.0, 0.0]], requires_grad=True), torch.tensor([[0.5, 0.0]], requires_grad=True)]
    crmt.margin_term(z, torch.tensor([0])).sum().backward()
    strong, weak = (part.grad for part in z)
    assert strong is not None and weak is not None and weak.abs().sum() > 10 * strong.abs().sum()


def test_mixed_margin_leaves_out_exponentials():
    z, y, other = [normal(8, 5, seed=s) for s in (1, 2)], torch.arange(8) % 5, torch.arange(8) % 3
    share, total = 0.3, torch.zeros(8, dtype=F64)
    published = torch.zeros(8, dtype=F64)
    for one in z:
        own, partner = one.gather(1, y[:, None])[:, 0], one.gather(1, other[:, None])[:, 0]
        different = (y != other).double()
        scale = (-(share * own + (1 - share) * partner)).exp()
        total += (one.exp().sum(1) - own.exp() - partner.exp() * different) * scale
        published += (one.exp().sum(1) - own - partner * different) * scale
    got = crmt.mixed_margin_term(z, y, other, share)
    assert torch.allclose(got, (total + 1e-5).log())
    assert (got - published.log()).abs().max() > 0.1  # logits subtracted from exponentials: another number
    assert torch.allclose(crmt.mixed_margin_term(z, y, y, share), crmt.margin_term(z, y))


def test_loss_is_cross_entropy_plus_rho_margins():
    z, y = [normal(8, 5, seed=s) for s in (1, 2)], torch.arange(8) % 5
    h = z[0] + z[1]
    expected = nn.functional.cross_entropy(h, y) + 2.0 * crmt.margin_term(z, y).mean()
    assert torch.allclose(CRMTLoss()(z, h, y), expected)


# --------------------------------------------------------------------------------------------------- radii


def test_worked_example():
    """numerator 2.0, denominator 2.8284, rho .70711."""
    z = [torch.tensor([[2.0, 0.5]]), torch.tensor([[1.0, 0.2]])]
    a = torch.tensor([[1.0, 1.0], [0.5, 0.5]])
    constants = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    rho = crmt.published_radius(z, a, torch.tensor([0.1, 0.0]), constants, torch.tensor([0]), torch.tensor([1]))
    assert rho.item() == pytest.approx(0.70711, abs=1e-5)
    negative = crmt.published_radius(z, -a, torch.tensor([0.1, 0.0]), constants, torch.tensor([1]), torch.tensor([0]))
    assert negative.item() == pytest.approx(1.8 / math.sqrt(8), rel=1e-6)  # |a| in the denominator: it keeps its sign
    both = crmt.published_radius(z, 3 * a, torch.tensor([0.3, 0.0]), constants, torch.tensor([0]), torch.tensor([1]))
    assert both.item() == pytest.approx(rho.item(), rel=1e-6)


class Both(nn.Module):
    def forward(self, x):
        return torch.cat([x, -x], 1)


def identity_head(encoder: nn.Module, dim: int, shapes, classes: int) -> MultiModalClassifier:
    fusion = OrthogonalFusion([dim], classes, a_init=1.0).double()
    fusion.raw[0].data = torch.eye(classes, dim, dtype=F64)
    return MultiModalClassifier([encoder], fusion, shapes).double().eval()


def test_the_plain_form_is_exact_for_opposite_rows_and_the_pair_form_for_orthogonal_ones():
    x = torch.tensor([[0.7], [-1.3]], dtype=F64)
    opposite = identity_head(Both(), 2, [[1]], 2)
    y = opposite(x).argmax(1)
    empirical = crmt.estimate_lipschitz(opposite, [x])
    assert torch.allclose(empirical.logits, torch.ones(1, 2, dtype=F64))
    assert torch.allclose(crmt.multimodal_radius(opposite, x, y, empirical).radius, x.abs()[:, 0])

    plane = identity_head(nn.Identity(), 2, [[2]], 2)
    x = normal(50, 2)
    y = plane(x).argmax(1)
    product = crmt.estimate_lipschitz(plane, [x], "product")
    exact = (x[:, 0] - x[:, 1]).abs() / math.sqrt(2)
    tight = crmt.multimodal_radius(plane, x, y, product)
    loose = crmt.multimodal_radius(plane, x, y, product, tight_pairs=False)
    assert torch.allclose(tight.radius, exact, rtol=1e-8)
    assert torch.allclose(loose.radius, exact / math.sqrt(2), rtol=1e-8)
    assert tight.certified


def test_tight_pairs_with_orthonormal_rows_is_the_root_of_squares():
    model: Any = random_model(3)
    x = normal(30, 8)
    y = model(x).argmax(1)
    constants = crmt.estimate_lipschitz(model, [x], "product")
    assert constants.encoders is not None
    lengths: Any = constants.encoders
    got = crmt.multimodal_radius(model, x, y, constants)
    logits, a, expected = model(x), model.fusion.a, torch.full((30,), math.inf, dtype=F64)
    for j in range(4):
        reach = sum((lengths[m] ** 2) * (a[m, y] ** 2 + a[m, j] ** 2) for m in range(2)) ** 0.5
        ratio = (logits.gather(1, y[:, None])[:, 0] - logits[:, j]) / reach
        expected = torch.where(y == j, expected, torch.minimum(expected, ratio))
    assert torch.allclose(got.radius, expected.detach(), rtol=1e-6)
    loose = crmt.multimodal_radius(model, x, y, constants, tight_pairs=False)
    assert (got.radius <= math.sqrt(2) * loose.radius + 1e-9).all() or (model.fusion.a < 0).any()
    assert (got.radius >= loose.radius - 1e-12).all()
    alone = crmt.multimodal_radius(model, x, y, constants, [1])
    assert (alone.radius >= got.radius).all()


def pgd(model, x, y, radius, reach, steps=30, restarts=3):
    """bool [B]: L2 PGD on the margin with one radius a point, over the coordinates in `reach`."""
    broken = torch.zeros(len(x), dtype=torch.bool)
    for restart in range(restarts):
        step = normal(*x.shape, seed=restart + 100) * reach
        delta = step / step.norm(dim=1, keepdim=True) * radius.unsqueeze(1)
        for i in range(steps):
            delta.requires_grad_()
            out = model(x + delta)
            gap = out.scatter(1, y[:, None], -torch.inf).amax(1) - out.gather(1, y[:, None])[:, 0]
            broken |= gap >= 0
            (g,) = torch.autograd.grad(gap.sum(), delta)
            g = g * reach
            size = radius.unsqueeze(1) * (0.5 if i < steps // 2 else 0.05)
            delta = (delta + size * g / g.norm(dim=1, keepdim=True).clamp_min(1e-12)).detach()
            delta = delta * (radius.unsqueeze(1) / delta.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp(max=1)
    return broken


MASKS = {(0,): [1.0] * 5 + [0.0] * 3, (1,): [0.0] * 5 + [1.0] * 3, (0, 1): [1.0] * 8}


@pytest.mark.parametrize("orthogonal", ["full", "row"])
def test_no_attack_within_the_certificate_succeeds(orthogonal):
    tried = broken_beyond = 0
    for seed in range(5):
        model, x = random_model(10 * seed, orthogonal=orthogonal), 2 * normal(200, 8, seed=seed)
        y = model(x).argmax(1)
        constants = crmt.estimate_lipschitz(model, [x], "product")
        for chosen, mask in MASKS.items():
            reach = torch.tensor(mask, dtype=F64)
            for tight in (True, False):
                found = crmt.multimodal_radius(model, x, y, constants, chosen, tight_pairs=tight)
                assert found.certified
                assert not pgd(model, x, y, 0.999 * found.radius, reach, steps=20, restarts=2).any()
                tried += len(x)
            broken_beyond += int(pgd(model, x, y, 10 * found.radius, reach, steps=20, restarts=1).sum())
    assert tried >= 6000
    assert broken_beyond > 500  # the attack is one that can succeed


def test_a_thousand_points_of_linear_heads_are_not_flipped():
    """Linear encoders, T exact: the nearest boundary, known in closed form, is never nearer than the radius."""
    for seed in range(50):
        encoders = [nn.Linear(4, 5, bias=False, dtype=F64) for _ in range(2)]
        for m, encoder in enumerate(encoders):
            encoder.weight.data = normal(5, 4, seed=seed + 5000 * m)
        fusion = OrthogonalFusion([5, 5], 3, generator=generator(seed)).double()
        fusion.a.data = normal(2, 3, seed=seed)
        model, x = MultiModalClassifier(encoders, fusion, [[4], [4]]), normal(20, 8, seed=seed)
        with torch.no_grad():
            h, weights = model(x), fusion.weights()
            y = h.argmax(1)
            rows = torch.cat([(fusion.a[m, :, None] * weights[m]) @ encoders[m].weight for m in range(2)], 1)
            row_norms = torch.stack([(weights[m] @ encoders[m].weight).norm(dim=1) for m in range(2)])
            planes = (h.gather(1, y[:, None]) - h) / torch.cdist(rows, rows)[y]
            exact = planes.scatter(1, y[:, None], math.inf).amin(1)
        constants = crmt.estimate_lipschitz(model, [x])
        assert torch.allclose(constants.logits, row_norms, rtol=1e-9)
        assert (crmt.multimodal_radius(model, x, y, constants).radius <= exact + 1e-9).all()


def test_planted_mistakes_break():
    """Gradients on few data as if they were bounds; joint attacks judged by one modality's term; zero constants of one modality."""
    model, x = random_model(7), 2 * normal(400, 8, seed=1)
    y = model(x).argmax(1)
    product, empirical = crmt.estimate_lipschitz(model, [x], "product"), crmt.estimate_lipschitz(model, [x[:1]])
    assert not crmt.multimodal_radius(model, x, y, empirical).certified
    everything = torch.ones(8, dtype=F64)
    guessed = crmt.multimodal_radius(model, x, y, empirical).radius
    assert pgd(model, x, y, 0.999 * guessed, everything).any()
    # the published pass leaves the second modality's constants at (nearly) zero: see the test of the loop below
    starved = crmt.Lipschitz(product.logits * torch.tensor([[0.2], [1e-6]]), None, "product", product.model)
    wrong = crmt.multimodal_radius(model, x, y, starved).radius.clamp(max=50)
    assert pgd(model, x, y, 0.999 * wrong, everything).any()


def test_empirical_constants_are_per_row_gradients_and_below_the_product():
    model, x = random_model(4), normal(60, 8)
    got = crmt.estimate_lipschitz(model, x.split(16))
    expected = torch.zeros(2, 4, dtype=F64)
    for i in range(60):
        v = x[i : i + 1].clone().requires_grad_()
        uni, _ = model.both(v)
        for m, part in enumerate((slice(0, 5), slice(5, 8))):
            for k in range(4):
                (g,) = torch.autograd.grad(uni[m][0, k], v, retain_graph=True)
                expected[m, k] = max(expected[m, k].item(), g[0, part].norm().item())
    assert torch.allclose(got.logits, expected)
    assert (crmt.estimate_lipschitz(model, [x], "product").logits >= got.logits).all()


def test_the_published_pass_accumulates_one_modality_and_zeroes_the_other():
    """Its loop clears the second input's gradient before reading it, and never the first's."""
    model: Any = random_model(4)
    x = normal(20, 8)
    first, second = (part.clone().requires_grad_() for part in crmt.unpack(x, model.shapes))
    published = torch.zeros(2, 4, dtype=F64)
    out = model(crmt.pack([first, second]))
    for k in range(4):
        out[:, k].sum().backward(retain_graph=True)
        for m, data in enumerate((first, second)):
            assert data.grad is not None and second.grad is not None
            norms = data.grad.detach().clone().norm(dim=1)
            second.grad.zero_()
            published[m, k] = max(published[m, k].item(), norms.max().item())
    ours = crmt.estimate_lipschitz(model, [x]).logits * model.fusion.a.abs().detach()
    assert (published[1] == 0).all()
    assert (published[0] - ours[0]).abs().max() > 0.1
    assert published[0, 0].item() == pytest.approx(ours[0, 0].item())  # only before anything has accumulated


def test_preference_shares():
    model: Any = random_model(5)
    x = normal(80, 8)
    y = model(x).argmax(1)
    report = crmt.modality_preference(model, x, y, crmt.estimate_lipschitz(model, [x]))
    assert sum(report.vulnerability) == pytest.approx(1)
    with torch.no_grad():
        model.fusion.a[1] *= 1e-3
    lean = crmt.modality_preference(model, x, model(x).argmax(1), crmt.estimate_lipschitz(model, [x]))
    assert lean.preferred == 0
    assert lean.vulnerability[0] > 0.99
    single = identity_head(nn.Identity(), 3, [[3]], 2)
    x = normal(9, 3)
    alone = crmt.modality_preference(single, x, single(x).argmax(1), crmt.estimate_lipschitz(single, [x]))
    assert "one modality" in alone.warnings[0]


# --------------------------------------------------------------------------------------------------- attacks


def test_an_attack_stays_in_its_modality_and_radius():
    model, x = random_model(2), normal(100, 8)
    y = model(x).argmax(1)
    held = Held(model, model.shapes, [1])
    v = x.clone().requires_grad_()
    held(v).square().sum().backward()
    assert v.grad is not None and (v.grad[:, :5] == 0).all()
    assert (v.grad[:, 5:] != 0).any()
    share = [crmt.attack_modalities(model, x, y, chosen, 1.0, generator=generator()).double().mean() for chosen in ((0,), (1,), (0, 1))]  # fmt: skip
    assert share[2] >= max(share[:2])
    more = crmt.attack_modalities(model, x, y, (0,), 1.0, restarts=4, generator=generator())
    assert more.double().mean() >= share[0]
    one_step = crmt.attack_modalities(model, x, y, (0, 1), 1.0, steps=1, generator=generator())
    assert one_step.double().mean() <= share[2]


def test_missing_modality_is_filled():
    model, x = random_model(2), normal(50, 8)
    y = model(x).argmax(1)
    report = crmt.evaluate_multimodal(model, x, y, (0.1,), generator=generator())
    gone = x.clone()
    gone[:, :5] = 0
    assert torch.equal(report.missing[0], model(gone).argmax(1) == y)
    assert report.worst_missing == min(right.double().mean().item() for right in report.missing)
    mean = crmt.evaluate_multimodal(model, x, y, (0.1,), fill=x.mean(0), generator=generator())
    gone[:, :5] = x.mean(0)[:5]
    assert torch.equal(mean.missing[0], model(gone).argmax(1) == y)
    assert report.clean.all()
    assert report.worst(0.1) == min(report.accuracy("0", 0.1), report.accuracy("1", 0.1))


def test_joint_adversary_moves_by_at_most_eps():
    model, x = random_model(6).train(), normal(40, 8)
    y = model(x).argmax(1)
    moved = crmt.joint_adversary(model, x, y, eps=0.5)
    length = (moved - x).norm(dim=1)
    assert length.max() <= 0.5 + 1e-9
    assert (moved - x).abs().max() <= 2 * 0.5  # the published clamp never binds
    assert nn.functional.cross_entropy(model(moved), y) > nn.functional.cross_entropy(model(x), y)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


# --------------------------------------------------------------------------------------------------- step 2


def prepared_for_step_two():
    task = crmt.two_view_digits(921, sizes=(400, 100, 200))
    model = seeded_build(lambda: crmt.two_branch([[64], [40]], 10, width=32), generator(0))
    model: Any = fit(model, task, Training(epochs=6), [CRMT(integrate_lr=0.0)]).model
    constants = crmt.estimate_lipschitz(model, list(task.train.x.split(100)))
    return task, model, constants


def test_step_two_moves_a_alone_and_raises_the_radius():
    task, model, constants = prepared_for_step_two()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    norm = model.fusion.a.norm()
    train, options = (task.train.x, task.train.labels), {"lr": 0.01, "epochs": 5, "generator": generator()}

    def mean_radius() -> float:
        with torch.no_grad():
            z, h = model.both(train[0])
        rival = h.scatter(1, train[1][:, None], -torch.inf).argmax(1)
        return crmt.published_radius(z, model.fusion.a, model.fusion.bias, constants.logits, train[1], rival).mean().item()  # fmt: skip

    start = mean_radius()
    model.train()
    returned = crmt.integrate(model, train, constants, **options)
    assert returned == pytest.approx(mean_radius(), rel=1e-5)
    assert returned > start
    assert model.fusion.a.norm().item() == pytest.approx(norm.item(), rel=1e-5)
    assert model.training
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"fusion.a"}


def test_without_the_norm_weight_decay_shrinks_a():
    task, model, constants = prepared_for_step_two()
    free, norm = copy.deepcopy(model), model.fusion.a.norm().item()
    crmt.integrate(free, (task.train.x, task.train.labels), constants, lr=0.3, epochs=10, keep_norm=False, generator=generator())  # fmt: skip
    assert abs(free.fusion.a.norm().item() / norm - 1) > 1e-3


def test_validation_keeps_the_best_a():
    task, model, constants = prepared_for_step_two()
    before = accuracy(model, task.valid.x, task.valid.labels)
    crmt.integrate(
        model, (task.train.x, task.train.labels), constants, valid=(task.valid.x, task.valid.labels), lr=1.0, epochs=5, generator=generator()
    )  # fmt: skip
    assert accuracy(model, task.valid.x, task.valid.labels) >= before


# --------------------------------------------------------------------------------------------------- the plugs


def small_task(seed: int = 922):
    return crmt.two_view_digits(seed, sizes=(128, 48, 64)).changed(budget="quick")


def small_model():
    return seeded_build(lambda: crmt.two_branch([[64], [40]], 10, width=16), generator(0))


@pytest.mark.parametrize("settings", [{}, {"mixup": True}, {"adversarial": 0.1}, {"orthogonal": "row"}])
def test_treatment_keeps_its_promises_on_a_two_branch_model(settings):
    check_treatment(CRMT(**settings), small_model(), small_task())


def test_treatment_works_behind_normalisation_and_rebuilds():
    task = small_task()
    model = Normalized(small_model(), task.train.x.mean(0), task.train.x.std(0).clamp_min(0.1), dims=0)
    run = fit(model, task, Training(epochs=2), [CRMT()])
    (method,) = run.treatments
    again = CRMT().rebuild(Normalized(small_model(), task.train.x.mean(0), torch.ones(104), dims=0), method.structure())
    again.load_state_dict(run.model.state_dict())
    assert torch.equal(again.eval()(task.test.x), run.model(task.test.x))


def test_treatment_refuses_models_of_one_input():
    task = small_task()
    with pytest.raises(Refused, match="one input"):
        fit(mlp((104,), 10), task, Training(epochs=1), [CRMT()])
    with pytest.raises(Refused, match="apart"):
        fit(crmt.Packed(Mine(), [[1, 8, 8], [40]]), task, Training(epochs=1), [CRMT()])
    narrow = crmt.two_branch([[64], [40]], 10, width=8)
    with pytest.raises(InvalidInput, match="at least 10 features"):
        fit(narrow, task, Training(epochs=1), [CRMT()])


def test_instrument_keeps_its_promises():
    task = small_task()
    model = fit(small_model(), task, Training(epochs=12, lr=3e-3), [CRMT()]).model
    subject = Subject(model, "two views", "vector", (104,), 10, bounds=None)
    check_instrument(crmt.Modalities(restarts=1), subject, task)
    finding = crmt.Modalities(radius=0.3).measure(subject, task)
    names = [part.name for part in finding.parts]
    assert names[:5] == ["no attack", "modality 0 attacked", "modality 1 attacked", "all attacked together", "modality 0 missing"]  # fmt: skip
    assert finding.value == min(finding.parts[1].value, finding.parts[2].value)
    for m in range(2):  # a certificate never claims what the attack took
        proven = next(p for p in finding.parts if p.name == f"certified against attacks on modality {m}")
        assert proven.samples is not None
        assert (proven.samples <= finding.parts[1 + m].samples).all()
    assert len(finding.pictures) == 2
    assert sum(finding.details["preference_vulnerability"]) == pytest.approx(1)


def test_instrument_measures_any_two_branch_and_refuses_the_rest():
    task = small_task()
    own = Subject(crmt.Packed(Mine(), [[1, 8, 8], [40]]), "mine", "vector", (104,), 10, bounds=None)
    assert crmt.Modalities().unfit(own, task) is None
    finding = crmt.Modalities(restarts=1).measure(own, task)
    assert len(finding.parts) == 6
    plain = own.with_model(mlp((104,), 10))
    reason = crmt.Modalities().unfit(plain, task)
    assert reason is not None
    assert "one input" in reason


def test_two_views_share_their_labels_and_differ_in_noise():
    quiet, loud = (crmt.two_view_digits(923, code_noise=n) for n in (0.3, 2.0))
    assert torch.equal(quiet.train.x[:, :64], loud.train.x[:, :64])
    assert torch.equal(quiet.test.labels, loud.test.labels)
    for task in (quiet, loud):
        assert task.train.x[:, 64:].std().item() == pytest.approx(0.3, rel=1e-4)

    def nearest(task):
        distance = torch.cdist(task.test.x[:, 64:], task.train.x[:, 64:])
        return (task.train.labels[distance.argmin(1)] == task.test.labels).double().mean().item()

    assert nearest(quiet) > nearest(loud) + 0.2


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MultiModalClassifier([nn.Identity()], ConcatFusion([3, 3], 2), [[3], [3]]), "do not fit"),
        (lambda: OrthogonalFusion([3, 8], 4), "at least 4 features"),
        (lambda: OrthogonalFusion([8], 4, orthogonal="qr"), "orthogonal"),  # type: ignore[arg-type]
        (lambda: ConcatFusion([], 4), "in_dims"),
        (lambda: crmt.pack([torch.ones(2, 3), torch.ones(3, 3)]), "same examples"),
        (lambda: crmt.estimate_lipschitz(random_model(0), []), "no batches"),
        (lambda: crmt.estimate_lipschitz(random_model(0), [normal(2, 8)], "guess"), "method"),  # type: ignore[arg-type]
        (lambda: radius_with(torch.ones(2, 3)), r"\[2, 4\]"),
        (lambda: radius_with(torch.zeros(2, 4)), "positive"),
        (lambda: crmt.multimodal_radius(random_model(0), normal(2, 8), torch.tensor([0, 9]), constants()), "y must"),
        (lambda: crmt.multimodal_radius(random_model(0), normal(2, 8), torch.tensor([0, 1]), constants(), [2]), "modalities"),
        (lambda: crmt.evaluate_multimodal(random_model(0), normal(0, 8), torch.zeros(0, dtype=torch.int64), (1.0,), generator=generator()), "no examples"),
        (lambda: CRMT(rho=-1.0), "rho"),
        (lambda: CRMT(mixup=True, adversarial=0.1), "choose one"),
        (lambda: crmt.Modalities(radius=0.0), "radius"),
    ],
)  # fmt: skip
def test_bad_input(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()


def constants():
    return crmt.estimate_lipschitz(random_model(0), [normal(2, 8)])


def radius_with(values):
    wrong = crmt.Lipschitz(values.double(), None, "empirical", constants().model)
    return crmt.multimodal_radius(random_model(0), normal(2, 8), torch.tensor([0, 1]), wrong)


def test_constants_of_another_checkpoint_are_refused():
    with pytest.raises(Refused, match="other weights"):
        crmt.multimodal_radius(random_model(1), normal(2, 8), torch.tensor([0, 1]), constants())
    with pytest.raises(Refused, match="tight_pairs"):
        crmt.multimodal_radius(random_model(0), normal(2, 8), torch.tensor([0, 1]), constants(), tight_pairs=True)
    model: Any = random_model(0)
    model.fusion.a.data *= 2  # step 2 may move a: T does not depend on it
    crmt.multimodal_radius(model, normal(2, 8), torch.tensor([0, 1]), constants())


# --- what a plausible slip would change -------------------------------------------------------------------------------


def moody(seed: int = 0) -> MultiModalClassifier:
    """Encoders with batch-norm whose statistics are far from those of a batch: training mode is another function."""

    def build() -> MultiModalClassifier:
        encoders = [nn.Sequential(nn.Linear(n, 6), nn.BatchNorm1d(6), nn.Tanh()) for n in (5, 3)]
        return MultiModalClassifier(encoders, OrthogonalFusion([6, 6], 4, a_init=1.0), [[5], [3]])

    model: Any = seeded_build(build, generator(seed)).double()
    for encoder in model.encoders:
        encoder[1].running_mean.fill_(0.3)
        encoder[1].running_var.fill_(4.0)
    model.fusion.a.data = torch.tensor([[1.0, 0.5, 2.0, 1.0], [0.2, 1.0, 0.7, 0.4]], dtype=F64)
    return model.train()


def test_theory_and_step_two_are_of_the_evaluated_model():
    model, x = moody(), normal(40, 8)
    y, kept = model.eval()(x).argmax(1), copy.deepcopy(model.state_dict())
    still = crmt.estimate_lipschitz(model, [x])
    radius = crmt.multimodal_radius(model, x, y, crmt.estimate_lipschitz(model, [x], "product"))
    liked = crmt.modality_preference(model, x, y, still)
    moved = crmt.joint_adversary(model, x, y, eps=0.5)
    model.train()
    moving = crmt.estimate_lipschitz(model, [x])
    assert torch.equal(still.logits, moving.logits)
    again = crmt.multimodal_radius(model, x, y, crmt.estimate_lipschitz(model, [x], "product"))
    assert torch.equal(radius.radius, again.radius) and bool((radius.radius > 0).all())
    assert crmt.modality_preference(model, x, y, moving) == liked
    assert torch.equal(crmt.joint_adversary(model, x, y, eps=0.5), moved)
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())  # no batch was counted
    crmt.integrate(model, (x, y), moving, epochs=1, generator=generator())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, kept[k])}
    assert changed == {"fusion.a"} and model.training


def test_step_two_is_the_loop_of_the_paper():
    model, x, g = moody().eval(), normal(30, 8), generator(3)
    y = model(x).argmax(1)
    constants = crmt.estimate_lipschitz(model, [x])
    fusion: Any = model.fusion
    a, z, b = fusion.a.detach().clone(), [u.detach() for u in model.both(x)[0]], fusion.bias.detach()
    norm, velocity, t = a.norm(), torch.zeros_like(a), constants.logits
    crmt.integrate(model, (x, y), constants, lr=0.05, epochs=3, batch_size=11, generator=generator(3))
    for _ in range(3):
        for pick in torch.randperm(30, generator=g).split(11):
            a.requires_grad_()
            h = sum(a[m] * z[m][pick] for m in range(2)) + b
            rows, own = torch.arange(len(pick)), y[pick]
            rival = h.detach().scatter(1, own[:, None], -torch.inf).argmax(1)
            reach = sum((a[m, own].abs() * t[m, own] + a[m, rival].abs() * t[m, rival]) ** 2 for m in range(2)) ** 0.5
            mean = ((h[rows, own] - h[rows, rival]) / reach).mean()
            slope = -torch.autograd.grad(mean, a)[0] + 1e-2 * a.detach()
            with torch.no_grad():
                velocity = 0.9 * velocity + slope
                a = a - 0.05 * velocity
                a = a * norm / a.norm()
    assert torch.allclose(fusion.a, a, rtol=1e-9)


def test_preference_by_hand():
    """Margins carry their weights a; shares of the reach are averaged over examples, at the rival of the whole model."""
    model, x = moody().eval(), normal(50, 8)
    y = (model(x).argmax(1) + torch.arange(50) % 2) % 4  # half of them wrong
    constants = crmt.estimate_lipschitz(model, [x])
    got = crmt.modality_preference(model, x, y, constants)
    with torch.no_grad():
        z, h = model.both(x)
        a: Any = model.fusion.integration()
        margins, shares, right = torch.zeros(2, 50, dtype=F64), torch.zeros(2, 50, dtype=F64), [0, 0]
        for i in range(50):
            own = int(y[i])
            rival = max((k for k in range(4) if k != own), key=lambda k: h[i, k].item())
            reach = [(a[m, own].abs() * constants.logits[m, own] + a[m, rival].abs() * constants.logits[m, rival]).item() for m in range(2)]  # fmt: skip
            for m in range(2):
                margins[m, i] = a[m, own] * z[m][i, own] - a[m, rival] * z[m][i, rival]
                shares[m, i] = reach[m] / sum(reach)
                right[m] += int(z[m][i].argmax() == own)
    assert got.margin == pytest.approx(margins.mean(1).tolist())
    assert got.vulnerability == pytest.approx(shares.mean(1).tolist())
    assert got.accuracy == pytest.approx([r / 50 for r in right])
    assert got.preferred == int(shares.mean(1).argmax())


def test_mixed_cross_entropy_has_both_labels():
    z, y, other = [normal(8, 5, seed=s) for s in (1, 2)], torch.arange(8) % 5, torch.arange(8) % 3
    h, cross = z[0] + z[1], nn.functional.cross_entropy
    expected = 0.3 * cross(h, y) + 0.7 * cross(h, other) + 2 * crmt.mixed_margin_term(z, y, other, 0.3).mean()
    assert torch.allclose(CRMTLoss(2.0)(z, h, y, other, 0.3), expected)


def test_the_treatments_loss_is_what_its_settings_say():
    """Mixed inputs go with the partners' labels, adversarial ones are the joint adversary's, and rho weighs the margins."""
    model, x, y = moody().eval(), normal(20, 8), torch.arange(20) % 4
    batch: Any = type("Batch", (), {"x": x, "y": y, "generator": generator(5)})()
    z, h = model.both(x)
    assert torch.allclose(CRMT(rho=0.7).loss(model, batch), CRMTLoss(0.7)(z, h, y))
    g = generator(5)
    share, partner = float(torch.rand((), generator=g)), torch.randperm(20, generator=g)
    z, h = model.both(share * x + (1 - share) * x[partner])
    assert torch.allclose(CRMT(mixup=True).loss(model, batch), CRMTLoss(2.0)(z, h, y, y[partner], share))
    z, h = model.both(crmt.joint_adversary(model, x, y, eps=0.4))
    assert torch.allclose(CRMT(adversarial=0.4).loss(model, batch), CRMTLoss(2.0)(z, h, y))


def test_finish_integrates_with_what_stands_before_the_model():
    task = small_task()
    mean, std = task.train.x.mean(0), task.train.x.std(0).clamp_min(0.1)
    model: Any = Normalized(small_model(), mean, std, dims=0)
    trained: Any = fit(model, task, Training(epochs=3), [CRMT(integrate_lr=0.0)]).model
    twin = copy.deepcopy(trained)
    CRMT(integrate_lr=0.02, integrate_epochs=2).finish(trained, task)
    assert not torch.equal(trained.model.fusion.a, twin.model.fusion.a)
    seen = [((s.x - mean) / std, s.labels) for s in (task.train, task.valid)]
    constants = crmt.estimate_lipschitz(twin.model, list(seen[0][0].split(256)))
    crmt.integrate(twin.model, seen[0], constants, valid=seen[1], lr=0.02, epochs=2, generator=task.generator("crmt/integrate"))  # fmt: skip
    assert torch.allclose(trained.model.fusion.a, twin.model.fusion.a, rtol=1e-5)


def test_one_step_is_the_whole_radius_and_restarts_stay_in_their_modality(monkeypatch):
    from surefoot.certified.crmt import robustness as module

    calls: list[tuple[torch.Tensor, dict[str, Any]]] = []
    real = module.pgd

    def spy(model, x, y, **options):
        calls.append((x, options))
        return real(model, x, y, **options)

    monkeypatch.setattr(module, "pgd", spy)
    model, x = random_model(2), normal(30, 8)
    y = model(x).argmax(1)
    crmt.attack_modalities(model, x, y, (1,), 0.05, steps=1, generator=generator())
    crmt.attack_modalities(model, x, y, (1,), 0.05, steps=2, restarts=3, generator=generator())
    assert [options["step_size"] for _, options in calls] == [0.05, None, None, None]
    assert [options["loss"] for _, options in calls] == ["ce", "ce", "margin", "ce"]
    for given, options in calls:
        moved = options["start"] - given
        assert not options["random_start"] and (moved[:, :5] == 0).all()
        assert ((moved.norm(dim=1) < 1e-12) | ((moved.norm(dim=1) - 0.05).abs() < 1e-9)).all()
    assert (calls[0][1]["start"] == calls[0][0]).all() and (calls[2][1]["start"] != calls[2][0]).any()


def test_dependent_rows_stay_finite():
    raw = normal(4, 7).float()
    raw[1] = raw[0]
    raw.requires_grad_()
    rows = orthonormal_rows(raw)
    rows.square().sum().backward()
    assert rows.abs().max() < 10 and raw.grad is not None and torch.isfinite(raw.grad).all()
    assert orthonormal_rows(normal(3, 5)).dtype == F64
    assert torch.allclose(orthonormal_rows(normal(3, 5)) @ orthonormal_rows(normal(3, 5)).T, torch.eye(3, dtype=F64), atol=1e-12)  # fmt: skip


def test_the_instrument_certifies_in_the_scale_of_the_data_or_not_at_all():
    task = small_task()
    inner = fit(small_model(), task, Training(epochs=12, lr=3e-3), [CRMT()]).model
    subject = Subject(inner, "two views", "vector", (104,), 10, bounds=None)
    finding = crmt.Modalities(radius=0.02, restarts=1).measure(subject, task)
    proven = [p for p in finding.parts if p.name.startswith("certified")]
    split = task.sample("modalities", 100)
    constants = crmt.estimate_lipschitz(inner, [split.x[:1]], "product")
    for m, part in enumerate(proven):
        found = crmt.multimodal_radius(inner, split.x, split.labels, constants, [m])
        assert part.samples is not None and part.samples.tolist() == (found.radius >= 0.02).double().tolist()
    assert 0 < proven[0].value < 1
    before = Normalized(
        inner, torch.zeros(104), torch.full((104,), 0.5), dims=0
    )  # constants of the encoders are half the truth
    names = [p.name for p in crmt.Modalities(radius=0.02, restarts=1).measure(subject.with_model(before), task).parts]
    assert not any("certified" in name for name in names)


def test_the_instrument_keeps_to_the_range_of_the_data(monkeypatch):
    from surefoot.certified.crmt import instrument as module

    seen: list[Any] = []
    real = module.evaluate_multimodal
    monkeypatch.setattr(module, "evaluate_multimodal", lambda *a, **k: seen.append(k["bounds"]) or real(*a, **k))
    task = small_task()
    crmt.Modalities(restarts=1).measure(Subject(small_model(), "m", "vector", (104,), 10, bounds=(-2.0, 2.0)), task)
    assert seen == [(-2.0, 2.0)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: crmt.attack_modalities(random_model(0), normal(2, 8), torch.tensor([0, 1]), [2], 0.1, generator=generator()), "modalities"),
        (lambda: crmt.attack_modalities(random_model(0), normal(2, 8), torch.tensor([0, 1]), [], 0.1, generator=generator()), "modalities"),
        (lambda: crmt.evaluate_multimodal(random_model(0), normal(2, 8), torch.tensor([0]), (0.1,), generator=generator()), "y must"),
        (lambda: crmt.modality_preference(random_model(0), normal(2, 8), torch.tensor([0, 9]), constants()), "y must"),
    ],
)  # fmt: skip
def test_more_bad_input(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()


def test_every_use_of_constants_asks_whose_they_are():
    x, y = normal(4, 8), torch.tensor([0, 1, 2, 3])
    model: Any = random_model(0)
    model.fusion.raw[0].data[0, 0] += 0.5  # the same encoders, another matrix
    for use in (
        lambda: crmt.multimodal_radius(model, x, y, constants()),
        lambda: crmt.modality_preference(model, x, y, constants()),
        lambda: crmt.integrate(model, (x, y), constants(), generator=generator()),
    ):
        with pytest.raises(Refused, match="other weights"):
            use()
    once, twice = (crmt.multimodal_radius(random_model(0), x, y, constants(), m) for m in ([1], [1, 1]))
    assert torch.equal(once.signed, twice.signed)


def test_what_the_model_sees_behind_batch_norm_is_read_in_evaluation_mode():
    from surefoot.certified.crmt.training import _inputs_of

    inner, norm, x = moody(), nn.BatchNorm1d(8).double(), normal(30, 8)
    model = nn.Sequential(norm, inner).train()
    seen = _inputs_of(inner, model, x)
    assert torch.allclose(seen, x / math.sqrt(1 + norm.eps))
    assert norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 0 and model.training


def test_rows_as_published_are_centred():
    assert torch.allclose(unit_rows(normal(4, 7) + 3.0).mean(1), torch.zeros(4, dtype=F64), atol=1e-12)


def test_a_wrong_answer_has_no_radius():
    model, x = random_model(3), normal(30, 8)
    constants = crmt.estimate_lipschitz(model, [x], "product")
    wrong = (model(x).argmax(1) + 1) % 4
    found = crmt.multimodal_radius(model, x, wrong, constants)
    assert (found.radius == 0).all() and (found.signed < 0).all()


def test_of_equally_accurate_weights_the_later_are_kept():
    model, x = moody().eval(), normal(30, 8)
    y, fusion = model(x).argmax(1), model.fusion
    assert isinstance(fusion, OrthogonalFusion)
    before = fusion.a.detach().clone()
    crmt.integrate(model, (x, y), crmt.estimate_lipschitz(model, [x]), valid=(x, y), lr=1e-4, epochs=2, generator=generator())  # fmt: skip
    assert torch.equal(model(x).argmax(1), y) and not torch.equal(fusion.a, before)
