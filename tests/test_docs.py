"""What the README, the Makefile and the messages tell a user to type exists, and everything public says what it is."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import h5py
import pytest

from cxr_fast.cli import main

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cxr_fast"
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted(PACKAGE.glob("*.py"))


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language in the README; an empty language is a fence without a name."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in fences if name == language]


def parse(line: str, *, complete: bool = True) -> None:
    """Read a command line with click's own parser and run nothing. `complete=False` lets arguments be left out."""
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
    except click.MissingParameter:
        if complete:
            raise


def commands(group: click.Group = main, path: str = "cxrfast") -> Iterator[tuple[str, click.Command]]:
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


SHELL = [line for text in blocks("sh") for line in text.splitlines() if line.startswith("cxrfast ")]


@pytest.mark.parametrize("line", SHELL)
def test_a_command_of_the_readme_parses(line: str) -> None:
    parse(line)


def test_the_main_job_is_in_the_readme() -> None:
    steps = [shlex.split(line, comments=True)[1] for line in SHELL]
    assert steps[:6] == ["prepare", "cache", "sweep", "export", "predict", "bench"]


def test_commands_within_sentences_parse() -> None:
    spans = re.findall(r"`(cxrfast [^`]+)`", README)
    assert spans
    for span in spans:
        parse(span, complete=False)


def test_the_parser_above_refuses_what_does_not_exist() -> None:
    for line in ("cxrfast cash data", "cxrfast cache data --wieghts x", "cxrfast bench speed", "cxrfast --frobnicate"):
        with pytest.raises(click.UsageError):
            parse(line, complete=False)
    with pytest.raises(click.MissingParameter):
        parse("cxrfast predict model.onnx --out p.csv")


def test_the_commands_of_the_makefile_parse() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = re.findall(r"^\t@?(\$\(CXR\) .*?)(?: \|\|.*)?$", text, re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        plain = line.replace("$(CXR)", "cxrfast")
        while "$(" in plain:
            plain = re.sub(r"\$\([^()]*\)", "9", plain)
        parse(plain)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_commands_that_messages_tell_to_type_parse(module: Path) -> None:
    """`cxrfast cache SOURCE --out {file} --repair` in an error must not send a user to a second error."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        for text in re.findall(r"`(cxrfast [^`]+)`", written(node)):
            parse(text, complete=False)


def written(node: ast.AST) -> str:
    """The text of a string or an f-string, a letter in place of each value."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "X" for v in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_flags_of_the_readme_exist() -> None:
    known = {option for _, command in commands() for param in command.params for option in param.opts}
    spans = [span for span in re.findall(r"`([^`\n]+)`", README) if span.startswith(("cxrfast", "--"))]
    used = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)}
    assert used
    assert used <= known


@pytest.mark.parametrize(
    ("path", "command"), list(commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_command_and_every_flag_says_what_it_is_for(path: str, command: click.Command) -> None:
    assert command.help, path
    options = [param for param in command.params if isinstance(param, click.Option)]
    assert not [option.name for option in options if not option.help]


def test_the_tree_names_every_module() -> None:
    tree = next(text for text in blocks("") if text.startswith("cxr_fast/"))
    named = re.findall(r"^  (\w+\.py) +\S", tree, re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in MODULES if path.name != "__init__.py")
    for folder in re.findall(r"^(\w+)/", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir()


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_everything_public_has_a_docstring(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    bare = [] if ast.get_docstring(tree) else ["the module"]
    owners: list[tuple[str, ast.Module | ast.ClassDef]] = [("", tree)]
    owners += [(f"{node.name}.", node) for node in tree.body if isinstance(node, ast.ClassDef)]
    for prefix, owner in owners:
        for node in owner.body:
            # forward() is what its class describes, and invoke() is click's.
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and node.name not in ("forward", "invoke") and not ast.get_docstring(node):
                bare.append(prefix + node.name)
    assert bare == []


# ------------------------------------------------------------------------------------ the README's Python, run


def test_the_readmes_prediction_runs(
    toy_model: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = next(text for text in blocks("python") if "Predictor" in text)
    (path,) = re.findall(r'Predictor\("(.*)"\)', code)
    (tmp_path / path).parent.mkdir(parents=True)
    shutil.copy(toy_model, tmp_path / path)
    images = sorted((toy_data / "images").iterdir())
    shutil.copy(images[0], tmp_path / "film.png")
    shutil.copy(images[3], tmp_path / "broken.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    text = capsys.readouterr().out
    first, *rest = text.splitlines()
    assert 0 < float(first) < 1
    assert rest[0].startswith("film.png [")
    assert rest[-1] == "broken.png truncated"


def test_the_readmes_reading_of_a_cache_runs(toy_cache: Path) -> None:
    code = next(text for text in blocks("python") if "h5py" in text)
    (path,) = re.findall(r'h5py\.File\("(.*)"\)', code)
    found: dict[str, object] = {}
    exec(compile(code.replace(path, str(toy_cache)), "README.md", "exec"), found)
    assert len(found["classes"]) == 35  # type: ignore[arg-type]
    assert found["first"].shape == (2, 101, 64)  # type: ignore[attr-defined]
    assert found["labels"].shape == (79, 35)  # type: ignore[attr-defined]


def test_the_readmes_table_is_the_file(toy_cache: Path) -> None:
    section = README.partition("## The cache file")[2].partition("\n## ")[0]
    named = [
        name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    ]
    attributes = re.findall(r"`(\w+)`", section.partition("Attributes:")[2].partition("h5py")[0])
    with h5py.File(toy_cache) as file:
        assert sorted(named) == sorted(file)
        assert sorted(attributes) == sorted(file.attrs)
