"""The commands on broken files, away from pytest: a crash or a hang is seen, and takes nobody along.

Where ONNX Runtime may get to see the damage each call is a process of its own, forked from one that has everything
imported, and ends as the installed script does; elsewhere click's runner stands for it, in half the time. A line of
JSON a file; the last name begun is where the worker itself was lost.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from cxr_fast.cli.main import main
from cxr_fast.inference import batch, verify

IMPORTED = (batch, verify)  # before the forks: the commands do so themselves

MEMORY = 16 << 30
SECONDS = 20
# How many broken things there are at least, by the test that makes them; each asserts its own.
LEAST = {"flips": 240, "cuts": 98, "swaps": 85, "entries": 170, "graphs": 110, "sealed": 60, "odd": 60, "images": 920}


def call(arguments: list[str]) -> dict[str, Any]:
    """Exit code (negative: the signal that killed it), what it wrote and seconds of `cxrfast ARGUMENTS`."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.monotonic()
        with warnings.catch_warnings():  # Python 3.12 warns of threads; the child only runs one command and ends
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            _become(arguments, out.fileno(), err.fileno())
        _, status = os.waitpid(child, 0)
        told = {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - began}
        for name, file in (("out", out), ("err", err)):
            file.seek(0)
            told[name] = file.read().decode("utf-8", "replace")
        return told


def _become(arguments: list[str], out: int, err: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115  pytest has its own
    code: Any = 1
    try:
        main(arguments, prog_name="cxrfast")
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def call_inside(arguments: list[str]) -> dict[str, Any]:
    """The same without a process of its own."""
    began = time.monotonic()
    told = CliRunner().invoke(main, arguments)
    lost = told.exception is not None and not isinstance(told.exception, SystemExit)
    trace = "".join(traceback.format_exception(told.exception)) if lost else ""
    seconds = time.monotonic() - began
    return {"code": told.exit_code, "seconds": seconds, "out": told.stdout, "err": told.stderr + trace}


def run(how: Callable[[list[str]], dict[str, Any]], folder: Path, films: list[str]) -> None:
    """Each file or folder in `folder` through `predict` and `verify`; the table, where there is one, as its lines."""
    table = Path(tempfile.mkdtemp()) / "p.csv"
    quick = ["--device", "cpu", "--threads", "1"]
    for path in sorted(folder.iterdir()):
        print(json.dumps({"begins": path.name}), flush=True)
        found = {
            "predict": call(
                ["predict", str(path), *films, "--out", str(table), "--workers", "1", "--overwrite", *quick]
            ),
            "verify": how(["verify", str(path), *quick]),
            "table": table.read_text().splitlines() if table.exists() else None,
        }
        table.unlink(missing_ok=True)
        print(json.dumps({"name": path.name, **found}), flush=True)


if __name__ == "__main__":
    run({"apart": call, "inside": call_inside}[sys.argv[1]], Path(sys.argv[2]), sys.argv[3:])
