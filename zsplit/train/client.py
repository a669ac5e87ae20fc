"""A client: it keeps the data and the front of the model, and trains or evaluates when it is its turn."""

import math
import time
from collections import Counter
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from zsplit.codec import encode
from zsplit.config import Config
from zsplit.data import ClientData
from zsplit.errors import RunFailedError
from zsplit.model import randomness
from zsplit.train.half import Half, Workshop
from zsplit.train.link import Incoming, Link
from zsplit.train.machine import describe, use_threads
from zsplit.train.schedule import order
from zsplit.train.shelf import Fetched
from zsplit.train.state import State
from zsplit.wire.messages import Evaluate, Held, Lease, Orders, Tally, Turn, bucket_of
from zsplit.wire.messages import Tensors as TensorsMessage

TELEMETRY_SECONDS = 0.25

EVALUATION_WINDOW = 3
"""Batches of an evaluation that are unanswered at once."""


class Reply(NamedTuple):
    """What the server answered to a micro-batch."""

    message: TensorsMessage
    tensors: dict[str, Tensor]


class Revoked(Exception):  # noqa: N818  (no error: the orders have changed)
    """The job under way is no longer in the orders."""


class Client:
    """The process. `serve` returns the broker's last sentence when the run is over."""

    def __init__(self, link: Link, config: Config, workshop: Workshop, data: ClientData) -> None:
        self.link = link
        self.config = config
        self.workshop = workshop
        self.data = data
        self.orders = Orders(revision=0)
        self.halves: dict[str, Half] = {}
        self.index = link.welcome.index
        self.idle = 0.0
        self._finished: set[Lease] = set()
        self._losses: list[float] = []
        self._samples = 0
        self._told = time.monotonic()
        self._idle_told = 0.0

    def serve(self) -> str:
        """Do the broker's jobs until the run is over. Raises RunFailedError where it failed."""
        sizes = self.data.size("train"), self.data.size("validation"), self.data.size("test")
        self.link.prepared(describe(self.workshop.device, self.workshop.cut, *sizes))
        while self.orders.finish is None:
            job = next((j for j in self.orders.jobs if j.lease not in self._finished), None)
            if isinstance(job, Turn | Evaluate):
                self._do(job)
            else:
                self._wait()
        if not self.orders.finish.ok:
            raise RunFailedError(self.orders.finish.sentence)
        return self.orders.finish.sentence

    def _do(self, job: Turn | Evaluate) -> None:
        """Do one job to its end, or until the orders no longer list it."""
        half = self._half(job.plan.cut)
        self.idle, began = 0.0, time.monotonic()
        try:
            self._load(job, half)
            state, tally = self._train(job, half) if isinstance(job, Turn) else self._evaluate(job, half)
        except Revoked:
            return
        self._finished = {job.lease}
        tally = msgspec.structs.replace(tally, seconds=time.monotonic() - began, idle=self.idle)
        digest = state.digest if state is not None else ""
        last = job.first + job.count if isinstance(job, Turn) else 0
        self.link.report(Held(lease=job.lease, state="done", step=last, digest=digest, tally=tally), state)

    def _half(self, cut: str) -> Half:
        if cut not in self.halves:
            self.halves[cut] = self.workshop.front(cut)
            self.halves[cut].keep_for(self.index)
        return self.halves[cut]

    def _load(self, job: Turn | Evaluate, half: Half) -> None:
        self.link.report(Held(lease=job.lease, state="opening"), at_once=False)
        self.link.fetch(job.lease, job.base, half.wants if isinstance(job, Turn) else half.weighs)
        while True:
            event = self._wait(job.lease)
            if isinstance(event, Fetched) and event.lease == job.lease:
                half.load(event.tensors)
                return

    # Training

    def _train(self, job: Turn, half: Half) -> tuple[State, Tally]:
        use_threads(job.threads[0])
        half.part.train()
        durations: Counter[int] = Counter()
        loss_sum, samples = 0.0, 0
        for step in range(job.first, job.first + job.count):
            began = time.monotonic()
            loss, size = self._step(job, half, step)
            loss_sum, samples = loss_sum + loss * size, samples + size
            durations[bucket_of(time.monotonic() - began)] += 1
            self.link.report(Held(lease=job.lease, state="running", step=step + 1), at_once=False)
            self._tell(loss, size)
        tally = Tally(steps=job.count, samples=samples, loss_sum=loss_sum, step_seconds=dict(durations))
        return half.state(), tally

    def _step(self, job: Turn, half: Half, step: int) -> tuple[float, int]:
        """One mini-batch: one optimizer step on both sides. Return its mean loss and its samples."""
        inputs, labels = self.data.train_batch(job.round, step)
        micros = min(job.plan.micro_batches, len(labels))
        scalars = {"batch": float(len(labels)), "micros": float(micros)}
        slices = list(zip(inputs.tensor_split(micros), labels.tensor_split(micros), strict=True))
        outputs: dict[int, Tensor] = {}
        loss = 0.0
        norms = None
        for action, micro in order(micros, job.plan.window):
            if action == "forward":
                x, y = slices[micro]
                with randomness(self.config.run.seed, self.index, job.round, step, micro):
                    outputs[micro] = half.part(x.to(half.device))
                sent = [encode("smashed", outputs[micro], job.plan.up), encode("labels", y)]
                self.link.send_tensors(job.lease, "train", step, micro, 0, sent, scalars)
            else:
                reply = self._answer(job.lease, step, micro)
                _backward(outputs.pop(micro), reply.tensors["gradients"])
                loss += reply.message.scalars["loss"] * (len(slices[micro][1]) / len(labels))
                norms = reply.tensors.get("norms")
        self._check(loss, job, step)
        if norms is not None:
            self._clip(job, half, step, norms)
        half.step()
        return loss, len(labels)

    def _clip(self, job: Turn, half: Half, step: int, theirs: Tensor) -> None:
        """Scale both sides' gradients by one factor; the server waits for it before it steps."""
        front, back = self.workshop.parts(job.plan.cut)
        norms = {name: norm for (name, _), norm in zip(front.named_parameters(), half.gradient_norms(), strict=True)}
        norms |= {name: norm for (name, _), norm in zip(back.named_parameters(), theirs, strict=True)}
        scale = self.workshop.clip_scale(norms)
        self.link.send_step(job.lease, step, scale)
        half.scale_gradients(scale)

    def _check(self, loss: float, job: Turn, step: int) -> None:
        if not math.isfinite(loss):
            raise RunFailedError(
                f"The loss became {loss} in round {job.round + 1}, step {step}: lower train.lr, or set train.clip_norm"
            )

    # Evaluation

    @torch.no_grad()
    def _evaluate(self, job: Evaluate, half: Half) -> tuple[None, Tally]:
        half.part.eval()
        total: Counter[str] = Counter()
        sent = answered = 0
        for inputs, labels in self.data.eval_batches(job.part):
            if sent - answered == EVALUATION_WINDOW:
                total.update(self._answer(job.lease, answered, 0).message.scalars)
                answered += 1
            smashed = half.part(inputs.to(half.device))
            frames = [encode("smashed", smashed, job.plan.up), encode("labels", labels)]
            self.link.send_tensors(job.lease, "eval", sent, 0, 0, frames, {})
            sent += 1
        for step in range(answered, sent):
            total.update(self._answer(job.lease, step, 0).message.scalars)
        if not math.isfinite(total["loss"]):
            raise RunFailedError(f"The {job.part} loss after round {job.round + 1} is {total['loss']}: lower train.lr")
        samples, top1, top5 = (int(total[name]) for name in ("samples", "top1", "top5"))
        return None, Tally(steps=sent, samples=samples, loss_sum=total["loss"], top1=top1, top5=top5)

    # Waiting

    def _wait(self, lease: Lease | None = None) -> Fetched | Incoming | None:
        """Wait for an event and return it, orders excepted: they are kept. Raises Revoked when `lease` is over."""
        began = time.monotonic()
        event = self.link.next()
        self.idle += time.monotonic() - began
        if not isinstance(event, Orders):
            return event
        self.orders = event
        if lease is not None and all(job.lease != lease for job in event.jobs):
            raise Revoked
        return None

    def _answer(self, lease: Lease, step: int, micro: int) -> Reply:
        """Wait for the server's answer to one micro-batch."""
        while True:
            event = self._wait(lease)
            if isinstance(event, Incoming) and isinstance(event.message, TensorsMessage):
                message = event.message
                if (message.lease, message.step, message.micro) == (lease, step, micro):
                    return Reply(message, event.tensors)

    def _tell(self, loss: float, samples: int) -> None:
        self._losses.append(loss)
        self._samples += samples
        elapsed = time.monotonic() - self._told
        if elapsed >= TELEMETRY_SECONDS:
            idle = max(0.0, self.idle - self._idle_told) / elapsed
            self.link.telemetry(tuple(self._losses), self._samples / elapsed, min(1.0, idle))
            self._losses, self._samples = [], 0
            self._told, self._idle_told = time.monotonic(), self.idle


def _backward(output: Tensor, gradient: Tensor) -> None:
    if output.requires_grad:  # a front without parameters has nothing to learn
        torch.autograd.backward(output, gradient.to(output.device))
