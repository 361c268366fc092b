"""The report's pictures: first-layer filters, activation maps, colour jitter, sheets of photographs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from net.layers import Conv, Dropout, Flatten, Linear, Lrn, MapNorm, MaxPool, Relu, Run
from net.network import prepare
from stages.trained import Trained

MAPS: Final = 16  # of a layer, the strongest
_ROW: Final = 8  # maps a row
_COLUMNS: Final = 4  # photographs a row of a sheet
_PHOTO: Final = 168  # side in pixels of a photograph on the page
_TILE: Final = 52  # pixels a map is enlarged to, at least where it is smaller
# Black, purple, orange, white: matplotlib's magma at nine places.
_MAGMA: Final = np.array(
    [
        (0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122),
        (229, 80, 100), (251, 135, 97), (254, 194, 135), (252, 253, 191),
    ]
)  # fmt: skip

_KINDS: Final = {Relu: "ReLU", Lrn: "LRN", MapNorm: "map norm", MaxPool: "pool"}


@dataclass(frozen=True)
class Maps:
    """What one layer makes of a picture: title, shape as text, and the strongest maps as one picture."""

    title: str
    shape: str
    note: str
    image: Image.Image


def filters(trained: Trained) -> Image.Image:
    """conv1's 96 filters, 11x11 pixels each, in 6 rows of 16: the first three rows are the first GPU's 48.

    Each filter is stretched on its own so that 0 is middle grey and its largest weight black or white.
    """
    w = trained.parameters["conv1.w"]
    if trained.config.input.bgr:
        w = w[:, :, ::-1]
    scaled = w / np.maximum(np.abs(w).max(axis=(0, 1, 2)), np.finfo(np.float32).tiny)
    tiles = np.clip(127.5 + 127.5 * scaled, 0, 255).astype(np.uint8).transpose(3, 0, 1, 2)
    return tiled(tiles, 16, gap=1)


def activations(trained: Trained, ops: ModuleType, squares: Sequence[np.ndarray]) -> list[list[Maps]]:
    """Activation maps of pictures (uint8, stored squares), layer by layer, on the centre crop.

    The plain layers are computed one by one, not fused, so that everything between them can be seen.
    """
    parameters = trained.on_device(ops)
    x = prepare(ops, trained.preparation(ops), ops.upload(trained.inputs(squares, views=1)))
    shown: list[list[Maps]] = [[] for _ in squares]
    name = ""
    done: list[str] = []
    for layer in trained.layers:
        x, _ = layer.forward(ops, parameters, x, Run(training=False))
        match layer:
            case Conv() | Linear():
                name, done = layer.name, []
            case Flatten() | Dropout():
                continue
            case _:
                done.append(_KINDS.get(type(layer), type(layer).__name__))
        if done and not isinstance(layer, Lrn | MapNorm) and name != "fc8":
            for place, y in enumerate(ops.to_host(x)):
                shown[place].append(_maps(f"{name} · {' · '.join(done)}", np.asarray(y)))
    return shown


def jitter(square: np.ndarray, directions: np.ndarray, sigma: float) -> Image.Image:
    """A picture shifted along each eigenvector by -3, -1.5, 0, 1.5, 3 standard deviations of the jitter.

    A row an eigenvector; ``directions`` are eigenvector times standard deviation on the 0..255 scale, as in training.
    """
    small = np.asarray(Image.fromarray(square).resize((128, 128)), dtype=np.float64)
    tiles = [small + steps * sigma * direction for direction in directions for steps in (-3, -1.5, 0, 1.5, 3)]
    return tiled(np.clip(np.round(np.stack(tiles)), 0, 255).astype(np.uint8), 5, gap=4)


def sheet(squares: Sequence[np.ndarray], captions: Sequence[Sequence[str]]) -> Image.Image:
    """Pictures with lines of text below each."""
    side, line, pad = 192, 16, 8
    lines = max(map(len, captions))
    cell = (side + pad, side + lines * line + 2 * pad)
    rows = -(-len(squares) // _COLUMNS)
    image = Image.new("RGB", (_COLUMNS * cell[0] + pad, rows * cell[1] + pad), "white")
    draw, font = ImageDraw.Draw(image), _font(12)
    for place, (square, texts) in enumerate(zip(squares, captions, strict=True)):
        x, y = pad + place % _COLUMNS * cell[0], pad + place // _COLUMNS * cell[1]
        image.paste(Image.fromarray(square).resize((side, side)), (x, y))
        for number, text in enumerate(texts):
            draw.text((x, y + side + 4 + number * line), _fitted(draw, text, font, side), fill="black", font=font)
    return image


def maps_sheet(square: np.ndarray, maps: Sequence[Maps]) -> Image.Image:
    """A picture and its activation maps below each other, with titles."""
    pad, line = 12, 20
    pictures = [Image.fromarray(square), *(on_white(m.image) for m in maps)]
    width = max(picture.width for picture in pictures)
    titles = ["the stored picture", *(f"{m.title}   {m.shape}" for m in maps)]
    height = sum(p.height + line + pad for p in pictures) + pad
    image = Image.new("RGB", (width + 2 * pad, height), "white")
    draw, font = ImageDraw.Draw(image), _font(13)
    y = pad
    for title, picture in zip(titles, pictures, strict=True):
        draw.text((pad, y), title, fill="black", font=font)
        image.paste(picture, (pad, y + line))
        y += picture.height + line + pad
    return image


def tiled(tiles: np.ndarray, columns: int, gap: int) -> Image.Image:
    """uint8 (N, H, W, 3) -> one picture with ``gap`` transparent pixels between the tiles."""
    count, height, width, _ = tiles.shape
    rows = -(-count // columns)
    canvas = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for place, tile in enumerate(tiles):
        top, left = place // columns * (height + gap), place % columns * (width + gap)
        canvas[top : top + height, left : left + width, :3] = tile
        canvas[top : top + height, left : left + width, 3] = 255
    return Image.fromarray(canvas)


def on_white(image: Image.Image) -> Image.Image:
    """The picture with its transparent places white."""
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def enlarged(image: Image.Image, factor: int) -> Image.Image:
    """Each pixel as a square of ``factor`` pixels."""
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def photo(square: np.ndarray) -> str:
    """A picture as a small JPEG in a data URI."""
    return data_uri(Image.fromarray(square).resize((_PHOTO, _PHOTO), Image.Resampling.LANCZOS), "JPEG", quality=85)


def data_uri(image: Image.Image, format: str = "PNG", **options: Any) -> str:
    """A picture as text that an HTML page can hold."""
    return f"data:image/{format.lower()};base64,{base64.b64encode(encoded(image, format, **options)).decode()}"


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """A picture as the bytes of a file; ``options`` are those of Pillow's ``save`` for this format."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _maps(title: str, y: np.ndarray) -> Maps:
    """The strongest maps of one layer's output for one picture, all on one scale from 0 to the largest value."""
    if y.ndim == 1:
        values = np.pad(y, (0, -len(y) % 128)).reshape(1, -1, 128)
        image = enlarged(tiled(_coloured(values), 1, gap=0), 4)
        return Maps(title, f"{len(y)} units", f"{np.mean(y > 0):.0%} of the units are active", image)
    strongest = np.argsort(-y.mean(axis=(0, 1)), kind="stable")[:MAPS]
    height, width, maps = y.shape
    factor = -(-_TILE // max(height, width))
    tiles = _coloured(y[:, :, strongest].transpose(2, 0, 1)).repeat(factor, axis=1).repeat(factor, axis=2)
    active = int(np.sum(y.max(axis=(0, 1)) > 0))
    note = f"the {len(strongest)} strongest; {active} of {maps} maps respond"
    return Maps(title, f"{height} x {width} x {maps}", note, tiled(tiles, _ROW, gap=2))


def _coloured(values: np.ndarray) -> np.ndarray:
    """Values from 0 to their largest as colours, uint8 (..., 3); the square root brings out the weak ones."""
    share = np.sqrt(np.clip(values, 0, None) / max(float(values.max()), np.finfo(np.float32).tiny))
    places = np.linspace(0, 1, len(_MAGMA))
    return np.stack([np.interp(share, places, _MAGMA[:, c]) for c in range(3)], axis=-1).astype(np.uint8)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """A font for class names in more than English: Pillow's own has hardly more than ASCII."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def drawable(name: str, number: int) -> str:
    """A class's name where the font has all its letters, else its number: Chinese names would be boxes."""
    font = _font(12)
    box = bytes(font.getmask("\uffff"))  # no letter, and so what is drawn for letters that are not there
    return name if all(bytes(font.getmask(letter)) != box for letter in name) else f"class {number}"


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    while len(text) > 4 and draw.textlength(text, font=font) > width:
        text = text[:-4] + "..."
    return text
