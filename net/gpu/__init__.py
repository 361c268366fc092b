"""The GPU backend: CuPy for memory, CUDA kernels of our own (the .cu files), cuBLAS for matrix products.

Importing it needs no GPU and no CuPy; ``start`` does. Formulas and shapes stand at the head of each .cu file, and the
operations mean what they mean in ``net.reference``. How it is built, and why, is told in ``docs/gpu.md``.
"""

from net.gpu.arrays import asarray, empty, host_empty, synchronize, to_host, upload
from net.gpu.blocks import (
    conv_block_backward,
    conv_block_forward,
    conv_block_relu_last_backward,
    conv_block_relu_last_forward,
    linear_block_backward,
    linear_block_forward,
)
from net.gpu.convolution import conv2d_backward, conv2d_forward
from net.gpu.device import card, describe
from net.gpu.graph import replayable
from net.gpu.layers import (
    augment,
    cross_entropy,
    dropout_backward,
    dropout_forward,
    lrn_backward,
    lrn_forward,
    map_norm_backward,
    map_norm_forward,
    maxpool_backward,
    maxpool_forward,
    relu_backward,
    relu_forward,
    sgd_update,
    softmax,
)
from net.gpu.linear import linear_backward, linear_forward
from net.gpu.memory import bytes_needed, check_memory, largest_batch
from net.gpu.nccl import reduction
from net.gpu.setup import availability, start

__all__ = [
    "asarray",
    "augment",
    "availability",
    "bytes_needed",
    "card",
    "check_memory",
    "conv2d_backward",
    "conv2d_forward",
    "conv_block_backward",
    "conv_block_forward",
    "conv_block_relu_last_backward",
    "conv_block_relu_last_forward",
    "cross_entropy",
    "describe",
    "dropout_backward",
    "dropout_forward",
    "empty",
    "host_empty",
    "largest_batch",
    "linear_backward",
    "linear_block_backward",
    "linear_block_forward",
    "linear_forward",
    "lrn_backward",
    "lrn_forward",
    "map_norm_backward",
    "map_norm_forward",
    "maxpool_backward",
    "maxpool_forward",
    "reduction",
    "relu_backward",
    "relu_forward",
    "replayable",
    "sgd_update",
    "softmax",
    "start",
    "synchronize",
    "to_host",
    "upload",
]
