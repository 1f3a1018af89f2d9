"""What every treatment and every instrument promises, as checks that raise `AssertionError`.

    from surefoot.contracts import check_treatment
    check_treatment(MyTreatment(), model, task)      your own method, before it goes into the catalogue

The test suite runs them over the catalogue. Each check is a plain function, so that a failing one can be called alone.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.core.finding import Finding
from surefoot.core.instrument import Instrument
from surefoot.core.subject import Subject, predict
from surefoot.core.task import Split, Task, Training
from surefoot.core.treatment import Treatment
from surefoot.errors import SurefootError
from surefoot.models.loading import load_saved, save_subject
from surefoot.training.loop import fit

SHORT = Training(epochs=2, batch_size=32, lr=2e-3)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def _same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def one_sentence(call: Callable[[], Any], what: str) -> None:
    """`call` must raise a `SurefootError` whose message is one short paragraph that ends in a full stop or question mark."""
    try:
        call()
    except SurefootError as error:
        text = str(error)
        _require(
            "\n" not in text and text.rstrip()[-1:] in ".?!" and len(text) < 400, f"{what}: not one sentence: {text!r}"
        )
        return
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__} instead of a SurefootError: {error}") from error
    raise AssertionError(f"{what}: accepted silently")


# --- treatments -----------------------------------------------------------------------------------------------------


def same_seed_same_result(treatment: Treatment, model: nn.Module, task: Task) -> None:
    first, second = (fit(model, task, SHORT, [treatment]).model for _ in range(2))
    _require(_same(_tensors(first), _tensors(second)), f"{treatment.slug}: two runs with one seed differ")


def leaves_the_caller_alone(treatment: Treatment, model: nn.Module, task: Task) -> None:
    """Model, treatment, data and the global random state are as they were."""
    weights, settings = _tensors(model), copy.deepcopy(treatment.settings())
    attributes, data, state = set(vars(treatment)), task.train.x.clone(), torch.get_rng_state()
    fit(model, task, SHORT, [treatment])
    _require(_same(weights, _tensors(model)), f"{treatment.slug}: changed the caller's model")
    _require(
        treatment.settings() == settings and set(vars(treatment)) == attributes, f"{treatment.slug}: changed itself"
    )
    _require(torch.equal(data, task.train.x), f"{treatment.slug}: changed the caller's data")
    _require(torch.equal(state, torch.get_rng_state()), f"{treatment.slug}: moved the global random state")


def settings_round_trip(treatment: Treatment, model: nn.Module, task: Task) -> None:
    settings = treatment.settings()
    read = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(json.dumps(settings)).items()}
    _require(type(treatment)(**read).settings() == settings, f"{treatment.slug}: settings do not survive JSON")


def saved_and_loaded(treatment: Treatment, model: nn.Module, task: Task, recipe: Mapping[str, Any]) -> None:
    """The finished model, saved and loaded through `model.json`, gives the same logits."""
    run = fit(model, task, SHORT, [treatment])
    subject = Subject(run.model, "contract", task.modality, task.input_shape, task.num_classes, task.bounds)
    with tempfile.TemporaryDirectory() as folder:
        save_subject(subject, Path(folder), recipe, run.treatments)
        loaded = load_saved(folder)
    expected, got = predict(run.model, task.test.x), predict(loaded.model, task.test.x)
    _require(torch.allclose(expected, got, atol=1e-5), f"{treatment.slug}: the loaded model gives other logits")


def resumes(treatment: Treatment, model: nn.Module, task: Task) -> None:
    """A run stopped after its first epoch and started again from the checkpoint ends where an undisturbed run ends."""

    class Stop(Exception):
        pass

    def stop(done: int, total: int, loss: float) -> None:
        raise Stop

    whole = fit(model, task, SHORT, [treatment])
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "run.pt"
        with contextlib.suppress(Stop):
            fit(model, task, SHORT, [treatment], checkpoint=checkpoint, progress=stop)
        resumed = fit(model, task, SHORT, [treatment], checkpoint=checkpoint)
    _require(_same(_tensors(whole.model), _tensors(resumed.model)), f"{treatment.slug}: a resumed run ends elsewhere")


def works_in_double(treatment: Treatment, model: nn.Module, task: Task) -> None:
    def double(split: Split) -> Split:
        return Split(split.x.double(), split.y, split.true_y)

    wide = task.changed(train=double(task.train), valid=double(task.valid), test=double(task.test))
    run = fit(copy.deepcopy(model).double(), wide, SHORT, [treatment])
    logits = predict(run.model, wide.test.x)
    _require(logits.dtype == torch.float64, f"{treatment.slug}: a float64 model came out as {logits.dtype}")
    _require(bool(torch.isfinite(logits).all()), f"{treatment.slug}: a float64 model gives NaN")


def works_on(device: torch.device, treatment: Treatment, model: nn.Module, task: Task) -> None:
    """Training there leaves everything there, and no NaN."""
    run = fit(model, task.changed(device=device), SHORT, [treatment])
    tensors = [*run.model.parameters(), *run.model.buffers()]
    _require(all(t.device == device for t in tensors), f"{treatment.slug}: left tensors elsewhere than on {device}")
    _require(bool(torch.isfinite(predict(run.model, task.test.x)).all()), f"{treatment.slug}: NaN on {device}")


def bad_input_is_refused(treatment: Treatment, model: nn.Module, task: Task) -> None:
    """Empty, NaN, wrong shape and wrong labels each give one clear sentence."""
    train = task.train
    poisoned = train.x.clone()
    poisoned[0] = math.nan
    labels = train.labels.clone()
    labels[0] = task.num_classes
    cases = {
        "an empty training split": Split(train.x[:0], train.labels[:0]),
        "NaN inputs": Split(poisoned, train.y),
        "inputs of another shape": Split(train.x[..., :-1], train.y),
        "a label outside the classes": Split(train.x, labels),
        "missing labels": Split(train.x, None),
    }
    for what, split in cases.items():
        one_sentence(lambda s=split: fit(model, task.changed(train=s), SHORT, [treatment]), f"{treatment.slug}: {what}")


def composes_or_refuses(first: Treatment, second: Treatment, model: nn.Module, task: Task) -> None:
    """Two treatments either train together to finite logits, or are refused with one sentence."""
    try:
        run = fit(model, task, SHORT, [first, second])
    except SurefootError:
        one_sentence(lambda: fit(model, task, SHORT, [first, second]), f"{first.slug} with {second.slug}")
        return
    logits = predict(run.model, task.test.x)
    _require(
        logits.shape == (len(task.test), task.num_classes),
        f"{first.slug} with {second.slug}: logits {tuple(logits.shape)}",
    )
    _require(bool(torch.isfinite(logits).all()), f"{first.slug} with {second.slug}: NaN logits")


TREATMENT_CHECKS = (
    same_seed_same_result,
    leaves_the_caller_alone,
    settings_round_trip,
    resumes,
    works_in_double,
    bad_input_is_refused,
)


def check_treatment(
    treatment: Treatment, model: nn.Module, task: Task, recipe: Mapping[str, Any] | None = None
) -> None:
    """All checks of a treatment that fit this machine; `recipe` (see `load_model`) adds saving and loading."""
    for contract in TREATMENT_CHECKS:
        contract(treatment, model, task)
    if recipe is not None:
        saved_and_loaded(treatment, model, task, recipe)
    if torch.cuda.is_available():
        works_on(torch.device("cuda", 0), treatment, model, task)


# --- instruments ----------------------------------------------------------------------------------------------------


def _numbers(finding: Finding) -> tuple[Any, ...]:
    return (finding.name, finding.value, finding.low, finding.high, finding.n, *(_numbers(p) for p in finding.parts))


def same_seed_same_finding(instrument: Instrument, subject: Subject, task: Task) -> None:
    first, second = (_numbers(instrument.measure(subject, task)) for _ in range(2))
    _require(repr(first) == repr(second), f"{instrument.slug}: two measurements with one seed differ")


def leaves_the_subject_alone(instrument: Instrument, subject: Subject, task: Task) -> None:
    subject.model.train()
    for module in list(subject.model.modules())[1::3]:
        module.training = False
    flags = [m.training for m in subject.model.modules()]
    weights, data, state = _tensors(subject.model), task.test.x.clone(), torch.get_rng_state()
    try:
        instrument.measure(subject, task)
        _require(_same(weights, _tensors(subject.model)), f"{instrument.slug}: changed the model")
        _require(flags == [m.training for m in subject.model.modules()], f"{instrument.slug}: changed training flags")
        _require(all(p.grad is None for p in subject.model.parameters()), f"{instrument.slug}: left gradients behind")
        _require(all(p.requires_grad for p in subject.model.parameters()), f"{instrument.slug}: froze parameters")
        _require(torch.equal(data, task.test.x), f"{instrument.slug}: changed the data")
        _require(torch.equal(state, torch.get_rng_state()), f"{instrument.slug}: moved the global random state")
    finally:
        subject.model.eval()


def finding_is_whole(instrument: Instrument, subject: Subject, task: Task) -> None:
    """Interval around the value, samples whose mean is the value, a sentence, JSON."""
    finding = instrument.measure(subject, task)
    _require(finding.instrument == instrument.slug, f"{instrument.slug}: signs as {finding.instrument}")
    _require(
        finding.sentence.strip()[-1:] in ".!?", f"{instrument.slug}: its sentence does not end: {finding.sentence!r}"
    )
    json.dumps(finding.to_dict())
    for part in (finding, *finding.parts):
        _require(part.n > 0, f"{instrument.slug}/{part.name}: no examples")
        inside = part.low <= part.value + 1e-9 and part.value <= part.high + 1e-9
        _require(inside, f"{instrument.slug}/{part.name}: {part.value} outside [{part.low}, {part.high}]")
        if part.samples is not None:
            mean = float(part.samples.mean())
            _require(math.isclose(mean, part.value, abs_tol=1e-6), f"{instrument.slug}/{part.name}: value {part.value}, mean of samples {mean}")  # fmt: skip


def measures_in_double(instrument: Instrument, subject: Subject, task: Task) -> None:
    wide = task.changed(
        **{name: Split(getattr(task, name).x.double(), getattr(task, name).y) for name in ("train", "valid", "test")}
    )
    finding = instrument.measure(subject.with_model(copy.deepcopy(subject.model).double()), wide)
    _require(math.isfinite(finding.value), f"{instrument.slug}: {finding.value} for a float64 model")


def measures_on(device: torch.device, instrument: Instrument, subject: Subject, task: Task) -> None:
    there = subject.with_model(copy.deepcopy(subject.model).to(device))
    finding = instrument.measure(there, task.changed(device=device))
    _require(math.isfinite(finding.value), f"{instrument.slug}: {finding.value} on {device}")


def unlabelled_is_said(instrument: Instrument, subject: Subject, task: Task) -> None:
    bare = task.changed(**{n: Split(getattr(task, n).x, None) for n in ("train", "valid", "test")})
    reason = instrument.unfit(subject, bare)
    if reason is not None:
        _require(reason.strip()[-1:] in ".!?", f"{instrument.slug}: the reason does not end: {reason!r}")
        return
    _require(math.isfinite(instrument.measure(subject, bare).value), f"{instrument.slug}: NaN without labels")


class _Nan(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * math.nan


def nan_model_is_refused(instrument: Instrument, subject: Subject, task: Task) -> None:
    """A model that answers NaN is refused with one sentence, by `unfit` or by `measure`; or the model is not looked at."""
    broken = subject.with_model(_Nan(copy.deepcopy(subject.model)))
    if instrument.unfit(broken, task) is not None or not instrument.reads_model:
        return
    one_sentence(lambda: instrument.measure(broken, task), f"{instrument.slug}: a model that answers NaN")


INSTRUMENT_CHECKS = (
    same_seed_same_finding,
    leaves_the_subject_alone,
    finding_is_whole,
    measures_in_double,
    unlabelled_is_said,
    nan_model_is_refused,
)


def check_instrument(instrument: Instrument, subject: Subject, task: Task) -> None:
    """All checks of an instrument."""
    for contract in INSTRUMENT_CHECKS:
        contract(instrument, subject, task)
    if torch.cuda.is_available():
        measures_on(torch.device("cuda", 0), instrument, subject, task)
