"""Modules import downwards only, `predict` runs without torch, and `--help` answers at once."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cxr_fast
from cxr_fast import model_file
from cxr_fast.cli import main

PACKAGE = Path(cxr_fast.__file__).parent
FLOORS = {
    0: ("__init__", "errors", "wire"),
    1: (
        "config",
        "labels",
        "tables",
        "text",
        "dicom",
        "anatomy",
        "lock",
        "markup",
        "plots",
        "flat",
        "whole",
        "operations",
    ),
    2: (
        *("layouts", "rows", "splits", "preprocess", "findings", "metrics", "calibrate", "timing", "twins", "curves"),
        *("model_file", "devices", "formats", "stream"),
    ),
    3: (
        *("datasets", "phantom", "store", "session", "backbone", "activations", "losses", "saved", "subgroups"),
        *("cpu", "material", "shell", "drift", "inputs", "overlay", "bench_plots", "cluster", "products"),
    ),
    4: ("tail", "reuse", "index", "outcome", "making", "card", "predict", "doctor"),
    5: (
        *("encode", "train", "runs", "selection", "tails", "page", "resume", "reference", "benchmark_record"),
        "cluster_predict",
    ),
    6: (
        *("heads", "stacked", "journal", "shards", "verify", "evaluation", "versus", "graph", "model_check", "answers"),
        *("explain", "bench_worker"),
    ),
    7: ("cluster_cache", "search", "checks", "bench", "compare"),
    8: (
        "finals",
        "record",
        "report",
        "export",
        "bench_cache",
        "bench_compare",
        "serving",
        "cluster_search",
        "bench_info",
    ),
    9: ("sweep", "bench_training", "throughput", "info"),
    10: ("data_commands", "train_commands", "model_commands", "bench_commands"),
    11: ("cli",),
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules}
HEAVY = ("torch", "open_clip", "timm", "h5py", "pandas", "sklearn", "onnx", "matplotlib", "transformers", "ray")


def imported(source: str, modules: set[str]) -> set[str]:
    """Modules of the package that a source imports anywhere in it; `__init__` for the package itself."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for parts in (alias.name.split(".") for alias in node.names):
                if parts[0] == "cxr_fast":
                    found.add(parts[1] if len(parts) > 1 else "__init__")
        elif isinstance(node, ast.ImportFrom):
            assert node.level < 2, "the package is flat"
            inside = (node.module or "") if node.level else (node.module or "").removeprefix("cxr_fast").lstrip(".")
            if node.level or (node.module or "").split(".")[0] == "cxr_fast":
                names = [inside.split(".")[0]] if inside else [alias.name for alias in node.names]
                found |= {name if name in modules else "__init__" for name in names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            named = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
            if str(named).startswith((".", "cxr_fast.")):
                found.add(str(named).removeprefix("cxr_fast").lstrip(".").split(".")[0])
    return found


def violations(sources: dict[str, str], floor: dict[str, int]) -> list[str]:
    """Every import that does not go strictly down, and every module without a floor."""
    unlisted = [f"{module} has no floor" for module in sorted(set(sources) - set(floor))]
    return unlisted + [
        f"{module} ({floor[module]}) imports {other} ({floor.get(other)})"
        for module in sorted(set(sources) & set(floor))
        for other in sorted(imported(sources[module], set(sources)))
        if floor.get(other, 99) >= floor[module]
    ]


def sources() -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in PACKAGE.glob("*.py")}


def test_modules_import_only_from_lower_floors() -> None:
    assert violations(sources(), FLOOR) == []


def test_the_package_is_flat_and_the_table_names_no_ghost() -> None:
    assert {path.parent for path in PACKAGE.rglob("*.py")} == {PACKAGE}
    assert set(FLOOR) == set(sources())
    assert len(FLOOR) == sum(map(len, FLOORS.values()))


@pytest.mark.parametrize(
    "planted",
    [
        "from .sweep import Sweep",
        "from . import sweep",
        "from . import errors, sweep as later",
        "import cxr_fast.sweep",
        "import cxr_fast.sweep as later",
        "from cxr_fast import sweep",
        "from cxr_fast.sweep import Sweep",
        "def inner():\n    from .sweep import Sweep",
        "class Inner:\n    def deep(self):\n        from . import sweep",
        "if TYPE_CHECKING:\n    from .sweep import Sweep",
        "import importlib\nimportlib.import_module('.sweep', 'cxr_fast')",
        "__import__('cxr_fast.sweep')",
    ],
)
def test_the_check_finds_a_planted_violation(planted: str) -> None:
    clean = dict.fromkeys(FLOOR, "from . import errors\n") | dict.fromkeys(FLOORS[0], "")
    assert violations(clean, FLOOR) == []
    for module in ("tail", "sweep", "verify"):
        found = violations({**clean, module: clean[module] + planted}, FLOOR)
        assert found == [f"{module} ({FLOOR[module]}) imports sweep (9)"]
    assert violations({**clean, "cli": clean["cli"] + planted}, FLOOR) == []


def test_the_check_finds_a_module_without_a_floor() -> None:
    assert violations({"errors": "", "extra": ""}, FLOOR) == ["extra has no floor"]
    assert violations({"errors": "from . import extra", "extra": ""}, FLOOR) == [
        "extra has no floor",
        "errors (0) imports extra (None)",
    ]


# A fresh process: what is in sys.modules afterwards.


def loaded(code: str, *arguments: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter after `code`."""
    tail = "\nimport json, sys\nprint(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    command = [sys.executable, "-c", code + tail, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PACKAGE.parent, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_predict_imports_without_torch() -> None:
    found = loaded("import cxr_fast.predict")
    assert {"onnxruntime", "numpy", "cxr_fast"} <= found
    assert found.isdisjoint(HEAVY)


@pytest.mark.parametrize(("module", "brings"), [("backbone", "torch"), ("store", "h5py")])
def test_the_process_check_can_fail(module: str, brings: str) -> None:
    assert brings in loaded(f"import cxr_fast.predict, cxr_fast.{module}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file of ours, written by hand: the probability of its one class is the mean grey level."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["pixels"], ["grey"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["grey", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "scale"], ["scaled"]),
        helper.make_node("Reshape", ["scaled", "shape"], ["probabilities"]),
    ]
    graph = helper.make_graph(
        nodes,
        "grey",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 16, 16])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 1])],
        [
            helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2]),
            helper.make_tensor("scale", TensorProto.FLOAT, [], [1 / 255]),
            helper.make_tensor("shape", TensorProto.INT64, [2], [-1, 1]),
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    entries = {
        "schema": model_file.SCHEMA,
        "labels": ["bright"],
        "labels_sha256": model_file.labels_sha256(["bright"]),
        "thresholds": [0.5],
        "preprocess": {"size": 16, "resize": "squash", "dicom_policy": "voi"},
    }
    helper.set_model_props(proto, {f"cxr.{name}": json.dumps(value) for name, value in entries.items()})
    path = tmp_path_factory.mktemp("model") / "grey.onnx"
    model_file.write(path, proto.SerializeToString())
    return path


def test_a_whole_prediction_runs_without_torch(model: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (40, 40), 204).save(tmp_path / "a.png")
    out = tmp_path / "out.csv"
    found = loaded(
        "import sys\nfrom cxr_fast.cli import main\n"
        "main(['predict', sys.argv[1], sys.argv[2], '--out', sys.argv[3], '--device', 'cpu', '--decide'], "
        "standalone_mode=False)",
        str(model),
        str(tmp_path / "a.png"),
        str(out),
    )
    assert found.isdisjoint(HEAVY)
    assert "onnxruntime" in found
    head, row = out.read_text().splitlines()
    assert head == "path,status,reason,bright,findings"
    assert row == f"{tmp_path / 'a.png'},ok,,0.8000001,bright"


COMMANDS = ["", *main.commands, *(f"bench {name}" for name in getattr(main.commands["bench"], "commands", ()))]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command: str) -> None:
    found = loaded(
        f"from cxr_fast.cli import main\nmain({[*command.split(), '--help']!r}, standalone_mode=False, prog_name='x')"
    )
    assert "click" in found
    assert found.isdisjoint((*HEAVY, "numpy", "PIL", "onnxruntime"))


def test_help_answers_in_under_300_ms() -> None:
    script = shutil.which("cxrfast", path=str(Path(sys.executable).parent))
    command = [script] if script else [sys.executable, "-c", "from cxr_fast.cli import main; main()"]
    times = []
    for _ in range(5):
        began = time.perf_counter()
        result = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True, timeout=60)
        times.append(time.perf_counter() - began)
    assert "cxrfast predict MODEL FILES" in result.stdout
    assert min(times) < 0.3
