from __future__ import annotations

import pytest

from surefoot.datasets.embedded import digits


@pytest.fixture
def task():
    return digits(0, sizes=(200, 50, 100))


@pytest.fixture
def factory(tmp_path, request):
    """The file of factories that a test module keeps in FACTORY."""
    (tmp_path / "net.py").write_text(request.module.FACTORY)
    return f"{tmp_path}/net.py"
