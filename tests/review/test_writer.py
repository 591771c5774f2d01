"""The review page of a run: its cards against plain loops over the report's table, what it keeps, lacks and hides."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cxr_fast.cli.main import main
from cxr_fast.data.tables.corrections import read_corrections
from cxr_fast.errors import InputError
from cxr_fast.export import heatmaps
from cxr_fast.report.writer import write_films, write_report
from cxr_fast.review import pictures, writer
from cxr_fast.review.films import KINDS
from cxr_fast.review.writer import ReviewSpec, write_review
from cxr_fast.training.run_folder import read_info, read_run
from tests.helpers.pages import Page, browse

ALL = ReviewSpec(top=1000)


def copy_run(run: Path, out: Path) -> Path:
    return Path(shutil.copytree(run, out / "run"))


@pytest.fixture(scope="module")
def reviewed(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the page of all its errors; do not write into it."""
    folder = copy_run(toy_run, tmp_path_factory.mktemp("review"))
    write_review(folder, ALL)
    return folder


def whole_table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "review.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(folder: Path) -> list[dict[str, str]]:
    """The rows of the errors, which come first."""
    rows = whole_table(folder)
    errors = [row for row in rows if row["kind"] in KINDS]
    assert errors == rows[: len(errors)]
    return errors


def page_of(folder: Path) -> Page:
    return Page((folder / "review.html").read_text("utf-8"))


def cards_of(page: Page) -> list[dict[str, str | None]]:
    return [named for tag, named in page.tags if tag == "article"]


def cxr(*words: object) -> Result:
    return CliRunner().invoke(main, list(map(str, words)), catch_exceptions=False)


# ------------------------------------------------------------------------------------------------ which films


def by_hand(folder: Path) -> list[tuple[str, str, str, str]]:
    """(class, part, kind, image) of every error, worst first, from the report's own predictions.csv."""
    run = read_info(folder)
    write_films(folder, run)
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    out = []
    for name in run["classes"]:
        for part in ("out_of_fold", "holdout"):
            for kind, label, sign in (("false negative", "1", 1), ("false positive", "0", -1)):
                wrong = [
                    row
                    for row in rows
                    if row["part"] == part and row[f"{name}_label"] == label and row[f"{name}_decision"] != label
                ]
                wrong.sort(key=lambda row: sign * float(np.float32(row[f"{name}_probability"])))
                out += [(name, part, kind, row["image"]) for row in wrong]
    return out


def test_the_cards_are_the_errors_of_the_reports_table(reviewed: Path) -> None:
    found = [(row["class"], row["part"], row["kind"], row["image"]) for row in table(reviewed)]
    expected = by_hand(reviewed)
    assert len(expected) > 30
    assert {kind for _, _, kind, _ in expected} == {"false negative", "false positive"}
    assert found == expected


def test_probabilities_are_those_of_the_report(reviewed: Path) -> None:
    write_films(reviewed, read_info(reviewed))
    with open(reviewed / "predictions.csv", newline="", encoding="utf-8") as file:
        films = {row["image"]: row for row in csv.DictReader(file)}
    lines = re.findall(r"<li>probability (.*?)</li>", (reviewed / "review.html").read_text())
    rows = table(reviewed)
    assert len(lines) > len(rows), "suspects have theirs"
    lines = lines[: len(rows)]
    for row, line in zip(rows, lines, strict=True):
        p, limit = re.fullmatch(r"(\S+), threshold (\S+)", line).groups()  # type: ignore[union-attr]
        exact = float(films[row["image"]][f"{row['class']}_probability"])
        assert float(row["probability"]) == pytest.approx(exact, abs=1e-7)
        assert float(p) == pytest.approx(exact, abs=5.1e-5)
        assert (float(p) >= float(limit)) == (row["kind"] == "false positive"), "the line shows the decision"


def test_a_class_without_errors_is_said(reviewed: Path) -> None:
    page, run = page_of(reviewed), read_info(reviewed)
    assert page.sections == [*(f"class-{c}" for c in range(len(run["classes"]))), "suspects", "twins"]
    shown = {row["class"] for row in table(reviewed)}
    assert shown != set(run["classes"]), "every class has errors: nothing is tested"
    assert page.text.count("no film is known to be positive.") + page.text.count(": no false negative among") > 3


def test_top_and_class_choose(toy_run: Path, reviewed: Path, tmp_path: Path) -> None:
    folder = copy_run(toy_run, tmp_path)
    shutil.copytree(reviewed / "review", folder / "review")
    all_rows = table(reviewed)
    name = max({row["class"] for row in all_rows}, key=[row["class"] for row in all_rows].count)
    found = write_review(folder, ReviewSpec(top=2, classes=(name.upper(), name)))
    lists: dict[tuple[str, str], list[str]] = {}
    for row in all_rows:
        if row["class"] == name:
            lists.setdefault((row["part"], row["kind"]), []).append(row["image"])
    assert [row["image"] for row in table(folder)] == [image for images in lists.values() for image in images[:2]]
    assert found.cards > len(table(folder)) == sum(len(images[:2]) for images in lists.values()) > 2
    assert page_of(folder).sections == [f"class-{read_info(folder)['classes'].index(name)}", "suspects", "twins"]
    assert {row["class"] for row in whole_table(folder)} - {""} == {name}, "of twins no class"


def test_a_page_holds_no_more_cards_than_a_browser_bears(
    toy_run: Path, reviewed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_run(toy_run, tmp_path)
    shutil.copytree(reviewed / "review", folder / "review")
    lists = len({(row["class"], row["part"], row["kind"]) for row in table(reviewed)})
    monkeypatch.setattr(writer, "MOST", lists + 3)
    write_review(folder, ALL)
    assert len(table(folder)) <= lists + 3
    assert f"A page holds {lists + 3} errors at most: the worst 1 of each" in page_of(folder).text


# ------------------------------------------------------------------------------------------------ what is beside them


def test_the_nearest_are_training_films_of_other_groups(reviewed: Path) -> None:
    """By plain loops; of the three that the page names the groups are compared."""
    with np.load(reviewed / "predictions.npz") as file:
        fold, groups = file["fold"], file["group"].tolist()
    number = {name: place + 1 for place, name in enumerate(dict.fromkeys(groups))}
    best = read_info(reviewed)["chosen"]["fold"]
    text = (reviewed / "review.html").read_text()
    near = [re.findall(r", group (\d+)</small>", each) for each in re.findall(r"<article.*?</article>", text, re.S)]
    rows = table(reviewed)
    assert len(near) > len(rows)
    held = 0
    for row, found in zip(rows, near, strict=False):
        own = int(row["fold"] or best)
        held += row["fold"] == ""
        allowed = {number[g] for g, f in zip(groups, fold, strict=True) if f >= 0 and f != own} - {number[row["group"]]}
        assert len(found) == 3
        assert {int(each) for each in found} <= allowed
    assert held > 3


def test_the_map_is_that_of_explain_and_of_the_model_that_scored_the_film(reviewed: Path) -> None:
    """From the film through the whole tower, as `explain` does; the review starts from the cache's float16 tokens."""
    run = read_run(reviewed)
    folds = read_run(reviewed, "ensemble")
    root = Path(run.info["cache"]["dataset"]["root"])
    seen = set()
    for row in table(reviewed):
        if len(seen) == 4 or (part := row["fold"]) in seen:
            continue
        seen.add(part)
        member = run.members if part == "" else folds.members[int(part) : int(part) + 1]
        one = type(run)(folder=run.folder, info=run.info, members=tuple(member), chosen="", tta=None)
        expected = heatmaps.explain(one, root / row["image"], classes=[row["class"]]).maps[0].shares
        c = str(run.info["classes"].index(row["class"]))
        kept = [np.load(path) for path in (reviewed / "review").glob(f"{row['image_sha256'][:20]}.*.npz")]
        maps = [file[c] for file in kept if c in file.files]
        assert len(maps) == 1
        np.testing.assert_allclose(maps[0], expected, atol=3e-3 * expected.max())
        others = [each for k, each in enumerate(folds.members) if part and k != int(part)]
        for other in others:
            wrong = heatmaps.explain(
                type(run)(folder=run.folder, info=run.info, members=(other,), chosen="", tta=None),
                root / row["image"],
                classes=[row["class"]],
            )
            assert np.abs(wrong.maps[0].shares - maps[0]).max() > 3e-3 * expected.max()
    assert len(seen) == 4, "a fold or the hold-out was not looked at"


def test_without_the_cache_the_maps_come_from_the_films(toy_run: Path, reviewed: Path, tmp_path: Path) -> None:
    folder = copy_run(toy_run, tmp_path)
    info = read_info(folder)
    info["cache"]["path"] = str(tmp_path / "gone.h5")
    (folder / "run.json").write_text(json.dumps(info))
    name = table(reviewed)[0]["class"]
    found = write_review(folder, ReviewSpec(top=3, classes=(name,)))
    (said,) = found.missing
    assert said.startswith("nearest training films, label suspects, near twins and odd films: gone.h5: no such cache")
    assert found.whole
    assert '<ol class="near"' not in (folder / "review.html").read_text()
    same = 0
    for path in (folder / "review").glob("*.npz"):
        with np.load(path) as slow, np.load(reviewed / "review" / path.name) as fast:
            for key in slow.files:
                np.testing.assert_allclose(fast[key], slow[key], atol=3e-3 * slow[key].max())
                same += 1
    assert same > 3
    with pytest.raises(InputError, match=r"--cache: .*gone"):
        write_review(folder, ReviewSpec(cache=tmp_path / "gone.h5"))
    assert write_review(folder, ReviewSpec(top=3, classes=(name,), cache=Path(read_info(toy_run)["cache"]["path"])))
    assert '<ol class="near"' in (folder / "review.html").read_text()


def test_another_cache_is_refused(toy_run: Path, toy_cache_average: Path) -> None:
    with pytest.raises(InputError, match="is not the cache that this run was trained from"):
        write_review(toy_run, ReviewSpec(cache=toy_cache_average))
    assert not (toy_run / "review.html").exists()


def test_a_backbone_without_attention_to_show_has_films_and_no_maps(toy_run_average: Path, tmp_path: Path) -> None:
    folder = copy_run(toy_run_average, tmp_path)
    found = write_review(folder, ReviewSpec(top=1))
    assert found.missing[0] == "heat maps: the backbone averages its patches, so that nothing says where it looked."
    assert found.missing[1].startswith("odd films: no unlikeness: ")
    text = (folder / "review.html").read_text()
    assert 'class="map"' not in text
    assert 'class="film f' in text


# ------------------------------------------------------------------------------------------------ interrupted, missing


def test_an_interrupted_review_goes_on(
    toy_run: Path, reviewed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read, done = copy_run(toy_run, tmp_path), pictures.Reader.read, list[str]()

    def some(self: pictures.Reader, name: str, sha256: str) -> pictures.ReadFilm:
        if len(done) == 40:
            raise KeyboardInterrupt
        done.append(name)
        return read(self, name, sha256)

    monkeypatch.setattr(pictures.Reader, "read", some)
    monkeypatch.setattr(pictures, "BATCH", 4)
    with pytest.raises(KeyboardInterrupt):
        write_review(folder, ALL)
    assert not (folder / "review.html").exists()
    kept = len(list((folder / "review").glob("*.webp")))
    assert kept >= 30
    monkeypatch.setattr(pictures.Reader, "read", lambda *a: done.append(a[1]) or read(*a))  # type: ignore[func-returns-value]
    write_review(folder, ALL)
    assert len(done) - 40 <= len(list((folder / "review").glob("*.webp"))) - kept
    assert (folder / "review.html").read_bytes() == (reviewed / "review.html").read_bytes()
    monkeypatch.setattr(pictures.Reader, "read", lambda *_: pytest.fail("a kept film is read again"))
    write_review(folder, ALL)
    for path in list((folder / "review").iterdir())[::7]:  # damage is made again
        path.write_bytes(path.read_bytes()[:20])
    monkeypatch.setattr(pictures.Reader, "read", read)
    write_review(folder, ALL)
    assert (folder / "review.html").read_bytes() == (reviewed / "review.html").read_bytes()


def test_films_that_are_missing_changed_or_elsewhere(toy_run: Path, reviewed: Path, tmp_path: Path) -> None:
    folder, films = copy_run(toy_run, tmp_path), tmp_path / "films"
    root = Path(read_info(toy_run)["cache"]["dataset"]["root"])
    shutil.copytree(root / "images", films)
    rows = table(reviewed)
    names = list(dict.fromkeys(Path(row["image"]).name for row in rows))
    (films / names[0]).unlink()
    shutil.copy(films / names[2], films / names[1])
    result = cxr("review", folder, "--images", films, "--top", 1000)
    assert result.exit_code == 1
    assert "missing: pictures of 1 film: not found; give the folder of the films with --images" in result.stderr
    assert "missing: pictures of 1 film: changed since it was cached" in result.stderr
    assert [row["image"] for row in table(folder)] == [row["image"] for row in rows], "the rest is there"
    page = page_of(folder)
    rows = whole_table(folder)
    assert page.text.count("no picture: not found") == sum(row["image"].endswith(names[0]) for row in rows)
    assert page.text.count("no picture: changed since") == sum(row["image"].endswith(names[1]) for row in rows)
    assert "Pictures of 1 film: changed since it was cached" in page.text
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.rmtree(folder / "review")
    result = cxr("review", folder, "--images", empty, "--top", 1)
    assert result.exit_code == 1
    assert page_of(folder).text.count("no picture: not found") == len(whole_table(folder)) > 10


def test_marks_in_the_list_of_suspects_are_not_written_over(toy_run: Path, reviewed: Path, tmp_path: Path) -> None:
    folder = copy_run(toy_run, tmp_path)
    shutil.copytree(reviewed / "review", folder / "review")
    path, few = folder / "suspects.csv", ReviewSpec(top=1, twins=False)
    write_review(folder, few)
    first = path.read_bytes()
    assert len(first.splitlines()) > 50
    assert not (folder / "near_twins.csv").exists()
    assert "twins" not in page_of(folder).sections
    path.write_bytes(b"")
    write_review(folder, few)
    assert path.read_bytes() == first, "an empty or unmarked list is made again"
    marked = first.replace(b",\r\n", b",flip\r\n", 2).replace(b",flip", b",", 1)
    assert marked != first
    path.write_bytes(marked)
    write_review(folder, few)
    assert path.read_bytes() == marked
    assert "suspects.csv holds marks and was left as it was" in page_of(folder).text


def test_mistakes_are_one_line(toy_run: Path, tmp_path: Path) -> None:
    assert not (toy_run / "report.html").exists()
    for words, said in [
        ((toy_run, "--class", "qqq"), "--class: this run has no 'qqq'; its classes: Airspace"),
        ((tmp_path,), "not a run folder"),
        ((toy_run, "--top", 0), "--top"),
        ((toy_run, "--link"), "--link: "),
    ]:
        result = cxr("review", *words)
        assert result.exit_code == 2, words
        assert said in result.stderr
        assert len(result.stderr.splitlines()) <= 2
    assert not (toy_run / "review").exists()


# ------------------------------------------------------------------------------------------------ what it may hold


def test_the_page_names_no_film_and_no_patient_and_says_what_it_is(reviewed: Path) -> None:
    text = (reviewed / "review.html").read_text()
    with np.load(reviewed / "predictions.npz") as file:
        names = {Path(name).name for name in file["image"].tolist()}
        groups = set(file["group"].tolist())
    plain = Page(text).text
    assert not [name for name in names if name in text or Path(name).stem in text]
    assert not [g for g in groups if re.search(rf"group {re.escape(g)}\b", plain) and not g.isdigit()]
    assert str(reviewed.parent) not in text
    assert "These are pictures of patients." in plain
    assert "Research use only" in plain
    assert "RANDOM BACKBONE" in plain or "PHANTOM IMAGES" in plain


@pytest.mark.usefixtures("sketched")
def test_the_report_links_the_page_only_where_asked(toy_run: Path, reviewed: Path, tmp_path: Path) -> None:
    folder = copy_run(toy_run, tmp_path)
    write_report(folder, resamples=0)
    shutil.copytree(reviewed / "review", folder / "review")
    assert "review" not in (folder / "report.html").read_text()
    write_review(folder, ReviewSpec(top=1))
    assert "review" not in (folder / "report.html").read_text()
    for _ in range(2):
        write_review(folder, ReviewSpec(top=1, link=True))
        report = Page((folder / "report.html").read_text())
        assert [named["href"] for tag, named in report.tags if tag == "a"].count("review.html") == 1


def test_the_page_asks_for_nothing(reviewed: Path) -> None:
    page = page_of(reviewed)
    assert page.requests() == []
    policies = [named["content"] for tag, named in page.tags if tag == "meta" and "http-equiv" in named]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]


STEPS = """(function () {
  var out = {}, all = document.querySelectorAll(".card");
  function shown() { return Array.prototype.filter.call(all, function (c) { return !c.hidden; }); }
  function press(key) { document.dispatchEvent(new KeyboardEvent("keydown", {key: key, bubbles: true})); }
  function choose(by, value) {
    var select = document.querySelector("select[data-by=" + by + "]");
    select.value = value;
    select.dispatchEvent(new Event("change"));
  }
  out.all = shown().length;
  out.bar = !document.getElementById("bar").hidden;
  choose("k", "false negative"); choose("p", "holdout");
  out.filtered = shown().map(function (c) { return c.id; });
  press("j"); press("j"); press("k"); press("ArrowRight");
  out.at = document.activeElement.id;
  press("2");
  out.csv = window.review.csv();
  var marked = document.activeElement.dataset, sha = marked.sha, of = marked.class, label = marked.label;
  function relabel(value) {
    document.querySelectorAll(".card").forEach(function (c) {
      if (c.dataset.sha === sha && c.dataset.class === of) c.dataset.label = value;
    });
  }
  relabel(label === "1" ? "0" : "1");
  out.corrected = window.review.csv();
  relabel(label);
  out.pressed = document.activeElement.querySelectorAll("button[aria-pressed=true]").length;
  press("h");
  out.maps = getComputedStyle(document.querySelector(".map")).opacity;
  press("h");
  choose("m", "marked");
  out.marked = shown().length;
  choose("m", ""); choose("k", ""); choose("p", "");
  var film = document.querySelector(".card > .film");
  film.click();
  out.tapped = getComputedStyle(film.querySelector(".map")).opacity;
  out.ratio = film.offsetHeight / film.offsetWidth;
  document.getElementById("save").click();
  out.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  return out;
})()"""


def test_a_browser_filters_steps_marks_and_saves(reviewed: Path, tmp_path: Path) -> None:
    rows = table(reviewed)
    cards = {row["card"] for row in whole_table(reviewed)}
    found = browse(reviewed / "review.html", tmp_path, STEPS)
    assert found["wrong"] == []
    assert [name for name in found["asked"] if not name.startswith(("data:", "blob:"))] == []
    did: dict[str, Any] = found["found"]
    # A mark of a label that was corrected since is not saved: it would turn the correction back.
    assert did["corrected"] == "card,image_sha256,class,label,mark\r\n"
    assert did["bar"]
    assert did["all"] == len(cards)
    wanted = [row for row in rows if row["kind"] == "false negative" and row["part"] == "holdout"]
    assert did["filtered"] == [f"card-{row['card']}" for row in wanted]
    assert len(wanted) > 1
    second = wanted[1]
    assert did["at"] == f"card-{second['card']}"
    assert did["csv"] == (
        "card,image_sha256,class,label,mark\r\n"
        f"{second['card']},{second['image_sha256']},{quoted(second['class'])},1,flip\r\n"
    )
    (tmp_path / "marks.csv").write_text(did["csv"], newline="")
    (mark,) = read_corrections(tmp_path / "marks.csv").marks
    assert (mark.sha256, mark.name, mark.label, mark.mark) == (second["image_sha256"], second["class"], 1, "flip")
    assert did["pressed"] == 1
    assert did["marked"] in (1, 2), "the same film and class may be a suspect too"
    assert (did["maps"], did["tapped"]) == ("1", "1")
    assert did["wide"] <= 0, "the page scrolls sideways"
    assert did["ratio"] == pytest.approx(1, abs=0.02), "phantoms are square"


def quoted(cell: str) -> str:
    return f'"{cell}"' if "," in cell else cell
