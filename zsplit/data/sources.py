"""The datasets that have a name: from their own files, made up, or from a function of one's own."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from zsplit.config import Config
from zsplit.config.datasets import is_function
from zsplit.data import cifar, folder, mnist, svhn
from zsplit.data.download import download
from zsplit.data.fake import open_fake
from zsplit.data.files import Place
from zsplit.data.images import Data, Images, Samples, Scale
from zsplit.data.labels import Labels, without_labels
from zsplit.data.partition import permutation
from zsplit.errors import ConfigError, DataError
from zsplit.own import make


class Source(NamedTuple):
    """A dataset in files.

    `open` takes their place, the config and whether labels are wanted; `labels`, where they lie apart, opens them
    alone; `shape` is that of a sample, where the name tells it; `needs` says which files there have to be.
    """

    open: Callable[[Place, Config, bool], Data]
    shape: tuple[int, ...] | None
    needs: str
    labels: Callable[[Place], Labels] | None = None


SOURCES: dict[str, Source] = {
    "digits": Source(lambda *_: mnist.open_digits(), (1, 8, 8), ""),
    "mnist": Source(
        lambda place, _, labels: mnist.open_mnist(place, labels), (1, 28, 28), mnist.FILES, mnist.open_mnist_labels
    ),
    "svhn": Source(
        lambda place, _, labels: svhn.open_svhn(place, labels), (3, 32, 32), svhn.FILES, svhn.open_svhn_labels
    ),
    "cifar10": Source(lambda place, *_: cifar.open_cifar(cifar.LAYOUT10, place), (3, 32, 32), cifar.FILES10),
    "cifar100": Source(lambda place, *_: cifar.open_cifar(cifar.LAYOUT100, place), (3, 32, 32), cifar.FILES100),
    "imagefolder": Source(
        lambda place, config, _: folder.open_imagefolder(place, config.model.input), None, folder.FILES
    ),
}

SCALES = {
    "digits": mnist.DIGITS,
    "mnist": mnist.MNIST,
    "svhn": svhn.SVHN,
    "cifar10": cifar.CIFAR10,
    "cifar100": cifar.CIFAR100,
    "imagefolder": folder.IMAGENET,
}
"""How each dataset's pixels become numbers, under `data.normalize = "dataset"`."""


def open_data(config: Config, allowed: Collection[str] = (), labels: bool = True) -> Data:
    """Return the data that [data] says: from local files, made up, or from a function in one of the `allowed` modules.

    Without `labels` none is kept, all are −1, and where they lie in files of their own those need not exist. Raises
    `DataError` where files are missing, damaged or of another shape than `model.input`, with what to put where, and
    `ConfigError` for `data.name = "own"`, which no file can stand for, and for a module that is not allowed.
    """
    found = _opened(config, allowed, labels)
    parts = (_part(config, kind, dataset) for kind, dataset in (("train", found.train), ("test", found.test)))
    train, test = (each if labels else without_labels(each) for each in parts)
    data = replace(found, train=train, test=test)
    if config.model.input and tuple(data.shape) != config.model.input:
        raise DataError(
            f"The samples of {config.data.name} have the shape {list(data.shape)}, model.input is "
            f"{list(config.model.input)}: leave model.input out, or take a dataset of that shape."
        )
    return data


def open_labels(config: Config, allowed: Collection[str] = ()) -> Labels:
    """Return the labels alone, for a server whose clients have none: sample i here is sample i of `open_data`.

    MNIST and SVHN are opened without their images. Raises as `open_data` does.
    """
    source = SOURCES.get(config.data.name)
    if source and source.labels:
        found = source.labels(_place(config, source))
    else:
        found = Labels.of(_opened(config, allowed, True))
    train, test = _used(config, "train", len(found.train)), _used(config, "test", len(found.test))
    return Labels(found.train[train], found.test[test])


def fetch_originals(config: Config) -> None:
    """Download what is missing from `data.path`, where `data.download` asks for it. Raises `DataError`."""
    source = SOURCES.get(config.data.name)
    if source and config.data.download:
        _place(config, source)


def sample_shape(config: Config) -> tuple[int, ...]:
    """Return the shape of one sample without opening any file: `model.input`, or what `data.name` implies.

    Raises `ConfigError` where only the files tell.
    """
    name = config.data.name
    implied = config.data.shape if name == "fake" else SOURCES[name].shape if name in SOURCES else None
    shape = config.model.input or implied
    if not shape:
        raise ConfigError(
            f'data.name = "{name}" does not tell the shape of a sample: '
            "set model.input, such as model.input = [3, 32, 32]."
        )
    return shape


def _opened(config: Config, allowed: Collection[str], labels: bool) -> Data:
    name = config.data.name
    if name == "own":
        raise ConfigError(
            'data.name = "own" stands for datasets that a Python script hands over: '
            f"start that script, or name one of {', '.join((*SOURCES, 'fake'))}."
        )
    if name == "fake":
        return open_fake(config)
    if is_function(name):
        return make(name, allowed, "data.name", Data, config)
    source = SOURCES[name]
    return source.open(_place(config, source), config, labels)


def _place(config: Config, source: Source) -> Place:
    """Return where the files are, after those were fetched that are missing and wanted."""
    name, path = config.data.name, Path(config.data.path).expanduser()
    place = Place(name, path, source.needs)
    if not source.needs:
        return place
    if not config.data.path:
        raise DataError(f"{name} needs a folder with {source.needs}: set data.path to it.")
    if config.data.download:
        download(place)
    if not path.is_dir():
        raise DataError(f"data.path = {path} is no folder: {name} needs one with {source.needs}.")
    return place


def _part(config: Config, kind: str, dataset: Samples) -> Samples:
    """Return the samples that are used, scaled as the config says."""
    used = _used(config, kind, len(dataset))
    if len(used) < len(dataset):
        dataset = _subset(dataset, used)
    return dataset.scaled(normalized(config, dataset.scale)) if isinstance(dataset, Images) else dataset


def _used(config: Config, kind: str, n: int) -> Tensor:
    """Return which of a part's n samples are used: the head of a permutation, in the order of the files."""
    size = config.data.train_size if kind == "train" else config.data.test_size
    if size > n:
        raise DataError(f"data.{kind}_size = {size} is more than the {n} samples there are: set {n} at most, or 0.")
    return permutation(n, config.run.seed, "size", kind)[:size].sort().values if size else torch.arange(n)


def _subset(dataset: Samples, used: Tensor) -> Samples:
    match dataset:
        case Images():
            return dataset.part(used)
        case TensorDataset(tensors=tensors):
            return TensorDataset(*(tensor[used] for tensor in tensors))
        case _:
            whole: Any = dataset
            return Subset(whole, used.tolist())


def normalized(config: Config, scale: Scale) -> Scale:
    """Return a dataset's scale as `data.normalize` wants it."""
    match config.data.normalize:
        case "dataset":
            return scale
        case "half":
            mean, std = 0.5, 0.5
        case "none":
            mean, std = 0.0, 1.0
    channels = len(scale.mean)
    return Scale(scale.full, (mean,) * channels, (std,) * channels)
