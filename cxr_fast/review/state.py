"""What a review keeps while it works, so that an interrupted one goes on: thumbnails and heat maps."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import digest
from ..system.files import write_bytes

FOLDER = "review"
# Characters of a hash in a file's name: 80 bits, so that two films never share one.
SHORT = 20


@dataclass(frozen=True, kw_only=True)
class KeptFiles:
    """A folder of small files, each named by the hash of the film it is of: a film that changed has none.

    What cannot be read counts as absent, and is made again.
    """

    folder: Path

    def thumbnail(self, sha256: str) -> bytes | None:
        """The WebP of a film, if it is kept."""
        try:
            return self._thumbnail(sha256).read_bytes() or None
        except OSError:
            return None

    def keep_thumbnail(self, sha256: str, webp: bytes) -> None:
        """Keep the WebP of a film."""
        write_bytes(self._thumbnail(sha256), webp, folders=True)

    def maps(self, sha256: str, model: str) -> dict[int, np.ndarray]:
        """The heat maps of a film by one model that are kept, by class number: shares (rows, columns) float16."""
        found = self._arrays(self._maps(sha256, model))
        return {int(name): values for name, values in found.items()}

    def keep_maps(self, sha256: str, model: str, maps: Mapping[int, np.ndarray]) -> None:
        """Keep the heat maps of a film by one model beside those that are kept already."""
        whole = self.maps(sha256, model) | dict(maps)
        self._write(self._maps(sha256, model), {str(c): shares.astype(np.float16) for c, shares in whole.items()})

    def _thumbnail(self, sha256: str) -> Path:
        return self.folder / f"{sha256[:SHORT]}.webp"

    def _maps(self, sha256: str, model: str) -> Path:
        return self.folder / f"{sha256[:SHORT]}.{digest([sha256, model])[:SHORT]}.npz"

    @staticmethod
    def _arrays(path: Path) -> dict[str, np.ndarray]:
        try:
            with open(path, "rb") as raw, np.load(raw) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return {}

    @staticmethod
    def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        write_bytes(path, buffer.getvalue(), folders=True)
