"""The wrapper that classifies the selected crop, its certificate, and the treatment that trains for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.core.subject import predict
from surefoot.core.task import Task
from surefoot.core.treatment import Treatment
from surefoot.errors import InvalidInput, Refused, check, check_at_least, check_choice, check_open_unit
from surefoot.shift.crop_selection.selection import (
    Mode,
    Score,
    Size,
    as_pair,
    cut,
    dog_orders,
    grid_size,
    select_positions,
    wrap_around,
)
from surefoot.shift.crop_selection.translation import windows


class CropSelection(nn.Module):
    """`model` on the selected crop of each image, resized to `output_size` where one is given.

    Images `[B, C, H, W]` of exactly `image_size`, floating in [0, 1] (scored as bytes, classified as they are) or uint8 (given
    to the model as x / 255). The model must have been trained on crops of this size, resized the same way.
    """

    def __init__(
        self,
        model: nn.Module,
        image_size: Size,
        crop_size: Size,
        score: Score = "dog",
        mode: Mode = "realistic",
        output_size: Size | None = None,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, ("realistic", "cyclic"))
        self.model = model
        self.image_size, self.crop_size = as_pair("image_size", image_size), as_pair("crop_size", crop_size)
        self.score: Score = score
        self.mode: Mode = mode
        self.output_size = None if output_size is None else as_pair("output_size", output_size)
        grid_size(self.image_size, self.crop_size)
        if not callable(score):
            check_choice("score", score, ("dog", "center", "random"))
            dog_orders(self.crop_size)

    def select(self, x: Tensor) -> Tensor:  # int64 [B, 2]
        """Top-left corners of the selected crops."""
        self._check(x)
        return select_positions(self._extended(x), self.crop_size, self.score)

    def crop(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        """The selected crops."""
        return cut(self._extended(x), self.select(x), self.crop_size)

    def forward(self, x: Tensor) -> Tensor:
        crops = self.crop(x)
        if crops.dtype == torch.uint8:
            parameter = next(self.model.parameters(), None)
            crops = crops.to(torch.get_default_dtype() if parameter is None else parameter.dtype) / 255
        return self.model(resize(crops, self.output_size))

    def certify(self, frame: Tensor, max_shift: int = 1) -> Tensor | None:  # bool [B]
        """True where no shift of the centre window by at most `max_shift` pixels (each axis) selects other content.

        `frame` `[B, C, H + 2m, W + 2m]` (larger ones are cut to that) holds every window; certified iff its best crop lies in all. None for
        frames of the bare window size: unseen border pixels may always score higher. Cyclic selection is invariant by itself.
        """
        check_at_least("max_shift", max_shift, 0)
        if self.mode == "cyclic":
            raise Refused(
                "A certificate is for realistic shifts; with mode='cyclic' every cyclic shift selects the same crop."
            )
        size = tuple(frame.shape[-2:])
        if size == self.image_size and max_shift > 0:
            return None
        height, width = (s + 2 * max_shift for s in self.image_size)
        check(frame.dim() == 4 and size[0] >= height and size[1] >= width, f"frame must be at least [B, C, {height}, {width}] for shifts up to {max_shift}, got {list(frame.shape)}.")  # fmt: skip
        positions = select_positions(windows(frame, (height, width)), self.crop_size, self.score)
        last = torch.tensor(grid_size(self.image_size, self.crop_size), device=frame.device) - 1
        return ((positions >= 2 * max_shift) & (positions <= last)).all(1)

    def border_share(self, x: Tensor) -> float:
        """Share of images whose crop lies on the border of the position grid.

        Above `uniform_border_share` the bound's assumption fails, and changes are more frequent than it says.
        """
        positions = self.select(x)
        last = torch.tensor(self._grid(), device=x.device) - 1
        return float(((positions == 0) | (positions == last)).any(1).double().mean())

    def uniform_border_share(self) -> float:
        """What `border_share` would be if every position were equally likely."""
        a, b = self._grid()
        return 1 - max(0, a - 2) * max(0, b - 2) / (a * b)

    def _grid(self) -> tuple[int, int]:
        return self.image_size if self.mode == "cyclic" else grid_size(self.image_size, self.crop_size)

    def _check(self, x: Tensor) -> None:
        height, width = self.image_size
        check(x.dim() == 4 and tuple(x.shape[2:]) == self.image_size, f"Images must be [B, C, {height}, {width}], got {list(x.shape)}.")  # fmt: skip

    def _extended(self, x: Tensor) -> Tensor:
        return wrap_around(x, self.crop_size) if self.mode == "cyclic" else x


def resize(x: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Bilinear, the same in training and inference; nothing where the size is right or none is asked for."""
    if size is None or tuple(x.shape[-2:]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class RandomCrop:
    """Augmentation: a uniformly placed crop of each image, resized as at inference."""

    crop_size: tuple[int, int]
    mode: Mode = "realistic"
    output_size: tuple[int, int] | None = None

    def __call__(
        self,
        x: Tensor,  # [B, C, H, W]
        generator: torch.Generator,
    ) -> Tensor:  # [B, C, h, w], or of `output_size`
        grid = x.shape[2:] if self.mode == "cyclic" else grid_size((x.shape[2], x.shape[3]), self.crop_size)
        places = [torch.randint(n, (len(x),), generator=generator, device=generator.device) for n in grid]
        extended = wrap_around(x, self.crop_size) if self.mode == "cyclic" else x
        return resize(cut(extended, torch.stack(places, 1).to(x.device), self.crop_size), self.output_size)


@dataclass
class CropSelectionTreatment(Treatment):
    """Train on random crops, classify the best-scoring crop.

    `crop_size` in pixels, else `crop` times the image side. A model that takes the crop as it is (global pooling) gets it so; any
    other gets it resized to the image size, in training and inference alike. `resize=True` or `False` decides by hand.
    """

    crop: float = 0.75
    crop_size: int | None = None
    score: Literal["dog", "center", "random"] = "dog"
    mode: Mode = "realistic"
    resize: bool | None = None
    image_size_: tuple[int, int] | None = field(default=None, init=False)
    crop_size_: tuple[int, int] | None = field(default=None, init=False)
    output_size_: tuple[int, int] | None = field(default=None, init=False)

    slug = "crop_selection"
    finish_order = 20

    def __post_init__(self) -> None:
        if self.crop_size is None:
            check_open_unit("crop", self.crop)
        else:
            check_at_least("crop_size", self.crop_size, 3)
        check_choice("score", self.score, ("dog", "center", "random"))
        check_choice("mode", self.mode, ("realistic", "cyclic"))

    def check(self, model: nn.Module, task: Task) -> None:
        if len(task.input_shape) != 3:
            raise Refused(
                f"crop_selection chooses a crop of an image [C, H, W]; these inputs have shape {list(task.input_shape)}."
            )
        self._crop_of(task)

    def _crop_of(self, task: Task) -> tuple[int, int]:
        height, width = task.input_shape[1:]
        h, w = (round(self.crop * side) for side in (height, width)) if self.crop_size is None else [self.crop_size] * 2
        grid_size((height, width), (h, w))
        dog_orders((h, w))
        return h, w

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        self.image_size_ = (task.input_shape[1], task.input_shape[2])
        self.crop_size_ = self._crop_of(task)
        native = _takes(model, task, self.crop_size_) if self.resize is None else not self.resize
        self.output_size_ = None if native else self.image_size_
        crop = RandomCrop(self.crop_size_, self.mode, self.output_size_)
        return model, task.changed(augment=(*task.augment, crop))

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        return self.rebuild(model, self.structure())

    def structure(self) -> dict[str, Any]:
        return {"image_size": self.image_size_, "crop_size": self.crop_size_, "output_size": self.output_size_}

    def rebuild(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        image_size, crop_size, output_size = _sizes_in(structure)
        if image_size is None or crop_size is None:
            raise InvalidInput("crop_selection has no sizes yet; call prepare first.")
        return CropSelection(model, image_size, crop_size, self.score, self.mode, output_size)

    def state_dict(self) -> dict[str, Any]:
        return self.structure()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.image_size_, self.crop_size_, self.output_size_ = _sizes_in(state)


def _sizes_in(structure: Mapping[str, Any]) -> Iterator[tuple[int, int] | None]:
    """Image, crop and output size as pairs; JSON made lists of them."""
    for key in ("image_size", "crop_size", "output_size"):
        size = structure[key]
        yield None if size is None else (int(size[0]), int(size[1]))


def _takes(model: nn.Module, task: Task, crop_size: tuple[int, int]) -> bool:
    """Whether the model classifies crops of that size as they come."""
    parameter = next(model.parameters(), None)
    blank = torch.zeros(
        1, task.input_shape[0], *crop_size, dtype=task.test.x.dtype if parameter is None else parameter.dtype
    )
    try:
        logits = predict(model, blank)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    return tuple(logits.shape) == (1, task.num_classes)
