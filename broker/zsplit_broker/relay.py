"""What may pass on the data connection, and where it goes: attaching, relay rules, pulls."""

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

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
    Tensors,
    Turn,
)
from zsplit_broker.scheduler import Scheduler
from zsplit_broker.session import Session
from zsplit_broker.traffic import DOWN, UP, Lane, Traffic
from zsplit_broker.work import Peer, client_of, parties, peer_of, refs_of

BROKER = b""
"""Stands for the broker itself among the destinations of a data message."""


class Route(NamedTuple):
    """Where a data message goes: a routing id or `BROKER`; `message`, without frames, goes in its place."""

    to: bytes
    message: DataMessage | None = None


KINDS: dict[type[Job], Kind] = {Turn: "train", Evaluate: "eval", Predict: "predict", Measure: "probe"}
"""The kind of tensors that pass under a job."""

KEY = 39
"""Bytes of a header by which lanes are looked up. With a run's usual names session and lease are in them, and no head
is shorter; which lane it is, if any, is then found by the whole head."""

LANES, MAX_HEAD = 8, 2048
"""Lanes that are kept of one key, since heads differ by leg and by the tensors' sizes, and the bytes of a head."""


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
        self._lanes: dict[bytes, list[Lane]] = {}

    def lane(self, sender: bytes, header: bytes, sizes: list[int]) -> Lane | None:
        """Return the lane that these tensors may take, or None where `check_sizes` and `route` have to find out.

        Nothing is decoded: tensors of the same head have passed before, and whoever gets these reads their tail. Who
        sends them on has the lane count them.
        """
        for lane in self._lanes.get(header[:KEY], ()):
            if lane.takes(sender, header, sizes):
                return lane
        return None

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
        self._forget_lanes()
        return Attached(self.run, session.token)

    def resends(self, peer: Peer) -> Iterator[tuple[bytes, Resend]]:
        """Yield what to tell the others when a peer's data connection is new, or the peer is gone: what went to it, or
        was asked of it, may be lost.
        """
        for lease, work in self.scheduler.work.items():
            concerned = parties(work.job)
            asked = any(peer_of(ref.holder) == peer for ref in refs_of(work.job))
            for other in concerned - {peer} if peer in concerned or asked else ():
                session = self.by_peer.get(other)
                if session is not None and session.data is not None:
                    yield session.data, Resend(self.run, session.token, lease)

    def _relay(self, session: Session, message: Tensors | Step, size: int) -> Route | None:
        to = self._other(session, message)
        if to is None or to.data is None or session.data is None:
            return None
        if isinstance(message, Step):
            session.up += size
            to.down += size
        else:
            lane = Lane(message, session.data, to.data, session, to, self._traffic(message.lease))
            lane.count(message.step, message.micro, message.scalars, size)
            self._keep(lane)
        return Route(to.data)

    def _keep(self, lane: Lane) -> None:
        """Keep a lane for the tensors that are like those it was made for."""
        alike = self._lanes.setdefault(lane.head[:KEY], [])
        if len(lane.head) <= MAX_HEAD and all(other.head != lane.head for other in alike):
            for old in alike[LANES - 1 :]:
                old.end()
            del alike[LANES - 1 :]
            alike.insert(0, lane)

    def _forget_lanes(self) -> None:
        for alike in self._lanes.values():
            for lane in alike:
                lane.end()
        self._lanes.clear()

    def _other(self, session: Session, message: Tensors | Step) -> Session | None:
        """Return the other one of the two that have the lease, or None where the message may not pass."""
        work = self.scheduler.work.get(message.lease)
        if work is None or not work.ready or not isinstance(work.job, Turn | Evaluate | Predict | Measure):
            return None
        job = work.job
        if not takes_part(session, job):
            return None
        legs = legs_of(job, session.role)
        if isinstance(message, Tensors) and (message.kind != KINDS[type(job)] or message.leg not in legs):
            return None
        return self.by_peer.get(("server", job.server) if session.role == "client" else ("client", job.client))

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
        self._forget_lanes()

    def forget(self, lease: Lease) -> None:
        """Drop what was found out and counted for a lease that is over."""
        self.traffic.pop(lease, None)
        self._forget_lanes()


def legs_of(job: Job, role: Role) -> range:
    """Return the legs on which a side may send: the client on even ones, the server on odd ones; 2 and 3 of a tail."""
    last = 4 if isinstance(job, Turn) and job.plan.tail else 2
    return range(0 if role == "client" else 1, last, 2)


def takes_part(session: Session, job: Job) -> bool:
    """Whether the peer is one of the job's two."""
    if session.role == "server":
        return session.index == job.server
    return session.index == client_of(job)
