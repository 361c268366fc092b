"""The built-in demo set: drawn pictures of twelve classes, packed as the official ILSVRC archives are.

Each class is a solid of one shape, covered with one pattern in a dark and a bright range of hues, on cluttered ground.
Hues and patterns each belong to several classes, so none alone tells them apart. Place, size, rotation, light, ground
and noise vary from picture to picture. Among the training pictures are the oddities of the real set: a PNG and a CMYK
JPEG that are called .JPEG, a grey one, and one cut short.

Everything is drawn from fixed seeds: the same package versions on the same kind of processor give the same bytes.
"""

from __future__ import annotations

import colorsys
import gzip
import io
import math
import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import joblib
import numpy as np
import scipy.io
from PIL import Image, ImageDraw

from data import ilsvrc
from pipeline.run_dir import make_folder, sync_folder, write_error

TRAIN_PER_CLASS: Final = 80
VAL_PER_CLASS: Final = 20

_TIME: Final = 1338508800  # 2012-06-01: every member's time, so that the archives' bytes do not depend on the clock
_SEED: Final = 2012


@dataclass(frozen=True)
class Kind:
    """A class: its words, its shape, its pattern, and the hues (0..1) its dark and bright parts scatter around.

    Without a bright hue (None) those parts are nearly white.
    """

    words: str
    shape: str
    pattern: str
    dark: float
    bright: float | None


_RED, _YELLOW, _GREEN, _BLUE = 0.00, 0.15, 0.36, 0.61

# Sorted-WNID order. Four dark hues, five bright ones, four patterns, six shapes; no two classes share both hues.
KINDS: Final = (
    Kind("red and white striped ball, beach ball", "ball", "stripes", _RED, None),
    Kind("red and yellow dotted star, sheriff's star", "star", "dots", _RED, _YELLOW),
    Kind("red and blue checked tile, racing tile", "tile", "checks", _RED, _BLUE),
    Kind("yellow and white dotted ball, ladybird ball", "ball", "dots", _YELLOW, None),
    Kind("yellow and red ringed tile, target", "tile", "rings", _YELLOW, _RED),
    Kind("yellow and green striped cone, traffic cone", "cone", "stripes", _YELLOW, _GREEN),
    Kind("green and white checked cone, harlequin cone", "cone", "checks", _GREEN, None),
    Kind("green and blue ringed star, ripple star", "star", "rings", _GREEN, _BLUE),
    Kind("green and red striped cross, barrier", "cross", "stripes", _GREEN, _RED),
    Kind("blue and white ringed ball, marble", "ball", "rings", _BLUE, None),
    Kind("blue and yellow checked cross, flag", "cross", "checks", _BLUE, _YELLOW),
    Kind("blue and green dotted hexagon, die", "hexagon", "dots", _BLUE, _GREEN),
)
CLASSES: Final = len(KINDS)


def wnid(label: int) -> str:
    """The class's WNID; the numbers lie outside WordNet's, so none is mistaken for a real one."""
    return f"n{90000001 + label}"


def devkit_id(label: int) -> int:
    """The class's ID in the devkit: 1..12, in an order of its own, as in the real one."""
    return (label * 5 + 7) % CLASSES + 1


def draw(folder: Path, jobs: int = -1, train: int = TRAIN_PER_CLASS, val: int = VAL_PER_CLASS) -> None:
    """Draw the set and put the three archives into ``folder``, which must not exist yet.

    Parameters
    ----------
    jobs : int
        Processes to draw with; -1 uses every core. The bytes do not depend on it.
    train, val : int
        Pictures of each class.
    """
    make_folder(folder.parent)
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        parallel = joblib.Parallel(n_jobs=jobs)
        drawn = parallel(joblib.delayed(_draw_class)(label, train, val) for label in range(CLASSES))
        _pack_train(unfinished / ilsvrc.TRAIN, [files[:train] for files in drawn])
        truth = _pack_val(unfinished / ilsvrc.VAL, [files[train:] for files in drawn])
        _pack_devkit(unfinished / ilsvrc.DEVKIT, truth)
        for path in unfinished.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(unfinished)
        os.replace(unfinished, folder)
        sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise write_error(folder, error) from error


def _draw_class(label: int, train: int, val: int) -> list[bytes]:
    """The files of a class, training pictures first."""
    return [_file(draw_picture(label, n), label, n if n < train else None) for n in range(train + val)]


def _file(picture: Image.Image, label: int, number: int | None) -> bytes:
    """The picture as JPEG, but for four odd ones among the training pictures."""
    if (label, number) == (1, 3):
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        return stream.getvalue()
    if (label, number) == (4, 5):
        return _jpeg(picture.convert("CMYK"))
    if (label, number) == (7, 2):
        return _jpeg(picture.convert("L"))
    if (label, number) == (10, 6):
        return _jpeg(picture)[:4000]
    return _jpeg(picture)


def _jpeg(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=88)
    return stream.getvalue()


def draw_picture(label: int, number: int) -> Image.Image:
    """Draw one picture of a class: RGB, 200 to 400 pixels a side."""
    random = np.random.default_rng([_SEED, label, number])
    width, height = random.integers(200, 401, size=2).tolist()
    short = min(width, height)
    picture = _ground(random, width, height)
    # The square that preprocessing keeps is the middle one: the solid lies mostly inside it.
    radius = short * random.uniform(0.30, 0.46)
    reach = short / 2 - radius * 0.8
    cx, cy = width / 2 + random.uniform(-reach, reach), height / 2 + random.uniform(-reach, reach)
    turn = random.uniform(0, 2 * math.pi)
    solid = _solid(random, KINDS[label], radius, turn)
    mask = _mask(KINDS[label].shape, solid.size[0], radius, turn)
    picture.paste(solid, (round(cx - solid.size[0] / 2), round(cy - solid.size[1] / 2)), mask)
    noise = random.standard_normal((height, width, 1), dtype=np.float32) * np.float32(random.uniform(2, 14))
    values = (np.asarray(picture, dtype=np.float32) + noise) * np.float32(random.uniform(0.75, 1.15))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _ground(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """A muted gradient with a few soft blotches of any hue."""
    first, last = (_rgb(random.uniform(), random.uniform(0, 0.5), random.uniform(0.2, 0.9)) for _ in range(2))
    angle = random.uniform(0, 2 * math.pi)
    y, x = np.mgrid[-0.5:0.5:32j, -0.5:0.5:32j]
    along = np.clip(0.5 + x * math.cos(angle) + y * math.sin(angle), 0, 1)[..., None]
    gradient = (first + (last - first) * along).astype(np.uint8)
    ground = Image.fromarray(gradient).resize((width, height), Image.Resampling.BILINEAR)
    blotches, weights = Image.new("RGB", (width, height)), Image.new("L", (width, height))
    for _ in range(int(random.integers(2, 8))):
        x0, y0, r = random.uniform(0, width), random.uniform(0, height), min(width, height) * random.uniform(0.05, 0.25)
        box = (x0 - r, y0 - r * random.uniform(0.5, 1), x0 + r, y0 + r)
        colour = _rgb(random.uniform(), random.uniform(0.2, 0.9), random.uniform(0.2, 1))
        round_one, weight = random.uniform() < 0.5, int(random.integers(90, 220))
        for canvas, fill in ((blotches, tuple(int(c) for c in colour)), (weights, weight)):
            draw = ImageDraw.Draw(canvas)
            (draw.ellipse if round_one else draw.rectangle)(box, fill=fill)
    ground.paste(blotches, mask=weights)
    return ground


def _solid(random: np.random.Generator, kind: Kind, radius: float, turn: float) -> Image.Image:
    """A square filled with the kind's pattern in its colours, lit from one side."""
    side = 2 * math.ceil(1.2 * radius)
    y, x = np.mgrid[:side, :side].astype(np.float32) - np.float32(side / 2)
    cosine, sine = np.float32(math.cos(turn)), np.float32(math.sin(turn))
    period = np.float32(radius * random.uniform(0.30, 0.42))
    shift = random.uniform(0, 1, 2).astype(np.float32)
    light = _pattern(kind.pattern, (x * cosine + y * sine) / period, (y * cosine - x * sine) / period, shift)
    dark = _rgb(kind.dark + random.normal(0, 0.02), random.uniform(0.7, 1.0), random.uniform(0.35, 0.65))
    if kind.bright is None:
        bright = _rgb(kind.dark + random.normal(0, 0.02), random.uniform(0.0, 0.2), random.uniform(0.85, 1.0))
    else:
        bright = _rgb(kind.bright + random.normal(0, 0.02), random.uniform(0.7, 1.0), random.uniform(0.85, 1.0))
    slope = (random.uniform(-0.35, 0.35, 2) / radius).astype(np.float32)
    shade = np.clip(1 + slope[0] * x + slope[1] * y, 0.5, 1.4)
    colour = (dark + (bright - dark) * light[..., None]) * shade[..., None]
    return Image.fromarray(np.clip(colour, 0, 255).astype(np.uint8))


def _mask(shape: str, side: int, radius: float, turn: float) -> Image.Image:
    """The shape's coverage of each pixel of a square, 0..255."""
    canvas = Image.new("L", (side * 2, side * 2))  # drawn twice as large and reduced: smooth edges
    draw = ImageDraw.Draw(canvas)
    if shape == "ball":
        draw.ellipse((side - 2 * radius, side - 2 * radius, side + 2 * radius, side + 2 * radius), fill=255)
    else:
        draw.polygon([(side + 2 * radius * x, side + 2 * radius * y) for x, y in _outline(shape, turn)], fill=255)
    return canvas.reduce(2)


def _outline(shape: str, turn: float) -> list[tuple[float, float]]:
    """The shape's corners on the unit circle, turned."""
    if shape == "star":
        corners = [(0.5 + 0.5 * (i % 2 == 0), i * math.pi / 5) for i in range(10)]
    elif shape == "cross":
        arm = 0.36
        quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
        points = [
            (x * math.cos(a) - y * math.sin(a), x * math.sin(a) + y * math.cos(a))
            for a in (0, math.pi / 2, math.pi, 3 * math.pi / 2)
            for x, y in quarter
        ]
        corners = [(math.hypot(x, y), math.atan2(y, x)) for x, y in points]
    else:
        count = {"cone": 3, "tile": 4, "hexagon": 6}[shape]
        corners = [(1.1 if count == 3 else 1.0, i * 2 * math.pi / count) for i in range(count)]
    return [(r * math.cos(a + turn), r * math.sin(a + turn)) for r, a in corners]


def _pattern(pattern: str, u: np.ndarray, v: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The pattern's brightness, float32, 0..1, at (u, v) periods from the middle."""
    full_turn = np.float32(2 * np.pi)
    a, b = full_turn * (u + shift[0]), full_turn * (v + shift[1])
    if pattern == "stripes":
        wave = np.sin(a)
    elif pattern == "checks":
        wave = np.sin(a) * np.sin(b) * 2
    elif pattern == "dots":
        wave = np.cos(a) + np.cos(b) - np.float32(0.7)
    else:
        wave = np.sin(full_turn * (np.hypot(u, v) + shift[0]))
    return np.clip(wave * 4 + np.float32(0.5), 0, 1)


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), dtype=np.float32) * 255


def _pack_train(path: Path, classes: list[list[bytes]]) -> None:
    with tarfile.open(path, "w") as outer:
        for label, files in enumerate(classes):
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w") as inner:
                for number, data in enumerate(files, start=1):
                    _add(inner, f"{wnid(label)}_{number}.JPEG", data)
            _add(outer, f"{wnid(label)}.tar", stream.getvalue())


def _pack_val(path: Path, classes: list[list[bytes]]) -> list[int]:
    """Pack the validation pictures in mixed order; returns the ground truth, the devkit ID of each."""
    files = [(devkit_id(label), data) for label, own in enumerate(classes) for data in own]
    order = np.random.default_rng(_SEED).permutation(len(files)).tolist()
    with tarfile.open(path, "w") as archive:
        for number, place in enumerate(order, start=1):
            _add(archive, f"ILSVRC2012_val_{number:08d}.JPEG", files[place][1])
    return [files[place][0] for place in order]


def _pack_devkit(path: Path, truth: list[int]) -> None:
    """Pack meta.mat, with the twelve classes and their common ancestor, and the ground truth."""
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    labels = sorted(range(CLASSES), key=devkit_id)
    rows: list[tuple[int, str, str, str, int]] = [
        (devkit_id(label), wnid(label), KINDS[label].words, f"a drawn {KINDS[label].words}", 0) for label in labels
    ]
    rows.append((CLASSES + 1, "n90000000", "drawn solid", "a solid of the demo set", CLASSES))
    stream = io.BytesIO()
    scipy.io.savemat(stream, {"synsets": np.array(rows, dtype=fields).reshape(-1, 1)})
    # The first 116 bytes are free text in which scipy notes the time.
    meta = b"MATLAB 5.0 MAT-file, the demo set's classes".ljust(116) + stream.getvalue()[116:]
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=_TIME) as zipped:
        with tarfile.open(fileobj=zipped, mode="w") as archive:
            _add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", meta)
            lines = "".join(f"{identity}\n" for identity in truth).encode()
            _add(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", lines)
    path.write_bytes(packed.getvalue())


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime = len(data), _TIME
    archive.addfile(member, io.BytesIO(data))
