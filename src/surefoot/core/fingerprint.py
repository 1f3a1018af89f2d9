"""Which code a trial's numbers depend on, as one hash: the modules of the house that its cells import, directly or not."""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from surefoot.core.trial import Trial

PACKAGE = Path(__file__).resolve().parents[1]
OUTSIDE_A_CELL = ("engine", "environment", "evidence", "fingerprint", "plan", "pool", "statistics", "store", "verdicts")


def code_fingerprint(trial: Trial) -> str:
    """sha256 over the code that a cell's numbers depend on; a change in any of it asks for new cells.

    The roots are what runs a cell, the trial's module and every file that holds one of its functions; from there every import of
    `surefoot.*` is followed, wherever in a file it stands. What acts outside of a cell (store, statistics, verdicts, ...) is left out,
    and so are comments, docstrings and layout. A file outside the house counts, but what it imports from outside does not.
    """
    family, _, slug = trial.method.replace("-", "_").partition("/")
    roots = {PACKAGE / "core" / "cell.py", PACKAGE / "trials" / family / f"{slug}.py", *_files_of(trial)}
    digest = hashlib.sha256()
    for name, code in sorted(_closure(roots).items()):
        digest.update(f"{name}\0{code}\0".encode())
    return digest.hexdigest()


def _closure(roots: set[Path]) -> dict[str, str]:
    """Name -> code of the roots and of all that they import from the house."""
    waiting, found = [path for path in roots if path.is_file()], {}
    outside = {PACKAGE / "core" / f"{name}.py" for name in OUTSIDE_A_CELL}
    while waiting:
        path = waiting.pop()
        name = str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else path.name
        if name in found or path in outside:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        waiting += [file for module in _imports(tree) for file in _files(module)]
        found[name] = ast.dump(_without_docstrings(tree))
    return found


def _imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names of the house that a file may import; `from a import b` yields both a and a.b, as b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files(module: str) -> Iterator[Path]:
    """The files that importing `module` runs: it and the packages above it."""
    parts = module.split(".")
    if parts[0] != "surefoot":
        return
    for length in range(1, len(parts)):
        stem = PACKAGE.joinpath(*parts[1 : length + 1])
        yield from (file for file in (stem / "__init__.py", stem.with_suffix(".py")) if file.is_file())


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
    return tree


def _files_of(trial: Trial) -> Iterator[Path]:
    for setup in trial.tiers.values():
        pieces = [setup.task, setup.model, setup.measure, setup.on_epoch, *(arm.run for arm in setup.arms.values())]
        for piece in (*pieces, *(claim.effect for claim in setup.claims)):
            with suppress(TypeError):  # not a function
                if piece is not None and (file := inspect.getsourcefile(inspect.unwrap(piece))):
                    yield Path(file).resolve()
