"""What the method asks of large models, as protocols: a person's own network, or an embedded stand-in, answers the same questions.

Nothing here chooses a backend silently: `reconstruct` is given the priors, and its report names them by `name`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from surefoot.errors import InvalidInput, check
from surefoot.nn.geometry.cameras import Camera
from surefoot.nn.geometry.ply import PointCloud


class PairPointmaps(NamedTuple):
    """Two photos of one place as points in the frame of the first camera, at a scale of the pair's own."""

    i: int
    j: int
    points_i: Tensor  # [H, W, 3], the pixels of photo i
    points_j: Tensor  # [H, W, 3], the pixels of photo j
    conf_i: Tensor  # [H, W], above 1
    conf_j: Tensor  # [H, W], above 1

    def checked(self) -> PairPointmaps:
        """This pair, or a clear error where a prior answered nonsense."""
        for name, points, conf in (("i", self.points_i, self.conf_i), ("j", self.points_j, self.conf_j)):
            where = (
                f"The stereo prior's map of photo {self.i if name == 'i' else self.j} in the pair ({self.i}, {self.j})"
            )
            check(points.shape == (*conf.shape, 3) and conf.dim() == 2, f"{where} is {tuple(points.shape)} with confidence {tuple(conf.shape)}; they must be [H, W, 3] and [H, W].")  # fmt: skip
            check(
                bool(torch.isfinite(points).all() and torch.isfinite(conf).all()),
                f"{where} holds NaN or infinite values.",
            )
            check(
                bool((conf > 0).all()),
                f"{where} has confidences of {float(conf.min()):.3g}; they must be positive (1 means no weight).",
            )
        behind = float((self.points_i[..., 2] <= 0).float().mean())
        if behind > 0.5:
            raise InvalidInput(f"The stereo prior puts {behind:.0%} of photo {self.i} behind its own camera in the pair ({self.i}, {self.j}); both maps must be in the frame of camera i, z forward.")  # fmt: skip
        return self

    def to(self, device: torch.device) -> PairPointmaps:
        return self._replace(**{k: t.to(device) for k, t in self._asdict().items() if isinstance(t, Tensor)})


@runtime_checkable
class StereoPrior(Protocol):
    """Pointmaps of two photos, DUSt3R-like."""

    @property
    def name(self) -> str: ...

    def predict(self, i: int, j: int, image_i: Tensor, image_j: Tensor) -> PairPointmaps: ...  # images [H, W, 3]


@dataclass(frozen=True)
class MultiView:
    """What a prior that sees all photos at once gives: VGGT-like networks, or structure from motion."""

    cameras: tuple[Camera, ...]  # of the registered photos, in the order of `registered`
    registered: tuple[int, ...]  # indices into the photos
    cloud: PointCloud
    depths: Tensor | None = None  # [V, H, W], z in each registered camera, 0 where unknown
    conf: Tensor | None = None  # [V, H, W], above 1
    notes: tuple[str, ...] = ()  # warnings a reader must see: unregistered photos, loose settings, poor residuals

    def to(self, device: torch.device) -> MultiView:
        return replace(
            self,
            cameras=tuple(c.to(device) for c in self.cameras),
            cloud=PointCloud(self.cloud.points.to(device), self.cloud.rgb.to(device)),
            depths=None if self.depths is None else self.depths.to(device),
            conf=None if self.conf is None else self.conf.to(device),
        )


class MultiViewPrior(Protocol):
    @property
    def name(self) -> str: ...

    def reconstruct(self, images: Sequence[Tensor], names: Sequence[str], K: Tensor | None) -> MultiView: ...


class MonoDepthPrior(Protocol):
    """Depth of one photo up to an unknown scale and shift; larger is farther."""

    @property
    def name(self) -> str: ...

    def predict(self, index: int, image: Tensor) -> Tensor: ...  # [H, W]


class MonoNormalPrior(Protocol):
    """Normals of one photo in the camera's frame, towards the camera; zero where unknown."""

    @property
    def name(self) -> str: ...

    def predict(self, index: int, image: Tensor) -> Tensor: ...  # [H, W, 3]


class ImageRepairPrior(Protocol):
    """A model that turns a faulty rendering into a plausible photo of this place.

    With `state_dict` and `load_state_dict` it is kept once it is fitted; if `fit` takes `checkpoint` too (`stages.Checkpoint`, which has `load`, `due` and
    `save`; see `fitting.fit_steps`), a fit that is stopped goes on from there.
    """

    @property
    def name(self) -> str: ...

    def fit(self, degraded: Tensor, clean: Tensor, *, generator: torch.Generator) -> None: ...  # [P, H, W, 3] twice

    def repair(self, renders: Tensor, *, strength: float, generator: torch.Generator) -> Tensor: ...  # [V, H, W, 3]


class VideoEnhancePrior(Protocol):
    """A model that makes a rendered clip look filmed; it sees depth and cameras, so that frames can be warped onto each other."""

    @property
    def name(self) -> str: ...

    def enhance(
        self, frames: Tensor, depths: Tensor, cameras: Sequence[Camera], *, strength: float, generator: torch.Generator
    ) -> Tensor: ...  # [F, H, W, 3]


def all_pairs(n: int, window: int = 24) -> list[tuple[int, int]]:
    """Both orders of every pair; beyond `window` photos only neighbours, around the loop."""
    if n <= window:
        return [(i, j) for i in range(n) for j in range(n) if i != j]
    near = {(i, (i + step) % n) for i in range(n) for step in range(1, 4)}
    return sorted(near | {(j, i) for i, j in near})
