"""Answers of a model file to labelled films, read back from the table that `predict` writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from cxr_fast.external.evaluation import _unlikeness
from cxr_fast.external.films import Answers, _read


def test_unlikeness_is_read_where_the_table_has_it(tmp_path: Path) -> None:
    table = tmp_path / "predictions.csv"
    table.write_text("path,status,reason,note,unlikeness,a\nx,ok,,,0.5,0.25\ny,failed,empty: y,,,\nz,ok,,,1.5,1\n")
    probs, unlike = _read(table, ["a"], 3)
    np.testing.assert_array_equal(probs, np.array([[0.25], [np.nan], [1]], np.float32))
    np.testing.assert_array_equal(unlike, [0.5, np.nan, 1.5])
    answers = Answers(probs=probs, unlikeness=unlike, summary={})
    assert answers.answered.tolist() == [True, False, True]
    assert _unlikeness(answers) == {"films": 2, "over_1": 1, "quartiles": [0.75, 1.0, 1.25]}
    table.write_text("path,status,reason,note,a\nx,ok,,,0.25\n")
    probs, unlike = _read(table, ["a"], 1)
    assert np.isnan(unlike).all()
    assert _unlikeness(replace(answers, unlikeness=unlike)) is None
