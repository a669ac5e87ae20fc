"""One peer's connection to the broker: a thread that beats, sends, receives and transfers states.

The trainer's thread computes; this one does everything that must not wait for it. They meet at a queue
of events (orders, tensors, fetched states, the end) and at an outbox. States that this peer holds are
served from here too, while the trainer goes on.
"""

import contextlib
import queue
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import zmq
from torch import Tensor

from zsplit.codec import decode
from zsplit.config import from_json
from zsplit.errors import LinkError, ZsplitError
from zsplit.greeting import RETRY_SECONDS, greet, parse_address
from zsplit.train.shelf import Fetched, Shelf, Transfer
from zsplit.train.state import State
from zsplit.wire.frames import (
    CHUNK,
    MAX_CONTROL,
    MAX_FRAMES,
    check_frames,
    decode_control,
    decode_data,
    encode,
)
from zsplit.wire.messages import (
    PROTOCOL,
    Attach,
    Attached,
    Beat,
    Bye,
    Chunk,
    ControlMessage,
    DataMessage,
    Detached,
    Fault,
    Held,
    Hello,
    Kind,
    Lease,
    Orders,
    Prepared,
    Pull,
    Ref,
    Refused,
    Role,
    Step,
    Telemetry,
    TensorMeta,
    Welcome,
    What,
)
from zsplit.wire.messages import Tensors as TensorsMessage
from zsplit.wire.wake import Wake

CONNECT_SECONDS = 60.0
"""How long a peer goes on trying to reach a broker that does not answer, unless told otherwise."""


class Incoming(NamedTuple):
    """A tensor message of a lease; the tensors share the memory that they were received in."""

    message: TensorsMessage | Step
    tensors: dict[str, Tensor]


class Ended(NamedTuple):
    """The link is over, for the reason given."""

    error: ZsplitError


Event = Orders | Incoming | Fetched | Ended


class Link:
    """The connection. `join` starts it; afterwards the trainer reads `next` and calls the verbs below it."""

    def __init__(self, address: str, role: Role, index: int = -1, say: Callable[[str], None] = lambda _: None) -> None:
        self.address = address
        self._host, _ = parse_address(address)
        self._say = say
        self._hello = Hello(
            protocol=PROTOCOL, role=role, index=index, instance=uuid.uuid4().hex, host=socket.gethostname()
        )
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._welcomed: queue.SimpleQueue[Welcome | ZsplitError] = queue.SimpleQueue()
        self._wake = Wake()
        self._lock = threading.Lock()
        self._outbox: deque[tuple[bytes, list[memoryview]]] = deque()
        self._messages: deque[ControlMessage] = deque()
        self._shelf = Shelf()
        self._held: dict[Lease, Held] = {}
        self._prepared: Prepared | None = None
        self._beat_due = 0.0
        self._attached = False
        self._closing = False
        self._thread = threading.Thread(target=self._live, name="zsplit-link", daemon=True)

    # For the trainer

    def join(self, connect_seconds: float = CONNECT_SECONDS) -> Welcome:
        """Say hello until the broker answers. Raises LinkError or ConfigError where it refuses or is not there."""
        self._connect_seconds = connect_seconds
        self._thread.start()
        answer = self._welcomed.get()
        if isinstance(answer, ZsplitError):
            self._thread.join()
            raise answer
        self.welcome = answer
        return answer

    def next(self, timeout: float | None = None) -> Orders | Incoming | Fetched | None:
        """Return the next event, or None after `timeout` seconds. Raises what ended the link."""
        try:
            event = self._events.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(event, Ended):
            raise event.error
        return event

    def prepared(self, prepared: Prepared) -> None:
        """Tell the broker that this peer can be given jobs."""
        with self._lock:
            self._prepared = prepared
        self._beat_now()

    def report(self, held: Held, state: State | None = None, at_once: bool = True) -> None:
        """Tell the broker how far a job is: at once, or with the next beat.

        `state` is the job's result, whose digest `held` names: it is kept and served until nobody needs it.
        """
        with self._lock:
            self._held[held.lease] = held
            if state is not None:
                self._shelf.put(state)
        if at_once:
            self._beat_now()

    def fetch(self, lease: Lease, ref: Ref, wanted: Callable[[str], bool] = lambda _: True) -> None:
        """Ask for a state, or the tensors in it that are wanted by name; it arrives as `Fetched`."""
        fetched = self._shelf.fetch(lease, ref, wanted)
        if fetched is not None:
            self._events.put(fetched)
        else:
            self._wake.set()

    def send_tensors(
        self,
        lease: Lease,
        kind: Kind,
        step: int,
        micro: int,
        leg: int,
        encoded: Iterable[tuple[TensorMeta, memoryview]],
        scalars: dict[str, float],
    ) -> None:
        """Send tensors of a micro-batch; their memory must stay as it is until they were answered."""
        metas, frames = zip(*encoded, strict=True) if encoded else ((), ())
        run, session = self.welcome.run, self.welcome.session
        self._send(TensorsMessage(run, session, lease, kind, step, micro, leg, tuple(metas), scalars), list(frames))

    def send_step(self, lease: Lease, step: int, scale: float) -> None:
        """Tell the server to step its optimizer, gradients scaled."""
        self._send(Step(self.welcome.run, self.welcome.session, lease, step, scale), [])

    def telemetry(self, losses: tuple[float, ...], samples_per_second: float, idle_share: float) -> None:
        """Tell the monitor how it goes; may be lost."""
        session = self.welcome.session
        self._messages.append(
            Telemetry(session=session, losses=losses, samples_per_second=samples_per_second, idle_share=idle_share)
        )
        self._wake.set()

    def fault(self, sentence: str) -> None:
        """Tell the broker that this peer cannot go on."""
        self._messages.append(Fault(session=self.welcome.session, sentence=sentence))
        self._wake.set()

    def _send(self, message: TensorsMessage | Step, frames: list[memoryview]) -> None:
        self._outbox.append((encode(message), frames))
        self._wake.set()

    def close(self) -> None:
        """Say goodbye and end the thread."""
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        self._wake.close()

    def _beat_now(self) -> None:
        self._beat_due = 0.0
        self._wake.set()

    # The thread

    def _live(self) -> None:
        context = zmq.Context()
        try:
            self._control = self._socket(context, MAX_CONTROL)
            self._control.connect(f"tcp://{self.address}")
            self._data = self._socket(context, -1)
            seconds, closing = self._connect_seconds, lambda: self._closing
            self._enter(greet(self._control, self.address, self._hello, seconds, self._say, closing))
            while not self._closing:
                self._turn()
            self._leave()
        except ZsplitError as error:
            self._end(error)
        except Exception as error:  # a bug, but the trainer must not wait for ever
            self._end(LinkError(f"The link to the broker failed with {type(error).__name__}: {error}"))
        finally:
            context.destroy(linger=500)

    def _end(self, error: ZsplitError) -> None:
        self._welcomed.put(error)
        self._events.put(Ended(error))

    def _socket(self, context: zmq.Context[zmq.Socket[bytes]], max_frame: int) -> zmq.Socket[bytes]:
        made = context.socket(zmq.DEALER)
        made.setsockopt(zmq.IMMEDIATE, 1)  # nothing may wait for a broker that is not there: it may be another
        made.setsockopt(zmq.MAXMSGSIZE, max_frame)
        made.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        made.setsockopt(zmq.TCP_KEEPALIVE, 1)
        made.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 4)
        made.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 2)
        made.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
        if self._host.startswith("["):
            made.setsockopt(zmq.IPV6, 1)
        return made

    def _enter(self, welcome: Welcome) -> None:
        self.config = from_json(welcome.config)
        self._session, self._run = welcome.session, welcome.run
        self._data.setsockopt(zmq.MAXMSGSIZE, max(2 * CHUNK, self.config.broker.max_message_mb * 2**20))
        self._data.connect(f"tcp://{self._host}:{welcome.data_port}")
        self._poller = zmq.Poller()
        for source in (self._control, self._data, self._wake.fd):
            self._poller.register(source, zmq.POLLIN)
        self._heard = time.monotonic()
        self._attach_due = 0.0
        self._revision = 0
        self._welcomed.put(welcome)

    def _turn(self) -> None:
        now = time.monotonic()
        due = self._beat_due if self._attached else min(self._beat_due, self._attach_due)
        ready = dict(self._poller.poll(max(0, int((due - now) * 1000))))
        if self._wake.fd in ready:
            self._wake.clear()
        if self._data in ready:
            self._drain(self._receive_data)
        if self._control in ready:
            self._drain(self._receive_control)
        self._send_all()
        now = time.monotonic()
        if now >= self._beat_due:
            self._beat_due = now + self.config.link.beat_seconds
            if now - self._heard > 2.5 * self.config.link.beat_seconds:
                self._send_control(self._hello)  # the connection may be a new one, which the broker does not know yet
            self._send_control(self._beat(now))
            self._shelf.again()
        if not self._attached and now >= self._attach_due:
            self._attach_due = now + RETRY_SECONDS
            self._send_data(encode(Attach(self._run, self._session)), [])
        if now - self._heard > self.config.link.lease_seconds:
            silence = self.config.link.lease_seconds
            raise LinkError(f"the broker at {self.address} has been silent for {silence:g} s: is it still running?")

    def _drain(self, take: Callable[[], None]) -> None:
        with contextlib.suppress(zmq.Again):
            for _ in range(64):
                take()

    # Control

    def _beat(self, now: float) -> Beat:
        with self._lock:
            return Beat(
                session=self._session,
                sent=now,
                held=tuple(self._held.values()),
                have=self._shelf.digests(),
                prepared=self._prepared if self._attached else None,
            )

    def _receive_control(self) -> None:
        message = decode_control(self._control.recv(zmq.NOBLOCK))
        self._heard = time.monotonic()
        if isinstance(message, Refused):
            raise LinkError(message.sentence)
        if isinstance(message, Welcome) and message.session != self._session:
            raise LinkError("The broker had given this peer up and does not know its session any more: start it again")
        if isinstance(message, Orders) and message.revision > self._revision:
            self._revision = message.revision
            self._obey(message)

    def _obey(self, orders: Orders) -> None:
        """Forget what the broker no longer lists, and pass the orders on."""
        leases = {job.lease for job in orders.jobs}
        with self._lock:
            self._held = {lease: held for lease, held in self._held.items() if lease in leases}
            self._shelf.keep({*orders.keep, *(held.digest for held in self._held.values())}, leases)
        self._events.put(orders)

    def _send_control(self, message: ControlMessage) -> None:
        with contextlib.suppress(zmq.Again):  # the next beat mends it
            self._control.send(encode(message), zmq.NOBLOCK)

    def _leave(self) -> None:
        while self._messages:
            self._send_control(self._messages.popleft())
        self._send_control(Bye(session=self._session))

    # Data

    def _receive_data(self) -> None:
        header = self._data.recv(zmq.NOBLOCK)
        frames: list[zmq.Frame] = []
        more = self._data.getsockopt(zmq.RCVMORE)
        while more:
            frame = self._data.recv(copy=False)
            if len(frames) < MAX_FRAMES:
                frames.append(frame)
            more = frame.more
        message = decode_data(header)
        buffers = [memoryview(frame.buffer) for frame in frames]
        check_frames(message, [buffer.nbytes for buffer in buffers])
        self._take(message, buffers)

    def _take(self, message: DataMessage, buffers: list[memoryview]) -> None:
        match message:
            case TensorsMessage(tensors=metas):
                self._events.put(Incoming(message, _decoded(metas, buffers)))
            case Step():
                self._events.put(Incoming(message, {}))
            case Pull():
                self._serve(message)
            case Chunk():
                fetched = self._shelf.take(message, buffers[0] if buffers else None)
                if fetched is not None:
                    self._events.put(fetched)
            case Attached():
                self._attached = True
            case Detached() if self._attached:
                raise LinkError(f"the data connection to the broker at {self.address} was lost")
            case _:
                pass

    def _serve(self, pull: Pull) -> None:
        """Answer a pull from the states held here."""
        data = self._shelf.serve(pull)
        header = Chunk(
            self._run, self._session, pull.lease, pull.origin, pull.digest, pull.offset, data.nbytes, pull.what
        )
        self._outbox.append((encode(header), [data] if data.nbytes else []))

    def _send_all(self) -> None:
        while self._messages:
            self._send_control(self._messages.popleft())
        if self._attached:
            for transfer, piece in self._shelf.wants():
                self._outbox.append((encode(self._pull(transfer, *piece)), []))
        while self._outbox and self._attached:
            if not self._send_data(*self._outbox[0]):
                return
            self._outbox.popleft()

    def _pull(self, transfer: Transfer, offset: int, length: int, what: What) -> Pull:
        ref = transfer.ref
        return Pull(self._run, self._session, transfer.lease, ref.holder, ref.digest, offset, length, what)

    def _send_data(self, header: bytes, frames: list[memoryview]) -> bool:
        """Send one data message; return whether the socket took it."""
        try:
            self._data.send(header, zmq.NOBLOCK | (zmq.SNDMORE if frames else 0))
        except zmq.Again:
            return False
        for number, frame in enumerate(frames, 1):
            self._data.send(frame, zmq.SNDMORE if number < len(frames) else 0, copy=False)
        return True


def _decoded(metas: tuple[TensorMeta, ...], buffers: list[memoryview]) -> dict[str, Tensor]:
    return {meta.what: decode(meta, buffer) for meta, buffer in zip(metas, buffers, strict=True)}
