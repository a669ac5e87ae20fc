"""What splitting costs a step: against the uncut model in one process, and beside a plain stop-and-wait loop.

    uncut    one process with the whole model, in plain PyTorch
    split    the product: its broker, a server and a client, as the processes they always are
    pickle   a client and a server with the same two parts, over one REQ/REP pair and pickle, and nothing else

All three train the same model on the same samples with the same optimizer. Each process has as many threads as
that of the uncut model.

The ways take turns, a block of steps each, in another order in each round; whoever is not being measured
waits. What sets the pace is the dataset (`Course`): every way asks it for its samples, it takes the time at each
mini-batch's first one, and holds the way up between two blocks. So a step lasts from the first sample of
its batch to the first sample of the next, whoever trains. A way's figure in a round is the median of
the block's steps; a ratio is that of two figures of the same round, and the table shows its median.
"""

import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import click
import zmq
from common import child, json_option, machine, show, with_goal, write
from rich.box import SIMPLE
from rich.table import Table
from trainers import Course, Setting, serve_pickle, train_pickle, train_split, train_uncut

WAYS = ("uncut", "split", "pickle")

GOAL = 1.07
"""Time of a split step ÷ that of an uncut one to reach."""

POLL_SECONDS = 1
"""How often it is asked, while a block lasts, whether all processes still live."""

Round = dict[str, list[float]]
"""The durations of a block's steps, in seconds, by way."""

Gates = dict[str, zmq.Socket[bytes]]
"""The gate of each way's course."""


def measure(setting: Setting) -> list[Round]:
    """Let all ways train in turns; return what each round took."""
    rounds: list[Round] = []
    with ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        stack.callback(context.destroy, linger=0)
        gates = {way: context.socket(zmq.PAIR) for way in WAYS}
        for gate in gates.values():
            gate.bind("tcp://127.0.0.1:*")
        courses = {way: Course(setting, gate.getsockopt_string(zmq.LAST_ENDPOINT)) for way, gate in gates.items()}
        uncut, _ = stack.enter_context(child(train_uncut, setting, courses["uncut"]))
        server, endpoint = stack.enter_context(child(serve_pickle, setting))
        client, _ = stack.enter_context(child(train_pickle, setting, courses["pickle"], endpoint))

        def take_turns(on: Callable[[], bool]) -> None:
            rounds.extend(drive(gates, setting, lambda: on() and {uncut, server, client} <= living()))

        train_split(setting, courses["split"], take_turns)
    return rounds


def living() -> set[int | None]:
    """Return the ids of this process's children that have not ended."""
    return {process.pid for process in multiprocessing.active_children()}


def drive(gates: Gates, setting: Setting, on: Callable[[], bool]) -> Iterator[Round]:
    """Let one block after the other pass, while `on` says that all processes live; yield the rounds."""
    warm_up, *blocks, last = setting.blocks
    pass_block(gates, WAYS, warm_up, on)
    for steps, order in zip(blocks, itertools.cycle(itertools.permutations(WAYS)), strict=False):
        yield pass_block(gates, order, steps, on)
    gates["split"].send(b"%d" % last)


def pass_block(gates: Gates, order: Sequence[str], steps: int, on: Callable[[], bool]) -> Round:
    """Let each way take so many steps, one way after the other; return their durations."""
    taken = {}
    for way in order:
        gates[way].send(b"%d" % steps)
        while not gates[way].poll(POLL_SECONDS * 1000):
            if not on():
                raise click.ClickException(f"a process ended while {way} was being measured: its words are above")
        taken[way] = json.loads(gates[way].recv())
    return taken


def figures_of(setting: Setting, rounds: Sequence[Round]) -> dict[str, Any]:
    """Return medians, and the medians and the range of the rounds' ratios to the uncut model."""
    taken = [{way: median(durations) for way, durations in each.items()} for each in rounds]
    ratios = {way: [each[way] / each["uncut"] for each in taken] for way in WAYS if way != "uncut"}
    return {
        **setting._asdict(),
        "step_seconds": {way: median(each[way] for each in taken) for way in WAYS},
        "ratios": {way: median(values) for way, values in ratios.items()},
        "ranges": {way: [min(values), max(values)] for way, values in ratios.items()},
        "goals": {"split": GOAL},
        "taken": rounds,
    }


def table_of(points: Sequence[dict[str, Any]]) -> Table:
    """Return the figures as a table; in brackets what the ratio is to reach, and the rounds' lowest and highest."""
    first = points[0]
    shape = "×".join(map(str, first["shape"]))
    title = f"A step of {first['model']}, {first['batch']} samples of {shape}, cut at {first['cut']}: ms"
    table = Table(title=title, box=SIMPLE)
    for column in ("threads", *WAYS, "split ÷ uncut", "from–to", "pickle ÷ uncut", "from–to"):
        table.add_column(column, justify="right")
    for point in points:
        ratios = {way: f"{ratio:.3f}" for way, ratio in point["ratios"].items()}
        ranges = {way: "–".join(f"{end:.2f}" for end in ends) for way, ends in point["ranges"].items()}
        table.add_row(
            str(point["threads"]),
            *(f"{point['step_seconds'][way] * 1e3:.1f}" for way in WAYS),
            *(with_goal(ratios["split"], f"{GOAL:g}"), ranges["split"]),
            *(ratios["pickle"], ranges["pickle"]),
        )
    return table


def _numbers(separator: str) -> Callable[[click.Context, click.Parameter, str], tuple[int, ...]]:
    def parse(_context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
        parts = text.split(separator)
        if not all(part.isdecimal() and int(part) for part in parts):
            raise click.BadParameter(f"{text!r} does not do: give numbers such as {option.default}")
        return tuple(map(int, parts))

    return parse


count = click.IntRange(min=1)


@click.command(context_settings={"show_default": True})
@click.option("--threads", default="1,2", callback=_numbers(","), help="Threads of each process, one after the other.")
@click.option("--rounds", default=7, type=count, help="Blocks of each way.")
@click.option("--steps", default=10, type=count, help="Steps in a block.")
@click.option("--batch", default=128, type=count, help="Samples in a mini-batch.")
@click.option("--model", default="resnet18", help="A model that the config knows.")
@click.option("--input", "shape", default="3x32x32", callback=_numbers("x"), help="Shape of a sample.")
@click.option("--cut", default="layer2.1.relu_1", help="Where it is cut, from `zsplit cuts`.")
@json_option
def main(
    threads: tuple[int, ...],
    rounds: int,
    steps: int,
    batch: int,
    model: str,
    shape: tuple[int, ...],
    cut: str,
    file: Path | None,
) -> None:
    """Compare a split step with that of the uncut model and with a stop-and-wait loop."""
    settings = [Setting(model, cut, shape, batch, each, rounds, steps) for each in threads]
    points = [figures_of(setting, measure(setting)) for setting in settings]
    show(table_of(points))
    write(file, {"machine": machine("torch", "pyzmq"), "points": points})


if __name__ == "__main__":
    main()
