"""The verbs. Each parses its arguments, calls the library, and says where the result is."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from surefoot import __version__

app = typer.Typer(
    name="surefoot",
    help="Find out where a PyTorch model breaks, fix it with published methods, and prove the fix.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class BudgetChoice(StrEnum):
    quick = "quick"
    standard = "standard"
    thorough = "thorough"


class TierChoice(StrEnum):
    embedded = "embedded"
    standard = "standard"


Model = Annotated[str, typer.Argument(help="Embedded name, saved folder, file.py:factory, .pt2 or TorchScript file.")]
Data = Annotated[str, typer.Option("--data", help="Name, folder of images, .npz, .csv, .parquet or file.py:function.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Folder of the standard data (else $SUREFOOT_DATA).")]
Weights = Annotated[Path | None, typer.Option("--weights", help="Weights for file.py:factory (.safetensors).")]
Target = Annotated[str | None, typer.Option("--target", help="Target column of a table.")]
Trust = Annotated[bool, typer.Option("--trust", help="Unpickle model files. A pickle can run any code.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 ...")]
Budget = Annotated[BudgetChoice, typer.Option("--budget", help="How much time to spend.")]
Only = Annotated[str | None, typer.Option("--only", help="Instruments or families, separated by commas.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of the report.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"surefoot {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Find out where a PyTorch model breaks, fix it with published methods, and prove the fix."""


@app.command("list")
def list_methods(
    as_json: Json = False, family: Annotated[str | None, typer.Option(help="Only this family.")] = None
) -> None:
    """List the methods: what each is for, and whether it works here."""
    from surefoot.cli import show

    show.print_list(family, as_json)


@app.command("show")
def show_method(slug: Annotated[str, typer.Argument(help="Slug of a method.")]) -> None:
    """Show one method: what, when, how to use it in your own loop, settings, cost, evidence, citation."""
    from surefoot.cli import show

    show.print_method(slug)


@app.command()
def cite(names: Annotated[list[str], typer.Argument(help="Slugs, or the folder of a run.")]) -> None:
    """Print the BibTeX you owe for methods, or for the treatments of a run."""
    from surefoot.cli import show

    show.print_citations(names)


@app.command()
def audit(
    model: Model,
    data: Data,
    weights: Weights = None,
    data_dir: DataDir = None,
    target: Target = None,
    budget: Budget = BudgetChoice.standard,
    only: Only = None,
    seed: Seed = 0,
    device: Device = "cpu",
    trust: Trust = False,
    out: Out = Path("surefoot-report"),
    as_json: Json = False,
) -> None:
    """Measure where a model breaks and write a report."""
    from surefoot.cli import jobs

    source = jobs.Source(model, data, weights, data_dir, target, budget.value, seed, device, trust)
    jobs.run_audit(source, only=only, out=out, as_json=as_json)


@app.command()
def harden(
    model: Model,
    data: Data,
    with_: Annotated[str, typer.Option("--with", help="Treatments: a,b(setting=value),c.")],
    weights: Weights = None,
    data_dir: DataDir = None,
    target: Target = None,
    budget: Budget = BudgetChoice.standard,
    only: Only = None,
    epochs: Annotated[int, typer.Option(help="Training epochs.")] = 20,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    batch_size: Annotated[int, typer.Option(help="Examples a training step.")] = 64,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.0,
    label_noise: Annotated[float, typer.Option(help="Share of training labels to corrupt on purpose first.")] = 0.0,
    seed: Seed = 0,
    device: Device = "cpu",
    trust: Trust = False,
    out: Out = Path("surefoot-report"),
    as_json: Json = False,
) -> None:
    """Train a stack of treatments in one run, audit before and after, and save the model."""
    from surefoot.cli import jobs
    from surefoot.core.task import Training

    source = jobs.Source(model, data, weights, data_dir, target, budget.value, seed, device, trust)
    training = Training(epochs=epochs, lr=lr, batch_size=batch_size, weight_decay=weight_decay)
    jobs.run_harden(source, with_, training, label_noise=label_noise, only=only, out=out, as_json=as_json)


@app.command()
def trial(
    slug: Annotated[str, typer.Argument(help="Slug of a method.")],
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 5,
    first_seed: Annotated[int, typer.Option(help="The first seed; move it past seeds the protocol was made with.")] = 0,
    tier: Annotated[TierChoice, typer.Option(help="Which data.")] = TierChoice.embedded,
    data: Annotated[str | None, typer.Option("--data", help="Your own data in the task's place.")] = None,
    data_dir: DataDir = None,
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
    ray: Annotated[str | None, typer.Option("--ray", help="Address of a Ray cluster (local: start one).")] = None,
    store: Annotated[Path | None, typer.Option(help="SQLite file of finished cells.")] = None,
    evidence: Annotated[Path | None, typer.Option(help="Folder to write <family>/<slug>.json to.")] = None,
    as_json: Json = False,
) -> None:
    """Put a method on trial against its baselines; a killed trial resumes."""
    from surefoot.cli import jobs

    jobs.run_trial_job(
        slug, range(first_seed, first_seed + seeds), tier.value, data, data_dir, workers, ray, store, evidence, as_json
    )


class ModeChoice(StrEnum):
    around = "360"
    forward = "forward"


class ScopeChoice(StrEnum):
    unsure = "unsure"
    all = "all"


LARGE, LENGTH, METHOD = "Large models", "How long, how large", "Parts of the method"


@app.command()
def reconstruct(
    photos: Annotated[Path, typer.Argument(help="Folder of three to sixteen photos of one place.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the scene; an unfinished run in it goes on.")] = Path("scene"),
    mode: Annotated[ModeChoice, typer.Option(help="A walk around, or views that look one way.")] = ModeChoice.around,
    eval_every: Annotated[int | None, typer.Option(help="Hold every n-th photo out, to tell how good it is.")] = None,
    crop: Annotated[bool, typer.Option("--crop", help="Crop photos of several sizes to the smallest.")] = False,
    focal: Annotated[float | None, typer.Option(help="Focal length in pixels of the photos as they are, if you know it.")] = None,
    stereo: Annotated[str, typer.Option(help="Who finds poses and depths: colmap, dust3r:PATH, vggt:PATH.", rich_help_panel=LARGE)] = "colmap",
    depth: Annotated[str, typer.Option(help="Who guesses depth from one photo: none, marigold:PATH.", rich_help_panel=LARGE)] = "none",
    normals: Annotated[str, typer.Option(help="Who guesses normals from one photo: none, marigold:PATH.", rich_help_panel=LARGE)] = "none",
    repair: Annotated[str, typer.Option(help="Who repairs virtual views: patch, none, diffusers:PATH.", rich_help_panel=LARGE)] = "patch",
    enhance: Annotated[str, typer.Option(help="Who enhances the video: temporal, none, diffusers:PATH.", rich_help_panel=LARGE)] = "temporal",
    prompt: Annotated[str | None, typer.Option(help="One sentence on the place, for --repair diffusers:PATH.", rich_help_panel=LARGE)] = None,
    device: Annotated[str, typer.Option(help="Where splats are trained and models given by PATH run: cpu, cuda, ...", rich_help_panel=LARGE)] = "cpu",
    trust: Annotated[bool, typer.Option("--trust", help="Unpickle a network that comes as a pickle.", rich_help_panel=LARGE)] = False,
    size: Annotated[int, typer.Option(help="Longer side of the pictures that train the splats.", rich_help_panel=LENGTH)] = 96,
    steps: Annotated[int | None, typer.Option(help="Training steps in all (default 500 on a CPU, the paper's on a GPU); every schedule and rate goes with them.", rich_help_panel=LENGTH)] = None,
    splats: Annotated[int | None, typer.Option(help="Splats at most (default 4,000 on a CPU, 200,000 on a GPU).", rich_help_panel=LENGTH)] = None,
    align_steps: Annotated[int | None, typer.Option(help="Steps that align pairs of --stereo dust3r:PATH (default 500).", rich_help_panel=LENGTH)] = None,
    rounds: Annotated[int, typer.Option(help="How often virtual views are repaired anew.", rich_help_panel=LENGTH)] = 2,
    repair_steps: Annotated[int | None, typer.Option(help="Steps that fit the repair model to the scene (default: 600 for patch, 1800 for diffusers).", rich_help_panel=LENGTH)] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the walk (default 60 on a CPU, 300 on a GPU).", rich_help_panel=LENGTH)] = None,
    distill_steps: Annotated[int, typer.Option(help="Steps that feed the enhanced frames back into the splats as weak targets; 0 leaves the splats alone.", rich_help_panel=LENGTH)] = 0,
    repair_strength: Annotated[float | None, typer.Option(help="How much of a virtual view may be painted anew, 0 to 1 (default 0.3 on a CPU, 0.2 on a GPU).", rich_help_panel=METHOD)] = None,
    mask_unreliable: Annotated[bool, typer.Option("--mask-unreliable", help="Let repaired pixels train nothing where the repair changed much.", rich_help_panel=METHOD)] = False,
    depth_scope: Annotated[ScopeChoice, typer.Option(help="What --depth may move in the alignment: pixels that stereo is unsure of, or all.", rich_help_panel=METHOD)] = ScopeChoice.unsure,
    adaptor: Annotated[bool, typer.Option("--adaptor", help="Let each pair of the alignment stretch its depth against its width.", rich_help_panel=METHOD)] = False,
    optimize_poses: Annotated[bool, typer.Option("--optimize-poses", help="Let training move the cameras too.", rich_help_panel=METHOD)] = False,
    without: Annotated[list[str] | None, typer.Option(help="Leave a part out (repeat for several): depth_guidance, cleaning, cross_view, background, depth_loss, normal_loss, virtual_views, repair, distance_weight, enhancement.", rich_help_panel=METHOD)] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Turn a handful of photos into a 3D scene of Gaussian splats, with a path through it and a report."""
    from surefoot.cli.reconstruct import run_reconstruct

    named = {
        "stereo": stereo, "depth": depth, "normals": normals, "repair": repair, "enhance": enhance, "prompt": prompt, "device": device, "trust": trust,
    }  # fmt: skip
    method = {
        "align_steps": align_steps, "rounds": rounds, "repair_steps": repair_steps, "frames": frames, "distill_steps": distill_steps, "repair_strength": repair_strength,
        "mask_unreliable": mask_unreliable, "depth_scope": depth_scope.value, "adaptor": adaptor, "optimize_poses": optimize_poses, "without": without or [],
    }  # fmt: skip
    run_reconstruct(
        photos, out, mode=mode.value, named=named, method=method, eval_every=eval_every, size=size, steps=steps, splats=splats, focal=focal, crop=crop,
        seed=seed, as_json=as_json,
    )  # fmt: skip


@app.command()
def evidence(
    out: Annotated[Path, typer.Option("--out", help="HTML file to write.")] = Path("surefoot-evidence.html"),
) -> None:
    """Write an HTML overview of all trials."""
    from surefoot.cli import jobs

    jobs.write_evidence(out)


def settings_of(plug: Any) -> list[tuple[str, str]]:
    """Names and defaults of a treatment's settings."""
    import dataclasses

    return [
        (f.name, "" if f.default is dataclasses.MISSING else repr(f.default))
        for f in dataclasses.fields(plug)
        if f.init
    ]
