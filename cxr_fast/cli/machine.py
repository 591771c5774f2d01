"""The command that looks at this machine: parse, call one function, print."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..system.files import write_json
from .options import PATH


@click.command()
@click.option("--deep", is_flag=True, help="Also import torch, make a CUDA tensor, and run a session on each provider.")
@click.option("--json", "json_out", type=PATH, help="Write the findings here.")
def doctor(deep: bool, json_out: Path | None) -> None:
    """Say what this machine and installation can do.

    Each line begins with ok, -- (absent and optional) or !! (needed and wrong: exit 1).
    """
    from .doctor import describe, examine, healthy, to_json

    findings = examine(deep=deep)
    click.echo(describe(findings))
    if json_out is not None:
        write_json(json_out, to_json(findings), "--json")
        click.echo(f"wrote {json_out}")
    sys.exit(0 if healthy(findings) else 1)
