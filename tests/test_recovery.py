"""Whatever is lost is done again, and what was done once counts once: the scheduler under any losses and restarts."""

from collections import Counter
from collections.abc import Callable
from random import Random

import msgspec
import pytest
from helpers import (
    Play,
    config_of,
    configs,
    equal_shards,
    fingerprint,
    lineage,
    sizes_for,
    undisturbed,
    unhurried,
)
from hypothesis import given
from hypothesis import strategies as st

from zsplit.wire.events import LogEvent
from zsplit.wire.messages import Evaluate, Job, Merge, Ref, Role, Turn
from zsplit_broker.bulletin import Bulletin
from zsplit_broker.events import (
    Damaged,
    Discard,
    Done,
    Draining,
    Event,
    Finish,
    Grant,
    Lost,
    Missed,
    Open,
    Ready,
    Started,
    Stopped,
    Store,
    Stored,
)
from zsplit_broker.router import Router
from zsplit_broker.scheduler import Scheduler, restore

FAULTS = ["lose", "lose", "lose", "restart", "stop", "damage"]


class Storm:
    """A run in which peers are lost and come back, and the broker is started again, between any two events."""

    def __init__(self, play: Play, random: Random, faults: int) -> None:
        self.play, self.random, self.faults = play, random, faults

    def go_on(self) -> Scheduler:
        """Go on to the end."""
        play = self.play
        for _ in range(20_000):
            if play.scheduler.outcome is not None and play.scheduler.outcome.ok:
                break
            if self.faults and self.random.random() < 0.1 and play.scheduler.phase != "waiting":
                self.faults -= 1
                self._fault(self.random.choice(FAULTS))
                continue
            absent = [peer for peer in play.peers if peer not in play.scheduler.peers]
            choices: list[Event] = [*play.due(), *(play.joined(peer) for peer in absent)]
            play.tell(self.random.choice(choices))
        return play.scheduler

    def _fault(self, kind: str) -> None:
        play = self.play
        match kind:
            case "lose":
                role, index = self.random.choice(play.peers)
                play.tell(Lost(role, index, "it was killed"))
            case "restart":
                self._take_up()
            case "stop":
                play.tell(Stopped("stopped by SIGINT"))
                self._take_up()
            case "damage" if len(play.scheduler.stored) > 1:
                play.tell(Damaged(self.random.choice(play.scheduler.stored), "its bytes are others"))

    def _take_up(self) -> None:
        """A new broker knows what the journal says, and nothing else."""
        play = self.play
        again = restore(play.config, [msgspec.json.encode(entry) for entry in play.log])
        assert fingerprint(again) == fingerprint(play.scheduler)
        play.scheduler = again
        play.tell(Started(again.epoch + 1))


@st.composite
def storms(draw: st.DrawFn, policies: tuple[str, ...] = ("round_robin", "parallel")) -> Storm:
    """Return a run that nobody has begun, and what is to happen to it. Its plan, if any, is made once."""
    config = draw(configs(policies))
    stops_early = config.run.eval_every and config.schedule.policy != "async"
    patience = draw(st.sampled_from([0, 1])) if stops_early else 0
    run = msgspec.structs.replace(config.run, rounds=draw(st.integers(1, 4)), patience=patience)
    fixed = msgspec.structs.replace(config.train, micro_batches=1)
    model = msgspec.structs.replace(config.model, cut="")
    config = msgspec.structs.replace(config, run=run, train=fixed, model=model)
    play = Play(config, draw(sizes_for(config)), draw(st.integers(1, 3)))
    return Storm(play, draw(st.randoms(use_true_random=False)), draw(st.integers(0, 12)))


@unhurried
@given(storms())
def test_a_run_in_a_storm_ends_as_one_in_calm_weather(storm: Storm) -> None:
    storm.play.begin()
    scheduler = storm.go_on()
    calm = undisturbed(storm.play)
    assert scheduler.outcome == Finish(True, "the run is finished")
    assert lineage(scheduler) == lineage(calm)
    assert scheduler.stored[-1] == calm.stored[-1]
    assert scheduler.test.samples == calm.test.samples
    assert {name: t.samples for name, t in scheduler.books.tests.items()} == {
        name: t.samples for name, t in calm.books.tests.items()
    }


@unhurried
@given(storms(("async",)))
def test_clients_that_do_not_wait_for_each_other_all_get_their_turns_in_a_storm(storm: Storm) -> None:
    storm.play.begin()
    scheduler, config = storm.go_on(), storm.play.config
    assert scheduler.outcome == Finish(True, "the run is finished")
    turns = Counter(client for record in scheduler.history for client in record.clients)
    assert sum(turns.values()) <= config.run.rounds * config.schedule.clients
    steps = sum(record.train.steps for record in scheduler.history)
    assert steps == config.run.rounds * sum(scheduler.steps(client) for client in range(config.schedule.clients))


# Clients that do not come back


def lost(play: Play, client: int, until: float) -> Missed | None:
    """Lose a client, let that much time pass in which it does not come back, and return what is decided then."""
    play.tell(Lost("client", client, "it was killed"))
    return play.scheduler.overdue(play.log[-1].at + until)


def turns_of(play: Play) -> list[Turn]:
    """Return the turns that were granted, in order."""
    return [said.job for said in play.said if isinstance(said, Grant) and isinstance(said.job, Turn)]


def merges_of(play: Play) -> list[Merge]:
    return [said.job for said in play.said if isinstance(said, Open) and isinstance(said.job, Merge)]


def without(play: Play, client: int) -> Play:
    """Let everything happen that does not need this client, until nothing is left."""
    play.peers.remove(("client", client))
    return play.go_on()


WAITING = {"schedule__rejoin_timeout": 60.0, "schedule__clients": 3, "run__rounds": 3}


@pytest.mark.parametrize("model", ["replica", "shared", "fused"])
def test_a_round_closes_without_a_client_that_does_not_come_back_and_it_is_welcome_at_the_next(model: str) -> None:
    play = Play(config_of(**WAITING, schedule__server_model=model)).begin().go_on(events=2)
    assert lost(play, 1, 60.0) is None or model != "replica", "the others are at work still"
    without(play, 1)
    assert play.scheduler.waits_for() == "the run waits for client 1"
    gone = play.scheduler.gone["client", 1]
    assert play.scheduler.overdue(gone + 59.0) is None
    missed = play.scheduler.overdue(gone + 60.0)
    assert missed == Missed(1, "client 1 did not come back within 60 s (schedule.rejoin_timeout)")
    play.tell(missed)
    while play.scheduler.round == 0:
        play.go_on(events=1)
    assert [[c.client for c in merge.inputs] for merge in merges_of(play)] == [[0, 2]]
    play.peers.append(("client", 1))
    play.tell(play.joined(("client", 1)))
    play.go_on()
    assert play.scheduler.outcome == Finish(True, "the run is finished")
    assert [sorted(record.clients) for record in play.scheduler.history] == [[0, 2], [0, 1, 2], [0, 1, 2]]


def test_one_that_stays_away_is_not_waited_for_again() -> None:
    play = Play(config_of(**WAITING)).begin().go_on(events=2)
    play.tell(Lost("client", 1, "it was killed"))
    without(play, 1)
    play.tell(Missed(1, "it did not come back"))
    play.go_on()
    assert play.scheduler.outcome == Finish(True, "the run is finished")
    assert [sorted(record.clients) for record in play.scheduler.history] == [[0, 2]] * 3
    assert play.scheduler.test.samples == 10, "those who are here are tested"


def test_in_turn_the_next_one_takes_the_turn_of_one_that_is_gone_whose_own_comes_later() -> None:
    play = Play(config_of(**WAITING, schedule__policy="round_robin")).begin().go_on(events=2)
    missed = lost(play, 0, 60.0)
    assert missed is not None
    play.tell(missed)
    without_it = [share.client for stage in play.scheduler.stages for share in stage]
    assert without_it == [1, 2, 0]
    play.tell(play.joined(("client", 0)))
    play.go_on()
    assert [turn.client for turn in turns_of(play)][:4] == [1, 2, 0, 0]
    assert [sorted(record.clients) for record in play.scheduler.history] == [[0, 1, 2]] * 3


def test_in_turn_one_that_is_not_back_for_its_later_turn_either_misses_the_round() -> None:
    play = Play(config_of(**WAITING, schedule__policy="round_robin")).begin().go_on(events=2)
    first = lost(play, 0, 60.0)
    assert first is not None
    play.tell(first)
    without(play, 0)
    assert play.scheduler.waits_for() == "the run waits for client 0"
    again = play.scheduler.overdue(play.log[-1].at + 60.0)
    assert again is not None
    play.tell(again)
    play.go_on()
    assert play.scheduler.outcome == Finish(True, "the run is finished")
    assert [sorted(record.clients) for record in play.scheduler.history] == [[1, 2]] * 3


def test_with_fewer_than_min_clients_a_round_waits_and_says_for_whom() -> None:
    play = Play(config_of(**WAITING, schedule__min_clients=3)).begin().go_on(events=2)
    play.tell(Lost("client", 2, "it was killed"))
    without(play, 2)
    assert play.scheduler.overdue(1e9) is None
    assert play.scheduler.waits_for() == "the run waits for client 2"
    play.peers.append(("client", 2))
    play.tell(play.joined(("client", 2)))
    assert play.go_on().scheduler.outcome == Finish(True, "the run is finished")


def test_a_round_needs_min_clients_to_begin() -> None:
    play = Play(config_of(**WAITING, schedule__min_clients=2)).begin().go_on(events=2)
    for client in (1, 2):
        play.tell(Lost("client", client, "it was killed"))
        play.tell(Missed(client, "it did not come back"))
    play.peers = [("server", 0), ("client", 0)]
    play.go_on()
    sentence = "the run needs more clients (schedule.min_clients = 2, and 1 here): start them"
    assert play.scheduler.waits_for() == sentence
    router = Router(play.config, play.scheduler, "r", (1, 2))
    bulletin = Bulletin(play.scheduler, router, "r", "out")
    said = [event for _ in range(3) for event in bulletin.state(0.0) if isinstance(event, LogEvent)]
    assert [event.text for event in said] == [sentence], "it is said once"
    play.peers.append(("client", 1))
    play.tell(play.joined(("client", 1)))
    assert play.go_on().scheduler.outcome == Finish(True, "the run is finished")


@pytest.mark.parametrize("policy", ["parallel", "round_robin"])
def test_a_straggler_is_closed_out_when_the_time_of_the_round_is_up(policy: str) -> None:
    play = Play(config_of(**WAITING, schedule__policy=policy, schedule__round_timeout=100.0)).begin().go_on(events=2)
    hung = 0
    while work := [event for event in play.due() if not is_done_by(event, hung, play)]:
        play.tell(work[0])
    began = play.scheduler.books.rounds[0].began
    assert play.scheduler.overdue(began + 99.0) is None
    missed = play.scheduler.overdue(began + 200.0)
    assert missed == Missed(0, "client 0 did not finish within 100 s (schedule.round_timeout)")
    play.tell(missed)
    assert not any(isinstance(work.job, Turn) and work.job.client == hung for work in play.scheduler.work.values())
    play.go_on()
    assert play.scheduler.outcome == Finish(True, "the run is finished")
    first, *later = (sorted(record.clients) for record in play.scheduler.history)
    assert first == ([1, 2] if policy == "parallel" else [0, 1, 2])
    assert later == [[0, 1, 2]] * 2


@pytest.mark.parametrize("model", ["shared", "fused"])
def test_where_all_wait_for_one_that_is_the_straggler(model: str) -> None:
    keys = WAITING | {"schedule__server_model": model, "schedule__round_timeout": 100.0, "schedule__min_clients": 2}
    play = Play(config_of(**keys)).begin()
    while len(turns_of(play)) < 3:
        play.go_on(events=1)
    late = play.scheduler.stage_began + 100.0
    slow = Missed(1, "client 1 did not finish within 100 s (schedule.round_timeout)")
    assert play.scheduler.overdue(late, at_work={0: 0.3, 1: 0.9, 2: 0.4}) == slow
    assert play.scheduler.overdue(late - 1.0, at_work={0: 0.3, 1: 0.9, 2: 0.4}) is None
    assert play.scheduler.overdue(late, at_work={0: 0.3, 1: 0.4, 2: 0.4}) is None, "the server is slow"
    assert play.scheduler.overdue(late, at_work={0: 0.9, 1: 0.9, 2: 0.9}) is None, "all are slow"
    assert play.scheduler.overdue(late, at_work={0: 0.3, 1: 0.9, 2: 0.9}) is None, "two are needed"
    play.tell(Missed(1, "it is slow"))
    began = play.scheduler.stage_began
    assert play.scheduler.overdue(began + 99.0, at_work={0: 0.9}) is None, "all begin anew, and so does their time"
    play.go_on()
    assert play.scheduler.outcome == Finish(True, "the run is finished")
    assert [sorted(record.clients) for record in play.scheduler.history] == [[0, 2], [0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("model", ["shared", "fused"])
@pytest.mark.parametrize("role", ["client", "server"])
def test_turns_that_begin_anew_together_have_all_their_time(model: str, role: Role) -> None:
    keys = WAITING | {"schedule__server_model": model, "schedule__round_timeout": 100.0}
    play = Play(config_of(**keys)).begin()
    while len(turns_of(play)) < 3:
        play.go_on(events=1)
    play.tell(Lost(role, 0, "it was killed"))
    for _ in range(90):
        play.tell(play.joined(("client", 1)))
    play.tell(play.joined((role, 0)))
    play.go_on(events=1)
    began = play.log[-1].at
    assert play.scheduler.overdue(began + 90.0, at_work={0: 0.9}) is None
    assert play.scheduler.overdue(began + 100.0, at_work={0: 0.9}) is not None


def test_where_one_back_is_handed_on_each_turn_has_all_the_time() -> None:
    keys = WAITING | {"schedule__server_model": "shared", "schedule__shared_order": "turn"}
    play = Play(config_of(**keys, schedule__round_timeout=40.0)).begin()
    while [turn.client for turn in turns_of(play)][-1:] != [1]:
        play.go_on(events=1)
    began = play.scheduler.stage_began
    assert began > play.scheduler.books.rounds[0].began
    assert play.scheduler.overdue(began + 39.0) is None
    assert play.scheduler.overdue(began + 40.0) == Missed(
        1, "client 1 did not finish within 40 s (schedule.round_timeout)"
    )


def is_done_by(event: Event, client: int, play: Play) -> bool:
    """Whether an event is the end of a client's own side of a turn."""
    return isinstance(event, Done) and event.side == "client" and play.scheduler.work[event.lease].job.client == client


# Going back and draining


def test_when_all_servers_are_gone_the_run_waits_says_so_and_goes_on_from_the_disk() -> None:
    play = Play(config_of(**WAITING)).begin().go_on(events=2)
    version = play.scheduler.base().digest
    play.tell(Lost("server", 0, "it was killed"))
    assert play.due() == []
    assert play.scheduler.waits_for() == "the run waits for a server"
    assert play.scheduler.overdue(1e9) is None
    said = play.tell(play.joined(("server", 0)))
    bases = {one.job.base for one in said if isinstance(one, Open)}
    assert bases == {Ref(digest=version, holder="broker")}
    assert play.go_on().scheduler.outcome == Finish(True, "the run is finished")


def test_the_turns_of_a_server_that_is_gone_are_granted_again_on_those_that_remain() -> None:
    play = Play(config_of(**WAITING), servers=2).begin().go_on(events=2)
    with_it = [turn.client for turn in play.scheduler.jobs(("server", 1)) if isinstance(turn, Turn)]
    said = play.tell(Lost("server", 1, "it was killed"))
    again = [one.job for one in said if isinstance(one, Open)]
    assert [(turn.client, turn.server) for turn in again] == [(client, 0) for client in with_it]


def test_a_damaged_version_is_left_for_the_one_before_it() -> None:
    play = Play(config_of(**WAITING)).begin()
    while len(play.scheduler.history) < 2:
        play.go_on(events=1)
    newest, calm = play.scheduler.stored[-1], undisturbed(play)
    play.tell(Stopped("stopped by SIGINT"))
    play.tell(Started(2))
    assert len(play.scheduler.history) == 2
    play.tell(Damaged(newest, "its bytes are others"))
    assert [record.round for record in play.scheduler.history] == [0]
    assert play.scheduler.version == Ref(digest=play.scheduler.stored[-1], holder="broker")
    for peer in play.peers:
        play.tell(play.joined(peer))
    assert lineage(play.go_on().scheduler) == lineage(calm)


def putting_off(play: Play, kind: type[Job | Stored]) -> Callable[[list[Event]], Event]:
    """Return how to choose the first event that is due, one of this kind only where there is no other."""

    def is_put_off(event: Event) -> bool:
        of_a_job = isinstance(event, Ready | Done)
        return isinstance(play.scheduler.work[event.lease].job if of_a_job else event, kind)

    return lambda due: min(due, key=is_put_off)


@pytest.mark.parametrize("late", [Stored, Evaluate])
@pytest.mark.parametrize("shape", [{}, {"run__commit_every": 1}, {"schedule__policy": "parallel"}], ids=str)
def test_a_version_that_is_damaged_at_any_time_costs_the_run_nothing_but_time(
    shape: dict[str, object], late: type[Job | Stored]
) -> None:
    config = config_of(**WAITING | {"schedule__policy": "round_robin"} | shape)
    calm = undisturbed(Play(config))

    def until(point: int) -> Play:
        play = Play(config).begin()
        play.go_on(putting_off(play, Evaluate), events=point)
        return play

    point = anew = 0
    while (now := until(point).scheduler).outcome is None:
        for digest in now.stored if len(now.stored) > 1 else []:
            play = until(point)
            play.tell(Started(2))
            said = play.tell(Damaged(digest, "its bytes are others"))
            anew += any(isinstance(each, Store) for each in said)
            play.go_on(putting_off(play, late))
            assert play.scheduler.outcome == Finish(True, "the run is finished")
            assert lineage(play.scheduler) == lineage(calm)
            assert play.scheduler.stored[-1] == calm.stored[-1]
        point += 1
    assert anew > 20, "who has it still is asked for it"


@pytest.mark.parametrize("policy", ["parallel", "round_robin", "async"])
def test_draining_ends_the_run_when_the_version_of_the_round_is_stored(policy: str) -> None:
    reset = {"schedule__optimizer_state": "reset"} if policy == "async" else {}
    play = Play(config_of(**WAITING, schedule__policy=policy, **reset)).begin().go_on(events=4)
    play.tell(Draining("stopped by SIGTERM"))
    assert play.scheduler.outcome is None
    play.go_on()
    outcome = play.scheduler.outcome
    assert outcome is not None
    assert not outcome.ok
    assert outcome.sentence.startswith("stopped by SIGTERM. The last version, ")
    assert "(1 of 3 rounds are done): `zsplit resume RUN` goes on with it" in outcome.sentence
    play.tell(Started(2))
    for peer in play.peers:
        play.tell(play.joined(peer))
    assert play.go_on().scheduler.outcome == Finish(True, "the run is finished")


def test_draining_waits_for_a_version_that_is_stored_again() -> None:
    play = Play(config_of(**WAITING, schedule__min_clients=3)).begin().go_on(events=2)
    play.tell(Lost("client", 1, "it was killed"))
    play.tell(Missed(1, "it did not come back"))
    without(play, 1)
    assert play.scheduler.waits_for().startswith("the run needs more clients")
    version = play.scheduler.base()
    play.tell(Started(2))
    assert play.tell(Damaged(version.digest, "its bytes are others")) == [Discard(version.digest), Store(version)]
    assert play.tell(Draining("stopped by SIGTERM")) == []
    (finish,) = play.tell(Stored(version.digest))
    assert isinstance(finish, Finish)
    assert finish.sentence.startswith(f"stopped by SIGTERM. The last version, {version.digest[:12]}, is kept (1 of 3")


def test_draining_before_there_is_a_version_ends_the_run_at_once() -> None:
    play = Play(config_of(**WAITING)).begin()
    play.tell(Draining("stopped by SIGTERM"))
    sentence = "stopped by SIGTERM. Nothing was stored yet: start the run again"
    assert play.scheduler.outcome == Finish(False, sentence)


def test_a_client_that_dies_after_the_broker_was_started_again_is_closed_out_too() -> None:
    play = Play(config_of(**WAITING)).begin().go_on(events=2)
    play.tell(Started(2))
    play.tell(Lost("client", 1, "it was killed"))
    without(play, 1)
    missed = play.scheduler.overdue(play.log[-1].at + 60.0)
    assert missed == Missed(1, "client 1 did not come back within 60 s (schedule.rejoin_timeout)")


def test_time_in_which_the_broker_itself_was_stopped_is_not_waited() -> None:
    play = Play(config_of(**WAITING)).begin().go_on(events=2)
    play.tell(Lost("client", 1, "it was killed"))
    without(play, 1)
    woken = play.log[-1].at + 3600.0
    assert play.scheduler.overdue(woken, since=woken) is None
    assert play.scheduler.overdue(woken + 59.0, since=woken) is None
    assert play.scheduler.overdue(woken + 60.0, since=woken) is not None


def test_drawn_clients_that_are_slow_are_not_closed_out_for_those_who_were_not_drawn() -> None:
    keys = WAITING | {"schedule__clients": 4, "schedule__clients_per_round": 2, "schedule__round_timeout": 10.0}
    play = Play(config_of(**keys)).begin().go_on(events=2)
    assert play.scheduler.overdue(1e6) is None


def test_a_version_that_was_found_on_the_disk_and_is_damaged_is_pulled_from_its_holder() -> None:
    play = Play(config_of(**WAITING)).begin().go_on(events=1)
    (ref,) = play.scheduler.storing.values()
    assert play.tell(Damaged(ref.digest, "its bytes are others")) == [Store(ref)]


def test_a_broker_that_takes_a_run_up_asks_again_for_what_was_on_its_way() -> None:
    play = Play(config_of(**WAITING)).begin().go_on(events=1)
    (ref,) = play.scheduler.storing.values()
    assert play.tell(Started(2)) == [Store(ref)]


def test_a_run_that_was_stopped_while_it_waited_waits_again() -> None:
    play = Play(config_of(**WAITING))
    play.tell(Started(1))
    play.tell(play.joined(("client", 0)))
    play.tell(Stopped("stopped by SIGINT"))
    play.tell(Started(2))
    assert play.scheduler.phase == "waiting"
    assert play.scheduler.missing() == ["client 0", "client 1", "client 2", "a server"]


@st.composite
def thinning(draw: st.DrawFn) -> tuple[Storm, list[int]]:
    """Return a storm, and the clients that never come back once they are lost; one always does."""
    storm = draw(storms())
    clients = list(range(storm.play.config.schedule.clients))
    return storm, draw(st.lists(st.sampled_from(clients[1:] or clients), max_size=3)) if clients[1:] else []


@unhurried
@given(thinning())
def test_a_run_ends_whoever_stays_away(of: tuple[Storm, list[int]]) -> None:
    storm, fickle = of
    play = storm.play.begin()
    for client in fickle:
        play.go_on(storm.random.choice, storm.random.randrange(20))
        if play.scheduler.phase in ("waiting", "finished"):
            break
        play.tell(Lost("client", client, "it was killed"))
        if ("client", client) in play.peers:
            play.peers.remove(("client", client))
    for _ in range(2000):
        play.go_on(storm.random.choice)
        missed = play.scheduler.overdue(1e9)
        if play.scheduler.outcome is not None or missed is None:
            break
        play.tell(missed)
    assert play.scheduler.outcome == Finish(True, "the run is finished"), play.scheduler.waits_for()
    again = restore(play.config, [msgspec.json.encode(entry) for entry in play.log])
    assert fingerprint(again) == fingerprint(play.scheduler)


# Elastic runs


@pytest.mark.parametrize("policy", ["parallel", "round_robin", "async"])
def test_an_elastic_run_begins_with_few_and_goes_on_with_whoever_joins(policy: str) -> None:
    reset = {"schedule__optimizer_state": "reset"} if policy == "async" else {}
    longer = WAITING | {"run__rounds": 5, "run__eval_every": 1}
    config = config_of(**longer, schedule__policy=policy, schedule__elastic=True, **reset)
    play = Play(config, equal_shards(config) + equal_shards(config)[:1])
    play.tell(Started(1))
    play.peers = [("server", 0), ("client", 1)]
    assert play.scheduler.missing() == ["a client", "a server"]
    for peer in play.peers:
        play.tell(play.joined(peer))
    while len(play.scheduler.history) < 1:
        play.go_on(events=1)
    for late in (("client", 3), ("client", 0)):
        play.peers.append(late)
        play.tell(play.joined(late))
    play.go_on()
    assert play.scheduler.outcome == Finish(True, "the run is finished")
    took_part = [sorted(record.clients) for record in play.scheduler.history]
    assert took_part[0] == [1]
    assert {client for clients in took_part for client in clients} == {0, 1, 3}
    if policy != "async":
        assert took_part[-1] == [0, 1, 3]
    assert play.scheduler.history[-1].validation.samples == 12
