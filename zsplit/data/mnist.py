"""MNIST and the digits of the package: IDX files, read where they lie.

IDX is two zero bytes, a type, the number of dimensions, each dimension as a big-endian 32-bit integer, then the bytes
(yann.lecun.com/exdb/mnist, "FILE FORMATS").
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from zsplit.data.files import Place, damaged, open_file
from zsplit.data.images import Data, Pixels, Scale
from zsplit.data.labels import UNKNOWN, Labels

UNSIGNED_BYTE = 8

# Mean and deviation of the training images themselves (a test computes them again).
DIGITS = Scale(16, (0.3051,), (0.3762,))
# PyTorch's MNIST example (pytorch/examples, mnist/main.py): those of the training images.
MNIST = Scale(255, (0.1307,), (0.3081,))

FILES = (
    "MNIST/raw/train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte, as they are or .gz"
)

HELD_OUT_EVERY = 5


def open_digits() -> Data:
    """Return the digits that ship in the package, one in five of each class to test on."""
    folder = Path(__file__).parent
    pixels = read_idx(folder / "digits-images-idx3-ubyte.gz", 3).unsqueeze(1)
    labels = read_idx(folder / "digits-labels-idx1-ubyte.gz", 1).to(torch.int64)
    held_out = _every_fifth_of_its_class(labels)
    train, test = (Pixels(pixels[mask], labels[mask], DIGITS) for mask in (~held_out, held_out))
    return Data(train, test, (1, 8, 8), 10)


def open_mnist(place: Place, labels: bool) -> Data:
    """Return MNIST; without `labels`, their files are not looked for. Raises `DataError`."""
    return Data(_part(place, "train", labels), _part(place, "t10k", labels), (1, 28, 28), 10)


def open_mnist_labels(place: Place) -> Labels:
    """Return MNIST's labels alone; no file of images is looked for. Raises `DataError`."""
    return Labels(_labels(place, "train"), _labels(place, "t10k"))


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


def _every_fifth_of_its_class(labels: Tensor) -> Tensor:
    """Return the mask of the test images: in each class the fifth, tenth, … in the file's order."""
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        held_out[(labels == label).nonzero().squeeze(1)[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]] = True
    return held_out


def _part(place: Place, prefix: str, labels: bool) -> Pixels:
    path = _file(place, prefix, "images-idx3-ubyte")
    pixels = read_idx(path, 3).unsqueeze(1)
    found = _labels(place, prefix) if labels else torch.full((len(pixels),), UNKNOWN)
    if not len(pixels) == len(found) > 0:
        raise damaged(path, f"{len(pixels)} images, {len(found)} labels")
    return Pixels(pixels, found, MNIST)


def _labels(place: Place, prefix: str) -> Tensor:
    return read_idx(_file(place, prefix, "labels-idx1-ubyte"), 1).to(torch.int64)


def _file(place: Place, prefix: str, kind: str) -> Path:
    return place.find("MNIST/raw", (f"{prefix}-{kind}", f"{prefix}-{kind}.gz"))


def _content(path: Path) -> bytes:
    with open_file(path) as file:
        try:
            return gzip.decompress(file.read()) if path.suffix == ".gz" else file.read()
        except (OSError, EOFError, zlib.error) as error:
            raise damaged(path, str(error)) from error
