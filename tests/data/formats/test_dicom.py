"""DICOM: every step of the standard against a plain computation or pydicom's own, and files made to break."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cxr_fast
from cxr_fast.config import PreprocessSpec, choices
from cxr_fast.data.formats import limits
from cxr_fast.data.images import REASONS, decode_grey
from cxr_fast.errors import ImageError
from tests.data.test_images import (
    REAL,
    SPEC,
    grey,
    jpeg_of_size,
    luma,
    mutated,
    needs_real,
    noise,
    reason,
    save,
    smooth,
    survives,
)

pydicom = pytest.importorskip("pydicom", reason="pip install 'cxr-fast[dicom]'")
from pydicom import pixels, uid  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.pixels import get_decoder, get_encoder  # noqa: E402


def dicom_file(array, *, bits=None, photometric="MONOCHROME2", syntax=None, frame=None, preamble=True, **elements):
    """A secondary capture written with pydicom; `frame` is an already compressed one, `elements` by keyword."""

    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = uid.SecondaryCaptureImageStorage, "1.2.3.4"
    ds.Modality, ds.PatientID = "DX", "p17"
    ds.Rows, ds.Columns = array.shape[:2]
    ds.SamplesPerPixel = 1 if array.ndim == 2 else 3
    if array.ndim == 3:
        ds.PlanarConfiguration = 0
    ds.PhotometricInterpretation = photometric
    ds.BitsAllocated = array.dtype.itemsize * 8
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(array.dtype.kind == "i")
    ds.PixelData = encapsulate([frame]) if frame is not None else array.tobytes() + b"\0" * (array.nbytes % 2)
    ds["PixelData"].VR = "OW" if array.dtype.itemsize == 2 and frame is None else "OB"
    ds["PixelData"].is_undefined_length = frame is not None
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    syntax = syntax or uid.ExplicitVRLittleEndian
    file = io.BytesIO()
    if not preamble:
        pydicom.dcmwrite(file, ds, implicit_vr=syntax.is_implicit_VR, little_endian=True)
        return file.getvalue()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(file, ds, enforce_file_format=True)
    return file.getvalue()


def lut(entries, first, bits, values):

    item = Dataset()
    item.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [entries, first, bits])
    item.add_new("LUTData", "OW", np.asarray(values, "<u2").tobytes())
    return item


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.rint(np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def test_dicom_8_bit_without_voi_is_what_it_was():
    array = noise(33, 21) // 2  # not full range: it must not be stretched
    for policy in ("voi", "raw"):
        np.testing.assert_array_equal(grey(dicom_file(array), dicom_policy=policy), array)
    np.testing.assert_array_equal(grey(dicom_file(array), dicom_policy="minmax"), scaled(array, 0, array.max()))


def test_dicom_deep_without_voi_is_stretched_by_voi_and_not_by_raw():
    array = noise(33, 21, top=3000) + 100
    data = dicom_file(array.astype(np.uint16), bits=12)
    for policy in ("voi", "minmax"):
        np.testing.assert_array_equal(grey(data, dicom_policy=policy), scaled(array, array.min(), array.max()))
    np.testing.assert_array_equal(grey(data, dicom_policy="raw"), scaled(array, 0, 4095))


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("center", "width"), [(2000, 1500), (100.5, 3000), (3000, 300), (-200, 9000)])
def test_dicom_window_is_pydicoms(function, center, width):

    array = noise(40, 50, top=4096)
    fields = {"WindowCenter": center, "WindowWidth": width, "RescaleSlope": 1.5, "RescaleIntercept": -300}
    if function:
        fields["VOILUTFunction"] = function
    data = dicom_file(array, bits=12, **fields)
    ds = pydicom.dcmread(io.BytesIO(data))
    with np.errstate(over="ignore"):  # pydicom's sigmoid overflows, harmlessly
        shown = pixels.apply_voi_lut(pixels.apply_modality_lut(ds.pixel_array, ds), ds)
    expected = scaled(shown, -300, 4095 * 1.5 - 300)
    assert np.abs(grey(data).astype(int) - expected).max() <= 1  # a half may round either way
    assert np.mean(grey(data) != expected) < 0.01


def test_dicom_first_of_several_windows_and_windows_that_mean_nothing():
    array = noise(40, 50, top=4096)
    one = dicom_file(array, bits=12, WindowCenter=2000, WindowWidth=1500)
    two = dicom_file(array, bits=12, WindowCenter=[2000, 50], WindowWidth=[1500, 3])
    np.testing.assert_array_equal(grey(one), grey(two))
    none = dicom_file(array, bits=12)
    for width in (0, -5, ""):
        np.testing.assert_array_equal(grey(dicom_file(array, bits=12, WindowCenter=9, WindowWidth=width)), grey(none))
    few = array // 16 * 16  # at most 256 different values, of which a window may leave two greys
    step = grey(dicom_file(few, bits=12, WindowCenter=2000, WindowWidth=1))
    np.testing.assert_array_equal(step, np.where(few > 1999.5, 255, 0))


def test_dicom_voi_sequence_comes_before_the_window():
    array = noise(40, 50, top=4096)
    curve = np.sqrt(np.arange(1000) / 999) * 1023
    item = lut(1000, 2000, 10, curve)
    data = dicom_file(array, bits=12, VOILUTSequence=[item], WindowCenter=9, WindowWidth=9)
    index = np.clip(array.astype(int) - 2000, 0, 999)
    np.testing.assert_array_equal(grey(data), scaled(curve.astype(np.uint16)[index], 0, 1023))
    assert not np.array_equal(grey(data, dicom_policy="raw"), grey(data))


def test_dicom_voi_table_of_8_bits_and_one_declared_too_wide():
    array = noise(40, 50, top=4096)
    curve = np.arange(4096) // 16
    eight = dicom_file(array, bits=12, VOILUTSequence=[lut(4096, 0, 8, curve)])
    np.testing.assert_array_equal(grey(eight), array // 16)
    wide = dicom_file(array, bits=12, VOILUTSequence=[lut(4096, 0, 16, 4095 - np.arange(4096))])
    np.testing.assert_array_equal(grey(wide), scaled(4095 - array, 0, 4095))


def test_dicom_voi_table_below_zero():
    array = noise(40, 50, top=4096).astype(np.int16) - 2048
    data = dicom_file(array, bits=12, VOILUTSequence=[lut(4096, -2048, 12, np.arange(4096))])
    np.testing.assert_array_equal(grey(data), scaled(array, -2048, 2047))


def test_dicom_modality_table():
    array = noise(40, 50, top=1024)
    curve = np.arange(1024) ** 2 // 16
    item = lut(1024, 0, 16, curve)
    data = dicom_file(array, bits=10, ModalityLUTSequence=[item], WindowCenter=20000, WindowWidth=30001)
    expected = (curve[array] - 19999.5) / 30000 + 0.5
    np.testing.assert_array_equal(grey(data), scaled(expected, 0, 1))
    np.testing.assert_array_equal(grey(data, dicom_policy="raw"), scaled(curve[array], 0, curve.max()))


def test_dicom_signed_negative_slope_and_overlay_bits():
    array = noise(40, 50, top=4096).astype(np.int16) - 2048
    np.testing.assert_array_equal(grey(dicom_file(array, bits=12), dicom_policy="raw"), scaled(array, -2048, 2047))
    sixteen = (noise(40, 50, top=65536).astype(int) - 32768).astype(np.int16)
    np.testing.assert_array_equal(grey(dicom_file(sixteen), dicom_policy="raw"), scaled(sixteen, -32768, 32767))
    falling = dicom_file(array, bits=12, RescaleSlope=-1, RescaleIntercept=5)
    np.testing.assert_array_equal(grey(falling, dicom_policy="raw"), scaled(-array.astype(int), -2047, 2048))
    plain = noise(40, 50, top=4096)
    overlaid = plain | (noise(40, 50, top=2, seed=1).astype(np.uint16) << 13)
    np.testing.assert_array_equal(grey(dicom_file(overlaid, bits=12)), grey(dicom_file(plain, bits=12)))


@pytest.mark.parametrize("policy", choices(PreprocessSpec, "dicom_policy"))
def test_dicom_is_inverted_once(policy):
    array = noise(40, 50, top=4096)
    window = {"bits": 12, "WindowCenter": 2000, "WindowWidth": 1500}
    upright = grey(dicom_file(array, **window), dicom_policy=policy)
    for photometric, shape in (("MONOCHROME1", ""), ("MONOCHROME1", "INVERSE"), ("MONOCHROME2", "INVERSE")):
        data = dicom_file(array, photometric=photometric, PresentationLUTShape=shape, **window)
        np.testing.assert_array_equal(grey(data, dicom_policy=policy), 255 - upright)
    same = dicom_file(array, PresentationLUTShape="IDENTITY", **window)
    np.testing.assert_array_equal(grey(same, dicom_policy=policy), upright)


def test_dicom_padding_does_not_stretch_the_range():
    array = noise(40, 50, top=1000) + 500
    padded = array.copy()
    padded[:5] = 4000
    inside = grey(dicom_file(padded.astype(np.uint16), bits=12, PixelPaddingValue=4000))[5:]
    np.testing.assert_array_equal(inside, scaled(array[5:], array[5:].min(), array[5:].max()))
    blank = np.full((8, 8), 7, np.uint16)
    assert not grey(dicom_file(blank, bits=12, PixelPaddingValue=7)).any()


def test_dicom_colour():
    array = noise(20, 30, 3)
    np.testing.assert_array_equal(grey(dicom_file(array, photometric="RGB")), luma(array))
    planes = dicom_file(array, photometric="RGB", PlanarConfiguration=1, PixelData=array.transpose(2, 0, 1).tobytes())
    np.testing.assert_array_equal(grey(planes), luma(array))
    soft = smooth(20, 30)
    soft = np.stack([soft, soft // 2 + 40, soft // 3 + 60], axis=2)
    ybr = np.asarray(Image.fromarray(soft).convert("YCbCr"))
    assert np.abs(grey(dicom_file(ybr, photometric="YBR_FULL")).astype(int) - luma(soft)).max() <= 1
    palette = dicom_file(noise(9, 9), photometric="PALETTE COLOR")
    assert reason(palette) in ("unsupported", "corrupt")
    assert reason(dicom_file(noise(9, 9, 3, top=65536), photometric="RGB")) == "unsupported"


def test_dicom_encodings():
    array = noise(40, 50, top=4096)
    expected = grey(dicom_file(array, bits=12))
    for syntax in (uid.ImplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian):
        np.testing.assert_array_equal(grey(dicom_file(array, bits=12, syntax=syntax)), expected)
    for syntax in (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian):
        data = dicom_file(array, bits=12, syntax=syntax, preamble=False)
        assert data[128:132] != b"DICM"
        np.testing.assert_array_equal(grey(data), expected)


def test_dicom_compressed():
    array = smooth(40, 50)
    data = save(array, "JPEG")
    wrapped = dicom_file(array, syntax=uid.JPEGBaseline8Bit, frame=data)
    np.testing.assert_array_equal(grey(wrapped), grey(data))  # the same decoder as for a .jpg
    deep = noise(40, 50, top=65536)
    j2k = save(deep, "JPEG2000", no_jp2=True, irreversible=False)
    wrapped = dicom_file(deep, syntax=uid.JPEG2000Lossless, frame=j2k)
    np.testing.assert_array_equal(grey(wrapped, dicom_policy="raw"), scaled(deep, 0, 65535))

    rle = get_encoder(uid.RLELossless).encode(
        deep.tobytes(),
        rows=40,
        columns=50,
        samples_per_pixel=1,
        number_of_frames=1,
        bits_allocated=16,
        bits_stored=16,
        pixel_representation=0,
        photometric_interpretation="MONOCHROME2",
        encoding_plugin="pydicom",
    )
    wrapped = dicom_file(deep, syntax=uid.RLELossless, frame=rle)
    np.testing.assert_array_equal(grey(wrapped, dicom_policy="raw"), scaled(deep, 0, 65535))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.98])
def test_dicom_compressed_and_cut_short(share):
    jpeg, j2k = save(noise(90, 90), "JPEG", quality=100), save(noise(90, 90), "JPEG2000", no_jp2=True)
    for syntax, frame in ((uid.JPEGBaseline8Bit, jpeg), (uid.JPEG2000Lossless, j2k)):
        inside = frame[: int(len(frame) * share)]
        assert reason(dicom_file(noise(90, 90), syntax=syntax, frame=inside)) == "truncated"
        filled = inside.ljust(len(frame), b"\0")
        assert reason(dicom_file(noise(90, 90), syntax=syntax, frame=filled)) == "truncated"
        np.testing.assert_array_equal(
            grey(dicom_file(noise(90, 90), syntax=syntax, frame=frame + bytes(500))),
            grey(dicom_file(noise(90, 90), syntax=syntax, frame=frame)),
        )
        whole = dicom_file(noise(90, 90), syntax=syntax, frame=frame)
        start = whole.index(b"\xe0\x7f\x10\x00") + 40
        assert reason(whole[: start + int(len(frame) * share) - 40]) == "truncated"


def test_dicom_needs_a_plugin(monkeypatch):

    array = noise(16, 16, top=4096)
    jpeg = save(noise(16, 16), "JPEG")
    frames = {
        uid.JPEGLosslessSV1: jpeg.replace(b"\xff\xc0", b"\xff\xc3"),
        uid.JPEG2000Lossless: save(noise(16, 16), "JPEG2000", no_jp2=True),
    }
    for syntax, frame in frames.items():
        monkeypatch.setattr(get_decoder(syntax), "_available", {})
        with pytest.raises(ImageError, match="of the extra dicom") as caught:
            decode_grey(dicom_file(array, bits=12, syntax=syntax, frame=frame), spec=SPEC)
        assert caught.value.reason == "needs_plugin"
        assert syntax.name in str(caught.value)
    extended = get_decoder(uid.JPEGExtended12Bit)
    monkeypatch.setattr(extended, "_available", {k: v for k, v in extended._available.items() if k == "pillow"})
    frame = jpeg.replace(b"\xff\xc0", b"\xff\xc1")
    assert reason(dicom_file(array, bits=12, syntax=uid.JPEGExtended12Bit, frame=frame)) == "needs_plugin"
    assert reason(dicom_file(array, bits=12, syntax=uid.MPEG2MPML, frame=jpeg)) == "unsupported"


def test_dicom_needs_pydicom(monkeypatch):
    data = dicom_file(noise(16, 16))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImageError, match="which the extra dicom brings") as caught:
        decode_grey(data, spec=SPEC)
    assert caught.value.reason == "needs_pydicom"
    for text in (str(caught.value), *REASONS.values()):
        assert str(Path(cxr_fast.__file__).parents[1]) not in text, "a row of predictions may leave this machine"


def test_dicom_refusals():
    array = noise(16, 16, top=4096)
    data = dicom_file(array, bits=12)
    assert reason(dicom_file(np.concatenate([array, array]), bits=12, Rows=16, NumberOfFrames=2)) == "multi_frame"
    assert reason(data[:-100]) == "truncated"
    assert reason(dicom_file(array, bits=12, RescaleSlope=0, RescaleIntercept=0)) == "corrupt"
    assert reason(dicom_file(array.astype(np.uint32), bits=20)) == "unsupported"
    assert reason(dicom_file(array, bits=12, Rows=0)) == "corrupt"
    assert reason(data[: data.index(b"\xe0\x7f\x10\x00")]) == "no_pixels"


def test_dicom_bombs():
    array = noise(16, 16)
    assert reason(dicom_file(array, Rows=60_000, Columns=60_000)) == "too_large"
    jpeg = jpeg_of_size(save(array, "JPEG"), 60_000, 60_000)
    assert reason(dicom_file(array, syntax=uid.JPEGBaseline8Bit, frame=jpeg)) == "too_large"
    jpeg = jpeg_of_size(save(array, "JPEG"), 16, 17)
    assert reason(dicom_file(array, syntax=uid.JPEGBaseline8Bit, frame=jpeg)) == "corrupt"
    j2k = bytearray(save(array, "JPEG2000", no_jp2=True))
    j2k[8:16] = struct.pack(">II", 60_000, 60_000)
    assert reason(dicom_file(array, syntax=uid.JPEG2000Lossless, frame=bytes(j2k))) == "too_large"


def test_dicom_deflated_is_bounded(monkeypatch):
    data = dicom_file(np.zeros((500, 500), np.uint16), syntax=uid.DeflatedExplicitVRLittleEndian)
    assert len(data) < 10_000
    monkeypatch.setattr(limits, "MAX_BYTES", 400_000)
    assert reason(data) == "too_large"


def test_dicom_warnings_do_not_leak():
    data = dicom_file(noise(16, 16), StudyDate="20200101").replace(b"20200101", b"not-a-da")
    assert grey(data).shape == (16, 16)
    extra = dicom_file(noise(16, 16), PixelData=noise(16, 16).tobytes() + bytes(100))
    np.testing.assert_array_equal(grey(extra), noise(16, 16))


# ---- fuzzing


def samples() -> dict[str, bytes]:
    array, deep = smooth(24, 20), noise(24, 20, top=65536)
    window = {"WindowCenter": 2000, "WindowWidth": 1500, "RescaleSlope": 2, "RescaleIntercept": -5}
    table = lut(256, 0, 12, np.arange(256) * 16)
    j2k = save(array, "JPEG2000", no_jp2=True)
    return {
        "dicom": dicom_file(deep % 4096, bits=12, **window),
        "tables": dicom_file(array, ModalityLUTSequence=[table], VOILUTSequence=[table], PixelPaddingValue=3),
        "dicomjpeg": dicom_file(array, syntax=uid.JPEGBaseline8Bit, frame=save(array, "JPEG")),
        "dicomj2k": dicom_file(array, syntax=uid.JPEG2000Lossless, frame=j2k),
        "bare": dicom_file(noise(24, 20, 3), photometric="RGB", preamble=False),
    }


# ---- real files


@needs_real
def test_real_mutated_files():
    rng = np.random.default_rng(20)
    files = [path.read_bytes() for path in sorted(Path(REAL, "dicom").glob("*.dcm"))]
    outcomes = [survives(mutated(files[n % len(files)], rng)) for n in range(200)]
    assert 0 < sum(outcomes) < len(outcomes)


@needs_real
def test_real_dicom_pair_is_one_image_and_its_negative():
    """The MONOCHROME1 file holds the same stored values as the other: by the standard, its negative is shown."""
    one = decode_grey(Path(REAL, "dicom", "monochrome1.dcm").read_bytes(), spec=SPEC)
    two = decode_grey(Path(REAL, "dicom", "rsna_monochrome2.dcm").read_bytes(), spec=SPEC)
    assert two.shape == (1024, 1024)
    np.testing.assert_array_equal(one, 255 - two)
    lungs, spine = two[300:500, 250:330], two[500:700, 480:540]
    assert lungs.mean() + 40 < spine.mean()  # air dark, bone light


@needs_real
def test_real_radiograph_written_as_monochrome1_looks_the_same():
    """What a digital detector writes: 12 bits, low where little was absorbed, window, MONOCHROME1."""
    path = sorted(Path(REAL, "full_size").glob("*.png"))[3]
    plain = decode_grey(path.read_bytes(), spec=SPEC)
    stored = (4095 - plain.astype(np.uint16) * 16).astype(np.uint16)
    fields = {"bits": 12, "photometric": "MONOCHROME1", "PresentationLUTShape": "INVERSE"}
    data = dicom_file(stored, WindowCenter=2048, WindowWidth=4096, **fields)
    assert np.abs(grey(data).astype(int) - plain).max() <= 1
