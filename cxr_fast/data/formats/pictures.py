"""PNG, JPEG, TIFF and BMP files to grey pictures at full size."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from ...errors import ImageError
from . import voi
from .limits import check_size

# Built by hand, not through Image.open: that would try every plugin installed, and warns by a global setting.
_READERS: dict[str, type[ImageFile.ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "TIFF": TiffImageFile,
    "BMP": BmpImageFile,
}
MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    *((mark, "TIFF") for mark in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
)
BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # "BM" alone also begins ordinary text
END = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS, _PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH = 258, 262, 322, 323  # TIFF tags
_SAMPLE = 32  # pixels a side that are looked at before a whole picture is searched for a second grey

SIXTEEN_TO_EIGHT = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257


def open_picture(data: bytes, kind: str) -> ImageFile.ImageFile:
    """Read the header, and refuse by it: nothing is decoded yet."""
    image = _READERS[kind](io.BytesIO(data))
    check_size(*image.size)
    if kind == "PNG":
        _check_png(data)
    # Looked for after the headers, as thumbnails have their own. Without it zeros in place of the rest are pixels.
    if kind == "JPEG" and image.fp is not None and data.rfind(END[kind], image.fp.tell()) < 0:
        raise ImageError("truncated", "JPEG file ends before its end marker; copy it again")
    if getattr(image, "is_animated", False):
        raise ImageError("multi_frame", f"{kind} with several frames; save the one to use as its own file")
    if isinstance(image, TiffImageFile):  # libtiff allocates a whole tile, whatever the image's size
        check_size(image.tag_v2.get(_TILE_WIDTH, 1), image.tag_v2.get(_TILE_LENGTH, 1))
    return image


def _check_png(data: bytes) -> None:
    """Prove the checksums of the pixels, which Pillow does not: a flipped bit, or zeros for the rest, would be a film.

    What is cut short, and all other chunks, is left to Pillow.
    """
    at, whole = 8, memoryview(data)
    while at + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if name == b"IEND" or end + 4 > len(data):
            return
        if name == b"IDAT" and zlib.crc32(whole[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise ImageError("corrupt", "PNG file is corrupt (its pixels do not have their checksum); copy it again")
        at = end + 4


def to_grey(image: Image.Image) -> Image.Image:
    """A file of any mode to mode L, upright. Raises ImageError (`unsupported`, `bad_range`, `flat`)."""
    image.load()
    upright = _upright(image)
    mode = upright.mode
    if mode.startswith("I;16") or (mode == "I" and image.format == "PNG"):
        return Image.fromarray(_grey_deep(image, np.asarray(upright)))
    if mode == "F":
        return Image.fromarray(float_to_grey(_white_is_zero(image, np.asarray(upright), 1)))
    if mode not in ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"):
        raise ImageError("unsupported", f"{image.format} with pixels of kind {mode}; save it as 8 or 16 bit grey")
    grey = _grey_bytes(upright)
    if _is_uniform(grey) and any(low < high for low, high in _extrema(upright)):
        raise ImageError(
            "flat", "the pixels differ and all become one grey (by transparency or a palette); save it grey"
        )
    return grey


def _grey_bytes(upright: Image.Image) -> Image.Image:
    """8 bits and fewer, of any mode, to mode L."""
    mode = upright.mode
    if mode in ("P", "PA") or (mode in ("1", "L", "RGB") and "transparency" in upright.info):
        upright = upright.convert("RGBA")
    elif mode in ("CMYK", "YCbCr"):
        upright = upright.convert("RGB")
    grey = upright if upright.mode == "L" else upright.convert("L")
    if upright.mode in ("LA", "RGBA"):
        return Image.composite(grey, Image.new("L", grey.size), upright.getchannel("A"))
    return grey


def _is_uniform(grey: Image.Image) -> bool:
    """Whether a mode L picture is one grey; most are not by a few of their pixels."""
    low, high = _extrema(grey.resize((_SAMPLE, _SAMPLE), Image.Resampling.NEAREST))[0]
    if low < high:
        return False
    low, high = _extrema(grey)[0]
    return low == high


def _extrema(image: Image.Image) -> list[tuple[float, float]]:
    """The smallest and largest value of each band."""
    found = image.getextrema()
    return [found] if isinstance(found[0], (int, float)) else list(found)


def _grey_deep(image: Image.Image, values: np.ndarray) -> np.ndarray:
    """9 to 16 bits to 8; a TIFF says how many bits it has."""
    bits = int(image.tag_v2.get(_BITS, (16,))[0]) if isinstance(image, TiffImageFile) else 16
    return deep_to_grey(_white_is_zero(image, values, (1 << bits) - 1), bits)


def deep_to_grey(values: np.ndarray, bits: int = 16) -> np.ndarray:
    """9 to 16 bits to uint8 by their full range, never by what is found. Raises ImageError (`flat`)."""
    top = (1 << bits) - 1
    greys = SIXTEEN_TO_EIGHT
    if bits < 16:
        greys = ((np.arange(1 << 16) * 255 + top // 2) // top).clip(0, 255).astype(np.uint8)
    low, high = int(values.min()), int(values.max())
    if int(greys[high]) - int(greys[low]) < voi.FEW_GREYS:
        different = int(np.count_nonzero(np.bincount(values.ravel())))
        _check_flat(different, greys[values], f"{low:,} to {high:,} of {top:,}")
    return np.asarray(greys[values])


def _check_flat(different: int, greys: np.ndarray, span: str) -> None:
    """Refuse a picture that shows nothing of its stored values, as `voi.is_flat` does."""
    shown = len(np.unique(greys))
    if different > 1 and (shown == 1 or (different > voi.MANY and shown < voi.FEW_GREYS)):
        raise ImageError(
            "flat",
            f"{different:,} different values, {span}, become {shown} grey level(s); save it with values over the full "
            "range, or as 8 bit",
        )


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, unless the metadata is broken; Pillow has done so already for TIFF."""
    if isinstance(image, TiffImageFile):
        return image
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken metadata around sound pixels
        return image
    return image if turn is None else image.transpose(turn)


def _white_is_zero(image: Image.Image, values: np.ndarray, top: int) -> np.ndarray:
    """Invert a TIFF that counts from white; Pillow does that for 8 bits and fewer, not for 16 or floats."""
    white = isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0
    return top - values if white else values


def float_to_grey(values: np.ndarray) -> np.ndarray:
    """Floats from 0 to 1 to uint8. Raises ImageError (`bad_range`, `flat`)."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # NaN fails too
        raise ImageError("bad_range", f"floating-point pixels from {low:g} to {high:g}; 0 to 1 is read")
    greys = np.rint(values * np.float32(255)).astype(np.uint8)
    if (high - low) * 255 < voi.FEW_GREYS:
        _check_flat(len(np.unique(values)), greys, f"{low:g} to {high:g} of 1")
    return np.asarray(greys)
