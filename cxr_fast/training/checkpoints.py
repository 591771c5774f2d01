"""An unfinished sweep on disk: every fold's state after each epoch, its snapshots, and what it was asked to do.

States are written by a thread beside the training, the newest of each fold first; a fold trained faster than the disk
takes its states is saved less often. A file appears under its name only when it is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..errors import InputError
from .fold import Fold, Snapshot

SUFFIX = ".partial"
State = tuple[dict[str, torch.Tensor], dict[str, Any]]


class Journal:
    """The folder `NAME.partial` beside a run that is not finished yet.

    `plan` is JSON: all that decides the result. A folder of another plan is refused (InputError naming the field);
    one of the same plan is continued. Use as a context manager: leaving it waits for what is being written.

    `beside` joins a folder that another process, on any machine, holds the plan and the lock of: nothing is compared,
    cleared away or made.
    """

    def __init__(self, out: Path, plan: Mapping[str, Any], *, beside: bool = False) -> None:
        self.folder = out.with_name(out.name + SUFFIX)
        self.resumed = (self.folder / "plan.json").is_file()
        self._waiting: dict[str, State] = {}
        self._passed: dict[str, int] = {}  # on a GPU: epochs of a fold since it was saved
        self._changed = threading.Condition()
        self._busy, self._closing = False, False
        self._error: BaseException | None = None
        if not beside:
            self._begin(out, plan)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _begin(self, out: Path, plan: Mapping[str, Any]) -> None:
        if differs := difference(self.folder, plan):
            raise InputError(
                f"{self.folder}: unfinished run with {differs}. Run its own command to finish it, give another --out, "
                "or pass --overwrite to drop it."
            )
        try:
            (self.folder / "states").mkdir(parents=True, exist_ok=True)
            (self.folder / "snapshots").mkdir(exist_ok=True)
            for part in ("states", "snapshots"):  # what a kill in the middle of a write left, safetensors' own too
                for path in (self.folder / part).iterdir():
                    if path.suffix != ".safetensors":
                        path.unlink(missing_ok=True)
            self.write("plan.json", plan)
        except OSError as error:
            raise InputError(f"--out: cannot write {out}: {error.strerror or error}.") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if kind is None:
            self._raise()

    def restore(self, key: str, fold: Fold) -> set[int]:
        """Bring a fold to where it was saved, if it was; the budgets whose snapshots are there."""
        path = self._state(key)
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                values = json.loads(file.metadata()["values"])
                fold.restore({name: file.get_tensor(name) for name in file.keys()}, values)  # noqa: SIM118
        found = (self.folder / "snapshots").glob(f"{key}.epochs*.safetensors")
        budgets = {int(p.name.removesuffix(".safetensors").rpartition(".epochs")[2]) for p in found}
        # One from an epoch after the saved state is taken again, from the same weights.
        return {budget for budget in budgets if budget <= fold.epoch or fold.stopped}

    def save(self, key: str, fold: Fold) -> None:
        """Have the fold's state written soon. Raises InputError when an earlier write failed."""
        self._raise()
        if fold.device.type == "cuda" and not self._turn(key):
            return
        state = fold.state()
        with self._changed:
            self._waiting[key] = state
            self._changed.notify_all()

    def _turn(self, key: str) -> bool:
        """Whether a fold on a GPU is to be saved now: none is waiting, and none went without for longer.

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
        try:
            _save(self.snapshot_path(key, snapshot.budget), tensors, {"epoch": snapshot.epoch})
        except (OSError, SafetensorError) as error:
            raise self._failure(error) from error

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
        """Where a snapshot lies."""
        return self.folder / "snapshots" / f"{key}.epochs{budget}.safetensors"

    def files(self, key: str) -> list[Path]:
        """The states and snapshots whose key starts so."""
        return [path for part in ("states", "snapshots") for path in sorted((self.folder / part).glob(f"{key}.*"))]

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """A JSON file in the folder, whole or not at all."""
        scratch = self.folder / f"{name}.new"
        scratch.write_text(json.dumps(value), encoding="utf-8")
        os.replace(scratch, self.folder / name)

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, or None."""
        path = self.folder / name
        found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return found

    def remove(self) -> None:
        """Remove the folder; the run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

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
        reason = getattr(error, "strerror", None) or str(error)[:120]
        return InputError(
            f"{self.folder}: cannot write: {reason}. What is saved is kept; make room and run the same command again."
        )


def difference(folder: Path, plan: Mapping[str, Any]) -> str:
    """What an unfinished run in `folder` was asked otherwise (`lr 1e-05 where this has 2e-05`); empty for nothing."""
    path = folder / "plan.json"
    if not path.is_file():
        return ""
    try:
        old = _flat(json.loads(path.read_text(encoding="utf-8")))
    except ValueError:
        return "a plan that cannot be read"
    new = _flat(json.loads(json.dumps(plan)))
    for name in {**new, **old}:
        if old.get(name) != new.get(name):
            return f"{name.rpartition('.')[2]} {_short(old.get(name))} where this has {_short(new.get(name))}"
    return ""


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
    """Tensors and JSON values, on disk before the file takes its name.

    On a cluster a fold may be trained again while the node that was given up still writes it: the same bytes, but not
    into the same scratch file.
    """
    scratch = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.new")
    try:
        save_file({k: t.contiguous() for k, t in tensors.items()}, scratch, metadata={"values": json.dumps(values)})
        fd = os.open(scratch, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(scratch, path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
