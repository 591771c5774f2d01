"""Hundreds of broken images in one `cxrfast predict`: a row each, in order; the sound ones as if they were alone."""

from __future__ import annotations

import csv
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cxr_fast.data.images import REASONS
from cxr_fast.inference.outputs import shown
from tests.data.test_images import chunk, jpeg_of_size, mutated, noise, png, save, smooth
from tests.data.test_images import samples as pictures
from tests.helpers.fuzz_worker import LEAST

pytest.importorskip("pydicom")
dicoms = pytest.importorskip("test_dicom")

SECONDS = 60
# Damage in place shows where the format holds a checksum or, to zeros for a rest, an end marker.
PROVEN = ("png", "png16", "palette", "rgba")
ENDED = (*PROVEN, "jpeg", "progressive", "cmyk", "dicomjpeg", "dicomj2k", "lzw", "deflate")
Broken = dict[str, tuple[bytes, str]]  # what a file is called: its content, and the sound file whose row it may have


def cxr(*arguments: object, given: bytes = b"") -> Any:
    """The command as a process of its own."""
    command = [sys.executable, "-m", "cxr_fast", *map(str, arguments), "--device", "cpu", "--threads", "1"]
    return subprocess.run(command, input=given, capture_output=True, check=False, timeout=SECONDS)


def table(path: Path) -> list[list[str]]:
    """The rows below the head; a name may hold any end of a line."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def sound() -> dict[str, bytes]:
    """A film in every format that is read, and turned by EXIF in each of its ways."""
    files = {**pictures(), **dicoms.samples()}
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        files[f"turned{turn}"] = save(Image.fromarray(smooth(30, 20)), "JPEG", exif=exif)
    return files


def damaged(files: dict[str, bytes], rng: np.random.Generator) -> Broken:
    found: Broken = {}
    for name, data in files.items():
        for k in range(9):
            at = int(rng.integers(len(data))) if k % 3 else len(data) - 1 - k
            found[f"{name} cut {k}"] = data[:at], name
            found[f"{name} filled {k}"] = (
                data[:at].ljust(len(data), bytes([(0, 255, 85)[k % 3]])),
                name if name in ENDED else "?",
            )
        for k in range(12):
            broken = bytearray(data)
            for _ in range(1 + k % 3):
                broken[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
            found[f"{name} flipped {k}"] = bytes(broken), name if name in PROVEN else "?"
        for k in range(4):
            found[f"{name} mutated {k}"] = mutated(data, rng), "?"
    return found


def special(files: dict[str, bytes]) -> Iterator[tuple[str, bytes, str]]:
    """What it is called, its content, and the reason it fails for; none where its row is its own."""
    deep = noise(24, 20, top=4096)
    frames = [Image.fromarray(noise(20, 20, seed=k)) for k in range(3)]
    yield from [
        ("empty", b"", "empty"),
        ("one byte", b"\x89", "not_an_image"),
        ("text", b"not a film" * 99, "not_an_image"),
    ]
    for fmt, code in (
        ("GIF", "not_an_image"),
        ("WEBP", "not_an_image"),
        ("PNG", "multi_frame"),
        ("TIFF", "multi_frame"),
    ):
        yield f"animated {fmt}", save(frames[0], fmt, save_all=True, append_images=frames[1:]), code
    yield "still gif", save(frames[0], "GIF"), "not_an_image"
    bomb = zlib.compress(bytes(1 << 20), 9)
    yield "png bomb", png(60_000, 60_000, b""), "too_large"
    yield "png wide", png(4_000_000, 20, b""), "too_large"
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20, 20, 8, 0, 0, 0, 0))
    yield "png too much", b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", bomb) + chunk(b"IEND", b""), ""
    text = b"k\0\0" + zlib.compress(bytes(80 << 20), 9)
    yield "png text bomb", files["png"][:33] + chunk(b"zTXt", text) + files["png"][33:], "too_large"
    yield "jpeg bomb", jpeg_of_size(files["jpeg"], 65_000, 65_000), "too_large"
    yield "bmp bomb", files["bmp"][:18] + struct.pack("<ii", 40_000, 40_000) + files["bmp"][26:], "too_large"
    yield "bmp negative", files["bmp"][:18] + struct.pack("<ii", -5, 20) + files["bmp"][26:], ""
    yield "dicom bomb", dicoms.dicom_file(deep, bits=12, Rows=60_000, Columns=60_000), "too_large"
    scaled = dicoms.dicom_file(deep, bits=12, RescaleSlope="1.25", RescaleIntercept="0")
    yield "dicom nan", scaled.replace(b"1.25", b"nan "), "corrupt"
    yield "dicom inf", scaled.replace(b"1.25", b"-inf"), "corrupt"
    yield "dicom no number", scaled.replace(b"1.25", b"1,25"), "corrupt"
    yield "dicom flat", dicoms.dicom_file(deep, bits=12, RescaleSlope=0, RescaleIntercept=0), "corrupt"
    whole = dicoms.dicom_file(deep, bits=12)
    yield "dicom no pixels", whole[: whole.index(b"\xe0\x7f\x10\x00")], "no_pixels"
    yield (
        "dicom frames",
        dicoms.dicom_file(np.concatenate([deep, deep]), bits=12, Rows=24, NumberOfFrames=2),
        "multi_frame",
    )
    for value in (np.nan, np.inf, 2):
        yield f"tiff {value}", save(np.full((9, 9), value, np.float32), "TIFF"), "bad_range"


NAMES = [
    *("new\nline.png", "return\r.png", "tab\t.png", 'comma,quote".png', "-dash.png", "=cmd.png", " spaces .png"),
    *(
        "\u00e4\u4e2d\U0001f9b4.png",
        "a\u0301.png",
        "\u202egnp.png",
        "\x1b[31m.png",
        "no suffix",
        "x.dcm",
        "x.csv",
        "x.gif",
    ),
    *(os.fsdecode(b"\xff\xfe.png"), os.fsdecode(b"latin \xe9.png"), "y" * 250, "*.png", "[a].png", "@list", "~"),
]


def test_every_image_has_its_row(toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sound, broken and strange, shuffled together; then those with probabilities in a run of their own, to the bit."""
    rng, files = np.random.default_rng(29), sound()
    broken, odd = damaged(files, rng), list(special(files))
    content: dict[str, bytes] = {f"{k} {name}.png": data for k in range(3) for name, data in files.items()}
    own = {path: path.split(" ", 1)[1].removesuffix(".png") for path in content}  # a sound file, by any name
    content |= dict.fromkeys(NAMES, files["jpeg"])
    own |= dict.fromkeys(NAMES, "jpeg")
    content |= {f"{name}.jpg": data for name, (data, _) in broken.items()}
    content |= {f"{name}.bmp": data for name, data, _ in odd}
    for path, data in content.items():
        (tmp_path / path).write_bytes(data)
    failing = {"folder.png": "unreadable", "ring.png": "unreadable", "gone.png": "missing", "to gone.png": "missing"}
    failing |= {"pipe.png": "unreadable", "z" * 300: "unreadable", "1 png.png/inside": "missing"}
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "ring.png").symlink_to("ring.png")
    (tmp_path / "to gone.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    failing |= {f"{name}.bmp": code for name, _, code in odd if code}
    paths = list(dict.fromkeys([*content, *failing]))
    rng.shuffle(paths)
    assert len(broken) + len(odd) + len(NAMES) >= LEAST["images"]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    done = cxr("predict", toy_model, "-", "--out", "p.csv", given=b"\0".join(map(os.fsencode, paths)))
    said, lines = done.stderr.decode(), done.stdout.decode().splitlines()
    rows = {row[0]: row for row in table(tmp_path / "p.csv")}
    assert done.returncode == 1, said
    assert "Traceback" not in said
    assert list(rows) == [shown(path) for path in paths]
    failed = [row for row in rows.values() if row[1] == "failed"]
    assert len(lines) == 1
    assert f"{len(rows) - len(failed)} of {len(rows)} images predicted" in lines[0].replace(",", "")
    assert said.splitlines()[-1] == f"{len(failed):,} image(s) failed; their rows say why"
    assert {row[1] for row in rows.values()} == {"ok", "failed"}
    for row in failed:
        assert row[2].split(": ")[0] in REASONS, row
        assert not any(row[3:]), row
    for path, code in failing.items():
        assert rows[path][2].startswith(f"{code}: "), rows[path][:3]

    alone = [path for path in paths if rows[shown(path)][1] == "ok"]
    assert set(own) <= set(alone)
    again = cxr(
        "predict", toy_model, "-", "--out", "q.csv", "--batch-size", 5, given=b"\0".join(map(os.fsencode, alone))
    )
    assert again.returncode == 0, again.stderr.decode()
    assert table(tmp_path / "q.csv") == [rows[shown(path)] for path in alone]

    of = {name: rows[f"0 {name}.png"][3:] for name in files}
    assert len(set(map(tuple, of.values()))) > len(of) // 2
    for path, name in own.items():
        assert rows[shown(path)][3:] == of[name], path
    for name, (_, may) in broken.items():
        row = rows[f"{name}.jpg"]
        assert may == "?" or row[1] == "failed" or row[3:] == of[may], row[:3]
