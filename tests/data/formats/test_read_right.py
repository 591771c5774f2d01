"""Films with odd headers: read as an independent computation reads them, or refused with a reason."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cxr_fast.config import PreprocessSpec
from cxr_fast.data.formats import dicom, voi
from cxr_fast.data.images import decode_grey, load
from cxr_fast.errors import ImageError
from tests.data.test_images import REAL, SPEC, grey, needs_real, noise, reason, save

pydicom = pytest.importorskip("pydicom", reason="pip install 'cxr-fast[dicom]'")
from pydicom import pixels, uid  # noqa: E402
from pydicom.dataset import Dataset  # noqa: E402

from tests.data.formats.test_dicom import dicom_file, scaled  # noqa: E402

SYNTAX = "codestream_of_another_syntax"
RAMP = np.arange(64 * 32, dtype=np.uint16).reshape(64, 32) * 2  # smooth, 2,048 different values below 4,096


def note(data: bytes, policy: str = "voi") -> str:
    return dicom.decode(data, policy)[1]


def cases(name: str) -> Path:
    return Path(REAL, "cases", name)


def read(name: str) -> np.ndarray:
    return decode_grey(cases(name).read_bytes(), spec=SPEC)


# ---- the small inputs of the issue


@needs_real
@pytest.mark.parametrize(
    ("case", "same"),
    [
        ("functional_groups_ignored/enhanced.dcm", "functional_groups_ignored/classic.dcm"),
        (
            "codestream_of_another_syntax/j2k_in_jpeg_syntax.dcm",
            "codestream_of_another_syntax/j2k_in_jpeg_syntax_plain.dcm",
        ),
        ("high_bit_ignored/highbit15.dcm", "high_bit_ignored/plain.dcm"),
        ("deflated_by_byte_search/mentions_deflated.dcm", "high_bit_ignored/plain.dcm"),
        ("deflated_by_byte_search/deflated_wrong_group_length.dcm", "high_bit_ignored/plain.dcm"),
        ("jpeg_bytes_after_end/after_end.dcm", "jpeg_bytes_after_end/same.jpg"),
        ("padding_not_left_out/us_for_signed.dcm", "padding_not_left_out/ok.dcm"),
        ("padding_not_left_out/range_limit_us.dcm", "padding_not_left_out/ok.dcm"),
        ("padding_not_left_out/above_bits_stored.dcm", "padding_not_left_out/ok.dcm"),
    ],
)
def test_case_reads_as_its_sound_twin(case, same):
    film = np.s_[:, 8:] if "padding" in case else np.s_[:]  # columns 0 to 7 are padding
    np.testing.assert_array_equal(read(case)[film], read(same)[film])
    if "padding" in case:
        assert (read(case)[film].min(), read(case)[film].max()) == (0, 255)


@needs_real
@pytest.mark.parametrize("name", ["off", "short_lut", "stored_units"])
def test_case_whose_window_shows_nothing_is_read_by_its_range(name):
    data = cases(f"window_shows_nothing/{name}.dcm").read_bytes()
    ds = pydicom.dcmread(io.BytesIO(data))
    values = pixels.apply_modality_lut(ds.pixel_array, ds)
    np.testing.assert_array_equal(grey(data), scaled(values, values.min(), values.max()))
    assert "shows none of the stored values; read by its range" in note(data)


@needs_real
@pytest.mark.parametrize("name", ["comma", "words", "empty_first"])
def test_case_whose_window_is_no_number_is_read_by_its_range(name):
    data = cases(f"window_not_a_number/{name}.dcm").read_bytes()
    assert (grey(data).min(), grey(data).max()) == (0, 255)
    assert "is none; read by its range" in note(data)


@needs_real
def test_case_with_empty_lookup_tables_goes_on_to_what_the_header_says_next():
    for name in ("modality_empty", "modality_blank", "voi_blank_with_window"):
        data = cases(f"empty_lut_item/{name}.dcm").read_bytes()
        ds = pydicom.dcmread(io.BytesIO(data))
        values = ds.pixel_array.astype(float)
        if "WindowCenter" in ds:
            low = float(ds.WindowCenter) - 0.5 - (float(ds.WindowWidth) - 1) / 2
            expected = scaled(values, low, low + float(ds.WindowWidth) - 1)
        else:
            expected = scaled(values, values.min(), values.max())
        assert np.abs(grey(data).astype(int) - expected).max() <= 1


@needs_real
@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("header_messages/no_rows.dcm", "corrupt", "has no Rows"),
        ("header_messages/two_bits_stored.dcm", "corrupt", "BitsStored"),
        ("header_messages/empty_pixels.dcm", "no_pixels", "PixelData is empty"),
        ("header_messages/float_pixels.dcm", "unsupported", "floating-point"),
        ("reason_holds_address/raw_as_jpeg.dcm", "corrupt", "does not begin as JPEG"),
        ("tiff_12_bit_black/jpeg12.jpg", "unsupported", "12-bit"),
        ("tiff_12_bit_black/t64float.tif", "unsupported", "pixel mode"),
    ],
)
def test_case_is_refused_with_its_reason(name, code, words):
    with pytest.raises(ImageError, match=words) as caught:
        decode_grey(cases(name).read_bytes(), spec=SPEC, name=name)
    assert caught.value.reason == code
    assert "0x" not in str(caught.value)
    assert "attribute" not in str(caught.value)


@needs_real
def test_case_of_twelve_bits_in_a_tiff():
    with Image.open(cases("tiff_12_bit_black/t12.tif")) as image:
        stored = np.asarray(image).astype(float)
    np.testing.assert_array_equal(read("tiff_12_bit_black/t12.tif"), scaled(stored, 0, 4095))


# ---- the same kinds, made here


@pytest.mark.parametrize("invert", [1, -1])
def test_functional_groups_are_read_as_a_classic_header(invert):
    values = {"RescaleSlope": invert, "RescaleIntercept": 4095 if invert < 0 else 0}
    window = {"WindowCenter": 2000, "WindowWidth": 1500}
    transform, frame, groups = Dataset(), Dataset(), Dataset()
    for target, elements in ((transform, values), (frame, window)):
        for name, value in elements.items():
            setattr(target, name, value)
    groups.PixelValueTransformationSequence, groups.FrameVOILUTSequence = [transform], [frame]
    classic = dicom_file(RAMP, bits=12, **values, **window)
    for where in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        np.testing.assert_array_equal(grey(dicom_file(RAMP, bits=12, **{where: [groups]})), grey(classic))


@pytest.mark.parametrize("high", [12, 13, 15])
def test_bits_that_lie_high_are_moved_down(high):
    shifted = (RAMP << (high - 11)).astype(np.uint16)
    np.testing.assert_array_equal(grey(dicom_file(shifted, bits=12, HighBit=high)), grey(dicom_file(RAMP, bits=12)))
    signed = RAMP.astype(np.int16) - 2048
    moved = (signed << (high - 11)).astype(np.int16)
    np.testing.assert_array_equal(grey(dicom_file(moved, bits=12, HighBit=high)), grey(dicom_file(signed, bits=12)))


def test_high_bit_that_cannot_be_is_refused():
    assert reason(dicom_file(RAMP, bits=12, HighBit=16)) == "corrupt"
    assert reason(dicom_file(RAMP, bits=12, HighBit=4)) == "corrupt"


def test_values_beyond_bits_stored_are_refused_and_overlay_bits_are_left_out():
    assert reason(dicom_file(RAMP, bits=10)) == "corrupt"  # would wrap around three times
    overlay = RAMP | (np.random.default_rng(0).integers(0, 2, RAMP.shape) << 15).astype(np.uint16)
    np.testing.assert_array_equal(grey(dicom_file(overlay, bits=12)), grey(dicom_file(RAMP, bits=12)))
    assert "bits above the 12" in note(dicom_file(overlay, bits=12))
    signed = RAMP.astype(np.int16) - 2048  # sign bits above BitsStored are no pixels of their own
    assert not note(dicom_file(signed, bits=12))


def test_codestream_is_decoded_by_what_it_is():
    film = noise(33, 21)
    j2k, jpeg = save(film, "JPEG2000", no_jp2=True), save(film, "JPEG")
    plain = grey(dicom_file(film, syntax=uid.JPEG2000Lossless, frame=j2k))
    wrong = dicom_file(film, syntax=uid.JPEGBaseline8Bit, frame=j2k)
    np.testing.assert_array_equal(grey(wrong), plain)
    assert "the header says JPEG Baseline" in note(wrong)
    plain = grey(dicom_file(film, syntax=uid.JPEGBaseline8Bit, frame=jpeg))
    for syntax in (uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.RLELossless):
        np.testing.assert_array_equal(grey(dicom_file(film, syntax=syntax, frame=jpeg)), plain)
    assert reason(dicom_file(film, syntax=uid.JPEGBaseline8Bit, frame=film.tobytes() + b"\0")) == "corrupt"


@given(
    center=st.floats(-1e6, 1e6),
    width=st.floats(1, 1e5),
    slope=st.floats(1e-4, 100),
    policy=st.sampled_from(["voi", "minmax", "raw"]),
)
@settings(max_examples=60)
def test_no_film_of_many_values_shows_nothing(center, width, slope, policy):
    data = dicom_file(
        RAMP,
        bits=12,
        WindowCenter=f"{center:.9g}",
        WindowWidth=f"{width:.9g}",
        RescaleSlope=f"{slope:.6g}",
        RescaleIntercept=0,
    )
    shown, said = dicom.decode(data, policy)
    assert len(np.unique(shown)) >= voi.FEW_GREYS
    table = np.unique(shown[np.argsort(RAMP, axis=None) // 32, np.argsort(RAMP, axis=None) % 32], return_index=True)[1]
    assert (np.diff(table) > 0).all()  # brighter where more is stored
    if said:
        np.testing.assert_array_equal(shown, grey(dicom_file(RAMP, bits=12)))


def test_film_that_no_reading_shows_is_flat():
    narrow = (RAMP // 64 + np.arange(32) % 2).astype(np.uint16)  # 65 values of 65,536
    assert reason(dicom_file(narrow, bits=16), dicom_policy="raw") == "flat"
    assert (grey(dicom_file(narrow, bits=16)).min(), grey(dicom_file(narrow, bits=16)).max()) == (0, 255)
    spike = RAMP % 1000
    spike[0, 0] = 65535  # one pixel leaves 500 values two greys
    assert reason(dicom_file(spike.astype(np.uint16), bits=16)) == "flat"
    assert grey(dicom_file(np.zeros((9, 9), np.uint16), bits=12)).max() == 0  # nothing was stored that could be seen


def test_picture_that_shows_nothing_is_flat():
    assert reason(save(RAMP // 2, "PNG")) == "flat"  # 10 bits in 16
    assert reason(save(RAMP, "PNG")) == "flat"  # 12 bits in 16
    np.testing.assert_array_equal(
        grey(save((RAMP * 16).astype(np.uint16), "PNG")), (RAMP.astype(int) * 16 + 128) // 257
    )
    assert reason(save((RAMP / 65535).astype(np.float32), "TIFF")) == "flat"
    film = noise(20, 20)
    clear = Image.merge("LA", [Image.fromarray(film), Image.new("L", (20, 20), 0)])
    file = io.BytesIO()
    clear.save(file, "PNG")
    assert reason(file.getvalue()) == "flat"
    palette = Image.fromarray(film % 4).convert("P")
    palette.putpalette([7] * 768)
    file = io.BytesIO()
    palette.save(file, "PNG")
    assert reason(file.getvalue()) == "flat"
    assert grey(save(np.full((20, 20), 9, np.uint8), "PNG")).max() == 9
    dot = np.zeros((500, 500), np.uint8)
    dot[1, 1] = 255
    assert grey(save(dot, "PNG")).max() == 255


def test_film_of_another_kind_is_noted(tmp_path):
    for field, value in (("Modality", "CT"), ("BodyPartExamined", "HAND")):
        path = tmp_path / f"{value}.dcm"
        path.write_bytes(dicom_file(RAMP, bits=12, **{field: value}))
        assert load(path, PreprocessSpec(size=16)).note == f"{field} is {value}"
    for part in ("CHEST", "THORAX", "CHEST PA", ""):
        assert not note(dicom_file(RAMP, bits=12, BodyPartExamined=part))


def test_public_files_agree_with_pydicom():
    """Single-frame grey files that pydicom ships, without a table of ours between: modality LUT, VOI, range."""
    compared = 0
    for path in sorted(Path(pydicom.__file__).parent.glob("data/test_files/*.dcm")):
        data = path.read_bytes()
        try:
            shown = decode_grey(data, spec=SPEC)
            ds = pydicom.dcmread(io.BytesIO(data), force=True)
            stored = ds.pixel_array
        except Exception:  # refused, or not readable by pydicom either
            continue
        if ds.SamplesPerPixel != 1 or "read by" in note(data) or "PixelPaddingValue" in ds or "VOILUTSequence" in ds:
            continue
        values = pixels.apply_modality_lut(stored, ds).astype(float)
        if ds.get("WindowCenter") is not None:
            center, width = (float(np.atleast_1d(ds[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
            low = center - 0.5 - (width - 1) / 2
            expected = scaled(values, low, low + width - 1)
        elif ds.BitsStored <= 8:
            expected = scaled(values, 0, (1 << ds.BitsStored) - 1)
        else:
            expected = scaled(values, values.min(), values.max())
        if ds.PhotometricInterpretation == "MONOCHROME1":
            expected = 255 - expected
        assert np.abs(shown.astype(int) - expected.astype(int)).max() <= 1, path
        compared += 1
    assert compared >= 10


@given(
    center=st.floats(-5000, 5000),
    width=st.floats(1, 9000),
    padding=st.none() | st.integers(0, 4095),
    scale=st.sampled_from([1, 16, 400]),
)
@settings(max_examples=60)
def test_a_part_of_the_film_decides_as_all_of_it_does(center, width, padding, scale):
    """Fast against slow: whether a table shows nothing, asked of one row of sixteen first or of every pixel."""
    film = (RAMP // scale * scale).astype(np.uint16)
    film[::16] = film[0, 0]  # the rows that are looked at first are all alike
    header = {"WindowCenter": f"{center:.6g}", "WindowWidth": f"{width:.6g}"}
    if padding is not None:
        header["PixelPaddingValue"] = padding
    data = dicom_file(film, bits=12, **header)

    def outcome():
        try:
            shown, said = dicom.decode(data, "voi")
            return shown.tobytes(), said
        except ImageError as error:
            return error.reason, str(error)

    fast = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(voi, "_shows_nothing", lambda table, _, all_found: voi.is_flat(table, all_found()))
        assert outcome() == fast
