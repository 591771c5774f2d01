"""Upload a run's verified model files, its card and its tables of figures to the Hugging Face hub.

What goes is an explicit list. Each text of it is cleaned of paths of this machine and of subgroups, then searched for
the images, patients and studies of the run; a model file that holds any of them is refused, for it cannot be cleaned.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..config import NOTICE
from ..data.disclosure import Secrets, list_paths, read_names
from ..errors import InputError
from ..system import huggingface
from ..system.huggingface import explain
from . import hub, model_file, verify
from .model_file import VARIANTS, file_name
from .session import require_one_model

CARD, README = "MODEL_CARD.md", "README.md"
# Sums over all images of a part. Not among them: curves.csv and reliability.csv, a point of which may be one image's
# prediction; cooccurrence.csv, a cell of which may be one patient; evaluation.json, which holds these and subgroups.
TABLES = ("figures.csv", "per_class.csv", "confusion.csv")
TEXT_COLUMNS = ("part", "level", "figure", "tier", "class")
BREAKDOWN = ("by", "group")  # figures.csv: the column a subgroup is of, and its value
# Lines of the card's list of missing figures that name no subgroup, no value and no file.
PLAIN_MISSING = re.compile(
    r"- (training images: no intervals|intervals of [\d,]+ of |\d+ columns? not shown"
    r"|[^:]*: (no intervals|the data names))"
)
USE = """
## Use

```sh
cxrfast predict hf-hub:{repo} films/ --out predictions.csv
```
"""


@dataclass(frozen=True, kw_only=True)
class UploadSpec:
    """Where a run goes: `repo` (owner/name), made `private` if it is new, and the branch `revision`.

    `dry_run` ends before the network; model files are verified on `device` with `threads`.
    """

    repo: str
    private: bool = True
    revision: str = hub.MAIN
    dry_run: bool = False
    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class UploadFile:
    """One file as it goes: its name on the hub, its bytes or where they are, and what was done to it."""

    name: str
    content: Path | bytes
    note: str

    @property
    def size(self) -> int:
        """Bytes that go."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True, kw_only=True)
class UploadPlan:
    """What goes, and what of the run's folder stays here.

    Of what is on the hub: the files that are replaced, and those removed because they are of an earlier model.
    """

    files: tuple[UploadFile, ...]
    replaced: tuple[str, ...]
    removed: tuple[str, ...]
    stays: tuple[str, ...]
    data: str
    is_new: bool


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """The address of what was uploaded, with its commit; its page; and what the hub remarked about the card."""

    address: hub.HubAddress
    page: str
    notes: tuple[str, ...]


def push(run: Path, spec: UploadSpec, on_plan: Callable[[UploadPlan], None]) -> Pushed | None:
    """Upload RUN/model.*.onnx, MODEL_CARD.md as README.md and TABLES in one commit; None for a dry run.

    `on_plan` gets what will go before anything is sent. Files of those names that an earlier model left there and this
    one has not are removed in the same commit. Raises InputError for a folder that is no exported run, a model file
    that does not verify, a text with something of a patient, a repository of the other visibility, and where there is
    no token or no network.
    """
    record = _read_record(run)
    library = huggingface.library("cxrfast push")
    _check_name(spec)
    exists, there = (False, ()) if spec.dry_run else _look(library, spec)
    names_of_run = read_names(run / "predictions.npz", record.get("classes") or ())
    secrets = Secrets(paths=tuple(list_paths(run, record)), names=names_of_run)
    models, info = _verified_models(run, spec, secrets)
    files = [*models, _card(run, spec, info, secrets), *_tables(run, info["labels"])]
    names = {file.name for file in files}
    ours = [*map(file_name, VARIANTS), *TABLES]
    plan = UploadPlan(
        files=tuple(files),
        replaced=tuple(file.name for file in files if file.name in there),
        removed=tuple(name for name in ours if name in there and name not in names),
        stays=tuple(sorted(path.name for path in run.iterdir() if path.name not in {*names, CARD})),
        data=str(info["data"]["name"]),
        is_new=not exists,
    )
    on_plan(plan)
    return None if spec.dry_run else _send(library, spec, plan, str(info["model_sha256"]))


# ------------------------------------------------------------------------------------------------------- the run


def _read_record(run: Path) -> dict[str, Any]:
    """Read run.json. InputError where the folder holds none."""
    path = run / "run.json"
    if not path.is_file():
        raise InputError(f"{run}: no run here (it has no run.json); name the folder that `cxrfast sweep` wrote.")
    try:
        record = json.loads(path.read_bytes())
        record["cache"]["dataset"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged or not of a run ({type(error).__name__}).") from error
    return dict(record)


# ------------------------------------------------------------------------------------------------------ the files


def _verified_models(run: Path, spec: UploadSpec, secrets: Secrets) -> tuple[list[UploadFile], dict[str, Any]]:
    """Verify each model file as `cxrfast verify RUN` does; return them and the metadata of the first."""
    variants = [variant for variant in VARIANTS if (run / file_name(variant)).is_file()]
    if not variants:
        raise InputError(f"{run}: no model.*.onnx in this folder; `cxrfast export {run}` makes them.")
    require_one_model(run, variants)
    paths = [run / file_name(variant) for variant in variants]
    found = verify.verify_all(paths, device=spec.device, threads=spec.threads)
    if verify.exit_code(found):
        bad = next(item for item in found if not isinstance(item, verify.Report) or not item.ok)
        raise InputError(f"nothing was sent: {_failed(bad)}")
    files = []
    for path, item in zip(paths, found, strict=True):
        if isinstance(item, verify.Report):
            note = f"verified on {item.provider}"
        else:  # a file that this device does not run
            model_file.read(path)
            note = "content hash verified; not run, this device does not run it"
        _check_entries(path, secrets)
        files.append(UploadFile(name=path.name, content=path, note=note))
    return files, model_file.read(paths[0], check=False)


def _failed(item: verify.Report | verify.Unjudged) -> str:
    if isinstance(item, verify.Unjudged):
        return str(item.error)
    wrong = "; ".join(f"{check.name}: {check.detail}" for check in item.checks if not check.ok)
    return f"{item.path} does not verify ({wrong})."


def _check_entries(path: Path, secrets: Secrets) -> None:
    """Refuse a model file whose metadata hold what must not go; it is sealed, so it cannot be cleaned."""
    for key, value in model_file.entries(path).items():
        if not key.startswith(model_file.PREFIX):
            raise InputError(f"{path}: another program wrote {key!r} into its metadata; export the run again.")
        for text in _texts(json.loads(value)):
            if what := secrets.find(text):
                raise InputError(f"nothing was sent: {path}: its entry {key} holds {what}.")


def _texts(value: Any) -> Iterator[str]:
    """Every text of a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inside in value.items():
            yield key
            yield from _texts(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from _texts(inside)


def _card(run: Path, spec: UploadSpec, info: dict[str, Any], secrets: Secrets) -> UploadFile:
    """The card without subgroups and paths, with the command that takes the model."""
    path = run / CARD
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read; `cxrfast report {run}` writes it.") from error
    if NOTICE not in text:
        raise InputError(f"{path} lacks the notice {NOTICE!r}; `cxrfast report {run}` writes it again.")
    if info["model_sha256"][:16] not in text:
        raise InputError(
            f"{path} is of another model than the model files; `cxrfast report {run}` and `cxrfast export {run}` "
            "make both again."
        )
    kept, left = _without_subgroups(text.splitlines())
    text = secrets.clean("\n".join(kept) + "\n") + USE.format(repo=spec.repo)
    if what := secrets.find(text):
        raise InputError(f"nothing was sent: {path} holds {what}.")
    notes = [f"{CARD}", f"without {left} line(s) on subgroups or files" if left else ""]
    return UploadFile(name=README, content=text.encode(), note=", ".join(filter(None, notes)))


def _without_subgroups(lines: Sequence[str]) -> tuple[list[str], int]:
    """Drop the section Shortcuts, and the lines of Missing that may name a subgroup or a file; return the rest and
    the number of lines dropped."""
    out: list[str] = []
    section, left = "", 0
    for line in lines:
        if line.startswith("## "):
            section = line.removeprefix("## ")
        if section == "Missing" and line.startswith("- ") and not PLAIN_MISSING.match(line):
            left += 1
        elif section == "Shortcuts":
            left += line.startswith("- ")
        else:
            out.append(line)
    return out, left


def _tables(run: Path, labels: Sequence[str]) -> list[UploadFile]:
    """The tables of TABLES that the run has, without the rows and columns of subgroups."""
    files = []
    for name in TABLES:
        if not (run / name).is_file():
            continue
        try:
            with open(run / name, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except (OSError, ValueError, csv.Error) as error:
            raise InputError(f"{run / name} cannot be read ({error}); `cxrfast report {run}` writes it.") from error
        kept = [row for row in rows if not row.get(BREAKDOWN[0])]
        columns = [column for column in (rows[0] if rows else ()) if column not in BREAKDOWN]
        for row, column in ((row, column) for row in kept for column in columns):
            if not _is_figure(column, row[column], labels):
                raise InputError(
                    f"nothing was sent: {run / name} holds {row[column]!r} in the column {column}, which is no figure; "
                    f"`cxrfast report {run}` writes it again."
                )
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(columns)
        writer.writerows([row[column] for column in columns] for row in kept)
        less = len(rows) - len(kept)
        note = f"without {less} row(s) on views and subgroups" if less else ""
        files.append(UploadFile(name=name, content=text.getvalue().encode(), note=note))
    return files


def _is_figure(column: str, cell: str, labels: Sequence[str]) -> bool:
    """Whether a cell is a number, empty, one of the model's classes, or a word that this program writes."""
    if column == "class":
        return cell in labels
    if column in TEXT_COLUMNS:
        return re.fullmatch(r"[a-z0-9_() ]*", cell) is not None
    try:
        return not cell or not math.isinf(float(cell))
    except (ValueError, TypeError):
        return False


# -------------------------------------------------------------------------------------------------------- the hub


def _check_name(spec: UploadSpec) -> None:
    """Refuse a name of a repository or branch that the hub does not allow, before anything is read."""
    bare, _, revision = spec.repo.removeprefix(hub.PREFIX).partition("@")
    if bare != spec.repo:
        write = "/".join(bare.split("/")[:2]) + (f" --revision {revision}" if revision else "")
        raise InputError(f"{spec.repo!r} is the address to take a model from; to push there, write {write}.")
    if spec.repo.count("/") != 1:
        raise InputError(f"{spec.repo!r} is no repository of the hub; write owner/name.")
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(spec.repo)
    except ValueError as error:
        raise InputError(f"{spec.repo!r} is no repository of the hub: {explain(error)}.") from error
    if hub.COMMIT.fullmatch(spec.revision) or not _is_branch(spec.revision):
        raise InputError(f"--revision: {spec.revision!r} is no name of a branch.")


def _is_branch(name: str) -> bool:
    """Whether git takes a name for a branch (git-check-ref-format), of those that need no quoting in a shell."""
    parts = name.split("/")
    return (
        re.fullmatch(r"\w[\w./-]*", name) is not None
        and all(part and not part.startswith(".") and not part.endswith(".lock") for part in parts)
        and ".." not in name
        and not name.endswith(".")
        and name != "HEAD"
    )


def _look(library: Any, spec: UploadSpec) -> tuple[bool, tuple[str, ...]]:
    """Whether the repository exists, and the names of its files. InputError where it cannot be written."""
    if not library.get_token():
        raise InputError("no Hugging Face token: set HF_TOKEN to one that may write, or run `hf auth login`.")
    if not huggingface.hub_resolves():
        raise InputError(f"{spec.repo}: the hub does not answer, its name does not resolve.")
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        found = huggingface.read_repository(library, spec.repo)
        _require_same_visibility(spec, found.private)
        if spec.revision != hub.MAIN:
            found = huggingface.read_repository(library, spec.repo, spec.revision)
    except RevisionNotFoundError:
        pass  # a new branch begins with the files of main
    except RepositoryNotFoundError as error:
        if huggingface.status_of(error) == 403:
            raise InputError(f"{spec.repo}: {explain(error)}.") from error
        return False, ()
    except huggingface.hub_errors() as error:
        raise InputError(f"{spec.repo}: {explain(error)}.") from error
    return True, found.files


def _require_same_visibility(spec: UploadSpec, private: bool) -> None:
    if spec.private and not private:
        raise InputError(f"{spec.repo} exists and is public; pass --public to put this model there, or another name.")
    if private and not spec.private:
        raise InputError(f"{spec.repo} exists and is private; pass --private, or make it public on its page first.")


def _send(library: Any, spec: UploadSpec, plan: UploadPlan, model_sha256: str) -> Pushed:
    """Make the repository and the branch where they are new, and upload all in one commit."""
    api = library.HfApi()
    huggingface.limit_waiting(library)
    operations = [
        library.CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.content) for file in plan.files
    ]
    operations += [library.CommitOperationDelete(path_in_repo=name) for name in plan.removed]
    try:
        with warnings.catch_warnings(record=True) as remarks, huggingface.answers_of_the_hub():
            warnings.simplefilter("always")
            if plan.is_new:
                api.create_repo(spec.repo, private=spec.private, exist_ok=True)
            if spec.revision != hub.MAIN:
                api.create_branch(spec.repo, branch=spec.revision, exist_ok=True)
            commit = api.create_commit(
                spec.repo,
                operations,
                commit_message=f"Model {model_sha256[:16]}, uploaded by cxr-fast {__version__}",
                revision=spec.revision,
            )
    except huggingface.hub_errors() as error:
        raise InputError(f"{spec.repo}: the upload failed: {explain(error)}.") from error
    return Pushed(
        address=hub.HubAddress(repo=spec.repo, revision=commit.oid),
        page=f"{huggingface.without_login(api.endpoint)}/{spec.repo}/tree/{commit.oid}",
        notes=tuple(" ".join(str(remark.message).split()) for remark in remarks if remark.category is UserWarning),
    )
