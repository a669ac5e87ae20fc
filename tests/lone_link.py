"""A link to a broker that says and does only what the test wants."""

import time
from threading import Thread
from typing import Any

import zmq
from helpers import config_of

from zsplit.config import Config, to_json
from zsplit.train.link import Link
from zsplit.wire import frames, messages
from zsplit.wire.messages import Lease, Orders, Role, Turn

PATIENCE_MS = 10_000

LEASE = Lease(1, 1)
TURN = Turn(
    lease=LEASE,
    client=0,
    server=0,
    base=messages.Ref("", "broker"),
    plan=messages.Plan("relu"),
    round=0,
    first=0,
    count=1,
)
AHEAD = 1000.0
"""Seconds that the broker's clock is ahead of everybody's here."""


class Broker:
    """Sockets for one peer. What the peer says is read when the test asks for it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.context = zmq.Context()
        self.control, self.data = (self.context.socket(zmq.ROUTER) for _ in range(2))
        self.port, self.data_port = (each.bind_to_random_port("tcp://127.0.0.1") for each in (self.control, self.data))
        self.address = f"127.0.0.1:{self.port}"
        self.peer = self.data_peer = b""
        self.revision = 0
        self.session, self.run = "s", "r"
        self.welcomed = False

    def welcome(self, session: str = "s", run: str = "r") -> messages.Hello:
        """Answer the next hello, which begins a session; later ones, said when the broker is quiet, are as welcome."""
        self.session, self.run, self.revision = session, run, 0
        hello: messages.Hello = self.heard(messages.Hello)
        self.bid_welcome()
        self.welcomed = True
        return hello

    def bid_welcome(self) -> None:
        config, port = to_json(self.config), self.data_port
        self.tell(
            messages.Welcome(session=self.session, run=self.run, index=0, config=config, data_port=port, events_port=1)
        )

    def attach(self, *jobs: messages.Job) -> messages.Attach:
        """Answer the next beat, with a turn or these jobs to do, and let tensors pass."""
        self.order(self.heard(messages.Beat), *jobs)
        attach: messages.Attach = self.came(messages.Attach)
        self.pass_on(messages.Attached(self.run, self.session))
        return attach

    def order(self, beat: messages.Beat, *jobs: messages.Job) -> None:
        self.revision += 1
        jobs = jobs or (TURN,)
        self.tell(Orders(revision=self.revision, jobs=jobs, echo=beat.sent, now=time.monotonic() + AHEAD))

    def order_nothing(self) -> None:
        self.revision += 1
        self.tell(Orders(revision=self.revision))

    def stop(self) -> None:
        """Be gone, as a process that was killed."""
        self.context.destroy(linger=0)

    def restart(self) -> None:
        """Be another process on the same ports."""
        self.context = zmq.Context()
        self.control, self.data = (self.context.socket(zmq.ROUTER) for _ in range(2))
        self.control.bind(f"tcp://127.0.0.1:{self.port}")
        self.data_port = self.data.bind_to_random_port("tcp://127.0.0.1")
        self.welcomed = False

    def tell(self, message: messages.ControlMessage) -> None:
        self.control.send_multipart([self.peer, frames.encode(message)])

    def pass_on(self, message: messages.DataMessage, *payload: bytes) -> None:
        self.data.send_multipart([self.data_peer, frames.encode(message), *payload])

    def heard(self, kind: Any) -> Any:
        """Return the next control message of a kind."""
        while True:
            assert self.control.poll(PATIENCE_MS), f"no {kind} came"
            self.peer, header = self.control.recv_multipart()
            message = frames.decode_control(header)
            if isinstance(message, kind):
                return message
            if isinstance(message, messages.Hello) and self.welcomed:
                self.bid_welcome()

    def came(self, kind: Any) -> Any:
        """Return the next data message of a kind."""
        while True:
            assert self.data.poll(PATIENCE_MS), f"no {kind} came"
            self.data_peer, header, *_ = self.data.recv_multipart()
            message = frames.decode_data(header)
            if isinstance(message, kind):
                return message


class Joined:
    """A link that has joined a broker, both of them closed at the end of the test."""

    def __init__(self) -> None:
        self.open: list[tuple[Link, Broker]] = []
        self.said: list[str] = []

    def __call__(self, role: Role = "client", *jobs: messages.Job, **keys: object) -> tuple[Link, Broker]:
        """Join as a peer that has a turn or these jobs to do. What its link says to a person is in `said`."""
        broker = Broker(self.config(**keys))
        link = Link(broker.address, role, say=self.said.append)
        self.open.append((link, broker))
        self._join(link, broker)
        broker.attach(*jobs)
        assert isinstance(link.next(10), Orders)
        return link, broker

    def config(self, **keys: object) -> Config:
        return config_of(**{"link__beat_seconds": 0.2, **keys})

    def close(self) -> None:
        for link, broker in self.open:
            link.close()
            broker.context.destroy(linger=0)

    def _join(self, link: Link, broker: Broker) -> None:
        answering = Thread(target=broker.welcome)
        answering.start()
        try:
            link.join(10)
        finally:
            answering.join()
