"""A server: it keeps the back of the model and steps it, evaluates, and merges contributions to versions.

Everything it does is a job under a lease. Jobs appear in the orders, ask for the state that they need, and
then react to their clients' tensors, in the order in which these come; orders that no longer list a job
end it.
"""

import time
from collections.abc import Iterator

from zsplit.config import Config
from zsplit.train.half import Half, Workshop
from zsplit.train.jobs import Evaluating, Handler, Initialising, Measuring, Merging, Training
from zsplit.train.labels import LabelBook
from zsplit.train.link import Fetched, Incoming, Leave, Link
from zsplit.train.machine import describe
from zsplit.train.middle import Absent, MiddleEvaluating, MiddleTraining
from zsplit.train.predicting import Predicting
from zsplit.train.shared import Common, GroupTraining, common_of
from zsplit.wire.messages import Evaluate, Finish, Init, Job, Lease, Measure, Merge, Orders, Predict, Step, Turn
from zsplit.wire.messages import Tensors as TensorsMessage

TELEMETRY_SECONDS = 0.25

HAS_BACK = Training | Evaluating | Predicting
"""Jobs that compute on a back."""


class Server:
    """The process. `serve` returns how the run ended, or that this server was asked to leave and has."""

    def __init__(self, link: Link, config: Config, workshop: Workshop, labels: LabelBook | None = None) -> None:
        self.link = link
        self.config = config
        self.workshop = workshop
        self.labels = labels
        self.jobs: dict[Lease, Handler] = {}
        self.spare: list[tuple[tuple[str, str], Half]] = []
        self._asked_to_leave = ""
        self._samples = 0
        self._busy = 0.0
        self._told = time.monotonic()

    def serve(self) -> Finish:
        """Do the broker's jobs until the run is over, or somebody wants this server to leave and its turns are over."""
        shop = self.workshop
        self.link.prepared(describe(shop.device, shop.cut, tail=shop.tail, earliest=shop.earliest))
        while True:
            event = self.link.next(TELEMETRY_SECONDS)
            began = time.monotonic()
            match event:
                case Orders(finish=Finish() as finish):
                    return finish
                case Orders():
                    self._obey(event)
                case Fetched(lease=lease):
                    if lease in self.jobs:
                        self.jobs[lease].fetched(event)
                case Incoming(message=message):
                    if message.lease in self.jobs:
                        handler = self.jobs[message.lease]
                        handler.incoming(self._labelled(handler, event))
                        self._samples += _samples(message)
                case Leave(sentence=sentence):
                    self._asked_to_leave = sentence
                case None:
                    pass
            if self._asked_to_leave and not self._has_turns():
                return Finish(ok=True, sentence=f"server {self.link.welcome.index} left: {self._asked_to_leave}")
            self._busy += time.monotonic() - began
            self._tell()

    def _obey(self, orders: Orders) -> None:
        listed = {job.lease: job for job in orders.jobs}
        for lease in self.jobs.keys() - listed.keys():
            self._drop(self.jobs.pop(lease))
        for lease in listed.keys() - self.jobs.keys():
            if not self._asked_to_leave:
                self.jobs[lease] = self._handler(listed[lease])
                self.jobs[lease].begin()

    def _has_turns(self) -> bool:
        return any(isinstance(handler, Training) for handler in self.jobs.values())

    def _handler(self, job: Job) -> Handler:
        match job:
            case Init():
                return Initialising(self.link, job, self.workshop)
            case Merge():
                return Merging(self.link, job, self.config, self.workshop.device)
            case Measure():
                return Measuring(self.link, job, self.config, self.workshop)
            case Turn() | Evaluate() if self.workshop.traced.is_output(job.plan.cut):
                return Absent(self.link, job)
            case Turn(group=None):
                return (MiddleTraining if job.plan.tail else Training)(self.link, job, self.config, self._half(job))
            case Turn():
                return GroupTraining(self.link, job, self.config, self._common(job))
            case Evaluate():
                kind = MiddleEvaluating if job.plan.tail else Evaluating
                return kind(self.link, job, self.config, self._half(job))
            case Predict():
                return Predicting(self.link, job, self._half(job))

    def _common(self, job: Turn) -> Common:
        """Return what the turns of a group have in common, made for the first of them."""
        for handler in self.jobs.values():
            if isinstance(handler, GroupTraining) and handler.job.group == job.group:
                return handler.common
        return common_of(self.config, job, self._half(job))

    def _labelled(self, handler: Handler, event: Incoming) -> Incoming:
        """Return what a client sent, with labels where they live here and it sent sample ids."""
        if self.labels is None or isinstance(event.message, Step) or not isinstance(handler, Training | Evaluating):
            return event
        return self.labels.join(handler.job, event)

    def _half(self, job: Turn | Evaluate | Predict) -> Half:
        """Return a back for the job, if possible one that has its version's weights already."""
        base = job.back if isinstance(job, Turn) and job.back is not None else job.base
        here = job.plan.cut, job.plan.tail
        fitting = [(half.version == base.digest, i) for i, (place, half) in enumerate(self.spare) if place == here]
        if not fitting:
            return self.workshop.back(*here)
        return self.spare.pop(max(fitting)[1])[1]

    def _drop(self, handler: Handler) -> None:
        """Keep the back of a job that is over for the next one at the same cut; no more than can be used at once."""
        if isinstance(handler, HAS_BACK) and all(half is not handler.half for half in self._in_use()):
            plan = handler.job.plan
            self.spare.append(((plan.cut, plan.tail), handler.half))
            del self.spare[: -self.config.schedule.clients]

    def _in_use(self) -> Iterator[Half]:
        """Yield the backs of jobs that go on, and those that are kept already: turns of a group have one."""
        yield from (half for _, half in self.spare)
        yield from (handler.half for handler in self.jobs.values() if isinstance(handler, HAS_BACK))

    def _tell(self) -> None:
        elapsed = time.monotonic() - self._told
        if elapsed >= TELEMETRY_SECONDS:
            self.link.telemetry((), self._samples / elapsed, max(0.0, 1 - self._busy / elapsed))
            self._told, self._samples, self._busy = time.monotonic(), 0, 0.0


def _samples(message: TensorsMessage | Step) -> int:
    """Return the samples that a message brings: none on a probe, which carries bytes."""
    if isinstance(message, Step) or message.kind == "probe":
        return 0
    return message.tensors[0].shape[0]
