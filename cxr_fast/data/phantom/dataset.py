"""Synthetic chest radiographs with planted findings, drawn as films and written as an Indiana dataset folder."""

from __future__ import annotations

import csv
import json
import shutil
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...errors import InputError
from ...system.files import disk_reason, folders_above, write_csv, write_json
from ..labels import NORMAL, classes_of_headings
from ..layouts import CARD, PROJECTIONS, REPORTS
from .anatomy import Field, Map, Patient, frontal, lateral, vessels
from .findings import drawable, plant, reshape

VIEWS = ("Frontal", "Lateral")
# Anatomy is drawn at most this large and then enlarged; only grain is finer, as on real film.
WORK_SIZE = 512
# Folders of this many studies hold every class; in smaller ones the rarest may be missing.
ALL_CLASSES_FROM = 150

# Studies of the Indiana collection by their films, 3,851 in all (two mixtures seen once are left out).
FILMS: tuple[tuple[str, int], ...] = (
    ("FL", 3194), ("F", 295), ("L", 151), ("FFL", 103), ("FLL", 77), ("LL", 11), ("FFLL", 8), ("FF", 5),
    ("FFFL", 4), ("FFFFL", 1),
)  # fmt: skip
NORMAL_STUDIES = 1628 / 3851
# What the normal studies are indexed with: none of these headings gives a class.
SILENT: tuple[tuple[str, int], ...] = (("normal", 1379), ("No Indexing", 92), ("Aorta/tortuous", 157))
# Headings that give the classes, with their studies in the collection; near-synonyms are merged.
HEADINGS: tuple[tuple[str, int], ...] = (
    ("Lung/hyperdistention", 530), ("Opacity/lung", 432), ("Cardiomegaly/mild", 340),
    ("Pulmonary Atelectasis/base", 315), ("Calcinosis/lung/hilum/lymph nodes", 292),
    ("Calcified Granuloma/lung", 270), ("Thoracic Vertebrae/degenerative", 256), ("Cicatrix/lung", 184),
    ("Spine/degenerative", 174), ("Markings/bronchovascular", 159), ("Pleural Effusion/small", 149),
    ("Atherosclerosis/aorta", 125), ("Airspace Disease/lung/base", 123), ("Density/lung", 116),
    ("Deformity/thoracic vertebrae", 113), ("Granulomatous Disease", 107), ("Nodule/lung", 106),
    ("Emphysema", 96), ("Scoliosis/thoracic vertebrae", 95), ("Fractures/ribs/healed", 86),
    ("Pulmonary Congestion", 84), ("Costophrenic Angle/blunted", 79), ("Osteophyte/thoracic vertebrae", 69),
    ("Infiltrate/lung", 63), ("Spondylosis/thoracic vertebrae", 63), ("Cardiac Shadow/enlarged", 54),
    ("Thickening/pleura", 52), ("Pulmonary Disease, Chronic Obstructive", 48), ("Hernia, Hiatal", 44),
    ("Pneumonia", 41), ("Diaphragmatic Eventration/right", 34), ("Kyphosis/thoracic vertebrae", 33),
    ("Granuloma/lung", 32), ("Pneumothorax/apex", 24), ("Consolidation/lung", 20), ("Lung, Hyperlucent", 17),
    ("Pulmonary Fibrosis", 18), ("Mass/lung", 16), ("Lung Diseases, Interstitial", 14),
    ("Pulmonary Artery/enlarged", 12), ("Heart Failure", 9), ("Pericardial Effusion", 9),
    ("Hypertension, Pulmonary", 7), ("Bullous Emphysema", 4), ("Cystic Fibrosis", 4), ("Ribs/prominent", 4),
    ("Aortic Aneurysm", 3), ("Subcutaneous Emphysema", 3), ("Bronchiectasis", 3), ("Hydropneumothorax", 2),
    ("Tuberculosis", 1), ("Bronchiolitis", 1),
)  # fmt: skip

# Present only while a folder is being written, so that a killed run is recognised and may be started again.
UNFINISHED = "phantom.unfinished"
REPORT_COLUMNS = ("uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression")
PROJECTION_COLUMNS = ("uid", "filename", "projection")
ABOUT = (
    "Synthetic chest radiographs with planted findings, drawn by cxr-fast. No patient is shown; "
    "figures measured on them say nothing about real radiographs."
)
Row = dict[str, str]


def draw(
    rng: np.random.Generator,
    *,
    view: str = "Frontal",
    findings: Sequence[str] = (),
    size: tuple[int, int] = (256, 256),
    patient: Patient | None = None,
) -> NDArray[np.uint8]:
    """One film, uint8 (H, W) of `size` (H, W), with every one of `findings` (class names) planted.

    The body, and where and how strongly each finding sits in it, come from `patient` (sampled from `rng` where
    None), so the films of one patient agree; positioning, exposure and grain come from `rng`.
    Raises InputError for a view, a finding or a size that cannot be drawn.
    """
    _check(view, findings, size)
    patient = patient or Patient.sample(rng)
    scale = min(1.0, WORK_SIZE / max(size))
    height, width = (max(16, round(edge * scale)) for edge in size)
    shaped = reshape(patient, findings)
    u, y = _grid(rng, height, width)
    field = frontal(shaped, u, y) if view == "Frontal" else lateral(shaped, u, y)
    vessels(field, shaped)
    for name in sorted(set(findings) - {NORMAL}):
        plant(field, patient, name)
    return _film(rng, field, size)


def _check(view: str, findings: Sequence[str], size: tuple[int, int]) -> None:
    if view not in VIEWS:
        raise InputError(f"view {view!r} cannot be drawn; it must be one of {', '.join(VIEWS)}.")
    if unknown := sorted(set(findings) - drawable() - {NORMAL}):
        raise InputError(f"cannot draw {', '.join(unknown)}: findings are class names of cxr_fast.data.labels.CLASSES.")
    if min(size) < 16 or max(size) > 8192:
        raise InputError(f"--size: {size[0]} x {size[1]} must be between 16 and 8192 pixels.")


def _grid(rng: np.random.Generator, height: int, width: int) -> tuple[Map, Map]:
    """Patient coordinates (1, W) and (H, 1) under this film's own magnification and off-centring."""
    half, zoom = min(height, width) / 2, rng.uniform(0.95, 1.06)
    dx, dy = rng.normal(0, 0.025, 2)
    u = ((np.arange(width) + 0.5 - width / 2) / half * zoom + dx).astype(np.float32)[None, :]
    y = ((np.arange(height) + 0.5 - height / 2) / half * zoom + dy).astype(np.float32)[:, None]
    return u, y


def _film(rng: np.random.Generator, field: Field, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Density to grey, as film does: exposure and tone curve, grain at full size, collimator, side marker."""
    contrast, fog, speck = rng.uniform(1.75, 2.15), rng.uniform(0.0, 0.03), rng.uniform(0.008, 0.016)
    # Its own stream: grain takes as many numbers as there are pixels, the rest must not depend on the size.
    grain = np.random.default_rng(rng.integers(2**63)).standard_normal(size, dtype=np.float32)
    grey = 1 - np.exp(np.float32(-contrast) * np.clip(field.density, 0, None))
    grey = fog + grey * np.float32((1 - fog) * 0.98 / (1 - np.exp(-contrast * 1.35)))
    if grey.shape != size:
        grey = np.asarray(Image.fromarray(grey).resize(size[::-1], Image.Resampling.BICUBIC))
    grey = grey + np.float32(speck) * grain
    image = np.asarray(np.clip(grey * 255, 0, 255), dtype=np.uint8)
    _blades(rng, image)
    _marker(rng, image, field.view)
    return image


def _blades(rng: np.random.Generator, image: NDArray[np.uint8]) -> None:
    """Black collimator edges, up to 4 % of each side and on most films none."""
    height, width = image.shape
    top, bottom, left, right = np.clip(rng.normal(0, 0.012, 4), 0, 0.04)
    image[: int(top * height)] = 0
    image[height - int(bottom * height) :] = 0
    image[:, : int(left * width)] = 0
    image[:, width - int(right * width) :] = 0


def _marker(rng: np.random.Generator, image: NDArray[np.uint8], view: str) -> None:
    """A lead L at the patient's left; two strokes, so that no font decides the bytes."""
    unit = max(1, image.shape[0] // 80)
    top = int(image.shape[0] * rng.uniform(0.05, 0.09))
    left = int(image.shape[1] * (rng.uniform(0.90, 0.93) if view == "Frontal" else rng.uniform(0.05, 0.08)))
    image[top : top + 5 * unit, left : left + unit] = 250
    image[top + 4 * unit : top + 5 * unit, left : left + 3 * unit] = 250


def write_dataset(
    out: Path, *, studies: int = 300, size: int = 256, seed: int = 0, limit_images: int | None = None
) -> int:
    """Write a phantom dataset in the layout of the public Indiana copy, and return how many images it has.

    `out` gets `images/*.png` (size x size, 8-bit grey), the two CSV files and `dataset.json`, the CSV files after the
    images and the card last; the same arguments give the same bytes. With `limit_images` the first images only, and
    the reports of their studies. Rare findings are spread systematically, so from 150 studies every class occurs.
    An earlier phantom dataset in `out` is replaced.
    Raises InputError where `out` holds anything else, or a number is out of range.
    """
    _check_numbers(studies=studies, size=size, seed=seed, limit=limit_images)
    headings = sample_headings(np.random.default_rng([seed, 1]), studies)
    reports = [_report(uid, mesh) for uid, mesh in enumerate(headings, start=1)]
    projections = [row for report in reports for row in _projections(seed, report["uid"])][:limit_images]
    return _write(out, reports, projections, size=size, seed=seed)


def write_for(
    reports_csv: Path, projections_csv: Path, out: Path, *, size: int = 256, seed: int = 0, limit: int | None = None
) -> int:
    """Draw a phantom for every row of an Indiana-style pair of CSV files; return how many images were written.

    What each shows follows the study's headings (`MeSH`); `out` becomes a dataset of its own, with
    the rows drawn (the first `limit`) and their reports. Raises InputError for files without the columns needed, for
    file names that are not plain names, and where `write_dataset` does.
    """
    _check_numbers(size=size, seed=seed, limit=limit)
    reports = _read(reports_csv, ("uid", "MeSH"), "the reports file")
    projections = _read(projections_csv, PROJECTION_COLUMNS, "the projections file")[:limit]
    return _write(out, reports, projections, size=size, seed=seed)


def sample_headings(rng: np.random.Generator, studies: int) -> list[str]:
    """A `MeSH` field for each study: 42 % without findings, the rest with one to many, in Indiana's long tail.

    Each heading gets its share of the studies rounded at random, so its frequency is exact to one study; from
    `ALL_CLASSES_FROM` studies a class that would be left out gets one study.
    """
    tokens = [h for h, count in HEADINGS for _ in range(int(count / 3851 * studies + rng.random()))]
    if studies >= ALL_CLASSES_FROM:
        present = set(classes_of_headings(tokens))
        for heading, _ in HEADINGS:
            if missing := set(classes_of_headings(heading)) - present:
                tokens.append(heading)
                present |= missing
    order = rng.permutation(studies)
    abnormal = order[: min(len(tokens), studies - round(NORMAL_STUDIES * studies))]
    # Some patients collect findings: a heavy-tailed appetite gives Indiana's one to nine classes a study.
    appetite = rng.gamma(0.7, size=len(abnormal))
    found: dict[int, list[str]] = {int(study): [] for study in abnormal}
    for k, i in enumerate(rng.permutation(len(tokens))):
        study = abnormal[k] if k < len(abnormal) else rng.choice(abnormal, p=appetite / appetite.sum())
        if tokens[i] not in found[int(study)]:
            found[int(study)].append(tokens[i])
        else:
            found[_next_without(found, int(study), tokens[i])].append(tokens[i])
    silent = rng.choice([h for h, _ in SILENT], size=studies, p=_shares(SILENT))
    return [";".join(found.get(study, [str(silent[study])])) for study in range(studies)]


def _next_without(found: dict[int, list[str]], study: int, heading: str) -> int:
    """The next abnormal study that lacks a heading; `study` itself where all have it."""
    keys = list(found)
    start = keys.index(study)
    return next((k for k in keys[start:] + keys[:start] if heading not in found[k]), study)


def _shares(table: Sequence[tuple[str, int]]) -> NDArray[np.float64]:
    counts = np.array([count for _, count in table], dtype=np.float64)
    return counts / counts.sum()


def _report(uid: int, mesh: str) -> Row:
    problems = ";".join(dict.fromkeys(part.partition("/")[0] for part in mesh.split(";")))
    shown = ", ".join(classes_of_headings(mesh))
    text = {"findings": f"Drawn, not acquired. Planted: {shown}.", "impression": f"{shown}."}
    fixed = {"image": "Xray Chest PA and Lateral", "indication": "Synthetic.", "comparison": "None."}
    return {"uid": str(uid), "MeSH": mesh, "Problems": problems, **fixed, **text}


def sample_films(rng: np.random.Generator) -> list[str]:
    """The views of one study, frontal ones first: one to five films, as often as in the collection."""
    films = str(rng.choice([films for films, _ in FILMS], p=_shares(FILMS)))
    return ["Frontal" if film == "F" else "Lateral" for film in films]


def _projections(seed: int, uid: str) -> list[Row]:
    films = sample_films(np.random.default_rng([seed, 2, zlib.crc32(uid.encode())]))
    return [
        {"uid": uid, "filename": f"{uid}_IM-{int(uid):04d}-{k}001.dcm.png", "projection": view}
        for k, view in enumerate(films, start=1)
    ]


def _write(out: Path, reports: Sequence[Row], projections: Sequence[Row], *, size: int, seed: int) -> int:
    by_uid = {row["uid"]: row for row in reports}
    _check_rows(by_uid, projections)
    _refuse_foreign(out)
    try:
        with folders_above(out / CARD):
            (out / UNFINISHED).touch()
            try:
                _draw_all(out, reports, projections, size=size, seed=seed)
            except (OSError, InputError):
                _clear(out)  # half a data set can be neither used nor gone on with
                raise
    except OSError as error:
        raise InputError(f"{out}: cannot write: {disk_reason(out / CARD, error)}.") from error
    return len(projections)


def _draw_all(out: Path, reports: Sequence[Row], projections: Sequence[Row], *, size: int, seed: int) -> None:
    """Write images, tables and the card into a folder marked unfinished. An earlier card goes first and the new one
    comes last, so no kill leaves old and new mixed under it."""
    by_uid = {row["uid"]: row for row in reports}
    _clear(out, but=UNFINISHED)
    (out / "images").mkdir()
    for row in projections:
        image = _draw_row(by_uid[row["uid"]], row, size=size, seed=seed)
        # Level 1: grain hardly compresses, and the default level takes three times as long for 3 % less.
        Image.fromarray(image).save(out / "images" / row["filename"], format="PNG", compress_level=1)
    kept = {row["uid"] for row in projections}
    written = [row for row in reports if row["uid"] in kept]
    for name, columns, rows in ((PROJECTIONS, PROJECTION_COLUMNS, projections), (REPORTS, REPORT_COLUMNS, written)):
        write_csv(out / name, columns, ([row.get(c, "") for c in columns] for row in rows), end="\n")
    write_json(out / CARD, {"name": "phantom", "synthetic": True, "seed": seed, "about": ABOUT})
    (out / UNFINISHED).unlink()


def _check_rows(by_uid: dict[str, Row], projections: Sequence[Row]) -> None:
    if orphans := {row["uid"] for row in projections} - set(by_uid):
        raise InputError(f"uid {min(orphans)} has images but no report: the two CSV files do not belong together.")
    if views := {row["projection"] for row in projections} - set(VIEWS):
        raise InputError(f"projection {min(views)!r} cannot be drawn; it must be one of {', '.join(VIEWS)}.")
    names = [row["filename"] for row in projections]
    if bad := [name for name in names if name != Path(name).name or not name.endswith(".png") or "\\" in name]:
        raise InputError(f"{bad[0]!r} is not the plain name of a PNG file; mend the projections file.")
    if len(set(names)) < len(names):
        raise InputError("the projections file names one image twice; mend it.")


def _draw_row(report: Row, row: Row, *, size: int, seed: int) -> NDArray[np.uint8]:
    """One image; its randomness hangs on seed, uid and file name alone, not on what else is drawn."""
    uid, name = zlib.crc32(row["uid"].encode()), zlib.crc32(row["filename"].encode())
    patient = Patient.sample(np.random.default_rng(np.random.SeedSequence([seed, 3, uid])))
    rng = np.random.default_rng(np.random.SeedSequence([seed, 4, uid, name]))
    found = classes_of_headings(report["MeSH"])
    return draw(rng, view=row["projection"], findings=found, size=(size, size), patient=patient)


def _check_numbers(*, size: int, seed: int, limit: int | None, studies: int = 1) -> None:
    if not 16 <= size <= 8192:
        raise InputError(f"--size: {size} must be between 16 and 8192 pixels.")
    if seed < 0:
        raise InputError(f"--seed: {seed} must be 0 or more.")
    if studies < 1:
        raise InputError(f"--studies: {studies} must be 1 or more.")
    if limit is not None and limit < 1:
        raise InputError(f"--limit: {limit} must be 1 or more.")


def _refuse_foreign(out: Path) -> None:
    """Raise InputError where `out` is a file or holds files that are no phantom data set."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; name a folder that is new or empty.")
    ours = (out / UNFINISHED).exists() or _is_phantom(out / CARD)
    if out.exists() and any(out.iterdir()) and not ours:
        raise InputError(f"{out} holds files that are no phantom dataset; name a folder that is new or empty.")


def _clear(out: Path, but: str = "") -> None:
    """Remove the files of a phantom data set, the card first and the mark of an unfinished one last."""
    for name in (CARD, REPORTS, PROJECTIONS):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "images", ignore_errors=True)
    if but != UNFINISHED:
        (out / UNFINISHED).unlink(missing_ok=True)


def _is_phantom(card: Path) -> bool:
    try:
        return bool(json.loads(card.read_text(encoding="utf-8")).get("name") == "phantom")
    except (OSError, ValueError, AttributeError):
        return False


def _read(path: Path, need: Iterable[str], what: str) -> list[Row]:
    if not path.is_file():
        raise InputError(f"{path} is missing: give the path of {what}.")
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        if lacking := [name for name in need if name not in (reader.fieldnames or ())]:
            raise InputError(f"{path} has no column {', '.join(lacking)}: it is not {what} of an Indiana copy.")
        return list(reader)
