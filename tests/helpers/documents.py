"""The README and the pages of docs/ taken apart: their fenced blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from cxr_fast.cli.main import main

ROOT = Path(__file__).parent.parent.parent
ACTIVATE = ". .venv/bin/activate"
# Every page by its path from the root of the repository.
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
# What click raises for a group without a command, where it does not show its help.
GROUP_ALONE = getattr(click.exceptions, "NoArgsIsHelpError", click.MissingParameter)
FENCE = re.compile(rf"^(?:{NOT_RUN.pattern}\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its language ("" without one), its text, and why it is not run ("" where it is)."""

    page: str
    line: int
    language: str
    text: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(language: str | None = None, page: str | None = None) -> list[Block]:
    """The fenced blocks of all pages, or of one, in order; of one language, or of all."""
    found = [
        Block(name, text[: match.start(3)].count("\n"), match[2], match[3], match[1] or "")
        for name, text in PAGES.items()
        for match in FENCE.finditer(text)
        if page in (None, name)
    ]
    return [block for block in found if language in (None, block.language)]


def simple_commands(text: str) -> Iterator[str]:
    """The commands of a shell block, one by one: pipes, `;` and `if ...; then` taken apart, comments left out.

    So is the line that tells the shell where `cxrfast` is: the tests know.
    """
    for line in text.splitlines():
        if line.partition("#")[0].strip() == ACTIVATE:
            continue
        lexer = shlex.shlex(line, posix=False, punctuation_chars=";|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= {";", "|"}:
                if words:
                    yield " ".join(words)
                words = []
            elif words or word not in ("if", "then", "else", "fi"):
                words.append(word)


def cxrfast_commands(text: str) -> list[str]:
    """The `cxrfast` commands of a shell block, those that Slurm starts included."""
    found = (re.search(r"(?:^|\.sh )(cxrfast .*)", command) for command in simple_commands(text))
    return [match[1] for match in found if match]


def parse(line: str, *, complete: bool = True) -> list[str]:
    """Read a command line with click's own parser and run nothing; its command and arguments.

    `complete=False` lets arguments be left out. Raises click.UsageError for what does not exist.
    """
    words = shlex.split(line, comments=True)
    assert words[0] == "cxrfast", line
    context = main.make_context("cxrfast", words[1:])
    command: click.Command = main
    try:
        while isinstance(command, click.Group):
            name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            assert name is not None
            assert found is not None
            command, context = found, found.make_context(name, rest, parent=context)
    except click.UsageError as error:
        if complete or not isinstance(error, (click.MissingParameter, GROUP_ALONE)):
            raise
    return words[1:]


def command_of(words: list[str]) -> tuple[str, click.Command]:
    """The name of the command that these arguments call, such as `bench latency`, and the command."""
    command: click.Command = main
    names: list[str] = []
    for word in words:
        if not isinstance(command, click.Group) or word not in command.commands:  # `runs` has a command by default
            break
        names.append(word)
        command = command.commands[word]
    return " ".join(names), command
