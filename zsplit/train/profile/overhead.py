"""What a step takes besides the model: loading a mini-batch, and a message's way through this peer."""

import queue
import threading
from collections.abc import Callable
from statistics import median

import torch

from zsplit.codec import decode, encode
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
        taken.append(_seconds(load, clock))
    return median(taken[1:] or taken)


def message_seconds(clock: Clock) -> float:
    """Return what a micro-batch adds at this peer beyond its bytes, one message out and one in.

    Tensors of one sample are encoded with their header, handed to another thread and back, and decoded.
    """
    there: queue.SimpleQueue[list[bytes | memoryview] | None] = queue.SimpleQueue()
    back: queue.SimpleQueue[list[bytes | memoryview]] = queue.SimpleQueue()

    def link() -> None:
        while (message := there.get()) is not None:
            back.put(message)

    def pass_on() -> None:
        there.put(_encoded())
        _decode(back.get())

    thread = threading.Thread(target=link, name="zsplit-overhead", daemon=True)
    thread.start()
    pass_on()
    taken = [_seconds(pass_on, clock) for _ in range(REPETITIONS)]
    there.put(None)
    thread.join()
    return median(taken)


def _encoded() -> list[bytes | memoryview]:
    """Return the frames of a micro-batch of one sample."""
    smashed, labels = encode("smashed", torch.zeros(1, 1)), encode("labels", torch.zeros(1, dtype=torch.int64))
    header = Tensors(
        run="run", session="session", lease=Lease(0, 0), kind="train", step=0, micro=0, leg=0,
        tensors=(smashed[0], labels[0]), scalars={"batch": 1.0, "micros": 1.0},
    )  # fmt: skip
    return [frames.encode(header), smashed[1], labels[1]]


def _decode(message: list[bytes | memoryview]) -> None:
    header = frames.decode_data(bytes(message[0]))
    if isinstance(header, Tensors):
        for meta, frame in zip(header.tensors, message[1:], strict=True):
            decode(meta, memoryview(frame))


def _seconds(act: Callable[[], object], clock: Clock) -> float:
    began = clock()
    act()
    return clock() - began
