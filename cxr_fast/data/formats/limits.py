"""How large an image file may be, whatever its format."""

from __future__ import annotations

from ...errors import ImageError

# 80 megapixels is twice the largest detector. It is below the size at which Pillow itself would warn, so that
# warning never appears; with the file limit it holds the worst case (progressive CMYK JPEG) under 2 GB.
MAX_PIXELS = 80_000_000
MAX_SIDE = 65_535
MAX_BYTES = 256 << 20


def check_size(width: int, height: int) -> None:
    """Raise ImageError (`corrupt`, `too_large`) for a picture of no size, or of more than the limits."""
    if width < 1 or height < 1:
        raise ImageError("corrupt", f"the header says {width} x {height} pixels")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        limit = f"{MAX_PIXELS // 10**6} megapixels or {MAX_SIDE} a side"
        raise ImageError("too_large", f"{width} x {height} pixels, more than {limit}")
