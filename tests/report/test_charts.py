"""The quick ways to a picture file against matplotlib's own."""

from __future__ import annotations

import io
import re
import zlib
from typing import Any

import numpy as np
import pytest
from fontTools.ttLib import TTFont

from cxr_fast.report import charts


def figure() -> Any:
    """A figure with a legend, letters of two fonts' subsets, pairs that a font joins (fi, ffl), and brackets."""
    rows = [
        {"class": name, "auc": {"value": 0.5 + c / 10, "low": 0.4, "high": 0.9 if c else None}, "positives": 7 * c}
        for c, name in enumerate(("Infiltrate (left)", "affliction", "AVAW …", "Émphysème"))
    ]
    return charts.class_intervals(rows, "auc", "AUC")


def test_one_drawing_gives_the_bytes_of_savefig() -> None:
    slow = io.BytesIO()
    figure().savefig(slow, format="png")
    assert charts.png(figure()) == slow.getvalue()


def test_a_pdf_draws_the_same_letters_without_the_tables_it_has_no_use_for(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = charts.render(figure())["pdf"]
    monkeypatch.setattr(charts, "UNUSED_TABLES", ())
    slow = charts.render(figure())["pdf"]
    assert len(quick) < len(slow)
    pages, fonts = split(quick)
    same_pages, whole_fonts = split(slow)
    assert pages == same_pages, "strokes, letters by number, and which glyph each number is"
    assert len(fonts) == len(whole_fonts) > 0
    for (font, numbers), (whole, _) in zip(fonts, whole_fonts, strict=True):
        assert "GSUB" in set(whole.keys()) - set(font.keys())
        assert any(numbers)
        for number in numbers:
            assert outline(font, number) == outline(whole, number)


def split(pdf: bytes) -> tuple[list[bytes], list[tuple[Any, list[int]]]]:
    """The streams of a PDF file that are no fonts, and its TrueType fonts with the glyphs that its letters use."""
    objects = re.findall(rb"(\d+) 0 obj\n(.*?)\nendobj", pdf, re.DOTALL)
    dicts = {number: data.partition(b"stream")[0] for number, data in objects}
    found = re.findall(rb"(\d+) 0 obj\n(?:(?!endobj).)*?stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL)
    streams = {number: zlib.decompress(data) for number, data in found}
    fonts = []
    for data in dicts.values():
        if glyphs := re.search(rb"/CIDToGIDMap (\d+) 0 R", data):
            described = re.search(rb"/FontDescriptor (\d+) 0 R", data)
            file = re.search(rb"/FontFile2 (\d+) 0 R", dicts[described[1]]) if described else None
            assert file
            numbers = np.frombuffer(streams[glyphs[1]], ">u2").tolist()
            fonts.append((TTFont(io.BytesIO(streams.pop(file[1]))), numbers))
    return list(streams.values()), fonts


def outline(font: Any, number: int) -> tuple[list[Any], list[int]]:
    """The points of a glyph, those of its parts in place, and where its contours end."""
    points, ends, _ = font["glyf"][font.getGlyphName(number)].getCoordinates(font["glyf"])
    return list(points), list(ends)
