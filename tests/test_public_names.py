"""The names that `from cxr_fast import ...` gives: complete, typed, free until used, each with an example that runs."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import json
import os
import pydoc
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cxr_fast

TORCH = {"Sweep", "build_cache", "export_run"}  # names whose module loads torch; all others must not
UNDOCUMENTED = {"Cache"}  # open_cache shows one
EXAMPLES = sorted(
    name
    for name in cxr_fast.__all__
    if name not in UNDOCUMENTED and not (name.endswith("Error") or name == "Interrupted")
)


def in_new_process(code: str) -> list[str]:
    """What a fresh interpreter prints as JSON after `code`, such as the modules it has loaded (LOADED)."""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return list(json.loads(result.stdout.splitlines()[-1]))


LOADED = "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"


def test_the_list_of_names_is_sorted_and_what_dir_and_help_show() -> None:
    assert cxr_fast.__all__ == sorted(cxr_fast.__all__)
    assert set(cxr_fast.__all__) <= set(dir(cxr_fast))
    text = pydoc.plain(pydoc.render_doc(cxr_fast))
    for name in cxr_fast.__all__:
        assert name in text, name
    # pydoc lists what lies in the folder: the packages, never the modules inside them.
    assert "predictor\n" not in text.partition("CLASSES")[0]


def test_every_name_is_there_and_others_are_refused() -> None:
    for name in cxr_fast.__all__:
        value = getattr(cxr_fast, name)
        assert value is getattr(importlib.import_module(f"cxr_fast.{cxr_fast._MODULE[name]}"), name)
    with pytest.raises(AttributeError, match="has no attribute 'Predicter'"):
        cxr_fast.Predicter  # noqa: B018
    with pytest.raises(ImportError, match="Predicter"):
        exec("from cxr_fast import Predicter", {})


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(cxr_fast.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.name == alias.asname, "without `as` a type checker does not hand the name on"
            seen[alias.name] = node.module
    assert seen == cxr_fast._MODULE
    assert Path(cxr_fast.__file__).with_name("py.typed").is_file()


def test_importing_the_package_loads_nothing() -> None:
    before = set(in_new_process(LOADED))
    after = set(in_new_process("import cxr_fast" + LOADED))
    of_importlib = {"importlib", "importlib._bootstrap", "importlib._bootstrap_external", "warnings"}
    assert after - before - of_importlib == {"cxr_fast"}


@pytest.mark.parametrize("first", ["cxr_fast.predict", "cxr_fast.inference.batch", "cxr_fast.export.variants"])
def test_onnx_runtime_reports_to_nobody(first: str, tmp_path: Path) -> None:
    """From 1.29 its import leaves an identifier and a queue in the home folder, unless it was told not to before."""
    set_by_others = ("ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "CI", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in set_by_others}
    code = (
        f"import {first}, os, sys; assert 'onnxruntime' in sys.modules and os.environ['ORT_DISABLE_TELEMETRY'] == '1'"
    )
    command = [sys.executable, "-c", code]
    subprocess.run(command, check=True, timeout=280, env=environment | {"HOME": str(tmp_path)})
    assert [path for path in tmp_path.rglob("*") if "onnxruntime" in path.name] == []


def test_only_training_names_load_torch() -> None:
    free = sorted(set(cxr_fast.__all__) - TORCH)
    assert "torch" not in in_new_process(f"from cxr_fast import {', '.join(free)}" + LOADED)
    asked = f"""
import json, sys
import cxr_fast
sys.modules["torch"] = None  # its import fails from here on
for name in (names := {sorted(TORCH)!r}):
    try:
        getattr(cxr_fast, name)
    except ModuleNotFoundError as error:
        names[names.index(name)] = error.name
print(json.dumps(names))
"""
    assert in_new_process(asked) == ["torch"] * len(TORCH)


def test_no_public_name_is_also_that_of_a_package() -> None:
    """Importing cxr_fast.export.graph anywhere sets `cxr_fast.export` to the package, whatever __getattr__ gives."""
    inside = {path.stem for path in Path(cxr_fast.__file__).parent.iterdir()}
    assert inside.isdisjoint(cxr_fast.__all__)


@pytest.fixture
def desk(
    toy_data: Path, toy_cache: Path, toy_run: Path, toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working folder with a dataset, its cache, a run and its model under the names that the examples use."""
    for folder in ("cache", "exports"):
        (tmp_path / folder).mkdir()
    (tmp_path / "indiana").symlink_to(toy_data)
    (tmp_path / "cache" / "indiana.h5").symlink_to(toy_cache)
    shutil.copytree(toy_run, tmp_path / "exports" / "indiana")
    shutil.copy(toy_model, tmp_path / "exports" / "indiana" / "model.fp32.onnx")
    shutil.copy(sorted((toy_data / "images").iterdir())[0], tmp_path / "film.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_name_runs(name: str, desk: Path) -> None:
    value = getattr(cxr_fast, name)
    names = {each: getattr(cxr_fast, each) for each in cxr_fast.__all__} | {"Path": Path}
    text = inspect.getdoc(value) or ""
    example = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    assert example.examples, f"{name} shows no example"
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(example, out=said.append)
    assert not runner.summarize(verbose=False).failed, "".join(said)


@pytest.mark.usefixtures("sketched")
def test_the_library_prints_nothing(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each public call that does work, and its progress callback; on both streams, C libraries included."""
    from cxr_fast import ExportSpec, SweepSpec, TrainSpec

    told: list[tuple[object, ...]] = []

    def tell(*values: object) -> None:
        told.append(values)

    films = cxr_fast.read_dataset("indiana", limit=6)
    cxr_fast.write_manifest(films, "films.csv")
    spec = cxr_fast.CacheSpec(weights="random:0:test_vit")
    cxr_fast.build_cache(films, "cache/few.h5", spec, device="cpu", on_progress=tell)
    cache = cxr_fast.open_cache("cache/indiana.h5")
    assert len(cache.dataset()) == cache.ok.sum()
    search = SweepSpec(epochs=(1,), folds=2, train=TrainSpec(lr=1e-3, batch_size=8))
    sweep = cxr_fast.Sweep(cache.path, "exports/quiet", search, cxr_fast.SweepOptions(device="cpu"))
    assert sweep.plan().seconds > 0
    sweep.run(tell)
    cxr_fast.read_run(sweep.out).module()
    cxr_fast.read_record(sweep.out)
    (one,) = cxr_fast.export_run(sweep.out, ExportSpec(count=8), on_progress=tell)
    cxr_fast.write_report(sweep.out, resamples=10)
    cxr_fast.evaluate(sweep.out, resamples=10)
    cxr_fast.compare_runs("exports/indiana", sweep.out, resamples=10, part="out_of_fold")
    cxr_fast.Predictor(one.path, device="cpu")("film.png")
    assert len({len(values) for values in told}) > 1, "progress of several kinds"
    assert capfd.readouterr() == ("", "")
