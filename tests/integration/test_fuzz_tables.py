"""2,000 mutated tables of each known layout: an error of one or two lines, or labels; never all of them lost unsaid."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from cxr_fast.data import paths
from cxr_fast.data.labels import CHEXPERT_CLASSES
from cxr_fast.data.manifest import Manifest, read_dataset
from cxr_fast.data.tables.columns import TableSpec
from cxr_fast.data.tables.source import read_any
from cxr_fast.errors import InputError

TABLES = 2000
T = TypeVar("T")
Rows = list[list[str]]
Files = dict[str, Rows]  # a layout's tables by name; the first is what is read


def chexpert_rows(head: list[str], keys: Rows) -> Rows:
    marks = ["1.0", "", "0.0", "-1.0", ""]
    return [
        [*head, *CHEXPERT_CLASSES],
        *([*key, *(marks[(row + c) % 5] for c in range(14))] for row, key in enumerate(keys)),
    ]


MANIFEST = [
    ["image", "group", "view", "study", "meta:sex", "Edema", "Mass"],
    *(
        [f"a/{row}.png", f"p{row // 2}", "PA", f"s{row}", "F", str(row % 2), ("1", "0", "")[row % 3]]
        for row in range(6)
    ),
]
INDIANA: Files = {
    "indiana_reports.csv": [
        ["uid", "MeSH", "findings"],
        *([str(row), ("normal", "Cardiomegaly/mild", "Nodule;Mass")[row % 3], "None, a word"] for row in range(6)),
    ],
    "indiana_projections.csv": [
        ["uid", "filename", "projection"],
        *([str(row), f"{row}_{view}.png", ("Frontal", "Lateral")[view]] for row in range(6) for view in range(2)),
    ],
}
NIH = [
    ["Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender", "View Position"],
    *(
        [
            f"{row // 2}_{row % 2}.png",
            ("No Finding", "Mass|Edema", "Hernia")[row % 3],
            "0",
            str(row // 2),
            "58",
            "F",
            "PA",
        ]
        for row in range(6)
    ),
]
CHEXPERT = chexpert_rows(
    ["Path", "Sex", "Age", "Frontal/Lateral"],
    [[f"train/patient{row}/study1/view1_frontal.jpg", "Female", "68", "Frontal"] for row in range(6)],
)
MIMIC: Files = {
    "mimic-cxr-2.0.0-chexpert.csv": chexpert_rows(
        ["subject_id", "study_id"], [[f"1000000{row}", f"5000000{row}"] for row in range(6)]
    ),
    "mimic-cxr-2.0.0-metadata.csv": [
        ["dicom_id", "subject_id", "study_id", "ViewPosition"],
        *([f"aa{row}", f"1000000{row}", f"5000000{row}", "PA"] for row in range(6)),
    ],
}
HOSPITAL = [
    ["File", "Patient ID", "Inpatient", "Findings", "Edema", "Mass"],
    *(
        [f"{row}.dcm", str(row), "1", ("Edema|Mass", "Mass", "none")[row % 3], str(row % 2), ("yes", "no")[row % 2]]
        for row in range(6)
    ),
]


def unchecked(source: Path) -> Manifest:
    return read_dataset(source, missing="unchecked")


def hospital(**named: object) -> Callable[[Path], Manifest]:
    def read(source: Path) -> Manifest:
        found = read_any(source, TableSpec(**named), missing="unchecked")  # type: ignore[arg-type]
        return read_dataset(source, missing="unchecked") if found is None else found

    return read


Read = Callable[[Path], Manifest]
LAYOUTS: dict[str, tuple[Files, Read]] = {
    "manifest": ({"manifest.csv": MANIFEST}, unchecked),
    "indiana": (INDIANA, unchecked),
    "nih": ({"Data_Entry_2017.csv": NIH}, unchecked),
    "chexpert": ({"train.csv": CHEXPERT}, unchecked),
    "mimic": (MIMIC, unchecked),
    "columns of a hospital": ({"h.csv": HOSPITAL}, hospital(classes=("Edema", "Mass"))),
    "listed by a hospital": ({"h.csv": HOSPITAL}, hospital(labels="Findings", classes=("Edema", "Mass"))),
}


# ------------------------------------------------------------------------------------------------- mutations


def to_text(rows: Rows, mark: str = ",") -> str:
    quoted = (
        mark.join('"' + cell.replace('"', '""') + '"' if any(c in cell for c in ',;\t"\n') else cell for cell in row)
        for row in rows
    )
    return "\n".join(quoted) + "\n"


WORDS = [
    *("", "nan", "NA", "-1", "-1.0", "1", "1.0", "0", "0.0", "01", " 1 ", "yes", "7", "0.7", "-", "None", "No Finding"),
    *(
        "x" * 300,
        "\0",
        "\u00e9",
        "e\u0301",
        "1;0",
        "a,b",
        '"',
        "\\",
        "a\\b.png",
        "/",
        "..",
        "a/b/c",
        "\n",
        "\ufeff",
        "='1'",
    ),
    *("s50000001", "50000001.0", "5e7", "Meier, Anna", "Mass|", "|", "normal", "Nodule;;", "1,0", "inf", "9" * 400),
]


def same(rows: Rows, rng: random.Random, name: str) -> Rows:
    """Another order of rows or columns, identifiers as floats, names of our own columns in capitals."""
    head, body = rows[0], [list(row) for row in rows[1:]]
    kind = rng.randrange(4)
    if kind == 0:
        rng.shuffle(body)
    if kind == 1:
        order = list(range(len(head)))
        rng.shuffle(order)
        return [[row[c] for c in order] for row in rows]
    if kind == 2:
        for c in (c for c, title in enumerate(head) if title in ("uid", "study_id", "subject_id")):
            body = [[*row[:c], row[c] + rng.choice(("", ".0")), *row[c + 1 :]] for row in body]
    if kind == 3 and name == "manifest":
        head = [title.upper() if title in ("image", "group", "view") else title for title in head]
    return [head, *body]


def broken(rows: Rows, rng: random.Random) -> Rows:
    """One change that may lose or contradict something."""
    rows = [list(row) for row in rows]
    rows[0] = rows[0] or [""]
    at, column = rng.randrange(len(rows)), rng.randrange(len(rows[0]))
    kind = rng.randrange(10)
    if kind == 0:
        rows = [row[:column] + row[column + 1 :] for row in rows]
    elif kind == 1:
        rows = [[*row, row[column]] if column < len(row) else row for row in rows]
    elif kind == 2:
        rows[0][column] = rng.choice((rows[0][column].lower(), rows[0][column].upper(), f" {rows[0][column]}", *WORDS))
    elif kind == 3:
        word = rng.choice(WORDS)
        rows[1:] = [[*row[:column], word, *row[column + 1 :]] for row in rows[1:]]
    elif kind == 4:
        del rows[at]
    elif kind == 5:
        rows.append(list(rows[at]))
    elif kind == 6:
        rows[at] = rows[at][:column] if rng.random() < 0.5 else [*rows[at], rng.choice(WORDS)]
    else:
        for _ in range(rng.randrange(1, 4)):
            row = rows[rng.randrange(len(rows))]
            if row:
                row[rng.randrange(len(row))] = rng.choice(WORDS)
    return rows or [[]]


def damaged(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    at = rng.randrange(len(out))
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(out[:at])
    if kind == 1:
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        out[at:at] = rng.choice((b"\0", b'"', b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b"\xe9", b",,,", b";"))
    elif kind == 3:
        return data.decode().encode("utf-16" if rng.random() < 0.5 else "latin-1", "replace")
    elif kind == 4:
        return data.replace(b"\n", rng.choice((b"\r", b"\n\n", b"\0")))
    else:
        return data.replace(b",", rng.choice((b"|", b" ", b";", b",,")))
    return bytes(out)


def mutated(files: Files, rng: random.Random, layout: str) -> tuple[dict[str, bytes], bool]:
    """The tables with one of them changed, and whether the labels must be the same."""
    name = rng.choice(list(files))
    out = {other: to_text(rows).encode() for other, rows in files.items()}
    if rng.random() < 0.25:
        mark = rng.choice(",;\t")
        text = to_text(same(files[name], rng, layout), mark).replace("\n", rng.choice(("\n", "\r\n")))
        out[name] = text.encode(rng.choice(("utf-8", "utf-8-sig", "utf-16")))
        return out, True
    rows = files[name]
    for _ in range(rng.randrange(1, 3)):
        rows = broken(rows, rng)
    out[name] = to_text(rows).encode()
    if out[name] and rng.random() < 0.3:
        out[name] = damaged(out[name], rng)
    return out, False


# -------------------------------------------------------------------------------------------------- the tests


def by_image(manifest: Manifest) -> dict[str, dict[str, int]]:
    rows = (dict(zip(manifest.classes, row, strict=True)) for row in manifest.labels.tolist())
    return dict(zip(manifest.images, rows, strict=True))


def write_anew(path: Path, data: bytes) -> None:
    """A new file: some file systems write a file that is cut to nothing to the disk at once, which takes long."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def outcome(read: Callable[[Path], T], table: Path) -> T | str:
    """What is read, or the error's text; any other error fails the test."""
    try:
        return read(table)
    except InputError as error:
        return str(error)


def check(manifest: Manifest, name: str) -> None:
    """No label is lost in silence: where none is known or none positive, a note says so."""
    assert manifest.labels.shape == (len(manifest.images), len(manifest.classes))
    assert set(np.unique(manifest.labels)) <= {1, 0, -1, -2}
    assert all(manifest.groups)
    if not (manifest.labels == 1).any():
        assert any(word in note for note in manifest.notes for word in ("No label is known", "No image has")), name
    if manifest.info["kind"] == "indiana" and (manifest.labels.sum(axis=0) > 0).sum() < 2:
        normal = manifest.labels[:, manifest.classes.index("Normal")]
        headed = manifest.info["unindexed_studies"] + manifest.info["only_dropped_studies"] == 0
        assert headed or not normal.all() or manifest.notes or len(manifest) < 6, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mutated_table_is_read_or_refused(layout: str, tmp_path: Path) -> None:
    files, read = LAYOUTS[layout]
    first, written = tmp_path / next(iter(files)), dict[str, bytes]()
    for name, rows in files.items():
        (tmp_path / name).write_text(to_text(rows), encoding="utf-8")
    base, rng = by_image(read(first)), random.Random(layout)
    outcomes = {"same": 0, "read": 0, "refused": 0}
    for number in range(TABLES):
        tables, lossless = mutated(files, rng, layout)
        for name, data in tables.items():
            if written.get(name) != data:
                write_anew(tmp_path / name, data)
        written = tables
        found = outcome(read, first)
        if isinstance(found, str):
            assert not lossless, (number, tables, found)
            assert found.count("\n") <= 1, (number, found)
            assert len(found) < 1000, (number, found)
            outcomes["refused"] += 1
            continue
        check(found, f"{number}: {tables}")
        if lossless:
            assert by_image(found) == base, (number, tables)
        outcomes["same" if lossless else "read"] += 1
        if layout == "manifest" and not lossless:
            predicted = outcome(lambda table: paths.read([str(table)]), first)
            assert "\n" not in predicted if isinstance(predicted, str) else predicted.paths
    assert min(outcomes.values()) > TABLES // 20, outcomes


REPORT = """<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="CXR{0}"/><MeSH><major>{1}</major></MeSH>
<parentImage id="CXR{0}_IM-0001-3001"/><parentImage id="CXR{0}_IM-0001-4001"/></eCitation>"""


def reports(rng: random.Random) -> Iterator[bytes]:
    """Three reports, one of them damaged, or without its headings."""
    texts = [REPORT.format(row, ("Cardiomegaly", "Nodule", "normal")[row]).encode() for row in range(3)]
    at = rng.randrange(3)
    words = [b"MeSH", b"major", b"parentImage", b"id=", b"uId", b"CXR", b"Nodule", b'"', b"<", b">", b"/"]
    for row, text in enumerate(texts):
        if row != at:
            yield text
        elif rng.random() < 0.5:
            yield text.replace(rng.choice(words), rng.choice([*words, b"", b"&amp;", b"&x;", b"\xff"]))
        else:
            yield damaged(text, rng)


def test_a_mutated_openi_report_is_read_or_refused(tmp_path: Path) -> None:
    rng, written = random.Random("openi"), dict[int, bytes]()
    outcomes = {"read": 0, "refused": 0}
    for number in range(TABLES):
        for row, data in enumerate(reports(rng)):
            if written.get(row) != data:
                write_anew(tmp_path / f"{row}.xml", data)
                written[row] = data
        found = outcome(unchecked, tmp_path)
        if isinstance(found, str):
            assert len(found) < 1000, (number, found)
            outcomes["refused"] += 1
            continue
        assert 3 <= len(found) <= 8, number
        assert (found.labels == 1).any(axis=1).all(), number
        outcomes["read"] += 1
    assert min(outcomes.values()) > TABLES // 10, outcomes


@pytest.mark.parametrize(("suffix", "needed"), [(".parquet", "pyarrow"), (".xlsx", "openpyxl")])
def test_a_damaged_binary_table_is_read_or_refused(suffix: str, needed: str, tmp_path: Path) -> None:
    pytest.importorskip(needed)
    head, *body = HOSPITAL
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".xlsx":
        import openpyxl

        book = openpyxl.Workbook()
        for row in HOSPITAL:
            book.active.append(row)
        book.save(whole)
    else:
        import pyarrow
        import pyarrow.parquet

        columns = {title: [row[c] for row in body] for c, title in enumerate(head)}
        pyarrow.parquet.write_table(pyarrow.table(columns), whole)
    read = hospital(classes=("Edema", "Mass"))
    base, data, rng = by_image(read(whole)), whole.read_bytes(), random.Random(suffix)
    for number in range(300):
        broken_bytes = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            broken_bytes[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        table = tmp_path / f"broken{suffix}"
        write_anew(table, bytes(broken_bytes[: rng.randrange(1, len(data))] if rng.random() < 0.2 else broken_bytes))
        found = outcome(read, table)
        if isinstance(found, str):
            assert found.count("\n") <= 1, (number, found)
            continue
        check(found, str(number))
        assert suffix == ".parquet" or by_image(found) == base, number
