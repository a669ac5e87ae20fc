"""Values on an even grid, each as its place there: what `quantize` and `ms` have in common.

A tensor is seen as (outer, groups, inner): each group has a scale s and a zero point z of its own, and a code c stands
for (c − z)·s.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from zsplit.codec.tensors import from_bytes, to_bytes

BLOCK = 2**17
"""Elements that are worked on at a time: they stay in the cache between one operation and the next."""


class Grid(NamedTuple):
    """Scale (working type) and zero point (uint8) of each group."""

    scale: Tensor
    zero: Tensor

    def to_bytes(self) -> list[Tensor]:
        return [to_bytes(self.scale), self.zero]

    @classmethod
    def from_bytes(cls, data: Tensor, dtype: torch.dtype) -> "Grid":
        groups = len(data) // (dtype.itemsize + 1)
        return cls(from_bytes(data[:-groups], dtype), data[-groups:])


def scale_of(low: Tensor, high: Tensor, steps: int) -> Tensor:
    """Return (high − low) / steps, computed in float64 and rounded once; the largest number there is at most."""
    scale = (high.double() - low.double()) / steps
    return scale.clamp(max=torch.finfo(low.dtype).max).to(low.dtype)


def ratio(x: Tensor, scale: Tensor) -> Tensor:
    """Return x / scale, where a scale of 0 leaves x: then all values are 0, or round to it."""
    return x / torch.where(scale == 0, 1, scale)


def place(x: Tensor, grid: Grid, last: int, rounding: str, codes: Tensor, seed: int | None = None) -> None:
    """Write the codes 0 … last of `x` (outer, groups, inner) to `codes` (flat uint8).

    `rounding` is `nearest` (half to even), `floor`, or `stochastic`, which without a seed is `nearest`.
    """
    scale, zero = torch.where(grid.scale == 0, 1, grid.scale)[:, None], grid.zero.to(x.dtype)[:, None]
    out, generator, shifted = codes[: x.numel()].view(x.shape), None, bool(grid.zero.any())
    if rounding == "stochastic" and seed is not None:
        generator = torch.Generator(x.device).manual_seed(seed)
    for part in blocks(x.shape):
        group = part[1]
        at = x[part] / scale[group]
        if generator is not None:
            at.add_(torch.rand(at.shape, dtype=at.dtype, device=at.device, generator=generator)).floor_()
        elif rounding == "floor":
            at.floor_()
        else:
            at.round_()
        if shifted:
            at.add_(zero[group])
        out[part] = at.clamp_(0, last)


def values(codes: Tensor, shape: tuple[int, int, int], grid: Grid) -> Tensor:
    """Return what flat codes stand for, as (outer, groups, inner) in the type of the scale."""
    scale, zero = grid.scale[:, None], grid.zero.to(grid.scale.dtype)[:, None]
    x = torch.empty(shape, dtype=grid.scale.dtype, device=codes.device)
    read, shifted = codes.view(shape), bool(grid.zero.any())
    for part in blocks(shape):
        at = x[part].copy_(read[part])
        if shifted:
            at.sub_(zero[part[1]])
        at.mul_(scale[part[1]])
    return x


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice, slice]]:
    """Yield a tensor's parts of about `BLOCK` elements, cut along its longest way that is not within a group."""
    outer, groups, inner = shape
    everything = slice(None)
    if groups == 1:
        yield from ((everything, everything, part) for part in _cut(inner, BLOCK // outer))
    elif outer > 1:
        yield from ((part, everything, everything) for part in _cut(outer, BLOCK // (groups * inner)))
    else:
        yield from ((everything, part, everything) for part in _cut(groups, BLOCK // inner))


def _cut(length: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(at, at + size) for at in range(0, length, size))
