"""Tensors out and in: encoded and decoded in order, each on a thread of its own, and timed on their way.

So while the trainer computes one micro-batch, the one before it is encoded, the one before that is on the wire, and
answers that came are decoded.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from zsplit.codec import decode, encode, is_view
from zsplit.train.link.clock import Clock
from zsplit.train.link.contexts import Contexts
from zsplit.train.link.flows import Flows
from zsplit.train.link.lanes import Lane
from zsplit.train.link.spans import Recorder
from zsplit.wire.messages import Step, TensorMeta, What
from zsplit.wire.messages import Tensors as TensorsMessage

SMALL = 256 * 1024
"""Bytes that are decoded where they arrive if they are raw: to hand them to another thread takes longer than to copy
them (about 20 µs against 10)."""

Tagged = tuple[What, Tensor, str]
"""What a tensor is, the tensor, and the codec it is to travel in."""


class Incoming(NamedTuple):
    """A message of a lease, its tensors, and when all of it was here (`time.monotonic`)."""

    message: TensorsMessage | Step
    tensors: dict[str, Tensor]
    arrived: float


class Outgoing(NamedTuple):
    """A message of a lease that is ready to leave, its frames, and since when."""

    message: TensorsMessage | Step
    frames: list[memoryview]
    ready: float


class Exchange:
    """Between the trainer and the link's thread: `post` takes what is to leave, `deliver` what has come.

    What came compressed is unpacked on `device`. `seed` is the run's.
    """

    def __init__(
        self,
        clock: Clock,
        spans: Recorder,
        post: Callable[[Outgoing], None],
        deliver: Callable[[Incoming], None],
        failed: Callable[[Exception], None],
        seed: int = 0,
    ) -> None:
        self.flows = Flows()
        self.contexts = Contexts(seed)
        self.device = torch.device("cpu")
        self._clock, self._spans = clock, spans
        self._post, self._deliver = post, deliver
        self._encoding = Lane("zsplit-encode", failed)
        self._decoding = Lane("zsplit-decode", failed)

    def send(self, message: TensorsMessage | Step, tensors: Sequence[Tagged] = ()) -> None:
        """Encode tensors and post the message with them; here, where the frames are the tensors' own memory."""
        here = all(is_view(tensor, codec) for _, tensor, codec in tensors)
        self._encoding.do(partial(self._encode, message, tensors), here)

    def receive(self, message: TensorsMessage | Step, buffers: list[memoryview], arrived: float) -> None:
        """Decode a message that arrived and deliver it."""
        nbytes = sum(buffer.nbytes for buffer in buffers)
        if isinstance(message, TensorsMessage) and "left" in message.scalars:
            begin = self._count(message, nbytes, arrived)
            self._spans.add("down", "receive", begin, arrived, message.step, message.micro, message.lease)
        here = nbytes < SMALL and (isinstance(message, Step) or all(meta.codec == "raw" for meta in message.tensors))
        self._decoding.do(partial(self._decode, message, buffers, arrived), here)

    def close(self) -> None:
        """End both threads."""
        self._encoding.close()
        self._decoding.close()

    def _count(self, message: TensorsMessage, nbytes: int, arrived: float) -> float:
        """Count the message for its lease; return when the way began to carry it, by our clock."""
        left = message.scalars["left"]
        return self._clock.ours(self.flows.add(message.lease, nbytes, left, self._clock.now(arrived)))

    def _encode(self, message: TensorsMessage | Step, tensors: Sequence[Tagged]) -> None:
        frames: list[memoryview] = []
        if isinstance(message, TensorsMessage) and tensors:
            if any(self.contexts.lacks(message, codec) for _, _, codec in tensors):
                return
            with self._spans.span("up", "encode", message.step, message.micro, message.lease):
                encoded = [self._encode_one(message, *tagged) for tagged in tensors]
            frames = [frame for _, frame in encoded]
            message = msgspec.structs.replace(message, tensors=tuple(meta for meta, _ in encoded))
        self._post(Outgoing(message, frames, time.monotonic()))

    def _encode_one(
        self, message: TensorsMessage, what: What, tensor: Tensor, codec: str
    ) -> tuple[TensorMeta, memoryview]:
        context = self.contexts.of(message, codec)
        encoded = encode(what, tensor, codec, context, None if codec == "raw" else self.contexts.seed(message))
        self.contexts.add(message, codec, context)
        return encoded

    def _decode(self, message: TensorsMessage | Step, buffers: list[memoryview], arrived: float) -> None:
        tensors: dict[str, Tensor] = {}
        if isinstance(message, TensorsMessage) and buffers:
            if any(self.contexts.lacks(message, meta.codec) for meta in message.tensors):
                return
            with self._spans.span("down", "decode", message.step, message.micro, message.lease):
                tensors = {
                    m.what: self._decode_one(message, m, buffer)
                    for m, buffer in zip(message.tensors, buffers, strict=True)
                }
        self._deliver(Incoming(message, tensors, arrived))

    def _decode_one(self, message: TensorsMessage, meta: TensorMeta, buffer: memoryview) -> Tensor:
        context = self.contexts.of(message, meta.codec)
        tensor = decode(meta, buffer, context, self.device)
        self.contexts.add(message, meta.codec, context)
        return tensor
