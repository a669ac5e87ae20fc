"""A server: it keeps the back of the model and steps it, evaluates, and merges contributions to versions.

Everything it does is a job under a lease. Jobs appear in the orders, ask for the state that they need, and
then react to their clients' tensors, in the order in which these come; orders that no longer list a job
end it.
"""

import time
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from zsplit.codec import encode
from zsplit.config import Config
from zsplit.errors import ConfigError, RemoteProtocolError, RunFailedError
from zsplit.model import randomness
from zsplit.train.aggregate import Part, merge
from zsplit.train.half import Half, Workshop
from zsplit.train.link import Fetched, Incoming, Link
from zsplit.train.machine import describe
from zsplit.train.state import State, Tensors
from zsplit.wire.manifest import LOCAL
from zsplit.wire.messages import (
    Evaluate,
    Finish,
    Held,
    Init,
    Job,
    Lease,
    Merge,
    Orders,
    Step,
    Tally,
    Turn,
)
from zsplit.wire.messages import Tensors as TensorsMessage

TELEMETRY_SECONDS = 0.25


class Handler(Protocol):
    """A job in the server's hands."""

    def begin(self) -> None:
        """Ask for what the job needs."""

    def fetched(self, event: Fetched) -> None:
        """Take in a state that the job asked for."""

    def incoming(self, event: Incoming) -> None:
        """Take in tensors of the job's client."""


class Server:
    """The process. `serve` returns the broker's last sentence when the run is over."""

    def __init__(self, link: Link, config: Config, workshop: Workshop) -> None:
        self.link = link
        self.config = config
        self.workshop = workshop
        self.jobs: dict[Lease, Handler] = {}
        self.spare: dict[str, list[Half]] = {}
        self._samples = 0
        self._busy = 0.0
        self._told = time.monotonic()

    def serve(self) -> str:
        """Do the broker's jobs until the run is over. Raises RunFailedError where it failed."""
        self.link.prepared(describe(self.workshop.device, self.workshop.cut))
        while True:
            event = self.link.next(TELEMETRY_SECONDS)
            began = time.monotonic()
            match event:
                case Orders(finish=Finish() as finish):
                    if not finish.ok:
                        raise RunFailedError(finish.sentence)
                    return finish.sentence
                case Orders():
                    self._obey(event)
                case Fetched(lease=lease):
                    if lease in self.jobs:
                        self.jobs[lease].fetched(event)
                case Incoming(message=message):
                    if message.lease in self.jobs:
                        self.jobs[message.lease].incoming(event)
                        self._samples += message.tensors[0].shape[0] if isinstance(message, TensorsMessage) else 0
                case None:
                    pass
            self._busy += time.monotonic() - began
            self._tell()

    def _obey(self, orders: Orders) -> None:
        listed = {job.lease: job for job in orders.jobs}
        for lease in self.jobs.keys() - listed.keys():
            self._drop(self.jobs.pop(lease))
        for lease in listed.keys() - self.jobs.keys():
            self.jobs[lease] = self._handler(listed[lease])
            self.jobs[lease].begin()

    def _handler(self, job: Job) -> Handler:
        match job:
            case Init():
                return Initialising(self.link, job, self.workshop)
            case Merge():
                return Merging(self.link, job)
            case Turn():
                return Training(self.link, job, self.config, self._half(job.plan.cut))
            case Evaluate():
                return Evaluating(self.link, job, self._half(job.plan.cut))

    def _half(self, cut: str) -> Half:
        spare = self.spare.get(cut)
        return spare.pop() if spare else self.workshop.back(cut)

    def _drop(self, handler: Handler) -> None:
        """Keep the back of a job that is over for the next one at the same cut."""
        if isinstance(handler, Training | Evaluating):
            self.spare.setdefault(handler.job.plan.cut, []).append(handler.half)

    def _tell(self) -> None:
        elapsed = time.monotonic() - self._told
        if elapsed >= TELEMETRY_SECONDS:
            self.link.telemetry((), self._samples / elapsed, max(0.0, 1 - self._busy / elapsed))
            self._told, self._samples, self._busy = time.monotonic(), 0, 0.0


class Initialising:
    """Version 0: the model as it was built from the seed, or as the user's script made it."""

    def __init__(self, link: Link, job: Init, workshop: Workshop) -> None:
        self.link, self.job, self.workshop = link, job, workshop

    def begin(self) -> None:
        finish(self.link, self.job.lease, self.workshop.initial(), Tally())

    def fetched(self, event: Fetched) -> None:
        """Nothing is asked for."""

    def incoming(self, event: Incoming) -> None:
        """No client takes part."""


class Merging:
    """Contributions to a version. The base is asked for as well: it has what peers keep for themselves."""

    def __init__(self, link: Link, job: Merge) -> None:
        self.link, self.job = link, job
        self.refs = [job.base, *(ref for c in job.inputs for ref in (c.front, c.back))]
        self.states: dict[str, Tensors] = {}

    def begin(self) -> None:
        for ref in {ref.digest: ref for ref in self.refs}.values():
            self.link.fetch(self.job.lease, ref, keeps if ref is self.job.base else everything)

    def fetched(self, event: Fetched) -> None:
        self.states[event.ref.digest] = event.tensors
        if len(self.states) == len({ref.digest for ref in self.refs}):
            began = time.monotonic()
            parts = [
                Part(c.weight, {**self.states[c.front.digest], **self.states[c.back.digest]}) for c in self.job.inputs
            ]
            merged = State.of(merge(self.states[self.job.base.digest], parts))
            finish(self.link, self.job.lease, merged, Tally(seconds=time.monotonic() - began))

    def incoming(self, event: Incoming) -> None:
        """No client takes part."""


class Training:
    """The server's side of a turn: forward and backward for each micro-batch, and the step with the last one."""

    def __init__(self, link: Link, job: Turn, config: Config, half: Half) -> None:
        self.link, self.job, self.config, self.half = link, job, config, half
        self.half.keep_for(None if config.schedule.policy == "round_robin" else job.client)
        self.at = (job.first, 0)
        self.samples = 0
        self.busy = 0.0

    def begin(self) -> None:
        self.link.fetch(self.job.lease, self.job.base, self.half.wants)

    def fetched(self, event: Fetched) -> None:
        self.half.load(event.tensors)
        self.half.part.train()
        self.link.report(Held(lease=self.job.lease, state="ready"))

    def incoming(self, event: Incoming) -> None:
        began = time.monotonic()
        match event.message:
            case Step(step=step, scale=scale) if (step, -1) == self.at:
                self.half.scale_gradients(scale)
                self._step(step)
            case TensorsMessage(step=step, micro=micro) if (step, micro) == self.at:
                self._micro_batch(event.message, event.tensors)
            case message:
                raise RemoteProtocolError(
                    f"Client {self.job.client} sent {type(message).__name__} of step {message.step} out of order"
                )
        self.busy += time.monotonic() - began
        if self.at[0] == self.job.first + self.job.count:
            self._finish()

    def _micro_batch(self, message: TensorsMessage, tensors: dict[str, Tensor]) -> None:
        device = next((p.device for p in self.half.parameters), torch.device("cpu"))
        smashed = tensors["smashed"].to(device).requires_grad_()
        labels = tensors["labels"].to(device)
        batch, micros = int(message.scalars["batch"]), int(message.scalars["micros"])
        with randomness(self.config.run.seed, self.job.client, self.job.round, message.step, message.micro):
            outputs = self.half.part(smashed)
        loss = cross_entropy(outputs, labels)
        torch.autograd.backward(loss * (len(labels) / batch))
        self.samples += len(labels)
        last = message.micro == micros - 1
        clipping = last and self.config.train.clip_norm > 0
        self._reply(message, smashed, loss, clipping)
        if clipping:
            self.at = (message.step, -1)
        elif last:
            self._step(message.step)
        else:
            self.at = (message.step, message.micro + 1)

    def _reply(self, message: TensorsMessage, smashed: Tensor, loss: Tensor, norms: bool) -> None:
        gradient = smashed.grad if smashed.grad is not None else torch.zeros_like(smashed)
        sent = [encode("gradients", gradient, self.job.plan.down)]
        if norms:
            sent.append(encode("norms", self.half.gradient_norms()))
        lease, step, micro = self.job.lease, message.step, message.micro
        self.link.send_tensors(lease, "train", step, micro, 1, sent, {"loss": float(loss.detach())})

    def _step(self, step: int) -> None:
        self.half.step()
        self.at = (step + 1, 0)
        self.link.report(Held(lease=self.job.lease, state="running", step=step + 1), at_once=False)

    def _finish(self) -> None:
        tally = Tally(steps=self.job.count, samples=self.samples, seconds=self.busy)
        finish(self.link, self.job.lease, self.half.state(), tally)


class Evaluating:
    """The server's side of an evaluation: forward only; loss, top-1 and top-5 are summed over samples."""

    def __init__(self, link: Link, job: Evaluate, half: Half) -> None:
        self.link, self.job, self.half = link, job, half

    def begin(self) -> None:
        self.link.fetch(self.job.lease, self.job.base, self.half.wants)

    def fetched(self, event: Fetched) -> None:
        self.half.load(event.tensors)
        self.half.part.eval()
        self.link.report(Held(lease=self.job.lease, state="ready"))

    @torch.no_grad()
    def incoming(self, event: Incoming) -> None:
        message = event.message
        if not isinstance(message, TensorsMessage):
            raise RemoteProtocolError(f"Client {self.job.client} sent {type(message).__name__} in an evaluation")
        device = next((p.device for p in self.half.part.parameters()), torch.device("cpu"))
        outputs = self.half.part(event.tensors["smashed"].to(device))
        scores = score(outputs, event.tensors["labels"].to(device))
        self.link.send_tensors(self.job.lease, "eval", message.step, message.micro, 1, [], scores)


def finish(link: Link, lease: Lease, state: State, tally: Tally) -> None:
    """Hold the result of a job, and say that it is done."""
    link.hold(state)
    link.report(Held(lease=lease, state="done", digest=state.digest, tally=tally))


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of logits (N, classes). Raises ConfigError for a label that has no output."""
    if outputs.ndim != 2:
        raise ConfigError(f"The model's output has {outputs.ndim} dimensions: training needs logits (batch, classes).")
    return F.cross_entropy(outputs, labels)


def score(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Return loss, top-1 and top-5 summed over samples, in float64 and exactly."""
    losses = F.cross_entropy(outputs, labels, reduction="none").double().sum()
    ranked = outputs.topk(min(5, outputs.shape[1]), dim=1).indices == labels[:, None]
    return {
        "loss": float(losses),
        "top1": float(ranked[:, 0].sum()),
        "top5": float(ranked.any(dim=1).sum()),
        "samples": float(len(labels)),
    }


def keeps(name: str) -> bool:
    """Whether a tensor of the base is needed to merge: only what peers keep for themselves."""
    return name.startswith(LOCAL)


def everything(_: str) -> bool:
    return True
