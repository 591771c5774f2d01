"""Show how far a cache run is, and what it did."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ...system.text import duration
from ..console import ProgressBar, echo_notes, took
from ..dataset import echo_oddest


class CacheProgress:
    """The line of a cache run: images compared with their rows, then images encoded; `many`: by many machines,
    whose seconds do not add up to those that passed."""

    def __init__(self, *, many: bool) -> None:
        self.bar, self.many, self.compared = ProgressBar(), many, 0

    def compare(self, more: int, rows: int) -> None:
        """Show that `more` images were read and compared with the `rows` that the cache holds."""
        self.compared += more
        total, self.bar.whole = max(rows, self.compared), False
        self.bar.show(self.compared, total, f"{self.compared:,} of {total:,} images compared with their rows")

    def show(self, p: Any) -> None:
        """Show a `BuildProgress`."""
        self.bar.whole = True
        rate = p.encoded / max(self.bar.seconds if self.many else p.seconds, 1e-9)
        text = f"{p.done:,} of {p.total:,} images, {rate:.1f} images/s, waiting for {p.bottleneck}"
        # Not `done`, which counts a block once it is on the disk, while the next one is encoded.
        self.bar.show(p.before + p.encoded, p.total, text, before=p.before, seconds=None if self.many else p.seconds)


def echo_outcome(outcome: Any, path: Path, visual: Any) -> None:
    """What a cache run did, and the images least like the others; exit 1 where images failed."""
    from ...activations import build

    rate = f" ({outcome.encoded / max(outcome.seconds, 1e-9):.1f} images/s)" if outcome.encoded else ""
    encoded = f"encoded {outcome.encoded:,} images in {duration(outcome.seconds)}{rate}"
    click.echo(f"reused {outcome.reused:,}, {encoded}, {took()}: {path}")
    echo_notes(outcome.notes)
    echo_oddest(path, visual)
    noted = build.write_notes(path, outcome.noted)
    if outcome.noted:
        image, note = outcome.noted[0]
        click.echo(
            f"note: {len(outcome.noted):,} image(s) have a note in {noted}; the first, {image}: {note}", err=True
        )
    listing = build.write_errors(path, outcome.failed)
    if outcome.failed:
        click.echo(
            f"{len(outcome.failed):,} image(s) failed and will not be trained on, listed in {listing}:", err=True
        )
        for image, error in outcome.failed[:5]:
            click.echo(f"  {image}: {error}", err=True)
        sys.exit(1)
