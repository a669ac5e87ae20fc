"""How many bytes a tensor takes in a codec: a function of spec, shape and item size, `lz4` excepted.

A frame is the tensor's parameters (none in most codecs), its codes or positions, then its values. d is the number of
elements, k of those that are kept, b the bits of a code.
"""

from collections.abc import Sequence
from math import prod

from zsplit.spec.stages import Half, Mask, Ms, Quantize, RandTopK, Raw, Scope, Spec, TopK, Values

SCALE = 4
"""Bytes of a scale, and of the arithmetic of codes: float32, or the tensor's own where that is wider."""


def nbytes(spec: Spec, shape: Sequence[int], itemsize: int, count: int = 0) -> int:
    """Return the bytes of a frame, before `lz4`. `count` is the number of values that `mask` has kept."""
    if not prod(shape):
        return 0
    match spec.select:
        case None:
            return _values(spec.values, shape, itemsize)
        case Mask():
            return _values(spec.values, (count,), itemsize)
        case TopK() | RandTopK() as select:
            return positions(select, shape) + _values(spec.values, (kept(spec, shape),), itemsize)


def bounds(spec: Spec, shape: Sequence[int], itemsize: int) -> tuple[int, int]:
    """Return the fewest and the most bytes that a frame can have; with `lz4` a byte says how it was compressed."""
    most = nbytes(spec, shape, itemsize, prod(shape))
    least = 0 if spec.answers else most
    if not spec.lz4 or not prod(shape):
        return least, most
    return 1, most + 1


def kept(spec: Spec, shape: Sequence[int]) -> int:
    """Return how many elements a codec that keeps some keeps of a tensor, 0 where it keeps none."""
    for stage in (spec.select, spec.values):
        if isinstance(stage, TopK | RandTopK | Ms):
            count = groups(stage.scope, shape)
            return count * share(stage, prod(shape) // count) if count else 0
    return 0


def share(stage: TopK | RandTopK | Ms, elements: int) -> int:
    """Return k, ⌊(1 − ratio) · elements⌋, in whole numbers alone: `elements` may be one that torch has yet to know."""
    kept = 1 - stage.ratio
    return elements * kept.numerator // kept.denominator


def groups(scope: Scope, shape: Sequence[int]) -> int:
    """Return how many parts of a tensor are each treated by themselves."""
    if scope == "sample" and len(shape) > 0:
        return shape[0]
    return shape[1] if scope == "channel" and len(shape) > 1 else 1


def positions(stage: TopK | RandTopK, shape: Sequence[int]) -> int:
    """Return the bytes of the positions: a bit for each element, or each position packed, whichever is less."""
    rows = groups(stage.scope, shape)
    width = prod(shape) // rows
    return min(packed(prod(shape), 1), packed(rows * share(stage, width) * index_bits(width), 1))


def index_bits(elements: int) -> int:
    """Return the bits of a position among so many elements."""
    return max(1, (elements - 1).bit_length())


def packed(count: int, bits: int) -> int:
    """Return the bytes of so many codes of so many bits: eight codes are never cut apart."""
    return -(-count // 8) * bits


def parameters(count: int, itemsize: int) -> int:
    """Return the bytes of so many scales and zero points."""
    return count * (max(SCALE, itemsize) + 1)


def _values(stage: Values, shape: Sequence[int], itemsize: int) -> int:
    d = prod(shape)
    match stage:
        case Raw():
            return d * itemsize
        case Half():
            return d * 2
        case Quantize(bits=bits, scope=scope):
            return parameters(groups(scope, shape), itemsize) + packed(d, bits) if d else 0
        case Ms(bits=bits, scope=scope):
            rows = groups(scope, shape)
            return parameters(rows, itemsize) + packed(d, bits) + rows * share(stage, d // rows) * itemsize
