"""Check what `python -m build` made: nothing foreign in the source archive, everything of the package in the wheel."""

from __future__ import annotations

import hashlib
import re
import sys
import tarfile
import zipfile
from pathlib import Path

# Names of what runs, tests and tools leave in a checkout, as parts of a path or as ends of one.
FOREIGN = re.compile(
    r"(^|/)(__pycache__|\.venv|\.git|\.(pytest|mypy|ruff)_cache|\.hypothesis|\.ipynb_checkpoints|demo|dist|build)/"
    r"|^(cache|exports)/(?!README\.md$)"
    r"|\.(pyc|h5|onnx|safetensors|npz|partial|lock|resume|whl)$"
)
NEEDED = ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md", "pyproject.toml")


def problems(sdist: list[str], wheel: list[str]) -> list[str]:
    """What is wrong with the files of a source archive (without its top folder) and those of a wheel."""
    found = [f"the source archive holds {name}" for name in sdist if FOREIGN.search(name)]
    found += [f"the source archive lacks {name}" for name in NEEDED if name not in sdist]
    own = {name for name in sdist if name.startswith("cxr_fast/")}
    packed = {name for name in wheel if ".dist-info/" not in name}
    found += [f"the wheel lacks {name}" for name in sorted(own - packed)]
    found += [f"the wheel holds {name}" for name in sorted(packed - own)]
    if "cxr_fast/py.typed" not in wheel:
        found.append("the wheel lacks cxr_fast/py.typed")
    return found


def only(folder: Path, pattern: str) -> Path:
    """The one file of a pattern in a folder."""
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        sys.exit(f"{folder} holds {len(files)} files {pattern}; remove the folder and build again.")
    return files[0]


def main(dist: Path, tree: Path) -> None:
    """Check archive and wheel in `dist`, and that the wheel in `tree`, built without the archive, is the same."""
    archive, wheel = only(dist, "*.tar.gz"), only(dist, "*.whl")
    with tarfile.open(archive) as tar:
        sources = [name.partition("/")[2] for name in tar.getnames()]
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    found = problems(sources, names)
    direct = only(tree, "*.whl")
    first, second = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (wheel, direct))
    if first != second:
        found.append(f"{wheel} from the source archive and {direct} from the checkout differ")
    if found:
        sys.exit("\n".join(found))
    print(f"{archive.name}: {len(sources)} files, {archive.stat().st_size / 1e6:.1f} MB")
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB, the same from archive and checkout")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
