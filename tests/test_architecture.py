"""The house rules that a machine can hold: who imports whom, what stays without torch, how large a room may be.

Each check is a function of sources, so that a test can plant a violation and see it found.
"""

from __future__ import annotations

import ast
import functools
import json
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import cxr_fast
from cxr_fast.cli.main import main
from cxr_fast.inference import model_file

PACKAGE = Path(cxr_fast.__file__).parent
# A package imports only packages before it; ORDER[:TORCH_FREE] never imports torch.
ORDER = (
    *("errors", "config", "recipes", "grid", "system", "data", "metrics", "inference"),
    *("models", "activations", "unlikeness", "training", "export", "report", "external", "review"),
    *("runs", "loggers", "cluster", "bench", "cli"),
)
TORCH_FREE = ("errors", "config", "recipes", "grid", "system", "data", "metrics", "inference", "external")
NO_TORCH_AT_TOP = ("report", "cli")
STRANGERS = frozenset({"inference", "metrics", "models"})  # these do not know each other
FACES = {"predict": "inference", "__main__": "cli", "__init__": ""}  # modules beside the packages, and whom they show
HEAVY = ("torch", "open_clip", "timm", "h5py", "pandas", "sklearn", "onnx", "matplotlib", "transformers", "ray")

MODULES, LINES, FUNCTION, ARGUMENTS = 12, 400, 60, 6

Sources = dict[str, str]  # "training.fold" -> source


def sources() -> Sources:
    """Every module of the package by its dotted name inside it; a package's __init__ by the package's name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path.read_text("utf-8")
    return found


parse = functools.cache(ast.parse)  # several checks look at the same source


def folder(module: str) -> str:
    """The package a module is in, or the module itself where it stands beside the packages."""
    return module.partition(".")[0]


def imports(module: str, source: str, known: set[str], *, top: bool = False) -> set[str]:
    """Dotted names that a source imports: inside the package without `cxr_fast.`, others by their first part.

    `top` looks only at what runs when the module is imported, and not under TYPE_CHECKING.
    """
    here = module.split(".") if any(name.startswith(f"{module}.") for name in known) else module.split(".")[:-1]
    found: set[str] = set()

    def add(name: str, names: list[str]) -> None:
        if name.split(".")[0] != "cxr_fast":
            found.add(name.split(".")[0])
            return
        inside = name.partition(".")[2]
        for each in names or [""]:
            longer = f"{inside}.{each}".strip(".")
            found.add(longer if longer in known else inside or "__init__")

    for node in walk(parse(source), top):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name, [])
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(["cxr_fast", *here[: len(here) - node.level + 1]]) if node.level else ""
            add(".".join(part for part in (base, node.module) if part), [alias.name for alias in node.names])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            named = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
            if str(named).startswith("."):
                add(f"cxr_fast{named}", [])
            elif named:
                add(str(named), [])
    return found


def walk(tree: ast.AST, top: bool) -> list[ast.AST]:
    """Every node, or with `top` those outside functions and outside `if TYPE_CHECKING`."""
    if not top:
        return list(ast.walk(tree))
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        found += [node, *walk(node, top)]
    return found


# ------------------------------------------------------------------------------------------------ the checks


def upward(found: Sources) -> list[str]:
    """Imports that do not go up the order, cycles inside a package excepted: those are `cycles`."""
    out = []
    for module, source in sorted(found.items()):
        own = folder(module)
        for other in sorted(imports(module, source, set(found))):
            target = folder(other)
            if target == own or target not in (*ORDER, *FACES):
                continue
            allowed = ORDER[: ORDER.index(own)] if own in ORDER else ORDER
            strange = {own, target} <= STRANGERS
            if target in FACES and not (target == "__init__" and own not in FACES):
                out.append(f"{module} imports {other}, which is for users")
            elif target in ORDER and (target not in allowed or strange):
                out.append(f"{module} imports {other}")
    return out


def cycles(found: Sources) -> list[str]:
    """Modules that import each other in a circle, at any depth of function; the root imports its names when asked."""
    arrows = {name: imports(name, text, set(found)) & set(found) for name, text in found.items()}
    arrows["__init__"] = set()
    left = {name: others - {name} for name, others in arrows.items()}
    while True:
        free = {name for name, others in left.items() if not others & set(left)}
        if not free:
            return sorted(left)
        left = {name: others for name, others in left.items() if name not in free}


def torch_users(found: Sources) -> list[str]:
    """Modules of the torch-free half that import torch, or the packages below the line, anywhere; and of report and
    cli at top level."""
    out = []
    for module, source in sorted(found.items()):
        own = folder(module)
        anywhere, at_top = (imports(module, source, set(found), top=top) for top in (False, True))
        if (own in TORCH_FREE or own in FACES) and "torch" in anywhere:
            out.append(f"{module} imports torch")
        if own in NO_TORCH_AT_TOP and "torch" in at_top:
            out.append(f"{module} imports torch at top level")
        if own != "cluster" and "ray" in anywhere:
            out.append(f"{module} imports ray")
    return out


def crowded(found: Sources) -> list[str]:
    """Packages of more than MODULES modules; a package inside a package counts by itself."""
    packages = {module for module in found if any(name.startswith(f"{module}.") for name in found)}
    count = Counter(module.rpartition(".")[0] for module in found if module not in packages and "." in module)
    return [f"{name} has {number} modules" for name, number in sorted(count.items()) if number > MODULES]


def long_modules(found: Sources) -> dict[str, int]:
    """Modules of more than LINES lines."""
    return {name: lines for name, text in found.items() if (lines := len(text.splitlines())) > LINES}


def functions(found: Sources) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function by `module:Class.name`."""
    out: list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]] = []

    def visit(node: ast.AST, path: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{path}{child.name}"
                if not isinstance(child, ast.ClassDef):
                    out.append((name, child))
                visit(child, f"{name}.")
            else:
                visit(child, path)

    for module, source in sorted(found.items()):
        visit(parse(source), f"{module}:")
    return out


def long_functions(found: Sources) -> dict[str, int]:
    """Functions of more than FUNCTION lines, docstring and signature counted."""
    sizes = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions(found)}
    return {name: size for name, size in sizes.items() if size > FUNCTION}


def many_arguments(found: Sources) -> dict[str, int]:
    """Functions of more than ARGUMENTS arguments beside self and cls, commands of click excepted."""
    out = {}
    for name, node in functions(found):
        if any("command" in ast.unparse(each) for each in node.decorator_list):
            continue
        named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len([arg for arg in named if arg.arg not in ("self", "cls")])
        if count > ARGUMENTS:
            out[name] = count
    return out


def shared_class_names(found: Sources) -> list[str]:
    """Public classes of one name in two modules."""
    where: dict[str, list[str]] = defaultdict(list)
    for module, source in sorted(found.items()):
        for node in ast.walk(parse(source)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].append(module)
    return [f"{name} in {', '.join(modules)}" for name, modules in sorted(where.items()) if len(modules) > 1]


def plural_aliases(found: Sources) -> list[str]:
    """Modules of ours imported under the plural of a module's name."""
    singular = {module.rpartition(".")[2] for module in found}
    out = []
    for module, source in sorted(found.items()):
        for node in ast.walk(parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("cxr_fast")):
                out += [
                    f"{module} imports {alias.name} as {alias.asname}"
                    for alias in node.names
                    if alias.asname and alias.name in singular and alias.asname.endswith("s")
                ]
    return out


# ------------------------------------------------------------------------------------------------ the package


def test_packages_import_only_what_stands_above_them() -> None:
    assert upward(sources()) == []


def test_no_module_imports_itself_through_others() -> None:
    assert cycles(sources()) == []


def test_torch_and_ray_stay_in_their_rooms() -> None:
    assert torch_users(sources()) == []


# The head's training loop: one linear pass over a step, 1.8 to 2.2 times faster than the stacked one on a CPU.
LONG = {"training.folds.head_fold:_steps"}
# The public class: a user's head and loss stand in its signature by name.
MANY = LONG | {"training.sweep:SweepJob.__init__"}


def test_rooms_and_functions_stay_small() -> None:
    found = sources()
    assert crowded(found) == []
    assert long_modules(found) == {}
    assert set(long_functions(found)) <= LONG
    assert set(many_arguments(found)) <= MANY


def test_names_are_not_shared() -> None:
    assert shared_class_names(sources()) == []
    assert plural_aliases(sources()) == []


def test_every_package_is_in_the_order_and_says_what_is_in_it() -> None:
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE}
    assert folders == set(ORDER) - {"errors", "config", "recipes"}
    beside = {path.stem for path in PACKAGE.glob("*.py")}
    assert beside == {"errors", "config", "recipes", *FACES}
    for path in PACKAGE.rglob("__init__.py"):
        body = ast.parse(path.read_text("utf-8")).body
        assert ast.get_docstring(ast.Module(body, [])), path
        assert path.parent == PACKAGE or len(body) == 1, f"{path}: one docstring and no code"


# ------------------------------------------------------------------------------- the checks find what is planted

CLEAN: Sources = {
    "__init__": "",
    "errors": "",
    "config": "from .errors import E",
    **dict.fromkeys(ORDER[2:], '"""A package."""'),
    **{f"{name}.thing": "from ..errors import E\nfrom .. import __version__" for name in ORDER[2:]},
}


def planted(module: str, text: str) -> Sources:
    return {**CLEAN, module: CLEAN[module] + "\n" + text}


def test_clean_sources_pass() -> None:
    for check in (upward, cycles, torch_users, crowded, shared_class_names, plural_aliases):
        assert check(CLEAN) == []
    for limit in (long_modules, long_functions, many_arguments):
        assert limit(CLEAN) == {}


@pytest.mark.parametrize(
    "text",
    [
        "from ..training.thing import A",
        "from ..training import thing",
        "from .. import errors, training",
        "import cxr_fast.training.thing",
        "import cxr_fast.training.thing as later",
        "from cxr_fast.training import thing",
        "from cxr_fast import training",
        "def inner():\n    from ..training.thing import A",
        "class Inner:\n    def deep(self):\n        from ..training import thing",
        "if TYPE_CHECKING:\n    from ..training import thing",
        "import importlib\nimportlib.import_module('.training.thing', 'cxr_fast')",
        "__import__('cxr_fast.training.thing')",
    ],
)
def test_an_upward_import_is_found(text: str) -> None:
    for module in ("system.thing", "data.thing", "activations.thing"):
        (found,) = upward(planted(module, text))
        assert found.startswith(f"{module} imports training")
    assert upward(planted("report.thing", text)) == []


def test_strangers_and_faces_are_found() -> None:
    assert upward(planted("inference.thing", "from ..metrics import thing")) == [
        "inference.thing imports metrics.thing"
    ]
    assert upward(planted("models.thing", "from ..inference import thing")) == ["models.thing imports inference.thing"]
    face = {**CLEAN, "predict": "from .inference.thing import A"}
    assert upward(face) == []
    user = {**face, "bench.thing": "from ..predict import Predictor"}
    assert upward(user) == ["bench.thing imports predict, which is for users"]
    assert upward({**face, "predict": "from .training.thing import A"}) == []  # torch decides there: see torch_users


def test_a_cycle_is_found() -> None:
    found = {**CLEAN, "data.other": "from .thing import A", "data.thing": "def late():\n    from . import other"}
    assert cycles(found) == ["data.other", "data.thing"]


def test_torch_is_found_in_any_depth() -> None:
    inner = "def inner():\n    import torch.nn"
    assert torch_users(planted("inference.thing", inner)) == ["inference.thing imports torch"]
    assert torch_users(planted("cli.thing", inner)) == []
    assert torch_users(planted("cli.thing", "from torch import nn")) == ["cli.thing imports torch at top level"]
    assert torch_users(planted("cli.thing", "if TYPE_CHECKING:\n    import torch")) == []
    assert torch_users(planted("training.thing", "import torch")) == []
    assert torch_users(planted("training.thing", "def f():\n    import ray")) == ["training.thing imports ray"]


def test_large_rooms_are_found() -> None:
    many = {**CLEAN, **{f"data.m{i}": "" for i in range(MODULES)}}
    assert crowded(many) == [f"data has {MODULES + 1} modules"]
    assert long_modules({"a": "x = 1\n" * LINES, "b": "x = 1\n" * (LINES + 1)}) == {"b": LINES + 1}
    body = "    x = 1\n" * FUNCTION
    assert long_functions({"a": f"class C:\n  def f(self):\n{body}"}) == {"a:C.f": FUNCTION + 1}
    assert long_functions({"a": f"def f():\n{body[len(body) // FUNCTION :]}"}) == {}
    assert many_arguments({"a": "def f(self, a, b, c, d, e, f): ...\ndef g(a, b, c, d, e, *, f, g): ..."}) == {"a:g": 7}
    assert many_arguments({"a": "@click.command()\ndef f(a, b, c, d, e, f, g): ..."}) == {}
    assert shared_class_names({"a": "class A: ...", "b": "class A: ...\nclass _B: ..."}) == ["A in a, b"]
    alias = {"fold": "", "search": "from . import fold as folds\nfrom . import fold as one"}
    assert plural_aliases(alias) == ["search imports fold as folds"]


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


@pytest.mark.parametrize(("module", "brings"), [("models.backbone", "torch"), ("activations.file", "h5py")])
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
        "import sys\nfrom cxr_fast.cli.main import main\n"
        "main(['predict', sys.argv[1], sys.argv[2], '--out', sys.argv[3], '--device', 'cpu', '--decide'], "
        "standalone_mode=False)",
        str(model),
        str(tmp_path / "a.png"),
        str(out),
    )
    assert found.isdisjoint(HEAVY)
    assert "onnxruntime" in found
    head, row = out.read_text().splitlines()
    assert head == "path,status,reason,note,unlikeness,bright,findings"
    assert row == f"{tmp_path / 'a.png'},ok,,,,0.8000001,bright"


COMMANDS = ["", *main.commands, *(f"bench {name}" for name in getattr(main.commands["bench"], "commands", ()))]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command: str) -> None:
    found = loaded(
        "from cxr_fast.cli.main import main\n"
        f"main({[*command.split(), '--help']!r}, standalone_mode=False, prog_name='x')"
    )
    assert "click" in found
    assert found.isdisjoint((*HEAVY, "numpy", "PIL", "onnxruntime"))


def test_the_installed_command_and_the_module_answer() -> None:
    script = shutil.which("cxrfast", path=str(Path(sys.executable).parent))
    for command in ([sys.executable, "-m", "cxr_fast"], *([[script]] if script else [])):
        result = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True, timeout=60)
        assert "cxrfast predict MODEL FILES" in result.stdout
