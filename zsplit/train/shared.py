"""One back for several clients: stepped by each in a fixed order, or by all of them at once.

`shared` is SplitFed V2 (Thapa et al. 2022, algorithm 2): the back takes one client's step after another's. `fused`
takes one step on the concatenated smashed data of all clients, as training on the union of their mini-batches would.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from zsplit.config import Config
from zsplit.errors import RemoteProtocolError
from zsplit.model import randomness
from zsplit.seeds import derive
from zsplit.train.half import Half
from zsplit.train.jobs import Training, pair, whole
from zsplit.train.link import Incoming, Link
from zsplit.train.loss import check_labels
from zsplit.wire.messages import Share, Turn
from zsplit.wire.messages import Tensors as TensorsMessage

EVERYBODY = -1
"""Stands for the client in the seeds of what the back draws at random for all clients at once."""


class Slot(NamedTuple):
    """A step of the back: which step of the round, and whose."""

    step: int
    clients: tuple[int, ...]


def steps_of(shares: Sequence[Share]) -> Iterator[Slot]:
    """Yield each step of the clients' turns with those who have it, by index."""
    for step in range(min(s.first for s in shares), max(s.first + s.steps for s in shares)):
        yield Slot(step, tuple(sorted(s.client for s in shares if s.first <= step < s.first + s.steps)))


def shuffled(seed: int, round_: int, shares: Sequence[Share]) -> Iterator[Slot]:
    """Yield the same with one client at a time, in an order drawn anew for each step."""
    for step, clients in steps_of(shares):
        order = list(clients)
        Random(derive(seed, "shared", round_, step)).shuffle(order)  # noqa: S311
        yield from (Slot(step, (client,)) for client in order)


class Common(Protocol):
    """What the turns of a group have in common: a back, and the order in which it takes what comes."""

    half: Half
    turns: dict[int, "GroupTraining"]

    def take(self, client: int, event: Incoming) -> None:
        """Take in a client's message, and do what can be done now."""


class GroupTraining(Training):
    """The server's side of a turn that shares its back. The first turn of the group loads it, the last ends all."""

    def __init__(self, link: Link, job: Turn, config: Config, common: Common) -> None:
        super().__init__(link, job, config, common.half)
        self.common = common
        self.loaded = False

    def begin(self) -> None:
        others = list(self.common.turns.values())
        self.common.turns[self.job.client] = self
        if not others:
            super().begin()
        elif others[0].loaded:
            self.ready()

    def ready(self) -> None:
        """Say that the back is loaded, for all turns that wait for it."""
        for turn in self.common.turns.values():
            if not turn.loaded:
                turn.loaded = True
                super(GroupTraining, turn).ready()

    def incoming(self, event: Incoming) -> None:
        self.common.take(self.job.client, event)

    def advance(self, event: Incoming) -> bool:
        """Take a message as a turn of its own would; return whether that ended a step."""
        step = self.at[0]
        super().incoming(event)
        return self.at[0] > step


class _Group:
    """Turns, what came for them and waits, and the slots to come."""

    def __init__(self, half: Half, slots: Iterator[Slot]) -> None:
        self.half = half
        self.turns: dict[int, GroupTraining] = {}
        self.slot = next(slots, None)
        self._slots = slots
        self.waiting: defaultdict[int, deque[Incoming]] = defaultdict(deque)

    def next_slot(self) -> None:
        """The slot is done; after the last one all turns are."""
        self.slot = next(self._slots, None)
        if self.slot is None:
            state = self.half.state()
            for turn in self.turns.values():
                turn.finish(state)


class Shared(_Group):
    """The back of `shared`: one client's step after another's, whenever they come."""

    def take(self, client: int, event: Incoming) -> None:
        self.waiting[client].append(event)
        while self.slot is not None and self.waiting[self.slot.clients[0]]:
            turn = self.turns[self.slot.clients[0]]
            if turn.advance(self.waiting[turn.job.client].popleft()):
                self.next_slot()


class Fused(_Group):
    """The back of `fused`: micro-batch m of a step is that of all clients who have one.

    The loss is the mean over the union of the mini-batches, of B samples. Client i, with bᵢ of them, gets its gradient
    times B/bᵢ: the front steps as if its mini-batch were alone.
    """

    def __init__(self, half: Half, slots: Iterator[Slot], config: Config) -> None:
        super().__init__(half, slots)
        self.config = config
        self.micro = 0
        self.batches: dict[int, int] = {}
        self.micros: dict[int, int] = {}

    def take(self, client: int, event: Incoming) -> None:
        self.waiting[client].append(event)
        while (clients := self._due()) and all(self.waiting[each] for each in clients):
            self._micro_batch([(self.turns[each], self.waiting[each].popleft()) for each in clients])

    def _due(self) -> list[int]:
        """Return the clients of which a micro-batch is due."""
        clients = self.slot.clients if self.slot is not None else ()
        return [client for client in clients if self.micro == 0 or self.micros[client] > self.micro]

    def _micro_batch(self, taken: Sequence[tuple[GroupTraining, Incoming]]) -> None:
        messages = [self._message(turn, event) for turn, event in taken]
        if self.micro == 0:
            self.batches = {turn.job.client: whole(m, "batch") for (turn, _), m in zip(taken, messages, strict=True)}
            self.micros = {turn.job.client: whole(m, "micros") for (turn, _), m in zip(taken, messages, strict=True)}
            taken[0][0].use_epoch(messages[0].step)
            self.half.begin_step(max(self.micros.values()))
        pairs = [pair(event.tensors, self.half.device) for _, event in taken]
        gradients, losses = self._compute(taken[0][0], messages[0].step, pairs)
        total = sum(self.batches.values())
        for (turn, _), message, gradient, loss in zip(taken, messages, gradients, losses, strict=True):
            turn.samples += len(gradient)
            scaled = gradient * (total / self.batches[turn.job.client])
            turn.reply(message, [] if self.half.is_first else [("gradients", scaled, turn.job.plan.down)], loss)
        self.micro += 1
        if not self._due():
            self._step(taken[0][0], messages[0].step)

    def _message(self, turn: GroupTraining, event: Incoming) -> TensorsMessage:
        message = event.message
        step = self.slot.step if self.slot is not None else -1
        if not isinstance(message, TensorsMessage) or (message.step, message.micro) != (step, self.micro):
            raise RemoteProtocolError(
                f"Client {turn.job.client} sent {type(message).__name__} of step {message.step} out of order"
            )
        return message

    def _compute(
        self, turn: GroupTraining, step: int, pairs: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Return each client's gradient of the mean loss over all, and its own mean loss."""
        sizes = [len(labels) for _, labels in pairs]
        smashed = torch.cat([each for each, _ in pairs]).requires_grad_(not self.half.is_first)
        labels = torch.cat([each for _, each in pairs])
        place = EVERYBODY, turn.job.round, step, self.micro
        with turn.account.computing("forward", step, self.micro), randomness(self.config.run.seed, *place):
            outputs = self.half.forward(smashed)
        check_labels(labels, outputs)
        with turn.account.computing("backward", step, self.micro):
            loss = F.cross_entropy(outputs, labels)
            torch.autograd.backward(loss * (len(labels) / sum(self.batches.values())))
        gradient = smashed.grad if smashed.grad is not None else torch.zeros_like(smashed)
        own = zip(torch.split(outputs.detach(), sizes), torch.split(labels, sizes), strict=True)
        return torch.split(gradient, sizes), [F.cross_entropy(each, y) for each, y in own]

    def _step(self, turn: GroupTraining, step: int) -> None:
        with turn.account.computing("step", step):
            self.half.step()
        self.micro = 0
        for client in self.slot.clients if self.slot is not None else ():
            self.turns[client].stepped(step)
        self.next_slot()


def common_of(config: Config, job: Turn, half: Half) -> Common:
    """Return what the turns of this one's group have in common."""
    if job.group is None:
        raise AssertionError("a turn of its own has nothing in common")
    shares = job.group.shares
    if config.schedule.server_model == "fused":
        return Fused(half, steps_of(shares), config)
    return Shared(half, shuffled(config.run.seed, job.round, shares))
