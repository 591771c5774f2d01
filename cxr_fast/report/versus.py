"""Several runs on one page: beside each other, then each against the first on the images both scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import NOTICE
from . import charts
from .html import (
    NONE,
    Cell,
    Lines,
    contents,
    count_cell,
    document,
    figure_cell,
    note,
    number,
    of_classes,
    paragraph,
    picture,
    section,
    table,
    text,
    value_cell,
)
from .page import missing as told_missing
from .summary import FIGURES

Runs = Mapping[str, Mapping[str, Any]]


def page(
    runs: Runs,
    evaluations: Mapping[str, Mapping[str, Any] | None],
    pairs: Mapping[str, Mapping[str, Any]],
    missing: Sequence[str],
) -> bytes:
    """The whole page. `pairs` holds, by the other run's name, what `compare` says of it against the first."""
    first = next(iter(runs))
    sections = [
        beside(runs, evaluations, paired=bool(pairs)),
        *(against(first, name, pair, number_) for number_, (name, pair) in enumerate(pairs.items(), start=1)),
        settings(runs),
    ]
    sections = [part for part in sections if part]
    title = f"Comparison of {len(runs)} runs"
    parts = [
        "<header>",
        f"<h1>{text(title)}</h1>",
        paragraph(NOTICE, "note"),
        *(paragraph(_warning(name, run), "warn") for name, run in runs.items() if run["provenance"]),
        *(paragraph(summary(first, name, pair), "lead") for name, pair in pairs.items()),
        told_missing(missing),
        contents(sections),
        "</header>",
        "<main>",
        *sections,
        "</main>",
        f'<footer><p class="note">{text(NOTICE)}</p></footer>',
    ]
    return document(f"cxr-fast: {title}", "\n".join(part for part in parts if part))


def _warning(name: str, run: Mapping[str, Any]) -> str:
    return f"{name}: {run['provenance']}. Its figures say nothing about real radiographs or real BiomedCLIP."


def summary(first: str, other: str, pair: Mapping[str, Any]) -> str:
    """One sentence: the difference in macro AUC, and whether the interval leaves room for none."""
    found = pair["figures"]["macro_auc"]
    if found["difference"] is None:
        return f"{other} against {first}: no class has an AUC on the images both scored."
    said = "a difference" if charts.excludes_zero(found) else "no clear difference: the interval holds 0"
    if found["low"] is None:
        said = "without an interval, which the images are too few for"
    return (
        f"On the {pair['images']:,} {_part(pair)} images both scored, macro AUC of {other} is {number(found['b'])} "
        f"and of {first} {number(found['a'])}: {difference_text(found)}, {said}."
    )


def difference_text(found: Mapping[str, Any]) -> str:
    """`+0.012 [-0.003, +0.027]`."""
    if found["difference"] is None:
        return NONE
    return f"{_signed(found['difference'])} {_brackets(found)}".strip()


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _brackets(found: Mapping[str, Any]) -> str:
    return "" if found["low"] is None else f"[{_signed(found['low'])}, {_signed(found['high'])}]"


def _difference_cell(found: Mapping[str, Any]) -> Cell:
    if found["difference"] is None:
        return Cell(text=NONE)
    return Cell(text=_signed(found["difference"]), sort=found["difference"], interval=_brackets(found))


def _part(pair: Mapping[str, Any]) -> str:
    return "held-out" if pair["part"] == "holdout" else "out-of-fold"


def beside(runs: Runs, evaluations: Mapping[str, Mapping[str, Any] | None], *, paired: bool) -> str:
    """Each run's own figures, on its own images."""
    found: dict[str, Mapping[str, Any] | None] = {}
    kinds = []
    for name, evaluation in evaluations.items():
        parts = {} if evaluation is None else evaluation["parts"]
        kind = next((kind for kind in ("holdout", "out_of_fold") if parts.get(kind)), None)
        found[name] = parts[kind] if kind else None
        kinds.append({"holdout": "hold-out", "out_of_fold": "out of fold"}.get(kind or "", NONE))
    rows: Lines = [
        ["Dataset", *(str(run["cache"]["dataset"]["name"]) for run in runs.values())],
        ["Final model", *(str(run["final"]["kind"]) for run in runs.values())],
        ["Epochs chosen", *(count_cell(run["chosen"]["epochs"]) for run in runs.values())],
        ["Figures on", *kinds],
        ["Images", *(count_cell(part["n"] if part else None) for part in found.values())],
        ["Classes with an AUC", *(of_classes(part) if part else NONE for part in found.values())],
    ]
    for key, title in FIGURES.items():
        rows.append(
            [title, *(figure_cell(part["figures"].get(key)) if part else Cell(text=NONE) for part in found.values())]
        )
    return section(
        "beside",
        "The runs beside each other",
        table(["figure", *runs], rows, caption="Figures of each run", show_caption=False),
        note(
            "Each run on its own images; intervals that overlap say little about a difference."
            + (" The paired comparison below uses the images both scored." if paired else "")
        ),
    )


def against(first: str, other: str, pair: Mapping[str, Any], place: int) -> str:
    """Headline differences and each class's, second minus first."""
    head = ["figure", first, other, "difference"]
    rows: Lines = []
    for key, title in FIGURES.items():
        if found := pair["figures"].get(key):
            rows.append([title, value_cell(found["a"]), value_cell(found["b"]), _difference_cell(found)])
    classes: Lines = [
        [
            str(row["class"]),
            count_cell(row["positives"]),
            value_cell(row["auc"]["a"]),
            value_cell(row["auc"]["b"]),
            _difference_cell(row["auc"]),
            _difference_cell(row["ap"]),
        ]
        for row in pair["per_class"]
    ]
    known = [row for row in pair["per_class"] if row["auc"]["difference"] is not None]
    sure = sum(row["auc"]["low"] is not None for row in known)
    columns = ["class", "positives", f"AUC, {first}", f"AUC, {other}", "difference", "difference in AP"]
    return section(
        f"pair{place}",
        f"{other} minus {first}",
        table(head, rows, caption=f"Differences in the figures, {other} minus {first}", show_caption=False),
        note(_how(pair)),
        table(columns, classes, caption=f"Differences by class, {other} minus {first}", css="full sortable"),
        picture(
            f"Difference in AUC of each class, {other} minus {first}",
            charts.differences(pair["per_class"], (first, other)) if known else None,
            f"Right of the line {other} is better. "
            + (
                f"Orange: the interval holds no 0; of {sure} classes without any difference about "
                f"{sure * (1 - pair['level']):.1f} would be orange by chance."
                if sure
                else "No class is in enough groups for an interval."
            ),
        ),
    )


def _how(pair: Mapping[str, Any]) -> str:
    return (
        f"{pair['images']:,} {_part(pair)} images of {pair['groups']:,} groups in common; {pair['only_a']:,} and "
        f"{pair['only_b']:,} in one run alone are left out. {100 * pair['level']:.0f} % intervals from "
        f"{pair['resamples']:,} paired bootstrap resamples of {pair['unit']}s, seed {pair['seed']}: both runs are "
        "scored on the same resamples."
    )


def settings(runs: Runs) -> str:
    """What was set differently in the runs."""
    flat = {name: _settings(run) for name, run in runs.items()}
    keys = list(dict.fromkeys(key for each in flat.values() for key in each))
    rows = [
        [key, *(each.get(key, NONE) for each in flat.values())]
        for key in keys
        if len({each.get(key) for each in flat.values()}) > 1
    ]
    if not rows:
        return section("settings", "Settings that differ", note("None: the same data, cache and settings."))
    return section(
        "settings",
        "Settings that differ",
        table(["setting", *runs], rows, caption="Settings that differ", css="words", show_caption=False),
    )


def _settings(run: Mapping[str, Any]) -> dict[str, str]:
    spec = {key: value for key, value in run["spec"].items() if key != "train"}
    cache = run["cache"]
    out = {"weights": cache["weights"], "cache": cache["fingerprint"][:16], "labels from": cache["labels_from"]}
    out |= {**spec, **run["train"], "device": run["device"], "precision used": run["precision"]}
    out |= {"unfreeze_blocks": run["unfreeze_blocks"], **run["preprocess"], "written by": run["written_by"]}
    return {key: str(value) for key, value in out.items()}
