"""The three ways to train that `step.py` compares, and the course that sets their pace."""

import itertools
import pickle
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import click
import torch
import zmq
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

import zsplit
from zsplit.model import zoo

WARM_UP = 3
"""Steps of each way before the first round."""

POOL = 8
"""Different mini-batches; they come again and again."""

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
    test = TensorDataset(course.inputs[:1], torch.tensor(course.labels[:1]))
    data = zsplit.Data(course, test, setting.shape, CLASSES)
    with TemporaryDirectory() as folder:
        result = zsplit.run_here(config, str(Path(folder, "run")), data=data, watch=lambda _, on: drive(on))
    if not result.ok:
        raise click.ClickException(f"the product's run failed: {result.sentence}")
