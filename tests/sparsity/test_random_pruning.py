"""Random pruning: densities, masks, training with zeros that stay, and the treatment."""

import copy
import math

import pytest
import torch
from torch import nn

from surefoot.core.task import Training
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput, Refused
from surefoot.models.networks import mlp, seeded_build, small_cnn, small_resnet
from surefoot.sparsity.random_pruning import (
    RandomPruning,
    apply_masks_,
    finalize_,
    layer_densities,
    maskable_weights,
    random_masks,
    random_prune_,
    score_masks,
    sparsity_report,
    weight_scores,
)
from surefoot.sparsity.random_pruning.densities import Rule
from surefoot.training.loop import fit

CONV = {"conv1": (16, 3, 3, 3), "conv2": (32, 16, 3, 3), "conv3": (64, 32, 3, 3), "fc": (10, 64)}
MLP = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
RULES: list[Rule] = ["uniform", "uniform_plus", "er", "erk", "erk_plus"]


def build(factory=None, seed=0):
    factory = factory or (lambda: small_cnn((1, 8, 8), 10, widths=(8, 16, 16)))
    return seeded_build(factory, torch.Generator().manual_seed(seed))


def batch(n=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def task():
    return digits(0, sizes=(256, 64, 64))


# --- densities


@pytest.mark.parametrize(
    ("density", "expected", "eps"),
    [
        (0.5, [1, 0.82512, 0.38964, 1], 70.4103),
        (0.2, [1, 0.28173, 0.13304, 1], 24.0410),
        (0.1, [0.56630, 0.11468, 0.05415, 1], 9.7856),
        (0.05, [0.27360, 0.05540, 0.02616, 0.54666], 4.7278),
    ],
)
def test_erk_worked_example_of_a_convnet(density, expected, eps):
    found = layer_densities(CONV, density, "erk")
    assert list(found.values()) == pytest.approx(expected, abs=5e-6)
    ratio = sum(CONV["conv3"]) / math.prod(CONV["conv3"])
    assert found["conv3"] / ratio == pytest.approx(eps, abs=5e-5)


@pytest.mark.parametrize(("density", "expected"), [(0.1, [0.07957, 0.23019, 1.0]), (0.05, [0.03848, 0.11133, 0.91851])])
def test_erk_worked_example_of_an_mlp_where_it_equals_er(density, expected):
    found = layer_densities(MLP, density, "erk")
    assert list(found.values()) == pytest.approx(expected, abs=5e-6)
    assert found == layer_densities(MLP, density, "er")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("density", [0.05, 0.1, 0.37, 0.8, 1.0])
@pytest.mark.parametrize("shapes", [CONV, MLP])
def test_every_rule_meets_the_budget(rule, density, shapes):
    found = layer_densities(shapes, density, rule)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert sum(found[n] * sizes[n] for n in sizes) == pytest.approx(density * sum(sizes.values()), rel=1e-9)
    assert all(0 < value <= 1 for value in found.values())


def test_er_ignores_the_kernel_and_power_sharpens():
    er = layer_densities(CONV, 0.05, "er")
    assert er["conv2"] / er["conv3"] == pytest.approx(((32 + 16) / (32 * 16)) / ((64 + 32) / (64 * 32)))
    flat = layer_densities(CONV, 0.05, "erk", power=0.0)
    assert list(flat.values()) == pytest.approx([0.05] * 4)


def test_fixed_layers_of_the_plus_rules():
    found = layer_densities(CONV, 0.1, "uniform_plus")
    assert (found["conv1"], found["fc"]) == (1.0, 0.2)
    assert found["conv2"] == found["conv3"]
    assert layer_densities(CONV, 0.5, "uniform_plus")["fc"] == 0.5  # at most 80 % sparse
    plus = layer_densities(CONV, 0.1, "erk_plus", fc_density=0.3)
    assert plus["fc"] == 0.3
    assert plus["conv2"] / plus["conv3"] == pytest.approx((32 + 16 + 6) / (32 * 16) / ((64 + 32 + 6) / (64 * 32)))
    assert layer_densities(CONV, 0.1, "erk_plus")["fc"] == 1.0


def test_uniform_plus_below_its_fixed_layers_names_the_smallest_density():
    """The trial's net at width 8: 2 % is infeasible, 3 % leaves the middle layers 0.2 %."""
    net = {"c1": (8, 1, 3, 3), "c2": (16, 8, 3, 3), "c3": (16, 16, 3, 3), "fc": (10, 16)}
    with pytest.raises(InvalidInput, match=r"must be above 0\.02"):
        layer_densities(net, 0.02, "uniform_plus")
    assert layer_densities(net, 0.03, "uniform_plus")["c2"] == pytest.approx(0.002, abs=5e-4)
    fixed_heavy = {"c1": (64, 3, 7, 7), "c2": (4, 4, 1, 1), "fc": (10, 64)}
    with pytest.raises(InvalidInput, match="must be above") as error:
        layer_densities(fixed_heavy, 0.5, "uniform_plus")
    least = float(str(error.value).rsplit(" ", 1)[1].rstrip("."))
    assert min(layer_densities(fixed_heavy, least + 1e-4, "uniform_plus").values()) > 0


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
def test_density_outside_the_unit_interval(density):
    with pytest.raises(InvalidInput, match=r"density must lie in \(0, 1\]"):
        layer_densities(CONV, density)


def test_other_bad_input_of_densities():
    with pytest.raises(InvalidInput, match="rule must be one of"):
        layer_densities(CONV, 0.1, "magnitude")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="no convolution or linear weight"):
        layer_densities(nn.ReLU(), 0.1)
    with pytest.raises(InvalidInput, match="give it a model, a batch"):
        layer_densities(build(), 0.1, "snip")
    with pytest.raises(InvalidInput, match="in one of the two only"):
        layer_densities(CONV, 0.1, {"conv1": 0.5})
    with pytest.raises(InvalidInput, match="fc_density"):
        layer_densities(CONV, 0.9999, "erk_plus", fc_density=0.1)
    with pytest.raises(InvalidInput, match="fixes every layer"):
        layer_densities({"fc": (10, 4)}, 0.5, "erk_plus")


# --- masks


@pytest.mark.parametrize("rule", RULES)
def test_exact_masks_have_exactly_the_budget(rule):
    model = build()
    masks = random_masks(model, layer_densities(model, 0.137, rule), generator=generator())
    total = sum(weight.numel() for weight in maskable_weights(model).values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.137 * total)


def test_masks_depend_on_the_seed_only_and_not_on_the_order_of_layers():
    class Net(nn.Module):
        def __init__(self, order):
            super().__init__()
            for name in order:
                setattr(self, name, nn.Linear(20, 30) if name == "a" else nn.Linear(30, 5))

    one, two = Net("ab"), Net("ba")
    densities = {"a.weight": 0.3, "b.weight": 0.2}
    first, second = (random_masks(net, densities, generator=generator(5)) for net in (one, two))
    other = random_masks(one, densities, generator=generator(6))
    assert all(torch.equal(first[name], second[name]) for name in densities)
    assert not torch.equal(first["a.weight"], other["a.weight"])
    again = random_masks(one.double(), densities, generator=generator(5))
    assert all(torch.equal(first[name], again[name]) for name in densities)


def test_bernoulli_masks_are_at_the_density_within_sampling_error():
    model = nn.Sequential(nn.Linear(200, 300))
    mask = random_masks(model, {"0.weight": 0.1}, exact=False, generator=generator())["0.weight"]
    n = mask.numel()
    assert abs(mask.double().mean().item() - 0.1) < 4 * math.sqrt(0.1 * 0.9 / n)
    assert int(mask.sum()) != round(0.1 * n)


def test_no_layer_and_no_unit_is_emptied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 100), nn.Linear(100, 100))
    densities = {"0.weight": 0.0, "1.weight": 0.01, "2.weight": 0.02}
    total = round(0.01 * 400 + 0.02 * 10_000)
    masks = random_masks(model, densities, generator=generator(), min_per_layer=3)
    assert int(masks["0.weight"].sum()) == 3
    assert sum(int(mask.sum()) for mask in masks.values()) == total  # the largest layer paid
    by_unit = random_masks(model, densities, generator=generator(), min_per_unit=1)
    assert all(bool(mask.any(1).all()) for mask in by_unit.values())
    assert sum(int(mask.sum()) for mask in by_unit.values()) == total
    bernoulli = random_masks(model, densities, exact=False, generator=generator(), min_per_layer=2)
    assert all(int(mask.sum()) >= 2 for mask in bernoulli.values())


def test_density_one_is_all_ones():
    model = build()
    for rule in RULES:
        masks = random_masks(model, layer_densities(model, 1.0, rule), generator=generator())
        assert all(bool(mask.all()) for mask in masks.values())


def test_depthwise_convolutions_become_nearly_dense_under_erk():
    found = layer_densities({"dw": (64, 1, 3, 3), "pw": (128, 64, 1, 1), "fc": (10, 128)}, 0.4, "erk")
    assert found["dw"] == 1.0 and found["pw"] < 0.4


@pytest.mark.parametrize("rule", ["snip", "grasp"])
def test_score_rules_keep_the_ratio_and_redraw_the_positions(rule):
    model = build(lambda: mlp((1, 8, 8), 10, hidden=(60,)))
    before = copy.deepcopy(model.state_dict())
    loss = nn.functional.cross_entropy
    densities = layer_densities(model, 0.2, rule, loss_fn=loss, batch=batch())
    own = score_masks(weight_scores(model, loss, batch(), rule), 0.2)
    drawn = random_masks(model, densities, generator=generator(3))
    for name, share in densities.items():
        assert int(drawn[name].sum()) == int(own[name].sum())
        k, n = int(own[name].sum()), own[name].numel()
        overlap = int((drawn[name] & own[name]).sum())  # hypergeometric, mean k^2 / n
        deviation = math.sqrt(k * share * (1 - share) * (n - k) / (n - 1))
        assert abs(overlap - k * share) <= 3 * deviation
    assert sum(int(mask.sum()) for mask in own.values()) == round(0.2 * sum(m.numel() for m in own.values()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_snip_and_grasp_scores_of_a_quadratic():
    """loss = (w.x)^2 / 2 with x = (1, 2), w = (3, -1): g = (1, 2), H g = x (x.g) = (5, 10)."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, -1.0]]))
    data = (torch.tensor([[1.0, 2.0]]), torch.zeros(1))
    loss = lambda out, _: 0.5 * out.square().sum()  # noqa: E731
    assert weight_scores(model, loss, data, "snip")["weight"].tolist() == [[3.0, 2.0]]
    # energy g.stop(g): its gradient is H g; kept are the smallest -w (H g), that is the largest w (H g)
    assert weight_scores(model, loss, data, "grasp")["weight"].tolist() == [[15.0, -10.0]]


# --- masks at work


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=5e-4),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=1e-1),
}


def train_steps(model, optimizer, steps=5, clip=None):
    for step in range(steps):
        x, y = batch(seed=step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_pruned_weights_and_their_state_stay_exactly_zero(kind, clip):
    model = build()
    optimizer = OPTIMIZERS[kind](model.parameters())
    train_steps(model, optimizer, 2)  # state from dense steps must be cleared too
    handle = random_prune_(model, 0.1, generator=generator()).attach(optimizer)
    start = {name: weight.detach().clone() for name, weight in maskable_weights(model).items()}
    train_steps(model, optimizer, clip=clip)
    for name, mask in handle.masks().items():
        weight = maskable_weights(model)[name]
        pruned = mask == 0
        assert bool((weight[pruned] == 0).all())
        assert bool((weight[~pruned] != start[name][~pruned]).any())
        for value in optimizer.state[weight].values():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                assert bool((value[pruned] == 0).all())
    assert handle.density() == pytest.approx(0.1, abs=5e-4)


def test_masks_survive_save_and_load_and_finalize_leaves_a_plain_model(tmp_path):
    model = build()
    handle = random_prune_(model, 0.2, generator=generator())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    handle.attach(optimizer)
    train_steps(model, optimizer)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = build(seed=9)
    other_handle = random_prune_(other, 0.2, generator=generator(9))
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(handle.masks().values(), other_handle.masks().values()))
    train_steps(other, OPTIMIZERS["sgd"](other.parameters()), 0)
    x, _ = batch()
    model.eval()
    before, zeros = model(x), {name: weight == 0 for name, weight in maskable_weights(model).items()}
    names = set(build().state_dict())
    handle.remove()
    assert set(model.state_dict()) == names
    assert torch.equal(model(x), before)
    assert all(torch.equal(weight == 0, zeros[name]) for name, weight in maskable_weights(model).items())
    finalize_(other)
    assert set(other.state_dict()) == names
    # the hooks are gone: the next steps fill the zeros
    train_steps(model.train(), optimizer, 1)
    assert sparsity_report(model).density > 0.9


def test_scale_init_divides_by_the_root_of_the_density():
    plain, scaled = build(), build()
    random_prune_(plain, 0.25, "uniform", generator=generator())
    random_prune_(scaled, 0.25, "uniform", generator=generator(), scale_init=True)
    report = sparsity_report(plain).densities
    for name, weight in maskable_weights(plain).items():
        assert torch.allclose(maskable_weights(scaled)[name], weight / math.sqrt(report[name]))


def test_report_counts_nonzero_weights():
    model = build()
    random_prune_(model, 0.2, generator=generator())
    report = sparsity_report(model)
    assert sum(report.kept.values()) == round(0.2 * sum(report.sizes.values()))
    assert report.densities == pytest.approx(layer_densities(model, 0.2), abs=0.02)


def test_bad_masks_and_optimizers():
    model = build()
    masks = random_masks(model, layer_densities(model, 0.5), generator=generator())
    name, mask = next(iter(masks.items()))
    with pytest.raises(InvalidInput, match="no parameter"):
        apply_masks_(model, {"nowhere.weight": mask})
    with pytest.raises(InvalidInput, match="has shape"):
        apply_masks_(model, {name: mask[:1]})
    handle = apply_masks_(model, masks)
    with pytest.raises(InvalidInput, match="masked already"):
        apply_masks_(model, masks)
    with pytest.raises(InvalidInput, match="does not hold"):
        handle.attach(torch.optim.SGD(build().parameters(), 0.1))
    tied = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    tied[1].weight = tied[0].weight
    assert list(maskable_weights(tied)) == ["0.weight"]
    with pytest.raises(InvalidInput, match="one tied weight"):
        apply_masks_(tied, {"0.weight": torch.ones(5, 5), "1.weight": torch.ones(5, 5)})


# --- the treatment


@pytest.mark.parametrize("rule", ["erk", "uniform_plus", "snip"])
def test_treatment_leaves_a_plain_model_with_the_budget_met(task, rule):
    model = build(lambda: small_resnet((1, 8, 8), 10, widths=(8, 16)))
    run = fit(
        model,
        task,
        Training(epochs=2, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4),
        [RandomPruning(0.2, rule)],
    )
    report = sparsity_report(run.model)
    assert sum(report.kept.values()) <= round(0.2 * sum(report.sizes.values()))
    assert report.density == pytest.approx(0.2, abs=2e-3)
    assert set(run.model.state_dict()) == set(model.state_dict())
    again = fit(
        model,
        task,
        Training(epochs=2, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4),
        [RandomPruning(0.2, rule)],
    )
    assert all(torch.equal(a, b) for a, b in zip(run.model.state_dict().values(), again.model.state_dict().values()))
    assert sparsity_report(model).density > 0.99  # the caller's model is untouched
    fresh = RandomPruning(0.2, rule).rebuild(
        build(lambda: small_resnet((1, 8, 8), 10, widths=(8, 16)), seed=4), run.treatments[0].structure()
    )
    fresh.load_state_dict(run.model.state_dict())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_density_one_trains_bit_identically_to_dense(task, optimizer):
    training = Training(epochs=2, optimizer=optimizer, weight_decay=1e-3)
    dense = fit(build(), task, training).model.state_dict()
    pruned = fit(build(), task, training, [RandomPruning(1.0)]).model.state_dict()
    assert all(torch.equal(value, pruned[name]) for name, value in dense.items())


def test_a_killed_run_goes_on_with_the_same_masks(task, tmp_path):
    training = Training(epochs=3, optimizer="sgd", lr=0.1, momentum=0.9)
    whole = fit(build(), task, training, [RandomPruning(0.2)]).model.state_dict()

    def stop(done, steps, loss):
        if done >= steps // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(build(), task, training, [RandomPruning(0.2)], checkpoint=tmp_path / "run.pt", progress=stop)
    resumed = fit(build(), task, training, [RandomPruning(0.2)], checkpoint=tmp_path / "run.pt").model.state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_treatment_checks_before_training(task):
    with pytest.raises(InvalidInput, match="density"):
        RandomPruning(0.0).check(build(), task)
    with pytest.raises(InvalidInput, match="no convolution or linear weight"):
        RandomPruning().check(nn.Flatten(), task)
    parametrized = build()
    nn.utils.parametrizations.weight_norm(parametrized.get_submodule("0"))
    with pytest.raises(Refused, match="parametrized"):
        RandomPruning().check(parametrized, task)


def test_global_generator_is_left_alone(task):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    random_prune_(build(), 0.2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10))
    weight_scores(model, nn.functional.cross_entropy, batch(), "snip")
    fit(build(), task, Training(epochs=1), [RandomPruning(0.2)])
    state_after = torch.get_rng_state()
    torch.manual_seed(3)
    nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10))
    assert torch.equal(torch.get_rng_state(), state_after)
    assert not torch.equal(state, state_after)  # building the net above did draw
