"""Testing a run's model: uncut, in one process, on the test data of the run's config."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from math import isclose
from typing import Any

import msgspec
import torch
from torch import Tensor

from zsplit.after.trained import Trained
from zsplit.config import Config
from zsplit.config.datasets import is_function
from zsplit.data import Data, gather, open_data
from zsplit.errors import ConfigError
from zsplit.train.loss import check_labels, score

WITHOUT_FILES = ("digits", "fake")
"""Datasets that no folder holds."""

NEAR = 1e-5
"""Losses that differ by no more than this share are equal: other threads and devices round differently."""


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """What a model does on the test data: means over its samples. `expected` is what the summary says.

    Where there was a codec, that is what it says of the model without.
    """

    samples: int
    loss: float
    accuracy: float
    top5: float
    expected: dict[str, float | None]

    @property
    def same(self) -> bool | None:
        """Whether accuracy and loss are those of the summary; None where it says nothing."""
        accuracy, loss = self.expected["accuracy"], self.expected["loss"]
        if accuracy is None or loss is None:
            return None
        return self.accuracy == accuracy and isclose(self.loss, loss, rel_tol=NEAR, abs_tol=NEAR)

    def verdict(self) -> str:
        """Return how this compares with the summary, in words."""
        accuracy, loss = self.expected["accuracy"], self.expected["loss"]
        if accuracy is None or loss is None:
            return "The run's summary has no test figures to compare with."
        found = f"the run's summary: test accuracy {100 * accuracy:.2f} %, loss {loss:.4f}"
        return f"Equal to {found}." if self.same else f"Not equal to {found}."


def evaluate(trained: Trained, summary: Mapping[str, Any], path: str = "", allowed: Collection[str] = ()) -> Scores:
    """Return what the model does on its run's test data; `path` takes the place of `data.path`.

    The config may name a function of the `allowed` modules as its data (`zsplit.own`).
    Raises ConfigError for a `path` where the data have none, DataError where the data cannot be read.
    """
    data = open_data(elsewhere(trained.config, path), allowed)
    total: Counter[str] = Counter()
    with torch.inference_mode():
        for x, labels in _batches(trained.config, data):
            outputs = trained.model(x.to(trained.device))
            check_labels(labels, outputs)
            total.update(score(outputs, labels.to(trained.device)))
    samples = total["samples"]
    return Scores(
        samples=int(samples),
        loss=total["loss"] / samples,
        accuracy=total["top1"] / samples,
        top5=total["top5"] / samples,
        expected={name: uncoded(summary, f"test_{name}") for name in ("accuracy", "top5", "loss")},
    )


def uncoded(summary: Mapping[str, Any], figure: str) -> float | None:
    """Return what the summary says of the model without its codec, which is the one at hand."""
    value: float | None = summary.get(f"{figure}_raw", summary.get(figure))
    return value


def _batches(config: Config, data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the test data in the batches that the run's clients made of their parts."""
    for part in torch.arange(len(data.test)).tensor_split(config.schedule.clients):
        for first in range(0, len(part), config.train.batch_size):
            yield gather(data.test, part[first : first + config.train.batch_size])


def elsewhere(config: Config, path: str) -> Config:
    """Return the config with its data in another folder, if one is given. Raises ConfigError where they have none."""
    if not path:
        return config
    if config.data.name in WITHOUT_FILES or is_function(config.data.name):
        raise ConfigError(f'data.name = "{config.data.name}" is not read from a folder: leave --data out.')
    replace = msgspec.structs.replace
    return replace(config, data=replace(config.data, path=path))
