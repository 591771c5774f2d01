"""Trials: a command killed at random moments, and a disk after a power cut; each ended by the same command.

After each kill or cut: every file that has its final name is as the undisturbed run leaves it, or as it was before. At
the end: every result is that of the undisturbed run, to the bit. After a cut that comes once the command has ended with
its exit code: every result is still there, with no further run.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import contents
from .disk import CHANGES, NAME_CHANGES, ORDERS, Disk, Record, read_log
from .processes import Commands, Recording
from .scenarios import Scenario

MOST_KILLS = 3
BEFORE, DURING, RESULTS, ENDED = "before anything was written", "during", "results there", "after the end"
STAGES = (BEFORE, DURING, RESULTS, ENDED)
WAIT = 120  # seconds for the first round of `predict --watch`


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What an undisturbed run leaves, by name; all that a name stood for on the way, and before it; its time and its
    recorded changes."""

    results: dict[str, str]
    before: dict[str, str]
    whole: dict[str, set[str]]
    seconds: float
    records: list[Record]
    changes: int


@dataclass(kw_only=True)
class Tally:
    """What came of the trials of one scenario."""

    trials: int = 0
    stages: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """For the result's file."""
        stages = {name: self.stages[name] for name in STAGES}
        return {"trials": self.trials, "stages": stages, "left": dict(self.left), "wrong": self.wrong}


class Bench:
    """Runs one scenario again and again in `folder`, whose `in` holds the inputs."""

    def __init__(
        self, commands: Commands, folder: Path, scenario: Scenario, seed: int, *, by_change: float = 0.5
    ) -> None:
        self.commands, self.scenario, self.seed = commands, scenario, seed
        self.by_change = by_change if commands.records else 0.0  # the share of kills in place of a change
        self.inputs, self.out, self.log = folder / "in", folder / "out", folder / "log"
        self.arguments = scenario.arguments(self.inputs, self.out)
        self.reference = self._refer()

    # Running.

    def run(self, *, record: bool = False) -> int:
        """Run the command to its end; its exit code."""
        self.log.unlink(missing_ok=True)
        recording = Recording(root=self.out, log=self.log) if record else None
        if not self.scenario.watch:
            return self.commands.run(self.arguments, recording)
        self.commands.start(self.arguments, recording)
        end = time.monotonic() + WAIT
        while self.scenario.watch not in self.commands.text():  # each round says so when it has written
            if time.monotonic() > end or self.commands.is_over():
                break
            time.sleep(0.02)
        self.commands.kill(signal.SIGTERM)
        return self.commands.wait()

    def _refer(self) -> Reference:
        found, times = [], []
        for record in (True, False):
            self.scenario.begin(self.inputs, self.out)
            before, began = contents.results(self.out), time.perf_counter()
            code = self.run(record=record and self.commands.records)
            times.append(time.perf_counter() - began)
            if code not in self.scenario.codes:
                raise SystemExit(f"{self.scenario.name}: exit code {code}\n{self.commands.text()}")
            if record:
                records = read_log(self.log)
                self._prove_record(records)
                whole = self._all_named(records)
            found.append(contents.results(self.out))
        if differ := describe_difference(found[0], found[1]):
            raise SystemExit(f"{self.scenario.name}: two undisturbed runs differ: {differ}")
        for some in (before, found[0]):
            for name, value in some.items():
                whole.setdefault(name, set()).add(value)
        changes = sum(record.kind in CHANGES for record in records)
        return Reference(
            results=found[0], before=before, whole=whole, seconds=min(times), records=records, changes=changes
        )

    def _all_named(self, records: list[Record]) -> dict[str, set[str]]:
        """The digests of everything that got a final name in a recorded run: some files are written twice."""
        found: dict[str, set[str]] = {}
        kept, one = self.out.with_name("kept"), self.out.with_name("one") / "part"
        shutil.move(self.out, kept)
        self.scenario.begin(self.inputs, self.out)
        disk = Disk(self.out)
        for record in records:
            disk.play(record)
            if record.kind == "rename" and not contents.is_unfinished(os.path.relpath(record.paths[1], self.out)):
                shutil.rmtree(one.parent, ignore_errors=True)
                one.parent.mkdir()
                for path in disk.write_part(record.paths[1], one):
                    name = os.path.normpath(os.path.relpath(record.paths[1], self.out) / path.relative_to(one))
                    found.setdefault(name, set()).add(contents.digest(path, os.path.basename(name)))
        shutil.rmtree(one.parent, ignore_errors=True)
        shutil.rmtree(self.out)
        shutil.move(kept, self.out)
        return found

    def _prove_record(self, records: list[Record]) -> None:
        """Play a whole record back: it must give the real folder, or writes were not seen."""
        if not records:
            return
        copy = self.out.with_name("copy")
        shutil.move(self.out, copy)
        self.scenario.begin(self.inputs, self.out)
        disk = self._play(records, len(records))
        shutil.rmtree(self.out)
        shutil.move(copy, self.out)
        for record in list(disk.names_unseen(self.out)):
            disk.play(record)
            records.append(record)
        shutil.move(self.out, copy)
        disk.write_live(self.out)
        real, played = (
            {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            for folder in (copy, self.out)
        )
        shutil.rmtree(self.out)
        shutil.move(copy, self.out)
        if wrong := sorted(name for name in real | played if real.get(name) != played.get(name)):
            raise SystemExit(f"{self.scenario.name}: played back, {wrong[:3]} differ(s): not every write was recorded")

    def _play(self, records: list[Record], count: int) -> Disk:
        """The disk after the first records, from what is in `out` now."""
        disk = Disk(self.out)
        for record in records[:count]:
            disk.play(record)
        return disk

    # Judging.

    def stage(self, code: int) -> str:
        """How far a command was that has been killed, or ended with `code` before that."""
        if code != -signal.SIGKILL:
            return ENDED
        found = contents.results(self.out)
        if all(found.get(name) == value for name, value in self.reference.results.items()):
            return RESULTS
        files = [p.relative_to(self.out).as_posix() for p in self.out.rglob("*") if not p.name.endswith(".lock")]
        begun = found != self.reference.before or any(map(contents.is_unfinished, files))
        return DURING if begun else BEFORE

    def half(self) -> str:
        """Files with a final name that are neither whole nor as they were before; empty where there are none."""
        wrong = []
        for name, value in contents.results(self.out).items():
            if value.startswith("?"):
                wrong.append(f"{name} {value}")
            elif self.reference.records and value not in self.reference.whole.get(name, ()):
                wrong.append(f"{name} has other content")
        return "; ".join(wrong[:3])

    def lacking(self) -> str:
        """How the results differ from those of the undisturbed run; empty where they do not."""
        return describe_difference(self.reference.results, contents.results(self.out))

    def finish(self, tally: Tally, about: dict[str, Any]) -> None:
        """Run the command to its end and compare."""
        code = self.run()
        refused = code == 2 and self.scenario.refusal and self.scenario.refusal in self.commands.text()
        wrong = ""
        if not refused and code not in self.scenario.codes:
            wrong = f"exit code {code}: {last_line(self.commands.text())}"
        if wrong := wrong or self.lacking():
            tally.wrong.append({**about, "at the end": self._plain(wrong)})
        tally.left.update(kind_of(name) for name in contents.left_over(self.out))

    def _plain(self, text: str) -> str:
        return text.replace(str(self.out.parent), "")[:300]

    # Trials.

    def kill_trial(self, trial: int, tally: Tally) -> None:
        """Kill the command one to three times, then let it end.

        Half of the kills come at a moment of the undisturbed run's time, half in place of one of its changes.
        """
        draw = random.Random(f"{self.seed} {self.scenario.name} kill {trial}")
        self.scenario.begin(self.inputs, self.out)
        about: dict[str, Any] = {"trial": trial, "kills": []}
        tally.trials += 1
        for _ in range(draw.randint(1, MOST_KILLS)):
            if draw.random() < self.by_change:
                change = draw.randint(1, self.reference.changes)
                about["kills"].append(f"change {change}")
                self.log.unlink(missing_ok=True)
                self.commands.start(self.arguments, Recording(root=self.out, log=self.log, kill_at=change))
                if self.scenario.watch:  # it has fewer changes left than that, and never ends
                    self._wait_over(2 * self.reference.seconds)
            else:
                moment = draw.uniform(0, self.reference.seconds)
                about["kills"].append(f"{moment:.3f} s")
                self.commands.start(self.arguments)
                self._wait_over(moment)
            if self.scenario.watch or about["kills"][-1].endswith(" s"):
                self.commands.kill()
            tally.stages[self.stage(self.commands.wait())] += 1
            if wrong := self.half():
                tally.wrong.append({**about, "after a kill": self._plain(wrong)})
        self.finish(tally, about)

    def _wait_over(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.commands.is_over():
            time.sleep(min(left, 0.05))

    def cut_trial(self, trial: int, tally: Tally) -> None:
        """Build the disk after a power cut in the recorded run, in every second trial let the command go on from it and
        cut it again, then let it end."""
        draw = random.Random(f"{self.seed} {self.scenario.name} cut {trial}")
        self.scenario.begin(self.inputs, self.out)
        about: dict[str, Any] = {"trial": trial, "cuts": []}
        tally.trials += 1
        records = self.reference.records
        for again in range(draw.randint(1, 2)):
            if again:
                kept = self.out.with_name("kept")
                shutil.copytree(self.out, kept)
                self.run(record=True)
                records = read_log(self.log)
                shutil.rmtree(self.out)
                shutil.move(kept, self.out)
            self._cut(records, choose_cut(records, draw), draw, about)
            tally.stages[self.stage(-signal.SIGKILL)] += 1
            if wrong := self.half():
                tally.wrong.append({**about, "after a cut": self._plain(wrong)})
        self.finish(tally, about)

    def end_trial(self, trial: int, tally: Tally) -> None:
        """Build the disk after a power cut right after the recorded run has ended: everything must be there, and
        one more run must agree."""
        draw = random.Random(f"{self.seed} {self.scenario.name} end {trial}")
        self.scenario.begin(self.inputs, self.out)
        about: dict[str, Any] = {"trial": trial, "cuts": []}
        tally.trials += 1
        self._cut(self.reference.records, len(self.reference.records), draw, about)
        tally.stages[self.stage(-signal.SIGKILL)] += 1
        if wrong := self.lacking():
            tally.wrong.append({**about, "lost": self._plain(wrong)})
        else:
            self.finish(tally, about)

    def _cut(self, records: list[Record], count: int, draw: random.Random, about: dict[str, Any]) -> None:
        disk, order = self._play(records, count), draw.choice(ORDERS)
        shutil.rmtree(self.out)
        disk.write_cut(self.out, order, draw)
        last = records[count - 1] if count else None
        names = " ".join(Path(path).name for path in last.paths) if last else ""
        about["cuts"].append(f"{count} of {len(records)}, {order}, after {last.kind if last else 'nothing'} {names}")


def choose_cut(records: list[Record], draw: random.Random) -> int:
    """How many records come before the cut: half of the time one that changes a name or syncs, or the one before."""
    kinds = NAME_CHANGES if draw.random() < 0.5 else CHANGES
    places = [i for i, record in enumerate(records) if record.kind in kinds]
    return draw.choice(places) + draw.randint(0, 1) if places else len(records)


def describe_difference(wanted: dict[str, str], found: dict[str, str]) -> str:
    """The first files that differ, and how."""
    said = []
    for name in sorted(wanted | found):
        if name not in found:
            said.append(f"{name} is missing")
        elif name not in wanted:
            said.append(f"{name} is there too")
        elif wanted[name] != found[name]:
            said.append(f"{name} differs" if not found[name].startswith("?") else f"{name} {found[name]}")
    return "; ".join(said[:3]) + (f" and {len(said) - 3} more" if len(said) > 3 else "")


def kind_of(name: str) -> str:
    """What kind of file was left over: the end of its name, without numbers of processes."""
    return contents.LEFT.search(name)[0].rstrip("0123456789").rstrip(".")  # type: ignore[index]


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


Trial = Callable[[int, Tally], None]
