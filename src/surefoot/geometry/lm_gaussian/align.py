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

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from surefoot.errors import InvalidInput, check, check_at_least, check_choice, check_positive
from surefoot.geometry.lm_gaussian.clean import clean_confidence
from surefoot.geometry.lm_gaussian.losses import local_pearson_loss, pearson_depth_loss
from surefoot.geometry.lm_gaussian.priors import PairPointmaps
from surefoot.nn.geometry.alignment import umeyama
from surefoot.nn.geometry.cameras import pixel_centres
from surefoot.nn.geometry.rotations import invert_rigid, matrix_to_quaternion, quaternion_to_matrix, rigid

MEAN_LOG_SCALE = math.log(0.5)
UNSURE = 5.0  # confidence below which the monocular depth may move a pixel
Progress = Callable[[int, int, float], None]  # step, steps, loss


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

    @property
    def points(self) -> Tensor:  # [n, H, W, 3], world
        return world_points(self.depths, self.K, invert_rigid(self.w2c))


def world_points(depths: Tensor, K: Tensor, c2w: Tensor) -> Tensor:  # [n, H, W], [n, 3, 3], [n, 4, 4] -> [n, H, W, 3]
    height, width = depths.shape[1:]
    pixels = pixel_centres(width, height, dtype=depths.dtype, device=depths.device)
    x = (pixels[..., 0] - K[:, 0, 2, None, None]) / K[:, 0, 0, None, None]
    y = (pixels[..., 1] - K[:, 1, 2, None, None]) / K[:, 1, 1, None, None]
    local = torch.stack([x * depths, y * depths, depths], -1).flatten(1, 2)
    return (local @ c2w[:, :3, :3].mT + c2w[:, None, :3, 3]).unflatten(1, (height, width))


def focal_from_pointmap(
    points: Tensor,  # [H, W, 3], in the camera's own frame
    conf: Tensor,  # [H, W]
    iterations: int = 20,
) -> float:
    """argmin_f sum w |(u - cx, v - cy) - f (x, y) / z|, by Weiszfeld's re-weighting; the principal point is the middle."""
    height, width = conf.shape
    pixels = pixel_centres(width, height, dtype=points.dtype, device=points.device) - points.new_tensor(
        [width / 2, height / 2]
    )
    front = points[..., 2] > 1e-6
    check(bool(front.any()), "A pointmap has no pixel in front of its camera, so it tells no focal length.")
    rays, pixels, w = points[front][:, :2] / points[front][:, 2:], pixels[front], conf[front]
    weight, focal = w, torch.ones(())
    for _ in range(iterations):
        focal = (weight[:, None] * pixels * rays).sum() / (weight[:, None] * rays * rays).sum().clamp_min(1e-12)
        weight = w / (pixels - focal * rays).norm(dim=1).clamp_min(1e-6)
    check(float(focal) > 0, "The stereo prior's pointmaps are mirrored: they fit a negative focal length; check the prior's axes (x right, y down, z forward).")  # fmt: skip
    return float(focal)


class _Pairs:
    """All pairs stacked."""

    def __init__(self, pairs: Sequence[PairPointmaps]) -> None:
        self.list = list(pairs)
        self.i = torch.tensor([p.i for p in pairs])
        self.j = torch.tensor([p.j for p in pairs])
        self.points = torch.stack(
            [torch.stack([p.points_i.flatten(0, 1), p.points_j.flatten(0, 1)]) for p in pairs], 1
        )  # [2, E, P, 3]
        self.conf = torch.stack([torch.stack([p.conf_i.flatten(), p.conf_j.flatten()]) for p in pairs], 1)  # [2, E, P]
        self.weight = self.conf.clamp_min(1.0).log()
        self.photos = torch.stack([self.i, self.j])  # [2, E]


def check_pairs(pairs: Sequence[PairPointmaps], n: int) -> None:
    """Refuse unusable maps, mixed sizes, and a graph in which some photo cannot be reached."""
    check(len(pairs) > 0, "There are no pairs to align; give at least two photos.")
    for pair in pairs:
        pair.checked()
    shape = pairs[0].conf_i.shape
    odd = [f"({p.i}, {p.j})" for p in pairs if p.conf_i.shape != shape or p.conf_j.shape != shape]
    check(not odd, f"All pointmaps must have one size, {tuple(shape)}; the pairs {', '.join(odd[:5])} have another.")
    seen, grown = {pairs[0].i}, True
    while grown:
        more = {k for p in pairs if (p.i in seen) != (p.j in seen) for k in (p.i, p.j)}
        grown = bool(more - seen)
        seen |= more
    lost = sorted(set(range(n)) - seen)
    if lost:
        raise InvalidInput(f"No chain of pairs leads to photos {', '.join(map(str, lost))}; take photos that overlap with the others, or leave these out.")  # fmt: skip


def align_pointmaps(
    pairs: Sequence[PairPointmaps],
    *,
    mono_depth: Tensor | None = None,  # [n, H, W], any scale and shift
    K: Tensor | None = None,  # [n, 3, 3]: known intrinsics, else estimated
    w2c: Tensor | None = None,  # [n, 4, 4]: known poses, else estimated
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
) -> GlobalAlignment:
    """Fit one world to the pairs.

    - `mono_depth`: depth guidance; None switches it off. `clean_every=None` switches cleaning off within the fit.
    - `K`, `w2c`: what is known is held fixed; with known poses the scale is known as well, and the gauge is switched off.
    - `shared_focal`: one camera took all photos (the photos' mean focal is used); else a focal a photo.
    - `adaptor`: each pair may also stretch its depth against its width (volume kept).
    - `damage(parameters)`: changes the starting point in place (for trying how far the fit comes back).
    """
    n = 1 + max(max(p.i, p.j) for p in pairs) if pairs else 0
    check_pairs(pairs, n)
    check_choice("depth_scope", depth_scope, ("unsure", "all"))
    check_at_least("steps", steps, 0)
    check_positive("lr", lr)
    if mono_depth is not None:
        flat = [k for k, m in enumerate(mono_depth) if float(m.std()) < 1e-8]
        check(
            not flat,
            f"The depth prior is constant on photos {', '.join(map(str, flat))}; it orders nothing, so leave it out.",
        )
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    kept, dropped = list(pairs), []
    while True:
        fit = _Fit(_Pairs(kept), n, K, w2c, shared_focal, adaptor)
        if damage is not None:
            with torch.no_grad():
                damage(fit.parameters)
        losses = fit.run(steps, lr, mono_depth, depth_scope, clean_every, tol, generator, progress)
        residuals = fit.residuals()
        worst = max(residuals, key=lambda e: residuals[e])
        middle = sorted(residuals.values())[len(residuals) // 2]
        without = [p for p in kept if (p.i, p.j) != worst]
        if residuals[worst] <= 5 * max(middle, 1e-6) or len(dropped) >= len(pairs) // 10 or not _connected(without, n):
            return fit.result(residuals, tuple(dropped), tuple(losses))
        kept = without
        dropped.append(worst)


def _connected(pairs: Sequence[PairPointmaps], n: int) -> bool:
    try:
        check_pairs(pairs, n)
    except InvalidInput:
        return False
    return True


class _Fit:
    """The unknowns of one fit, where they start, and the loop."""

    def __init__(
        self, pairs: _Pairs, n: int, K: Tensor | None, w2c: Tensor | None, shared: bool, adaptor: bool
    ) -> None:
        self.pairs, self.n, self.known_K, self.known_w2c = pairs, n, K, w2c
        self.shape = tuple(pairs.list[0].conf_i.shape)
        self.conf = self._photo_confidence()
        self.keep = torch.ones_like(self.conf, dtype=torch.bool)
        with torch.no_grad():
            focals = self._focals(shared)
            c2w, depths = self._spanning_tree(focals)
            dtype = pairs.points.dtype
            self.parameters: dict[str, Tensor] = {
                "log_depth": depths.clamp_min(1e-4).log(),
                "quat": matrix_to_quaternion(c2w[:, :3, :3]),
                "centre": c2w[:, :3, 3].clone(),
                "focal": 20 * focals[: 1 if shared else n].log(),
                **self._pair_start(world_points(depths, self._K(focals), c2w)),
                "pair_stretch": torch.zeros(len(pairs.i), dtype=dtype),
            }
        fixed = {"focal"} if K is not None else set()
        fixed |= {"quat", "centre"} if w2c is not None else set()
        fixed |= set() if adaptor else {"pair_stretch"}
        self.free = [p.requires_grad_() for name, p in self.parameters.items() if name not in fixed]

    # --- where the fit starts ---

    def _photo_confidence(self) -> Tensor:  # [n, H, W], mean over the pairs that show the photo
        total, count = (torch.zeros(self.n, self.pairs.conf.shape[-1]) for _ in range(2))
        photos = self.pairs.photos.flatten()
        total.index_add_(0, photos, self.pairs.conf.flatten(0, 1).float())
        count.index_add_(0, photos, torch.ones(len(photos), total.shape[1]))
        return (total / count.clamp_min(1)).unflatten(1, self.shape)

    def _focals(self, shared: bool) -> Tensor:  # [n]
        if self.known_K is not None:
            return self.known_K[:, 0, 0].clone()
        found: list[list[float]] = [[] for _ in range(self.n)]
        for pair in self.pairs.list:
            found[pair.i].append(focal_from_pointmap(pair.points_i, pair.conf_i))
        everyone = sorted(f for fs in found for f in fs)
        middle = everyone[len(everyone) // 2]
        each = [sorted(fs)[len(fs) // 2] if fs and not shared else middle for fs in found]
        return torch.tensor(each, dtype=self.pairs.points.dtype)

    def _K(self, focals: Tensor) -> Tensor:  # [n, 3, 3]
        if self.known_K is not None:
            return self.known_K.to(focals)
        height, width = self.shape
        middle = focals.new_tensor([[0, 0, width / 2], [0, 0, height / 2], [0, 0, 1]])
        diagonal = focals.new_tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 0]])
        return middle + focals.expand(self.n)[:, None, None] * diagonal

    def _spanning_tree(self, focals: Tensor) -> tuple[Tensor, Tensor]:  # c2w [n, 4, 4], depths [n, H, W]
        """Photos one after another along the surest pairs; each new map is brought to the world by its partner's."""
        pairs = self.pairs
        score = pairs.conf.mean(-1).prod(0)
        order = torch.argsort(score, descending=True).tolist()
        first = order[0]
        world: dict[int, Tensor] = {int(pairs.i[first]): pairs.points[0, first]}
        while len(world) < self.n:
            e = next(e for e in order if (int(pairs.i[e]) in world) != (int(pairs.j[e]) in world))
            old = 0 if int(pairs.i[e]) in world else 1
            photo, new = int(pairs.photos[old, e]), int(pairs.photos[1 - old, e])
            move = umeyama(pairs.points[old, e], world[photo], pairs.weight[old, e] + 1e-6)
            world[new] = move.apply(pairs.points[1 - old, e])
        maps = torch.stack([world[k] for k in range(self.n)])
        c2w = torch.stack([self._pose_of(k, maps[k]) for k in range(self.n)])
        local = (maps - c2w[:, None, :3, 3]) @ c2w[:, :3, :3]
        if self.known_w2c is not None:
            return self._onto_known(c2w, local)
        return c2w, local[..., 2].unflatten(1, self.shape)

    def _pose_of(self, photo: int, world: Tensor) -> Tensor:  # [4, 4]
        """cam -> world of a photo, from the surest pair that shows it in its own frame."""
        own = [e for e in range(len(self.pairs.i)) if int(self.pairs.i[e]) == photo]
        check(
            bool(own),
            f"Photo {photo} is never the first of a pair, so its own frame is unknown; predict both orders of each pair.",
        )
        best = max(own, key=lambda e: float(self.pairs.conf[:, e].mean()))
        move = umeyama(self.pairs.points[0, best], world, self.pairs.weight[0, best] + 1e-6)
        return rigid(move.rotation, move.translation)

    def _onto_known(self, c2w: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
        assert self.known_w2c is not None
        known = invert_rigid(self.known_w2c).to(c2w)
        between = torch.pdist(known[:, :3, 3]).mean() / torch.pdist(c2w[:, :3, 3]).mean().clamp_min(1e-9)
        return known, (local[..., 2] * between).unflatten(1, self.shape)

    def _pair_start(self, world: Tensor) -> dict[str, Tensor]:
        """Each pair's similarity from its frame to the world, by both of its maps."""
        pairs, flat = self.pairs, world.flatten(1, 2)
        target = flat[pairs.photos]  # [2, E, P, 3]
        move = umeyama(pairs.points.transpose(0, 1).flatten(1, 2), target.transpose(0, 1).flatten(1, 2), pairs.weight.transpose(0, 1).flatten(1) + 1e-6)  # fmt: skip
        return {
            "pair_quat": matrix_to_quaternion(move.rotation),
            "pair_shift": move.translation,
            "pair_log_scale": move.scale.log(),
        }

    # --- the fit ---

    def _gauge(self) -> Tensor:  # [E], log scales with their mean fixed
        log_scale = self.parameters["pair_log_scale"]
        return log_scale if self.known_w2c is not None else log_scale - log_scale.mean() + MEAN_LOG_SCALE

    def cameras(self) -> tuple[Tensor, Tensor, Tensor]:  # K [n, 3, 3], c2w [n, 4, 4], depths [n, H, W]
        p = self.parameters
        return (
            self._K((p["focal"] / 20).exp()),
            rigid(quaternion_to_matrix(p["quat"]), p["centre"]),
            p["log_depth"].exp(),
        )

    def distances(self) -> Tensor:  # [2, E, P], weighted
        p, pairs = self.parameters, self.pairs
        K, c2w, depths = self.cameras()
        chi = world_points(depths, K, c2w).flatten(1, 2)[pairs.photos]
        stretch = torch.stack([p["pair_stretch"], p["pair_stretch"], -2 * p["pair_stretch"]], -1).exp()
        motion = quaternion_to_matrix(p["pair_quat"]) * (self._gauge().exp()[:, None] * stretch)[:, None, :]
        placed = pairs.points @ motion.mT + p["pair_shift"][:, None]
        weight = pairs.weight * self.keep.flatten(1)[pairs.photos]
        return weight * (chi - placed).square().sum(-1).clamp_min(1e-20).sqrt()

    def run(
        self, steps: int, lr: float, mono: Tensor | None, scope: str, clean_every: int | None, tol: float,
        generator: torch.Generator, progress: Progress | None,
    ) -> list[float]:  # fmt: skip
        if self.known_w2c is None:  # the gauge at the start: the world takes the scale that the pairs are given
            with torch.no_grad():
                self._rescale(float(MEAN_LOG_SCALE - self.parameters["pair_log_scale"].mean()))
        optimizer = torch.optim.Adam(self.free, lr=lr, betas=(0.9, 0.9))
        losses = []
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            loss = self.distances().mean(-1).sum(0).mean()
            if mono is not None:
                loss = loss + self._depth_loss(mono, scope, step, generator) / self.n
            value = float(loss.detach())
            if not math.isfinite(value):
                raise InvalidInput(
                    f"The alignment diverged at step {step}; lower lr (now {lr:g}) or check the pointmaps."
                )
            losses.append(value)
            loss.backward()
            optimizer.step()
            if clean_every and step > 100 and step % clean_every == 0:
                self._clean(tol)
            if progress is not None:
                progress(step + 1, steps, value)
        self._check_spread()
        return losses

    @torch.no_grad()
    def _rescale(self, log_factor: float) -> None:
        p = self.parameters
        p["log_depth"].add_(log_factor)
        p["centre"].mul_(math.exp(log_factor))
        p["pair_shift"].mul_(math.exp(log_factor))
        p["pair_log_scale"].add_(log_factor)

    def _depth_loss(self, mono: Tensor, scope: str, step: int, generator: torch.Generator) -> Tensor:
        _, _, depths = self.cameras()
        depths = depths if scope == "all" else torch.where(self.conf < UNSURE, depths, depths.detach())
        box = 32 * min(self.shape) // 512 if min(self.shape) > 100 else max(4, min(self.shape) // 3)
        total = depths.new_zeros(())
        for depth, prior in zip(depths, mono.to(depths), strict=True):
            local = local_pearson_loss(depth, prior, max(box, 4), generator=generator)
            local = local + edge_aware_smoothness(depth, prior) if step > 100 else local
            total = total + pearson_depth_loss(depth, prior) + 5 * local
        return total

    @torch.no_grad()
    def _clean(self, tol: float) -> None:
        K, c2w, depths = self.cameras()
        self.keep = clean_confidence(depths, self.conf, invert_rigid(c2w), K, tol=tol) > 0

    def _check_spread(self) -> None:
        centres = self.parameters["centre"].detach()
        spread = float((centres - centres.mean(0)).norm(dim=1).max())
        if not spread > 1e-4 * float(self.parameters["log_depth"].detach().exp().median()):
            raise InvalidInput(
                "The alignment collapsed: all cameras stand in one place; the photos need some distance between them."
            )

    @torch.no_grad()
    def residuals(self) -> dict[tuple[int, int], float]:
        per_pair = self.distances().sum((0, 2)) / self.pairs.weight.sum((0, 2)).clamp_min(1e-9)
        return {(p.i, p.j): float(r) for p, r in zip(self.pairs.list, per_pair, strict=True)}

    @torch.no_grad()
    def result(self, residuals: dict, dropped: tuple, losses: tuple[float, ...]) -> GlobalAlignment:
        K, c2w, depths = self.cameras()
        scales = {(p.i, p.j): float(s) for p, s in zip(self.pairs.list, self._gauge().exp(), strict=True)}
        conf = torch.where(self.keep, self.conf, torch.zeros_like(self.conf))
        return GlobalAlignment(invert_rigid(c2w), K, depths, conf.to(depths), scales, residuals, dropped, losses)


def edge_aware_smoothness(
    depth: Tensor,  # [H, W]
    guide: Tensor,  # [H, W], the monocular depth
) -> Tensor:
    """sum |dD| exp(-|dM|) / sum exp(-|dM|), with D by its mean and M by its standard deviation: neither the scale of the scene nor that of the
    prior matters, so it cannot shrink the scene."""
    d, m = depth / depth.mean(), guide / guide.std().clamp_min(1e-8)
    total, weights = depth.new_zeros(()), depth.new_zeros(())
    for axis in (0, 1):
        weight = torch.exp(-m.diff(dim=axis).abs())
        total, weights = total + (d.diff(dim=axis).abs() * weight).sum(), weights + weight.sum()
    return total / weights
