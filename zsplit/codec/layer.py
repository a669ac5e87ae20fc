"""A codec as a layer of a model: what it makes of a tensor, in plain torch operations that exporters can follow."""

from math import inf

import torch
from torch import Tensor, nn

from zsplit.codec import ms, quantize
from zsplit.codec.grid import Grid
from zsplit.codec.half import narrow, widen
from zsplit.codec.tensors import working
from zsplit.errors import ConfigError
from zsplit.spec import Half, Ms, Quantize, RandTopK, Raw, Spec, TopK, parse
from zsplit.spec.sizes import share
from zsplit.spec.stages import Values


class CodecLayer(nn.Module):
    """Takes smashed data, the batch first, and gives what comes out of the codec at the other end: the same bits.

    Nothing is random, as in an evaluation: `randtopk` is `topk`, stochastic rounding is to the nearest. `lz4` loses
    nothing and so does nothing here. How many values are kept of a whole tensor follows from the shape of each batch,
    so that a graph of this takes batches of any size. Values that are infinite or not numbers, which codecs that
    compare values refuse, are not looked for. Raises ConfigError for a spec that is none, and for `mask`.
    """

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.spec: Spec = parse(spec)
        if self.spec.answers:
            raise ConfigError(
                f'The codec "{spec}" cannot be a layer, since mask needs the tensor that this one answers: '
                "take the codec of the smashed data."
            )

    def forward(self, x: Tensor) -> Tensor:
        values, select = self.spec.values, self.spec.select
        if isinstance(values, Ms):
            return _masked(values, x)
        if not isinstance(select, TopK | RandTopK):
            return _written(values, x)
        keep = _largest(select, x).reshape(x.shape)
        # The grid of the kept values is that of these and zeros, since zero is on every grid.
        return torch.where(keep, _written(values, torch.where(keep, x, 0)), 0)


def _written(stage: Values, x: Tensor) -> Tensor:
    match stage:
        case Half():
            return widen(narrow(stage, x), x.dtype)
        case Quantize():
            return _quantized(stage, x)
        case Raw() | Ms():
            return x


def _quantized(stage: Quantize, x: Tensor) -> Tensor:
    wide, last = x.to(working(x.dtype)), 2**stage.bits - 1
    within = [way for way in range(x.dim()) if way != 1 or stage.scope == "tensor"]
    low, high = wide.amin(within, keepdim=True), wide.amax(within, keepdim=True)
    grid = quantize.grid_of(low, high, last, torch.finfo(x.dtype).max)
    return _on_grid(wide, grid, last, "nearest").to(x.dtype)


def _masked(stage: Ms, x: Tensor) -> Tensor:
    keep = _largest(stage, x)
    rows = x.to(working(x.dtype)).reshape(keep.shape)
    last, magnitude = 2**stage.bits - 1, rows.abs()
    low = torch.where(keep, 0, rows).amin(1, keepdim=True).clamp(max=0)
    threshold = torch.where(keep, magnitude, inf).amin(1, keepdim=True)
    threshold = torch.where(threshold == inf, magnitude.amax(1, keepdim=True), threshold)  # nothing is kept
    coarse = _on_grid(rows, ms.grid_of(low, threshold, last), last - 1, stage.round).to(x.dtype)
    return torch.where(keep.reshape(x.shape), x, coarse.reshape(x.shape))


def _largest(stage: TopK | RandTopK | Ms, x: Tensor) -> Tensor:
    """Return which values are the largest of their row, (rows, width); ties go to the lowest position."""
    magnitude = x.abs().reshape(x.shape[0] if stage.scope == "sample" else 1, -1)
    count = share(stage, magnitude.shape[1])
    # Sorted values are the same in every runtime, the order of equal ones is not: no positions are taken from here.
    best_first = magnitude.sort(dim=1, descending=True).values
    first = torch.arange(magnitude.shape[1], device=x.device) < count
    threshold = torch.where(first, best_first, inf).amin(1, keepdim=True)
    above, equal = magnitude > threshold, magnitude == threshold
    return above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))


def _on_grid(x: Tensor, grid: Grid, last: int, rounding: str) -> Tensor:
    """Return what the codes 0 … last of x stand for."""
    zero = grid.zero.to(x.dtype)
    at = x / torch.where(grid.scale == 0, 1, grid.scale)
    at = at.floor() if rounding == "floor" else at.round()
    return ((at + zero).clamp(0, last) - zero) * grid.scale
