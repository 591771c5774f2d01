"""Settings of an earlier cache, or of that of a run, for another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ...errors import InputError


def as_in_cache(ctx: click.Context, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a command, with those that were not given taken from the cache of --from, or of that run: encoder,
    pixels, and label rules."""
    command_line = click.core.ParameterSource.COMMANDLINE
    if ctx.get_parameter_source("recipe") == command_line:
        raise InputError("--from and --recipe each name all settings; leave one of them out.")
    meta = _cache_meta(flags["earlier"])
    rules = meta["dataset"].get("label_rules", {})
    own = {**meta["spec"], **meta["spec"]["preprocess"], **{k: rules[k] for k in ("blank", "uncertain") if k in rules}}
    own["views"] = ",".join(own["views"])
    return dict(flags) | {
        name: value for name, value in own.items() if name in flags and ctx.get_parameter_source(name) != command_line
    }


def _cache_meta(path: Path) -> Mapping[str, Any]:
    """What a cache records of itself; for a run folder, its run.json or an unfinished run, that of its cache."""
    from ...activations.cache import open_cache
    from ...runs.request import read_request
    from ...training.run_folder import read_info

    folder = path.parent if path.name in ("run.json", "plan.json") else path
    if (folder / "run.json").is_file():
        meta: Mapping[str, Any] = read_info(folder)["cache"]
        return meta
    if (folder / "plan.json").is_file():
        path = read_request(folder).existing_cache() or path
    return open_cache(path, partial=True).meta
