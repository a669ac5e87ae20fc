"""A turn over real links between which connections, sessions and messages are lost ends with the same weights."""

import itertools
from collections.abc import Iterator
from random import Random
from threading import Thread
from typing import Any

import pytest
import zmq
from helpers import config_of
from test_revoked import BASE, DATA, shops_of, turn_of

from zsplit.config import Config, to_json
from zsplit.data import ClientData
from zsplit.train.client import Client
from zsplit.train.link import Link
from zsplit.train.server import Server
from zsplit.train.state import State
from zsplit.wire import frames, messages
from zsplit.wire.messages import Finish, Orders, Plan, Role, Turn
from zsplit.wire.transfer import MANIFEST

OTHER: dict[Role, Role] = {"client": "server", "server": "client"}
RUN = "r"


class Broker:
    """Relays one turn, and every so many messages does harm: `seed` says which. None: it does its work."""

    def __init__(self, config: Config, turn: Turn, base: State, seed: int | None) -> None:
        self.config, self.turn, self.base = config, turn, base
        self.context = zmq.Context()
        self.control, self.data = (self.context.socket(zmq.ROUTER) for _ in range(2))
        self.port, self.data_port = (each.bind_to_random_port("tcp://127.0.0.1") for each in (self.control, self.data))
        self.sessions: dict[str, Role] = {}
        self.at_control: dict[Role, bytes] = {}
        self.at_data: dict[Role, bytes] = {}
        self.done: dict[str, str] = {}
        self.harms = 0
        self.over = False
        self._ready = False
        self._numbers, self._revisions = itertools.count(), itertools.count(1)
        self._random = Random(seed)
        self._harmful = seed is not None

    def live(self) -> None:
        poller = zmq.Poller()
        for each in (self.control, self.data):
            poller.register(each, zmq.POLLIN)
        while not self.over:
            for each, _ in poller.poll(100):
                sender, header, *parts = each.recv_multipart()
                if each is self.control:
                    self._hear(sender, frames.decode_control(header))
                else:
                    self._pass_on(sender, header, parts)
        self.context.destroy(linger=1000)

    def _hear(self, sender: bytes, message: messages.ControlMessage) -> None:
        match message:
            case messages.Hello(role="client" | "server" as role):
                session = f"{role} {next(self._numbers)}"
                self._forget(role)
                self.sessions[session], self.at_control[role] = role, sender
                welcome = messages.Welcome(
                    session=session,
                    run=RUN,
                    index=0,
                    config=to_json(self.config),
                    data_port=self.data_port,
                    events_port=1,
                )
                self.control.send_multipart([sender, frames.encode(welcome)])
            case messages.Beat() if message.session not in self.sessions:
                self.control.send_multipart([sender, frames.encode(messages.Unknown())])
            case messages.Beat():
                role = self.sessions[message.session]
                for held in message.held:
                    self._ready = self._ready or role == "server"
                    if held.state == "done":
                        self.done[role] = held.digest
                self.control.send_multipart([sender, frames.encode(self._orders(role, message.sent))])
            case _:
                pass

    def _orders(self, role: Role, sent: float) -> Orders:
        over = Finish(ok=True, sentence="over") if len(self.done) == 2 else None
        jobs = (self.turn,) if (role == "server" or self._ready) and over is None else ()
        return Orders(revision=next(self._revisions), jobs=jobs, finish=over, echo=sent, now=sent)

    def _pass_on(self, sender: bytes, header: bytes, parts: list[bytes]) -> None:
        message = frames.decode_data(header)
        role = self.sessions.get(message.session)
        if role is None or (self.at_data.get(role) != sender and not isinstance(message, messages.Attach)):
            self._send(sender, messages.Detached(RUN, ""))
        elif isinstance(message, messages.Attach):
            self.at_data[role] = sender
            self._send(sender, messages.Attached(RUN, message.session))
            self._to(OTHER[role], frames.encode(messages.Resend(RUN, "", self.turn.lease)), [])
        elif isinstance(message, messages.Pull):
            self._serve(sender, role, message)
        else:
            for _ in range(1 if self._random.random() < 0.8 else 2):
                self._to(OTHER[role], header, parts)
            if self._harmful and self._random.random() < 0.15:
                self.harms += 1
                self._random.choice([self._cut, self._forget])(self._random.choice(["client", "server"]))

    def _cut(self, role: Role) -> None:
        """Lose a data connection, and tell its peer as TCP would."""
        connection = self.at_data.pop(role, None)
        if connection is not None:
            self._send(connection, messages.Detached(RUN, ""))

    def _forget(self, role: Role) -> None:
        """Lose a session and what belongs to it."""
        self._cut(role)
        self.sessions = {session: each for session, each in self.sessions.items() if each != role}

    def _serve(self, sender: bytes, role: Role, pull: messages.Pull) -> None:
        data = self.base.manifest.encode() if pull.offset == MANIFEST else self.base.read(pull.offset, pull.length)
        chunk = messages.Chunk(RUN, "", pull.lease, role, pull.digest, pull.offset, len(data), pull.what)
        self._send(sender, chunk, bytes(data))

    def _to(self, role: Role, header: bytes, parts: list[bytes]) -> None:
        if role in self.at_data:
            self.data.send_multipart([self.at_data[role], header, *parts])

    def _send(self, to: bytes, message: messages.DataMessage, *parts: bytes) -> None:
        self.data.send_multipart([to, frames.encode(message), *parts])


def train(config: Config, plan: Plan, seed: int | None) -> Broker:
    """Train one turn with a broker that does harm as `seed` says."""
    shops = shops_of(to_json(config))
    base = shops[0].initial()
    turn = turn_of(plan, base=base.digest, count=3)
    broker = Broker(config, turn, base, seed)
    ends: dict[Role, Finish | Exception] = {}

    def live(role: Role, link: Link) -> None:
        try:
            link.join(30)
            trainer: Any = (
                Client(link, config, shops[0], ClientData(config, 0, DATA))
                if role == "client"
                else Server(link, config, shops[1])
            )
            ends[role] = trainer.serve()
        except Exception as error:
            ends[role] = error
            links[OTHER[role]].leave("the other failed")
        finally:
            link.close()

    links: dict[Role, Link] = {role: Link(f"127.0.0.1:{broker.port}", role) for role in OTHER}
    relaying, *training = Thread(target=broker.live), *(Thread(target=live, args=each) for each in links.items())
    for thread in (relaying, *training):
        thread.start()
    for thread in training:
        thread.join()
    broker.over = True
    relaying.join()
    assert ends == dict.fromkeys(OTHER, Finish(ok=True, sentence="over"))
    return broker


def shapes() -> Iterator[Any]:
    sparse = {"up": "ms:ratio=0.5,bits=4", "down": "mask"}
    keep = {"train__labels": "keep", "model__cut": "relu"}
    yield pytest.param(Plan(cut="relu", micro_batches=3, window=3), {}, id="two parts")
    yield pytest.param(Plan(cut="relu", micro_batches=2, window=1), {"train__clip_norm": 0.5}, id="clipped")
    yield pytest.param(Plan(cut="relu", micro_batches=3, window=2, **sparse), {}, id="what was kept for the way back")
    yield pytest.param(Plan(cut="relu", tail="bn3", micro_batches=3, window=2, **sparse), keep, id="a tail")


@pytest.mark.parametrize(("plan", "keys"), list(shapes()))
def test_a_turn_survives_whatever_is_lost_and_doubled(plan: Plan, keys: dict[str, object]) -> None:
    config = config_of(**{**BASE, "link__beat_seconds": 0.1, **keys})
    undisturbed = train(config, plan, None)
    harms = 0
    for seed in range(4):
        broker = train(config, plan, seed)
        harms += broker.harms
        assert broker.done == undisturbed.done
    assert harms
