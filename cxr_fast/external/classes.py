"""Match the class columns of a labelled table with the classes of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.near_names import nearest_name
from ..errors import InputError
from ..system.text import counted

NAMED = 5


@dataclass(frozen=True, kw_only=True)
class MatchedClasses:
    """The classes that a model and a table both have.

    `names` are the model's, in its order; `columns` the table's column of each. `lacking` are classes of the model that
    the table has not, `unknown` columns of the table that are no class of the model.
    """

    names: tuple[str, ...]
    columns: tuple[str, ...]
    lacking: tuple[str, ...]
    unknown: tuple[str, ...]


def match_classes(theirs: Sequence[str], ours: Sequence[str], renamed: Sequence[str], table: str) -> MatchedClasses:
    """Match a table's class columns with a model's classes by name, and by `renamed`, texts THEIRS=OURS.

    `table` names the table in messages. Raises InputError for a text of `renamed` that fits no column and class, for
    two columns of one class, and where no class matches.
    """
    column_of = {name: name for name in theirs if name in ours}
    for text in renamed:
        column, name = _read_renamed(text, theirs, ours, table)
        if column_of.get(name, column) != column:
            raise InputError(
                f"--map {text}: class {name!r} has the column {column_of[name]!r} of {table} already; one class takes "
                "one column."
            )
        column_of[name] = column
    names = tuple(name for name in ours if name in column_of)
    used = set(column_of.values())
    found = MatchedClasses(
        names=names,
        columns=tuple(column_of[name] for name in names),
        lacking=tuple(name for name in ours if name not in column_of),
        unknown=tuple(name for name in theirs if name not in used),
    )
    if not names:
        said = describe_unknown(found, table)
        raise InputError(f"{table} has none of the {len(ours)} classes of the model ({_some(ours)}); {said}.")
    return found


def _read_renamed(text: str, theirs: Sequence[str], ours: Sequence[str], table: str) -> tuple[str, str]:
    """The column and the class of THEIRS=OURS; either may hold an equals sign."""
    parts = text.split("=")
    pairs = [("=".join(parts[:k]).strip(), "=".join(parts[k:]).strip()) for k in range(1, len(parts))]
    if not pairs:
        raise InputError(f"--map {text}: write THEIRS=OURS, a class column of {table}, then a class of the model.")
    for column, name in pairs:
        if column in theirs and name in ours:
            return column, name
    column, name = pairs[0]
    if column not in theirs:
        what, wanted, names = f"{table} has no class column", column, theirs
    else:
        what, wanted, names = "the model has no class", name, ours
    near = nearest_name(wanted, names)
    said = f"nearest: {near!r}" if near else f"it has {_some(names)}"
    raise InputError(f"--map {text}: {what} {wanted!r}; {said}.")


def describe_unknown(found: MatchedClasses, table: str) -> str:
    """Name the columns that are no class of the model, and for those near one the flag that takes them as that."""
    free = found.lacking
    near = {name: nearest_name(name, free) for name in found.unknown}
    hints = [f'--map "{name}={other}"' for name, other in near.items() if other]
    are = "are" if len(found.unknown) != 1 else "is"
    said = f"{counted(len(found.unknown), 'column')} of {table} {are} no class of the model: {_some(found.unknown)}"
    return said + (f"; nearest: {', '.join(hints[:NAMED])}" if hints else "")


def describe_classes(found: MatchedClasses, table: str) -> list[str]:
    """Lines about what has no figures: classes that the table lacks, columns that the model lacks."""
    lines = []
    total = len(found.names) + len(found.lacking)
    if found.lacking:
        have = "has" if len(found.lacking) == 1 else "have"
        lines.append(
            f"{len(found.lacking)} of {total} classes of the model {have} no column in {table} and no figures: "
            f"{_some(found.lacking)}"
        )
    if found.unknown:
        lines.append(describe_unknown(found, table))
    return lines


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(map(repr, names[:NAMED])) + (f" and {more} more" if more > 0 else "")
