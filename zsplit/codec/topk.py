"""`topk`, `randtopk` and `mask`: which values of a tensor travel, and how the other end knows their places."""

from math import prod

import torch
from torch import Tensor

from zsplit.codec.bits import empty_codes, pack, pack_whole, unpack, unpack_whole
from zsplit.codec.context import Context
from zsplit.codec.largest import Largest, places
from zsplit.errors import LocalProtocolError, RemoteProtocolError
from zsplit.spec import RandTopK, TopK
from zsplit.spec.sizes import groups, index_bits, packed, positions, share


def choose(stage: TopK | RandTopK, x: Tensor, seed: int | None) -> Tensor:
    """Return the positions to keep in the flat tensor, ascending. Without a seed `randtopk` is `topk`."""
    rows = x.view(groups(stage.scope, x.shape), -1)
    count = share(stage, rows.shape[1])
    best = Largest(rows, count).kept
    if isinstance(stage, TopK) or seed is None or count in (0, rows.shape[1]):
        return best
    return _exchanged(best.view(-1, count), rows.shape[1], float(stage.alpha), seed)


def _exchanged(best: Tensor, width: int, alpha: float, seed: int) -> Tensor:
    """Return the positions with some of each row's best (rows, count) exchanged for others, all equally likely.

    Each of the count draws is one of the others with probability alpha, so their number is binomial.
    """
    generator = torch.Generator(best.device).manual_seed(seed)
    rows, count = best.shape

    def draws(*shape: int) -> Tensor:
        return torch.rand(*shape, device=best.device, generator=generator)

    others = (draws(rows, count) < alpha).sum(1, keepdim=True).clamp(max=width - count)
    stays = draws(rows, count).argsort(1).argsort(1) >= others
    keep = torch.zeros(rows * width, dtype=torch.bool, device=best.device)
    lots = draws(rows * width)
    lots[best.view(-1)] = -1  # the best have had their turn
    most = int(others.max())
    drawn = lots.view(rows, width).topk(most).indices + torch.arange(rows, device=best.device)[:, None] * width
    keep[best[stays]] = True
    keep[drawn[torch.arange(most, device=best.device) < others]] = True
    return places(keep)


def write(stage: TopK | RandTopK, shape: tuple[int, ...], kept: Tensor) -> Tensor:
    """Return the positions as bytes: a bit for each element, or each position packed, whichever is less."""
    rows, d = groups(stage.scope, shape), prod(shape)
    if packed(d, 1) <= positions(stage, shape):
        marks = empty_codes(d, kept.device).zero_()
        marks[kept] = 1
        return pack(marks, 1)[0]
    return pack_whole(kept % (d // rows), index_bits(d // rows))


def read(stage: TopK | RandTopK, data: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the positions that bytes of the right length hold. Raises RemoteProtocolError where they cannot be."""
    rows, d = groups(stage.scope, shape), prod(shape)
    width = d // rows
    count = share(stage, width)
    if packed(d, 1) <= positions(stage, shape):
        kept = places(unpack(data, d, 1).view(torch.bool))
        if len(kept) != rows * count:
            raise RemoteProtocolError(f"A bitmap marks {len(kept)} values, its frame has {rows * count}")
        return kept
    within = unpack_whole(data, rows * count, index_bits(width)).view(rows, count)
    if within.numel() and (int(within.max()) >= width or bool((within.diff(dim=1) <= 0).any())):
        raise RemoteProtocolError(f"The positions of a frame are not ascending within {width}")
    return (within + torch.arange(rows, device=data.device)[:, None] * width).view(-1)


def kept_before(shape: tuple[int, ...], context: Context, device: torch.device, ours: bool) -> Tensor:
    """Return the positions that were kept of the tensor that one of this shape answers.

    Raises LocalProtocolError where it is ours and there are none, RemoteProtocolError where it came.
    """
    if context.kept is None or context.shape != shape:
        found = "kept none" if context.kept is None else f"is {list(context.shape)}"
        kind = LocalProtocolError if ours else RemoteProtocolError
        raise kind(f'"mask" has no positions for a tensor of {list(shape)}: what it answers {found}')
    return context.kept.to(device)
