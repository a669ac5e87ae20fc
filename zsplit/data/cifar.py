"""CIFAR-10 and CIFAR-100 (Python version): pickles, read out of their archive or beside it; nothing is unpacked.

The reader makes arrays and nothing else, whatever the pickle asks for.
"""

import pickle
import tarfile
import zlib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zsplit.data.files import Place, damaged, open_file
from zsplit.data.images import Data, Pixels, Scale

# Each those of the 50,000 training images, over all pixels of a channel.
CIFAR10 = Scale(255, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100 = Scale(255, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))

# What a pickled array of bytes needs, under the names of numpy 1 and 2.
ARRAY_PARTS = {
    ("numpy.core.multiarray", "_reconstruct"): "numpy._core.multiarray",
    ("numpy._core.multiarray", "_reconstruct"): "numpy._core.multiarray",
    ("numpy", "ndarray"): "numpy",
    ("_codecs", "encode"): "_codecs",
}

Batch = tuple[Tensor, Tensor]
"""Pixels (N, 3, 32, 32) in uint8, labels (N,) in int64."""


class Layout(NamedTuple):
    """Where the images are: the archive, the folder in it, the batches of each part, the key of the labels."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str
    scale: Scale
    classes: int


LAYOUT10 = Layout(
    "cifar-10-python.tar.gz",
    "cifar-10-batches-py",
    tuple(f"data_batch_{number}" for number in range(1, 6)),
    ("test_batch",),
    "labels",
    CIFAR10,
    10,
)
LAYOUT100 = Layout(
    "cifar-100-python.tar.gz", "cifar-100-python", ("train",), ("test",), "fine_labels", CIFAR100, 100
)  # fmt: skip

FILES10 = "cifar-10-python.tar.gz, or what is in it: cifar-10-batches-py/data_batch_1 to data_batch_5 and test_batch"
FILES100 = "cifar-100-python.tar.gz, or what is in it: cifar-100-python/train and test"


def open_cifar(layout: Layout, place: Place) -> Data:
    """Return the images, from the files beside the archive where they are there. Raises `DataError`."""
    names = (*layout.train, *layout.test)
    archive = place.look(".", (layout.archive,))
    beside = all(place.look(layout.folder, (name,)) for name in names)
    if archive and not beside:
        batches = _from_archive(archive, layout, names)
    else:
        batches = {name: _from_file(place.find(layout.folder, (name,)), layout.labels) for name in names}
    train, test = (_part([batches[name] for name in part], layout.scale) for part in (layout.train, layout.test))
    return Data(train, test, (3, 32, 32), layout.classes)


def _part(batches: Sequence[Batch], scale: Scale) -> Pixels:
    pixels, labels = zip(*batches, strict=True)
    return Pixels(torch.cat(pixels), torch.cat(labels), scale)


def _from_file(path: Path, key: str) -> Batch:
    with open_file(path) as file:
        return _batch(file, path, key)


def _from_archive(archive: Path, layout: Layout, names: Sequence[str]) -> dict[str, Batch]:
    wanted = {f"{layout.folder}/{name}": name for name in names}
    found: dict[str, Batch] = {}
    try:
        # A stream: each byte is decompressed once.
        with open_file(archive) as file, tarfile.open(fileobj=file, mode="r|gz") as members:
            for member in members:
                content = members.extractfile(member) if member.name in wanted else None
                if content is not None:
                    found[wanted[member.name]] = _batch(content, archive / member.name, layout.labels)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise damaged(archive, str(error)) from error
    missing = [name for name in names if name not in found]
    if missing:
        raise damaged(archive, f"{missing[0]} is not in it")
    return found


def _batch(file: IO[bytes], path: Path, key: str) -> Batch:
    try:
        batch = _ArrayUnpickler(file, encoding="latin1").load()
        pixels, labels = torch.from_numpy(batch["data"]), torch.tensor(batch[key])
        pixels = pixels.view(-1, 3, 32, 32)
    # A damaged pickle can raise nearly anything.
    except Exception as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    if pixels.dtype != torch.uint8 or labels.dtype != torch.int64 or labels.shape != pixels.shape[:1]:
        raise damaged(path, "pixels and labels do not match")
    return pixels, labels


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
