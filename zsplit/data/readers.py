"""The files that image sets come in, read where they lie: nothing is unpacked, nothing is written.

IDX is MNIST's format: two zero bytes, a type, the number of dimensions, each dimension as a big-endian
32-bit integer, then the bytes. CIFAR's batches are pickles; the reader here makes arrays and nothing else.
"""

import gzip
import math
import pickle
import struct
import zlib
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsplit.errors import DataError

UNSIGNED_BYTE = 8

# What a pickled array of bytes needs, under the names of numpy 1 and 2.
ARRAY_PARTS = {
    ("numpy.core.multiarray", "_reconstruct"): "numpy._core.multiarray",
    ("numpy._core.multiarray", "_reconstruct"): "numpy._core.multiarray",
    ("numpy", "ndarray"): "numpy",
    ("_codecs", "encode"): "_codecs",
}


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Return an IDX file of unsigned bytes, gzip'd where its name ends in `.gz`, as a tensor of its shape.

    Raises `DataError` where the file cannot be read, is damaged, or has another number of dimensions.
    """
    content = _content(path)
    try:
        zeros, kind, found = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{found}I", content, 4)
    except struct.error as error:
        raise damaged(path, "it ends within its head") from error
    if (zeros, kind, found) != (0, UNSIGNED_BYTE, dimensions):
        raise damaged(path, f"it is no IDX file of bytes in {dimensions} dimensions")
    head = 4 + 4 * found
    if len(content) - head != math.prod(shape):
        raise damaged(path, f"{math.prod(shape)} bytes should follow its head, {len(content) - head} do")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[head:].view(shape)


def read_cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Return one batch of CIFAR-10 (Python version): pixels (N, 3, 32, 32) in uint8, labels (N,) in int64.

    Raises `DataError` where the file cannot be read or is damaged, or would make anything but arrays.
    """
    with _opened(path) as file:
        try:
            batch = _ArrayUnpickler(file, encoding="latin1").load()
            pixels, labels = torch.from_numpy(batch["data"]), torch.tensor(batch["labels"])
            pixels = pixels.view(-1, 3, 32, 32)
        # A damaged pickle can raise nearly anything.
        except Exception as error:
            raise damaged(path, f"{type(error).__name__}: {error}") from error
    if pixels.dtype != torch.uint8 or labels.dtype != torch.int64 or labels.shape != pixels.shape[:1]:
        raise damaged(path, "pixels and labels do not match")
    return pixels, labels


def damaged(path: Path, why: str) -> DataError:
    """Return the error for a file whose contents are not what they should be."""
    return DataError(f"{path} is damaged ({why}): fetch it again.")


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "dtype"):
            return _dtype
        if (module, name) not in ARRAY_PARTS:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return getattr(import_module(ARRAY_PARTS[module, name]), name)


def _dtype(name: str, align: int = 0, copy: int = 0) -> np.dtype[Any]:
    # The original files have numbers there, at which numpy 2.4.0 to 2.4.4 warn.
    return np.dtype(name, bool(align), bool(copy))


def _content(path: Path) -> bytes:
    with _opened(path) as file:
        try:
            return gzip.decompress(file.read()) if path.suffix == ".gz" else file.read()
        except (OSError, EOFError, zlib.error) as error:
            raise damaged(path, str(error)) from error


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): mend that.") from error
