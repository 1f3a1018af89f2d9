"""Make the pictures of the reconstruction guide: the fox of instant-ngp from nine photos.

    SUREFOOT_DATA=... python docs/fox.py [cuda]

Photos are taken as they are, lens distortion included, without intrinsics or poses; the command that a person types does the rest. Writes
`images/reconstruct_fox.gif` (the walk), `images/reconstruct_fox.png` (eight views along it) and `images/reconstruct_fox.json` (what the run says of itself). With `cuda` the same nine photos
in full size by the paper's schedule on a GPU: `images/reconstruct_fox_cuda.png` and `.json`, no GIF.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES = Path(__file__).parent / "images"
COUNT, COLUMNS = 9, 8
COMMANDS = {
    "cpu": ("--mode", "forward", "--size", "160", "--steps", "2500", "--splats", "14000", "--repair", "none"),
    "cuda": ("--mode", "forward", "--size", "480", "--device", "cuda", "--repair", "none"),
}


def main() -> None:
    data = os.environ.get("SUREFOOT_DATA")
    if data is None:
        raise SystemExit("Set SUREFOOT_DATA to the folder that holds multiview/fox_270x480.npz.")
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    command, stem = COMMANDS[device], "reconstruct_fox" + ("" if device == "cpu" else f"_{device}")
    photos = np.load(Path(data) / "multiview" / "fox_270x480.npz")["images"]
    chosen = np.linspace(0, len(photos) - 1, COUNT).round().astype(int)
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "photos", Path(scratch) / "scene"
        folder.mkdir()
        for k in chosen:
            Image.fromarray(photos[k]).save(folder / f"fox_{k:02d}.png")
        subprocess.run([sys.executable, "-m", "surefoot.cli", "reconstruct", str(folder), "--out", str(out), *command], check=True)  # fmt: skip
        IMAGES.mkdir(exist_ok=True)
        if device == "cpu":
            (IMAGES / f"{stem}.gif").write_bytes((out / "path.gif").read_bytes())
        frames = sorted((out / "path").glob("*.png"))
        picked = [np.asarray(Image.open(frames[i])) for i in np.linspace(0, len(frames) - 1, COLUMNS).round().astype(int)]  # fmt: skip
        Image.fromarray(np.concatenate(picked, 1)).save(IMAGES / f"{stem}.png")
        report = json.loads((out / "reconstruct.json").read_text())
    report = {key: value for key, value in report.items() if key not in ("history", "switches")}
    report["command"] = " ".join(["surefoot reconstruct photos", *command])
    (IMAGES / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
