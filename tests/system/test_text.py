"""One table shown in every medium says the same; numbers and sizes read as a person writes them."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest

from cxr_fast.system.text import Figure, Table, cell_text, to_csv, to_markdown, to_plain

TABLE = Table(
    columns=["class", "n", "AUC"],
    rows=[["Mass | <b>", 1234, Figure(value=0.81249, low=0.7, high=0.9)], ["Edema", 3, Figure(value=float("nan"))]],
    chosen=[0],
    foot=[["mean", 1237, Figure(value=0.8)]],
    notes=["n counts films"],
)


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "–"),
        (1234567, "1,234,567"),
        ("as it is", "as it is"),
        (Figure(value=0.5), "0.500"),
        (Figure(value=0.5, low=0.25, high=0.75, digits=2), "0.50 [0.25, 0.75]"),
        (Figure(value=None, low=0.1, high=0.2), "–"),
        (Figure(value=0.5, low=0.1), "0.500"),
    ],
)
def test_a_cell_reads_as_a_person_writes_it(cell: object, text: str) -> None:
    assert cell_text(cell) == text  # type: ignore[arg-type]


def test_plain_text_is_aligned_and_marks_the_chosen_row() -> None:
    assert to_plain(replace(TABLE, mark="best")).splitlines() == [
        "class           n                   AUC",
        "----------  -----  --------------------",
        "Mass | <b>  1,234  0.812 [0.700, 0.900]  <- best",
        "Edema           3                     –",
        "mean        1,237                 0.800",
        "n counts films",
    ]


def test_markdown_escapes_what_would_break_a_row() -> None:
    head, rule, first, *_ = to_markdown(TABLE).splitlines()
    assert (head, rule) == ("| class | n | AUC |", "| --- | ---: | ---: |")
    assert first == "| Mass \\| &lt;b> | 1,234 | 0.812 [0.700, 0.900] |"
    assert to_markdown(TABLE).endswith("\n\nn counts films")


def test_csv_keeps_every_digit_and_the_interval() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(TABLE))))
    assert rows[0] == {"class": "Mass | <b>", "n": "1234", "AUC": "0.81249", "AUC_low": "0.7", "AUC_high": "0.9"}
    assert len(rows) == 2
