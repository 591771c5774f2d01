"""Pixels: every format against a plain computation, the resizes against torchvision, and files made to break."""

from __future__ import annotations

import ast
import concurrent.futures
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import textwrap
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cxr_fast.config import PreprocessSpec, choices
from cxr_fast.data import images
from cxr_fast.data.formats import dicom, limits, pictures
from cxr_fast.data.images import (
    REASONS,
    array_pixels,
    decode_grey,
    flip,
    load,
    read_bytes,
    resize,
)
from cxr_fast.errors import ImageError

SPEC = PreprocessSpec()
MODES = choices(PreprocessSpec, "resize")
REAL = os.environ.get("CXR_FAST_REAL_DATA")
needs_real = pytest.mark.skipif(not REAL, reason="CXR_FAST_REAL_DATA is not set")


def spec(**fields) -> PreprocessSpec:
    return PreprocessSpec(**fields)


def noise(*shape: int, top: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top, shape).astype(np.uint8 if top <= 256 else np.uint16)


def smooth(h: int, w: int) -> np.ndarray:
    y, x = np.mgrid[:h, :w]
    return ((np.sin(x / 9) + np.cos(y / 7) + 2) * 63).astype(np.uint8)


def save(array: np.ndarray | Image.Image, fmt: str, **options) -> bytes:
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def grey(data: bytes, **fields) -> np.ndarray:
    pixels = decode_grey(data, spec=spec(**fields))
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 2
    return pixels


def reason(data: bytes, **fields) -> str:
    with pytest.raises(ImageError) as caught:
        decode_grey(data, spec=spec(**fields), name="p17.png")
    assert caught.value.reason in REASONS
    assert str(caught.value).startswith("p17.png: ")
    assert "\n" not in str(caught.value)
    return caught.value.reason


def luma(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601 in Pillow's fixed point."""
    return ((rgb[..., :3].astype(np.int64) @ [19595, 38470, 7471] + 0x8000) >> 16).astype(np.uint8)


def tiff(array: np.ndarray, *, photometric: int = 1, order: str = "<", size: tuple[int, int] | None = None) -> bytes:
    """An uncompressed TIFF of one strip, of any dtype: what Pillow itself will not write."""
    width, height = size or (array.shape[1], array.shape[0])
    kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    data = array.astype(array.dtype.newbyteorder(order)).tobytes()
    tags = [(256, width), (257, height), (258, array.dtype.itemsize * 8), (259, 1), (262, photometric)]
    tags += [(273, 8 + 2 + 12 * 10 + 4), (277, 1), (278, height), (279, len(data)), (339, kind)]
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 10)
    for tag, value in tags:
        long = tag in (256, 257, 273, 278, 279)
        out += struct.pack(order + ("HHII" if long else "HHIHxx"), tag, 4 if long else 3, 1, value)
    return out + struct.pack(order + "I", 0) + data


def png(width: int, height: int, body: bytes, *, depth: int = 8, colour: int = 0, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    idat = chunk(b"IDAT", zlib.compress(body, 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + idat + chunk(b"IEND", b"")


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def jpeg_of_size(data: bytes, width: int, height: int) -> bytes:
    """The same JPEG, its header claiming another size."""
    at = next(i for i in range(len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC1, 0xC2))
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


# ---- formats


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "BMP"])
def test_lossless_8_bit_grey_is_the_array_itself(fmt):
    array = noise(37, 53)
    np.testing.assert_array_equal(grey(save(array, fmt)), array)


def test_16_bit_is_divided_by_257_and_never_stretched():
    array = noise(50, 40, top=65536)
    expected = np.rint(array / 257).astype(np.uint8)
    for order in "<>":
        np.testing.assert_array_equal(grey(tiff(array, order=order)), expected)
    np.testing.assert_array_equal(grey(save(array, "PNG")), expected)
    for compression in ("tiff_lzw", "tiff_adobe_deflate"):
        np.testing.assert_array_equal(grey(save(array, "TIFF", compression=compression)), expected)
    twelve = grey(save(noise(8, 8, top=4096), "PNG"))
    assert twelve.max() <= 16


def test_palette_and_one_bit():
    array = noise(20, 30)
    palette = noise(256, 3, seed=1)
    image = Image.fromarray(array, "L").convert("P")
    image.putpalette(palette.tobytes())
    np.testing.assert_array_equal(grey(save(image, "PNG")), luma(palette[array]))
    bits = noise(20, 30, top=2).astype(bool)
    for fmt in ("PNG", "TIFF", "BMP"):
        np.testing.assert_array_equal(grey(save(Image.fromarray(bits), fmt)), bits * np.uint8(255))


def test_colour_is_itu_601_luma():
    array = noise(20, 30, 3)
    for fmt in ("PNG", "TIFF", "BMP"):
        np.testing.assert_array_equal(grey(save(array, fmt)), luma(array))
    same = np.repeat(noise(20, 30)[..., None], 3, axis=2)
    np.testing.assert_array_equal(grey(save(same, "PNG")), same[..., 0])


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_over_black(mode, fmt):
    array = noise(20, 30, len(mode))
    image = Image.frombytes(mode, (30, 20), array.tobytes())
    flat = luma(array) if mode == "RGBA" else array[..., 0]
    expected = np.rint(flat.astype(float) * array[..., -1] / 255)
    np.testing.assert_array_equal(grey(save(image, fmt)), expected)


def test_transparent_colours_are_black():
    array = noise(20, 30)
    key = int(array[3, 4])
    np.testing.assert_array_equal(grey(save(array, "PNG", transparency=key)), np.where(array == key, 0, array))
    image = Image.fromarray(array).convert("P")
    alpha = np.full(256, 255, np.uint8)
    alpha[key] = 0
    expected = np.where(array == key, 0, array)
    np.testing.assert_array_equal(grey(save(image, "PNG", transparency=alpha.tobytes())), expected)


def test_jpeg_grey_colour_and_progressive():
    array = smooth(61, 83)
    for options in ({}, {"progressive": True}, {"quality": 95}):
        data = save(array, "JPEG", **options)
        np.testing.assert_array_equal(grey(data), np.asarray(Image.open(io.BytesIO(data))))
    colour = save(np.stack([array, array[::-1], array[:, ::-1]], axis=2), "JPEG")
    np.testing.assert_array_equal(grey(colour), luma(np.asarray(Image.open(io.BytesIO(colour)))))


def test_cmyk_jpeg_is_read_with_adobes_inversion():
    array = smooth(48, 64)
    image = Image.merge("CMYK", [Image.new("L", (64, 48))] * 3 + [Image.fromarray(255 - array)])
    data = save(image, "JPEG", quality=100)
    assert b"Adobe" in data
    assert np.abs(grey(data).astype(int) - array).max() <= 4


def test_multi_picture_jpeg_gives_its_first_picture():
    first, second = smooth(40, 40), 255 - smooth(40, 40)
    data = save(Image.fromarray(first), "MPO", save_all=True, append_images=[Image.fromarray(second)])
    assert np.abs(grey(data).astype(int) - first).max() < 20


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_applied_once(fmt, turn):
    y, x = np.mgrid[:32, :48]
    image = Image.fromarray((y * 3 + x * 2).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = turn
    data = save(image, fmt, exif=exif)
    a = np.asarray(image)
    expected = [a, a[:, ::-1], a[::-1, ::-1], a[::-1], a.T, a[::-1].T, a[::-1, ::-1].T, a.T[::-1]][turn - 1]
    got = grey(data).astype(int)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= (6 if fmt == "JPEG" else 0)


def test_broken_exif_does_not_cost_the_image():
    array = noise(16, 16)
    np.testing.assert_array_equal(grey(save(array, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")), array)


def test_white_is_zero_tiff_is_inverted():
    for array in (noise(9, 7), noise(9, 7, top=65536)):
        np.testing.assert_array_equal(grey(tiff(array, photometric=0)), 255 - grey(tiff(array)))
    array = np.random.default_rng(0).random((9, 7), dtype=np.float32)
    assert np.abs(grey(tiff(array, photometric=0)).astype(int) + grey(tiff(array)) - 255).max() <= 1


def test_float_tiff_is_0_to_1_or_refused():
    array = np.random.default_rng(0).random((9, 7), dtype=np.float32)
    for order in "<>":
        np.testing.assert_array_equal(grey(tiff(array, order=order)), np.rint(array * np.float32(255)))
    for wrong in (array * 255, array - 0.5, np.where(array > 0.5, np.nan, array), array / np.float32(1e-30)):
        assert reason(tiff(wrong.astype(np.float32))) == "bad_range"


def test_layouts_without_a_grey_reading_are_refused():
    assert reason(tiff(noise(9, 7).astype(np.int16))) == "unsupported"
    assert reason(tiff(noise(9, 7).astype(np.uint32))) in ("unsupported", "corrupt")
    assert reason(save(Image.fromarray(noise(9, 7, 3)).convert("LAB"), "TIFF")) == "unsupported"


# ---- what is refused


def test_content_decides_not_the_name(tmp_path):
    (tmp_path / "a.png").write_bytes(save(noise(20, 20), "JPEG"))
    assert load(tmp_path / "a.png", SPEC)[0].shape == (224, 224)
    for text in (
        b"patient,label\n1,0\n",
        b"BM" + b"not a bitmap" * 20,
        b"\x08\x00\x05\x00",
        b"x" * 4000,
        bytes(500),
        save(noise(9, 9), "PNG")[1:],
    ):
        assert reason(text) == "not_an_image"
    assert reason(save(noise(20, 20), "GIF")) == "not_an_image"
    assert reason(save(noise(20, 20), "WEBP")) == "not_an_image"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not_an_image"


def test_missing_unreadable_empty(tmp_path):
    def why(path: str | Path) -> str:
        with pytest.raises(ImageError) as caught:
            read_bytes(path)
        assert str(path) in str(caught.value)
        return caught.value.reason

    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe")
    assert why(tmp_path / "none.png") == "missing"
    assert why(tmp_path / "empty.png" / "below") == "missing"
    assert why(tmp_path) == "unreadable"
    assert why(tmp_path / "pipe") == "unreadable"
    assert why("a\0b") == "unreadable"
    assert why(tmp_path / "empty.png") == "empty"
    with open(tmp_path / "big.png", "wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    assert why(tmp_path / "big.png") == "too_large"
    assert reason(b"") == "empty"
    with pytest.raises(ImageError) as caught:
        load(tmp_path / "none.png", SPEC)
    assert caught.value.reason == "missing"


def test_permission_denied(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"x")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ImageError, match="Permission denied") as caught:
        read_bytes(path)
    monkeypatch.undo()
    assert caught.value.reason == "unreadable"


@pytest.mark.parametrize("fmt", ["PNG", "JPEG"])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9, 0.99])
def test_truncated(fmt, share):
    data = save(noise(64, 64), fmt)
    assert reason(data[: int(len(data) * share)]) == "truncated"


def test_truncated_tiff_and_bmp():
    for fmt in ("TIFF", "BMP"):
        data = save(noise(64, 64), fmt)
        assert reason(data[: len(data) * 3 // 4]) in ("truncated", "corrupt")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_a_png_with_any_flipped_bit_is_refused_or_the_same(mode):
    """Pillow does not look at the checksum of the pixels: up to 3 % of these flips gave another film without a word."""
    data = save(Image.fromarray(smooth(24, 20)).convert(mode), "PNG")
    sound = grey(data)
    for bit in range(0, 8 * len(data), 3):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        if survives(bytes(broken)):
            np.testing.assert_array_equal(grey(bytes(broken)), sound)


@pytest.mark.parametrize(("fmt", "code"), [("PNG", "corrupt"), ("JPEG", "truncated")])
@pytest.mark.parametrize("fill", [b"\0", b"\xff", b"U"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_cut_short_and_filled_up_to_its_size(fmt, code, fill, share):
    """What a copy leaves that was broken off after the space was taken; zeros are pixels to both decoders."""
    data = save(noise(64, 64, 3), fmt, **({"quality": 100} if fmt == "JPEG" else {}))
    assert reason(data[: int(len(data) * share)].ljust(len(data), fill)) == code


def test_an_end_marker_before_the_pixels_does_not_count():
    """A thumbnail in the metadata has its own."""
    data = save(noise(64, 64, 3), "JPEG", quality=100)
    thumbnail = b"\xff\xe2" + struct.pack(">H", 2 + 400) + save(noise(8, 8), "JPEG").ljust(400, b"\0")[:400]
    whole = data[:2] + thumbnail + data[2:]
    np.testing.assert_array_equal(grey(whole + b"trailing"), grey(data))
    assert reason(whole[:-3000] + bytes(3000)) == "truncated"


def test_several_frames():
    a, b = Image.fromarray(noise(20, 20)), Image.fromarray(noise(20, 20, seed=1))
    assert reason(save(a, "TIFF", save_all=True, append_images=[b])) == "multi_frame"
    assert reason(save(a, "PNG", save_all=True, append_images=[b])) == "multi_frame"


def test_zero_size():
    assert reason(png(0, 5, b"")) == "corrupt"
    assert reason(png(5, 0, b"")) == "corrupt"


def test_every_reason_raised_is_explained():
    found = set()
    for module in (images, dicom, limits, pictures):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ImageError":
                found |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    assert found | {"truncated"} == set(REASONS)
    assert all(text and "\n" not in text for text in REASONS.values())


BOMBS = """
    import json, resource, struct, sys, zlib
    sys.path.insert(0, {tests!r})
    from tests.data.test_images import *

    def why(data):
        try:
            return list(decode_grey(data, spec=SPEC).shape)
        except ImageError as error:
            return error.reason

    out = {{}}
    side = 60_000
    out["png"] = why(png(side, side, bytes(1000)))
    out["jpeg"] = why(jpeg_of_size(save(noise(16, 16), "JPEG"), side, side))
    out["tiff"] = why(tiff(noise(16, 16), size=(side, side)))
    bmp = save(noise(16, 16), "BMP")
    out["bmp"] = why(bmp[:18] + struct.pack("<ii", side, side) + bmp[26:])
    out["long"] = why(png(70_000, 1, bytes(70_001)))
    text = zlib.compress(bytes(300 << 20), 1)
    out["text"] = why(png(16, 16, bytes(272), extra=chunk(b"zTXt", b"a\\0\\0" + text)))
    profile = chunk(b"iCCP", b"a\\0\\0" + text)
    out["profile"] = why(png(16, 16, bytes(272), extra=profile))
    out["idat"] = why(png(16, 16, bytes(300 << 20)))
    out["rgba"] = why(png(8900, 8900, bytes(8900 * (8900 * 4 + 1)), colour=6))
    out["grey16"] = why(png(8900, 8900, bytes(8900 * (8900 * 2 + 1)), depth=16))
    out["tall"] = list(array_pixels(np.zeros((65_535, 1), np.uint8), SPEC).shape)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps([out, rss]))
"""


def run_python(code: str) -> list:
    code = textwrap.dedent(code).format(tests=str(Path(__file__).parents[2]))
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_bombs_are_refused_in_bounded_memory():
    out, gib = run_python(BOMBS)
    refused = {"png", "jpeg", "tiff", "bmp", "long"}
    assert {key: out[key] for key in refused} == dict.fromkeys(refused, "too_large")
    assert out["text"] == "too_large"
    assert out["rgba"] == out["grey16"] == [8900, 8900]
    assert out["profile"] in ([16, 16], "too_large", "corrupt")
    assert out["idat"] in ([16, 16], "corrupt")
    assert out["tall"] == [224, 224]
    assert gib < 2.5


def test_import_is_light():
    code = """
    import json, sys
    import cxr_fast.data.images
    print(json.dumps([m for m in ("pydicom", "torch", "h5py", "pandas", "onnx", "scipy") if m in sys.modules]))
    """
    assert run_python(code) == []


# ---- resizing


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (224, 224), (225, 700), (50, 60), (1, 9), (500, 333)])
@pytest.mark.parametrize("size", [224, 97])
def test_resize_is_torchvisions_and_open_clips(shape, size):
    pytest.importorskip("torchvision")
    transform = pytest.importorskip("open_clip.transform")
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    bicubic = InterpolationMode.BICUBIC
    array = noise(*shape)
    rgb = Image.fromarray(array).convert("RGB")
    expected = {
        "squash": Resize((size, size), interpolation=bicubic)(rgb),
        "crop": CenterCrop((size, size))(Resize(size, interpolation=bicubic)(rgb)),
    }
    if min(shape) > 1:  # open_clip rounds the short side of a 1 x 9 image to 24, which is fine; of 1 x 999 to 0
        small = transform.ResizeKeepRatio(size, interpolation=bicubic, longest=1)(rgb)
        expected["pad"] = transform.CenterCropOrPad(size, fill=0)(small)
    for mode, image in expected.items():
        np.testing.assert_array_equal(resize(array, spec(size=size, resize=mode)), np.asarray(image)[..., 0], mode)


sides = st.integers(1, 500)


@settings(deadline=None, max_examples=80)
@given(sides, sides, st.sampled_from(MODES), st.integers(8, 300), st.integers(0, 2**32 - 1))
def test_resize_shape_and_flip(height, width, mode, size, seed):
    array = noise(height, width, seed=seed)
    wanted = spec(size=size, resize=mode)
    longest = size * max(height, width) // min(height, width)
    if mode == "crop" and longest * size > images.MAX_PIXELS:
        with pytest.raises(ImageError, match="crop"):
            resize(array, wanted)
        return
    pixels = resize(array, wanted)
    assert pixels.shape == (size, size)
    assert pixels.dtype == np.uint8
    assert flip(pixels).flags.c_contiguous
    np.testing.assert_array_equal(flip(pixels), pixels[:, ::-1])
    np.testing.assert_array_equal(flip(flip(pixels)), pixels)
    np.testing.assert_array_equal(array_pixels(array, wanted), pixels)
    np.testing.assert_array_equal(array_pixels(np.repeat(array[..., None], 3, axis=2), wanted), pixels)


@settings(deadline=None, max_examples=60)
@given(sides, sides, st.sampled_from(["squash", "pad"]), st.integers(8, 300), st.integers(1, 255))
def test_a_constant_image_stays_constant_and_pad_keeps_the_aspect(height, width, mode, size, value):
    pixels = resize(np.full((height, width), value, np.uint8), spec(size=size, resize=mode))
    if mode == "squash":
        assert (pixels == value).all()
        return
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    box = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert (box == value).all()
    assert max(box.shape) == size
    assert abs(min(box.shape) - max(1, size * min(height, width) / max(height, width))) <= 0.5 + 1e-9
    for first, length in ((rows[0], box.shape[0]), (columns[0], box.shape[1])):
        assert first == (size - length) // 2


def test_too_long_to_crop_is_refused():
    with pytest.raises(ImageError) as caught:
        resize(np.zeros((1, 60_000), np.uint8), spec(resize="crop"))
    assert caught.value.reason == "elongated"


def test_resize_and_array_pixels_refuse_what_is_no_image():
    for wrong in (
        np.zeros((4, 4), np.complex64),
        np.zeros((4, 4), bool),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 0), np.uint8),
        np.zeros((4, 4), np.int16),
        np.zeros((4, 4, 3), np.uint16),
        np.zeros(4, np.uint8),
        [[1, 2], [3, 4]],
        None,
    ):
        for function in (array_pixels, resize):
            with pytest.raises(ImageError) as caught:
                function(wrong, SPEC)
            assert caught.value.reason == "bad_array"
    with pytest.raises(ImageError, match="resize takes uint8"):
        resize(np.zeros((4, 4)), SPEC)
    for odd in (np.full((4, 4), 7.0), np.full((4, 4), np.nan)):
        with pytest.raises(ImageError) as caught:
            array_pixels(odd, SPEC)
        assert caught.value.reason == "bad_range"


def test_array_pixels_follows_the_rules_of_files():
    deep, colour = noise(90, 70, top=65536), noise(90, 70, 3)
    np.testing.assert_array_equal(array_pixels(deep, SPEC), resize(grey(save(deep, "PNG")), SPEC))
    np.testing.assert_array_equal(array_pixels(colour, SPEC), resize(grey(save(colour, "PNG")), SPEC))
    view = noise(90, 70)[::-2, ::3]
    np.testing.assert_array_equal(array_pixels(view, SPEC), resize(view.copy(), SPEC))
    assert array_pixels(deep.astype(">u2"), SPEC).tolist() == array_pixels(deep, SPEC).tolist()


# ---- load


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "TIFF", "BMP"])
def test_load_is_decode_then_resize_to_the_last_bit(tmp_path, fmt, mode):
    wanted = spec(resize=mode)
    for number, array in enumerate((noise(301, 97), noise(400, 500, 3))):
        data = save(array, fmt)
        path = tmp_path / f"{number}.bin"
        path.write_bytes(data)
        pixels, sha, _ = load(path, wanted)
        np.testing.assert_array_equal(pixels, resize(decode_grey(data, spec=wanted), wanted))
        assert sha == hashlib.sha256(data).hexdigest()
        assert pixels.flags.writeable
        assert pixels.flags.c_contiguous


def test_load_names_the_file(tmp_path):
    (tmp_path / "long.png").write_bytes(png(60_000, 1, bytes(60_001)))
    (tmp_path / "text.png").write_bytes(b"hello")
    for name, code in (("long.png", "elongated"), ("text.png", "not_an_image")):
        with pytest.raises(ImageError) as caught:
            load(tmp_path / name, spec(resize="crop"))
        assert caught.value.reason == code
        assert str(caught.value).startswith(f"{tmp_path / name}: ")


def noisy_tiff(array: np.ndarray) -> bytes:
    """A TIFF over which Pillow warns: one tag's data lies beyond the end of the file."""
    data = bytearray(tiff(array))
    at = data.index(struct.pack("<HHI", 339, 3, 1))
    data[at : at + 12] = struct.pack("<HHII", 305, 2, 40, 1 << 20)
    return bytes(data)


def test_decoder_warnings_do_not_leak_and_filters_are_put_back(tmp_path):
    data = noisy_tiff(noise(16, 16))
    with pytest.warns(UserWarning, match="."), Image.open(io.BytesIO(data)) as image:
        image.load()
    before = list(warnings.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inner = list(warnings.filters)
        grey(data)
        assert list(warnings.filters) == inner
    assert list(warnings.filters) == before
    assert reason(data[:100])
    assert list(warnings.filters) == before


def test_threads_agree_and_do_not_warn(tmp_path):
    paths = []
    for number in range(12):
        array = noise(200 + number, 150, seed=number)
        data = noisy_tiff(array) if number % 3 == 0 else save(array, "PNG" if number % 3 == 1 else "JPEG")
        paths.append(tmp_path / f"{number}")
        paths[-1].write_bytes(data)
    before = list(warnings.filters)
    alone = [load(path, SPEC) for path in paths]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda path: load(path, SPEC), paths * 5))
    for (pixels, sha, _), (expected, wanted, _) in zip(together, alone * 5, strict=True):
        np.testing.assert_array_equal(pixels, expected)
        assert sha == wanted
    assert list(warnings.filters) == before


def test_pillows_own_settings_are_neither_used_nor_changed(monkeypatch):
    data = save(noise(100, 100), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert grey(data).shape == (100, 100)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_self_check_is_stable_and_notices_another_resize(monkeypatch):
    value = images.self_check()
    assert len(value) == 64
    assert value == images.self_check()
    bilinear = Image.Resampling.BILINEAR
    monkeypatch.setattr(images, "_square", lambda image, wanted: image.resize((wanted.size,) * 2, bilinear))
    assert images.self_check() != value


def test_self_check_notices_another_jpeg_decoder(monkeypatch):
    value, decode = images.self_check(), images.decode_grey

    def off_by_one(data, *, spec):
        return decode(data, spec=spec) ^ np.uint8(data[:2] == b"\xff\xd8")

    monkeypatch.setattr(images, "decode_grey", off_by_one)
    assert images.self_check() != value


# ---- fuzzing


def samples() -> dict[str, bytes]:
    array, colour, deep = smooth(24, 20), noise(24, 20, 3), noise(24, 20, top=65536)
    image = Image.fromarray(array)
    return {
        "png": save(array, "PNG"),
        "png16": save(deep, "PNG"),
        "palette": save(image.convert("P"), "PNG", transparency=3),
        "rgba": save(Image.fromarray(colour).convert("RGBA"), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
        "jpeg": save(array, "JPEG"),
        "progressive": save(colour, "JPEG", progressive=True),
        "cmyk": save(Image.fromarray(colour).convert("CMYK"), "JPEG"),
        "tiff16": tiff(deep, order=">"),
        "float": tiff(array.astype(np.float32) / 255),
        "lzw": save(array, "TIFF", compression="tiff_lzw"),
        "deflate": save(deep, "TIFF", compression="tiff_adobe_deflate"),
        "tiffjpeg": save(array, "TIFF", compression="jpeg"),
        "bmp": save(array, "BMP"),
    }


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Bits flipped, the end cut off, a piece overwritten by another, or bytes put in; often in the header."""
    out = bytearray(data)
    reach = len(out) if rng.random() < 0.5 else min(len(out), 400)
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(reach))
        kind = int(rng.integers(5))
        if kind == 0:
            out[at % len(out)] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[at % len(out)] = int(rng.choice([0, 1, 127, 128, 255]))
        elif kind == 2:
            size, source = int(rng.integers(1, 40)), int(rng.integers(len(out)))
            out[at : at + size] = out[source : source + size]
        elif kind == 3:
            out[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif rng.random() < 0.4:
            del out[max(1, at) :]
    return bytes(out)


def survives(data: bytes) -> bool:
    """Decode; True for pixels, False for an ImageError. Anything else is the failure looked for."""
    try:
        pixels = decode_grey(data, spec=SPEC)
    except ImageError as error:
        assert error.reason in REASONS  # noqa: PT017
        return False
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 2
    return True


@settings(deadline=None, max_examples=150)
@given(
    st.binary(max_size=600), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"BM", b"\x08\0"])
)
def test_any_bytes_give_pixels_or_an_image_error(tail, head):
    survives(head + tail)
    survives(bytes(128) + b"DICM" + head + tail)


# ---- real files


@needs_real
def test_real_mutated_files():
    rng = np.random.default_rng(18)
    files = [path.read_bytes() for path in sorted(Path(REAL, "nih", "images").glob("*.png"))[:100]]
    start = time.perf_counter()
    outcomes = [survives(mutated(files[n % len(files)], rng)) for n in range(2000)]
    assert 0 < sum(outcomes) < len(outcomes)
    assert time.perf_counter() - start < 60


@needs_real
def test_real_full_size_files_match_the_plain_way():
    for path in sorted(Path(REAL, "full_size").glob("*.png")):
        pixels, sha, _ = load(path, SPEC)
        with Image.open(path) as image:
            plain = np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(pixels, plain[..., 0])
        assert sha == hashlib.sha256(path.read_bytes()).hexdigest()
        assert 60 < pixels.mean() < 200
        assert pixels.std() > 30
