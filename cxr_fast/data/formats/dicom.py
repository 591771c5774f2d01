"""One DICOM file to 8-bit grey: header, stored values, and what they look like by `voi`.

pydicom is the optional extra `[dicom]` and is imported only when a DICOM file is met.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from ...errors import ImageError
from . import limits, voi

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_LONG = (b"OB", b"OW", b"OF", b"SQ", b"UT", b"UN")  # value representations with a length of four bytes
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_NEEDED = ("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation", "PhotometricInterpretation")
# What a header may say in words without being no film of a chest.
_MODALITIES = frozenset({"CR", "DX", "RG", "DR", "XR", "OT", "SC", ""})
_CHEST = re.compile(r"CHEST|THORA|TORAX|TORAC|LUNG|RIB|STERN|HEART|TRUNK|POITR|^$", re.IGNORECASE)
_SUBJECT = ("Modality is ", "BodyPartExamined is ")
_JPEG_SIZED = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}  # SOFn; 0xF7 is JPEG-LS


def looks_like_dicom(data: bytes) -> bool:
    """Whether `data` has `DICM` at byte 128, or no preamble but begins with a group 2 or group 8 element."""
    if data[128:132] == b"DICM":
        return True
    group, element = struct.unpack_from("<HH", data) if len(data) >= 132 else (0, 0)
    return group in (0x0002, 0x0008) and element <= 0x0018


def decode(data: bytes, policy: str) -> tuple[np.ndarray, str]:
    """The picture of a single-frame DICOM file as uint8 (H, W), black 0, bones light whatever its photometric; a note.

    `policy` is `PreprocessSpec.dicom_policy`:
    `voi` (what a viewer shows) is the VOI LUT sequence's first item, else the first window, else the range:
    the possible one for stored values of 8 bits (someone already made a picture of them), the one found in the
    image for deeper ones (12-bit values declared as 16 would come out black otherwise). The range also stands in
    for a window that is no number or that shows none of the stored values;
    `raw` is the modality LUT scaled by all values the stored bits can hold, the same for every image of a device;
    `minmax` is the modality LUT scaled by the smallest and largest value found, pixel padding left out.

    MONOCHROME1 and a PresentationLUTShape of INVERSE state the same fact (PS3.3 C.8.11.3 demands both together):
    either or both invert once. A negative RescaleSlope inverts by itself. Colour files give ITU-R 601 luma. An
    enhanced file of one frame has its rescale and window in functional groups. A compressed frame is decoded by what
    it is, whatever the transfer syntax says.

    The note, empty for most files, says where the header was not followed, and what says that this is no chest film.

    What is too large is refused before anything is decoded or inflated. Raises ImageError (`needs_pydicom`,
    `needs_plugin`, `no_pixels`, `truncated`, `multi_frame`, `unsupported`, `corrupt`, `too_large`, `flat`), and
    whatever pydicom raises on a broken file.
    """
    try:
        import pydicom
    except ImportError:
        # A row of predictions holds this text, and such a file may leave the machine: no path of the installation.
        message = "a DICOM file needs pydicom, which the extra dicom brings; `cxrfast doctor` says how to install it"
        raise ImageError("needs_pydicom", message) from None
    _check_deflated(data)
    return decode_dataset(pydicom.dcmread(io.BytesIO(data), force=data[128:132] != b"DICM"), policy, data)


def decode_dataset(ds: Any, policy: str, data: bytes = b"") -> tuple[np.ndarray, str]:
    """`decode` for a pydicom data set; `data` are the bytes it was read from, where it was read from bytes."""
    _check_header(ds, data)
    limits.check_size(int(ds.Columns), int(ds.Rows))
    _use_functional_groups(ds)
    stored, photometric, notes = _stored(ds)
    notes += _subject(ds)
    if photometric in ("MONOCHROME1", "MONOCHROME2"):
        shown, note = voi.show(ds, stored, policy, photometric == "MONOCHROME1")
        return shown, "; ".join([*([note] if note else []), *notes])
    if stored.ndim != 3 or stored.shape[2] != 3 or stored.dtype != np.uint8:
        raise ImageError("unsupported", f"{photometric} with {ds.BitsStored} bits; save it as 8-bit MONOCHROME2 or RGB")
    if photometric.startswith("YBR_FULL"):
        return np.ascontiguousarray(stored[..., 0]), "; ".join(notes)  # Y is the luma that RGB to L would compute
    return np.asarray(Image.fromarray(stored).convert("L")), "; ".join(notes)


def _check_deflated(data: bytes) -> None:
    """pydicom inflates the whole data set at once: 1 MB can become 1 GB."""
    start, syntax = _file_meta(data)
    if syntax != _DEFLATED:
        return
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    if len(inflater.decompress(data[start:], limits.MAX_BYTES + 1)) > limits.MAX_BYTES:
        raise ImageError("too_large", f"inflates to more than {limits.MAX_BYTES >> 20} MiB")


def _file_meta(data: bytes) -> tuple[int, bytes]:
    """Where the data set begins behind the elements of group 2, and the transfer syntax they name, empty where none.

    The elements are read one by one, as pydicom does, since the group's length is often written wrong.
    """
    at, syntax = 132 if data[128:132] == b"DICM" else 0, b""
    while at + 8 <= len(data):
        group, element = struct.unpack_from("<HH", data, at)
        if group != 2:
            break
        long = data[at + 4 : at + 6] in _LONG
        if long and at + 12 > len(data):
            break
        length = struct.unpack_from("<I", data, at + 8)[0] if long else struct.unpack_from("<H", data, at + 6)[0]
        at += 12 if long else 8
        if element == 0x0010:
            syntax = data[at : at + length].rstrip(b"\0 ")
        at += length
    return at, syntax


def _check_header(ds: Any, data: bytes) -> None:
    """Refuse by name what the header lacks or says twice, and files of no image or of several."""
    if not any(key in ds for key in _PIXELS):
        if b"\xe0\x7f\x10\x00" in data:  # pydicom drops everything when a compressed element is cut short
            raise ImageError("truncated", "the DICOM file ends inside its pixel data; copy it again")
        raise ImageError("no_pixels", "the DICOM file holds no image (a report, a directory or a header alone)")
    if "PixelData" not in ds:
        raise ImageError("unsupported", "floating-point pixel data; export the film as 8 to 16 bit grey")
    if not ds.PixelData:
        raise ImageError("no_pixels", "PixelData is empty; export the film again")
    lacking = [name for name in _NEEDED if ds.get(name) is None or ds.get(name) == ""]
    if lacking:
        raise ImageError("corrupt", f"the DICOM header has no {', '.join(lacking)}; export the film again")
    for name in _NEEDED[:-1]:
        if not isinstance(ds.get(name), int):
            raise ImageError("corrupt", f"{name} in the DICOM header is not one number; export the film again")
    if not 1 <= ds.BitsStored <= ds.BitsAllocated:
        raise ImageError("corrupt", f"BitsStored is {ds.BitsStored} and BitsAllocated {ds.BitsAllocated}")
    try:
        frames = int(ds.get("NumberOfFrames") or 1)
    except (TypeError, ValueError):
        raise ImageError("corrupt", "NumberOfFrames in the DICOM header is not one number") from None
    if frames > 1:
        raise ImageError("multi_frame", f"{frames} frames; save the one to use as its own file")


def _use_functional_groups(ds: Any) -> None:
    """Put the rescale and window of an enhanced file's one frame where a classic file has them (PS3.3 C.7.6.16)."""
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for item in (ds.get(groups) or ())[:1]:
            for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for values in (item.get(macro) or ())[:1]:
                    ds.update(values)


def _subject(ds: Any) -> list[str]:
    """What the header says that makes this no film of a chest, as notes."""
    modality, part = (str(ds.get(name) or "").strip() for name in ("Modality", "BodyPartExamined"))
    notes = [] if modality.upper() in _MODALITIES else [f"Modality is {_word(modality)}"]
    return notes + ([] if _CHEST.search(part) else [f"BodyPartExamined is {_word(part)}"])


def other_subject(note: str) -> str:
    """Return the parts of a film's note that say that it is no film of a chest; empty where none does."""
    return "; ".join(part for part in note.split("; ") if part.startswith(_SUBJECT))


def _word(text: str) -> str:
    return "".join(c for c in text if c.isprintable())[:16]


def _stored(ds: Any) -> tuple[np.ndarray, str, list[str]]:
    """Stored values, uint8/uint16 (H, W) with unused high bits as found, or (H, W, 3); their photometric; notes."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import (
        ExplicitVRBigEndian,
        ExplicitVRLittleEndian,
        JPEGBaseline8Bit,
        JPEGExtended12Bit,
        RLELossless,
    )

    syntax, notes = getattr(getattr(ds, "file_meta", None), "TransferSyntaxUID", None), []
    if syntax is None:  # no preamble: pydicom guessed the encoding, and the pixels are not compressed
        syntax = ExplicitVRLittleEndian if ds.original_encoding[1] else ExplicitVRBigEndian
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        message = f"transfer syntax {syntax.name}; convert it to Explicit VR Little Endian (dcmdjpeg, gdcmconv)"
        raise ImageError("unsupported", message) from None
    plugin = ""
    if syntax.is_encapsulated:
        true = _true_syntax(ds, syntax)
        if true != syntax:
            notes = [f"the compressed image is {true.name}, the header says {syntax.name}"]
            syntax = ds.file_meta.TransferSyntaxUID = true
            decoder = get_decoder(syntax)
        available = set(decoder.available_plugins)
        if syntax == JPEGExtended12Bit and int(ds.BitsStored) > 8:
            available.discard("pillow")  # it says that it can, and cannot
        if not available:
            message = f"{syntax.name} needs pylibjpeg and its plugins, of the extra dicom; see `cxrfast doctor`"
            raise ImageError("needs_plugin", message)
        # The same pixels as from a .jpg, whatever else is installed; and pylibjpeg's RLE panics on broken files,
        # past every `except Exception`.
        plugin = {JPEGBaseline8Bit: "pillow", RLELossless: "pydicom"}.get(syntax, "")
        _check_codestream(ds)
    # raw: no colour conversion, which pydicom does in float32; high bits are masked by `voi.show`.
    options = {"raw": True, "view_only": True, "correct_unused_bits": False, "decoding_plugin": plugin}
    array, properties = decoder.as_array(ds, index=0, **options)
    if not syntax.is_encapsulated or syntax == RLELossless:
        array = _shifted(ds, array)
    return array, str(properties["photometric_interpretation"]), notes


def _shifted(ds: Any, array: np.ndarray) -> np.ndarray:
    """Move values down whose highest bit is not the last of BitsStored."""
    high, bits = ds.get("HighBit"), int(ds.BitsStored)
    if not isinstance(high, int) or high == bits - 1:
        return array
    if not bits - 1 < high < int(ds.BitsAllocated):
        raise ImageError("corrupt", f"HighBit is {high}, BitsStored {bits}, BitsAllocated {ds.BitsAllocated}")
    codes = array.view(array.dtype.str.replace("i", "u")) >> (high + 1 - bits)
    return (codes & ((1 << bits) - 1)).view(array.dtype)


def _true_syntax(ds: Any, syntax: Any) -> Any:
    """The transfer syntax of the compressed frame by its first bytes, where the one named is of another family.

    Raises ImageError (`corrupt`) where a JPEG of any kind is named and the frame begins as none.
    """
    from pydicom import uid

    frame = _first_frame(ds)
    jpeg = {0xC3: uid.JPEGLosslessSV1, 0xF7: uid.JPEGLSLossless, 0xC1: uid.JPEGExtended12Bit}
    families = (uid.JPEG2000TransferSyntaxes, uid.JPEGLSTransferSyntaxes, [uid.JPEGLossless, uid.JPEGLosslessSV1])
    found = None
    if frame[:4] == b"\xff\x4f\xff\x51" or frame[4:8] == b"jP  ":
        found = uid.JPEG2000Lossless
    elif frame[:2] == b"\xff\xd8":
        found = jpeg.get(_frame_marker(frame), uid.JPEGBaseline8Bit)
    if found is None:
        if syntax != uid.RLELossless and "JPEG" in syntax.name:
            raise ImageError("corrupt", f"the compressed image does not begin as {syntax.name}; export it again")
        return syntax
    if "JPEG 2000" in syntax.name and found == uid.JPEG2000Lossless:  # the high-throughput kinds too
        return syntax
    both = ([uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit], *families)
    return syntax if any(found in family and syntax in family for family in both) else found


def _first_frame(ds: Any) -> bytes:
    from pydicom.encaps import get_frame

    return bytes(get_frame(ds.PixelData, 0, number_of_frames=1))


def _frame_marker(frame: bytes) -> int:
    """The marker that says which kind of JPEG a codestream is (SOFn, or 0xF7 of JPEG-LS); 0 where none is found."""
    at = _frame_header(frame)
    return frame[at + 1] if at else 0


def _frame_header(frame: bytes) -> int:
    """Where the frame header of a JPEG or JPEG-LS codestream begins; 0 where none is found."""
    at = 2
    while frame[:2] == b"\xff\xd8" and at + 9 <= len(frame) and frame[at] == 0xFF:
        marker, length = frame[at + 1], struct.unpack_from(">H", frame, at + 2)[0]
        if marker in _JPEG_SIZED:
            return at
        at += 1 if marker == 0xFF else 2 + length
    return 0


def _check_codestream(ds: Any) -> None:
    """A compressed frame has a size of its own, and that is the one decoders allocate.

    And an end marker, for pylibjpeg and Pillow make up the rest of a JPEG that is cut short or filled up with zeros. It
    is looked for behind the header, as in a file of its own: bytes may follow it.
    """
    frame = _first_frame(ds)
    size = _codestream_size(frame)
    if size is None:
        return
    if frame.rfind(b"\xff\xd9", max(_frame_header(frame), 4)) < 0:
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
    if at := _frame_header(frame):
        height, width = struct.unpack_from(">HH", frame, at + 5)
        return width, height
    return None
