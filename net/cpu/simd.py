"""The two inner loops that a compiler does not find by itself, written as vector instructions.

Numba turns most loops here into vector code without help. Two need more than it can see: the *micro-kernel* of a
matrix product, whose sums must stay in registers throughout, and the small fixed matrices of the Winograd transforms,
which should be straight-line additions rather than loops. Both are written down in LLVM's intermediate language, in
which ``<8 x float>`` is a type; LLVM does the rest for whatever processor it finds.

Arrays are passed flat (one dimension), with offsets and steps counted in elements.

Gain (one core of a Zen 3, GFLOP/s; the ceiling is about 100): the product of a 96x48 by a 48x128 matrix takes 92 with
the micro-kernel and 74 in OpenBLAS, 96x256 by 256x384 takes 98 and 86: OpenBLAS first copies both operands into the
order it needs, here they are made in that order. No command repeats these two; ``python -m bench.kernels`` times whole
layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from net.cpu.cook_toom import TRANSFORMS
from net.cpu.jit import inner, processor

LANES: Final = 16 if "+avx512f" in processor()[1].split(",") else 8  # floats in a vector register
PANEL: Final = 2 * LANES  # columns of the right operand that lie side by side
BLOCK: Final = 6  # rows at a time: 6 x 2 sums, 2 vectors of b and one of a fill the 16 registers of AVX2
WIDE: Final = LANES == 16  # whether there are 32 registers, enough for two panels at a time
PIECE: Final = 16  # terms of a sum, or half as many more, that are added up by themselves before they join it

_FLOAT: Final = ir.FloatType()
_VECTOR: Final = ir.VectorType(_FLOAT, LANES)
_WIDE: Final = ir.VectorType(ir.DoubleType(), LANES)
_INT: Final = ir.IntType(64)
_FUSE: Final = ("contract",)  # a multiplication and the addition after it may become one instruction


@inner
def lines(count: int) -> np.ndarray:
    """``count`` numbers of a task's own, from the start of a cache line on.

    Numba's arrays begin in the middle of a line as often as not, and a vector that lies across two takes two loads.
    """
    room = np.empty(count + 15, np.float32)
    first = -(room.ctypes.data // 4) % 16
    return room[first : first + count]


@intrinsic(prefer_literal=True)
def multiply_block(
    typing: Any,
    rows: Any,
    vectors: Any,
    add: Any,
    a: Any,
    a_at: Any,
    a_row: Any,
    a_step: Any,
    b: Any,
    b_at: Any,
    c: Any,
    c_at: Any,
    c_row: Any,
    depth: Any,
) -> Any:
    """``c = a b`` or ``c += a b`` for ``rows`` (a literal, at most BLOCK) rows and one or two (``vectors``, a literal)
    vectors of columns of a panel.

    Element (i, k) of a is ``a[a_at + i a_row + k a_step]``; row k of b, PANEL numbers side by side, starts at
    ``b[b_at + k PANEL]``; row i of c at ``c[c_at + i c_row]``. ``add`` is a literal, ``depth`` >= 1 the length of the
    sums.

    A sum is computed in the order of k, PIECE terms at a time (the last piece has up to half as many more): each piece
    starts at zero and is then added to the total. Rounding grows with the length of a chain of additions, as the square
    root of half of it: 11 roundings for 256 terms in a row, 4 for 16 pieces of 16. In Winograd's products that is most
    of the error there is (docs/cpu.md).
    """
    count, accumulate = rows.literal_value, add.literal_value
    halves = (0, LANES)[: vectors.literal_value]
    integer = types.intp
    signature = types.void(rows, vectors, add, a, integer, integer, integer, b, integer, c, integer, integer, integer)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        _, _, _, a, a_at, a_row, a_step, b, b_at, c, c_at, c_row, depth = args
        a_start = builder.gep(_data(context, builder, signature.args[3], a), [a_at])
        b_start = builder.gep(_data(context, builder, signature.args[7], b), [b_at])
        c_start = builder.gep(_data(context, builder, signature.args[9], c), [c_at])
        a_rows = [builder.gep(a_start, [builder.mul(a_row, _INT(i))]) for i in range(count)]
        if accumulate:  # c is wanted after the loop: by then it is here
            for i in range(count):
                for half in halves:
                    _prefetch(builder, builder.gep(c_start, [builder.add(builder.mul(c_row, _INT(i)), _INT(half))]))

        before = builder.block
        piece = builder.append_basic_block("piece")
        builder.branch(piece)

        builder.position_at_end(piece)
        first = builder.phi(_INT)
        first.add_incoming(_INT(0), before)
        totals = [[builder.phi(_VECTOR) for _ in halves] for _ in range(count)]
        end = _end_of_piece(builder, first, depth)
        starts = [builder.gep(b_start, [_INT(half)]) for half in halves]
        sums = _sums_of_piece(builder, first, end, a_rows, a_step, starts)
        for i in range(count):
            for j in range(len(halves)):
                total = builder.fadd(totals[i][j], sums[i][j])
                totals[i][j].add_incoming(ir.Constant(_VECTOR, None), before)
                totals[i][j].add_incoming(total, builder.block)
                sums[i][j] = total
        first.add_incoming(end, builder.block)
        after = builder.append_basic_block("sums")
        builder.cbranch(builder.icmp_signed("<", end, depth), piece, after)

        builder.position_at_end(after)
        for i in range(count):
            for j, half in enumerate(halves):
                to = builder.gep(c_start, [builder.add(builder.mul(c_row, _INT(i)), _INT(half))])
                value = builder.fadd(sums[i][j], _load(builder, to)) if accumulate else sums[i][j]
                _store(builder, value, to)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def multiply_wide_block(
    typing: Any,
    rows: Any,
    vectors: Any,
    add: Any,
    a: Any,
    a_at: Any,
    a_row: Any,
    a_step: Any,
    b: Any,
    b_at: Any,
    b_panel: Any,
    c: Any,
    c_at: Any,
    c_row: Any,
    c_panel: Any,
    depth: Any,
    part: Any,
) -> Any:
    """``c = a b`` or ``c += a b`` for three or four (``vectors``, a literal) vectors of columns of two panels, which
    begin ``b_panel`` apart in b and ``c_panel`` in c; the rest as in :func:`multiply_block`, and the same to the last
    bit.

    For processors with 32 vector registers, 24 of which hold sums here. Ten vectors are loaded for 24 multiplications,
    where a block of one panel loads eight for twelve: an Ice Lake loads one vector in a cycle and multiplies two. The
    totals of the pieces are kept in memory: in c, and in ``part`` (2 BLOCK PANEL) where c is added to.
    """
    count, accumulate = rows.literal_value, add.literal_value
    places = ((0, 0), (0, LANES), (1, 0), (1, LANES))[: vectors.literal_value]
    n = types.intp
    signature = types.void(rows, vectors, add, a, n, n, n, b, n, n, c, n, n, n, n, part)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        _, _, _, a, a_at, a_row, a_step, b, b_at, b_panel, c, c_at, c_row, c_panel, depth, part = args
        a_start = builder.gep(_data(context, builder, signature.args[3], a), [a_at])
        b_start = builder.gep(_data(context, builder, signature.args[7], b), [b_at])
        c_start = builder.gep(_data(context, builder, signature.args[10], c), [c_at])
        part_start = _data(context, builder, signature.args[15], part)
        a_rows = [builder.gep(a_start, [builder.mul(a_row, _INT(i))]) for i in range(count)]
        b_starts = [
            builder.gep(b_start, [builder.add(builder.mul(b_panel, _INT(panel)), _INT(half))]) for panel, half in places
        ]

        def result(i: int, j: int) -> Any:
            panel, half = places[j]
            row = builder.gep(c_start, [builder.mul(c_row, _INT(i))])
            return builder.gep(row, [builder.add(builder.mul(c_panel, _INT(panel)), _INT(half))])

        cells = [(i, j) for i in range(count) for j in range(len(places))]
        totals = {
            (i, j): builder.gep(part_start, [_INT((4 * i + j) * LANES)]) if accumulate else result(i, j)
            for i, j in cells
        }
        if accumulate:
            for cell in cells:
                _prefetch(builder, result(*cell))

        before = builder.block
        piece = builder.append_basic_block("piece")
        builder.branch(piece)

        builder.position_at_end(piece)
        first = builder.phi(_INT)
        first.add_incoming(_INT(0), before)
        end = _end_of_piece(builder, first, depth)
        sums = _sums_of_piece(builder, first, end, a_rows, a_step, b_starts)
        with builder.if_else(builder.icmp_signed("==", first, _INT(0))) as (at_first, later):
            for begun, block in ((False, at_first), (True, later)):
                with block:
                    for i, j in cells:
                        value, to = sums[i][j], totals[i, j]
                        _store(builder, builder.fadd(_load(builder, to), value) if begun else value, to)
        after = builder.append_basic_block("sums")
        first.add_incoming(end, builder.block)
        builder.cbranch(builder.icmp_signed("<", end, depth), piece, after)

        builder.position_at_end(after)
        if accumulate:
            for cell in cells:
                to = result(*cell)
                _store(builder, builder.fadd(_load(builder, totals[cell]), _load(builder, to)), to)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def transform(
    typing: Any, name: Any, source: Any, source_at: Any, source_step: Any, to: Any, to_at: Any, to_step: Any
) -> Any:
    """``to = M source`` with the matrix M = ``TRANSFORMS[name]``, for LANES channels that lie side by side.

    Element k of the source is the vector at ``source[source_at + k source_step]``, element i of the result the one at
    ``to[to_at + i to_step]``. ``name`` is a literal. Where one of the arrays is float64, the arithmetic is.
    """
    matrix = TRANSFORMS[name.literal_value]
    integer = types.intp
    signature = types.void(name, source, integer, integer, to, integer, integer)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        _, source, source_at, source_step, to, to_at, to_step = args
        start = builder.gep(_data(context, builder, signature.args[1], source), [source_at])
        end = builder.gep(_data(context, builder, signature.args[4], to), [to_at])
        wide = types.float64 in (signature.args[1].dtype, signature.args[4].dtype)
        inputs = [
            _load(builder, builder.gep(start, [builder.mul(source_step, _INT(k))])) for k in range(len(matrix[0]))
        ]
        if wide:
            inputs = [_converted(builder, value, _WIDE) for value in inputs]
        kind = _WIDE if signature.args[4].dtype == types.float64 else _VECTOR
        for i, value in enumerate(_straight_line(builder, matrix, inputs)):
            _store(builder, _converted(builder, value, kind), builder.gep(end, [builder.mul(to_step, _INT(i))]))
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def copy(typing: Any, count: Any, source: Any, source_at: Any, to: Any, to_at: Any) -> Any:
    """``to[to_at : to_at + count] = source[source_at : source_at + count]`` for a literal ``count``.

    As a loop so few numbers would cost more in questions (does one array begin within the other?) than in moves.
    """
    signature = types.void(count, source, types.intp, to, types.intp)
    kind = ir.VectorType(_FLOAT, count.literal_value)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        _, source, source_at, to, to_at = args
        start = builder.gep(_data(context, builder, signature.args[1], source), [source_at])
        vector = builder.load(builder.bitcast(start, kind.as_pointer()))
        vector.align = 4
        _store(builder, vector, builder.gep(_data(context, builder, signature.args[3], to), [to_at]))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def stream(typing: Any, source: Any, source_at: Any, to: Any, to_at: Any) -> Any:
    """LANES numbers from ``source[source_at]`` on to ``to[to_at]`` on, a whole cache line or half of one, past the
    caches: an ordinary store of a line reads it from memory first. :func:`fence` must follow before others read it.

    ``to[to_at]`` lies on a multiple of a vector's bytes.
    """
    signature = types.void(source, types.intp, to, types.intp)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        source, source_at, to, to_at = args
        value = _load(builder, builder.gep(_data(context, builder, signature.args[0], source), [source_at]))
        address = builder.gep(_data(context, builder, signature.args[2], to), [to_at])
        store = builder.store(value, builder.bitcast(address, _VECTOR.as_pointer()))
        store.align = 4 * LANES
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def fence(typing: Any) -> Any:
    """What :func:`stream` has written is there for other cores from now on."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def prefetch(typing: Any, array: Any, at: Any) -> Any:
    """Ask for the cache line of ``array[at]`` without waiting for it. Harmless beyond the array's end."""
    signature = types.void(array, types.intp)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        _prefetch(builder, builder.gep(_data(context, builder, signature.args[0], args[0]), [args[1]]))
        return context.get_dummy_value()

    return signature, generate


def _end_of_piece(builder: ir.IRBuilder, first: Any, depth: Any) -> Any:
    """Where the piece from ``first`` on ends; the last one takes up to half a piece more, rather than leave it over."""
    end = builder.add(first, _INT(PIECE))
    return builder.select(builder.icmp_signed("<", builder.add(end, _INT(PIECE // 2)), depth), end, depth)


def _sums_of_piece(
    builder: ir.IRBuilder, first: Any, end: Any, a_rows: list[Any], a_step: Any, b_starts: list[Any]
) -> list[list[Any]]:
    """The terms from ``first`` to ``end`` of rows of a times vectors of b. What is built next comes after the loop."""
    before = builder.block
    loop = builder.append_basic_block("depth")
    after = builder.append_basic_block("piece_end")
    builder.branch(loop)

    builder.position_at_end(loop)
    k = builder.phi(_INT)
    k.add_incoming(first, before)
    sums = [[builder.phi(_VECTOR) for _ in b_starts] for _ in a_rows]
    b_row = builder.mul(k, _INT(PANEL))
    b_vectors = [_load(builder, builder.gep(start, [b_row])) for start in b_starts]
    a_column = builder.mul(k, a_step)
    for i, row in enumerate(a_rows):
        element = _spread(builder, builder.load(builder.gep(row, [a_column])))
        for j, vector in enumerate(b_vectors):
            total = _multiply_add(builder, element, vector, sums[i][j])
            sums[i][j].add_incoming(ir.Constant(_VECTOR, None), before)
            sums[i][j].add_incoming(total, loop)
            sums[i][j] = total
    following = builder.add(k, _INT(1))
    k.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, end), loop, after)

    builder.position_at_end(after)
    return sums


def _prefetch(builder: ir.IRBuilder, address: Any) -> None:
    number = ir.IntType(32)
    address = builder.bitcast(address, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [address, number(0), number(3), number(1)])  # to read, into all levels, data


def _straight_line(builder: ir.IRBuilder, matrix: Sequence[Sequence[Fraction]], inputs: list[Any]) -> list[Any]:
    """``matrix @ inputs`` without loops and without multiplying by 0 and 1.

    Points come in pairs +p and -p, so columns or rows come in pairs that differ in some signs only. A pair of columns
    (u, v) needs only u + v and u - v from then on; a pair of rows shares its sums of equal and of opposite terms.
    """
    columns = [list(column) for column in zip(*matrix, strict=True)]
    inputs = list(inputs)
    for u, v in _pairs(columns):
        inputs[u], inputs[v] = builder.fadd(inputs[u], inputs[v]), builder.fsub(inputs[u], inputs[v])
        for i in range(len(matrix)):
            x, y = columns[u][i], columns[v][i]
            columns[u][i], columns[v][i] = (x, Fraction(0)) if x == y else (Fraction(0), x)
    rows = [list(row) for row in zip(*columns, strict=True)]
    outputs: list[Any] = [None] * len(rows)
    for i, j in _pairs(rows):
        same = _dot(builder, [x if x == y else Fraction(0) for x, y in zip(rows[i], rows[j], strict=True)], inputs)
        opposite = _dot(builder, [x if x != y else Fraction(0) for x, y in zip(rows[i], rows[j], strict=True)], inputs)
        outputs[i], outputs[j] = builder.fadd(same, opposite), builder.fsub(same, opposite)
    return [_dot(builder, row, inputs) if value is None else value for row, value in zip(rows, outputs, strict=True)]


def _pairs(rows: list[list[Fraction]]) -> list[tuple[int, int]]:
    """Rows that are alike but for signs, with terms of both kinds; each row in one pair at most."""
    pairs: list[tuple[int, int]] = []
    for i in range(len(rows)):
        for j in range(i + 1, len(rows)):
            taken = any(i in pair or j in pair for pair in pairs)
            terms = [(x, y) for x, y in zip(rows[i], rows[j], strict=True) if x or y]
            alike = all(abs(x) == abs(y) for x, y in terms)
            if not taken and alike and any(x == y for x, y in terms) and any(x != y for x, y in terms):
                pairs.append((i, j))
    return pairs


def _dot(builder: ir.IRBuilder, row: Sequence[Fraction], inputs: Sequence[Any]) -> Any:
    total = None
    for coefficient, value in sorted(zip(row, inputs, strict=True), key=lambda term: abs(term[0]) != 1):
        if coefficient == 0:
            continue
        if total is None:
            total = value if coefficient == 1 else builder.fmul(value, _constant(coefficient, value.type))
        elif coefficient == 1:
            total = builder.fadd(total, value)
        elif coefficient == -1:
            total = builder.fsub(total, value)
        else:
            total = _multiply_add(builder, value, _constant(coefficient, value.type), total)
    return ir.Constant(inputs[0].type, None) if total is None else total


def _multiply_add(builder: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    return builder.fadd(builder.fmul(x, y, flags=_FUSE), z, flags=_FUSE)


def _constant(value: Fraction, kind: ir.VectorType) -> ir.Constant:
    return ir.Constant(kind, [ir.Constant(kind.element, float(value))] * LANES)


def _converted(builder: ir.IRBuilder, vector: Any, kind: ir.VectorType) -> Any:
    """The vector in single or in double precision."""
    if vector.type == kind:
        return vector
    return builder.fpext(vector, kind) if kind == _WIDE else builder.fptrunc(vector, kind)


def _spread(builder: ir.IRBuilder, value: Any) -> Any:
    """One number in all places of a vector."""
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.IntType(32)(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), LANES), None))


def _data(context: Any, builder: ir.IRBuilder, kind: Any, array: Any) -> Any:
    return context.make_array(kind)(context, builder, array).data


def _load(builder: ir.IRBuilder, pointer: Any) -> Any:
    kind = ir.VectorType(pointer.type.pointee, LANES)
    vector = builder.load(builder.bitcast(pointer, kind.as_pointer()))
    vector.align = 4
    return vector


def _store(builder: ir.IRBuilder, vector: Any, pointer: Any) -> None:
    builder.store(vector, builder.bitcast(pointer, vector.type.as_pointer())).align = 4
