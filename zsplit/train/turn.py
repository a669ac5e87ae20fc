"""A client's side of a turn and of an evaluation: what it computes, sends and waits for, step by step."""

import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

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

EVALUATION_WINDOW = 3
"""Batches of an evaluation that are unanswered at once."""


class Reply(NamedTuple):
    """What the server answered to a micro-batch."""

    message: TensorsMessage
    tensors: dict[str, Tensor]


class Answers(Protocol):
    """Waits for the server's answer to one micro-batch."""

    def __call__(self, lease: Lease, kind: Kind, step: int, micro: int) -> Reply: ...


class Desk(NamedTuple):
    """What a client works with: the same for all of its jobs."""

    link: Link
    config: Config
    workshop: Workshop
    data: ClientData
    batches: Prefetch
    client: int
    answer: Answers
    tell: Callable[[float, int], None]


class Training:
    """A turn: `run` trains its steps and returns the front as it is then, and what was done."""

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
        tally = Tally(steps=job.count, samples=samples, loss_sum=loss_sum, step_seconds=dict(durations))
        return self.half.state(), tally

    def _step(self, step: int) -> tuple[float, int]:
        """One mini-batch: one optimizer step on both sides. Return its mean loss and its samples."""
        job = self.job
        self.half.use_epoch(epoch_of(self.desk.config, job.round, step, job.epoch_steps))
        with self.account.computing("load", step):
            inputs, labels = self.desk.batches.train_batch(self.job.round, step)
        micros = min(job.plan.micro_batches, len(labels))
        slices = list(zip(inputs.tensor_split(micros), labels.tensor_split(micros), strict=True))
        self.half.begin_step(micros)
        outputs: dict[int, Tensor] = {}
        loss = 0.0
        norms = None
        for action, micro in order(micros, job.plan.window):
            if action == "forward":
                outputs[micro] = self._forward(step, micro, slices)
            else:
                reply = self.desk.answer(job.lease, "train", step, micro)
                with self.account.computing("backward", step, micro):
                    _backward(outputs.pop(micro), reply.tensors["gradients"])
                loss += reply.message.scalars["loss"] * (len(slices[micro][1]) / len(labels))
                norms = reply.tensors.get("norms")
        self._check(loss, step)
        with self.account.computing("step", step):
            if norms is not None:
                self._clip(step, norms)
            self.half.step()
        return loss, len(labels)

    def _forward(self, step: int, micro: int, slices: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Compute the smashed data of one micro-batch and send them on their way."""
        x, labels = slices[micro]
        with self.account.computing("forward", step, micro), self._randomness(step, micro):
            smashed: Tensor = self.half.part(x.to(self.half.device))
        scalars = {"batch": float(sum(len(y) for _, y in slices)), "micros": float(len(slices))}
        sent: list[Outgoing] = [("smashed", smashed, self.job.plan.up), ("labels", labels, "raw")]
        self.desk.link.send_tensors(self.job.lease, "train", step, micro, 0, sent, scalars)
        return smashed

    def _randomness(self, step: int, micro: int) -> AbstractContextManager[None]:
        return randomness(self.desk.config.run.seed, self.desk.client, self.job.round, step, micro)

    def _clip(self, step: int, theirs: Tensor) -> None:
        """Scale both sides' gradients by one factor; the server waits for it before it steps."""
        front, back = self.desk.workshop.parts(self.job.plan.cut)
        mine = self.half.gradient_norms()
        norms = {name: norm for (name, _), norm in zip(front.named_parameters(), mine, strict=True)}
        norms |= {name: norm for (name, _), norm in zip(back.named_parameters(), theirs, strict=True)}
        scale = self.desk.workshop.clip_scale(norms)
        self.desk.link.send_step(self.job.lease, step, scale)
        self.half.scale_gradients(scale)

    def _check(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise RunFailedError(
                f"The loss became {loss} in round {self.job.round + 1}, step {step}: "
                "lower train.lr, or set train.clip_norm"
            )


@torch.no_grad()
def evaluate(desk: Desk, job: Evaluate, half: Half, account: Account) -> Tally:
    """Evaluate a version on this client's part of the data, forward only; return the sums over its samples."""
    half.part.eval()
    total: Counter[str] = Counter()
    sent = answered = 0
    for inputs, labels in desk.data.eval_batches(job.part):
        if sent - answered == EVALUATION_WINDOW:
            total.update(_scores(desk, job, answered))
            answered += 1
        with account.computing("evaluate", sent):
            smashed = half.part(inputs.to(half.device))
        tensors: list[Outgoing] = [("smashed", smashed, job.plan.up), ("labels", labels, "raw")]
        desk.link.send_tensors(job.lease, "eval", sent, 0, 0, tensors, {})
        sent += 1
    for step in range(answered, sent):
        total.update(_scores(desk, job, step))
    if not math.isfinite(total["loss"]):
        raise RunFailedError(f"The {job.part} loss after round {job.round + 1} is {total['loss']}: lower train.lr")
    samples, top1, top5 = (int(total[name]) for name in ("samples", "top1", "top5"))
    return Tally(steps=sent, samples=samples, loss_sum=total["loss"], top1=top1, top5=top5)


SCORES = ("loss", "top1", "top5", "samples")


def _scores(desk: Desk, job: Evaluate, step: int) -> dict[str, float]:
    scalars = desk.answer(job.lease, "eval", step, 0).message.scalars
    return {name: scalars[name] for name in SCORES}


def _backward(output: Tensor, gradient: Tensor) -> None:
    if output.requires_grad:  # a front without parameters has nothing to learn
        torch.autograd.backward(output, gradient.to(output.device))
