"""`list`, `show` and `cite`: the catalogue on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surefoot import catalog
from surefoot.errors import check

if TYPE_CHECKING:
    from rich.console import Console

STYLE = {"holds": "green", "inconclusive": "yellow", "contradicted": "red"}


def console() -> Console:
    from rich.console import Console

    return Console()


def as_row(method: catalog.Method) -> dict[str, Any]:
    return {
        "slug": method.slug,
        "family": method.family,
        "title": method.title,
        "paper": method.paper,
        "works": catalog.works(method),
        "verdicts": catalog.verdicts(method),
    }


def print_list(family: str | None, as_json: bool) -> None:
    chosen = [m for m in catalog.methods() if family in (None, m.family)]
    families = sorted({m.family for m in catalog.methods()})
    check(bool(chosen), f"There is no family {family!r}; there are {', '.join(families)}.")
    rows = [as_row(m) for m in chosen]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", "method", "family", "what it is for", "verdicts"):
        table.add_column(column, no_wrap=column in ("method", "family"))
    for method, row in zip(chosen, rows, strict=True):
        counts = [v for tier in row["verdicts"].values() for v in tier.values()]
        summary = " ".join(f"[{STYLE[k]}]{counts.count(k)} {k}[/]" for k in STYLE if k in counts)
        mark = "[green]●[/]" if row["works"] else "[dim]○[/]"
        table.add_row(mark, method.slug, f"[dim]{method.family}[/]", method.sentence, summary)
    out = console()
    out.print(table)
    ready = sum(row["works"] for row in rows)
    out.print(f"\n{ready} of {len(rows)} work (●). surefoot show METHOD tells more.")


def print_method(slug: str) -> None:
    from rich.syntax import Syntax
    from rich.table import Table

    method = catalog.find(slug)
    out = console()
    out.print(f"[bold]{method.slug}[/] · {method.title}\n[dim]{method.paper}[/]\n")
    out.print(method.sentence)
    if not method.treatment and not method.use:
        out.print("\n[yellow]This method is in the catalogue but not built yet.[/]")
    if method.when:
        out.print(f"\n[bold]When[/]  {method.when}")
    if method.use:
        out.print("\n[bold]In your own loop[/]")
        out.print(Syntax(method.use.strip(), "python", background_color="default"))
    if method.treatment:
        from surefoot.cli.app import settings_of

        out.print(f"\n[bold]On your model[/]  surefoot harden MODEL --data DATA --with {method.slug}")
        settings = settings_of(catalog.load_plug(method.treatment))
        out.print("[bold]Settings[/]  " + (", ".join(f"{n}={v}" for n, v in settings) or "none"))
    if method.cost:
        out.print(f"[bold]Cost[/]  {method.cost}")
    found = catalog.evidence(method)
    if found is not None:
        for tier, data in (("embedded", found), ("standard", found.get("standard"))):
            if data is None:
                continue
            table = Table(
                box=None,
                pad_edge=False,
                title=f"Evidence, {tier} tier, {len(data['seeds'])} seeds",
                title_justify="left",
            )
            for column in ("verdict", "claim", "effect", "95 % interval"):
                table.add_column(column)
            for c in data["claims"]:
                table.add_row(f"[{STYLE[c['verdict']]}]{c['verdict']}[/]", c["claim"], number(c["effect"]), f"{number(c['low'])} to {number(c['high'])}")  # fmt: skip
            out.print()
            out.print(table)
    out.print(f"\n[bold]Cite[/]  surefoot cite {method.slug}")


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if 9999.5 <= abs(value) < 1e15 else f"{value:.4g}"


def print_citations(names: list[str]) -> None:
    chosen: list[catalog.Method] = []
    for name in names:
        path = Path(name).expanduser()
        chosen += _of_run(path) if path.is_dir() else [catalog.find(name)]
    print(catalog.bibtex(list(dict.fromkeys(chosen))))


def _of_run(folder: Path) -> list[catalog.Method]:
    """The treatments of a folder written by `surefoot harden` (the report's or the model's)."""
    for candidate in (folder / "model.json", folder / "model" / "model.json"):
        if candidate.is_file():
            return [catalog.find(t["slug"]) for t in json.loads(candidate.read_text())["treatments"]]
    check(False, f"{folder} holds no model.json; give a slug or a folder that surefoot harden wrote.")
    return []
