"""Every certifier of the house under at least 10,000 attacked points: zero broken, and the same attack breaks a planted mistake.

The recipes are those of `python benchmarks/soundness.py`, which prints the table.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

_PATH = Path(__file__).parents[2] / "benchmarks" / "soundness.py"
if not _PATH.exists():
    pytest.skip("The recipes live in benchmarks/, which source distributions leave out.", allow_module_level=True)
_SPEC = importlib.util.spec_from_file_location("soundness", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
soundness = sys.modules["soundness"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(soundness)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(soundness.RECIPES))
def test_ten_thousand_attacked_points_break_nothing(name, record_property):
    row = soundness.RECIPES[name]()
    record_property("attacked", row.attacked)
    assert row.attacked >= soundness.LEAST
    assert row.broken == 0
    assert row.caught >= 20  # the attack is one that can succeed
