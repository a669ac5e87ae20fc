"""The run as a state machine: under any events its invariants hold, and with obedient peers it gets to its end."""

from collections import Counter
from itertools import pairwise
from random import Random

import msgspec
import pytest
from helpers import (
    LINK,
    NO_SUCH_LEASE,
    PROFILE,
    Play,
    anything,
    config_of,
    configs,
    equal_shards,
    fingerprint,
    planned,
    sizes_for,
    through_the_journal,
    unhurried,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zsplit.errors import StorageError
from zsplit.plan import Situation
from zsplit.wire.messages import Evaluate, Init, Lease, Measure, Merge, Plan, Prepared, Tally, Turn
from zsplit_broker.archive import KEPT_VERSIONS
from zsplit_broker.events import (
    Announce,
    Close,
    Damaged,
    Decide,
    Discard,
    Done,
    Draining,
    Entry,
    Event,
    Finish,
    Forsake,
    Grant,
    Instruction,
    Joined,
    Lost,
    Missed,
    Open,
    Planned,
    Ready,
    Started,
    Stopped,
    Store,
    Stored,
)
from zsplit_broker.policy import merges_after, participants, shares_back, stages_of
from zsplit_broker.scheduler import Scheduler, restore
from zsplit_broker.survey import measures, plans_itself
from zsplit_broker.work import Peer, client_of, peer_of, refs_of

NOWHERE = Situation("parallel", (), ())

ROUND_ROBIN = {"schedule__policy": "round_robin", "schedule__clients": 3}


@st.composite
def plays(draw: st.DrawFn, policies: tuple[str, ...] = ("round_robin", "parallel")) -> Play:
    """Return a run that nobody has begun."""
    config = draw(configs(policies))
    return Play(config, draw(sizes_for(config)), draw(st.integers(1, 3)), still=draw(st.booleans()))


def assert_restored(play: Play) -> None:
    """A scheduler that is told the journal again is the live one at every point, and says the same."""
    live, again = Scheduler(play.config), Scheduler(play.config)
    for entry in play.log:
        assert live.handle(entry) == again.handle(through_the_journal(entry))
        assert fingerprint(live) == fingerprint(again)
    restored = restore(play.config, [msgspec.json.encode(entry) for entry in play.log])
    assert fingerprint(again) == fingerprint(restored) == fingerprint(play.scheduler)


class Ledger:
    """What the instructions alone tell: which leases are open and granted, and which versions lie on the disk."""

    def __init__(self) -> None:
        self.open: dict[Lease, bool] = {}
        self.closed: set[Lease] = set()
        self.waiting: set[str] = set()
        self.disk: set[str] = set()
        self.announced: list[int] = []
        self.asked = 0
        self.damaged: set[str] = set()

    def written(self, digest: str) -> None:
        """The disk has it before the scheduler knows."""
        self.waiting.discard(digest)
        self.disk.add(digest)

    def follow(self, instruction: Instruction) -> None:
        match instruction:
            case Open(job):
                assert job.lease not in self.open.keys() | self.closed, "a lease is opened twice"
                self.open[job.lease] = False
            case Grant(job):
                assert self.open[job.lease] is False, "a lease is granted twice, or was never opened"
                self.open[job.lease] = True
            case Close(job):
                del self.open[job.lease]
                self.closed.add(job.lease)
            case Store(ref):
                self.waiting.add(ref.digest)
            case Forsake(digest):
                self.waiting.remove(digest)
            case Discard(digest):
                self.disk.remove(digest)
            case Announce(round_):
                self.announced = [*self.announced[:round_], round_]
            case Decide():
                self.asked += 1


class Mischief(RuleBasedStateMachine):
    """Peers that come, go, report late, twice or nonsense, beside some that do as they are told."""

    play: Play

    @initialize(play=plays(("round_robin", "parallel", "async")), all_there=st.booleans())
    def start(self, play: Play, all_there: bool) -> None:
        self.play, self.ledger = play, Ledger()
        self.tell(Started(1))
        if all_there:
            self.join_all()

    def tell(self, event: Event) -> None:
        over = self.play.scheduler.phase == "finished" and not isinstance(event, Started)
        if not over and isinstance(event, Stored) and event.digest in self.ledger.waiting:
            self.ledger.written(event.digest)
        said = self.play.tell(event)
        assert not (over and said), "a run that is over says something"
        for instruction in said:
            self.ledger.follow(instruction)

    def assert_ignored(self, event: Event) -> None:
        before = fingerprint(self.play.scheduler)[1:]
        self.tell(event)
        assert fingerprint(self.play.scheduler)[1:] == before

    def join_all(self) -> None:
        for peer in self.play.peers:
            if peer not in self.play.scheduler.peers:
                self.tell(self.play.joined(peer))

    @rule(number=st.integers(0, 20))
    def join(self, number: int) -> None:
        self.tell(self.play.joined(self.play.peers[number % len(self.play.peers)]))

    @rule(count=st.integers(1, 30), random=st.randoms(use_true_random=False))
    def obey(self, count: int, random: Random) -> None:
        self.join_all()
        for _ in range(count):
            due = self.play.due()
            if due:
                self.tell(random.choice(due))

    @rule(number=st.integers(0, 1000))
    def repeat(self, number: int) -> None:
        event = self.play.log[number % len(self.play.log)].event
        if not isinstance(event, Started):
            self.tell(event)

    @rule(event=anything(Ready | Done | Stored))
    def report_nonsense(self, event: Ready | Done | Stored) -> None:
        if isinstance(event, Stored) or event.lease not in self.play.scheduler.work:
            self.assert_ignored(event)

    @precondition(lambda self: self.play.scheduler.plans.deciding is None and self.play.scheduler.phase != "waiting")
    @rule(event=anything(Planned))
    def plan_unasked(self, event: Planned) -> None:
        self.assert_ignored(event)

    @precondition(lambda self: self.play.scheduler.phase == "waiting")
    @rule(round_=st.integers(0, 2))
    def bring_a_plan(self, round_: int) -> None:
        self.tell(planned(self.play.config, Decide(round_, NOWHERE)))

    @rule(epoch=st.integers(1, 3), number=st.integers(0, 40), side=st.sampled_from(["client", "server"]))
    def report_for_some_lease(self, epoch: int, number: int, side: str) -> None:
        lease = Lease(epoch, number)
        if lease in self.play.scheduler.work:
            self.tell(Ready(lease))
        else:
            self.assert_ignored(Ready(lease))
            self.assert_ignored(Done(lease, side, "d", Tally()))

    @rule()
    def restart_the_broker(self) -> None:
        self.tell(Started(self.play.scheduler.epoch + 1))

    @precondition(lambda self: self.play.scheduler.phase == "waiting")
    @rule(number=st.integers(0, 20))
    def leave_before_the_start(self, number: int) -> None:
        role, index = self.play.peers[number % len(self.play.peers)]
        self.tell(Lost(role, index, "it left"))
        assert self.play.scheduler.phase == "waiting"

    @precondition(lambda self: self.play.scheduler.phase != "waiting")
    @rule(number=st.integers(0, 20))
    def lose(self, number: int) -> None:
        role, index = self.play.peers[number % len(self.play.peers)]
        before = self.play.scheduler.outcome
        self.tell(Lost(role, index, "it fell silent"))
        scheduler = self.play.scheduler
        drained = Finish(False, scheduler.ended(scheduler.draining)) if scheduler.draining else before
        assert scheduler.outcome in (before, drained)  # one that drains ends where its round is lost, not later

    @precondition(lambda self: self.play.scheduler.phase != "waiting")
    @rule(number=st.integers(0, 20), stop=st.booleans())
    def end(self, number: int, stop: bool) -> None:
        role, index = self.play.peers[number % len(self.play.peers)]
        known = (role, index) in self.play.scheduler.peers
        self.tell(Stopped("Ctrl-C") if stop else Lost(role, index, "the loss is nan", fatal=True))
        assert self.play.scheduler.phase == "finished" or not (stop or known)

    @rule(client=st.integers(0, 3))
    def go_on_without(self, client: int) -> None:
        self.tell(Missed(client % self.play.config.schedule.clients, "it did not come back"))

    @precondition(lambda self: self.play.scheduler.stored)
    @rule(number=st.integers(0, 3))
    def damage(self, number: int) -> None:
        stored = self.play.scheduler.stored
        self.ledger.damaged.add(digest := stored[number % len(stored)])
        self.tell(Damaged(digest, "its bytes are others"))

    @rule()
    def drain(self) -> None:
        self.tell(Draining("SIGTERM"))

    @invariant()
    def the_invariants_hold(self) -> None:
        self.play.scheduler.check()

    @invariant()
    def the_instructions_tell_the_whole_story(self) -> None:
        work = self.play.scheduler.work
        assert self.ledger.open.keys() == work.keys()
        for lease, granted in self.ledger.open.items():
            assert granted == (work[lease].ready and client_of(work[lease].job) is not None)
        assert self.ledger.waiting == self.play.scheduler.storing.keys()
        rounds = [record.round for record in self.play.scheduler.history]
        assert self.ledger.announced[: len(rounds)] == rounds == list(range(len(rounds)))

    @invariant()
    def only_parallel_clients_never_evaluate_beside_a_turn_and_round_robin_has_one(self) -> None:
        scheduler, policy = self.play.scheduler, self.play.config.schedule.policy
        for i in range(self.play.config.schedule.clients):
            jobs = scheduler.jobs(("client", i))
            assert len(jobs) <= {"parallel": 1, "round_robin": 2, "async": 3}[policy]
            assert sum(not isinstance(job, Evaluate) for job in jobs) <= 1
        turns = [work.job for work in scheduler.work.values() if isinstance(work.job, Turn)]
        assert policy != "round_robin" or len(turns) <= 1
        assert len({turn.client for turn in turns}) == len(turns)

    @invariant()
    def a_round_is_recorded_when_its_version_is_stored_and_evaluated_and_not_before(self) -> None:
        scheduler = self.play.scheduler
        open_ = {work.job.round for work in scheduler.work.values() if isinstance(work.job, Evaluate)}
        assert not open_ & {record.round for record in scheduler.history}
        on_their_way = self.ledger.waiting - self.ledger.disk - self.ledger.damaged
        assert not {record.version for record in scheduler.history} & on_their_way
        if scheduler.unsettled and scheduler.outcome is None:
            first, version = next(iter(scheduler.unsettled.items()))
            due = {each.round for each, *_ in scheduler.evaluations_due()}
            assert first in open_ | due or version.digest in scheduler.storing

    @invariant()
    def nothing_is_planned_that_nobody_asked_for(self) -> None:
        assert self.play.scheduler.plans.deciding is None or self.ledger.asked >= 1

    @invariant()
    def the_versions_that_are_known_are_on_the_disk_and_are_few(self) -> None:
        scheduler = self.play.scheduler
        assert self.ledger.disk == set(scheduler.stored)
        assert len(scheduler.stored) <= KEPT_VERSIONS + len(scheduler.unsettled)

    @invariant()
    def whatever_an_open_job_may_pull_is_kept_by_who_holds_it(self) -> None:
        scheduler = self.play.scheduler
        needed = [ref for work in scheduler.work.values() for ref in refs_of(work.job)]
        for ref in needed + list(scheduler.storing.values()):
            assert ref.digest in scheduler.stored or ref.digest in scheduler.kept(peer_of(ref.holder))

    def teardown(self) -> None:
        if hasattr(self, "play"):
            assert_restored(self.play)


Mischief.TestCase.settings = settings(unhurried, max_examples=300, stateful_step_count=40)
TestMischief = Mischief.TestCase


# Runs that end


def turns_of(play: Play) -> list[Turn]:
    return [said.job for said in play.said if isinstance(said, Grant) and isinstance(said.job, Turn)]


def opened(play: Play, kind: type) -> list:
    return [said.job for said in play.said if isinstance(said, Open) and isinstance(said.job, kind)]


@unhurried
@given(plays(), st.randoms(use_true_random=False))
def test_a_run_with_obedient_peers_ends_with_everything_done_once(play: Play, random: Random) -> None:
    play.begin().go_on(random.choice)
    scheduler, config = play.scheduler, play.config
    assert scheduler.outcome == Finish(True, "the run is finished")
    assert [said for said in play.said if isinstance(said, Finish)] == [scheduler.outcome]
    rounds = range(config.run.rounds)
    assert [said.round for said in play.said if isinstance(said, Announce)] == list(rounds)
    steps = {c: scheduler.steps(c) for c in range(config.schedule.clients)}
    stages = [stages_of(config, participants(config, r), steps) for r in rounds]
    assert Counter((t.round, t.client, t.first, t.count) for t in turns_of(play)) == Counter(
        (r, *share) for r in rounds for stage in stages[r] for share in stage
    )
    merges = [r for r in rounds for number in range(len(stages[r])) if merges_after(config, stages[r], number)]
    assert [merge.round for merge in opened(play, Merge)] == merges
    assert len(opened(play, Init)) == 1
    measured = Counter((job.server, job.client) for job in opened(play, Measure))
    assert set(measured.values()) <= {1}
    alone = [(server, -1) for role, server in play.peers if role == "server"]
    assert len(measured) == (len(alone) + config.schedule.clients if measures(config) else 0)
    assert (any(isinstance(said, Decide) for said in play.said)) == measures(config)
    plans_made = {turn.plan.cut for turn in turns_of(play)}
    assert plans_made == ({"pool"} if plans_itself(config) else {"relu"})


DISCARDING: dict[str, dict[str, object]] = {"async": {"schedule__max_staleness": 0}}
"""Late results are thrown away, so that a round can end without a merge."""


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("policy", ["round_robin", "parallel", "async"])
def test_a_round_whose_version_is_on_the_disk_already_is_recorded_at_once(policy: str, seed: int) -> None:
    config = config_of(schedule__policy=policy, schedule__clients=2, run__rounds=1, **DISCARDING.get(policy, {}))
    play = Play(config, equal_shards(config, validation=0, test=0), still=True).begin()
    random, scheduler = Random(seed), play.scheduler
    while scheduler.outcome is None:
        play.tell(random.choice(play.due()))
        assert not {ref.digest for ref in scheduler.unsettled.values()} & set(scheduler.stored)
    assert scheduler.outcome == Finish(True, "the run is finished")
    assert [said.round for said in play.said if isinstance(said, Announce)] == [0]


def test_a_run_without_clients_under_async_says_what_it_waits_for() -> None:
    play = Play(config_of(schedule__policy="async", schedule__clients=2, schedule__min_clients=1)).begin()
    while not turns_of(play):
        play.tell(play.due()[0])
    play.tell(Stopped("Ctrl-C"))
    play.tell(Started(2))
    for client in range(2):
        play.tell(Missed(client, "it did not come back"))
    play.tell(play.joined(("server", 0)))
    sentence = "the run needs more clients (schedule.min_clients = 1, and 0 here): start them"
    assert (play.scheduler.waits_for(), play.scheduler.work) == (sentence, {})
    play.tell(play.joined(("client", 1)))
    play.go_on(Random(0).choice)
    assert play.scheduler.outcome == Finish(True, "the run is finished")


@unhurried
@given(plays(), st.randoms(use_true_random=False))
def test_every_client_with_data_evaluates_when_it_is_due_and_tests_once(play: Play, random: Random) -> None:
    play.begin().go_on(random.choice)
    config, clients = play.config, range(play.config.schedule.clients)
    every = config.run.eval_every
    due = [r for r in range(config.run.rounds) if every and (r + 1) % every == 0]
    evaluations = Counter((e.part, e.round, e.client) for e in opened(play, Evaluate))
    expected = [("validation", r, c) for r in due for c in clients if play.shards[c].validation]
    expected += [("test", config.run.rounds, c) for c in clients if play.shards[c].test]
    assert evaluations == Counter(expected)
    assert play.scheduler.test.samples == sum(shard.test for shard in play.shards)
    validated = [record.validation.samples for record in play.scheduler.history]
    assert [record.round for record in play.scheduler.history] == list(range(config.run.rounds))
    assert validated == [sum(s.validation for s in play.shards) if r in due else 0 for r in range(config.run.rounds)]


@unhurried
@given(st.booleans(), st.sampled_from(["parallel", "round_robin"]), st.randoms(use_true_random=False))
def test_what_loses_something_is_tested_with_and_without_and_validated_as_the_config_says(
    through: bool, policy: str, random: Random
) -> None:
    keys = {"codec__up": "ms:ratio=0.9,bits=2", "codec__down": "mask", "codec__eval": through}
    play = Play(config_of(schedule__clients=2, run__rounds=2, schedule__policy=policy, **keys)).begin()
    play.go_on(random.choice)
    ups = Counter((e.part, e.plan.up) for e in opened(play, Evaluate))
    spec = "ms:ratio=0.9,bits=2"
    validated = spec if through else "raw"
    assert ups == {("validation", validated): 4, ("test", spec): 2, ("test", "raw"): 2}
    assert {turn.plan.up for turn in turns_of(play)} == {spec}
    assert {name: tally.samples for name, tally in play.scheduler.books.tests.items()} == {spec: 10, "raw": 10}
    assert_restored(play)


@unhurried
@given(plays(), st.randoms(use_true_random=False))
def test_rounds_add_up_exactly_and_their_versions_are_stored(play: Play, random: Random) -> None:
    play.begin().go_on(random.choice)
    merges = opened(play, Merge)
    for record in play.scheduler.history:
        clients = participants(play.config, record.round)
        epochs = play.config.train.local_epochs
        assert record.train.samples == epochs * sum(play.shards[c].train for c in clients)
        assert record.train.steps == sum(play.scheduler.steps(c) for c in clients)
        assert record.server.samples == record.train.samples
        assert record.seconds > 0
        last = [merge for merge in merges if merge.round == record.round][-1]
        assert record.version == play.done(("server", last.server), last).digest
    stored = [entry.event.digest for entry in play.log if isinstance(entry.event, Stored)]
    assert {record.version for record in play.scheduler.history} <= set(stored)
    assert play.scheduler.stored[-1] == play.scheduler.history[-1].version
    assert sum(record.seconds for record in play.scheduler.history) < play.scheduler.seconds
    assert all(0 < record.training <= record.seconds for record in play.scheduler.history)


@unhurried
@given(plays(("round_robin",)), st.randoms(use_true_random=False))
def test_round_robin_grants_every_client_of_the_round_within_as_many_turns_as_there_are(
    play: Play, random: Random
) -> None:
    play.begin().go_on(random.choice)
    order = [turn.client for turn in turns_of(play)]
    assert order == [client for r in range(play.config.run.rounds) for client in participants(play.config, r)]
    clients = play.config.schedule.clients
    if not play.config.schedule.clients_per_round:
        for first in range(len(order) - clients + 1):
            assert set(order[first : first + clients]) == set(range(clients))


@unhurried
@given(plays(("parallel",)), st.randoms(use_true_random=False))
def test_parallel_grants_every_client_of_the_round_before_anyone_twice(play: Play, random: Random) -> None:
    play.begin().go_on(random.choice)
    for round_ in range(play.config.run.rounds):
        clients = participants(play.config, round_)
        order = [turn.client for turn in turns_of(play) if turn.round == round_]
        assert sorted(order[: len(clients)]) == clients


@unhurried
@given(plays(), st.integers(0, 200), st.randoms(use_true_random=False))
def test_every_lease_is_closed_once_however_the_run_ends(play: Play, events: int, random: Random) -> None:
    play.begin().go_on(random.choice, events)
    play.tell(Lost(*play.peers[random.randrange(len(play.peers))], "the loss is nan", fatal=True))
    granted = Counter(said.job.lease for said in play.said if isinstance(said, Grant))
    open_ = Counter(said.job.lease for said in play.said if isinstance(said, Open))
    assert open_ == Counter(said.job.lease for said in play.said if isinstance(said, Close))
    assert granted <= open_
    assert set(open_.values()) == {1}
    assert [play.scheduler.jobs(peer) for peer in play.peers] == [[]] * len(play.peers)


@unhurried
@given(plays(), st.randoms(use_true_random=False))
def test_a_journal_restores_the_run_at_every_point(play: Play, random: Random) -> None:
    play.begin()
    while play.due():
        if random.random() < 0.05:
            play.tell(Started(play.scheduler.epoch + 1))
        play.tell(random.choice(play.due()))
    assert play.scheduler.phase == "finished"
    assert_restored(play)


@unhurried
@given(plays(), st.integers(0, 60), st.randoms(use_true_random=False))
def test_a_run_restored_in_the_middle_goes_on_as_if_nothing_had_happened(
    play: Play, events: int, random: Random
) -> None:
    play.begin().go_on(random.choice, events)
    lines = [msgspec.json.encode(entry) for entry in play.log]
    play.go_on()
    after = Play(play.config, play.shards, still=play.still)
    after.peers, after.log = play.peers, play.log[: len(lines)]
    after.scheduler = restore(play.config, lines)
    after.go_on()
    assert fingerprint(after.scheduler) == fingerprint(play.scheduler)


@pytest.mark.parametrize("line", [b"{}", b"not json", b'{"at":0.0,"event":{"event":"dance"}}'])
def test_a_journal_with_a_line_that_is_no_event_is_refused_with_its_number(line: bytes) -> None:
    with pytest.raises(StorageError, match="Line 3 of the journal is no event of this version"):
        restore(config_of(), [msgspec.json.encode(Entry(0.0, Started(1))), line])


@unhurried
@given(anything(Entry))
def test_a_journal_line_comes_back_as_it_was(entry: Entry) -> None:
    assert through_the_journal(entry) == entry


# The beginning


def test_the_run_begins_when_all_clients_and_a_server_are_there() -> None:
    play = Play(config_of(schedule__clients=2), servers=2)
    play.tell(Started(1))
    assert play.scheduler.missing() == ["client 0", "client 1", "a server"]
    assert play.tell(play.joined(("client", 1))) == []
    assert play.tell(play.joined(("server", 1))) == []
    assert play.scheduler.missing() == ["client 0"]
    assert play.tell(play.joined(("client", 0))) == [Open(Init(lease=Lease(1, 1), server=1))]
    assert play.scheduler.missing() == []


def test_a_peer_that_leaves_before_the_start_is_waited_for_again() -> None:
    play = Play(config_of(schedule__clients=1))
    play.tell(Started(1))
    play.tell(play.joined(("client", 0)))
    assert play.tell(Lost("client", 0, "it left")) == []
    assert play.tell(play.joined(("server", 0))) == []
    assert play.scheduler.missing() == ["client 0"]
    assert play.tell(play.joined(("client", 0))) != []


def test_nothing_is_trained_before_version_0_is_on_the_disk() -> None:
    play = Play(config_of(**ROUND_ROBIN)).begin()
    (init,) = play.due()
    (close, store) = play.tell(init)
    assert isinstance(close, Close)
    assert isinstance(store, Store)
    assert play.scheduler.phase == "initialising"
    assert [type(said) for said in play.tell(Stored(store.ref.digest))] == [Open]
    assert play.scheduler.phase == "training"


# Turns


def test_a_turn_is_granted_when_its_server_is_ready_and_over_when_both_sides_are_done() -> None:
    play = Play(config_of(**ROUND_ROBIN)).begin().go_on(events=2)
    (turn,) = opened(play, Turn)
    server, client = ("server", 0), ("client", 0)
    assert play.scheduler.jobs(server) == [turn]
    assert play.scheduler.jobs(client) == []
    assert play.tell(Ready(turn.lease)) == [Grant(turn)]
    assert play.tell(Ready(turn.lease)) == []
    assert play.scheduler.jobs(client) == [turn]
    assert play.tell(play.done(client, turn)) == []
    assert play.scheduler.jobs(client) == [turn]
    close, merge = play.tell(play.done(server, turn))
    assert close == Close(turn)
    assert isinstance(merge.job, Merge)
    assert play.scheduler.jobs(client) == []


def test_a_turn_names_everything_that_it_depends_on() -> None:
    config = config_of(
        **ROUND_ROBIN, train__batch_size=8, train__local_epochs=2, train__micro_batches=4, plan__window=2
    )
    play = Play(config, equal_shards(config, train=20)).begin().go_on(events=2)
    (turn,) = opened(play, Turn)
    assert (turn.round, turn.first, turn.count) == (0, 0, 6)
    assert turn.threads == (1, 2)
    assert (turn.plan.cut, turn.plan.micro_batches, turn.plan.window) == ("relu", 4, 2)
    assert turn.base == play.scheduler.version


def test_a_window_that_is_not_set_is_the_whole_step() -> None:
    assert Play(config_of(train__micro_batches=4)).begin().scheduler.plan_of(0).window == 4


def test_each_turn_of_round_robin_starts_from_what_the_one_before_left() -> None:
    play = Play(config_of(**ROUND_ROBIN, run__rounds=2)).begin().go_on()
    merged = [play.done(("server", 0), merge).digest for merge in opened(play, Merge)]
    bases = [turn.base.digest for turn in turns_of(play)]
    assert bases[1:] == merged[:-1]
    for turn, merge in zip(turns_of(play), opened(play, Merge), strict=True):
        (share,) = merge.inputs
        assert (share.client, merge.base) == (turn.client, turn.base)
        assert share.front.digest == play.done(("client", turn.client), turn).digest
        assert share.back.digest == play.done(("server", turn.server), turn).digest


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_contributions_are_merged_in_client_order_with_their_weights(weighting: str) -> None:
    config = config_of(
        schedule__clients=3, schedule__aggregate_every=2, schedule__weighting=weighting, train__batch_size=8
    )
    shards = [Prepared(train=train) for train in (30, 12, 3)]
    play = Play(config, shards).begin().go_on(lambda due: due[-1])
    weights = [[(c.client, c.weight) for c in merge.inputs] for merge in opened(play, Merge)[:2]]
    by_samples = [[(0, 16.0), (1, 12.0), (2, 3.0)], [(0, 14.0)]]
    assert weights == (by_samples if weighting == "samples" else [[(c, 1.0) for c, _ in row] for row in by_samples])


def test_parallel_turns_are_shared_out_to_the_servers_evenly() -> None:
    config = config_of(schedule__clients=4)
    play = Play(config, servers=3).begin().go_on(events=2)
    assert [turn.server for turn in opened(play, Turn)] == [0, 1, 2, 0]
    assert [len(play.scheduler.jobs(("server", k))) for k in range(3)] == [2, 1, 1]


@unhurried
@given(plays(("parallel",)))
def test_no_server_ever_has_two_jobs_more_than_another_where_turns_do_not_share_a_back(play: Play) -> None:
    assume(not shares_back(play.config))
    play.begin()
    loads = []
    while due := play.due():
        said = play.tell(due[0])
        if sum(isinstance(instruction, Open) for instruction in said) > 1:
            loads.append([len(play.scheduler.jobs(peer)) for peer in play.peers if peer[0] == "server"])
    assert all(max(load) - min(load) <= 1 for load in loads)


def test_a_server_that_joins_late_gets_turns_too() -> None:
    config = config_of(schedule__clients=2, run__rounds=2)
    play = Play(config, servers=1).begin()
    late: Peer = ("server", 1)
    play.peers.append(late)
    play.tell(Joined("server", 1, Prepared(cut="relu")))
    play.go_on()
    assert {turn.server for turn in turns_of(play)} == {0, 1}
    assert play.scheduler.outcome == Finish(True, "the run is finished")


def test_averages_are_made_where_a_back_lies() -> None:
    play = Play(config_of(schedule__clients=3), servers=2).begin().go_on()
    for merge in opened(play, Merge):
        assert merge.inputs[0].back.holder == f"server.{merge.server}"
        assert {share.back.holder for share in merge.inputs} == {"server.0", "server.1"}
        assert [share.front.holder for share in merge.inputs] == ["client.0", "client.1", "client.2"]


# Versions


@pytest.mark.parametrize(("every", "per_round"), [(0, 1), (1, 3), (2, 2), (3, 1)])
def test_round_robin_commits_as_often_as_the_config_says(every: int, per_round: int) -> None:
    play = Play(config_of(**ROUND_ROBIN, run__rounds=2, run__commit_every=every)).begin().go_on()
    assert sum(isinstance(said, Store) for said in play.said) == 1 + 2 * per_round


def without_the_disk(play: Play) -> Play:
    """Let everything happen but what the disk reports, until nothing is left."""
    while work := [event for event in play.due() if not isinstance(event, Stored)]:
        play.tell(work[0])
    return play


def test_parallel_turns_go_on_beside_storing_and_the_round_after_the_next_waits_for_it() -> None:
    play = Play(config_of(run__rounds=4, schedule__clients=3)).begin().go_on(events=2)
    without_the_disk(play)
    assert [(turn.round, turn.client) for turn in turns_of(play)] == [(r, c) for r in (0, 1) for c in (0, 1, 2)]
    assert (play.scheduler.phase, play.scheduler.history) == ("validating", [])
    held = play.due()
    assert [type(event) for event in held] == [Stored, Stored]
    assert Announce(0) in play.tell(held[0])
    assert (play.scheduler.phase, play.scheduler.round) == ("training", 2)


def test_where_training_may_end_early_parallel_turns_wait_for_the_version_of_the_round_before() -> None:
    play = Play(config_of(run__rounds=4, run__patience=2, schedule__clients=3)).begin().go_on(events=2)
    without_the_disk(play)
    assert [(turn.round, turn.client) for turn in turns_of(play)] == [(0, 0), (0, 1), (0, 2)]
    (held,) = play.due()
    assert play.scheduler.phase == "validating"
    play.tell(held)
    assert (play.scheduler.phase, play.scheduler.round) == ("training", 1)


def test_turns_go_on_while_a_version_is_being_stored_and_the_round_after_the_next_waits_for_it() -> None:
    play = Play(config_of(**ROUND_ROBIN, run__rounds=4, run__commit_every=1)).begin().go_on(events=2)
    without_the_disk(play)
    assert [(turn.round, turn.client) for turn in turns_of(play)] == [(r, c) for r in (0, 1) for c in (0, 1, 2)]
    assert (play.scheduler.phase, play.scheduler.history) == ("validating", [])
    held = play.due()
    assert len(held) == 6
    for event in held[:3]:
        assert play.scheduler.phase == "validating"
        said = play.tell(event)
    assert Announce(0) in said
    assert (play.scheduler.phase, play.scheduler.round) == ("training", 2)
    without_the_disk(play)
    assert {turn.round for turn in turns_of(play)} == {0, 1, 2}


# Round-robin evaluates beside the next round


def without_evaluations(play: Play, rounds: set[int]) -> Play:
    """Let everything happen but the end of these rounds' evaluations, until nothing is left."""

    def waits(event: Event) -> bool:
        job = play.scheduler.work[event.lease].job if isinstance(event, Done) else None
        return isinstance(job, Evaluate) and job.round in rounds

    while work := [event for event in play.due() if not waits(event)]:
        play.tell(work[0])
    return play


def test_the_next_rounds_first_turn_opens_at_once_and_before_the_evaluations() -> None:
    play = Play(config_of(**ROUND_ROBIN, run__rounds=2), servers=2).begin()
    while len(opened(play, Merge)) < 3:
        play.go_on(events=1)
    (done,) = [event for event in play.due() if isinstance(event, Done)]
    close, store, *jobs = play.tell(done)
    assert [type(said) for said in (close, store)] == [Close, Store]
    assert [(type(said.job), said.job.client) for said in jobs] == [
        (Turn, 0),
        (Evaluate, 0),
        (Evaluate, 1),
        (Evaluate, 2),
    ]
    assert [said.job.server for said in jobs] == [0, 1, 0, 1]
    assert {said.job.base.digest for said in jobs} == {store.ref.digest}
    assert [said.job.round for said in jobs] == [1, 0, 0, 0]


def test_the_version_under_evaluation_is_kept_by_its_holder_while_training_goes_on() -> None:
    play = Play(config_of(**ROUND_ROBIN, run__rounds=3)).begin()
    without_evaluations(play, {0})
    (evaluation,) = {job.base for job in opened(play, Evaluate) if job.round == 0}
    assert evaluation.digest not in play.scheduler.storing
    assert evaluation != play.scheduler.version
    assert evaluation.digest in play.scheduler.kept(("server", 0))


def test_a_round_whose_evaluation_is_late_holds_up_the_round_after_the_next() -> None:
    play = Play(config_of(**ROUND_ROBIN, run__rounds=3)).begin()
    without_evaluations(play, {0})
    assert {turn.round for turn in turns_of(play)} == {0, 1}
    assert (play.scheduler.phase, play.scheduler.history) == ("validating", [])
    without_evaluations(play, {1})
    assert {turn.round for turn in turns_of(play)} == {0, 1, 2}


def test_a_run_that_drains_ends_with_the_version_before_where_that_of_its_round_is_lost() -> None:
    play = Play(config_of(run__rounds=1, schedule__clients=1)).begin()
    while not play.scheduler.unsettled:
        play.go_on(events=1)
    (first,) = play.scheduler.stored
    play.tell(Draining("SIGTERM"))
    assert play.scheduler.outcome is None
    play.tell(Lost("server", 0, "killed"))
    assert play.scheduler.stored == [first]
    assert play.scheduler.outcome == Finish(False, play.scheduler.ended("SIGTERM"))


def test_rounds_are_announced_in_order_whichever_evaluation_ends_first() -> None:
    play = Play(config_of(**ROUND_ROBIN, run__rounds=2)).begin()
    without_evaluations(play, {0})
    assert not [said for said in play.said if isinstance(said, Announce)]
    play.go_on()
    assert [said for said in play.said if isinstance(said, Announce)] == [Announce(0), Announce(1)]
    assert [record.validation.samples for record in play.scheduler.history] == [12, 12]


def test_the_test_waits_for_all_rounds() -> None:
    play = Play(config_of(**ROUND_ROBIN, run__rounds=2)).begin()
    without_evaluations(play, {0, 1})
    assert not [job for job in opened(play, Evaluate) if job.part == "test"]
    assert play.go_on().scheduler.outcome == Finish(True, "the run is finished")


@unhurried
@given(plays(("parallel",)), st.randoms(use_true_random=False))
def test_parallel_rounds_begin_when_the_one_before_is_evaluated_and_the_one_before_that_over(
    play: Play, random: Random
) -> None:
    play.begin().go_on(random.choice)
    first: dict[int, int] = {}
    evaluated: dict[int, int] = {}
    for number, said in enumerate(play.said):
        match said:
            case Open(job=Turn(round=round_)):
                first.setdefault(round_, number)
            case Close(job=Evaluate(part="validation", round=round_)):
                evaluated[round_] = number
    announced = {said.round: number for number, said in enumerate(play.said) if isinstance(said, Announce)}
    assert all(evaluated.get(round_ - 1, -1) < number for round_, number in first.items())
    assert all(announced[round_ - 2] < number for round_, number in first.items() if round_ > 1)


# Measuring and planning

AUTO = {"model__cut": "auto", "train__micro_batches": "auto", "schedule__clients": 2}


def test_servers_measure_first_then_the_clients_one_at_a_time_while_the_others_are_quiet() -> None:
    play = Play(config_of(**AUTO), servers=2).begin()
    while play.scheduler.plans.deciding is None:
        assert [len(play.scheduler.work), play.scheduler.phase] == [1, "measuring"]
        play.go_on(events=1)
    assert [(job.server, job.client) for job in opened(play, Measure)] == [(0, -1), (1, -1), (0, 0), (1, 1)]
    assert play.scheduler.phase == "planning"


def test_without_quiet_all_servers_measure_at_once_and_then_all_clients() -> None:
    play = Play(config_of(**AUTO, plan__quiet=False), servers=2).begin()
    assert [(job.server, job.client) for job in opened(play, Measure)] == [(0, -1), (1, -1)]
    assert play.go_on(events=1).scheduler.phase == "measuring"
    play.go_on(events=1)
    assert [(job.server, job.client) for job in opened(play, Measure)][2:] == [(0, 0), (1, 1)]
    assert len(play.scheduler.work) == 2


def test_a_client_that_measures_with_another_server_meanwhile_is_not_asked_twice() -> None:
    play = Play(config_of(**AUTO, plan__quiet=False), servers=2).begin().go_on(events=2)
    play.tell(Lost("server", 0, "it was killed"))
    play.tell(play.joined(("server", 0)))
    assert [(job.server, job.client) for job in opened(play, Measure)][2:] == [(0, 0), (1, 1), (1, 0)]
    play.go_on()
    assert len(opened(play, Measure)) == 5
    assert play.scheduler.outcome == Finish(True, "the run is finished")


def test_round_robin_measures_with_the_server_that_it_trains_with() -> None:
    play = Play(config_of(**AUTO, schedule__policy="round_robin"), servers=2).begin().go_on()
    assert [job.server for job in opened(play, Measure) if job.client >= 0] == [0, 0]
    assert {turn.server for turn in turns_of(play)} == {0}


def test_a_measurement_is_granted_when_its_server_is_ready_and_over_when_the_client_is_done() -> None:
    play = Play(config_of(**AUTO)).begin().go_on(events=1)
    (measure,) = [job for job in opened(play, Measure) if job.client == 0]
    assert play.tell(Ready(measure.lease)) == [Grant(measure)]
    assert play.scheduler.jobs(("client", 0)) == [measure]
    close, *_ = play.tell(play.done(("client", 0), measure))
    assert close == Close(measure)


def test_the_situation_has_every_peers_profile_link_and_place() -> None:
    config = config_of(**AUTO, train__batch_size=8, plan__min_cut=1, plan__client_memory_mb=64.0)
    play = Play(config, equal_shards(config, train=20)).begin()
    while play.scheduler.plans.deciding is None:
        play.go_on(events=1)
    (asked,) = [said for said in play.said if isinstance(said, Decide)]
    situation = asked.situation
    assert [(site.client, site.server, site.steps, site.batch) for site in situation.clients] == [
        (0, 0, 3, 8),
        (1, 0, 3, 8),
    ]
    assert {site.profile for site in (*situation.clients, *situation.servers)} == {PROFILE}
    assert {site.link for site in situation.clients} == {LINK}
    limits = situation.limits
    assert (limits.cut, limits.micro_batches, limits.min_cut, limits.client_memory_mb) == ("", 0, "1", 64.0)
    assert limits.slots == 1
    assert (asked.round, asked.current) == (0, {})


def test_nothing_is_initialised_before_there_is_a_plan_and_turns_have_it() -> None:
    play = Play(config_of(**AUTO)).begin()
    while play.scheduler.plans.deciding is None:
        assert opened(play, Init) == []
        play.go_on(events=1)
    assert [type(event) for event in play.due()] == [Planned]
    plans = {0: Plan(cut="relu", micro_batches=2), 1: Plan(cut="pool", micro_batches=8, window=3)}
    (init,) = play.tell(Planned(0, plans, {0: 0.1, 1: 0.2}, "two plans"))
    assert isinstance(init.job, Init)
    play.go_on(events=4)
    assert {turn.client: turn.plan for turn in opened(play, Turn)} == plans
    assert (play.scheduler.plans.cut, play.scheduler.plans.predicted) == ("relu, pool", {0: 0.1, 1: 0.2})


def test_the_cut_is_said_as_auto_only_where_the_planner_chooses_it() -> None:
    waiting = Play(config_of(schedule__clients=2))
    waiting.tell(Started(1))
    assert waiting.scheduler.plans.cut == ""
    assert waiting.begin().scheduler.plans.cut == "relu"
    assert Play(config_of(**AUTO)).begin().scheduler.plans.cut == "auto"


def test_fixed_plans_are_measured_where_a_prediction_is_asked_for_and_stay_fixed() -> None:
    play = Play(config_of(plan__predict=True, schedule__clients=2, train__micro_batches=4)).begin()
    while play.scheduler.plans.deciding is None:
        play.go_on(events=1)
    fixed = Plan(cut="relu", micro_batches=4, window=4)
    assert play.scheduler.plans.deciding.current == {0: fixed, 1: fixed}
    limits = play.scheduler.plans.deciding.situation.limits
    assert (limits.cut, limits.micro_batches) == ("relu", 4)


@pytest.mark.parametrize("keys", [{}, {"plan__predict": True, "plan__file": "plan.json"}])
def test_nothing_is_measured_where_nobody_asks_for_it(keys: dict[str, object]) -> None:
    play = Play(config_of(**keys)).begin()
    assert isinstance(play.said[0].job, Init)


def test_an_earlier_runs_plans_are_used_from_their_rounds_on_and_nothing_is_measured() -> None:
    config = config_of(**AUTO, plan__file="plan.json", plan__predict=True, run__rounds=4)
    play = Play(config)
    play.tell(Started(1))
    first, later = Plan(cut="relu"), Plan(cut="pool", micro_batches=2)
    play.tell(Planned(0, {0: first, 1: first}))
    play.tell(Planned(2, {0: first, 1: later}))
    for peer in play.peers:
        play.tell(play.joined(peer))
    play.go_on()
    assert opened(play, Measure) == []
    assert not [said for said in play.said if isinstance(said, Decide)]
    used = [(turn.round, turn.client, turn.plan) for turn in opened(play, Turn)]
    assert used == [(r, c, later if r >= 2 and c else first) for r in range(4) for c in (0, 1)]


@pytest.mark.parametrize("policy", ["parallel", "round_robin"])
def test_a_round_is_evaluated_once_with_its_own_plans_also_beside_the_next_one(policy: str) -> None:
    config = config_of(**AUTO, plan__file="plan.json", plan__predict=True, run__rounds=3, schedule__policy=policy)
    play = Play(config)
    play.tell(Started(1))
    for round_, codec in enumerate(("raw", "half", "bf16")):
        plan = Plan(cut="relu", up=codec)
        play.tell(Planned(round_, {0: plan, 1: plan}))
    for peer in play.peers:
        play.tell(play.joined(peer))
    while play.scheduler.outcome is None:
        without_the_disk(play)
        play.go_on(events=1)
    used = [(e.round, e.client, e.plan.up) for e in opened(play, Evaluate) if e.part == "validation"]
    assert sorted(used) == [(r, c, codec) for r, codec in enumerate(("raw", "half", "bf16")) for c in (0, 1)]


def test_what_is_done_again_after_going_back_is_done_with_the_plans_of_its_round() -> None:
    config = config_of(
        **AUTO, plan__file="plan.json", plan__predict=True, run__rounds=2, run__commit_every=1,
        schedule__policy="round_robin",
    )  # fmt: skip
    play = Play(config, servers=2)
    play.tell(Started(1))
    for round_, codec in enumerate(("raw", "half")):
        plan = Plan(cut="relu", up=codec)
        play.tell(Planned(round_, {0: plan, 1: plan}))
    for peer in play.peers:
        play.tell(play.joined(peer))
    while play.scheduler.round == 0:
        stored = [event for event in play.due() if isinstance(event, Stored)]
        play.tell((stored or play.due())[0])
    without_the_disk(play)  # the next round begins beside the storing of the first
    assert play.scheduler.plan_of(0).up == "half"
    version = play.scheduler.base()
    play.tell(Lost("server", int(version.holder.partition(".")[2]), "killed"))
    assert (play.scheduler.round, play.scheduler.stage) == (0, 1)
    play.go_on()
    assert {(turn.round, turn.plan.up) for turn in turns_of(play)} == {(0, "raw"), (1, "half")}


@pytest.mark.parametrize("policy", ["parallel", "round_robin"])
def test_another_plan_is_asked_for_when_a_round_went_otherwise_and_used_from_the_next_round_on(policy: str) -> None:
    config = config_of(**AUTO, schedule__policy=policy, run__rounds=3, train__batch_size=4)
    play = Play(config, equal_shards(config, train=20)).begin()
    while len([said for said in play.said if isinstance(said, Decide)]) < 2:
        play.go_on(events=1)
    asked = play.scheduler.plans.deciding
    assert asked is not None
    assert (asked.round, asked.gain, asked.current) == (1, 0.1, play.scheduler.plans.current)
    assert asked.why.keys() == {0, 1}
    assert asked.situation != play.said
    while work := [event for event in play.due() if not isinstance(event, Planned)]:
        play.tell(work[0])
    assert {turn.round for turn in turns_of(play)} == {0}
    assert len(play.scheduler.history) == 1
    better = Plan(cut="relu", micro_batches=16)
    play.tell(Planned(1, {0: better, 1: better}, {0: 0.1, 1: 0.1}, "better"))
    assert {turn.plan for turn in opened(play, Turn) if turn.round == 1} == {better}


def test_plans_stay_where_none_is_better() -> None:
    config = config_of(**AUTO, run__rounds=2, train__batch_size=4)
    play = Play(config, equal_shards(config, train=20)).begin()
    while len([said for said in play.said if isinstance(said, Decide)]) < 2:
        play.go_on(events=1)
    before = play.scheduler.plans.current
    play.tell(Planned(1))
    assert play.go_on().scheduler.plans.current == before
    assert {turn.plan for turn in turns_of(play)} == set(before.values())


def test_no_plan_is_asked_for_after_the_last_round() -> None:
    config = config_of(**AUTO, run__rounds=1, train__batch_size=4)
    play = Play(config, equal_shards(config, train=20)).begin().go_on()
    assert len([said for said in play.said if isinstance(said, Decide)]) == 1


def test_fixed_plans_are_not_asked_for_again() -> None:
    config = config_of(plan__predict=True, run__rounds=3, train__batch_size=4)
    play = Play(config, equal_shards(config, train=20)).begin().go_on()
    assert not plans_itself(config)
    assert len([said for said in play.said if isinstance(said, Decide)]) == 1


@pytest.mark.parametrize(
    ("who", "lacking", "sentence"),
    [
        ("server", {"profile": None}, "server 0 measured itself and sent no profile"),
        ("client", {"profile": None}, "client 0 measured itself and sent no profile"),
        ("client", {"link": None}, "client 0 measured itself and sent nothing about its link"),
    ],
)
def test_a_measurement_that_is_none_ends_the_run(who: str, lacking: dict[str, None], sentence: str) -> None:
    play = Play(config_of(**AUTO)).begin()
    if who == "client":
        play.go_on(events=2)
    (event,) = [event for event in play.due() if isinstance(event, Done) and event.side == who]
    *_, finish = play.tell(msgspec.structs.replace(event, **lacking))
    assert finish == Finish(False, f"{sentence}. Nothing was stored yet: start the run again")


def test_only_the_newest_two_versions_are_kept() -> None:
    play = Play(config_of(**ROUND_ROBIN, run__rounds=3)).begin().go_on()
    versions = [said.ref.digest for said in play.said if isinstance(said, Store)]
    assert [said.digest for said in play.said if isinstance(said, Discard)] == versions[:-KEPT_VERSIONS]
    assert play.scheduler.stored == versions[-KEPT_VERSIONS:]


def test_versions_are_old_and_new_in_the_order_of_training_whichever_the_disk_finishes_first() -> None:
    play = Play(config_of(**ROUND_ROBIN, run__rounds=1, run__commit_every=1)).begin().go_on(events=2)
    while work := [event for event in play.due() if not isinstance(event, Stored)]:
        play.tell(work[0])
    *older, last = play.scheduler.storing
    assert len(older) == 2
    said = [instruction for digest in (last, *older) for instruction in play.tell(Stored(digest))]
    assert play.scheduler.stored == [older[-1], last]
    assert Discard(last) not in said


def test_a_version_is_kept_by_who_holds_it_until_it_is_stored_though_training_has_gone_on() -> None:
    play = Play(config_of(**ROUND_ROBIN, run__rounds=1, run__commit_every=1)).begin().go_on(events=2)
    while work := [event for event in play.due() if not isinstance(event, Stored)]:
        play.tell(work[0])
    waiting = list(play.scheduler.storing)
    assert set(waiting) <= set(play.scheduler.kept(("server", 0)))
    play.tell(Stored(waiting[0]))
    assert waiting[0] not in play.scheduler.kept(("server", 0))


def test_a_run_that_learns_nothing_never_discards_its_only_version() -> None:
    play = Play(config_of(**ROUND_ROBIN, run__rounds=3, run__commit_every=1), still=True).begin().go_on()
    assert not [said for said in play.said if isinstance(said, Discard)]
    assert len(play.scheduler.stored) == 1
    assert play.scheduler.outcome == Finish(True, "the run is finished")


def test_a_version_that_comes_back_while_it_is_the_oldest_is_not_discarded() -> None:
    config = config_of(schedule__policy="round_robin", schedule__clients=4, run__commit_every=1)
    play = Play(config).begin()
    learnt = iter(["a", "b", "c", "a", "e"])

    def named(event: object) -> object:
        """Let the versions be these, in order; the disk is busy with the last two at once."""
        if isinstance(event, Done) and isinstance(play.scheduler.work[event.lease].job, Init | Merge):
            return Done(event.lease, event.side, next(learnt), event.tally)
        return event

    while not {"c", "a"} <= play.scheduler.storing.keys():
        due = [event for event in play.due() if event not in (Stored("c"),)]
        play.tell(named(due[-1]))
    assert Discard("a") not in play.tell(Stored("c"))


# The end


def test_a_peer_that_says_that_nobody_can_go_on_ends_the_run_with_its_name_and_what_was_kept() -> None:
    play = Play(config_of(**ROUND_ROBIN, run__rounds=2)).begin().go_on(events=8)
    *closed, finish = play.tell(Lost("client", 2, "The loss became nan", fatal=True))
    assert [type(said) for said in closed] == [Close]
    kept = play.scheduler.stored[-1][:12]
    assert finish == Finish(
        False,
        "client 2 is gone: The loss became nan. The last version, "
        f"{kept}, is kept (0 of 2 rounds are done): `zsplit resume RUN` goes on with it",
    )


def test_a_run_that_ends_before_the_first_version_says_so() -> None:
    play = Play(config_of(**ROUND_ROBIN)).begin()
    finish = play.tell(Lost("server", 0, "No such model", fatal=True))[-1]
    assert finish == Finish(False, "server 0 is gone: No such model. Nothing was stored yet: start the run again")


def test_a_run_that_is_stopped_says_why() -> None:
    play = Play(config_of(**ROUND_ROBIN))
    play.tell(Started(1))
    assert play.tell(Stopped("Stopped by Ctrl-C")) == [
        Finish(False, "Stopped by Ctrl-C. Nothing was stored yet: start the run again")
    ]


def test_a_stranger_that_is_lost_changes_nothing() -> None:
    play = Play(config_of(**ROUND_ROBIN)).begin()
    assert play.tell(Lost("server", 5, "it left")) == []
    assert play.scheduler.outcome is None


def test_a_run_that_is_over_takes_in_nothing_more() -> None:
    play = Play(config_of(**ROUND_ROBIN)).begin().go_on()
    said = len(play.said)
    for entry in list(play.log):
        assert play.tell(entry.event) == []
    assert play.tell(Stopped("too late")) == []
    assert len(play.said) == said
    assert play.scheduler.outcome == Finish(True, "the run is finished")


def test_without_any_test_data_the_run_ends_with_its_last_round() -> None:
    config = config_of(**ROUND_ROBIN, run__rounds=1)
    play = Play(config, equal_shards(config, validation=0, test=0)).begin().go_on()
    assert play.scheduler.outcome == Finish(True, "the run is finished")
    assert opened(play, Evaluate) == []


# Leases


def test_a_report_for_a_lease_that_is_over_changes_nothing() -> None:
    play = Play(config_of(**ROUND_ROBIN)).begin().go_on(events=8)
    before = fingerprint(play.scheduler)[1:]
    for lease in (Lease(1, 1), Lease(1, 2), NO_SUCH_LEASE):
        assert play.tell(Done(lease, "server", "d", Tally())) == []
        assert play.tell(Ready(lease)) == []
    assert play.tell(Stored("d")) == []
    assert fingerprint(play.scheduler)[1:] == before


@unhurried
@given(plays(), st.randoms(use_true_random=False))
def test_leases_only_ever_grow_also_across_a_restart_and_open_ones_live_on(play: Play, random: Random) -> None:
    play.begin()
    while due := play.due():
        if random.random() < 0.1:
            before = list(play.scheduler.work)
            again = play.tell(Started(play.scheduler.epoch + 1))
            assert all(isinstance(said, Store | Decide) for said in again), "more is said again than what is lost"
            assert list(play.scheduler.work) == before
        play.tell(random.choice(due))
    leases = [said.job.lease for said in play.said if isinstance(said, Open)]
    assert all(one < other for one, other in pairwise(leases))
    assert play.scheduler.outcome == Finish(True, "the run is finished")


def test_a_new_life_of_the_broker_numbers_its_leases_anew() -> None:
    play = Play(config_of(**ROUND_ROBIN)).begin()
    play.tell(Started(2))
    play.go_on(events=2)
    assert [turn.lease for turn in opened(play, Turn)] == [Lease(2, 1)]


def test_the_first_report_of_a_side_is_the_one_that_counts() -> None:
    play = Play(config_of(**ROUND_ROBIN)).begin().go_on(events=3)
    (turn,) = turns_of(play)
    for digest in ("first", "second"):
        play.tell(Done(turn.lease, "client", digest, Tally(samples=3)))
    play.tell(Done(turn.lease, "server", "back", Tally()))
    (merge,) = opened(play, Merge)
    assert [share.front.digest for share in merge.inputs] == ["first"]


# One back for several clients


@unhurried
@given(plays(("parallel",)), st.randoms(use_true_random=False))
def test_turns_that_share_a_back_are_one_group_at_one_server(play: Play, random: Random) -> None:
    play.begin().go_on(random.choice)
    groups: dict[int, list[Turn]] = {}
    for turn in turns_of(play):
        assert (turn.group is not None) == shares_back(play.config)
        if turn.group is not None:
            groups.setdefault(turn.group.number, []).append(turn)
    for turns in groups.values():
        assert len({turn.server for turn in turns}) == 1
        assert {turn.group for turn in turns} == {turns[0].group}
        assert turns[0].group is not None
        assert sorted((t.client, t.first, t.count) for t in turns) == sorted(turns[0].group.shares)


@unhurried
@given(plays(("parallel",)), st.randoms(use_true_random=False))
def test_where_there_is_one_back_a_merge_gets_the_latest_once(play: Play, random: Random) -> None:
    play.begin().go_on(random.choice)
    replica = play.config.schedule.server_model == "replica"
    for merge in opened(play, Merge):
        backs = [contribution.back for contribution in merge.inputs if contribution.back is not None]
        assert len(backs) == (len(merge.inputs) if replica else 1)


def test_a_back_that_is_handed_on_is_where_the_next_turn_begins() -> None:
    keys = {"schedule__server_model": "shared", "schedule__shared_order": "turn", "run__rounds": 2}
    play = Play(config_of(schedule__clients=3, **keys)).begin().go_on()
    first, second, third, fourth = turns_of(play)[:4]
    done = {e.event.lease: e.event for e in play.log if isinstance(e.event, Done) and e.event.side == "server"}
    assert first.back is None
    assert second.back is not None
    assert (second.back.digest, second.base) == (done[first.lease].digest, first.base)
    assert third.back is not None
    assert third.back.digest == done[second.lease].digest
    assert fourth.back is None
    assert opened(play, Merge)[0].inputs[-1].back.digest == done[third.lease].digest


# Clients that do not wait


@unhurried
@given(plays(("async",)), st.randoms(use_true_random=False))
def test_every_client_has_its_turns_whatever_the_others_do(play: Play, random: Random) -> None:
    play.begin().go_on(random.choice)
    scheduler, config = play.scheduler, play.config
    assert scheduler.outcome == Finish(True, "the run is finished")
    rounds, clients = range(config.run.rounds), range(config.schedule.clients)
    assert Counter((t.client, t.round, t.count) for t in turns_of(play)) == Counter(
        (c, r, scheduler.steps(c)) for c in clients for r in rounds
    )
    assert [said.round for said in play.said if isinstance(said, Announce)] == list(rounds)
    merges = opened(play, Merge)
    assert len(merges) + scheduler.arrivals.discarded == len(rounds) * len(clients)
    assert sum(record.train.steps for record in scheduler.history) == sum(t.count for t in turns_of(play))
    assert_restored(play)


@unhurried
@given(plays(("async",)), st.randoms(use_true_random=False))
def test_a_result_is_mixed_in_by_its_staleness(play: Play, random: Random) -> None:
    play.begin().go_on(random.choice)
    schedule, begun, versions = play.config.schedule, {}, 0
    for said in play.said:
        match said:
            case Open(Turn() as turn):
                begun[turn.client] = versions
            case Close(Merge(inputs=(contribution,), share=share)):
                staleness = versions - begun[contribution.client]
                assert staleness <= schedule.max_staleness
                assert share == schedule.mixing * (staleness + 1) ** -schedule.mixing_power
                versions += 1
    assert versions == play.scheduler.arrivals.versions


# Early stopping


class Learning(Play):
    """Peers whose validation becomes better for a while: one more sample is right in each of the first rounds."""

    better = 3

    def tally(self, peer: Peer, job: object) -> Tally:
        tally = super().tally(peer, job)
        if isinstance(job, Evaluate):
            return msgspec.structs.replace(tally, top1=min(job.round, self.better))
        return tally


@pytest.mark.parametrize("policy", ["parallel", "round_robin", "async"])
def test_a_run_ends_when_validation_is_not_better_for_as_many_rounds_as_the_config_says(policy: str) -> None:
    config = config_of(schedule__policy=policy, schedule__clients=2, run__rounds=20, run__patience=2)
    play = Learning(config, equal_shards(config, validation=5)).begin().go_on()
    assert play.scheduler.outcome == Finish(True, "the run is finished")
    beside = {"parallel": 0, "round_robin": 1, "async": 2}[policy]  # rounds that may end before it is known
    assert len(play.scheduler.history) - (Learning.better + 1 + 2) in range(beside + 1)
    assert play.scheduler.stored[-1] == play.scheduler.history[-1].version
    assert play.scheduler.test.samples == 10
    assert_restored(play)
