"""Three ways from a client to an echo: through the broker, through a `zmq.proxy`, and directly."""

from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import NamedTuple

import zmq
from common import child, running_broker
from peers import Peer, Sender, Socket, dealer, enter_as_client, enter_as_server

BROKER_SETTINGS = (
    "run.rounds=1",
    "schedule.clients=1",
    "link.lease_seconds=864000",  # the two ends send no beats while they are measured
    "link.beat_seconds=86400",
)


class Way(NamedTuple):
    """One way from the client to the echo: the client's end of it, and the process in the middle, if any."""

    name: str
    data: Socket
    sender: Sender
    middle: int | None


def broker_way(context: zmq.Context[Socket], stack: ExitStack) -> Way:
    """Start a broker, and an echo as its server; return the way of its client, which holds a turn."""
    process, told = stack.enter_context(running_broker(BROKER_SETTINGS))
    stack.enter_context(child(_echo_at_broker, told["address"]))
    peer = Peer(context, told["address"], "client")
    return Way("broker", peer.data, enter_as_client(peer), process.pid)


def proxy_way(context: zmq.Context[Socket], stack: ExitStack) -> Way:
    """Start a `zmq.proxy` with an echo behind it."""
    process, (front, back) = stack.enter_context(child(_proxy))
    stack.enter_context(child(_echo_at_proxy, back))
    data = dealer(context)
    data.connect(front)
    return Way("proxy", data, Sender(), process)


def direct_way(context: zmq.Context[Socket], stack: ExitStack) -> Way:
    """Start an echo and connect to it."""
    _, endpoint = stack.enter_context(child(_echo_alone))
    data = dealer(context)
    data.connect(endpoint)
    return Way("direct", data, Sender(), None)


def echo(data: Socket, sender: Sender, envelope: int) -> None:
    """Answer every message with its own payload, for ever. `envelope`: frames before the header."""
    data.setsockopt(zmq.RCVTIMEO, -1)
    answers: dict[int, bytes] = {}
    while True:
        before = [data.recv() for _ in range(envelope)]
        data.recv()
        payload = data.recv(copy=False)
        size = len(payload)
        if size not in answers:
            answers[size] = sender.header(leg=1, size=size)
        for frame in before:
            data.send(frame, zmq.SNDMORE)
        data.send(answers[size], zmq.SNDMORE)
        data.send(payload, copy=False)


def _echo_at_broker(report: Connection, address: str) -> None:
    report.send(None)
    peer = Peer(zmq.Context(), address, "server")
    echo(peer.data, enter_as_server(peer), envelope=0)


def _echo_at_proxy(report: Connection, endpoint: str) -> None:
    data = dealer(zmq.Context())
    data.connect(endpoint)
    report.send(None)
    echo(data, Sender(), envelope=1)  # the id by which the proxy's ROUTER knows the client


def _echo_alone(report: Connection) -> None:
    data = dealer(zmq.Context())
    data.bind("tcp://127.0.0.1:*")
    report.send(data.getsockopt_string(zmq.LAST_ENDPOINT))
    echo(data, Sender(), envelope=0)


def _proxy(report: Connection) -> None:
    context = zmq.Context()
    front, back = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    for made in (front, back):
        made.bind("tcp://127.0.0.1:*")
    report.send([made.getsockopt_string(zmq.LAST_ENDPOINT) for made in (front, back)])
    zmq.proxy(front, back)
