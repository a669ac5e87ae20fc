"""The processes of one server, as torchrun starts them: who is who, and what goes between them.

The first process leads: it alone has a link to the broker. It tells the others what to do, one command after the
other, and each command says which tensors follow it. All of it travels with torch.distributed's collectives.
"""

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

import msgspec
import torch
import torch.distributed as dist

# Imported later, as DistributedDataParallel does, its functions would hold the process group as a default argument, and
# `Team.leave` could not end it.
import torch.distributed.nn
from torch import Tensor

from zsplit.codec import DTYPES, NAMES
from zsplit.errors import ConfigError

PATIENCE = timedelta(days=365)
"""How long a process waits for the next command. One that has died is noticed at once, by its closed connection."""


class Command(msgspec.Struct, frozen=True, tag=True):
    """What the first process tells the others."""


class Begin(Command, frozen=True):
    """Build the model of this config (as JSON), for samples of this shape."""

    config: bytes
    shape: tuple[int, ...]


class Make(Command, frozen=True):
    """Make a back by this number, between these places; those that the first process has no more are forgotten."""

    half: int
    cut: str
    tail: str
    forget: tuple[int, ...]


class Load(Command, frozen=True):
    """Take over a version: of its tensors these follow, as names, dtypes and shapes."""

    half: int
    owner: int | None
    version: str
    entries: tuple[tuple[str, str, tuple[int, ...]], ...]


class Call(Command, frozen=True):
    """Do to a back what the first process does to its own: a method of `Half`, by name."""

    half: int
    method: str
    arguments: tuple[int | float, ...] = ()


class Forward(Command, frozen=True):
    """Run a slice of a micro-batch. The tensor that is cut into slices has this dtype and shape.

    `learns`: it will be taken back, by this number. `place` is what all that is random is drawn from.
    """

    half: int
    number: int
    dtype: str
    shape: tuple[int, ...]
    training: bool
    learns: bool
    wants_gradient: bool
    place: tuple[int, ...]


class Backward(Command, frozen=True):
    """Take a slice back, and, with the last one of a step, add up all processes' gradients."""

    half: int
    number: int
    last: bool


class End(Command, frozen=True):
    """The run is over."""


Told = Begin | Make | Load | Call | Forward | Backward | End


class Holder(Protocol):
    """What has torch objects that hold the process group."""

    def let_go(self) -> None:
        """Drop them; nothing is computed any more."""


class Team:
    """The processes of one server; `rank` is this one's number, and 0 leads."""

    def __init__(self, rank: int, size: int, local: int = 0) -> None:
        self.rank, self.size, self._local = rank, size, local
        self._holders = weakref.WeakSet[Holder]()

    @classmethod
    def join(cls, environment: Mapping[str, str] = os.environ) -> "Team":
        """Meet the others, where the environment says; return once all are there."""
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size(), int(environment.get("LOCAL_RANK", "0")))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def held_by(self, holder: Holder) -> None:
        """Have this one let go when the processes part."""
        self._holders.add(holder)

    def leave(self) -> None:
        """End what `join` began, its threads included; the first process tells the others.

        A thread of gloo's that were still there when the interpreter ends, and had a tensor to let go of, would abort
        the process: torch has it wait for an interpreter that is no more (github.com/pytorch/pytorch/issues/190489).
        """
        if self.leads:
            self.tell(End())
        for holder in self._holders:
            holder.let_go()
        dist.destroy_process_group()

    def device(self, asked: str) -> torch.device:
        """Return this process's device: a GPU of its own on its machine, or the CPU.

        Raises ConfigError where there are fewer GPUs than processes, where torch has no NCCL, and for other devices.
        """
        if asked == "auto":
            asked = "cuda" if torch.cuda.is_available() else "cpu"
        if asked == "cpu":
            return torch.device("cpu")
        if asked != "cuda":
            raise ConfigError(
                f"A server of {self.size} processes cannot use the device {asked!r}: give --device cuda, and each "
                "process takes a GPU of its own, or --device cpu."
            )
        if not dist.is_nccl_available():
            raise ConfigError(
                f"This torch has no NCCL, which a server of {self.size} processes needs on GPUs: use --device cpu, or "
                "start one process."
            )
        count = torch.cuda.device_count()
        if self._local >= count:
            raise ConfigError(
                f"torchrun started more processes on this machine than it has GPUs ({count}): "
                "lower --nproc-per-node, or use --device cpu."
            )
        torch.cuda.set_device(self._local)
        return torch.device("cuda", self._local)

    # Commands

    def tell(self, command: Told) -> None:
        """Tell all others."""
        told = msgspec.msgpack.encode(command)
        with talking():
            dist.broadcast(torch.tensor([len(told)]), 0)
            dist.broadcast(torch.frombuffer(bytearray(told), dtype=torch.uint8), 0)

    def hear(self) -> Told:
        """Return the next command, as soon as it is there."""
        size = torch.zeros(1, dtype=torch.int64)
        with talking():
            dist.broadcast(size, 0)
            told = torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(told, 0)
        command: Told = msgspec.msgpack.decode(told.numpy().data, type=Told)
        return command

    # Tensors

    def give(self, tensors: Sequence[Tensor]) -> None:
        """Give all others these tensors."""
        data = [tensor.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
        if data:
            with talking():
                dist.broadcast(torch.cat(data), 0)

    def take(self, entries: Sequence[tuple[str, str, tuple[int, ...]]]) -> dict[str, Tensor]:
        """Return the tensors that the first process gives, by name, in the host's memory."""
        empty = {name: torch.empty(shape, dtype=DTYPES[dtype]) for name, dtype, shape in entries}
        if empty:
            data = torch.empty(sum(tensor.nbytes for tensor in empty.values()), dtype=torch.uint8)
            with talking():
                dist.broadcast(data, 0)
            pieces = torch.split(data, [tensor.nbytes for tensor in empty.values()])
            for tensor, piece in zip(empty.values(), pieces, strict=True):
                tensor.reshape(-1).view(torch.uint8).copy_(piece)
        return empty

    def sizes(self, samples: int) -> list[int]:
        """Return how many samples of a micro-batch each process has: balanced, as `tensor_split` does."""
        return [samples // self.size + (rank < samples % self.size) for rank in range(self.size)]

    def deal(self, whole: Tensor, fill: Tensor) -> Tensor:
        """Give every other process its slice of a tensor (samples, …), return one's own.

        All get the same number of rows: `fill` (1, …) makes up for what is missing, so that no slice is empty.
        """
        rows = self.sizes(len(whole))[0]
        slices = [
            (each if len(each) == rows else torch.cat([each, fill])).contiguous()
            for each in whole.tensor_split(self.size)
        ]
        with talking():
            dist.scatter(torch.empty_like(slices[0]), slices, 0)
        return slices[0]

    def draw(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return this process's slice of a tensor of this shape and dtype that the first process deals."""
        mine = torch.empty((self.sizes(shape[0])[0], *shape[1:]), dtype=dtype, device=device)
        with talking():
            dist.scatter(mine, None, 0)
        return mine

    def collect(self, mine: Tensor, samples: int) -> Tensor | None:
        """Return what the slices (rows, …) of all processes are together (samples, …), to the first process."""
        mine = mine.detach().contiguous()
        slices = [torch.empty_like(mine) for _ in range(self.size)] if self.leads else None
        with talking():
            dist.gather(mine, slices, 0)
        if slices is None:
            return None
        return torch.cat([each[:own] for each, own in zip(slices, self.sizes(samples), strict=True)])


@contextmanager
def talking() -> Iterator[None]:
    """Leave where another process of this server is gone: without a fault of one's own, as a server that is lost."""
    try:
        yield
    except RuntimeError as error:
        raise SystemExit("zsplit: another process of this server has ended: torchrun says which.") from error


def entries_of(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """Return names, dtypes and shapes of tensors."""
    return tuple((name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items())
