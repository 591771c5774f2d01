"""Small inputs that such tools read wrongly, and the public files that pydicom ships: what is right, what comes out.

python benchmarks/run_cases.py [FOLDER]

FOLDER holds the cases (default: `cases` below the folder that CXR_FAST_REAL_DATA names); without it only pydicom's
files are read. Exit 1 where anything is OPEN. "Right" for pixels is an independent computation, by pydicom's functions
on the parsed data set or by the sound twin of a file, within one grey level.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
from click.testing import CliRunner
from PIL import Image
from pydicom import pixels

from cxr_fast.cli.main import main as cxrfast
from cxr_fast.config import PreprocessSpec
from cxr_fast.data import paths
from cxr_fast.data.formats import dicom
from cxr_fast.data.images import decode_grey, is_one_image, pixels_of
from cxr_fast.data.manifest import read_dataset
from cxr_fast.errors import CxrFastError, ImageError
from cxr_fast.system.text import Table, to_plain

SPEC = PreprocessSpec(size=64)
OPEN, FINE = "OPEN", "yes"
PADDING = np.s_[:, 8:]  # of the cases of padding the film begins in column 8


class Outcome(NamedTuple):
    """One file: what is right, what came out, and whether the two agree."""

    name: str
    kind: str
    right: str
    came_out: str
    ok: bool


# ------------------------------------------------------------------ what a film must look like


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale values so that `low` is 0 and `high` is 255."""
    return np.rint(np.clip((values.astype(float) - low) / max(high - low, 1e-12), 0, 1) * 255).astype(np.uint8)


def expected(ds: Any, *, window: bool = True) -> np.ndarray:
    """What a viewer shows of a grey film, by pydicom's modality LUT and the window, else the range."""
    stored = ds.pixel_array
    items = ds.get("ModalityLUTSequence") or ()
    if "ModalityLUTSequence" in ds and not any(item.get("LUTDescriptor") and item.get("LUTData") for item in items):
        del ds.ModalityLUTSequence  # an empty item says nothing, and pydicom trips over it
    values = pixels.apply_modality_lut(stored, ds).astype(float)
    if window and ds.get("WindowCenter") is not None:
        center, width = (float(np.atleast_1d(ds[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
        low = center - 0.5 - (width - 1) / 2
        out = scaled(values, low, low + width - 1)
    elif ds.BitsStored <= 8:
        out = scaled(values, 0, (1 << ds.BitsStored) - 1)
    else:
        out = scaled(values, values.min(), values.max())
    return 255 - out if ds.PhotometricInterpretation == "MONOCHROME1" else out


def apart(one: np.ndarray, other: np.ndarray) -> int:
    """Return the largest difference of two pictures in grey levels, 255 for other sizes."""
    return 255 if one.shape != other.shape else int(np.abs(one.astype(int) - other).max())


def grey(path: Path) -> tuple[np.ndarray | None, str]:
    """Read a file as uint8 (H, W), or None; and how it was read, or the reason why not."""
    data = path.read_bytes()
    try:
        shown = decode_grey(data, spec=SPEC)
    except ImageError as error:
        return None, f"failed: {error.reason}: {error}"
    return shown, dicom.decode(data, "voi")[1] if dicom.looks_like_dicom(data) else ""


# ------------------------------------------------------------------ the cases, kind by kind


def same(root: Path, name: str, twin: str, film: Any = np.s_[:]) -> Outcome:
    """A film whose pixels are those of its sound twin."""
    shown, said = grey(root / name)
    other, _ = grey(root / twin)
    right = f"the pixels of {Path(twin).name}"
    if shown is None or other is None:
        return Outcome(name, "twin", right, said, False)
    off = apart(shown[film], other[film])
    return Outcome(name, "twin", right, f"{off} grey levels apart{f'; {said}' if said else ''}", off <= 1)


def viewed(root: Path, name: str, *, window: bool = True, said_so: bool = False) -> Outcome:
    """A film that shows what pydicom's functions give; `said_so`: with a note that it is read by its range."""
    path = root / name
    shown, said = grey(path)
    right = f"{'the window' if window else 'the range'} by pydicom{', said in the row' if said_so else ''}"
    if shown is None:
        return Outcome(name, "window", right, said, False)
    off = apart(shown, expected(pydicom.dcmread(path, force=True), window=window))
    told = not said_so or "read by its range" in said
    return Outcome(name, "window", right, f"{off} grey levels apart{f'; {said}' if said else ''}", off <= 1 and told)


def refused(root: Path, name: str, reason: str, words: str) -> Outcome:
    """A film that is refused with a reason in words of its own, without an address in memory."""
    shown, said = grey(root / name)
    ok = shown is None and said.startswith(f"failed: {reason}: ") and words in said and "0x" not in said
    return Outcome(name, "refused", f"failed: {reason}, naming {words!r}", said or "read", ok)


def twelve_bits(root: Path, name: str) -> Outcome:
    """A 12-bit TIFF by its full range."""
    with Image.open(root / name) as image:
        stored = np.asarray(image)
    shown, said = grey(root / name)
    off = 255 if shown is None else apart(shown, scaled(stored, 0, 4095))
    return Outcome(name, "twin", "scaled by BitsPerSample", said or f"{off} grey levels apart", off <= 1)


def listed(root: Path, name: str) -> Outcome:
    """A list whose first name is free of a byte order mark."""
    found = [Path(path).name for path in paths.read([f"@{root / name}"]).paths]
    return Outcome(name, "list", "a.png, b.png", ", ".join(found), found == ["a.png", "b.png"])


def walked(root: Path, name: str) -> Outcome:
    """A folder of which hidden files and those of Apple's archives are passed over, and counted."""
    found = paths.read([str(root / name)])
    out = ", ".join(os.path.relpath(path, root / name) for path in found.paths)
    said = "; ".join(f"{count} {why}" for why, count in found.passed_over.items())
    ok = out == "a.png" and bool(said)
    return Outcome(name, "list", "a.png; the rest counted", f"{out}; {said or 'nothing counted'}", ok)


def arguments(root: Path, name: str) -> Outcome:
    """One film of every kind that a Predictor takes, with the same pixels."""
    path = root / name
    wanted = pixels_of(path, SPEC)
    with Image.open(path) as image:
        kinds: dict[str, Any] = {
            "str": str(path),
            "Path": path,
            "bytes": path.read_bytes(),
            "BytesIO": io.BytesIO(path.read_bytes()),
            "PIL": image.copy(),
            "array": np.asarray(image.convert("L")),
        }
    with contextlib.suppress(ImportError):
        import torch

        kinds["tensor"] = torch.from_numpy(kinds["array"].copy())
    wrong = []
    for kind, value in kinds.items():
        try:
            if not is_one_image(value) or apart(pixels_of(value, SPEC), wanted):
                wrong.append(kind)
        except (ImageError, TypeError) as error:
            wrong.append(f"{kind} ({error})")
    out = f"wrong: {', '.join(wrong)}" if wrong else f"the same pixels from {', '.join(kinds)}"
    return Outcome(name, "argument", "the same pixels from each", out, not wrong)


def all_found(root: Path, name: str) -> Outcome:
    """A table whose images exist under names that differ a little."""
    table = next((root / name).glob("*.csv"))
    try:
        count = len(read_dataset(table))
    except CxrFastError as error:
        said = str(error).replace(str(root / name), "")
        return Outcome(name, "table", "every image found, or what differs", f"exit 2: {said}", "differ" in said)
    return Outcome(name, "table", "every image found, or what differs", f"{count} images", True)


def mimic(root: Path, name: str, *, clash: bool) -> Outcome:
    """MIMIC's tables with ids written in two ways, or with a study that contradicts itself."""
    right = "exit 2: contradicting rows" if clash else "the labels of both studies"
    try:
        found = read_dataset(root / name, missing="unchecked")
    except CxrFastError as error:
        return Outcome(name, "table", right, f"exit 2: {error}", clash)
    edema = found.labels[:, found.classes.index("Edema")].tolist()
    known = int((found.labels != -1).any(axis=1).sum())
    out = f"{known} of {len(found)} images with a known label; Edema {edema}"
    return Outcome(name, "table", right, out, not clash and known == 2 and edema[1] == 1)


def prepared(root: Path, name: str, right: str, code: int, any_of: Sequence[str]) -> Outcome:
    """What `cxrfast prepare` says of a table, and its exit code; one of `any_of` must stand in it."""
    result = CliRunner().invoke(cxrfast, ["prepare", str(root / name), "--labels-only"])
    lines = [line for line in result.output.splitlines() if any(word in line for word in any_of)]
    said = lines[0].strip() if lines else f"nothing of {' or '.join(any_of)}"
    return Outcome(name, "table", right, f"exit {result.exit_code}: {said}", result.exit_code == code and bool(lines))


CASES: tuple[tuple[Callable[..., Outcome], str, dict[str, Any]], ...] = (
    (same, "functional_groups_ignored/enhanced.dcm", {"twin": "functional_groups_ignored/classic.dcm"}),
    (
        same,
        "codestream_of_another_syntax/j2k_in_jpeg_syntax.dcm",
        {"twin": "codestream_of_another_syntax/j2k_in_jpeg_syntax_plain.dcm"},
    ),
    (same, "high_bit_ignored/highbit15.dcm", {"twin": "high_bit_ignored/plain.dcm"}),
    (same, "deflated_by_byte_search/mentions_deflated.dcm", {"twin": "high_bit_ignored/plain.dcm"}),
    (same, "deflated_by_byte_search/deflated_wrong_group_length.dcm", {"twin": "high_bit_ignored/plain.dcm"}),
    (same, "jpeg_bytes_after_end/after_end.dcm", {"twin": "jpeg_bytes_after_end/same.jpg"}),
    (same, "padding_not_left_out/us_for_signed.dcm", {"twin": "padding_not_left_out/ok.dcm", "film": PADDING}),
    (same, "padding_not_left_out/range_limit_us.dcm", {"twin": "padding_not_left_out/ok.dcm", "film": PADDING}),
    (same, "padding_not_left_out/above_bits_stored.dcm", {"twin": "padding_not_left_out/ok.dcm", "film": PADDING}),
    (viewed, "window_shows_nothing/off.dcm", {"window": False, "said_so": True}),
    (viewed, "window_shows_nothing/short_lut.dcm", {"window": False, "said_so": True}),
    (viewed, "window_shows_nothing/stored_units.dcm", {"window": False, "said_so": True}),
    (viewed, "window_not_a_number/comma.dcm", {"window": False, "said_so": True}),
    (viewed, "window_not_a_number/words.dcm", {"window": False, "said_so": True}),
    (viewed, "window_not_a_number/empty_first.dcm", {"window": False, "said_so": True}),
    (viewed, "empty_lut_item/modality_empty.dcm", {}),
    (viewed, "empty_lut_item/modality_blank.dcm", {}),
    (viewed, "empty_lut_item/voi_blank_with_window.dcm", {}),
    (refused, "header_messages/no_rows.dcm", {"reason": "corrupt", "words": "Rows"}),
    (refused, "header_messages/two_bits_stored.dcm", {"reason": "corrupt", "words": "BitsStored"}),
    (refused, "header_messages/empty_pixels.dcm", {"reason": "no_pixels", "words": "PixelData"}),
    (refused, "header_messages/float_pixels.dcm", {"reason": "unsupported", "words": "floating-point"}),
    (refused, "reason_holds_address/raw_as_jpeg.dcm", {"reason": "corrupt", "words": "does not begin as JPEG"}),
    (refused, "tiff_12_bit_black/jpeg12.jpg", {"reason": "unsupported", "words": "12-bit"}),
    (refused, "tiff_12_bit_black/t64float.tif", {"reason": "unsupported", "words": "pixel mode"}),
    (twelve_bits, "tiff_12_bit_black/t12.tif", {}),
    (listed, "list_with_bom/bom.txt", {}),
    (walked, "apple_double_rows/films", {}),
    (arguments, "predictor_arguments/a.png", {}),
    (mimic, "mimic_labels_lost/ok", {"clash": False}),
    (mimic, "mimic_labels_lost/float_ids", {"clash": False}),
    (mimic, "mimic_labels_lost/twice", {"clash": True}),
    (all_found, "names_that_differ_a_little/backslash", {}),
    (all_found, "names_that_differ_a_little/nfc", {}),
    (all_found, "names_that_differ_a_little/upper", {}),
    (all_found, "names_that_differ_a_little/chexpert_png", {}),
    (
        prepared,
        "groups_spelled_twice/m.csv",
        {"right": "a note with the number of such pairs", "code": 0, "any_of": ("spelled", "spelling", "written")},
    ),
    (
        prepared,
        "semicolon_in_class/m.csv",
        {"right": "exit 2, or quoted, where the table is read", "code": 2, "any_of": ("';'", '";"', "semicolon")},
    ),
)


def run_cases(root: Path) -> Iterator[Outcome]:
    """Read every case below `root`; one that raises what it should not is OPEN with that error."""
    for judge, name, more in CASES:
        try:
            yield judge(root, name, **more)
        except Exception as error:  # a traceback is what this looks for
            yield Outcome(name, "error", "no traceback", f"{type(error).__name__}: {error}", False)


# ------------------------------------------------------------------ the files that pydicom ships


def public_file(path: Path) -> Outcome:
    """Read one of pydicom's files: as pydicom's functions show it, refused with a reason, or not comparable."""
    name = path.name
    shown, said = grey(path)
    if shown is None:
        return Outcome(name, "refused", "one reason", said, "Error(" not in said and "0x" not in said)
    try:
        ds = pydicom.dcmread(path, force=True)
        if ds.SamplesPerPixel != 1:
            return Outcome(name, "colour", "not compared", f"{shown.shape[1]} x {shown.shape[0]}; {said}", True)
        if "PixelPaddingValue" in ds or "VOILUTSequence" in ds:
            return Outcome(name, "padding or LUT", "not compared", f"{shown.shape[1]} x {shown.shape[0]}; {said}", True)
        off = apart(shown, expected(ds, window="read by its range" not in said))
    except Exception as error:  # pydicom cannot read it
        return Outcome(name, "read", "not compared", f"pydicom fails: {type(error).__name__}; {said}", True)
    out = f"{off} grey levels apart{f'; {said}' if said else ''}"
    return Outcome(name, "grey", "as pydicom shows it", out, off <= 1)


def public_files() -> Iterator[Outcome]:
    """Read every DICOM file below pydicom's own folder of test files."""
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    for path in sorted(folder.rglob("*.dcm")):
        try:
            yield public_file(path)
        except Exception as error:  # a traceback is what this looks for
            yield Outcome(path.name, "error", "no traceback", f"{type(error).__name__}: {error}", False)


# ------------------------------------------------------------------ tables


def as_table(found: list[Outcome], title: str, root: Path | None = None) -> Table:
    """Make the table of the outcomes; paths of this machine are left out of what came out."""
    here = f"{root}{os.sep}" if root else ""
    rows = [
        [
            one.name,
            one.kind,
            one.right,
            " ".join((one.came_out.replace(here, "") if here else one.came_out).split())[:120],
            FINE if one.ok else OPEN,
        ]
        for one in found
    ]
    open_ones = sum(not one.ok for one in found)
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(one.kind for one in found).most_common())
    notes = [f"{len(found)} inputs ({kinds}), {open_ones} open"]
    return Table(columns=["case", "kind", "right", "what came out", "ok"], rows=rows, title=title, notes=notes)


def main() -> int:
    """Print both tables; 1 where a case is open."""
    warnings.filterwarnings("ignore", module="pydicom")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    data = os.environ.get("CXR_FAST_REAL_DATA")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(data) / "cases" if data else None)
    root = parser.parse_args().folder
    tables, public = [], list(public_files())
    found = list(public)
    if root is not None and not root.is_dir():
        print(f"error: {root} is no folder of cases.", file=sys.stderr)
        return 2
    if root is not None:
        cases = list(run_cases(root))
        tables.append(as_table(cases, "small inputs that are easily read wrongly", root))
        found += cases
    tables.append(as_table(public, f"files that pydicom {pydicom.__version__} ships"))
    for table in tables:
        print(f"{table.title}\n{to_plain(table)}\n")
    return int(not all(one.ok for one in found))


if __name__ == "__main__":
    sys.exit(main())
