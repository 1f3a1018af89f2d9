"""The trial engine on a toy: phases, failures, resumption, many processes, and kill -9."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from surefoot.core import engine
from surefoot.core import fingerprint as fingerprint_module
from surefoot.core.engine import run_trial
from surefoot.core.fingerprint import code_fingerprint
from surefoot.core.plan import combinations, load_trial
from surefoot.core.store import Store
from surefoot.core.task import Split, Task
from surefoot.core.trial import Arm, Claim
from surefoot.core.verdicts import judge_claims
from surefoot.errors import InvalidInput

TOY = f"{Path(__file__).with_name('toy_trial.py')}:TRIAL"
comparable = load_trial(TOY).tiers["embedded"].task.__globals__["comparable"]


@pytest.fixture(autouse=True)
def fingerprint(monkeypatch):
    """Fixed, so that nobody who edits a source while the tests run changes what they see; test_fingerprint has the real one."""
    monkeypatch.setattr(engine, "code_fingerprint", lambda trial: "toy")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trials.db"


@pytest.fixture
def log(tmp_path, monkeypatch):
    """What was computed, in order: reads the toy's log."""
    file = tmp_path / "log"
    monkeypatch.setenv("TOY_LOG", str(file))
    return lambda: [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def toy(**changes):
    trial = load_trial(TOY)
    return replace(trial, tiers={"embedded": replace(trial.tiers["embedded"], **changes)})


def statuses(path):
    with Store(path) as store:
        return dict(store._db.execute("SELECT status, count(*) FROM cells GROUP BY status").fetchall())


# ---------------------------------------------------------------- phases


def test_a_whole_trial(path, log):
    events = []
    result = run_trial(TOY, seeds=5, store=path, progress=lambda *event: events.append(event))
    assert result.method == "toys/toy" and result.seeds == (0, 1, 2, 3, 4) and result.complete
    assert result.settings["method"] == {"strength": 2.0} and result.settings["control"] == {}
    assert set(result.arms) == {"control", "method", "trained"}
    for metrics in result.arms.values():
        assert {"accuracy", "seconds", "peak_mb"} <= set(metrics)
        assert all(len(values) == 5 and all(map(math.isfinite, values)) for values in metrics.values())
        assert min(metrics["seconds"]) >= 0 and min(metrics["peak_mb"]) > 10
    assert [claim.verdict for claim in result.claims] == ["holds", "holds", "holds", "contradicted"]
    assert result.claims[0].effect == pytest.approx(0.1, abs=0.01)
    assert result.claims[1].effect == pytest.approx(0.1, abs=0.01)  # lower is better: the sign is turned
    assert math.isnan(result.claims[2].p)
    total = 3 + 2 + 3 * 5
    assert [event[:2] for event in events] == [(done, total) for done in range(1, total + 1)]
    assert {"method, tuning", "control, seed 4"} <= {event[2] for event in events}
    assert len(log()) == 3 + 2 * 5  # the toy's system arms
    assert result.environment["code"] == "toy"


def test_same_seed_same_result_and_nothing_is_computed_twice(path, tmp_path, log):
    first = run_trial(TOY, seeds=2, store=path)
    computed = len(log())
    assert comparable(run_trial(TOY, seeds=2, store=path)) == comparable(first)
    assert len(log()) == computed
    assert comparable(run_trial(TOY, seeds=2, store=tmp_path / "other.db")) == comparable(first)
    computed = len(log())
    more = run_trial(TOY, seeds=3, store=path)  # only the new seed is computed
    assert len(log()) == computed + 2
    assert more.arms["method"]["accuracy"][:2] == first.arms["method"]["accuracy"]


def test_the_callers_generator_and_threads_are_left_alone(path):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    run_trial(TOY, seeds=1, store=path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_tuning_sees_the_validation_split_and_takes_the_first_of_equals(path):
    seen = []

    def spy(task, generator, width, depth=0):
        seen.append((task.seed, torch.equal(task.test.x, task.valid.x), width, depth))
        return {"score": {1: 3.0, 2: 1.0, 3: 1.0, 4: math.nan}[width], "accuracy": 0.0}

    arms = {"spy": Arm(spy, grid={"width": (1, 2, 3, 4), "depth": (7,)}, system=True)}
    trial = toy(arms=arms, claims=[], tune_on="score", tune_better="lower", tuning_seeds=(1000, 1001))
    result = run_trial(trial, seeds=1, store=path)
    assert seen[:-1] == [(seed, True, width, 7) for width in (1, 2, 3, 4) for seed in (1000, 1001)]
    assert seen[-1] == (0, False, 2, 7)
    assert result.settings["spy"] == {"width": 2, "depth": 7}
    highest = run_trial(toy(arms=arms, claims=[], tune_on="score"), seeds=1, store=path)
    assert highest.settings["spy"]["width"] == 1


def test_grids():
    arm = Arm(print, grid={"a": (1, 2), "b": ("x", "y")})
    assert combinations(arm) == [{"a": a, "b": b} for a in (1, 2) for b in "xy"]
    assert combinations(Arm(print)) == [{}]
    with pytest.raises(InvalidInput, match="grid of a is empty"):
        combinations(Arm(print, grid={"a": ()}))


def test_stack_arms_share_data_and_initial_weights(path):
    result = run_trial(TOY, seeds=2, store=path, only_arms=["trained"])
    assert result.arms["trained"]["epochs"] == [2.0, 2.0]
    assert result.arms["trained"]["weight"][0] != result.arms["trained"]["weight"][1]
    twin = toy(arms={name: load_trial(TOY).tiers["embedded"].arms["trained"] for name in ("one", "two")}, claims=[])
    pair = run_trial(twin, seeds=2, store=path)
    assert pair.arms["one"]["weight"] == pair.arms["two"]["weight"]


def test_only_some_arms(path):
    result = run_trial(TOY, seeds=2, store=path, only_arms=["method"])
    assert not result.complete and list(result.arms) == ["method"]
    assert {claim.verdict for claim in result.claims} == {"inconclusive"}
    assert result.claims[0].reason == "Arm control was not run."


# ---------------------------------------------------------------- failures


def test_a_failing_arm_is_recorded_and_retried(path, monkeypatch, log):
    monkeypatch.setenv("TOY_BREAK", "control=error")
    broken = run_trial(TOY, seeds=2, store=path)
    assert [f.where for f in broken.failures] == ["seed 0", "seed 1"]
    assert broken.failures[0].error.startswith("RuntimeError: the toy is broken (toy_trial.py:")
    assert math.isnan(broken.arms["control"]["seconds"][0])
    assert all(map(math.isfinite, broken.arms["method"]["accuracy"]))  # the others went on
    assert broken.claims[0].verdict == "inconclusive"
    assert "control failed (seed" in broken.claims[0].reason and "the toy is broken" in broken.claims[0].reason
    assert broken.claims[3].reason == "" and broken.claims[3].p < 1  # a claim that does not need the broken arm
    monkeypatch.delenv("TOY_BREAK")
    computed = len(log())
    mended = run_trial(TOY, seeds=2, store=path)
    assert len(log()) == computed + 2  # the two failed cells and no other
    assert not mended.failures and mended.claims[2].verdict == "holds"


def test_an_arm_none_of_whose_settings_works(path, monkeypatch):
    monkeypatch.setenv("TOY_BREAK", "method=error")
    result = run_trial(TOY, seeds=2, store=path)
    assert [(f.arm, f.where) for f in result.failures] == [("method", "tuning")]
    assert "the toy is broken" in result.claims[0].reason
    assert all(map(math.isnan, result.arms["method"]["seconds"]))
    monkeypatch.setenv("TOY_BREAK", "method=nan")
    assert "No setting of its grid gave a finite accuracy" in run_trial(TOY, seeds=2, store=path).claims[0].reason


def test_sys_exit_in_an_arm_is_a_failure(path, monkeypatch):
    monkeypatch.setenv("TOY_BREAK", "control=exit")
    assert "SystemExit: 3" in run_trial(TOY, seeds=1, store=path).failures[0].error


def test_nan_is_no_failure_but_no_verdict_either(path, monkeypatch):
    monkeypatch.setenv("TOY_BREAK", "control=nan")
    result = run_trial(TOY, seeds=2, store=path)
    assert not result.failures
    assert result.claims[0].verdict == "inconclusive"
    assert result.claims[0].reason == "The effect is nan at seed 0."


def test_a_missing_tuning_metric_is_named(path):
    arms = {"spy": Arm(lambda task, generator, a: {"loss": 1.0}, grid={"a": (1, 2)}, system=True)}
    result = run_trial(toy(arms=arms, claims=[]), seeds=1, store=path)
    assert "gives no accuracy, on which it is tuned; it gives loss" in result.failures[0].error


@pytest.mark.parametrize("how", ["arm", "progress"])
def test_ctrl_c_leaves_the_store_consistent(path, monkeypatch, how):
    def stop(*_):
        raise KeyboardInterrupt

    if how == "arm":
        monkeypatch.setenv("TOY_BREAK", "control=interrupt")
    with pytest.raises(KeyboardInterrupt):
        run_trial(TOY, seeds=2, store=path, progress=stop if how == "progress" else None)
    assert set(statuses(path)) == {"done"}  # no claim is left behind
    monkeypatch.delenv("TOY_BREAK", raising=False)
    assert not run_trial(TOY, seeds=2, store=path).failures


def test_peak_memory_is_the_cells_own(path):
    def hungry(task, generator, megabytes):
        block = torch.ones(megabytes * 2**18)
        return {"accuracy": block[-1].item()}

    arms = {
        "big": Arm(hungry, {"megabytes": (300,)}, system=True),
        "small": Arm(hungry, {"megabytes": (1,)}, system=True),
    }
    result = run_trial(toy(arms=arms, claims=[]), seeds=2, store=path)
    if Path("/proc/self/clear_refs").exists():
        for big, small in zip(result.arms["big"]["peak_mb"], result.arms["small"]["peak_mb"], strict=True):
            assert 250 < big - small < 350


# ---------------------------------------------------------------- what asks for new cells


def test_arguments_that_cannot_be(path):
    bad: list[dict[str, Any]] = [
        {"seeds": 0},
        {"seeds": [1, 1]},
        {"seeds": []},
        {"tier": "standard"},
        {"workers": 0},
        {"only_arms": ["x"]},
    ]
    for arguments in bad:
        with pytest.raises(InvalidInput):
            run_trial(TOY, store=path, **arguments)
    with pytest.raises(InvalidInput, match="tuning seeds"):
        run_trial(TOY, seeds=[1000, 1], store=path)
    with pytest.raises(InvalidInput, match="no trial for 'noisy_labels/none'"):
        load_trial("noisy_labels/none")
    with pytest.raises(InvalidInput, match="family/slug"):
        load_trial("elr")
    with pytest.raises(InvalidInput, match="no Trial named nothing"):
        load_trial(TOY.replace(":TRIAL", ":nothing"))
    with pytest.raises(InvalidInput, match="does not exist"):
        load_trial("nowhere.py:TRIAL")


def own_task(shift):
    def make(seed, data_dir):
        x = torch.linspace(0, 1, 24).reshape(8, 3) + shift
        split = Split(x, torch.arange(8) % 2)
        return Task("mine", split, split, split, 2, modality="vector", bounds=None)

    return make


def test_own_data_have_cells_of_their_own(path, log):
    run_trial(TOY, seeds=1, store=path)
    before = len(log())
    own = run_trial(TOY, seeds=2, store=path, data=own_task(0.0))
    assert own.tier == "own" and own.data.startswith("mine#")
    assert len(log()) == before + 3 + 4
    assert (
        own.arms["trained"]["weight"][0] != own.arms["trained"]["weight"][1]
    )  # the seed is the trial's, not the data's
    run_trial(TOY, seeds=2, store=path, data=own_task(0.0))
    assert len(log()) == before + 7
    run_trial(TOY, seeds=2, store=path, data=own_task(1.0))  # same name, other contents
    assert len(log()) == before + 14


def test_missing_data_is_one_error_before_anything_runs(path):
    def absent(seed, data_dir):
        raise InvalidInput("train.npz is not there.")

    with pytest.raises(InvalidInput, match=r"train\.npz"):
        run_trial(toy(task=absent), seeds=2, store=path)
    assert not path.exists()


def test_other_code_asks_for_new_cells(path, log, monkeypatch):
    run_trial(TOY, seeds=1, store=path)
    before = len(log())
    monkeypatch.setattr(engine, "code_fingerprint", lambda trial: "changed")
    run_trial(TOY, seeds=1, store=path)
    assert len(log()) == 2 * before


def test_fingerprint(tmp_path, monkeypatch):
    package = tmp_path / "surefoot"
    shutil.copytree(fingerprint_module.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fingerprint_module, "PACKAGE", package)
    shutil.copy(TOY.removesuffix(":TRIAL"), tmp_path / "mine.py")
    trial = replace(load_trial(f"{tmp_path / 'mine.py'}:TRIAL"), method="noisy_labels/elr")
    first = code_fingerprint(trial)

    def touch(file, text="\nTOUCHED = 1\n"):
        before = file.read_text()
        file.write_text(before + text)
        changed = code_fingerprint(trial) != first
        file.write_text(before)
        return changed

    assert code_fingerprint(trial) == first
    assert touch(tmp_path / "mine.py")
    for name in (
        "core/task.py",
        "training/loop.py",
        "noisy_labels/elr.py",
        "noisy_labels/__init__.py",
        "models/networks.py",
    ):
        assert touch(package / name), name
        assert not touch(package / name, "\n# a comment\n"), name
    for name in (
        "core/statistics.py",
        "core/store.py",
        "contracts.py",
        "init/tract.py",
        "curation/data_diet/runs.py",
        "cli/__init__.py",
    ):
        assert not touch(package / name), name


def test_fingerprint_ignores_docstrings_and_layout(tmp_path):
    def code(text):
        (tmp_path / "trial.py").write_text(text)
        return fingerprint_module._closure({tmp_path / "trial.py"})

    plain = code("from surefoot.core.task import Task\n\ndef f(x):\n    return x + 1\n")
    assert (
        code(
            '"""About."""\nfrom surefoot.core.task import Task\ndef f(x):\n    """More."""\n    return (x\n            + 1)\n'
        )
        == plain
    )
    assert code("from surefoot.core.task import Task\n\ndef f(x):\n    return x + 2\n") != plain
    assert {"core/task.py", "core/subject.py", "core/__init__.py", "errors.py"} < set(plain)


# ---------------------------------------------------------------- verdicts


def arms_of(**values):
    return {arm: {"m": list(numbers)} for arm, numbers in values.items()}


def test_holm_spans_the_claims_of_a_trial():
    base = [0.0] * 5
    weak = [0.02, 0.05, 0.01, 0.06, 0.04]  # p about 0.02
    arms = arms_of(a=weak, b=base)
    one = judge_claims([Claim("x", "m", "a", "b")], arms, range(5), {})
    assert one[0].verdict == "holds" and 0.01 < one[0].p < 0.025
    three = judge_claims([Claim(name, "m", "a", "b") for name in "xyz"], arms, range(5), {})
    assert [claim.verdict for claim in three] == ["inconclusive"] * 3
    assert three[0].adjusted_p == pytest.approx(3 * one[0].p)
    guarantee = Claim("g", "m", "a", "b", every_seed=True)
    with_guarantee = judge_claims([Claim("x", "m", "a", "b"), guarantee], arms, range(5), {})
    assert [claim.verdict for claim in with_guarantee] == ["holds", "holds"]  # counts need no correction


def test_kinds_of_claims():
    arms = arms_of(a=[0.50, 0.51, 0.49, 0.50, 0.52], b=[0.30, 0.32, 0.29, 0.31, 0.30])
    verdict = lambda **claim: judge_claims([Claim("c", "m", **claim)], arms, range(5), {})[0]  # noqa: E731
    assert verdict(arm="a", over="b", at_least=0.1).verdict == "holds"
    assert verdict(arm="a", over="b", at_least=0.3).verdict == "contradicted"
    assert verdict(arm="a", over="b", better="lower").verdict == "contradicted"
    assert verdict(arm="a", at_least=0.45).verdict == "holds"
    assert verdict(arm="a", better="lower", at_least=-0.6).verdict == "holds"  # at most 0.6
    assert verdict(arm="a", over="b", within=0.3).verdict == "holds"
    assert verdict(arm="a", over="b", within=0.1).verdict == "contradicted"
    assert verdict(arm="a", every_seed=True, at_least=0.49).verdict == "holds"
    assert verdict(arm="a", every_seed=True, at_least=0.495).verdict == "contradicted"
    assert verdict(arm="a", over="b", every_seed=True, within=0.2).verdict == "contradicted"
    ratio = verdict(effect=lambda row: row["a"]["m"] / row["b"]["m"], at_least=1.5)
    assert ratio.verdict == "holds" and ratio.effect == pytest.approx(1.66, abs=0.02)


def test_claims_that_cannot_be_computed_say_why():
    arms = arms_of(a=[1.0, 2.0, 3.0], b=[1.0, 1.0, 1.0])
    wrong = judge_claims(
        [
            Claim("metric", "none", "a"),
            Claim("arm", "m", "c"),
            Claim("failed", "m", "b"),
            Claim("bug", effect=lambda row: 1 / 0),
        ],
        arms,
        range(3),
        {"b": "Arm b failed."},
    )
    assert {claim.verdict for claim in wrong} == {"inconclusive"}
    assert "named 'none'" in wrong[0].reason and "named 'c'" in wrong[1].reason
    assert wrong[2].reason == "Arm b failed."
    assert "ZeroDivisionError" in wrong[3].reason
    single = judge_claims([Claim("one seed", "m", "a")], arms_of(a=[1.0]), range(1), {})[0]
    assert single.verdict == "inconclusive" and single.p == 1.0


# ---------------------------------------------------------------- other processes


class Nursery:
    """Forks runs of the toy trial from a process that has torch imported already."""

    def __init__(self, store, seeds, workers=1, **environment):
        script = TOY.removesuffix(":TRIAL")
        self._process = subprocess.Popen(
            [sys.executable, script, str(store), str(seeds), str(workers)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip

    def go(self):
        return int(self._say("go"))

    def wait(self, pid):
        """(exit status, result or None)"""
        status, file = self._say(pid).split(maxsplit=1)
        return int(status), json.loads(Path(file).read_text()) if Path(file).exists() else None

    def _say(self, word):
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def done_rows(path):
    with Store(path) as store:
        rows = store._db.execute("SELECT arm, settings, seed, metrics, seconds, token FROM cells WHERE status = 'done'")
        return {row[:3]: row[3:] for row in rows.fetchall()}


@pytest.mark.slow
@needs_fork
def test_kill_nine_twenty_times(path, tmp_path, log):
    """Nothing finished is lost, nothing is counted twice, and the result is that of a run that nobody killed."""
    chance, seeds, hits = random.Random(9), 130, 0
    with Nursery(path, seeds, TOY_SLEEP="0.01") as nursery:
        snapshots = []
        for _ in range(20):
            pid = nursery.go()
            target, deadline = len(log()) + chance.randint(1, 12), time.monotonic() + 20
            while len(log()) < target and time.monotonic() < deadline:  # by progress, not by the clock: machines differ
                time.sleep(0.004)
            time.sleep(chance.uniform(0, 0.03))  # within a cell, between two, or while one is being recorded
            os.kill(pid, signal.SIGKILL)
            status, result = nursery.wait(pid)
            hits += result is None and status == signal.SIGKILL
            snapshots.append((done_rows(path) if path.exists() else {}, len(log())))
        status, final = nursery.wait(nursery.go())
    assert status == 0 and hits == 20, "every kill must have met a run that was under way"
    assert len({len(done) for done, _ in snapshots}) >= 15, "the kills must have come at different stages"
    final_rows, computed = done_rows(path), log()
    for done, lines in snapshots:
        assert done.items() <= final_rows.items()  # kept as they were, the claim's token included
        again = {(arm, json.dumps(settings, separators=(",", ":")), seed) for arm, seed, settings in computed[lines:]}
        assert not again & done.keys()  # and never computed again
    assert len(final_rows) == 3 + 2 + 3 * seeds
    whole = run_trial(TOY, seeds=seeds, store=tmp_path / "whole.db")
    assert final == comparable(whole)


@pytest.mark.slow
@needs_fork
def test_two_trials_share_a_store(path, log):
    seeds = 12
    with Nursery(path, seeds, TOY_SLEEP="0.01") as nursery:
        pids = [nursery.go(), nursery.go()]
        (first_status, first), (second_status, second) = (nursery.wait(pid) for pid in pids)
    assert first_status == second_status == 0
    assert first == second == comparable(run_trial(TOY, seeds=seeds, store=path))
    lines = [json.dumps(line) for line in log()]
    assert len(lines) == len(set(lines)) == 3 + 2 * seeds  # each cell was computed by one of them
    with Store(path) as store:
        owners = store._db.execute("SELECT pid, count(*) FROM cells GROUP BY pid").fetchall()
    assert len(owners) == 2  # and both did some


@pytest.mark.slow
def test_workers_give_the_same_result(path, tmp_path):
    events = []
    many = run_trial(TOY, seeds=4, store=path, workers=2, progress=lambda *event: events.append(event))
    assert comparable(many) == comparable(run_trial(TOY, seeds=4, store=tmp_path / "alone.db"))
    assert events[-1][:2] == (17, 17)
    with Store(path) as store:
        assert os.getpid() not in {row[0] for row in store._db.execute("SELECT pid FROM cells")}
    with pytest.raises(InvalidInput, match="Other processes must be able to import"):
        run_trial(toy(), store=path, workers=2)  # its lambdas cannot travel


@pytest.mark.slow
def test_a_cell_that_kills_its_workers_does_not_stop_the_others(path, monkeypatch):
    monkeypatch.setenv("TOY_BREAK", "control=kill")
    result = run_trial(TOY, seeds=1, store=path, workers=2)
    assert [(f.arm, f.seed) for f in result.failures] == [("control", 0)]
    assert "died 3 times" in result.failures[0].error
    assert math.isfinite(result.arms["trained"]["accuracy"][0])


@pytest.mark.slow
@needs_fork
def test_orphaned_workers_stop(path):
    with Nursery(path, 500, 2, TOY_SLEEP="0.05") as nursery:
        pid = nursery.go()
        deadline = time.monotonic() + 60
        while not (path.exists() and statuses(path).get("done", 0) > 3) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        nursery.wait(pid)
        time.sleep(1.0)
        before = statuses(path)
        time.sleep(0.5)
    assert statuses(path) == before and before.get("claimed", 0) == 0


@pytest.mark.slow
def test_ray_gives_the_same_result(path, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    result = run_trial(TOY, seeds=2, store=path, ray_address="local")
    assert not ray.is_initialized()
    assert comparable(result) == comparable(run_trial(TOY, seeds=2, store=tmp_path / "alone.db"))
    assert statuses(path) == {"done": 3 + 2 + 6}
