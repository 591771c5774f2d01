"""An unfinished run on disk: going on is never having stopped, other plans are refused, and kills cost no file."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from cxr_fast.activations.loader import Activations
from cxr_fast.config import SweepSpec, TrainSpec, to_dict
from cxr_fast.errors import InputError
from cxr_fast.training import checkpoints
from cxr_fast.training.checkpoints import Journal, difference
from cxr_fast.training.folds.fold import Fold, FoldData
from cxr_fast.training.folds.head_fold import HeadFold
from cxr_fast.training.folds.loop import Recorder, fit
from tests.helpers import toys
from tests.helpers.toys import SPEC, make, same

PLAN: dict[str, Any] = {"spec": {"seed": 0, "train": {"lr": 1e-5}}, "cache": "abc", "grid": [{"lr": 1.0}]}
KEY = "config0.fold0"
# Everything moves: the scheduler halves, early stopping counts.
BUSY = dataclasses.replace(SPEC, plateau_patience=0, patience=30)


def more(fold: Any, epochs: int) -> Any:
    for _ in range(epochs):
        fold.run_epoch()
    return fold


def saved(out: Path, fold: Fold, key: str = KEY) -> None:
    with Journal(out, PLAN) as journal:
        journal.save(key, fold)


def restored(out: Path, fold: Any, key: str = KEY) -> tuple[Any, set[int]]:
    with Journal(out, PLAN) as journal:
        journal.restore(key, fold)
        return fold, fold.taken


def taken_after(journal: Journal, key: str, fold: Any) -> set[int]:
    journal.restore(key, fold)
    return set(fold.taken)


def blocks(spec: Any = BUSY) -> Fold:
    """A fold that trains a whole transformer block, its norm and the head."""
    from cxr_fast.models import backbone
    from tests.conftest import TOY

    array = np.random.default_rng(0).standard_normal((toys.IMAGES, 2, 9, 64)).astype(np.float16)
    data = FoldData(
        activations=Activations(array, toys.CPU),
        labels=toys.labels(),
        train_rows=toys.TRAIN,
        valid_rows=toys.VALID,
    )
    spec = dataclasses.replace(spec, train_norm=True)
    return Fold(backbone.load(TOY).visual, data, spec, unfreeze_blocks=1, seed=3)


# Going on.


@pytest.mark.parametrize(
    "new",
    [blocks, lambda: make(Fold, BUSY), lambda: make(HeadFold, BUSY)],
    ids=["block and head", "head", "head by hand"],
)
def test_two_epochs_a_save_and_two_more_are_four_epochs_to_the_last_bit(new: Callable[[], Any], tmp_path: Path) -> None:
    saved(tmp_path / "run", more(new(), 2))
    fold, taken = restored(tmp_path / "run", new())
    assert taken == set()
    assert fold.epoch == 2
    straight = more(new(), 4)
    assert same(more(fold, 2), straight)
    assert len({epoch.lr for epoch in straight.history}) > 1, "the scheduler never acted"
    assert torch.equal(fold.generator.get_state(), straight.generator.get_state())
    assert (fold.best, fold.stale, fold.stopped) == (straight.best, straight.stale, straight.stopped)


def test_early_stopping_counts_on_where_it_was(tmp_path: Path) -> None:
    spec = dataclasses.replace(BUSY, patience=3)
    straight = make(Fold, spec)
    fit(straight, (60,), Recorder())
    assert 3 < straight.epoch < 60
    for cut in (straight.epoch - 1, straight.epoch):
        out = tmp_path / str(cut)
        saved(out, more(make(Fold, spec), cut))
        fold, _ = restored(out, make(Fold, spec))
        fit(fold, (60,), Recorder())
        assert same(fold, straight)


def test_a_refit_at_given_rates_goes_on_too(tmp_path: Path) -> None:
    def new() -> Any:
        return make(Fold, valid_rows=toys.VALID[:0], rates=[1e-3, 5e-4, 2e-4, 1e-4])

    saved(tmp_path / "run", more(new(), 2))
    assert same_but_nan(more(restored(tmp_path / "run", new())[0], 2), more(new(), 4))


def same_but_nan(one: Fold, other: Fold) -> bool:
    for fold in (one, other):
        fold.history = [dataclasses.replace(e, valid_loss=0.0, valid_auc=0.0) for e in fold.history]
    return same(one, other)


def test_a_fold_never_saved_starts_at_its_beginning(tmp_path: Path) -> None:
    fold, taken = restored(tmp_path / "run", make())
    assert taken == set()
    assert same(fold, make())


def test_the_newest_of_states_handed_over_is_what_is_there_after_a_flush(tmp_path: Path) -> None:
    with Journal(tmp_path / "run", PLAN) as journal:
        folds = [make(fold=k) for k in range(2)]
        for _ in range(3):
            for k, fold in enumerate(folds):
                more(fold, 1)
                journal.save(f"config0.fold{k}", fold)
        journal.flush()
        for k, fold in enumerate(folds):
            again = make(fold=k)
            journal.restore(f"config0.fold{k}", again)
            assert same(again, fold)


def test_a_state_handed_over_is_that_of_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, write = threading.Event(), checkpoints._save

    def late(*arguments: Any) -> None:
        assert gate.wait(60)
        write(*arguments)

    monkeypatch.setattr(checkpoints, "_save", late)
    fold = more(make(), 1)
    with Journal(tmp_path / "run", PLAN) as journal:
        journal.save(KEY, fold)
        more(fold, 1)
        gate.set()
    assert same(restored(tmp_path / "run", make())[0], more(make(), 1))


# Snapshots.


def test_a_snapshot_comes_back_as_it_was(tmp_path: Path) -> None:
    fold = more(make(), 2)
    snapshot = fold.snapshot(5)
    with Journal(tmp_path / "run", PLAN) as journal:
        journal.save_snapshot(KEY, snapshot)
        state, probabilities, epoch = journal.load_snapshot(KEY, 5)
    assert epoch == 2
    assert state.keys() == snapshot.state.keys()
    assert all(torch.equal(tensor, snapshot.state[name]) for name, tensor in state.items())
    assert probabilities.tobytes() == snapshot.probabilities.tobytes()
    assert probabilities.dtype == np.float32


def test_only_snapshots_not_newer_than_the_state_count(tmp_path: Path) -> None:
    fold = make()
    with Journal(tmp_path / "run", PLAN) as journal:
        for epoch in (1, 2, 3, 4):
            more(fold, 1)
            journal.save_snapshot(KEY, fold.snapshot(epoch))
            if epoch == 3:
                journal.save(KEY, fold)
        journal.save_snapshot("config0.fold01", fold.snapshot(1))
        journal.save_snapshot("config10.fold0", fold.snapshot(2))
    again, taken = restored(tmp_path / "run", make())
    assert (again.epoch, taken) == (3, {1, 2, 3})
    assert restored(tmp_path / "run", make(), "config0.fold1")[1] == set()
    assert restored(tmp_path / "run", make(), "config10.fold0")[1] == set(), "there is no state beside it"


def test_snapshots_of_a_fold_that_stopped_early_count_once_the_state_says_so(tmp_path: Path) -> None:
    spec = dataclasses.replace(BUSY, patience=1)
    fold = make(Fold, spec)
    while not fold.stopped:
        before = fold.state()
        more(fold, 1)
    with Journal(tmp_path / "run", PLAN) as journal:
        for budget in (fold.epoch, 500, 900):
            journal.save_snapshot(KEY, fold.snapshot(budget))
        earlier = make(Fold, spec)
        earlier.restore(*before)
        journal.save(KEY, earlier)
        journal.flush()
        assert taken_after(journal, KEY, make(Fold, spec)) == set()
        journal.save(KEY, fold)
        journal.flush()
        assert taken_after(journal, KEY, make(Fold, spec)) == {fold.epoch, 500, 900}


# Plans.


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"spec": {"seed": 0, "train": {"lr": 2e-5}}}, "lr 1e-05 where this has 2e-05"),
        ({"spec": {"seed": 7, "train": {"lr": 1e-5}}}, "seed 0 where this has 7"),
        ({"cache": "x" * 64}, "cache abc where this has xxxxxxxxxxxx…"),
        ({"grid": []}, "grid [{'lr': 1.0}] where this has []"),
        ({"torch": "3"}, "torch None where this has 3"),
    ],
)
def test_another_plan_is_refused_with_the_field_and_both_values(
    changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    saved(tmp_path / "run", make())
    with pytest.raises(InputError) as caught:
        Journal(tmp_path / "run", {**PLAN, **changed})
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'run.partial'}: unfinished run with {said}. ")
    assert "--overwrite" in text
    assert "\n" not in text
    assert same(restored(tmp_path / "run", make())[0], make()), "what is there was left alone"


def test_the_same_plan_is_gone_on_with(tmp_path: Path) -> None:
    with Journal(tmp_path / "run", PLAN) as journal:
        assert not journal.resumed
    with Journal(tmp_path / "run", dict(reversed(PLAN.items()))) as journal:
        assert journal.resumed


def test_a_field_that_came_later_had_its_default_before(tmp_path: Path) -> None:
    """The plan of an earlier version names fewer fields than that of the same command now."""
    with Journal(tmp_path / "run", PLAN):
        pass
    now = to_dict(SweepSpec(train=TrainSpec(lr=1e-5), split_method="iterative"))  # the method of its time
    assert set(now["train"]) > set(PLAN["spec"]["train"])
    assert difference(tmp_path / "run.partial", PLAN | {"spec": now}) == ""
    now["train"]["ema"] = 0.9
    assert difference(tmp_path / "run.partial", PLAN | {"spec": now}) == "ema 0.0 where this has 0.9"


def test_tuples_and_lists_are_the_same_plan_once_written(tmp_path: Path) -> None:
    with Journal(tmp_path / "run", {"epochs": (1, 2), "lr": 0.1 + 0.2}):
        pass
    assert difference(tmp_path / "run.partial", {"epochs": [1, 2], "lr": 0.1 + 0.2}) == ""
    assert difference(tmp_path / "other.partial", {"epochs": [3]}) == ""


def test_a_plan_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "run", make())
    for damaged in (b"{", b"\xff\xfe", b""):
        (tmp_path / "run.partial" / "plan.json").write_bytes(damaged)
        with pytest.raises(InputError, match="unfinished run with a plan that cannot be read"):
            Journal(tmp_path / "run", PLAN)


def test_a_folder_that_cannot_be_made_is_an_error_naming_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^--out: cannot write .*run: .*file is a file, not a folder\.$"):
        Journal(tmp_path / "file" / "run", PLAN)


# Writes that fail.


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(checkpoints, "_save", fail)


FULL = OSError(errno.ENOSPC, "No space left on device")


def hand_over(out: Path, when: str) -> None:
    """Save a state, and again, or flush, or only leave."""
    with Journal(out, PLAN) as journal:
        journal.save(KEY, more(make(), 2))
        with journal._changed:
            assert journal._changed.wait_for(lambda: not journal._waiting and not journal._busy, timeout=60)
        assert journal._thread.is_alive()
        if when == "flush":
            journal.flush()
        elif when == "save":
            journal.save(KEY, make())


@pytest.mark.parametrize("when", ["save", "flush", "exit"])
def test_a_full_disk_is_told_at_the_next_call_and_what_is_saved_stays(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = more(make(), 1)
    saved(tmp_path / "run", fold)
    with monkeypatch.context() as patch:
        failing(patch, FULL)
        with pytest.raises(InputError) as caught:
            hand_over(tmp_path / "run", when)
    text = str(caught.value)
    assert text.startswith(f"--out: cannot write {tmp_path / 'run.partial'}: No space left on device. ")
    assert "make room" in text
    assert "\n" not in text
    assert same(restored(tmp_path / "run", make())[0], fold)


def test_a_full_disk_at_a_snapshot_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fold = more(make(), 1)
    with Journal(tmp_path / "run", PLAN) as journal:
        journal.save_snapshot(KEY, fold.snapshot(1))
        kept = journal.snapshot_path(KEY, 1).read_bytes()
        failing(monkeypatch, FULL)
        with pytest.raises(InputError, match=r"No space left on device.*make room"):
            journal.save_snapshot(KEY, fold.snapshot(1))
        assert journal.snapshot_path(KEY, 1).read_bytes() == kept


def test_an_error_of_the_block_is_not_hidden_by_one_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, FULL)

    def wrong() -> None:
        with Journal(tmp_path / "run", PLAN) as journal:
            journal.save(KEY, make())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        wrong()


@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("other")])
def test_any_other_failure_of_a_write_is_not_lost_and_hangs_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error)
    for when in ("save", "flush", "exit"):
        with pytest.raises(InputError, match=f"cannot write .*run.partial: {error}"):
            hand_over(tmp_path / "run", when)


def test_a_write_that_fails_leaves_no_scratch_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Path) -> None:
        raise FULL

    monkeypatch.setattr(checkpoints, "put_in_place", refuse)
    with pytest.raises(InputError, match="make room"):
        saved(tmp_path / "run", make())
    assert list((tmp_path / "run.partial" / "states").iterdir()) == []


def test_a_half_written_file_is_ignored_and_written_over(tmp_path: Path) -> None:
    fold = more(make(), 2)
    saved(tmp_path / "run", fold)
    folder = tmp_path / "run.partial"
    state = folder / "states" / f"{KEY}.safetensors"
    for path in (state, folder / "snapshots" / f"{KEY}.epochs1.safetensors"):
        path.with_name(path.name + ".new").write_bytes(state.read_bytes()[:1000])
    again, taken = restored(tmp_path / "run", make())
    assert taken == set()
    assert same(again, fold)
    saved(tmp_path / "run", more(fold, 1))
    assert [p.name for p in (folder / "states").iterdir()] == [state.name]
    assert restored(tmp_path / "run", make())[0].epoch == 3


# Housekeeping.


def test_forgetting_a_configuration_leaves_those_whose_number_starts_alike(tmp_path: Path) -> None:
    fold = more(make(), 1)
    with Journal(tmp_path / "run", PLAN) as journal:
        for number in (1, 10, 11, 2):
            for k in (0, 1):
                journal.save(f"config{number}.fold{k}", fold)
                journal.save_snapshot(f"config{number}.fold{k}", fold.snapshot(1))
        journal.flush()

        def there(part: str) -> set[str]:
            return {p.name.split(".")[0] for p in (journal.folder / part).iterdir()}

        journal.forget("config1", states_only=True)
        assert there("states") == {"config10", "config11", "config2"}
        assert there("snapshots") == {"config1", "config10", "config11", "config2"}
        journal.forget("config1")
        assert there("snapshots") == {"config10", "config11", "config2"}
        journal.forget("config1")
        assert taken_after(journal, "config10.fold0", make()) == {1}


def test_json_is_written_whole_and_read_back(tmp_path: Path) -> None:
    with Journal(tmp_path / "run", PLAN) as journal:
        assert journal.read("config0.json") is None
        journal.write("config0.json", {"a": [1, 2.5, None]})
        assert journal.read("config0.json") == {"a": [1, 2.5, None]}
        assert not list(journal.folder.glob("*.new"))
        journal.remove()
        assert not journal.folder.exists()


# A real process, killed.

# Imports once; each line on stdin is a folder, and when a forked child that trains there is killed: once so many states
# are whole, in the middle of a file below that part of the folder, or without one in the middle of that next step.
TRAIN = """
import os, sys
from pathlib import Path
from tests.helpers import states
from tests.helpers import toys
from cxr_fast.training import checkpoints as module
from cxr_fast.training.checkpoints import Journal
from cxr_fast.training.folds.loop import Recorder, fit

class Last:
    def __init__(self, whole, part, step):
        self.whole, self.part, self.step, self.saved = whole, part, step, 0

    def __call__(self, name, arguments):
        # One thread writes all states: where the next one is to get its name, those before have theirs.
        self.saved += name == "replace" and Path(arguments[1]).parent.name == "states"
        if self.saved <= self.whole:
            return False
        if self.part:
            return name == "fsync" and self.part in os.readlink(f"/proc/self/fd/{arguments[0]}").split("/")[:-1]
        self.step -= 1
        return self.step < 0

def halved(tensors, path, metadata):
    save(tensors, path, metadata=metadata)
    if last.saved > last.whole and last.part == path.parent.name:
        os.truncate(path, path.stat().st_size // 2)

def train(out):
    fold, key, budgets = toys.make(), "config0.fold0", range(1, 3000)
    with Journal(out, {"seed": 0}) as journal:
        journal.restore(key, fold)
        fit(fold, budgets, Recorder(
            epoch=lambda fold, _: journal.save(key, fold),
            snapshot=lambda _, s: journal.save_snapshot(key, s) if s.budget % 3 == 0 else None,
        ))

toys.make()  # what torch imports late takes a second
save = module.save_file
for line in sys.stdin:
    out, whole, part, step = line.rstrip().split("\\t")
    child = os.fork()
    if not child:
        try:
            last, module.save_file = Last(int(whole), part, int(step)), halved
            states.Steps(last)
            train(Path(out))
        finally:
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def trainer() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # A session of its own, so that a test that fails half-way takes the child with it.
    process = subprocess.Popen([sys.executable, "-c", TRAIN], env=environment, start_new_session=True, **pipes)
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def inode(path: Path) -> int:
    """Changes with every state that takes its name."""
    return path.stat().st_ino if path.exists() else 0


def whole(folder: Path, seen: set[tuple[str, int]]) -> tuple[int, int]:
    """Assert that every file under its own name loads and is complete; the state's epoch, and how many snapshots.

    Those `seen` whole before are not read again.
    """
    blank = make()
    tensors, values = blank.state()
    want = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    epoch = 0
    assert json.loads((folder / "plan.json").read_text()) == {"seed": 0}
    named = [p for part in ("states", "snapshots") for p in (folder / part).iterdir() if p.suffix == ".safetensors"]
    for path in named:
        if path.parent.name == "snapshots" and (path.name, inode(path)) in seen:
            continue
        seen.add((path.name, inode(path)))
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = json.loads(file.metadata()["values"])
        assert all(tensor.isfinite().all() for tensor in found.values() if tensor.is_floating_point())
        if path.parent.name == "states":
            assert {name: tuple(tensor.shape) for name, tensor in found.items()} == want
            assert said.keys() == values.keys()
            epoch = said["epoch"]
            assert [line["epoch"] for line in said["history"]] == list(range(1, epoch + 1))
        else:
            assert found["validation.probabilities"].shape == (len(toys.VALID), toys.CLASSES)
            assert found.keys() == {*blank.tail.state_dict(), "validation.probabilities"}
            assert path.name == f"{KEY}.epochs{said['epoch']}.safetensors"
    return epoch, sum(p.parent.name == "snapshots" for p in named)


@pytest.mark.kill
def test_a_process_killed_at_any_moment_leaves_whole_files_and_loses_no_bit(
    trainer: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert trainer.stdin is not None
    assert trainer.stdout is not None
    out, chance = tmp_path / "run", random.Random(os.urandom(8))
    folder, reached, seen = tmp_path / "run.partial", 0, set[tuple[str, int]]()
    for kill in range(10):
        part = ("", "states", "", "snapshots")[kill % 4]  # where it dies in the middle of a file
        trainer.stdin.write(f"{out}\t{chance.randint(1, 4)}\t{part}\t{chance.randint(0, 30)}\n")
        trainer.stdin.flush()
        assert trainer.stdout.readline() == f"{-signal.SIGKILL}\n"
        if part:
            assert any(path.suffix == ".new" for path in (folder / part).iterdir()), "no file was being written"
        epoch, snapshots = whole(folder, seen)
        assert epoch > reached, "every round goes on from the one before"
        # A snapshot is written before the state of its epoch, so none is missing; one may be of a later epoch.
        assert snapshots >= epoch // 3
        reached = epoch
    fold = make()
    with Journal(out, {"seed": 0}) as journal:
        left = [p.name for part in ("states", "snapshots") for p in (folder / part).iterdir()]
        assert all(name.endswith(".safetensors") for name in left), "halves of files take space for nothing"
        journal.restore(KEY, fold)
        assert fold.taken == set(range(3, reached + 1, 3))
        straight = make()
        for budget in range(1, reached + 1):
            more(straight, 1)
            if budget % 3 == 0:
                tensors, probabilities, _ = journal.load_snapshot(KEY, budget)
                assert probabilities.tobytes() == straight.snapshot(budget).probabilities.tobytes()
                assert all(torch.equal(tensor, tensors[name]) for name, tensor in straight.tail.state_dict().items())
    assert same(fold, straight)


def test_what_a_kill_left_of_a_removed_run_is_of_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "run", more(make(), 3))
    folder = tmp_path / "run.partial"
    (folder / "config0.json").write_text("{}")
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *_, **__: None)  # killed once the plan is gone
    checkpoints.remove_journal(folder)
    monkeypatch.undo()
    assert [path.name for path in folder.iterdir() if path.name == "plan.json"] == []
    assert list((folder / "states").iterdir())
    fold, taken = restored(tmp_path / "run", make())
    assert (fold.epoch, taken) == (0, set())
    assert not (folder / "config0.json").exists()


def test_a_snapshot_is_on_disk_with_its_name_before_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    put = checkpoints.put_in_place
    monkeypatch.setattr(checkpoints, "put_in_place", lambda one, other: (synced.append(other), put(one, other)))
    with Journal(tmp_path / "run", {"seed": 0}) as journal:
        fit(make(), (2,), Recorder(snapshot=lambda _, snapshot: journal.save_snapshot(KEY, snapshot)))
    assert [path.name for path in synced] == [f"{KEY}.epochs2.safetensors"]
