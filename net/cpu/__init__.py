"""The CPU backend: the operations of ``net.backend`` on Numba kernels and the BLAS of NumPy's wheel.

``net.reference`` says what each operation computes; here is how it is computed fast. Start reading at ``jit.py`` (how
kernels are compiled) and ``memory.py`` (where arrays come from). Call it from one thread; the operations themselves use
every core.
"""

from net.cpu import jit  # noqa: F401, first of all: it imports Numba in its own way
from net.cpu.ahead import warm_up
from net.cpu.augment import augment
from net.cpu.conv import conv2d_backward, conv2d_forward, conv_block_backward, conv_block_forward
from net.cpu.dropout import dropout_backward, dropout_forward
from net.cpu.fixed import fixed
from net.cpu.linear import linear_backward, linear_block_backward, linear_block_forward, linear_forward
from net.cpu.loss import cross_entropy, softmax
from net.cpu.lrn import lrn_backward, lrn_forward
from net.cpu.map_norm import map_norm_backward, map_norm_forward
from net.cpu.memory import adopt, asarray, empty, host_empty, synchronize, to_host, upload
from net.cpu.pool import maxpool_backward, maxpool_forward
from net.cpu.relu import relu_backward, relu_forward
from net.cpu.update import sgd_update

__all__ = [
    "adopt",
    "asarray",
    "augment",
    "conv2d_backward",
    "conv2d_forward",
    "conv_block_backward",
    "conv_block_forward",
    "cross_entropy",
    "dropout_backward",
    "dropout_forward",
    "empty",
    "fixed",
    "host_empty",
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
    "relu_backward",
    "relu_forward",
    "sgd_update",
    "softmax",
    "synchronize",
    "to_host",
    "upload",
    "warm_up",
]
