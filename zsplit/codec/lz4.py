"""`lz4`: bytes compressed without loss, or not at all. The frame's first byte says how.

A sample decides: bytes as they are, bytes shuffled (the first of every item, then the second, …: exponents are alike
where values are not), or nothing where neither saves enough to be worth the time.
"""

import torch

from zsplit.codec.tensors import tensor_of
from zsplit.errors import RemoteProtocolError

STORED, PLAIN, SHUFFLED = 0, 1, 2

PIECES, PIECE = 8, 8 * 1024
"""What is tried first: so many pieces of so many bytes, spread over the frame."""

WORTH = 0.95
"""Nothing is compressed whose sample keeps more than this share of its size."""


def squeeze(data: memoryview, itemsize: int) -> memoryview:
    """Return the frame of these bytes: one byte longer at most."""
    how = _choose(data, itemsize)
    if how != STORED:
        small = _compress(_shuffled(data, itemsize) if how == SHUFFLED else data)
        if len(small) < len(data):
            return _joined(how, small)
    return _joined(STORED, data)


def expand(frame: memoryview, size: int, itemsize: int) -> memoryview:
    """Return the `size` bytes that a frame holds; not a byte more is ever written.

    Raises RemoteProtocolError where it holds something else.
    """
    how, body = frame[0] if frame.nbytes else -1, frame[1:]
    if how == STORED and body.nbytes == size:
        return body
    if how not in (PLAIN, SHUFFLED) or (how == SHUFFLED and size % itemsize):
        raise RemoteProtocolError(f"An lz4 frame of {frame.nbytes} bytes cannot hold {size} bytes")
    data = _decompress(body, size)
    return _shuffled(data, size // itemsize) if how == SHUFFLED else data


def _choose(data: memoryview, itemsize: int) -> int:
    if data.nbytes <= PIECES * PIECE:
        pieces = [data]
    else:
        step = (data.nbytes - PIECE) // (PIECES - 1) // itemsize * itemsize
        pieces = [data[at * step : at * step + PIECE] for at in range(PIECES)]
    whole = [piece[: piece.nbytes // itemsize * itemsize] for piece in pieces]
    sizes = {PLAIN: sum(len(_compress(piece)) for piece in pieces)}
    if itemsize > 1 and not data.nbytes % itemsize:
        sizes[SHUFFLED] = sum(len(_compress(_shuffled(piece, itemsize))) for piece in whole)
    best = min(sizes, key=lambda how: sizes[how])
    return best if sizes[best] < WORTH * sum(piece.nbytes for piece in pieces) else STORED


def _joined(how: int, body: memoryview) -> memoryview:
    frame = bytearray(1 + len(body))
    frame[0], frame[1:] = how, body
    return memoryview(frame)


def _shuffled(data: memoryview, itemsize: int) -> memoryview:
    """Return the bytes with those of all items that have the same place side by side.

    With the number of items in place of their size it is the way back.
    """
    rows = tensor_of(data, torch.uint8).view(-1, itemsize)
    view: memoryview = rows.t().contiguous().view(-1).numpy().data
    return view


def _compress(data: memoryview) -> memoryview:
    import lz4.block

    return memoryview(lz4.block.compress(data, store_size=False, return_bytearray=True))


def _decompress(body: memoryview, size: int) -> memoryview:
    import lz4.block

    try:
        data = lz4.block.decompress(body, uncompressed_size=size, return_bytearray=True)
    except lz4.block.LZ4BlockError as error:
        raise RemoteProtocolError(f"An lz4 frame does not hold {size} bytes ({error})") from error
    if len(data) != size:
        raise RemoteProtocolError(f"An lz4 frame holds {len(data)} bytes in place of {size}")
    return memoryview(data)
