"""Codes of a few bits, packed without a gap.

Codes of b bits are cut into parts of 8, 4, 2 and 1 bits, as the binary digits of b say, from the lowest bits on. Parts
of w bits fill n = w·⌈d/8⌉ bytes, in planes: byte j has those of the codes j, j + n, j + 2n, …, the first in its lowest
bits. So all is done on long runs of bytes, whatever b is.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

WIDTHS = (8, 4, 2, 1)


def empty_codes(count: int, device: torch.device) -> Tensor:
    """Return room for so many codes of one byte each, rounded up to whole eights; what is beyond is zero."""
    codes = torch.empty(-(-count // 8) * 8, dtype=torch.uint8, device=device)
    codes[count:] = 0
    return codes


def pack(codes: Tensor, bits: int) -> list[Tensor]:
    """Return the bytes of codes (uint8, from `empty_codes`) below 2^bits, in pieces that follow each other."""
    return [_join(codes, first, width, bits) for first, width in _parts(bits)]


def unpack(data: Tensor, count: int, bits: int) -> Tensor:
    """Return `count` codes of one byte each from their bytes."""
    eights = -(-count // 8)
    codes = torch.empty(eights * 8, dtype=torch.uint8, device=data.device)
    for first, width in _parts(bits):
        _part(data[eights * first : eights * (first + width)], codes, first, width)
    return codes[:count]


def pack_whole(numbers: Tensor, bits: int) -> Tensor:
    """Return the bytes of whole numbers (int64), each below 2^bits, of any number of bits up to 63."""
    count = len(numbers) * bits
    digits = empty_codes(count, numbers.device)
    each = torch.arange(bits, device=numbers.device)
    digits[:count] = ((numbers[:, None] >> each) & 1).to(torch.uint8).view(-1)
    return pack(digits, 1)[0]


def unpack_whole(data: Tensor, count: int, bits: int) -> Tensor:
    """Return `count` whole numbers (int64) from their bytes."""
    each = torch.arange(bits, device=data.device)
    digits = unpack(data, count * bits, 1).view(count, bits)
    return (digits.to(torch.int64) << each).sum(dim=1)


def _parts(bits: int) -> Iterator[tuple[int, int]]:
    """Yield the first bit and the width of each part of a code."""
    first = 0
    for width in WIDTHS:
        if bits & width:
            yield first, width
            first += width


def _join(codes: Tensor, first: int, width: int, bits: int) -> Tensor:
    """Return the bytes of one part of each code."""
    if width == 8:
        return codes
    planes = [_cut(plane, first, width, bits) for plane in codes.view(8 // width, -1)]
    data = planes[0].clone()
    for i, plane in enumerate(planes[1:], 1):
        data |= plane << (i * width)
    return data


def _cut(plane: Tensor, first: int, width: int, bits: int) -> Tensor:
    """Return a part of codes of so many bits; nothing has to be masked above the last part."""
    part = plane >> first if first else plane
    return part & ((1 << width) - 1) if first + width < bits else part


def _part(data: Tensor, codes: Tensor, first: int, width: int) -> None:
    """Write a part of each code where it is the first, else add it."""
    planes = codes.view(8 // width, -1)
    for i, plane in enumerate(planes):
        part = _cut(data, i * width, width, 8)
        if first:
            plane |= part << first
        else:
            plane.copy_(part)
