"""The unknowns of one alignment, the loss that they minimise, and the loop; see `align` for the equations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from surefoot.errors import InvalidInput
from surefoot.geometry.lm_gaussian.align_start import Pairs, focal_notes, focals_of, place
from surefoot.geometry.lm_gaussian.clean import clean_confidence
from surefoot.geometry.lm_gaussian.losses import local_pearson_loss, pearson_depth_loss
from surefoot.geometry.lm_gaussian.stages import Checkpoint, InnerCheckpoint
from surefoot.nn.geometry.alignment import umeyama
from surefoot.nn.geometry.cameras import pixel_centres
from surefoot.nn.geometry.rotations import invert_rigid, matrix_to_quaternion, quaternion_to_matrix, rigid

MEAN_LOG_SCALE = math.log(0.5)
UNSURE = 5.0  # confidence below which the monocular depth may move a pixel
# Cameras nearer together than this share of the median depth stand in one place: one photo repeated, with a stereo network's noise, spreads by .0004 to .0009.
LEAST_SPREAD = 3e-3
LOG_UNIT = 20.0  # focals and stretches are stored as 20 log: Adam's steps on them are twenty times smaller
Progress = Callable[[int, int, float], None]  # step, steps, loss


def world_points(depths: Tensor, K: Tensor, c2w: Tensor) -> Tensor:  # [n, H, W], [n, 3, 3], [n, 4, 4] -> [n, H, W, 3]
    height, width = depths.shape[1:]
    pixels = pixel_centres(width, height, dtype=depths.dtype, device=depths.device)
    x = (pixels[..., 0] - K[:, 0, 2, None, None]) / K[:, 0, 0, None, None]
    y = (pixels[..., 1] - K[:, 1, 2, None, None]) / K[:, 1, 1, None, None]
    local = torch.stack([x * depths, y * depths, depths], -1).flatten(1, 2)
    return (local @ c2w[:, :3, :3].mT + c2w[:, None, :3, 3]).unflatten(1, (height, width))


@dataclass(frozen=True)
class FitOptions:
    """How a fit goes; the arguments of `align_pointmaps`."""

    K: Tensor | None  # [n, 3, 3]
    known: Mapping[int, Tensor]  # w2c [4, 4] by photo
    shared_focal: bool
    adaptor: bool
    mono_depth: Tensor | None  # [n, H, W]
    depth_scope: Literal["unsure", "all"]
    clean_every: int | None
    tol: float
    steps: int
    lr: float
    names: tuple[str, ...]  # of the photos


class Fit:
    """One fit of one set of pairs."""

    def __init__(self, pairs: Pairs, n: int, options: FitOptions) -> None:
        self.pairs, self.n, self.options, self.shape = pairs, n, options, pairs.shape
        self.conf = pairs.photo_confidence(n)
        self.keep = torch.ones_like(self.conf, dtype=torch.bool)
        # From two known poses on the scale is known, and a second scale held by the gauge would pull against it.
        self.normalised = len(options.known) < 2
        with torch.no_grad():
            shared = options.shared_focal
            focals = focals_of(pairs, n, shared) if options.K is None else options.K[:, 0, 0].to(pairs.points)
            placed = place(pairs, focals, options.known, options.names)
            self.notes = placed.notes if options.K is None else placed.notes + focal_notes(pairs, focals)
            self.parameters: dict[str, Tensor] = {
                "log_depth": placed.depths.clamp_min(1e-4).log(),
                "quat": matrix_to_quaternion(placed.c2w[:, :3, :3]),
                "centre": placed.c2w[:, :3, 3].clone(),
                "focal": LOG_UNIT * focals[: 1 if shared else n].log(),
                **self._pair_start(world_points(placed.depths, self._K(focals), placed.c2w)),
                "pair_stretch": pairs.points.new_zeros(len(pairs.list)),
            }
        fixed = ({"focal"} if options.K is not None else set()) | (set() if options.adaptor else {"pair_stretch"})
        fixed |= {"quat", "centre"} if len(options.known) == n else set()
        self.free = [p.requires_grad_() for name, p in self.parameters.items() if name not in fixed]
        self.held = torch.tensor([k in options.known for k in range(n)], device=self.conf.device)[:, None]

    def _K(self, focals: Tensor) -> Tensor:  # [n, 3, 3]
        if self.options.K is not None:
            return self.options.K.to(focals)
        height, width = self.shape
        middle = focals.new_tensor([[0, 0, width / 2], [0, 0, height / 2], [0, 0, 1]])
        diagonal = focals.new_tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 0]])
        return middle + focals.expand(self.n)[:, None, None] * diagonal

    def _pair_start(self, world: Tensor) -> dict[str, Tensor]:
        """Each pair's similarity from its frame to the world, by both of its maps."""
        pairs = self.pairs
        mine, target, weight = (
            x.transpose(0, 1).flatten(1, 2) for x in (pairs.points, pairs.of_photos(world.flatten(1, 2)), pairs.weight)
        )
        move = umeyama(mine, target, weight + 1e-6)
        return {
            "pair_quat": matrix_to_quaternion(move.rotation),
            "pair_shift": move.translation,
            "pair_log_scale": move.scale.log(),
        }

    # --- the loss ---

    def log_scales(self) -> Tensor:  # [E], with their mean fixed unless poses tell the scale
        log_scale = self.parameters["pair_log_scale"]
        return log_scale - log_scale.mean() + MEAN_LOG_SCALE if self.normalised else log_scale

    def cameras(self) -> tuple[Tensor, Tensor, Tensor]:  # K [n, 3, 3], c2w [n, 4, 4], depths [n, H, W]
        p = self.parameters
        quat, centre = p["quat"], p["centre"]
        if self.options.known:
            quat, centre = (torch.where(self.held, x.detach(), x) for x in (quat, centre))
        c2w = rigid(quaternion_to_matrix(quat), centre)
        return self._K((p["focal"] / LOG_UNIT).exp()), c2w, p["log_depth"].exp()

    def distances(self) -> Tensor:  # [2, E, P], weighted
        p, pairs = self.parameters, self.pairs
        K, c2w, depths = self.cameras()
        chi = pairs.of_photos(world_points(depths, K, c2w).flatten(1, 2))
        log_stretch = p["pair_stretch"] / LOG_UNIT
        stretch = torch.stack([log_stretch, log_stretch, -2 * log_stretch], -1).exp()
        motion = quaternion_to_matrix(p["pair_quat"]) * (self.log_scales().exp()[:, None] * stretch)[:, None, :]
        placed = pairs.points @ motion.mT + p["pair_shift"][:, None]
        weight = pairs.weight * self.keep.flatten(1)[pairs.photos]
        return weight * (chi - placed).square().sum(-1).clamp_min(1e-20).sqrt()

    def _depth_loss(self, mono: Tensor, step: int, generator: torch.Generator) -> Tensor:
        _, _, depths = self.cameras()
        everywhere = self.options.depth_scope == "all"
        depths = depths if everywhere else torch.where(self.conf < UNSURE, depths, depths.detach())
        total = depths.new_zeros(())
        for depth, prior in zip(depths, mono.to(depths), strict=True):
            local = local_pearson_loss(depth, prior, box_of(self.shape), generator=generator)
            local = local + edge_aware_smoothness(depth, prior) if step > 100 else local
            total = total + pearson_depth_loss(depth, prior) + 5 * local
        return total

    # --- the loop ---

    def run(
        self,
        generator: torch.Generator,
        progress: Progress | None = None,
        checkpoint: Checkpoint | InnerCheckpoint | None = None,
    ) -> list[float]:
        """The losses of all steps; a checkpoint's are taken up where they ended."""
        steps, lr, mono, clean_every = (getattr(self.options, k) for k in ("steps", "lr", "mono_depth", "clean_every"))
        optimizer = torch.optim.Adam(self.free, lr=lr, betas=(0.9, 0.9))
        saved = None if checkpoint is None else checkpoint.load(generator)
        if saved is None:
            losses: list[float] = []
            if self.normalised:  # the gauge at the start: the world takes the scale that the pairs are given
                self._rescale(MEAN_LOG_SCALE - float(self.parameters["pair_log_scale"].detach().mean()))
        else:
            losses = self._take_up(saved, optimizer)
        for step in range(len(losses), steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            loss = self.distances().mean(-1).sum(0).mean()
            if mono is not None:
                loss = loss + self._depth_loss(mono, step, generator) / self.n
            value = float(loss.detach())
            if not math.isfinite(value):
                raise InvalidInput(
                    f"The alignment diverged at step {step}; lower lr (now {lr:g}) or check the pointmaps."
                )
            losses.append(value)
            loss.backward()
            optimizer.step()
            if clean_every and step > 100 and step % clean_every == 0:
                self._clean()
            if checkpoint is not None and step + 1 < steps and checkpoint.due():
                checkpoint.save(self._state(losses, optimizer), generator)
            if progress is not None:
                progress(step + 1, steps, value)
        self._check_spread()
        return losses

    def _state(self, losses: list[float], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        parameters = {name: p.detach() for name, p in self.parameters.items()}
        return {"parameters": parameters, "keep": self.keep, "optimizer": optimizer.state_dict(), "losses": losses}

    @torch.no_grad()
    def _take_up(self, saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> list[float]:
        for name, p in self.parameters.items():
            p.copy_(saved["parameters"][name])
        self.keep = saved["keep"].to(self.keep.device)
        optimizer.load_state_dict(saved["optimizer"])
        return list(saved["losses"])

    @torch.no_grad()
    def _rescale(self, log_factor: float) -> None:
        """The whole world larger, about the one pose that may be known."""
        p, factor = self.parameters, math.exp(log_factor)
        still = p["centre"][self.held[:, 0]].sum(0) * (1 - factor)  # zero unless a pose is known
        p["log_depth"].add_(log_factor)
        p["centre"].mul_(factor).add_(still)
        p["pair_shift"].mul_(factor).add_(still)
        p["pair_log_scale"].add_(log_factor)

    @torch.no_grad()
    def _clean(self) -> None:
        K, c2w, depths = self.cameras()
        self.keep = clean_confidence(depths, self.conf, invert_rigid(c2w), K, tol=self.options.tol) > 0

    def _check_spread(self) -> None:
        centres = self.parameters["centre"].detach()
        spread = float((centres - centres.mean(0)).norm(dim=1).max())
        if not spread > LEAST_SPREAD * float(self.parameters["log_depth"].detach().exp().median()):
            raise InvalidInput(
                "The alignment collapsed: all cameras stand in one place; the photos need some distance between them."
            )

    @torch.no_grad()
    def residuals(self) -> dict[tuple[int, int], float]:
        per_pair = self.distances().sum((0, 2)) / self.pairs.weight.sum((0, 2)).clamp_min(1e-9)
        return {(p.i, p.j): float(r) for p, r in zip(self.pairs.list, per_pair, strict=True)}


def box_of(shape: tuple[int, ...]) -> int:
    """The side of the correlated boxes: 32 pixels, and a third of the picture where that is less (16 at 48)."""
    return max(4, min(32, min(shape) // 3))


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
