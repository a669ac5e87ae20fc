"""What a dataset is here: any map-style torch dataset of pairs (tensor, label), gathered in batches.

Images that fit into memory stay there as bytes and become floats when a batch is taken, so that a client pays
for its batches and not for the whole set.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from zsplit.data.augment import Draws
from zsplit.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


def eight_bits(image: "Image", mode: str) -> "Image":
    """Return an image in one of Pillow's modes of 8 bits; of 16 bits the high ones, where Pillow clips at 255."""
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value * (1 / 256))
    return image.convert(mode)


class Samples(Protocol):
    """A map-style dataset: sample i is a pair of a tensor and an integer label."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Scale:
    """How pixels become numbers: divided by `full`, then each channel less its mean, over its deviation."""

    full: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return pixels of shape (…, C, H, W) as float32 of the same shape."""
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (self.mean, self.std))
        return pixels.to(torch.float32).div_(self.full).sub_(mean).div_(std)


class Images(Dataset[tuple[Tensor, int]]):
    """Images of one shape: `labels` of shape (N,) and type int64, and the scale that makes pixels into numbers."""

    def __init__(self, labels: Tensor, scale: Scale) -> None:
        self.labels, self.scale = labels, scale

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = self.batch(torch.tensor([index]))
        return x[0], int(y[0])

    def batch(self, indices: Tensor, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        """Return the samples of the given indices, shape (B,), changed as drawn: x (B, C, H, W), y (B,)."""
        pixels = self.read(indices, draws)
        return self.scale(draws.apply(pixels) if draws else pixels), self.labels[indices]

    def scaled(self, scale: Scale) -> Self:
        """Return the same images under another scale."""
        other = copy(self)
        other.scale = scale
        return other

    def labelled(self, labels: Tensor) -> Self:
        """Return the same images under other labels."""
        other = copy(self)
        other.labels = labels
        return other

    def read(self, indices: Tensor, draws: Draws | None) -> Tensor:
        """Return the pixels of the given indices, shape (B, C, H, W), uint8."""
        raise NotImplementedError

    def part(self, indices: Tensor) -> "Images":
        """Return the images of the given indices alone."""
        raise NotImplementedError


class Pixels(Images):
    """Images in memory: `pixels` of shape (N, C, H, W) and type uint8."""

    def __init__(self, pixels: Tensor, labels: Tensor, scale: Scale) -> None:
        super().__init__(labels, scale)
        self.pixels = pixels

    def read(self, indices: Tensor, draws: Draws | None) -> Tensor:  # noqa: ARG002  (they are whole as they lie)
        """Return the pixels of the given indices, shape (B, C, H, W), uint8."""
        return self.pixels[indices]

    def part(self, indices: Tensor) -> "Pixels":
        """Return the images of the given indices alone."""
        return Pixels(self.pixels[indices], self.labels[indices], self.scale)


@dataclass(frozen=True)
class Data:
    """What a run trains and tests on. `shape` is that of one sample; `classes` is None where nobody knows."""

    train: Samples
    test: Samples
    shape: tuple[int, ...]
    classes: int | None


def from_datasets(train: Samples, test: Samples, classes: int | None = None) -> Data:
    """Return one's own map-style datasets of pairs (tensor, label) as the data of a run.

    The shape is that of the first sample. The number of classes is `classes`, else what the datasets say
    of themselves (`TensorDataset` by its labels, torchvision's by `classes`), else unknown. Raises
    `DataError` where a dataset has no length, no samples, or other samples than such pairs.
    """
    for name, dataset in (("training", train), ("test", test)):
        _check_map_style(name, dataset)
    x, _ = gather(train, torch.tensor([0]))
    said = (_classes(dataset) for dataset in (train, test))
    known = classes if classes is not None else max((each for each in said if each), default=None)
    return Data(train, test, tuple(x.shape[1:]), known)


def gather(dataset: Samples, indices: Tensor, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
    """Return the samples of the given indices, shape (B,), as x of shape (B, …) and y of shape (B,), int64.

    `draws` says what happens to them at random. Raises `DataError` where a sample is no pair (tensor, label), differs
    from the others in shape, or is no image that could be changed.
    """
    if isinstance(dataset, Images):
        return dataset.batch(indices, draws)
    match dataset:
        case TensorDataset(tensors=(x, y)):
            x, y = x[indices], y[indices].to(torch.int64)
        case _:
            x, y = _stacked(dataset, indices.tolist())
    return (draws.apply(x) if draws else x), y


def _stacked(dataset: Samples, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    samples = [sample_of(dataset, index) for index in indices]
    for index, (x, _) in zip(indices, samples, strict=True):
        if x.shape != samples[0][0].shape:
            raise DataError(
                f"Sample {index} of the dataset has the shape {tuple(x.shape)}, sample {indices[0]} has "
                f"{tuple(samples[0][0].shape)}: bring all to one shape."
            )
    return torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples], dtype=torch.int64)


def sample_of(dataset: Samples, index: int) -> tuple[Tensor, int]:
    """Return one sample. Raises `DataError` where it is no pair (tensor, label)."""
    match dataset[index]:
        case (Tensor() as x, int() | Tensor(shape=()) as y):
            return x, int(y)
        case (x, y):
            found = f"a pair ({type(x).__name__}, {type(y).__name__})"
        case other:
            found = f"a {type(other).__name__}"
    raise DataError(
        f"Sample {index} of the dataset is {found} in place of a pair (tensor, integer label): "
        "give the dataset a transform that makes such pairs."
    )


def _check_map_style(name: str, dataset: Samples) -> None:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(
            f"The {name} dataset is a {type(dataset).__name__} without __len__ and __getitem__: "
            "give a map-style dataset."
        )
    if not len(dataset):
        raise DataError(f"The {name} dataset has no samples: give one that has.")


def _classes(dataset: Samples) -> int | None:
    match dataset:
        case TensorDataset(tensors=(_, labels)):
            return int(labels.max()) + 1
        case _:
            return len(getattr(dataset, "classes", ())) or None
