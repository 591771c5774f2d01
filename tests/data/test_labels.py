"""Headings to classes: the parsing on its own, the table as data, and every published label where the data is."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.data import labels
from cxr_fast.errors import SchemaError

RAW = json.loads(labels.TABLE_FILE.read_text(encoding="utf-8"))
KNOWN = st.sampled_from([*RAW["headings"], *RAW["dropped"]])
QUALIFIER = st.text(alphabet="abc, -", max_size=6).map("/{}".format)


def real(name: str) -> Path:
    root = os.environ.get("CXR_FAST_REAL_DATA")
    if not root or not (Path(root) / name).exists():
        pytest.skip(f"CXR_FAST_REAL_DATA is unset or holds no {name}")
    return Path(root) / name


@pytest.mark.parametrize(
    ("headings", "classes"),
    [
        ("normal", ("Normal",)),
        ("", ("Normal",)),
        ("No Indexing", ("Normal",)),
        ("Aorta/tortuous;Catheters, Indwelling/right", ("Normal",)),
        ("Cardiomegaly/borderline;Pulmonary Artery/enlarged", ("Cardiomegaly", "Pulmonary Artery Enlargement")),
        ("Opacity/lung/base;Heart Failure", ("Cardiomegaly", "Edema", "Lesion")),
        ("cardiac   SHADOW /enlarged", ("Cardiac Shadow (abnormal)",)),
        ("Bone Diseases, Metabolic/spine", ("Degenerative Change",)),
        ("A heading nobody knows;Nodule", ("Nodule",)),
    ],
)
def test_classes_of_headings(headings: str, classes: tuple[str, ...]) -> None:
    assert labels.classes_of_headings(headings) == classes
    assert labels.classes_of_headings(headings.split(";")) == classes


@given(st.lists(st.tuples(KNOWN, QUALIFIER), max_size=6), st.randoms(use_true_random=False))
def test_order_spacing_case_and_qualifiers_do_not_matter(parts: list[tuple[str, str]], random) -> None:
    plain = labels.classes_of_headings([heading for heading, _ in parts])
    messy = [random.choice([str.upper, str.lower])(heading).replace(" ", "  ") + rest for heading, rest in parts]
    random.shuffle(messy)
    assert labels.classes_of_headings(" ; ".join(messy) + ";") == plain
    assert labels.classes_of_headings(messy + messy) == plain


@given(st.lists(KNOWN, max_size=6))
def test_normal_stands_alone_and_the_rest_is_the_union(headings: list[str]) -> None:
    found = labels.classes_of_headings(headings)
    union = {name for heading in headings for name in labels.classes_of_headings(heading)} - {labels.NORMAL}
    assert set(found) == (union or {labels.NORMAL})
    assert list(found) == sorted(found, key=str.casefold)


@given(st.lists(KNOWN, max_size=4))
def test_doubt_is_only_about_normal_and_never_double(headings: list[str]) -> None:
    doubts = labels.unindexed(headings), labels.only_dropped(headings)
    assert doubts != (True, True)
    if any(doubts):
        assert labels.classes_of_headings(headings) == (labels.NORMAL,)


@pytest.mark.parametrize(
    ("headings", "unindexed", "only_dropped"),
    [
        ("No Indexing", True, False),
        ("", True, False),
        ("normal", False, False),
        ("Aorta/tortuous", False, True),
        ("Aorta/tortuous;Nodule", False, False),
        ("Stents;No Indexing", False, True),
        ("A heading nobody knows", False, True),
    ],
)
def test_doubt(headings: str, unindexed: bool, only_dropped: bool) -> None:
    assert (labels.unindexed(headings), labels.only_dropped(headings)) == (unindexed, only_dropped)


def test_the_table_has_35_classes_and_no_heading_is_both_kept_and_dropped() -> None:
    assert len(labels.CLASSES) == len(set(labels.CLASSES)) == 35
    assert list(labels.CLASSES) == sorted(labels.CLASSES, key=str.casefold)
    assert labels.NORMAL == "Normal"
    assert labels.NORMAL in labels.CLASSES
    kept, dropped = ({labels.normalise(name) for name in RAW[key]} for key in ("headings", "dropped"))
    assert not kept & dropped
    assert RAW["version"] in labels.TABLE_VERSION


def test_traps_are_one_sentence_about_a_class_that_exists() -> None:
    assert {"Hyperinflation", "Rib Fracture", "Thickening", "Normal"} <= {name for name, _ in labels.TRAPS}
    for name, sentence in labels.TRAPS:
        assert name in labels.CLASSES
        assert sentence.endswith(".")
        assert "\n" not in sentence


def test_an_unknown_schema_is_refused_and_says_who_wrote_it() -> None:
    with pytest.raises(SchemaError, match=r"indiana-35 9\.0\.0 has schema 2; this cxr-fast reads schema 1"):
        labels.parse_table(json.dumps(RAW | {"schema": 2, "version": "9.0.0"}))


def test_importing_labels_loads_nothing_heavy() -> None:
    code = "import sys, cxr_fast.data.labels; print({'numpy', 'pandas', 'torch'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@pytest.mark.parametrize("column", ["MeSH", "Problems"])
def test_every_published_label(column: str) -> None:
    with real("iu/indiana_reports_labelled.csv").open(encoding="utf-8", newline="") as file:
        studies = list(csv.DictReader(file))
    assert len(studies) == 3851
    for study in studies:
        published = {"Normal" if name == "normal" else name for name in study["label"].split(";")}
        assert set(labels.classes_of_headings(study[column])) == published, study["uid"]
    assert sum(labels.unindexed(study[column]) for study in studies) == 92
    assert sum(labels.only_dropped(study[column]) for study in studies) == 157


def test_the_figures_in_the_traps() -> None:
    with real("iu/indiana_reports.csv").open(encoding="utf-8", newline="") as file:
        fields = [study["MeSH"] for study in csv.DictReader(file)]

    def count(name: str, heading: str = "", qualifier: str = "") -> int:
        """Studies of a class, or those of them with this heading, so qualified."""
        of_class = [field.split(";") for field in fields if name in labels.classes_of_headings(field)]
        return sum(any(p.strip().startswith(heading) and qualifier in p for p in parts) for parts in of_class)

    traps = dict(labels.TRAPS)
    for name, heading, qualifier, said in [
        ("Hyperinflation", "Lung", "hypoinflation", (284, 547)),
        ("Lesion", "Opacity", "", (432, 694)),
        ("Pleural Thickening", "Costophrenic Angle", "", (78, 81)),
        ("Volume Loss", "Pulmonary Atelectasis", "", (315, 324)),
        ("Fibrosis", "Cicatrix", "", (184, 191)),
        ("Thickening", "Thickening", "pleura", (43, 52)),
        ("Calcified Granuloma", "Granulomatous Disease", "", (107, 409)),
        ("Degenerative Change", "Atherosclerosis", "", (125, 715)),
        ("Rib Fracture", "Ribs", "", (4, 4)),
    ]:
        assert (count(name, heading, qualifier), count(name)) == said, name
        assert all(str(number) in traps[name] for number in said), name
