"""Write the numbers of the README between its two marks, from the catalogue and the committed evidence."""

from __future__ import annotations

import re
from pathlib import Path

from surefoot import catalog

README = Path(__file__).parents[1] / "README.md"


def numbers() -> str:
    works = [m for m in catalog.methods() if catalog.works(m)]
    claims = [v for m in works for tier in catalog.verdicts(m).values() for v in tier.values()]
    counts = {v: claims.count(v) for v in ("holds", "inconclusive", "contradicted")}
    tiers = [(tier, record) for m in works for tier, record in catalog.records(m).items()]
    standard = sum(tier == "standard" for tier, _ in tiers)
    fewest = {name: min(len(record["seeds"]) for tier, record in tiers if tier == name) for name in ("embedded", "standard")}  # fmt: skip
    lines = [
        f"{len(works)} of {len(catalog.methods())} methods work, with {len(claims)} claims tried (over at least {fewest['embedded']} seeds, or {fewest['standard']} on large data): {counts['holds']} hold, "
        f"{counts['inconclusive']} are inconclusive, {counts['contradicted']} are contradicted at this scale. {standard} methods have also been tried on real data, "
        f"MNIST, Fashion-MNIST or photos. An audit has {len(catalog.instruments())} instruments.",
        "",
        "| method | what it is for | hold | inconclusive | contradicted |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for m in works:
        found = [v for tier in catalog.verdicts(m).values() for v in tier.values()]
        row = " | ".join(str(found.count(v)) for v in counts)
        lines.append(f"| `{m.slug}` | {m.sentence} | {row} |")
    return "\n".join(lines)


def filled(text: str) -> str:
    marks = r"(<!-- numbers: begin -->\n).*?(<!-- numbers: end -->)"
    return re.sub(marks, lambda m: f"{m[1]}{numbers()}\n{m[2]}", text, flags=re.S)


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
