"""`reconstruct`: photos in, a scene and a report out."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from surefoot.errors import InvalidInput, check, check_at_least, check_choice, check_positive

if TYPE_CHECKING:
    from surefoot.geometry.lm_gaussian import Budget, Switches
    from surefoot.geometry.lm_gaussian.settings import Mode

STAGES = {
    "poses": "finding the cameras",
    "align": "aligning",
    "fit": "fitting the repair model",
    "train": "training splats",
    "refine": "refining with repaired views",
    "distill": "learning from the enhanced frames",
}


PARTS = (
    "depth_guidance", "cleaning", "cross_view", "background", "depth_loss", "normal_loss", "virtual_views", "repair", "distance_weight", "enhancement",
)  # fmt: skip


def check_asked(named: Mapping[str, Any], method: Mapping[str, Any]) -> None:
    """Options that belong to what was not asked for would do nothing in silence."""
    check_at_least("--rounds", method["rounds"], 1)
    pairs, repair, film = (named["stereo"].startswith("dust3r"), named["repair"] != "none", named["enhance"] != "none")
    without = {name: "repair" for name in ("repair_steps", "repair_strength", "mask_unreliable") if not repair and method[name]}  # fmt: skip
    without |= {"distill_steps": "enhance"} if method["distill_steps"] and not film else {}
    for name, question in without.items():
        raise InvalidInput(f"--{name.replace('_', '-')} has nothing to act on without --{question}.")
    for name in ("adaptor", "align_steps"):
        if method[name] and not pairs:
            raise InvalidInput(f"--{name.replace('_', '-')} belongs to the alignment of pairs; it needs --stereo dust3r:PATH.")  # fmt: skip
    if method["depth_scope"] != "unsure" and not (pairs and named["depth"] != "none"):
        raise InvalidInput("--depth-scope says what --depth may move in the alignment of pairs; it needs --stereo dust3r:PATH and --depth.")  # fmt: skip
    for name in method["without"]:
        check_choice("--without", name, PARTS)
    strength = method["repair_strength"]
    check(strength is None or 0 < strength <= 1, f"--repair-strength must be above 0 and at most 1, got {strength}.")
    check_at_least("--frames", 2 if method["frames"] is None else method["frames"], 2)
    check_at_least("--align-steps", 1 if method["align_steps"] is None else method["align_steps"], 1)
    check_at_least("--distill-steps", method["distill_steps"], 0)


def settings_of_run(
    mode: Mode, named: Mapping[str, Any], method: Mapping[str, Any], *, steps: int | None, splats: int | None
) -> tuple[Budget, Switches]:
    from surefoot.geometry.lm_gaussian import Budget, Switches

    budget = Budget.of(mode, steps=steps, device=named["device"], refined=named["repair"] != "none")
    given = {"splats": splats, "align_steps": method["align_steps"], "repair_strength": method["repair_strength"], "path_frames": method["frames"], "distill_steps": method["distill_steps"]}  # fmt: skip
    switches = Switches(rounds=method["rounds"], depth_scope=method["depth_scope"], adaptor=method["adaptor"], mask_unreliable=method["mask_unreliable"])  # fmt: skip
    off = {*method["without"], *(("repair",) if named["repair"] == "none" else ())}
    return replace(budget, **{k: v for k, v in given.items() if v is not None}), replace(switches, **dict.fromkeys(off, False))  # fmt: skip


def run_reconstruct(
    photos: Path, out: Path, *, mode: Mode, named: Mapping[str, Any], method: Mapping[str, Any], eval_every: int | None, size: int, steps: int | None,
    splats: int | None, focal: float | None, crop: bool, seed: int, as_json: bool,
) -> None:  # fmt: skip
    named, off = dict(named), set(method["without"])
    for part, question in (("repair", "repair"), ("enhancement", "enhance")):
        named[question] = "none" if part in off else named[question]
    check_asked(named, method)
    if eval_every is not None:
        check_at_least("--eval-every", eval_every, 2)
    if steps is not None:
        check_at_least("--steps", steps, 10)
    if splats is not None:
        check_at_least("--splats", splats, 100)
    if focal is not None:
        check_positive("--focal", focal)

    from surefoot.geometry.lm_gaussian.backends import load_backends, usable_device
    from surefoot.geometry.lm_gaussian.outputs import save_result
    from surefoot.geometry.lm_gaussian.photos import read_photos
    from surefoot.geometry.lm_gaussian.run import reconstruct_photos
    from surefoot.nn.geometry.cameras import intrinsics
    from surefoot.report import write_reconstruction_report

    console = Console(stderr=True)
    named["device"] = usable_device(named["device"])
    found = read_photos(photos, crop=crop)
    height, width = found.images[0].shape[:2]
    K = None if focal is None else intrinsics(focal, width, height)
    budget, switches = settings_of_run(mode, named, method, steps=steps, splats=splats)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    start = time.perf_counter()
    with Progress(*columns, console=console, transient=True) as bar:
        line = bar.add_task("reading photos", total=None)

        def tell(stage: str, step: int, total: int) -> None:
            bar.update(line, completed=step, total=total, description=STAGES.get(stage, stage))

        bar.update(line, description="loading models")
        chosen = load_backends(
            **named, fit_steps=method["repair_steps"], on_fit=lambda step, total, loss: tell("fit", step, total)
        )
        result, held, small = reconstruct_photos(
            found.images, found.names, size=size, mode=mode, eval_every=eval_every,
            backends=chosen, switches=switches, budget=budget, K=K, optimize_poses=method["optimize_poses"], seed=seed, device=named["device"], folder=out,
            progress=tell,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    result.report["seed"] = seed
    if held is not None:
        result.report["held_out"] = {"photos": list(held.names), **held.scores}
    files = save_result(result, out, repair=chosen.repair)
    page = write_reconstruction_report(result, held, small, out, files=files, seconds=seconds)
    if as_json:
        print(json.dumps(result.report, indent=1))
        return
    console.print(
        f"{len(result.cameras)} of {len(found.names)} photos found their place; {len(result.scene)} splats in {seconds:.0f} s."
    )
    for name in result.report.get("unregistered", []):
        console.print(f"Not placed: {name}")
    for note in result.report.get("notes", []):
        console.print(f"Note: {note}")
    if held is not None:
        console.print(
            f"Held-out photos: {held.scores['psnr_fitted']:.1f} dB with fitted poses, {held.scores['psnr']:.1f} dB as registered."
        )
    if "distillation" in result.report:
        before, after = (result.report["distillation"][when]["train_psnr"] for when in ("before", "after"))
        console.print(
            f"The enhanced frames were fed back: training photos {before:.1f} dB before, {after:.1f} dB after."
        )
    console.print(f"Splats: {out / 'scene.ply'}\nReport: {page}")
