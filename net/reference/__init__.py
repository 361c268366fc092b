"""The textbook backend: every operation of AlexNet in plain NumPy, one per file; the others are tested against it.

Each file opens with the formula, the shapes and the section of the paper (A. Krizhevsky, I. Sutskever, G. Hinton,
"ImageNet Classification with Deep Convolutional Neural Networks", NIPS 2012), derives the backward pass, gives an
example to compute by hand, and then writes both down. What the other backends compute is defined here.

In all files L is the loss, and dy stands for the array of derivatives ∂L/∂y, one for each number of y; dx, dw and db
likewise. A number that enters several outputs collects a derivative from each (the chain rule)::

    dx[i] = sum_j dy[j] ∂y[j]/∂x[i]

All functions compute in the precision they are given: float32 in, float32 out, and float64 for checks. "Keep x" in a
docstring says what the backward pass will ask for. But for labels, nothing here looks for wrong arguments: shapes
that do not fit mostly fail in NumPy, with its message. docs/alexnet.md shows how to check a gradient yourself.
"""

from net.reference.arrays import asarray, empty, host_empty, synchronize, to_host, upload
from net.reference.augment import augment
from net.reference.convolution import conv2d_backward, conv2d_forward
from net.reference.cross_entropy import cross_entropy
from net.reference.dropout import dropout_backward, dropout_forward
from net.reference.linear import linear_backward, linear_forward
from net.reference.lrn import lrn_backward, lrn_forward
from net.reference.map_norm import map_norm_backward, map_norm_forward
from net.reference.maxpool import maxpool_backward, maxpool_forward
from net.reference.relu import relu_backward, relu_forward
from net.reference.sgd import sgd_update
from net.reference.softmax import softmax

__all__ = [
    "asarray",
    "augment",
    "conv2d_backward",
    "conv2d_forward",
    "cross_entropy",
    "dropout_backward",
    "dropout_forward",
    "empty",
    "host_empty",
    "linear_backward",
    "linear_forward",
    "lrn_backward",
    "lrn_forward",
    "map_norm_backward",
    "map_norm_forward",
    "maxpool_backward",
    "maxpool_forward",
    "relu_backward",
    "relu_forward",
    "sgd_update",
    "softmax",
    "synchronize",
    "to_host",
    "upload",
]
