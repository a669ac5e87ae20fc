"""Who may do what, when: the run as a state machine. Events in, instructions out; no clock, no socket.

What is to be done when is in `course`; here is what the events change. Nothing depends on anything but the config and
the events so far: replaying a journal gives the same scheduler, lease for lease.

Peers may be lost at any time. What they had under way is closed, what they held for others counts as not done, and the
course opens it again: from the version on which it began, or, where that was lost as well, from the newest one on the
broker's disk, to which the whole run goes back.
"""

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from zsplit.config import Config
from zsplit.errors import StorageError
from zsplit.wire.messages import Contribution, Evaluate, Init, Lease, Measure, Merge, Ref, Turn
from zsplit_broker.course import Course
from zsplit_broker.events import (
    Damaged,
    Discard,
    Done,
    Draining,
    Entry,
    Event,
    Forsake,
    Grant,
    Instruction,
    Joined,
    Lost,
    Missed,
    Planned,
    Ready,
    Started,
    Stopped,
    Store,
    Stored,
)
from zsplit_broker.policy import segment_of, shares_back
from zsplit_broker.state import Finished, Mark, evaluated_by
from zsplit_broker.survey import measures
from zsplit_broker.work import ON_DISK, Peer, Work, client_of, peer_of, refs_in, refs_of

NOBODY: Mapping[int, float] = {}
"""No client at all."""

MOST = 0.5
"""Share of its turn's time in which a client is at work, from which on those that share its back wait for it."""


class Scheduler(Course):
    """The run. `handle` takes one event at a time; everything else reads."""

    def handle(self, entry: Entry) -> list[Instruction]:
        """Take in one event and return what follows from it. One that no longer matters changes nothing."""
        self.now = entry.at
        if self.outcome is not None and (self.outcome.ok or not isinstance(entry.event, Started)):
            return []
        return list(self._follow(entry.event))

    def _follow(self, event: Event) -> Iterator[Instruction]:
        match event:
            case Started():
                yield from self._take_up(event)
            case Joined():
                yield from self._join(event)
            case Lost():
                yield from self._lose(event)
            case Missed():
                yield from self._miss(event)
            case Ready(lease=lease):
                yield from self._ready(lease)
            case Done():
                yield from self._done(event)
            case Stored(digest=digest):
                yield from self._stored(digest)
            case Damaged(digest=digest):
                yield from self._damaged(digest)
            case Planned():
                yield from self._planned(event)
            case Draining(sentence=sentence):
                yield from self._drain(sentence)
            case Stopped(sentence=sentence):
                yield from self._finish(False, self.ended(sentence))

    # Peers

    def _join(self, event: Joined) -> Iterator[Instruction]:
        peer = event.role, event.index
        self.peers[peer] = self.known[peer] = event
        self.gone.pop(peer, None)
        if event.role == "client":
            self.away.discard(event.index)
        if self.assembled is None and self.servers() and len(self.clients) >= self.config.schedule.min_clients:
            self.assembled = self.now
        yield from self.proceed()

    def _lose(self, event: Lost) -> Iterator[Instruction]:
        peer = event.role, event.index
        if self.peers.pop(peer, None) is None or self.phase == "waiting":
            return
        if event.fatal:
            yield from self._finish(False, self.ended(f"{event.role} {event.index} is gone: {event.sentence}"))
            return
        self.gone[peer] = self.now
        yield from self._withdraw(peer)
        yield from self.proceed()

    def _withdraw(self, peer: Peer) -> Iterator[Instruction]:
        """Close what a peer that is gone had under way, and count what it held for others as not done."""
        yield from self._close_all(
            work for work in self.work.values() if takes_part(peer, work) or self._needs_of(peer, work)
        )
        lost = {ref.digest for ref in self._refs() if peer_of(ref.holder) == peer}
        yield from self._drop_contributions(lost)
        versions = [*self.unsettled.values(), *self.storing.values()] + ([self.version] if self.version else [])
        if any(ref.digest in lost and ref.digest not in self.stored for ref in versions):
            yield from self._roll_back()
        elif self.version is not None and self.version.digest in lost:
            self.version = Ref(digest=self.version.digest, holder=ON_DISK)
        self.unsettled = {r: self._where(ref, lost) for r, ref in self.unsettled.items()}

    def _needs_of(self, peer: Peer, work: Work) -> bool:
        """Whether a job needs a state that this peer held and no disk has."""
        return any(peer_of(ref.holder) == peer and ref.digest not in self.stored for ref in refs_of(work.job))

    def _where(self, ref: Ref, lost: set[str]) -> Ref:
        return Ref(digest=ref.digest, holder=ON_DISK) if ref.digest in lost else ref

    def _refs(self) -> Iterator[Ref]:
        """Yield the states that somebody holds for the run."""
        for contribution in (*self.contributions.values(), *self.arrivals.contributions):
            yield from refs_in(contribution)
        yield from self.storing.values()
        yield from self.unsettled.values()
        if self.version is not None:
            yield self.version

    def _close_all(self, works: Iterable[Work]) -> Iterator[Instruction]:
        """Close these jobs; with a turn that shares its back all others that do, of which none is done without it."""
        jobs = [work.job for work in works]
        groups = {job.group.number for job in jobs if isinstance(job, Turn) and job.group is not None}
        for lease, work in list(self.work.items()):
            group = work.job.group if isinstance(work.job, Turn) else None
            if work.job in jobs or (group is not None and group.number in groups):
                yield self._close(lease)
        if groups:
            self.contributions, self.finished = {}, {}

    def _drop_contributions(self, lost: set[str]) -> Iterator[Instruction]:
        """Have the turns done again whose contributions are lost; where they have one back, all of its turns."""
        yield from self._close_all(
            work
            for work in self.work.values()
            if isinstance(work.job, Merge | Turn) and any(ref.digest in lost for ref in needed_only_from_peers(work))
        )
        if self.is_async:
            for contribution in self.arrivals.contributions:
                if any(ref.digest in lost for ref in refs_in(contribution)):
                    self.arrivals.again(contribution.client)
                    self.finished.pop(contribution.client, None)
            return
        gone = [client for client, c in self.contributions.items() if any(ref.digest in lost for ref in refs_in(c))]
        if not gone:
            return
        if self.config.schedule.server_model != "replica":
            yield from self._replay_segment()
            return
        for client in gone:
            del self.contributions[client], self.finished[client]
        yield from self._close_all(work for work in self.work.values() if isinstance(work.job, Merge))
        self._begin_stage(self.stage)

    def _replay_segment(self) -> Iterator[Instruction]:
        """Do all turns since the last merge again: they have one back."""
        yield from self._close_all(work for work in self.work.values() if isinstance(work.job, Turn | Merge))
        self.contributions, self.finished = {}, {}
        self._begin_stage(segment_of(self.config, self.stages, self.stage))

    # Going back

    def _roll_back(self) -> Iterator[Instruction]:
        """Go back to the newest version on the disk before which nothing is missing; without one to the beginning."""
        digest = next((each for each in reversed(self.stored) if self._is_whole(self.marks[each])), None)
        mark = self.marks[digest] if digest is not None else Mark(0)
        yield from self._close_all(work for work in self.work.values() if self._is_after(mark, work))
        yield from (Forsake(each) for each in self.archive.forsake())
        for newer in self.stored[self.stored.index(digest) + 1 if digest is not None else 0 :]:
            self.archive.remove(newer)
            yield Discard(newer)
        self.marks = {each: self.marks[each] for each in self.stored}
        self._forget_since(mark)
        self.version = Ref(digest=digest, holder=ON_DISK) if digest is not None else None
        if digest is None:
            self.phase = "measuring" if measures(self.config) and not self.surveyed else "initialising"
        elif mark.stages:
            self._begin_stage(mark.stage)
        else:
            self.phase = "validating"

    def _is_whole(self, mark: Mark) -> bool:
        """Whether all versions before it that are still needed are on the disk."""
        return all(ref.digest in self.stored for round_, ref in self.unsettled.items() if round_ < mark.round)

    def _is_after(self, mark: Mark, work: Work) -> bool:
        """Whether a job is none that still counts when training stands there again."""
        match work.job:
            case Evaluate(part="validation", round=round_):
                return round_ >= mark.round
            case Measure():
                return False
            case _:
                return True

    def _forget_since(self, mark: Mark) -> None:
        """Forget what came after this."""
        self.contributions, self.finished = {}, {}
        self.round, self.stage, self.stages = mark.round, mark.stage, list(mark.stages)
        self.missed, self.moved = set(mark.missed), set(mark.moved)
        self.plans.use(mark.round)
        self.books.go_back(mark.round, mark.book)
        self.books.tests = {}
        self.evaluated = {each for each in self.evaluated if each.part == "validation" and each.round < mark.round}
        self.unsettled = {
            round_: Ref(digest=ref.digest, holder=ON_DISK)
            for round_, ref in self.unsettled.items()
            if round_ < mark.round
        }
        self.history = [record for record in self.history if record.round < mark.round]
        if self.is_async and mark.results is not None:
            self.arrivals.go_back(mark.results)
        elif self.is_async:
            self.arrivals = type(self.arrivals)(self.config.schedule)

    def _take_up(self, event: Started) -> Iterator[Instruction]:
        """A broker takes the run up: go on where it was; where it had ended early, with whoever joins from now on."""
        self.epoch, self.number, self.ports = event.epoch, 0, event.ports
        lives_on = self.outcome is None and self.assembled is not None
        self.assembled, self.draining = (self.now if lives_on else None), ""
        if self.outcome is not None:
            self.outcome = None
            self.gone |= dict.fromkeys(self.peers, self.now)
            self.peers.clear()
            if self.began is None:
                self.phase = "waiting"
            else:
                self.plans.deciding = None
                yield from self._roll_back()
            return
        yield from (Store(ref) for ref in self.storing.values())
        if self.plans.deciding is not None:
            yield self.plans.deciding

    def _damaged(self, digest: str) -> Iterator[Instruction]:
        """Go on without a version that was stored: where it is needed, from the one before it."""
        if digest not in self.stored:
            if digest in self.storing:  # it was found on the disk, and read in vain: its holder has it
                yield Store(self.storing[digest])
            return
        yield from self._close_all(
            work for work in self.work.values() if Ref(digest=digest, holder=ON_DISK) in refs_of(work.job)
        )
        needed = [ref for ref in (self.version, *self.unsettled.values()) if ref is not None and ref.digest == digest]
        yield Discard(digest)
        if needed and all(ref.holder != ON_DISK for ref in needed):  # somebody has it still
            self.archive.store_again(needed[0])
            yield Store(needed[0])
        else:
            self.archive.remove(digest)
            if needed:
                yield from self._roll_back()
        yield from self.proceed()

    # Going on without a client

    def overdue(self, now: float, since: float = 0.0, at_work: Mapping[int, float] = NOBODY) -> Missed | None:
        """Return the client that was waited for long enough, and without which the run can go on; None: nobody.

        Nobody was waited for before `since`: the broker itself was stopped, or could write nothing. `at_work` is the
        share of its turn's time in which it was each client that was to send: where several share a back, all are late
        because of those who were at work for most of it.
        """
        schedule = self.config.schedule
        if self.assembled is None or self.phase in ("waiting", "finished"):
            return None
        earliest = max(self.assembled, since)
        training = self.phase == "training"
        if not (training and not self.is_async and self._is_open(Turn)):
            for client in self.awaited():
                gone = max(self.gone.get(("client", client), earliest), earliest)
                if now - gone >= schedule.rejoin_timeout and self._can_spare(client):
                    waited = f"{schedule.rejoin_timeout:g} s (schedule.rejoin_timeout)"
                    return Missed(client, f"client {client} did not come back within {waited}")
        if training and not self.is_async and schedule.round_timeout and self._is_late(now, earliest):
            for client in sorted(self._stragglers(at_work)):
                if self._can_spare(client, at_work):
                    allowed = f"{schedule.round_timeout:g} s (schedule.round_timeout)"
                    return Missed(client, f"client {client} did not finish within {allowed}")
        return None

    def _is_late(self, now: float, earliest: float) -> bool:
        """Whether the time for a round is up; where clients take turns, or share a back, each stage has as much."""
        schedule = self.config.schedule
        staged = schedule.policy == "round_robin" or schedule.server_model != "replica"
        began = self.stage_began if staged else self.books.rounds[self.round].began
        return now - max(began, earliest) >= self.config.schedule.round_timeout

    def _stragglers(self, at_work: Mapping[int, float] = NOBODY) -> set[int]:
        """Return the clients whose turn is due while they are not here, or open while it does not wait for others."""
        slow = self._training()
        if shares_back(self.config) and len(slow) > 1:
            slow = {client for client in slow if at_work.get(client, 0.0) > MOST}
        return slow | {s.client for s in self.shares_due() if ("client", s.client) not in self.peers}

    def _training(self) -> set[int]:
        """Return the clients whose turn is open and, on their side, not done."""
        works = [work for work in self.work.values() if "client" not in work.done]
        return {work.job.client for work in works if isinstance(work.job, Turn)}

    def _can_spare(self, client: int, at_work: Mapping[int, float] = NOBODY) -> bool:
        """Whether what waits for this client can go on without it."""
        least = self.config.schedule.min_clients
        if self.phase != "training" or self.is_async:
            others = set(self.eligible()) - {client}
            return self.phase not in ("measuring", "training") or len(others) >= least
        if client not in {share.client for share in self.stages[self.stage]}:
            return True  # it is waited for with an evaluation only
        if self._later_turns(client):
            return True
        gone = ("client", client) not in self.peers
        if self.config.schedule.clients_per_round and gone:  # all that were drawn may be, and be drawn no more
            return len([other for other in self.clients if other != client]) >= least
        stragglers = self._stragglers(at_work)
        return len([other for other in self.crowd() if other != client and other not in stragglers]) >= least

    def _later_turns(self, client: int) -> bool:
        """Whether somebody else can take the turn of this client, which comes later in the round."""
        alone = self.config.schedule.policy == "round_robin"
        return alone and client not in self.moved and self.stage + 1 < len(self.stages)

    def _miss(self, event: Missed) -> Iterator[Instruction]:
        client = event.client
        if self.phase in ("waiting", "finished"):
            return
        awaited = {share.client for share in self.shares_due()} | self._training()
        if self.phase == "training" and not self.is_async and client in awaited:
            works = [work for work in self.work.values() if isinstance(work.job, Turn) and work.job.client == client]
            yield from self._close_all(works)
            if self._later_turns(client):
                self.moved.add(client)
                self.stages = [*self.stages[: self.stage], *self.stages[self.stage + 1 :], self.stages[self.stage]]
                self._begin_stage(self.stage)
                yield from self.proceed()
                return
            self.missed.add(client)
            if shares_back(self.config):
                yield from self._replay_segment()
        if ("client", client) not in self.peers:
            self.away.add(client)
        yield from self.proceed()

    # Jobs

    def _ready(self, lease: Lease) -> Iterator[Instruction]:
        work = self.work.get(lease)
        if work is not None and not work.ready:
            work.ready = True
            if client_of(work.job) is not None:
                yield Grant(work.job)

    def _done(self, event: Done) -> Iterator[Instruction]:
        work = self.work.get(event.lease)
        if work is None or event.side in work.done:
            return
        work.done[event.side] = event
        if not work.complete:
            return
        base = self.bases.pop(event.lease, 0)
        yield self._close(event.lease)
        wrong = self._collect(work, base)
        if wrong:
            yield from self._finish(False, self.ended(wrong))
        else:
            yield from self.proceed()

    def _collect(self, work: Work, base: int) -> str:
        """Keep what a finished job leaves: measurements, a contribution, a version, figures. Return what is wrong."""
        done, client, server = work.done, work.tally("client"), work.tally("server")
        match work.job:
            case Measure(client=measured):
                return self.survey.take(work.job, done["client" if measured >= 0 else "server"])
            case Turn():
                self.finished[work.job.client] = Finished(work.job, client, server)
                self._keep(self._contribution(work.job, done), base)
            case Init(server=index) | Merge(server=index):
                if isinstance(work.job, Merge):
                    for contribution in work.job.inputs:
                        self._count_turn(contribution.client)
                    self.books.count(work.job, client, server, self.round)
                    if self.is_async:
                        self.arrivals.mixed()
                self.contributions = {}
                self.version = Ref(digest=done["server"].digest, holder=f"server.{index}")
            case Evaluate():
                self.evaluated.add(evaluated_by(work.job))
                self.books.count(work.job, client, server, self.round)
        return ""

    def _contribution(self, turn: Turn, done: Mapping[str, Done]) -> Contribution:
        samples = done["client"].tally.samples
        return Contribution(
            client=turn.client,
            weight=float(samples) if self.config.schedule.weighting == "samples" else 1.0,
            front=Ref(digest=done["client"].digest, holder=f"client.{turn.client}"),
            back=Ref(digest=done["server"].digest, holder=f"server.{turn.server}"),
        )

    def _keep(self, contribution: Contribution, base: int) -> None:
        """Keep a contribution until it is merged. Where all have one back, the latest is everybody's."""
        if self.is_async:
            self.arrivals.take(contribution, base)
            return
        if self.config.schedule.server_model != "replica":
            fronts = self.contributions.items()
            self.contributions = {client: msgspec.structs.replace(each, back=None) for client, each in fronts}
        self.contributions[contribution.client] = contribution

    # Versions and plans

    def _stored(self, digest: str) -> Iterator[Instruction]:
        if digest in self.storing:
            needed = [*self.unsettled.values(), *(ref for work in self.work.values() for ref in refs_of(work.job))]
            for other in self.archive.written(digest, {ref.digest for ref in needed}):
                self.marks.pop(other, None)
                yield Discard(other)
            yield from self.proceed()

    def _planned(self, event: Planned) -> Iterator[Instruction]:
        """Take plans in. Those that nobody asked for are an earlier run's, and come before this one begins."""
        asked = self.plans.deciding is not None
        if asked or self.phase == "waiting":
            self.plans.take(event, self.round)
        if asked:
            yield from self.proceed()

    def _drain(self, sentence: str) -> Iterator[Instruction]:
        """End the run after the round under way; at once where none is."""
        self.draining = sentence
        if self.phase in ("waiting", "measuring", "planning", "initialising"):
            yield from self._finish(False, self.ended(sentence))
        else:
            yield from self.proceed()


def takes_part(peer: Peer, work: Work) -> bool:
    """Whether a peer is one of the job's two."""
    role, index = peer
    return index == (work.job.server if role == "server" else client_of(work.job))


def needed_only_from_peers(work: Work) -> list[Ref]:
    """Return the states of a job that no disk has: fronts and backs that turns left."""
    match work.job:
        case Turn(back=back):
            return [back] if back is not None else []
        case Merge(inputs=inputs):
            return [ref for contribution in inputs for ref in refs_in(contribution)]
        case _:
            return []


def restore(config: Config, lines: Iterable[bytes]) -> Scheduler:
    """Return the scheduler that a journal's lines lead to: the one that wrote them, had it never died.

    Raises StorageError for a line that is no event.
    """
    scheduler = Scheduler(config)
    for number, line in enumerate(lines, 2):
        try:
            scheduler.handle(msgspec.json.decode(line, type=Entry))
        except msgspec.MsgspecError as error:
            raise StorageError(f"Line {number} of the journal is no event of this version ({error})") from error
    return scheduler
