"""Three ways from a client to an echo: through the broker, through a `zmq.proxy`, and directly."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import NamedTuple

import click
import zmq
from common import child, processes, running_broker
from peers import Peer, Sender, Socket, dealer, enter_as_client, enter_as_server

BROKER_SETTINGS = (
    "run.rounds=1",
    "schedule.clients=1",
    "link.lease_seconds=864000",  # the two ends send no beats while they are measured
    "link.beat_seconds=86400",
)


Join = Callable[..., tuple[Socket, Sender]]
"""What a client does first: it takes a context and an address, and returns its end of the way."""


class Way(NamedTuple):
    """One way from a client to the echo: the client, to be asked to exchange, and the process in the middle, if any."""

    name: str
    client: Connection
    middle: int | None

    def exchange(self, size: int, window: int, messages: int) -> float:
        """Have messages with payloads of `size` bytes sent and answered, `window` in flight; return wall seconds."""
        try:
            self.client.send((size, window, messages))
            return float(self.client.recv())
        except (OSError, EOFError) as error:
            raise click.ClickException(f"the client of the {self.name} ended: its own words are above") from error


def broker_way(stack: ExitStack) -> Way:
    """Start a broker, an echo as its server, and a client that holds a turn."""
    process, told = stack.enter_context(running_broker(BROKER_SETTINGS))
    stack.enter_context(child(_echo_at_broker, told["address"]))
    return Way("broker", _client(stack, _join_broker, told["address"]), process.pid)


def proxy_way(stack: ExitStack) -> Way:
    """Start a `zmq.proxy` with an echo behind it, and a client."""
    process, (front, back) = stack.enter_context(child(_proxy))
    stack.enter_context(child(_echo_at_proxy, back))
    return Way("proxy", _client(stack, _connect, front), process)


def direct_way(stack: ExitStack) -> Way:
    """Start an echo, and a client that is connected to it."""
    _, endpoint = stack.enter_context(child(_echo_alone))
    return Way("direct", _client(stack, _connect, endpoint), None)


def _client(stack: ExitStack, join: Join, address: str) -> Connection:
    """Start a client in a process of its own, as a real one is: the system settles where the threads of one way run."""
    ours, theirs = processes.Pipe()
    stack.enter_context(child(_exchange_as_asked, theirs, join, address))
    theirs.close()  # so that it is noticed here when the client ends
    return ours


def _exchange_as_asked(report: Connection, requests: Connection, join: Join, address: str) -> None:
    report.send(None)
    data, sender = join(zmq.Context(), address)
    while True:
        size, window, messages = requests.recv()
        requests.send(exchange(data, sender.header(leg=0, size=size), zmq.Frame(bytes(size)), window, messages))


def _join_broker(context: zmq.Context[Socket], address: str) -> tuple[Socket, Sender]:
    peer = Peer(context, address, "client")
    return peer.data, enter_as_client(peer)


def _connect(context: zmq.Context[Socket], endpoint: str) -> tuple[Socket, Sender]:
    data = dealer(context)
    data.connect(endpoint)
    return data, Sender()


def exchange(data: Socket, header: bytes, payload: zmq.Frame, window: int, messages: int) -> float:
    """Send so many messages and take the answers, `window` in flight; return wall seconds."""
    began = time.perf_counter()
    for number in range(messages + window):
        if number >= window:
            data.recv()
            answer = data.recv(copy=False)
        if number < messages:
            data.send(header, zmq.SNDMORE)
            data.send(payload, copy=False)
    seconds = time.perf_counter() - began
    if len(answer) != len(payload) or answer.more:
        raise click.ClickException(f"the echo answered with {len(answer)} bytes instead of {len(payload)}")
    return seconds


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
