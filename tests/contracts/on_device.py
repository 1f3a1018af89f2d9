"""Every treatment and instrument away from the CPU, as one process: `python on_device.py [cuda:0]` prints {name: complaint or null} as JSON.

Without a name it is the second device that computes on the CPU and refuses what a GPU refuses. That one marks its process, hence a script.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from surefoot import catalog, contracts
from surefoot.certified import crmt
from surefoot.certified.prototype_rbf import PrototypeRBF
from surefoot.core.second_device import second_device
from surefoot.core.subject import Subject
from surefoot.core.task import Task, Training
from surefoot.datasets.embedded import digits
from surefoot.models import Normalized, mlp, seeded_build, small_cnn
from surefoot.models.loading import channel_statistics
from surefoot.training.loop import fit


def worlds() -> dict[str, tuple[Task, nn.Module]]:
    """Digits and a small net, and what the methods for other models take."""
    task = digits(3, sizes=(128, 48, 64)).changed(budget="quick")
    views = crmt.two_view_digits(3, sizes=(128, 48, 64)).changed(budget="quick")
    mean, std, dims = channel_statistics(task.train.x)
    net = seeded_build(lambda: small_cnn(task.input_shape, 10), task.generator("model"))
    two = seeded_build(lambda: crmt.two_branch([[64], [40]], 10, width=16), views.generator("model"))
    tiny = seeded_build(lambda: mlp(task.input_shape, 10, hidden=(16, 16)), task.generator("model"))
    headed = fit(net, task, Training(epochs=4, lr=3e-3), [PrototypeRBF()]).model
    plain = (task, Normalized(net, mean, std, dims=dims))
    return {
        "": plain,
        "crmt": (views, two),
        "modalities": (views, two),
        "components": (task, headed),
        "nap": (task, tiny),
    }


def reconstruction(device: torch.device) -> None:
    """LM-Gaussian from photos on the device, priors answering on the CPU, and every file of it."""
    from surefoot.datasets.scenes import courtyard360
    from surefoot.geometry.lm_gaussian import (
        Budget,
        OracleMonoPrior,
        OracleStereoPrior,
        PatchDenoiserRepair,
        Switches,
        TemporalFilterEnhance,
        reconstruct,
        refine_pose,
    )
    from surefoot.geometry.lm_gaussian.evaluate import point_floaters, rendered_floaters, score_pose_free
    from surefoot.geometry.lm_gaussian.outputs import save_result
    from surefoot.nn.geometry.camera_files import save_llff, save_nerfstudio

    scene = courtyard360(24, train=4)
    views = [scene.view(camera, supersample=1) for camera in scene.train]
    budget = Budget(align_steps=6, steps=10, refine_steps=6, splats=200, virtual_per_gap=2, path_frames=3, keep_early=2)
    repair = PatchDenoiserRepair(fit_steps=3, batch=4, widths=(8, 8, 8))
    for generator in (torch.Generator(), torch.Generator(device)):
        result = reconstruct(
            [v.rgb.to(device) for v in views], stereo_prior=OracleStereoPrior(views), depth_prior=OracleMonoPrior(views), repair_prior=repair,
            video_prior=TemporalFilterEnhance(repair), switches=Switches(rounds=1, mask_unreliable=True), budget=budget, optimize_poses=True,
            generator=generator.manual_seed(0),
        )  # fmt: skip
    camera = refine_pose(result.scene, result.cameras[0], views[0].rgb.to(device), steps=2)
    photos, depths = (torch.stack([getattr(v, name) for v in views]).to(device) for name in ("rgb", "depth"))
    score_pose_free(result.scene, result.cameras, scene.train, scene.train[:2], photos[:2], steps=2)
    point_floaters(result.cloud.points.to(device), result.cameras, depths)
    rendered_floaters(result.scene, result.cameras[:1], depths[:1])
    with tempfile.TemporaryDirectory() as folder:
        save_result(result, Path(folder), repair=repair)
        save_nerfstudio(Path(folder) / "transforms.json", [camera])
        save_llff(Path(folder) / "poses_bounds.npy", [camera], torch.ones(1, 2))
    if result.scene.means.device != device:
        raise AssertionError(f"the splats are on {result.scene.means.device}")


def complaint(call: Callable[[], None]) -> str | None:
    try:
        call()
    except Exception as error:
        where = [f for f in traceback.extract_tb(error.__traceback__) if "surefoot" in f.filename and "second_device" not in f.filename]  # fmt: skip
        return f"{type(error).__name__}: {error} ({where[-1].filename.rpartition('surefoot/')[2]}:{where[-1].lineno})"
    return None


def main() -> None:
    found: dict[str, str | None] = {}
    named = torch.device(sys.argv[1]) if len(sys.argv) > 1 else None
    with contextlib.nullcontext(named) if named is not None else second_device() as device:
        known = worlds()
        for method in catalog.methods():
            if method.treatment:
                task, model = known.get(method.slug, known[""])
                found[method.slug] = complaint(
                    lambda s=method.slug, t=task, m=model: contracts.works_on(device, catalog.make_treatment(s), m, t)
                )
        for entry in catalog.instruments():
            task, model = known.get(entry.slug, known[""])
            subject = Subject(model.eval(), entry.slug, task.modality, task.input_shape, task.num_classes, task.bounds)
            found[f"instrument {entry.slug}"] = complaint(
                lambda s=entry.slug, t=task, m=subject: contracts.measures_on(device, catalog.make_instrument(s), m, t)
            )
        found["reconstruct"] = complaint(lambda: reconstruction(device))
    sys.stdout.write(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # PyTorch's thread for the second device may abort an ordinary exit


if __name__ == "__main__":
    main()
