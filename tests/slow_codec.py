"""The codecs again, one number at a time: plain Python on float32 scalars, with nothing of zsplit in it.

What a codec does to a tensor (`ms`, `quantize`, `largest`) and the bytes of its frame, for golden tests and for the
reference of a run that applies a codec in its graph.
"""

from collections.abc import Sequence
from decimal import Decimal
from math import floor
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

F32 = np.float32
Rounding = Literal["nearest", "floor"]


class Coded(NamedTuple):
    """What became of a row of numbers: codes, scale, zero point, positions that were kept, and what comes back."""

    codes: list[int]
    scale: float
    zero: int
    kept: list[int]
    decoded: list[float]


def keeps(ratio: str, d: int) -> int:
    """Return ⌊(1 − r)·d⌋ in decimal arithmetic."""
    return int((1 - Decimal(ratio)) * d)


def largest(x: Sequence[float], k: int) -> list[int]:
    """Return the positions of the k largest |x|, ties to the lowest, ascending."""
    return sorted(sorted(range(len(x)), key=lambda i: (-abs(x[i]), i))[:k])


def ms(x: Sequence[float], ratio: str, bits: int, rounding: Rounding = "nearest") -> Coded:
    """Mask-encoded sparsification of one row, as the issue states it."""
    kept = largest(x, keeps(ratio, len(x)))
    rest = [value for i, value in enumerate(x) if i not in set(kept)]
    levels = 2**bits - 1
    tau = min((abs(x[i]) for i in kept), default=max(map(abs, x)))
    low = min([0.0, *rest])
    s = F32((tau - low) / levels)
    z = min(round(float(F32(-low) / s)), (levels - 1) // 2) if s else 0
    codes, decoded = [], []
    for i, value in enumerate(x):
        if i in set(kept):
            codes.append(levels)
            decoded.append(float(value))
            continue
        at = float(F32(value) / s) if s else 0.0
        code = max(0, min((floor(at) if rounding == "floor" else round(at)) + z, levels - 1))
        codes.append(code)
        decoded.append(float(F32(code - z) * s))
    return Coded(codes, float(s), z, kept, decoded)


def quantize(x: Sequence[float], bits: int) -> Coded:
    """Affine quantisation of one group, zero on the grid."""
    low, high, levels = min([0.0, *x]), max([0.0, *x]), 2**bits - 1
    s = F32((high - low) / levels)
    z = min(round(float(F32(-low) / s)), levels) if s else 0  # the smallest floats have a scale that is rounded a lot
    codes = [max(0, min(round(float(F32(value) / s)) + z, levels)) if s else z for value in x]
    return Coded(codes, float(s), z, [], [float(F32(code - z) * s) for code in codes])


def packed(codes: Sequence[int], bits: int) -> bytes:
    """Return codes as bytes: parts of 8, 4, 2 and 1 bits from the lowest on, each in planes."""
    padded = [*codes, *[0] * (-len(codes) % 8)]
    out, first = b"", 0
    for width in (8, 4, 2, 1):
        if bits & width:
            planes = 8 // width
            count = len(padded) // planes
            parts = [(code >> first) % 2**width for code in padded]
            out += bytes(sum(parts[j + i * count] << (i * width) for i in range(planes)) for j in range(count))
            first += width
    return out


def ms_frame(x: Sequence[float], ratio: str, bits: int, rounding: Rounding = "nearest") -> bytes:
    """Return the frame of one row: scale, zero point, codes, exact values."""
    coded = ms(x, ratio, bits, rounding)
    head = F32(coded.scale).tobytes() + bytes([coded.zero])
    return head + packed(coded.codes, bits) + np.array([x[i] for i in coded.kept], dtype=F32).tobytes()


def quantize_frame(x: Sequence[float], bits: int) -> bytes:
    """Return the frame of a tensor that is one group."""
    coded = quantize(x, bits)
    return F32(coded.scale).tobytes() + bytes([coded.zero]) + packed(coded.codes, bits)


class SlowMs(torch.autograd.Function):
    """A layer that makes of its input what comes out of `ms`, and lets gradients through at the kept positions only.

    That is what a run does whose smashed data go up by `ms` and whose gradients come down by `mask`.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, ratio: str, bits: int) -> Tensor:  # type: ignore[override]
        coded = ms(x.detach().reshape(-1).tolist(), ratio, bits)
        ctx.kept = coded.kept  # type: ignore[attr-defined]
        return torch.tensor(coded.decoded, dtype=x.dtype).reshape(x.shape)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        masked = torch.zeros_like(gradient).reshape(-1)
        masked[ctx.kept] = gradient.reshape(-1)[ctx.kept]  # type: ignore[attr-defined]
        return masked.reshape(gradient.shape), None, None
