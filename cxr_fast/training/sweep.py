"""Run a whole sweep: from an activation file to a run folder with hold-out, folds, search and the final model."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from .. import __version__
from ..activations.cache import Cache
from ..activations.encoder import load_recorded
from ..activations.forward import precision
from ..activations.loader import Activations
from ..config import SweepOptions, SweepSpec, digest, to_dict
from ..data.manifest import Manifest
from ..data.tables.corrections import describe_source
from ..errors import CxrFastError, InputError, Interrupted
from ..grid.points import make_points
from ..models.backbone import Backbone, tower_sha256
from ..models.device import pick_device
from ..models.heads import Custom, LossFunction, MakeHead
from ..models.tail import count_trainable
from ..system.files import AnyPath, put_in_place, sync_tree
from ..system.locks import FileLock, graceful
from . import operating_points, run_record
from .checkpoints import Journal, difference, remove_journal
from .configurations.train import train_points
from .dataset import read
from .earlier_runs import find_trained_holdouts
from .expected_time import EpochTimes, SweepPlan, expect, unknown_times
from .final_models import FinalModels
from .finish import Setup, finish
from .folds.fold import OnEpoch, require_scorable
from .run_folder import ABOUT, read_info
from .search import FoldTrainer, Search, Trainers, require_cached, trained_blocks


def backbone_for(file: Cache, weights: str | None = None) -> Backbone:
    """Load the tower that the cache was made with, and check its hash against the cache's."""
    backbone = load_recorded(file.meta, weights)
    if tower_sha256(backbone.visual) != file.meta["tower_sha256"]:
        raise InputError(
            f"--weights {backbone.source}: not the weights {file.path} was made with; pass those, or cache again."
        )
    return backbone


class SweepJob:
    """One search over one cache. `plan` says what will happen; `run` does it and writes the run folder.

    `out` None takes the first free name of `exports/CACHE`, `exports/CACHE-2`, ...; an unfinished run of the same
    request counts as free and is continued. `manifest` brings other labels. With `trainers` (a cluster's) folds and
    refit are trained there and all else happens here; on CPUs the figures are a local run's to the last bit. Users see
    `cxr_fast.Sweep`, which writes the report too.
    """

    def __init__(
        self,
        cache: AnyPath,
        out: AnyPath | None,
        spec: SweepSpec,
        options: SweepOptions = SweepOptions(),  # noqa: B008
        *,
        manifest: Manifest | None = None,
        trainers: Trainers | None = None,
        head: MakeHead | None = None,
        loss: LossFunction | None = None,
    ) -> None:
        cache, out = Path(cache), None if out is None else Path(out)
        if out is not None:
            require_free(out, options.overwrite)
        self.spec, self.options = spec, options
        self.points = make_points(spec.train, options.grid, seed=spec.seed, trials=options.trials)
        self.data = read(cache, spec, manifest, options)
        self.unfreeze_blocks = int(self.data.file.meta["spec"]["unfreeze_blocks"])
        for point in self.points:
            require_cached(point.train, self.unfreeze_blocks, self.data.file.meta["spec"]["views"])
        self.labels_from = describe_source("the cache" if manifest is None else manifest.name, self.data.corrections)
        self._choose_device(trainers)
        dev = self.data.assignment >= 0
        operating_points.require_reachable(self.data.labels[dev], spec.threshold_target, self.data.header.classes)
        self.backbone = backbone_for(self.data.file, options.weights)
        self.activations = Activations(self.data.file.activations, self.device, residency=self.residency)
        self.search = Search(
            self.backbone,
            self.activations,
            self.data,
            spec,
            unfreeze_blocks=self.unfreeze_blocks,
            custom=Custom(head=head, loss=loss),
        )
        self._require_scorable()
        self.search.custom.require_loss(len(self.data.header.classes), self.device)
        self.trainable = [count_trainable(self.search.tail(point.train)) for point in self.points]
        self._names = [out] if out else list(_names(Path("exports") / cache.stem, self.request()))
        self.out = self._names[-1]
        self._warn_of_holdouts()
        self.search.scratch = self.out.parent if self.out.parent.is_dir() else None
        self.trainer: FoldTrainer | None = None
        if trainers is not None:
            self.trainer = trainers.start(
                self.search,
                list(zip(self.points, self.kinds, strict=True)),
                self.out,
                device=self.trained_on,
                residency=options.residency,
            )
            self.search.train_folds = self.trainer.train_folds

    def _require_scorable(self) -> None:
        """Raise InputError where a fold of a seed cannot be trained or scored."""
        labels = self.data.header.labels
        for seed in dict.fromkeys(point.seed for point in self.points):
            data = self.search.with_seed(seed).data
            try:
                for k in range(self.spec.folds):
                    require_scorable(labels, data.train(k), data.valid(k), fold=k)
            except InputError as error:
                raise error if seed == self.spec.seed else InputError(f"--grid seed={seed}: {error}") from error

    def _warn_of_holdouts(self) -> None:
        """Note the runs beside this one whose hold-out it would train on."""
        data = self.data
        groups, sha256 = ([column[row] for row in data.rows] for column in (data.header.groups, data.file.sha256))
        name = str(data.file.meta["dataset"]["name"])
        lines = find_trained_holdouts(self.out.parent, groups, sha256, data.assignment, name)
        self.data = replace(data, notes=(*data.notes, *lines))

    @property
    def runs_blocks_first(self) -> bool:
        """Whether cached blocks run once, frozen, before anything is trained: `plan` does it, to time what follows."""
        cut = self.unfreeze_blocks
        trains = (point.train for point in self.points)
        return any(trained_blocks(train, cut) < cut or train.head_first for train in trains)

    def _choose_device(self, trainers: Trainers | None) -> None:
        """Choose where folds are trained, the precision of each configuration, and what this machine computes on."""
        device, residency, cut = self.options.device, self.options.residency, self.unfreeze_blocks
        trains = [point.train for point in self.points]
        if trainers is None:
            self.device, self.residency = pick_device(device), residency
            self.trained_on, self.gpu = self.device.type, device_name(self.device)
            self.kinds = [precision(train, self.device, trained_blocks(train, cut)) for train in trains]
            return
        self.trained_on, self.gpu, bfloat16 = trainers.target(device), "cpu", False
        if self.trained_on == "cuda":
            self.gpu, bfloat16 = trainers.gpu()
        # Where this machine lends its GPU to the tasks, their activations need its memory.
        self.device = pick_device("auto" if self.trained_on == "cuda" else "cpu")
        self.residency = "host" if self.device.type == "cuda" else residency
        kind = "bfloat16" if bfloat16 else "float32"
        self.kinds = [
            precision(train, self.device, trained_blocks(train, cut))
            if self.trained_on == "cpu" or train.precision != "auto"
            else kind
            for train in trains
        ]

    def request(self) -> dict[str, Any]:
        """All that decides the result, as JSON: an unfinished run of the same request may be continued."""
        data, hasher = self.data, hashlib.sha256()
        for part in (data.rows, data.header.labels[data.rows], data.assignment):
            hasher.update(np.ascontiguousarray(part).data)
        hasher.update("\0".join((*data.header.groups, *data.header.classes)).encode())
        return {
            "spec": to_dict(self.spec),
            "grid": [point.changes for point in self.points],
            "cache": data.file.meta["fingerprint"],
            "data": hasher.hexdigest(),
            "weights": data.file.meta["tower_sha256"],
            "device": self.trained_on,
            "precision": self.kinds,
            "cxr-fast": __version__,
            "torch": torch.__version__,
            **self.search.custom.mark(),
        }

    @property
    def _with_refit(self) -> bool:
        return bool((self.data.assignment == -1).any()) or self.spec.final == "refit"

    def plan(self) -> SweepPlan:
        """Counts, memory and expected time."""
        data, header, spec, times = self.data, self.data.header, self.spec, self._expect()
        retrained = spec.retrain_head != "none"
        return SweepPlan(
            cache=data.file.path,
            out=self.out,
            images=len(data.rows),
            failed=int((~data.file.ok).sum()),
            groups=len({header.groups[i] for i in data.rows}),
            classes=len(header.classes),
            folds=spec.folds,
            configurations=len(self.points),
            holdout_images=int((data.assignment == -1).sum()),
            epochs=spec.epochs,
            epochs_in_all=spec.epochs[-1] * (spec.folds * (len(self.points) + retrained) + self._with_refit),
            trainable=self.trainable[0],
            activation_bytes=data.file.activations.nbytes,
            where=self.activations.where,
            device=str(self.device) if self.trainer is None else self.trained_on,
            precision=self.kinds[0],
            seconds=times.total if self.device.type == self.trained_on else float("nan"),
            times=times,
            resumed=self._goes_on(),
            cluster="" if self.trainer is None else str(self.trainer),
            notes=() if self.trainer is None else tuple(self.trainer.notes),
        )

    def _goes_on(self) -> bool:
        """Whether an unfinished run of this very request exists and is not to be replaced."""
        folder = Path(f"{self.out}.partial")
        unfinished = (folder / "plan.json").is_file() and not self.options.overwrite
        return unfinished and not difference(folder, self.request())

    def find_finished(self) -> Path | None:
        """Return the finished run of this very request, by whatever version: `out`, or a name that was taken before it.

        Runs of versions that did not record their request are not found.
        """
        mine = _digest(self.request())
        for path in self._names:
            with contextlib.suppress(CxrFastError):  # another version's, or no run: not this one
                if read_info(path).get("request_sha256") == mine:
                    return path
        return None

    def _about(self) -> dict[str, Any]:
        """What the list of runs shows of an unfinished one, beside its plan."""
        meta = self.data.file.meta
        return {
            "data": str(meta["dataset"]["name"]),
            "weights": str(meta["weights"]),
            "cache": str(self.data.file.path),
            "grid": list(self.options.grid),
            "trials": self.options.trials,
        }

    def _expect(self) -> EpochTimes:
        """Expect the time of each epoch; all alike where this machine lacks the device."""
        spec, trains = self.spec, [point.train for point in self.points]
        if self.device.type != self.trained_on:
            again = spec.retrain_head != "none"
            return unknown_times(len(trains), spec.epochs[-1], spec.folds, refit=self._with_refit, retrained=again)
        at_once = None if self.trainer is None else min(self.trainer.at_once, spec.folds * len(trains))
        return expect(self.search, trains, at_once=at_once, refit=self._with_refit)

    def run(self, on_epoch: OnEpoch | None = None) -> dict[str, Any]:
        """Train every fold, choose on validation alone, score the hold-out once; the run as a dict.

        The folder appears under its final name only when it is complete. SIGINT, SIGTERM and kills leave
        `OUT.partial`, from which the same call goes on to the same bits; Interrupted says so.
        """
        began = time.perf_counter()
        with FileLock(self.out), graceful() as stopped:
            require_free(self.out, self.options.overwrite)
            folder = Path(f"{self.out}.partial")
            if self.options.overwrite and difference(folder, self.request()):
                remove_journal(folder)
            with Journal(self.out, self.request()) as journal:
                try:
                    journal.write(ABOUT, self._about())
                    run = self._run(journal, on_epoch, stopped.is_set, began)
                except Interrupted as error:
                    safe = "every finished epoch" if self.trained_on == "cpu" else "what was saved of each fold"
                    raise Interrupted(
                        f"stopped; {safe} is safe in {journal.folder}. Run the same command again to go on."
                    ) from error
                except OSError as error:
                    raise InputError(
                        f"--out: cannot write {journal.folder}: {error.strerror or error}. What is saved is kept; run "
                        "the same command again to go on."
                    ) from error
                finally:
                    if self.trainer is not None:
                        self.trainer.close()
            _put_in_place(journal.folder / "run", self.out)
            journal.remove()
        return run

    def _run(
        self, journal: Journal, on_epoch: OnEpoch | None, stop: Callable[[], bool], began: float
    ) -> dict[str, Any]:
        # The tasks of a cluster stop together, so there nothing is left to be chosen.
        found = train_points(self.search, self.points, journal, on_epoch, stop, go_on=self.trainer is None)
        configurations, chosen = found.configurations, found.chosen
        trained = chosen.trained
        finals = FinalModels(self.search, trained, journal, chosen.budget)
        if self._with_refit and self.trainer is not None:
            epochs = finals.refit_epochs()
            self.trainer.refit(trained.number, epochs, trained.rates(epochs), journal, on_epoch, stop)
        elif self._with_refit:
            finals.refit(on_epoch, stop)
        if self.spec.retrain_head != "none":
            finals.retrain(on_epoch, stop)
        folder = journal.folder / "run"
        with journal.guard():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            setup = Setup(
                labels_from=self.labels_from,
                precision=self.kinds[trained.number],
                device=self.gpu,
                trainable=self.trainable[trained.number],
                with_refit=self._with_refit,
                grid=self.options.grid,
                trials=self.options.trials,
            )
            record = finish(folder, configurations, chosen, finals, setup)
            record.lost = found.lost or msgspec.UNSET
            record.cluster = msgspec.UNSET if self.trainer is None else self.trainer.describe()
            record.request_sha256 = _digest(self.request())
            record.seconds = time.perf_counter() - began
            run = record.to_dict()
            run_record.write_run(folder, run, configurations, self.search.assignments)
        return run


def require_free(out: Path, overwrite: bool) -> None:
    """Only a run, or an empty folder, may be replaced: `--out DATA --overwrite` must not cost the data."""
    if above := next((path for path in out.absolute().parents if path.is_file()), None):
        raise InputError(f"--out: cannot write {out}: {above} is a file, not a folder.")
    if not out.exists():
        return
    if not overwrite:
        raise InputError(f"--out: {out} exists; give another --out, or pass --overwrite.")
    if not out.is_dir() or (any(out.iterdir()) and not (out / "run.json").is_file()):
        raise InputError(f"--overwrite: {out} is not a run folder and is left alone; give another --out.")


def _names(path: Path, request: dict[str, Any]) -> Iterator[Path]:
    """`path`, `path-2`, `path-3`, ... up to the first that does not exist and that no unfinished run of another request
    has."""
    candidate, number = path, 2
    while candidate.exists() or difference(Path(f"{candidate}.partial"), request):
        yield candidate
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    yield candidate


def _digest(request: dict[str, Any]) -> str:
    """sha256 of what decides a result, whatever versions compute it."""
    return digest({name: value for name, value in request.items() if name not in ("cxr-fast", "torch")})


def _put_in_place(folder: Path, out: Path) -> None:
    """Give a finished folder its name, all of it on the disk; one of that name is set aside first and removed last."""
    sync_tree(folder)
    if out.exists():
        os.replace(out, out.with_name(f"{out.name}.old.{os.getpid()}"))
    put_in_place(folder, out)
    for old in out.parent.glob(f"{glob.escape(out.name)}.old.*"):  # of killed runs too
        if old.name.removeprefix(f"{out.name}.old.").isdecimal():  # no folder that a user called so
            shutil.rmtree(old, ignore_errors=True)


def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
