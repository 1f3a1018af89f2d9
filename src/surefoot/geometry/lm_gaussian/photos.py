"""A folder of photos as tensors, turned upright, in RGB, of one size; and one clear sentence where that cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from surefoot.errors import InvalidInput, check, check_at_least

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"}


@dataclass(frozen=True)
class Photos:
    images: tuple[Tensor, ...]  # each float32 [H, W, 3] in [0, 1], all of one size
    names: tuple[str, ...]


def read_photos(folder: Path | str, *, crop: bool = False) -> Photos:
    """All photos of a folder, by name.

    EXIF rotation is applied, grey becomes RGB, transparency lies on white, 16-bit values are scaled. Photos of several sizes are refused
    with their names, or with `crop` cut to the smallest width and height around their middle. Raises `InvalidInput` for a
    folder without at least two photos, a video file, and files that are not pictures though they are named so.
    """
    folder = Path(folder).expanduser()
    if folder.suffix.lower() in VIDEOS:
        raise InvalidInput(f"{folder} is a video; take single frames out of it first (ffmpeg -i {folder.name} -r 2 frames/%04d.png) and give their folder.")  # fmt: skip
    check(folder.is_dir(), f"{folder} is not a folder; name a folder of photos.")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
    if len(paths) < 2:
        films = [p.name for p in folder.iterdir() if p.suffix.lower() in VIDEOS]
        hint = f" It holds the video {films[0]}; take single frames out of it first." if films else ""
        raise InvalidInput(f"{folder} holds {len(paths)} photo{'s' if len(paths) != 1 else ''}, and a reconstruction needs at least two.{hint}")  # fmt: skip
    images = [_read(path) for path in paths]
    return Photos(tuple(_one_size(images, [p.name for p in paths], crop)), tuple(p.name for p in paths))


def _read(path: Path) -> Tensor:  # [H, W, 3]
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            array = np.asarray(_upright(ImageOps.exif_transpose(opened)))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise InvalidInput(
            f"{path} cannot be read as a picture ({str(error).splitlines()[0]}); remove or replace it."
        ) from error
    deep = array.dtype.itemsize > 1  # 16 bits, in either byte order or widened
    x = torch.from_numpy(array.astype(np.float32)) / (65535 if deep else 255)
    x = x.clamp(0, 1)
    if x.dim() == 2:
        return x[..., None].expand(-1, -1, 3).contiguous()
    if x.shape[2] == 4:  # on white
        return x[..., :3] * x[..., 3:] + (1 - x[..., 3:])
    return x


def _upright(image):
    """A mode whose array is grey, RGB or RGBA."""
    if "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode in ("L", "RGB", "RGBA", "I;16", "I;16B", "I;16L", "I"):
        return image
    return image.convert("RGBA" if image.mode in ("LA", "PA", "La") else "RGB")


def _one_size(images: Sequence[Tensor], names: Sequence[str], crop: bool) -> list[Tensor]:
    sizes = {tuple(image.shape[:2]) for image in images}
    if len(sizes) == 1:
        return list(images)
    if not crop:
        listed = ", ".join(
            f"{name} ({image.shape[1]} x {image.shape[0]})" for name, image in list(zip(names, images, strict=True))[:6]
        )
        raise InvalidInput(
            f"The photos have {len(sizes)} sizes ({listed}); give photos of one camera held one way, or crop them (--crop)."
        )
    height, width = min(s[0] for s in sizes), min(s[1] for s in sizes)
    cut = []
    for image in images:
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        cut.append(image[top : top + height, left : left + width])
    return cut


def resize(images: Sequence[Tensor], long_side: int) -> list[Tensor]:
    """The images with their longer side at `long_side` pixels, averaged down; never enlarged."""
    check_at_least("long_side", long_side, 8)
    height, width = images[0].shape[:2]
    factor = min(1.0, long_side / max(height, width))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    if size == (height, width):
        return list(images)
    return [
        F.interpolate(im.permute(2, 0, 1)[None], size=size, mode="bilinear", antialias=True)[0]
        .permute(1, 2, 0)
        .clamp(0, 1)
        for im in images
    ]
