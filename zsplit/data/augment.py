"""Random changes of training images: functions of the seed and of the sample, whatever batch it comes in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from torch.nn import functional

from zsplit.config.augment import Change, Crop, Flip, ResizedCrop
from zsplit.errors import DataError
from zsplit.seeds import derive

Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a window, in pixels."""

AREAS = (0.08, 1.0)
"""Share of the image that a resized crop shows (Szegedy et al. 2015, section 6; torchvision's RandomResizedCrop)."""

ASPECTS = (3 / 4, 4 / 3)
"""Width by height of that window (the same)."""

TRIES = 10


@dataclass(frozen=True)
class Draws:
    """What happens to the images of a batch: `keys` of shape (B,) holds a random number of 63 bits for each."""

    changes: tuple[Change, ...]
    keys: Tensor

    @property
    def resizes(self) -> bool:
        """Whether windows of the files are shown (`window`) in the place of whole images."""
        return ResizedCrop() in self.changes

    def apply(self, images: Tensor) -> Tensor:
        """Return images of shape (B, C, H, W) changed, in the same shape and type. Raises `DataError` for others."""
        if images.dim() != 4:
            raise DataError(
                f"data.augment changes images of shape (channels, height, width), the samples have the shape "
                f'{tuple(images.shape[1:])}: set data.augment = "none".'
            )
        keys = self.keys
        for change in self.changes:
            match change:
                case Crop(pad):
                    images, keys = _cropped(images, pad, keys)
                case Flip():
                    images, keys = _flipped(images, keys)
                case ResizedCrop():
                    pass  # done when the file was read
        return images

    def window(self, position: int, width: int, height: int) -> Box:
        """Return the window of the image at a position of the batch that a resized crop shows."""
        return random_window(Random(int(self.keys[position])), width, height)  # noqa: S311  (no secret)


def draws_of(
    changes: tuple[Change, ...], seed: int, client: int, round: int, epoch: int, samples: Sequence[int]
) -> Draws | None:
    """Return what happens to these samples in a local epoch of a round; None where nothing does."""
    if not changes:
        return None
    keys = [derive(seed, "augment", client, round, epoch, sample) for sample in samples]
    return Draws(changes, torch.tensor(keys, dtype=torch.int64))


def random_window(random: Random, width: int, height: int) -> Box:
    """Return a window of random area, aspect and place; after ten that do not fit, the largest central one.

    It is torchvision's `RandomResizedCrop.get_params`, drawn from another generator.
    """
    logs = [math.log(aspect) for aspect in ASPECTS]
    for _ in range(TRIES):
        area = width * height * random.uniform(*AREAS)
        aspect = math.exp(random.uniform(*logs))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(random.random() * (height - h + 1)), int(random.random() * (width - w + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * ASPECTS[1])), min(height, round(width / ASPECTS[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _cropped(images: Tensor, pad: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    places = 2 * pad + 1
    keys, top = _drawn(keys, places)
    keys, left = _drawn(keys, places)
    height, width = images.shape[2:]
    windows = functional.pad(images, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images)), :, top, left], keys


def _flipped(images: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    keys, odd = _drawn(keys, 2)
    return torch.where(odd.bool().view(-1, 1, 1, 1), images.flip(3), images), keys


def _drawn(keys: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return what is left of the keys, and a number below n from each: its digit in base n."""
    return keys // n, keys % n
