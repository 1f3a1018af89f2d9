"""Evidence files: their shape, both tiers in one, atomic writes, and what is no evidence."""

import json
import math
import os
import threading
from dataclasses import replace

import pytest

from surefoot.core import evidence as evidence_module
from surefoot.core.engine import TrialResult
from surefoot.core.evidence import all_evidence, evidence_path, load_evidence, to_dict, write_evidence, write_json
from surefoot.core.plan import Failure
from surefoot.core.verdicts import ClaimResult
from surefoot.errors import InvalidInput, Refused

RESULT = TrialResult(
    method="noisy_labels/elr",
    tier="embedded",
    data="tier",
    seeds=(0, 1),
    arms={
        "control": {"accuracy": [0.1 + 0.2, 0.5], "seconds": [1.0, 2.0], "peak_mb": [300.0, 301.0]},
        "elr": {"accuracy": [0.9, math.nan], "seconds": [1.5, math.nan], "peak_mb": [310.0, math.nan]},
        "odd": {"accuracy": [math.inf, 0.1], "seconds": [1.0, 1.0], "peak_mb": [1.0, 1.0]},
    },
    settings={"control": {}, "elr": {"lam": 3.0}, "odd": {}},
    claims=(
        ClaimResult("Better.", "holds", 0.2, 0.1, 0.3, 0.01, 0.02),
        ClaimResult("Always.", "holds", 0.2, 0.1, 0.3),
        ClaimResult("Broken.", "inconclusive", reason="Arm elr failed (seed 1): out of memory."),
        ClaimResult("Two alike.", "inconclusive", 0.1, -math.inf, math.inf, 0.5, 0.5),
    ),
    failures=(Failure("elr", "seed 1", "out of memory.", 1),),
    environment={"python": "3.11", "code": "abc"},
    notes="Read with care.",
)
STANDARD = replace(RESULT, tier="standard", seeds=(0, 1), notes="")


def test_the_shape():
    record = to_dict(RESULT)
    assert list(record)[:6] == ["method", "tier", "seeds", "arms", "claims", "environment"]
    assert record["seeds"] == [0, 1]
    assert record["arms"]["control"] == {"accuracy": [0.1 + 0.2, 0.5], "seconds": [1.0, 2.0], "peak_mb": [300.0, 301.0]}
    assert record["claims"][0] == {
        "claim": "Better.", "verdict": "holds", "effect": 0.2, "low": 0.1, "high": 0.3, "p": 0.01,
    }  # fmt: skip
    assert record["claims"][1]["p"] is None
    assert record["claims"][3]["low"] is None and record["claims"][3]["high"] is None
    assert record["settings"]["elr"] == {"lam": 3.0}
    assert record["adjusted_p"] == {"Better.": 0.02, "Two alike.": 0.5}
    assert record["reasons"] == {"Broken.": "Arm elr failed (seed 1): out of memory."}


def test_what_is_not_finite_is_null_and_noted():
    record = to_dict(RESULT)
    assert record["arms"]["elr"]["accuracy"] == [0.9, None]
    assert record["notes"] == ["Read with care.", "elr, seed 1: out of memory.", "odd, seed 0: accuracy is inf."]
    json.dumps(record, allow_nan=False)


def test_both_tiers_in_one_file_in_either_order(tmp_path):
    for number, order in enumerate([(RESULT, STANDARD), (STANDARD, RESULT)]):
        for result in order:
            path = write_evidence(result, tmp_path / str(number))
        assert path == evidence_path("noisy_labels/elr", tmp_path / str(number))
        content = json.loads(path.read_text())
        assert content["tier"] == "embedded" and content["standard"]["tier"] == "standard"
        assert "standard" not in content["standard"]
        assert load_evidence(path) == {"embedded": to_dict(RESULT), "standard": to_dict(STANDARD)}
    rerun = write_evidence(replace(RESULT, notes="Again."), tmp_path / "0")
    assert load_evidence(rerun)["embedded"]["notes"][0] == "Again."
    assert "standard" in load_evidence(rerun)


def test_only_the_standard_tier(tmp_path):
    path = write_evidence(STANDARD, tmp_path)
    assert json.loads(path.read_text())["tier"] == "standard"
    assert list(load_evidence(path)) == ["standard"]


def test_own_data_and_partial_runs_do_not_touch_the_evidence(tmp_path):
    write_evidence(RESULT, tmp_path)
    own = write_evidence(replace(RESULT, tier="own", data="mine#1"), tmp_path)
    assert own.name == "elr.own.json" and load_evidence(own)["own"]["data"] == "mine#1"
    assert all_evidence(tmp_path) == {"noisy_labels/elr": {"embedded": to_dict(RESULT)}}
    with pytest.raises(Refused, match="Only some arms"):
        write_evidence(replace(RESULT, complete=False), tmp_path)
    assert write_evidence(RESULT, path=tmp_path / "here.json") == tmp_path / "here.json"


def test_floats_survive_and_lists_stay_on_a_line(tmp_path):
    text = write_evidence(RESULT, tmp_path).read_text()
    assert '"accuracy": [0.30000000000000004, 0.5]' in text
    assert text.endswith("}\n")
    write_json(tmp_path / "odd.json", {"empty": {}, "none": [], "nested": [{"a": [1]}, {}], "word": 'say "é"'})
    assert json.loads((tmp_path / "odd.json").read_text()) == {
        "empty": {}, "none": [], "nested": [{"a": [1]}, {}], "word": 'say "é"',
    }  # fmt: skip


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_evidence(RESULT, tmp_path)
    before = path.read_text()
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"accuracy": math.nan})

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(evidence_module.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_evidence(replace(RESULT, notes="new"), tmp_path)
    assert path.read_text() == before
    assert os.listdir(path.parent) == ["elr.json"]  # no partial file is left


def test_two_writers_at_once_keep_both_tiers(tmp_path):
    for number in range(20):
        folder = tmp_path / str(number)
        writers = [threading.Thread(target=write_evidence, args=(result, folder)) for result in (RESULT, STANDARD)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert set(load_evidence(evidence_path(RESULT.method, folder))) == {"embedded", "standard"}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "cannot be read"),
        ("[1]", "must be a JSON object"),
        ('{"method": "a/b"}', "lacks tier, seeds"),
        (json.dumps(to_dict(RESULT) | {"claims": [{"claim": "x"}]}), "each claim needs"),
        (json.dumps(to_dict(RESULT) | {"seeds": [0, 1, 2]}), "one value for each of 3 seeds"),
        (json.dumps(to_dict(RESULT) | {"standard": 3}), "must be a JSON object"),
        (json.dumps(to_dict(RESULT) | {"arms": []}), "arms must be an object"),
    ],
)
def test_what_is_no_evidence_is_named(tmp_path, content, complaint):
    path = tmp_path / "family" / "x.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(InvalidInput, match=complaint) as caught:
        load_evidence(path)
    assert "x.json" in str(caught.value)
    with pytest.raises(InvalidInput):
        all_evidence(tmp_path)
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_evidence(tmp_path / "absent.json")


def test_reading_evidence_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys; from surefoot.core import evidence, store; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
