"""Which values of a tensor are largest in magnitude: exactly, ties to the lowest position."""

import torch
from torch import Tensor

from zsplit.codec.limits import refuse_infinite

SAMPLE = 2**15
"""Values by which a threshold is guessed where a row is long."""

LONG = 2**18
"""From this length on a guess is worth it."""

FOLDS = 8
"""Values of a long row that are looked at together: only where their largest is above the threshold, one by one."""


class Largest:
    """The `count` largest |x| of each row of `x` (rows, width), `count` from 0 to width.

    `kept` are their positions in the flat tensor, row by row, ascending. Raises RunFailedError for values that are not
    finite.
    """

    def __init__(self, x: Tensor, count: int) -> None:
        self._x, self._columns = x, torch.empty(0)
        rows, width = x.shape
        if rows == 1 and width >= LONG and 0 < count <= width // 4 and self._fold(x[0], count):
            return
        low, high = x.aminmax() if x.numel() else (torch.zeros(1), torch.zeros(1))
        refuse_infinite(low, high)
        self.kept = _exact(x.abs(), count)

    def lowest_other(self) -> Tensor:
        """Return for each row the smallest of the values that are not among the largest, 0 where none is negative."""
        if len(self._columns):
            others = self._values.clone()
            others[self._chosen] = 0
            return torch.minimum(others.amin(), self._columns.amin()).clamp(max=0)[None]
        others = self._x.clone()
        others.view(-1)[self.kept] = 0
        return others.amin(1).clamp(max=0)

    def _fold(self, row: Tensor, count: int) -> bool:
        """Find the largest among those above a threshold that a sample suggests; return whether there are enough.

        The row is folded; a column whose largest is below the threshold is done with.
        """
        width = len(row) // FOLDS
        folded = row[: width * FOLDS].view(FOLDS, width)
        low, high = folded.amin(0), folded.amax(0)
        refuse_infinite(low.amin(), high.amax(), row[width * FOLDS :])
        threshold = _guess(row, count)
        hit = torch.maximum(high, -low) >= threshold
        columns = hit.nonzero()[:, 0]
        tail = torch.arange(width * FOLDS, len(row), device=row.device)
        self._values = torch.cat([folded.index_select(1, columns).view(-1), row[width * FOLDS :]])
        above = (self._values.abs() >= threshold).nonzero()[:, 0]
        if len(above) < count:
            return False
        self._chosen = above[_exact(self._values.take(above).abs()[None], count)]
        self._columns = low.masked_fill_(hit, 0)
        self.kept = _unfolded(self._chosen, columns, width, tail)
        return True


def _unfolded(chosen: Tensor, columns: Tensor, width: int, tail: Tensor) -> Tensor:
    """Return the positions in the row of what was chosen from columns and, behind them, the tail."""
    within = chosen[chosen < FOLDS * len(columns)]
    behind = chosen[len(within) :] - FOLDS * len(columns)
    count = max(1, len(columns))
    return torch.cat([within // count * width + columns[within % count], tail[behind]])


def _guess(row: Tensor, count: int) -> Tensor:
    """Return a threshold that a few more values than `count` are likely to reach."""
    sample = row[:: len(row) // SAMPLE].abs()
    share = len(sample) * count / len(row)
    rank = min(len(sample), int(share + 4 * share**0.5) + 8)
    return sample.topk(rank, sorted=False).values.amin()


def _exact(magnitude: Tensor, count: int) -> Tensor:
    """Return the positions of the `count` largest of each row."""
    rows, width = magnitude.shape
    if count in (0, width):
        return torch.arange(rows * count, device=magnitude.device)
    threshold = magnitude.topk(count, sorted=False).values.amin(1, keepdim=True)
    keep = magnitude >= threshold
    if int(keep.sum()) > rows * count:
        above = magnitude > threshold
        equal = keep & ~above
        keep = above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))
    return places(keep.view(-1))


def places(marked: Tensor) -> Tensor:
    """Return the positions of what is true in a flat bool tensor: by eights, since most of these are all false."""
    whole = len(marked) // 8 * 8
    eights = marked[:whole].view(torch.int64).nonzero()[:, 0]
    found = marked[:whole].view(-1, 8).index_select(0, eights).nonzero()
    positions = eights[found[:, 0]] * 8 + found[:, 1]
    return torch.cat([positions, marked[whole:].nonzero()[:, 0] + whole])
