"""One picture: from its file's bytes to the stored square.

Files are judged by their content, never by their name: ILSVRC holds a PNG and CMYK files named .JPEG. EXIF orientation
is ignored unless one asks for it, as every ImageNet baseline does. The square is torchvision's ``Resize(size)`` and
``CenterCrop(size)`` to the last bit: the short side becomes ``size``, the long side ``int(size * long / short)``, and
the middle is kept. Only the kept middle is computed, by Pillow's own arithmetic (data/kernels.py).

Pillow opens and judges every file. Where ``decoder`` is "simplejpeg", that package (the same libjpeg-turbo without
Pillow's detour through a stream and four bytes a pixel) decodes the JPEGs it finds nothing wrong with; the others stay
with Pillow.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import io
import re
import struct
import warnings
import zlib
from collections import Counter
from typing import Final

import numpy as np
import PIL
from PIL import Image, features

from data import kernels
from pipeline.errors import PipelineError

FORMATS: Final = ("JPEG", "PNG", "GIF", "BMP", "WEBP")  # no format that runs a program or reads other files
LONGEST_SIDE: Final = 65500  # pixels; the most a JPEG can have
MOST_PIXELS: Final = 100_000_000  # of the file and of the resized picture: 400 MB while it is worked on

FILTERS: Final = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}

# Filters whose weights data/kernels.py computes; the others are Pillow's resize of the whole picture.
_KINDS: Final = {"bicubic": kernels.BICUBIC, "bilinear": kernels.BILINEAR, "box": kernels.BOX}
_LARGEST_TURNED: Final = 25_000_000  # pixels; larger pictures go through Pillow's resize, which needs less memory

# What Pillow's parsers stumble over in damaged files.
_DAMAGE: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    MemoryError,
    AttributeError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
TURNED: Final = "EXIF orientation"  # a kind of its own among what is noted of pictures
_ORIENTATION: Final = 0x0112  # its tag
# Steps along the rows and columns, after rows and columns have changed places for 5 to 8 (EXIF 2.32, section 4.6.4).
_STEPS: Final = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}
_MOST_KINDS: Final = 100  # kinds of decoder warnings kept apart; the rest counts as "others"


class UnreadableError(Exception):
    """The picture cannot be used; the message says why."""


def decoder(name: str) -> dict[str, str]:
    """The decoder's name and versions; other versions may give other pixels.

    Raises
    ------
    PipelineError
        It is not installed.
    """
    jpeg = features.version("libjpeg_turbo") or features.version("jpg") or "unknown"
    pillow = {"name": "Pillow", "version": PIL.__version__, "jpeg": jpeg}
    if name == "pillow":
        return pillow
    if importlib.util.find_spec(name) is None:
        raise PipelineError(
            f"preprocess.decoder is {name}, which is not installed; install it (pip install {name}), "
            "or leave preprocess.decoder at pillow"
        )
    return {"name": name, "version": importlib.metadata.version(name), "jpeg": jpeg, "pillow": PIL.__version__}


def read_square(
    data: bytes,
    size: int,
    resample: str,
    noted: Counter[str],
    formats: tuple[str, ...] = FORMATS,
    decoder: str = "pillow",
    upright: bool = False,
) -> np.ndarray:
    """Decode a picture and make its square, uint8 (size, size, 3), RGB.

    Parameters
    ----------
    data : bytes
        The file's content.
    size : int
        Side of the square in pixels.
    resample : str
        Resampling filter, a key of ``FILTERS``.
    noted : Counter
        Counts the decoder's warnings by kind, and under ``TURNED`` the pictures whose EXIF data say that they are to be
        turned; they are never printed.
    formats : tuple of str
        Pillow's names of the formats to accept.
    decoder : str
        "pillow" or "simplejpeg".
    upright : bool
        Turn and mirror the picture as its EXIF data say; without it they are counted only.

    Raises
    ------
    UnreadableError
        Not a picture, cut short, damaged or too large; nothing is allocated by what the file claims to be.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            pixels, orientation = _decoded(data, formats, decoder)
            if orientation in _STEPS:
                noted[TURNED] += 1
                pixels = _turned(pixels, orientation) if upright else pixels
            return square(pixels, size, resample)
        finally:
            for warning in caught:
                _note(noted, warning)


def decode(data: bytes, formats: tuple[str, ...] = FORMATS, decoder: str = "pillow") -> np.ndarray:
    """Decode a picture, full size: uint8 (height, width, 4), red, green, blue and a byte without meaning.

    Four bytes a pixel are how Pillow holds a picture, and they can be moved as one number.

    CMYK and palettes are converted, an alpha channel is dropped, 16-bit grey is scaled to 8 bits (Pillow's own
    conversion would clip it).
    """
    return _decoded(data, formats, decoder)[0]


def _decoded(data: bytes, formats: tuple[str, ...], decoder: str) -> tuple[np.ndarray, int]:
    """The picture as :func:`decode` gives it, and its EXIF orientation."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            _check_size(*image.size)
            if decoder == "simplejpeg" and image.format == "JPEG" and image.mode in ("RGB", "L"):
                pixels = _by_simplejpeg(data)
                if pixels is not None and pixels.shape == (image.height, image.width, 4):
                    return pixels, _orientation(image)
            if image.mode.startswith("I"):
                grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
                pixels = ((grey * 255 + 32767) // 65535).astype(np.uint8)[..., None].repeat(4, axis=2)
            else:
                pixels = rgbx(image)
            return pixels, _orientation(image)  # now that it is loaded: of a TIFF Pillow has turned it then
    except PIL.UnidentifiedImageError as error:
        raise UnreadableError("not a picture in a known format") from error
    except _DAMAGE as error:
        # Pillow names the in-memory file by its address in some messages.
        text = re.sub(r" at 0x[0-9a-f]+", "", str(error)) or type(error).__name__
        raise UnreadableError(f"the decoder says: {text}"[:300]) from error


def _by_simplejpeg(data: bytes) -> np.ndarray | None:
    """The JPEG's pixels, or None where simplejpeg finds something to complain about: Pillow has the last word on it."""
    import simplejpeg  # an extra; here, so that whoever does without it needs it nowhere

    try:
        return simplejpeg.decode_jpeg(data, "RGBX")
    except (ValueError, MemoryError):
        return None


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, as it is, where nothing says so that can be read: damage there harms no pixel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is noted stands in the shards, whose bytes this must not change
        try:
            orientation = image.getexif().get(_ORIENTATION)
        except _DAMAGE:
            return 1
    return orientation if isinstance(orientation, int) else 1


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What :func:`decode` gave as it is to be looked at."""
    whole = pixels.view(np.uint32)
    rows, columns = _STEPS[orientation]
    turned = (whole.swapaxes(0, 1) if orientation >= 5 else whole)[::rows, ::columns]
    return np.ascontiguousarray(turned).view(np.uint8)


def rgbx(image: Image.Image) -> np.ndarray:
    """A picture of Pillow's in the form that :func:`decode` gives."""
    image.load()  # before it is converted: an untold palette or mode is only known now
    image = image if image.mode == "RGB" else image.convert("RGB")
    pixels = _lent(image)
    if pixels is None:
        pixels = np.frombuffer(image.tobytes("raw", "RGBX"), dtype=np.uint8)
    return pixels.reshape(image.height, image.width, 4)


class _Lent:
    """An array's address, and the capsule that keeps the memory there; NumPy keeps this object in turn."""

    def __init__(self, capsule: object, address: int, size: int) -> None:
        self._capsule = capsule
        self.__array_interface__ = {"version": 3, "shape": (size,), "typestr": "|u1", "data": (address, True)}


def _lent(image: Image.Image) -> np.ndarray | None:
    """Pillow's own memory of an RGB picture as an array, read only: ``tobytes`` gives the same, copied twice.

    Pillow 11.2 and later lend it through the Arrow C data interface, whose structs are fixed for good
    (https://arrow.apache.org/docs/format/CDataInterface.html): the picture is a list of pixels, whose only child is the
    array of bytes; of each the second buffer holds the values. None where Pillow is older, or holds the picture in
    several pieces, as it does with more than 16 MB.
    """
    if not hasattr(image, "__arrow_c_array__"):
        return None
    try:
        _, capsule = image.__arrow_c_array__()
    except ValueError:  # "Image is in multiple array blocks"
        return None
    pixels = _ArrowArray.from_address(_capsule_pointer(capsule, b"arrow_array"))
    if (pixels.length, pixels.offset, pixels.n_children) != (image.width * image.height, 0, 1):
        return None
    values = pixels.children[0].contents
    if (values.length, values.offset, values.n_buffers) != (4 * pixels.length, 0, 2):
        return None
    return np.asarray(_Lent(capsule, values.buffers[1], values.length))


class _ArrowArray(ctypes.Structure):
    pass


_ArrowArray._fields_ = [
    *((name, ctypes.c_int64) for name in ("length", "null_count", "offset", "n_buffers", "n_children")),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
    *((name, ctypes.c_void_p) for name in ("dictionary", "release", "private_data")),
]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def square(pixels: np.ndarray, size: int, resample: str) -> np.ndarray:
    """Short side to ``size``, centre crop: uint8 (size, size, 3), from what :func:`decode` or :func:`rgbx` gave.

    Raises
    ------
    UnreadableError
        The picture is so elongated that the resized one would not fit into memory.
    """
    high, wide = pixels.shape[:2]
    width, height = resized(wide, high, size)
    if width * height > MOST_PIXELS:
        raise UnreadableError(
            f"it is too long and thin: with its short side at {size} it would have {width} x {height} pixels, "
            f"and more than {MOST_PIXELS} are refused"
        )
    left, top = round((width - size) / 2), round((height - size) / 2)
    if (width, height) == (wide, high):
        return pixels[top : top + size, left : left + size, :3]
    # Of tall pictures Pillow 13 resamples the rows first, older ones never: what it does there is left to it.
    if resample in _KINDS and wide * high <= _LARGEST_TURNED and high <= 2 * wide:
        across = kernels.weights(wide, width, left, size, _KINDS[resample])
        down = kernels.weights(high, height, top, size, _KINDS[resample])
        return _combined(pixels, across, down, size)
    whole = Image.fromarray(np.ascontiguousarray(pixels[..., :3])).resize((width, height), FILTERS[resample])
    return np.asarray(whole.crop((left, top, left + size, top + size)))


def _combined(pixels: np.ndarray, across: kernels.Weights, down: kernels.Weights, size: int) -> np.ndarray:
    """Resample the columns, then the rows, as Pillow does: uint8 (size, size, 3)."""
    (x, x_taps, x_weight), (y, y_taps, y_weight) = across, down
    first, last, top, bottom = x[0], (x + x_taps).max(), y[0], (y + y_taps).max()
    # Each pass adds up whole lines; for the columns, lines are the picture's columns, so it is turned and turned back.
    kept = pixels.view(np.uint32)[top:bottom, first:last, 0]
    columns = np.empty(kept.shape[::-1], dtype=np.uint32)
    kernels.turned(kept, columns)
    narrow = np.empty((size, len(kept)), dtype=np.uint32)
    kernels.combine(columns.view(np.uint8), x - first, x_taps, x_weight, narrow.view(np.uint8))
    lines = np.empty((len(kept), size), dtype=np.uint32)
    kernels.turned(narrow, lines)
    out = np.empty((size, 4 * size), dtype=np.uint8)
    kernels.combine(lines.view(np.uint8), y - top, y_taps, y_weight, out)
    return kernels.without_fourth(out.reshape(size, size, 4))


def resized(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height with the short side at ``size``, as torchvision computes them."""
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1 or max(width, height) > LONGEST_SIDE or width * height > MOST_PIXELS:
        raise UnreadableError(
            f"it has {width} x {height} pixels; more than {LONGEST_SIDE} a side or {MOST_PIXELS} are refused"
        )


def _note(noted: Counter[str], warning: warnings.WarningMessage) -> None:
    # Numbers differ from file to file; the kind is what remains without them.
    kind = re.sub(r"\d+", "N", f"{warning.category.__name__}: {warning.message}")[:200]
    kinds = len(noted) - (TURNED in noted)
    noted[kind if kind in noted or kinds < _MOST_KINDS else "others"] += 1
