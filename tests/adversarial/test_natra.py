"""NaTra: inversion, directions, the filter, the attack and the training loss, against exact cases."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from surefoot.adversarial.natra import (
    Directions,
    LatentCodes,
    NaTra,
    NaturalTransformation,
    attribute_directions,
    compose,
    filter_directions,
    first_affine,
    invert_batch,
    natra_loss,
    natural_attack,
    psnr,
    realism,
    split_generator,
    train_encoder,
    train_natra,
)
from surefoot.core.task import Training
from surefoot.datasets.embedded import digits, seeded
from surefoot.datasets.shapes import CLASSES, Factors, render
from surefoot.errors import InvalidInput, Refused
from surefoot.models import mlp, seeded_build, small_cnn
from surefoot.models.generators import ImageEncoder, image_decoder, train_vae
from surefoot.training.loop import fit


def seed(purpose: str) -> torch.Generator:
    return seeded(907, purpose)


def rand(*shape: int, purpose: str = "rand", dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=seed(purpose), dtype=dtype)


class Linear2d(nn.Sequential):
    """z -> A z + b as images of `shape`."""

    def __init__(self, matrix: Tensor, shape: tuple[int, ...], bias: Tensor | None = None) -> None:
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None, dtype=matrix.dtype)
        layer.weight.data = matrix.clone()
        if bias is not None:
            layer.bias.data = bias.clone()
        super().__init__(layer, nn.Unflatten(1, shape))


@pytest.fixture(scope="module")
def decoder() -> nn.Sequential:
    net = seeded_build(lambda: image_decoder(6, (1, 8, 8), width=4, hidden=16), seed("decoder"))
    assert isinstance(net, nn.Sequential)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)  # else every z gives nearly the same image
    return net.eval()


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return seeded_build(lambda: ImageEncoder((1, 8, 8), 6, width=4, hidden=16), seed("encoder")).eval()


@pytest.fixture(scope="module")
def images(decoder: nn.Module) -> Tensor:
    with torch.no_grad():
        return decoder(rand(20, 6, purpose="images", dtype=torch.float32))


@pytest.fixture(scope="module")
def codes(decoder: nn.Sequential, encoder: nn.Module, images: Tensor) -> LatentCodes:
    return invert_batch(decoder, encoder, images, steps=20, num_codes=3, generator=seed("codes"))


@pytest.fixture(scope="module")
def directions(decoder: nn.Sequential) -> Directions:
    return attribute_directions(decoder, k=3)


@pytest.fixture(scope="module")
def transform(decoder: nn.Sequential, codes: LatentCodes, directions: Directions) -> NaturalTransformation:
    return NaturalTransformation(decoder, codes, directions, 1.5)


# --- the generator as a backend -------------------------------------------------------------------------------------


class Halves(nn.Module):
    """A user's own generator, with `split` and a latent size that it says itself."""

    latent_dim = 6

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def split(self, layer: int | None) -> tuple[nn.Module, nn.Module]:
        return self.net[:5], self.net[5:]

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z)


def test_the_default_cut_is_where_positions_begin(decoder):
    head, tail = split_generator(decoder)
    z = rand(4, 6, dtype=torch.float32)
    assert head(z).shape == (4, 4, 2, 2)
    assert torch.allclose(tail(head(z)), decoder(z))


def test_compose_is_the_equation(decoder):
    z, a = rand(3, 2, 6, dtype=torch.float32), rand(3, 2, 4, purpose="a", dtype=torch.float32)
    head, tail = split_generator(decoder)
    expected = torch.stack(
        [
            tail(torch.stack([a[i, n][:, None, None] * head(z[i, n : n + 1])[0] for n in range(2)]).sum(0)[None])[0]
            for i in range(3)
        ]
    )
    assert torch.allclose(compose(decoder, z, a), expected, atol=1e-6)
    ones = torch.ones(3, 1, 4)
    assert torch.allclose(compose(decoder, z[:, :1], ones), decoder(z[:, 0]), atol=1e-6)


def test_a_users_generator_with_split(decoder, encoder, images):
    own = invert_batch(Halves(decoder), encoder, images, steps=5, num_codes=2, generator=seed("own"))
    ours = invert_batch(decoder, encoder, images, steps=5, num_codes=2, layer=5, generator=seed("own"))
    assert torch.equal(own.codes, ours.codes)


def test_convolutions_as_first_layer():
    transposed = nn.ConvTranspose2d(3, 5, 4)
    z = rand(2, 3, dtype=torch.float32)
    moved = transposed(z[:, :, None, None]) - transposed(torch.zeros(1, 3, 1, 1))
    assert torch.allclose(z @ first_affine(nn.Sequential(transposed)).T, moved.flatten(1), atol=1e-5)


def test_a_generator_that_cannot_be_cut(images, encoder):
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 64)

        def forward(self, z: Tensor) -> Tensor:
            return self.layer(z).reshape(-1, 1, 8, 8).sigmoid()

    assert len(invert_batch(Whole(), encoder, images, steps=1)) == 20
    with pytest.raises(InvalidInput, match=r"split\(layer\)"):
        invert_batch(Whole(), encoder, images, steps=1, num_codes=2)
    with pytest.raises(InvalidInput, match="name the layer"):
        split_generator(Linear2d(rand(4, 2), (4,)))
    with pytest.raises(InvalidInput, match=r"layer must lie in 1\.\.1"):
        split_generator(Linear2d(rand(4, 2), (1, 2, 2)), 2)


# --- inversion ------------------------------------------------------------------------------------------------------


def test_linear_inversion_is_least_squares():
    matrix, bias, x = rand(12, 3), rand(12, purpose="b"), rand(5, 1, 3, 4, purpose="x")
    net = Linear2d(matrix, (1, 3, 4), bias)
    found = invert_batch(net, None, x, steps=800, lr=0.1, code_weight=0.0, bounds=None)
    expected = torch.linalg.lstsq(matrix, (x.flatten(1) - bias).T).solution.T
    assert torch.allclose(found.codes[:, 0], expected, atol=1e-4)
    assert found.weights is None


def test_two_linear_layers_show_no_gain_from_more_codes():
    """Without positions free channel weights reach all of A2's range with one code; frozen ones only A2 A1's."""
    first, second, x = rand(4, 2), rand(6, 4, purpose="2"), rand(8, 1, 2, 3, purpose="x")
    net = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 6, bias=False), nn.Unflatten(1, (1, 2, 3))).double()
    net[0].weight.data, net[1].weight.data = first, second

    def error(num_codes: int, free: bool) -> Tensor:
        options = {"steps": 1500, "lr": 0.1, "code_weight": 0.0, "bounds": None, "restarts": 8, "layer": 1}
        found = invert_batch(net, None, x, num_codes=num_codes, channel_weights=free, generator=seed("r"), **options)
        return (found.images(net) - x).flatten(1).square().sum(1)

    def residual(matrix: Tensor) -> Tensor:
        flat = x.flatten(1).T
        return (matrix @ torch.linalg.lstsq(matrix, flat).solution - flat).square().sum(0)

    assert torch.allclose(error(1, False), residual(second @ first), atol=1e-4)
    assert torch.allclose(error(1, True), residual(second), atol=1e-3)
    assert torch.allclose(error(2, True), residual(second), atol=1e-3)


def test_more_codes_rebuild_more_where_features_have_positions():
    net = nn.Sequential(
        nn.Linear(2, 12, bias=False), nn.Unflatten(1, (2, 2, 3)), nn.Conv2d(2, 1, 1, bias=False)
    ).double()
    net[0].weight.data, net[2].weight.data = rand(12, 2), rand(1, 2, 1, 1, purpose="c")
    x = rand(6, 1, 2, 3, purpose="x")

    def error(num_codes: int, free: bool) -> float:
        options = {"steps": 800, "lr": 0.1, "code_weight": 0.0, "bounds": None, "restarts": 8}
        found = invert_batch(net, None, x, num_codes=num_codes, channel_weights=free, generator=seed("r"), **options)
        return (found.images(net) - x).square().sum().item()

    plain, weighted, four = error(1, False), error(1, True), error(4, True)
    assert four < 0.9 * weighted and weighted < 0.9 * plain


def test_the_shared_shift_finds_a_constant_offset():
    """All images lie one step along e1 from the encoder's codes: the shift finds it before any code moves alone."""
    net = Linear2d(torch.eye(4, dtype=torch.float64), (1, 2, 2))
    z = rand(30, 4)
    offset = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    x = net(z + offset).detach()
    found = invert_batch(net, lambda images: z, x, steps=500, lr=0.05, code_weight=0.0, bounds=None)
    assert found.shift is not None
    assert torch.allclose(found.shift, offset, atol=0.02)


def test_inversion_improves_on_the_encoder(decoder, images):
    net = train_encoder(decoder, images, steps=150, generator=seed("train"))
    found = invert_batch(decoder, net, images, steps=60)
    assert float(found.psnr.median()) > float(found.encoded_psnr.median()) + 1.0
    rebuilt = found.images(decoder).detach()
    assert torch.allclose(found.psnr, psnr(rebuilt, images), atol=1e-3)


def test_feature_term_pulls_features_together(decoder, encoder, images):
    phi = encoder.features
    plain = invert_batch(decoder, encoder, images, steps=40, code_weight=0.0)
    felt = invert_batch(decoder, encoder, images, steps=40, code_weight=0.0, features=phi, feature_weight=100.0)
    gap = [(phi(c.images(decoder)) - phi(images)).square().mean().item() for c in (plain, felt)]
    assert gap[1] < gap[0]


def test_batched_equals_one_by_one_and_follows_permutations(decoder, encoder, images):
    options = {"steps": 15, "num_codes": 2, "shift": torch.full((6,), 0.1), "lr": 0.05}
    whole = invert_batch(decoder, encoder, images, generator=seed("p"), **options)
    order = torch.randperm(20, generator=seed("order"))
    permuted = invert_batch(decoder, encoder, images[order], generator=seed("p"), **options)
    assert torch.allclose(permuted.codes, whole.codes[order], atol=1e-4)
    single = invert_batch(decoder, encoder, images[3:4], generator=seed("p"), **options)
    assert torch.allclose(single.codes[0], whole.codes[3], atol=1e-4)
    again = invert_batch(decoder, encoder, images, generator=seed("p"), **options)
    assert torch.equal(again.codes, whole.codes)


def test_networks_are_left_as_they_were(images):
    """Batch statistics of the generator must not follow the inversion, whatever mode it came in."""
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Unflatten(1, (1, 4, 4)), nn.Upsample((8, 8)), nn.Sigmoid())  # fmt: skip
    encoder = ImageEncoder((1, 8, 8), 6)
    net.train()
    before = copy.deepcopy((net.state_dict(), encoder.state_dict()))
    state = torch.get_rng_state()
    invert_batch(net, encoder, images, steps=3, num_codes=2, features=encoder.features)
    assert net.training and net[1].training
    for old, network in zip(before, (net, encoder)):
        assert all(torch.equal(v, network.state_dict()[k]) for k, v in old.items())
        assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_codes_below_the_floor_are_named(codes):
    floor = float(codes.psnr.median())
    assert 0 < int(codes.usable(floor).sum()) < len(codes)
    with pytest.raises(InvalidInput, match="does not cover"):
        codes.usable(99.0)


# --- directions -----------------------------------------------------------------------------------------------------


def test_closed_form_of_a_diagonal_matrix():
    net = Linear2d(torch.diag(torch.tensor([3.0, 2.0, 1.0])), (1, 1, 3))
    found = attribute_directions(net, k=3)
    assert torch.allclose(found.vectors, torch.eye(3), atol=1e-6)
    assert torch.allclose(found.values, torch.tensor([9.0, 4.0, 1.0]), atol=1e-5)
    assert torch.allclose(found.scale, torch.ones(3), atol=1e-6)


def test_closed_form_is_orthonormal_and_sign_normalised(decoder):
    found = attribute_directions(decoder, k=6)
    assert torch.allclose(found.vectors @ found.vectors.T, torch.eye(6), atol=1e-5)
    assert bool((found.vectors.gather(1, found.vectors.abs().argmax(1, keepdim=True)) > 0).all())


def test_amounts_are_standard_deviations_of_the_codes():
    """A latent axis that the data hardly use must not lead, however large its weights: absolute units would let it."""
    net = Linear2d(torch.diag(torch.tensor([3.0, 2.0, 1.0])), (1, 1, 3))
    z = rand(4000, 3, dtype=torch.float32) * torch.tensor([0.1, 1.0, 5.0])
    found = attribute_directions(net, k=3, codes=z)
    assert found.vectors.argmax(1).tolist() == [2, 1, 0]
    assert torch.allclose(found.scale, torch.tensor([5.0, 1.0, 0.1]), rtol=0.05)


def test_pca_finds_the_axes_of_a_linear_generator():
    """For features A z with orthogonal columns the components are z's axes by column length; one unit is one deviation."""
    basis = torch.linalg.qr(rand(16, 3))[0] * torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)
    net = Linear2d(basis, (1, 4, 4))
    net.append(nn.Identity())
    found = attribute_directions(net, method="pca", k=3, layer=1, generator=seed("pca"))
    assert found.vectors.argmax(1).tolist() == [1, 2, 0]
    assert torch.allclose(found.vectors.max(1).values, torch.ones(3, dtype=torch.float64), atol=0.01)
    assert torch.allclose(found.scale, torch.ones(3, dtype=torch.float64), atol=0.03)


def plain_components(features: Tensor, z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The construction as it is written down, in float64: SVD of centred features, least squares of z on unit scores."""
    centred, moved = features.double() - features.double().mean(0), z.double() - z.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    scores = u[:, :k] * (len(z) - 1) ** 0.5
    return torch.linalg.lstsq(scores, moved).solution, s[:k].square() / (len(z) - 1)


@pytest.mark.parametrize(("samples", "dtype"), [(2000, torch.float32), (2000, torch.float64), (40, torch.float32), (40, torch.float64)])  # fmt: skip
def test_pca_is_its_definition_in_both_precisions_and_with_fewer_rows_than_features(samples, dtype):
    net = seeded_build(lambda: image_decoder(6, (1, 8, 8), width=16, hidden=64), seed("wide")).to(dtype)
    assert isinstance(net, nn.Sequential)
    z = rand(samples, 6, dtype=torch.float64).to(dtype) * torch.arange(1, 7).to(dtype)
    found = attribute_directions(net, method="pca", k=4, layer=2, codes=z)
    with torch.no_grad():
        features = net[:2](z)
    assert features.shape[1] == 64
    steps, values = plain_components(features, z, 4)
    near = 1e-5 if dtype == torch.float32 else 1e-10
    assert torch.allclose(found.scale.double(), steps.norm(dim=1), rtol=near)
    assert torch.allclose(found.values.double(), values, rtol=near)
    assert bool(((found.vectors.double() * steps).sum(1).abs() / steps.norm(dim=1) > 1 - near).all())


def test_pca_refuses_more_directions_than_move_the_features():
    """Without it the third would be what rounding leaves, called a direction."""
    net = Linear2d(rand(16, 3) * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64), (1, 4, 4))
    net.append(nn.Identity())
    assert len(attribute_directions(net, method="pca", k=2, layer=1, generator=seed("pca"))) == 2
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(InvalidInput, match="Fewer than k = 3"):
            attribute_directions(net.to(dtype), method="pca", k=3, layer=1, generator=seed("pca"))


class Procedural(nn.Module):
    """A generator with known factors: z = (square to cross, brightness, tilt)."""

    latent_dim = 3

    def forward(self, z: Tensor) -> Tensor:
        n, zero = len(z), z.new_zeros(len(z))
        drawn = [
            render(
                Factors(torch.full((n,), CLASSES.index(name)), 0.65 + 0.1 * z[:, 1], zero, zero, 6 * z[:, 2],
                        zero + 0.12, zero + 0.9, zero, zero)
            )
            for name in ("square", "cross")
        ]  # fmt: skip
        share = torch.sigmoid(4 * z[:, 0]).reshape(-1, 1, 1, 1)
        return (1 - share) * drawn[0] + share * drawn[1]


def correlate(x: Tensor) -> Tensor:
    """Logits of a judge that knows: the best normalised correlation with each glyph over tilts."""
    tilts = torch.arange(-20.0, 21.0, 4.0)
    scores = []
    for class_code in (-3.0, 3.0):
        z = torch.stack([torch.full_like(tilts, class_code), torch.zeros_like(tilts), tilts / 6], 1)
        templates = Procedural()(z).flatten(1)
        scores.append((F.normalize(x.flatten(1) - x.flatten(1).mean(1, keepdim=True)) @ F.normalize(templates - templates.mean(1, keepdim=True)).T).amax(1))  # fmt: skip
    return 20 * torch.stack(scores, 1)


def procedural(alpha_max: float = 2.0) -> NaturalTransformation:
    n = 60
    z = torch.cat([torch.where(torch.arange(n) % 2 == 0, -1.0, 1.0)[:, None], 0.5 * rand(n, 2, dtype=torch.float32)], 1)
    codes = LatentCodes(z.unsqueeze(1), None, torch.full((n,), 50.0), torch.full((n,), 50.0))
    return NaturalTransformation(Procedural(), codes, Directions(torch.eye(3), torch.ones(3), torch.ones(3)), alpha_max)


def test_filter_drops_the_class_direction():
    report = filter_directions(correlate, procedural())
    assert report.kept.tolist() == [False, True, True]
    kept, reach = report.select()
    assert torch.equal(kept.vectors, torch.eye(3)[1:]) and reach.tolist() == [2.0, 2.0]
    assert float(report.label_change[0]) > 0.2 and report.joint_label_change <= 0.05


def test_filter_drops_what_does_not_move_the_image():
    report = filter_directions(correlate, procedural(), min_image_change=0.12)
    assert not bool(report.kept[1]) or not bool(report.kept[2])


def test_filter_can_halve_the_reach_of_a_direction():
    report = filter_directions(correlate, procedural(), halvings=3)
    assert float(report.reach[0]) < 1.0 and report.reach[1:].tolist() == [2.0, 2.0]
    assert float(report.label_change[0]) <= 0.05


def test_no_direction_passes():
    def moody(x: Tensor) -> Tensor:  # its answer hangs on the last digits of a pixel sum
        return torch.stack([torch.sin(1e3 * x.sum((1, 2, 3))), torch.zeros(len(x))], 1)

    with pytest.raises(InvalidInput, match=r"No direction keeps the class .*0: at 2 labels"):
        filter_directions(moody, procedural()).select()


# --- transformation and attack --------------------------------------------------------------------------------------


def test_no_amount_is_the_reconstruction(transform, decoder, codes, images):
    assert torch.equal(transform(transform.amounts()), codes.images(decoder).clamp(0, 1))
    kept = replace(transform, residual=True, x=images)
    assert torch.equal(kept(kept.amounts()), images)


def test_every_code_gets_the_same_shift(transform, decoder, codes):
    a = transform.draw(seed("a"))
    steps = [a[:, k, None] * transform.directions.scale[k] * transform.directions.vectors[k] for k in range(3)]
    shift = torch.stack(steps).sum(0)
    expected = compose(decoder, codes.codes + shift[:, None], codes.weights, codes.layer)
    assert torch.allclose(transform(a), expected, atol=1e-6)
    part = transform.take(torch.tensor([4, 2]))
    assert torch.allclose(part(a[[4, 2]]), expected[[4, 2]], atol=1e-5)


def test_float32_follows_float64(transform):
    def double(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.double()

    c, d = transform.codes, transform.directions
    wide = replace(
        transform,
        generator_net=copy.deepcopy(transform.generator_net).double(),
        codes=replace(c, codes=c.codes.double(), weights=double(c.weights)),
        directions=Directions(d.vectors.double(), d.scale.double(), d.values.double()),
    )
    a = transform.draw(seed("wide"))
    assert torch.allclose(transform(a).double(), wide(a.double()), atol=1e-5)


def classifier() -> nn.Module:
    return seeded_build(lambda: mlp((1, 8, 8), 3, hidden=(16,)), seed("classifier"))


def test_the_attack_keeps_its_promises(transform):
    model, y = classifier(), torch.arange(20) % 3
    found = natural_attack(model, transform, y, mode="pgd", steps=4, draws=5, generator=seed("attack"))
    assert bool((found.a.abs() <= 1.5 + 1e-6).all())
    assert bool((found.loss >= found.drawn_loss).all()) and bool((found.drawn_loss >= found.clean_loss).all())
    assert float((found.loss - found.drawn_loss).mean()) > 0
    assert torch.allclose(found.loss, F.cross_entropy(model(transform(found.a)), y, reduction="none"), atol=1e-5)
    assert torch.allclose(found.x, transform(found.a), atol=1e-6)
    best = natural_attack(model, transform, y, mode="best", draws=5, generator=seed("attack"))
    assert torch.equal(best.loss, found.drawn_loss)  # pgd starts where the same draws end
    single = natural_attack(model, transform, y, mode="random", generator=seed("attack"))
    assert float(single.loss.mean()) < float(found.loss.mean())


def test_the_attack_reaches_the_corner_of_a_linear_problem():
    """Images linear in a and a linear two-class model: the worst point is the corner of the box."""
    net = Linear2d(torch.diag(torch.tensor([3.0, 2.0, 1.0])), (1, 1, 3))
    codes = LatentCodes(torch.zeros(4, 1, 3), None, torch.zeros(4), torch.zeros(4))
    moves = NaturalTransformation(net, codes, attribute_directions(net, k=3), torch.tensor([1.0, 2.0, 0.5]), bounds=None)  # fmt: skip
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False))
    model[1].weight.data = torch.tensor([[0.3, -0.2, 0.5], [-0.3, 0.2, -0.5]])
    found = natural_attack(model, moves, torch.zeros(4, dtype=torch.int64), steps=5, generator=seed("corner"))
    assert torch.allclose(found.a, torch.tensor([[-1.0, 2.0, -0.5]]).expand(4, 3))


def test_the_attack_leaves_the_model_alone(transform):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        first = natural_attack(model, transform, torch.arange(20) % 3, generator=seed("alone"))
        second = natural_attack(model, transform, torch.arange(20) % 3, generator=seed("alone"))
    assert torch.equal(first.a, second.a) and model.training
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is None for p in model.parameters()) and torch.equal(state, torch.get_rng_state())


def test_the_loss_is_its_equation(transform, images):
    model, y = classifier(), torch.arange(20) % 3
    usable = torch.arange(20) < 15
    moved = natural_attack(model, transform, y, steps=2, draws=2, generator=seed("loss")).x
    clean, shifted = model(images), model(moved)[:15]
    kl = (clean[:15].softmax(1) * (clean[:15].log_softmax(1) - shifted.log_softmax(1))).sum(1).mean()
    expected = F.cross_entropy(clean, y) + 0.7 * F.cross_entropy(shifted, y[:15]) + 0.3 * kl
    options = {"weight": 0.7, "steps": 2, "draws": 2, "consistency": 0.3, "usable": usable}
    assert torch.allclose(natra_loss(model, images, y, transform, generator=seed("loss"), **options), expected)
    nothing = natra_loss(model, images, y, transform, usable=torch.zeros(20, dtype=torch.bool), generator=seed("loss"))
    assert torch.allclose(nothing, F.cross_entropy(clean, y))


def test_pixel_attack_on_top_costs_more(transform, images):
    model, y = classifier(), torch.arange(20) % 3
    plain, both = (
        natra_loss(model, images, y, transform, pixel_eps=eps, generator=seed("pixel")).item() for eps in (0.0, 0.1)
    )
    assert both > plain


# --- training -------------------------------------------------------------------------------------------------------


def loader_of(images: Tensor, y: Tensor, *, shuffle: bool = True) -> DataLoader:
    data = TensorDataset(images, y, torch.arange(len(y)))
    return DataLoader(data, 8, shuffle=shuffle, generator=seed("order"))


def test_training_uses_the_codes_and_touches_no_generator(transform, encoder, images):
    y, before = torch.arange(20) % 3, copy.deepcopy(transform.generator_net.state_dict())
    calls = []
    handle = encoder.register_forward_hook(lambda *args: calls.append(1))
    model = classifier()
    weights = copy.deepcopy(model.state_dict())
    trained = train_natra(model, loader_of(images, y), transform, epochs=2, steps=1, draws=1, generator=seed("train"))
    handle.remove()
    assert not calls  # no image is inverted again
    assert all(torch.equal(v, transform.generator_net.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is None for p in transform.generator_net.parameters())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in weights.items())
    assert not all(torch.equal(v, trained.state_dict()[k]) for k, v in weights.items())
    again = train_natra(model, loader_of(images, y), transform, epochs=2, steps=1, draws=1, generator=seed("train"))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in trained.state_dict().items())


def test_an_index_that_does_not_follow_the_data_set_is_caught(decoder, encoder, directions, images):
    codes = invert_batch(decoder, train_encoder(decoder, images, steps=200, generator=seed("e")), images, steps=150)
    moves, y = NaturalTransformation(decoder, codes, directions), torch.arange(20) % 3
    train_natra(classifier(), loader_of(images, y), moves, epochs=1, steps=1, generator=seed("ok"))
    with pytest.raises(InvalidInput, match="index does not follow"):
        train_natra(classifier(), loader_of(images.flip(0), y), moves, epochs=1, steps=1, generator=seed("bad"))
    with pytest.raises(InvalidInput, match="index does not follow"):
        train_natra(classifier(), loader_of(1 - images, y), moves, epochs=1, steps=1, generator=seed("bad"))
    pairs = DataLoader(TensorDataset(images, y), 8)
    with pytest.raises(InvalidInput, match="x, y, index"):
        train_natra(classifier(), pairs, moves, epochs=1, generator=seed("bad"))
    with pytest.raises(InvalidInput, match="20 images and the data set has 12"):
        train_natra(classifier(), loader_of(images[:12], y[:12]), moves, epochs=1, generator=seed("bad"))


def test_realism_tells_artefacts(images):
    real, rest = images[:10], images[10:]
    assert realism(rest, real, rest).ratio == pytest.approx(1.0)
    assert realism(torch.rand(10, 1, 8, 8, generator=seed("noise")), real, rest).ratio > 1.5


def test_treatment_trains_with_a_given_generator():
    task = digits(907, sizes=(100, 20, 50))
    vae = train_vae(task.train.x, steps=60, latent_dim=8, generator=seed("vae"))
    method = NaTra(k=4, num_codes=2, inversion_steps=10, reference_steps=60, psnr_floor=5.0, max_label_change=0.3)
    method.using(generator_net=vae.decoder, encoder=vae.encoder)
    model = seeded_build(lambda: small_cnn(task.input_shape, 10, widths=(8, 8)), seed("net"))
    run = fit(model, task, Training(steps=6), [method])
    (left,) = run.treatments
    assert isinstance(left, NaTra) and left.transform_ is not None and left.report_ is not None
    assert len(left.transform_) == 100 and left.transform_.codes.codes.shape[1:] == (2, 8)
    assert method.transform_ is None
    assert left.dropped_ == int((left.transform_.codes.psnr < 5.0).sum())


def test_a_given_encoder_lends_its_layers_to_the_inversion_as_a_trained_one_does():
    task = digits(907, sizes=(60, 20, 50))
    settings = {"k": 2, "latent_dim": 8, "num_codes": 2, "generator_steps": 30, "inversion_steps": 10, "reference_steps": 10, "psnr_floor": 1.0, "filter": False}  # fmt: skip
    model = seeded_build(lambda: small_cnn(task.input_shape, 10, widths=(8, 8)), seed("net"))
    made = train_vae(task.train.x, latent_dim=8, steps=30, bounds=task.bounds, generator=task.generator("natra/vae"))
    own, given = NaTra(**settings), NaTra(**settings).using(generator_net=made.decoder, encoder=made.encoder)
    blind = NaTra(**settings).using(generator_net=made.decoder, encoder=lambda x: made.encoder(x))
    for method in (own, given, blind):
        method.prepare(model, task)
    codes = [method.transform_.codes.codes for method in (own, given, blind) if method.transform_ is not None]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_generator_learns_and_takes_any_size():
    task = digits(908, sizes=(200, 20, 50))
    trained = train_vae(task.train.x, steps=150, latent_dim=8, generator=seed("vae"))
    with torch.no_grad():
        rebuilt = trained.decoder(trained.encoder(task.test.x))
    error, spread = (rebuilt - task.test.x).square().mean(), (task.test.x - task.train.x.mean(0)).square().mean()
    assert float(error) < 0.6 * float(spread)
    odd = image_decoder(3, (3, 9, 14), bounds=(-1.0, 1.0))
    made = odd(rand(2, 3, dtype=torch.float32))
    assert made.shape == (2, 3, 9, 14) and float(made.abs().max()) <= 1
    assert ImageEncoder((3, 9, 14), 5)(made).shape == (2, 5)


# --- bad input ------------------------------------------------------------------------------------------------------


def test_bad_input(decoder, encoder, images, codes, directions, transform):
    with pytest.raises(InvalidInput, match=r"makes images \[1, 8, 8\]"):
        invert_batch(decoder, encoder, torch.rand(2, 1, 9, 9))
    with pytest.raises(InvalidInput, match="rescale"):
        invert_batch(decoder, encoder, images * 255)
    with pytest.raises(InvalidInput, match="finite"):
        invert_batch(decoder, encoder, images / 0)
    with pytest.raises(InvalidInput, match="encoder must give codes"):
        invert_batch(decoder, lambda x: x.flatten(1), images)
    with pytest.raises(InvalidInput, match="channel weights"):
        invert_batch(decoder, encoder, images, num_codes=2, channel_weights=False)
    with pytest.raises(InvalidInput, match="k = 7 directions do not fit into 6"):
        attribute_directions(decoder, k=7)
    for wrong in (0.0, -1.0, float("nan"), torch.tensor([1.0, 0.0, 1.0])):
        with pytest.raises(InvalidInput, match="alpha_max must be positive"):
            NaturalTransformation(decoder, codes, directions, wrong)
    with pytest.raises(InvalidInput, match="residual=True needs x"):
        NaturalTransformation(decoder, codes, directions, residual=True)
    with pytest.raises(InvalidInput, match="invert it again"):
        NaturalTransformation(decoder, codes, directions, x=images[:5])
    with pytest.raises(InvalidInput, match="different generators"):
        NaturalTransformation(decoder, codes, Directions(torch.eye(2), torch.ones(2), torch.ones(2)))
    with pytest.raises(InvalidInput, match="labels"):
        natural_attack(classifier(), transform, torch.zeros(20))
    with pytest.raises(InvalidInput, match="NaN logits"):
        natural_attack(lambda x: x.flatten(1)[:, :3] * float("nan"), transform, torch.zeros(20, dtype=torch.int64))
    with pytest.raises(InvalidInput, match="mode must be"):
        natural_attack(classifier(), transform, torch.zeros(20, dtype=torch.int64), mode="worst")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="alpha_max"):
        NaTra(alpha_max=0.0)
    with pytest.raises(InvalidInput, match="k = 20 directions"):
        NaTra(k=20).check(classifier(), digits(0, sizes=(20, 5, 10)))


def test_vectors_are_refused():
    task = digits(0, sizes=(20, 5, 10))
    flat = task.changed(**{n: type(task.train)(s.x.flatten(1), s.y) for n, s in (("train", task.train), ("test", task.test))})  # fmt: skip
    with pytest.raises(Refused, match=r"images \[C, H, W\]"):
        NaTra().check(mlp((64,), 10), flat)
