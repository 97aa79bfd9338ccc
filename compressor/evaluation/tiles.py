"""The matrix unit of x86 CPUs (Intel AMX, Intel's Optimization Manual, chapter 20) from numba.

The unit has eight tiles of 16 rows of 64 bytes. Numbers 0 to 3 hold a block of 32 rows by 32 columns of
fp32 sums, 4 and 5 hold 32 rows by 32 bf16 numbers of the left factor, 6 and 7 as much of the right one,
whose rows are pairs of numbers (``pack_pairs``). All functions but ``usable`` are for numba's compiled
code, take addresses and strides in bytes, and act on the tiles of the thread, which ``begin`` sets up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, update_wrapper
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from compressor.evaluation.kernels import EXP2

TILE_ROWS = 16
TILE_BYTES = 1024
_LOG2_E = math.log2(math.e)
_LEAST_POWER = -126.0
_LANES = 16
_WORDS = ir.VectorType(ir.IntType(32), _LANES)
_HALF_WORDS = ir.VectorType(ir.IntType(16), _LANES)
_FLOATS = ir.VectorType(ir.FloatType(), _LANES)
_HALF_WORD = ir.Constant(_WORDS, [16] * _LANES)
_ROW, _HALF_ROW = 64, 32
"""Bytes of a tile's row: a vector of fp32; of as many bf16 numbers."""
_BLOCK_BYTES = 2 * _ROW
"""Bytes of a row of a block of sums."""

LAYOUT = np.zeros(64, np.uint8)
"""What ``begin`` loads: palette 1, eight tiles of 16 rows of 64 bytes."""
LAYOUT[0] = 1
LAYOUT[16:32].view(np.uint16)[:] = 64
LAYOUT[48:56] = TILE_ROWS

llvm.initialize_native_asmparser()
_Builder = Any


def _instruction(*kinds: Any, result: Any = types.none) -> Callable[[Callable[..., Any]], Any]:
    """A function for compiled code, with arguments of these kinds, from one that generates what it does."""

    def decorated(generate: Callable[..., Any]) -> Any:
        def typed(typing_context: Any, *_: Any) -> tuple[Any, Any]:
            del typing_context

            def lowered(context: Any, builder: _Builder, signature: Any, operands: Any) -> Any:
                del signature
                value = generate(builder, *operands)
                return context.get_dummy_value() if value is None else value

            return result(*kinds), lowered

        return intrinsic(update_wrapper(typed, generate))

    return decorated


@cache
def usable() -> bool:
    """Whether this CPU has the unit, for bf16, and the system lets this process use it."""
    features = llvm.get_host_cpu_features()
    has = all(features.get(name, False) for name in ("amx-tile", "amx-bf16", "avx512bf16"))
    return has and torch.cpu._init_amx()


def _assembly(builder: _Builder, lines: list[str], *operands: Any) -> None:
    """Inline assembly of these lines, which name their operands $0, $1, ..."""
    kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
    constraints = ",".join([*("r" for _ in operands), "~{memory}"])
    builder.asm(kind, "\n".join(lines), constraints, operands, side_effect=True)


def _number(value: int) -> Any:
    return ir.Constant(ir.IntType(64), value)


@_instruction(types.intp)
def begin(builder: _Builder, layout: Any) -> None:
    """Set the thread's tiles up as ``LAYOUT``, at that address, says."""
    _assembly(builder, ["ldtilecfg ($0)"], layout)


@_instruction()
def end(builder: _Builder) -> None:
    """Give the tiles back: a thread that holds them is slower to switch to and from."""
    _assembly(builder, ["tilerelease"])


@_instruction()
def clear_sums(builder: _Builder) -> None:
    """Set the block's sums to 0."""
    _assembly(builder, [f"tilezero %tmm{tile}" for tile in range(4)])


@_instruction(types.intp, types.intp, types.intp)
def add_products(builder: _Builder, left: Any, stride: Any, right: Any) -> None:
    """Add to the block's sums 32 numbers of each row of ``left`` times those of each column of ``right``.

    ``right`` are two packed tiles. They pass the first cache by (t1), where the rows of ``left``, which are
    needed again for the next columns, then stay.
    """
    below = builder.add(left, builder.mul(stride, _number(TILE_ROWS)))
    lines = [
        "tileloadd ($0,$2,1), %tmm4",
        "tileloaddt1 ($3,$4,1), %tmm6",
        "tdpbf16ps %tmm6, %tmm4, %tmm0",
        f"tileloaddt1 {TILE_BYTES}($3,$4,1), %tmm7",
        "tdpbf16ps %tmm7, %tmm4, %tmm1",
        "tileloadd ($1,$2,1), %tmm5",
        "tdpbf16ps %tmm6, %tmm5, %tmm2",
        "tdpbf16ps %tmm7, %tmm5, %tmm3",
    ]
    _assembly(builder, lines, left, below, stride, right, _number(_ROW))


@_instruction(types.intp, types.intp)
def store_sums(builder: _Builder, target: Any, stride: Any) -> None:
    """Store the block's sums as fp32 [32, 32]."""
    below = builder.add(target, builder.mul(stride, _number(TILE_ROWS)))
    lines = [
        "tilestored %tmm0, ($0,$2,1)",
        f"tilestored %tmm1, {_ROW}($0,$2,1)",
        "tilestored %tmm2, ($1,$2,1)",
        f"tilestored %tmm3, {_ROW}($1,$2,1)",
    ]
    _assembly(builder, lines, target, below, stride)


@_instruction(types.intp, types.intp, types.intp)
def pack_pairs(builder: _Builder, source: Any, stride: Any, target: Any) -> None:
    """Transpose 16 rows of 16 pairs of bf16 numbers into a tile, as the right factor is to lie."""
    offsets = [builder.mul(stride, _number(row)) for row in range(TILE_ROWS)]
    rows = [_loaded(builder, _WORDS, builder.add(source, offset)) for offset in offsets]
    for distance in (1, 2, 4, 8):  # exchange the off-diagonal squares of that size
        rows = [_exchanged(builder, rows, row, distance) for row in range(TILE_ROWS)]
    for row, value in enumerate(rows):
        _stored(builder, value, builder.add(target, _number(row * _ROW)))


def _exchanged(builder: _Builder, rows: list[Any], row: int, distance: int) -> Any:
    """A row after its square of that size and that of its partner, ``distance`` away, changed places."""
    partner = row ^ distance
    high = bool(row & distance)
    lanes = []
    for lane in range(_LANES):
        own = bool(lane & distance) == high
        lanes.append(lane if own else (lane ^ distance) + _LANES)
    return builder.shuffle_vector(rows[row], rows[partner], ir.Constant(_WORDS, lanes))


@_instruction(types.intp, types.intp)
def copy_32(builder: _Builder, source: Any, target: Any) -> None:
    """Copy 32 bf16 numbers."""
    _stored(builder, _loaded(builder, _WORDS, source), target)


@_instruction(types.intp, types.intp)
def fetch(builder: _Builder, source: Any, size: Any) -> None:
    """Bring so many bytes, a multiple of 64, into the second cache while other work goes on."""
    with cgutils.for_range(builder, builder.sdiv(size, _number(_ROW))) as loop:
        place = builder.add(source, builder.mul(loop.index, _number(_ROW)))
        _assembly(builder, ["prefetcht1 ($0)"], place)


@_instruction(types.intp, types.intp)
def round_32(builder: _Builder, source: Any, target: Any) -> None:
    """Store 32 fp32 numbers as bf16, ties to even."""
    _stored(builder, _rounded(builder, *_both(builder, source)), target)


@_instruction(types.intp, types.intp, types.intp)
def add_32(builder: _Builder, source: Any, added: Any, target: Any) -> None:
    """Store 32 fp32 numbers, plus as many bf16 ones, as bf16."""
    others = (_widened(builder, builder.add(added, _number(offset))) for offset in (0, _HALF_ROW))
    totals = (builder.fadd(*pair) for pair in zip(_both(builder, source), others, strict=True))
    _stored(builder, _rounded(builder, *totals), target)


@_instruction(types.intp, types.float32, types.intp)
def scale_32(builder: _Builder, source: Any, factor: Any, target: Any) -> None:
    """Store 32 fp32 numbers times a factor as bf16."""
    factors = _everywhere(builder, factor)
    scaled = (builder.fmul(values, factors) for values in _both(builder, source))
    _stored(builder, _rounded(builder, *scaled), target)


@_instruction(types.intp, types.intp)
def gate_16(builder: _Builder, source: Any, target: Any) -> None:
    """Store silu(gate) * up as bf16, of 16 fp32 gates and the 16 numbers that follow them."""
    gates, ups = _both(builder, source)
    decay = _exp2(builder, builder.fmul(gates, _floats(-_LOG2_E)))
    silu = builder.fdiv(gates, builder.fadd(decay, _floats(1.0)))
    kind = ir.FunctionType(_HALF_WORDS, [_FLOATS])
    gated = builder.fmul(silu, ups)
    rounded = builder.asm(kind, "vcvtneps2bf16 $1, $0", "=v,v", [gated], side_effect=False)
    _stored(builder, rounded, target)


@_instruction(types.intp, types.intp, types.intp, types.intp, types.float32, types.intp)
def rotate_32(builder: _Builder, source: Any, half: Any, cos: Any, sin: Any, scale: Any, target: Any) -> None:
    """Rotary embedding, times ``scale``, of 32 bf16 numbers and of those ``half`` bytes after them."""
    scales, firsts, seconds = _everywhere(builder, scale), [], []
    for offset in (0, _HALF_ROW):
        pairs = []
        for base in (source, cos, sin):
            place = builder.add(base, _number(offset))
            pairs.append((_widened(builder, place), _widened(builder, builder.add(place, half))))
        (x, y), (cos_x, cos_y), (sin_x, sin_y) = pairs
        x, y = builder.fmul(x, scales), builder.fmul(y, scales)
        firsts.append(builder.fsub(builder.fmul(x, cos_x), builder.fmul(y, sin_x)))
        seconds.append(builder.fadd(builder.fmul(y, cos_y), builder.fmul(x, sin_y)))
    _stored(builder, _rounded(builder, *firsts), target)
    _stored(builder, _rounded(builder, *seconds), builder.add(target, half))


@_instruction(types.intp, types.intp, types.intp)
def pair_16(builder: _Builder, first: Any, second: Any, target: Any) -> None:
    """Store 16 bf16 numbers of a row and of the next in pairs: a row of a tile of a right factor."""
    low, high = (builder.zext(_loaded(builder, _HALF_WORDS, row), _WORDS) for row in (first, second))
    _stored(builder, builder.or_(low, builder.shl(high, _HALF_WORD)), target)


@_instruction(types.intp, types.intp, types.intp)
def hide(builder: _Builder, scores: Any, hidden: Any, blocks: Any) -> None:
    """Add 0 or minus infinity to blocks of 32 scores in place."""
    with cgutils.for_range(builder, blocks) as loop:
        offset = builder.mul(loop.index, _number(_BLOCK_BYTES))
        place, source = (builder.add(base, offset) for base in (scores, hidden))
        for half, (score, added) in enumerate(
            zip(_both(builder, place), _both(builder, source), strict=True)
        ):
            _stored(builder, builder.fadd(score, added), builder.add(place, _number(half * _ROW)))


@_instruction(types.intp, types.intp, result=types.float32)
def largest(builder: _Builder, source: Any, blocks: Any) -> Any:
    """The largest of blocks of 32 fp32 numbers, those that are no numbers left out."""
    most = cgutils.alloca_once_value(builder, _floats(-math.inf))
    with cgutils.for_range(builder, blocks) as loop:
        place = builder.add(source, builder.mul(loop.index, _number(_BLOCK_BYTES)))
        for values in _both(builder, place):
            builder.store(_larger(builder, values, builder.load(most)), most)
    reduce = _vector_function(builder, "vector.reduce.fmax", ir.FloatType(), _FLOATS)
    return builder.call(reduce, [builder.load(most)])


@_instruction(types.intp, types.intp, types.float32, result=types.float32)
def sum_exponentials(builder: _Builder, source: Any, blocks: Any, shift: Any) -> Any:
    """The sum of e ** (value - shift) over blocks of 32 values."""
    return _exponentials(builder, source, blocks, shift, None)


@_instruction(types.intp, types.intp, types.float32, types.intp, result=types.float32)
def store_exponentials(builder: _Builder, source: Any, blocks: Any, shift: Any, target: Any) -> Any:
    """The same, and store them as bf16."""
    return _exponentials(builder, source, blocks, shift, target)


def _exponentials(builder: _Builder, source: Any, blocks: Any, shift: Any, target: Any) -> Any:
    shifts = _everywhere(builder, shift)
    total = cgutils.alloca_once_value(builder, _floats(0.0))
    with cgutils.for_range(builder, blocks) as loop:
        results = []
        for values in _both(builder, builder.add(source, builder.mul(loop.index, _number(_BLOCK_BYTES)))):
            powers = builder.fmul(builder.fsub(values, shifts), _floats(_LOG2_E))
            results.append(_exp2(builder, _larger(builder, _floats(_LEAST_POWER), powers)))
        builder.store(builder.fadd(builder.load(total), builder.fadd(*results)), total)
        if target is not None:
            place = builder.add(target, builder.mul(loop.index, _number(_ROW)))
            _stored(builder, _rounded(builder, *results), place)
    reduce = _vector_function(builder, "vector.reduce.fadd", ir.FloatType(), ir.FloatType(), _FLOATS)
    zero = ir.Constant(ir.FloatType(), 0.0)
    return builder.call(reduce, [zero, builder.load(total)], fastmath=("reassoc",))


def _everywhere(builder: _Builder, value: Any) -> Any:
    """A vector of one number."""
    first = builder.insert_element(_floats(0.0), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, first, ir.Constant(_WORDS, [0] * _LANES))


def _widened(builder: _Builder, address: Any) -> Any:
    """16 bf16 numbers as fp32."""
    words = builder.zext(_loaded(builder, _HALF_WORDS, address), _WORDS)
    return builder.bitcast(builder.shl(words, _HALF_WORD), _FLOATS)


def _larger(builder: _Builder, ones: Any, others: Any) -> Any:
    """The larger of each pair; the other where one is no number."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS, _FLOATS])
    return builder.asm(kind, "vmaxps $2, $1, $0", "=v,v,v", [ones, others], side_effect=False)


def _exp2(builder: _Builder, powers: Any) -> Any:
    """2 to these powers."""
    floor = _vector_function(builder, "floor", _FLOATS, _FLOATS)
    fma = _vector_function(builder, "fma", _FLOATS, _FLOATS, _FLOATS, _FLOATS)
    whole = builder.call(floor, [powers])
    part = builder.fsub(powers, whole)
    result = _floats(float(EXP2[0]))
    for coefficient in EXP2[1:]:
        result = builder.call(fma, [result, part, _floats(float(coefficient))])
    kind = ir.FunctionType(_FLOATS, [_FLOATS, _FLOATS])
    return builder.asm(kind, "vscalefps $2, $1, $0", "=v,v,v", [result, whole], side_effect=False)


def _vector_function(builder: _Builder, name: str, result: Any, *kinds: Any) -> Any:
    """LLVM's function of that name for 16 fp32 numbers."""
    kind = ir.FunctionType(result, kinds)
    name = f"llvm.{name}.v{_LANES}f32"
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, kind, name)


def _rounded(builder: _Builder, low: Any, high: Any) -> Any:
    """Two vectors of fp32 as one of bf16."""
    kind = ir.FunctionType(_WORDS, [_FLOATS, _FLOATS])
    return builder.asm(kind, "vcvtne2ps2bf16 $1, $2, $0", "=v,v,v", [low, high], side_effect=False)


def _both(builder: _Builder, address: Any) -> list[Any]:
    """Two vectors of fp32."""
    return [_loaded(builder, _FLOATS, builder.add(address, _number(offset))) for offset in (0, _ROW)]


def _floats(value: float) -> Any:
    return ir.Constant(_FLOATS, [value] * _LANES)


def _loaded(builder: _Builder, kind: Any, address: Any) -> Any:
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = 2
    return value


def _stored(builder: _Builder, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=2)
