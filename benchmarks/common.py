"""What the drivers share: options, rounds in turn, fresh processes, the result file, and tables filled into a text."""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import operator
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cxr_fast
from cxr_fast.bench import measure as timing
from cxr_fast.system import hardware

HERE = Path(__file__).resolve().parent
ROOT, RESULTS = HERE.parent, HERE / "results"
spread = timing.spread
# Any `cxrfast` command, with its largest resident size as the last line. Both homes of `main` are tried, so that an
# older checkout runs too. VmHWM, because getrusage's figure outlives exec and would show the parent's.
COMMAND = """
import sys
try:
    from cxr_fast.cli.main import main
except ModuleNotFoundError:
    from cxr_fast.cli import main
try:
    main(sys.argv[1:], standalone_mode=False)
finally:
    print(*[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")])
"""


# A driver from its options to its result.


def run(
    measure: Callable[[argparse.Namespace, Path], dict[str, Any]], name: str, doc: str, **options: Any
) -> dict[str, Any]:
    """Write what `measure(args, scratch)` returns as `results/NAME-DEVICE-DATE.json`, or where --json says; return it.

    Each of `options` becomes a flag: a tuple names its choices, the first the default; a list is its default and the
    number of values; a type has no default; any other value is the default.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, value in (options | {"scratch": Path, "json": Path}).items():
        if isinstance(value, bool):
            how: dict[str, Any] = {"action": argparse.BooleanOptionalAction, "default": value}
        elif isinstance(value, tuple):
            how = {"choices": value, "default": value[0]}
        elif isinstance(value, list):
            how = {"nargs": len(value), "type": type(value[0]), "default": value}
        else:
            how = {"type": value} if isinstance(value, type) else {"type": type(value), "default": value}
        parser.add_argument("--" + option.replace("_", "-"), **how)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        result = {"name": name, **environment(), **measure(args, Path(scratch))}
        save(result, args.json)
    return result


def environment() -> dict[str, Any]:
    """Date, commit, library versions and machine."""
    import numpy
    import torch

    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "versions": {"cxr-fast": cxr_fast.__version__, "torch": torch.__version__, "numpy": numpy.__version__},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "machine": hardware.machine(),
    }


def commit() -> str | None:
    """Short revision of this checkout; None where it is a copy without one, or git is not installed."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


def save(result: dict[str, Any], out: Path | None) -> None:
    """Write the result, and print it as the last line."""
    machine = result["machine"]
    device = re.sub(r"[^a-z0-9]+", "-", str(result["gpu"] or machine["cpu"]).lower()).strip("-")
    path = out or RESULTS / f"{result['name']}-{device}-{machine['cores']}c-{result['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path.name}\n{json.dumps(result)}")


# Measuring.


def turns(arms: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """The figures that each arm returns, in interleaved rounds; and what other processes took of the machine."""
    samples: dict[str, list[Any]] = {name: [] for name in arms}
    with hardware.OtherCpu() as others:
        for _ in range(rounds):
            for name, arm in arms.items():
                samples[name].append(arm())
    if others.noisy:
        print(f"NOISY: other processes took {others.share:.0%} of the machine")
    return samples, {"share": others.share, "noisy": others.noisy}


def seconds(call: Callable[..., object], *args: Any, **named: Any) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    call(*args, **named)
    return time.perf_counter() - began


def by_key(samples: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Samples of several figures each, by figure."""
    return {key: [each[key] for each in samples] for key in samples[0]}


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def spreads(samples: Mapping[str, Sequence[float]], unit: str) -> dict[str, dict[str, float | int]]:
    """n, median, minimum and maximum of each, printed as a table."""
    found = {name: spread(values) for name, values in samples.items()}
    width = max(map(len, [unit, *found]))
    print(f"{unit:{width}}  {'median':>10}  {'min':>10}  {'max':>10}   n")
    for name, s in found.items():
        print(f"{name:{width}}  {s['median']:10.4g}  {s['min']:10.4g}  {s['max']:10.4g}  {s['n']:2d}")
    return found


def python(code: str, *words: object, root: Path = ROOT) -> str:
    """What `code` prints in a fresh process with the package of `root`; SystemExit with its errors where it fails."""
    path = os.pathsep.join(filter(None, [str(root), str(HERE), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-c", code, *map(str, words)]  # -P: no package of the working folder
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})
    if done.returncode:
        raise SystemExit(f"{' '.join(command[4:])}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def cxrfast(*words: object, root: Path = ROOT) -> tuple[float, int]:
    """Seconds of a command in a fresh process, from start to end, and its peak resident memory in bytes."""
    began = time.perf_counter()
    last = python(COMMAND, *words, root=root).splitlines()[-1]
    return time.perf_counter() - began, int(last) * 1024


def peak_memory() -> int:
    """This process's largest resident size so far, in bytes; getrusage's outlives exec and would show the parent's."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024


# The network's arithmetic, a multiply-add counted as two.


def block_flops(tokens: int, width: int, mlp: int) -> float:
    """A whole block, forward: queries, keys, values, projection and MLP; then the scores and the sums they weigh."""
    return 2 * tokens * (4 * width**2 + 2 * width * mlp) + 4 * tokens**2 * width


def tail_flops(
    shape: tuple[int, int, int, int], blocks: int, head: Sequence[int], *, class_token: bool = True
) -> tuple[float, float]:
    """(a training sample, forward alone) of `blocks` >= 1 trained blocks, projection and head.

    `shape`: tokens, width, MLP width, heads. `head`: its widths, the embedding first and the classes last. With
    `class_token` the last block answers for one query, so no token's key or value is made. Backward is twice forward;
    once for the projection, which is frozen; and less by the first block's queries, keys and values, which send no
    gradient on to its input.
    """
    tokens, width, mlp, heads = shape
    alone = 8 * width**2 + 4 * width * mlp + 4 * heads * tokens * width
    last = alone if class_token else block_flops(tokens, width, mlp)
    trained = (blocks - 1) * block_flops(tokens, width, mlp) + last
    layers, projection = 2 * sum(a * b for a, b in itertools.pairwise(head)), 2 * width * head[0]
    no_gradient = 6 * tokens * width**2 if blocks > 1 or not class_token else 0
    return 3 * (trained + layers) + 2 * projection - no_gradient, trained + layers + projection


# What docs/explanation/ and SCALE.md show of the results.


def results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Every result with its file's name, the newest first."""
    found = [json.loads(path.read_text(encoding="utf-8")) | {"file": path.name} for path in folder.glob("*.json")]
    return sorted(found, key=lambda result: (result["date"], result["file"]), reverse=True)


def figure(result: Mapping[str, Any], path: str) -> Any:
    """The value at `path`, keys with slashes between them."""
    return functools.reduce(operator.getitem, path.split("/"), result)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def between(text: str, name: str) -> str:
    """What a text has between its two markers of this name; SystemExit where it lacks one."""
    found = re.search(f"<!-- {name}: begin -->(.*)<!-- {name}: end -->", text, re.DOTALL)
    if found is None:
        raise SystemExit(f"no text between <!-- {name}: begin --> and <!-- {name}: end -->")
    return found[1].strip()


def filled(text: str, name: str, inside: str) -> str:
    """The text with `inside` between its two markers of this name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    between(text, name)
    return f"{text.partition(begin)[0]}{begin}\n\n{inside}\n\n{end}{text.partition(end)[2]}"
