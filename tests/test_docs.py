"""What the README, docs/, the Makefile and messages tell a user to type exists; everything public says what it is."""

from __future__ import annotations

import ast
import csv
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import h5py
import numpy as np
import pytest
from click.testing import CliRunner

import cxr_fast
from cxr_fast.cli.main import main
from cxr_fast.data.manifest import read_dataset
from cxr_fast.inference.predictor import Predictor

from .helpers.documents import ACTIVATE, PAGES, Block, blocks, cxrfast_commands, parse, simple_commands

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cxr_fast"
README = PAGES["README.md"]
EVERYTHING = "\n".join(PAGES.values())
MODULES = sorted(PACKAGE.rglob("*.py"))
PUBLISHED = "https://github.com/brijk143/MMED_RAG"
# Commands of others that the pages show.
# Files that pages link and another change brings.
COMING = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md", "docker/README.md"}
STRANGERS = {"awk", "echo", "find", "make", "pip", "python", "ray", "sbatch"}


def commands(group: click.Group = main, path: str = "cxrfast") -> Iterator[tuple[str, click.Command]]:
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


SHELL = [(str(block), line) for block in blocks("sh") for line in cxrfast_commands(block.text)]


@pytest.mark.parametrize("line", [line for _, line in SHELL])
def test_a_command_of_the_pages_parses(line: str) -> None:
    parse(line)


def test_every_page_shows_what_it_is_about() -> None:
    assert len(README.splitlines()) < 200
    assert len(SHELL) > 50
    assert {page for page in PAGES if "/how-to/" in page} <= {where.partition(":")[0] for where, _ in SHELL}


def test_commands_of_others_are_known() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for block in blocks("sh"):
        for command in simple_commands(block.text):
            first, *words = command.split()
            assert first in {"cxrfast", *STRANGERS}, f"{block}: {command}"
            if first == "make":
                assert words[0] in targets, f"{block}: {command}"
            if first == "python":
                assert (ROOT / words[0]).is_file(), f"{block}: {command}"


def test_the_extras_that_pages_name_exist() -> None:
    """`pip install 'cxr-fast[cpu]'` must not install a bare package with a warning."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        known = set(tomllib.load(file)["project"]["optional-dependencies"])
    if "train" not in known:
        pytest.skip("the extras are not split yet")
    named = [name for group in re.findall(r"(?:cxr-fast|\.)\[([a-z,]+)\]'", EVERYTHING) for name in group.split(",")]
    assert set(named) >= {"cpu", "gpu", "train", "dev", "dicom", "parquet", "cluster"}
    assert set(named) <= known
    (table,) = re.findall(r"## Extras\n(.*?)\n## ", PAGES["docs/how-to/install.md"], re.DOTALL)
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == known


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_of_the_pages_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


def test_the_table_that_pages_show_is_a_manifest(tmp_path: Path, toy_data: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("1.png", "2.dcm"):
        (tmp_path / "a" / name).write_bytes(b"")
    texts = {block.text for block in blocks("csv")}
    assert len(texts) == 1, "two pages show different tables"
    (tmp_path / "my.csv").write_text(texts.pop(), encoding="utf-8")
    manifest = read_dataset(tmp_path / "my.csv")
    assert manifest.classes == ("Cardiomegaly", "Effusion")
    assert manifest.labels.tolist() == [[1, 0], [1, -1]]
    assert manifest.groups == ("p1", "p1")
    assert manifest.subgroups == {"sex": ("F", "F")}


def test_the_main_job_is_in_the_readme() -> None:
    steps = [line.split()[1] for where, line in SHELL if where.startswith("README.md:")]
    assert steps[:8] == ["prepare", "cache", "sweep", "sweep", "export", "verify", "predict", "bench"]
    assert steps[8:13] == ["prepare", "cache", "sweep", "export", "predict"]
    main_job = blocks("sh", "README.md")[1].text
    assert main_job.startswith(ACTIVATE), "make install puts cxrfast where no shell looks"
    # The plain default takes most of a day on two cores.
    assert main_job.index("cxrfast sweep --recipe tuned") < main_job.index("cxrfast sweep   ")


def test_the_readmes_table_names_every_command() -> None:
    assert sorted(re.findall(r"^\| `cxrfast (\w+)` \|", README, re.MULTILINE)) == sorted(main.commands)


def test_the_reference_has_every_command_and_every_public_name() -> None:
    shown = re.findall(r"^    :command: (\w+)$", PAGES["docs/reference/commands.md"], re.MULTILINE)
    assert sorted(shown) == sorted(main.commands)
    assert (
        sorted(re.findall(r"^::: cxr_fast\.(\w+)$", PAGES["docs/reference/python.md"], re.MULTILINE))
        == cxr_fast.__all__
    )


def test_links_between_pages_lead_somewhere() -> None:
    """Files, and headings where a link names one; `make docs` checks the same of docs/ alone."""
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("https://") or target in COMING:
                continue
            file, _, heading = target.partition("#")
            path = ROOT / page if not file else (ROOT / page).parent / file
            assert path.is_file(), f"{page}: {target}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = [re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles]
                assert heading in slugs, f"{page}: {target}"


def test_every_page_is_in_the_menu() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert sorted(re.findall(r"- (\S+\.md)$", text, re.MULTILINE)) == sorted(
        page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")
    )


def test_the_site_asks_for_nothing_from_the_network() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "https://" not in text
    assert "font: false" in text
    assert "polyfills: [assets/iframe-worker.js]" in text
    assert (ROOT / "docs" / "assets" / "iframe-worker.js").is_file()


def test_the_published_recipe_is_named_with_its_address() -> None:
    words = r"published\s+(?:recipe|pipeline|code|method|choices|labels|learning rate)"
    for page, text in PAGES.items():
        assert not re.search(words, text) or PUBLISHED in text, page


def test_what_the_method_costs_is_said() -> None:
    for page in ("README.md", "docs/explanation/limits.md"):
        for fact in ("plain and mirrored", "other side of the chest", "224 x 224 pixels", "Research use only"):
            assert fact in PAGES[page], f"{page}: {fact}"


def test_commands_within_sentences_parse() -> None:
    spans = re.findall(r"`(cxrfast [^`]+)`", EVERYTHING)
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


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_commands_that_messages_tell_to_type_parse(module: Path) -> None:
    """`cxrfast cache SOURCE --out {file} --repair` in an error must not send a user to a second error."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        for text in re.findall(r"`(cxrfast [^`]+)`", written(node)):
            parse(text, complete=False)


def written(node: ast.AST) -> str:
    """The text of a string or an f-string, a digit in place of each value."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "9" for v in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_flags_of_the_pages_exist() -> None:
    known = {
        option
        for _, command in commands()
        for param in command.params
        for option in (*param.opts, *param.secondary_opts)
    }
    spans = [span for span in re.findall(r"`([^`\n]+)`", EVERYTHING) if span.startswith(("cxrfast", "--"))]
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


@pytest.mark.parametrize("group", [main, main.commands["bench"]], ids=["cxrfast", "bench"])
def test_the_list_of_commands_cuts_no_sentence(group: click.Group) -> None:
    """On a terminal of 80 columns, the narrowest that is common."""
    longest = max(map(len, group.commands))
    for name, command in group.commands.items():
        said = command.get_short_help_str(80 - 2 - 6 - longest)
        assert re.search(r"[^.]\.$", said), f"{name}: {said}"


def test_the_tree_names_every_room() -> None:
    (tree,) = (block.text for block in blocks("", "docs/reference/source_tree.md"))
    named = re.findall(r"^  (\w+(?:\.py|/)) +\S", tree, re.MULTILINE)
    rooms = [f"{path.name}/" if path.is_dir() else path.name for path in PACKAGE.iterdir()]
    assert sorted(named) == sorted(set(rooms) - {"__init__.py", "py.typed", "__pycache__/"})
    for folder in re.findall(r"^(\w+)/", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir()


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
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


# ------------------------------------------------ blocks whose result is looked at; test_docs_run.py runs the others


def test_the_readmes_prediction_runs(
    toy_model: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = (block.text for block in blocks("python", "README.md"))
    (path,) = re.findall(r'Predictor\("(.*)"\)', code)
    (tmp_path / path).parent.mkdir(parents=True)
    shutil.copy(toy_model, tmp_path / path)
    images = sorted((toy_data / "images").iterdir())
    shutil.copy(images[0], tmp_path / "film.png")
    shutil.copy(images[3], tmp_path / "broken.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "page", "exec"), {})
    text = capsys.readouterr().out
    first, *rest = text.splitlines()
    assert 0 < float(first) < 1
    assert rest[0].startswith("film.png [")
    assert rest[-1] == "broken.png truncated"


def test_a_head_and_a_loss_of_ones_own_train_and_export_as_the_page_says(
    toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = (block.text for block in blocks("python", "docs/recipes.md"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "exports").mkdir()
    shutil.copy(toy_cache, tmp_path / "cache" / "indiana.h5")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "page", "exec"), {"__name__": "page"})
    run = json.loads((tmp_path / "exports/own/run.json").read_text(encoding="utf-8"))
    assert [layer["layer"] for layer in run["custom"]["layers"]["inside"].values()] == [
        *("LayerNorm", "Linear", "GELU", "Dropout", "Linear")
    ]
    assert (tmp_path / "exports/own/model.fp32.onnx").is_file()


# --------------------------------------------------------------------------------------- the table of benchmarks


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that writes the table of ratios in docs/explanation/benchmarks.md."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("readme_table")


def test_the_figures_of_the_benchmarks_page_are_those_of_the_results(tables: ModuleType) -> None:
    page = PAGES[tables.PAGE.relative_to(ROOT).as_posix()]
    assert tables.common.between(page, "benchmarks") == tables.table(), "run python benchmarks/readme_table.py"
    assert tables.common.filled(page, "benchmarks", tables.table()) == page


def test_the_table_follows_the_newest_result_and_says_what_is_not_measured(tables: ModuleType, tmp_path: Path) -> None:
    rows = tables.rows()
    assert len({row["what"] for row in rows}) == len(rows) > 10
    assert all("| | | |" in line for line in tables.table(tmp_path).splitlines()[2:]), "figures without a file"
    common = {"name": "cache", "gpu": None, "machine": {"cpu": "X", "cores": 2}, "weights": "random:0"}
    for date, share in (("2026-01-01", 0.5), ("2026-02-01", 0.75)):
        spread = {"n": 3, "median": share, "min": share - 0.1, "max": share + 0.1}
        (tmp_path / f"cache-{date}.json").write_text(json.dumps(common | {"date": date, "bound_over_whole": spread}))
    lines = [line for line in tables.table(tmp_path).splitlines()[2:] if "| | | |" not in line]
    assert len(lines) == 1, "a CPU's figure stands for no GPU's"
    assert "| 0.75 [0.65, 0.85] | 3 | X, 2 cores, 2026-02-01 | `run_cache.py` |" in lines[0]
    other = common | {"machine": {"cpu": "Y", "cores": 4}, "date": "2026-01-15", "bound_over_whole": 0.9}
    (tmp_path / "cache-other.json").write_text(json.dumps(other))
    line = next(line for line in tables.table(tmp_path).splitlines() if "X, 2" in line)
    kept = "0.75 [0.65, 0.85]<br>0.90 | 3<br> | X, 2 cores, 2026-02-01<br>Y, 4 cores, 2026-01-15"
    assert kept in line, "one machine's figure hides another's"


def test_a_command_of_the_table_is_a_file(tables: ModuleType) -> None:
    for row in tables.rows():
        assert (ROOT / "benchmarks" / row["command"].split()[0]).is_file()
    drivers = re.findall(r"\$\(BENCH\)/(\w+\.py)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert len(drivers) >= 6
    assert all((ROOT / "benchmarks" / name).is_file() for name in drivers)


MODEL = "exports/indiana/model.fp32.onnx"


@pytest.fixture
def desk(toy_model: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what the batch scripts of the pages read, under the names they use; one film is broken."""
    (tmp_path / MODEL).parent.mkdir(parents=True)
    shutil.copy(toy_model, tmp_path / MODEL)
    images = sorted((toy_data / "images").iterdir())
    (tmp_path / "new_films" / "ward").mkdir(parents=True)
    for image, name in zip(images, ("a.png", "b.png", "ward/c.png", "d.png"), strict=False):
        shutil.copy(image, tmp_path / "new_films" / name)
    shutil.copy(images[0], tmp_path / "film.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def batch_scripts(language: str) -> list[str]:
    """The blocks of the page, as they stand."""
    return [block.text for block in blocks(language, "docs/how-to/batch_scripts.md")]


def positives() -> dict[str, dict[str, tuple[float, float]]]:
    """What the folder's sound films hold over their thresholds: probability and threshold by film and class."""
    predictor = Predictor(MODEL, device="cpu")
    films = [f"new_films/{name}" for name in ("a.png", "b.png", "ward/c.png")]
    limits = dict(zip(predictor.labels, predictor.thresholds, strict=True))
    found = dict(zip(films, predictor(films), strict=True))
    return {f: {c: (p, limits[c]) for c, p in each.items() if p >= limits[c]} for f, each in found.items()}


def test_the_batch_script_runs(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = batch_scripts("python")
    exec(compile(code, "page", "exec"), {})
    with open(desk / "positives.csv", newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["path", "class", "probability", "threshold"]
    expected = [
        [film, name, f"{p:.4f}", f"{limit:.4f}"]
        for film, each in positives().items()
        for name, (p, limit) in each.items()
    ]
    assert expected, "no film has a finding: the comparison shows nothing"
    assert rows == expected
    assert capsys.readouterr().err == "new_films/d.png: truncated\n"


@pytest.mark.skipif(not (shutil.which("awk") and shutil.which("sh")), reason="needs sh and awk")
def test_the_shell_line_runs(desk: Path) -> None:
    (line,) = batch_scripts("sh")
    (desk / "bin").mkdir()
    (desk / "bin" / "cxrfast").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cxr_fast "$@"\n')
    (desk / "bin" / "cxrfast").chmod(0o755)
    path = f"{desk / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    said = [row for row in result.stdout.splitlines() if row.startswith("new_films/")]
    assert said == [f"{film}: {';'.join(each)}" for film, each in positives().items() if each]
    assert "1 image(s) failed" in result.stderr


def test_plain_onnxruntime_gives_the_predictors_numbers(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, code = batch_scripts("python")
    assert "cxr_fast" not in code
    assert len([line for line in code.splitlines() if line]) <= 10
    found: dict[str, object] = {}
    exec(compile(code, "page", "exec"), found)
    predictor = Predictor(MODEL, device="cpu")
    np.testing.assert_array_equal(np.asarray(found["film"]), predictor.pixels("film.png"))
    assert ast.literal_eval(capsys.readouterr().out) == predictor(["film.png"])[0]


def test_the_heat_map_is_drawn(toy_run: Path, desk: Path) -> None:
    shutil.copytree(toy_run, "exports/indiana", dirs_exist_ok=True)
    line = next(line for _, line in SHELL if line.startswith("cxrfast explain"))
    result = CliRunner().invoke(main, shlex.split(line, comments=True)[1:])
    assert result.exit_code == 0, result.output
    assert (desk / "overlay.png").stat().st_size > 1000


def test_the_reading_of_a_cache_runs(toy_cache: Path) -> None:
    (code,) = (block.text for block in blocks("python", "docs/reference/cache_file.md"))
    (path,) = re.findall(r'h5py\.File\("(.*)"\)', code)
    found: dict[str, object] = {}
    exec(compile(code.replace(path, str(toy_cache)), "page", "exec"), found)
    assert len(found["classes"]) == 35  # type: ignore[arg-type]
    assert found["first"].shape == (2, 101, 64)  # type: ignore[attr-defined]
    assert found["labels"].shape == (79, 35)  # type: ignore[attr-defined]


def test_the_table_of_the_cache_file_is_the_file(toy_cache: Path) -> None:
    section = PAGES["docs/reference/cache_file.md"].partition("\n## ")[0]
    named = [
        name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    ]
    attributes = re.findall(r"`(\w+)`", section.partition("Attributes:")[2].partition("h5py")[0])
    with h5py.File(toy_cache) as file:
        assert sorted(named) == sorted(file)
        assert sorted(attributes) == sorted(file.attrs)
