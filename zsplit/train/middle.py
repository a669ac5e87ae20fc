"""The server's side where the loss is the client's: the middle of a U-shaped model, or nothing at all."""

import torch
from torch import Tensor

from zsplit import crash
from zsplit.config import Config
from zsplit.errors import RemoteProtocolError
from zsplit.model import randomness
from zsplit.train.half import Half
from zsplit.train.jobs import Evaluating, Training, finish, gradients_of, whole
from zsplit.train.link import Fetched, Incoming, Link
from zsplit.train.machine import use_threads
from zsplit.train.state import State
from zsplit.wire.messages import Evaluate, Held, Step, Tally, Turn, What
from zsplit.wire.messages import Tensors as TensorsMessage


class MiddleTraining(Training):
    """A U-shaped turn: forward as smashed data come, backward as the gradients of what it made of them come.

    `at` is the micro-batch whose gradients are due, `forwards` the one whose smashed data are.
    """

    def __init__(self, link: Link, job: Turn, config: Config, half: Half) -> None:
        super().__init__(link, job, config, half)
        self.micros = 0
        self.forwards = 0
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def incoming(self, event: Incoming) -> None:
        use_threads(self.job.threads[1])
        match event.message:
            case Step(step=of, scale=scale) if (of, -1) == self.at:
                self.half.scale_gradients(scale)
                self._end(of)
            case TensorsMessage(leg=0, step=of, micro=this) if self._is_due(of, this):
                self._forward(event.message, event.tensors)
            case TensorsMessage(leg=2, step=of, micro=this) if (of, this) == self.at and this in self._made:
                self._backward(event.message, event.tensors)
            case message:
                raise RemoteProtocolError(
                    f"Client {self.job.client} sent {type(message).__name__} of step {message.step} out of order"
                )
        if self.done:
            self.finish()

    def _is_due(self, step: int, micro: int) -> bool:
        """Whether these smashed data are the next."""
        within = micro == 0 or micro < self.micros
        return (step, micro) == (self.at[0], self.forwards) and self.at[1] >= 0 and within

    def _forward(self, message: TensorsMessage, tensors: dict[str, Tensor]) -> None:
        smashed = only(tensors, "smashed").to(self.half.device)
        smashed.requires_grad_(not self.half.is_first)
        if message.micro == 0:
            self.micros = whole(message, "micros")
            self.use_epoch(message.step)
            self.half.begin_step(self.micros)
        place = self.job.client, self.job.round, message.step, message.micro
        with self.account.computing("forward", *place[2:]), randomness(self.config.run.seed, *place):
            outputs = self.half.forward(smashed)
        self.samples += len(smashed)
        self.forwards += 1
        self._made[message.micro] = smashed, outputs
        self._answer(message, [("smashed", outputs, self.job.plan.up)])

    def _backward(self, message: TensorsMessage, tensors: dict[str, Tensor]) -> None:
        smashed, outputs = self._made.pop(message.micro)
        gradients = only(tensors, "gradients").to(self.half.device)
        if gradients.shape != outputs.shape:
            raise RemoteProtocolError(
                f"Gradients of shape {list(outputs.shape)} were expected, {list(gradients.shape)} came"
            )
        with self.account.computing("backward", message.step, message.micro):
            if outputs.requires_grad:  # a middle without parameters, at the model's input, has nothing to learn
                torch.autograd.backward(outputs, gradients)
        last = message.micro == self.micros - 1
        clipping = last and self.config.train.clip_norm > 0
        norms: list[tuple[What, Tensor, str]] = [("norms", self.half.gradient_norms(), "raw")] if clipping else []
        self._answer(message, [*gradients_of(smashed, self.job.plan.down), *norms])
        if clipping:
            self.at = (message.step, -1)
        elif last:
            self._end(message.step)
        else:
            self.at = (message.step, message.micro + 1)

    def _answer(self, message: TensorsMessage, tensors: list[tuple[What, Tensor, str]]) -> None:
        """Answer a leg with the next one."""
        crash.at("server.apply")
        self.link.send_tensors(self.job.lease, "train", message.step, message.micro, message.leg + 1, tensors, {})

    def _end(self, step: int) -> None:
        self._step(step)
        self.forwards = 0


class MiddleEvaluating(Evaluating):
    """A U-shaped evaluation: the middle's output goes back to the client, who scores it."""

    @torch.no_grad()
    def incoming(self, event: Incoming) -> None:
        message = event.message
        if not isinstance(message, TensorsMessage):
            raise RemoteProtocolError(f"Client {self.job.client} sent {type(message).__name__} in an evaluation")
        with self.account.computing("evaluate", message.step):
            outputs = self.half.forward(only(event.tensors, "smashed").to(self.half.device))
        sent: list[tuple[What, Tensor, str]] = [("smashed", outputs, self.job.plan.up)]
        self.link.send_tensors(self.job.lease, "eval", message.step, message.micro, 1, sent, {})


class Absent:
    """The server's side of a cut at the output: a turn is done at once and contributes no tensor."""

    def __init__(self, link: Link, job: Turn | Evaluate) -> None:
        self.link, self.job = link, job

    def begin(self) -> None:
        if isinstance(self.job, Turn):
            finish(self.link, self.job.lease, State.of({}), Tally())
        else:
            self.link.report(Held(lease=self.job.lease, state="ready"))

    def fetched(self, event: Fetched) -> None:
        """Nothing is asked for."""

    def incoming(self, event: Incoming) -> None:
        raise RemoteProtocolError(
            f"Client {self.job.client} sent {type(event.message).__name__}, though it has the whole model"
        )


def only(tensors: dict[str, Tensor], what: What) -> Tensor:
    """Return the one tensor that a message holds. Raises RemoteProtocolError where it holds anything else."""
    if tensors.keys() != {what}:
        raise RemoteProtocolError(f"Nothing but {what} was expected, {', '.join(tensors) or 'nothing'} came")
    return tensors[what]
