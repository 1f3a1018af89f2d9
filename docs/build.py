"""Write the generated pages of the site: one page a method, an index, what the benchmarks gave, and the evidence overview."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from pathlib import Path

from surefoot import catalog
from surefoot.report import write_evidence_page

DOCS = Path(__file__).parent
MARK = {"holds": "✓ holds", "inconclusive": "? inconclusive", "contradicted": "✗ contradicted"}


def settings_table(method: catalog.Method) -> list[str]:
    plug = catalog.load_plug(method.treatment)
    rows = [f for f in dataclasses.fields(plug) if f.init]
    if not rows:
        return []
    lines = ["## Settings", "", "| setting | default |", "| --- | --- |"]
    return [*lines, *(f"| `{f.name}` | `{f.default!r}` |" for f in rows), ""]


def evidence_section(method: catalog.Method) -> list[str]:
    found = catalog.evidence(method)
    if found is None:
        return []
    lines = ["## Evidence", ""]
    for tier, data in (("Embedded", found), ("Standard", found.get("standard"))):
        if data is None:
            continue
        lines += [f"{tier} tier, {len(data['seeds'])} seeds. Effects are paired over seeds.", ""]
        lines += ["| verdict | claim | effect | 95 % interval |", "| --- | --- | --- | --- |"]
        for c in data["claims"]:
            numbers = ["–" if c[k] is None else f"{c[k]:.3g}" for k in ("effect", "low", "high")]
            lines.append(f"| {MARK[c['verdict']]} | {c['claim']} | {numbers[0]} | {numbers[1]} to {numbers[2]} |")
        arms = data["arms"]
        metrics = [
            m for m in dict.fromkeys(m for values in arms.values() for m in values) if not catalog.is_curve_point(m)
        ]
        lines += [
            "",
            "| arm | " + " | ".join(m.replace("_", " ") for m in metrics) + " |",
            "| --- " * (len(metrics) + 1) + "|",
        ]
        for arm, values in arms.items():
            known = [[v for v in values.get(m, []) if v is not None] for m in metrics]
            lines.append(f"| {arm} | " + " | ".join(f"{sum(k) / len(k):.4g}" if k else "–" for k in known) + " |")
        lines += ["", *(line for note in data.get("notes", []) for line in (f"> {note}", ""))]
    return lines


def page(method: catalog.Method) -> str:
    lines = [f"# {method.slug}", "", f"**{method.title}** ({method.paper})", "", method.sentence, ""]
    if not method.treatment:
        return "\n".join(
            [*lines, "In the catalogue, not built yet.", "", "```bibtex", catalog.bibtex([method]), "```", ""]
        )
    if method.when:
        lines += ["**When.** " + method.when, ""]
    if method.use:
        lines += ["## In your own loop", "", "```python", method.use.strip(), "```", ""]
    lines += ["## On your model", "", "```bash", f"surefoot harden MODEL --data DATA --with {method.slug}", f"surefoot trial {method.slug}", "```", ""]  # fmt: skip
    lines += settings_table(method)
    if method.cost:
        lines += ["**Cost.** " + method.cost, ""]
    lines += evidence_section(method)
    doc = inspect.getdoc(importlib.import_module(method.module)) or ""
    lines += [
        "## The method",
        "",
        "```text",
        doc,
        "```",
        "",
        "## Cite",
        "",
        "```bibtex",
        catalog.bibtex([method]),
        "```",
        "",
    ]
    return "\n".join(lines)


def index() -> str:
    lines = [
        "# Methods",
        "",
        "● works here: built, with a trial protocol and committed evidence. ○ in the catalogue.",
        "",
    ]
    for family in dict.fromkeys(m.family for m in catalog.methods()):
        lines += [f"## {family}", ""]
        for m in catalog.methods():
            if m.family == family:
                lines.append(f"- {'●' if catalog.works(m) else '○'} [{m.slug}]({m.family}/{m.slug}.md): {m.sentence}")
        lines.append("")
    return "\n".join(lines)


def speed() -> str:
    """Every kept benchmark run: our time over the peer's, below 1 is faster."""
    lines = [
        "# Speed",
        "",
        "Our time over the peer's in the same run; below 1 is faster. `make bench` takes the numbers anew where you are.",
        "",
    ]
    for path in sorted((DOCS.parent / "benchmarks" / "results").glob("*.json")):
        kept = json.loads(path.read_text())
        where = ", ".join(f"{k} {v}" for k, v in kept["environment"].items() if v and not isinstance(v, dict))
        lines += [f"## {path.stem}", "", where, ""]
        for name, rows in kept["results"].items():
            lines += [
                f"### {name}",
                "",
                "| ratio | what | ours | peer | memory | note |",
                "| ---: | --- | ---: | --- | ---: | --- |",
            ]
            lines += [speed_row(row) for row in rows]
            lines.append("")
    return "\n".join(lines)


def speed_row(row: dict) -> str:
    def milliseconds(value: float | None) -> str:
        return "–" if value is None else f"{1e3 * value:.3g} ms"

    ours, peer = row.get("ours_s"), row.get("peer_s")
    ratio = f"{ours / peer:.2f}" if ours is not None and peer else "–"
    memory = " / ".join("–" if row.get(k) is None else f"{row[k]:.0f}" for k in ("ours_mb", "peer_mb"))
    note = (row.get("note") or row.get("quality") or "").replace("|", "/")
    what = row["what"].replace("|", "/")
    return f"| {ratio} | {what} | {milliseconds(ours)} | {milliseconds(peer)} {row.get('peer', '')} | {memory} MB | {note} |"


def build() -> None:
    folder = DOCS / "methods"
    for method in catalog.methods():
        path = folder / method.family / f"{method.slug}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(method), encoding="utf-8")
    (folder / "index.md").write_text(index(), encoding="utf-8")
    (DOCS / "speed.md").write_text(speed(), encoding="utf-8")
    write_evidence_page(DOCS / "evidence.html")


if __name__ == "__main__":
    build()
