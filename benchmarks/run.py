"""`make bench`: every benchmark beside its peers in one run, ratio first (ours / peer: below 1 is faster than the peer).

python benchmarks/run.py [name ...]          only the named ones, say: attacks smoothing
python benchmarks/run.py --keep MACHINE      put the rows into results/MACHINE.json, too, which the site's page on speed shows
"""

from __future__ import annotations

import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from surefoot.core.environment import environment

HERE = Path(__file__).parent


def cli_rows() -> list[dict]:
    """Start-up of the commands that promise to be quick."""
    rows = []
    for verb in ("list", "--help"):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "surefoot.cli", verb], capture_output=True, check=True)
            times.append(time.perf_counter() - start)
        rows.append(
            {"what": f"surefoot {verb}", "ours_s": statistics.median(times), "peer": "0.4 s wanted", "peer_s": 0.4}
        )
    return rows


def show(row: dict) -> str:
    def seconds(value: float | None) -> str:
        return "–" if value is None else f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"

    def memory(value: float | None) -> str:
        return "–" if value is None else f"{value:.0f} MB"

    ours, peer = row.get("ours_s"), row.get("peer_s")
    ratio = ours / peer if ours is not None and peer else None
    first = "     –" if ratio is None else f"{ratio:6.2f}"
    times = f"{seconds(ours)} | {seconds(peer)} {row.get('peer', '')}"
    extra = row.get("note") or row.get("quality") or ""
    return f"{first}  {row['what']}: {times}; {memory(row.get('ours_mb'))} | {memory(row.get('peer_mb'))}. {extra}"


def keep(machine: str, results: dict[str, list[dict]]) -> None:
    """The rows with where they were taken, over earlier ones of the same benches."""
    path = HERE / "results" / f"{machine}.json"
    path.parent.mkdir(exist_ok=True)
    known = json.loads(path.read_text())["results"] if path.exists() else {}
    here = environment()
    stamp = {key: here[key] for key in ("python", "packages", "system", "cpus", "gpu", "date")}
    rows = {name: [row | {"revision": here["revision"]} for row in found] for name, found in results.items()}
    path.write_text(json.dumps({"environment": stamp, "results": known | rows}, indent=1, default=str) + "\n")


def main() -> None:
    wanted = sys.argv[1:]
    machine = None
    if "--keep" in wanted:
        at = wanted.index("--keep")
        machine, wanted = wanted[at + 1], wanted[:at] + wanted[at + 2 :]
    sys.path.insert(0, str(HERE))
    results: dict[str, list[dict]] = {}
    print(f"ratio  ours / peer, median of 5, {platform.machine()}, Python {platform.python_version()}\n")
    for path in sorted(HERE.glob("bench_*.py")):
        name = path.stem.removeprefix("bench_")
        if wanted and name not in wanted:
            continue
        print(name)
        results[name] = importlib.import_module(path.stem).rows()
        print("\n".join(f"  {show(row)}" for row in results[name]), flush=True)
    if not wanted or "cli" in wanted:
        results["cli"] = cli_rows()
        print("cli\n" + "\n".join(f"  {show(row)}" for row in results["cli"]))
    (HERE / "latest.json").write_text(json.dumps(results, indent=1, default=str))
    if machine is not None:
        keep(machine, results)


if __name__ == "__main__":
    main()
