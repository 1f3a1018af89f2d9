"""The splat rasteriser, forward and backward, beside the dense formula under plain autograd, and beside its targets on two cores.

gsplat needs a GPU and is no peer on a CPU. Memory is the growth of the process's peak, so the dense rows come last.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from surefoot.nn.geometry.cameras import Camera, focal_of, intrinsics, look_at
from surefoot.nn.geometry.dense import rasterize_dense
from surefoot.nn.geometry.rasterizer import rasterize
from surefoot.nn.geometry.splats import GaussianScene

REPEATS = 5
CASES = ((64, 4_000, 0.150), (128, 20_000, 1.2))  # side, splats, seconds wanted


def scene_and_camera(size: int, splats: int) -> tuple[GaussianScene, Camera]:
    g = torch.Generator().manual_seed(0)
    scene = GaussianScene.from_points(
        2 * torch.rand(splats, 3, generator=g) - 1, torch.rand(splats, 3, generator=g), degree=1
    )
    pose = look_at(torch.tensor([0.0, -2.5, 0.6]), torch.zeros(3))
    return scene, Camera(intrinsics(focal_of(55, size), size, size), pose, size, size)


def timed(step: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """Median seconds of forward and backward, and how many MB the peak of the process grew."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        step().backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def rows() -> list[dict[str, Any]]:
    found = []
    for size, splats, wanted in CASES:
        scene, camera = scene_and_camera(size, splats)
        seconds, mb = timed(lambda: rasterize(scene, camera).rgb.square().mean())  # noqa: B023
        what = f"{size} x {size}, {splats} splats, forward and backward"
        found.append({"what": what, "ours_s": seconds, "peer": "target on two cores", "peer_s": wanted, "ours_mb": mb})
    size, splats, _ = CASES[0]
    scene, camera = scene_and_camera(size, splats)
    ours = found[0]
    dense, dense_mb = timed(lambda: rasterize_dense(scene.splats(), camera, torch.zeros(3))[0].square().mean())
    fast = rasterize(scene, camera).rgb
    slow = rasterize_dense(scene.splats(), camera, torch.zeros(3))[0]
    gap = float((fast - slow).detach().abs().mean())
    found.append(
        {
            "what": ours["what"], "ours_s": ours["ours_s"], "ours_mb": ours["ours_mb"], "peer": "dense autograd", "peer_s": dense, "peer_mb": dense_mb,
            "quality": f"mean difference {gap:.1e}",
        }
    )  # fmt: skip
    return found


if __name__ == "__main__":
    for row in rows():
        print(row)
