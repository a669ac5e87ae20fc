"""Synthetic images: no files, the same wherever they are made, and a model can learn them."""

import torch
from torch import Tensor

from zsplit.config import Config
from zsplit.data.images import Data, Pixels, Scale
from zsplit.errors import ConfigError
from zsplit.seeds import derive

LEVELS = 128
"""Pixels are an image of the class plus noise, each uniform over so many levels."""

MEAN = LEVELS - 1
DEVIATION = ((LEVELS**2 - 1) / 6) ** 0.5

CHUNK = 1024
"""Samples that are made at once."""


def open_fake(config: Config) -> Data:
    """Return random images of `data.shape` in `data.classes` classes: `data.samples` to train on, a tenth to test on.

    Sample i of a part follows from `run.seed`, shape, classes and i alone. It is the random image of its class under as
    much noise. Raises `ConfigError` for a shape that is not (channels, height, width).
    """
    shape, samples = config.data.shape, config.data.samples
    if len(shape) != 3:
        raise ConfigError(
            f"data.shape = {list(shape)} is no image's shape: set channels, height and width, such as [3, 32, 32]."
        )
    return Data(
        _part(config, "train", samples), _part(config, "test", max(1, samples // 10)), shape, config.data.classes
    )


def _part(config: Config, part: str, samples: int) -> Pixels:
    seed, classes, shape = config.run.seed, config.data.classes, config.data.shape
    images = _levels(derive(seed, "fake", "classes"), (classes, *shape))
    pixels = _levels(derive(seed, "fake", part, "noise"), (samples, *shape))
    labels = torch.randint(classes, (samples,), generator=_generator(derive(seed, "fake", part, "labels")))
    for first in range(0, samples, CHUNK):
        pixels[first : first + CHUNK] += images[labels[first : first + CHUNK]]
    return Pixels(pixels, labels, Scale(1.0, (float(MEAN),) * shape[0], (DEVIATION,) * shape[0]))


def _levels(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(LEVELS, shape, dtype=torch.uint8, generator=_generator(seed))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
