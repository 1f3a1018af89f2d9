"""Every Python example of the guides and of the catalogue runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from surefoot import catalog

ROOT = Path(__file__).parents[2]
BLOCKS = [
    (f"{path.stem}-{number}", code)
    for path in sorted((ROOT / "docs").glob("guides/*.md"))
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.S))
]
USES = [(m.slug, m.use) for m in catalog.methods() if m.treatment or m.use]


@pytest.mark.parametrize(("name", "code"), BLOCKS, ids=[n for n, _ in BLOCKS])
def test_guide(name, code):
    exec(compile(code, name, "exec"), {"__name__": name})


@pytest.mark.parametrize(("slug", "code"), USES, ids=[n for n, _ in USES])
def test_use_of_a_method(slug, code):
    assert code.strip(), f"{slug} has no example in the catalogue"
    exec(compile(code, slug, "exec"), {"__name__": slug})


def test_pages_are_generated(tmp_path):
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import build  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.pop(0)
    for method in catalog.methods():
        text = build.page(method)
        assert method.title in text
        assert "@" in text
    assert build.index().count("](") == 73


@pytest.mark.slow
def test_site_builds(tmp_path):
    pytest.importorskip("material")
    subprocess.run([sys.executable, str(ROOT / "docs" / "build.py")], check=True, capture_output=True)
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "methods" / "noisy_labels" / "elr" / "index.html").exists()


def test_readme_numbers_are_true():
    """The README's table is the one that the committed evidence gives (run docs/readme_numbers.py after a trial)."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import readme_numbers  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.pop(0)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme_numbers.filled(text) == text


def test_readme_example():
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S):
        exec(compile(code, "README", "exec"), {})
