"""Adversarial accuracy: the radius rule, a sound number, warnings where gradients are masked, and when it does not run."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from surefoot.audit.instruments.adversarial import EFFORT, LEAST, AdversarialAccuracy
from surefoot.audit.instruments.surrogate import undefended_surrogate
from surefoot.contracts import check_instrument
from surefoot.core.finding import Chart, Thumbnails
from surefoot.core.subject import Subject
from surefoot.core.task import Split, Task, Training
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput
from surefoot.models import small_cnn
from surefoot.training.loop import fit


@pytest.fixture(scope="module")
def trained() -> tuple[Subject, Task]:
    task = digits(0, sizes=(600, 50, 200)).changed(budget="quick")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_cnn(task.input_shape, 10)
    run = fit(model, task, Training(epochs=10, lr=3e-3))
    return Subject(run.model, "digits", "image", task.input_shape, 10), task


def test_headline_parts_and_pictures(trained):
    subject, task = trained
    found = AdversarialAccuracy(eps=0.06).measure(subject, task)
    clean, *after = found.parts
    assert clean.name == "clean"
    assert [part.name for part in after] == ["after apgd-ce", "after apgd-t", "after fab-t", "after square"]
    values = [part.value for part in found.parts]
    assert values == sorted(values, reverse=True)
    assert found.value == values[-1]
    assert 0 < found.value < clean.value - 0.1
    assert found.n == EFFORT["quick"].examples
    assert found.low <= found.value <= found.high
    chart, images = found.pictures
    assert isinstance(chart, Chart)
    curve = chart.figure["data"][0]["y"]
    assert curve == sorted(curve, reverse=True)
    assert curve[0] > 0.9
    assert curve[-1] < 0.3
    assert isinstance(images, Thumbnails)
    assert len(images.images) == len(images.captions) == 12
    assert all(caption.startswith("taken for") for caption in images.captions[1::2])
    assert found.fix[0] == "fast_ibp"
    assert found.warnings == ()
    assert found.cost.passes is not None
    assert found.cost.passes > 1000


def test_zero_radius_is_plain_accuracy(trained):
    subject, task = trained
    found = AdversarialAccuracy(eps=0.0).measure(subject, task)
    assert found.value == found.parts[0].value


def test_radius_rule(trained):
    _, task = trained

    def rule(shape: tuple[int, ...], norm: str = "linf", bounds: tuple[float, float] = (0.0, 1.0)) -> float:
        split = Split(torch.rand(2, *shape), torch.zeros(2, dtype=torch.int64))
        return AdversarialAccuracy(norm=norm).radius(task.changed(test=split, bounds=bounds))  # type: ignore[arg-type]

    assert rule((3, 32, 32)) == 8 / 255
    assert rule((1, 28, 28)) == rule((12,)) == 0.1
    assert rule((1, 28, 28), bounds=(-1.0, 1.0)) == 0.2
    assert rule((3, 64, 64), "l2") == 0.5
    assert AdversarialAccuracy(eps=0.3).radius(task) == 0.3


class Masked(nn.Module):
    """Rounds the input: the gradient is exactly zero."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x * 16).round() / 16)


def test_masked_gradients_are_warned_of(trained):
    subject, task = trained
    found = AdversarialAccuracy(eps=0.1).measure(subject.with_model(Masked(subject.model)), task)
    assert found.warnings[0].startswith("Do not believe this accuracy")
    assert any("exactly zero" in warning for warning in found.warnings)
    assert any("Random search beats" in warning for warning in found.warnings)
    assert found.details["masking"]["zero_gradient"]["suspicious"]


def test_gradients_of_a_stand_in_see_through_the_mask(trained):
    subject, task = trained
    masked = subject.with_model(Masked(subject.model))
    naive = AdversarialAccuracy(eps=0.06).measure(masked, task)
    seen = AdversarialAccuracy(eps=0.06, attack_target=subject.model).measure(masked, task)
    assert seen.value < naive.value
    assert any("stand-in" in note for note in seen.details["notes"])


class Saturated(nn.Module):
    """Probabilities of logits times 10,000: whatever the loss, float32 leaves no gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return (1e4 * self.model(x)).softmax(1)


@pytest.fixture(scope="module")
def standard(trained) -> Task:
    return trained[1].changed(budget="standard", test=trained[1].test.take(slice(0, 60)))


@pytest.mark.parametrize("mask", [Masked, Saturated])
def test_transfer_from_an_undefended_net_sees_what_a_masked_model_hides(trained, standard, mask):
    subject, _ = trained
    found = AdversarialAccuracy().measure(subject.with_model(mask(subject.model)), standard)
    assert found.details["masking"]["transfer"]["suspicious"]
    assert any("undefended model beat" in warning for warning in found.warnings)


def test_transfer_does_not_accuse_an_honest_model(trained, standard):
    subject, _ = trained
    found = AdversarialAccuracy().measure(subject, standard)
    assert not found.details["masking"]["transfer"]["suspicious"]
    assert not any("undefended" in warning for warning in found.warnings)
    facts = found.details["transfer"]
    assert facts["accuracy"] > 0.85
    assert facts["examples"] == 600
    assert facts["training_passes"] == 300 * 64
    assert found.cost.passes is not None
    assert found.cost.passes > facts["training_passes"]


def test_the_transfer_check_says_why_it_was_left_out(trained, standard):
    subject, quick = trained
    assert "quick budget" in AdversarialAccuracy().measure(subject, quick).details["transfer"]["skipped"]
    empty = standard.changed(train=quick.train.take(slice(0, 3)))
    assert "training examples" in AdversarialAccuracy(eps=0.0).measure(subject, empty).details["transfer"]["skipped"]
    given = AdversarialAccuracy(eps=0.06, undefended=subject.model).measure(subject, quick)
    assert given.details["masking"]["transfer"]["suspicious"] is False
    large = Split(torch.zeros(40, 3, 80, 80), torch.zeros(40, dtype=torch.int64))
    assert "too large" in undefended_surrogate(subject, quick.changed(train=large), examples=50).reason


def test_the_stand_in_learns_predictions_where_there_are_no_labels(trained):
    subject, task = trained
    unlabelled = task.changed(train=Split(task.train.x))
    before = torch.random.get_rng_state()
    found, again = (undefended_surrogate(subject, unlabelled, examples=400, steps=60) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert found.taught_by == "predictions"
    assert found.accuracy > 0.5
    assert found.accuracy == again.accuracy
    assert found.model is not None
    assert again.model is not None
    assert torch.equal(found.model(task.test.x[:20]), again.model(task.test.x[:20]))


class Noisy(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + 0.1 * torch.randn_like(x))


def test_random_models_are_attacked_in_expectation(trained):
    subject, task = trained
    found = AdversarialAccuracy(eps=0.06).measure(subject.with_model(Noisy(subject.model)), task)
    assert found.details["decision"] == "majority"
    assert found.details["draws"] == 10
    assert any("random numbers" in warning for warning in found.warnings)
    assert found.value < found.parts[0].value - 0.05


class Costly(nn.Module):
    """A wide layer that changes nothing but the bill."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.wide = model, nn.Linear(64, 4096)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + 0.0 * self.wide(x.flatten(1)).sum(1, keepdim=True)


def test_a_costly_model_is_attacked_on_fewer_examples(trained):
    subject, task = trained
    effort, first = EFFORT["quick"], task.test.x[:1]
    cheap = AdversarialAccuracy()._affordable(subject, first, effort, task)
    costly = AdversarialAccuracy()._affordable(subject.with_model(Costly(subject.model)), first, effort, task)
    tiny = AdversarialAccuracy()._affordable(subject, first, replace(effort, flops=1.0), task)
    assert cheap == effort.examples
    assert costly <= cheap
    assert tiny == LEAST


def test_where_it_does_not_fit(trained):
    subject, task = trained
    instrument = AdversarialAccuracy()
    assert instrument.unfit(subject, task) is None
    assert "bounds" in (instrument.unfit(subject, task.changed(bounds=None)) or "")
    assert "labels" in (instrument.unfit(subject, task.changed(test=Split(task.test.x))) or "")
    with pytest.raises(InvalidInput, match="norm must be"):
        AdversarialAccuracy(norm="l1").measure(subject, task)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="eps must be"):
        AdversarialAccuracy(eps=-1.0).measure(subject, task)
    with pytest.raises(InvalidInput, match="within bounds"):
        AdversarialAccuracy().measure(subject, task.changed(test=Split(task.test.x * 3, task.test.y)))


def test_bounded_tables_are_attacked():
    x = torch.rand(300, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] + x[:, 1] > 1).long()
    split = Split(x, y)
    task = Task("table", split, split, split, 2, "vector", (0.0, 1.0), budget="quick")
    model = nn.Linear(6, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0] * 6, [4.0, 4.0, 0, 0, 0, 0]]))
        model.bias.copy_(torch.tensor([0.0, -4.0]))
    found = AdversarialAccuracy(eps=0.05).measure(Subject(model, "linear", "vector", (6,), 2), task)
    chosen = task.sample("adversarial", 128)
    exact = ((chosen.x[:, 0] + chosen.x[:, 1] - 1).abs() > 0.1).double().mean().item()  # w.x moves by eps ||w||_1
    assert found.value == pytest.approx(exact, abs=0.01)


def test_contract(trained):
    subject, task = trained
    check_instrument(AdversarialAccuracy(), subject, task.changed(test=task.test.take(slice(0, 40))))
