"""Run the steps of a Dockerfile without an engine: in a folder of its own, from an empty environment.

A fresh virtual environment of this Python stands in for the base image. Absolute paths of the image lie below the
folder. Then the program of the image runs with `--version` and `doctor`: as user 10001 where this script runs as root
and that user may read this Python.
What an engine would do and this cannot: other Python versions, system packages, a file system that is read-only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Where packages come from is the machine's business; all else of its environment is left out.
KEPT = re.compile(r"PIP_.*|.*_proxy|.*_PROXY|SSL_CERT_FILE|REQUESTS_CA_BUNDLE")


@dataclass(frozen=True)
class Step:
    """One instruction, its text without line ends, and the number of its stage, from 0."""

    instruction: str
    text: str
    stage: int


def parse(dockerfile: str) -> list[Step]:
    """Read the instructions; a comment is left out, continued lines are joined."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    steps: list[Step] = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        word, _, text = line.partition(" ")
        stage = sum(step.instruction == "FROM" for step in steps) - (word != "FROM")
        steps.append(Step(word, text.strip(), stage))
    return steps


@dataclass
class Image:
    """What a Dockerfile's steps make below `folder`."""

    folder: Path
    source: Path = ROOT
    resolve: bool = False
    workdir: Path = field(init=False)
    environment: dict[str, str] = field(init=False)
    entrypoint: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        """Begin a stage: the working folder and the environment are those of the base image again."""
        self.workdir = self.folder
        kept = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
        path = os.pathsep.join([str(self.folder / "base" / "bin"), "/usr/bin", "/bin"])
        self.environment = kept | {"PATH": path, "HOME": str(self.folder / "tmp"), "LANG": "C.UTF-8"}

    def inside(self, text: str) -> str:
        """Put the absolute paths of a text below the folder."""
        return re.sub(r"(?<![\w.}/-])/(?=(?:src|dist|opt|data|tmp|hub)\b)", f"{self.folder}/", text)

    def do(self, step: Step) -> None:
        """Run one step. Raises CalledProcessError where a command fails, ValueError for an unknown instruction."""
        match step.instruction:
            case "FROM":
                self._begin()
            case "WORKDIR":
                self.workdir = Path(self.inside(step.text))
                self.workdir.mkdir(parents=True, exist_ok=True)
            case "ENV":
                self.environment |= environment(self.inside(step.text), self.environment)
            case "COPY":
                self._copy(step.text.split())
            case "RUN":
                self._run(step.text)
            case "ENTRYPOINT":
                self.entrypoint = json.loads(step.text)
            case "USER" | "CMD":
                pass
            case other:
                raise ValueError(f"{other} is not known here; add it to run_steps.py")

    def _copy(self, words: list[str]) -> None:
        if words[0].startswith("--from="):
            # Stages share the folder, so what one has made is where the other wants it.
            if words[1] != words[2] or not Path(self.inside(words[1])).exists():
                raise ValueError(f"COPY {' '.join(words)}: only a path that exists, to the same path")
            return
        *sources, target = words
        for name in sources:
            to = self.workdir / target
            if (self.source / name).is_dir():
                shutil.copytree(
                    self.source / name, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy(self.source / name, to)

    def _run(self, text: str) -> None:
        if self.resolve:
            text = re.sub(r"(pip \S+ \S+ install)", r"\1 --dry-run --quiet", text)
        subprocess.run(["/bin/sh", "-ec", self.inside(text)], cwd=self.workdir, env=self.environment, check=True)

    def call(self, *arguments: str) -> None:
        """Run the image's program as the user of the image, where this process may change to another user."""
        other = os.geteuid() == 0 and open_to_all(Path(sys.executable).resolve())
        user = {"user": 10001, "group": 10001, "extra_groups": []} if other else {}
        print(f"{self.entrypoint[0]} {' '.join(arguments)} as {'user 10001' if other else 'this user'}", flush=True)
        program = shutil.which(self.entrypoint[0], path=self.environment["PATH"])
        if program is None:
            raise ValueError(f"ENTRYPOINT: {self.entrypoint[0]} is not on the image's PATH")
        subprocess.run([program, *arguments], cwd=self.workdir, env=self.environment, check=True, **user)  # type: ignore[call-overload]


def environment(text: str, known: Mapping[str, str]) -> dict[str, str]:
    """Read `NAME=VALUE NAME=VALUE` with `$NAME` replaced by what is known."""
    pairs = dict(pair.partition("=")[::2] for pair in text.split())
    return {name: re.sub(r"\$(\w+)", lambda found: known.get(found[1], ""), value) for name, value in pairs.items()}


def open_to_all(path: Path) -> bool:
    """Whether every user may go down to a path; a Python below a home folder may be closed to others."""
    return all(parent.stat().st_mode & 0o001 for parent in path.parents)


def size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def main() -> None:
    """Run the steps of the Dockerfile named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--resolve", action="store_true", help="Look for the packages and install none.")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cxr-fast-image-") as name:
        folder = Path(name).resolve()
        folder.chmod(0o755)
        subprocess.run([sys.executable, "-m", "venv", str(folder / "base")], check=True)
        for made in ("tmp", "data", "hub"):
            (folder / made).mkdir()
            (folder / made).chmod(0o777)
        image = Image(folder, resolve=asked.resolve)
        for step in parse(asked.dockerfile.read_text(encoding="utf-8")):
            print(f"{step.instruction} {step.text}", flush=True)
            image.do(step)
        if asked.resolve:
            print("every package was found")
            return
        print(f"installed: {size(folder / 'opt') / 1e6:.0f} MB")
        image.call("--version")
        image.call("doctor")


if __name__ == "__main__":
    main()
