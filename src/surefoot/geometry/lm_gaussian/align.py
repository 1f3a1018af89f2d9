"""Stage 0a: one world out of many pairs. Every photo gets a depth map, a pose and a focal length that explain all pairwise pointmaps.

    chi_i(p) = T_i [ D_i(p) K_i^-1 (p, 1) ]
    L = 1/|E| sum_e [ mean_p w_e^i |chi_i - s_e P_e X_e^i| + mean_p w_e^j |chi_j - s_e P_e X_e^j| ] + L_depth / n,  w = log conf

The Euclidean distance (not its square) keeps outliers from ruling. The pairs' log scales are shifted at every step so that their
mean stays at log 0.5: without that gauge everything shrinks to a point. `L_depth` correlates D_i with a monocular depth map, and
by default moves only pixels whose confidence is low (`depth_scope="unsure"`): the mono map orders the far background, where stereo
is blind, but would bend what stereo knows.

A pair that is confident and wrong is picked first by the spanning tree and ruins everything. So the residual of each pair is looked at
after the fit; while the worst is above five times the median it is dropped and the fit starts anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from surefoot.errors import check, check_at_least, check_choice, check_positive
from surefoot.geometry.lm_gaussian.align_fit import Fit, FitOptions, Progress, world_points
from surefoot.geometry.lm_gaussian.align_start import Pairs, check_pairs, reached
from surefoot.geometry.lm_gaussian.priors import PairPointmaps
from surefoot.geometry.lm_gaussian.stages import Checkpoint
from surefoot.nn.geometry.rotations import check_rotation, invert_rigid

MISFIT = 5.0  # a pair whose residual is so many times the median goes


@dataclass(frozen=True)
class GlobalAlignment:
    """One world. `conf` is the mean over the pairs, zero where cleaned; `dropped` names the pairs that did not fit."""

    w2c: Tensor  # [n, 4, 4]
    K: Tensor  # [n, 3, 3]
    depths: Tensor  # [n, H, W]
    conf: Tensor  # [n, H, W]
    pair_scales: dict[tuple[int, int], float]
    residuals: dict[tuple[int, int], float]
    dropped: tuple[tuple[int, int], ...] = ()
    losses: tuple[float, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()  # what a reader should know of the start

    @property
    def points(self) -> Tensor:  # [n, H, W, 3]
        """Every pixel's point in the world, cleaned or not."""
        return world_points(self.depths, self.K, invert_rigid(self.w2c))


def align_pointmaps(
    pairs: Sequence[PairPointmaps],
    *,
    names: Sequence[str] | None = None,
    mono_depth: Tensor | None = None,  # [n, H, W], any scale and shift
    K: Tensor | None = None,  # [n, 3, 3]: known intrinsics, else estimated
    w2c: Tensor
    | Mapping[int, Tensor]
    | None = None,  # [n, 4, 4], or [4, 4] by photo: known poses, others are estimated
    shared_focal: bool = True,
    adaptor: bool = False,
    depth_scope: Literal["unsure", "all"] = "unsure",
    clean_every: int | None = 50,
    tol: float = 0.03,
    steps: int = 500,
    lr: float = 0.01,
    generator: torch.Generator | None = None,
    damage: Callable[[dict[str, Tensor]], None] | None = None,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> GlobalAlignment:
    """Fit one world to the pairs; n is one more than the highest number of a photo in them.

    - `names`: what the photos are called in errors and notes (default: their numbers).
    - `mono_depth`: depth guidance; None switches it off. `clean_every=None` switches cleaning off within the fit.
    - `K`, `w2c`: what is known is held fixed. Two known poses tell the scale, so from two on the gauge is switched off.
    - `shared_focal`: one camera took all photos (the photos' median focal is the start); else a focal a photo.
    - `adaptor`: each pair may also stretch its depth against its width (volume kept).
    - `damage(parameters)`: changes the starting point in place (for trying how far the fit comes back).
    - `checkpoint`: take up the fit that it holds, and keep this one there; the end is the same to the bit.

    World units are arbitrary unless two poses are known; focal lengths are in pixels of the maps. Raises `InvalidInput` for maps that cannot be used,
    photos that no pair of any confidence leads to, a depth prior that is constant, a fit that diverges, and cameras that collapse into one place.
    """
    n = 1 + max(max(p.i, p.j) for p in pairs) if pairs else 0
    called = [str(k) for k in range(n)] if names is None else list(names)
    check(len(called) >= n, f"There are {len(called)} names for {n} photos.")
    check_pairs(pairs, n, called)
    check_choice("depth_scope", depth_scope, ("unsure", "all"))
    check(K is None or K.shape == (n, 3, 3), f"K must be [{n}, 3, 3], one for each photo, got {None if K is None else list(K.shape)}.")  # fmt: skip
    wanted = (n, *pairs[0].conf_i.shape)
    check(mono_depth is None or mono_depth.shape == wanted, f"mono_depth must be {list(wanted)}, the size of the maps, got {None if mono_depth is None else list(mono_depth.shape)}.")  # fmt: skip
    check_at_least("steps", steps, 0)
    check_positive("lr", lr)
    if mono_depth is not None:
        flat = [k for k, m in enumerate(mono_depth) if float(m.std()) < 1e-8]
        check(
            not flat,
            f"The depth prior is constant on photos {', '.join(called[k] for k in flat)}; it orders nothing, so leave it out.",
        )
    known = _known(w2c, n)
    options = FitOptions(
        K, known, shared_focal, adaptor, mono_depth, depth_scope, clean_every, tol, steps, lr, tuple(called)
    )
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    saved = None if checkpoint is None else checkpoint.load(generator)
    dropped: list[tuple[int, int]] = [] if saved is None else [(i, j) for i, j in saved["dropped"]]
    while True:
        kept = [p for p in pairs if (p.i, p.j) not in dropped]
        fit = Fit(Pairs(kept), n, options)
        if damage is not None:
            with torch.no_grad():
                damage(fit.parameters)
        inside = None if saved is None else saved["inner"]
        within = None if checkpoint is None else checkpoint.within({"dropped": list(dropped)}, inside)
        losses, saved = fit.run(generator, progress, within), None
        residuals = fit.residuals()
        worst = max(residuals, key=lambda e: residuals[e])
        middle = sorted(residuals.values())[len(residuals) // 2]
        without = [p for p in kept if (p.i, p.j) != worst]
        fits = residuals[worst] <= MISFIT * max(middle, 1e-6)
        if fits or len(dropped) >= len(pairs) // 10 or len(reached(without)) < n:
            return _result(fit, residuals, tuple(dropped), tuple(losses))
        dropped.append(worst)


def _known(w2c: Tensor | Mapping[int, Tensor] | None, n: int) -> dict[int, Tensor]:
    if w2c is None:
        return {}
    known = dict(w2c) if isinstance(w2c, Mapping) else dict(enumerate(w2c))
    odd = sorted(k for k in known if not 0 <= k < n)
    check(not odd, f"Poses are given for photos {', '.join(map(str, odd))}, and the pairs show photos 0 to {n - 1}.")
    for k, pose in known.items():
        check(pose.shape == (4, 4), f"The pose of photo {k} must be [4, 4], got {list(pose.shape)}.")
        check_rotation(f"The pose of photo {k}", pose[:3, :3])
    return known


@torch.no_grad()
def _result(fit: Fit, residuals: dict[tuple[int, int], float], dropped: Any, losses: tuple[float, ...]) -> GlobalAlignment:  # fmt: skip
    K, c2w, depths = fit.cameras()
    scales = {(p.i, p.j): float(s) for p, s in zip(fit.pairs.list, fit.log_scales().exp(), strict=True)}
    conf = torch.where(fit.keep, fit.conf, torch.zeros_like(fit.conf))
    return GlobalAlignment(invert_rigid(c2w), K, depths, conf.to(depths), scales, residuals, dropped, losses, fit.notes)
