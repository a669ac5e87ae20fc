"""A client's side of a turn and of an evaluation: what it computes, sends and waits for, step by step."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from zsplit import crash
from zsplit.config import Config
from zsplit.data import ClientData, Prefetch
from zsplit.errors import RunFailedError
from zsplit.model import randomness
from zsplit.train.account import Account
from zsplit.train.half import Half, Workshop
from zsplit.train.link import Link
from zsplit.train.rates import epoch_of
from zsplit.train.schedule import order
from zsplit.train.state import State
from zsplit.wire.messages import Evaluate, Held, Kind, Lease, Tally, Turn, What, bucket_of
from zsplit.wire.messages import Tensors as TensorsMessage

Outgoing = tuple[What, Tensor, str]
"""What a tensor is, the tensor, and the codec that it travels in."""

Batch = tuple[Tensor, Tensor]
"""Inputs (B, …), and a target (B,) for each: its label, or the id by which the server finds that."""

EVALUATION_WINDOW = 3
"""Batches of an evaluation that are unanswered at once."""


class Reply(NamedTuple):
    """What the server answered to a micro-batch."""

    message: TensorsMessage
    tensors: dict[str, Tensor]


class Answers(Protocol):
    """Waits for the server's answer to one micro-batch."""

    def __call__(self, lease: Lease, kind: Kind, step: int, micro: int, leg: int = 1) -> Reply: ...


class Desk(NamedTuple):
    """What a client works with: the same for all of its jobs."""

    link: Link
    config: Config
    workshop: Workshop
    data: ClientData
    batches: Prefetch
    client: int
    answer: Answers
    look_up: Callable[[Lease], None]
    tell: Callable[[float, int], None]

    @property
    def target(self) -> What:
        """What goes with the inputs: labels, or the sample ids by which the server finds them."""
        return "ids" if self.config.train.labels == "server" else "labels"

    def train_batch(self, round: int, step: int) -> Batch:
        """Return the inputs and targets of a step."""
        inputs, labels = self.batches.train_batch(round, step)
        return inputs, self.data.train_ids(round, step) if self.target == "ids" else labels

    def eval_batches(self, part: Literal["validation", "test"]) -> Iterator[Batch]:
        """Yield the inputs and targets of an evaluation."""
        batches = self.data.eval_batches(part)
        if self.target == "labels":
            return batches
        return ((inputs, ids) for (inputs, _), ids in zip(batches, self.data.eval_ids(part), strict=True))


class Training:
    """A turn: `run` trains its steps and returns the front as it is then, and what was done.

    Here the loss is the server's, and the targets travel with the smashed data. Where it is the client's, micro-batches
    take another way (`UShaped`, `Alone`).
    """

    def __init__(self, desk: Desk, job: Turn, half: Half, account: Account) -> None:
        self.desk, self.job, self.half, self.account = desk, job, half, account

    def run(self) -> tuple[State, Tally]:
        job = self.job
        self.half.part.train()
        durations: Counter[int] = Counter()
        loss_sum, samples = 0.0, 0
        for step in range(job.first, job.first + job.count):
            began = time.monotonic()
            loss, size = self._step(step)
            loss_sum, samples = loss_sum + loss * size, samples + size
            durations[bucket_of(time.monotonic() - began)] += 1
            self.desk.link.report(Held(lease=job.lease, state="running", step=step + 1), at_once=False)
            self.desk.tell(loss, size)
            self.desk.look_up(job.lease)
        tally = Tally(steps=job.count, samples=samples, loss_sum=loss_sum, step_seconds=dict(durations))
        return self.half.state(), tally

    def _step(self, step: int) -> tuple[float, int]:
        """One mini-batch: one optimizer step on both sides. Return its mean loss and its samples."""
        job = self.job
        self.half.use_epoch(epoch_of(self.desk.config, job.round, step, job.epoch_steps))
        with self.account.computing("load", step):
            inputs, targets = self.desk.train_batch(job.round, step)
        micros = min(job.plan.micro_batches, len(targets))
        slices = list(zip(inputs.tensor_split(micros), targets.tensor_split(micros), strict=True))
        self.half.begin_step(micros)
        loss, norms = self.micro_batches(step, slices)
        self._check(loss, step)
        with self.account.computing("step", step):
            if self.desk.config.train.clip_norm:
                self._clip(step, norms)
            self.half.step()
        crash.at("client.step")
        return loss, len(targets)

    def micro_batches(self, step: int, slices: Sequence[Batch]) -> tuple[float, Tensor | None]:
        """Take the slices of a step forward and backward.

        Return their mean loss, and the norms of the server's gradients where these are to be clipped.
        """
        smashed: dict[int, Tensor] = {}
        loss, norms = 0.0, None
        for action, micro in order(len(slices), self.job.plan.window):
            if action == "forward":
                smashed[micro] = self.forward(step, micro, slices)
            else:
                reply = self.desk.answer(self.job.lease, "train", step, micro)
                norms = self.backward(step, micro, smashed.pop(micro), reply)
                loss += reply.message.scalars["loss"] * (len(slices[micro][1]) / size_of(slices))
        return loss, norms

    def forward(self, step: int, micro: int, slices: Sequence[Batch]) -> Tensor:
        """Compute the smashed data of one micro-batch and send them on their way."""
        x, targets = slices[micro]
        with self.account.computing("forward", step, micro), self.randomness(step, micro):
            smashed: Tensor = self.half.part(x.to(self.half.device))
        scalars = {"batch": float(size_of(slices)), "micros": float(len(slices))}
        sent: list[Outgoing] = [("smashed", smashed, self.job.plan.up), *self.beside(targets)]
        crash.at("client.send")
        self.desk.link.send_tensors(self.job.lease, "train", step, micro, 0, sent, scalars)
        return smashed

    def beside(self, targets: Tensor) -> list[Outgoing]:
        """Return what travels with the smashed data."""
        return [(self.desk.target, targets, "raw")]

    def backward(self, step: int, micro: int, smashed: Tensor, reply: Reply) -> Tensor | None:
        """Go backward from the gradients of smashed data; return the norms that came with them."""
        with self.account.computing("backward", step, micro):
            if smashed.requires_grad:  # a front without parameters has nothing to learn
                torch.autograd.backward(smashed, reply.tensors["gradients"].to(smashed.device))
        return reply.tensors.get("norms")

    def randomness(self, step: int, micro: int) -> AbstractContextManager[None]:
        return randomness(self.desk.config.run.seed, self.desk.client, self.job.round, step, micro)

    def _clip(self, step: int, theirs: Tensor | None) -> None:
        """Scale both sides' gradients by one factor; a server that takes part waits for it before it steps."""
        front, back = self.desk.workshop.parts(self.job.plan.cut, self.job.plan.tail)
        mine = self.half.gradient_norms()
        norms = {name: norm for (name, _), norm in zip(front.named_parameters(), mine, strict=True)}
        if theirs is not None:
            norms |= {name: norm for (name, _), norm in zip(back.named_parameters(), theirs, strict=True)}
        scale = self.desk.workshop.clip_scale(norms)
        if theirs is not None:
            self.desk.link.send_step(self.job.lease, step, scale)
        self.half.scale_gradients(scale)

    def _check(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise RunFailedError(
                f"The loss became {loss} in round {self.job.round + 1}, step {step}: "
                "lower train.lr, or set train.clip_norm"
            )


class Evaluation:
    """A version on this client's part of the data, forward only; `run` returns the sums over its samples.

    Here the server scores, as it has the targets.
    """

    def __init__(self, desk: Desk, job: Evaluate, half: Half, account: Account) -> None:
        self.desk, self.job, self.half, self.account = desk, job, half, account

    @torch.no_grad()
    def run(self) -> Tally:
        self.half.part.eval()
        total: Counter[str] = Counter()
        sent = answered = 0
        for inputs, targets in self.desk.eval_batches(self.job.part):
            if sent - answered == EVALUATION_WINDOW:
                total.update(self.scores(answered))
                answered += 1
            with self.account.computing("evaluate", sent):
                outputs = self.half.part(inputs.to(self.half.device))
            self.send(sent, outputs, targets)
            crash.at("client.evaluate")
            sent += 1
        for number in range(answered, sent):
            total.update(self.scores(number))
        self._check(total["loss"])
        samples, top1, top5 = (int(total[name]) for name in ("samples", "top1", "top5"))
        return Tally(steps=sent, samples=samples, loss_sum=total["loss"], top1=top1, top5=top5)

    def send(self, number: int, outputs: Tensor, targets: Tensor) -> None:
        """Send what the front made of a batch."""
        tensors: list[Outgoing] = [("smashed", outputs, self.job.plan.up), (self.desk.target, targets, "raw")]
        self.desk.link.send_tensors(self.job.lease, "eval", number, 0, 0, tensors, {})

    def scores(self, number: int) -> Mapping[str, float]:
        """Return loss, top-1, top-5 and samples of a batch, summed."""
        scalars = self.desk.answer(self.job.lease, "eval", number, 0).message.scalars
        return {name: scalars[name] for name in SCORES}

    def _check(self, loss: float) -> None:
        if not math.isfinite(loss):
            # Validation is part of its round; the test comes after the last, when that round is counted already.
            rounds = self.job.round + (self.job.part == "validation")
            raise RunFailedError(f"The {self.job.part} loss after round {rounds} is {loss}: lower train.lr")


SCORES = ("loss", "top1", "top5", "samples")


def size_of(slices: Sequence[Batch]) -> int:
    """Return the samples of a mini-batch."""
    return sum(len(targets) for _, targets in slices)
