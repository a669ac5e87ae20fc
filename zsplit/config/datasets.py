"""The datasets that [data] can name, and what each of its keys means for them. No torch."""

import re
from collections.abc import Iterator

from zsplit.config.augment import ResizedCrop, parse_augment
from zsplit.config.keys import as_toml
from zsplit.config.partition import NEEDS_LABELS, ByLabel, FromFile, labels_missing, parse_partition
from zsplit.config.sections import DataSection
from zsplit.config.spec import unknown

DATASETS = ("digits", "mnist", "svhn", "cifar10", "cifar100", "imagefolder", "fake", "own")

FETCHED = ("mnist", "svhn", "cifar10", "cifar100")
"""Datasets whose original files can be downloaded."""

UNSCALED = ("fake", "own")
"""Datasets that have no constants to be normalised with; functions of one's own have none either."""

FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
"""`package.module:function`."""


def is_function(name: str) -> bool:
    """Say whether the name is that of a function of one's own."""
    return FUNCTION.fullmatch(name) is not None


def in_names(data: DataSection) -> Iterator[str]:
    """The dataset's name, and keys that mean something for some datasets only."""
    if data.name not in DATASETS and not is_function(data.name):
        yield str(unknown("data.name", data.name, data.name, [*DATASETS, "package.module:function"]))
    for key in ("shape", "classes", "samples"):
        if data.name != "fake":
            yield from _idle(data, key, ("fake",))
    if data.name not in FETCHED:
        yield from _idle(data, "download", FETCHED)
    if data.name in UNSCALED or is_function(data.name):
        yield from _idle(data, "normalize", [name for name in DATASETS if name not in UNSCALED])
    if data.name == "own":
        for key in ("train_size", "test_size"):
            yield from _idle(data, key, [name for name in DATASETS if name != "own"])


def in_partition(data: DataSection, clients: int, labels: str) -> Iterator[str]:
    """The partition's text, who is meant by it, and whether clients have the `labels` (`train.labels`) for it."""
    partition = parse_partition(data.partition)
    if isinstance(partition, NEEDS_LABELS) and labels == "server":
        yield labels_missing(data.partition)
    if isinstance(partition, ByLabel) and len(partition.labels) != clients:
        yield (
            f"data.partition = {as_toml(data.partition)} has {len(partition.labels)} lists for "
            f"schedule.clients = {clients}: give each client one."
        )
    if isinstance(partition, FromFile) and data.train_size:
        yield (
            f"data.train_size = {data.train_size} means nothing with data.partition = {as_toml(data.partition)}, "
            "whose file says which samples are used: leave one of the two out."
        )


def in_augment(data: DataSection, shape: tuple[int, ...]) -> Iterator[str]:
    """The augmentation's text, and images of any size, which are brought to `shape` (that of `model.input`)."""
    if ResizedCrop() not in parse_augment(data.augment):
        return
    if data.name != "imagefolder":
        yield (
            f"data.augment = {as_toml(data.augment)} is for images of many sizes: "
            'take crop for crops, or set data.name = "imagefolder".'
        )
    if not shape:
        yield (
            f"data.augment = {as_toml(data.augment)} needs a size to crop to: "
            "set model.input, such as model.input = [3, 224, 224]."
        )


def _idle(data: DataSection, key: str, names: tuple[str, ...] | list[str]) -> Iterator[str]:
    """Yield the refusal of a key that is set where it means nothing; `names` are the datasets where it does."""
    value = getattr(data, key)
    if value != getattr(DataSection(), key):
        yield (
            f"data.{key} = {as_toml(value)} means nothing for data.name = {as_toml(data.name)}: "
            f"leave it out, or set data.name = {' or '.join(map(as_toml, names))}."
        )
