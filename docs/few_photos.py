"""Print the tables of "How many photos" in the reconstruction guide: random handfuls of the fox's photos, and the dino ring spread evenly, registered
without poses or intrinsics.

    SUREFOOT_DATA=... python docs/few_photos.py

Takes three to five minutes on one core. The published poses are the truth; an error is the largest angle between two photos of a model.
"""

from __future__ import annotations

import itertools
import sys

import numpy as np
import torch

from surefoot.datasets.standard import data_folder
from surefoot.errors import InvalidInput
from surefoot.geometry.lm_gaussian.colmap import ColmapPrior
from surefoot.nn.geometry.rotations import rotation_angle
from surefoot.trials.geometry.lm_photos import COUNTS, PhotoScene, dino_ring, fox

DRAWS, RIGHT = 10, 5.0  # handfuls of each size, degrees


def main() -> None:
    scene, draw = fox(data_folder(None)), np.random.default_rng(2024)
    rows = ["| photos | all placed | some placed | refused | right, trusted | right, warned | wrong, warned | wrong, trusted |", "|---" * 8 + "|"]  # fmt: skip
    for n in (3, 4, 5, 6, 8, 12):
        results = [handful(scene, draw.choice(len(scene.images), n, replace=False)) for _ in range(DRAWS)]
        placed = [r[0] for r in results]
        told = [(error <= RIGHT, trusted) for count, error, trusted in results if count]
        cells = [n, placed.count(n), sum(0 < p < n for p in placed), placed.count(0)]
        cells += [told.count(kind) for kind in ((True, True), (True, False), (False, False), (False, True))]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    ring = dino_ring(data_folder(None))
    rows += ["", "| photos of the ring | placed | largest error, degrees | trusted |", "|---" * 4 + "|"]
    for n in COUNTS:
        placed, error, trusted = handful(ring, np.arange(n) * len(ring.images) // n)
        rows.append(f"| {n} | {placed} | {f'{error:.1f}' if placed else '–'} | {'yes' if trusted else 'no'} |")
    sys.stdout.write("\n".join(rows) + "\n")


def handful(scene: PhotoScene, chosen: np.ndarray) -> tuple[int, float, bool]:
    """Photos placed, largest error in degrees, whether nothing speaks against the poses."""
    chosen = np.sort(chosen)
    try:
        found = ColmapPrior(dense=False).reconstruct([scene.images[k] for k in chosen], [scene.names[k] for k in chosen])  # fmt: skip
    except InvalidInput:
        return 0, 0.0, False
    true = [scene.cameras[chosen[k]].w2c.double() for k in found.registered]
    estimated = [camera.w2c.double() for camera in found.cameras]

    def turn(poses: list[torch.Tensor], i: int, j: int) -> torch.Tensor:
        return poses[j][:3, :3] @ poses[i][:3, :3].mT

    pairs = itertools.combinations(range(len(true)), 2)
    errors = [float(rotation_angle(turn(estimated, i, j), turn(true, i, j))) for i, j in pairs]
    return len(true), max(errors), not found.doubts


if __name__ == "__main__":
    main()
