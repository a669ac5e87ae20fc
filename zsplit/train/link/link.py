"""One peer's connection to the broker, as the trainer uses it. A thread beats, sends, receives and transfers states.

The trainer's thread computes; all that must not wait for it is done by others: the session's thread moves messages
and serves the states held here, two lanes encode and decode tensors. What is news comes through one queue.
"""

import contextlib
import queue
import socket
import threading
import uuid
from collections.abc import Callable, Sequence

import torch

from zsplit.errors import ConfigError, LinkError, ZsplitError
from zsplit.greeting import greet, parse_address
from zsplit.train.link.clock import Clock
from zsplit.train.link.connection import Connection
from zsplit.train.link.exchange import Incoming, Tagged
from zsplit.train.link.session import Ended, Event, Leave, Session
from zsplit.train.link.shelf import Fetched
from zsplit.train.link.spans import Recorder
from zsplit.train.state import State
from zsplit.wire.frames import encode
from zsplit.wire.messages import (
    PROTOCOL,
    Fault,
    Flow,
    Held,
    Hello,
    Kind,
    Lease,
    Orders,
    Prepared,
    Ref,
    Role,
    Step,
    Telemetry,
    Welcome,
)
from zsplit.wire.messages import Tensors as TensorsMessage
from zsplit.wire.wake import Wake

CONNECT_SECONDS = 60.0
"""How long a peer goes on trying to reach a broker that does not answer, unless told otherwise."""

UNSTAMPED = ""
"""Stands for run and session in a message of the trainer: it gets them when it leaves, since they may change."""


class Link:
    """The connection. `join` starts it; afterwards the trainer reads `next` and calls the verbs below it.

    `clock` is the broker's clock, `spans` keeps what is done when for the run's timeline.
    """

    clock: Clock
    spans: Recorder

    def __init__(self, address: str, role: Role, index: int = -1, say: Callable[[str], None] = lambda _: None) -> None:
        parse_address(address)
        self.address = address
        self._say = say
        self._hello = Hello(
            protocol=PROTOCOL, role=role, index=index, instance=uuid.uuid4().hex, host=socket.gethostname()
        )
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._joined: queue.SimpleQueue[Session | ZsplitError] = queue.SimpleQueue()
        self._wake = Wake()
        self._closing = False
        self._thread = threading.Thread(target=self._live, name="zsplit-link", daemon=True)

    def join(self, connect_seconds: float = CONNECT_SECONDS) -> Welcome:
        """Say hello until the broker answers. Raises LinkError or ConfigError where it refuses or is not there."""
        self._connect_seconds = connect_seconds
        self._thread.start()
        answer = self._joined.get()
        if isinstance(answer, ZsplitError):
            self._thread.join()
            raise answer
        self._session = answer
        self.clock, self.spans = answer.clock, answer.spans
        return self.welcome

    @property
    def welcome(self) -> Welcome:
        """The broker's latest: after an absence a server may have another index."""
        return self._session.welcome

    def next(self, timeout: float | None = None) -> Orders | Incoming | Fetched | Leave | None:
        """Return the next event, or None after `timeout` seconds (0: where there is none). Raises what ended the link.

        While the broker is not there nothing comes; nothing is lost either.
        """
        try:
            event = self._events.get(timeout != 0, timeout)
        except queue.Empty:
            return None
        if isinstance(event, Ended):
            raise event.error
        return event

    # Jobs

    def prepared(self, prepared: Prepared) -> None:
        """Tell the broker that this peer can be given jobs."""
        self._session.standing.prepare(prepared)
        self._session.beat_now()

    def report(self, held: Held, state: State | None = None, at_once: bool = True) -> None:
        """Tell the broker how far a job is: at once, or with the next beat.

        `state` is the job's result, whose digest `held` names: it is kept and served until nobody needs it.
        """
        self._session.standing.report(held, state)
        if at_once:
            self._session.beat_now()

    def fetch(self, lease: Lease, ref: Ref, wanted: Callable[[str], bool] = lambda _: True) -> None:
        """Ask for a state, or the tensors in it that are wanted by name; it arrives as `Fetched`."""
        fetched = self._session.standing.shelf.fetch(lease, ref, wanted)
        if fetched is not None:
            self._events.put(fetched)
        else:
            self._wake.set()

    # Tensors

    def unpack_on(self, device: torch.device) -> None:
        """Have compressed tensors that arrive unpacked on this device; raw ones stay in the memory they came in."""
        self._session.exchange.device = device

    def send_tensors(
        self,
        lease: Lease,
        kind: Kind,
        step: int,
        micro: int,
        leg: int,
        tensors: Sequence[Tagged],
        scalars: dict[str, float],
    ) -> None:
        """Send tensors of a micro-batch, each as (what, tensor, codec).

        Their memory must stay as it is until they were answered. An error in encoding them comes with `next`.
        """
        message = TensorsMessage(UNSTAMPED, UNSTAMPED, lease, kind, leg, (), step, micro, scalars)
        self._session.exchange.send(message, tensors)

    def send_step(self, lease: Lease, step: int, scale: float) -> None:
        """Tell the server to step its optimizer, gradients scaled."""
        self._session.exchange.send(Step(UNSTAMPED, UNSTAMPED, lease, step, scale))

    def flow(self, lease: Lease) -> Flow:
        """Return what came in under the lease and how long it was on its way, and forget it."""
        return self._session.exchange.flows.take(lease)

    # Words

    def telemetry(self, losses: tuple[float, ...], samples_per_second: float, idle_share: float) -> None:
        """Tell the monitor how it goes; may be lost."""
        self._session.say(
            Telemetry(session=UNSTAMPED, losses=losses, samples_per_second=samples_per_second, idle_share=idle_share)
        )

    def fault(self, sentence: str, fatal: bool = False) -> None:
        """Tell the broker that this peer cannot go on; with `fatal` that nobody can, so that the run is to end."""
        self._session.say(Fault(session=UNSTAMPED, sentence=sentence, fatal=fatal))

    # Its life

    def leave(self, sentence: str) -> None:
        """Have `next` return that this peer is to leave, for this reason; safe to call from a signal handler."""
        self._events.put(Leave(sentence))

    def close(self) -> None:
        """Say goodbye and end the threads."""
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        self._wake.close()

    def _live(self) -> None:
        """The link's thread: hello, a session, goodbye."""
        connection = Connection(self.address, self._wake, self._hello.role)
        try:
            session = self._enter(connection)
            self._joined.put(session)
            with contextlib.closing(session.exchange):
                while not self._closing:
                    session.turn()
                session.leave()
        except ZsplitError as error:
            self._end(error)
        except Exception as error:  # a bug, but the trainer must not wait for ever
            self._end(LinkError(f"The link to the broker failed with {type(error).__name__}: {error}"))
        finally:
            connection.close()

    def _enter(self, connection: Connection) -> Session:
        """Say hello and begin the session that the broker offers; where its config cannot be met, tell it why."""
        seconds, closing = self._connect_seconds, lambda: self._closing
        welcome = greet(connection.control, self.address, self._hello, seconds, self._say, closing)
        try:
            return Session(connection, welcome, self._hello, self._events.put, self._wake, self._say)
        except ConfigError as error:
            connection.tell(encode(Fault(session=welcome.session, sentence=str(error))))
            connection.flush()
            raise

    def _end(self, error: ZsplitError) -> None:
        self._joined.put(error)
        self._events.put(Ended(error))
