"""Labels apart from the images: read alone for a server that joins them by sample, or left out for its clients."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from zsplit.data.images import Data, Images, Samples, sample_of

UNKNOWN = -1
"""The label of a sample whose label is not here."""


@dataclass(frozen=True)
class Labels:
    """The labels of all training and of all test samples, each of shape (N,) and type int64."""

    train: Tensor
    test: Tensor

    @classmethod
    def of(cls, data: Data) -> "Labels":
        """Return the labels of these samples."""
        return cls(labels_of(data.train), labels_of(data.test))


class Unlabelled(Dataset[tuple[Tensor, int]]):
    """Samples whose labels are dropped as soon as they are read."""

    def __init__(self, dataset: Samples) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return sample_of(self._dataset, index)[0], UNKNOWN


def labels_of(dataset: Samples) -> Tensor:
    """Return all labels, shape (N,), int64: where nothing else tells them, every sample is read."""
    match dataset:
        case Images(labels=labels):
            return labels
        case TensorDataset(tensors=(_, labels)):
            return labels.to(torch.int64)
        case Subset():
            inner: Any = dataset.dataset
            return labels_of(inner)[torch.as_tensor(dataset.indices)]
    targets = getattr(dataset, "targets", None)
    if targets is None or getattr(dataset, "target_transform", None) is not None:
        targets = [sample_of(dataset, index)[1] for index in range(len(dataset))]
    return torch.as_tensor(targets, dtype=torch.int64)


def without_labels(dataset: Samples) -> Samples:
    """Return the same samples, each with the label −1."""
    match dataset:
        case Images(labels=labels):
            return dataset.labelled(torch.full_like(labels, UNKNOWN))
        case TensorDataset(tensors=(x, labels)):
            return TensorDataset(x, torch.full(labels.shape, UNKNOWN))
        case _:
            return Unlabelled(dataset)


def unlabelled(data: Data) -> Data:
    """Return the same data without labels."""
    return replace(data, train=without_labels(data.train), test=without_labels(data.test))
