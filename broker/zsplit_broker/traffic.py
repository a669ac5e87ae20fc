"""What passed under a lease: the lanes that tensors take, how many bytes that was, and whose turn it is to send."""

from collections import defaultdict
from collections.abc import Mapping

from zsplit.wire.frames import MAX_HEADER, decode_tail, head_of, raw_size
from zsplit.wire.messages import TensorMeta, Tensors
from zsplit_broker.session import Session

UP, DOWN = 0, 1
"""Ways as seen from the client, and where they are counted."""


class Exchange:
    """Who is to send next under a lease, by the tensors of its latest step. Those that come again change nothing."""

    def __init__(self) -> None:
        self._step = -1
        self._micros = 1.0
        self._asked: set[tuple[int, int]] = set()
        self._answered: set[tuple[int, int]] = set()

    def note(self, step: int, micro: int, leg: int, micros: float | None) -> None:
        """Take in what passed, up on even legs and down on odd ones; `micros` are the step's, where it says."""
        if step < self._step:
            return
        if step > self._step:
            self._step = step
            self._asked, self._answered = set(), set()
        if leg % 2 == UP:
            self._asked.add((micro, leg))
            self._micros = self._micros if micros is None else micros
        else:
            self._answered.add((micro, leg - 1))

    @property
    def asks_server(self) -> bool:
        """Whether the server has tensors that it did not answer."""
        return not self._asked <= self._answered

    def is_held_up(self, window: int) -> bool:
        """Whether the client can send no more before an answer comes: its window is full, or its step has all."""
        open_ = len(self._asked - self._answered)
        return open_ >= window or (open_ > 0 and sum(leg == 0 for _, leg in self._asked) >= self._micros)


class Traffic:
    """What was relayed under a lease: bytes by kind, up and down, and whose turn it is to send.

    `raw` is what the bytes would have been without codecs. `at_work` are those of the `seconds` in which the client was
    to send, and not held up by its server.
    """

    def __init__(self) -> None:
        self.bytes: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
        self.raw: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
        self.exchange = Exchange()
        self.seconds = self.at_work = 0.0

    def count(self, kind: str, way: int, size: int, raw: int) -> None:
        """Count bytes of a kind."""
        self.bytes[kind][way] += size
        self.raw[kind][way] += raw


class Lane:
    """Where tensors of one head go, and where they count. Of their headers all but the tail (step, micro, scalars) is
    known: the `head` is what it begins with, `sizes` are those of the frames.

    What was found out about the first of them holds for all until a connection, a session or a lease ends; then the
    relay forgets all lanes. `next` is the one that the message after such a one took the last time: mostly two ends
    take turns, and then no lane has to be looked up.
    """

    def __init__(
        self, message: Tensors, sender: bytes, to: bytes, source: Session, target: Session, traffic: Traffic
    ) -> None:
        self.head = head_of(message)
        self.sizes = [meta.nbytes for meta in message.tensors]
        self._raw = [raw_of(meta) for meta in message.tensors]
        self.sender, self.to = sender, to
        self.next: Lane | None = None
        self._message, self._source, self._target, self._traffic = message, source, target, traffic

    def end(self) -> None:
        """Take no message any more, whoever knows this lane as the next one, and know none."""
        self.sender, self.next = b"", None

    def takes(self, sender: bytes, header: bytes, sizes: list[int]) -> bool:
        """Return whether a message with frames of these sizes may take this lane."""
        return (
            self.sender == sender and header.startswith(self.head) and self.sizes == sizes and len(header) <= MAX_HEADER
        )

    def size(self, header: bytes) -> int:
        """Return the bytes of a message with such a header."""
        return len(header) + sum(self.sizes)

    def take(self, header: bytes) -> None:
        """Count a message that took this lane. Raises RemoteProtocolError where its tail is none."""
        self.count(*decode_tail(header[len(self.head) :]), self.size(header))

    def count(self, step: int, micro: int, scalars: Mapping[str, float], size: int) -> None:
        """Count a message of `size` bytes."""
        leg, kind, metas = self._message.leg, self._message.kind, self._message.tensors
        self._source.up += size
        self._target.down += size
        self._traffic.exchange.note(step, micro, leg, scalars.get("micros"))
        count, way = self._traffic.count, leg % 2
        if kind == "eval":
            count("evaluation", way, size, size + sum(self._raw) - sum(self.sizes))
            return
        for meta, raw in zip(metas, self._raw, strict=True):
            count(meta.what, way, meta.nbytes, raw)
            size -= meta.nbytes
        count("headers", way, size, size)


def raw_of(meta: TensorMeta) -> int:
    """Return the bytes that a tensor would have had without its codec."""
    return meta.nbytes if meta.codec == "raw" else raw_size(meta)
