"""What a step takes besides the model: loading a mini-batch, and a message's way out of this peer and in again."""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from statistics import median
from types import TracebackType
from typing import NamedTuple, Self

import msgspec
import torch
import zmq
from torch import Tensor

from zsplit.codec import decode, encode
from zsplit.model import randomness
from zsplit.wire import frames
from zsplit.wire.messages import Lease, Tensors

Clock = Callable[[], float]
"""A clock in seconds."""

REPETITIONS = 20
LOADING_SECONDS = 0.3
"""Time in which more than one mini-batch is loaded."""


def batch_seconds(load: Callable[[], object], clock: Clock) -> float:
    """Return the seconds in which `load` loads a mini-batch: the median of some, the first left out if it can be."""
    taken: list[float] = []
    while len(taken) < REPETITIONS and sum(taken) < LOADING_SECONDS:
        began = clock()
        load()
        taken.append(clock() - began)
    return median(taken[1:] or taken)


class Packed(NamedTuple):
    """A message on its way to the link's thread."""

    header: Tensors
    buffers: list[memoryview]


class Messenger:
    """Times what a micro-batch adds at this peer beyond its bytes: one message out and one in.

    A message of one sample takes the way that it takes in training: the random state is set, tensors are encoded,
    another thread sends them through a socket, receives and decodes them, and hands them back. How long that takes
    depends on what ran before: between two slices of a model none of it is in the caches, and it takes three times as
    long as over and over. So `pass_on` is to be called where messages are, after a slice.
    """

    def __init__(self, clock: Clock, codec: str) -> None:
        self._clock, self._codec = clock, codec
        self._there: SimpleQueue[Packed | None] = SimpleQueue()
        self._back: SimpleQueue[dict[str, Tensor]] = SimpleQueue()
        self._context = zmq.Context()
        self._out, self._in = (self._context.socket(zmq.PAIR) for _ in range(2))
        self._in.connect(f"tcp://127.0.0.1:{self._out.bind_to_random_port('tcp://127.0.0.1')}")
        self._thread = threading.Thread(target=self._carry, name="zsplit-messenger", daemon=True)
        self._taken: list[float] = []

    def __enter__(self) -> Self:
        self._thread.start()
        self._pass_on()  # connects, and loads what is imported late
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._there.put(None)
        self._thread.join()
        self._context.destroy(linger=0)

    def pass_on(self) -> None:
        """Time one message."""
        began = self._clock()
        self._pass_on()
        self._taken.append(self._clock() - began)

    @property
    def seconds(self) -> float:
        """The median of what was timed, 0 where nothing was."""
        return median(self._taken) if self._taken else 0.0

    def _pass_on(self) -> None:
        with randomness(0, 0, 0, 0, 0):
            smashed = encode("smashed", torch.zeros(1, 1), self._codec)
        labels = encode("labels", torch.zeros(1, dtype=torch.int64))
        header = Tensors(
            run="run", session="session", lease=Lease(0, 0), kind="train", step=0, micro=0, leg=0,
            tensors=(smashed[0], labels[0]), scalars={"batch": 1.0, "micros": 1.0},
        )  # fmt: skip
        self._there.put(Packed(header, [smashed[1], labels[1]]))
        self._back.get()

    def _carry(self) -> None:
        """The thread of the link."""
        while (packed := self._there.get()) is not None:
            header, buffers = packed
            stamped = msgspec.structs.replace(header, scalars={**header.scalars, "left": self._clock()})
            self._out.send(frames.encode(stamped), zmq.SNDMORE)
            self._out.send_multipart(buffers, copy=False)
            received, *parts = self._in.recv_multipart(copy=False)
            message = frames.decode_data(received.bytes)
            assert isinstance(message, Tensors)
            tensors = zip(message.tensors, parts, strict=True)
            self._back.put({meta.what: decode(meta, memoryview(part.buffer)) for meta, part in tensors})
