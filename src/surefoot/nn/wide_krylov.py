"""Leading singular triplets by a few wide blocks: for devices on which a launch costs more than the arithmetic of a narrow block."""

from __future__ import annotations

import torch
from torch import Tensor


def leading_triplets(
    weight: Tensor,  # [m, n], m >= n
    rank: int,
    *,
    block: int,
    steps: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor] | None:  # U [m, r], S [r], V^T [r, n]
    """Rayleigh-Ritz on the block Krylov space of `steps` blocks W^T G, (W^T W) W^T G, ... of a Gaussian G with `block` columns.

    Products with W are in its own precision; blocks are made orthonormal by two Cholesky QRs and the small problem is solved from the Gram
    matrix, both in float64, which keeps what squaring costs. None where a block has not the full rank (a weight of low rank, repeated
    values): narrow blocks must then find new directions one by one. The device is waited for once.
    """
    (m, n), failed = weight.shape, []
    draw = torch.randn(m, block, generator=generator, device=generator.device, dtype=weight.dtype)
    image = draw.to(weight.device)
    z, p = weight.new_empty(n, steps * block), weight.new_empty(m, steps * block)
    for start in range(0, steps * block, block):
        new, known = weight.mT @ image, z[:, :start]
        if start:
            for _ in range(2):
                new = torch.addmm(new, known, known.mT @ new, alpha=-1)
        for _ in range(2):
            wide = new.double()
            factor, info = torch.linalg.cholesky_ex(wide.mT @ wide)
            new = torch.linalg.solve_triangular(factor, wide.mT, upper=False).mT.to(weight.dtype)
            failed.append(info)
        image = weight @ new
        z[:, start : start + block], p[:, start : start + block] = new, image
    if bool(torch.stack(failed).any()):
        return None
    wide = p.double()
    squares, vectors = torch.linalg.eigh(wide.mT @ wide)
    vectors, values = vectors[:, -rank:].flip(1), squares[-rank:].flip(0).clamp_min(0).sqrt()
    if not bool(values[-1] > torch.finfo(weight.dtype).eps * values[0]):
        return None
    left, right = (wide @ vectors) / values, vectors.mT @ z.mT.double()
    return left.to(weight.dtype), values.to(weight.dtype), right.to(weight.dtype)
