"""Labels apart from their samples: for a server that has them, and for clients that are to have none."""

from typing import cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from zsplit.data.images import Data, Pixels, Samples
from zsplit.data.sources import Folder

UNKNOWN = -1
"""Stands in the place of a label that this peer does not have."""


def labels_of(dataset: Samples, ids: Tensor) -> Tensor:
    """Return the labels (B,), int64, of the samples at these positions (B,), without the inputs where that can be."""
    match dataset:
        case Pixels(labels=labels):
            return labels[ids]
        case TensorDataset(tensors=(_, labels)):
            return labels[ids].to(torch.int64)
        case Folder(samples=samples):
            return torch.tensor([samples[index][1] for index in ids.tolist()])
        case _:
            return torch.tensor([int(dataset[index][1]) for index in ids.tolist()])


def without_labels(data: Data) -> Data:
    """Return the same samples, each with the label −1."""
    return Data(_unlabelled(data.train), _unlabelled(data.test), data.shape, data.classes)


def _unlabelled(dataset: Samples) -> Samples:
    match dataset:
        case Pixels(pixels=pixels, scale=scale):
            return Pixels(pixels, _unknown(len(pixels)), scale)
        case TensorDataset(tensors=(inputs, _)):
            return cast(Samples, TensorDataset(inputs, _unknown(len(inputs))))
        case _:
            return Unlabelled(dataset)


def _unknown(count: int) -> Tensor:
    return torch.full((count,), UNKNOWN)


class Unlabelled(Dataset[tuple[Tensor, int]]):
    """A dataset that keeps what it knows of its labels to itself."""

    def __init__(self, dataset: Samples) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._dataset[index][0], UNKNOWN
