"""`ms`, mask-encoded sparsification: a mask of b bits for each value says which are sent exactly, and what the rest is.

For the d elements of a tensor (or of each sample): T are the k = ⌊(1 − r)·d⌋ of largest magnitude, ties to the lowest
position; L = 2^b − 1; τ = min |x_T| (max |x| where k = 0); lo = min(0, the smallest of the rest); s = (τ − lo)/L;
z = min(round(−lo/s), (L − 1) div 2). The rest gets the code clamp(round(x/s) + z, 0, L − 1) and comes back as
(code − z)·s; T gets the code L and its exact values. Under `round=floor` the code has ⌊x/s⌋.

After "Mask-Encoded Sparsification" (ECAI 2024), whose values are not negative: then lo = z = 0.
"""

from math import prod

import torch
from torch import Tensor

from zsplit.codec.bits import empty_codes, pack, unpack
from zsplit.codec.context import Context
from zsplit.codec.grid import Grid, place, ratio, scale_of, values
from zsplit.codec.largest import Largest, places
from zsplit.codec.tensors import from_bytes, to_bytes, working
from zsplit.errors import RemoteProtocolError
from zsplit.spec import Ms
from zsplit.spec.sizes import groups, packed, parameters, share


def write(stage: Ms, x: Tensor, context: Context) -> list[Tensor]:
    """Return the pieces of a frame: parameters, codes, exact values. What was kept goes into the context."""
    rows = x.to(working(x.dtype)).view(groups(stage.scope, x.shape), -1)
    best = Largest(rows, share(stage, rows.shape[1]))
    codes = empty_codes(x.numel(), x.device)
    last = 2**stage.bits - 1
    grid = _grid(rows, best, last)
    place(rows[None], grid, last - 1, stage.round, codes)
    codes[best.kept] = last
    context.keep(tuple(x.shape), best.kept)
    return [*grid.to_bytes(), *pack(codes, stage.bits), to_bytes(x.view(-1).take(best.kept))]


def read(stage: Ms, data: Tensor, shape: tuple[int, ...], dtype: torch.dtype, context: Context) -> Tensor:
    """Return the tensor that a frame of the right length holds; what was kept goes into the context.

    Raises RemoteProtocolError where the mask marks more or fewer values than there are.
    """
    d, rows = prod(shape), groups(stage.scope, shape)
    count, size = rows * share(stage, d // rows), parameters(rows, dtype.itemsize)
    codes = unpack(data[size : size + packed(d, stage.bits)], d, stage.bits)
    kept = places(codes == 2**stage.bits - 1)
    if len(kept) != count:
        raise RemoteProtocolError(f"A mask marks {len(kept)} values, its frame has {count}")
    grid = Grid.from_bytes(data[:size], working(dtype))
    x = values(codes, (1, rows, d // rows), grid).view(-1).to(dtype)
    x[kept] = from_bytes(data[size + packed(d, stage.bits) :], dtype)
    context.keep(shape, kept)
    return x.view(shape)


def _grid(rows: Tensor, best: Largest, last: int) -> Grid:
    low = best.lowest_other()
    exact = rows.take(best.kept).view(len(rows), -1).abs()
    threshold = exact.amin(1) if exact.shape[1] else rows.abs().amax(1)
    return grid_of(low, threshold, last)


def grid_of(low: Tensor, threshold: Tensor, last: int) -> Grid:
    """Return the grid of groups with these lo and τ; `last` is L."""
    scale = scale_of(low, threshold, last)
    zero = ratio(-low, scale).round().clamp(max=(last - 1) // 2)
    return Grid(scale, zero.to(torch.uint8))
