"""Every backward pass of the reference against differences of its forward pass, in float64.

A random dy makes one number of the output, sum(dy * y); its derivative along a random direction is known twice, from
the backward pass and from the forward pass at two points close by. A wrong factor, sign, term or index anywhere in a
gradient changes it along almost every direction.
"""

from __future__ import annotations

import numpy as np
import pytest

from net import reference
from tests.net import cases
from tests.net.oracle import directional_error

TOLERANCE = 1e-6


def _float64(case: cases.Case) -> list[np.ndarray]:
    return [a.astype(np.float64) if a.dtype == np.float32 else a for a in map(cases.host, case.args)]


def _of(operation: str) -> list[cases.Case]:
    return [c for c in cases.of(operation) if not (c.nan or c.strided or c.layer)]


@pytest.mark.parametrize("case", _of("conv2d_forward"), ids=str)
def test_convolution(case):
    x, w, b = _float64(case)
    random = cases.random_for(str(case))
    dy = random.standard_normal(reference.conv2d_forward(x, w, b, **case.kwargs).shape)
    gradients = reference.conv2d_backward(dy, x, w, **case.kwargs, need_dx=True)
    error = directional_error(
        lambda x, w, b: reference.conv2d_forward(x, w, b, **case.kwargs), (x, w, b), gradients, dy, random
    )
    assert error <= TOLERANCE


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("pad", [0, 1, 2])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_convolution_geometries(stride, pad, groups):
    random = cases.random_for(f"geometry {stride} {pad} {groups}")
    x, w, b = (random.standard_normal(s) for s in ((2, 9, 12, 4), (5, 3, 4 // groups, 6), (6,)))
    geometry = {"stride": stride, "pad": pad, "groups": groups}
    dy = random.standard_normal(reference.conv2d_forward(x, w, b, **geometry).shape)
    gradients = reference.conv2d_backward(dy, x, w, **geometry, need_dx=True)
    error = directional_error(
        lambda x, w, b: reference.conv2d_forward(x, w, b, **geometry), (x, w, b), gradients, dy, random
    )
    assert error <= TOLERANCE


@pytest.mark.parametrize("case", _of("linear_forward"), ids=str)
def test_fully_connected(case):
    x, w, b = _float64(case)
    random = cases.random_for(str(case))
    dy = random.standard_normal((len(x), w.shape[1]))
    gradients = reference.linear_backward(dy, x, w, need_dx=True)
    assert directional_error(reference.linear_forward, (x, w, b), gradients, dy, random) <= TOLERANCE


@pytest.mark.parametrize("case", [*_of("lrn_forward"), *_of("map_norm_forward")], ids=str)
def test_normalisation(case):
    (x,) = _float64(case)
    forward, backward = (getattr(reference, case.operation[: -len("forward")] + d) for d in ("forward", "backward"))
    random = cases.random_for(str(case))
    dy = random.standard_normal(x.shape)
    _, s = forward(x, **case.kwargs)
    rest = {name: value for name, value in case.kwargs.items() if name != "k"}
    dx = backward(dy, x, s, **rest)
    assert directional_error(lambda x: forward(x, **case.kwargs)[0], (x,), (dx,), dy, random) <= TOLERANCE


def test_relu():
    random = cases.random_for("relu gradient")
    x, dy = random.standard_normal((2, 3, 5, 7)), random.standard_normal((2, 3, 5, 7))
    x += np.copysign(0.01, x)  # away from the kink at 0, where there is no derivative
    dx = reference.relu_backward(dy, reference.relu_forward(x))
    assert directional_error(reference.relu_forward, (x,), (dx,), dy, random) <= TOLERANCE


@pytest.mark.parametrize(
    ("height", "width", "size", "stride"),
    [(7, 9, 3, 2), (8, 10, 3, 2), (6, 5, 3, 1), (7, 6, 2, 2), (9, 8, 2, 3), (5, 4, 1, 1)],
)
def test_max_pooling(height, width, size, stride):
    random = cases.random_for(f"pool gradient {height} {width} {size} {stride}")
    # All values different by more than the differences' step, or the winner would change on the way.
    x = random.permutation(2 * height * width * 3).reshape(2, height, width, 3) * 0.01
    y, winner = reference.maxpool_forward(x, size=size, stride=stride)
    dy = random.standard_normal(y.shape)
    dx = reference.maxpool_backward(dy, winner, height=height, width=width, size=size, stride=stride)
    error = directional_error(
        lambda x: reference.maxpool_forward(x, size=size, stride=stride)[0], (x,), (dx,), dy, random
    )
    assert error <= TOLERANCE


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_dropout(scale):
    random = cases.random_for("dropout gradient")
    x, dy = random.standard_normal((5, 33)), random.standard_normal((5, 33))
    options = {"keep": 0.5, "scale": scale, "key": (3, 2**33 + 1, 6)}
    dx = reference.dropout_backward(dy, **options)
    assert directional_error(lambda x: reference.dropout_forward(x, **options), (x,), (dx,), dy, random) <= TOLERANCE


@pytest.mark.parametrize("case", [c for c in _of("cross_entropy") if "infinity" not in c.name], ids=str)
def test_loss(case):
    z, labels = _float64(case)
    if "large" in case.name or "certain" in case.name:
        z = z / 100  # there the gradient is 0 to within rounding
    random = cases.random_for(str(case))
    _, dz = reference.cross_entropy(z, labels)
    mean = np.full(len(z), 1 / len(z))  # the loss of a batch is the mean over its images
    error = directional_error(lambda z: reference.cross_entropy(z, labels)[0], (z,), (dz,), mean, random)
    assert error <= TOLERANCE
