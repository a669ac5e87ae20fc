"""Which samples a client has, and which of them make up a batch: functions of the seed, never of the past.

Every client computes its own part, and a batch is found from round and step alone, so a replay may start in the
middle of a round.
"""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Literal

import torch
from torch import Tensor

from zsplit.config import Config
from zsplit.config.augment import parse_augment
from zsplit.config.partition import Replicate, parse_partition
from zsplit.data.augment import draws_of
from zsplit.data.images import Data, gather
from zsplit.data.labels import labels_of
from zsplit.data.partition import permutation, shards
from zsplit.data.threads import one_thread
from zsplit.errors import ConfigError

Part = Literal["train", "validation", "test"]
EvalPart = Literal["validation", "test"]
Place = tuple[int, int]
"""Round and step."""

Batch = tuple[Tensor, Tensor]

WORTHWHILE = 0.001
"""Seconds from which on loading a mini-batch ahead gains more than it costs."""


def indices_of(config: Config, client: int, shard: Tensor, n_test: int) -> dict[Part, Tensor]:
    """Return what a client that has a shard of the training samples trains on, validates on and tests on.

    `validation` is the head of a permutation of the shard; test samples are dealt out in order. Where all have all
    samples, they hold the same ones out and each evaluates its share: nobody trains on what another validates on. One
    beyond `schedule.clients` evaluates nothing.
    """
    seed, n_validation = config.run.seed, math.floor(config.data.val_fraction * len(shard))
    if isinstance(parse_partition(config.data.partition), Replicate):
        order = permutation(len(shard), seed, "validation")
        mine = _share(order[:n_validation], config, client)
    else:
        order = permutation(len(shard), seed, "validation", client)
        mine = order[:n_validation]
    test = _share(torch.arange(n_test), config, client)
    return {"train": shard[order[n_validation:]], "validation": shard[mine], "test": test}


def _share(samples: Tensor, config: Config, client: int) -> Tensor:
    """Return what a client evaluates of these samples, of which each is evaluated by one."""
    clients = config.schedule.clients
    return samples.tensor_split(clients)[client] if client < clients else samples[:0]


class ClientData:
    """The part of the data that client `index` trains, validates and tests on, and its batches.

    `indices` holds the positions in the training set (`train`, `validation`) and in the test set (`test`): the ids of
    the samples. With `labels_known=False` the labels are not here, and no batch says what they are. Raises
    `ConfigError` where there is no such client, it has no sample, the partition needs labels that are not known, or
    `model.num_classes` is too small.
    """

    def __init__(self, config: Config, index: int, data: Data, labels_known: bool = True) -> None:
        clients, elastic = config.schedule.clients, config.schedule.elastic
        for_all = elastic and isinstance(parse_partition(config.data.partition), Replicate)
        if not 0 <= index < clients and not for_all:
            more = ', and one beyond them has data under data.partition = "replicate" only' if elastic else ""
            known = f"with schedule.clients = {clients} they are 0 to {clients - 1}"
            raise ConfigError(f"There is no client {index}: {known}{more}.")
        _check_classes(config, data)
        self.index, self._config, self._data, self._labels_known = index, config, data, labels_known
        self._changes = parse_augment(config.data.augment)
        labels = (lambda: labels_of(data.train)) if labels_known else None
        self.indices = indices_of(
            config, index, shards(config, len(data.train), labels)[min(index, clients - 1)], len(data.test)
        )
        self._order: tuple[tuple[int, int], Tensor] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Mini-batches in one pass over the training samples, the short last one among them."""
        return self.batches("train")

    @property
    def steps_per_round(self) -> int:
        """Steps of a whole turn: all local epochs."""
        return self.steps_per_epoch * self._config.train.local_epochs

    def size(self, part: Part) -> int:
        """Return the number of samples."""
        return len(self.indices[part])

    def batches(self, part: Part) -> int:
        """Return the number of batches of `train.batch_size` that the part makes up."""
        return math.ceil(self.size(part) / self._config.train.batch_size)

    def train_ids(self, round: int, step: int) -> Tensor:
        """Return which training samples are the mini-batch of a step, counted over all local epochs, shape (B,).

        Raises `IndexError` for a step that the round does not have.
        """
        if not 0 <= step < self.steps_per_round:
            raise IndexError(f"step {step} of a round of {self.steps_per_round} steps")
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._batch(self._epoch_order(round, epoch), position)

    def train_batch(self, round: int, step: int) -> tuple[Tensor, Tensor]:
        """Return the mini-batch of a step, changed as `data.augment` says: x of shape (B, …), y of shape (B,).

        Raises `IndexError` for a step that the round does not have.
        """
        ids = self.train_ids(round, step)
        epoch = step // self.steps_per_epoch
        draws = draws_of(self._changes, self._config.run.seed, self.index, round, epoch, ids.tolist())
        return self._checked(gather(self._data.train, ids, draws))

    def eval_ids(self, part: EvalPart) -> Iterator[Tensor]:
        """Yield which samples are in the part's batches: of the training set for `validation`, else of the test set."""
        for position in range(self.batches(part)):
            yield self._batch(self.indices[part], position)

    def eval_batches(self, part: EvalPart) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the part's batches in fixed order, that of `eval_ids`."""
        dataset = self._data.test if part == "test" else self._data.train
        for ids in self.eval_ids(part):
            yield self._checked(gather(dataset, ids))

    def _epoch_order(self, round: int, epoch: int) -> Tensor:
        # Read once: another thread may be fetching for another epoch.
        known = self._order
        if known is None or known[0] != (round, epoch):
            train = self.indices["train"]
            order = permutation(len(train), self._config.run.seed, "order", self.index, round, epoch)
            known = self._order = ((round, epoch), train[order])
        return known[1]

    def _batch(self, indices: Tensor, position: int) -> Tensor:
        size = self._config.train.batch_size
        return indices[position * size : (position + 1) * size]

    def _checked(self, batch: Batch) -> Batch:
        if self._labels_known:
            _check_labels(self._config, batch[1])
        return batch


class Prefetch:
    """A client's mini-batches, each loaded while the one before is used. The results are those of `ClientData`.

    Only what takes longer to load than the hand-over between threads is loaded ahead, and nothing where loading draws
    from torch's default generator: the model draws from it meanwhile. `clock` returns seconds.
    """

    def __init__(self, data: ClientData, rounds: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._data, self._rounds, self._clock = data, rounds, clock
        self._ahead: tuple[Place, Future[Batch]] | None = None
        self._draws = False
        self._seconds = 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="zsplit-data")

    def train_batch(self, round: int, step: int) -> tuple[Tensor, Tensor]:
        """Return the mini-batch of a step, and begin to load the next one. Raises what loading it raises."""
        place, ahead = (round, step), self._ahead
        self._ahead = None
        if ahead and ahead[0] != place:
            wait([ahead[1]])  # a turn began anew: no two threads load at once
        batch = ahead[1].result() if ahead and ahead[0] == place else self._here(place)
        if self._seconds > WORTHWHILE and not self._draws and (following := self._next(place)):
            self._ahead = following, self._pool.submit(self._load, following)
        return batch

    def close(self) -> None:
        """End the thread, once it has loaded what it is loading."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _here(self, place: Place) -> Batch:
        before = torch.get_rng_state()
        batch = self._load(place)
        self._draws = self._draws or not torch.equal(before, torch.get_rng_state())
        return batch

    def _load(self, place: Place) -> Batch:
        began = self._clock()
        with one_thread():  # here too, so that a batch has the same bits wherever it is loaded
            batch = self._data.train_batch(*place)
        self._seconds = self._clock() - began
        return batch

    def _next(self, place: Place) -> Place | None:
        """Return the place of the mini-batch that is due after this one, if there is one."""
        round, step = place
        if step + 1 < self._data.steps_per_round:
            return round, step + 1
        return (round + 1, 0) if round + 1 < self._rounds else None


def _check_classes(config: Config, data: Data) -> None:
    found, outputs = data.classes, config.model.num_classes
    if found is not None and found > outputs:
        raise ConfigError(
            f"model.num_classes = {outputs} is too small, the data has {found} classes: "
            f"set model.num_classes = {found}."
        )


def _check_labels(config: Config, labels: Tensor) -> None:
    lowest, highest = (int(each) for each in labels.aminmax())
    if lowest < 0:
        raise ConfigError(f"The data has the label {lowest}: number its classes from 0.")
    if highest >= config.model.num_classes:
        raise ConfigError(
            f"model.num_classes = {config.model.num_classes} is too small, the data has the label {highest}: "
            f"set model.num_classes to {highest + 1} or more."
        )
