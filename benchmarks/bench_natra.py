"""NaTra's two costly steps beside the plain way: all images into the latent space at once, and directions by principal components.

Peers: the same descent over one image after another (what per-image inversion scripts do), and scikit-learn's `PCA` with NumPy's least squares for the
construction of GANSpace. SeFa's published closed form is `numpy.linalg.eig` of A^T A. The generator is an untrained decoder: time does not hang
on its weights. Both sides run in turn in one process on one thread (`_timing.py`), and `quality` says how far apart the results
are. The last row is the price in training: a NaTra attack on kept codes beside the pixel attack of as many steps.

Run: python benchmarks/bench_natra.py
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from _timing import Row, memory_mb, row, timed
from surefoot.adversarial.natra import (
    Directions,
    LatentCodes,
    NaturalAttack,
    NaturalTransformation,
    attribute_directions,
    invert_batch,
    natural_attack,
)
from surefoot.datasets.embedded import digits
from surefoot.models import seeded_build, small_cnn
from surefoot.models.generators import ImageEncoder, image_decoder
from surefoot.nn.attacks import pgd_train

LATENT, IMAGES, STEPS = 16, 32, 20


def source() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def networks() -> tuple[nn.Sequential, ImageEncoder]:
    decoder = seeded_build(lambda: image_decoder(LATENT, (1, 8, 8)), source())
    encoder = seeded_build(lambda: ImageEncoder((1, 8, 8), LATENT), source())
    assert isinstance(decoder, nn.Sequential) and isinstance(encoder, ImageEncoder)
    return decoder.eval(), encoder.eval()


def inversion(decoder: nn.Sequential, encoder: ImageEncoder, x: Tensor, num_codes: int) -> Row:
    def invert(images: Tensor) -> LatentCodes:
        return invert_batch(decoder, encoder, images, steps=STEPS, num_codes=num_codes, shift=False, generator=source())

    def one_by_one() -> list[LatentCodes]:
        return [invert(x[k : k + 1]) for k in range(len(x))]

    (ours, batch), (theirs, single) = timed(lambda: invert(x), one_by_one)
    gap = (torch.cat([codes.psnr for codes in single]) - batch.psnr).abs().max().item()
    what = f"{IMAGES} images to {num_codes} code{'s'[: num_codes > 1]} each, {STEPS} steps"
    return row(what, ours, "one image after another", theirs, f"PSNR of an image differs by at most {gap:.1e} dB", ours_mb=memory_mb(lambda: invert(x)), peer_mb=memory_mb(one_by_one))  # fmt: skip


def components(decoder: nn.Sequential) -> Row:
    samples, k = 10_000, 8

    def by_sklearn() -> np.ndarray:
        z = torch.randn(samples, LATENT, generator=source())
        with torch.no_grad():
            features = torch.cat([decoder[:2](part) for part in z.split(1000)]).numpy()
        scores = PCA(k, whiten=True).fit_transform(features)
        found = np.linalg.lstsq(scores, z.numpy() - z.numpy().mean(0), rcond=None)[0]
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def own() -> Directions:
        return attribute_directions(decoder, method="pca", k=k, layer=2, samples=samples, generator=source())

    (ours, directions), (theirs, peer) = timed(own, by_sklearn)
    agreement = (directions.vectors * torch.from_numpy(peer)).sum(1).abs().min().item()
    what = f"{k} directions by components of {samples:,} features"
    return row(what, ours, "scikit-learn PCA", theirs, f"cosine of a pair at least {agreement:.6f}; ours solves in float64", ours_mb=memory_mb(own), peer_mb=memory_mb(by_sklearn))  # fmt: skip


def closed_form(decoder: nn.Sequential) -> Row:
    first = decoder[0]
    assert isinstance(first, nn.Linear)

    def by_numpy() -> np.ndarray:
        a = first.weight.detach().numpy()
        values, vectors = np.linalg.eig(a.T @ a)
        return vectors[:, values.argsort()[::-1]].T

    def own() -> Directions:
        return attribute_directions(decoder, k=LATENT)

    (ours, directions), (theirs, peer) = timed(own, by_numpy)
    agreement = (directions.vectors * torch.from_numpy(peer.real.astype(np.float32))).sum(1).abs().min().item()
    what = f"{LATENT} directions in closed form, checked and in float64"
    return row(what, ours, "numpy.linalg.eig alone", theirs, f"cosine of a pair at least {agreement:.4f}", ours_mb=memory_mb(own), peer_mb=memory_mb(by_numpy))  # fmt: skip


def attack(decoder: nn.Sequential, encoder: ImageEncoder, x: Tensor, y: Tensor) -> Row:
    """Not the same thing on both sides: what the move from pixels to amounts costs in a training step."""
    net = seeded_build(lambda: small_cnn((1, 8, 8), 10), source()).eval()
    codes = invert_batch(decoder, encoder, x, steps=STEPS, generator=source())
    directions = attribute_directions(decoder, k=4)
    transform = NaturalTransformation(decoder, codes, directions, alpha_max=1.0)

    def natural() -> NaturalAttack:
        return natural_attack(net, transform, y, steps=5, generator=source())

    def pixels() -> Tensor:
        return pgd_train(net, x, y, eps=0.1, steps=5, generator=source())

    (ours, _), (theirs, _) = timed(natural, pixels)
    each = timed(lambda: invert_batch(decoder, encoder, x, steps=STEPS, generator=source()))[0][0]
    note = f"another threat; encoding these images afresh would add {1e3 * each:.0f} ms to each step"
    return row(f"attack of 5 steps on kept codes, batch {len(x)}", ours, "pixel PGD of 5 steps", theirs, note, ours_mb=memory_mb(natural), peer_mb=memory_mb(pixels))  # fmt: skip


def rows() -> list[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        task = digits(0)
        x, y = task.train.x[:IMAGES], task.train.labels[:IMAGES]
        decoder, encoder = networks()
        codes = [inversion(decoder, encoder, x, n) for n in (1, 4)]
        return [*codes, components(decoder), closed_form(decoder), attack(decoder, encoder, x, y)]
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    for entry in rows():
        print(entry)
