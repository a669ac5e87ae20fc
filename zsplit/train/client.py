"""A client: it keeps the data and the front of the model, and trains, evaluates or measures when it is its turn."""

import time
from contextlib import closing

import msgspec
import torch
from torch import Tensor

from zsplit import crash
from zsplit.config import Config
from zsplit.data import ClientData, Prefetch
from zsplit.train.account import Account
from zsplit.train.half import Half, Workshop
from zsplit.train.link import Fetched, Incoming, Leave, Link
from zsplit.train.machine import describe, use_threads
from zsplit.train.modes import evaluation, training
from zsplit.train.profile import measure, measure_link
from zsplit.train.state import State
from zsplit.train.turn import Answers, Desk, Reply
from zsplit.wire.messages import Evaluate, Finish, Held, Kind, Lease, Measure, Orders, Plan, Tally, Turn, What
from zsplit.wire.messages import Tensors as TensorsMessage

TELEMETRY_SECONDS = 0.25


class Revoked(Exception):  # noqa: N818  (no error: the orders have changed)
    """The job under way is no longer in the orders."""


class Left(Exception):  # noqa: N818  (no error: somebody asked for it)
    """This client was asked to leave, and is where it can."""


class Client:
    """The process. `serve` returns how the run ended, or that this client was asked to leave and has."""

    def __init__(self, link: Link, config: Config, workshop: Workshop, data: ClientData) -> None:
        self.link = link
        self.config = config
        self.workshop = workshop
        self.data = data
        self.orders = Orders(revision=0)
        self.halves: dict[tuple[str, str], Half] = {}  # one at most: the current plan's
        self.index = link.welcome.index
        self.batches = Prefetch(data, config.run.rounds)
        self.desk = Desk(
            link, config, workshop, data, self.batches, self.index, self._answer, self._look_up, self._tell
        )
        self.account = Account(link.spans, workshop.device)
        self._finished: set[Lease] = set()
        self._asked_to_leave = ""
        self._losses: list[float] = []
        self._samples = 0
        self._told = time.monotonic()
        self._idle_told = 0.0

    def serve(self) -> Finish:
        """Do the broker's jobs until the run is over, or somebody wants this client to leave."""
        with closing(self.batches):
            try:
                return self._serve()
            except Left as left:
                return Finish(ok=True, sentence=f"client {self.index} left{left}")

    def _serve(self) -> Finish:
        sizes = self.data.size("train"), self.data.size("validation"), self.data.size("test")
        shop = self.workshop
        self.link.prepared(describe(shop.device, shop.cut, *sizes, tail=shop.tail, earliest=shop.earliest))
        while self.orders.finish is None:
            job = self._next_job()
            if job is None:
                self._wait()
            else:
                self._do(job)
        return self.orders.finish

    def _next_job(self) -> Turn | Evaluate | Measure | None:
        """Return what to do next: a turn before an evaluation, since others wait for its end."""
        jobs = [job for job in self.orders.jobs if job.lease not in self._finished]
        mine = [job for job in jobs if isinstance(job, Turn | Evaluate | Measure)]
        return min(mine, key=lambda job: not isinstance(job, Turn), default=None)

    def _do(self, job: Turn | Evaluate | Measure) -> None:
        """Do one job to its end, or until the orders no longer list it."""
        self.account = Account(self.link.spans, self.workshop.device)
        self._idle_told = 0.0
        try:
            match job:
                case Turn():
                    self._train(job)
                case Evaluate():
                    self._evaluate(job)
                case Measure():
                    self._measure(job)
        except Revoked:
            return
        self._finished.add(job.lease)

    def _train(self, job: Turn) -> None:
        began = time.monotonic()
        half = self._half(job.plan)
        self._load(job, half)
        use_threads(job.threads[0])
        state, tally = training(self.desk, job, half, self.account).run()
        crash.at("client.done")
        self._done(job.lease, tally, began, job.first + job.count, state)

    def _evaluate(self, job: Evaluate) -> None:
        began = time.monotonic()
        half = self._half(job.plan)
        self._load(job, half)
        self._done(job.lease, evaluation(self.desk, job, half, self.account).run(), began)

    def _done(self, lease: Lease, tally: Tally, began: float, step: int = 0, state: State | None = None) -> None:
        """Report a job with its figures and what it leaves."""
        seconds, account = time.monotonic() - began, self.account
        tally = msgspec.structs.replace(
            tally, seconds=seconds, idle=account.idle, busy=account.busy, flow=self.link.flow(lease)
        )
        digest = state.digest if state is not None else ""
        self.link.report(Held(lease=lease, state="done", step=step, digest=digest, tally=tally), state)

    def _half(self, plan: Plan) -> Half:
        place = plan.cut, plan.tail
        if place not in self.halves:
            self.halves = {place: self.workshop.front(*place)}
            self.halves[place].keep_for(self.index)
        return self.halves[place]

    def _load(self, job: Turn | Evaluate, half: Half) -> None:
        self.link.report(Held(lease=job.lease, state="opening"), at_once=False)
        self.link.fetch(job.lease, job.base, half.needs(job.base.digest, isinstance(job, Turn)))
        while True:
            event = self._wait(job.lease, "fetch")
            if isinstance(event, Fetched) and event.lease == job.lease:
                crash.at("client.load")
                half.load(job.base.digest, event.tensors)
                return

    # Measuring

    def _measure(self, job: Measure) -> None:
        """Measure this peer's stretches of the model and its link to the server."""
        self.link.report(Held(lease=job.lease, state="running"))
        with self.account.computing("measure"):
            profile = measure(self.workshop, self.config, lambda: self.data.train_batch(0, 0))
        probes = Probes(self.link, job.lease, self._answer)
        self.link.report(Held(lease=job.lease, state="done", profile=profile, link=measure_link(probes.exchange)))

    # Waiting

    def _wait(
        self, lease: Lease | None = None, why: str = "wait", step: int = -1, micro: int = -1, leaves: bool = True
    ) -> Fetched | Incoming | None:
        """Wait for an event and return it, orders excepted: they are kept. Raises Revoked when `lease` is over.

        Raises Left where this client is to leave and, with `leaves`, can do so at once.
        """
        with self.account.waiting(why, step, micro):
            event = self.link.next()
        event = self._take(event, lease)
        if self._asked_to_leave and leaves:
            raise Left(f": {self._asked_to_leave}")
        return event

    def _take(
        self, event: Orders | Fetched | Incoming | Leave | None, lease: Lease | None
    ) -> Fetched | Incoming | None:
        """Return an event that is for the job under this lease. Raises Revoked when that is over."""
        if isinstance(event, Leave):
            self._asked_to_leave = event.sentence
        if not isinstance(event, Orders):
            return None if isinstance(event, Leave) else event
        self.orders = event
        self._finished &= {job.lease for job in event.jobs}
        if lease is not None and all(job.lease != lease for job in event.jobs):
            raise Revoked
        return None

    def _look_up(self, lease: Lease) -> None:
        """Between two steps of a turn, look at what came meanwhile. Raises Revoked when that is over, and Left."""
        while (event := self.link.next(0)) is not None:
            self._take(event, lease)
        if self._asked_to_leave:
            raise Left(f" after its step: {self._asked_to_leave}")

    def _answer(self, lease: Lease, kind: Kind, step: int, micro: int, leg: int = 1) -> Reply:
        """Wait for the server's answer to one micro-batch on one leg. A step of a turn is waited for to its end."""
        while True:
            event = self._wait(lease, "wait", step, micro, leaves=kind != "train")
            if isinstance(event, Incoming) and isinstance(event.message, TensorsMessage):
                message = event.message
                found = message.lease, message.kind, message.step, message.micro, message.leg
                if found == (lease, kind, step, micro, leg):
                    crash.at("client.answer")
                    return Reply(message, event.tensors)

    def _tell(self, loss: float, samples: int) -> None:
        self._losses.append(loss)
        self._samples += samples
        elapsed = time.monotonic() - self._told
        if elapsed >= TELEMETRY_SECONDS:
            idle = max(0.0, self.account.idle - self._idle_told) / elapsed
            self.link.telemetry(tuple(self._losses), self._samples / elapsed, min(1.0, idle))
            self._losses, self._samples = [], 0
            self._told, self._idle_told = time.monotonic(), self.account.idle


class Probes:
    """Exchanges of bytes with the server under a lease, numbered as steps."""

    def __init__(self, link: Link, lease: Lease, answer: Answers) -> None:
        self.link, self.lease, self.answer = link, lease, answer
        self.number = 0

    def exchange(self, up: int, down: int) -> float:
        """Send `up` bytes, wait for `down` bytes; return the wall seconds."""
        began = time.monotonic()
        # Zeros: memory that nobody wrote may hold what must not leave this machine.
        sent: list[tuple[What, Tensor, str]] = [("other", torch.zeros(up, dtype=torch.uint8), "raw")]
        self.link.send_tensors(self.lease, "probe", self.number, 0, 0, sent, {"down": float(down)})
        self.answer(self.lease, "probe", self.number, 0)
        self.number += 1
        return time.monotonic() - began
