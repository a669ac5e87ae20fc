"""Asking a run's model: what does it see on these images, and how sure is it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from zsplit.after.evaluate import elsewhere
from zsplit.after.images import read_images, scale_of
from zsplit.after.names import class_names
from zsplit.after.trained import Trained
from zsplit.config import Config

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


Model = Callable[[Tensor], Iterable[Tensor]]
"""Gives the outputs, shape (classes,), of each of its inputs, shape (N, C, H, W)."""


def predict(
    config: Config, shape: tuple[int, ...], ask: Model, paths: Sequence[Path], resize: bool = False, data: str = ""
) -> list[Prediction]:
    """Return what the model of a run with this config sees on each image.

    `data` takes the place of `data.path`, where class names are read. Raises ConfigError and DataError as
    `read_images` does.
    """
    inputs = read_images(list(paths), shape, scale_of(config, shape[0]), resize)
    names = class_names(elsewhere(config, data))
    return [
        Prediction(str(path), list(_guesses(logits.cpu(), names)))
        for path, logits in zip(paths, ask(inputs), strict=True)
    ]


@torch.inference_mode()
def ask_here(trained: Trained, inputs: Tensor) -> list[Tensor]:
    """Return the uncut model's outputs, one input at a time: none depends on which others it came with."""
    return [trained.model(one[None].to(trained.device))[0] for one in inputs]


def _guesses(logits: Tensor, names: Sequence[str]) -> Iterator[Guess]:
    best = logits.double().softmax(dim=0).topk(min(TOP, len(logits)))
    for index, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        yield Guess(index, names[index] if index < len(names) else str(index), probability)
