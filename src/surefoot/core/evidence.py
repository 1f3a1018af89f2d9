"""Evidence: what a trial found, as one committed JSON file a method, `evidence/<family>/<slug>.json`.

The top level is the embedded tier's record; the standard tier's, in the same shape, stands under `"standard"`:

    {"method", "tier", "seeds": [...], "arms": {arm: {metric: [per seed], "seconds": [...], "peak_mb": [...]}},
     "claims": [{"claim", "verdict", "effect", "low", "high", "p"}], "environment": {...},
     "settings": {arm: tuned settings}, "adjusted_p": {claim: p}, "reasons": {claim: why undecided}, "notes": [...]}

JSON has no NaN: a number that is missing or not finite is `null`, and a note says where and why. `p` is the raw p-value; a
verdict compares the Holm-adjusted one. A method of which only the standard tier was run has that record at the top.
Reading needs neither torch nor numpy, as `surefoot list` reads every file.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surefoot.errors import InvalidInput, Refused

if TYPE_CHECKING:
    from surefoot.core.engine import TrialResult

Record = dict[str, Any]
_KEYS = ("method", "tier", "seeds", "arms", "claims", "environment")
_CLAIM_KEYS = ("claim", "verdict", "effect", "low", "high", "p")


def evidence_path(method: str, directory: Path | str = "evidence") -> Path:
    return Path(directory) / f"{method}.json"


def to_dict(result: TrialResult) -> Record:
    """The JSON twin of a trial's result."""
    notes = [result.notes] if result.notes else []
    notes += [f"{failure.arm}, {failure.where}: {failure.error}" for failure in result.failures]
    arms: dict[str, dict[str, list[float | None]]] = {}
    for arm, metrics in result.arms.items():
        arms[arm] = {}
        for metric, values in metrics.items():
            arms[arm][metric] = [_finite(value) for value in values]
            for seed, value in zip(result.seeds, values, strict=True):
                if not math.isfinite(value) and not result.failed(arm, seed):
                    notes.append(f"{arm}, seed {seed}: {metric} is {value}.")
    record: Record = {"method": result.method, "tier": result.tier, "seeds": list(result.seeds), "arms": arms}
    record["claims"] = [
        {
            "claim": claim.claim,
            "verdict": claim.verdict,
            **{name: _finite(getattr(claim, name)) for name in ("effect", "low", "high", "p")},
        }
        for claim in result.claims
    ]
    record["environment"] = dict(result.environment)
    record["settings"] = {arm: dict(settings) for arm, settings in result.settings.items()}
    record["adjusted_p"] = {c.claim: c.adjusted_p for c in result.claims if math.isfinite(c.adjusted_p)}
    record["reasons"] = {c.claim: c.reason for c in result.claims if c.reason}
    record["notes"] = notes
    if result.tier == "own":
        record["data"] = result.data
    return record


def write_evidence(result: TrialResult, directory: Path | str = "evidence", *, path: Path | str | None = None) -> Path:
    """Write a result into its method's file, atomically, beside what the file holds of the other tier.

    A trial on the user's own data goes to `<slug>.own.json`. A run of only some arms is refused: it would replace more
    evidence than it brings.
    """
    if not result.complete:
        raise Refused(f"Only some arms of {result.method} were run; run all of them to write its evidence.")
    record = to_dict(result)
    name = f"{result.method}.own" if result.tier == "own" else result.method
    target = Path(path) if path is not None else evidence_path(name, directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent):  # both tiers of a method may finish at the same time
        tiers = load_evidence(target) if target.exists() else {}
        tiers[record["tier"]] = record
        top = tiers.pop("embedded", None) or tiers.pop(record["tier"])
        write_json(target, {**top, **{name: tiers[name] for name in ("standard",) if name in tiers}})
    return target


def write_json(path: Path, value: Any) -> None:
    """Atomic: whoever reads `path`, at any moment, finds the old file or the new one whole. NaN is refused."""
    text = _pretty(value)
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)  # mkstemp's 0600 would go into the commit
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def load_evidence(path: Path | str) -> dict[str, Record]:
    """The records of one file by tier; a missing, malformed or foreign file is an `InvalidInput`."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be read as evidence ({error}); run the trial again to write it.") from error
    records = [content]
    if isinstance(content, dict) and "standard" in content:
        records.append(content.pop("standard"))
    for record in records:
        problem = _problem(record)
        if problem:
            raise InvalidInput(f"{path} is not evidence of a trial: {problem}; run the trial again to write it.")
    return {record["tier"]: record for record in records}


def all_evidence(directory: Path | str = "evidence") -> dict[str, dict[str, Record]]:
    """Every method's records by tier: `{method: {tier: record}}`, in order of the method's name."""
    found: dict[str, dict[str, Record]] = {}
    for path in sorted(Path(directory).glob("*/*.json")):
        if not path.name.endswith(".own.json") and not path.name.startswith("."):
            records = load_evidence(path)
            found[next(iter(records.values()))["method"]] = records
    return found


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _problem(record: Any) -> str | None:
    if not isinstance(record, dict):
        return "a record must be a JSON object"
    missing = [key for key in _KEYS if key not in record]
    if missing:
        return f"it lacks {', '.join(missing)}"
    if not isinstance(record["arms"], dict) or not isinstance(record["claims"], list):
        return "arms must be an object and claims a list"
    for claim in record["claims"]:
        if not isinstance(claim, dict) or any(key not in claim for key in _CLAIM_KEYS):
            return f"each claim needs {', '.join(_CLAIM_KEYS)}"
    for arm, metrics in record["arms"].items():
        for metric, values in metrics.items():
            if not isinstance(values, list) or len(values) != len(record["seeds"]):
                return f"{metric} of arm {arm} must hold one value for each of {len(record['seeds'])} seeds"
    return None


def _pretty(value: Any, indent: int = 0) -> str:
    """JSON with one line per list of numbers, so that a rerun makes a diff that can be read."""
    if isinstance(value, Mapping) and value:
        pad = "  " * (indent + 1)
        rows = [f"{pad}{json.dumps(str(key))}: {_pretty(item, indent + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(rows) + "\n" + "  " * indent + "}"
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        pad = "  " * (indent + 1)
        return "[\n" + ",\n".join(pad + _pretty(item, indent + 1) for item in value) + "\n" + "  " * indent + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Read, merge and replace under a lock on the folder, where the system has one."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
