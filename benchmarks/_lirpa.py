"""Make auto-lirpa 0.3 (2022) importable on today's torch and numpy, which dropped three names and changed one call it uses.

`load()` mends these and returns the package, or None where it is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import numpy as np
import torch


def load() -> ModuleType | None:
    if importlib.util.find_spec("auto_LiRPA") is None:
        return None
    _numpy_arraysetops()
    _onnx_opset()
    _graph_attributes()
    package = importlib.import_module("auto_LiRPA")
    _named_members(package.BoundedModule)
    return package


def _numpy_arraysetops() -> None:
    """numpy 2 has no `numpy.lib.arraysetops`; only `isin` is read from it."""
    name = "numpy.lib.arraysetops"
    if name not in sys.modules:
        stand_in = ModuleType(name)
        stand_in.isin = np.isin  # type: ignore[attr-defined]
        sys.modules[name] = stand_in


def _onnx_opset() -> None:
    """torch moved the exporter's opset setting into a private global."""
    symbolic_helper = importlib.import_module(
        "torch.onnx.symbolic_helper"
    )  # not the attribute of that name, another module
    if not hasattr(symbolic_helper, "_set_opset_version"):
        from torch.onnx._internal.torchscript_exporter._globals import GLOBALS

        def set_opset(version: int) -> None:
            GLOBALS._export_onnx_opset_version = version

        symbolic_helper._set_opset_version = set_opset  # type: ignore[attr-defined]


def _graph_attributes() -> None:
    """Graph nodes could once be indexed by attribute name, `node["alpha"]`."""
    node = torch._C.Node
    if not hasattr(node, "__getitem__"):
        node.__getitem__ = lambda self, key: getattr(self, self.kindOf(key))(key)  # type: ignore[attr-defined]


def _named_members(bounded: type) -> None:
    """torch passes `remove_duplicate` now; the package's override always removes duplicates."""
    original = bounded._named_members  # type: ignore[attr-defined]
    if getattr(original, "takes_duplicates", False):
        return

    def named_members(self, get_members_fn, prefix="", recurse=True, remove_duplicate=True):
        return original(self, get_members_fn, prefix, recurse)

    named_members.takes_duplicates = True  # type: ignore[attr-defined]
    bounded._named_members = named_members  # type: ignore[attr-defined]
