"""Rotations and rigid motions: unit quaternions (w, x, y, z), 3x3 matrices, the exponential maps, and angles between them."""

from __future__ import annotations

import torch
from torch import Tensor

from surefoot.errors import check


def quaternion_to_matrix(
    quats: Tensor,  # [..., 4], wxyz, any non-zero length
) -> Tensor:  # [..., 3, 3]
    """The rotation of a quaternion, which is normalised first."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def matrix_to_quaternion(
    rotation: Tensor,  # [..., 3, 3]
) -> Tensor:  # [..., 4], wxyz, w >= 0
    """The unit quaternion of a rotation, from its best-conditioned component (no division by a small number)."""
    m = rotation
    trace = m[..., 0, 0] + m[..., 1, 1] + m[..., 2, 2]
    # Four times the outer product q q^T; its largest diagonal entry picks the row to normalise.
    diagonal = torch.stack([1 + trace, *(1 + 2 * m[..., i, i] - trace for i in range(3))], -1)
    wx, wy, wz = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    xy, xz, yz = m[..., 1, 0] + m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 2, 1] + m[..., 1, 2]
    rows = (
        diagonal[..., 0], wx, wy, wz,
        wx, diagonal[..., 1], xy, xz,
        wy, xy, diagonal[..., 2], yz,
        wz, xz, yz, diagonal[..., 3],
    )  # fmt: skip
    outer = torch.stack(rows, -1).unflatten(-1, (4, 4))
    best = diagonal.argmax(-1)[..., None, None].expand(*diagonal.shape[:-1], 1, 4)
    quat = torch.nn.functional.normalize(outer.gather(-2, best).squeeze(-2), dim=-1)
    return torch.where(quat[..., :1] < 0, -quat, quat)


def skew(
    v: Tensor,  # [..., 3]
) -> Tensor:  # [..., 3, 3], the matrix of v x
    x, y, z = v.unbind(-1)
    o = torch.zeros_like(x)
    return torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))


def so3_exp(
    omega: Tensor,  # [..., 3], axis times angle
) -> Tensor:  # [..., 3, 3]
    """Rodrigues' formula, with its series at small angles so that value and gradient are exact at zero."""
    a, b, _ = _series(omega)
    k = skew(omega)
    return torch.eye(3, dtype=omega.dtype, device=omega.device) + a * k + b * (k @ k)


def se3_exp(
    xi: Tensor,  # [..., 6]: rotation vector, then translation
) -> Tensor:  # [..., 4, 4]
    """The rigid motion of a twist."""
    omega, v = xi[..., :3], xi[..., 3:]
    a, b, c = _series(omega)
    k = skew(omega)
    eye = torch.eye(3, dtype=xi.dtype, device=xi.device)
    rotation = eye + a * k + b * (k @ k)
    translation = (eye + b * k + c * (k @ k)) @ v[..., None]
    return rigid(rotation, translation.squeeze(-1))


def _series(omega: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sin t / t, (1 - cos t) / t^2 and (t - sin t) / t^3, each [..., 1, 1]."""
    square = (omega * omega).sum(-1)[..., None, None]
    small = square < 1e-4
    safe = torch.where(small, torch.ones_like(square), square)
    t = safe.sqrt()
    a = torch.where(small, 1 - square / 6 + square**2 / 120, t.sin() / t)
    b = torch.where(small, 0.5 - square / 24 + square**2 / 720, (1 - t.cos()) / safe)
    c = torch.where(small, 1 / 6 - square / 120 + square**2 / 5040, (t - t.sin()) / (safe * t))
    return a, b, c


def rigid(
    rotation: Tensor,  # [..., 3, 3]
    translation: Tensor,  # [..., 3]
) -> Tensor:  # [..., 4, 4]
    """The homogeneous matrix of x -> R x + t."""
    top = torch.cat([rotation, translation[..., None]], -1)
    bottom = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=top.dtype, device=top.device).expand(*top.shape[:-2], 1, 4)
    return torch.cat([top, bottom], -2)


def invert_rigid(
    motion: Tensor,  # [..., 4, 4]
) -> Tensor:  # [..., 4, 4]
    """The inverse of a rotation and translation, without a linear solve."""
    rotation = motion[..., :3, :3].mT
    return rigid(rotation, -(rotation @ motion[..., :3, 3:]).squeeze(-1))


def rotation_angle(
    a: Tensor,  # [..., 3, 3]
    b: Tensor,  # [..., 3, 3]
) -> Tensor:  # float64 [...], degrees
    """The angle between two rotations, 2 asin(|A - B|_F / (2 sqrt 2)) in float64.

    The usual acos((tr - 1) / 2) loses every angle below 0.03 degrees to rounding in float32.
    """
    chord = (a.double() - b.double()).flatten(-2).norm(dim=-1) / 8.0**0.5
    return torch.rad2deg(2 * torch.asin(chord.clamp(max=1.0)))


def slerp(
    a: Tensor,  # [..., 4]
    b: Tensor,  # [..., 4]
    t: Tensor | float,
) -> Tensor:  # [..., 4]
    """Spherical interpolation between two unit quaternions along the shorter arc; nearly equal ones are mixed linearly."""
    a, b = torch.nn.functional.normalize(a, dim=-1), torch.nn.functional.normalize(b, dim=-1)
    dot = (a * b).sum(-1, keepdim=True)
    b = torch.where(dot < 0, -b, b)
    angle = torch.acos(dot.abs().clamp(max=1.0))
    near = angle < 1e-4
    sine = torch.where(near, torch.ones_like(angle), angle.sin())
    t = torch.as_tensor(t, dtype=a.dtype, device=a.device)
    weight_a = torch.where(near, 1 - t, ((1 - t) * angle).sin() / sine)
    weight_b = torch.where(near, t.expand_as(angle), (t * angle).sin() / sine)
    return torch.nn.functional.normalize(weight_a * a + weight_b * b, dim=-1)


def check_rotation(name: str, rotation: Tensor, tol: float = 1e-3) -> None:
    """Refuse matrices that are not proper rotations."""
    eye = torch.eye(3, dtype=rotation.dtype, device=rotation.device)
    off = (rotation @ rotation.mT - eye).abs().amax()
    determinant = torch.linalg.det(rotation)
    good = bool(off <= tol) and bool((determinant > 0).all())
    check(good, f"{name} must hold rotations (orthonormal, determinant 1); the worst is off by {float(off):.2g} with determinant {float(determinant.min()):.3g}.")  # fmt: skip
