"""Every treatment and instrument of the catalogue keeps its promises, and broken ones are caught."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import nn

from surefoot import catalog, contracts
from surefoot.core.finding import Finding
from surefoot.core.instrument import Instrument
from surefoot.core.subject import Subject
from surefoot.core.task import Task, Training
from surefoot.core.treatment import Treatment
from surefoot.datasets.embedded import digits
from surefoot.errors import Refused, SurefootError
from surefoot.models import Normalized, mlp, seeded_build, small_cnn
from surefoot.models.loading import channel_statistics
from surefoot.training.loop import fit

TREATMENTS = [m.slug for m in catalog.methods() if m.treatment]
INSTRUMENTS = [i.slug for i in catalog.instruments()]


@pytest.fixture(scope="module")
def task() -> Task:
    return digits(3, sizes=(128, 48, 64)).changed(budget="quick")


@pytest.fixture(scope="module")
def model(task: Task) -> nn.Module:
    mean, std, dims = channel_statistics(task.train.x)
    network = seeded_build(lambda: small_cnn(task.input_shape, 10), task.generator("model"))
    return Normalized(network, mean, std, dims=dims)


@pytest.fixture(scope="module")
def recipe(task: Task) -> dict[str, object]:
    mean, std, dims = channel_statistics(task.train.x)
    shape = list(task.input_shape)
    return {"kind": "embedded", "name": "small_cnn", "input_shape": shape, "num_classes": 10, "mean": mean, "std": std, "dims": dims}  # fmt: skip


@pytest.fixture(scope="module")
def subject(task: Task, model: nn.Module) -> Subject:
    run = fit(model, task, Training(epochs=12, lr=3e-3))
    return Subject(run.model, "digits", "image", task.input_shape, 10)


# Methods that refuse a plain image classifier keep their promises on the kind of model that they are for.


@cache
def two_views() -> tuple[Task, nn.Module]:
    from surefoot.certified import crmt

    task = crmt.two_view_digits(3, sizes=(128, 48, 64)).changed(budget="quick")
    return task, seeded_build(lambda: crmt.two_branch([[64], [40]], 10, width=16), task.generator("model"))


@cache
def components() -> tuple[Task, nn.Module]:
    from surefoot.certified.prototype_rbf import PrototypeRBF

    task = digits(3, sizes=(128, 48, 64)).changed(budget="quick")
    net = seeded_build(lambda: small_cnn(task.input_shape, 10), task.generator("model"))
    return task, fit(net, task, Training(epochs=4, lr=3e-3), [PrototypeRBF()]).model


@cache
def small_mlp() -> tuple[Task, nn.Module]:
    task = digits(3, sizes=(128, 48, 64)).changed(budget="quick")
    return task, seeded_build(lambda: mlp(task.input_shape, 10, hidden=(16, 16)), task.generator("model"))


WORLDS = {"nap": small_mlp, "crmt": two_views, "modalities": two_views, "components": components}


@pytest.mark.parametrize("contract", contracts.TREATMENT_CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("slug", TREATMENTS)
def test_treatment(slug, contract, model, task):
    task, model = WORLDS[slug]() if slug in WORLDS else (task, model)
    contract(catalog.make_treatment(slug), model, task)


@pytest.mark.parametrize("slug", [s for s in TREATMENTS if s not in WORLDS])
def test_treatment_saved_and_loaded(slug, model, task, recipe):
    contracts.saved_and_loaded(catalog.make_treatment(slug), model, task, recipe)


@pytest.mark.parametrize("slug", [s for s in TREATMENTS if s in WORLDS])
def test_treatment_refuses_a_plain_classifier(slug, model, task):
    with pytest.raises(Refused):
        catalog.make_treatment(slug).check(model, task)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"), list(itertools.combinations([s for s in TREATMENTS if s not in WORLDS], 2))
)
def test_pairs_compose_or_refuse(first, second, model, task):
    contracts.composes_or_refuses(catalog.make_treatment(first), catalog.make_treatment(second), model, task)


@pytest.mark.parametrize("contract", contracts.INSTRUMENT_CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("slug", INSTRUMENTS)
def test_instrument(slug, contract, subject, task):
    if slug in WORLDS:
        assert catalog.make_instrument(slug).unfit(subject, task)
        task, model = WORLDS[slug]()
        run = fit(model, task, Training(epochs=8, lr=3e-3))
        subject = Subject(run.model, slug, task.modality, task.input_shape, task.num_classes, task.bounds)
    contract(catalog.make_instrument(slug), subject, task)


# --- the suite can fail ---------------------------------------------------------------------------------------------


@dataclass
class Broken(Treatment):
    """Draws from the global generator, writes into the caller's data, keeps unsavable state, narrows to float32."""

    slug = "broken"
    sizes: tuple[int, ...] = (1,)
    note: object = None

    def prepare(self, model, task):
        with torch.no_grad():
            next(model.parameters()).add_(0.1 * torch.randn(1).item())
            task.train.x.mul_(0.999)
        return model.float(), task

    def settings(self):
        return {"sizes": self.sizes, "note": [self.note]}

    def before_step(self, model, optimizer, batch):
        self.count_ = getattr(self, "count_", 0) + 1
        for p in model.parameters():
            if p.grad is not None:
                p.grad *= self.count_

    def finish(self, model, task):
        return nn.Sequential(model, nn.Linear(task.num_classes, task.num_classes))


BROKEN = ["same_seed_same_result", "leaves_the_caller_alone", "settings_round_trip", "resumes"]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_treatment_is_caught(name, model):
    with pytest.raises(AssertionError):
        getattr(contracts, name)(Broken(), model, digits(3, sizes=(64, 32, 32)))


def test_a_broken_treatment_does_not_load(model, recipe):
    with pytest.raises(SurefootError, match="no method 'broken'"):
        contracts.saved_and_loaded(Broken(), model, digits(3, sizes=(64, 32, 32)), recipe)


class Careless(Instrument):
    """Unseeded noise, gradients left behind, an interval beside its value."""

    slug = "careless"
    title = "Careless"

    def measure(self, subject, task):
        subject.model(task.test.x[:4] + 0.1 * torch.randn_like(task.test.x[:4])).sum().backward()
        value = torch.rand(()).item()
        return Finding("other", "careless", value, value + 0.1, value + 0.2, "share", "higher", 4, "No end")


CARELESS = ["same_seed_same_finding", "leaves_the_subject_alone", "finding_is_whole", "nan_model_is_refused"]


@pytest.mark.parametrize("name", CARELESS)
def test_a_careless_instrument_is_caught(name, subject, task):
    with pytest.raises(AssertionError):
        getattr(contracts, name)(Careless(), subject, task)
    subject.model.zero_grad(set_to_none=True)
