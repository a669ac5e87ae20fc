"""Who is who, and what may pass: sessions, leases, relay rules, signs of life. No clock, no socket.

Routing ids are the sockets' own and mean nothing outside; a session is known by its token. The newest
hello of a process wins, and who sent a message is what the socket says, never what the message says.
"""

import secrets
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from zsplit.config import Config, to_json
from zsplit.wire.messages import (
    PROTOCOL,
    Attach,
    Attached,
    Beat,
    Bye,
    Chunk,
    ControlMessage,
    DataMessage,
    Detached,
    Evaluate,
    Fault,
    Finish,
    Hello,
    Init,
    Job,
    Lease,
    Merge,
    Orders,
    Prepared,
    Pull,
    Ref,
    Refused,
    Step,
    Tally,
    Telemetry,
    Tensors,
    Turn,
    Welcome,
)
from zsplit_broker.events import Done, Event, Joined, Lost, Ready
from zsplit_broker.scheduler import Peer, Scheduler

BROKER = b""
"""Stands for the broker itself among the destinations of a data message."""


class Session:
    """One process that said hello, and what it last said."""

    def __init__(self, token: str, hello: Hello, index: int, control: bytes, now: float) -> None:
        self.token = token
        self.role = hello.role
        self.index = index
        self.instance = hello.instance
        self.host = hello.host
        self.control = control
        self.data: bytes | None = None
        self.seen = now
        self.reachable = True
        self.challenged: tuple[str, float] | None = None
        self.revision = 0
        self.orders: tuple[tuple[Job, ...], tuple[str, ...], Finish | None] = ((), (), None)
        self.beat: Beat | None = None
        self.progress: tuple[tuple[Lease, int], ...] = ()
        self.progressed = now
        self.telemetry: Telemetry | None = None
        self.losses: list[float] = []
        self.steps = (0, 0)
        self.up = self.down = 0

    @property
    def peer(self) -> Peer:
        return self.role, self.index

    @property
    def name(self) -> str:
        return f"{self.role}.{self.index}"

    @property
    def prepared(self) -> Prepared | None:
        return self.beat.prepared if self.beat else None


class Route(NamedTuple):
    """Where a data message goes: a routing id or `BROKER`, and the message where its header must change."""

    to: bytes
    message: DataMessage | None = None


class Outgoing(NamedTuple):
    """A control message to send, to a routing id of the control socket."""

    to: bytes
    message: ControlMessage


class Router:
    """The broker's memory of its peers: what came in goes in, what to send or what happened comes out."""

    def __init__(
        self,
        config: Config,
        scheduler: Scheduler,
        run: str,
        ports: tuple[int, int],
        new_token: Callable[[], str] = lambda: secrets.token_hex(8),
    ) -> None:
        self.config = config
        self.scheduler = scheduler
        self.run = run
        self.ports = ports
        self.sessions: dict[str, Session] = {}
        self.traffic: dict[Lease, dict[str, list[int]]] = {}
        self.unanswered: dict[Lease, int] = {}
        self.dropped = 0
        self.finish: Finish | None = None
        self._new_token = new_token
        self._config_json = to_json(config)
        self._by_peer: dict[Peer, Session] = {}
        self._by_data: dict[bytes, Session] = {}
        self._ticked: float | None = None

    # Hello

    def hello(self, control: bytes, hello: Hello, now: float) -> Iterator[Outgoing | Lost]:
        """Answer a hello: welcome, refusal, or nothing yet (the peer says hello again); say who was replaced."""
        sentence = self._objection(hello)
        if sentence:
            yield Outgoing(control, Refused(sentence=sentence, code=2))
        elif hello.role == "monitor":
            yield Outgoing(control, self._welcome("", -1))
        else:
            yield from self._admit(control, hello, now)

    def _objection(self, hello: Hello) -> str:
        clients = self.config.schedule.clients
        if hello.protocol != PROTOCOL:
            return refuse_protocol(hello.protocol)
        if hello.role == "client" and hello.index >= clients:
            return (
                f"client index {hello.index} is out of range: this run has {clients} clients, "
                f"0 to {clients - 1} (schedule.clients)"
            )
        if self.finish is not None and all(s.instance != hello.instance for s in self.sessions.values()):
            return f"this run is over: {self.finish.sentence}"
        return ""

    def _admit(self, control: bytes, hello: Hello, now: float) -> Iterator[Outgoing | Lost]:
        index = hello.index if hello.index >= 0 else self._index_of(hello)
        if index is None:
            clients = self.config.schedule.clients
            yield Outgoing(control, Refused(sentence=f"all {clients} clients of this run are here", code=2))
            return
        there = self._by_peer.get((hello.role, index))
        if there is not None and there.instance != hello.instance:
            if there.reachable:
                yield from self._challenge(there, control, hello.instance)
                return
            yield self._lose(there, "its connection closed, and another process took its place")
            there = None
        if there is None:
            there = Session(self._new_token(), hello, index, control, now)
            self.sessions[there.token] = self._by_peer[there.peer] = there
        there.control, there.seen, there.reachable = control, now, True
        yield Outgoing(control, self._welcome(there.token, index))

    def _challenge(self, there: Session, newcomer: bytes, instance: str) -> Iterator[Outgoing]:
        """Find out whether the process that has the newcomer's index still lives; the newcomer asks again meanwhile.

        A beat since the challenge proves it, a probe that cannot be delivered disproves it, silence decides within
        `lease_seconds`.
        """
        if there.challenged is None or there.challenged[0] != instance:
            there.challenged = instance, there.seen
            yield Outgoing(there.control, self.orders(there))
        elif there.seen > there.challenged[1]:
            there.challenged = None
            sentence = f"{there.role} {there.index} is already running on {there.host or 'another host'}"
            yield Outgoing(newcomer, Refused(sentence=sentence, code=1))

    def _index_of(self, hello: Hello) -> int | None:
        """Return the index of a process that left it to us: the one it has, else the lowest that is free."""
        for session in self.sessions.values():
            if session.instance == hello.instance:
                return session.index
        limit = self.config.schedule.clients if hello.role == "client" else len(self.sessions) + 1
        return next((i for i in range(limit) if (hello.role, i) not in self._by_peer), None)

    def _welcome(self, token: str, index: int) -> Welcome:
        return Welcome(
            session=token,
            run=self.run,
            index=index,
            config=self._config_json,
            data_port=self.ports[0],
            events_port=self.ports[1],
        )

    # Control

    def control(self, message: Beat | Telemetry | Fault | Bye, control: bytes, now: float) -> list[Event]:
        """Take in a control message of a session; return the events that are news to the scheduler."""
        session = self.sessions.get(message.session)
        if session is None or session.control != control:
            self.dropped += 1
            return []
        session.seen, session.reachable = now, True
        match message:
            case Beat():
                return list(self._beat(session, message, now))
            case Telemetry():
                session.telemetry = message
                session.losses += message.losses
                return []
            case Fault(sentence=sentence):
                return [self._lose(session, sentence)]
            case Bye():
                return [self._lose(session, "it left")]

    def _beat(self, session: Session, beat: Beat, now: float) -> Iterator[Event]:
        session.beat = beat
        progress = tuple((h.lease, h.step) for h in beat.held)
        if progress != session.progress:
            session.progress, session.progressed = progress, now
        role = session.role
        if role == "monitor":
            return
        if beat.prepared is not None and session.peer not in self.scheduler.peers:
            yield Joined(role, session.index, beat.prepared)
        for held in beat.held:
            if held.state == "done" and held.step:
                session.steps = held.step, held.step
            work = self.scheduler.work.get(held.lease)
            if work is None or not _takes_part(session, work.job):
                continue
            if held.state in ("ready", "running") and role == "server" and not work.ready:
                yield Ready(held.lease)
            elif held.state == "done" and role not in work.done and (work.ready or isinstance(work.job, Init | Merge)):
                yield Done(held.lease, role, held.digest, self._with_traffic(held.lease, held.tally, role))

    def _with_traffic(self, lease: Lease, tally: Tally, role: str) -> Tally:
        """Add what the relay counted to the side that accounts for it: the client's, where there is one."""
        job = self.scheduler.work[lease].job
        if role == "server" and isinstance(job, Turn | Evaluate):
            return replace_tally(tally, {})
        counted = {kind: (up, down) for kind, (up, down) in self.traffic.get(lease, {}).items()}
        return replace_tally(tally, counted)

    def orders(self, session: Session, echo: float = 0.0, now: float = 0.0) -> Orders:
        """Return all that this peer should hold, under a new revision."""
        session.revision += 1
        session.orders = self._wanted(session)
        jobs, keep, finish = session.orders
        return Orders(revision=session.revision, jobs=jobs, keep=keep, finish=finish, echo=echo, now=now)

    def changed(self, peers: set[Peer] | None = None) -> Iterator[Session]:
        """Yield the sessions (of these peers, or all) whose orders are no longer what they were told."""
        for peer in list(self._by_peer) if peers is None else peers:
            session = self._by_peer.get(peer)
            if session is not None and session.orders != self._wanted(session):
                yield session

    def _wanted(self, session: Session) -> tuple[tuple[Job, ...], tuple[str, ...], Finish | None]:
        peer = session.peer
        return tuple(self.scheduler.jobs(peer)), tuple(self.scheduler.kept(peer)), self.finish

    def session(self, token: str) -> Session | None:
        return self.sessions.get(token)

    # Signs of life

    def tick(self, now: float) -> list[Event]:
        """Return a `Lost` for each peer that was silent, or made no progress, for too long."""
        self._forgive_own_pause(now)
        return [
            self._lose(session, sentence)
            for session in list(self.sessions.values())
            if (sentence := self._overdue(session, now))
        ]

    def _forgive_own_pause(self, now: float) -> None:
        """A broker that was stopped itself has heard nobody: that is not the peers' fault."""
        if self._ticked is not None and now - self._ticked > 2 * self.config.link.beat_seconds:
            for session in self.sessions.values():
                session.seen = min(now, session.seen + now - self._ticked)
                session.progressed = min(now, session.progressed + now - self._ticked)
        self._ticked = now

    def _overdue(self, session: Session, now: float) -> str:
        link = self.config.link
        if now - session.seen > link.lease_seconds:
            return f"no sign of life for {link.lease_seconds:g} s (link.lease_seconds)"
        late = link.progress_seconds and now - session.progressed > link.progress_seconds
        if late and self._is_asked(session):
            return f"it beats, but makes no progress for {link.progress_seconds:g} s (link.progress_seconds)"
        return ""

    def _is_asked(self, session: Session) -> bool:
        """Whether a turn waits for this peer: for a server that has tensors to answer, else for the client."""
        running = [held.lease for held in session.beat.held if held.state == "running"] if session.beat else []
        return any((self.unanswered.get(lease, 0) > 0) == (session.role == "server") for lease in running)

    def unreachable(self, control: bytes) -> None:
        """A control message could not be delivered: the connection is gone. Its peer may come back in time."""
        for session in self.sessions.values():
            if session.control == control:
                session.reachable = False

    def _lose(self, session: Session, sentence: str) -> Lost:
        self.sessions.pop(session.token, None)
        self._by_peer.pop(session.peer, None)
        if session.data is not None:
            self._by_data.pop(session.data, None)
        role = session.role
        if role == "monitor":
            raise AssertionError("monitors have no session")
        return Lost(role, session.index, sentence)

    # Data

    def route(self, sender: bytes, message: DataMessage, size: int) -> Route | None:
        """Return where a data message goes, or None where it may not pass (stale, or not its sender's).

        `size` is the message's bytes; they count towards the lease, by kind, up and down.
        """
        if isinstance(message, Attach):
            return Route(sender, self._attach(sender, message))
        session = self._by_data.get(sender)
        if session is None:
            return Route(sender, Detached(self.run, ""))
        if message.session != session.token or message.run != self.run:
            return None
        match message:
            case Tensors():
                return self._relay(session, message, size)
            case Step():
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
            return Detached(self.run, message.session)
        if session.data is not None:
            self._by_data.pop(session.data, None)
        before = self._by_data.get(sender)
        if before is not None:
            before.data = None
        session.data = sender
        self._by_data[sender] = session
        return Attached(self.run, session.token)

    def _relay(self, session: Session, message: Tensors | Step, size: int) -> Route | None:
        work = self.scheduler.work.get(message.lease)
        if work is None or not isinstance(work.job, Turn | Evaluate):
            return None
        job = work.job
        up = session.role == "client"
        if isinstance(message, Tensors) and message.kind != ("train" if isinstance(job, Turn) else "eval"):
            return None
        to = self._by_peer.get(("server", job.server) if up else ("client", job.client))
        if to is None or to.data is None or not work.ready or not _takes_part(session, job):
            return None
        if isinstance(message, Tensors):
            self.unanswered[message.lease] = self.unanswered.get(message.lease, 0) + (1 if up else -1)
            self._count_tensors(job, message, size, up)
        self._count_ends(session, to, size)
        return Route(to.data)

    def _pull(self, sender: bytes, session: Session, message: Pull) -> Route | None:
        work = self.scheduler.work.get(message.lease)
        if work is None or not _takes_part(session, work.job):
            return None
        if Ref(digest=message.digest, holder=message.source) not in refs_of(work.job):
            return None
        to = self.data_of(message.source)
        if to is not None:
            return Route(to, msgspec.structs.replace(message, origin=session.name))
        return Route(sender, self.lacking(message, session.name))

    def lacking(self, pull: Pull, origin: str) -> Chunk:
        """Return the answer to a pull whose holder cannot be reached: try again later."""
        return Chunk(self.run, "", pull.lease, origin, pull.digest, pull.offset, 0, pull.what)

    def _chunk(self, session: Session, message: Chunk, size: int) -> Route | None:
        ref = Ref(digest=message.digest, holder=session.name)
        if message.origin == "broker":
            return Route(BROKER) if ref in self.scheduler.storing.values() else None
        work = self.scheduler.work.get(message.lease)
        to = self._by_peer.get(peer_of(message.origin))
        if work is None or to is None or to.data is None:
            return None
        if ref not in refs_of(work.job) or not _takes_part(to, work.job):
            return None
        if session.role != to.role:
            self._count(message.lease, message.what, size, up=session.role == "client")
            self._count_ends(session, to, size)
        return Route(to.data)

    def name_of(self, data: bytes) -> str:
        """Return the name of the peer on a data connection, or nothing."""
        session = self._by_data.get(data)
        return session.name if session else ""

    def data_of(self, name: str) -> bytes | None:
        """Return the routing id of a peer's data connection, or None where it has none."""
        session = self._by_peer.get(peer_of(name))
        return session.data if session else None

    # Counting

    def _count_tensors(self, job: Turn | Evaluate, message: Tensors, size: int, up: bool) -> None:
        if isinstance(job, Evaluate):
            self._count(message.lease, "evaluation", size, up)
            return
        left = size
        for meta in message.tensors:
            self._count(message.lease, meta.what, meta.nbytes, up)
            left -= meta.nbytes
        self._count(message.lease, "headers", left, up)

    def _count(self, lease: Lease, kind: str, size: int, up: bool) -> None:
        self.traffic.setdefault(lease, {}).setdefault(kind, [0, 0])[0 if up else 1] += size

    def _count_ends(self, sender: Session, receiver: Session, size: int) -> None:
        sender.up += size
        receiver.down += size

    def forget(self, lease: Lease) -> None:
        """Drop what was counted for a lease that is over."""
        self.traffic.pop(lease, None)
        self.unanswered.pop(lease, None)


def refuse_protocol(theirs: int) -> str:
    """Return the sentence for a peer of another protocol version."""
    return (
        f"this broker speaks protocol {PROTOCOL}, you speak {theirs}: "
        "install the same version of zsplit on both machines"
    )


def refs_of(job: Job) -> list[Ref]:
    """Return the states that a job may pull."""
    match job:
        case Turn(base=base) | Evaluate(base=base):
            return [base]
        case Merge(base=base, inputs=inputs):
            return [base, *(ref for c in inputs for ref in (c.front, c.back))]
        case _:
            return []


def peer_of(name: str) -> Peer:
    """Return the peer that a name such as `client.3` stands for; one that is nobody's becomes nobody."""
    role, _, index = name.partition(".")
    return role, int(index) if len(index) < 10 and index.isascii() and index.isdigit() else -1


def replace_tally(tally: Tally, traffic: dict[str, tuple[int, int]]) -> Tally:
    """Return the tally with the relay's count of bytes in the place of whatever the peer claimed."""
    return msgspec.structs.replace(tally, traffic=traffic) if (tally.traffic or traffic) else tally


def _takes_part(session: Session, job: Job) -> bool:
    if session.role == "server":
        return session.index == job.server
    return isinstance(job, Turn | Evaluate) and session.index == job.client
