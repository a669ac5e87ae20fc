"""What the tests of the pure cores share: configs in one line, anything of a type, and peers that obey."""

from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from msgspec import inspect as kinds

from zsplit.config import Config, load_config
from zsplit.wire.manifest import digest_of
from zsplit.wire.messages import (
    Evaluate,
    Flow,
    Init,
    Job,
    Lease,
    LinkSpeed,
    Measure,
    Merge,
    Plan,
    Prepared,
    Profile,
    Share,
    Stretch,
    Tally,
    Turn,
)
from zsplit_broker.events import Decide, Done, Entry, Event, Instruction, Joined, Planned, Ready, Started, Stored
from zsplit_broker.scheduler import Scheduler
from zsplit_broker.work import Peer, Work, client_of

NO_SUCH_LEASE = Lease(99, 99)

STRETCH = Stretch(forward=(0.01, 0.03), backward=(0.02, 0.06), step=0.001, saved=100.0, weights=1000)

PROFILE = Profile(cuts=("relu", "pool"), up=(400.0, 100.0), down=(400.0, 100.0), sizes=(1, 4), stretches=(STRETCH,) * 3)

LINK = LinkSpeed(up=1e6, down=2e6, rtt=0.01)

SERVER_MODELS = [
    {"schedule__server_model": "replica"},
    {"schedule__server_model": "shared"},
    {"schedule__server_model": "shared", "schedule__shared_order": "turn"},
    {"schedule__server_model": "fused"},
]

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For a machine that is busy otherwise: how long an example takes is no finding."""


def config_of(**values: object) -> Config:
    """Return a config with single keys set, such as `schedule__clients=3`."""
    return load_config(None, {key.replace("__", "."): value for key, value in values.items()})


def flat(config: Config) -> dict[str, object]:
    """Return all keys of a config as `config_of` takes them."""
    tables = msgspec.to_builtins(config)
    return {f"{section}__{key}": value for section, rows in tables.items() for key, value in rows.items()}


def anything(type_: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for all values of a type that msgspec decodes, read off the type itself.

    Floats are finite, since NaN does not equal itself; integers are those that msgpack has.
    """
    return _values(kinds.type_info(type_))


def _values(kind: kinds.Type) -> st.SearchStrategy[Any]:
    match kind:
        case kinds.StructType(cls=cls, fields=fields) | kinds.NamedTupleType(cls=cls, fields=fields):
            return st.builds(cls, **{field.name: _values(field.type) for field in fields})
        case kinds.UnionType(types=types):
            return st.one_of(*map(_values, types))
        case kinds.VarTupleType(item_type=item):
            return st.lists(_values(item), max_size=3).map(tuple)
        case kinds.TupleType(item_types=items):
            return st.tuples(*map(_values, items))
        case kinds.DictType(key_type=key, value_type=value):
            return st.dictionaries(_values(key), _values(value), max_size=3)
        case kinds.LiteralType(values=choices):
            return st.sampled_from(choices)
        case kinds.IntType(ge=least, le=most):
            return st.integers(-(2**63) if least is None else least, 2**64 - 1 if most is None else most)
        case kinds.FloatType(ge=least, le=most):
            return st.floats(least, most, allow_nan=False, allow_infinity=False)
        case _:
            return SCALARS[type(kind)]


SCALARS: dict[type[kinds.Type], st.SearchStrategy[Any]] = {
    kinds.StrType: st.text(max_size=8),
    kinds.BytesType: st.binary(max_size=8),
    kinds.BoolType: st.booleans(),
    kinds.NoneType: st.none(),
}


@st.composite
def damaged(draw: st.DrawFn, intact: st.SearchStrategy[bytes]) -> bytes:
    """Return bytes that were good once, with a few of them changed, lost or added."""
    data = bytearray(draw(intact))
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, len(data)))
        data[first : first + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(data)


@st.composite
def configs(draw: st.DrawFn, policies: tuple[str, ...] = ("round_robin", "parallel")) -> Config:
    """Return configs that differ in all that the scheduler looks at."""
    clients = draw(st.integers(1, 4))
    keys: dict[str, object] = {
        "run__rounds": draw(st.integers(1, 3)),
        "run__eval_every": draw(st.integers(0, 3)),
        "schedule__policy": draw(st.sampled_from(policies)),
        "schedule__clients": clients,
        "schedule__clients_per_round": draw(st.integers(0, clients)),
        "schedule__weighting": draw(st.sampled_from(["samples", "uniform"])),
        "train__batch_size": draw(st.integers(1, 8)),
        "train__local_epochs": draw(st.integers(1, 2)),
        "train__micro_batches": draw(st.sampled_from([1, "auto"])),
        "model__cut": draw(st.sampled_from(["", "auto"])),
        "plan__predict": draw(st.booleans()),
        "plan__quiet": draw(st.booleans()),
    }
    match keys["schedule__policy"]:
        case "parallel":
            keys["schedule__aggregate_every"] = draw(st.sampled_from([-1, 1, 2, 5]))
            keys |= draw(st.sampled_from(SERVER_MODELS))
            if keys.get("schedule__server_model", "replica") != "replica":
                keys["model__cut"] = ""  # one back has one cut
        case "round_robin":
            keys["run__commit_every"] = draw(st.integers(0, 3))
        case "async":
            keys["schedule__clients_per_round"] = 0
            keys["schedule__max_staleness"] = draw(st.integers(0, 3))
    return config_of(**keys)


@st.composite
def sizes_for(draw: st.DrawFn, config: Config) -> list[Prepared]:
    """Return what each client has: training samples always, validation and test samples perhaps."""
    few = st.integers(0, 6)
    return [
        Prepared(cut="relu", train=draw(st.integers(1, 24)), validation=draw(few), test=draw(few), threads=1)
        for _ in range(config.schedule.clients)
    ]


def equal_shards(config: Config, train: int = 20, validation: int = 4, test: int = 5) -> list[Prepared]:
    """Return what each client has where all have the same."""
    return [Prepared(cut="relu", train=train, validation=validation, test=test, threads=1)] * config.schedule.clients


class Play:
    """A scheduler with peers that do as they are told: every event that they cause is chosen by the test.

    `clock` seconds pass between two events. With `still` nobody learns anything: all states are equal.
    """

    def __init__(
        self,
        config: Config,
        shards: list[Prepared] | None = None,
        servers: int = 1,
        still: bool = False,
        clock: float = 1.0,
    ) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.shards = shards or equal_shards(config)
        self.peers: list[Peer] = [("server", k) for k in range(servers)]
        self.peers += [("client", i) for i in range(config.schedule.clients)]
        self.log: list[Entry] = []
        self.said: list[Instruction] = []
        self.still = still
        self._clock = clock

    def tell(self, event: Event) -> list[Instruction]:
        """Let one event happen; return what the scheduler says to it."""
        entry = Entry(self._clock * len(self.log), event)
        self.log.append(entry)
        said = self.scheduler.handle(entry)
        self.scheduler.check()
        self.said += said
        return said

    def joined(self, peer: Peer) -> Joined:
        role, index = peer
        return Joined(role, index, self.shards[index] if role == "client" else Prepared(cut="relu", threads=2))

    def begin(self) -> "Play":
        """Start the broker and let everybody join."""
        self.tell(Started(1))
        for peer in self.peers:
            self.tell(self.joined(peer))
        return self

    def due(self) -> list[Event]:
        """Return what there is to happen: what obedient peers and the disk would report now, each once."""
        events: list[Event] = []
        if self.scheduler.phase == "finished":
            return events
        for peer in self.peers:
            for job in self.scheduler.jobs(peer):
                events += self._reports(peer, job, self.scheduler.work[job.lease])
        if self.scheduler.plans.deciding is not None:
            events.append(planned(self.config, self.scheduler.plans.deciding))
        return events + [Stored(digest) for digest in self.scheduler.storing]

    def _reports(self, peer: Peer, job: Job, work: Work) -> Iterable[Event]:
        role = peer[0]
        if role == "server" and client_of(job) is not None and not work.ready:
            yield Ready(job.lease)
        elif role not in work.done and (role == "client" or client_of(job) is None or isinstance(job, Turn)):
            yield self.done(peer, job)

    def done(self, peer: Peer, job: Job) -> Done:
        """Return the report of a job that went well."""
        side = "client" if peer[0] == "client" else "server"
        if isinstance(job, Measure):
            return Done(job.lease, side, "", Tally(), PROFILE, LINK if side == "client" else None)
        digest = digest_of(b"" if self.still else repr(result_of(job, side)).encode())
        return Done(job.lease, side, digest, self.tally(peer, job))

    def tally(self, peer: Peer, job: Job) -> Tally:
        """Return figures that can be told apart when they are added up: one second a job, half of it idle.

        What comes in is faster from lease to lease, and slow again.
        """
        steps = job.count if isinstance(job, Turn) else 1
        samples = self.samples(job)
        traffic = {} if peer[0] == "server" else {"smashed": (100 * steps, 0), "gradients": (0, 10 * steps)}
        return Tally(
            steps=steps,
            samples=samples,
            loss_sum=0.5 * samples,
            top1=samples // 2,
            top5=samples,
            seconds=1.0,
            idle=0.5,
            busy=0.25,
            flow=Flow(2**20 * (1 + job.lease.number % 3), 1.0, 1),
            step_seconds={0: steps},
            traffic=traffic,
            traffic_raw={kind: (4 * up, 4 * down) for kind, (up, down) in traffic.items()},
        )

    def samples(self, job: Job) -> int:
        """Return how many samples a job sees."""
        match job:
            case Turn(client=client, first=first, count=count):
                size, batch = self.shards[client].train, self.config.train.batch_size
                per_epoch = -(-size // batch)
                return sum(min(batch, size - s % per_epoch * batch) for s in range(first, first + count))
            case Evaluate(client=client, part=part):
                return int(getattr(self.shards[client], part))
            case Init() | Merge() | Measure():
                return 0

    def go_on(self, choose: Callable[[list[Event]], Event] = lambda due: due[0], events: int = 10_000) -> "Play":
        """Let what is due happen, one event after the other, until nothing is; at most so many."""
        for _ in range(events):
            due = self.due()
            if not due:
                break
            self.tell(choose(due))
        return self


def result_of(job: Job, side: str) -> object:
    """Return what a job's result follows from: nothing of when, under which lease and at which server it was done."""
    match job:
        case Turn():
            back = job.base.digest if job.back is None else job.back.digest
            own = (Share(job.client, job.first, job.count),)
            return side, own if side == "client" or job.group is None else job.group.shares, job.round, back
        case Merge(inputs=inputs):
            fronts = [(c.client, c.weight, c.front.digest) for c in inputs]
            return fronts, [c.back.digest for c in inputs if c.back is not None], job.base.digest, job.share
        case _:
            return side


def planned(config: Config, asked: Decide) -> Planned:
    """Return what a planner may say: what is fixed, else for every other round something better."""
    clients = range(config.schedule.clients)
    if asked.current and asked.round % 2 == 0:
        fixed = asked.round == 0
        return Planned(0, asked.current, dict.fromkeys(clients, 0.5)) if fixed else Planned(asked.round)
    plan = Plan(cut="pool", micro_batches=1 + asked.round, window=1 + asked.round)
    return Planned(asked.round, dict.fromkeys(clients, plan), dict.fromkeys(clients, 0.25), "planned")


def fingerprint(scheduler: Scheduler) -> tuple[object, ...]:
    """Return all that a scheduler knows, to compare two of them."""
    work = [(lease, w.job, w.ready, list(w.done.items())) for lease, w in scheduler.work.items()]
    return (
        scheduler.now,
        (scheduler.phase, scheduler.outcome, list(scheduler.peers.items())),
        (scheduler.epoch, scheduler.number, work),
        (scheduler.round, scheduler.stages, scheduler.stage, scheduler.version),
        (scheduler.contributions, scheduler.storing, scheduler.stored, scheduler.unsettled),
        (scheduler.known, scheduler.gone, scheduler.away, scheduler.missed, scheduler.moved, scheduler.assembled),
        (scheduler.finished, scheduler.evaluated, scheduler.draining, scheduler.stage_began),
        {digest: mark._replace(book=None) for digest, mark in scheduler.marks.items()},
        (scheduler.arrivals.contributions, scheduler.arrivals.turns, scheduler.arrivals.count, scheduler.bases),
        (scheduler.history, scheduler.books.tests, scheduler.began),
        (scheduler.plans.situation, scheduler.plans.deciding, scheduler.plans.made),
        (scheduler.plans.current, scheduler.plans.predicted),
    )


def undisturbed(play: Play) -> Scheduler:
    """Return how the run of a play ends when nothing happens to it."""
    return Play(play.config, play.shards, len([p for p in play.peers if p[0] == "server"])).begin().go_on().scheduler


def lineage(scheduler: Scheduler) -> list[tuple[object, ...]]:
    """Return what a run came to, round by round: nothing of how long it took."""
    return [
        (r.round, r.version, r.train.steps, r.train.samples, r.train.loss_sum, r.validation.samples, r.clients.keys())
        for r in scheduler.history
    ]


def through_the_journal(entry: Entry) -> Entry:
    """Return the entry as it comes back from a line of the journal."""
    return msgspec.json.decode(msgspec.json.encode(entry), type=Entry)
