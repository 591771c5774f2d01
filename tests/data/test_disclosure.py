"""What looks like a person, a number of one or a day is seen as such, and what groups patients is not."""

from __future__ import annotations

from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_fast.data import disclosure
from cxr_fast.data.disclosure import VALUES, Secrets, differ_everywhere, is_date, is_identifier, is_person, why_hidden

FORMS = ("%Y%m%d", "%Y-%m-%d", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%y", "%Y/%m/%d", "%d-%b-%Y", "%B %d, %Y", "%d %B %Y")


@given(
    st.dates(date(1900, 1, 1), date(2099, 12, 31)), st.sampled_from(FORMS), st.sampled_from(["", " 14:03", "T14:03:22"])
)
def test_every_day_however_written_is_a_date(day: date, form: str, time: str) -> None:
    assert is_date(day.strftime(form) + time)


@pytest.mark.parametrize(
    "text", ["", "AP", "50-59", "100-109", "1000-1999", "2008", "2020-01", "0.20200101", "3.1", "up to 20"]
)
def test_other_numbers_are_no_dates(text: str) -> None:
    assert not is_date(text)


@pytest.mark.parametrize(
    "text",
    [
        *("1234567", "123456.0", "ACC0012345", "MRN-12345", "1.2.840.113619", "a.b@clinic.org", "079 123 45 67"),
        *("756.1234.5678.97", "scan/a.png", "/home/meier/x", "C:\\scans\\x", "AB12CD34EF56", "20230115.0"),
        "550e8400-e29b-41d4-a716-446655440000",
    ],
)
def test_identifiers(text: str) -> None:
    assert is_identifier(text)


@pytest.mark.parametrize(
    "text", ["DR9500", "XR656", "C90", "50-59", "12345.678", "0.123456789", "3", "F", "deadbeefcafe"]
)
def test_models_and_measurements_are_no_identifiers(text: str) -> None:
    assert not is_identifier(text)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "MEIER^ANNA",
            "Meier, Anna",
            "Anna Meier",
            "HANS MEIER",
            "Dr. Meier",
            "Prof Meier",
            "A. Meier",
            "O'Brien, P.",
        ),
        *("Anna-Maria van Dyk", "John White", "Müller Ümit", "Meier, MD"),
    ],
)
def test_names_of_persons(text: str) -> None:
    assert is_person(text)


@pytest.mark.parametrize(
    "text",
    [
        *("F", "AP", "Frontal", "Left Lateral", "AP SUPINE", "ANTERO-POSTERIOR", "Never Smoker", "Scanner A"),
        *("GE MEDICAL SYSTEMS", "Philips Medical Systems", "KONICA MINOLTA", "FUJIFILM Corporation", "Canon Inc."),
        *("Black or African American", "White, non-Hispanic", "Ward North", "Siemens", "up to 20"),
    ],
)
def test_groups_of_patients_are_no_names(text: str) -> None:
    assert not is_person(text)


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        *[(n, True) for n in ("PatientID", "patient_id", "name", "StudyDate", "dob", "birth_year", "AccessionNumber")],
        *[(n, True) for n in ("referring_physician", "2021-03-01", "id", "operator", "no.")],
        *[
            (n, False)
            for n in ("sex", "Patient Sex", "scanner_name", "ManufacturerModelName", "device_id", "view", "stage")
        ],
    ],
)
def test_the_name_of_a_column_may_hide_it(name: str, hidden: bool) -> None:
    assert bool(why_hidden(name, ["a"] * 40, [str(i) for i in range(40)])) == hidden


def test_one_value_hides_a_column_and_is_not_told() -> None:
    groups = [str(i) for i in range(40)]
    for value in ("Anna Meier", "3.5.1957", "ACC0012345", "a remark " * 10):
        why = why_hidden("ward", ["North"] * 39 + [value], groups)
        assert why
        assert value not in why
    assert "differ from" in why_hidden("consecutive", [str(i) for i in range(40)], groups)
    assert "differ from" in why_hidden(
        "consecutive", [str(i // 2) for i in range(40)], [str(i // 2) for i in range(40)]
    )
    assert why_hidden("dose", [f"{i}.5" for i in range(40)], groups) == ""
    assert why_hidden("dose", [str(i % 20) for i in range(40)], groups) == ""


def test_texts_that_all_differ() -> None:
    assert differ_everywhere([str(i) for i in range(VALUES + 1)])
    assert not differ_everywhere(["1", "0", "2"], ("1", "0", ""))
    assert differ_everywhere(["4711", "4712", "4713", ""], ("1", "0", ""))
    assert not differ_everywhere(["4711", "4711", "4713"])


def test_paths_leave_every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = Secrets(paths=("/data/of Dr Winter/weights", "/data/of Dr Winter"))
    value = {"a": ["/data/of Dr Winter/weights", 3, None], "b": {"c": "from /data/of Dr Winter, and /x/y.h5"}}
    assert secrets.clean_values(value) == {"a": ["weights", 3, None], "b": {"c": "from of Dr Winter, and y.h5"}}


def test_a_huge_column_is_looked_through_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(disclosure, "is_person", lambda text: seen.append(text))
    why_hidden("remark", [f"text {chr(97 + i % 26)}{'x' * (i % 40)} {i % 997}" for i in range(20_000)], ["p"] * 20_000)
    assert 0 < len(seen) <= disclosure.SAMPLE


SPELLINGS = ["Müller Jörg", "Mu\u0308ller Jo\u0308rg", "MÜLLER JÖRG", "müller_jörg", "Müller-Jörg", "Müller\n  Jörg"]
SPELLINGS += ["Müller\u00a0Jörg", "M%C3%BCller%20J%C3%B6rg", "M\\u00fcller J\\u00f6rg", "M&uuml;ller J&ouml;rg"]
SPELLINGS += ["Scan_Müller_Jörg_2"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_name_is_found_in_every_spelling(spelling: str) -> None:
    secrets = Secrets(paths=(), names=("Müller Jörg", "Anna Winter"))
    assert "Müller Jörg" in secrets.find(f"trained on {spelling}.")
    assert not secrets.find("trained on Müller films of Jörgensen, Annas Winters")
