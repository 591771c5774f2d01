"""An extension of griffe that shows the `>>>` examples of docstrings as code on the page of the Python API."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^[ ]*>>> .*(?:\n[ ]*\S.*)*", re.MULTILINE)


def fenced(text: str) -> str:
    """The docstring with each example, up to the next empty line, as a fenced block without its indentation."""
    return EXAMPLE.sub(lambda found: f"```pycon\n{unindented(found[0])}\n```", text)


def unindented(text: str) -> str:
    """The lines of an example without the indentation that its first line has."""
    width = len(text) - len(text.lstrip(" "))
    return "\n".join(line[width:] for line in text.splitlines())


class Examples(griffe.Extension):
    """Fence the examples of every docstring that griffe reads."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
