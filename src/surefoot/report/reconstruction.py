"""The page of a reconstruction: the walk, held-out photos beside their renderings, who answered what."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from surefoot.report.page import png_uri, render_page

if TYPE_CHECKING:
    from torch import Tensor

    from surefoot.geometry.lm_gaussian.run import HeldOut
    from surefoot.geometry.lm_gaussian.system import LMGaussianResult


def write_reconstruction_report(
    result: LMGaussianResult,
    held: HeldOut | None,
    photos: Tensor,  # [V, H, W, 3], the training photos at the size of the splats
    folder: Path,
    *,
    files: dict[str, str],
    seconds: float,
) -> Path:
    """`report.html` in `folder`, which holds the GIFs of `save_result` already; one file that opens without a network."""
    from surefoot.geometry.lm_gaussian.outputs import as_uint8
    from surefoot.nn.geometry.rasterizer import rasterize

    with torch.no_grad():
        renders = [rasterize(result.scene, camera).rgb for camera in result.cameras]
    trained = [
        {"name": camera.name, "photo": png_uri(as_uint8(photo)), "render": png_uri(as_uint8(render))}
        for camera, photo, render in zip(result.cameras, photos, renders, strict=True)
    ]
    kept_out = []
    if held is not None:
        rows = zip(held.names, held.photos, held.renders, held.scores["each_psnr_fitted"], strict=True)
        kept_out = [
            {"name": n, "photo": png_uri(as_uint8(p)), "render": png_uri(as_uint8(r)), "psnr": s} for n, p, r, s in rows
        ]
    enhanced = folder / "path_enhanced.gif"
    return render_page(
        "reconstruct.html", folder / "report.html", title=f"Reconstruction of {len(trained)} photos", report=result.report, photos=trained, held=kept_out,
        scores=None if held is None else held.scores, path_gif=_gif_uri(folder / "path.gif"),
        enhanced_gif=_gif_uri(enhanced) if enhanced.is_file() else None, files=files, seconds=seconds,
    )  # fmt: skip


def _gif_uri(path: Path) -> str:
    return "data:image/gif;base64," + base64.b64encode(path.read_bytes()).decode()
