"""Softmax and cross-entropy, the loss (paper, section 3.5: multinomial logistic regression).

Shapes
    z, dz (N, classes) and loss (N,) float32, or float64 in checks; labels (N,) integers 0 .. classes - 1, others
    are refused with a ValueError

Forward
    With p = softmax(z), the loss of image n is the negative log-probability of its label t::

        loss[n] = -log p[n, t] = log(sum_j exp(z[n, j])) - z[n, t]

    log is the natural logarithm. The right-hand form never takes the logarithm of a probability that has been rounded
    to 0. As in ``softmax.py`` the largest score is subtracted from all scores first. A network that knows nothing gives
    p = 1 / classes: a loss of log(1000) = 6.908 for ImageNet.

Backward
    The batch's loss is the mean over its images, L = sum_n loss[n] / N. For one image::

        ∂(log sum_j exp z[j]) / ∂z[c] = exp(z[c]) / sum_j exp(z[j]) = p[c]
        ∂z[t] / ∂z[c] = 1 if c = t else 0

    so ``dz[n, c] = (p[n, c] - [c = t]) / N``, where [c = t] is 1 for the label and 0 for the other classes: what the
    network said less what it should have said. It pushes the label's score up and the others down, by amounts that sum
    to 0, and less the surer the network is of the label. This 1/N is the only one in the whole backward pass.

Example
    Scores that make p = (1/4, 1/2, 1/4), and the label 1: the loss is log 2.

    >>> loss, dz = cross_entropy(np.log([[1.0, 2.0, 1.0]]), np.array([1]))
    >>> loss.round(3), dz
    (array([0.693]), array([[ 0.25, -0.5 ,  0.25]]))
"""

from __future__ import annotations

import numpy as np


def cross_entropy(z: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """z (N, classes), labels (N,) -> loss of each image (N,), gradient of their mean dz (N, classes)."""
    if not np.all((labels >= 0) & (labels < z.shape[1])):  # NumPy would count -1 from the end
        raise ValueError(f"labels must lie between 0 and {z.shape[1] - 1}")
    n = np.arange(len(z))
    shifted = z - z.max(axis=1, keepdims=True)
    e = np.exp(shifted)
    total = e.sum(axis=1)
    loss = np.log(total) - shifted[n, labels]
    dz = e / total[:, np.newaxis]
    dz[n, labels] -= 1
    return loss, dz / len(z)
