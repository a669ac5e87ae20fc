"""One peer's time with its broker, from welcome to goodbye: beats and orders, tensors, states. One thread's work."""

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from zsplit.config import from_json, link_of
from zsplit.errors import LinkError, ZsplitError
from zsplit.greeting import RETRY_SECONDS
from zsplit.train.link.clock import Clock
from zsplit.train.link.connection import Connection, Parcel, Received
from zsplit.train.link.exchange import Exchange, Incoming, Outgoing
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
    ControlMessage,
    Detached,
    Hello,
    Init,
    Merge,
    Orders,
    Pull,
    Refused,
    Step,
    Telemetry,
    Welcome,
    What,
)
from zsplit.wire.messages import Tensors as TensorsMessage
from zsplit.wire.wake import Wake

SAMPLES = 5
"""Round trips after which the broker's clock is known well enough for beats to come at their own pace."""

SPANS_SECONDS = 0.5
"""How often spans are sent where there are any."""


class Ended(NamedTuple):
    """The link is over, for the reason given."""

    error: ZsplitError


Event = Orders | Incoming | Fetched | Ended


class Session:
    """`turn` waits for something to do and does it; `post` and `say` may be called by other threads.

    Raises ConfigError where the config's trace for this client's link cannot be read.
    """

    def __init__(
        self,
        connection: Connection,
        welcome: Welcome,
        hello: Hello,
        tell: Callable[[Event], None],
        wake: Wake,
    ) -> None:
        self.welcome = welcome
        self.config = from_json(welcome.config)
        self.standing = Standing()
        self.clock = Clock()
        self.spans = Recorder(self.config.run.timeline)
        self.exchange = Exchange(self.clock, self.spans, self._post, tell, self._fail, self.config.run.seed)
        self._run, self._session = welcome.run, welcome.session
        self._connection, self._hello = connection, hello
        self._tell, self._wake = tell, wake
        self._largest = max(2 * CHUNK, self.config.broker.max_message_mb * 2**20)
        self._outbox: deque[Outgoing] = deque()
        self._messages: deque[ControlMessage] = deque()
        self._telemetry = Telemetry(session=self._session)
        self._attached = False
        self._sent = 0.0
        self._revision = 0
        self._beat_due = self._attach_due = self._spans_due = 0.0
        self._heard = time.monotonic()
        self._open()

    def _open(self) -> None:
        """Connect for tensors, and from now on be as slow as the config wants a client's link to be."""
        if self._hello.role == "client":
            shape = link_of(self.config, self.welcome.index)
            self._connection.shape(*lines(shape.rows(), shape.rtt_ms / 1000, time.monotonic()))
        self._connection.open_data(self.welcome.data_port, self._largest)

    # For other threads

    def say(self, message: ControlMessage) -> None:
        """Send a control message soon; it may be lost."""
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
        self._connection.wait(self._due())
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
        self._connection.tell(encode(Bye(session=self._session)))
        self._connection.flush()

    def _due(self) -> float:
        due = self._beat_due
        if not self._attached:
            due = min(due, self._attach_due)
        return min(due, self._spans_due) if self.spans.on else due

    def _keep_time(self, now: float) -> None:
        if now >= self._beat_due:
            self._beat(now)
        if not self._attached and now >= self._attach_due:
            self._attach_due = now + RETRY_SECONDS
            if not self._connection.sending:
                self._connection.send(Parcel(encode(Attach(self._run, self._session)), []))
        if self.spans.on and now >= self._spans_due:
            self._spans_due = now + SPANS_SECONDS
            self._send_spans()
        silence = self.config.link.lease_seconds
        if now - self._heard > silence:
            address = self._connection.address
            raise LinkError(f"the broker at {address} has been silent for {silence:g} s: is it still running?")

    # Control

    def _beat(self, now: float) -> None:
        """Say all that this peer holds; more often at first, when the broker's clock is not known yet."""
        pace = self.config.link.beat_seconds
        self._beat_due = now + (pace if self.clock.samples >= SAMPLES else pace / 10)
        if now - self._heard > 2.5 * pace:
            # The connection may be a new one, which the broker does not know yet.
            self._connection.tell(encode(self._hello))
        self._connection.tell(encode(self.standing.beat(self._session, now, self._attached)))
        self.standing.shelf.again()

    def _hear(self, header: bytes, at: float) -> None:
        message = decode_control(header)
        self._heard = at
        match message:
            case Refused(sentence=sentence):
                raise LinkError(sentence)
            case Welcome(session=session) if session != self._session:
                raise LinkError(
                    "The broker had given this peer up and does not know its session any more: start it again"
                )
            case Orders():
                self.clock.take(message.echo, message.now, at)
                if message.revision > self._revision:
                    self._revision = message.revision
                    self._obey(message)
            case _:
                pass

    def _obey(self, orders: Orders) -> None:
        """Forget what the broker no longer lists, and pass the orders on."""
        self.standing.obey(orders)
        if self._hello.role == "server":
            self.spans.clients = {job.lease: job.client for job in orders.jobs if not isinstance(job, Init | Merge)}
        self.exchange.flows.keep({job.lease for job in orders.jobs})
        self.exchange.contexts.keep(orders.jobs)
        self._tell(orders)

    def _send_messages(self) -> None:
        while self._messages:
            message = self._messages.popleft()
            if isinstance(message, Telemetry):
                self._telemetry = message
            self._connection.tell(encode(message))

    def _send_spans(self) -> bool:
        """Send spans, if there are any, with the figures that were told last; return whether there were."""
        spans = self.spans.drain(self.clock)
        if spans:
            self._connection.tell(encode(msgspec.structs.replace(self._telemetry, losses=(), spans=spans)))
        return bool(spans)

    # Data

    def _receive(self, received: Received, at: float) -> None:
        message = decode_data(received.header)
        buffers = received.buffers
        check_frames(message, [buffer.nbytes for buffer in buffers], self._largest)
        match message:
            case TensorsMessage() | Step():
                self.exchange.receive(message, buffers, at)
            case Pull():
                self._serve(message)
            case Chunk():
                fetched = self.standing.shelf.take(message, buffers[0] if buffers else None)
                if fetched is not None:
                    self._tell(fetched)
            case Attached():
                self._attached = True
            case Detached() if self._attached:
                raise LinkError(f"the data connection to the broker at {self._connection.address} was lost")
            case _:
                pass

    def _serve(self, pull: Pull) -> None:
        """Answer a pull from the states held here."""
        data = self.standing.shelf.serve(pull)
        header = Chunk(
            self._run, self._session, pull.lease, pull.origin, pull.digest, pull.offset, data.nbytes, pull.what
        )
        self._connection.send(Parcel(encode(header), [data] if data.nbytes else []))

    def _send_all(self) -> None:
        self._send_messages()
        if self._attached:
            for transfer, piece in self.standing.shelf.wants():
                self._connection.send(Parcel(encode(self._pull(transfer, *piece)), []))
            while self._outbox:
                self._connection.send(self._stamped(self._outbox.popleft()))
        for parcel in self._connection.release():
            if parcel.ready:
                begin, self._sent = max(parcel.ready, self._sent), time.monotonic()
                self.spans.add("up", "send", begin, self._sent, parcel.step, parcel.micro, parcel.lease)

    def _stamped(self, outgoing: Outgoing) -> Parcel:
        """Return the message as it leaves; tensors say when that was, on the broker's clock."""
        message, frames, ready = outgoing
        if isinstance(message, Step):
            return Parcel(encode(message), frames)
        scalars = {**message.scalars, "left": self.clock.now()}
        header = encode(msgspec.structs.replace(message, scalars=scalars))
        return Parcel(header, frames, message.step, message.micro, ready, message.lease)

    def _pull(self, transfer: Transfer, offset: int, length: int, what: What) -> Pull:
        ref = transfer.ref
        return Pull(self._run, self._session, transfer.lease, ref.holder, ref.digest, offset, length, what)
