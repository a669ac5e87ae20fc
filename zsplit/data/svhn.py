"""SVHN, cropped digits: MAT-files of images `X` (32, 32, 3, N) and labels `y` (N, 1), in which 10 is the digit 0."""

from pathlib import Path

import torch
from torch import Tensor

from zsplit.data.files import Place, damaged
from zsplit.data.images import Data, Pixels, Scale
from zsplit.data.labels import UNKNOWN, Labels
from zsplit.data.mat import read_mat

# Those of the 73,257 training images, over all pixels of a channel.
SVHN = Scale(255, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))

FILES = "train_32x32.mat and test_32x32.mat"


def open_svhn(place: Place, labels: bool) -> Data:
    """Return SVHN; without `labels`, they are not read. Raises `DataError`."""
    return Data(_part(place, "train", labels), _part(place, "test", labels), (3, 32, 32), 10)


def open_svhn_labels(place: Place) -> Labels:
    """Return SVHN's labels alone; the images are not decompressed. Raises `DataError`."""
    return Labels(_labels(_file(place, "train")), _labels(_file(place, "test")))


def _part(place: Place, name: str, labels: bool) -> Pixels:
    path = _file(place, name)
    images = read_mat(path, "X")
    if images.dtype != torch.uint8 or images.shape[1:] != (3, 32, 32):
        raise damaged(path, f"X has the shape {tuple(images.shape[::-1])} and the type {images.dtype}")
    found = _labels(path) if labels else torch.full((len(images),), UNKNOWN)
    if not len(images) == len(found) > 0:
        raise damaged(path, f"{len(images)} images, {len(found)} labels")
    # Column by column: what varies fastest are the rows.
    return Pixels(images.transpose(2, 3).contiguous(), found, SVHN)


def _labels(path: Path) -> Tensor:
    return read_mat(path, "y").flatten().to(torch.int64) % 10


def _file(place: Place, name: str) -> Path:
    return place.find(".", (f"{name}_32x32.mat",))
