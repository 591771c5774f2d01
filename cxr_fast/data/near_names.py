"""Find names that differ a little from those listed: of files by backslashes, Unicode, case, suffix; of classes."""

from __future__ import annotations

import difflib
import functools
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping

_SUFFIXES = re.compile(r"(\.(png|jpe?g|tiff?|bmp|dcm|dicom))+$", re.IGNORECASE)
_STEPS: Mapping[str, Callable[[str], str]] = {
    "backslashes": lambda name: name.replace("\\", "/"),
    "composed and decomposed letters": lambda name: unicodedata.normalize("NFC", name),
    "upper and lower case": str.casefold,
    "the suffix": lambda name: _SUFFIXES.sub("", name),
}


def spell_name(name: str) -> str:
    """Return one spelling of a path for all that differ a little."""
    for step in _STEPS.values():
        name = step(name)
    return name


def name_differences(listed: str, found: str) -> str:
    """Say in what two names differ that `spell_name` makes equal: `backslashes and the suffix`."""
    one, other, tried = listed, found, []
    for name, step in _STEPS.items():
        if one != other:
            one, other = step(one), step(other)
            tried.append(name)
    return " and ".join(name for name in tried if not _equal(listed, found, {*tried} - {name})) or "spelling"


def nearest_name(name: str, names: Iterable[str], least: float = 0.6) -> str:
    """Return the one of `names` that is nearest to a class's name, empty where none is near.

    Case, underscores and hyphens do not count. Nearness is the share of letters in common, in order (difflib).

        >>> nearest_name("Pleural effusion", ["Effusion", "Edema", "Pleural_Thickening"])
        'Effusion'
    """
    plain = {_spell_class(each): each for each in names}
    own = _spell_class(name)
    inside = [each for each in plain if set(each.split()) <= set(own.split())]
    found = sorted(inside, key=len, reverse=True) or difflib.get_close_matches(own, plain, n=1, cutoff=least)
    return plain[found[0]] if found else ""


def _spell_class(name: str) -> str:
    return " ".join(re.sub(r"[\W_]+", " ", unicodedata.normalize("NFC", name).casefold()).split())


def _equal(one: str, other: str, steps: Collection[str]) -> bool:
    for name in _STEPS:
        if name in steps:
            one, other = _STEPS[name](one), _STEPS[name](other)
    return one == other


class NearNames:
    """Looks for files by names that differ a little; the names in each folder are read once."""

    def __init__(self) -> None:
        self._folders: dict[str, tuple[dict[str, list[str]], dict[str, list[str]]]] = {}

    def find(self, root: str, listed: str) -> list[str]:
        """Return the files below `root` that a listed path may mean, as paths relative to `root`: mostly one or none.

        An absolute path is returned as one. Of files that differ in the suffix alone from the listed name, all are
        returned; of those that have its suffix, only these.
        """
        parts = listed.replace("\\", "/").split("/")
        at = ["/"] if parts[0] == "" else []
        for part in parts[:-1]:
            if part in ("", ".", "..") or os.path.isdir(os.path.join(root, *at, part)):
                at += [part] if part else []
                continue
            fits = [name for name in self._below(root, at, part)[0] if os.path.isdir(os.path.join(root, *at, name))]
            if len(fits) != 1:
                return []
            at.append(fits[0])
        same, other = self._below(root, at, parts[-1])
        for fits in (same, other):
            if files := [name for name in fits if os.path.isfile(os.path.join(root, *at, name))]:
                return ["/".join([*at, name]).replace("//", "/") for name in sorted(files)]
        return []

    def _below(self, root: str, at: list[str], name: str) -> tuple[list[str], list[str]]:
        """Names in a folder that equal `name` but for Unicode and case, and those that also differ in the suffix."""
        folder = os.path.join(root, *at)
        if folder not in self._folders:
            whole: dict[str, list[str]] = {}
            stems: dict[str, list[str]] = {}
            try:
                names = os.listdir(folder)
            except OSError:
                names = []
            for each in names:
                whole.setdefault(_spell_whole(each), []).append(each)
                stems.setdefault(spell_name(each), []).append(each)
            self._folders[folder] = whole, stems
        whole, stems = self._folders[folder]
        return whole.get(_spell_whole(name), []), stems.get(spell_name(name), [])


@functools.lru_cache(maxsize=4)
def _remember(folder: str, changed: int) -> NearNames:
    """The names of a folder as of its last change, for many files that are missing from it."""
    return NearNames()


def hint_at(path: str) -> str:
    """Say which file beside a missing one has nearly its name, and what differs; empty where there is none."""
    folder, name = os.path.split(path)
    folder = folder or os.curdir
    try:
        fits = _remember(folder, os.stat(folder).st_mtime_ns).find(folder, name)
    except (OSError, ValueError):
        return ""
    return f"{fits[0]} is there, which differs in {name_differences(name, fits[0])}" if fits else ""


def _spell_whole(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
