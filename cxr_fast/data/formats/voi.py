"""Stored DICOM values to shown greys: modality LUT, VOI LUT or window, range, padding (PS3.3 C.7.6.3, C.11)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ...errors import ImageError

MAX_BITS = 16  # every table below has one entry a stored value: 65,536 at most
# A picture of fewer greys shows nothing of a film with MANY stored values; a window that leaves so few is not used.
FEW_GREYS, MANY = 32, 256
# One row of so many is looked at first: what these show, the film shows, and counting all pixels is most of the work.
_STEP = 16
_BLOCK = 1 << 22  # pixels a histogram step; bincount widens each to 8 bytes


def show(ds: Any, stored: np.ndarray, policy: str, inverted: bool) -> tuple[np.ndarray, str]:
    """Stored values (H, W) to shown uint8 (H, W), and a note where the header's own reading was left.

    One table with an entry a stored value does all of it: exact, and no float image. Raises ImageError (`unsupported`,
    `corrupt`, `flat`).
    """
    bits = int(ds.BitsStored)
    if stored.ndim != 2 or stored.dtype.kind not in "iu" or not 1 <= bits <= MAX_BITS or stored.itemsize > 2:
        raise ImageError("unsupported", f"{stored.dtype} pixels with {bits} bits stored; 8 to 16 bit are read")
    mask = (1 << bits) - 1  # bits above are not pixels (old overlays lived there); this also folds the sign
    raw = stored.view(stored.dtype.str.replace("i", "u"))
    codes = raw if bits == 8 * raw.itemsize else raw & mask
    values = np.arange(mask + 1, dtype=np.int64)
    if int(ds.PixelRepresentation) == 1:
        values[values > mask >> 1] -= mask + 1
    above = _check_bits(ds, raw, codes, values)
    some = _found(ds, codes[::_STEP], values, only_film=True)
    table, note = _table(ds, _modality(ds, values), some, functools.cache(lambda: _found(ds, codes, values)), policy)
    if inverted or ds.get("PresentationLUTShape") == "INVERSE":
        table = 255 - table
    return table[codes], "; ".join(filter(None, (above, note)))


def _table(
    ds: Any, modality: np.ndarray, some: np.ndarray, all_found: Callable[[], np.ndarray], policy: str
) -> tuple[np.ndarray, str]:
    """The grey of each stored value, uint8, and a note. Raises ImageError (`flat`) where no reading shows the film.

    `some` says which values occur in a part of the film, `all_found()` in all of it.
    """
    bits, notes = int(ds.BitsStored), []
    if policy == "voi":
        shown, note = _voi(ds, modality)
        if note:
            notes.append(note)
        if shown is not None:
            if not _shows_nothing(table := _greys(shown), some, all_found):
                return table, "; ".join(notes)
            notes.append(f"the {_named(ds)} shows none of the stored values")
    whole = policy == "raw" or (policy == "voi" and bits <= 8)
    table = _greys(_stretch(modality, modality if whole else modality[all_found()]))
    if _shows_nothing(table, some, all_found):
        found = all_found()
        raise ImageError(
            "flat",
            f"{np.count_nonzero(found):,} different values are stored and become {count_greys(table, found)} grey "
            f"level(s); {'use --dicom-policy voi' if policy == 'raw' else 'export the film with its window again'}",
        )
    if notes:
        low, high = modality[all_found()].min(), modality[all_found()].max()
        notes.append("read by its range" if whole else f"read by its range, {low:g} to {high:g}")
    return table, "; ".join(notes)


def _shows_nothing(table: np.ndarray, some: np.ndarray, all_found: Callable[[], np.ndarray]) -> bool:
    """As `is_flat` of all values that occur, which need not be known where some of them are greys enough."""
    return count_greys(table, some) < FEW_GREYS and is_flat(table, all_found())


def is_flat(table: np.ndarray, found: np.ndarray) -> bool:
    """Whether values that differ become one grey, or more than MANY of them fewer greys than FEW_GREYS.

    table (V,) is the grey of each value, found bool (V,) says which values occur.
    """
    values, greys = np.count_nonzero(found), count_greys(table, found)
    return bool(values > 1 and (greys == 1 or (values > MANY and greys < FEW_GREYS)))


def count_greys(table: np.ndarray, found: np.ndarray) -> int:
    """Count the different greys of the values that occur; table (V,), found bool (V,)."""
    return len(np.unique(table[found]))


def _greys(shown: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(shown, 0, 1) * 255).astype(np.uint8)


def _check_bits(ds: Any, raw: np.ndarray, codes: np.ndarray, values: np.ndarray) -> str:
    """A note where bits above BitsStored are set that no sign and no padding accounts for, and were left out.

    They are an old overlay, or the values need more bits than the header says and would wrap around. Neighbours differ
    less with them than without in the latter case: then ImageError (`corrupt`).
    """
    bits, whole = int(ds.BitsStored), (1 << 8 * raw.itemsize) - 1
    if bits == 8 * raw.itemsize or not (odd := raw > codes).any():
        return ""
    if int(ds.PixelRepresentation) == 1:  # a negative value in all bits
        odd &= raw != (values[codes] & whole)
    if (padding := _integer(ds, "PixelPaddingValue")) is not None:
        odd &= raw != padding & whole
    if not odd.any():
        return ""
    with_them, without = (_roughness(np.where(odd, full, codes)) for full in (raw, codes))
    if with_them < without:
        raise ImageError(
            "corrupt",
            f"stored values reach {int(raw[odd].max()):,}, more than the {bits} bits of BitsStored hold; export the "
            "film again",
        )
    return f"bits above the {bits} of BitsStored are set and were left out"


def _roughness(values: np.ndarray) -> int:
    """The sum of the differences between neighbours; values (H, W)."""
    wide = values.astype(np.int32)
    return int(sum(np.abs(np.diff(wide, axis=axis)).sum(dtype=np.int64) for axis in (0, 1)))


def _modality(ds: Any, values: np.ndarray) -> np.ndarray:
    """Modality LUT (PS3.3 C.11.1) of every stored value, float64."""
    if (item := _lut_item(ds, "ModalityLUTSequence")) is not None:
        return _lookup(ds, item, values)[0]
    slope, intercept = _first(ds, "RescaleSlope", 1.0), _first(ds, "RescaleIntercept", 0.0)
    if not (math.isfinite(slope) and math.isfinite(intercept) and slope != 0):
        raise ImageError("corrupt", f"RescaleSlope {slope}, RescaleIntercept {intercept}")
    return values * slope + intercept


def _voi(ds: Any, modality: np.ndarray) -> tuple[np.ndarray | None, str]:
    """VOI LUT or window (PS3.3 C.11.2) to 0..1, float64, None where the file has none that means anything; a note."""
    if (item := _lut_item(ds, "VOILUTSequence")) is not None:
        shown, top = _lookup(ds, item, modality)
        return shown / top, ""
    center, width = (_first(ds, keyword, math.nan) for keyword in ("WindowCenter", "WindowWidth"))
    function = str(ds.get("VOILUTFunction") or "LINEAR").upper()
    least = 0 if function in ("LINEAR_EXACT", "SIGMOID") else 1
    if not (math.isfinite(center) and math.isfinite(width) and width > 0 and width >= least):
        words = [_text(ds, keyword) for keyword in ("WindowCenter", "WindowWidth")]
        return None, f"the window ({words[0]}, {words[1]}) is none" if all(words) else ""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (modality - center) / width, -700, 700))), ""
    if function == "LINEAR_EXACT":
        return (modality - center) / width + 0.5, ""
    if width == 1:
        return (modality > center - 0.5).astype(np.float64), ""
    return (modality - (center - 0.5)) / (width - 1) + 0.5, ""


def _named(ds: Any) -> str:
    if _lut_item(ds, "VOILUTSequence") is not None:
        return "VOI lookup table"
    return f"window ({_text(ds, 'WindowCenter')}, {_text(ds, 'WindowWidth')})"


def _lut_item(ds: Any, keyword: str) -> Any:
    """The first item of a LUT sequence that has a descriptor and data; None where there is none, as scanners write."""
    for item in ds.get(keyword) or ():
        descriptor, data = item.get("LUTDescriptor"), item.get("LUTData")
        if descriptor is not None and len(descriptor) == 3 and data is not None and data != b"" and data != "":
            return item
    return None


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


def _found(ds: Any, codes: np.ndarray, values: np.ndarray, *, only_film: bool = False) -> np.ndarray:
    """Which stored values occur in the image, padding left out (unless it is all there is): bool (len(values),).

    With `only_film` padding is left out whatever there is beside it.
    Padding is masked and signed as the pixels are, whether the file gives it as signed or not.
    """
    flat = codes.reshape(-1)
    seen = np.zeros(len(values), dtype=bool)
    for at in range(0, flat.size, _BLOCK):
        seen |= np.bincount(flat[at : at + _BLOCK], minlength=len(values)) > 0
    padding = _integer(ds, "PixelPaddingValue")
    if padding is None:
        return seen
    limit = _integer(ds, "PixelPaddingRangeLimit")
    ends = [int(values[end & (len(values) - 1)]) for end in (padding, padding if limit is None else limit)]
    kept = seen & ~((values >= min(ends)) & (values <= max(ends)))
    return kept if only_film or kept.any() else seen


def _stretch(values: np.ndarray, over: np.ndarray) -> np.ndarray:
    """`values` to 0..1 over the range of `over`; a range of one value is black."""
    low, high = over.min(), over.max()
    return (values - low) / (high - low) if high > low else np.zeros(len(values))


def _first(ds: Any, keyword: str, default: float) -> float:
    """The first value of an element as a float; `default` where it is absent, empty or no number."""
    try:
        value = ds.get(keyword)
        if value is not None and not isinstance(value, (str, bytes, int, float)) and hasattr(value, "__len__"):
            value = value[0] if len(value) else None
        return default if value is None or value == "" else float(value)
    except (ValueError, TypeError, OverflowError):
        return default


def _integer(ds: Any, keyword: str) -> int | None:
    value = _first(ds, keyword, math.nan)
    return int(value) if math.isfinite(value) else None


def _text(ds: Any, keyword: str) -> str:
    """An element as the file has it, at most 20 characters; empty where it is absent or empty."""
    try:
        value = ds.get_item(keyword)
        raw = getattr(value, "value", None)
    except (ValueError, TypeError, AttributeError):
        return ""
    if isinstance(raw, float):
        raw = f"{raw:g}"
    text = raw.decode("ascii", "replace") if isinstance(raw, bytes) else str("" if raw is None else raw)
    return "".join(c for c in text.strip() if c.isprintable())[:20]
