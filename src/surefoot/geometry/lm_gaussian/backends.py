"""Who answers, by name: `--stereo dust3r:PATH` and its like, in one table. Nothing is chosen silently, and a name that cannot be had is an error.

stereo    colmap | dust3r:PATH | vggt:PATH        depth     none | marigold:PATH       normals   none | marigold:PATH
repair    none | patch | diffusers:PATH           enhance   none | temporal | diffusers:PATH
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from surefoot.errors import InvalidInput, check, check_at_least, check_choice
from surefoot.geometry.lm_gaussian.align import align_pointmaps
from surefoot.geometry.lm_gaussian.enhance import TemporalFilterEnhance
from surefoot.geometry.lm_gaussian.networks import (
    Dust3rPrior,
    MarigoldDepthPrior,
    MarigoldNormalsPrior,
    VggtPrior,
    nearest,
)
from surefoot.geometry.lm_gaussian.priors import (
    ImageRepairPrior,
    MonoDepthPrior,
    MonoNormalPrior,
    MultiView,
    MultiViewPrior,
    PairPointmaps,
    StereoPrior,
    VideoEnhancePrior,
)
from surefoot.geometry.lm_gaussian.repair import PatchDenoiserRepair
from surefoot.geometry.lm_gaussian.stages import Checkpoint
from surefoot.geometry.lm_gaussian.video import DiffusersVideoPrior
from surefoot.nn.geometry.cameras import Camera
from surefoot.nn.geometry.ply import PointCloud

CHOICES = {
    "stereo": ("colmap", "dust3r:PATH", "vggt:PATH"),
    "depth": ("none", "marigold:PATH"),
    "normals": ("none", "marigold:PATH"),
    "repair": ("none", "patch", "diffusers:PATH"),
    "enhance": ("none", "temporal", "diffusers:PATH"),
}


@dataclass(frozen=True)
class Backends:
    """The priors of one run; `stereo` None is structure from motion by pycolmap, which needs the photos' sizes first."""

    stereo: StereoPrior | MultiViewPrior | None = None
    depth: MonoDepthPrior | None = None
    normals: MonoNormalPrior | None = None
    repair: ImageRepairPrior | None = None
    enhance: VideoEnhancePrior | None = None
    asked: tuple[str, ...] = ()  # the names as given, so that a run can be told from another


def parse(question: str, answer: str) -> tuple[str, str | None]:
    """`name` or `name:PATH` of one question's choices, or one sentence."""
    check_choice("question", question, tuple(CHOICES))
    name, _, path = answer.partition(":")
    allowed = {choice.partition(":")[0]: choice.endswith(":PATH") for choice in CHOICES[question]}
    if name not in allowed:
        raise InvalidInput(f"--{question} must be one of {', '.join(CHOICES[question])}, got {answer!r}.")
    if allowed[name] and not path:
        raise InvalidInput(f"--{question} {name} needs the place of the model on this disk: {name}:PATH.")
    check(allowed[name] or not path, f"--{question} {name} takes no path, got {answer!r}.")
    return name, path or None


def load_backends(
    *,
    stereo: str = "colmap",
    depth: str = "none",
    normals: str = "none",
    repair: str = "patch",
    enhance: str = "temporal",
    prompt: str | None = None,
    fit_steps: int | None = None,
    device: torch.device | str = "cpu",
    trust: bool = False,
    on_fit: Callable[[int, int, float], None] | None = None,
) -> Backends:
    """The priors that these names stand for, all models loaded; `device` is where diffusion models run, `prompt` a sentence on the scene,
    `fit_steps` how long the repair model is fitted to it (default 600 for the patch denoiser, 1,800 for LoRA);
    `on_fit(step, steps, loss)` is told how fitting the repair model goes."""
    named = {"stereo": stereo, "depth": depth, "normals": normals, "repair": repair, "enhance": enhance}
    chosen = {question: parse(question, answer) for question, answer in named.items()}  # before gigabytes are read
    where = usable_device(device)
    long: dict[str, Any] = {} if fit_steps is None else {"fit_steps": fit_steps}
    if fit_steps is not None:
        check(chosen["repair"][0] != "none", "fit_steps is how long a repair model is fitted, and none was asked for.")
        check_at_least("fit_steps", fit_steps, 1)

    def made(question: str, **makers: Callable[[str], Any]) -> Any:
        name, path = chosen[question]
        return makers[name](path or "") if name in makers else None

    def moved(prior: Any) -> Any:
        if isinstance(prior.network_, torch.nn.Module):
            prior.network_.to(where)
        return prior

    def diffusers_repair(path: str) -> ImageRepairPrior:
        from surefoot.geometry.lm_gaussian.diffusers_repair import DiffusersControlNetRepair

        prior = DiffusersControlNetRepair.from_folder(path, device=where, on_step=on_fit, **long)
        return prior if prompt is None else replace(prior, prompt=prompt)

    repairer = made("repair", patch=lambda _: PatchDenoiserRepair(widths=(16, 32, 48), batch=16, on_step=on_fit, **long), diffusers=diffusers_repair)  # fmt: skip
    return Backends(
        made("stereo", dust3r=lambda p: moved(Dust3rPrior(p, trust=trust)), vggt=lambda p: moved(VggtPrior(p, trust=trust))),
        made("depth", marigold=lambda p: MarigoldDepthPrior(p, device=where)),
        made("normals", marigold=lambda p: MarigoldNormalsPrior(p, device=where)),
        repairer,
        made("enhance", temporal=lambda _: TemporalFilterEnhance(repairer), diffusers=lambda p: DiffusersVideoPrior(p, device=where)),
        (*named.values(), prompt or "", *(() if fit_steps is None else (f"fit_steps={fit_steps}",))),
    )  # fmt: skip


def usable_device(device: torch.device | str) -> torch.device:
    """The device by its name; `InvalidInput` where this machine has none such."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(
            f"The device {device!r} cannot be used here ({str(error).splitlines()[0][:120]})."
        ) from error
    return found


# ------------------------------------------------------------------------------------------------------ at two sizes


def first_depths(pairs: Sequence[PairPointmaps], n: int) -> tuple[Tensor, Tensor]:  # [n, H, W] twice
    """Depth and confidence of every photo in its own camera, from one pair each: enough to tell near from far."""
    own = {p.i: (p.points_i[..., 2], p.conf_i) for p in pairs}
    return torch.stack([own[k][0] for k in range(n)]), torch.stack([own[k][1] for k in range(n)])


def aligned(
    pairs: Sequence[PairPointmaps], names: Sequence[str], *, mono_depth: Tensor | None = None, K: Tensor | None = None, cleaning: bool = True,
    depth_scope: Literal["unsure", "all"] = "unsure", adaptor: bool = False, steps: int = 500, tol: float = 0.03, seed: int = 0, progress: Callable[[int, int, float], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> MultiView:  # fmt: skip
    """Pairs in one world, as the views that a prior of all photos would give; `K` [3, 3] where known, at the pairs' size; pairs that did not fit are
    named in the notes."""
    height, width = pairs[0].conf_i.shape
    known = None if K is None else K.expand(len(names), 3, 3)
    fit = align_pointmaps(pairs, names=names, mono_depth=mono_depth, K=known, clean_every=50 if cleaning else None, depth_scope=depth_scope, adaptor=adaptor, tol=tol, steps=steps, generator=torch.Generator().manual_seed(seed), progress=progress, checkpoint=checkpoint)  # fmt: skip
    cameras = tuple(Camera(k, w, width, height, name) for k, w, name in zip(fit.K, fit.w2c, names, strict=True))
    notes = fit.notes + tuple(
        f"The pair {names[i]}, {names[j]} did not fit the others and was dropped." for i, j in fit.dropped
    )
    empty = PointCloud(fit.depths.new_zeros(0, 3), fit.depths.new_zeros(0, 3))
    return MultiView(cameras, tuple(range(len(names))), empty, fit.depths, fit.conf, notes)


def resized(found: MultiView, width: int, height: int) -> MultiView:
    """The same views with another number of pixels."""
    maps = {k: None if t is None else nearest(t, height, width) for k, t in (("depths", found.depths), ("conf", found.conf))}  # fmt: skip
    return replace(found, cameras=tuple(c.resized(width, height) for c in found.cameras), **maps)


def oriented(mono: Tensor, depths: Tensor, conf: Tensor) -> tuple[Tensor, str | None]:  # each [V, H, W]
    """The mono maps with far above near: turned over, with a note, where most fall as the surer half of the stereo depths rises."""
    rho = []
    for m, d, c in zip(mono, depths, conf, strict=True):
        sure = (d > 0) & (c >= c.median())
        if int(sure.sum()) >= 2:
            rho.append(torch.corrcoef(torch.stack([m[sure], d[sure]]).double())[0, 1].nan_to_num())
    middle = float(torch.stack(rho).median()) if rho else 0.0
    if middle >= 0:
        return mono, None
    return (
        -mono,
        f"The depth prior's maps fall where the stereo depth rises (correlation {middle:.2f}), as disparity does; they were turned over.",
    )


def asked(predict: Callable[[int, Tensor], Tensor], images: Sequence[Tensor], width: int, height: int) -> Tensor:
    """A mono prior's answers on larger photos, at the size of the splats: [V, H, W, ...]."""
    return torch.cat([nearest(predict(k, image)[None], height, width) for k, image in enumerate(images)])


@dataclass(frozen=True)
class Answers:
    """A mono prior that has been asked already."""

    maps: Tensor  # [V, H, W, ...]
    name: str

    def predict(self, index: int, image: Tensor) -> Tensor:
        return self.maps[index]
