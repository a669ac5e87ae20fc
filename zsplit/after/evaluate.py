"""Testing a run's model in one process, on the test data of the run's config: uncut, or with its codec at the cut."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from math import isclose
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from zsplit.after.coded import coded, places_of
from zsplit.after.trained import Trained
from zsplit.config import Config
from zsplit.config.datasets import is_function
from zsplit.data import Data, gather, open_data
from zsplit.errors import ConfigError
from zsplit.spec import parse
from zsplit.train.loss import check_labels, score

WITHOUT_FILES = ("digits", "fake")
"""Datasets that no folder holds."""

NEAR = 1e-5
"""Losses that differ by no more than this share are equal: other threads and devices round differently."""


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """What a model does on the test data: means over its samples. `expected` is what the run's summary says.

    `codec` is the run's for smashed data; `through` says whether they took it here. A lossless one changes nothing.
    """

    samples: int
    loss: float
    accuracy: float
    top5: float
    codec: str
    through: bool
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
        which = "" if parse(self.codec).lossless else f" {'through' if self.through else 'without'} {self.codec}"
        found = f"the run's summary{which}: test accuracy {100 * accuracy:.2f} %, loss {loss:.4f}"
        return f"Equal to {found}." if self.same else f"Not equal to {found}."


def evaluate(
    trained: Trained,
    summary: Mapping[str, Any],
    path: str = "",
    through: bool = False,
    allowed: Collection[str] = (),
) -> Scores:
    """Return what the model does on its run's test data; `path` takes the place of `data.path`.

    Smashed data go `through` the run's codec or not, each client's at its own cut. A function that makes the data has
    to be in one of the `allowed` modules. Raises ConfigError for a `path` where the data have none, and where the
    summary does not say where the model was cut, DataError where the data cannot be read.
    """
    data = open_data(elsewhere(trained.config, path), allowed)
    model_of = _through(trained, summary) if through else lambda _: trained.model
    total: Counter[str] = Counter()
    with torch.inference_mode():
        for client, x, labels in _batches(trained.config, data):
            outputs = model_of(client)(x.to(trained.device))
            check_labels(labels, outputs)
            total.update(score(outputs, labels.to(trained.device)))
    samples = total["samples"]
    return Scores(
        samples=int(samples),
        loss=total["loss"] / samples,
        accuracy=total["top1"] / samples,
        top5=total["top5"] / samples,
        codec=trained.config.codec.up,
        through=through,
        expected=_expected(trained.config, summary, through),
    )


def _expected(config: Config, summary: Mapping[str, Any], through: bool) -> dict[str, float | None]:
    """Return what the summary says of the test data, with or without the codec. A run may have gone without either."""
    way = "_codec" if through else "_raw"
    same = parse(config.codec.up).lossless
    names = ("accuracy", "top5", "loss")
    return {name: summary.get(f"test_{name}{way}", summary.get(f"test_{name}") if same else None) for name in names}


def _through(trained: Trained, summary: Mapping[str, Any]) -> Callable[[int], nn.Module]:
    """Return what gives each client's model with the codec at its cut."""
    places = places_of(summary)
    make = cache(lambda place: coded(trained, *place))

    def model_of(client: int) -> nn.Module:
        if client not in places:
            raise ConfigError(
                "The run's summary does not say where its model was cut: leave --with-codec out, or test a run that "
                "came to its end."
            )
        return make(places[client])

    return model_of


def _batches(config: Config, data: Data) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the test data in the batches that the run's clients made of their parts: client, inputs, labels."""
    for client, part in enumerate(torch.arange(len(data.test)).tensor_split(config.schedule.clients)):
        for first in range(0, len(part), config.train.batch_size):
            yield client, *gather(data.test, part[first : first + config.train.batch_size])


def elsewhere(config: Config, path: str) -> Config:
    """Return the config with its data in another folder, if one is given. Raises ConfigError where they have none."""
    if not path:
        return config
    if config.data.name in WITHOUT_FILES or is_function(config.data.name):
        raise ConfigError(f'data.name = "{config.data.name}" is not read from a folder: leave --data out.')
    replace = msgspec.structs.replace
    return replace(config, data=replace(config.data, path=path))
