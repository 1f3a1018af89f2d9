"""`audit`, `harden`, `trial`, `evidence`: progress on the terminal, results on disk."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from surefoot import catalog
from surefoot.audit import Audit, all_instruments, audit
from surefoot.cli.show import STYLE, number
from surefoot.core.instrument import Instrument
from surefoot.core.subject import Subject
from surefoot.core.task import BudgetName, Split, Task, Training
from surefoot.datasets import load
from surefoot.datasets.noise import with_label_noise
from surefoot.errors import InvalidInput, SurefootError, check, check_at_least, check_non_negative, check_positive
from surefoot.harden import Hardened, check_hardenable, harden
from surefoot.models.files import first_line
from surefoot.models.loading import EFFICIENTNET, as_subject, load_exported, load_model, load_saved, read_facts
from surefoot.report import write_audit_report, write_evidence_page, write_harden_report
from surefoot.report.page import plain
from surefoot.training.loop import fit


@dataclass(frozen=True)
class Source:
    """The arguments that say which model and which data."""

    model: str
    data: str
    weights: Path | None
    data_dir: Path | None
    target: str | None
    budget: BudgetName
    seed: int
    device: str
    trust: bool


@dataclass(frozen=True)
class Loaded:
    subject: Subject
    task: Task
    recipe: dict[str, Any]
    trained: bool


def _err() -> Console:
    return Console(stderr=True)


def _bar(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def read_data(data: str, **options: Any) -> Task:
    """`load`, with whatever a person's file makes its reader raise said in one sentence."""
    try:
        return load(data, **options)
    except SurefootError:
        raise
    except Exception as error:
        raise InvalidInput(
            f"{data} cannot be read ({first_line(error)}); check that it is what its name says."
        ) from error


def load_source(source: Source) -> Loaded:
    """Model and data together: each says what the other must look like."""
    import torch

    for name, given in (("MODEL", source.model), ("--data", source.data)):
        check(bool(given.strip()), f"{name} is empty; name a {'model' if name == 'MODEL' else 'data set'}.")
    try:
        device = torch.device(source.device)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(
            f"device {source.device!r} cannot be used here; give cpu, or cuda where there is a GPU."
        ) from error
    path = Path(source.model).expanduser()
    saved = path.is_dir() or path.name == "model.json"
    shape, names = None, ()
    check(not saved or source.weights is None, f"{source.model} is a saved model and brings its own weights; leave --weights away.")  # fmt: skip
    if saved:
        facts = read_facts(path if path.is_dir() else path.parent)
        shape, names = tuple(facts["input_shape"]), tuple(facts.get("class_names", ()))
    elif source.model == EFFICIENTNET:
        shape = (3, 224, 224)
    elif path.suffix == ".pt2" and path.is_file():
        shape = load_exported(path)[1]
    task = read_data(
        source.data,
        seed=source.seed,
        data_dir=source.data_dir,
        target=source.target,
        input_shape=shape if shape is not None and len(shape) == 3 else None,
        class_names=names,
        budget=source.budget,
        device=device,
    )
    if saved:
        subject = load_saved(path)
        model, recipe, trained = subject.model, {"kind": "saved", "path": str(path)}, True
    else:
        model, recipe, trained = load_model(source.model, weights=source.weights, task=task, trust=source.trust)
    model = model.to(device)
    subject = as_subject(model, _name(source.model), task)
    return Loaded(subject, task, recipe, trained)


def usable_folder(folder: Path, option: str = "--out") -> None:
    """A folder that cannot be written is told of before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidInput(
            f"{option} {folder} cannot be written to ({error.strerror}); name another folder."
        ) from error


def _name(model: str) -> str:
    return Path(model).name if ("/" in model or "." in model) else model


def choose_instruments(only: str | None) -> list[Instrument]:
    """Instruments by slug, or by the family of the package they stand in."""
    everything = all_instruments()
    if only is None:
        return everything
    wanted = [w.strip() for w in only.split(",") if w.strip()]
    check(bool(wanted), "--only names nothing; name an instrument, or leave the option away.")
    chosen = []
    families = {i.slug: type(i).__module__.split(".")[1] for i in everything}
    for word in wanted:
        hits = [i for i in everything if word in (i.slug, families[i.slug])]
        hits = hits or [i for i in everything if i.slug.startswith(word)]
        known = ", ".join(i.slug for i in everything)
        check(bool(hits), f"--only names {word!r}, and there is no such instrument; there are {known}.")
        chosen += [h for h in hits if h.slug not in {c.slug for c in chosen}]
    return chosen


def _train_control(loaded: Loaded, training: Training, console: Console) -> Subject:
    """An embedded model comes untrained: train the plain control, and say so."""
    console.print(
        f"Training {loaded.subject.name} on {loaded.task.name} ({training.epochs} epochs, plain cross-entropy)."
    )
    with _bar(console) as bar:
        line = bar.add_task("training", total=None)
        run = fit(
            loaded.subject.model,
            loaded.task,
            training,
            progress=lambda done, total, loss: bar.update(
                line, completed=done, total=total, description=f"loss {loss:.3f}"
            ),
        )
    return loaded.subject.with_model(run.model)


def _recipe(train: Split, budget: BudgetName) -> Training:
    """Of an untrained model that is audited: 15 epochs, fewer where the budget allows fewer looks at examples."""
    looks = {"quick": 60_000, "standard": 300_000}.get(budget, 15 * len(train))
    return Training(epochs=min(15, max(1, looks // max(1, len(train)))), lr=2e-3)


def run_audit(source: Source, *, only: str | None, out: Path, as_json: bool) -> None:
    console = _err()
    instruments = choose_instruments(only)
    usable_folder(out)
    loaded = load_source(source)
    subject = loaded.subject
    if not loaded.trained:
        subject = _train_control(loaded, _recipe(loaded.task.train, source.budget), console)
    with _bar(console) as bar:
        line = bar.add_task("auditing", total=len(instruments))
        result = audit(
            subject,
            loaded.task,
            instruments,
            progress=lambda title, done, total: bar.update(line, completed=done, description=title),
        )
    page = write_audit_report(result, out)
    if as_json:
        print(json.dumps(plain(result.to_dict()), indent=1))
    else:
        print_audit(result, console)
        console.print(f"\nReport: {page}")


def print_audit(result: Audit, console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", "value", "95 % interval", "in words"):
        table.add_column(column)
    for f in result.findings:
        table.add_row(f.name, f"{number(f.value)} {f.unit}", f"{number(f.low)} to {number(f.high)}", f.sentence)
    console.print(table)
    for s in result.skipped:
        console.print(f"[dim]{s.title}: not measured. {s.reason}[/]")


def run_harden(
    source: Source,
    stack: str,
    training: Training,
    *,
    label_noise: float,
    only: str | None,
    out: Path,
    as_json: bool,
) -> None:
    console = _err()
    check_at_least("--epochs", training.epochs, 0)
    check_at_least("--batch-size", training.batch_size, 1)
    check_positive("--lr", training.lr)
    check_non_negative("--weight-decay", training.weight_decay)
    check(0 <= label_noise <= 1, f"--label-noise must lie in [0, 1], got {label_noise}.")
    treatments = [catalog.make_treatment(part) for part in catalog.split_stack(stack)]
    check(bool(treatments), "--with names no treatment; `surefoot list` shows them.")
    instruments = choose_instruments(only)
    usable_folder(out)
    loaded = load_source(source)
    task = loaded.task
    if label_noise > 0:
        noisy = with_label_noise(task.train, label_noise, task.num_classes, generator=task.generator("label noise"))
        task = task.changed(train=noisy, facts=task.facts | {"label noise": label_noise})
        loaded = replace(loaded, task=task)
    check(loaded.recipe["kind"] not in ("export", "script"), f"{source.model} is a frozen program that cannot be trained; give its file.py:factory with --weights.")  # fmt: skip
    check(loaded.recipe["kind"] != "saved", f"{source.model} is already a hardened model; harden the original model with the longer list of treatments.")  # fmt: skip
    start = loaded.subject
    check_hardenable(start.model, task, treatments)  # before the control is trained
    subject = start if loaded.trained else _train_control(loaded, training, console)
    checkpoint = _checkpoint(out, source, stack, training, label_noise)
    if checkpoint.exists():
        console.print(f"Going on with the interrupted training in {checkpoint}.")
    with _bar(console) as bar:
        line = bar.add_task("auditing", total=None)
        result = harden(
            subject,
            task,
            treatments,
            training=training,
            start=start,
            recipe=loaded.recipe,
            out=out / "model",
            instruments=instruments,
            progress=lambda done, total, loss: bar.update(
                line, completed=done, total=total, description=f"training, loss {loss:.3f}"
            ),
            audit_progress=lambda title, done, total: bar.update(line, completed=done, total=total, description=title),
            checkpoint=checkpoint,
        )
    checkpoint.unlink(missing_ok=True)
    page = write_harden_report(result, out)
    if as_json:
        print(json.dumps(plain(result.to_dict()), indent=1))
    else:
        print_hardened(result, console)
        console.print(f"\nModel: {out / 'model'}\nReport: {page}")


def _checkpoint(out: Path, source: Source, stack: str, training: Training, label_noise: float) -> Path:
    """Where an interrupted run left its training: a name that only the very same run has."""
    import hashlib

    key = hashlib.sha256(repr((source, stack, training, label_noise)).encode()).hexdigest()[:12]
    return out / f"training-{key}.pt"


def summary_lines(result: Hardened) -> list[str]:
    """The headline changes, one line each: name, before, after, paired interval, outcome."""
    lines = []
    for c in result.comparisons:
        if c.headline:
            interval = "" if c.low is None else f" ({c.low:+.3g} to {c.high:+.3g})"
            lines.append(f"{c.name}: {c.before:.4g} → {c.after:.4g} {c.unit}{interval}, {c.outcome}")
    return lines


def print_hardened(result: Hardened, console: Console) -> None:
    color = {"improved": "green", "worsened": "red", "unclear": "yellow"}
    names = ", ".join(str(t["slug"]) for t in result.treatments)
    console.print(f"[bold]{result.subject.name}[/] with {names}, trained in {result.cost.seconds:.1f} s:")
    for line in summary_lines(result):
        outcome = line.rsplit(", ", 1)[1]
        console.print(f"  [{color[outcome]}]●[/] {line}", highlight=False, soft_wrap=True)


def _own_task(data: str, seed: int, data_dir: Path | None) -> Task:
    """Own data in a trial's place; a plain function, so that worker processes can import it."""
    return read_data(data, seed=seed, data_dir=data_dir)


def run_trial_job(
    slug: str,
    seeds: Sequence[int],
    tier: str,
    data: str | None,
    data_dir: Path | None,
    workers: int,
    ray: str | None,
    store: Path | None,
    evidence: Path | None,
    as_json: bool,
) -> None:
    from surefoot.core.engine import load_trial, run_trial
    from surefoot.core.evidence import to_dict, write_evidence

    if evidence is not None:
        usable_folder(evidence, "--evidence")
    method = catalog.find(slug)
    protocol = load_trial(method.name)
    console = _err()
    own = None if data is None else partial(_own_task, data)
    with _bar(console) as bar:
        line = bar.add_task(method.name, total=None)
        result = run_trial(
            protocol,
            tier=tier,  # type: ignore[arg-type]
            seeds=seeds,
            data=own,
            data_dir=data_dir,
            workers=workers,
            ray_address=ray,
            store=store,
            progress=lambda done, total, what: bar.update(line, completed=done, total=total, description=what),
        )
    if evidence is not None:
        path = write_evidence(result, evidence)
        console.print(f"Evidence: {path}")
    facts = to_dict(result)
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        print_trial(facts, console)


def print_trial(facts: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    metrics = [m for m in _metrics(facts["arms"].values()) if m != "peak_mb" and not catalog.is_curve_point(m)]
    table = Table(
        box=None,
        pad_edge=False,
        title=f"{facts['method']}, {facts['tier']} tier, mean of {len(facts['seeds'])} seeds",
        title_justify="left",
    )
    for column in ("arm", *metrics):
        table.add_column(column)
    for arm, values in facts["arms"].items():
        cells = [[v for v in values.get(m, []) if v is not None] for m in metrics]
        table.add_row(arm, *(number(sum(c) / len(c)) if c else "–" for c in cells))
    console.print(table)
    claims = Table(box=None, pad_edge=False)
    for column in ("verdict", "claim", "effect", "95 % interval", "p (Holm)"):
        claims.add_column(column)
    for c in facts["claims"]:
        claims.add_row(f"[{STYLE[c['verdict']]}]{c['verdict']}[/]", c["claim"], number(c["effect"]), f"{number(c['low'])} to {number(c['high'])}", number(facts["adjusted_p"].get(c["claim"])))  # fmt: skip
    console.print(claims)


def _metrics(arms: Any) -> Sequence[str]:
    return list(dict.fromkeys(m for values in arms for m in values))


def write_evidence(out: Path) -> None:
    usable_folder(out.parent, "--out in")
    check(not out.is_dir(), f"--out {out} is a folder; name the HTML file to write.")
    page = write_evidence_page(out)
    _err().print(f"Evidence: {page}")
