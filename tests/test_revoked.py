"""A turn that is taken away at any moment and given again ends as if nothing had happened, at both of its peers.

A client and a server work in threads of one process; between them are queues and a broker that takes the turn away
when the test wants it: where a peer asks for a state, or a message is sent.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import torch
from helpers import config_of
from nets import Normed, images
from torch.utils.data import TensorDataset

from zsplit import from_datasets
from zsplit.config import Config, from_json, to_json
from zsplit.data import ClientData
from zsplit.train.client import Client
from zsplit.train.half import Workshop
from zsplit.train.link import Fetched, Incoming, Link
from zsplit.train.link.exchange import Tagged
from zsplit.train.link.spans import Recorder
from zsplit.train.server import Server
from zsplit.train.state import State
from zsplit.wire.messages import (
    Evaluate,
    Finish,
    Flow,
    Held,
    Job,
    Kind,
    Lease,
    Orders,
    Plan,
    Prepared,
    Ref,
    Step,
    Tally,
    TensorMeta,
    Tensors,
    Turn,
)

CPU = torch.device("cpu")
BASE = {
    "data__name": "own",
    "train__batch_size": 6,
    "train__micro_batches": 2,
    "train__momentum": 0.9,
    "data__val_fraction": 0.2,
    "schedule__clients": 1,
}
DATA = from_datasets(TensorDataset(*images(20)), TensorDataset(*images(6, seed=1)), classes=10)
MODES: dict[str, tuple[Plan, dict[str, object]]] = {
    "two parts": (Plan(cut="relu", micro_batches=2, window=2), {}),
    "clipped": (Plan(cut="relu", micro_batches=2, window=1), {"train__clip_norm": 0.5}),
    "deferred": (Plan(cut="relu", micro_batches=3, window=2), {"train__batch_norm": "deferred"}),
    "a tail": (
        Plan(cut="relu", tail="bn3", micro_batches=2, window=2),
        {"train__labels": "keep", "model__cut": "relu"},
    ),
    "alone": (Plan(cut="output"), {"model__cut": "output"}),
}


class Local:
    """What a trainer uses of a link, without one."""

    def __init__(self, broker: "Broker", role: str) -> None:
        self.broker, self.role = broker, role
        self.events: SimpleQueue[Any] = SimpleQueue()
        self.welcome = SimpleNamespace(index=0, serving=False)
        self.spans = Recorder(False)

    def prepared(self, prepared: Prepared) -> None:
        """It is known."""

    def telemetry(self, *_: object) -> None:
        """Nobody looks."""

    def flow(self, _: Lease) -> Flow:
        return Flow()

    def next(self, timeout: float | None = None) -> Any:
        try:
            return self.events.get(timeout != 0, timeout)
        except Empty:
            return None

    def report(self, held: Held, state: State | None = None, at_once: bool = True) -> None:
        self.broker.reported(self.role, held, state)

    def fetch(self, lease: Lease, ref: Ref, wanted: Callable[[str], bool] = lambda _: True) -> None:
        self.broker.passed()
        self.events.put(Fetched(lease, ref, self.broker.base.tensors(wanted)))

    def send_tensors(
        self,
        lease: Lease,
        kind: Kind,
        step: int,
        micro: int,
        leg: int,
        tensors: Sequence[Tagged],
        scalars: dict[str, float],
    ) -> None:
        self.broker.passed()
        metas = tuple(TensorMeta(what, "F32", tuple(tensor.shape), "raw", 0) for what, tensor, _ in tensors)
        message = Tensors("", "", lease, kind, leg, metas, step, micro, scalars)
        self._pass_on(Incoming(message, {what: tensor.detach().clone() for what, tensor, _ in tensors}, 0.0))

    def send_step(self, lease: Lease, step: int, scale: float) -> None:
        self.broker.passed()
        self._pass_on(Incoming(Step("", "", lease, step, scale), {}, 0.0))

    def _pass_on(self, event: Incoming) -> None:
        self.broker.links["server" if self.role == "client" else "client"].events.put(event)


class Broker:
    """Gives `first`, takes it away at the n-th place that is passed, gives `then` and waits for its end."""

    def __init__(self, base: State, first: Job, then: Job, at: int) -> None:
        self.base = base
        self.links = {role: Local(self, role) for role in ("client", "server")}
        self.places = 0
        self.results: dict[str, tuple[Tally, str]] = {}
        self._lock = Lock()
        self._job, self._then, self._at = first, then, at
        self._tell("server", first)

    def passed(self) -> None:
        with self._lock:
            self.places += 1
            if self.places == self._at:
                self._job = self._then
                self.results.clear()
                self._tell("client")
                self._tell("server", self._job)

    def reported(self, role: str, held: Held, state: State | None) -> None:
        with self._lock:
            if held.lease != self._job.lease:
                return
            if role == "server" and held.state in ("ready", "done") and "server" not in self.results:
                self._tell("client", self._job)
            if held.state == "done":
                self.results[role] = held.tally, state.digest if state else ""
            if "client" in self.results and ("server" in self.results or isinstance(self._job, Evaluate)):
                for link in self.links.values():
                    link.events.put(Orders(revision=9, finish=Finish(ok=True, sentence="over")))

    def _tell(self, role: str, *jobs: Job) -> None:
        self.links[role].events.put(Orders(revision=1, jobs=jobs))


@lru_cache
def shops_of(config: bytes) -> list[Workshop]:
    """Return a client's and a server's; what they make is new each time."""
    torch.set_num_threads(1)
    torch.manual_seed(5)
    model = Normed()
    return [Workshop(from_json(config), (1, 8, 8), CPU, model) for _ in range(2)]


def work(config: Config, first: Job, then: Job, at: int) -> Broker:
    """Have a client and a server do what the broker wants; return the broker."""
    shops = shops_of(to_json(config))
    broker = Broker(shops[0].initial(), first, then, at)
    client, server = (cast("Link", broker.links[role]) for role in ("client", "server"))
    ends: dict[str, Finish | Exception] = {}

    def live(role: str, serve: Callable[[], Finish]) -> None:
        try:
            ends[role] = serve()
        except Exception as error:
            ends[role] = error
            for link in broker.links.values():
                link.events.put(Orders(revision=9, finish=Finish(ok=False, sentence="the other failed")))

    serves = {
        "client": Client(client, config, shops[0], ClientData(config, 0, DATA)).serve,
        "server": Server(server, config, shops[1]).serve,
    }
    threads = [Thread(target=live, args=each) for each in serves.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == dict.fromkeys(("client", "server"), Finish(ok=True, sentence="over"))
    return broker


def figures(broker: Broker) -> dict[str, tuple[object, ...]]:
    """Return what both sides have reported but for times."""
    return {
        role: (digest, tally.steps, tally.samples, tally.loss_sum, tally.top1, tally.top5)
        for role, (tally, digest) in broker.results.items()
    }


def turn_of(plan: Plan, number: int = 1, round_: int = 0, first: int = 0, count: int = 2, base: str = "base") -> Turn:
    return Turn(
        lease=Lease(1, number),
        client=0,
        server=0,
        base=Ref(base, "broker"),
        plan=plan,
        round=round_,
        first=first,
        count=count,
        epoch_steps=3,
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_turn_that_is_given_again_ends_with_the_same_weights(mode: str) -> None:
    plan, keys = MODES[mode]
    config = config_of(**{**BASE, **keys})
    undisturbed = work(config, turn_of(plan), turn_of(plan, 2), at=0)
    assert undisturbed.places
    for at in range(1, undisturbed.places + 1):
        assert figures(work(config, turn_of(plan), turn_of(plan, 2), at)) == figures(undisturbed), f"taken away at {at}"


def test_a_later_step_or_round_can_be_followed_by_an_earlier_one() -> None:
    plan, _ = MODES["two parts"]
    config = config_of(**BASE)
    undisturbed = figures(work(config, turn_of(plan), turn_of(plan), at=0))
    for later in (turn_of(plan, 2, round_=3), turn_of(plan, 2, first=1)):
        assert figures(work(config, later, turn_of(plan, 3), at=5)) == undisturbed


@pytest.mark.parametrize("mode", MODES)
def test_an_evaluation_that_is_taken_away_counts_the_same_when_it_is_given_again(mode: str) -> None:
    plan, keys = MODES[mode]
    config = config_of(**{**BASE, **keys})
    first = Evaluate(lease=Lease(1, 1), client=0, server=0, base=Ref("base", "broker"), plan=plan, round=0, part="test")
    again = msgspec.structs.replace(first, lease=Lease(1, 2))
    undisturbed = work(config, first, again, at=0)
    for at in range(1, undisturbed.places + 1):
        assert figures(work(config, first, again, at)) == figures(undisturbed), f"taken away at {at}"
        assert figures(work(config, turn_of(plan), again, at)) == figures(undisturbed), f"in a turn's place at {at}"
