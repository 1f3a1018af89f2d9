"""Where the alignment starts: a focal length and a pose for every photo, chained along the surest pairs.

The maximum spanning tree over mean(conf_i) mean(conf_j) brings each photo's map to the world by its partner's (scaled Procrustes), and
with it the camera of the pair's first photo. A photo that is first in no pair of the tree gets its pose from its pixels and their world
points, by PnP in RANSAC. Where OpenCV is missing, or RANSAC finds no pose for half of the points, the rigid motion from the photo's own
frame in its surest pair has to do, and a note says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from surefoot.errors import InvalidInput, check
from surefoot.geometry.lm_gaussian.priors import PairPointmaps
from surefoot.nn.geometry.alignment import umeyama
from surefoot.nn.geometry.cameras import pixel_centres
from surefoot.nn.geometry.rotations import invert_rigid, rigid

FOCAL_OFF = 0.1  # a given focal length so far from that of the maps is told
PNP_ROUNDS, PNP_PIXELS = 10, 5 / 512  # RANSAC's rounds, and an inlier's error as a share of the longer side


class Pairs:
    """All pairs stacked; E pairs of photos with P pixels each."""

    def __init__(self, pairs: Sequence[PairPointmaps]) -> None:
        self.list = list(pairs)
        self.shape = tuple(pairs[0].conf_i.shape)
        self.points = torch.stack(
            [torch.stack([p.points_i.flatten(0, 1), p.points_j.flatten(0, 1)]) for p in pairs], 1
        )  # [2, E, P, 3]
        self.conf = torch.stack([torch.stack([p.conf_i.flatten(), p.conf_j.flatten()]) for p in pairs], 1)  # [2, E, P]
        self.weight = self.conf.clamp_min(1.0).log()
        device = self.points.device
        self.photos = torch.tensor([[p.i for p in pairs], [p.j for p in pairs]], device=device)  # [2, E]
        self.i, self.j = self.photos

    def of_photos(self, x: Tensor) -> Tensor:  # [n, ...] -> [2, E, ...], a photo's values for each of its pairs
        # Not x[photos]: the backward of that adds with atomics where threads are several, in an order that changes from run to run.
        return x.index_select(0, self.photos.flatten()).unflatten(0, (2, -1))

    def photo_confidence(self, n: int) -> Tensor:  # [n, H, W], mean over the pairs that show the photo
        device = self.conf.device
        total, count = (torch.zeros(n, self.conf.shape[-1], device=device) for _ in range(2))
        photos = self.photos.flatten()
        total.index_add_(0, photos, self.conf.flatten(0, 1).float())
        count.index_add_(0, photos, torch.ones(len(photos), total.shape[1], device=device))
        return (total / count.clamp_min(1)).unflatten(1, self.shape)


def check_pairs(pairs: Sequence[PairPointmaps], n: int, names: Sequence[str]) -> None:
    """Refuse unusable maps, mixed sizes, and a graph in which some photo cannot be reached. A map whose confidence is nowhere above 1 has no weight, so
    its pair leads nowhere."""
    check(len(pairs) > 0, "There are no pairs to align; give at least two photos.")
    for pair in pairs:
        pair.checked()
    shape = pairs[0].conf_i.shape
    odd = [f"({p.i}, {p.j})" for p in pairs if p.conf_i.shape != shape or p.conf_j.shape != shape]
    check(not odd, f"All pointmaps must have one size, {tuple(shape)}; the pairs {', '.join(odd[:5])} have another.")
    sure = [p for p in pairs if min(float(p.conf_i.max()), float(p.conf_j.max())) > 1]
    check(bool(sure), "No pair has a confidence above 1 in both of its photos, so nothing ties the photos together.")
    lost = sorted(set(range(n)) - reached(sure))
    if lost:
        raise InvalidInput(f"No chain of pairs leads to photos {', '.join(names[k] for k in lost)}; take photos that overlap with the others, or leave these out.")  # fmt: skip


def reached(pairs: Sequence[PairPointmaps]) -> set[int]:
    """The photos that chains of pairs connect to the first pair."""
    seen, grown = {pairs[0].i}, True
    while grown:
        more = {k for p in pairs if (p.i in seen) != (p.j in seen) for k in (p.i, p.j)}
        grown = bool(more - seen)
        seen |= more
    return seen


# ------------------------------------------------------------------------------------------------------ focal lengths


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


def focals_of(pairs: Pairs, n: int, shared: bool) -> Tensor:  # [n], the median over a photo's pairs, or over all
    found: list[list[float]] = [[] for _ in range(n)]
    for pair in pairs.list:
        found[pair.i].append(focal_from_pointmap(pair.points_i, pair.conf_i))
    everyone = sorted(f for fs in found for f in fs)
    middle = everyone[len(everyone) // 2]
    each = [sorted(fs)[len(fs) // 2] if fs and not shared else middle for fs in found]
    return pairs.points.new_tensor(each)


def focal_notes(pairs: Pairs, given: Tensor) -> tuple[str, ...]:  # [n], pixels
    """A sentence where the maps fit another focal length than the one that was given; on real photos 20 percent off cost 3 to 4 degrees."""
    try:
        fitted = focals_of(pairs, len(given), shared=True) / given
    except InvalidInput:  # maps that fit no focal length at all
        return ()
    ratio = float(fitted.median())
    if abs(ratio - 1) <= FOCAL_OFF:
        return ()
    return (f"The stereo prior's maps fit a focal length {abs(ratio - 1):.0%} {'longer' if ratio > 1 else 'shorter'} than the one that was given; one of the two is wrong, and the poses with it.",)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- poses


@dataclass(frozen=True)
class Placed:
    """The photos in one world."""

    c2w: Tensor  # [n, 4, 4]
    depths: Tensor  # [n, H, W]
    notes: tuple[str, ...] = ()


def place(
    pairs: Pairs,
    focals: Tensor,  # [n], pixels
    known: Mapping[int, Tensor],  # w2c [4, 4] by photo
    names: Sequence[str] | None = None,
) -> Placed:
    """All photos along the spanning tree, then moved onto the poses that are known."""
    n, notes = len(focals), []
    maps, poses = spanning_tree(pairs, n)
    conf = pairs.photo_confidence(n).flatten(1)
    for k in sorted(set(range(n)) - set(poses)):
        pose, failure = pnp_pose(maps[k], conf[k], float(focals[k]), pairs.shape)
        if pose is None:
            pose = own_frame_pose(pairs, k, maps[k])
            notes.append(
                f"Photo {k if names is None else names[k]} starts from the pose of its surest pair, not from PnP: {failure}."
            )
        poses[k] = pose
    c2w = torch.stack([poses[k] for k in range(n)])
    depths = ((maps - c2w[:, None, :3, 3]) @ c2w[:, :3, :3])[..., 2].unflatten(1, pairs.shape)
    placed = Placed(c2w, depths, tuple(notes))
    return onto_known(placed, known) if known else placed


def spanning_tree(pairs: Pairs, n: int) -> tuple[Tensor, dict[int, Tensor]]:
    """The photos' maps in one world [n, P, 3], one after another along the surest pairs, and cam -> world [4, 4] of the pairs' first photos."""
    order = torch.argsort(pairs.conf.mean(-1).prod(0), descending=True).tolist()
    first = order[0]
    world: dict[int, Tensor] = {int(pairs.i[first]): pairs.points[0, first]}
    poses: dict[int, Tensor] = {int(pairs.i[first]): torch.eye(4).to(pairs.points)}
    while len(world) < n:
        e = next(e for e in order if (int(pairs.i[e]) in world) != (int(pairs.j[e]) in world))
        old = 0 if int(pairs.i[e]) in world else 1
        photo, new = int(pairs.photos[old, e]), int(pairs.photos[1 - old, e])
        move = umeyama(pairs.points[old, e], world[photo], pairs.weight[old, e] + 1e-6)
        world[new] = move.apply(pairs.points[1 - old, e])
        poses.setdefault(int(pairs.i[e]), rigid(move.rotation, move.translation))
    return torch.stack([world[k] for k in range(n)]), poses


def own_frame_pose(pairs: Pairs, photo: int, world: Tensor) -> Tensor:  # [P, 3] -> cam -> world [4, 4]
    """The rigid motion from the photo's own frame, in the surest pair that has it first, onto its map."""
    own = [e for e, first in enumerate(pairs.i.tolist()) if first == photo]
    check(
        bool(own),
        f"Photo {photo} is never the first of a pair, so its own frame is unknown; predict both orders of each pair.",
    )
    best = max(own, key=lambda e: float(pairs.conf[:, e].mean()))
    move = umeyama(pairs.points[0, best], world, pairs.weight[0, best] + 1e-6)
    return rigid(move.rotation, move.translation)


def pnp_pose(
    world: Tensor,  # [P, 3], the pixels' points
    conf: Tensor,  # [P]
    focal: float,
    shape: Sequence[int],
) -> tuple[Tensor | None, str]:  # cam -> world [4, 4], or why there is none
    """The pose under which the surer half of the points falls on its pixels.

    OpenCV's RANSAC draws from a generator that starts anew at each call, so the answer is the same in every run.
    """
    try:
        import cv2
    except ImportError:
        return None, "OpenCV is not installed (extra geometry)"
    height, width = shape
    sure = (conf >= conf.median()).cpu().numpy()
    pixels = pixel_centres(width, height, dtype=torch.float64).flatten(0, 1).numpy()[sure]
    points = world.double().cpu().numpy()[sure]
    K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    limit = max(1.0, PNP_PIXELS * max(shape))
    good, turn, shift, inliers = cv2.solvePnPRansac(points, pixels, K, None, iterationsCount=PNP_ROUNDS, reprojectionError=limit, flags=cv2.SOLVEPNP_SQPNP)  # fmt: skip
    if not good or inliers is None or 2 * len(inliers) < len(points):
        return None, "no pose explains half of its points"
    w2c = rigid(world.new_tensor(cv2.Rodrigues(turn)[0]), world.new_tensor(shift.ravel()))
    return invert_rigid(w2c), ""


def onto_known(placed: Placed, known: Mapping[int, Tensor]) -> Placed:
    """Photos of known pose stand there, and the others move with them: by the mean rotation between the two worlds, the ratio of the
    known centres' distances (one known pose says nothing of the scale), and the shift between their means."""
    rows = list(known)
    true = torch.stack([invert_rigid(known[k].to(placed.c2w)) for k in rows])
    mine = placed.c2w[rows]
    u, _, vh = torch.linalg.svd((true[:, :3, :3] @ mine[:, :3, :3].mT).sum(0))
    turn = u @ torch.diag(u.new_tensor([1.0, 1.0, float(torch.linalg.det(u @ vh).sign())])) @ vh
    scale = placed.c2w.new_ones(())
    if len(rows) >= 2:
        scale = torch.pdist(true[:, :3, 3]).mean() / torch.pdist(mine[:, :3, 3]).mean().clamp_min(1e-9)
    centres = scale * (placed.c2w[:, :3, 3] - mine[:, :3, 3].mean(0)) @ turn.mT + true[:, :3, 3].mean(0)
    c2w = rigid(turn @ placed.c2w[:, :3, :3], centres)
    c2w[rows] = true
    return replace(placed, c2w=c2w, depths=scale * placed.depths)
