"""The pieces of a page: cells, tables, pictures; and what keeps text from being markup."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from jinja2 import UndefinedError
from PIL import Image

from cxr_fast.report.html import capitalise, embed, environment
from cxr_fast.system.text import Figure, Label, Table


def drawn(table: Table, **named: Any) -> str:
    """A table as the page has it, without line ends."""
    macros: Any = environment().get_template("macros.html.j2").module
    return str(macros.table(table, **named)).replace("\n", "")


def test_a_cell_says_what_it_sorts_by() -> None:
    cells = {
        "text <b>": "<td>text &lt;b&gt;</td>",
        1234: '<td data-v="1234">1,234</td>',
        None: '<td data-v="">–</td>',
        Figure(value=0.25): '<td data-v="0.25">0.250</td>',
        Figure(value=float("nan")): '<td data-v="">–</td>',
        Figure(value=0.5, low=0.4, high=0.6): '<td data-v="0.5">0.500 <span class="ci">[0.400, 0.600]</span></td>',
        Figure(value=-0.5, low=-1, high=0.25, signed=True): '<td data-v="-0.5">−0.500 '
        '<span class="ci">[−1.000, +0.250]</span></td>',
        Label(text="12 s", value=12.5): '<td data-v="12.5">12 s</td>',
        Label(text="<0>", alarm=True): '<td data-v="" class="alarm">&lt;0&gt;</td>',
    }
    for cell, shown in cells.items():
        table = drawn(Table(title="t", columns=["a", "b"], rows=[["x", cell]]))
        assert f'<tr><th scope="row">x</th>{shown}</tr>' in table


def test_a_table_has_a_region_a_caption_a_foot_and_marked_rows() -> None:
    table = Table(
        title="T & U",
        columns=["a", "b"],
        rows=[["x", 1], ["y", 2]],
        chosen=[1],
        foot=[["mean", 1.5]],
        mark="best",
        notes=["<read>"],
    )
    assert drawn(table, mark=True) == (
        '<div class="scroll" role="region" aria-label="T &amp; U" tabindex="0"><table class="full">'
        '<caption>T &amp; U</caption><thead><tr><th scope="col">a</th><th scope="col">b</th></tr></thead><tbody>'
        '<tr><th scope="row">x</th><td data-v="1">1</td></tr>'
        '<tr class="chosen"><th scope="row">y (best)</th><td data-v="2">2</td></tr></tbody>'
        '<tfoot><tr><th scope="row">mean</th><td data-v="1.5">1.5</td></tr></tfoot></table></div>'
        '<p class="note">&lt;read&gt;</p>'
    )
    assert "chosen" not in drawn(table, chosen=False)
    plain = drawn(Table(title="T", columns=["", ""], rows=[["x", "y"]], sortable=True), css="", caption=False)
    assert '<table class="sortable"><tbody>' in plain
    assert "<caption>" not in plain


def test_a_picture_is_inside_the_page_at_its_size() -> None:
    file = io.BytesIO()
    Image.new("L", (320, 160)).save(file, "png")
    found = embed(file.getvalue())
    assert (found.width, found.height) == (192, 96)
    assert base64.b64decode(found.source.removeprefix("data:image/png;base64,")) == file.getvalue()
    macros: Any = environment().get_template("macros.html.j2").module
    drawn = str(macros.picture(file.getvalue(), "a <b>", "c", wide=True)).strip()
    assert drawn == (
        '<figure><div class="scroll" role="region" aria-label="a &lt;b&gt;" tabindex="0"><img class="wide" '
        f'alt="a &lt;b&gt;" width="192" height="96" src="{found.source}"></div><figcaption>c</figcaption></figure>'
    )
    assert str(macros.picture(None, "a")).strip() == ""
    assert str(macros.pair("", " ")).strip() == ""


def test_values_are_text_in_a_page_and_in_markdown() -> None:
    evil = "<i>a</i>\n# b"
    assert environment().from_string("{{ x }}").render(x=evil) == "&lt;i&gt;a&lt;/i&gt;\n# b"
    markdown = environment(markdown=True)
    assert markdown.from_string("{{ x }} {{ x | quoted }}").render(x=evil) == ('&lt;i>a&lt;/i> # b "<i>a</i>\\n# b"')
    table = Table(columns=["a"], rows=[["x|y\n<b>"]])
    assert markdown.from_string("{{ t | markdown }}").render(t=table) == "| a |\n| --- |\n| x\\|y &lt;b> |"


def test_a_name_that_the_template_does_not_know_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="run"):
        environment().from_string("{{ run.name }}").render()


def test_a_capital_first_letter_changes_no_other() -> None:
    assert [capitalise(text) for text in ("", "a", "mAP of A")] == ["", "A", "MAP of A"]
