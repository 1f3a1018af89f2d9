"""Reports: worst first, every number with its interval and sample size, the fix beside the finding, settings at the foot."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape

from surefoot import catalog
from surefoot.audit import Audit
from surefoot.core.engine import load_trial
from surefoot.core.finding import Chart, Finding, Thumbnails
from surefoot.errors import SurefootError
from surefoot.harden import Hardened

LAYOUT = {
    "margin": {"l": 55, "r": 15, "t": 15, "b": 45},
    "height": 320,
    "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#3b4252"},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "colorway": ["#2563a6", "#d97706", "#2e8b57", "#b4434f", "#7c5cb8", "#5f7383"],
    "xaxis": {"gridcolor": "rgba(120,130,150,.22)", "zeroline": False, "automargin": True},
    "yaxis": {"gridcolor": "rgba(120,130,150,.22)", "zeroline": False, "automargin": True},
    "legend": {"orientation": "h", "y": 1.12},
}


# --- numbers --------------------------------------------------------------------------------------------------------


def is_share(unit: str) -> bool:
    return unit in ("share", "accuracy", "fraction", "rate", "probability", "calibration error")


def plain_number(value: float, *, sign: str = "") -> str:
    """Three significant digits, and never fewer than the digits before the point: 1,000 is not 1e+03."""
    value += 0.0  # turns -0 into 0
    return f"{value:{sign},.0f}" if 999.5 <= abs(value) < 1e15 else f"{value:{sign}.3g}"


def show(value: float | None, unit: str = "") -> str:
    """A number as a person reads it: shares as percent, the rest with three significant digits."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if is_share(unit):
        return f"{100 * value:.1f} %"
    text = plain_number(value)
    return f"{text} {unit}" if unit and not unit.startswith(("/", "%")) else text + unit


def show_difference(value: float | None, unit: str = "") -> str:
    if value is None:
        return "–"
    return f"{100 * value:+.1f} points" if is_share(unit) else plain_number(value, sign="+")


def severity(finding: Finding) -> float:
    """How bad a finding is, 0 (fine) to 1: the distance of a share from its good end; numbers without a scale stand between."""
    if finding.better == "neither":
        return 0.0
    if not is_share(finding.unit):
        return 0.5 if finding.value > 0 or finding.better == "higher" else 0.0
    value = min(max(finding.value, 0.0), 1.0)
    return 1.0 - value if finding.better == "higher" else value


# --- pictures -------------------------------------------------------------------------------------------------------


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, dictionaries merged key by key."""
    out = dict(base)
    for key, value in over.items():
        out[key] = (
            merged(out[key], value) if isinstance(value, Mapping) and isinstance(out.get(key), Mapping) else value
        )
    return out


def plain(value: Any) -> Any:
    """Nested tensors and arrays as lists, NaN as null: what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def png_uri(image: np.ndarray, least: int = 64) -> str:
    """A uint8 image as a data URI; tiny images are enlarged without smoothing so that pixels stay pixels."""
    from PIL import Image

    array = np.asarray(image, dtype=np.uint8)
    picture = Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)
    factor = max(1, math.ceil(least / max(picture.size)))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if max(picture.size) > 256:
        picture.thumbnail((256, 256))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _picture(picture: Chart | Thumbnails) -> dict[str, Any]:
    if isinstance(picture, Chart):
        layout = merged(LAYOUT, picture.figure.get("layout", {}))
        return {
            "kind": "chart",
            "data": plain(picture.figure["data"]),
            "layout": plain(layout),
            "caption": picture.caption,
        }
    images = [{"uri": png_uri(i), "caption": c} for i, c in zip(picture.images, picture.captions, strict=True)]
    return {"kind": "thumbnails", "images": images, "caption": picture.caption}


# --- what the evidence says about a fix -----------------------------------------------------------------------------


def fixes(slugs: Iterable[str]) -> list[dict[str, Any]]:
    """For each treatment named by a finding: what it is, how to apply it, and what its trials found."""
    rows = []
    for slug in slugs:
        method = catalog.find(slug)
        if not method.treatment:
            continue
        found = catalog.evidence(method)
        claims = [] if found is None else found["claims"] + found.get("standard", {}).get("claims", [])
        counts = {v: sum(c["verdict"] == v for c in claims) for v in ("holds", "inconclusive", "contradicted")}
        headline = next((c for c in claims if c["claim"] == method.headline), None)
        rows.append({"slug": method.slug, "sentence": method.sentence, "paper": method.paper, "counts": counts, "headline": headline, "trials": len(claims)})  # fmt: skip
    return rows


# --- writing --------------------------------------------------------------------------------------------------------


def _environment() -> Environment:
    env = Environment(
        loader=PackageLoader("surefoot.report"), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
    )
    env.filters.update(show=show, diff=show_difference, share=is_share)
    return env


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _finding(finding: Finding, applied: Iterable[str] = ()) -> dict[str, Any]:
    bad = severity(finding)
    return {
        "f": finding,
        "severity": bad,
        "tone": "bad" if bad > 0.5 else "middling" if bad > 0.15 else "good",
        "pictures": [_picture(p) for p in finding.pictures],
        "fixes": fixes(slug for slug in finding.fix if slug not in set(applied)),
        "details": json.dumps(plain(finding.details), indent=1),
    }


def render_page(name: str, path: Path, **values: Any) -> Path:
    charts = [p for f in values.get("findings", []) for p in f["pictures"] if p["kind"] == "chart"] + values.get(
        "charts", []
    )
    for number, chart in enumerate(charts):
        chart["id"] = f"chart{number}"
    page = _environment().get_template(name).render(charts_json=json.dumps(charts).replace("</", "<\\/"), plotly=_plotly() if charts else "", **values)  # fmt: skip
    _write(path, page)
    return path


def write_audit_report(result: Audit, folder: Path) -> Path:
    """`index.html` and `audit.json` in `folder`; returns the HTML's path."""
    _write(folder / "audit.json", json.dumps(plain(result.to_dict()), indent=1))
    findings = sorted((_finding(f) for f in result.findings), key=lambda f: -f["severity"])
    return render_page(
        "audit.html", folder / "index.html", title=f"Audit of {result.subject}", audit=result, findings=findings
    )


def write_harden_report(result: Hardened, folder: Path) -> Path:
    """`index.html` and `harden.json` in `folder`; returns the HTML's path."""
    _write(folder / "harden.json", json.dumps(plain(result.to_dict()), indent=1))
    applied = [str(t["slug"]) for t in result.treatments]
    findings = sorted((_finding(f, applied) for f in result.after.findings), key=lambda f: -f["severity"])
    stack = [{**t, "method": catalog.find(t["slug"])} for t in result.treatments]
    return render_page(
        "harden.html",
        folder / "index.html",
        title=f"{result.subject.name}, hardened",
        audit=result.after,
        result=result,
        findings=findings,
        headlines=[c for c in result.comparisons if c.headline],
        details=[c for c in result.comparisons if not c.headline],
        stack=stack,
        citations=catalog.bibtex([t["method"] for t in stack]),
    )


def _forest(claim: Mapping[str, Any]) -> dict[str, float] | None:
    """Positions in percent of an effect, its interval and zero on one line."""
    values = [claim.get(k) for k in ("effect", "low", "high")]
    if any(v is None or not math.isfinite(v) for v in values):
        return None
    effect, low, high = (float(v) for v in values)  # type: ignore[arg-type]
    target = float(claim.get("at_least") or 0.0)
    least, most = min(low, 0.0, target), max(high, 0.0, target)
    span = (most - least) or 1.0

    def place(v: float) -> float:
        return round(4 + 92 * (v - least) / span, 2)

    return {
        "effect": place(effect),
        "low": place(low),
        "high": place(high),
        "zero": place(0.0),
        "target": place(target),
    }


def write_evidence_page(path: Path) -> Path:
    """An overview of all committed trials as one HTML file."""
    entries = []
    for method in catalog.methods():
        found = catalog.evidence(method)
        if found is None:
            continue
        tiers = [("embedded", found)] + ([("standard", found["standard"])] if "standard" in found else [])
        entries.append(
            {
                "method": method,
                "works": catalog.works(method),
                "tiers": [_tier(n, d, _asked(method.name, n)) for n, d in tiers],
            }
        )
    counts = {v: sum(c["verdict"] == v for e in entries for t in e["tiers"] for c in t["claims"]) for v in ("holds", "inconclusive", "contradicted")}  # fmt: skip
    return render_page(
        "evidence.html", path, title="Evidence", entries=entries, counts=counts, total=len(catalog.methods())
    )


def _asked(method: str, tier: str) -> dict[str, float]:
    """What each claim of a protocol asks of its effect; nothing where the protocol cannot be loaded here."""
    try:
        setup = load_trial(method).tiers[tier]  # type: ignore[index]
    except (SurefootError, ImportError, KeyError):
        return {}
    return {claim.sentence: claim.at_least for claim in setup.claims if claim.within is None}


def _tier(name: str, data: Mapping[str, Any], asked: Mapping[str, float]) -> dict[str, Any]:
    metrics = [
        m for m in dict.fromkeys(m for values in data["arms"].values() for m in values) if not catalog.is_curve_point(m)
    ]

    def mean(values: list[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return sum(known) / len(known) if known else None

    arms = [{"name": a, "means": [mean(v.get(m, [])) for m in metrics]} for a, v in data["arms"].items()]
    claims = [{**c, "forest": _forest({"at_least": asked.get(c["claim"]), **c})} for c in data["claims"]]
    return {"name": name, "seeds": len(data["seeds"]), "metrics": metrics, "arms": arms, "claims": claims, "environment": data.get("environment", {}), "notes": data.get("notes", [])}  # fmt: skip
