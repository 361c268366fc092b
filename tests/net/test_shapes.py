"""Arrays that do not fit each other are refused by the fast backends, whose kernels check nothing themselves."""

from __future__ import annotations

import net.cpu
from tests.net import misfits


def test_the_cpu_refuses_arrays_that_do_not_fit() -> None:
    assert misfits.taken(net.cpu) == []
