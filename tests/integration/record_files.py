"""What a record keeps of a text or a file: values and digests, without what differs between two runs of one command.

Nothing here imports cxr_fast: the formats are read with the libraries that anyone would read them with.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

# What differs between two runs of one command: keys of JSON, columns of CSV.
VOLATILE = {
    "began", "commit", "content_sha256", "cpu", "created", "date", "latency_ms", "machine", "pillow", "seconds",
    "stages", "toolchain", "versions",
}  # fmt: skip
# Of a model file, whose bytes hold a time; of a shard, whose header holds the folder. run.json's is of the weights.
FILE_HASHES = {"model_sha256", "sha256"}
# What the package alone reads, and may come to hold in another form: test_made_before.py goes on from an old one.
PRIVATE = (".resume", ".checkpoint", ".sqlite")
PATTERNS = [
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\+00:00| UTC|Z)?", "<DATE>"),
    (r"(cxr-fast|version) \d[\w.]*", r"\1 <VERSION>"),
    (r"\b[0-9a-f]{10,64}\b", "<HEX>"),
    (r"\([\d.]+ [TGMk]B free\)", "(<FREE>)"),
    (r"[\d,.]+ images/s|\([\d,.]+/s\)", "<SPEED>"),
    (r"(\d+ h )?(\d+ min )?\b\d+(\.\d+)? ?(s|ms|min)\b", "<TIME>"),
    (r"^(fp32|fp16|int8)( +[\d.]+e[-+]\d+ .*) \S+$", r"\1\2 <TIME>"),  # the last column of the table of variants
    (r"^ *\d+\.\d %  .*\n", ""),  # progress, every 20 seconds
    (r"[ \t]+", " "),
    (r"-{3,}", "---"),
    (r" $", ""),
]


def sha(data: bytes) -> str:
    """The first 16 digits of a sha256: enough to tell two files apart, short enough to read."""
    return hashlib.sha256(data).hexdigest()[:16]


def of_array(array: np.ndarray) -> str:
    """Type, shape and digest of an array's values."""
    data = repr(array.tolist()).encode() if array.dtype.hasobject else np.ascontiguousarray(array).tobytes()
    return f"{array.dtype} {array.shape} {sha(data)}"


def plain_text(text: str, here: str) -> str:
    """Text with placeholders for what differs between two runs."""
    text = text.replace(here, "<HERE>")
    for pattern, by in PATTERNS:
        text = re.sub(pattern, by, text, flags=re.MULTILINE)
    return text


def plain_json(value: Any, here: str, drop: set[str] = VOLATILE) -> Any:
    """A JSON value with a placeholder under volatile keys; sentences in it are treated as text."""
    if isinstance(value, dict):
        return {k: "<VOLATILE>" if k in drop else plain_json(v, here, drop) for k, v in value.items()}
    if isinstance(value, list):
        return [plain_json(each, here, drop) for each in value]
    if isinstance(value, str):
        return plain_text(value, here) if " " in value else value.replace(here, "<HERE>")
    return value


def keys_of(value: Any) -> Any:
    """The keys of a JSON value alone, of a list those of all its elements. Numbers as keys are left out: how many
    percentiles a measurement has depends on how many samples it had time for."""
    if isinstance(value, list):
        out: dict[str, Any] = {}
        for each in value:
            out = merged(out, keys_of(each))
        return {"[]": out} if out else None
    if not isinstance(value, dict):
        return None
    return {k: None if k in VOLATILE else keys_of(v) for k, v in sorted(value.items()) if not k.isdigit()}


def merged(one: Any, other: Any) -> Any:
    """The keys of both, at every depth."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return other if isinstance(other, dict) else one
    return {k: merged(one.get(k), other.get(k)) for k in sorted(one | other)}


def of_hdf5(path: Path, here: str) -> Any:
    """Every dataset and attribute of an activation file."""
    import h5py

    with h5py.File(path) as file:
        found: dict[str, Any] = {name: of_array(np.asarray(file[name])) for name in file}
        for name, value in file.attrs.items():
            try:
                found[f"@{name}"] = plain_json(json.loads(value), here)
            except (TypeError, ValueError):
                found[f"@{name}"] = plain_text(str(value), here)
    return found


def of_model(path: Path, here: str) -> Any:
    """What an ONNX file says of itself, and its answers to six seeded images on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    texts = session.get_modelmeta().custom_metadata_map
    told = {name.removeprefix("cxr."): json.loads(texts[name]) for name in sorted(texts)}
    (pixels,) = session.get_inputs()
    images = np.random.default_rng(0).integers(0, 256, (6, *pixels.shape[1:]), np.uint8)
    names = [node.name for node in session.get_outputs()]
    answers = {
        name: of_array(array) for name, array in zip(names, session.run(names, {pixels.name: images}), strict=True)
    }
    return {"says": plain_json(told, here), "input": f"{pixels.name} {pixels.type}", "answers": answers}


def of_safetensors(path: Path, here: str) -> Any:
    """Every tensor of a model."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        tensors = {name: of_array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        return {"metadata": file.metadata(), **tensors}


def of_npz(path: Path, here: str) -> Any:
    """Every array."""
    with np.load(path) as file:
        return {name: of_array(file[name]) for name in file.files}


def of_csv(path: Path, here: str) -> Any:
    """The text, and each column, so that a difference has a name; without the text where a column holds times."""
    text = path.read_bytes()
    head, *rows = csv.reader(io.StringIO(text.decode()))
    columns = {name: sha(repr(values).encode()) for name, values in zip(head, zip(*rows, strict=True), strict=False)}
    kept = {name: digest for name, digest in columns.items() if name not in VOLATILE}
    return {"head": head, "rows": len(rows), **kept, **({"text": sha(text)} if len(kept) == len(columns) else {})}


def of_parquet(path: Path, here: str) -> Any:
    """Type and values of each column."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    return {
        field.name: f"{field.type} {sha(repr(table[field.name].to_pylist()).encode())}" for field in table.schema
    } | {"rows": table.num_rows}


def of_json(path: Path, here: str) -> Any:
    """The value."""
    return plain_json(
        json.loads(path.read_bytes()), here, VOLATILE if path.name == "run.json" else VOLATILE | FILE_HASHES
    )


def of_bytes(path: Path, here: str) -> Any:
    """The bytes."""
    return sha(path.read_bytes())


def of_image(path: Path, here: str) -> Any:
    """The pixels of a phantom; of a plot only that it exists."""
    from PIL import Image

    return of_array(np.asarray(Image.open(path))) if path.parent.name == "images" else "exists"


KINDS: dict[str, Callable[[Path, str], Any]] = {
    ".h5": of_hdf5, ".onnx": of_model, ".safetensors": of_safetensors, ".npz": of_npz, ".csv": of_csv,
    ".parquet": of_parquet, ".json": of_json, ".png": of_image, ".svg": of_image, ".pdf": of_image,
    ".npy": lambda path, here: of_array(np.load(path)),
}  # fmt: skip
PAGES = (".html", ".md")


def of_file(path: Path, here: str) -> Any:
    """What is kept of a file that is no page."""
    return KINDS.get(Path(path.name.removesuffix(".partial")).suffix, of_bytes)(path, here)


class Visible(HTMLParser):
    """The text of a page that a reader sees, a line for each piece."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("style", "script")

    def handle_data(self, data: str) -> None:
        if not self.hidden and data.strip():
            self.lines.append(" ".join(data.split()))


def page_lines(path: Path, here: str) -> list[str]:
    """The lines of a page or a Markdown file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".html":
        (page := Visible()).feed(text)
        text = "\n".join(page.lines)
    return plain_text(text, here).splitlines()
