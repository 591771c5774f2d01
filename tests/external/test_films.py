"""Answers of a model file to labelled films, read back from the table that `predict` writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from cxr_fast.data.manifest import Manifest
from cxr_fast.external.films import Answers, _read, describe_unlikeness


def manifest(count: int) -> Manifest:
    names = tuple(f"{k}.png" for k in range(count))
    labels = np.zeros((count, 1), np.int8)
    blank = ("",) * count
    return Manifest(
        name="site", root=Path(), images=names, groups=names, views=blank, studies=names, classes=("a",), labels=labels
    )


def test_unlikeness_is_read_where_the_table_has_it(tmp_path: Path) -> None:
    table = tmp_path / "predictions.csv"
    table.write_text("path,status,reason,note,unlikeness,a\nx,ok,,,0.5,0.25\ny,failed,empty: y,,,\nz,ok,,,1.5,1\n")
    probs, unlike = _read(table, ["a"], 3)
    np.testing.assert_array_equal(probs, np.array([[0.25], [np.nan], [1]], np.float32))
    np.testing.assert_array_equal(unlike, [0.5, np.nan, 1.5])
    answers = Answers(probs=probs, unlikeness=unlike, summary={})
    assert answers.answered.tolist() == [True, False, True]
    assert describe_unlikeness(manifest(3), answers) == (
        "1 of 2 films (50.0 %) have an unlikeness over 1; the most unlike are 2.png (1.50), 0.png (0.50)"
    )
    table.write_text("path,status,reason,note,a\nx,ok,,,0.25\n")
    probs, unlike = _read(table, ["a"], 1)
    assert np.isnan(unlike).all()
    assert describe_unlikeness(manifest(3), replace(answers, unlikeness=np.full(3, np.nan))) == ""
