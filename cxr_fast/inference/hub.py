"""Model files on the Hugging Face hub: `hf-hub:owner/name[@revision]` as a file of the hub's own cache."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import InputError
from ..system import huggingface
from ..system.huggingface import explain

PREFIX = "hf-hub:"
MAIN = "main"
COMMIT = re.compile(r"[0-9a-f]{40}")
# The hub's own rules for a name are checked by huggingface_hub; this tells the parts of an address apart.
_ADDRESS = re.compile(r"hf-hub:(?P<repo>[^/@]+/[^/@]+)(?:/(?P<file>[^@]+\.onnx))?(?:@(?P<revision>.+))?")


@dataclass(frozen=True, kw_only=True)
class HubAddress:
    """A repository at a revision (branch, tag or commit), and one file of it where `file` names one."""

    repo: str
    revision: str = MAIN
    file: str = ""

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}" + (f"/{self.file}" if self.file else "") + f"@{self.revision}"


@dataclass(frozen=True, kw_only=True)
class HubFiles:
    """Names of model files of a repository, the preferred one first.

    `offline` says why they are those of the cache alone; it is empty where the hub was asked.
    """

    address: HubAddress
    names: tuple[str, ...]
    offline: str = ""


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a model is named by an address of the hub, well formed or not."""
    return os.fspath(path).startswith(PREFIX)


def parse_address(path: str | os.PathLike[str]) -> HubAddress:
    """Read `hf-hub:owner/name[/FILE.onnx][@REVISION]`. Raises InputError for anything else."""
    found = _ADDRESS.fullmatch(os.fspath(path))
    if found is None:
        raise InputError(
            f"{os.fspath(path)}: no address of a model; write {PREFIX}owner/name or {PREFIX}owner/name@REVISION."
        )
    return HubAddress(repo=found["repo"], revision=found["revision"] or MAIN, file=found["file"] or "")


def with_file(path: Path, name: str) -> Path:
    """Return an address of the hub with `name` where it names no file yet; any other path as it is."""
    if not is_address(path) or (address := parse_address(path)).file:
        return path
    return Path(str(replace(address, file=name)))


def list_files(address: HubAddress, names: Sequence[str]) -> HubFiles:
    """List which of some files, the preferred one first, a repository has, or the cache where the hub does not answer.

    The hub is not asked where the address names a commit of which the first is in the cache: a commit never changes.
    Raises InputError for a repository or revision that does not exist, may not be read, or has none of the files.
    """
    if COMMIT.fullmatch(address.revision) and _in_cache(address, names[0]):
        return HubFiles(address=address, names=(names[0],))
    hub = huggingface.library(str(address))
    offline = "the name of the hub does not resolve"
    if huggingface.hub_resolves():
        try:
            there = huggingface.read_repository(hub, address.repo, address.revision).files
            held = tuple(name for name in names if name in there)
            if not held:
                wanted = " or ".join(sorted(names))
                raise InputError(f"{address}: it holds no {wanted}; `cxrfast push RUN` writes them.")
            return HubFiles(address=address, names=held)
        except huggingface.hub_errors() as error:
            if not huggingface.is_network_error(error):
                raise InputError(f"{address}: {explain(error)}.") from error
            offline = explain(error)
    held = tuple(name for name in names if _in_cache(address, name))
    if not held:
        raise InputError(f"{address}: {offline}, and no model of it is in the cache of earlier downloads.")
    return HubFiles(address=address, names=held, offline=offline)


def download(found: HubFiles, name: str) -> tuple[Path, HubAddress]:
    """Return a file in the hub's cache, downloaded where it is not there yet, and its address with the commit.

    Raises InputError where it cannot be had.
    """
    address = replace(found.address, file=name)
    hub = huggingface.library(str(address))
    try:
        path = Path(
            hub.hf_hub_download(address.repo, name, revision=address.revision, local_files_only=bool(found.offline))
        )
    except huggingface.hub_errors() as error:
        raise InputError(f"{address}: {explain(error)}.") from error
    depth = len(Path(name).parts)
    return path, replace(address, revision=path.parents[depth - 1].name)


@contextlib.contextmanager
def named_by_address(source: str, path: Path) -> Iterator[None]:
    """Make an error of a file in the hub's cache name its address, and say what to do about a damaged one."""
    try:
        yield
    except InputError as error:
        if not is_address(source):
            raise
        text = str(error).removeprefix(f"{path}: ").partition("; export the run again")[0].removesuffix(".")
        raise InputError(
            f"{source}: {text}; delete {path.resolve()} and run again. If it comes back so, it is damaged on the hub."
        ) from error


def _in_cache(address: HubAddress, name: str) -> bool:
    hub = huggingface.library(str(address))
    try:
        return isinstance(hub.try_to_load_from_cache(address.repo, name, revision=address.revision), str)
    except ValueError as error:
        raise InputError(f"{address}: {explain(error)}.") from error
