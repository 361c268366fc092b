"""Decoding and the square: against Pillow's plain sequence, and against files that are odd, damaged or hostile."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data.images import FILTERS, TURNED, UnreadableError, _lent, decode, decoder, read_square, rgbx, square
from pipeline.errors import PipelineError
from tests.data.archives import encoded, jpeg, picture


def plain(image: Image.Image, size: int, resample: Image.Resampling) -> np.ndarray:
    """torchvision's Resize(size) and CenterCrop(size) on a PIL image, written as its source has them."""
    w, h = image.size
    short, long = (w, h) if w <= h else (h, w)
    new_short, new_long = size, int(size * long / short)
    new_w, new_h = (new_short, new_long) if w <= h else (new_long, new_short)
    resized = image.resize((new_w, new_h), resample)
    top, left = round((new_h - size) / 2.0), round((new_w - size) / 2.0)
    return np.array(resized.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (500, 375),
        (375, 500),
        (333, 500),
        (501, 334),
        (256, 256),
        (256, 400),
        (227, 227),
        (64, 61),
        (300, 256),
        (1, 9),
        (300, 500),
        (500, 300),
        (256, 259),
        (259, 256),
    ],
)
def test_the_square_is_torchvisions_to_the_last_bit(width, height):
    image = picture(width * height, width, height)
    found = square(rgbx(image), 256, "bicubic")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, plain(image, 256, Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("name", "resample"),
    [("bilinear", Image.Resampling.BILINEAR), ("box", Image.Resampling.BOX), ("lanczos", Image.Resampling.LANCZOS)],
)
def test_the_filter_is_the_one_that_was_named(name, resample):
    image = picture(1, 101, 77)
    found = square(rgbx(image), 33, name)
    np.testing.assert_array_equal(found, plain(image, 33, resample))
    assert (found != plain(image, 33, Image.Resampling.BICUBIC)).any()


def rgb(data: bytes) -> np.ndarray:
    return decode(data)[..., :3]


@pytest.mark.parametrize("name", ["bicubic", "bilinear", "box"])
@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), size=st.integers(1, 80))
def test_every_size_gives_pillows_own_bytes(name, width, height, size):
    assume(max(width, height) * size <= 3000 * min(width, height))
    image = picture(width * height, width, height)
    np.testing.assert_array_equal(square(rgbx(image), size, name), plain(image, size, FILTERS[name]))


def test_a_jpeg_goes_through_unchanged():
    data = jpeg(5, 90, 70)
    expected = plain(Image.open(io.BytesIO(data)).convert("RGB"), 64, Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(read_square(data, 64, "bicubic", Counter()), expected)


def test_lent_pixels_outlive_their_picture():
    found = []
    for seed in range(40):
        with Image.open(io.BytesIO(encoded(picture(seed, 200, 150), "PNG"))) as image:
            found.append(rgbx(image))
    for seed, pixels in enumerate(found):
        np.testing.assert_array_equal(pixels[..., :3], np.array(picture(seed, 200, 150)))
    assert not found[0].flags.writeable


@pytest.mark.skipif(not hasattr(Image.Image, "__arrow_c_array__"), reason="Pillow is older than 11.2")
def test_pixels_are_lent_where_they_are_in_one_piece_and_copied_where_not():
    assert _lent(picture(1)) is not None
    large = Image.new("RGB", (2500, 2000), (1, 2, 3))
    assert _lent(large) is None
    assert rgbx(large)[-1, -1].tolist()[:3] == [1, 2, 3]


def test_a_png_is_read_whatever_it_is_called():
    image = picture(2)
    np.testing.assert_array_equal(rgb(encoded(image, "PNG")), np.array(image))


def test_cmyk_as_adobe_writes_it_comes_out_upright():
    colours = Image.new("RGB", (32, 32), (200, 40, 60))
    found = rgb(encoded(colours.convert("CMYK"), quality=95))
    assert np.abs(found.astype(int) - (200, 40, 60)).max() < 12  # inverted it would be near (55, 215, 195)


def test_grey_becomes_three_equal_channels():
    image = picture(3).convert("L")
    found = rgb(encoded(image, "PNG"))
    np.testing.assert_array_equal(found, np.array(image)[..., None].repeat(3, axis=2))


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 128, 129, 255, 256, 257, 32768, 65280, 65535]], dtype=np.uint16)
    found = (rgb(encoded(Image.fromarray(values), "PNG")))[0, :, 0]
    assert found.tolist() == [0, 0, 1, 1, 1, 1, 128, 254, 255]


def test_sixteen_bit_colour_is_read():
    rows = np.array([[[0, 32768, 65535]] * 4] * 4, dtype=">u2")
    scan = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    found = rgb(data + chunk(b"IDAT", scan) + chunk(b"IEND", b""))
    assert found.shape == (4, 4, 3)
    assert found[0, 0].tolist() == [0, 128, 255]


def test_a_palette_is_looked_up_and_its_transparency_dropped():
    image = picture(4).quantize(16)
    expected = np.array(image.convert("RGB"))
    data = encoded(image, "PNG", transparency=bytes([0, 128] + [255] * 14))
    with pytest.warns(UserWarning, match="Palette images with Transparency"):
        found = rgb(data)
    np.testing.assert_array_equal(found, expected)


def test_alpha_is_dropped_as_convert_does():
    image = picture(5)
    image.putalpha(Image.fromarray(np.arange(1200, dtype=np.uint32).astype(np.uint8).reshape(30, 40)))
    np.testing.assert_array_equal((rgb(encoded(image, "PNG"))), np.array(image)[..., :3])
    grey = picture(6).convert("LA")
    np.testing.assert_array_equal((rgb(encoded(grey, "PNG")))[..., 0], np.array(grey)[..., 0])


def test_black_and_white_becomes_0_and_255():
    image = picture(7).convert("1")
    assert set(np.unique(rgb(encoded(image, "PNG")))) == {0, 255}


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_exif_orientation_is_ignored_and_counted():
    image, noted = picture(8, 48, 32), Counter[str]()
    data = encoded(image, exif=oriented(6))  # turn by 90 degrees
    assert rgb(data).shape == (32, 48, 3)
    np.testing.assert_array_equal(read_square(data, 16, "box", noted), square(decode(data), 16, "box"))
    assert noted == {TURNED: 1}


@pytest.mark.parametrize("decoded_by", ["pillow", "simplejpeg"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "I;16"])
def test_asked_for_upright_a_picture_is_turned_as_pillow_turns_it(format, decoded_by, request):
    if decoded_by == "simplejpeg":
        request.getfixturevalue("simplejpeg")  # there, or skipped
    image = picture(8, 49, 32)
    if format == "I;16":  # grey of 16 bits, which goes a way of its own
        image, format = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG"
    for orientation in range(10):  # 0 and 9 mean nothing
        data = encoded(image, format, exif=oriented(orientation))
        whole = Image.open(io.BytesIO(data))
        wanted = ImageOps.exif_transpose(whole)
        assert wanted.size == ((32, 49) if 5 <= orientation <= 8 else (49, 32))
        wanted = Image.fromarray(rgb(encoded(wanted, "PNG")))
        found = read_square(data, 24, "bicubic", Counter(), (format,), decoded_by, upright=True)
        np.testing.assert_array_equal(found, plain(wanted, 24, Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",  # its table lies beyond the end
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\x01",  # cut short
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\x006\0\0\0\0\0\0\0",  # a word, not a number
        b"Exif\0\0nonsense",
    ],
)
def test_a_picture_with_damaged_exif_data_is_read_as_it_lies(exif):
    data, noted = encoded(picture(8, 48, 32), exif=exif), Counter[str]()
    plainly = read_square(encoded(picture(8, 48, 32)), 16, "box", Counter())
    np.testing.assert_array_equal(read_square(data, 16, "box", noted, upright=True), plainly)
    assert TURNED not in noted


def test_warnings_are_counted_by_kind_and_not_printed(capfd):
    noted: Counter[str] = Counter()
    image = picture(4).quantize(16)
    for _ in range(3):
        read_square(encoded(image, "PNG", transparency=bytes([0, 128])), 16, "bicubic", noted)
    assert list(noted.values()) == [3]
    assert next(iter(noted)).startswith("UserWarning: Palette images with Transparency")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF",
        b"no picture at all",
        jpeg(1, 90, 70)[:-30],
        jpeg(1, 90, 70)[:300],
        encoded(picture(1), "PNG")[:-200],
    ],
    ids=["empty", "three bytes", "text", "jpeg cut late", "jpeg cut early", "png cut"],
)
def test_what_cannot_be_read_is_told(data):
    with pytest.raises(UnreadableError, match=r"^(not a picture|the decoder says)"):
        read_square(data, 16, "bicubic", Counter())


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
        encoded(picture(1), "TIFF"),
        b"P6 9 9 255 ",
    ],
    ids=["postscript, on which Pillow would run Ghostscript", "tiff", "ppm"],
)
def test_other_formats_are_not_even_tried(data):
    with pytest.raises(UnreadableError, match=r"^not a picture in a known format$"):
        decode(data)


def test_reasons_do_not_depend_on_memory_addresses():
    with pytest.raises(UnreadableError) as caught:
        decode(encoded(picture(1), "PNG")[:40])
    assert "0x" not in str(caught.value)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and that has hardly any data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(65501, 10), (10, 65501), (10001, 10000), (60000, 60000), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_by_their_header(size):
    with pytest.raises(UnreadableError, match=rf"it has {size[0]} x {size[1]} pixels|decompression bomb"):
        read_square(claiming(*size), 16, "bicubic", Counter())


def test_a_jpeg_of_the_largest_size_is_refused():
    data = bytearray(jpeg(1))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(UnreadableError, match=r"it has 65535 x 65535 pixels|decompression bomb"):
        decode(bytes(data))


def test_what_would_explode_when_resized_is_refused():
    data = encoded(Image.new("RGB", (20000, 2)), "PNG")
    with pytest.raises(UnreadableError, match="with its short side at 256 it would have 2560000 x 256 pixels"):
        read_square(data, 256, "bicubic", Counter())
    assert read_square(data, 16, "bicubic", Counter()).shape == (16, 16, 3)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
@given(
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 1 << 16),
)
@settings(max_examples=60, deadline=None)
def test_damaged_files_give_a_square_or_a_reason(form, changes, cut):
    data = bytearray(encoded(picture(9, 24, 18), form))
    for position, value in changes:
        data[position % len(data)] = value
    data = data[: cut % (2 * len(data))]
    with contextlib.suppress(UnreadableError):
        assert read_square(bytes(data), 16, "bicubic", Counter()).shape == (16, 16, 3)


@pytest.fixture
def simplejpeg():
    # Under CI a missing package is a failure.
    return importlib.import_module("simplejpeg") if os.environ.get("CI") else pytest.importorskip("simplejpeg")


@pytest.mark.parametrize("form", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}])
def test_simplejpeg_gives_pillows_bytes(simplejpeg, monkeypatch, form, options):
    data = encoded(picture(3, 90, 70).convert(form), **options)
    calls = []
    decode_jpeg = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a: calls.append(1) or decode_jpeg(*a))
    found = read_square(data, 64, "bicubic", Counter(), decoder="simplejpeg")
    np.testing.assert_array_equal(found, read_square(data, 64, "bicubic", Counter()))
    assert calls == [1]


def test_what_simplejpeg_complains_of_is_pillows_to_judge(simplejpeg):
    cut, cmyk = jpeg(1, 90, 70)[:-30], encoded(picture(2).convert("CMYK"))
    with pytest.raises(UnreadableError, match="truncated"):
        read_square(cut, 16, "bicubic", Counter(), decoder="simplejpeg")
    odd = jpeg(1, 90, 70)
    middle = odd.index(b"\xff\xda")
    odd = odd[:middle] + b"\0\0\0" + odd[middle:]  # bytes before a marker: libjpeg warns, Pillow goes on
    for data in (cmyk, odd, encoded(picture(2), "PNG")):
        found = read_square(data, 16, "bicubic", Counter(), decoder="simplejpeg")
        np.testing.assert_array_equal(found, read_square(data, 16, "bicubic", Counter()))


def test_a_decoder_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PipelineError, match=r"simplejpeg, which is not installed.*leave preprocess.decoder at pillow"):
        decoder("simplejpeg")
