"""One peer's time with its broker, from welcome to goodbye: beats and orders, tensors, states. One thread's work."""

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from zsplit import crash
from zsplit.config import from_json, link_of
from zsplit.errors import LinkError, ZsplitError
from zsplit.greeting import RETRY_SECONDS, refusal
from zsplit.train.link.clock import Clock
from zsplit.train.link.connection import Connection, Parcel, Received
from zsplit.train.link.exchange import Exchange, Incoming, Outgoing
from zsplit.train.link.repeats import Answers, Questions, Repeats
from zsplit.train.link.shaping import lines
from zsplit.train.link.shelf import Fetched, Transfer
from zsplit.train.link.spans import Recorder
from zsplit.train.link.standing import Standing
from zsplit.wire.frames import CHUNK, check_frames, decode_control, decode_data, encode
from zsplit.wire.messages import (
    Attach,
    Attached,
    Bye,
    Chunk,
    Detached,
    Fault,
    Hello,
    Init,
    Lease,
    Merge,
    Orders,
    Pull,
    Refused,
    Resend,
    Span,
    Step,
    Telemetry,
    Unknown,
    Welcome,
    What,
)
from zsplit.wire.messages import Tensors as TensorsMessage
from zsplit.wire.wake import Wake

SAMPLES = 5
"""Round trips after which the broker's clock is known well enough for beats to come at their own pace."""

MISSED = 2.5
"""Beats without an answer after which the peer says hello: its connection may be one that the broker does not know."""

SPANS_SECONDS = 0.5
"""How often spans are sent where there are any."""


class Ended(NamedTuple):
    """The link is over, for the reason given."""

    error: ZsplitError


class Leave(NamedTuple):
    """This peer is asked to leave, for the reason given."""

    sentence: str


Event = Orders | Incoming | Fetched | Leave | Ended


class Session:
    """`turn` waits for something to do and does it; `post` and `say` may be called by other threads.

    The broker may fall silent, be another process when it is back, or have given this peer up: then the peer says hello
    until it is welcome again, and goes on with what the orders still list. `inform` is told so, for a person.
    Raises ConfigError where the config's trace for this client's link cannot be read.
    """

    def __init__(
        self,
        connection: Connection,
        welcome: Welcome,
        hello: Hello,
        tell: Callable[[Event], None],
        wake: Wake,
        inform: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.welcome = welcome
        self.config = from_json(welcome.config)
        self.standing = Standing()
        self.clock = Clock()
        self.spans = Recorder(self.config.run.timeline)
        self.exchange = Exchange(self.clock, self.spans, self._post, tell, self._fail, self.config.run.seed)
        self._connection = connection
        self._hello = msgspec.structs.replace(hello, index=welcome.index)
        self._role = hello.role
        self._points = f"{hello.role}.serve", f"{hello.role}.reply"
        self._repeats: Repeats[Outgoing] = Answers() if hello.role == "server" else Questions()
        self._tell, self._wake, self._inform = tell, wake, inform
        self._largest = max(2 * CHUNK, self.config.broker.max_message_mb * 2**20)
        self._outbox: deque[Outgoing] = deque()
        self._messages: deque[Telemetry | Fault] = deque()
        self._telemetry = Telemetry(session=welcome.session)
        self._attached = False
        self._sent = 0.0
        self._revision = 0
        self._beat_due = self._hello_due = self._attach_due = self._spans_due = 0.0
        self._greeting = self._looking = self._unknown = self._met = False
        self._heard = self._awake = time.monotonic()
        self._slow_down()
        self._open()

    def _slow_down(self) -> None:
        """From now on be as slow as the config wants a client's link to be."""
        if self._role == "client":
            shape = link_of(self.config, self.welcome.index)
            self._connection.shape(*lines(shape.rows(), shape.rtt_ms / 1000, time.monotonic()))

    def _open(self) -> None:
        """Make a new connection for tensors; what has to be sent again follows when the broker knows whose it is."""
        self._attached, self._attach_due = False, 0.0
        self._connection.open_data(self.welcome.data_port, self._largest)

    # For other threads

    def say(self, message: Telemetry | Fault) -> None:
        """Send a control message soon, in the session that there is then; it may be lost."""
        self._messages.append(message)
        self._wake.set()

    def beat_now(self) -> None:
        """Send a beat soon."""
        self._beat_due = 0.0
        self._wake.set()

    def _post(self, outgoing: Outgoing) -> None:
        self._outbox.append(outgoing)
        self._wake.set()

    def _fail(self, error: Exception) -> None:
        """What encodes or decodes has failed: the trainer gets to know, this thread goes on to tell the broker."""
        if not isinstance(error, ZsplitError):
            error = LinkError(f"Tensors could not be encoded or decoded: {type(error).__name__}: {error}")
        self._tell(Ended(error))

    # The thread

    def turn(self) -> None:
        """Wait for something to do, and do it. Raises ZsplitError where the broker is lost or wants no more."""
        due = self._due()
        self._connection.wait(due)
        self._forgive_own_pause(due)
        if self._connection.met:
            self._connection.met, self._met = False, True
            self._greet(at_once=True)
        for at, message in self._connection.heard():
            self._hear(message, at)
        for at, received in self._connection.arrivals():
            self._receive(received, at)
        self._send_all()
        self._keep_time(time.monotonic())

    def leave(self) -> None:
        """Say what is left to say, and goodbye."""
        self._send_messages()
        while self._send_spans():
            pass
        self._connection.tell(encode(Bye(session=self.welcome.session)))
        self._connection.flush()

    def _forgive_own_pause(self, due: float) -> None:
        """A peer that was stopped itself, and woke long after something was due, has not listened to the broker."""
        now = time.monotonic()
        pause = now - max(due, self._awake)
        if pause > self.config.link.beat_seconds:
            self._heard = min(now, self._heard + pause)
        self._awake = now

    def _due(self) -> float:
        due = self._hello_due if self._greeting else self._beat_due
        if not self._attached:
            due = min(due, self._attach_due)
        return min(due, self._spans_due) if self.spans.on else due

    def _keep_time(self, now: float) -> None:
        self._mind_silence(now - self._heard)
        if self._greeting and now >= self._hello_due:
            self._hello_due = now + RETRY_SECONDS
            self._connection.tell(encode(self._hello))
        elif not self._greeting and now >= self._beat_due:
            self._beat(now)
        if self._attached and self._connection.lost:
            self._open()
        if not self._attached and now >= self._attach_due:
            self._attach_due = now + RETRY_SECONDS
            if not self._connection.sending:
                self._connection.lost = False  # what is lost after this counts
                self._connection.send(Parcel(encode(Attach(self.welcome.run, self.welcome.session)), []))
        if self.spans.on and now >= self._spans_due:
            self._spans_due = now + SPANS_SECONDS
            self._send_spans()

    def _mind_silence(self, silence: float) -> None:
        """Look for a broker that says nothing. Raises LinkError where patience is at its end."""
        link, address = self.config.link, self._connection.address
        if silence > MISSED * link.beat_seconds:
            self._greet()
        if silence > link.lease_seconds and not self._looking:
            self._looking = True
            self._inform(f"the broker at {address} has been silent for {link.lease_seconds:g} s; looking for it")
        limit = max(link.patience_seconds, link.lease_seconds)
        if link.patience_seconds and silence > limit:
            raise LinkError(f"the broker at {address} has been silent for {limit:g} s: is it still running?")

    def _greet(self, at_once: bool = False) -> None:
        """Say hello, and no beat, until the broker bids welcome; at once where an earlier hello may be lost."""
        if at_once or not self._greeting:
            self._hello_due = 0.0
        self._greeting = True

    # Control

    def _beat(self, now: float) -> None:
        """Say all that this peer holds; more often at first, when the broker's clock is not known yet."""
        pace = self.config.link.beat_seconds
        self._beat_due = now + (pace if self.clock.samples >= SAMPLES else pace / 10)
        self._connection.tell(encode(self.standing.beat(self.welcome.session, now, self._revision, self._attached)))
        self.standing.shelf.again()

    def _hear(self, header: bytes, at: float) -> None:
        message = decode_control(header)
        self._heard = at
        if self._looking:
            self._looking = False
            self._inform(f"the broker at {self._connection.address} is back")
        match message:
            case Refused():
                raise refusal(message)
            case Unknown():
                self._unknown = True
                self._greet()
            case Welcome():
                self._rejoin(message)
            case Orders():
                self.clock.take(message.echo, message.now, at)
                if message.revision > self._revision:
                    self._revision = message.revision
                    self._obey(message)
            case _:
                pass

    def _rejoin(self, welcome: Welcome) -> None:
        """Go on in the session that the broker offers, be it the one that there was or a new one.

        Raises LinkError where the broker has another run now.
        """
        address, before = self._connection.address, self.welcome
        if welcome.run != before.run:
            raise LinkError(f"the broker at {address} has another run now: start this peer again to take part in it")
        self._greeting, self._beat_due = False, 0.0
        self._revision = 0  # a broker that is back counts anew; what comes after this is newer than what came before
        self.welcome, self._hello = welcome, msgspec.structs.replace(self._hello, index=welcome.index)
        if self._unknown or (welcome.session, welcome.data_port) != (before.session, before.data_port):
            found = f"found the broker at {address} again" if self._met else "the broker had given this peer up"
            self._inform(f"{found}; joined again as {self._role} {welcome.index}")
            self.clock.forget()
            self._open()
        self._unknown = self._met = False

    def _obey(self, orders: Orders) -> None:
        """Forget what the broker no longer lists, and pass the orders on."""
        self.standing.obey(orders)
        if self._role == "server":
            self.spans.clients = {job.lease: job.client for job in orders.jobs if not isinstance(job, Init | Merge)}
        self.exchange.flows.keep({job.lease for job in orders.jobs})
        self.exchange.contexts.keep(orders.jobs)
        self._repeats.keep(orders.jobs)
        self._tell(orders)

    def _send_messages(self) -> None:
        while self._messages:
            message = msgspec.structs.replace(self._messages.popleft(), session=self.welcome.session)
            if isinstance(message, Telemetry):
                self._telemetry = message
            self._connection.tell(encode(message))

    def _send_spans(self) -> bool:
        """Send spans, if there are any, with the figures that were told last; return whether there were."""
        spans = self.spans.drain(self.clock)
        if spans:
            self._connection.tell(encode(self._with_spans(spans)))
        return bool(spans)

    def _with_spans(self, spans: tuple[Span, ...]) -> Telemetry:
        return msgspec.structs.replace(self._telemetry, session=self.welcome.session, losses=(), spans=spans)

    # Data

    def _receive(self, received: Received, at: float) -> None:
        message = decode_data(received.header)
        buffers = received.buffers
        check_frames(message, [buffer.nbytes for buffer in buffers], self._largest)
        match message:
            case TensorsMessage() | Step() if self._repeats.comes(message):
                self.exchange.receive(message, buffers, at)
            case TensorsMessage() | Step():
                answer = self._repeats.answer(message)
                if answer is not None:
                    self._connection.send(self._stamped(answer))
            case Pull():
                self._serve(message)
            case Chunk():
                fetched = self.standing.shelf.take(message, buffers[0] if buffers else None)
                if fetched is not None:
                    self._tell(fetched)
            case Attached(session=session) if session == self.welcome.session and not self._attached:
                self._attached, self._beat_due = True, 0.0  # with the next beat this peer may be prepared
                self._send_again()
            case Resend(lease=lease) if self._attached:
                self._send_again(lease)
            case Detached() if self._attached:
                self._connection.lost = True
            case _:
                pass

    def _send_again(self, lease: Lease | None = None) -> None:
        """Send what is not answered, and ask for what did not come, under a lease or at all: it may have been lost."""
        self.standing.shelf.start_over(lease)
        for outgoing in self._repeats.unanswered(lease):
            self._connection.send(self._stamped(outgoing))

    def _serve(self, pull: Pull) -> None:
        """Answer a pull from the states held here."""
        data = self.standing.shelf.serve(pull)
        if pull.offset >= 0:
            crash.at(self._points[0])
        run, session = self.welcome.run, self.welcome.session
        header = Chunk(run, session, pull.lease, pull.origin, pull.digest, pull.offset, data.nbytes, pull.what)
        self._connection.send(Parcel(encode(header), [data] if data.nbytes else []))

    def _send_all(self) -> None:
        self._send_messages()
        if self._attached:
            for transfer, piece in self.standing.shelf.wants():
                self._connection.send(Parcel(encode(self._pull(transfer, *piece)), []))
            while self._outbox:
                outgoing = self._outbox.popleft()
                if self._repeats.leaves(outgoing.message, outgoing):
                    self._connection.send(self._stamped(outgoing))
        for parcel in self._connection.release():
            if parcel.ready:
                crash.at(self._points[1])
                begin, self._sent = max(parcel.ready, self._sent), time.monotonic()
                self.spans.add("up", "send", begin, self._sent, parcel.step, parcel.micro, parcel.lease)

    def _stamped(self, outgoing: Outgoing) -> Parcel:
        """Return the message as it leaves: in the session that there is now, tensors with the broker's time."""
        message, frames, ready = outgoing
        run, session = self.welcome.run, self.welcome.session
        if isinstance(message, Step):
            return Parcel(encode(msgspec.structs.replace(message, run=run, session=session)), frames)
        scalars = {**message.scalars, "left": self.clock.now()}
        header = encode(msgspec.structs.replace(message, run=run, session=session, scalars=scalars))
        return Parcel(header, frames, message.step, message.micro, ready, message.lease)

    def _pull(self, transfer: Transfer, offset: int, length: int, what: What) -> Pull:
        ref, run, session = transfer.ref, self.welcome.run, self.welcome.session
        return Pull(run, session, transfer.lease, ref.holder, ref.digest, offset, length, what)
