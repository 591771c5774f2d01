"""Commands killed at random moments, and disks after a power cut: is every result that of an undisturbed run?

    python benchmarks/run_crashes.py                            # all scenarios; about an hour of one core
    python benchmarks/run_crashes.py --scenario cache --trials 5 --cuts 5 --ends 5

`--scenario WORD` takes those with this word in their name. Each scenario runs a real `cxrfast` command on toy data
(`crashes/scenarios.py`), undisturbed twice, then

- `--trials` times killed one to three times, half of the kills at a random moment, half in place of a random change of
  a file, and run to its end;
- `--cuts` times from a disk after a power cut at a random change, every second time cut again on the way, and run to
  its end;
- `--ends` times looked at after a power cut that comes right after the command has ended.

`crashes/disk.py` says what is assumed of a disk, `crashes/contents.py` what is compared. Power cuts, and kills in place
of a change, need Linux and a C compiler (`crashes/recorder.c`); without them they are left out, and a line says so.
The same seed draws the same trials. Exit code 1 where anything was wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import common
from crashes.campaign import ENDED, STAGES, Bench, Tally
from crashes.processes import Commands, NoCompiler, build_recorder
from crashes.scenarios import ALL, Inputs

HEAD = (
    "scenario",
    "s",
    "changes",
    "kills: " + " / ".join(STAGES),
    "wrong",
    "cuts",
    "wrong",
    "cuts after the end",
    "lost",
)


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The campaign; a row a scenario as soon as it is done."""
    chosen = [scenario for scenario in ALL if not args.scenario or args.scenario in scenario.name]
    if not chosen:
        raise SystemExit(f"--scenario: none of {', '.join(scenario.name for scenario in ALL)}")
    began, folder = time.perf_counter(), scratch.resolve()
    try:
        recorder, why = build_recorder(folder), ""
    except NoCompiler as error:
        recorder, why = None, str(error)
        print(f"no power cuts, and kills at random moments only: {why}")
    rows: dict[str, Any] = {}
    with Commands(folder, folder / "said", recorder) as commands:
        (folder / "in").mkdir()
        Inputs(commands, folder / "in", chosen, lambda text: print(f"inputs: {text}", file=sys.stderr)).make()
        for scenario in chosen:
            rows[scenario.name] = _row(Bench(commands, folder, scenario, args.seed), args)
    print("\n" + table(rows))
    wrong = sum(len(row[kind]["wrong"]) for row in rows.values() for kind in ("kills", "cuts", "ends"))
    print(f"{wrong} wrong")
    seconds = time.perf_counter() - began
    return {"seed": args.seed, "not recorded": why, "seconds": seconds, "scenarios": rows, "wrong": wrong}


def _row(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    reference, out = bench.reference, {"seconds": bench.reference.seconds, "changes": bench.reference.changes}
    cut = bool(reference.records)
    for kind, count, trial in (
        ("kills", args.trials, bench.kill_trial),
        ("cuts", args.cuts * cut, bench.cut_trial),
        ("ends", args.ends * cut, bench.end_trial),
    ):
        tally = Tally()
        for number in range(count):
            trial(number, tally)
        out[kind] = tally.to_json()
    wrong = [each for kind in ("kills", "cuts", "ends") for each in out[kind]["wrong"]]
    print(f"{bench.scenario.name}: {len(wrong)} wrong" + "".join(f"\n  {each}" for each in wrong[:5]), flush=True)
    return out


def table(rows: dict[str, Any]) -> str:
    """Markdown, a row a scenario and their sums."""
    lines, sums = [], [0] * 9
    for name, row in rows.items():
        stages = [row["kills"]["stages"][stage] for stage in STAGES]
        cuts = [row["cuts"]["stages"][stage] for stage in STAGES if stage != ENDED]
        figures = [
            *stages, len(row["kills"]["wrong"]), sum(cuts), len(row["cuts"]["wrong"]), row["ends"]["trials"],
            len(row["ends"]["wrong"]),
        ]  # fmt: skip
        sums = [a + b for a, b in zip(sums, figures, strict=True)]
        lines.append([name, f"{row['seconds']:.1f}", str(row["changes"]), *_cells(figures)])
    return common.table(HEAD, [*lines, ["all", "", "", *_cells(sums)]])


def _cells(figures: list[int]) -> list[str]:
    return [" / ".join(map(str, figures[:4])), *map(str, figures[4:])]


if __name__ == "__main__":
    result = common.run(measure, "crashes", __doc__, trials=20, cuts=20, ends=5, scenario=str, seed=0)
    sys.exit(1 if result["wrong"] else 0)
