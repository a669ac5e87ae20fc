"""The broker's shell: sockets, waiting, clock. Every decision is made in the cores that it feeds.

One turn of the loop: relay tensors until the bell rings, take in what else came, collect what is news, write the
news to the journal (one fsync for all of it), let the scheduler follow from it, and tell the peers whose orders
changed.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import zmq

from zsplit import crash
from zsplit.config import Config
from zsplit.errors import RemoteProtocolError, StorageError, ZsplitError
from zsplit.wire import messages
from zsplit.wire.events import AnyEvent, LogEvent
from zsplit.wire.frames import decode_control, encode, protocol_of
from zsplit.wire.messages import (
    PROTOCOL,
    Beat,
    Bye,
    ControlMessage,
    Fault,
    Hello,
    Refused,
    Telemetry,
    Turn,
    Unknown,
)
from zsplit.wire.wake import Wake
from zsplit_broker import planning, record
from zsplit_broker.bulletin import Bulletin
from zsplit_broker.disk import DiskFullError, Outcome, Writer
from zsplit_broker.events import (
    Announce,
    Close,
    Decide,
    Discard,
    Draining,
    Entry,
    Event,
    Finish,
    Forsake,
    Grant,
    Instruction,
    Lost,
    Open,
    Planned,
    Started,
    Stopped,
    Store,
)
from zsplit_broker.journal import Journal
from zsplit_broker.port import Bell, Port
from zsplit_broker.processor import Processor
from zsplit_broker.router import Router, refuse_protocol
from zsplit_broker.scheduler import Scheduler
from zsplit_broker.sockets import Sockets
from zsplit_broker.summary import summarise
from zsplit_broker.switch import Switch
from zsplit_broker.timeline import Timeline
from zsplit_broker.versions import Versions
from zsplit_broker.work import Peer, parties

DRAIN = 64
"""Messages taken from one socket before the others have their turn."""

IDLE_SECONDS = 0.1
"""How long the relay goes on without a look at the clock."""

PUBLISH_SECONDS = 0.25
"""How often the state of the run and its peers is published."""

EXPORT = "export"
"""Key of the writer's task that makes `model.safetensors`."""

PLAN = "plan"
"""Key of the writer's task that makes a plan."""

FAREWELL_SECONDS = 1.5
"""How long the broker waits, at the end, for its peers to leave."""

RETURN_SECONDS = 5.0
"""How long one that was started again at the end waits for those who look for it."""

RETRY_SECONDS = 0.5
"""How long a broker whose disk is full waits before it tries again."""


class Broker:
    """One run's broker: `serve` runs it to its end."""

    def __init__(
        self,
        config: Config,
        run: str,
        folder: Path,
        journal: Journal,
        sockets: Sockets,
        news: Sequence[Event] = (),
        scheduler: Scheduler | None = None,
    ) -> None:
        self.config = config
        self.run = run
        self.folder = folder
        self.journal = journal
        self.scheduler = scheduler or Scheduler(config)
        self.scheduler.home = str(folder)
        self.router = Router(config, self.scheduler, run, (sockets.data_port, sockets.events_port))
        self.bulletin = Bulletin(self.scheduler, self.router, run, str(folder))
        self.versions = Versions(folder / "versions")
        self.control, self.events = sockets.control, sockets.events
        self.wake = Wake()
        self.writer = Writer(self.wake.set)
        self.switch = Switch(run, Port(sockets.data), self.router, self.versions, self.writer)
        self.depot = self.switch.depot
        self.poller = zmq.Poller()
        for source in (self.control, self.events, self.wake.fd):
            self.poller.register(source, zmq.POLLIN)
        descriptors = self.control.fileno(), self.events.fileno(), self.wake.fd
        self.bell = Bell(sockets.bell, descriptors, IDLE_SECONDS)
        self.processor = Processor(sockets.threads)
        self.busy = True
        ports = sockets.port, sockets.data_port, sockets.events_port
        self.news: list[Event] = [Started(self.scheduler.epoch + 1, ports), *news]
        self.answers: list[Planned] = []
        self.metrics: list[bytes] = []
        self.full: DiskFullError | None = None
        self.left: set[Peer] = set()
        self.timeline = Timeline(folder, self.writer.submit) if config.run.timeline else None
        self.stopping = self.draining = ""
        self.exported = False
        for done in self.scheduler.history[record.trim_metrics(folder, len(self.scheduler.history)) :]:
            self.metrics += self._publish([self.bulletin.round_event(done)])
        self._born = time.monotonic() - self.scheduler.now
        self._next_tick = self._next_publish = self._next_try = 0.0
        self._forgiven = self.now()

    # Start and end

    def serve(self) -> Finish:
        """Run until the run is over; return how it ended. A call to `stop` ends it early."""
        while self._goes_on():
            try:
                self._turn()
            except StorageError as error:  # the journal cannot be written: nothing may follow any more
                self.news.clear()
                self.scheduler.handle(Entry(self.now(), Stopped(str(error))))
        ended = self.scheduler.outcome
        if ended is None:
            raise AssertionError("the run goes on")
        outcome = self._export() if ended.ok else ended
        self._conclude(outcome)
        return outcome

    def _goes_on(self) -> bool:
        """Whether the run is on, or is still to be taken up; one whose disk has no room for that can be stopped."""
        outcome = self.scheduler.outcome
        if outcome is not None and self.full is not None and self.stopping:
            return False
        return outcome is None or (bool(self.news) and not outcome.ok)

    def stop(self, sentence: str) -> None:
        """End the run at the next turn of the loop; safe to call from a signal handler."""
        self.stopping = sentence
        self.wake.set()

    def drain(self, sentence: str) -> None:
        """End the run once the version of the round under way is stored; a second call ends it now."""
        if self.draining or self.scheduler.draining:
            self.stop(sentence)
        self.draining = sentence
        self.wake.set()

    def close(self) -> None:
        """End the bell's and the writer's threads and let go of the versions; sockets and journal are their makers'."""
        self.processor.leave()
        self.bell.close()
        if self.timeline is not None:
            self.timeline.finish()
        self.writer.close()
        self.versions.close()
        self.wake.close()

    def _export(self) -> Finish:
        """Write the merged model, the relay going on meanwhile; return how the run ended after all."""
        crash.at("broker.export")
        digest, begun = self.scheduler.stored[-1], False
        while not self.exported and not self.stopping:
            if not begun or (self.full is not None and self.now() >= self._next_try):
                begun, self.full = True, None
                self.writer.submit(EXPORT, lambda: self.versions.export(digest, self.folder / record.MODEL))
            self._turn()
        if self.stopping:
            return Finish(False, self.scheduler.ended(self.stopping))
        return Finish(True, "the run is finished")

    def _conclude(self, outcome: Finish) -> None:
        """Write the summary and send everybody home."""
        self.scheduler.outcome = outcome
        self._write_metrics()
        with contextlib.suppress(StorageError):  # a full disk is what the outcome tells already
            record.write_summary(self.folder, summarise(self.scheduler, self.run, self.folder))
        self._publish(self.bulletin.state(self.now()))
        self.router.finish = messages.Finish(ok=outcome.ok, sentence=outcome.sentence)
        self._tell(None)
        alone = not self.router.sessions and self.scheduler.peers  # they look for the broker before this one
        until = time.monotonic() + (RETURN_SECONDS if alone else FAREWELL_SECONDS)
        while self._is_expected() and time.monotonic() < until:
            self._turn()

    def _is_expected(self) -> bool:
        """Whether somebody is here, or was here before this broker and is not yet again."""
        here = self.router.sessions.values()
        return any(s.reachable for s in here) or bool(self.scheduler.peers.keys() - {s.peer for s in here} - self.left)

    def now(self) -> float:
        """Return seconds since the run began."""
        return time.monotonic() - self._born

    # One turn of the loop

    def _turn(self) -> None:
        """Relay until something else is due, then do that."""
        self.bell.set(at_once=self.busy)
        self.switch.pass_on_until_the_bell()
        self.processor.look(self.now())
        ready = dict(self.poller.poll(0))
        if self.control in ready:
            self._drain(self._control)
        if self.events in ready:
            self._drain(self._subscription)
        if self.wake.fd in ready:
            self.wake.clear()
            self._written()
        self._clock()
        self._take_news()
        self.busy = bool(ready)  # there may be more: the bell tells of what is new only

    def _drain(self, take: Callable[[], None]) -> None:
        with contextlib.suppress(zmq.Again):
            for _ in range(DRAIN):
                take()

    def _clock(self) -> None:
        now = self.now()
        if self.stopping and self.scheduler.outcome is None:
            self.news.append(Stopped(self.stopping))
            self.stopping = ""
        if self.draining and self.scheduler.outcome is None:
            self.news.append(Draining(self.draining))
            self.draining = ""
        if now >= self._next_tick:
            if now > self._next_tick + 2 * self.config.link.beat_seconds or self.full is not None:
                self._forgiven = now  # it was stopped itself, or could write nothing: nobody was waited for
            for session in self.router.silent(now):
                self._send(session.control, self.router.orders(session, now=now))  # fails where it is gone
            self.news += self.router.tick(now)
            self._next_tick = self.router.next_tick(now)
            at_work = self.router.relay.at_work()
            overdue = self.scheduler.overdue(now, self._forgiven, at_work) if self.full is None else None
            if overdue is not None:
                self.news.append(overdue)
            self.depot.tick()
            self._write_metrics()
        if now >= self._next_publish:
            self._next_publish = now + PUBLISH_SECONDS
            self._publish(self.bulletin.state(now))
            if self.bulletin.rates_due(now):
                self._publish([self.bulletin.rates(now, self.switch.relayed, self.switch.relayed_bytes)])

    def _take_news(self) -> None:
        if not self.news or (self.full is not None and self.now() < self._next_try):
            return
        news, self.news = self.news, []
        over = self.scheduler.outcome is not None and not isinstance(news[0], Started)
        if over:  # peers that leave when it is over are no news
            self.left |= {(event.role, event.index) for event in news if isinstance(event, Lost)}
            return
        try:
            self._take(news)
        except DiskFullError as error:
            self.news = [*news, *self.news]
            self._wait_for_room(error)

    def _wait_for_room(self, error: DiskFullError) -> None:
        """The disk is full: nothing follows from what happens until there is room. Say so once."""
        self._next_try = self.now() + RETRY_SECONDS
        self.news = [event for number, event in enumerate(self.news) if event not in self.news[:number]]
        stopped = next((event for event in self.news if isinstance(event, Stopped)), None)
        if stopped is not None:  # whoever takes the run up need not know
            self.scheduler.handle(Entry(self.now(), stopped))
            self.news.clear()
        if self.full is None:
            self._publish([LogEvent(level="error", who="broker", text=f"{error}. The run waits for room on the disk")])
        self.full = error

    def _has_room(self) -> None:
        """The disk took something again."""
        if self.full is not None and not self.depot.waits_for_room:
            self.full = None
            self._publish(
                [LogEvent(level="info", who="broker", text="there is room on the disk again: the run goes on")]
            )

    def _take(self, news: list[Event]) -> None:
        """Journal the news, then do what follows from it."""
        entries = [Entry(self.now(), event) for event in news]
        crash.at("broker.journal")
        self.journal.append([msgspec.json.encode(entry) for entry in entries])
        crash.at("broker.journaled")
        self._has_room()
        touched: set[Peer] = set()
        rounds = len(self.scheduler.history)
        for entry in entries:
            for instruction in self.scheduler.handle(entry):
                touched |= self._do(instruction)
            if isinstance(entry.event, Lost):
                self.switch.have_sent_again((entry.event.role, entry.event.index))
            self._publish(self.bulletin.logs(entry.event))
            self._publish(self.bulletin.departure(entry.event))
        if len(self.scheduler.history) < rounds:  # a version was damaged, and its round is done again
            self.metrics.clear()
            record.trim_metrics(self.folder, len(self.scheduler.history))
        self._tell(touched)

    def _tell(self, peers: set[Peer] | None) -> None:
        """Send their orders to those of the peers (or of all) whose orders changed."""
        for session in list(self.router.changed(peers)):
            self._send(session.control, self.router.orders(session, now=self.now()))

    # Instructions

    def _do(self, instruction: Instruction) -> set[Peer]:
        """Carry an instruction out; return the peers whose orders it may have changed."""
        match instruction:
            case Open(job):
                if self.timeline is not None and isinstance(job, Turn):
                    self.timeline.begin_round(job.round + 1, self.now())
                return {("server", job.server)}
            case Grant(job):
                return parties(job)
            case Close(job):
                self.router.relay.forget(job.lease)
                return parties(job)
            case Store(ref):
                self.depot.store(ref)
            case Forsake(digest):
                self.depot.forsake(digest)
            case Discard(digest):
                self.depot.discard(digest)
            case Decide():
                before = self.scheduler.plans.before(instruction.round)
                self.writer.submit(PLAN, partial(self._plan, instruction, before))
            case Announce(round_):
                crash.at("broker.announce")
                event = self.bulletin.round_event(self.scheduler.history[round_])
                self.metrics += self._publish([event])
                self._write_metrics()
                crash.at("broker.announced")
            case Finish():
                pass  # ends the loop in `serve`
        return set()

    def _write_metrics(self) -> None:
        """Write the rounds' figures; they wait where the disk is full."""
        with contextlib.suppress(DiskFullError):
            while self.metrics:
                record.append_metrics(self.folder, self.metrics[0])
                del self.metrics[0]

    def _publish(self, events: Iterable[AnyEvent]) -> list[bytes]:
        """Publish events; return their bodies as they went out."""
        stamped = [self.bulletin.stamp(event, time.time()) for event in events]
        for message in stamped:
            self.events.send_multipart(message)
        return [body for _, body in stamped]

    def _subscription(self) -> None:
        """Somebody subscribed: send the last value of each topic again."""
        frame = self.events.recv(zmq.NOBLOCK)
        if frame[:1] == b"\x01":
            for message in self.bulletin.replay(frame[1:]):
                self.events.send_multipart(message)

    # Control

    def _control(self) -> None:
        sender, *frames = self.control.recv_multipart(zmq.NOBLOCK)
        header = frames[0] if len(frames) == 1 else b""
        try:
            message = decode_control(header)
        except RemoteProtocolError:
            self._undecodable(sender, header)
            return
        now = self.now()
        match message:
            case Hello():
                for answer in self.router.hello(sender, message, now):
                    if isinstance(answer, Lost):
                        self.news.append(answer)
                    else:
                        self._send(answer.to, answer.message)
            case Beat():
                self.news += self.router.control(message, sender, now)
                self._answer(message, sender, now)
            case Telemetry() | Fault() | Bye():
                self.news += self.router.control(message, sender, now)
                if isinstance(message, Telemetry):
                    self._keep_spans(message, sender)
            case _:
                self.router.dropped += 1

    def _keep_spans(self, telemetry: Telemetry, sender: bytes) -> None:
        session = self.router.session(telemetry.session)
        if self.timeline is not None and session is not None and session.control == sender:
            full = self.timeline.add(session.peer, telemetry.spans)
            if full:
                self._publish([LogEvent(level="warning", who="broker", text=full)])

    def _answer(self, beat: Beat, sender: bytes, now: float) -> None:
        """Take the beat's news in at once, so that the answer already follows from it."""
        self._take_news()
        session = self.router.session(beat.session)
        if session is not None and session.control == sender:
            self._send(sender, self.router.orders(session, beat.sent, now))
        else:
            self._send(sender, Unknown())

    def _undecodable(self, sender: bytes, header: bytes) -> None:
        self.router.dropped += 1
        theirs = protocol_of(header)
        if theirs is not None and theirs != PROTOCOL:
            self._send(sender, Refused(sentence=refuse_protocol(theirs), code=2))

    def _send(self, to: bytes, message: ControlMessage) -> None:
        try:
            self.control.send_multipart([to, encode(message)], zmq.NOBLOCK)
        except zmq.Again:
            self.router.dropped += 1  # the next beat mends it
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.router.unreachable(to)

    # Planning

    def _plan(self, asked: Decide, before: list[Planned]) -> None:
        """Answer the scheduler; on the writer's thread, since a search takes a while. What it sees and says is kept."""
        answer = planning.answer(asked)
        with contextlib.suppress(DiskFullError):  # the journal has it, which the run goes on from
            record.write_situation(self.folder, asked.situation)
            if answer.plans:
                record.write_plans(self.folder, [*before, answer])
        self.answers.append(answer)

    # Storing

    def _written(self) -> None:
        """Collect what the writer finished: a digest is a version on disk, an error ends the run."""
        for outcome in self.writer.finished():
            try:
                self._collect(outcome)
            except DiskFullError as error:
                self._wait_for_room(error)
            except ZsplitError as error:
                self.stopping = str(error)
        self.depot.resume()

    def _collect(self, outcome: Outcome) -> None:
        if outcome.key in ("", EXPORT, PLAN) and outcome.error is not None:
            raise outcome.error
        match outcome.key:
            case "":
                pass
            case "export":
                self.exported = True
            case "plan":
                self.news.append(self.answers.pop())
            case _:
                news = self.depot.written(outcome)
                if news is not None:
                    self._has_room()
                    self.news.append(news)
