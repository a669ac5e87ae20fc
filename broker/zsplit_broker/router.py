"""Who is who: hellos, sessions, orders, signs of life. What may pass is `relay`. No clock, no socket.

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
    Beat,
    Bye,
    ControlMessage,
    Fault,
    Finish,
    Hello,
    Job,
    Lease,
    Orders,
    Refused,
    Tally,
    Telemetry,
    Welcome,
)
from zsplit_broker.events import Done, Event, Joined, Lost, Ready
from zsplit_broker.relay import Relay, takes_part
from zsplit_broker.scheduler import Scheduler
from zsplit_broker.session import Session
from zsplit_broker.work import Peer, client_of

NEWCOMERS = 16
"""How many processes at once can wait for an answer because they ask for one index; of more the first ask again."""


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
        self.dropped = 0
        self.finish: Finish | None = None
        self._new_token = new_token
        self._config_json = to_json(config)
        self._by_peer: dict[Peer, Session] = {}
        self.relay = Relay(run, scheduler, self.sessions, self._by_peer)
        self._ticked: float | None = None
        self._absent_since: float | None = None

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
        if hello.role == "client" and hello.index >= clients and not self.config.schedule.elastic:
            return (
                f"client index {hello.index} is out of range: this run has {clients} clients, "
                f"0 to {clients - 1} (schedule.clients)"
            )
        if self.finish is not None and hello.role != "monitor" and not self._is_known(hello):
            return f"this run is over: {self.finish.sentence}"
        return ""

    def _is_known(self, hello: Hello) -> bool:
        """Whether this very process is or was a peer of the run, maybe of the broker before this one."""
        here = any(session.instance == hello.instance for session in self.sessions.values())
        return here or any(joined.instance == hello.instance for joined in self.scheduler.known.values())

    def _admit(self, control: bytes, hello: Hello, now: float) -> Iterator[Outgoing | Lost]:
        if hello.index < 0:
            silent = [s for s in self.silent(now, 1.2) if s.role == hello.role and s.instance != hello.instance]
            quiet = [session for session in silent if session.reachable]
            yield from (Outgoing(session.control, self.orders(session)) for session in quiet)
            if quiet:
                return  # it asks again, and may have the index of one that cannot be reached
        index = hello.index if hello.index >= 0 and not self._is_given_away(hello) else self._index_of(hello)
        if index is None and any(peer not in self._by_peer for peer in self.scheduler.peers):
            return  # one that was here before this broker may not come back: ask again
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
        elif there is None:
            yield from self._replace_absent(hello, index)
        if there is None:
            there = Session(self._new_token(), hello, index, control, now)
            self.sessions[there.token] = self._by_peer[there.peer] = there
        there.control, there.seen, there.reachable = control, now, True
        yield Outgoing(control, self._welcome(there.token, index))

    def _replace_absent(self, hello: Hello, index: int) -> Iterator[Lost]:
        """Say that a peer of the broker before this one is gone where another process has its index now."""
        before = self.scheduler.peers.get((hello.role, index))
        if before is not None and before.instance != hello.instance:
            yield Lost(before.role, index, "another process took its place while the broker was away")

    def _is_given_away(self, hello: Hello) -> bool:
        """Whether a server that slept is somebody else by now, or another one is what it was.

        To a server an index is no more than a name: it works on under any other.
        """
        if hello.role != "server":
            return False
        there = self._by_peer.get((hello.role, hello.index))
        renamed = any(s.instance == hello.instance and s.index != hello.index for s in self.sessions.values())
        return renamed or (there is not None and self._has_proved_alive(there, hello.instance))

    def _has_proved_alive(self, there: Session, newcomer: str) -> bool:
        """Whether a process has obeyed orders with which it was challenged for this newcomer."""
        challenge = there.challenged.get(newcomer)
        return challenge is not None and there.beat is not None and there.beat.revision >= challenge

    def _challenge(self, there: Session, newcomer: bytes, instance: str) -> Iterator[Outgoing]:
        """Find out whether the process that has the newcomer's index still lives; the newcomer asks again meanwhile.

        A beat that follows the orders with which it was challenged proves it: any other may have been under way since
        before its death. A probe that cannot be delivered disproves it, silence decides within `lease_seconds`.
        """
        if instance not in there.challenged:
            probe = self.orders(there)
            there.challenged[instance] = probe.revision
            if len(there.challenged) > NEWCOMERS:
                del there.challenged[next(iter(there.challenged))]
            yield Outgoing(there.control, probe)
        elif self._has_proved_alive(there, instance):
            del there.challenged[instance]
            sentence = f"{there.role} {there.index} is already running on {there.host or 'another host'}"
            yield Outgoing(newcomer, Refused(sentence=sentence, code=1))

    def _index_of(self, hello: Hello) -> int | None:
        """Return the index of a process that left it to us: the one it has, else the lowest that is free.

        A newcomer takes the place of one that cannot be reached, a process that slept takes nobody's.
        """
        for session in self.sessions.values():
            if session.instance == hello.instance:
                return session.index
        dead = [s.index for s in self.sessions.values() if s.role == hello.role and not s.reachable]
        if dead and hello.index < 0:
            return min(dead)
        taken = {index for role, index in (*self._by_peer, *self.scheduler.peers) if role == hello.role}
        bounded = hello.role == "client" and not self.config.schedule.elastic
        limit = self.config.schedule.clients if bounded else len(taken) + 1
        return next((i for i in range(limit) if i not in taken), None)

    def _welcome(self, token: str, index: int) -> Welcome:
        return Welcome(
            session=token,
            run=self.run,
            index=index,
            config=self._config_json,
            data_port=self.ports[0],
            events_port=self.ports[1],
            serving=self.scheduler.phase == "serving",
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
            case Fault(sentence=sentence, fatal=fatal):
                return [self._lose(session, sentence, fatal)]
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
            yield Joined(role, session.index, beat.prepared, session.instance)
        for held in beat.held:
            if held.state == "done" and held.step:
                session.steps = held.step, held.step
            work = self.scheduler.work.get(held.lease)
            if work is None or not takes_part(session, work.job):
                continue
            if held.state != "opening" and role == "server" and not work.ready and client_of(work.job) is not None:
                yield Ready(held.lease)  # also where it is done at once, with nothing left to do
            if held.state == "done" and role not in work.done and (role == "server" or work.ready):
                tally = self._with_traffic(held.lease, held.tally, role)
                yield Done(held.lease, role, held.digest, tally, held.profile, held.link)

    def _with_traffic(self, lease: Lease, tally: Tally, role: str) -> Tally:
        """Add what the relay counted to the side that accounts for it: the client's, where there is one."""
        job = self.scheduler.work[lease].job
        if role == "server" and client_of(job) is not None:
            return replace_tally(tally, {}, {})
        return replace_tally(tally, self.relay.counted(lease), self.relay.counted_raw(lease))

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
        if self._ticked is not None and not self._forgive_own_pause(now - self._ticked, now):
            self.relay.pass_time(now - self._ticked)
        self._ticked = now
        lost = [
            self._lose(session, sentence)
            for session in list(self.sessions.values())
            if (sentence := self._overdue(session, now))
        ]
        return [*lost, *self._absent(now, {(event.role, event.index) for event in lost})]

    def next_tick(self, now: float) -> float:
        """Return when to tick again: after half a beat, or when the first lease can have ended, if that is sooner."""
        link = self.config.link
        ends = (session.seen + link.lease_seconds for session in self.sessions.values())
        return min([now + link.beat_seconds / 2, *ends])

    def _absent(self, now: float, lost: set[Peer]) -> Iterator[Lost]:
        """Yield the peers of the broker before this one that have not come back within their lease."""
        self._absent_since = now if self._absent_since is None else self._absent_since
        if now - self._absent_since <= self.config.link.lease_seconds:
            return
        for joined in list(self.scheduler.peers.values()):
            if (joined.role, joined.index) not in self._by_peer.keys() | lost:
                yield Lost(joined.role, joined.index, "it has not come back since the broker was started again")

    def _forgive_own_pause(self, seconds: float, now: float) -> bool:
        """A broker that was stopped itself has heard nobody: that is not the peers' fault. Return whether it was."""
        if seconds <= 2 * self.config.link.beat_seconds:
            return False
        self._absent_since = now
        for session in self.sessions.values():
            session.seen = min(now, session.seen + seconds)
            session.progressed = min(now, session.progressed + seconds)
        return True

    def silent(self, now: float, beats: float = 2.5) -> list[Session]:
        """Return the sessions that have not been heard for so many times the interval of their beats."""
        return [s for s in self.sessions.values() if now - s.seen > beats * self.config.link.beat_seconds]

    def _overdue(self, session: Session, now: float) -> str:
        link = self.config.link
        waiting = self.scheduler.phase == "waiting"  # the run could begin with a peer that is not there any more
        if waiting and not session.reachable and now - session.seen > link.lease_seconds / 2:
            return "its connection closed"
        if now - session.seen > link.lease_seconds:
            return f"no sign of life for {link.lease_seconds:g} s (link.lease_seconds)"
        late = link.progress_seconds and now - session.progressed > link.progress_seconds
        if late and self._is_asked(session):
            return f"it beats, but makes no progress for {link.progress_seconds:g} s (link.progress_seconds)"
        return ""

    def _is_asked(self, session: Session) -> bool:
        """Whether a turn waits for this peer: for a server that has tensors to answer, else for the client."""
        running = [held.lease for held in session.beat.held if held.state == "running"] if session.beat else []
        turns = [lease for lease in running if self.scheduler.is_turn(lease)]
        return any(self.relay.asks_server(lease) == (session.role == "server") for lease in turns)

    def unreachable(self, control: bytes) -> None:
        """A control message could not be delivered: the connection is gone. Its peer may come back in time."""
        for session in self.sessions.values():
            if session.control == control:
                session.reachable = False

    def _lose(self, session: Session, sentence: str, fatal: bool = False) -> Lost:
        self.sessions.pop(session.token, None)
        self._by_peer.pop(session.peer, None)
        self.relay.detach(session)
        role = session.role
        if role == "monitor":
            raise AssertionError("monitors have no session")
        return Lost(role, session.index, sentence, fatal)


def refuse_protocol(theirs: int) -> str:
    """Return the sentence for a peer of another protocol version."""
    return (
        f"this broker speaks protocol {PROTOCOL}, you speak {theirs}: "
        "install the same version of zsplit on both machines"
    )


def replace_tally(tally: Tally, traffic: dict[str, tuple[int, int]], raw: dict[str, tuple[int, int]]) -> Tally:
    """Return the tally with the relay's count of bytes in the place of whatever the peer claimed."""
    return msgspec.structs.replace(tally, traffic=traffic, traffic_raw=raw)
