"""On a GPU: a training step of splats beside the same step written around gsplat, and what the methods cost there.

Without a CUDA device there are no rows. Both sides run in turn in one process; a number is the median of blocks of calls between two
synchronisations. gsplat must be installed for the first rows.

- our `train_splats` (photometric loss, records, schedule) against a bare loop of gsplat's `rasterization`, the same loss and the same Adam
- the torch backend of `rasterize` against gsplat, forward and backward: the price of having no compiled kernels
- certified training, TrAct, ELR and ALDR-KL against a plain step of the same net
- PGD and APGD against torchattacks, PiSSA's start of a layer against PEFT's `pissa_niter_4`
- randomised smoothing against the plain loop of the published procedure

Run: python benchmarks/bench_cuda.py
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _timing import Row, row
from bench_tract import cifar_resnet18, imagenet_resnet18
from surefoot.models import seeded_build, small_cnn, small_resnet

DEVICE = torch.device("cuda", 0)
STEPS = 50  # of training splats, a call


def in_turn(*calls: Callable[[], Any], blocks: int = 5, length: float = 0.2) -> list[float]:
    """Median seconds of each call, the device awaited before and after each block of calls."""
    for call in calls:
        call()
        call()
    counts = []
    for call in calls:
        counts.append(max(1, min(200, int(length / max(_block(call, 1), 1e-5)))))
    taken = [[_block(call, n) for call, n in zip(calls, counts, strict=True)] for _ in range(blocks)]
    return [statistics.median(side) for side in zip(*taken, strict=True)]


def _block(call: Callable[[], Any], n: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(n):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / n


def peak_mb(call: Callable[[], Any]) -> float:
    """What one call adds to the allocated memory of the device, at its peak."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# --- splats -----------------------------------------------------------------------------------------------------------


def splat_rows() -> list[Row]:
    from surefoot.geometry.lm_gaussian.losses import photometric_loss
    from surefoot.geometry.lm_gaussian.train import Rates, train_splats
    from surefoot.nn.geometry.cameras import Camera, focal_of, intrinsics, look_at, scene_extent
    from surefoot.nn.geometry.densification import splat_optimizer
    from surefoot.nn.geometry.rasterizer import rasterize
    from surefoot.nn.geometry.splats import GaussianScene

    def world(size: int, splats: int, views: int = 8) -> tuple[GaussianScene, list[Camera], Tensor]:
        g = torch.Generator().manual_seed(0)
        scene = GaussianScene.from_points(
            2 * torch.rand(splats, 3, generator=g) - 1, torch.rand(splats, 3, generator=g), degree=3
        )
        turns = torch.linspace(0, 5.5, views)
        centres = torch.stack([2.6 * turns.cos(), 2.6 * turns.sin(), 0.6 + 0 * turns], 1)
        cameras = [Camera(intrinsics(focal_of(55, size), size, size), look_at(c, torch.zeros(3)), size, size).to(DEVICE) for c in centres]  # fmt: skip
        return scene.to(DEVICE), cameras, torch.rand(views, size, size, 3, generator=g).to(DEVICE)

    rates, found = Rates.full(), []
    for size, splats in ((128, 20_000), (256, 60_000), (512, 200_000)):
        what = f"{size} x {size}, {splats} splats"
        scene, cameras, images = world(size, splats)

        def picture(backend: str, scene: GaussianScene = scene, cameras: list[Camera] = cameras) -> None:
            rasterize(scene, cameras[0], backend=backend).rgb.square().mean().backward()  # type: ignore[arg-type]

        if importlib.util.find_spec("gsplat") is None:
            (ours,) = in_turn(lambda p=picture: p("torch"))
            found.append(
                row(f"rasterise {what}, forward and backward", ours, "gsplat", None, "", "gsplat is not installed")
            )
            continue
        from gsplat import rasterization  # type: ignore[import-not-found]

        ours, theirs = in_turn(lambda p=picture: p("torch"), lambda p=picture: p("gsplat"))
        mine, other = (rasterize(scene, cameras[0], backend=b).rgb.detach() for b in ("torch", "gsplat"))
        quality = f"mean difference {float((mine - other).abs().mean()):.1e}"
        memory = [peak_mb(lambda p=picture, b=b: p(b)) for b in ("torch", "gsplat")]
        found.append(row(f"torch backend, {what}, forward and backward", ours, "gsplat", theirs, quality, ours_mb=memory[0], peer_mb=memory[1]))  # fmt: skip

        extent = scene_extent(torch.stack([c.centre for c in cameras]))
        bare_scene, _, _ = world(size, splats)
        optimizer = splat_optimizer(bare_scene, extent, means=rates.means, log_scales=rates.log_scales, quats=rates.quats, opacity=rates.opacity, sh=rates.sh)  # fmt: skip

        def ours_run(scene: GaussianScene = scene, cameras: list[Camera] = cameras, images: Tensor = images) -> None:
            train_splats(scene, cameras, images, steps=STEPS, generator=torch.Generator().manual_seed(0), rates=rates)

        def bare_run(scene: GaussianScene = bare_scene, cameras: list[Camera] = cameras, images: Tensor = images, size: int = size, optimizer: torch.optim.Optimizer = optimizer) -> None:  # fmt: skip
            for k in range(STEPS):
                camera = cameras[k % len(cameras)]
                image, _, _ = rasterization(
                    scene.means, scene.quats, scene.log_scales.exp(), scene.logit_opacities.sigmoid(), scene.sh, camera.w2c[None],
                    camera.K[None], size, size, near_plane=0.2, sh_degree=3, packed=False,
                )  # fmt: skip
                loss = photometric_loss(image[0], images[k % len(cameras)])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

        ours, theirs = in_turn(ours_run, bare_run, length=0.0)
        memory = [peak_mb(ours_run), peak_mb(bare_run)]
        found.append(row(f"training step, {what}", ours / STEPS, "bare loop on gsplat", theirs / STEPS, f"mean of {STEPS} steps, same loss and optimiser", ours_mb=memory[0], peer_mb=memory[1]))  # fmt: skip
    return found


# --- training steps ---------------------------------------------------------------------------------------------------


def stepper(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def tract_rows() -> list[Row]:
    from surefoot.init.tract import apply_tract

    found = []
    cases: tuple[tuple[str, Callable[[], nn.Module], tuple[int, ...]], ...] = (
        ("ResNet-18, 3x3 stem, 128 x 3 x 32 x 32", cifar_resnet18, (128, 3, 32, 32)),
        ("ResNet-18, 7x7 stem, 128 x 3 x 224 x 224", imagenet_resnet18, (128, 3, 224, 224)),
    )
    for what, build, shape in cases:
        g = torch.Generator().manual_seed(0)
        plain = seeded_build(build, g).to(DEVICE)
        x, y = torch.randn(shape, generator=g).to(DEVICE), torch.randint(10, shape[:1], generator=g).to(DEVICE)
        ours = apply_tract(plain, layer="0")
        steps = [stepper(m, lambda m=m, x=x, y=y: F.cross_entropy(m(x), y)) for m in (ours, plain)]
        taken, memory = in_turn(*steps), [peak_mb(s) for s in steps]
        found.append(row(f"TrAct, a step of {what}", taken[0], "plain SGD", taken[1], "", ours_mb=memory[0], peer_mb=memory[1]))  # fmt: skip
    return found


def certified_rows() -> list[Row]:
    """A step on interval bounds of CNN-7, width 64 as published, beside a clean step."""
    from surefoot.certified.fast_ibp import cnn7
    from surefoot.nn.bounds import Program, interval_margins, propagate, region_around, robust_cross_entropy

    found = []
    for batch_norm in (False, True):
        torch.manual_seed(0)
        model = cnn7(3, 32, width=64, linear_size=512, batch_norm=batch_norm).to(DEVICE).train()
        x, y = torch.rand(128, 3, 32, 32, device=DEVICE), torch.randint(10, (128,), device=DEVICE)
        program = Program(model)

        def bounds(program: Program = program, x: Tensor = x, y: Tensor = y) -> Tensor:
            walked = propagate(program, region_around(x, 2 / 255).box, clean=x if program.needs_clean else None)
            return robust_cross_entropy(interval_margins(walked, y))

        ours, plain = stepper(model, bounds), stepper(model, lambda model=model, x=x, y=y: F.cross_entropy(model(x), y))
        taken, memory = in_turn(ours, plain), [peak_mb(ours), peak_mb(plain)]
        kind = "with batch-norm (clean pass included)" if batch_norm else "without batch-norm"
        found.append(row(f"IBP training step, CNN-7 width 64, 128 x 3 x 32 x 32, {kind}", taken[0], "clean step", taken[1], "wanted: 2.6", ours_mb=memory[0], peer_mb=memory[1]))  # fmt: skip
    return found


def loss_rows() -> list[Row]:
    from surefoot.noisy_labels.elr import ELRLoss
    from surefoot.noisy_labels.ldr import ALDRKLLoss

    g = torch.Generator().manual_seed(0)
    model = seeded_build(cifar_resnet18, g).to(DEVICE)
    x, y = torch.randn(128, 3, 32, 32, generator=g).to(DEVICE), torch.randint(10, (128,), generator=g).to(DEVICE)
    index = torch.arange(128, device=DEVICE)
    losses: dict[str, Any] = {
        "ELR": ELRLoss(50_000, 10),
        "ELR, values trusted": ELRLoss(50_000, 10, validate=False),
        "ALDR-KL": ALDRKLLoss(50_000, 10, normalize="l1"),
        "ALDR-KL, values trusted": ALDRKLLoss(50_000, 10, normalize="l1", validate=False),
    }
    plain = stepper(model, lambda: F.cross_entropy(model(x), y))
    moved = [loss.to(DEVICE) for loss in losses.values()]
    steps = [stepper(model, lambda loss=loss: loss(model(x), y, index)) for loss in moved]
    *taken, base = in_turn(*steps, plain)
    memory, base_mb = [peak_mb(step) for step in steps], peak_mb(plain)
    what = "a step of ResNet-18, 128 x 3 x 32 x 32"
    return [row(f"{name}, {what}", t, "cross-entropy", base, "", ours_mb=mb, peer_mb=base_mb) for name, t, mb in zip(losses, taken, memory, strict=True)]  # fmt: skip


def attack_rows() -> list[Row]:
    """The same steps from the same kind of start; robust accuracy is 0 on an untrained net for both, so only the work is compared."""
    from surefoot.nn.attacks import apgd, pgd_train

    if importlib.util.find_spec("torchattacks") is None:
        return []
    import torchattacks  # type: ignore[import-not-found]

    g = torch.Generator().manual_seed(0)
    model = seeded_build(lambda: small_resnet((3, 32, 32), 10), g).to(DEVICE).eval()
    x, y = torch.rand(256, 3, 32, 32, generator=g).to(DEVICE), torch.randint(10, (256,), generator=g).to(DEVICE)
    eps, found = 8 / 255, []

    def fresh() -> torch.Generator:
        return torch.Generator(DEVICE).manual_seed(0)

    cases = {
        "PGD-20": (lambda: pgd_train(model, x, y, eps=eps, steps=20, generator=fresh()), torchattacks.PGD(model, eps=eps, alpha=2.5 * eps / 20, steps=20)),
        "APGD-CE 25": (lambda: apgd(model, x, y, eps=eps, steps=25, generator=fresh()).x, torchattacks.APGD(model, eps=eps, steps=25)),
    }  # fmt: skip
    for name, (ours, peer) in cases.items():
        theirs = lambda peer=peer: peer(x, y)  # noqa: E731
        taken, memory = in_turn(ours, theirs), [peak_mb(ours), peak_mb(theirs)]
        found.append(row(f"{name}, small ResNet, 256 x 3 x 32 x 32", taken[0], "torchattacks", taken[1], "", ours_mb=memory[0], peer_mb=memory[1]))  # fmt: skip
    return found


# --- without training -------------------------------------------------------------------------------------------------


def smoothing_rows() -> list[Row]:
    from surefoot.nn.smoothing import certify

    g = torch.Generator().manual_seed(0)
    found, sigma, n, chunk = [], 0.25, 10_000, 1000
    cases: tuple[tuple[str, Callable[[], nn.Module], int], ...] = (
        ("small CNN 3x32x32", lambda: small_cnn((3, 32, 32), 10), 8),
        ("ResNet-18 3x32x32", cifar_resnet18, 2),
    )
    for what, build, images in cases:
        model = seeded_build(build, g).to(DEVICE).eval()
        x = torch.rand(images, 3, 32, 32, generator=g).to(DEVICE)

        def ours(model: nn.Module = model, x: Tensor = x) -> Any:
            return certify(model, x, sigma=sigma, num_classes=10, generator=torch.Generator(DEVICE).manual_seed(0), n0=100, n=n, batch_size=chunk)  # fmt: skip

        def plain(model: nn.Module = model, x: Tensor = x) -> None:
            with torch.no_grad():
                for image in x:
                    for size in (100, *([chunk] * (n // chunk))):
                        batch = image.repeat(size, 1, 1, 1)
                        guesses = model(batch + torch.randn_like(batch) * sigma).argmax(1)
                        counts = [0] * 10
                        for guess in guesses.cpu().numpy():
                            counts[guess] += 1

        taken, memory = in_turn(ours, plain, length=0.0), [peak_mb(ours), peak_mb(plain)]
        found.append(row(f"certify, {what}, {images} images, n = {n}", taken[0], "plain loop", taken[1], "", ours_mb=memory[0], peer_mb=memory[1]))  # fmt: skip
    return found


def pissa_rows() -> list[Row]:
    """The whole start of one layer: factors, residual, installation; the copy of the layer counts on both sides."""
    if importlib.util.find_spec("peft") is None:
        return []
    from peft import LoraConfig, get_peft_model
    from surefoot.peft.pissa import apply_pissa_

    g = torch.Generator().manual_seed(0)
    side, found = 4096, []
    u, v = (torch.linalg.qr(torch.randn(side, side, generator=g).to(DEVICE)).Q for _ in range(2))
    spectrum = torch.arange(1, side + 1, device=DEVICE).float() ** -1.0
    weight = (u * spectrum) @ v.T

    def layer() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(side, side, bias=False, device=DEVICE))
        model[0].weight = nn.Parameter(weight.clone())
        return model

    for rank in (16, 128):
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights="pissa_niter_4")  # type: ignore[arg-type]

        def ours(rank: int = rank) -> float:
            model: Any = layer()
            apply_pissa_(model, rank, niter=2)
            return model[0].base.weight.norm()

        def theirs(config: Any = config) -> float:
            adapted: Any = get_peft_model(layer(), config)
            return adapted.base_model.model[0].base_layer.weight.norm()

        tail = float(spectrum[rank:].norm())
        excess = " | ".join(f"{100 * (float(side()) / tail - 1):.2f} %" for side in (ours, theirs))
        taken, memory = in_turn(ours, theirs), [peak_mb(ours), peak_mb(theirs)]
        found.append(row(f"start of a {side} x {side} layer, rank {rank}", taken[0], "peft pissa_niter_4", taken[1], f"excess error {excess}", ours_mb=memory[0], peer_mb=memory[1]))  # fmt: skip
    return found


PARTS = (splat_rows, tract_rows, certified_rows, loss_rows, attack_rows, smoothing_rows, pissa_rows)


def rows() -> list[Row]:
    if not torch.cuda.is_available():
        return []
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # both sides in plain float32
    return [entry for part in PARTS for entry in part()]


if __name__ == "__main__":
    for entry in rows():
        print(entry)
