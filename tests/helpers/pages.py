"""A page taken apart, and a browser that loads it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

VOID = {"meta", "img", "br", "hr", "link", "input"}
# What makes a browser ask for something, by attribute.
ASKING = ("src", "srcset", "data", "poster", "action", "formaction", "background", "ping", "manifest", "xlink:href")


class Page(HTMLParser):
    """Tags with their attributes, the text, the sections, and the tables by caption as lists of rows."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.sections: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.marked: list[list[str]] = []
        self._rows: list[list[str]] = []
        self._mark = False
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append((tag, named))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections.append(named["id"] or "")
        if tag == "div" and named.get("role") == "region":
            self._name = named["aria-label"] or ""
        elif tag == "table":
            assert self._name not in self.tables, "two tables of one name"
            self._rows = self.tables[self._name] = []
        elif tag == "tr":
            self._rows.append([])
            if named.get("class") == "chosen":
                self.marked.append(self._rows[-1])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self._rows[-1][-1] += data
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def requests(self) -> list[str]:
        """Everything in the page that would make a browser ask for something that is not in it."""
        found = []
        for tag, attributes in self.tags:
            for name, value in attributes.items():
                asks = (
                    name in ASKING or (name == "href" and tag != "a") or (name == "style" and "url(" in (value or ""))
                )
                if asks and not (value or "").startswith("data:"):
                    found.append(f"{tag} {name}={value}")
        styles = "".join(re.findall(r"<style.*?</style>", self.source, re.DOTALL))
        found += re.findall(r"@import[^;]*", styles)
        found += [url for url in re.findall(r"url\(([^)]*)\)", styles) if not url.strip("'\" ").startswith("data:")]
        scripts = "".join(re.findall(r"<script.*?</script>", self.source, re.DOTALL))
        return found + re.findall(r"fetch\(|XMLHttpRequest|WebSocket|sendBeacon|import\(|new Image", scripts)


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Before anything of the page: everything it does wrong, scripts, pictures and refused addresses alike.
LISTEN = """<script>
var wrong = [];
addEventListener("error", function (e) { wrong.push(String(e.message || e.target.outerHTML).slice(0, 200)); }, true);
addEventListener("securitypolicyviolation", function (e) { wrong.push("refused " + e.blockedURI); });
["error", "warn"].forEach(function (kind) { console[kind] = function (text) { wrong.push(kind + ": " + text); }; });
</script>"""
TELL = """<script>addEventListener("load", function () { setTimeout(function () {
  var asked = performance.getEntriesByType("resource").map(function (entry) { return entry.name; });
  document.title = JSON.stringify({wrong: wrong, asked: asked, found: %s});
}, 50); });</script>"""


def browse(page: Path, scratch: Path, script: str = "null") -> dict[str, Any]:
    """What a headless Chromium finds in a page: `wrong`, what it `asked` for, and `found`, the value of a script.

    Skips the test where there is no Chromium.
    """
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium here; `apt-get install chromium` lets this run")
    text = page.read_text(encoding="utf-8").replace("<head>", f"<head>{LISTEN}", 1)
    probe = scratch / "probe.html"
    probe.write_text(text.replace("</body>", f"{TELL % script}</body>"), encoding="utf-8")
    quiet = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")
    flags = ("headless", "no-sandbox", "disable-gpu", *quiet, f"user-data-dir={scratch / 'profile'}")
    command = [program, *(f"--{flag}" for flag in flags), "--virtual-time-budget=5000", "--dump-dom"]
    result = subprocess.run([*command, probe.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    title = re.search(r"<title>(\{.*?\})</title>", result.stdout, re.DOTALL)
    assert title, result.stderr[-2000:]
    return dict(json.loads(html.unescape(title[1])))
