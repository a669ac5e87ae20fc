"""MATLAB's MAT-files of level 5: one array of numbers out of them, all else skipped.

After a head of 128 bytes come elements of a type, a length and that many bytes. A variable is an element of the type
matrix, which holds elements of its own: flags, dimensions, name, numbers, column by column. It may lie compressed
(zlib) in an element of its own. (MathWorks, "MAT-File Format", chapter 1.)
"""

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zsplit.data.files import damaged, open_file

HEAD = 128
ORDERS = {b"IM": "<", b"MI": ">"}
"""Byte order of numbers by the last two bytes of the head."""

MATRIX, COMPRESSED = 14, 15
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8"}
"""numpy's name of the numbers of an element, by its type."""

LEAD = 256
"""Bytes of a compressed variable in which its name is looked for."""


class Element(NamedTuple):
    """A stretch of numbers or bytes: its type and contents, and where the next one begins."""

    kind: int
    content: memoryview
    end: int


def read_mat(path: Path, name: str) -> Tensor:
    """Return the array of real numbers that a file has under a name, its dimensions in reverse, as the bytes lie.

    Raises `DataError` where the file cannot be read, is damaged or has no such array.
    """
    with open_file(path) as file:
        try:
            order = ORDERS[file.read(HEAD)[-2:]]
            for kind, content in _variables(file, order):
                if kind in (MATRIX, COMPRESSED) and (array := _array(content, kind, order, name)) is not None:
                    return array
        except KeyError as error:
            raise damaged(path, "it is no MAT-file of level 5, or has numbers of an unknown type") from error
        except (struct.error, zlib.error, ValueError) as error:
            raise damaged(path, str(error)) from error
    raise damaged(path, f"it has no variable {name}")


def _variables(file: BinaryIO, order: str) -> Iterator[tuple[int, bytes]]:
    while head := file.read(8):
        kind, length = struct.unpack(f"{order}II", head)
        content = file.read(length)
        if len(content) != length:
            raise ValueError("it ends within a variable")
        yield kind, content


def _array(content: bytes, kind: int, order: str, name: str) -> Tensor | None:
    """Return the array of a variable; None where it has another name, which is seen without decompressing it all."""
    if kind == COMPRESSED:
        lead = zlib.decompressobj().decompress(content, LEAD)
        if _name(memoryview(lead)[8:], order) != name:
            return None
        content = _decompressed(content, order)
    elif _name(memoryview(content), order) != name:
        return None
    return _numbers(memoryview(content), order)


def _decompressed(content: bytes, order: str) -> bytes:
    """Return the contents of a compressed matrix: no more than its head says."""
    stream = zlib.decompressobj()
    kind, length = struct.unpack(f"{order}II", stream.decompress(content, 8))
    if kind != MATRIX:
        raise ValueError("a compressed variable is no matrix")
    return stream.decompress(stream.unconsumed_tail, length) if length else b""


def _name(matrix: memoryview, order: str) -> str:
    """Return the name of a matrix, of which the beginning is enough."""
    dimensions = _element(matrix, _element(matrix, 0, order).end, order)
    return bytes(_element(matrix, dimensions.end, order).content).decode("latin1")


def _numbers(matrix: memoryview, order: str) -> Tensor:
    dimensions = _element(matrix, _element(matrix, 0, order).end, order)
    label = _element(matrix, dimensions.end, order)
    shape = np.frombuffer(dimensions.content, f"{order}i4")[::-1].tolist()
    real = _element(matrix, label.end, order)
    numbers = np.frombuffer(real.content, f"{order}{NUMBERS[real.kind]}")
    if len(numbers) != math.prod(shape):
        raise ValueError(f"{math.prod(shape)} numbers should follow, {len(numbers)} do")
    return torch.from_numpy(numbers.reshape(shape).astype(numbers.dtype.newbyteorder("=")))


def _element(matrix: memoryview, begin: int, order: str) -> Element:
    """Return the element that begins there: up to four bytes lie within its head, others after it, filled up to 8."""
    (word,) = struct.unpack_from(f"{order}I", matrix, begin)
    if word >> 16:
        kind, length, first, end = word & 0xFFFF, word >> 16, begin + 4, begin + 8
    else:
        (length,) = struct.unpack_from(f"{order}I", matrix, begin + 4)
        kind, first = word, begin + 8
        end = first + -(-length // 8) * 8
    content = matrix[first : first + length]
    if len(content) != length:
        raise ValueError("it ends within a variable")
    return Element(kind, content, end)
