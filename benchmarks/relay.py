"""What a hop through the broker costs: against `zmq.proxy`, and against no hop at all.

    client ──▶ middle ──▶ echo       middle: the broker, a zmq.proxy (ROUTER to DEALER), or nothing (direct)
           ◀──        ◀──

All three ways have the same client and echo code and the same frames: a header and one tensor, which comes back
in equal size. The broker is the product's own process, and the two ends say hello to it, store version 0
with it, and exchange tensors under the lease of a turn, as a client and a server do; only the model is missing.

Every pair measures all three ways once, one after the other and in another order each time. A ratio is
that of two figures of the same pair, the table shows its median over the pairs. CPU time is user and
system time of the middle's process, all threads, for each message that it passed on (two a round trip).
"""

import itertools
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import click
import zmq
from rich.console import Console
from rich.table import Table

from zsplit.greeting import greet, parse_address
from zsplit.wire.frames import decode_control, decode_data, encode
from zsplit.wire.manifest import Manifest
from zsplit.wire.messages import (
    PROTOCOL,
    Attach,
    Attached,
    Beat,
    Chunk,
    Held,
    Hello,
    Init,
    Job,
    Lease,
    Orders,
    Prepared,
    Pull,
    Role,
    TensorMeta,
    Tensors,
    Turn,
)

WINDOWS = (1, 8)
"""Messages in flight."""

WALL_GOAL, WALL_GOAL_FROM = 0.95, 64 * 1024
"""Speed to reach, as a share of `zmq.proxy`'s, and the payload in bytes from which it counts."""

CPU_GOALS = {100: 0.4, 64 * 1024: 0.85, 1024 * 1024: 0.9}
"""CPU time of `zmq.proxy` ÷ that of the broker to reach, by payload in bytes."""

ANSWER_SECONDS = 60.0
"""How long an answer may take before the benchmark gives up."""

BROKER_SETTINGS = (
    "broker.port=0",
    "run.rounds=1",
    "schedule.clients=1",
    "link.lease_seconds=864000",  # the two ends send no beats while they are measured
    "link.beat_seconds=86400",
)

Socket = zmq.Socket[bytes]
J = TypeVar("J", bound=Job)
processes = multiprocessing.get_context("spawn")


# The two ends: what a client and a server say until tensors flow


class Sender(NamedTuple):
    """What a header tells of who sends it; these defaults mean nothing to anybody, and are of the usual length."""

    run: str = "0" * 8
    session: str = "0" * 16
    lease: Lease = Lease(1, 2)

    def header(self, leg: int, size: int) -> bytes:
        """Return the header of one tensor of `size` bytes: smashed data on leg 0, gradients on leg 1."""
        meta = TensorMeta("gradients" if leg else "smashed", "U8", (size,), "raw", size)
        return encode(Tensors(self.run, self.session, self.lease, "train", 0, 0, leg, (meta,)))


class Peer:
    """A peer without a model that has joined the broker and attached its data connection."""

    def __init__(self, context: zmq.Context[Socket], address: str, role: Role) -> None:
        self.control, self.data = dealer(context), dealer(context)
        self.control.connect(f"tcp://{address}")
        hello = Hello(protocol=PROTOCOL, role=role, instance=f"{role} of benchmarks/relay.py", index=0)
        welcome = greet(self.control, address, hello, ANSWER_SECONDS, say=lambda _: None)
        self.run, self.session = welcome.run, welcome.session
        self.data.connect(f"tcp://{parse_address(address)[0]}:{welcome.data_port}")
        self.data.send(encode(Attach(self.run, self.session)))
        if not isinstance(decode_data(self.data.recv()), Attached):
            raise click.ClickException(f"the broker did not attach the {role}'s data connection: is it this version's?")

    def beat(self, *held: Held) -> None:
        """Tell the broker what this peer holds: its data, one sample, and these jobs."""
        prepared = Prepared(cut="0", train=1)
        self.control.send(encode(Beat(session=self.session, sent=0, held=held, prepared=prepared)))

    def job(self, kind: type[J]) -> J:
        """Wait for a job of this kind and return it."""
        while True:
            orders = decode_control(self.control.recv())
            if not isinstance(orders, Orders) or orders.finish is not None:
                raise click.ClickException(f"the broker gave up on the run: {orders}")
            for job in orders.jobs:
                if isinstance(job, kind):
                    return job

    def hand_over(self, state: Manifest) -> None:
        """Answer the broker's one pull of a state without tensors."""
        pull, body = decode_data(self.data.recv()), state.encode()
        assert isinstance(pull, Pull)
        chunk = Chunk(self.run, self.session, pull.lease, pull.origin, pull.digest, pull.offset, len(body), pull.what)
        self.data.send_multipart([encode(chunk), body])


def enter_as_client(peer: Peer) -> Sender:
    """Wait until the client may train."""
    peer.beat()
    return Sender(peer.run, peer.session, peer.job(Turn).lease)


def enter_as_server(peer: Peer) -> Sender:
    """Make version 0, let the broker store it, and be ready for the client's turn."""
    version = Manifest.of(())
    peer.beat()
    peer.beat(Held(lease=peer.job(Init).lease, state="done", digest=version.digest))
    peer.hand_over(version)
    lease = peer.job(Turn).lease
    peer.beat(Held(lease=lease, state="ready"))
    return Sender(peer.run, peer.session, lease)


def dealer(context: zmq.Context[Socket]) -> Socket:
    """Return a peer's socket."""
    made = context.socket(zmq.DEALER)
    made.setsockopt(zmq.IMMEDIATE, 1)
    made.setsockopt(zmq.RCVTIMEO, int(ANSWER_SECONDS * 1000))
    return made


# The same for all ways: exchange messages


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


# The three ways


class Way(NamedTuple):
    """One way from the client to the echo: the client's end of it, and the process in the middle, if any."""

    name: str
    data: Socket
    sender: Sender
    middle: int | None


class Figures(NamedTuple):
    """Of one measurement: seconds for each round trip, CPU seconds of the middle for each message."""

    wall: float
    cpu: float | None


def broker_way(context: zmq.Context[Socket], stack: ExitStack) -> Way:
    """Start a broker, and an echo as its server; return the way of its client, which holds a turn."""
    process, address = stack.enter_context(running_broker())
    stack.enter_context(child(_echo_at_broker, address))
    peer = Peer(context, address, "client")
    return Way("broker", peer.data, enter_as_client(peer), process)


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


@contextmanager
def running_broker() -> Iterator[tuple[int, str]]:
    """Start the product's broker; yield its process id and address. It is killed at the end."""
    settings = itertools.chain.from_iterable(("--set", setting) for setting in BROKER_SETTINGS)
    command = [sys.executable, "-m", "zsplit_broker", "--json", "--attached", *settings]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--out", str(Path(folder, "run"))]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise click.ClickException("the broker did not start: its own words are above")
            try:
                yield process.pid, json.loads(line)["address"]
            finally:
                process.kill()


@contextmanager
def child(target: Callable[..., None], *arguments: object) -> Iterator[tuple[int, Any]]:
    """Run a function in a process of its own; yield the process id and what the function first reports."""
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=_with_parent, args=(target, theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        assert process.pid is not None
        yield process.pid, ours.recv()
    finally:
        process.kill()
        process.join()


def _with_parent(target: Callable[..., None], report: Connection, *arguments: object) -> None:
    """Run the function; whatever it waits for, this process ends with its parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    target(report, *arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


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


# Measuring


def cpu_seconds(process: int) -> float:
    """Return user and system time of a process so far, all threads (its clock_getcpuclockid(3) on Linux)."""
    return time.clock_gettime(~process << 3 | 2)


def measure(way: Way, size: int, window: int, messages: int) -> Figures:
    """Exchange so many messages with payloads of `size` bytes over this way."""
    header, payload = way.sender.header(leg=0, size=size), zmq.Frame(bytes(size))
    before = cpu_seconds(way.middle) if way.middle else 0.0
    wall = exchange(way.data, header, payload, window, messages)
    cpu = (cpu_seconds(way.middle) - before) / (2 * messages) if way.middle else None
    return Figures(wall / messages, cpu)


def count_for(ways: Sequence[Way], size: int, window: int, seconds: float) -> int:
    """Warm every way up; return how many messages the slowest one exchanges in so many seconds."""
    messages, slowest = window, 0.0
    while messages * slowest < seconds / 4:
        messages *= 2
        slowest = max(measure(way, size, window, messages).wall for way in ways)
    return max(window, round(seconds / slowest))


def measure_point(ways: Sequence[Way], size: int, window: int, pairs: int, seconds: float) -> dict[str, Any]:
    """Measure all ways in so many pairs; return medians and the medians of the pairs' ratios.

    Seconds are for each round trip, CPU seconds for each message; a ratio below 1 means that the broker is slower.
    """
    messages = count_for(ways, size, window, seconds)
    orders = itertools.islice(itertools.cycle(itertools.permutations(ways)), pairs)
    taken = [{way.name: measure(way, size, window, messages) for way in order} for order in orders]
    names = [way.name for way in ways]
    return {
        "size": size,
        "window": window,
        "messages": messages,
        "wall_seconds": {name: median(pair[name].wall for pair in taken) for name in names},
        "cpu_seconds": {name: median(pair[name].cpu or 0.0 for pair in taken) for name in ("broker", "proxy")},
        "ratios": {
            "wall_proxy": median(pair["proxy"].wall / pair["broker"].wall for pair in taken),
            "wall_direct": median(pair["direct"].wall / pair["broker"].wall for pair in taken),
            "cpu_proxy": median((pair["proxy"].cpu or 0.0) / (pair["broker"].cpu or 1.0) for pair in taken),
        },
        "goals": {"wall_proxy": WALL_GOAL if size >= WALL_GOAL_FROM else None, "cpu_proxy": CPU_GOALS.get(size)},
        "pairs": [{name: figures._asdict() for name, figures in pair.items()} for pair in taken],
    }


# The command


def table_of(points: Sequence[dict[str, Any]]) -> Table:
    """Return the figures as a table: microseconds, and ratios beside what they are to reach."""
    table = Table(title="Relaying tensors: microseconds, and speed as a share of the others'")
    wall, cpu = "µs a round trip", "CPU µs a message"
    table.add_column("payload")
    for column in ("in flight", f"{wall}: broker", "proxy", "direct", f"{cpu}: broker", "proxy"):
        table.add_column(column, justify="right")
    for column in ("of direct", "of proxy", "CPU: proxy ÷ broker"):
        table.add_column(column, justify="right")
    for point in points:
        ratios, goals = point["ratios"], point["goals"]
        table.add_row(
            bytes_text(point["size"]),
            str(point["window"]),
            *(f"{point['wall_seconds'][name] * 1e6:.1f}" for name in ("broker", "proxy", "direct")),
            *(f"{point['cpu_seconds'][name] * 1e6:.1f}" for name in ("broker", "proxy")),
            f"{ratios['wall_direct']:.3f}",
            *(_with_goal(ratios[name], goals[name]) for name in ("wall_proxy", "cpu_proxy")),
        )
    return table


def _with_goal(ratio: float, goal: float | None) -> str:
    return f"{ratio:.3f}" if goal is None else f"{ratio:.3f} ({goal:g})"


def bytes_text(size: int) -> str:
    """Return a size such as `64 KiB`."""
    for unit, name in ((2**20, "MiB"), (2**10, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "pyzmq": zmq.__version__,
        "libzmq": zmq.zmq_version(),
    }


def _sizes(_context: click.Context, _option: click.Parameter, text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise click.BadParameter(f"{text!r} is no list of sizes: give bytes, such as 100,65536")
    return [int(part) for part in text.split(",")]


@click.command(context_settings={"show_default": True})
@click.option("--pairs", default=9, type=click.IntRange(min=1), help="Measurements of each way at each point.")
@click.option(
    "--sizes", default="100,4096,65536,1048576,4194304,16777216", callback=_sizes, help="Payloads, in bytes."
)
@click.option("--seconds-per-point", "seconds", default=0.5, help="What one measurement lasts.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write all figures to this file.")
def main(pairs: int, sizes: list[int], seconds: float, file: Path | None) -> None:
    """Compare the broker's relay with zmq.proxy and with a direct connection."""
    with ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        stack.callback(context.destroy, linger=0)
        ways = [start(context, stack) for start in (broker_way, proxy_way, direct_way)]
        points = [
            measure_point(ways, size, window, pairs, seconds) for size, window in itertools.product(sizes, WINDOWS)
        ]
    Console().print(table_of(points))
    if file is not None:
        file.write_text(json.dumps({"machine": machine(), "pairs": pairs, "points": points}, indent=1))


if __name__ == "__main__":
    main()
