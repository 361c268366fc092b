"""Weights that stay as they are from one forward pass to the next.

Winograd's products want the filters transformed (``winograd.filters``: G w Gᵀ). In training that is done anew in each
step and costs little beside a whole batch; for a single picture it costs more than the convolution. A prediction
therefore hands its parameters to :func:`fixed` first, and the transformed filters are kept with the weights.

They are never stale: ``sgd_update``, the only operation that changes parameters, counts its calls, and after another
one they are computed again.

Gain: with two other changes, one picture's forward pass 44 to 19 ms (docs/cpu.md, "One picture").
"""

from __future__ import annotations

from typing import Any

import numpy as np

from net.cpu import update, winograd


class FixedWeights(np.ndarray):
    """A convolution's weights, and what has been derived from them after how many updates."""

    def __array_finalize__(self, other: Any) -> None:
        # Runs for every new array of this kind, views included: none inherits what was derived from other numbers.
        self.derived: dict[tuple[int, int, int], np.ndarray] = {}
        self.updates = update.count()


def fixed(parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same parameters, sharing their memory, in a form that is faster to use again and again."""
    return {name: w.view(FixedWeights) if w.ndim == 4 else w for name, w in parameters.items()}


def filters(w: np.ndarray, s: winograd.Shape) -> np.ndarray:
    """``winograd.filters``, kept where w is fixed."""
    plain = np.asarray(w)  # kernels know no kinds of arrays but NumPy's own
    if not isinstance(w, FixedWeights):
        return winograd.filters(plain, s)
    if w.updates != update.count():
        w.derived.clear()
        w.updates = update.count()
    key = s.n, s.stride, s.groups  # the rest of a geometry does not matter to the filters
    if key not in w.derived:
        w.derived[key] = winograd.filters(plain, s)
    return w.derived[key]
