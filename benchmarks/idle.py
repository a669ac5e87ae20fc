"""How long the server waits, and how long a round takes, over a slow link: split learning in three ways, and federated.

    planned     the product, its clients at once, cut and micro-batches by its planner
    pipelined   the same, but cut where the model is cut by custom, and only the micro-batches planned
    sequential  the product as split learning began: one client after the other, the same cut, M = 1
    federated   federated averaging in plain PyTorch: each client trains the whole model and sends its weights, the
                server averages them and sends the average

In a round every client takes the same number of steps on as many samples, in all four ways, and the optimizer begins
anew: only weights travel between rounds. The link is the product's own shaping; the federated clients wait by the same
computation of when a message would be through. The server is idle when it neither computes (forward, backward,
optimizer's step) nor averages.
"""

import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import click
import torch
import zmq
from common import child, json_option, machine, show, write
from rich.box import SIMPLE
from rich.table import Table
from runs import CLASSES, Pass, Speed, Task, run, say, shown, speed_of
from torch import Tensor
from torch.nn.functional import cross_entropy
from trainers import Setting, build, optimizer_of

SHAPES = {"pipelearn/vgg5": (3, 32, 32), "digits/cnn": (1, 8, 8), "resnet18": (3, 32, 32)}

ANSWER_SECONDS = 600.0
"""How long a federated client may take for a round before the benchmark gives up."""

State = dict[str, Tensor]


class Measured(NamedTuple):
    """What a way took: seconds of each round but the first, the server's idle share, and the plans it ended with."""

    rounds: list[float]
    idle: float
    plans: list[str]


Way = Callable[[Task, int], Measured]


# The product


def product(settings: Mapping[str, object]) -> Way:
    """Return the way that trains with the product, these keys set."""

    def measure(task: Task, rounds: int) -> Measured:
        record = run(task, {"run.rounds": rounds, **settings})
        plans = [f"{plan['cut']}, {plan['micro_batches']}" for plan in record.summary["plan"].values()]
        seconds = [each["seconds"] for each in record.rounds[1:]]
        return Measured(seconds, record.summary["idle"]["server"], [*dict.fromkeys(plans)])

    return measure


# Federated averaging


def federated(task: Task, rounds: int) -> Measured:
    """Train the whole model at every client, and average."""
    setting = Setting(task.model, "", task.shape, task.batch, 1, rounds, task.steps)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        endpoint = f"ipc://{folder}/server"
        for _ in range(task.clients):
            stack.enter_context(child(train_whole, setting, task.speed, endpoint))
        _, taken = stack.enter_context(child(average_all, setting, task.clients, endpoint))
    seconds, busy = zip(*taken[1:], strict=True)
    return Measured(list(seconds), 1 - sum(busy) / sum(seconds), ["whole model"])


def train_whole(ready: Connection, setting: Setting, speed: Speed, endpoint: str) -> None:
    """A client: take the weights, train, send them, for ever."""
    torch.set_num_threads(setting.threads)
    model = build(setting)
    inputs, labels = torch.randn(setting.batch, *setting.shape), torch.randint(CLASSES, (setting.batch,))
    socket = zmq.Context().socket(zmq.REQ)
    socket.connect(endpoint)
    ready.send(None)
    link, own = Pass(speed), b""
    while True:
        socket.send(own)
        model.load_state_dict(pickle.loads(link.down(socket.recv())))
        optimizer = optimizer_of(model)
        for _ in range(setting.steps):
            optimizer.zero_grad()
            cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        own = link.up(pickle.dumps(model.state_dict(), pickle.HIGHEST_PROTOCOL))


def average_all(report: Connection, setting: Setting, clients: int, endpoint: str) -> None:
    """The server: wait for all, average, answer; report for each round what it took and what the averaging took (s)."""
    torch.set_num_threads(setting.threads)
    state: State = build(setting).state_dict()
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.setsockopt(zmq.RCVTIMEO, int(ANSWER_SECONDS * 1000))
    socket.bind(endpoint)
    taken = []
    _answer_all(socket, _from_all(socket, clients), state)
    began = time.perf_counter()
    for _ in range(setting.rounds):
        bodies = _from_all(socket, clients)
        averaging = time.perf_counter()
        state = mean([pickle.loads(body) for body in bodies.values()])
        ended = time.perf_counter()
        _answer_all(socket, bodies, state)
        taken.append((ended - began, ended - averaging))
        began = ended
    report.send(taken)


def _from_all(socket: zmq.Socket[bytes], clients: int) -> dict[bytes, bytes]:
    """Wait for a message of each client; return them by the client's address."""
    received: dict[bytes, bytes] = {}
    while len(received) < clients:
        client, _, body = socket.recv_multipart()
        received[client] = body
    return received


def _answer_all(socket: zmq.Socket[bytes], to: Sequence[bytes] | Mapping[bytes, bytes], state: State) -> None:
    body = pickle.dumps(state, pickle.HIGHEST_PROTOCOL)
    for client in to:
        socket.send_multipart([client, b"", body])


def mean(states: Sequence[State]) -> State:
    """Return the average of states, weight by weight; what counts batches is the first one's."""
    first, *_ = states
    return {
        name: torch.stack([state[name] for state in states]).mean(0) if value.is_floating_point() else value
        for name, value in first.items()
    }


WAYS: dict[str, Way] = {
    "planned": product({"model.cut": "auto", "train.micro_batches": "auto"}),
    "pipelined": product({"train.micro_batches": "auto"}),
    "sequential": product({"schedule.policy": "round_robin", "train.micro_batches": 1}),
    "federated": federated,
}
"""All ways; what is planned is compared with each of the others."""


def figures_of(task: Task, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Return the medians of each way, and how many times faster and less idle the planned one is."""
    seconds = {way: median(each.rounds) for way, each in measured.items()}
    idle = {way: each.idle * seconds[way] for way, each in measured.items()}
    return {
        **task._asdict(),
        "speed": str(task.speed),
        "rtt_ms": task.speed.rtt,
        "round_seconds": seconds,
        "idle_share": {way: each.idle for way, each in measured.items()},
        "idle_seconds": idle,
        "faster": {way: seconds[way] / seconds["planned"] for way in measured},
        "less_idle": {way: idle[way] / idle["planned"] for way in measured},
        "plans": {way: each.plans for way, each in measured.items()},
        "taken": {way: each.rounds for way, each in measured.items()},
    }


# The command


def table_of(figures: dict[str, Any]) -> Table:
    """Return the figures as a table."""
    title = (
        f"A round of {figures['model']}: {figures['clients']} clients at {figures['speed']} Mbit/s, each with "
        f"{figures['steps']} steps of {figures['batch']} samples of {shown(figures['shape'])}"
    )
    table = Table(title=title, box=SIMPLE)
    table.add_column("way")
    table.add_column("cut, M")
    for column in ("s a round", "server idle", "idle s a round", "planned is so many times faster", "less idle"):
        table.add_column(column, justify="right")
    for way in figures["round_seconds"]:
        table.add_row(
            way,
            "\n".join(figures["plans"][way]),
            f"{figures['round_seconds'][way]:.2f}",
            f"{figures['idle_share'][way]:.1%}",
            f"{figures['idle_seconds'][way]:.2f}",
            f"{figures['faster'][way]:.2f}",
            f"{figures['less_idle'][way]:.2f}",
        )
    return table


def _link(_context: click.Context, _option: click.Parameter, text: str) -> Speed:
    try:
        return speed_of(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} does not do: give Mbit/s up and down, such as 10/25") from None


count = click.IntRange(min=1)


@click.command(context_settings={"show_default": True})
@click.option("--model", default="pipelearn/vgg5", type=click.Choice([*SHAPES]), help="What is trained.")
@click.option("--link", "speed", default="10/25", callback=_link, help="Each client's Mbit/s up and down.")
@click.option("--clients", default=4, type=count, help="Number of clients.")
@click.option("--batch", default=100, type=count, help="Samples in a mini-batch.")
@click.option("--steps", default=10, type=count, help="Steps of each client in a round.")
@click.option("--rounds", default=3, type=click.IntRange(min=2), help="Rounds; the first one does not count.")
@json_option
def main(model: str, speed: Speed, clients: int, batch: int, steps: int, rounds: int, file: Path | None) -> None:
    """Compare the server's idle time with that of sequential split learning and of federated averaging."""
    task = Task(model, SHAPES[model], batch, speed, clients, steps)
    measured = {}
    for way, measure in WAYS.items():
        say(f"{way} …")
        measured[way] = measure(task, rounds)
    figures = figures_of(task, measured)
    show(table_of(figures))
    write(file, {"machine": machine("torch", "pyzmq"), **figures})


if __name__ == "__main__":
    main()
