"""The broker's cores without its sockets: the clock, the disk and the planner are in the test's hands."""

from itertools import count
from typing import Any

from helpers import config_of, planned

from zsplit.wire.manifest import digest_of
from zsplit.wire.messages import (
    PROTOCOL,
    Attach,
    Attached,
    Beat,
    ControlMessage,
    DataMessage,
    Held,
    Hello,
    Job,
    Lease,
    Orders,
    Prepared,
    Role,
    TensorMeta,
    Tensors,
    Turn,
    Welcome,
)
from zsplit_broker.events import Close, Decide, Entry, Event, Lost, Started, Store, Stored
from zsplit_broker.relay import Route
from zsplit_broker.router import Outgoing, Router
from zsplit_broker.scheduler import Scheduler

SMASHED = TensorMeta("smashed", "F32", (2, 3), "raw", 24)
LABELS = TensorMeta("labels", "I64", (2,), "raw", 16)

RUN = "run 0001"


class Member:
    """A process that is in: its index, its token, and its routing ids on the two sockets."""

    def __init__(self, role: Role, index: int, token: str, control: bytes, data: bytes) -> None:
        self.role, self.index, self.token = role, index, token
        self.control, self.data = control, data

    @property
    def name(self) -> str:
        return f"{self.role}.{self.index}"


class Desk:
    """A router and its scheduler, the clock in the test's hands. News is taken in as soon as there is some."""

    def __init__(self, shards: list[Prepared] | None = None, **keys: object) -> None:
        self.config = config_of(**keys)
        self.shards = shards or [Prepared(cut="relu", train=64, validation=4, test=4)] * self.config.schedule.clients
        self.now = 0.0
        self.scheduler = Scheduler(self.config)
        tokens = (f"token {n:010}" for n in count())
        self.router = Router(self.config, self.scheduler, RUN, (5758, 5759), lambda: next(tokens))
        self.log: list[Event] = []
        self.stores: list[str] = []
        self.asked: list[Decide] = []
        self.probed: list[bytes] = []
        self._ids = count()
        self.take([Started(1)])

    def take(self, events: list[Event]) -> None:
        """Let the scheduler follow from the news."""
        for event in events:
            self.log.append(event)
            for said in self.scheduler.handle(Entry(self.now, event)):
                if isinstance(said, Close):
                    self.router.relay.forget(said.job.lease)
                elif isinstance(said, Store):
                    self.stores.append(said.ref.digest)
                elif isinstance(said, Decide):
                    self.asked.append(said)
            self.scheduler.check()

    def routing_id(self) -> bytes:
        return b"id %d" % next(self._ids)

    def hello(self, role: Role, index: int = -1, instance: str = "a", **more: Any) -> ControlMessage | None:
        """Say hello on a new connection, or on that of `control`; return the answer."""
        control = more.pop("control", None) or self.routing_id()
        hello = Hello(**{"protocol": PROTOCOL, "role": role, "index": index, "instance": instance} | more)
        answers = list(self.router.hello(control, hello, self.now))
        self.take([answer for answer in answers if isinstance(answer, Lost)])
        sent = [answer for answer in answers if isinstance(answer, Outgoing)]
        self.probed = [out.to for out in sent if out.to != control]
        return next((out.message for out in sent if out.to == control), None)

    def enter(self, role: Role, index: int = -1, instance: str | None = None) -> Member:
        """Say hello and attach; not ready for jobs yet."""
        control = self.routing_id()
        answer = self.hello(role, index, instance or f"{role} {index}", control=control)
        assert isinstance(answer, Welcome), answer
        member = Member(role, answer.index, answer.session, control, self.routing_id())
        assert self.router.relay.route(member.data, Attach(RUN, member.token), 0) == Route(
            member.data, Attached(RUN, member.token)
        )
        return member

    def join(self, role: Role, index: int = -1, instance: str | None = None) -> Member:
        """Come in and be ready for jobs."""
        member = self.enter(role, index, instance)
        self.beat(member)
        return member

    def prepared(self, member: Member) -> Prepared:
        return self.shards[member.index] if member.role == "client" else Prepared(cut="relu")

    def beat(self, member: Member, *held: Held, **more: Any) -> list[Event]:
        """Beat once, all orders obeyed; return the news in it, which the scheduler has taken in."""
        session = self.router.session(member.token)
        kept = self.scheduler.kept((member.role, member.index)) if session else []
        fields = {
            "sent": self.now,
            "revision": session.revision if session else 0,
            "held": held,
            "have": (*kept, *(each.digest for each in held)),
            "prepared": self.prepared(member),
        } | more
        beat = Beat(session=member.token, **fields)
        events = self.router.control(beat, member.control, self.now)
        self.take(events)
        return events

    def orders(self, member: Member) -> Orders:
        return self.router.orders(self.session(member))

    def session(self, member: Member) -> Any:
        found = self.router.session(member.token)
        assert found is not None
        return found

    def done(self, member: Member, job: Job, **more: Any) -> list[Event]:
        """Report a job that is over."""
        return self.beat(member, Held(lease=job.lease, state="done", digest=digest_of(member.name.encode()), **more))

    def stored(self) -> None:
        """Let the disk be ready."""
        while self.stores:
            self.take([Stored(self.stores.pop(0))])

    def planned(self) -> None:
        """Let the planner answer."""
        while self.asked:
            self.take([planned(self.config, self.asked.pop(0))])

    def job(self, member: Member) -> Any:
        (job,) = self.orders(member).jobs
        return job

    def send(self, sender: Member, message: DataMessage, size: int = 100) -> Route | None:
        return self.router.relay.route(sender.data, message, size)

    def tensors(self, sender: Member, lease: Lease, *metas: TensorMeta, **more: Any) -> Tensors:
        fields = {"kind": "train", "step": 0, "micro": 0, "leg": 0 if sender.role == "client" else 1} | more
        return Tensors(RUN, sender.token, lease, tensors=metas or (SMASHED, LABELS), **fields)

    def after(self, seconds: float) -> list[Event]:
        """Let time pass in small steps, nobody beating; return who was lost, which the scheduler has taken in."""
        lost: list[Event] = []
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + self.config.link.beat_seconds / 2)
            news = self.router.tick(self.now)
            self.take(news)
            lost += news
        return lost


class Stage(Desk):
    """Two clients with a turn each, at a server of their own, and both servers ready."""

    def __init__(self, ready: bool = True, **keys: object) -> None:
        super().__init__(**{"schedule__clients": 2, "schedule__policy": "parallel"} | keys)
        self.servers = [self.join("server"), self.join("server", instance="other")]
        self.clients = [self.join("client", 0), self.join("client", 1)]
        self.done(self.servers[0], self.job(self.servers[0]))
        self.stored()
        self.turns: list[Turn] = [self.job(server) for server in self.servers]
        assert [(turn.client, turn.server) for turn in self.turns] == [(0, 0), (1, 1)]
        if ready:
            for server, turn in zip(self.servers, self.turns, strict=True):
                self.beat(server, Held(lease=turn.lease, state="ready"))

    def end_turns(self) -> None:
        for peers in (self.clients, self.servers):
            for peer, turn in zip(peers, self.turns, strict=True):
                self.done(peer, turn)
