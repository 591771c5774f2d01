"""The sweep that users see: `SweepJob` with the report that the command leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError
from ..report import writer
from ..training.folds.fold import OnEpoch
from ..training.sweep import SweepJob


class Sweep(SweepJob):
    """One search over one cache. `plan` says what will happen; `run` does it and writes the run folder and its report.

    `out` None takes the first free name of `exports/CACHE`, `exports/CACHE-2`, ...; an unfinished run of the same
    request counts as free and is continued. `manifest` brings other labels; `head` and `loss` are your own. With
    `trainers` (a cluster's) folds and refit are trained there and all else happens here; on CPUs the figures are a
    local run's to the last bit.

        >>> spec = SweepSpec(epochs=(1,), folds=2)
        >>> sweep = Sweep("cache/indiana.h5", "exports/short", spec, SweepOptions(device="cpu"))
        >>> sweep.plan().folds
        2
        >>> sweep.run()["final"]["kind"]
        'best-fold'
        >>> (sweep.out / "report.html").is_file()
        True
    """

    def run(self, on_epoch: OnEpoch | None = None, *, report: bool = True) -> dict[str, Any]:
        """Train every fold, choose on validation alone, score the hold-out once; the run as a dict.

        `on_epoch(configuration, fold, epoch)` is called after each epoch, `epoch` with its number, losses and
        validation macro AUC; one call at a time. `report` False leaves the report out:
        `write_report` writes it later. Raises what `SweepJob.run` and `write_report` raise.
        """
        run = super().run(on_epoch)
        if report:
            self.write_report()
        return run

    def write_report(self) -> writer.Written:
        """Write the report of the finished run into its folder, as `cxrfast sweep` and `cxrfast report` do.

        Raises InputError where a file cannot be written; the run itself is complete.
        """
        return report_run(self.out)


def report_run(out: Path) -> writer.Written:
    """Write the report of a finished run into its folder. Raises InputError where a file cannot be written."""
    try:
        return writer.write_report(out)
    except InputError as error:
        raise InputError(f"{error} The run is complete; `cxrfast report {out}` writes its report.") from error
