"""`cxrfast` commands as processes that can be killed: forks of one process that has imported the libraries.

torch, timm and scikit-learn take seconds to import; a command on toy data takes less. Each fork is a process group of
its own, which runs one command and ends. Charts are an empty picture: drawing them takes longer than all the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SECONDS = 300  # after which a command is killed, so that one that hangs ends the campaign

LAUNCHER = """
import atexit, ctypes, gc, importlib, io, json, os, signal, sys, threading, traceback
cores = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, [cores[os.getpid() % len(cores)]])  # one core: the package asks how many it may use
for name in ("numpy", "h5py", "scipy.stats", "sklearn.metrics", "sklearn.covariance", "matplotlib.figure", "onnx",
             "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "open_clip.timm_model", "torch",
             "safetensors.torch", "PIL.Image", "cxr_fast.cli.main", "cxr_fast.training.sweep",
             "cxr_fast.activations.build", "cxr_fast.report.writer", "cxr_fast.review.writer",
             "cxr_fast.inference.batch", "cxr_fast.external.writer", "cxr_fast.export.variants"):
    importlib.import_module(name)
from PIL import Image
from cxr_fast.report import charts
Image.new("L", (160, 160)).save(empty := io.BytesIO(), "png")
charts.render = lambda made: dict.fromkeys(charts.FORMATS, empty.getvalue())
gc.freeze()
print("ready", flush=True)
child = 0
for line in iter(sys.stdin.readline, ""):
    job = json.loads(line)
    if job is None:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    gate, opened = os.pipe()
    if child := os.fork():
        os.close(opened)
        os.read(gate, 1)  # until the child leads its own group
        os.close(gate)
        print(child, flush=True)
        continue
    os.setsid()
    signal.alarm(job["seconds"])
    said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(said, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.argv = open(0, closefd=False), ["cxrfast", *job["arguments"]]
    os.chdir(job["folder"])
    if job["log"]:
        begin = ctypes.CDLL(None).recorder_begin
        begin(os.fsencode(job["root"]), os.fsencode(job["log"]), ctypes.c_long(job["kill_at"]))
    os.write(opened, b"1")
    os.close(opened)
    os.close(gate)
    code = 1
    try:
        from cxr_fast.cli.main import main
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


class NoCompiler(Exception):
    """This machine has no C compiler, or no LD_PRELOAD: writes cannot be recorded."""


def build_recorder(folder: Path) -> Path:
    """Compile `recorder.c` into a library in `folder`. Raises NoCompiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        raise NoCompiler("no C compiler on this machine (or it is not Linux): writes are not recorded")
    library = folder / "recorder.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(HERE / "recorder.c"), "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoCompiler(f"the C compiler cannot build recorder.c: {done.stderr.strip().splitlines()[-1:]}")
    return library


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Where a command's changes below `root` are recorded; `kill_at` n > 0: it dies instead of making the n-th."""

    root: Path
    log: Path
    kill_at: int = 0


class Commands:
    """Runs `cxrfast` commands in `folder`, on one thread, without a GPU or a hub. Use as a context manager.

    With a `recorder` (from `build_recorder`) a command's changes can be recorded.
    """

    def __init__(self, folder: Path, said: Path, recorder: Path | None = None) -> None:
        self.folder, self.said, self.records = folder, said, recorder is not None
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        plain = {"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1", "PYTHONHASHSEED": "0", "ORT_DISABLE_TELEMETRY": "1"}
        path = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, **one, **plain, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        environment |= {"PYTHONPATH": path} | ({"LD_PRELOAD": str(recorder)} if recorder else {})
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-P", "-c", LAUNCHER], cwd=folder, env=environment, **pipes)  # type: ignore[call-overload]
        assert self.process.stdout.readline() == "ready\n", "the process that forks has died; its stderr says why"
        self.running = 0

    def start(self, arguments: Sequence[str], recording: Recording | None = None) -> int:
        """Start `cxrfast ARGUMENTS`; return its process id, which is that of its group too."""
        log = {} if recording is None else {"root": str(recording.root), "kill_at": recording.kill_at}
        self._tell(
            {"arguments": [*arguments], "said": str(self.said), "folder": str(self.folder), "seconds": SECONDS}
            | {"log": str(recording.log) if recording else ""}
            | log
        )
        self.running = int(self._answer())
        return self.running

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the group of the command that was started last."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.running, number)

    def wait(self) -> int:
        """Wait for the end of the command; its exit code, or minus the signal that killed it."""
        self._tell(None)
        return int(self._answer())

    def is_over(self) -> bool:
        """Whether the command has ended; `wait` still says how."""
        try:
            state = Path(f"/proc/{self.running}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        return state == "Z"

    def run(self, arguments: Sequence[str], recording: Recording | None = None) -> int:
        """Run a command to its end; its exit code."""
        self.start(arguments, recording)
        return self.wait()

    def text(self) -> str:
        """What the last command said."""
        return self.said.read_text(encoding="utf-8", errors="replace") if self.said.exists() else ""

    def _tell(self, job: object) -> None:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def _answer(self) -> str:
        line: str = self.process.stdout.readline()
        assert line, "the process that forks has died; its stderr says why"
        return line

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
