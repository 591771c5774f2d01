"""What a sweep was asked for, read back from its run folder, so that another sweep can be asked for the same."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import FORMER, PARTIAL, SweepSpec, from_dict, to_dict
from ..data.splits.given import EARLIER, LIST
from ..data.tables.corrections import describe_source
from ..errors import InputError, SchemaError
from ..training.run_folder import ABOUT, read_info

# Columns of the table of a grid that are results, not fields; `config` is the number of the configuration.
_RESULTS = frozenset({"config", "epochs", "mean_auc", "std_auc", "seconds", "chosen"})
_RARITY = frozenset(f"{tier}_{what}" for tier in ("head", "medium", "tail") for what in ("map", "classes"))


@dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """The settings of an earlier sweep: its spec, the flags of its grid, its cache, and where it is.

    `out` is where an unfinished run goes on; None for a finished one. `split_from` is a run whose hold-out and folds
    must be kept, because they were given by a list or a run that the record does not hold.
    """

    source: Path
    spec: SweepSpec
    grid: tuple[str, ...]
    cache: Path | None
    trials: int | None = None
    out: Path | None = None
    split_from: Path | None = None

    def existing_cache(self) -> Path | None:
        """The cache, None where it is not recorded. Raises InputError where it is not where it was."""
        if self.cache is not None and not self.cache.exists():
            raise InputError(f"--from: {self.cache}, the cache of {self.source}, is not there; name it: CACHE.")
        return self.cache

    def flags(self) -> dict[str, Any]:
        """Every setting by the name of its flag, with the text or value that the flag takes."""
        given = to_dict(self.spec)
        train = given.pop("train")
        values = {name: ",".join(map(str, v)) if isinstance(v, list) else v for name, v in {**given, **train}.items()}
        values["views"] = "plain,flip" if values.pop("flip") else "plain"
        values |= {"grid": self.grid, "trials": self.trials}
        if self.split_from is not None:
            values["split_from"] = str(self.split_from)
        return values


def read_request(path: Path) -> SweepRequest:
    """Read the settings of a run folder, its run.json, or an unfinished run `NAME.partial`.

    Raises InputError where it is neither, and for a run that flags alone cannot ask for again.
    """
    folder = path.parent if path.name in ("run.json", "plan.json") else path
    if folder.name.endswith(PARTIAL):
        return _unfinished(folder)
    run = read_info(folder)
    if custom := run.get("custom"):
        made = ", ".join(str(custom[part]) for part in ("head", "loss") if custom.get(part))
        raise InputError(f"--from: {folder} was trained with {made}, given in Python; no flag can ask for it.")
    given, search = (run.get("split") or {}).get("given", {}), run.get("search") or {}
    try:
        return SweepRequest(
            source=folder,
            spec=from_dict(SweepSpec, FORMER | run["spec"]),
            grid=tuple(search["grid"]) if search else grid_flags(read_points(run["grid"])),
            trials=search.get("trials"),
            cache=Path(run["cache"]["path"]),
            split_from=folder if given.keys() & {LIST, EARLIER} else None,
        )
    except (KeyError, TypeError, SchemaError) as error:
        raise InputError(f"--from: {folder / 'run.json'} cannot be read back ({error}).") from error


def lacking_labels(path: Path, given: Collection[str]) -> str:
    """The flags that gave a finished run other labels than its cache and are not among `given`; empty where none did.

    A record names a manifest or list, and does not hold it.
    """
    if path.name.endswith(PARTIAL) or path.name == "plan.json":
        return ""
    run, wanted = read_info(_folder(path)), {}
    made = run.get("corrections")
    source = run["cache"]["labels_from"].removesuffix(describe_source("", made))
    if source != "the cache":
        wanted["manifest"] = f"--manifest ({source})"
    if made:
        wanted["corrections"] = f"--corrections ({made['file']})"
    return " and ".join(text for name, text in wanted.items() if name not in given)


def _folder(path: Path) -> Path:
    return path.parent if path.name == "run.json" else path


def _unfinished(folder: Path) -> SweepRequest:
    try:
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        spec, flags = from_dict(SweepSpec, FORMER | plan["spec"]), grid_flags([dict(point) for point in plan["grid"]])
    except FileNotFoundError:
        raise InputError(f"--from: {folder} is not an unfinished run (no plan.json).") from None
    except (OSError, ValueError, KeyError, TypeError, SchemaError) as error:
        raise InputError(f"--from: {folder / 'plan.json'} cannot be read ({error}).") from error
    cache, trials = None, None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # an earlier version's names less, or nothing
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        cache = Path(about["cache"])
        flags, trials = tuple(about["grid"]), about["trials"]
    out = folder.with_name(folder.name.removesuffix(PARTIAL))
    return SweepRequest(source=folder, spec=spec, grid=flags, trials=trials, cache=cache, out=out)


def read_points(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each configuration of run.json's `grid` changed, in the order in which they were tried."""
    return [
        {name: value for name, value in row.items() if name not in _RESULTS | _RARITY}
        for row in sorted(rows, key=lambda row: row["config"])
    ]


def grid_flags(points: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """`NAME=A,B` for each field that the points of a grid change, in the order of their first values.

    >>> grid_flags([{"lr": 1e-05, "ema": 0.0}, {"lr": 2e-05, "ema": 0.0}])
    ('lr=1e-05,2e-05', 'ema=0.0')
    """
    names = list(points[0]) if points else []
    axes = {name: list(dict.fromkeys(_flag_text(point[name]) for point in points)) for name in names}
    return tuple(f"{name}={','.join(values)}" for name, values in axes.items())


def _flag_text(value: Any) -> str:
    """A value as --grid reads it."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def describe_changes(before: SweepRequest, spec: SweepSpec, grid: Sequence[str], trials: int | None) -> list[str]:
    """Name each setting that differs from an earlier sweep's: `lr 1e-05 instead of 2e-05`."""
    old, new = (to_dict(each) | to_dict(each.train) for each in (before.spec, spec))
    found = [
        f"{name} {_flag_text(new[name])} instead of {_flag_text(old[name])}"
        for name in new
        if name != "train" and new[name] != old[name]
    ]
    if tuple(grid) != before.grid:
        found.append(f"grid {' '.join(grid) or 'none'} instead of {' '.join(before.grid) or 'none'}")
    if trials != before.trials:
        found.append(f"trials {_flag_text(trials)} instead of {_flag_text(before.trials)}")
    return found
