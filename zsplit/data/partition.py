"""Who has which training samples: each client computes all parts from the config alone, and takes its own.

What is drawn comes from torch's `randperm` and from numpy's `RandomState`, whose stream is frozen (NEP 19), so that
peers agree whatever their numpy.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsplit.config import Config
from zsplit.config.keys import as_toml
from zsplit.config.partition import (
    NEEDS_LABELS,
    ByLabel,
    Dirichlet,
    FromFile,
    Iid,
    Partition,
    Quantity,
    Replicate,
    Shards,
    labels_missing,
    parse_partition,
)
from zsplit.data.index_file import read_partition
from zsplit.errors import ConfigError
from zsplit.seeds import derive

Counts = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

TRIES = 100
"""Draws of `quantity` before it is refused for leaving a client without a sample."""


def permutation(n: int, seed: int, purpose: str, *parts: int | str) -> Tensor:
    """Return the numbers below n in the order that belongs to a purpose, shape (n,), int64."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(derive(seed, purpose, *parts)))


def shards(config: Config, n_samples: int, labels: Callable[[], Tensor] | None = None) -> list[Tensor]:
    """Return the indices of each client's training samples, in the order that the partition gives them.

    `labels` gives all labels, shape (n_samples,); None where they are not known here. Raises `ConfigError` where a
    client is left without a sample or the labels are needed and unknown, `DataError` for a file that says nonsense.
    """
    partition = parse_partition(config.data.partition)
    if isinstance(partition, NEEDS_LABELS) and labels is None:
        raise ConfigError(labels_missing(config.data.partition))
    parts = _dealt(partition, config, n_samples, labels)
    for client, part in enumerate(parts):
        if not len(part):
            raise ConfigError(_empty(partition, config, client, n_samples))
    return parts


def _dealt(
    partition: Partition, config: Config, n: int, labels: Callable[[], Tensor] | None
) -> list[Tensor]:  # fmt: skip
    seed, clients = config.run.seed, config.schedule.clients
    match partition:
        case Iid():
            return list(permutation(n, seed, "partition").tensor_split(clients))
        case Replicate():
            return [torch.arange(n)] * clients
        case Quantity(alpha):
            return _by_quantity(alpha, n, clients, seed)
        case FromFile(path):
            return read_partition(Path(path).expanduser(), n, config)
    assert labels is not None
    match partition:
        case Dirichlet(alpha):
            return _by_dirichlet(alpha, labels(), clients, seed)
        case Shards(k):
            return _by_shards(k, labels(), clients, seed)
        case ByLabel(lists):
            return _by_label(lists, labels(), seed)


def _by_dirichlet(alpha: float, labels: Tensor, clients: int, seed: int) -> list[Tensor]:
    """Deal out equally many samples with a mix of labels that is drawn from Dir(α·p) for each client.

    p are the shares of the labels in all samples; where a label is used up, the others take its place (Hsu, Qi and
    Brown 2019, "Measuring the effects of non-identical data distribution", section 3).
    """
    random = _random(seed, "dirichlet")
    left: Counts = labels.bincount().numpy().copy()
    shares = left / left.sum()
    taken: list[Counts] = []
    for size in _sizes(len(labels), clients):
        taken.append(_mixed(random, size, _dirichlet(random, alpha * shares), left))
        left -= taken[-1]
    return _by_counts(np.array(taken), labels, seed)


def _mixed(random: np.random.RandomState, size: int, mix: Floats, left: Counts) -> Counts:
    """Return how many samples of each label a client of `size` samples gets, of those that are left."""
    counts = np.zeros_like(left)
    while missing := size - int(counts.sum()):
        there = left - counts
        wanted = np.where(there > 0, mix, 0.0)
        if not wanted.sum() > 0:  # nothing is left of what it should have
            wanted = there.astype(float)
        counts += np.minimum(random.multinomial(missing, wanted / wanted.sum()), there)
    return counts


def _by_counts(counts: Counts, labels: Tensor, seed: int) -> list[Tensor]:
    """Return samples for each client, so many of each label: `counts` has the shape (clients, labels)."""
    order = permutation(len(labels), seed, "partition")
    of_label = [order[labels[order] == label] for label in range(counts.shape[1])]
    dealt = [samples.tensor_split(np.cumsum(counts[:-1, label]).tolist()) for label, samples in enumerate(of_label)]
    return [torch.cat([parts[client] for parts in dealt]) for client in range(len(counts))]


def _by_shards(k: int, labels: Tensor, clients: int, seed: int) -> list[Tensor]:
    """Cut the samples, sorted by label, into `k` pieces for each client, and deal the pieces out at random.

    (McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized data", section 3.)
    """
    pieces = labels.argsort(stable=True).tensor_split(k * clients)
    order = permutation(k * clients, seed, "partition").view(clients, k)
    return [torch.cat([pieces[piece] for piece in mine]) for mine in order.tolist()]


def _by_quantity(alpha: float, n: int, clients: int, seed: int) -> list[Tensor]:
    """Deal out random samples, how many to each client as drawn from Dir(α) (Li et al. 2022, NIID-Bench, section 4.3).

    Draws that leave a client without a sample are thrown away, up to `TRIES` of them.
    """
    order, random = permutation(n, seed, "partition"), _random(seed, "quantity")
    parts: list[Tensor] = []
    for _ in range(TRIES):
        ends = np.rint(np.cumsum(_dirichlet(random, np.full(clients, alpha))) * n).astype(int)
        parts = list(order.tensor_split(ends[:-1].tolist()))
        if all(map(len, parts)):
            break
    return parts


def _by_label(lists: tuple[tuple[int, ...], ...], labels: Tensor, seed: int) -> list[Tensor]:
    """Give each client the samples of its labels; a label of several clients is dealt out among them equally."""
    order = permutation(len(labels), seed, "partition")
    parts: list[list[Tensor]] = [[] for _ in lists]
    for label in sorted({label for wanted in lists for label in wanted}):
        sharing = [client for client, wanted in enumerate(lists) if label in wanted]
        samples = order[labels[order] == label]
        for client, part in zip(sharing, samples.tensor_split(len(sharing)), strict=True):
            parts[client].append(part)
    return [torch.cat(part) for part in parts]


def _sizes(n: int, parts: int) -> list[int]:
    """Return n in parts whose sizes differ by one at most, the larger first."""
    return [n // parts + (part < n % parts) for part in range(parts)]


def _dirichlet(random: np.random.RandomState, alphas: Floats) -> Floats:
    """Return a draw from a Dirichlet distribution, by logarithms of gamma variates: small alphas would underflow.

    For α < 1, G(α) is G(α + 1)·U^(1/α) (Marsaglia and Tsang 2000, section 6).
    """
    positive = alphas > 0  # a label without samples has no share
    safe = np.where(positive, alphas, 1.0)
    logs = np.log(random.standard_gamma(safe + 1)) + np.log1p(-random.random_sample(len(alphas))) / safe
    logs[~positive] = -np.inf
    shares = np.exp(logs - logs.max())
    drawn: Floats = shares / shares.sum()
    return drawn


def _random(seed: int, *purpose: str) -> np.random.RandomState:
    value = derive(seed, "partition", *purpose)
    return np.random.RandomState([value & 0xFFFFFFFF, value >> 32])


def _empty(partition: Partition, config: Config, client: int, n: int) -> str:
    """Return the sentence for a client that is left without a sample."""
    clients, spec = config.schedule.clients, as_toml(config.data.partition)
    found = f"schedule.clients = {clients} leaves client {client} without a sample: there are {n} training samples"
    if n < clients and not isinstance(partition, ByLabel | FromFile):
        return f"{found}, take {n} clients at most."
    match partition:
        case Shards(k):
            way_out = f"{n} samples make {n} pieces at most, take fewer than {k} for each of {clients} clients"
        case Quantity():
            way_out = f"so did {TRIES} draws, take a larger alpha or fewer clients"
        case ByLabel(lists):
            way_out = f"no sample of the labels {list(lists[client])} is left for it, list others"
        case _:
            way_out = "give it some"
    return f"data.partition = {spec} leaves client {client} without a sample: {way_out}."
