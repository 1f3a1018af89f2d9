"""The leading singular triplets of a large matrix, and the best low-rank form of a product of two thin ones.

Sources: Musco, Musco, arXiv 1504.05477 (randomized block Krylov SVD); Chen, Epperly, Meyer, Musco, Rao, arXiv 2508.06486 (blocks
narrower than the rank need no more products).
"""

from __future__ import annotations

import torch
from torch import Tensor

from surefoot.errors import check, check_at_least
from surefoot.nn.wide_krylov import leading_triplets


def randomized_svd(
    weight: Tensor,  # [m, n]
    rank: int,
    *,
    niter: int | None = 4,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # U [m, r], S [r], V^T [r, n]
    """The leading singular triplets. `niter=None` is the exact SVD; so is any `niter` where the search space would not be thin.

    Rayleigh-Ritz on a block Krylov space: blocks W^T G, (W^T W) W^T G, ... of a Gaussian G with b = max(16, 3/16 rank) rows, until
    rank (1 + niter / 4) + b + 8 columns are there. All powers are kept, so niter = 2 leaves no more than four power iterations of a
    sketch of `rank` columns do on 1/i and i^-0.5 spectra, and less work does it; slower decay at rank 16 and Gaussian matrices, which
    have no principal part, need niter = 4 for that, which is within 1 % of the optimal Frobenius error. Without a generator G is the
    same every time. On a GPU the same space is built from 2 + niter / 2 blocks of `rank` columns, since launches, not arithmetic, take
    the time there.
    """
    m, n = weight.shape
    check(1 <= rank <= min(m, n), f"rank must be between 1 and {min(m, n)} for a {m} x {n} weight, got {rank}.")
    check_at_least("niter", 0 if niter is None else niter, 0)
    block = max(16, 8 * -(-3 * rank // 128))
    width = 0 if niter is None else rank + rank * niter // 4 + block + 8
    if niter is None or 2 * width > min(m, n):
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    tall = weight if m >= n else weight.mT
    generator = generator or torch.Generator(weight.device).manual_seed(0)
    if tall.is_cuda and 2 * (2 + niter // 2) * rank <= min(m, n):
        found = leading_triplets(tall, rank, block=rank, steps=2 + niter // 2, generator=generator)
        if found is not None:
            left, s, right = found
            return found if m >= n else (right.mT, s, left.mT)
    z, p = _krylov_space(tall, width, block, generator)
    left, s, right = _leading_of_product(p, z, rank)
    return (left, s, right) if m >= n else (right.mT, s, left.mT)


def _leading_of_product(
    p: Tensor,  # [c, m]
    z: Tensor,  # [c, n] with orthonormal rows
    rank: int,
) -> tuple[Tensor, Tensor, Tensor]:  # U [m, r], S [r], V^T [r, n]
    """The leading singular triplets of `P^T Z`.

    The Gram matrix of P tells the leading subspace, at half the cost of a QR of P. Squaring costs its eigenvectors digits, so they
    choose the subspace only: within it the triplets come from a Cholesky QR of columns of unit length, as good as a Householder QR
    while those are nearly orthogonal. Values that span more than a factor of 160 take the Householder QR of all of P.
    """
    squares, vectors = torch.linalg.eigh(p @ p.mT)
    few = min(rank + 8, len(p))  # a margin for what float32 squares cannot tell apart at the edge
    if bool(squares[-few] > 4e-5 * squares[-1]):
        inside, lengths = vectors[:, -few:].flip(1), squares[-few:].flip(0).sqrt()
        columns = p.mT @ (inside / lengths)
        factor, failed = torch.linalg.cholesky_ex(columns.mT @ columns)
        if not bool(failed):
            u, s, vh = torch.linalg.svd(factor.mT * lengths)  # P^T inside = Q (factor^T lengths)
            turned = torch.linalg.solve_triangular(factor.mT, u[:, :rank], upper=True)
            return columns @ turned, s[:rank], (vh[:rank] @ inside.mT) @ z
    reflectors, tau = torch.geqrf(p.mT)
    u, s, vh = torch.linalg.svd(reflectors[: len(p)].triu())
    padded = p.new_zeros(rank, p.shape[1]).mT
    padded[: len(p)] = u[:, :rank]
    return torch.ormqr(reflectors, tau, padded), s[:rank], vh[:rank] @ z


def _krylov_space(
    weight: Tensor,  # [m, n]
    width: int,
    block: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # Z [c, n] with orthonormal rows, Z W^T [c, m], c >= width
    """Orthogonalised twice, as Lanczos must be: against the two blocks before, which hold all but rounding, then against every one, until
    no row is mostly what rounding brought back."""
    (m, n), steps = weight.shape, -(-width // block)
    z, p = weight.new_empty(steps * block, n), weight.new_empty(steps * block, m)
    # A band of rows that stays in the cache is read once for both products with it.
    bands = [slice(i, i + 512) for i in range(0, m, 512)] if weight.device.type == "cpu" else [slice(0, m)]

    def draw(rows: int, columns: int) -> Tensor:
        noise = torch.randn(rows, columns, generator=generator, device=generator.device, dtype=weight.dtype)
        return noise.to(weight.device)

    new = torch.linalg.qr((draw(block, m) @ weight).mT).Q.mT
    for end in range(block, steps * block + 1, block):
        z[end - block : end] = new
        image, y = p[end - block : end], torch.zeros_like(new, memory_format=torch.contiguous_format)
        for band in bands:
            torch.mm(new, weight[band].mT, out=image[:, band])
            if end < len(z):
                y.addmm_(image[:, band], weight[band])
        if end == len(z):
            break
        near, whole = z[max(0, end - 2 * block) : end], _length(y)
        new = y.addmm_(y @ near.mT, near, alpha=-1)
        size = _length(new)
        for _ in range(4):  # as a rule once: a row that keeps a fair part of its length is free of the space so far
            q, r = torch.linalg.qr(torch.addmm(new, new @ z[:end].mT, z[:end], alpha=-1).mT)
            new, lengths = q.mT, [abs(length) for length in r.diagonal().tolist()]
            if min(lengths) > 0.03 * size:
                break
            spent = [i for i, length in enumerate(lengths) if length <= 8 * torch.finfo(y.dtype).eps * whole]
            if spent:  # the space is closed under W^T W (low rank, repeated values): go on from new directions
                new[spent] = draw(len(spent), n) / n**0.5
            size = whole = 1.0
    return z, p


def _length(rows: Tensor) -> float:
    """The Frobenius norm, by the one reduction that is quick for few numbers on a CPU."""
    flat = rows.reshape(-1)
    return float(flat.dot(flat)) ** 0.5


def truncate(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best rank-`rank` approximation of `B A`, balanced, and the singular values left out (the first is the spectral error).

    Thin QR of both factors and an SVD of their small core: the m x n product is never formed.
    """
    check(1 <= rank <= A.shape[0], f"rank must be between 1 and {A.shape[0]}, the rank of the factors, got {rank}.")
    q_b, r_b = torch.linalg.qr(B)
    q_a, r_a = torch.linalg.qr(A.mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    return root[:, None] * (vh[:kept] @ q_a.mT), (q_b @ u[:, :kept]) * root, s[kept:]


def all_finite(weight: Tensor) -> bool:
    """One pass over a non-empty tensor: NaN and infinity survive in a sum. Finite numbers may overflow there, never in their extremes."""
    weight = weight.detach()
    return bool(weight.sum().isfinite()) or bool(torch.stack(torch.aminmax(weight)).isfinite().all())
