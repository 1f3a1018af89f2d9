"""Reading and writing .ply: splat scenes as common viewers open them, and coloured point clouds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from surefoot.errors import InvalidInput, check
from surefoot.nn.geometry.splats import GaussianScene

TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip


@dataclass(frozen=True)
class PointCloud:
    points: Tensor  # float32 [N, 3]
    rgb: Tensor  # float32 [N, 3], in [0, 1]


def read_vertices(path: str | Path) -> np.ndarray:
    """The vertex element of a .ply (ascii or binary) as a structured array."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read ({error.strerror}).") from error
    end = data.find(b"end_header")
    if not data.startswith(b"ply") or end < 0:
        raise InvalidInput(f"{path} is not a .ply file; its header is missing.")
    newline = data.find(b"\n", end)
    body, header = data[newline + 1 :], data[:end].decode("ascii", "replace").split("\n")
    layout, names, count, inside = "", [], -1, False
    for line in header:
        words = line.split()
        if words[:1] == ["format"]:
            layout = words[1]
        elif words[:1] == ["element"]:
            check(inside or words[1] == "vertex" or count >= 0, f"{path} has {words[1]!r} before its vertices; that order is not supported.")  # fmt: skip
            inside = words[1] == "vertex"
            count = int(words[2]) if inside else count
        elif words[:1] == ["property"] and inside:
            check(
                len(words) == 3 and words[1] in TYPES,
                f"{path} has the vertex property {line!r}, which is not a plain number.",
            )
            names.append((words[2], TYPES[words[1]]))
    check(count >= 0 and bool(names), f"{path} has no vertices.")
    try:
        if layout == "ascii":
            rows = np.loadtxt(body.decode("ascii").splitlines()[:count], ndmin=2)
            check(
                rows.shape == (count, len(names)),
                f"{path} is cut short or malformed: {rows.shape[0]} of {count} vertices.",
            )
            return np.rec.fromarrays(rows.T, dtype=np.dtype(names))
        order = {"binary_little_endian": "<", "binary_big_endian": ">"}[layout]
        kind = np.dtype([(name, order + code) for name, code in names])
        check(
            len(body) >= count * kind.itemsize,
            f"{path} is cut short: {len(body)} bytes for {count} vertices of {kind.itemsize}.",
        )
        return np.frombuffer(body, kind, count)
    except (KeyError, ValueError) as error:
        raise InvalidInput(f"{path} is a malformed .ply ({error}).") from error


def write_vertices(path: str | Path, columns: dict[str, np.ndarray]) -> None:
    """A binary little-endian .ply of one vertex element, written whole or not at all."""
    kind = np.dtype([(name, value.dtype.newbyteorder("<")) for name, value in columns.items()])
    rows = np.empty(len(next(iter(columns.values()))), kind)
    for name, value in columns.items():
        rows[name] = value
    words = {"f4": "float", "u1": "uchar"}
    properties = [f"property {words[value.dtype.str[1:]]} {name}" for name, value in columns.items()]
    header = "\n".join(
        ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}", *properties, "end_header", ""]
    )
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(header.encode("ascii") + rows.tobytes())
    scratch.replace(path)


def save_splats(scene: GaussianScene, path: str | Path) -> None:
    """The splats as viewers read them: logit opacity, log scale, quaternion wxyz as stored, higher harmonics channel by channel.

    A smoothing filter is baked into scales and opacities, so that what is seen is what was trained.
    """
    splats = scene.splats()
    means, sh = (t.detach().cpu().float().numpy() for t in (splats.means, splats.sh))
    quats = scene.quats.detach().cpu().float().numpy()
    filtered = bool((scene.filter_3d > 0).any())
    opacity = torch.logit(splats.opacities.clamp(1e-7, 1 - 1e-7)) if filtered else scene.logit_opacities
    scales = splats.scales.log() if filtered else scene.log_scales
    rest = sh[:, 1:].transpose(0, 2, 1).reshape(len(sh), -1)  # all red coefficients, then green, then blue
    columns = {axis: means[:, i] for i, axis in enumerate("xyz")}
    columns |= {f"n{axis}": np.zeros(len(means), np.float32) for axis in "xyz"}
    columns |= {f"f_dc_{i}": sh[:, 0, i] for i in range(3)}
    columns |= {f"f_rest_{i}": rest[:, i] for i in range(rest.shape[1])}
    columns |= {"opacity": opacity.detach().cpu().float().numpy()}
    columns |= {f"scale_{i}": c for i, c in enumerate(scales.detach().cpu().float().numpy().T)}
    columns |= {f"rot_{i}": quats[:, i] for i in range(4)}
    write_vertices(path, columns)


def load_splats(path: str | Path) -> GaussianScene:
    """A scene from a splat .ply of degree 0 to 3."""
    rows = read_vertices(path)
    names = set(rows.dtype.names or ())
    needed = [
        *"xyz",
        "f_dc_0",
        "f_dc_1",
        "f_dc_2",
        "opacity",
        "scale_0",
        "scale_1",
        "scale_2",
        "rot_0",
        "rot_1",
        "rot_2",
        "rot_3",
    ]
    missing = [name for name in needed if name not in names]
    check(not missing, f"{path} is not a splat file: it lacks {', '.join(missing)}.")
    count = sum(name.startswith("f_rest_") for name in names)
    check(
        count in (0, 9, 24, 45), f"{path} has {count} f_rest properties; splats of degree 0 to 3 have 0, 9, 24 or 45."
    )

    def columns(*wanted: str) -> Tensor:
        return torch.from_numpy(np.stack([rows[name].astype(np.float32) for name in wanted], -1))

    dc = columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None]
    rest = columns(*(f"f_rest_{i}" for i in range(count))).unflatten(1, (3, -1)).transpose(1, 2) if count else dc[:, :0]
    values = (columns(*"xyz"), columns("scale_0", "scale_1", "scale_2"), columns("rot_0", "rot_1", "rot_2", "rot_3"), columns("opacity")[:, 0])  # fmt: skip
    check(all(bool(torch.isfinite(v).all()) for v in (*values, dc, rest)), f"{path} holds NaN or infinite values.")
    return GaussianScene(*values, torch.cat([dc, rest], 1))


def save_points(cloud: PointCloud, path: str | Path) -> None:
    """A coloured point cloud."""
    points = cloud.points.detach().cpu().float().numpy()
    rgb = (cloud.rgb.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    columns = {axis: points[:, i] for i, axis in enumerate("xyz")}
    write_vertices(path, columns | {name: rgb[:, i] for i, name in enumerate(("red", "green", "blue"))})


def load_points(path: str | Path) -> PointCloud:
    """A point cloud; grey where the file has no colours."""
    rows = read_vertices(path)
    names = rows.dtype.names or ()
    check(all(axis in names for axis in "xyz"), f"{path} lacks x, y or z.")
    points = torch.from_numpy(np.stack([rows[axis].astype(np.float32) for axis in "xyz"], -1))
    if not all(name in names for name in ("red", "green", "blue")):
        return PointCloud(points, torch.full_like(points, 0.5))
    scale = 255.0 if rows["red"].dtype.kind == "u" else 1.0
    return PointCloud(
        points, torch.from_numpy(np.stack([rows[c].astype(np.float32) / scale for c in ("red", "green", "blue")], -1))
    )
