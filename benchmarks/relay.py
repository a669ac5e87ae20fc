"""What a hop through the broker costs: against `zmq.proxy`, and against no hop at all.

    client ──▶ middle ──▶ echo       middle: the broker, a zmq.proxy (ROUTER to DEALER), or nothing (direct)
           ◀──        ◀──

All three ways have the same client and echo code, each in processes of its own, and the same frames: a header
and one tensor, which comes back in equal size. The broker is the product's own process, and the two ends say hello
to it, store version 0 with it, and exchange tensors under the lease of a turn, as a client and a server do; only the
model is missing.

Every pair measures all three ways once, one after the other and in another order each time. A ratio is
that of two figures of the same pair, the table shows its median over the pairs. All processes are started anew a few
times, since where their memory lies moves a ratio by as much as a fifth, for as long as they live. CPU time is user and
system time of the middle's process, all threads, for each message that it passed on (two a round trip).
"""

import itertools
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
from common import json_option, machine, with_goal, write
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from ways import Way, broker_way, direct_way, proxy_way

WIDTH = 110
"""Characters in a line of the table."""

WINDOWS = (1, 8)
"""Messages in flight."""

WALL_GOAL, WALL_GOAL_FROM = 0.95, 64 * 1024
"""Speed to reach, as a share of `zmq.proxy`'s, and the payload in bytes from which it counts."""

CPU_GOALS = {100: 0.4, 64 * 1024: 0.85, 1024 * 1024: 0.9}
"""CPU time of `zmq.proxy` ÷ that of the broker to reach, by payload in bytes."""


WAYS = broker_way, proxy_way, direct_way


class Figures(NamedTuple):
    """Of one measurement: seconds for each round trip, CPU seconds of the middle for each message."""

    wall: float
    cpu: float | None


Pair = dict[str, Figures]
"""What was measured of each way, by its name, one after the other."""

Order = tuple[int, ...]
"""In which order the ways are measured, as places in `WAYS`."""

Point = tuple[int, int]
"""Bytes of a payload, and how many are in flight."""


def cpu_seconds(process: int) -> float:
    """Return user and system time of a process so far, all threads (its clock_getcpuclockid(3) on Linux)."""
    return time.clock_gettime(~process << 3 | 2)


def measure(way: Way, size: int, window: int, messages: int) -> Figures:
    """Exchange so many messages with payloads of `size` bytes over this way."""
    way.exchange(size, window, max(window, messages // 2))  # what the middle does beside it is by now as it stays
    before = cpu_seconds(way.middle) if way.middle else 0.0
    wall = way.exchange(size, window, messages)
    cpu = (cpu_seconds(way.middle) - before) / (2 * messages) if way.middle else None
    return Figures(wall / messages, cpu)


def count_for(ways: Sequence[Way], size: int, window: int, seconds: float) -> int:
    """Warm every way up; return how many messages a middling one exchanges in about so many seconds."""
    messages, usual = window, 0.0
    while messages * usual < seconds / 4:
        messages *= 2
        usual = median(measure(way, size, window, messages).wall for way in ways)
    return max(window, round(seconds / usual))


def measure_pairs(ways: Sequence[Way], size: int, window: int, orders: Iterable[Order], seconds: float) -> list[Pair]:
    """Measure all ways once in each of these orders."""
    messages = count_for(ways, size, window, seconds)
    return [{ways[way].name: measure(ways[way], size, window, messages) for way in order} for order in orders]


def summarise(size: int, window: int, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return medians and the medians of the pairs' ratios.

    Seconds are for each round trip, CPU seconds for each message; a ratio below 1 means that the broker is slower.
    """
    return {
        "size": size,
        "window": window,
        "wall_seconds": {name: median(pair[name].wall for pair in pairs) for name in pairs[0]},
        "cpu_seconds": {name: median(pair[name].cpu or 0.0 for pair in pairs) for name in ("broker", "proxy")},
        "ratios": {
            "wall_proxy": median(pair["proxy"].wall / pair["broker"].wall for pair in pairs),
            "wall_direct": median(pair["direct"].wall / pair["broker"].wall for pair in pairs),
            "cpu_proxy": median((pair["proxy"].cpu or 0.0) / (pair["broker"].cpu or 1.0) for pair in pairs),
        },
        "goals": {"wall_proxy": WALL_GOAL if size >= WALL_GOAL_FROM else None, "cpu_proxy": CPU_GOALS.get(size)},
        "pairs": [{name: figures._asdict() for name, figures in pair.items()} for pair in pairs],
    }


# The command


def table_of(points: Sequence[dict[str, Any]]) -> Table:
    """Return the figures as a table; in brackets what a ratio is to reach."""
    title = "A relayed tensor: µs of a round trip, CPU µs of a message, and what is 1 where both are as fast"
    table = Table(title=title, box=SIMPLE)
    table.add_column("payload")
    for column in ("in flight", "broker", "proxy", "direct", "broker CPU", "proxy CPU"):
        table.add_column(column, justify="right")
    for column in ("direct ÷ broker", "proxy ÷ broker", "proxy ÷ broker CPU"):
        table.add_column(column, justify="right")
    for point in points:
        ratios, goals = point["ratios"], point["goals"]
        table.add_row(
            bytes_text(point["size"]),
            str(point["window"]),
            *(f"{point['wall_seconds'][name] * 1e6:.0f}" for name in ("broker", "proxy", "direct")),
            *(f"{point['cpu_seconds'][name] * 1e6:.1f}" for name in ("broker", "proxy")),
            f"{ratios['wall_direct']:.2f}",
            *(_with_goal(ratios[name], goals[name]) for name in ("wall_proxy", "cpu_proxy")),
        )
    return table


def _with_goal(ratio: float, goal: float | None) -> str:
    return f"{ratio:.2f}" if goal is None else with_goal(f"{ratio:.2f}", f"{goal:g}")


def bytes_text(size: int) -> str:
    """Return a size such as `64 KiB`."""
    for unit, name in ((2**20, "MiB"), (2**10, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"


def _sizes(_context: click.Context, _option: click.Parameter, text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise click.BadParameter(f"{text!r} is no list of sizes: give bytes, such as 100,65536")
    return [int(part) for part in text.split(",")]


@click.command(context_settings={"show_default": True})
@click.option("--starts", default=3, type=click.IntRange(min=1), help="How often all processes are started anew.")
@click.option(
    "--pairs", default=5, type=click.IntRange(min=1), help="Measurements of each way at each point of a start."
)
@click.option("--sizes", default="100,4096,65536,1048576,4194304,16777216", callback=_sizes, help="Payloads, in bytes.")
@click.option("--seconds-per-point", "seconds", default=0.5, help="What one measurement lasts.")
@json_option
def main(starts: int, pairs: int, sizes: list[int], seconds: float, file: Path | None) -> None:
    """Compare the broker's relay with zmq.proxy and with a direct connection."""
    taken: dict[Point, list[Pair]] = {point: [] for point in itertools.product(sizes, WINDOWS)}
    orders = itertools.cycle(itertools.permutations(range(len(WAYS))))
    for _ in range(starts):
        with ExitStack() as stack:
            ways = [start(stack) for start in WAYS]
            for (size, window), sofar in taken.items():
                sofar += measure_pairs(ways, size, window, itertools.islice(orders, pairs), seconds)
    points = [summarise(size, window, sofar) for (size, window), sofar in taken.items()]
    Console(width=WIDTH).print(table_of(points))
    write(file, {"machine": machine("pyzmq"), "starts": starts, "pairs": starts * pairs, "points": points})


if __name__ == "__main__":
    main()
