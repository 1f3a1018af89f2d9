"""What a stranger types by mistake: one sentence and exit code 2, before the work rather than after it."""

from __future__ import annotations

import json
import sys

import numpy as np
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
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "data.py").write_text("def raises():\n    raise KeyError('gone')\n\ndef asks(a, b):\n    return a, b\n")
    np.save("array", np.zeros((4, 8, 8)))
    (tmp_path / "array.npy").rename("array.npz")  # an array under an archive's name
    (tmp_path / "done" / "model").mkdir(parents=True)
    (tmp_path / "done" / "model" / "model.json").write_text("{}")
    return tmp_path


AUDIT = ("audit", "m.pt", "--data", "digits", "--budget", "quick", "--only", "accuracy")


HARDEN = ("harden", "small_cnn", "--data", "digits", "--with")
NET = """
import torch
from torch import nn

class Silent(nn.Sequential):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)

def silent():
    return Silent(nn.Flatten(), nn.Linear(64, 10))
"""


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
        (("audit", "done", "--data", "digits"), "done holds a report; its model is done/model"),
        (("audit", "small_cnn", "--data", "data.py:raises"), "data.py:raises failed: KeyError: 'gone'"),
        (("audit", "small_cnn", "--data", "data.py:asks"), "data.py:asks failed: TypeError: asks() missing"),
        (("audit", "small_cnn", "--data", "array.npz"), "array.npz is not an .npz archive"),
        (("trial", "elr", "--data", "data.py:raises"), "data.py:raises failed"),
        ((*HARDEN, "elr", "--epochs", "-1"), "--epochs must be"),
        ((*HARDEN, "elr", "--lr", "0"), "--lr must be"),
        ((*HARDEN, "elr", "--batch-size", "0"), "--batch-size must be"),
        ((*HARDEN, "elr", "--weight-decay", "-1"), "--weight-decay must be"),
        ((*HARDEN, "elr", "--label-noise", "-0.5"), "--label-noise must lie"),
        ((*HARDEN, ","), "--with names no treatment"),
        ((*HARDEN, "elr(lam='x')"), "The setting lam of elr is a number, got 'x'"),
        ((*HARDEN, "tract(sync=1)"), "The setting sync of tract is True or False, got 1"),
        (("harden", "net.py:silent", "--data", "digits", "--with", "elr"), "carry no gradient"),
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


@pytest.mark.parametrize("stack", ["elr,ldr", "tract,tract", "elr(lam=-1)"])
def test_a_refused_stack_trains_nothing(here, monkeypatch, capsys, stack):
    """Not even the control, which takes as long as the run that is refused."""
    code, _, err = surefoot(monkeypatch, capsys, *HARDEN, stack)
    assert code == 2
    assert "Training" not in err
    assert len(err.strip().splitlines()) == 1


def test_an_embedded_model_without_labels_is_one_sentence(here, monkeypatch, capsys, recwarn):
    np.savez("x.npz", x=np.zeros((4, 8, 8), np.uint8))
    code, _, err = surefoot(monkeypatch, capsys, "audit", "small_cnn", "--data", "x.npz")
    assert code == 2
    assert "the data has no labels" in err
    assert not recwarn.list


def test_ctrl_c_is_answered(here, monkeypatch, capsys):
    from surefoot.cli import jobs

    def interrupted(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "audit", interrupted)
    code, _, err = surefoot(monkeypatch, capsys, *AUDIT, "--out", "report")
    assert code == 130
    assert "surefoot: interrupted" in err
    assert "Traceback" not in err


def test_the_guide_names_every_instrument():
    from pathlib import Path

    from surefoot import catalog

    guide = (Path(__file__).parents[2] / "docs" / "guides" / "audit.md").read_text(encoding="utf-8")
    assert all(f"| `{entry.slug}` |" in guide for entry in catalog.instruments())


@pytest.mark.parametrize(("n", "budget", "epochs"), [(1_000, "quick", 15), (55_000, "quick", 1), (55_000, "standard", 5), (55_000, "thorough", 15), (10**6, "quick", 1)])  # fmt: skip
def test_the_budget_bounds_the_training_of_an_untrained_model_too(n, budget, epochs):
    from surefoot.cli.jobs import _recipe
    from surefoot.core.task import Split

    train = Split(torch.zeros(1, 1).expand(n, 1), torch.zeros(1, dtype=torch.int64).expand(n))
    assert _recipe(train, budget).epochs == epochs
