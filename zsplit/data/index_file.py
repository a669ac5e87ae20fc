"""Files that say which samples each client has."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zsplit.config import Config
from zsplit.errors import DataError


def read_partition(path: Path, n: int, config: Config) -> list[Tensor]:
    """Return the samples of each client, of `n` samples: JSON, or a line of numbers for each. Raises `DataError`.

    A sample may have several owners where nothing is held out for validation.
    """
    lists = _read_lists(path)
    if len(lists) != config.schedule.clients:
        raise DataError(
            f"{path} has {len(lists)} lists for schedule.clients = {config.schedule.clients}: give each client one."
        )
    seen: dict[int, int] = {}
    for client, samples in enumerate(lists):
        for sample in samples:
            _check_sample(path, client, sample, n, seen.get(sample), config.data.val_fraction)
            seen[sample] = client
    return [torch.tensor(samples, dtype=torch.int64) for samples in lists]


def _check_sample(path: Path, client: int, sample: int, n: int, owner: int | None, val_fraction: float) -> None:
    if not 0 <= sample < n:
        raise DataError(f"{path} gives client {client} the sample {sample}: with {n} of them they are 0 to {n - 1}.")
    if owner == client:
        raise DataError(f"{path} gives client {client} the sample {sample} twice: name it once.")
    if owner is not None and val_fraction:
        raise DataError(
            f"{path} gives sample {sample} to clients {owner} and {client}, and one could train on what the other "
            f"validates on (data.val_fraction = {val_fraction}): set data.val_fraction = 0, or give it to one of them."
        )


def _read_lists(path: Path) -> list[list[int]]:
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            lists = json.loads(text)
        else:
            lists = [[int(word) for word in line.replace(",", " ").split()] for line in text.splitlines()]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): put data.partition's file there.") from error
    except ValueError as error:  # of JSON, of int, of UTF-8
        raise _no_lists(path, str(error)) from error
    if not (isinstance(lists, list) and all(map(_is_list_of_integers, lists))):
        raise _no_lists(path, "it holds something else")
    return lists


def _no_lists(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} has no list of samples for each client ({why}): write JSON such as [[0, 2], [1]], or a line of "
        "numbers for each client."
    )


def _is_list_of_integers(found: Any) -> bool:
    return isinstance(found, list) and all(type(each) is int for each in found)
