"""One DICOM file to 8-bit grey: stored values, modality LUT, VOI, scaling, inversion (PS3.3 C.11, C.7.6.3).

pydicom is the optional extra `[dicom]` and is imported only when a DICOM file is met.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from ...errors import ImageError
from ...system.extras import install
from . import limits

MAX_BITS = 16  # every table below has one entry a stored value: 65,536 at most
_BLOCK = 1 << 22  # pixels a histogram step; bincount widens each to 8 bytes
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_JPEG_SIZED = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}  # SOFn; 0xF7 is JPEG-LS


def looks_like_dicom(data: bytes) -> bool:
    """Whether `data` has `DICM` at byte 128, or no preamble but begins with a group 2 or group 8 element."""
    if data[128:132] == b"DICM":
        return True
    group, element = struct.unpack_from("<HH", data) if len(data) >= 132 else (0, 0)
    return group in (0x0002, 0x0008) and element <= 0x0018


def decode(data: bytes, policy: str) -> np.ndarray:
    """The picture of a single-frame DICOM file as uint8 (H, W), black 0, bones light whatever its photometric.

    `policy` is `PreprocessSpec.dicom_policy`:
    `voi` (what a viewer shows) is the VOI LUT sequence's first item, else the first window, else the range:
    the possible one for stored values of 8 bits (someone already made a picture of them), the one found in the
    image for deeper ones (12-bit values declared as 16 would come out black otherwise);
    `raw` is the modality LUT scaled by all values the stored bits can hold, the same for every image of a device;
    `minmax` is the modality LUT scaled by the smallest and largest value found, pixel padding left out.

    MONOCHROME1 and a PresentationLUTShape of INVERSE state the same fact (PS3.3 C.8.11.3 demands both together):
    either or both invert once. A negative RescaleSlope inverts by itself. Colour files give ITU-R 601 luma.

    What is too large is refused before anything is decoded or inflated. Raises ImageError (`needs_pydicom`,
    `needs_plugin`, `no_pixels`, `truncated`, `multi_frame`, `unsupported`, `corrupt`, `too_large`), and whatever
    pydicom raises on a broken file.
    """
    try:
        import pydicom
    except ImportError:
        raise ImageError("needs_pydicom", f"a DICOM file needs pydicom: {install('dicom')}") from None
    _check_deflated(data)
    ds = pydicom.dcmread(io.BytesIO(data), force=data[128:132] != b"DICM")
    if "Rows" not in ds or not any(key in ds for key in _PIXELS):
        if b"\xe0\x7f\x10\x00" in data:  # pydicom drops everything when a compressed element is cut short
            raise ImageError("truncated", "the DICOM file ends inside its pixel data; copy it again")
        raise ImageError("no_pixels", "the DICOM file holds no image (a report, a directory or a header alone)")
    if int(ds.get("NumberOfFrames") or 1) > 1:
        raise ImageError("multi_frame", f"{ds.NumberOfFrames} frames; save the one to use as its own file")
    limits.check_size(int(ds.Columns), int(ds.Rows))
    stored, photometric = _stored(ds)
    if photometric in ("MONOCHROME1", "MONOCHROME2"):
        return _shown(ds, stored, policy, photometric == "MONOCHROME1")
    if stored.ndim != 3 or stored.shape[2] != 3 or stored.dtype != np.uint8:
        raise ImageError("unsupported", f"{photometric} with {ds.BitsStored} bits; save it as 8-bit MONOCHROME2 or RGB")
    if photometric.startswith("YBR_FULL"):
        return np.ascontiguousarray(stored[..., 0])  # Y is the luma that RGB to L would compute
    return np.asarray(Image.fromarray(stored).convert("L"))


def _check_deflated(data: bytes) -> None:
    """pydicom inflates the whole data set at once: 1 MB can become 1 GB."""
    if _DEFLATED not in data[132:4096]:
        return
    start = 144 + struct.unpack_from("<I", data, 140)[0]  # (0002,0000) is the length of the rest of group 2
    if len(zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[start:], limits.MAX_BYTES + 1)) > limits.MAX_BYTES:
        raise ImageError("too_large", f"inflates to more than {limits.MAX_BYTES >> 20} MiB")


def _stored(ds: Any) -> tuple[np.ndarray, str]:
    """Stored values, uint8/uint16 (H, W) with unused high bits as found, or (H, W, 3); and their photometric."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import (
        ExplicitVRBigEndian,
        ExplicitVRLittleEndian,
        JPEGBaseline8Bit,
        JPEGExtended12Bit,
        RLELossless,
    )

    syntax = getattr(getattr(ds, "file_meta", None), "TransferSyntaxUID", None)
    if syntax is None:  # no preamble: pydicom guessed the encoding, and the pixels are not compressed
        syntax = ExplicitVRLittleEndian if ds.original_encoding[1] else ExplicitVRBigEndian
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        message = f"transfer syntax {syntax.name}; convert it to Explicit VR Little Endian (dcmdjpeg, gdcmconv)"
        raise ImageError("unsupported", message) from None
    plugin = ""
    if syntax.is_encapsulated:
        available = set(decoder.available_plugins)
        if syntax == JPEGExtended12Bit and int(ds.BitsStored) > 8:
            available.discard("pillow")  # it says that it can, and cannot
        if not available:
            raise ImageError("needs_plugin", f"{syntax.name} needs pylibjpeg and its plugins: {install('dicom')}")
        # The same pixels as from a .jpg, whatever else is installed; and pylibjpeg's RLE panics on broken files,
        # past every `except Exception`.
        plugin = {JPEGBaseline8Bit: "pillow", RLELossless: "pydicom"}.get(syntax, "")
        _check_codestream(ds)
    # raw: no colour conversion, which pydicom does in float32; high bits are masked by `_shown`.
    options = {"raw": True, "view_only": True, "correct_unused_bits": False, "decoding_plugin": plugin}
    array, properties = decoder.as_array(ds, index=0, **options)
    return array, str(properties["photometric_interpretation"])


def _check_codestream(ds: Any) -> None:
    """A compressed frame has a size of its own, and that is the one decoders allocate.

    And an end marker, for pylibjpeg and Pillow make up the rest of a JPEG that is cut short or filled up with zeros.
    """
    from pydicom.encaps import get_frame

    frame = get_frame(ds.PixelData, 0, number_of_frames=1)
    size = _codestream_size(frame)
    if size is None:
        return
    if b"\xff\xd9" not in frame.rstrip(b"\0")[-64:]:
        raise ImageError("truncated", "the compressed image ends before its end marker; copy the file again")
    limits.check_size(*size)
    if size != (ds.Columns, ds.Rows):
        message = f"the compressed image is {size[0]} x {size[1]}, the header says {ds.Columns} x {ds.Rows}"
        raise ImageError("corrupt", message)


def _codestream_size(frame: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG, JPEG-LS or JPEG 2000 codestream; None for RLE, or where none is found."""
    if (siz := frame.find(b"\xff\x4f\xff\x51")) >= 0:  # SOC, then SIZ: extent minus offset
        right, bottom, left, top = struct.unpack_from(">4I", frame, siz + 8)
        return right - left, bottom - top
    at = 2
    while frame[:2] == b"\xff\xd8" and at + 9 <= len(frame) and frame[at] == 0xFF:
        marker, length = frame[at + 1], struct.unpack_from(">H", frame, at + 2)[0]
        if marker in _JPEG_SIZED:
            height, width = struct.unpack_from(">HH", frame, at + 5)
            return width, height
        at += 1 if marker == 0xFF else 2 + length
    return None


def _shown(ds: Any, stored: np.ndarray, policy: str, inverted: bool) -> np.ndarray:
    """Stored values to shown uint8 (H, W), by a table with one entry a stored value: exact, and no float image."""
    bits = int(ds.BitsStored)
    if stored.ndim != 2 or stored.dtype.kind not in "iu" or not 1 <= bits <= MAX_BITS or stored.itemsize > 2:
        raise ImageError("unsupported", f"{stored.dtype} pixels with {bits} bits stored; 8 to 16 bit are read")
    mask = (1 << bits) - 1  # bits above are not pixels (old overlays lived there); this also folds the sign
    codes = stored.view(stored.dtype.str.replace("i", "u")) & mask
    values = np.arange(mask + 1, dtype=np.int64)
    if int(ds.PixelRepresentation) == 1:
        values[values > mask >> 1] -= mask + 1
    modality = _modality(ds, values)
    shown = _voi(ds, modality) if policy == "voi" else None
    if shown is None:
        whole = policy == "raw" or (policy == "voi" and bits <= 8)
        shown = _stretch(modality, modality if whole else modality[_found(ds, codes, values)])
    table = np.rint(np.clip(shown, 0, 1) * 255).astype(np.uint8)
    if inverted or ds.get("PresentationLUTShape") == "INVERSE":
        table = 255 - table
    return table[codes]


def _modality(ds: Any, values: np.ndarray) -> np.ndarray:
    """Modality LUT (PS3.3 C.11.1) of every stored value, float64."""
    if ds.get("ModalityLUTSequence"):
        return _lookup(ds, ds.ModalityLUTSequence[0], values)[0]
    slope, intercept = _first(ds, "RescaleSlope", 1.0), _first(ds, "RescaleIntercept", 0.0)
    if not (math.isfinite(slope) and math.isfinite(intercept) and slope != 0):
        raise ImageError("corrupt", f"RescaleSlope {slope}, RescaleIntercept {intercept}")
    return values * slope + intercept


def _voi(ds: Any, modality: np.ndarray) -> np.ndarray | None:
    """VOI LUT or window (PS3.3 C.11.2) to 0..1, float64; None where the file has none that means anything."""
    if ds.get("VOILUTSequence"):
        shown, top = _lookup(ds, ds.VOILUTSequence[0], modality)
        return shown / top
    center, width = _first(ds, "WindowCenter", math.nan), _first(ds, "WindowWidth", math.nan)
    function = str(ds.get("VOILUTFunction") or "LINEAR").upper()
    least = 0 if function in ("LINEAR_EXACT", "SIGMOID") else 1
    if not (math.isfinite(center) and math.isfinite(width) and width > 0 and width >= least):
        return None
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (modality - center) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        return (modality - center) / width + 0.5
    if width == 1:
        return (modality > center - 0.5).astype(np.float64)
    return (modality - (center - 0.5)) / (width - 1) + 0.5


def _lookup(ds: Any, item: Any, values: np.ndarray) -> tuple[np.ndarray, int]:
    """`values` through a LUT sequence item, float64, and the top of its output range.

    pydicom's own apply_voi overflows on 8-bit tables of more than 256 entries, hence this one.
    """
    entries, first, bits = (int(v) for v in item.LUTDescriptor)
    entries = entries or 65536
    if first > 32767 and values.min() < 0:
        first -= 65536  # US where SS was meant
    data = item.LUTData
    if isinstance(data, bytes):
        wide = "<u2" if ds.original_encoding[1] is not False else ">u2"
        data = np.frombuffer(data, np.uint8 if len(data) < 2 * entries else wide)
    table = np.atleast_1d(np.asarray(data, dtype=np.int64))[:entries]
    if not len(table):
        raise ImageError("corrupt", "an empty lookup table")
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)
    # 16 is what toolkits write for the word size: then the largest entry tells how many bits are meant.
    used = bits if 8 <= bits < 16 else max(8, int(table.max()).bit_length())
    return table[index].astype(np.float64), (1 << used) - 1


def _found(ds: Any, codes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which stored values occur in the image, padding left out (unless it is all there is): bool (len(values),)."""
    flat = codes.reshape(-1)
    seen = np.zeros(len(values), dtype=bool)
    for at in range(0, flat.size, _BLOCK):
        seen |= np.bincount(flat[at : at + _BLOCK], minlength=len(values)) > 0
    padding = _first(ds, "PixelPaddingValue", math.nan)
    if math.isnan(padding):
        return seen
    limit = _first(ds, "PixelPaddingRangeLimit", padding)
    kept = seen & ~((values >= min(padding, limit)) & (values <= max(padding, limit)))
    return kept if kept.any() else seen


def _stretch(values: np.ndarray, over: np.ndarray) -> np.ndarray:
    """`values` to 0..1 over the range of `over`; a range of one value is black."""
    low, high = over.min(), over.max()
    return (values - low) / (high - low) if high > low else np.zeros(len(values))


def _first(ds: Any, keyword: str, default: float) -> float:
    """The first value of an element as a float; `default` where it is absent or empty."""
    value = ds.get(keyword)
    if value is None or value == "":
        return default
    if isinstance(value, (str, int, float)) or not hasattr(value, "__len__"):
        return float(value)
    return float(value[0]) if len(value) else default
