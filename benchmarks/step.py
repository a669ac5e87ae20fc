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
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import click
import torch
import zmq
from common import child, json_option, machine, write
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import zsplit
from zsplit.model import zoo

WAYS = ("uncut", "split", "pickle")

GOAL = 1.07
"""Time of a split step ÷ that of an uncut one to reach."""

WARM_UP = 3
"""Steps of each way before the first round."""

POOL = 8
"""Different mini-batches; they come again and again."""

POLL_SECONDS = 1
"""How often it is asked, while a block lasts, whether all processes still live."""

CLASSES, RATE, MOMENTUM = 10, 0.01, 0.9


class Setting(NamedTuple):
    """What is trained, and how long. `shape` is that of one sample, `threads` those of each process."""

    model: str
    cut: str
    shape: tuple[int, ...]
    batch: int
    threads: int
    rounds: int
    steps: int

    @property
    def blocks(self) -> list[int]:
        """Steps of each block: the warm-up, one for each round, and one that lets the last be timed to its end."""
        return [WARM_UP, *[self.steps] * self.rounds, 1]


class Course(Dataset[tuple[Tensor, int]]):
    """The samples of one way. For each number that comes through its gate it lets so many steps pass.

    At the end of such a block it answers with the duration of each step, in seconds. The gate is a PAIR socket;
    what trains is connected to it with its first sample.
    """

    def __init__(self, setting: Setting, gate: str) -> None:
        generator = torch.Generator().manual_seed(0)
        count = POOL * setting.batch
        self.inputs = torch.randn(count, *setting.shape, generator=generator)
        self.labels = torch.randint(CLASSES, (count,), generator=generator).tolist()
        self._batch, self._length = setting.batch, setting.batch * sum(setting.blocks)
        self._endpoint = gate
        self._gate: zmq.Socket[bytes] | None = None
        self._given = self._left = 0
        self._starts: list[float] = []

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self._given % self._batch == 0:
            self._begin_step()
        self._given += 1
        return self.inputs[index % len(self.inputs)], self.labels[index % len(self.inputs)]

    def _begin_step(self) -> None:
        now = time.perf_counter()
        if self._left == 0:
            self._wait(now)
            now = time.perf_counter()
        self._left -= 1
        self._starts.append(now)

    def _wait(self, now: float) -> None:
        """Answer for the block that has ended, if one has, and wait for the next."""
        if self._gate is None:
            self._gate = zmq.Context().socket(zmq.PAIR)
            self._gate.connect(self._endpoint)
        else:
            self._gate.send_json([after - before for before, after in itertools.pairwise([*self._starts, now])])
        self._left, self._starts = int(self._gate.recv()), []


# The uncut model


def train_uncut(ready: Connection, setting: Setting, course: Course) -> None:
    """Train the whole model."""
    torch.set_num_threads(setting.threads)
    model = build(setting)
    optimizer = optimizer_of(model)
    ready.send(None)
    for inputs, labels in DataLoader(course, setting.batch):
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def build(setting: Setting) -> nn.Module:
    """Return the whole model, in train mode."""
    return zoo.build(setting.model, CLASSES, 0, setting.shape).train()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer that all ways have."""
    return torch.optim.SGD(model.parameters(), RATE, MOMENTUM)


# The stop-and-wait baseline


def serve_pickle(ready: Connection, setting: Setting) -> None:
    """Keep the back: take smashed data and labels, step, answer with the gradient and the loss."""
    torch.set_num_threads(setting.threads)
    _, back = zsplit.split(build(setting), example(setting), setting.cut)
    optimizer = optimizer_of(back.train())
    socket = zmq.Context().socket(zmq.REP)
    socket.bind("tcp://127.0.0.1:*")
    ready.send(socket.getsockopt_string(zmq.LAST_ENDPOINT))
    while True:
        smashed, labels = pickle.loads(socket.recv())
        smashed.requires_grad_()
        optimizer.zero_grad()
        loss = cross_entropy(back(smashed), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        socket.send(pickle.dumps((smashed.grad, loss.item()), pickle.HIGHEST_PROTOCOL))


def train_pickle(ready: Connection, setting: Setting, course: Course, endpoint: str) -> None:
    """Train the front: send smashed data and labels, wait for the gradient, step."""
    torch.set_num_threads(setting.threads)
    front, _ = zsplit.split(build(setting), example(setting), setting.cut)
    optimizer = optimizer_of(front.train())
    socket = zmq.Context().socket(zmq.REQ)
    socket.connect(endpoint)
    ready.send(None)
    for inputs, labels in DataLoader(course, setting.batch):
        optimizer.zero_grad()
        smashed = front(inputs)
        socket.send(pickle.dumps((smashed.detach(), labels), pickle.HIGHEST_PROTOCOL))
        gradient, _ = pickle.loads(socket.recv())
        smashed.backward(gradient)
        optimizer.step()


def example(setting: Setting) -> Tensor:
    """Return an input to find the cut with."""
    return torch.zeros(2, *setting.shape)


# The product


def train_split(setting: Setting, course: Course, drive: Callable[[Callable[[], bool]], None]) -> None:
    """Run broker, server and client; call `drive` with a function that says whether they are still at it."""
    config = zsplit.load_config(
        None,
        {
            "run.name": "step",
            "run.rounds": 1,
            "run.eval_every": 0,
            "model.name": setting.model,
            "model.num_classes": CLASSES,
            "model.cut": setting.cut,
            "data.name": "own",
            "data.val_fraction": 0.0,
            "train.batch_size": setting.batch,
            "train.optimizer": "sgd",
            "train.lr": RATE,
            "train.momentum": MOMENTUM,
            "train.micro_batches": 1,
            "schedule.clients": 1,
            "broker.port": 0,
            "server.threads": setting.threads,
            "server.device": "cpu",
            "client.threads": setting.threads,
            "client.device": "cpu",
        },
    )
    test = torch.utils.data.TensorDataset(course.inputs[:1], torch.tensor(course.labels[:1]))
    data = zsplit.Data(course, test, setting.shape, CLASSES)
    with TemporaryDirectory() as folder:
        result = zsplit.run_here(config, str(Path(folder, "run")), data=data, watch=lambda _, on: drive(on))
    if not result.ok:
        raise click.ClickException(f"the product's run failed: {result.sentence}")


# Measuring

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
            alive = [on, uncut.is_alive, server.is_alive, client.is_alive]
            rounds.extend(drive(gates, setting, lambda: all(each() for each in alive)))

        train_split(setting, courses["split"], take_turns)
    return rounds


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
        taken[way] = gates[way].recv_json()
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


# The command


def table_of(points: Sequence[dict[str, Any]]) -> Table:
    """Return the figures as a table."""
    first = points[0]
    shape = "×".join(map(str, first["shape"]))
    table = Table(title=f"One step of {first['model']}, {first['batch']} samples of {shape}, cut at {first['cut']}")
    for column in ("threads a process", *(f"{way}, ms" for way in WAYS)):
        table.add_column(column, justify="right")
    table.add_column(f"split ÷ uncut (≤ {GOAL:g})", justify="right")
    table.add_column("pickle ÷ uncut", justify="right")
    for point in points:
        ratios, ranges = point["ratios"], point["ranges"]
        table.add_row(
            str(point["threads"]),
            *(f"{point['step_seconds'][way] * 1e3:.1f}" for way in WAYS),
            *(f"{ratios[way]:.3f} ({ranges[way][0]:.3f} to {ranges[way][1]:.3f})" for way in ratios),
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
    Console().print(table_of(points))
    write(file, {"machine": machine("torch", "pyzmq"), "points": points})


if __name__ == "__main__":
    main()
