"""Scheduler, router and journal together, as the broker's shell puts them together, under whatever can happen to them.

Peers know nothing but what the router tells them. They are killed, fall silent, come back and talk over beats that
are lost, doubled and late; the broker is killed before and after its journal's line, with a torn line behind it,
stopped, drained and started again from what the journal says. At the end everybody behaves, and the run has come to
what it comes to when nothing happens.
"""

from collections import Counter
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
from desk import RUN, Desk, Member
from helpers import Play, configs, fingerprint, flat, lineage, sizes_for, undisturbed, unhurried
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zsplit.config import Config
from zsplit.wire.messages import Attach, Beat, Held, Job, Lease, Orders, Prepared, Ref, Role, Turn, Welcome
from zsplit_broker.events import Damaged, Done, Draining, Entry, Event, Finish, Missed, Ready, Started, Stopped, Stored
from zsplit_broker.journal import JOURNAL, Journal
from zsplit_broker.relay import KINDS
from zsplit_broker.router import Router
from zsplit_broker.scheduler import restore
from zsplit_broker.work import Peer, client_of, refs_of

TORN = [b"", b"9", b'61 0badc0de {"at":3.0,"ev', b"\x00" * 7, b"900 0badc0de {" + b"x" * 800]
"""What a journal may end with whose broker was killed while it wrote."""


class Shell(Desk):
    """A desk with a journal in a folder: what is not in it has not happened."""

    def __init__(self, folder: Path, shards: list[Prepared], config: Config) -> None:
        self.folder = folder
        self.journal = Journal.open(folder)
        self.forgiven = 0.0
        super().__init__(shards, **flat(config))

    def take(self, events: list[Event]) -> None:
        """Write the news down, then let the scheduler follow from it. When a run is over nothing is news."""
        if events and (self.scheduler.outcome is None or isinstance(events[0], Started)):
            self._write(events)
            super().take(events)

    def _write(self, events: list[Event]) -> None:
        self.journal.append([msgspec.json.encode(Entry(self.now, event)) for event in events])

    def be_killed(self, torn: bytes = b"", unfollowed: list[Event] | None = None) -> None:
        """Kill the broker, and start it again. What is `unfollowed` is in the journal, and nobody was told."""
        if unfollowed and self.scheduler.outcome is None:
            self._write(unfollowed)
            for event in unfollowed:
                self.log.append(event)
                self.scheduler.handle(Entry(self.now, event))
        self.journal.close()
        with (self.folder / JOURNAL).open("ab") as file:
            file.write(torn)
        self.journal = Journal.open(self.folder)
        again = restore(self.config, self.journal.entries)
        assert fingerprint(again) == fingerprint(self.scheduler), "a restarted core is another than one that never died"
        self.scheduler = again
        self.router = Router(self.config, again, RUN, (5758, 5759), self.router._new_token)
        self.stores, self.asked, self.forgiven = [], [], self.now
        self.take([Started(again.epoch + 1)])


class Actor:
    """A peer that knows nothing but what it is told; `play` says what its work would come to."""

    def __init__(self, shell: Shell, peer: Peer, play: Play) -> None:
        self.shell, self.peer, self.play = shell, peer, play
        self.member: Member | None = None
        self.lives = 0
        self.orders = Orders(revision=0)
        self.held: dict[Lease, Held] = {}
        self.states: set[str] = set()

    @property
    def role(self) -> Role:
        return self.peer[0]

    def be_killed(self, seen: bool) -> None:
        """Lose everything; the broker may have `seen` the connection close."""
        if self.member is not None and seen:
            self.shell.router.unreachable(self.member.control)
        self.lives, self.member, self.orders, self.held, self.states = (
            self.lives + 1,
            None,
            Orders(revision=0),
            {},
            set(),
        )

    def is_in(self) -> bool:
        """Whether the broker knows this process, which says hello if it does not."""
        if self.member is not None and self.shell.router.session(self.member.token) is not None:
            return True
        control, data = self.shell.routing_id(), self.shell.routing_id()
        answer = self.shell.hello(*self.peer, f"{self.peer} {self.lives}", control=control)
        if not isinstance(answer, Welcome):
            return False
        self.member = Member(*self.peer, answer.session, control, data)
        self.shell.router.relay.route(data, Attach(RUN, answer.session), 0)
        self.orders = msgspec.structs.replace(self.orders, revision=0)
        return True

    def says(self) -> Beat:
        """Return what it would say now."""
        assert self.member is not None
        return Beat(
            session=self.member.token,
            sent=self.shell.now,
            revision=self.orders.revision,
            held=tuple(self.held.values()),
            have=tuple(self.states),
            prepared=self.shell.prepared(self.member),
        )

    def beat(self, answered: bool = True, times: int = 1) -> None:
        """Say what it holds, so many times; obey the answers, the last ones last."""
        if not self.is_in():
            return
        member = self.member
        assert member is not None
        answers = []
        for _ in range(times):
            self.shell.take(self.shell.router.control(self.says(), member.control, self.shell.now))
            if self.shell.router.session(member.token) is not None:
                answers.append(self.shell.orders(member))
        for orders in [*answers, *answers[:-1]] if answered else []:
            self._obey(orders)

    def _obey(self, orders: Orders) -> None:
        if orders.revision > self.orders.revision:
            self.orders = orders
            leases = {job.lease for job in orders.jobs}
            self.held = {lease: held for lease, held in self.held.items() if lease in leases}
            needed = {ref.digest for job in orders.jobs for ref in refs_of(job)}
            self.states &= {*orders.keep, *needed, *(held.digest for held in self.held.values())}

    def _pull(self, refs: list[Ref], actors: dict[str, "Actor"]) -> bool:
        """Fetch states where they are: at their holder, or on the disk. Return whether they are all here."""
        for ref in refs:
            holder = actors.get(ref.holder)
            if ref.digest in self.shell.scheduler.stored or (holder is not None and ref.digest in holder.states):
                self.states.add(ref.digest)
        return self.states >= {ref.digest for ref in refs}

    def work(self, actors: dict[str, "Actor"]) -> None:
        """Bring every job a step further. A server's side of a turn is done when its client's is."""
        for job in self.orders.jobs:
            if not self._pull(list(refs_of(job)), actors):
                continue
            state = self.held[job.lease].state if job.lease in self.held else ""
            if self.role == "client" or client_of(job) is None:
                self._hold(job, "done" if state else "opening")
            elif not state:
                self._hold(job, "ready")
            elif (
                state != "done"
                and isinstance(job, Turn)
                and (theirs := actors[f"client.{job.client}"].held.get(job.lease))
            ):
                self._hold(job, "done" if theirs.state == "done" else "running")

    def _hold(self, job: Job, state: Any) -> None:
        held = Held(lease=job.lease, state=state)
        if state == "done":
            done = self.play.done(self.peer, job)
            held = Held(done.lease, state, 0, done.digest, done.tally, done.profile, done.link)
            self.states.add(done.digest)
        self.held[job.lease] = held


def is_of(peer: Peer, job: Job) -> bool:
    """Whether a job is one of this peer's."""
    return peer in (("server", job.server), ("client", client_of(job)))


class Core(RuleBasedStateMachine):
    """A run in which anything happens between any two messages."""

    shell: Shell

    @initialize(data=st.data(), policy=st.sampled_from(["round_robin", "parallel", "async"]), servers=st.integers(1, 2))
    def begin(self, data: st.DataObject, policy: str, servers: int) -> None:
        config = data.draw(configs((policy,)))
        patience = data.draw(st.sampled_from([0.0, 20.0]))
        # A plan that is made anew, or a cut that is measured, may differ when it is asked for at another time.
        config = msgspec.structs.replace(
            config,
            train=msgspec.structs.replace(config.train, micro_batches=1),
            model=msgspec.structs.replace(config.model, cut=""),
            schedule=msgspec.structs.replace(config.schedule, rejoin_timeout=patience, round_timeout=patience),
        )
        shards = data.draw(sizes_for(config))
        self.folder = TemporaryDirectory()
        self.shell = Shell(Path(self.folder.name), shards, config)
        self.play = Play(config, shards, servers)
        self.actors = [Actor(self.shell, peer, self.play) for peer in self.play.peers]
        self.named = {f"{actor.peer[0]}.{actor.peer[1]}": actor for actor in self.actors}
        self.leases: dict[Lease, Job] = {}

    def actor(self, number: int) -> Actor:
        return self.actors[number % len(self.actors)]

    # Peers

    @rule(count=st.integers(1, 40), random=st.randoms(use_true_random=False))
    def all_goes_well(self, count: int, random: Random) -> None:
        for _ in range(count):
            actor = random.choice(self.actors)
            actor.beat()
            actor.work(self.named)
            self.follow()
            if random.random() < 0.3:
                self.store()
            self.shell.planned()

    @rule(number=st.integers(0, 9), answered=st.booleans(), times=st.integers(1, 2))
    def beat(self, number: int, answered: bool, times: int) -> None:
        self.actor(number).beat(answered, times)

    @rule(number=st.integers(0, 9))
    def work(self, number: int) -> None:
        self.actor(number).work(self.named)

    @rule(number=st.integers(0, 9), seen=st.booleans())
    def kill_a_peer(self, number: int, seen: bool) -> None:
        self.actor(number).be_killed(seen)

    @rule(halves=st.integers(1, 30), silent=st.sets(st.integers(0, 9)))
    def let_time_pass(self, halves: int, silent: set[int]) -> None:
        """All others beat meanwhile."""
        for _ in range(halves):
            self.shell.now += self.shell.config.link.beat_seconds / 2
            for number, actor in enumerate(self.actors):
                if number not in silent:
                    actor.beat()
            self.shell.take(self.shell.router.tick(self.shell.now))
            at_work = self.shell.router.relay.at_work()
            missed = self.shell.scheduler.overdue(self.shell.now, self.shell.forgiven, at_work)
            if missed is not None:
                self.shell.take([missed])

    # The broker

    @rule()
    def store(self) -> None:
        """The disk has what could be pulled from its holder."""
        waiting, self.shell.stores = self.shell.stores, []
        for digest in waiting:
            ref = self.shell.scheduler.storing.get(digest)
            if ref is not None and self.has(ref):
                self.shell.take([Stored(digest)])
            elif ref is not None:
                self.shell.stores.append(digest)

    def has(self, ref: Ref) -> bool:
        """Whether a state is where it is said to be."""
        if ref.holder == "broker":
            assert ref.digest in self.written, "a version is to be read that was never written"
            return True
        return ref.digest in self.named[ref.holder].states

    @property
    def written(self) -> set[str]:
        return {event.digest for event in self.shell.log if isinstance(event, Stored)}

    @rule()
    def plan(self) -> None:
        self.shell.planned()

    @rule(torn=st.sampled_from(TORN))
    def kill_the_broker(self, torn: bytes) -> None:
        self.shell.be_killed(torn)

    @rule(torn=st.sampled_from(TORN), number=st.integers(0, 9))
    def kill_the_broker_behind_a_line_about_a_peer(self, torn: bytes, number: int) -> None:
        actor = self.actor(number)
        if actor.is_in() and actor.member is not None:
            self.shell.be_killed(torn, self.shell.router.control(actor.says(), actor.member.control, self.shell.now))

    @precondition(lambda self: self.shell.stores)
    @rule(torn=st.sampled_from(TORN))
    def kill_the_broker_behind_a_line_about_a_version(self, torn: bytes) -> None:
        self.shell.be_killed(torn, [Stored(self.shell.stores[0])])

    @rule(drain=st.booleans())
    def stop_the_broker(self, drain: bool) -> None:
        if self.shell.scheduler.phase != "waiting":
            self.shell.take([Draining("stopped by SIGTERM") if drain else Stopped("stopped by SIGINT")])

    @precondition(lambda self: len(self.shell.scheduler.stored) > 1)
    @rule(number=st.integers(0, 3))
    def damage_a_version(self, number: int) -> None:
        """A broker finds it when it is started again."""
        stored = self.shell.scheduler.stored
        self.shell.be_killed()
        self.shell.take([Damaged(stored[number % len(stored)], "its bytes are others")])

    # What holds at any time

    @invariant()
    def follow(self) -> None:
        """The cores agree with themselves."""
        self.shell.scheduler.check()
        self.leases |= {lease: work.job for lease, work in self.shell.scheduler.work.items()}

    @invariant()
    def peers_are_told_of_open_work_only_and_of_theirs(self) -> None:
        for session in self.shell.router.sessions.values():
            jobs = self.shell.router._wanted(session)[0]
            assert all(job == self.shell.scheduler.work[job.lease].job and is_of(session.peer, job) for job in jobs)

    @invariant()
    def each_index_is_one_process(self) -> None:
        peers = Counter(session.peer for session in self.shell.router.sessions.values())
        assert set(peers.values()) <= {1}

    @invariant()
    def what_was_done_under_a_lease_is_taken_in_once(self) -> None:
        done = Counter((event.lease, event.side) for event in self.shell.log if isinstance(event, Done))
        assert set(done.values()) <= {1}
        ready = Counter(event.lease for event in self.shell.log if isinstance(event, Ready))
        assert set(ready.values()) <= {1}

    @invariant()
    def nothing_passes_under_a_lease_that_is_over_or_another_s(self) -> None:
        for actor in self.actors:
            if actor.member is None or self.shell.router.session(actor.member.token) is None:
                continue
            for lease, job in list(self.leases.items())[-12:]:
                kind = KINDS.get(type(job), "train")
                route = self.shell.send(actor.member, self.shell.tensors(actor.member, lease, kind=kind))
                work = self.shell.scheduler.work.get(lease)
                assert route is None or (work is not None and work.ready and type(job) in KINDS)
                assert route is None or is_of(actor.peer, job)

    # The end

    def teardown(self) -> None:
        if not hasattr(self, "shell"):
            return
        try:
            self.end_well()
            self.compare()
        finally:
            self.shell.journal.close()
            self.folder.cleanup()

    def end_well(self) -> None:
        """Everybody behaves from now on."""
        for _ in range(2000):
            outcome = self.shell.scheduler.outcome
            if outcome is not None and outcome.ok:
                return
            if outcome is not None:
                self.shell.be_killed()
            for actor in self.actors:
                actor.work(self.named)
            self.let_time_pass(1, set())
            self.store()
            self.shell.planned()
        raise AssertionError(f"the run does not end: {self.shell.scheduler.waits_for()}")

    def compare(self) -> None:
        scheduler, config = self.shell.scheduler, self.shell.config
        assert scheduler.outcome == Finish(True, "the run is finished")
        again = restore(config, Journal.open(self._copy()).entries)
        assert fingerprint(again) == fingerprint(scheduler)
        closed_out = any(isinstance(event, Missed) for event in self.shell.log)
        if config.schedule.policy != "async" and not closed_out:
            assert lineage(scheduler) == lineage(undisturbed(self.play))

    def _copy(self) -> Path:
        """Return a folder with the journal as it is on the disk."""
        folder = Path(self.folder.name) / "copy"
        folder.mkdir()
        (folder / JOURNAL).write_bytes((self.shell.folder / JOURNAL).read_bytes())
        return folder


Core.TestCase.settings = settings(unhurried, max_examples=200, stateful_step_count=30)
TestCore = Core.TestCase
