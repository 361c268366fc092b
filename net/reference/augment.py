"""From stored uint8 crops to the network's input (paper, sections 2 and 4.1).

Shapes
    images uint8 (N, H, W, 3): crops as they lie in the stored pictures, not mirrored yet
    corner int (N, 2): row and column of the crop in its picture
    flip uint8 (N,): 1 where the image is to be mirrored, left to right
    shift float (N, 3): colour jitter, added to red, green, blue, on the 0..255 scale
    mean None or float (M, M, 3): the training set's mean picture
    scale number: 1 leaves the input on the 0..255 scale, 1 / 255 puts it on 0..1
    border (before, after): zero rows and columns around the result
    y of shift's type (N, before + H + after, before + W + after, 3): float32, or float64 in checks

Formula
    For output pixel (r, c) of image n, border not counted, with c' = W - 1 - c where the image is mirrored, else c::

        y[n, r, c] = (images[n, r, c'] - m + shift[n]) * scale

    m is 0 without a mean. A mean as large as the crop (M = H) stays where it is, mean[r, c], whether the
    picture is mirrored or not, as in the authors' code. A larger one is the mean of whole pictures: it is cropped and
    mirrored with the picture, mean[corner row + r, corner column + c'].

    ``bgr`` reverses the order of the channels at the end. The border is exactly 0, outside the formula: it stands
    for "no signal", like the padding of a convolution. A border of three, (2, 1) or (0, 3), makes the network's
    227 x 227 of the paper's 224 x 224: docs/alexnet.md, "224 or 227?".

There is no backward pass: nothing needs the gradient of the pictures.

Example
    A crop of one row of two pixels, mirrored, with a border of one before:

    >>> images = np.array([[[[10, 20, 30], [40, 50, 60]]]], dtype=np.uint8)
    >>> corner, flip, shift = np.zeros((1, 2), int), np.ones(1, np.uint8), np.array([[1.0, 0.0, 0.0]])
    >>> y = augment(images, corner, flip, shift, mean=None, scale=0.1, bgr=False, border=(1, 0))
    >>> y.shape
    (1, 2, 3, 3)
    >>> y[0, 1]
    array([[0. , 0. , 0. ],
           [4.1, 5. , 6. ],
           [1.1, 2. , 3. ]])
"""

from __future__ import annotations

import numpy as np


def augment(
    images: np.ndarray,
    corner: np.ndarray,
    flip: np.ndarray,
    shift: np.ndarray,
    *,
    mean: np.ndarray | None,
    scale: float,
    bgr: bool,
    border: tuple[int, int],
) -> np.ndarray:
    """Crops and their draws -> input (N, H + before + after, W + before + after, 3), in ``shift``'s precision."""
    n, height, width, _ = images.shape
    before, after = border
    y = np.zeros((n, before + height + after, before + width + after, 3), dtype=shift.dtype)
    for image in range(n):
        pixels = images[image].astype(shift.dtype)
        if mean is not None and len(mean) != height:
            row, column = corner[image]
            pixels -= mean[row : row + height, column : column + width]
        if flip[image]:
            pixels = pixels[:, ::-1]
        if mean is not None and len(mean) == height:
            pixels = pixels - mean
        pixels = (pixels + shift[image]) * scale
        y[image, before : before + height, before : before + width] = pixels[..., ::-1] if bgr else pixels
    return y
