"""Whatever is lost is done again, and what was done once counts once: the scheduler under any losses and restarts."""

from collections import Counter
from random import Random

import msgspec
from helpers import Play, configs, fingerprint, sizes_for, unhurried
from hypothesis import given
from hypothesis import strategies as st

from zsplit_broker.events import (
    Damaged,
    Event,
    Finish,
    Lost,
    Started,
    Stopped,
)
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


def undisturbed(play: Play) -> Scheduler:
    """Return how the run ends when nothing happens to it."""
    return Play(play.config, play.shards, len([p for p in play.peers if p[0] == "server"])).begin().go_on().scheduler


def lineage(scheduler: Scheduler) -> list[tuple[object, ...]]:
    """Return what a run came to, round by round: nothing of how long it took."""
    return [
        (r.round, r.version, r.train.steps, r.train.samples, r.train.loss_sum, r.validation.samples, r.clients.keys())
        for r in scheduler.history
    ]


@st.composite
def storms(draw: st.DrawFn, policies: tuple[str, ...] = ("round_robin", "parallel")) -> Storm:
    """Return a run that nobody has begun, and what is to happen to it. Its plan, if any, is made once."""
    config = draw(configs(policies))
    run = msgspec.structs.replace(config.run, rounds=draw(st.integers(1, 4)))
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
