"""A record of what every command says and writes on seeded toy data, and a comparison of two records.

    python tests/integration/record.py make before.json                      # the package beside this script
    python tests/integration/record.py make after.json --package FOLDER      # another: FOLDER/cxr_fast
    python tests/integration/record.py compare before.json after.json --text

Make one before a change that must change nothing and one after it, on the same machine with the same libraries, for
another CPU or torch gives other bits. A record of an older commit:

    mkdir old && git archive 5ede8c5 cxr_fast | tar x -C old
    python tests/integration/record.py make old.json --package old

`compare` prints each difference of an exit code or a file and exits 1 where there is one. What is said and shown
(stdout, stderr, HTML, Markdown) is allowed to change: `--text` prints those differences too, and they do not count.

The commands are in record_commands.txt, their data is made by record_toys.py, and record_files.py says what is kept of
a file. Nothing of cxr_fast is imported here. A record takes two to three minutes of one core.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import record_toys
from forked import Commands
from record_files import PAGES, PRIVATE, keys_of, of_file, page_lines, plain_text

HERE = Path(__file__).resolve().parent


class Recorder:
    """Runs commands in `folder` and keeps what each says and leaves."""

    def __init__(self, folder: Path, package: Path, commands: Commands) -> None:
        self.folder, self.package, self.commands = folder, package, commands
        self.seen: dict[str, tuple[int, int]] = {}
        self.kept: dict[str, Any] = {}

    def run(self, arguments: Sequence[str], stdin: str, timed: bool) -> dict[str, Any]:
        """Exit code, text, files that are new or other than before, and files that are gone; of `timed` ones no text
        and no values."""
        done = self.commands.run(self.package, arguments, stdin=stdin)
        said = {} if timed else {"stdout": done.stdout, "stderr": done.stderr}
        text = {name: plain_text(text, str(self.folder)).splitlines() for name, text in said.items()}
        return {"exit": done.code, **text, **self.changes(timed)}

    def changes(self, keys_only: bool) -> dict[str, Any]:
        """What has changed in the folder since it was last looked at."""
        files: dict[str, Any] = {}
        pages: dict[str, list[str]] = {}
        before, now = self.seen, self.look()
        for name in (name for name in now if before.get(name) != now[name]):
            path = self.folder / name
            if path.suffix in PAGES:
                pages[name] = page_lines(path, str(self.folder))
                continue
            found = of_file(path, str(self.folder))
            found = keys_of(found) if keys_only else found
            if self.kept.get(name) != found:  # a file written again with the same content is no change
                files[name] = self.kept[name] = found
        return {"files": files, "pages": pages, "gone": sorted(before.keys() - now.keys())}

    def look(self) -> dict[str, tuple[int, int]]:
        """Time and size of every file but the package's private ones; what changes from now on is a change."""
        paths = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        paths = [path for path in paths if not any(word in path.name for word in PRIVATE)]
        stats = {path: path.stat() for path in paths}
        self.seen = {str(p.relative_to(self.folder)): (s.st_mtime_ns, s.st_size) for p, s in stats.items()}
        return self.seen


def commands() -> Iterator[str]:
    """The lines of record_commands.txt that do something."""
    for line in (HERE / "record_commands.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            yield line


def make(out: Path, package: Path) -> None:
    """Run every command and write the record."""
    began, steps = time.monotonic(), {}
    with tempfile.TemporaryDirectory(prefix="cxr-record-") as temporary:
        folder, scratch = Path(temporary).resolve() / "work", Path(temporary) / "scratch"
        folder.mkdir()
        scratch.mkdir()
        os.chdir(folder)
        with Commands(folder, scratch) as forked:
            recorder = Recorder(folder, package, forked)
            for line in commands():
                if line.startswith("!"):
                    getattr(record_toys, line[1:])()
                    recorder.look()
                    continue
                command, _, stdin = line.removeprefix("~ ").partition(" < ")
                name = command if command not in steps else f"{command} (again)"
                before = time.monotonic()
                steps[name] = recorder.run(shlex.split(command), stdin or os.devnull, line.startswith("~"))
                took = f"{time.monotonic() - before:6.1f} s  exit {steps[name]['exit']}"
                print(f"{took}  {line}", file=sys.stderr, flush=True)
        os.chdir(HERE)
    out.write_text(json.dumps({"libraries": libraries(), "steps": steps}, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(steps)} commands in {time.monotonic() - began:.0f} s: {out}", file=sys.stderr)


def libraries() -> dict[str, str]:
    """What besides the package decides the last bits."""
    from importlib.metadata import version

    names = ("torch", "timm", "numpy", "scipy", "scikit-learn", "pillow", "h5py", "onnxruntime-gpu", "click")
    processors = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.*)", processors.read_text()) if processors.is_file() else None
    found = {"python": sys.version.split()[0], "cpu": named[1] if named else ""}
    for name in names:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            found[name] = "absent"
    return found


# --------------------------------------------------------------------------------------------------- compare


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Each place where two JSON values differ, and both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            if key not in a or key not in b:
                yield f"{where}/{key}: only in the {'first' if key in a else 'second'}"
            else:
                yield from differences(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(one, other, f"{where}/{i}")
    elif a != b or type(a) is not type(b):
        yield f"{where}: {json.dumps(a)[:100]} -> {json.dumps(b)[:100]}"


def show(lines: Iterable[str], most: int) -> int:
    """Print up to so many lines, and how many more there are; how many there were."""
    listed = list(lines)
    for line in listed[:most]:
        print(f"    {line}")
    if len(listed) > most:
        print(f"    and {len(listed) - most} more")
    return len(listed)


def compare(one: dict[str, Any], other: dict[str, Any], *, text: bool, most: int) -> int:
    """Print every difference; how many count."""
    count, said = 0, 0
    for line in differences(one["libraries"], other["libraries"]):
        print(f"note: made with other libraries or on another machine: {line[1:]}")
    a, b = one["steps"], other["steps"]
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in a or name not in b:
            print(f"cxrfast {name}\n    only in the {'first' if name in a else 'second'} record")
            count += 1
            continue
        counted = list(differences(*({k: s[k] for k in ("exit", "files", "gone")} for s in (a[name], b[name]))))
        pairs = [(k, a[name].get(k, []), b[name].get(k, [])) for k in ("stdout", "stderr")]
        pages = [a[name]["pages"], b[name]["pages"]]
        pairs += [(page, *(p.get(page, []) for p in pages)) for page in sorted(pages[0] | pages[1])]
        changed = [pair for pair in pairs if pair[1] != pair[2]]
        if counted or (text and changed):
            print(f"cxrfast {name}")
        count += show(counted, most)
        said += len(changed)
        for what, before, after in changed if text else ():
            print(f"  text of {what}:")
            show((line for line in difflib.unified_diff(before, after, n=0) if line[:3] not in ("---", "+++")), most)
    print(f"{len(a)} commands: {count} differences in exit codes and files; {said} texts differ, which does not count")
    return count


def main() -> None:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    making = actions.add_parser("make", help="run every command and write what it did")
    making.add_argument("out", type=Path)
    making.add_argument("--package", type=Path, default=HERE.parents[1], help="the folder that holds cxr_fast")
    comparing = actions.add_parser("compare", help="print how two records differ; exit 1 where a figure or file does")
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    comparing.add_argument("--text", action="store_true", help="also differences in what is said, which do not count")
    comparing.add_argument("--most", type=int, default=20, help="lines shown of each command and text (20)")
    given = parser.parse_args()
    if given.action == "make":
        make(given.out.resolve(), given.package.resolve())
    else:
        records = [json.loads(path.read_text()) for path in (given.first, given.second)]
        sys.exit(1 if compare(*records, text=given.text, most=given.most) else 0)


if __name__ == "__main__":
    main()
