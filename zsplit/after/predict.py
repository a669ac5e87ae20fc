"""Asking a run's model: what does it see on these images, and how sure is it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from zsplit.after.evaluate import elsewhere
from zsplit.after.images import read_images, scale_of
from zsplit.after.names import class_names
from zsplit.after.trained import Trained

TOP = 5
"""Classes that are named for each image, most probable first."""


class Guess(msgspec.Struct, frozen=True):
    """A class, its name (its number where it has none), and its probability."""

    index: int
    name: str
    probability: float


class Prediction(msgspec.Struct, frozen=True):
    """What the model sees on an image: the most probable classes, best first."""

    image: str
    classes: list[Guess]


def predict(trained: Trained, paths: Sequence[Path], resize: bool = False, data: str = "") -> list[Prediction]:
    """Return what the model sees on each image. `data` takes the place of `data.path`, where class names are read.

    Raises ConfigError and DataError as `read_images` does.
    """
    scale = scale_of(trained.config, trained.shape[0])
    inputs = read_images(list(paths), trained.shape, scale, resize)
    names = class_names(elsewhere(trained.config, data))
    with torch.inference_mode():
        # One at a time: what an image gives must not depend on which others it came with.
        outputs = [trained.model(image[None].to(trained.device))[0].cpu() for image in inputs]
    return [Prediction(str(path), list(_guesses(logits, names))) for path, logits in zip(paths, outputs, strict=True)]


def _guesses(logits: Tensor, names: Sequence[str]) -> Iterator[Guess]:
    best = logits.double().softmax(dim=0).topk(min(TOP, len(logits)))
    for index, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        yield Guess(index, names[index] if index < len(names) else str(index), probability)
