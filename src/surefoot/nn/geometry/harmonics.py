"""Real spherical harmonics to degree 3, in the order and with the signs that splat files use."""

from __future__ import annotations

import torch
from torch import Tensor

from surefoot.errors import check

C0 = 0.28209479177387814
C1 = 0.4886025119029199
C2 = (1.0925484305920792, 0.31539156525252005, 0.5462742152960396)
C3 = (0.5900435899266435, 2.890611442640554, 0.4570457994644658, 0.3731763325901154, 1.445305721320277)


def sh_basis(
    directions: Tensor,  # [..., 3], unit length
    degree: int,
) -> Tensor:  # [..., (degree + 1)^2]
    check(degree in (0, 1, 2, 3), f"degree must be 0, 1, 2 or 3, got {degree!r}.")
    x, y, z = directions.unbind(-1)
    basis = [torch.full_like(x, C0)]
    if degree >= 1:
        basis += [-C1 * y, C1 * z, -C1 * x]
    if degree >= 2:
        xx, yy, zz = x * x, y * y, z * z
        basis += [C2[0] * x * y, -C2[0] * y * z, C2[1] * (2 * zz - xx - yy), -C2[0] * x * z, C2[2] * (xx - yy)]
        if degree == 3:
            basis += [
                -C3[0] * y * (3 * xx - yy), C3[1] * x * y * z, -C3[2] * y * (4 * zz - xx - yy),
                C3[3] * z * (2 * zz - 3 * xx - 3 * yy), -C3[2] * x * (4 * zz - xx - yy),
                C3[4] * z * (xx - yy), -C3[0] * x * (xx - 3 * yy),
            ]  # fmt: skip
    return torch.stack(basis, -1)


def sh_colours(
    sh: Tensor,  # [N, (d + 1)^2, 3]
    directions: Tensor,  # [N, 3], unit, from the camera to the splat
    degree: int | None = None,  # at most d; default d
) -> Tensor:  # [N, 3], max(SH + 0.5, 0)
    """Colours seen along `directions`; the clamp at 0 stops the gradient there."""
    full = round(sh.shape[1] ** 0.5) - 1
    check((full + 1) ** 2 == sh.shape[1], f"sh must hold 1, 4, 9 or 16 coefficients a colour, got {sh.shape[1]}.")
    basis = sh_basis(directions, full if degree is None else min(degree, full))
    return torch.einsum("nb,nbc->nc", basis, sh[:, : basis.shape[1]]).add(0.5).clamp_min(0.0)


def sh_from_rgb(rgb: Tensor) -> Tensor:
    """The constant coefficient that shows as this colour."""
    return (rgb - 0.5) / C0
