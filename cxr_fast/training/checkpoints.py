"""An unfinished sweep on disk: each fold's state after each epoch, its snapshots, and the plan of the sweep.

A thread writes the states while training goes on, only the newest of each fold; a fold trained faster than the disk
takes its states is saved less often. A file appears under its name only when it is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..config import FORMER, PARTIAL, SweepSpec, from_dict, to_dict
from ..errors import CxrFastError, InputError
from ..system.files import atomic, disk_reason, make_folders, put_in_place, sync_folder
from .folds.fold import Epoch, Fold, OnEpoch, Snapshot
from .folds.loop import Recorder

REFIT = "refit"
State = tuple[dict[str, torch.Tensor], dict[str, Any]]


def fold_key(number: int, fold: Fold) -> str:
    """What the files of a fold, or of a refit, of configuration `number` begin with."""
    return f"config{number}.{fold.name}"


class Journal:
    """The folder `NAME.partial` of a run `NAME` that is not finished yet.

    `plan` is JSON: all that decides the result. A folder of another plan is refused (InputError naming the field);
    one of the same plan is continued. Use as a context manager: leaving it waits for what is being written.

    `shared=True` opens a folder that another process, on any machine, owns: it is read and added to, never checked or
    cleaned.
    """

    def __init__(self, out: Path, plan: Mapping[str, Any], *, shared: bool = False) -> None:
        self.folder = out.with_name(out.name + PARTIAL)
        self.resumed = (self.folder / "plan.json").is_file()
        self._waiting: dict[str, State] = {}
        self._passed: dict[str, int] = {}  # on a GPU: epochs of a fold since it was saved
        self._changed = threading.Condition()
        self._busy, self._closing = False, False
        self._error: BaseException | None = None
        if not shared:
            self._begin(out, plan)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _begin(self, out: Path, plan: Mapping[str, Any]) -> None:
        if differs := difference(self.folder, plan):
            raise InputError(
                f"{self.folder}: unfinished run with {differs}. Run its own command to finish it, give another --out, "
                "or pass --overwrite to drop it."
            )
        began = self.folder.exists()
        try:
            if not self.resumed:
                _clear(self.folder)
            make_folders(self.folder / "states")
            make_folders(self.folder / "snapshots")
            for part in ("states", "snapshots"):  # what a kill in the middle of a write left, safetensors' own too
                for path in (self.folder / part).iterdir():
                    if path.suffix != ".safetensors":
                        path.unlink(missing_ok=True)
            with atomic(self.folder / "plan.json") as file:
                file.write(json.dumps(plan).encode())
        except (OSError, InputError) as error:
            if not began:
                self.remove()
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            raise InputError(f"--out: cannot write {out}: {disk_reason(out, cause)}.") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if kind is None:
            self._raise()

    def restore(self, key: str, fold: Fold) -> None:
        """Bring a fold to where it was saved, if it was, and note the budgets whose snapshots exist in `fold.taken`."""
        path = self._state(key)
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                values = json.loads(file.metadata()["values"])
                fold.restore({name: file.get_tensor(name) for name in file.keys()}, values)  # noqa: SIM118
        found = (self.folder / "snapshots").glob(f"{key}.epochs*.safetensors")
        budgets = {int(p.name.removesuffix(".safetensors").rpartition(".epochs")[2]) for p in found}
        # One from an epoch after the saved state is taken again, from the same weights.
        fold.taken = {budget for budget in budgets if budget <= fold.epoch or fold.stopped}

    def recorder(self, number: int, on_epoch: OnEpoch | None, stop: Callable[[], bool]) -> Recorder:
        """A recorder that saves the folds of configuration `number` here, and passes each epoch on to `on_epoch`."""

        def keep_epoch(fold: Fold, epoch: Epoch) -> None:
            self.save(fold_key(number, fold), fold)
            if on_epoch is not None:
                on_epoch(number, fold.number, epoch)

        def keep_snapshot(fold: Fold, snapshot: Snapshot) -> None:
            self.save_snapshot(fold_key(number, fold), snapshot)

        return Recorder(epoch=keep_epoch, snapshot=keep_snapshot, stop=stop)

    def save(self, key: str, fold: Fold) -> None:
        """Hand the fold's state to the writing thread. Raises InputError when an earlier write failed."""
        self._raise()
        if fold.device.type == "cuda" and not self._turn(key):
            return
        state = fold.state()
        with self._changed:
            self._waiting[key] = state
            self._changed.notify_all()

    def _turn(self, key: str) -> bool:
        """Whether to save a fold on a GPU now: no state is waiting, and no other fold was passed over more often.

        Five folds' states are 0.9 GB an epoch, and an epoch there should be short: no disk takes each.
        """
        if self._waiting or max(self._passed.values(), default=0) > self._passed.get(key, 0):
            self._passed[key] = self._passed.get(key, 0) + 1
            return False
        self._passed.pop(key, None)
        return True

    def flush(self) -> None:
        """Wait until every state handed over is on disk."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._busy)
        self._raise()

    def save_snapshot(self, key: str, snapshot: Snapshot) -> None:
        """Write a snapshot before going on. Raises InputError when the disk refuses."""
        tensors = {**snapshot.state, "validation.probabilities": torch.from_numpy(snapshot.probabilities)}
        with self.guard():
            _save(self.snapshot_path(key, snapshot.budget), tensors, {"epoch": snapshot.epoch})

    def load_snapshot(self, key: str, budget: int) -> tuple[dict[str, torch.Tensor], np.ndarray, int]:
        """Weights of the tail, validation probabilities (n_valid, C), and the epoch they are of."""
        path = self.snapshot_path(key, budget)
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            epoch = int(json.loads(file.metadata()["values"])["epoch"])
        return tensors, tensors.pop("validation.probabilities").numpy(), epoch

    def forget(self, key: str, *, states_only: bool = False) -> None:
        """Remove the states, and the snapshots, whose key starts so."""
        for path in self.files(key):
            if not states_only or path.parent.name == "states":
                path.unlink()

    def snapshot_path(self, key: str, budget: int) -> Path:
        """The path of a snapshot."""
        return self.folder / "snapshots" / f"{key}.epochs{budget}.safetensors"

    def files(self, key: str) -> list[Path]:
        """The states and snapshots whose key starts so."""
        return [path for part in ("states", "snapshots") for path in sorted((self.folder / part).glob(f"{key}.*"))]

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Where writing fails inside the `with` block, raise an InputError that says that what is saved is kept."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise self._failure(error) from error
        except InputError as error:
            if isinstance(error.__cause__, OSError):
                raise self._failure(error.__cause__) from error
            raise

    @contextlib.contextmanager
    def replace(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file of the folder that gets its name when the `with` block ends well."""
        with self.guard(), atomic(self.folder / name) as file:
            yield file

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file in the folder, whole or not at all."""
        with self.replace(name) as file:
            file.write(json.dumps(value).encode())

    def read(self, name: str) -> dict[str, Any] | None:
        """Read a JSON file of the folder; None where it does not exist."""
        path = self.folder / name
        found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return found

    def remove(self) -> None:
        """Remove the folder; the run is finished."""
        remove_journal(self.folder)

    def _state(self, key: str) -> Path:
        return self.folder / "states" / f"{key}.safetensors"

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                key = next(iter(self._waiting))
                tensors, values = self._waiting.pop(key)
                self._busy = True
            try:
                _save(self._state(key), tensors, values)
            except Exception as error:  # whatever it is: a thread that dies here loses states and hangs `flush`
                self._error = error
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._failure(self._error) from self._error

    def _failure(self, error: BaseException) -> InputError:
        said = str(error).removeprefix("Error while serializing: ").removeprefix("I/O error: ")
        reason = getattr(error, "strerror", None) or said.partition(" (os error")[0][:120]
        return InputError(
            f"--out: cannot write {self.folder}: {reason}. What is saved is kept; make room and run the same command "
            "again."
        )


def remove_journal(folder: Path) -> None:
    """Remove the folder of an unfinished run, its plan first: what a kill leaves of it belongs to no run."""
    with contextlib.suppress(OSError):
        (folder / "plan.json").unlink()
        sync_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Remove what is of a run from a folder without a plan: a kill left it, and it may be of another plan."""
    for name in ("states", "snapshots", "run"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in folder.glob("config*"):
        path.unlink()


def difference(folder: Path, plan: Mapping[str, Any]) -> str:
    """The first field in which the plan of an unfinished run differs (`lr 1e-05 where this has 2e-05`), or ""."""
    path = folder / "plan.json"
    if not path.is_file():
        return ""
    try:
        old = _flat(_whole(json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, TypeError, CxrFastError):
        return "a plan that cannot be read"
    new = _flat(_whole(json.loads(json.dumps(plan))))
    for name in {**new, **old}:
        if old.get(name) != new.get(name):
            return f"{name.rpartition('.')[2]} {_short(old.get(name))} where this has {_short(new.get(name))}"
    return ""


def _whole(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan with every field of its spec: one that came later had its default before, or the value in FORMER."""
    return plan | {"spec": to_dict(from_dict(SweepSpec, FORMER | plan["spec"]))} if "spec" in plan else plan


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= _flat(item, f"{name}.{key}" if name else key)
    return out


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"


def _save(path: Path, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
    """Write tensors and JSON values, on disk before the file takes its name; safetensors writes by path.

    On a cluster a fold may be trained again while the node that was given up still writes it: the same bytes, but not
    into the same scratch file.
    """
    scratch = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.new")
    try:
        save_file({k: t.contiguous() for k, t in tensors.items()}, scratch, metadata={"values": json.dumps(values)})
        put_in_place(scratch, path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
