"""What may pass on the data connection, and where it goes: attaching, relay rules, pulls, and a count of all that."""

from collections import defaultdict
from collections.abc import Iterator, Sequence, Sized
from typing import NamedTuple

import msgspec

from zsplit.wire.frames import LARGEST, raw_size
from zsplit.wire.messages import (
    Attach,
    Attached,
    Chunk,
    DataMessage,
    Detached,
    Evaluate,
    Job,
    Kind,
    Lease,
    Measure,
    Predict,
    Pull,
    Ref,
    Resend,
    Role,
    Step,
    TensorMeta,
    Tensors,
    Turn,
)
from zsplit_broker.scheduler import Scheduler
from zsplit_broker.session import Session
from zsplit_broker.work import Peer, client_of, peer_of, refs_of

BROKER = b""
"""Stands for the broker itself among the destinations of a data message."""


class Route(NamedTuple):
    """Where a data message goes: a routing id or `BROKER`; `message`, without frames, goes in its place."""

    to: bytes
    message: DataMessage | None = None


KINDS: dict[type[Job], Kind] = {Turn: "train", Evaluate: "eval", Predict: "predict", Measure: "probe"}
"""The kind of tensors that pass under a job."""

UP, DOWN = 0, 1
"""Ways as seen from the client, and where they are counted."""


class Exchange:
    """Who is to send next under a lease, by the tensors of its latest step. Those that come again change nothing."""

    def __init__(self) -> None:
        self._step = -1
        self._micros = 1.0
        self._asked: set[tuple[int, int]] = set()
        self._answered: set[tuple[int, int]] = set()

    def note(self, message: Tensors, way: int) -> None:
        """Take in what passed, one way or the other."""
        if message.step < self._step:
            return
        if message.step > self._step:
            self._step = message.step
            self._asked, self._answered = set(), set()
        if way == UP:
            self._asked.add((message.micro, message.leg))
            self._micros = message.scalars.get("micros", self._micros)
        else:
            self._answered.add((message.micro, message.leg - 1))

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
    """What was found out about one peer's tensors under one lease: where they go and where they count.

    Tensors with the same `marks` (run, session, kind) on its `legs` take it until a connection, a session or a lease
    ends; then the relay forgets all lanes.
    """

    def __init__(
        self,
        marks: tuple[str, str, Kind],
        legs: range,
        sender: Session,
        receiver: Session,
        to: bytes,
        traffic: Traffic,
    ) -> None:
        self.marks = marks
        self.legs = legs
        self.to = to
        self._sender = sender
        self._receiver = receiver
        self._traffic = traffic
        self._column = UP if sender.role == "client" else DOWN

    def count(self, message: DataMessage, size: int) -> None:
        """Count a message of `size` bytes that took this lane."""
        self._sender.up += size
        self._receiver.down += size
        if not isinstance(message, Tensors):
            return
        self._traffic.exchange.note(message, self._column)
        count, column = self._traffic.count, self._column
        if message.kind == "eval":
            count("evaluation", column, size, size + sum(raw_of(meta) - meta.nbytes for meta in message.tensors))
            return
        for meta in message.tensors:
            count(meta.what, column, meta.nbytes, raw_of(meta))
            size -= meta.nbytes
        count("headers", column, size, size)


class Relay:
    """The data plane: it knows which connection is whose, and asks the scheduler's open work what may pass."""

    def __init__(
        self, run: str, scheduler: Scheduler, sessions: dict[str, Session], by_peer: dict[Peer, Session]
    ) -> None:
        self.run = run
        self.scheduler = scheduler
        self.sessions = sessions
        self.by_peer = by_peer
        self.by_data: dict[bytes, Session] = {}
        self.traffic: dict[Lease, Traffic] = {}
        self._lanes: dict[tuple[bytes, Lease], Lane] = {}

    def lane(self, sender: bytes, message: DataMessage, frames: Sequence[Sized]) -> Lane | None:
        """Return the lane that these tensors may take, or None where `check_sizes` and `route` have to find out.

        Who sends a message on such a lane counts it there, best when it is on its way. All that a lone message waits
        for is in this one function: its code and data have left the caches since the last one.
        """
        if not isinstance(message, Tensors):
            return None
        lane = self._lanes.get((sender, message.lease))
        if lane is None or lane.marks != (message.run, message.session, message.kind) or message.leg not in lane.legs:
            return None
        metas = message.tensors
        if len(metas) != len(frames):
            return None
        for meta, frame in zip(metas, frames, strict=False):
            if meta.nbytes != len(frame) or (meta.codec != "raw" and raw_size(meta) > LARGEST):
                return None
        return lane

    def route(self, sender: bytes, message: DataMessage, size: int) -> Route | None:
        """Return where a data message goes, or None where it may not pass (stale, or not its sender's).

        `size` is the message's bytes; they count towards the lease, by kind, up and down.
        """
        if isinstance(message, Attach):
            return Route(sender, self._attach(sender, message))
        session = self.by_data.get(sender)
        if session is None:
            return Route(sender, Detached(self.run, ""))
        if message.session != session.token or message.run != self.run:
            return None
        match message:
            case Tensors() | Step():
                return self._relay(session, message, size)
            case Pull():
                return self._pull(sender, session, message)
            case Chunk():
                return self._chunk(session, message, size)
            case _:
                return None

    def _attach(self, sender: bytes, message: Attach) -> DataMessage:
        session = self.sessions.get(message.session)
        if session is None or message.run != self.run:
            return Detached(self.run, "")
        if session.data is not None:
            self.by_data.pop(session.data, None)
        before = self.by_data.get(sender)
        if before is not None:
            before.data = None
        session.data = sender
        self.by_data[sender] = session
        self._lanes.clear()
        return Attached(self.run, session.token)

    def resends(self, session: Session) -> Iterator[tuple[bytes, Resend]]:
        """Yield what to tell the others when a peer's data connection is new: what went to it, or was asked of it, may
        be lost.
        """
        for lease, work in self.scheduler.work.items():
            parties = self._parties(work.job)
            asked = any(ref.holder == session.name for ref in refs_of(work.job))
            for other in parties if session in parties or asked else ():
                if other is not session and other.data is not None:
                    yield other.data, Resend(self.run, other.token, lease)

    def _parties(self, job: Job) -> list[Session]:
        """Return the sessions of those who do a job, where they are here."""
        peers: list[Peer] = [("server", job.server)]
        client = client_of(job)
        if client is not None:
            peers.append(("client", client))
        return [self.by_peer[peer] for peer in peers if peer in self.by_peer]

    def _relay(self, session: Session, message: Tensors | Step, size: int) -> Route | None:
        lane = self._open_lane(session, message)
        if lane is None:
            return None
        lane.count(message, size)
        return Route(lane.to)

    def _open_lane(self, session: Session, message: Tensors | Step) -> Lane | None:
        """Return the lane of what this peer sends under the lease, or None where the message may not pass."""
        work = self.scheduler.work.get(message.lease)
        if work is None or not work.ready or not isinstance(work.job, Turn | Evaluate | Predict | Measure):
            return None
        job = work.job
        kind = KINDS[type(job)]
        to = self.by_peer.get(("server", job.server) if session.role == "client" else ("client", job.client))
        if to is None or to.data is None or session.data is None or not takes_part(session, job):
            return None
        legs = legs_of(job, session.role)
        if isinstance(message, Tensors) and (message.kind != kind or message.leg not in legs):
            return None
        marks = self.run, session.token, kind
        lane = Lane(marks, legs, session, to, to.data, self._traffic(message.lease))
        self._lanes[session.data, message.lease] = lane
        return lane

    def _pull(self, sender: bytes, session: Session, message: Pull) -> Route | None:
        work = self.scheduler.work.get(message.lease)
        if work is None or not takes_part(session, work.job):
            return None
        if Ref(digest=message.digest, holder=message.source) not in refs_of(work.job):
            return None
        asked = msgspec.structs.replace(message, origin=session.name)
        if message.source == "broker":
            return Route(BROKER, asked)
        to = self.data_of(message.source)
        if message.digest in self.scheduler.stored and not self._has(message.source, message.digest):
            return Route(BROKER, asked)  # who held it is gone, or another process by now, and the disk has it
        if to is not None:
            return Route(to, asked)
        return Route(sender, self.lacking(message, session.name))

    def lacking(self, pull: Pull, origin: str) -> Chunk:
        """Return the answer to a pull whose holder cannot be reached: try again later."""
        return Chunk(self.run, "", pull.lease, origin, pull.digest, pull.offset, 0, pull.what)

    def _chunk(self, session: Session, message: Chunk, size: int) -> Route | None:
        ref = Ref(digest=message.digest, holder=session.name)
        if message.origin == "broker":
            return Route(BROKER) if ref in self.scheduler.storing.values() else None
        work = self.scheduler.work.get(message.lease)
        to = self.by_peer.get(peer_of(message.origin))
        if work is None or to is None or to.data is None:
            return None
        if ref not in refs_of(work.job) or not takes_part(to, work.job):
            return None
        if session.role != to.role:
            self._traffic(message.lease).count(message.what, UP if session.role == "client" else DOWN, size, size)
            session.up += size
            to.down += size
        return Route(to.data)

    def _has(self, name: str, digest: str) -> bool:
        """Whether a peer is connected and says that it has a state."""
        holder = self.by_peer.get(peer_of(name))
        return holder is not None and holder.data is not None and holder.beat is not None and digest in holder.beat.have

    def name_of(self, data: bytes) -> str:
        """Return the name of the peer on a data connection, or nothing."""
        session = self.by_data.get(data)
        return session.name if session else ""

    def data_of(self, name: str) -> bytes | None:
        """Return the routing id of a peer's data connection, or None where it has none."""
        session = self.by_peer.get(peer_of(name))
        return session.data if session else None

    def asks_server(self, lease: Lease) -> bool:
        """Whether the server has tensors of this lease that it did not answer yet."""
        return lease in self.traffic and self.traffic[lease].exchange.asks_server

    def pass_time(self, seconds: float) -> None:
        """Note how long it was whose turn to send."""
        for lease, work in self.scheduler.work.items():
            if isinstance(work.job, Turn) and work.ready:
                traffic = self._traffic(lease)
                traffic.seconds += seconds
                traffic.at_work += 0.0 if traffic.exchange.is_held_up(work.job.plan.window) else seconds

    def at_work(self) -> dict[int, float]:
        """Return the share of each turn's time in which it was the client that was to send, by client."""
        turns = [work.job for work in self.scheduler.work.values() if isinstance(work.job, Turn)]
        known = {turn.client: self.traffic[turn.lease] for turn in turns if turn.lease in self.traffic}
        return {client: traffic.at_work / traffic.seconds for client, traffic in known.items() if traffic.seconds}

    def counted(self, lease: Lease) -> dict[str, tuple[int, int]]:
        """Return the bytes relayed under a lease by kind, up and down as seen from the client."""
        traffic = self.traffic.get(lease)
        return {kind: (up, down) for kind, (up, down) in traffic.bytes.items()} if traffic else {}

    def counted_raw(self, lease: Lease) -> dict[str, tuple[int, int]]:
        """Return what these bytes would have been without codecs."""
        traffic = self.traffic.get(lease)
        return {kind: (up, down) for kind, (up, down) in traffic.raw.items()} if traffic else {}

    def _traffic(self, lease: Lease) -> Traffic:
        return self.traffic.setdefault(lease, Traffic())

    def detach(self, session: Session) -> None:
        """A session is over: its data connection is nobody's."""
        if session.data is not None:
            self.by_data.pop(session.data, None)
        self._lanes.clear()

    def forget(self, lease: Lease) -> None:
        """Drop what was found out and counted for a lease that is over."""
        self.traffic.pop(lease, None)
        self._lanes.clear()


def raw_of(meta: TensorMeta) -> int:
    """Return the bytes that a tensor would have had without its codec."""
    return meta.nbytes if meta.codec == "raw" else raw_size(meta)


def legs_of(job: Job, role: Role) -> range:
    """Return the legs on which a side may send: the client on even ones, the server on odd ones; 2 and 3 of a tail."""
    last = 4 if isinstance(job, Turn) and job.plan.tail else 2
    return range(0 if role == "client" else 1, last, 2)


def takes_part(session: Session, job: Job) -> bool:
    """Whether the peer is one of the job's two."""
    if session.role == "server":
        return session.index == job.server
    return session.index == client_of(job)
