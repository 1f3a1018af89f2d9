"""What a stranger types by mistake: one sentence and exit code 2, before the work rather than after it."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from surefoot.cli import main


def surefoot(monkeypatch, capsys, *args):
    """The command in this process: exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["surefoot", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model frozen by `torch.jit`, its weights, and a file where a folder should be."""
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    torch.jit.save(torch.jit.trace(model, torch.rand(2, 1, 8, 8)), "m.pt")
    save_file(model.state_dict(), "w.safetensors")
    (tmp_path / "file").write_text("not a folder")
    return tmp_path


AUDIT = ("audit", "m.pt", "--data", "digits", "--budget", "quick", "--only", "accuracy")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((*AUDIT, "--out", "file"), "cannot be written to"),
        ((*AUDIT, "--out", "file/below"), "cannot be written to"),
        (("harden", "small_cnn", "--data", "digits", "--with", "tract", "--out", "file"), "cannot be written to"),
        (("trial", "elr", "--evidence", "file"), "--evidence file cannot be written to"),
        (("evidence", "--out", "."), "is a folder"),
        ((*AUDIT[:-1], ","), "--only names nothing"),
        ((*AUDIT, "--device", "meta"), "device 'meta' cannot be used"),
        ((*AUDIT, "--weights", "w.safetensors"), "brings its own weights"),
        (("audit", ".", "--data", "digits", "--weights", "w.safetensors"), "brings its own weights"),
        (("audit", "", "--data", "digits"), "MODEL is empty"),
        (("audit", "m.pt", "--data", ""), "--data is empty"),
    ],
)
def test_mistakes(here, monkeypatch, capsys, args, words):
    code, out, err = surefoot(monkeypatch, capsys, *args)
    assert code == 2
    assert words in err
    assert not out


def test_json_is_json_even_where_a_number_is_missing(here, monkeypatch, capsys):
    """NaN is no JSON; a value that does not exist is null."""
    from dataclasses import replace

    from surefoot.audit.instruments.accuracy import Accuracy

    measure = Accuracy.measure
    monkeypatch.setattr(Accuracy, "measure", lambda self, *given: replace(measure(self, *given), details={"x": float("nan")}))  # fmt: skip
    code, out, _ = surefoot(monkeypatch, capsys, *AUDIT, "--json", "--out", "report")
    assert code == 0

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    assert json.loads(out, parse_constant=refuse)["findings"][0]["details"] == {"x": None}
