"""The matrices of Winograd convolution, built from their interpolation points.

The problem in one dimension: m outputs of a filter g with r taps over n = m + r - 1 inputs d,
``y[i] = sum_k d[i + k] g[k]``. Written out that takes m r multiplications. F(m, r) takes n::

    y = Aᵀ [ (G g) * (B d) ]          A (n, m), G (n, r), B (n, n), * element by element

(Lavin and Gray, below, write Bᵀ for this B.)

Where the matrices come from (Cook and Toom): the product of two polynomials of degrees m - 1 and r - 1 has n
coefficients and is determined by its values at n points. Evaluating a polynomial at a point p is a row
(1, p, p², ...); at "infinity" it is the leading coefficient; and the value of a product is the product of the values:
n multiplications. Going back from values to coefficients is Lagrange's interpolation. A correlation is that
multiplication transposed (Winograd; A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR
2016), which exchanges the roles: evaluation becomes Aᵀ, interpolation becomes B. For finite points p_j and with
f_j = prod_{l != j} (p_j - p_l):

- A[j] = (1, p_j, ..., p_j^(m - 1)); at infinity (0, ..., 0, 1)
- G[j] = (1, p_j, ..., p_j^(r - 1)) / f_j; at infinity (0, ..., 0, 1)
- B[j] = coefficients of prod_{l != j} (x - p_l); at infinity those of prod_l (x - p_l)

In two dimensions each matrix is applied to columns and then to rows: an m x m tile of outputs costs n² instead of
(m r)² multiplications.

In exact arithmetic the points do not matter. In floating point they decide the error: sums of large terms of both
signs must cancel. The usual textbook points 0, ±1, ±2 are poor. Those below were found by trying all sets of symmetric
multiples of 1/8 (six points) and 1/4 (seven); being dyadic they make A and B exact in binary. G is
applied in double precision, once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Final

Matrix = tuple[tuple[Fraction, ...], ...]

POINTS: Final[dict[int, tuple[Fraction, ...]]] = {
    6: tuple(Fraction(p, 8) for p in (0, 5, -5, 12, -12)),  # and infinity
    7: tuple(Fraction(p, 4) for p in (1, -1, 3, -3, 7, -7)),  # and infinity
}


def cook_toom(m: int, r: int, points: Sequence[Fraction]) -> tuple[Matrix, Matrix, Matrix]:
    """A (n, m), G (n, r), B (n, n) of F(m, r) for n - 1 finite points and infinity.

    F(2, 3) as docs/cpu.md writes it out, its last product with the other sign:

    >>> a, g, b = cook_toom(2, 3, (Fraction(0), Fraction(1), Fraction(-1)))
    >>> [[int(v) for v in row] for row in b]  # d2 - d0, d1 + d2, d2 - d1, d3 - d1
    [[-1, 0, 1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]]
    >>> [[str(v) for v in row] for row in g]  # -g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2
    [['-1', '0', '0'], ['1/2', '1/2', '1/2'], ['1/2', '-1/2', '1/2'], ['0', '0', '1']]
    >>> [[int(v) for v in row] for row in transposed(a)]  # y0 and y1 from the four products
    [[1, 1, 1, 0], [0, 1, -1, 1]]

    Raises
    ------
    ValueError
        Two points are the same, or there are more or fewer than n - 1.
    """
    n = m + r - 1
    if len(set(points)) != n - 1:
        raise ValueError(f"F({m}, {r}) needs {n - 1} different finite points, not {len(set(points))}")
    a, g, b = [], [], []
    for j, p in enumerate(points):
        others = [q for q in points if q != p]
        f = Fraction(1)
        for q in others:
            f *= p - q
        a.append(tuple(p**i for i in range(m)))
        g.append(tuple(points[j] ** k / f for k in range(r)))
        b.append((*_product(others), Fraction(0)))
    a.append(_last(m))
    g.append(_last(r))
    b.append(_product(points))
    return tuple(a), tuple(g), tuple(b)


def transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))


def _product(roots: Sequence[Fraction]) -> tuple[Fraction, ...]:
    """Coefficients of prod (x - root), constant term first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        for i, c in enumerate(coefficients):
            shifted[i] -= root * c
        coefficients = shifted
    return tuple(coefficients)


def _last(length: int) -> tuple[Fraction, ...]:
    return (*(Fraction(0),) * (length - 1), Fraction(1))


A43, G43, B43 = cook_toom(4, 3, POINTS[6])
A35, G35, B35 = cook_toom(3, 5, POINTS[7])

# What kernels apply, by name: "input" and "output" to activations, "filter" to weights and, for the gradient of the
# weights, "gradient" to dy and "weights" to the sums.
TRANSFORMS: Final[dict[str, Matrix]] = {
    "filter 4,3": G43,
    "filter 3,5": G35,
    "input 4,3": B43,
    "output 4,3": transposed(A43),
    "gradient 4,3": A43,
    "input 3,5": B35,
    "output 3,5": transposed(A35),
    "gradient 3,5": A35,
    "weights 4,3": transposed(G43),
    "weights 3,5": transposed(G35),
}
