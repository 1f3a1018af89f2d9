"""`reconstruct`: photos in, a scene and a report out."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from surefoot.errors import check_at_least

STAGES = {
    "poses": "finding the cameras",
    "align": "aligning",
    "fit": "fitting the repair model",
    "train": "training splats",
    "refine": "refining with repaired views",
}


def run_reconstruct(
    photos: Path, out: Path, *, mode: str, named: Mapping[str, Any], eval_every: int | None, size: int, steps: int | None, splats: int | None,
    crop: bool, seed: int, as_json: bool,
) -> None:  # fmt: skip
    from surefoot.geometry.lm_gaussian import Budget, Switches
    from surefoot.geometry.lm_gaussian.backends import load_backends
    from surefoot.geometry.lm_gaussian.outputs import save_result
    from surefoot.geometry.lm_gaussian.photos import read_photos
    from surefoot.geometry.lm_gaussian.run import reconstruct_photos
    from surefoot.report import write_reconstruction_report

    console = Console(stderr=True)
    if eval_every is not None:
        check_at_least("--eval-every", eval_every, 2)
    found = read_photos(photos, crop=crop)
    budget = Budget()
    if steps is not None:
        check_at_least("--steps", steps, 10)
        budget = replace(budget, steps=round(0.7 * steps), refine_steps=steps - round(0.7 * steps))
    if splats is not None:
        check_at_least("--splats", splats, 100)
        budget = replace(budget, splats=splats)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    start = time.perf_counter()
    with Progress(*columns, console=console, transient=True) as bar:
        line = bar.add_task("reading photos", total=None)

        def tell(stage: str, step: int, total: int) -> None:
            bar.update(line, completed=step, total=total, description=STAGES.get(stage, stage))

        bar.update(line, description="loading models")
        chosen = load_backends(**named, on_fit=lambda step, total, loss: tell("fit", step, total))
        result, held, small = reconstruct_photos(
            found.images, found.names, size=size, mode=mode, eval_every=eval_every,  # type: ignore[arg-type]
            backends=chosen, switches=Switches(repair=chosen.repair is not None, rounds=2), budget=budget, seed=seed, folder=out, progress=tell,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    if held is not None:
        result.report["held_out"] = {"photos": list(held.names), **held.scores}
    files = save_result(result, out)
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
    console.print(f"Splats: {out / 'scene.ply'}\nReport: {page}")
