"""Reports are self-contained, true to the findings, and really drawn by a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from surefoot import catalog
from surefoot.audit import Audit, Skipped
from surefoot.core.finding import Chart, Cost, Finding, Thumbnails
from surefoot.core.subject import Subject
from surefoot.harden import Hardened, compare
from surefoot.models import mlp
from surefoot.report import page, write_audit_report, write_evidence_page, write_harden_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
FACTS = {"modality": "image", "parameters": 1234, "examples": {"train": 1, "valid": 1, "test": 40}, "budget": "quick"}


def finding(shift: float = 0.0, **changes) -> Finding:
    samples = (np.arange(40) % 10 < 6 + 20 * shift).astype(float)
    value = float(samples.mean())
    base = {
        "instrument": "accuracy",
        "name": "accuracy <b>",
        "value": value,
        "low": value - 0.1,
        "high": value + 0.1,
        "unit": "share",
        "better": "higher",
        "n": 40,
        "sentence": "Six of ten are right.",
        "samples": samples,
        "fix": ("elr",),
        "cost": Cost(1.0, 100.0, 40),
        "pictures": (
            Chart({"data": [{"type": "bar", "x": [1, 2, 3], "y": [0.2, float("nan"), np.float32(0.9)]}]}, "Bars."),
            Thumbnails(np.full((3, 8, 8), 200, np.uint8), ("one", "two", "three"), "Small ones."),
        ),
    }
    return Finding(**(base | changes))


def audit_of(*findings: Finding) -> Audit:
    return Audit(
        "net", "data", findings, (Skipped("bits", "Bits", "It needs labels."),), dict(FACTS), {"surefoot": "0"}
    )


@pytest.mark.parametrize(
    ("value", "shown", "difference"),
    [(1000.0, "1,000", "+1,000"), (123456.0, "123,456", "+123,456"), (999.4, "999", "+999"), (0.01234, "0.0123", "+0.0123"), (-0.0, "0", "+0"), (-2500.0, "-2,500", "-2,500")],
)  # fmt: skip
def test_numbers_as_a_person_reads_them(value, shown, difference):
    assert page.show(value) == shown
    assert page.show_difference(value) == difference


def test_worst_first_and_escaped(tmp_path):
    good = finding(instrument="good", name="good one", value=0.99, low=0.9, high=1.0, samples=None)
    path = write_audit_report(audit_of(good, finding()), tmp_path)
    html = path.read_text()
    assert html.index("accuracy &lt;b&gt;") < html.index("good one")
    assert "It needs labels." in html
    assert "surefoot harden … --with elr" in html
    assert not re.search(r'(src|href)="(?!data:|#)', html.split("<header>")[1])
    saved = json.loads((tmp_path / "audit.json").read_text())
    assert saved["findings"][1]["value"] == finding().value


def test_severity():
    assert page.severity(finding(value=0.2)) == pytest.approx(0.8)
    assert page.severity(finding(value=0.2, better="lower")) == pytest.approx(0.2)
    assert page.severity(finding(better="neither")) == 0.0


def hardened() -> Hardened:
    before, after = audit_of(finding()), audit_of(finding(0.1))
    subject = Subject(mlp((4,), 2), "net", "vector", (4,), 2)
    stack = ({"slug": "elr", "settings": {"lam": 3.0}},)
    return Hardened(subject, before, after, compare(before, after), stack, {"epochs": 3}, Cost(2.0, 50.0), None)


def test_comparison_is_paired():
    (row,) = hardened().comparisons
    assert row.difference == pytest.approx(0.2)
    assert row.low is not None and row.high is not None
    assert 0 < row.low < 0.2 < row.high
    assert row.outcome == "improved"


def test_harden_report(tmp_path):
    html = write_harden_report(hardened(), tmp_path).read_text()
    assert "+20.0 points" in html
    assert "liu2020elr" in html
    assert "--with elr" not in html  # already applied
    assert json.loads((tmp_path / "harden.json").read_text())["comparisons"][0]["outcome"] == "improved"


def test_evidence_page(tmp_path):
    html = write_evidence_page(tmp_path / "e.html").read_text()
    on_trial = [m for m in catalog.methods() if catalog.evidence(m) is not None]
    assert all(f'id="{m.slug}"' in html for m in on_trial)


def browse(path, tmp_path, width, *flags):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
    command += [
        f"--user-data-dir={tmp_path}/profile{width}",
        f"--window-size={width},1800",
        "--virtual-time-budget=10000",
    ]
    return subprocess.run([*command, *flags, path.as_uri()], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [500, 1200])
def test_the_plots_are_drawn(tmp_path, width):
    path = write_harden_report(hardened(), tmp_path / "r")
    dom = browse(path, tmp_path, width, "--dump-dom").stdout
    assert dom.count('class="main-svg"') >= 1
    assert dom.count('class="point"') == 3
    shot = tmp_path / "shot.png"
    browse(path, tmp_path, width, f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    blue = (np.abs(pixels - np.array([0x25, 0x63, 0xA6])).max(-1) < 12).mean()
    assert pixels.shape[1] == width
    assert blue > 0.01  # the bars take up a visible part of the page
