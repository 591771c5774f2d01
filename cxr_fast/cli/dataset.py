"""What the screen says of a data set: its counts, its class table, what to know of its labels, the plan of a cache."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from ..system.text import Figure, Table, duration, gigabytes
from .console import Part, show_plan


def describe_words(counts: dict[str, int]) -> str:
    """How many images the column split gives to training and hold-out, and how many it leaves to be drawn."""
    words = {"train": "training", "holdout": "hold-out", "": "to be drawn"}
    return ", ".join(f"{text} {counts[word]:,}" for word, text in words.items() if word in counts)


def choose_columns(manifest: Any) -> Any:
    """Which columns of a dataset a report may show."""
    from ..metrics import subgroups

    columns = {subgroups.VIEW: manifest.views} | {f"meta:{name}": v for name, v in manifest.subgroups.items()}
    return subgroups.choose(columns, manifest.groups)


def describe_manifest(manifest: Any) -> list[Part]:
    """The counts of a dataset, its class table, and what to know of its label set."""
    from ..data.manifest import class_table, summary
    from ..metrics.subgroups import count_views

    total = summary(manifest)
    views = ", ".join(f"{name} {n:,}" for name, n in count_views(manifest.views, manifest.groups).items())
    parts: list[Part] = [
        f"{manifest.name} ({manifest.info.get('kind', 'manifest')}): {total['images']:,} images, "
        f"{total['studies']:,} studies, {total['groups']:,} groups",
        f"views: {views}",
        *([f"split: {describe_words(total['splits'])}"] if total["splits"] else []),
        f"{total['positives']:,} positives, {total['labels_an_image']:.3f} labels per image",
    ]
    if total["skipped_missing"]:
        parts.append(
            f"skipped {total['skipped_missing']:,} listed image(s) that are not below {os.path.abspath(manifest.root)}"
        )
    found = class_table(manifest)
    rows: list[list[Any]] = [
        [r.name, r.positives, Figure(value=r.percent, digits=2), r.negatives, r.unknown, r.groups] for r in found
    ]
    parts += ["", Table(columns=["class", "positives", "% of known", "negatives", "unknown", "groups"], rows=rows)]
    parts += describe_labels(manifest, [r.name for r in found if r.positives and not r.negatives])
    if not found:
        parts.append("No classes: name findings with --classes, or add a column for each to the written table.")
    elif manifest.info.get("kind") == "manifest":
        parts.append(f"Every other column is a class: {', '.join(manifest.classes)}. --classes A,B takes only some.")
    if manifest.info.get("kind") in ("indiana", "openi"):
        from ..data.labels import TRAPS

        known = set(manifest.classes)
        notes = [f"  {name}: {text}" for name, text in TRAPS if name in known or not name]
        parts += ["", "Know before you trust a class of this label set:", *notes]
    return parts


def describe_labels(manifest: Any, one_sided: Sequence[str]) -> list[Part]:
    """How blank and uncertain labels counted, and which classes, `one_sided`, that leaves without a negative."""
    from ..data.labels import RULED, SOFT, describe_rules
    from ..data.manifest import summary

    parts: list[Part] = []
    if said := describe_rules(manifest.info):
        ruled = manifest.info["kind"] in RULED
        parts += ["", f"{said} --blank and --uncertain change this." if ruled else said]
    elif soft := summary(manifest)["uncertain"]:
        parts += ["", f"{soft:,} uncertain labels are targets of {SOFT:g} in training and unknown in every figure."]
    if one_sided:
        named = ", ".join(one_sided[:5]) + (", ..." if len(one_sided) > 5 else "")
        mend = (
            "; --blank negative gives them some"
            if manifest.info.get("label_rules", {}).get("blank") == "unknown"
            else ""
        )
        parts.append(f"No negatives, so no AUC and nothing to learn from: {named}{mend}.")
    return parts


def show_cache_plan(plan: Any, manifest: Any, path: Path, shards: int | None) -> None:
    """What a cache run will do, before it starts."""
    from ..data.labels import describe_rules

    show_plan(describe_cache_plan(plan, manifest, path, shards))
    if said := describe_rules(manifest.info):
        click.echo(said)


def describe_cache_plan(plan: Any, manifest: Any, path: Path, shards: int | None) -> str:
    """Images, size, place, pixels, device and expected time of a cache run."""
    skipped, root = manifest.info["skipped_missing"], os.path.abspath(manifest.root)
    return (
        f"{plan.images:,} images x {plan.views} view(s) -> {path}{f' and {shards} shards' if shards else ''}: "
        f"{gigabytes(plan.bytes_needed)} "
        f"({gigabytes(plan.bytes_free)} free), {plan.size} x {plan.size} pixels, cut {plan.cut}, {plan.dtype}, "
        f"on {plan.device}"
        + (f"; {plan.rows_done:,} already there" if plan.rows_done else "")
        + (f"; the rows of {plan.rows_copied:,} from another cache" if plan.rows_copied else "")
        + (f"; {plan.rows_dropped:,} there are no longer listed and go" if plan.rows_dropped else "")
        + (f"; skipped {skipped:,} listed image(s) that are not below {root}" if skipped else "")
        + ("" if math.isnan(plan.seconds) else f"; expected time {duration(plan.seconds)}")
    )


def echo_oddest(path: Path, visual: Any) -> None:
    """Name the images of a cache that are least like the others."""
    from ..activations.cache import open_cache
    from ..unlikeness.oddest import describe_oddest
    from ..unlikeness.record import find_oddest

    try:
        found = find_oddest(open_cache(path), visual)
    except InputError:  # too few films, or the shards are on other machines
        return
    click.echo("least like the others, by unlikeness (one film in a hundred is over 1):")
    click.echo("\n".join(f"  {line}" for line in describe_oddest(found)))
