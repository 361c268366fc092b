"""One picture: from its file's bytes to the stored square.

Files are judged by their content, never by their name: ILSVRC holds a PNG and CMYK files named .JPEG. EXIF orientation
is ignored, as every ImageNet baseline does. The square is torchvision's ``Resize(size)`` and ``CenterCrop(size)`` to
the last bit: the short side becomes ``size``, the long side ``int(size * long / short)``, and the middle is kept.
"""

from __future__ import annotations

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

FORMATS: Final = ("JPEG", "PNG", "GIF", "BMP", "WEBP")  # no format that runs a program or reads other files
LONGEST_SIDE: Final = 65500  # pixels; the most a JPEG can have
MOST_PIXELS: Final = 100_000_000  # of the file and of the resized picture: 400 MB while it is worked on

# Settled in the shards: a shard made with another rule is refused.
RULE: Final = "short side to size, centre crop"

FILTERS: Final = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}

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
_MOST_KINDS: Final = 100  # kinds of decoder warnings kept apart; the rest counts as "others"


class UnreadableError(Exception):
    """The picture cannot be used; the message says why."""


def decoder() -> dict[str, str]:
    """The decoder's name and versions; other versions may give other pixels."""
    jpeg = features.version("libjpeg_turbo") or features.version("jpg") or "unknown"
    return {"name": "Pillow", "version": PIL.__version__, "jpeg": jpeg}


def read_square(
    data: bytes, size: int, resample: str, noted: Counter[str], formats: tuple[str, ...] = FORMATS
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
        Counts the decoder's warnings by kind; they are never printed.
    formats : tuple of str
        Pillow's names of the formats to accept.

    Raises
    ------
    UnreadableError
        Not a picture, cut short, damaged or too large; nothing is allocated by what the file claims to be.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return square(decode(data, formats), size, resample)
        finally:
            for warning in caught:
                _note(noted, warning)


def decode(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Decode a picture to RGB, full size.

    CMYK and palettes are converted, an alpha channel is dropped, 16-bit grey is scaled to 8 bits (Pillow's own
    conversion would clip it).
    """
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            _check_size(*image.size, "it has")
            if image.mode.startswith("I"):
                grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
                return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except PIL.UnidentifiedImageError as error:
        raise UnreadableError("not a picture in a known format") from error
    except _DAMAGE as error:
        # Pillow names the in-memory file by its address in some messages.
        text = re.sub(r" at 0x[0-9a-f]+", "", str(error)) or type(error).__name__
        raise UnreadableError(f"the decoder says: {text}"[:300]) from error


def square(image: Image.Image, size: int, resample: str) -> np.ndarray:
    """Short side to ``size``, centre crop: uint8 (size, size, 3).

    Raises
    ------
    UnreadableError
        The picture is so elongated that the resized one would not fit into memory.
    """
    width, height = resized(*image.size, size)
    _check_size(width, height, f"with its short side at {size} it would have", side=MOST_PIXELS)
    if (width, height) != image.size:
        image = image.resize((width, height), FILTERS[resample])
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def resized(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height with the short side at ``size``, as torchvision computes them."""
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def _check_size(width: int, height: int, what: str, side: int = LONGEST_SIDE) -> None:
    if width < 1 or height < 1 or max(width, height) > side or width * height > MOST_PIXELS:
        raise UnreadableError(f"{what} {width} x {height} pixels; more than {side} a side or {MOST_PIXELS} are refused")


def _note(noted: Counter[str], warning: warnings.WarningMessage) -> None:
    # Numbers differ from file to file; the kind is what remains without them.
    kind = re.sub(r"\d+", "N", f"{warning.category.__name__}: {warning.message}")[:200]
    noted[kind if kind in noted or len(noted) < _MOST_KINDS else "others"] += 1
