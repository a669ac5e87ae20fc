"""`quantize`: values as codes of b bits on an even grid. Asymmetric, with zero on the grid, so that zeros stay zeros.

lo = min(0, min x), hi = max(0, max x), s = (hi − lo) / (2^b − 1), z = round(−lo/s); x gets the code round(x/s) + z and
comes back as (code − z)·s, no further than s/2 away.
"""

from math import prod

import torch
from torch import Tensor

from zsplit.codec.bits import empty_codes, pack, unpack
from zsplit.codec.grid import Grid, place, ratio, scale_of, values
from zsplit.codec.limits import refuse_infinite
from zsplit.codec.tensors import working
from zsplit.spec import Quantize
from zsplit.spec.sizes import groups, parameters


def write(stage: Quantize, x: Tensor, seed: int | None) -> list[Tensor]:
    """Return the pieces of a frame: parameters, codes. `seed` is for stochastic rounding; without one it is nearest."""
    x3 = x.to(working(x.dtype)).view(_grouped(stage, x.shape))
    last = 2**stage.bits - 1
    low, high = _extremes(x3)
    refuse_infinite(low, high)
    grid = grid_of(low, high, last, torch.finfo(x.dtype).max)
    codes = empty_codes(x.numel(), x.device)
    place(x3, grid, last, stage.round, codes, seed)
    return [*grid.to_bytes(), *pack(codes, stage.bits)]


def read(stage: Quantize, data: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the tensor that a frame of the right length holds."""
    grouped = _grouped(stage, shape)
    size = parameters(grouped[1], dtype.itemsize)
    grid = Grid.from_bytes(data[:size], working(dtype))
    codes = unpack(data[size:], prod(shape), stage.bits)
    return values(codes, grouped, grid).view(shape).to(dtype)


def _grouped(stage: Quantize, shape: tuple[int, ...]) -> tuple[int, int, int]:
    count = groups(stage.scope, shape)
    outer = shape[0] if count > 1 else 1
    return outer, count, prod(shape) // (outer * count)


def grid_of(low: Tensor, high: Tensor, last: int, most: float) -> Grid:
    """Return the grid of groups with these least and largest values. No code may stand for more than `most`."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = scale_of(low, high, last)
    zero = ratio(-low, scale).round().clamp(0, last)
    farthest = torch.maximum(zero, last - zero)
    return Grid(torch.minimum(scale, most / farthest), zero.to(torch.uint8))


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest value of each group of (outer, groups, inner)."""
    if x.shape[1] == 1:
        low, high = x.aminmax()
        return low[None], high[None]
    return x.amin((0, 2)), x.amax((0, 2))
