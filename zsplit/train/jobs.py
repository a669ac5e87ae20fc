"""What a server does under a lease: measure, make version 0, merge, train, evaluate.

A job asks for the state that it needs when it begins, and then reacts to what comes.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from zsplit import crash
from zsplit.config import Config
from zsplit.errors import RemoteProtocolError
from zsplit.model import randomness
from zsplit.train.account import Account
from zsplit.train.aggregate import Part, merge
from zsplit.train.half import Half, Workshop
from zsplit.train.link import Fetched, Incoming, Link
from zsplit.train.loss import check_labels, score
from zsplit.train.machine import use_threads
from zsplit.train.packing import difference_codec, unpack
from zsplit.train.profile import measure
from zsplit.train.rates import epoch_of
from zsplit.train.state import State, Tensors
from zsplit.wire.manifest import LOCAL
from zsplit.wire.messages import Evaluate, Held, Init, Lease, Measure, Merge, Predict, Step, Tally, Turn, What
from zsplit.wire.messages import Tensors as TensorsMessage

LARGEST_PROBE = 64 * 2**20
"""Bytes of an answer to a probe; far more than a client that measures its link asks for."""


Outgoing = tuple[What, Tensor, str]
"""What a tensor is, the tensor, and the codec that it travels in."""


class Handler(Protocol):
    """A job in the server's hands."""

    def begin(self) -> None:
        """Ask for what the job needs."""

    def fetched(self, event: Fetched) -> None:
        """Take in a state that the job asked for."""

    def incoming(self, event: Incoming) -> None:
        """Take in tensors of the job's client."""


class Initialising:
    """Version 0: the model as it was built from the seed or by the user's script, or the weights in a file."""

    def __init__(self, link: Link, job: Init, workshop: Workshop) -> None:
        self.link, self.job, self.workshop = link, job, workshop

    def begin(self) -> None:
        made = self.workshop.initial()
        crash.at("server.init")
        finish(self.link, self.job.lease, made, Tally())

    def fetched(self, event: Fetched) -> None:
        """Nothing is asked for."""

    def incoming(self, event: Incoming) -> None:
        """No client takes part."""


class Measuring:
    """This server measures itself; or it answers a client's probes of the link between them."""

    def __init__(self, link: Link, job: Measure, config: Config, workshop: Workshop) -> None:
        self.link, self.job, self.config, self.workshop = link, job, config, workshop

    def begin(self) -> None:
        if self.job.client >= 0:
            self.link.report(Held(lease=self.job.lease, state="ready"))
            return
        with Account(self.link.spans, self.workshop.device).computing("measure"):
            profile = measure(self.workshop, self.config, role="server")
        self.link.report(Held(lease=self.job.lease, state="done", profile=profile))

    def fetched(self, event: Fetched) -> None:
        """Nothing is asked for."""

    def incoming(self, event: Incoming) -> None:
        message = event.message
        if not isinstance(message, TensorsMessage):
            raise RemoteProtocolError(f"Client {self.job.client} sent {type(message).__name__} as a probe")
        size = whole(message, "down")
        if size > LARGEST_PROBE:
            raise RemoteProtocolError(f"Client {self.job.client} asks for a probe of {size} bytes")
        echo: list[tuple[What, Tensor, str]] = [("other", torch.zeros(size, dtype=torch.uint8), "raw")]
        self.link.send_tensors(self.job.lease, "probe", message.step, message.micro, 1, echo, {})


class Merging:
    """Contributions to a version. The base is asked for as well: it has what peers keep for themselves.

    Where its weights have a share in the version, or contributions are differences from it, all of it.
    """

    def __init__(self, link: Link, job: Merge, config: Config, device: torch.device) -> None:
        self.link, self.job, self.account = link, job, Account(link.spans, device, job.lease)
        self._spec = config.codec.weights
        fronts_and_backs = (ref for c in job.inputs for ref in (c.front, c.back))
        self.refs = [job.base, *(ref for ref in fronts_and_backs if ref is not None)]
        self.states: dict[str, Tensors] = {}

    def begin(self) -> None:
        of_base = keeps if self.job.share == 1.0 and not difference_codec(self._spec) else everything
        for ref in {ref.digest: ref for ref in self.refs}.values():
            self.link.fetch(self.job.lease, ref, of_base if ref is self.job.base else everything)

    def fetched(self, event: Fetched) -> None:
        self.states[event.ref.digest] = event.tensors
        if len(self.states) == len({ref.digest for ref in self.refs}):
            with self.account.computing("aggregate"):
                crash.at("server.merge")
                merged = State.of(merge(self.states[self.job.base.digest], self._parts(), self.job.share))
            crash.at("server.merged")
            finish(self.link, self.job.lease, merged, Tally(seconds=self.account.busy, busy=self.account.busy))

    def _parts(self) -> list[Part]:
        backs = [self.states[c.back.digest] if c.back is not None else {} for c in self.job.inputs]
        base = self.states[self.job.base.digest]
        fronts = [unpack(self._spec, self.states[c.front.digest], base) for c in self.job.inputs]
        return [Part(c.weight, f | b) for c, f, b in zip(self.job.inputs, fronts, backs, strict=True)]

    def incoming(self, event: Incoming) -> None:
        """No client takes part."""


class Training:
    """The server's side of a turn: forward and backward for each micro-batch, and the step with the last one."""

    def __init__(self, link: Link, job: Turn, config: Config, half: Half) -> None:
        self.link, self.job, self.config, self.half = link, job, config, half
        self.half.keep_for(owner(config, job.client))
        self.base = job.base if job.back is None else job.back
        self.account = Account(link.spans, half.device, job.lease)
        self.at = (job.first, 0)
        self.samples = 0

    def begin(self) -> None:
        self.link.fetch(self.job.lease, self.base, self.half.needs(self.base.digest, training=True))

    def fetched(self, event: Fetched) -> None:
        with self.link.spans.span("compute", "load", -1, -1, self.job.lease):
            self.half.load(self.base.digest, event.tensors)
            self.half.part.train()
        self.ready()

    def ready(self) -> None:
        """Say that the back is loaded."""
        crash.at("server.ready")
        self.link.report(Held(lease=self.job.lease, state="ready"))

    @property
    def done(self) -> bool:
        """Whether all steps are."""
        return self.at[0] == self.job.first + self.job.count

    def incoming(self, event: Incoming) -> None:
        use_threads(self.job.threads[1])
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
        if self.done and self.job.group is None:
            self.finish()

    def _micro_batch(self, message: TensorsMessage, tensors: dict[str, Tensor]) -> None:
        smashed, labels = pair(tensors, self.half.device)
        smashed.requires_grad_(not self.half.is_first)
        batch, micros = whole(message, "batch"), whole(message, "micros")
        if message.micro == 0:
            self.use_epoch(message.step)
            self.half.begin_step(micros)
        place = self.job.client, self.job.round, message.step, message.micro
        with self.account.computing("forward", *place[2:]), randomness(self.config.run.seed, *place):
            outputs = self.half.forward(smashed)
        check_labels(tensors["labels"], outputs)
        with self.account.computing("backward", *place[2:]):
            loss = F.cross_entropy(outputs, labels)
            torch.autograd.backward(loss * (len(labels) / batch))
        self.samples += len(labels)
        last = message.micro == micros - 1
        clipping = last and self.config.train.clip_norm > 0
        self.reply(message, gradients_of(smashed, self.job.plan.down), loss, clipping)
        if clipping:
            self.at = (message.step, -1)
        elif last:
            self._step(message.step)
        else:
            self.at = (message.step, message.micro + 1)

    def use_epoch(self, step: int) -> None:
        """Use the learning rate of the epoch that a step belongs to."""
        self.half.use_epoch(epoch_of(self.config, self.job.round, step, self.job.epoch_steps))

    def reply(self, message: TensorsMessage, sent: list[Outgoing], loss: Tensor, norms: bool = False) -> None:
        """Answer a micro-batch with the gradients of its smashed data, if any, and its mean loss."""
        crash.at("server.apply")
        if norms:
            sent = [*sent, ("norms", self.half.gradient_norms(), "raw")]
        lease, step, micro = self.job.lease, message.step, message.micro
        self.link.send_tensors(lease, "train", step, micro, 1, sent, {"loss": float(loss.detach())})

    def _step(self, step: int) -> None:
        with self.account.computing("step", step):
            self.half.step()
        self.stepped(step)

    def stepped(self, step: int) -> None:
        """A step is done."""
        crash.at("server.step")
        self.at = (step + 1, 0)
        self.link.report(Held(lease=self.job.lease, state="running", step=step + 1), at_once=False)

    def finish(self, state: State | None = None) -> None:
        """Report the turn with the back as it is now, or with this state of it."""
        busy, flow = self.account.busy, self.link.flow(self.job.lease)
        tally = Tally(steps=self.job.count, samples=self.samples, seconds=busy, busy=busy, flow=flow)
        crash.at("server.done")
        finish(self.link, self.job.lease, state or self.half.state(), tally)


class Forward:
    """The server's side of what learns nothing: load a version, then answer what comes."""

    def __init__(self, link: Link, job: Evaluate | Predict, half: Half) -> None:
        self.link, self.job, self.half = link, job, half
        self.account = Account(link.spans, half.device, job.lease)

    def begin(self) -> None:
        self.link.fetch(self.job.lease, self.job.base, self.half.needs(self.job.base.digest, training=False))

    def fetched(self, event: Fetched) -> None:
        self.half.load(self.job.base.digest, event.tensors)
        self.half.part.eval()
        self.link.report(Held(lease=self.job.lease, state="ready"))


class Evaluating(Forward):
    """The server's side of an evaluation: forward only; loss, top-1 and top-5 are summed over samples."""

    job: Evaluate

    def __init__(self, link: Link, job: Evaluate, config: Config, half: Half) -> None:
        super().__init__(link, job, half)
        self.half.keep_for(owner(config, job.client))

    @torch.no_grad()
    def incoming(self, event: Incoming) -> None:
        message = event.message
        if not isinstance(message, TensorsMessage):
            raise RemoteProtocolError(f"Client {self.job.client} sent {type(message).__name__} in an evaluation")
        smashed, labels = pair(event.tensors, self.half.device)
        with self.account.computing("evaluate", message.step):
            outputs = self.half.forward(smashed)
            check_labels(event.tensors["labels"], outputs)
            scores = score(outputs, labels)
        self.link.send_tensors(self.job.lease, "eval", message.step, message.micro, 1, [], scores)


def owner(config: Config, client: int) -> int | None:
    """Return whose a server's back is: the client's that it was made for, None where there is one for all."""
    own = config.schedule.policy != "round_robin" and config.schedule.server_model == "replica"
    return client if own else None


def finish(link: Link, lease: Lease, state: State, tally: Tally) -> None:
    """Say that a job is done, with its result."""
    link.report(Held(lease=lease, state="done", digest=state.digest, tally=tally), state)


def pair(tensors: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return smashed data and labels, on the device. Raises RemoteProtocolError where they do not belong together."""
    if tensors.keys() != {"smashed", "labels"} or len(tensors["smashed"]) != len(tensors["labels"]):
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise RemoteProtocolError(f"Smashed data and as many labels were expected, {shapes} came")
    return tensors["smashed"].to(device), tensors["labels"].to(device)


def gradients_of(smashed: Tensor, codec: str) -> list[Outgoing]:
    """Return what to send back of smashed data: their gradients; nothing of the model's own input, which wants none."""
    if not smashed.requires_grad:
        return []
    return [("gradients", smashed.grad if smashed.grad is not None else torch.zeros_like(smashed), codec)]


def whole(message: TensorsMessage, name: str) -> int:
    """Return a positive whole number among the scalars. Raises RemoteProtocolError where it is none."""
    value = message.scalars.get(name, 0.0)
    if value < 1 or value != int(value):
        raise RemoteProtocolError(f"The header of a micro-batch has {name} = {value}")
    return int(value)


def keeps(name: str) -> bool:
    """Whether a tensor of the base is needed to merge: only what peers keep for themselves."""
    return name.startswith(LOCAL)


def everything(_: str) -> bool:
    return True
