"""Turn one image file into pixels, by the same code for the cache, the predictor and the benchmarks."""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import io
import os
import re
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..config import PreprocessSpec, choices
from ..errors import ImageError
from .formats import dicom
from .formats.limits import MAX_BYTES, MAX_PIXELS, MAX_SIDE, check_size
from .formats.pictures import BMP_HEADERS, END, MAGIC, deep_to_grey, float_to_grey, open_picture, to_grey
from .near_names import hint_at

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm", ".dicom"})

REASONS: dict[str, str] = {
    "missing": "no file of that name; check the path, or the folder the manifest lies in",
    "unreadable": "the file exists and cannot be read; check its permissions, and that it is a plain file",
    "empty": "the file has no bytes; copy it again",
    "too_large": f"over {MAX_BYTES >> 20} MiB, {MAX_PIXELS // 10**6} megapixels or {MAX_SIDE} a side; save it smaller",
    "not_an_image": "the content is not PNG, JPEG, TIFF, BMP or DICOM, whatever the name says; save it as one",
    "truncated": "the file ends before its image does; copy it again",
    "corrupt": "the content is damaged or breaks its own format; copy or export it again",
    "multi_frame": "several frames or pages; save the one to use as its own file",
    "unsupported": "a pixel layout that has no single grey reading; save it as 8 or 16 bit grey",
    "flat": "values that differ become one grey, or hundreds of them a few: nothing would be seen; save it again",
    "bad_range": "floating-point pixels outside 0..1; save them as 16 bit, or divide by their full range",
    "no_chest": "with --strict: the DICOM header names another modality or body part; leave it out",
    "elongated": "too long and narrow to crop a square from; use --resize squash or pad",
    "needs_pydicom": "DICOM files need pydicom, which the extra dicom brings; `cxrfast doctor` says how to install it",
    "needs_plugin": "this DICOM compression needs pylibjpeg and its plugins, of the extra dicom; see `cxrfast doctor`",
    "no_pixels": "a DICOM file without an image (report, directory, header); leave it out",
    "bad_array": "no image, or an array that is not uint8 (H, W) or (H, W, 3), uint16 (H, W), or floats from 0 to 1",
}


# Grey, 29 x 40, quality 40: what an encoder here would make of the picture may be another file.
_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABQODxIPDRQSEBIXFRQYHjIhHhwcHj0sLiQySUBMS0dARkVQWnNiUFVtVkVGZIhlbXd7gYKBTmCNl4"
    "x9lnN+gXz/wAALCAAoAB0BAREA/8QAFgABAQEAAAAAAAAAAAAAAAAABQYE/8QALRABAAEDBAAEBAYDAAAAAAAAAQIDBBEAEiExBSJBUQYyYXET"
    "FIGRobHB8PH/2gAIAQEAAD8AE8Ptd+ONUNlawcEYsn6daTqNO2t18sZTzCCJndtUx3l46Bfo6kbjxW/rVZtO8rEd7iVOpIE6OAD09h5c63WFDN"
    "KMTuX9adtqZCDJFjEXbEXIeuDl+2hPiG+rO2lCX4TPJMp4HaZNsk+blevKO48yKG29vuj1nHHvqgsaPkiLg2/9/jW3xCuWNhKbGoshWNNYyQ5w"
    "OPbv1xuT5dRoFa5lUizc4DcAuDHRwHHR110Z0pRpMYGMfrh1QWcNlHdI8sY5cRVx9jvt1O/EF9+ZuJUADn0RzHuKIciIjnIymdOs9nRxjAftzp"
    "q3o5hn/f71o8XvI2VnSoRqzt7it5qNUxtJRw4ll4Hg9ueeNSlEakhkYiZCAu2Aq4M+nOmrSj04c+nGmqFNjDymc/f/ABr/2Q=="
)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file. Raises ImageError (`missing`, `unreadable`, `empty`, `too_large`)."""
    name = os.fspath(path)
    try:
        status = os.stat(name)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
            raise ImageError("unreadable", f"{name}: not a plain file")
        if status.st_size > MAX_BYTES:
            raise ImageError("too_large", f"{name}: {status.st_size >> 20} MiB, more than {MAX_BYTES >> 20}")
        with open(name, "rb") as file:
            data = file.read(MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        near = hint_at(os.fsdecode(name))
        raise ImageError("missing", f"{name}: no such file" + (f"; {near}" if near else "")) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ImageError("unreadable", f"{name}: {getattr(error, 'strerror', None) or error}") from None
    if not data:
        raise ImageError("empty", f"{name}: the file has no bytes")
    return data


def decode_grey(data: bytes, *, spec: PreprocessSpec, name: str = "") -> np.ndarray:
    """The bytes of one image file to grey pixels, uint8 (H, W), at full size.

    The format follows from the content, never from a name: PNG, JPEG, TIFF, BMP, or DICOM (`formats.dicom.decode`).

    - Colour becomes ITU-R 601 luma (Pillow's `L`); CMYK goes through RGB. ICC profiles and gamma are ignored.
    - 16 bits are divided by 257 and rounded, the full range: never stretched to what is found, so 12-bit values
      in a 16-bit PNG come out dark. Of 16-bit colour Pillow keeps the high byte. Floating-point TIFF must lie
      in 0..1. TIFF WhiteIsZero is inverted.
    - Transparency is composited over black (a 16-bit file's transparent value is ignored).
    - PNG proves its checksums, and JPEG must have its end marker. No other damage shows in a file that still
      decodes: JPEG, TIFF, BMP and DICOM hold no checksum of their pixels.
    - EXIF orientation is applied. Of a phone's multi-picture JPEG the first picture is taken; animated PNG and
      multi-page TIFF are refused.

    Raises ImageError with a code of `REASONS` and a message beginning with `name`; nothing else, on any bytes.
    """
    return np.array(_decode(data, spec, name)[0])


def resize(grey: np.ndarray, spec: PreprocessSpec) -> np.ndarray:
    """uint8 (H, W) to uint8 (size, size), bicubic with antialiasing, as open_clip's own PIL transform does it.

    `squash` ignores the aspect; `crop` brings the shortest side to `size` and cuts the centre; `pad` brings the
    longest side to `size` and centres it on black. Raises ImageError (`bad_array`, `too_large`, `elongated`).
    """
    if not isinstance(grey, np.ndarray) or grey.dtype != np.uint8 or grey.ndim != 2 or grey.size == 0:
        raise ImageError("bad_array", f"{_describe(grey)}: resize takes uint8 (H, W)")
    check_size(grey.shape[1], grey.shape[0])
    return np.array(_square(Image.fromarray(np.ascontiguousarray(grey)), spec))


class Loaded(NamedTuple):
    """One image file: pixels uint8 (size, size), the sha256 (hex) of its bytes, and a note, empty for most.

    The note says where a DICOM header was not followed and why, and what says that the film is none of a chest.
    """

    pixels: np.ndarray
    sha256: str
    note: str = ""


def load(path: str | os.PathLike[str], spec: PreprocessSpec, *, strict: bool = False) -> Loaded:
    """Read one image file; with `strict` one whose DICOM header names another modality or body part is refused.

    Its pixels equal `resize(decode_grey(read_bytes(path)))` to the last bit. Safe to call from several threads, and
    worth it: reading, hashing, decoding and resizing all release the GIL. Raises ImageError.
    """
    data = read_bytes(path)
    name = os.fspath(path)
    grey, note = _decode(data, spec, name)
    with _naming(name):
        if strict:
            _refuse_other_subject(note)
        return Loaded(np.array(_square(grey, spec)), hashlib.sha256(data).hexdigest(), note)


def _refuse_other_subject(note: str) -> None:
    if said := dicom.other_subject(note):
        raise ImageError("no_chest", f"{said}, which is no film of a chest")


def pixels_of(image: object, spec: PreprocessSpec, *, strict: bool = False) -> np.ndarray:
    """One image of any kind that people hold to pixels, uint8 (size, size), by the rules of `decode_grey`.

    A path (text or os.PathLike); the bytes of an image file, or a file object open for reading bytes; a PIL image; a
    NumPy array as `array_pixels` takes it; a torch tensor, which is such an array or has its channels first, (1, H, W)
    or (3, H, W); or a pydicom data set. `strict` is that of `load`. Raises ImageError; its message never holds the
    bytes.
    """
    if isinstance(image, (str, os.PathLike)):
        return load(image, spec, strict=strict).pixels
    if isinstance(image, (bytes, bytearray, memoryview)):
        name = f"{len(image):,} bytes"
        grey, note = _decode(bytes(image), spec, name)
        with _naming(name):
            if strict:
                _refuse_other_subject(note)
            return np.array(_square(grey, spec))
    if isinstance(image, np.ndarray):
        return array_pixels(image, spec)
    kind = type(image)
    if isinstance(image, Image.Image):
        with _naming(f"a PIL image of mode {image.mode}"):
            try:
                return np.array(_square(to_grey(image), spec))
            except (OSError, ValueError) as error:  # a file that Pillow opened and reads only now
                raise ImageError("corrupt", f"cannot be decoded ({str(error)[:100]})") from error
    if kind.__module__.split(".")[0] == "torch" and hasattr(image, "detach"):
        array = image.detach().cpu().numpy()
        if array.ndim == 3 and array.shape[0] in (1, 3):
            array = array[0] if array.shape[0] == 1 else np.moveaxis(array, 0, -1)
        return array_pixels(array, spec)
    if kind.__module__.split(".")[0] == "pydicom" and hasattr(image, "file_meta"):
        pixels, note = _dataset_grey(image, spec)
        if strict:
            _refuse_other_subject(note)
        return resize(pixels, spec)
    if callable(read := getattr(image, "read", None)):
        data = read()
        if not isinstance(data, bytes):
            raise ImageError(
                "bad_array", f"a file object that reads {type(data).__name__}; open it in binary mode, 'rb'"
            )
        return pixels_of(data, spec, strict=strict)
    raise ImageError(
        "bad_array",
        f"a {kind.__name__} is no image; give a path, bytes, a file object, a PIL image, a NumPy array, a torch tensor "
        "or a pydicom data set",
    )


def is_one_image(image: object) -> bool:
    """Whether `pixels_of` takes this as one image, and not as a collection of several."""
    one = (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray, Image.Image)
    library = type(image).__module__.split(".")[0]
    return isinstance(image, one) or library in ("torch", "pydicom") or hasattr(image, "read")


def _dataset_grey(dataset: object, spec: PreprocessSpec) -> tuple[np.ndarray, str]:
    """A pydicom data set in memory to grey, uint8 (H, W), and a note."""
    try:
        with _quiet():  # on a copy: reading an enhanced or mislabelled file changes its elements
            return dicom.decode_dataset(copy.deepcopy(dataset), spec.dicom_policy)
    except ImageError:
        raise
    except Exception as error:  # decoders raise anything at all
        raise ImageError("corrupt", f"the pydicom data set cannot be decoded ({str(error)[:100]})") from error


def array_pixels(array: np.ndarray, spec: PreprocessSpec) -> np.ndarray:
    """An image already in memory to pixels, uint8 (size, size), by the rules of `decode_grey`.

    `array` is uint8 (H, W) or (H, W, 3) RGB, uint16 (H, W) over its full range, or floating-point (H, W) or (H, W, 3)
    from 0 to 1. Raises ImageError.
    """
    kind = (array.dtype.name, array.ndim) if isinstance(array, np.ndarray) and array.size else None
    if kind is not None and array.ndim in (2, 3):
        check_size(array.shape[1], array.shape[0])
        with _naming(_describe(array)):
            if array.dtype.kind == "f":
                array = float_to_grey(array)
            elif kind == ("uint16", 2):
                array = deep_to_grey(array)
        kind = (array.dtype.name, array.ndim)
    if kind == ("uint8", 3) and array.shape[2] == 3:
        return np.array(_square(Image.fromarray(np.ascontiguousarray(array)).convert("L"), spec))
    if kind == ("uint8", 2):
        return resize(array, spec)
    shapes = "uint8 (H, W) or (H, W, 3), uint16 (H, W), or floats from 0 to 1"
    raise ImageError("bad_array", f"{_describe(array)}: give {shapes}")


def flip(pixels: np.ndarray) -> np.ndarray:
    """Mirror left and right, (..., H, W), contiguous."""
    return np.ascontiguousarray(pixels[..., ::-1])


def self_check() -> str:
    """sha256 (hex) of two built-in pictures through decoding and each resize: another value, another Pillow.

    PNG and JPEG stand for what Pillow does, decoding and resampling: Pillow 13.0 resizes tall pictures otherwise than
    12.0 (300 x 500 of noise to a square: a quarter of the pixels, up to 8 grey levels). DICOM is left out: its
    intensities are integer tables of ours, its compressions need an extra that a machine may lack, and its pixels
    pass the same resize.
    """
    y, x = np.mgrid[:301, :97]  # larger than the target one way, smaller the other
    picture = Image.fromarray(((x * 7 + y * 13 + x * y % 251) % 256).astype(np.uint8))
    png = io.BytesIO()
    picture.save(png, "PNG")
    total = hashlib.sha256()
    for mode in choices(PreprocessSpec, "resize"):
        spec = PreprocessSpec(resize=mode)  # type: ignore[arg-type]
        for data in (png.getvalue(), _JPEG):
            total.update(resize(decode_grey(data, spec=spec), spec).tobytes())
    return total.hexdigest()


def _describe(array: object) -> str:
    return f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"


def _decode(data: bytes, spec: PreprocessSpec, name: str) -> tuple[Image.Image, str]:
    """Any file to a mode L image and a note; the one boundary where a decoder's exceptions become ImageError."""
    with _naming(name), _quiet():
        if not data:
            raise ImageError("empty", "no bytes")
        if len(data) > MAX_BYTES:
            raise ImageError("too_large", f"{len(data) >> 20} MiB, more than {MAX_BYTES >> 20}")
        kind = _kind(data)
        try:
            if kind == "DICOM":
                pixels, note = dicom.decode(data, spec.dicom_policy)
                return Image.fromarray(pixels), note
            return to_grey(open_picture(data, kind)), ""
        except ImageError:
            raise
        except Exception as error:  # decoders raise anything at all on broken files
            reason = _reason(error, data, kind)
            # An address in memory would make the tables of two runs differ.
            said = re.sub(r"( object)? at 0x[0-9a-fA-F]+", "", " ".join(str(error).split()))
            detail = said[:200] or type(error).__name__
            raise ImageError(reason, f"{kind} file is {reason.replace('_', ' ')} ({detail})") from error


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the file's name before the message of an ImageError."""
    try:
        yield
    except ImageError as error:
        raise ImageError(error.reason, f"{name}: {error}" if name else str(error)) from error.__cause__


def _kind(data: bytes) -> str:
    """The format by content. DICOM first: its 128-byte preamble may hold a TIFF header."""
    if data[128:132] == b"DICM":
        return "DICOM"
    for magic, kind in MAGIC:
        if data.startswith(magic):
            return kind
    if data[:2] == b"BM" and len(data) >= 18 and struct.unpack_from("<I", data, 14)[0] in BMP_HEADERS:
        return "BMP"
    if dicom.looks_like_dicom(data):
        return "DICOM"
    raise ImageError("not_an_image", "not a PNG, JPEG, TIFF, BMP or DICOM file, whatever its name says")


def placed(width: int, height: int, spec: PreprocessSpec) -> tuple[int, int, int, int]:
    """How a picture comes into the model's square: resized to (wide, high), then moved by (left, top) up and left.

    `left` and `top` are negative where the square is larger (`pad`). Column x of the picture, counted in pixel edges,
    lies at x * wide / width - left of the square. Raises ImageError (`elongated`).
    """
    size = spec.size
    if spec.resize == "squash":
        return size, size, 0, 0
    if spec.resize == "pad":
        # timm's ResizeKeepRatio, longest=1, then open_clip's CenterCropOrPad
        ratio = max(height / size, width / size)
        wide, high = max(1, round(width / ratio)), max(1, round(height / ratio))
        return wide, high, -((size - wide) // 2), -((size - high) // 2)
    # torchvision's Resize(int), which truncates the longer side, then CenterCrop, which rounds half to even
    longer = int(size * max(width, height) / min(width, height))
    if longer * size > MAX_PIXELS:
        raise ImageError("elongated", f"{width} x {height} pixels leave no square to crop; use --resize squash or pad")
    wide, high = (size, longer) if width <= height else (longer, size)
    return wide, high, round((wide - size) / 2), round((high - size) / 2)


def _square(grey: Image.Image, spec: PreprocessSpec) -> Image.Image:
    """Mode L of any size to (size, size). No reducing_gap and no JPEG draft: neither is exact."""
    wide, high, left, top = placed(*grey.size, spec)
    small, size = grey.resize((wide, high), Image.Resampling.BICUBIC), spec.size
    if spec.resize == "pad":
        canvas = Image.new("L", (size, size))
        canvas.paste(small, (-left, -top))
        return canvas
    return small if spec.resize == "squash" else small.crop((left, top, left + size, top + size))


def _reason(error: Exception, data: bytes, kind: str) -> str:
    """`too_large`, `unsupported`, `truncated` or `corrupt`, by what a decoder said and whether the end is there."""
    text = str(error).lower()
    if any(words in text for words in ("unknown pixel mode", "12-bit layers")):  # Pillow's, for sound files
        return "unsupported"
    if isinstance(error, MemoryError) or "too large" in text:
        return "too_large"
    if kind in END and END[kind] not in data[-4096:]:
        return "truncated"
    short = ("truncated", "unpack", "not enough", "end of file", "less than expected", "incomplete")
    return "truncated" if isinstance(error, EOFError) or any(word in text for word in short) else "corrupt"


# Decoders warn about what they meet in a file; here it becomes a reason or does not matter. catch_warnings is not
# safe among threads (it restores a copy of the filters), so one filter is kept in place while anyone decodes.
_NOISE = re.compile(r"(PIL|pydicom|pylibjpeg|libjpeg|openjpeg|rle)\b")
_decoding = 0
_decoding_lock = threading.Lock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    global _decoding
    with _decoding_lock:
        _decoding += 1
        warnings.filterwarnings("ignore", module=_NOISE.pattern)
    try:
        yield
    finally:
        with _decoding_lock:
            _decoding -= 1
            if not _decoding:
                with contextlib.suppress(ValueError):  # the caller's own catch_warnings took it away
                    warnings.filters.remove(("ignore", None, Warning, _NOISE, 0))  # type: ignore[attr-defined]
