"""Large networks of a person's own behind the protocols of `priors.py`: DUSt3R and VGGT for geometry, Marigold for depth and normals, and a
diffusion pipeline for the finished video. They are loaded from disk (`local_models.py`), and what they answer is checked before it is believed.

Conventions that are translated here, since each network has its own:

    DUSt3R      photos in [-1, 1], sides divisible by 16; both maps in the frame of the first camera; a scale of the pair's own
    VGGT        photos in [0, 1], sides divisible by 14; w2c in OpenCV axes; pose code (t, quaternion x y z w, vertical and horizontal field of view)
    Marigold    depth 0 near to 1 far, or disparity 0 far to 1 near; normals with x right, y up, z towards the viewer: ours are (x, -y, -z)

Sources: Wang et al., DUSt3R, 2023, arXiv 2312.14132; Wang et al., VGGT, 2025, arXiv 2503.11651; Ke et al., Marigold, 2023, arXiv 2312.02145.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import InvalidInput, Refused, check, check_at_least, check_open_unit
from surefoot.geometry.lm_gaussian.clean import cloud_of
from surefoot.geometry.lm_gaussian.local_models import load_network, load_pipeline
from surefoot.geometry.lm_gaussian.priors import MultiView, PairPointmaps
from surefoot.nn.geometry.cameras import Camera
from surefoot.nn.geometry.rotations import quaternion_to_matrix

Network = Callable[..., Any]


def _loaded(model: Network | Path | str, trust: bool) -> tuple[Network, str, bool]:
    """The network, what to call it, and whether it is an exported file, which takes tensors only."""
    if isinstance(model, (str, Path)):
        return load_network(model, trust=trust), Path(model).name, ".py:" not in str(model)
    check(callable(model), f"The network must be callable or a path, got {type(model).__name__}.")
    return model, type(model).__name__, False


def _device_of(network: Network) -> torch.device:
    first = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    return torch.device("cpu") if first is None else first.device


def _ask(network: Network, what: str, *inputs: Any) -> Any:
    try:
        with torch.no_grad():
            return network(*inputs)
    except Exception as error:  # whatever a stranger's network raises
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InvalidInput(f"{what} fails on these photos ({type(error).__name__}: {line}); check that it takes inputs of this kind.") from error  # fmt: skip


def _sized(images: Sequence[Tensor], side: int, multiple: int) -> Tensor:  # each [H, W, 3] -> [N, 3, h, w]
    """The longer side at `side`, both at the nearest multiple; the little stretch this means is below half a multiple."""
    x = torch.stack([im.float() for im in images]).permute(0, 3, 1, 2)
    factor = side / max(x.shape[2:])
    size = [max(multiple, multiple * round(factor * s / multiple)) for s in x.shape[2:]]
    return F.interpolate(x, size=size, mode="bilinear", antialias=True).clamp(0, 1)


def nearest(maps: Tensor, height: int, width: int) -> Tensor:  # [V, h, w, ...] -> [V, H, W, ...]
    """Another number of pixels without mixing two surfaces."""
    rows = ((torch.arange(height) + 0.5) * maps.shape[1] / height).long().to(maps.device)
    columns = ((torch.arange(width) + 0.5) * maps.shape[2] / width).long().to(maps.device)
    return maps[:, rows[:, None], columns[None, :]]


# --------------------------------------------------------------------------------------------------------- DUSt3R


@dataclass
class Dust3rPrior:
    """A `StereoPrior` from any network that answers like DUSt3R.

    `model`: a callable, or a path (TorchScript, a `.pt2` of torch.export, `file.py:factory`). A callable and a factory's network are called as
    DUSt3R is, with two dicts (`img`, `true_shape`, `idx`, `instance`); an exported file with two tensors [1, 3, h, w]; `dicts` overrides. Answers: two
    dicts (`pts3d`, `conf`; `pts3d_in_other_view`, `conf`), a dict with those as `pred1` and `pred2`, or (X_ii, X_ji, conf_i, conf_j).
    """

    model: Network | Path | str
    side: int = 512
    multiple: int = 16
    dicts: bool | None = None
    trust: bool = False
    network_: Network = field(init=False, repr=False)
    name: str = field(init=False)

    def __post_init__(self) -> None:
        check_at_least("side", self.side, self.multiple)
        self.network_, label, exported = _loaded(self.model, self.trust)
        self.dicts = not exported if self.dicts is None else self.dicts
        self.name = f"stereo network {label} (DUSt3R-like)"

    def predict(self, i: int, j: int, image_i: Tensor, image_j: Tensor) -> PairPointmaps:
        """Maps at the photos' size; `InvalidInput` where the answer cannot be used."""
        size, device = image_i.shape[:2], _device_of(self.network_)
        x = [(2 * _sized([im], self.side, self.multiple) - 1).to(device) for im in (image_i, image_j)]
        if self.dicts:
            x = [{"img": y, "true_shape": torch.tensor([y.shape[2:]], dtype=torch.int32), "idx": k, "instance": str(k)} for y, k in zip(x, (i, j), strict=True)]  # fmt: skip
        maps = [_unbatched(t) for t in _pair_answer(_ask(self.network_, f"The {self.name}", *x))]
        for points, conf in (maps[:2], maps[2:]):
            check(points.dim() == 3 and points.shape[2] == 3 and points.shape[:2] == conf.shape, f"The {self.name} answers maps {tuple(points.shape)} with confidence {tuple(conf.shape)}; they must be [h, w, 3] and [h, w].")  # fmt: skip
        X_ii, conf_i, X_ji, conf_j = (nearest(t[None], *size)[0] for t in maps)
        return PairPointmaps(i, j, X_ii, X_ji, conf_i, conf_j).checked()


def _pair_answer(answer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # X_ii, conf_i, X_ji, conf_j
    if isinstance(answer, Mapping) and "pred1" in answer and "pred2" in answer:
        answer = (answer["pred1"], answer["pred2"])
    if isinstance(answer, (tuple, list)) and len(answer) == 4 and all(isinstance(t, Tensor) for t in answer):
        return answer[0], answer[2], answer[1], answer[3]
    if isinstance(answer, (tuple, list)) and len(answer) == 2 and all(isinstance(a, Mapping) for a in answer):
        one, two = answer
        other = two.get("pts3d_in_other_view")
        if "pts3d" in one and "conf" in one and "conf" in two and other is not None:
            return one["pts3d"], one["conf"], other, two["conf"]
    raise InvalidInput("The stereo network must answer two dicts with pts3d, conf and pts3d_in_other_view, conf (as DUSt3R does), or (X_ii, X_ji, conf_i, conf_j).")  # fmt: skip


def _unbatched(t: Tensor) -> Tensor:
    return (t[0] if t.dim() > 2 and t.shape[0] == 1 else t).detach().float().cpu()


# ----------------------------------------------------------------------------------------------------------- VGGT


@dataclass
class VggtPrior:
    """A `MultiViewPrior` from any network that sees all photos at once and answers like VGGT.

    `model` as for `Dust3rPrior`; it is called with [V, 3, h, w] in [0, 1]. Answers: a dict with cameras (`pose_enc` [V, 9], or `extrinsic`
    [V, 3 or 4, 4] and `intrinsic` [V, 3, 3] for h x w pixels) and geometry (`depth` and `depth_conf`, or `world_points` and `world_points_conf`),
    with or without a batch of one; or (pointmaps [V, h, w, 3] in the world, conf [V, h, w], w2c, K). Every photo counts as registered.
    """

    model: Network | Path | str
    side: int = 518
    multiple: int = 14
    trust: bool = False
    network_: Network = field(init=False, repr=False)
    name: str = field(init=False)

    def __post_init__(self) -> None:
        check_at_least("side", self.side, self.multiple)
        self.network_, label, _ = _loaded(self.model, self.trust)
        self.name = f"multi-view network {label} (VGGT-like)"

    def reconstruct(self, images: Sequence[Tensor], names: Sequence[str], K: Tensor | None = None) -> MultiView:
        """Cameras, depths and confidences at the photos' size; `K` [3, 3], if known, replaces the network's."""
        check(len(images) >= 2, f"A reconstruction needs at least two photos, got {len(images)}.")
        check(len({tuple(im.shape) for im in images}) == 1, "The photos must have one size; crop or resize them first.")
        height, width = images[0].shape[:2]
        x = _sized(images, self.side, self.multiple)
        answer = _ask(self.network_, f"The {self.name}", x.to(_device_of(self.network_)))
        w2c, intrinsic, depths, conf = _views_answer(answer, *x.shape[2:], views=len(images), who=self.name)
        for view, name in enumerate(names):
            self._check(name, depths[view], conf[view])
        cameras = [Camera(k, w, x.shape[3], x.shape[2], name).checked().resized(width, height) for k, w, name in zip(intrinsic, w2c, names, strict=True)]  # fmt: skip
        if K is not None:
            cameras = [Camera(K.to(c.K), c.w2c, width, height, c.name) for c in cameras]
        depths, conf = nearest(depths, height, width).clamp_min(0), nearest(conf, height, width)
        keep = (conf >= conf.flatten(1).median(1).values[:, None, None]) & (depths > 0)
        stacked = (torch.stack([c.w2c for c in cameras]), torch.stack([c.K for c in cameras]))
        cloud = cloud_of(depths, keep, torch.stack(list(images)), *stacked, at_most=20_000, generator=torch.Generator().manual_seed(0))  # fmt: skip
        return MultiView(tuple(cameras), tuple(range(len(images))), cloud, depths, conf)

    def _check(self, name: str, depth: Tensor, conf: Tensor) -> None:
        where = f"The {self.name}'s map of photo {name}"
        check(bool(torch.isfinite(depth).all() and torch.isfinite(conf).all()), f"{where} holds NaN or infinite values.")  # fmt: skip
        check(bool((conf > 0).all()), f"{where} has confidences of {float(conf.min()):.3g}; they must be positive (1 means no weight).")  # fmt: skip
        behind = float((depth <= 0).float().mean())
        check(behind <= 0.5, f"{where} puts {behind:.0%} of it behind its own camera; poses must be world to camera, z forward.")  # fmt: skip


def _views_answer(
    answer: Any, height: int, width: int, *, views: int, who: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # w2c [V, 4, 4], K [V, 3, 3], depth [V, h, w], conf [V, h, w]
    if isinstance(answer, (tuple, list)) and len(answer) == 4:
        answer = dict(zip(("world_points", "world_points_conf", "extrinsic", "intrinsic"), answer, strict=True))
    check(isinstance(answer, Mapping), f"The {who} answers {type(answer).__name__}; a dict as VGGT's, or (pointmaps, conf, w2c, K) is needed.")  # fmt: skip

    given: Mapping[str, Tensor] = answer  # type: ignore[assignment]

    def get(name: str, dims: int) -> Tensor | None:  # without a batch of one
        t = given.get(name)
        if t is None:
            return None
        t = t.detach().float().cpu()
        t = t[0] if t.dim() == dims + 1 and t.shape[0] == 1 else t
        check(t.dim() == dims and len(t) == views, f"The {who} answers {name} of shape {tuple(t.shape)} for {views} photos.")  # fmt: skip
        return t

    code, w2c, K = get("pose_enc", 2), get("extrinsic", 3), get("intrinsic", 3)
    if w2c is None or K is None:
        check(code is not None, f"The {who} gives no cameras; pose_enc, or extrinsic and intrinsic, are needed.")
        w2c, K = decode_pose(code, height, width)  # type: ignore[arg-type]
    w2c = torch.cat([w2c[:, :3], w2c.new_tensor([0, 0, 0, 1.0]).expand(len(w2c), 1, 4)], 1)
    depth, conf = get("depth", 4), get("depth_conf", 3)
    if depth is None or conf is None:
        points, conf = get("world_points", 4), get("world_points_conf", 3)
        check(points is not None and conf is not None, f"The {who} gives no geometry; depth and depth_conf, or world_points and world_points_conf, are needed.")  # fmt: skip
        depth = (torch.einsum("vi,vhwi->vhw", w2c[:, 2, :3], points) + w2c[:, 2, 3, None, None])[..., None]  # type: ignore[arg-type]
    check(depth.shape[1:3] == (height, width) == conf.shape[1:], f"The {who} answers maps of {tuple(depth.shape[1:3])} and {tuple(conf.shape[1:])} pixels for photos of {(height, width)}.")  # type: ignore[union-attr]  # fmt: skip
    return w2c, K, depth[..., 0], conf  # type: ignore[return-value]


def decode_pose(code: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:  # [V, 9] -> w2c [V, 3, 4], K [V, 3, 3]
    """VGGT's pose code: translation and quaternion (scalar last) of world to camera, vertical and horizontal field of view in radians."""
    rotation = quaternion_to_matrix(code[:, [6, 3, 4, 5]])
    K = torch.zeros(len(code), 3, 3)
    K[:, 0, 0], K[:, 1, 1] = (width / 2) / (code[:, 8] / 2).tan(), (height / 2) / (code[:, 7] / 2).tan()
    K[:, 0, 2], K[:, 1, 2], K[:, 2, 2] = width / 2, height / 2, 1
    return torch.cat([rotation, code[:, :3, None]], 2), K


# ------------------------------------------------------------------------------------------------------- Marigold


@dataclass
class _Marigold:
    """`folder`: a diffusers folder of the pipeline, or the pipeline. `steps` None: what the model was saved with (else 10)."""

    folder: Any
    steps: int | None = None
    ensemble: int = 1
    seed: int = 0
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    pipeline_: Any = field(init=False, repr=False)
    name: str = field(init=False)
    what = "MarigoldPipeline"

    def __post_init__(self) -> None:
        check_at_least("ensemble", self.ensemble, 1)
        given = isinstance(self.folder, (str, Path))
        self.pipeline_ = load_pipeline(self.folder, device=self.device, dtype=self.dtype) if given else self.folder
        found = type(self.pipeline_).__name__
        label = Path(self.folder).name if given else found
        if found != self.what:
            raise Refused(f"{label} is a {found}; a {self.what} is needed here.")
        self.name = f"{self.what.removesuffix('Pipeline')} ({label})"

    def _ask(self, index: int, image: Tensor) -> Tensor:  # [H, W, 3] -> [C, H, W]
        pipe = self.pipeline_
        answer = pipe(
            image.permute(2, 0, 1)[None].float().clamp(0, 1), num_inference_steps=self.steps or pipe.default_denoising_steps or 10,
            processing_resolution=pipe.default_processing_resolution or 768, ensemble_size=self.ensemble, output_type="pt",
            generator=torch.Generator().manual_seed(1_000_003 * self.seed + index),
        )  # fmt: skip
        found = answer.prediction[0].float().cpu()
        check(bool(torch.isfinite(found).all()), f"{self.name} answers NaN or infinite values on photo {index}; float16 weights may be the cause.")  # fmt: skip
        return found


@dataclass
class MarigoldDepthPrior(_Marigold):
    """A `MonoDepthPrior`: depth up to scale and shift, larger is farther.

    A model that predicts disparity d (0 far, 1 near, its shift unknown too) is turned over: 1 / (d + floor), which takes the farthest point to be
    1 / floor times as far as one at disparity 1.
    """

    floor: float = 0.05
    what = "MarigoldDepthPipeline"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_open_unit("floor", self.floor)
        kind = self.pipeline_.config.prediction_type
        if kind not in ("depth", "disparity"):
            raise Refused(f"{self.name} says it predicts {kind!r}; only depth and disparity tell which way is far.")

    def predict(self, index: int, image: Tensor) -> Tensor:  # [H, W]
        found = self._ask(index, image)[0]
        check(float(found.max() - found.min()) > 1e-6, f"{self.name} is constant on photo {index}; it orders nothing, so leave it out.")  # fmt: skip
        return found if self.pipeline_.config.prediction_type == "depth" else 1 / (found.clamp(0, 1) + self.floor)


@dataclass
class MarigoldNormalsPrior(_Marigold):
    """A `MonoNormalPrior`: unit normals in OpenCV axes, towards the camera; zero where the model gives none."""

    what = "MarigoldNormalsPipeline"

    def predict(self, index: int, image: Tensor) -> Tensor:  # [H, W, 3]
        found = self._ask(index, image).permute(1, 2, 0)
        away = float((found[..., 2] < 0).float().mean())
        check(away <= 0.5, f"{self.name} turns {away:.0%} of photo {index} away from the camera; normals must point towards it.")  # fmt: skip
        length = found.norm(dim=-1, keepdim=True)
        return torch.where(length > 0.5, found / length.clamp_min(1e-6), 0.0) * found.new_tensor([1.0, -1.0, -1.0])
