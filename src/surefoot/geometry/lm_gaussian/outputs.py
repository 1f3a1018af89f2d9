"""A reconstruction as files: splats, cloud, cameras in two formats, the path as frames and as a GIF, and a JSON of what happened."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from surefoot.core.environment import environment
from surefoot.geometry.lm_gaussian.diffusers_repair import DiffusersControlNetRepair
from surefoot.geometry.lm_gaussian.priors import ImageRepairPrior
from surefoot.geometry.lm_gaussian.system import LMGaussianResult
from surefoot.nn.geometry.camera_files import save_colmap, save_nerfstudio
from surefoot.nn.geometry.ply import save_points, save_splats


def as_uint8(image: Tensor) -> np.ndarray:  # [H, W, 3] in [0, 1]
    return (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def save_gif(frames: Tensor, path: Path, *, milliseconds: int = 80) -> None:  # [F, H, W, 3]
    """An endless GIF, written whole or not at all."""
    from PIL import Image

    pictures = [Image.fromarray(as_uint8(frame)) for frame in frames]
    partial = path.with_name(f".{path.name}.{os.getpid()}.gif")
    pictures[0].save(partial, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)
    partial.replace(path)


def save_frames(frames: Tensor, folder: Path) -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for k, frame in enumerate(frames):
        Image.fromarray(as_uint8(frame)).save(folder / f"frame_{k:04d}.png")


def contact_sheet(images: Sequence[Tensor], columns: int = 6) -> Tensor:  # [*, *, 3]
    """Pictures of one size in rows, the last row filled with white."""
    blank = torch.ones_like(images[0])
    rows = [list(images[k : k + columns]) for k in range(0, len(images), columns)]
    full = [row + [blank] * (min(columns, len(images)) - len(row)) for row in rows]
    return torch.cat([torch.cat(row, 1) for row in full], 0)


def save_result(result: LMGaussianResult, folder: Path, *, repair: ImageRepairPrior | None = None) -> dict[str, str]:
    """Everything but the HTML; returns what is where.

    scene.ply        splats, for any viewer          points.ply       the cleaned cloud
    sparse/          COLMAP cameras and points       transforms.json  the same for nerfstudio
    path.gif, path/  the walk; path_enhanced.gif after stage 3
    path_distilled.gif, scene_undistilled.ply   the walk after the splats learned from the enhanced frames, and the splats before
    repair_lora/     the LoRA of a diffusion model fitted to the scene, if `repair` is one
    reconstruct.json the report, the training curve, and the versions and machine that made them
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_splats(result.scene, folder / "scene.ply")
    save_points(result.cloud, folder / "points.ply")
    save_colmap(folder / "sparse", result.cameras, result.cloud)
    save_nerfstudio(folder / "transforms.json", result.cameras, ply_file="points.ply")
    save_gif(result.frames, folder / "path.gif")
    save_frames(result.frames, folder / "path")
    files = {
        "splats": "scene.ply",
        "points": "points.ply",
        "cameras": "sparse/",
        "transforms": "transforms.json",
        "path": "path.gif",
    }
    if result.enhanced is not None:
        save_gif(result.enhanced, folder / "path_enhanced.gif")
        files["enhanced path"] = "path_enhanced.gif"
    if result.undistilled is not None and result.distilled is not None:
        save_splats(result.undistilled, folder / "scene_undistilled.ply")
        save_gif(result.distilled, folder / "path_distilled.gif")
        files |= {"splats before distilling": "scene_undistilled.ply", "distilled path": "path_distilled.gif"}
    if isinstance(repair, DiffusersControlNetRepair) and repair.net_ is not None:
        repair.save_lora(folder / "repair_lora")
        files["repair model"] = "repair_lora/"
    partial = folder / f".reconstruct.json.{os.getpid()}"
    partial.write_text(json.dumps({**result.to_dict(), "environment": environment(), "files": files}, indent=1))
    partial.replace(folder / "reconstruct.json")
    return files
