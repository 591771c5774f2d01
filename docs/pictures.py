"""Draw docs/images/report_and_heat_map.png: the head of a report and a heat map, from phantoms and a random backbone.

    python docs/pictures.py

Runs the real commands (`phantom`, `cache`, `sweep`, `explain`) in a temporary folder, photographs the report with a
headless Chromium, and joins both pictures. Needs the training extra and Chromium; takes a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

OUT = Path(__file__).parent / "images" / "report_and_heat_map.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTH, HEIGHT = 1200, 640  # of the photograph, in pixels
LEFT, MAP_WIDTH = 104, 800  # where the heat map stands below it
LIMIT = 300_000  # bytes; the README loads this picture
# One thread: two that wait for each other are far slower on a busy machine.
STEPS = (
    "phantom data --studies {studies} --size 256",
    "cache data --weights random:0:test_vit --threads 1 --out phantom.h5",
    "sweep phantom.h5 --epochs {epochs} --lr 1e-3 --weight-decay 1e-2 --batch-size 32 --dropout 0.3"
    " --precision float32 --device cpu --threads 1 --out phantom",
)


def cxrfast(line: str, folder: Path) -> None:
    """Run one `cxrfast` command in `folder`; CalledProcessError where it fails."""
    subprocess.run([sys.executable, "-m", "cxr_fast", *line.split()], cwd=folder, check=True)


def photograph(page: Path, out: Path) -> None:
    """Write the first WIDTH x HEIGHT pixels of a page as PNG; SystemExit where no Chromium is installed."""
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        raise SystemExit("install Chromium: it photographs the report")
    flags = ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars", f"window-size={WIDTH},{HEIGHT}")
    command = [program, *(f"--{flag}" for flag in flags), f"--screenshot={out}", page.as_uri()]
    subprocess.run(command, check=True, timeout=120, capture_output=True)


def joined(top: Path, below: Path) -> Image.Image:
    """One picture of two, the second scaled to MAP_WIDTH and LEFT pixels from the margin, in 256 colours."""
    first, second = (Image.open(path).convert("RGB") for path in (top, below))
    second = second.resize((MAP_WIDTH, round(second.height * MAP_WIDTH / second.width)), Image.Resampling.LANCZOS)
    both = Image.new("RGB", (WIDTH, first.height + second.height), "white")
    both.paste(first, (0, 0))
    both.paste(second, (LEFT, first.height))
    return both.quantize(256, dither=Image.Dither.NONE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=100)
    parser.add_argument("--epochs", default="2,4,6")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in STEPS:
            cxrfast(step.format(studies=args.studies, epochs=args.epochs), folder)
        film = sorted((folder / "data" / "images").iterdir())[0]
        cxrfast(f"explain phantom {film} --top 1 --out heat_maps.png", folder)
        photograph(folder / "phantom" / "report.html", folder / "report.png")
        joined(folder / "report.png", folder / "heat_maps.png").save(args.out, optimize=True)
    size = args.out.stat().st_size
    if size > LIMIT:
        raise SystemExit(f"{args.out} has {size:,} bytes, more than {LIMIT:,}")
    print(f"wrote {args.out}, {size:,} bytes")


if __name__ == "__main__":
    main()
