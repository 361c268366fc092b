"""AlexNet: eight layers with parameters, five convolutional and three fully connected (paper, sections 3 and 3.5).

::

    picture                     227 x 227 x   3
    conv1  11x11, stride 4       55 x  55 x  96   ReLU, LRN, pool 3/2 ->  27 x 27 x  96
    conv2  5x5, pad 2, 2 groups  27 x  27 x 256   ReLU, LRN, pool 3/2 ->  13 x 13 x 256
    conv3  3x3, pad 1            13 x  13 x 384   ReLU
    conv4  3x3, pad 1, 2 groups  13 x  13 x 384   ReLU
    conv5  3x3, pad 1, 2 groups  13 x  13 x 256   ReLU, pool 3/2      ->   6 x  6 x 256
    fc6    6 x 6 x 256 = 9216 -> 4096             ReLU, dropout
    fc7    4096 -> 4096                           ReLU, dropout
    fc8    4096 -> classes                        softmax (in the loss)

"pad" is the number of zero rows and columns on each side; "pool 3/2" is the largest of 3x3 pixels, in steps of 2. The
groups are the paper's two GPUs: conv2, conv4 and conv5 see only the maps of their own GPU, conv3 and the fully
connected layers see all. 60,965,224 parameters at 1000 classes. docs/alexnet.md walks through it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from net.layers import Conv, Dropout, Flatten, Layer, Linear, Lrn, MapNorm, MaxPool, Relu, Shape


def alexnet(
    classes: int,
    *,
    lrn_size: int = 5,
    lrn_k: float = 2.0,
    lrn_alpha: float = 1e-4,
    lrn_alpha_over_n: bool = False,
    lrn_beta: float = 0.75,
    relu_before_lrn: bool = True,
    map_norm: bool = False,
    pool_size: int = 3,
    pool_stride: int = 2,
    fc_units: int = 4096,
    final_relu: bool = False,
    dropout_keep: float = 0.5,
    dropout_scale_in_training: bool = False,
) -> tuple[Layer, ...]:
    """The network as a list of layers, from the picture to the classes' scores (before the softmax).

    The options are the points in which the paper, its authors' code and its reimplementations differ; the defaults
    are the paper's text.

    Parameters
    ----------
    classes : int
        How many scores a picture gets; 1000 for ILSVRC.
    lrn_size, lrn_k, lrn_alpha, lrn_beta : int, float, float, float
        n, k, alpha and beta of local response normalisation (section 3.3); size 0 leaves it out.
    lrn_alpha_over_n : bool
        Divide alpha by n, as the authors' code and Caffe do and the paper does not.
    relu_before_lrn : bool
        False: conv1 is followed by LRN, pool, ReLU in this order, as in the authors' code.
    map_norm : bool
        A second normalisation after conv2's LRN, over 5x5 pixels of the same map, as in the authors' code.
    pool_size, pool_stride : int
        Of all three pools; they overlap where the stride is smaller than the size (section 3.4).
    fc_units : int
        Units of fc6 and of fc7 (section 3.5).
    final_relu : bool
        A ReLU after fc8.
    dropout_keep : float
        Probability that a unit of fc6 or fc7 survives (section 4.2); 1 leaves dropout out.
    dropout_scale_in_training : bool
        True: divide by ``dropout_keep`` in training (Caffe); False: multiply by it at test time (the paper).

    Examples
    --------
    >>> layers = alexnet(1000)
    >>> sum(row.parameters for row in table(layers))
    60965224
    >>> shape = (227, 227, 3)
    >>> for layer in layers[:4]:
    ...     shape = layer.output_shape(shape)
    ...     print(type(layer).__name__, shape)
    Conv (55, 55, 96)
    Relu (55, 55, 96)
    Lrn (55, 55, 96)
    MaxPool (27, 27, 96)
    """
    relu = Relu()
    pool = MaxPool(pool_size, pool_stride)
    alpha = lrn_alpha / lrn_size if lrn_size and lrn_alpha_over_n else lrn_alpha
    lrn = [Lrn(lrn_size, lrn_k, alpha, lrn_beta)] if lrn_size else []
    # The authors' code: 5x5 pixels, scale 0.001 divided by the 25 pixels of the window.
    same_map = [MapNorm(5, 1.0, 0.001 / 25, 0.75)] if map_norm else []
    after_conv1: list[Layer] = [relu, *lrn, pool] if relu_before_lrn else [*lrn, pool, relu]

    def dropout(number: int) -> list[Layer]:
        return [Dropout(number, dropout_keep, dropout_scale_in_training)] if dropout_keep < 1 else []

    return (
        Conv("conv1", 96, 11, stride=4),
        *after_conv1,
        Conv("conv2", 256, 5, pad=2, groups=2),
        relu,
        *lrn,
        *same_map,
        pool,
        Conv("conv3", 384, 3, pad=1),
        relu,
        Conv("conv4", 384, 3, pad=1, groups=2),
        relu,
        Conv("conv5", 256, 3, pad=1, groups=2),
        relu,
        pool,
        Flatten(),
        Linear("fc6", fc_units),
        relu,
        *dropout(6),
        Linear("fc7", fc_units),
        relu,
        *dropout(7),
        Linear("fc8", classes),
        *([relu] if final_relu else []),
    )


@dataclass(frozen=True)
class Row:
    """One layer with parameters in the network's table of sizes."""

    name: str
    output: Shape
    parameters: int
    multiply_adds: int  # of one image's forward pass


def table(layers: tuple[Layer, ...], shape: Shape = (227, 227, 3)) -> list[Row]:
    """Output shape, parameters and multiply-adds of each convolutional and fully connected layer.

    ``shape`` is the picture's, (height, width, channels). An output number is a sum of as many products as its kernel
    has weights, so a layer's multiply-adds are its output pixels times all its weights.
    """
    rows = []
    for layer in layers:
        output = layer.output_shape(shape)
        if isinstance(layer, Conv | Linear):
            sizes = {name[-1]: math.prod(s) for name, s in layer.parameter_shapes(shape).items()}
            pixels = math.prod(output[:-1])
            rows.append(Row(layer.name, output, sizes["w"] + sizes["b"], pixels * sizes["w"]))
        shape = output
    return rows
