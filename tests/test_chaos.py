"""The network that the chaos benchmark puts before each peer does what it says, to real sockets."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from conftest import free_port, until

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from chaos_net import Judge, Net, Proxy, Stream

HOST, TARGET = "127.0.0.2", "127.0.0.1"

Socket = zmq.Socket[bytes]


def once(_up: bool, _body: bytes) -> int:
    return 1


class Pair:
    """A ROUTER, and a DEALER that reaches it through a proxy."""

    def __init__(self, net: Net, judge: Judge, zmtp: bool = True) -> None:
        self.context: zmq.Context[Socket] = zmq.Context()
        port = free_port()
        other = port + 1  # a port that the proxy takes for bytes
        self.port = port if zmtp else other
        self.router = self.context.socket(zmq.ROUTER)
        self.router.bind(f"tcp://{TARGET}:{self.port}")
        self.dealer = self.context.socket(zmq.DEALER)
        for each in (self.router, self.dealer):
            each.setsockopt(zmq.RCVTIMEO, 10_000)
        self.events = self.dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.proxy: Proxy = net.proxy(HOST, TARGET, (port, other), judge)
        self.dealer.connect(f"tcp://{HOST}:{self.port}")

    def close(self) -> None:
        self.dealer.disable_monitor()
        self.events.close(linger=0)
        self.context.destroy(linger=0)


@pytest.fixture
def net() -> Iterator[Net]:
    with Net() as made:
        yield made


@pytest.fixture
def pairs(net: Net) -> Iterator[list[Pair]]:
    made: list[Pair] = []
    yield made
    for pair in made:
        pair.close()


@pytest.mark.parametrize("zmtp", [True, False])
def test_messages_pass_unchanged(net: Net, pairs: list[Pair], zmtp: bool) -> None:
    pairs.append(pair := Pair(net, once, zmtp))
    sizes = [0, 1, 255, 256, 70_000, 3_000_000]
    messages = [[bytes([size % 251]) * size, b"second", b""] for size in sizes]
    for message in messages:
        pair.dealer.send_multipart(message)
    for message in messages:
        sender, *frames = pair.router.recv_multipart()
        assert frames == message
        pair.router.send_multipart([sender, *frames])
        assert pair.dealer.recv_multipart() == message


@pytest.mark.parametrize("port", ["all", "own", "other"])
def test_a_cut_connection_is_reset_and_a_new_one_works(net: Net, pairs: list[Pair], port: str) -> None:
    pairs.append(pair := Pair(net, once))
    pair.dealer.send(b"before")
    assert pair.router.recv_multipart()[1] == b"before"
    meant = {"all": None, "own": pair.port, "other": pair.port + 1}[port]
    assert pair.proxy.cut(meant) == (port != "other")
    assert bool(pair.events.poll(5000 if port != "other" else 300)) == (port != "other")
    pair.dealer.send(b"after")
    assert pair.router.recv_multipart()[1] == b"after"


def test_a_half_open_connection_swallows_both_ways_and_closes_nothing_until_it_is_cut(
    net: Net, pairs: list[Pair]
) -> None:
    pairs.append(pair := Pair(net, once))
    pair.dealer.send(b"before")
    sender, _ = pair.router.recv_multipart()
    assert pair.proxy.swallow() == 1
    pair.dealer.send(b"lost")
    pair.router.send_multipart([sender, b"lost"])
    assert not pair.router.poll(300)
    assert not pair.dealer.poll(0)
    assert not pair.events.poll(0)
    assert pair.proxy.cut() == 1
    assert pair.events.poll(5000)
    pair.dealer.send(b"after")
    assert pair.router.recv_multipart()[1] == b"after"


def test_messages_are_dropped_and_doubled_whole_and_the_stream_stays_valid(net: Net, pairs: list[Pair]) -> None:
    def by_number(up: bool, body: bytes) -> int:
        return int(body) % 3 if up else 2

    pairs.append(pair := Pair(net, by_number))
    big = bytes(70_000)
    for number in range(60):
        pair.dealer.send_multipart([str(number).encode(), big[: number * 1000], b"end"])
    expected = [number for number in range(60) for _ in range(number % 3)]
    came = [pair.router.recv_multipart() for _ in expected]
    assert [int(number) for _, number, *_ in came] == expected
    assert all(frames == [big[: int(number) * 1000], b"end"] for _, number, *frames in came)
    pair.router.send_multipart([came[0][0], b"down"])
    assert [pair.dealer.recv() for _ in range(2)] == [b"down"] * 2
    assert not pair.dealer.poll(100)


def test_nobody_at_the_target_is_nobody_at_the_proxy_and_who_comes_later_is_reached(
    net: Net, pairs: list[Pair]
) -> None:
    pairs.append(pair := Pair(net, once))
    pair.router.close(linger=0)
    assert pair.events.poll(5000)
    again = pair.context.socket(zmq.ROUTER)
    until(lambda: _bound(again, pair.port), 10)
    again.setsockopt(zmq.RCVTIMEO, 10_000)
    pair.dealer.send(b"hello")
    assert again.recv_multipart()[1] == b"hello"
    again.close(linger=0)


def _bound(router: Socket, port: int) -> bool:
    try:
        router.bind(f"tcp://{TARGET}:{port}")
    except zmq.ZMQError:
        return False
    return True


def test_a_stream_is_taken_apart_the_same_however_it_comes() -> None:
    greeting, command = bytes(64), b"\x04\x05READY"
    messages = [b"\x00\x03one", b"\x01\x03two\x00\x05three", b"\x02" + (300).to_bytes(8) + bytes(300)]
    whole = greeting + command + b"".join(messages)
    for size in (1, 2, 7, 64, len(whole)):
        stream = Stream()
        pieces = [p for at in range(0, len(whole), size) for p in stream.feed(whole[at : at + size])]
        assert b"".join(piece.raw for piece in pieces) == whole
        told = [(piece.raw, piece.first) for piece in pieces if piece.first is not None]
        assert told == list(zip(messages, (b"one", b"two", bytes(300)), strict=True))
        assert command in [piece.raw for piece in pieces]
