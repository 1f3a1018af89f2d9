"""What finished and unfinished stages leave on disk, so that a run that was stopped goes on from there and ends where an undisturbed one ends."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from surefoot.nn.geometry.cameras import Camera
from surefoot.nn.geometry.ply import PointCloud
from surefoot.nn.geometry.splats import NAMES, GaussianScene

Record = dict[str, float]
T = TypeVar("T")


@dataclass
class Course:
    """What a training run leaves behind beside the scene."""

    history: list[Record] = field(default_factory=list)
    early: list[tuple[int, Tensor]] = field(default_factory=list)  # (photo, a faulty rendering): repair pairs
    steps: int = 0
    cameras: tuple[Camera, ...] = ()  # where the optimised poses ended; empty if they were not optimised


def save_whole(content: dict[str, Any], path: Path) -> None:
    """Tensors and plain values in a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save(content, partial)
    partial.replace(path)


def load_whole(path: Path) -> dict[str, Any] | None:
    """What `save_whole` wrote; None where there is no such file, or a damaged one. Nothing in it is run."""
    try:
        found = torch.load(path, weights_only=True)
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
    ):  # what garbage gives rise to
        return None
    return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class StageStore:
    """Files of one run, named by stage and by a key of all that the run was asked; a file of another run is never read.

    An unfinished stage is saved every `seconds` (see `Checkpoint`)."""

    folder: Path
    key: str
    seconds: float = 60.0

    @classmethod
    def of(cls, folder: Path, images: Sequence[Tensor], *settings: object) -> StageStore:
        digest = hashlib.sha256(repr((settings, [str(image.device) for image in images])).encode())
        for image in images:
            digest.update(image.detach().cpu().contiguous().numpy().tobytes())
        return cls(folder, digest.hexdigest()[:16])

    def _path(self, stage: str) -> Path:
        return self.folder / f"{stage}-{self.key}.pt"

    def finished(self, stage: str) -> bool:
        return self._path(stage).is_file()

    def get(self, stage: str, generator: torch.Generator) -> dict[str, Any] | None:
        """What the stage left, and the generator where it stood then; None if it has not been finished (or its file is damaged)."""
        saved = load_whole(self._path(stage))
        if saved is None:
            return None
        generator.set_state(saved.pop("generator"))
        return saved

    def put(self, stage: str, content: dict[str, Any], generator: torch.Generator) -> None:
        save_whole({**content, "generator": generator.get_state()}, self._path(stage))
        for left in self.folder.glob(f"{stage}{_UNFINISHED}-{self.key}.*"):
            left.unlink()

    def checkpoint(self, stage: str) -> Checkpoint:
        """Where a stage keeps what it has so far, until `put` of the finished stage removes it."""
        return Checkpoint(self, stage + _UNFINISHED, time.monotonic())


def once(
    stages: StageStore | None,
    stage: str,
    generator: torch.Generator,
    make: Callable[[], T],
    pack: Callable[[T], dict[str, Any]],
    unpack: Callable[[dict[str, Any]], T],
) -> T:
    """What a stage gives: from disk where it has been finished, else made, and kept if there is a place to keep it."""
    saved = None if stages is None else stages.get(stage, generator)
    if saved is not None:
        return unpack(saved)
    made = make()
    if stages is not None:
        stages.put(stage, pack(made), generator)
    return made


_UNFINISHED = "_unfinished"


@dataclass
class Checkpoint:
    """The last state of a stage that has not ended. Saving is atomic and draws nothing, so it changes nothing of the run."""

    store: StageStore
    stage: str
    last: float  # time.monotonic() of the last save

    def load(self, generator: torch.Generator) -> dict[str, Any] | None:
        """The state, and the generator where it stood then; None if there is none."""
        return self.store.get(self.stage, generator)

    def due(self) -> bool:
        return time.monotonic() - self.last >= self.store.seconds

    def save(self, state: dict[str, Any], generator: torch.Generator) -> None:
        self.store.put(self.stage, state, generator)
        self.last = time.monotonic()

    def within(self, around: dict[str, Any], inner: dict[str, Any] | None) -> InnerCheckpoint:
        """For a loop in a loop: `around` is the outer state that goes with each save, `inner` what the inner loop starts from."""
        return InnerCheckpoint(self, around, inner)


@dataclass
class InnerCheckpoint:
    outer: Checkpoint
    around: dict[str, Any]
    inner: dict[str, Any] | None

    def load(self, generator: torch.Generator) -> dict[str, Any] | None:
        return self.inner  # the outer load has set the generator

    def due(self) -> bool:
        return self.outer.due()

    def save(self, state: dict[str, Any], generator: torch.Generator) -> None:
        self.outer.save({**self.around, "inner": state}, generator)


def cameras_to_dict(cameras: Sequence[Camera]) -> dict[str, Any]:
    return {
        "K": torch.stack([c.K for c in cameras]), "w2c": torch.stack([c.w2c for c in cameras]),
        "size": [(c.width, c.height) for c in cameras], "names": [c.name for c in cameras],
    }  # fmt: skip


def cameras_from_dict(saved: dict[str, Any]) -> tuple[Camera, ...]:
    rows = zip(saved["K"], saved["w2c"], saved["size"], saved["names"], strict=True)
    return tuple(Camera(K, w2c, width, height, name) for K, w2c, (width, height), name in rows)


def cloud_to_dict(cloud: PointCloud) -> dict[str, Tensor]:
    return {"points": cloud.points, "rgb": cloud.rgb}


def scene_to_dict(scene: GaussianScene, course: Course) -> dict[str, Any]:
    return {
        **{name: getattr(scene, name).detach() for name in NAMES}, "filter_3d": scene.filter_3d, "active_degree": scene.active_degree,
        "early": [(k, image) for k, image in course.early], "history": json.dumps(course.history), "steps": course.steps,
        "cameras": cameras_to_dict(course.cameras) if course.cameras else None,
    }  # fmt: skip


def scene_from_dict(saved: dict[str, Any]) -> tuple[GaussianScene, Course]:
    scene = GaussianScene(*(saved[name] for name in NAMES))
    scene.filter_3d, scene.active_degree = saved["filter_3d"], int(saved["active_degree"])
    cameras = () if saved["cameras"] is None else cameras_from_dict(saved["cameras"])
    early = [tuple(pair) for pair in saved["early"]]
    return scene, Course(json.loads(saved["history"]), early, int(saved["steps"]), cameras)
