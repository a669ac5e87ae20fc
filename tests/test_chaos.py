"""The chaos benchmark: its network does what it says to real sockets, its books find what is wrong, a run survives."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import zmq
from conftest import free_port, until

from zsplit.wire.messages import Contribution, Job, Lease, Merge, Plan, Ref, Turn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from chaos_books import trained
from chaos_faults import KINDS, faults
from chaos_net import UNUSED, Judge, Net, Proxy, Stream, cables

CHAOS = Path(__file__).parents[1] / "benchmarks" / "chaos.py"

MINUTES, SEED = os.environ.get("ZSPLIT_CHAOS_MINUTES", "0.5"), os.environ.get("ZSPLIT_CHAOS_SEED", "1")
"""How long runs are under random faults here, and which; at least one run is ended, whatever it takes."""

HOST, TARGET = "127.0.0.2", "127.0.0.1"

Socket = zmq.Socket[bytes]


def once(_up: bool, _body: bytes) -> int:
    return 1


class Pair:
    """A ROUTER, and a DEALER that reaches it through a proxy."""

    def __init__(self, net: Net, judge: Judge, zmtp: bool = True, host: str = HOST) -> None:
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
        self.proxy: Proxy = net.proxy(host, TARGET, (port, other), judge)
        self.dealer.connect(f"tcp://{host}:{self.port}")

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


def test_what_is_sent_while_a_cable_is_out_comes_late_over_the_same_connection(net: Net, pairs: list[Pair]) -> None:
    with cables() as wires:
        if wires is None:
            pytest.skip("routes take root")
        pairs.append(pair := Pair(net, once, host=UNUSED))
        pair.dealer.send(b"before")
        sender, _ = pair.router.recv_multipart()
        wires.pull(UNUSED)
        pair.dealer.send(b"late")
        pair.router.send_multipart([sender, b"late"])
        assert not pair.router.poll(300)
        wires.plug(UNUSED)
        assert pair.router.recv_multipart() == [sender, b"late"]
        assert pair.dealer.recv() == b"late"
        assert not pair.events.poll(0)
        wires.pull(UNUSED)
    pair.dealer.send(b"after")
    assert pair.router.recv_multipart()[1] == b"after", "all are plugged in at the end"


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


# Faults


def test_a_seed_gives_the_same_faults_again_and_all_of_them() -> None:
    def drawn(seed: int) -> list[object]:
        return list(islice(faults(random.Random(seed), list(KINDS), 2.5), 500))

    assert drawn(1) == drawn(1) != drawn(2)
    assert {fault.kind for fault in islice(faults(random.Random(1), list(KINDS), 2.5), 500)} == set(KINDS)


def test_a_process_is_stopped_for_less_or_for_more_than_its_lease() -> None:
    for fault in islice(faults(random.Random(1), ["stop client (short)", "stop client (long)"], 2.5), 100):
        assert (fault.seconds < 2.5) == ("short" in fault.kind)
        assert fault.role == "client"


# Books


def turn(number: int, client: int, first: int, base: str) -> Turn:
    """A turn of two steps in the first round, of four steps."""
    return Turn(
        lease=Lease(1, number),
        client=client,
        server=0,
        base=Ref(base, "server.0"),
        plan=Plan("pool"),
        round=0,
        first=first,
        count=2,
        epoch_steps=4,
    )


def merge(number: int, base: str, fronts: dict[int, str]) -> Merge:
    inputs = tuple(Contribution(client, 1.0, Ref(digest, f"client.{client}")) for client, digest in fronts.items())
    return Merge(lease=Lease(1, number), server=0, base=Ref(base, "server.0"), round=0, inputs=inputs)


JOBS: list[Job] = [
    turn(1, 0, 0, "v0"),
    turn(2, 1, 0, "v0"),
    turn(3, 1, 0, "v0"),  # the same again: its client was lost
    merge(4, "v0", {0: "a", 1: "b"}),
    turn(5, 0, 2, "v1"),
    merge(6, "v1", {0: "c"}),
    merge(7, "v1", {0: "c"}),  # the same again: its server was lost
]
RESULTS = ["a", "b", "b", "v1", "c", "v2", "v2"]


def done(jobs: list[Job], results: list[str]) -> list[dict[str, object]]:
    return [
        {"lease": tuple(job.lease), "side": "client" if isinstance(job, Turn) else "server", "digest": result}
        for job, result in zip(jobs, results, strict=True)
    ]


def test_steps_are_counted_along_the_merges_whoever_repeats_them() -> None:
    counted = trained("v2", {job.lease: job for job in JOBS}, done(JOBS, RESULTS))
    assert counted == {(0, 0, 0): 1, (0, 0, 1): 1, (0, 0, 2): 1, (0, 0, 3): 1, (1, 0, 0): 1, (1, 0, 1): 1}


def test_a_turn_that_is_merged_again_on_top_of_itself_counts_twice() -> None:
    jobs, results = [*JOBS, turn(8, 0, 2, "v2"), merge(9, "v2", {0: "d"})], [*RESULTS, "d", "v3"]
    counted = trained("v3", {job.lease: job for job in jobs}, done(jobs, results))
    assert {unit for unit, times in counted.items() if times == 2} == {(0, 0, 2), (0, 0, 3)}


# Runs


@pytest.mark.timeout(1800)  # a busy machine takes a while to load torch again and again
def test_runs_under_random_faults_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    file = tmp_path / "chaos.json"
    command = [sys.executable, str(CHAOS), "--minutes", MINUTES, "--seed", SEED, "--rounds", "6", "--json", str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    figures = json.loads(file.read_text())
    assert figures["survived"] == figures["identical"] == len(figures["runs"]) >= 1
    assert figures["lost"] == figures["twice"] == 0
    assert figures["injected"]


def test_a_kind_of_fault_that_there_is_not_is_refused() -> None:
    ended = subprocess.run([sys.executable, str(CHAOS), "--only", "flood"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "'flood' is none of kill client, kill server" in ended.stderr
