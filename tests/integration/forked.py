"""Runs the command line of any cxr_fast, of any layout, in forks of one process that has imported the libraries.

torch, timm and scikit-learn take five seconds to import, and the record runs 190 commands. Nothing of cxr_fast is
imported before a fork, and nothing here imports it: the folder that holds the package is named with each command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS = 300  # after which a command is killed

LAUNCHER = """
import atexit, gc, importlib, json, os, signal, sys, threading, traceback
if sys.platform == "linux":  # on one core: the package asks how many it may use
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, [cores[os.getpid() % len(cores)]])
for name in ("numpy", "h5py", "scipy.stats", "sklearn.metrics", "matplotlib.figure", "open_clip.timm_model", "onnx"):
    importlib.import_module(name)
gc.freeze()
for line in iter(sys.stdin.readline, ""):
    job = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    signal.alarm(job["seconds"])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY), number)
    sys.stdin, sys.argv = open(0, closefd=False), ["cxrfast", *job["arguments"]]
    sys.path.insert(0, job["package"])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [job["package"], os.environ.get("PYTHONPATH")]))
    code = 1
    try:
        try:
            from cxr_fast.cli.main import main
        except ImportError:
            from cxr_fast.cli import main
        exec(job["before"])
        main(prog_name="cxrfast")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an ordinary end would take all those libraries apart, for two seconds
os._exit(0)
"""


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a command ended; negative: the signal that killed it."""

    code: int
    stdout: str
    stderr: str


class Commands:
    """Runs `cxrfast` commands in `folder`, on one thread, without a GPU or a hub. Use as a context manager.

    `scratch` is a folder for what they say.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.scratch = scratch
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        plain = {"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1", "PYTHONHASHSEED": "0"}
        environment = {**os.environ, **one, **plain, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", LAUNCHER], cwd=folder, env=environment, **pipes)  # type: ignore[call-overload]

    def run(self, package: Path, arguments: Sequence[str], *, stdin: str = os.devnull, before: str = "") -> Done:
        """Run `cxrfast ARGUMENTS` of `package`/cxr_fast; `before` is Python that the command's process runs first."""
        assert (package / "cxr_fast" / "__init__.py").is_file(), package
        out, err = self.scratch / "stdout", self.scratch / "stderr"
        said = {"stdin": stdin, "stdout": str(out), "stderr": str(err)}
        job = {"package": str(package), "arguments": [*arguments], "before": before, "seconds": SECONDS, **said}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        code = self.process.stdout.readline()
        assert code, "the process that forks has died; its stderr says why"
        return Done(code=int(code), stdout=out.read_text(), stderr=err.read_text())

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
