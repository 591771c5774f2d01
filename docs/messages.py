"""Print every error and note of the program with its place, to be read as a stranger: python docs/messages.py

A message is any text of four words or more that is no docstring. Values that are filled in stand as `{...}`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "cxr_fast"


def text_of(node: ast.expr) -> str:
    """The text of a string or an f-string, also of several in a row; empty for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(v) if isinstance(v, ast.Constant) else "{" + ast.unparse(v.value) + "}"  # type: ignore[attr-defined]
                       for v in node.values)  # fmt: skip
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return ""


def docstrings(tree: ast.AST) -> set[int]:
    """Which nodes are docstrings, by identity."""
    owners = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
    first = [owner.body[0] for owner in owners if owner.body]
    return {id(n.value) for n in first if isinstance(n, ast.Expr)}


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each message of a module, in order."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped, parts = docstrings(tree), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr | ast.BinOp):
            parts |= {id(inner) for inner in ast.walk(node)} - {id(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.expr) or id(node) in skipped | parts:
            continue
        text = " ".join(text_of(node).split())
        if text.count(" ") > 2:
            yield node.lineno, text


if __name__ == "__main__":
    for module in sorted(PACKAGE.rglob("*.py")):
        for line, message in sorted(messages(module)):
            print(f"{module.relative_to(PACKAGE)}:{line}: {message}")
