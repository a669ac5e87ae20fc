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

    def welcome(self) -> None:
        self.heard(messages.Hello)
        welcome = messages.Welcome(
            session="s", run="r", index=0, config=to_json(self.config), data_port=self.data_port, events_port=1
        )
        self.tell(welcome)

    def attach(self) -> None:
        """Answer the first beat, with a turn to do, and let tensors pass."""
        self.order(self.heard(messages.Beat))
        self.came(messages.Attach)
        self.pass_on(messages.Attached("r", "s"))

    def order(self, beat: messages.Beat) -> None:
        self.revision += 1
        self.tell(Orders(revision=self.revision, jobs=(TURN,), echo=beat.sent, now=time.monotonic() + AHEAD))

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

    def __call__(self, role: Role = "client", **keys: object) -> tuple[Link, Broker]:
        broker = Broker(config_of(link__beat_seconds=0.2, **keys))
        link = Link(broker.address, role)
        self.open.append((link, broker))
        self._join(link, broker)
        broker.attach()
        assert isinstance(link.next(10), Orders)
        return link, broker

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
