"""Datasets and configs for the tests of what clients see, each set up in a line."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from zsplit.config import Config, load_config
from zsplit.data import Data, from_datasets
from zsplit.data.images import Pixels
from zsplit.seeds import derive

SHARED = os.environ.get("ZSPLIT_TEST_DATA", "")
needs_shared = pytest.mark.skipif(not SHARED, reason="ZSPLIT_TEST_DATA names no folder with real images")


def config_of(**overrides: object) -> Config:
    """Return a config with keys written `section__key`."""
    return load_config(None, {key.replace("__", "."): value for key, value in overrides.items()})


def numbered(n: int, classes: int = 10) -> TensorDataset:
    """Return n samples whose only feature is their index."""
    return TensorDataset(torch.arange(n, dtype=torch.float32).view(n, 1), torch.arange(n) % classes)


def numbered_data(n_train: int, n_test: int = 10) -> Data:
    return from_datasets(numbered(n_train), numbered(n_test))


def permutation(n: int, *purpose: Any) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(derive(*purpose)))


def pixels_of(part: Any) -> Tensor:
    assert isinstance(part, Pixels)
    return part.pixels


class Own(Dataset[Any]):
    """A map-style dataset of whatever it is given."""

    def __init__(self, *samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]
