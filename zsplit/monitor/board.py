"""What the monitor knows: events in, the latest of each kind out. No clock, no socket, no terminal.

`now` is any clock that only goes forward, in seconds; it need not be the broker's.
"""

from collections import deque
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from zsplit.errors import RemoteProtocolError
from zsplit.monitor.curve import Curve
from zsplit.wire.events import (
    AnyEvent,
    BrokerEvent,
    ClientEvent,
    Event,
    LogEvent,
    RoundEvent,
    RunEvent,
    ServerEvent,
    decode_event,
    topic,
)

ENDED = frozenset({"finished", "failed"})
"""States of a run after which nothing more happens."""

BEFORE = frozenset({"waiting", "measuring", "planning"})
"""States of a run before its first round."""

SCHEMA = Event().v
"""The version of the events that this monitor reads."""

ROUNDS = 1000
"""Rounds that are kept, the latest."""

LINES = 100
"""Log lines that are kept, the latest."""

LONGEST = 1000
"""Characters of a text that are kept."""

E = TypeVar("E", bound=Event)


class Board:
    """The latest of everything that was published about one run.

    Public fields are to be read, not written: `run`, `broker`, `clients` and `servers` by index, `rounds` by
    number, `log` (oldest first), `curve` (training loss of each step, in the order of arrival). `missed`
    counts events that the gaps in `seq` betray, `repeats` those that came again, `unreadable` what was no
    event. `heard` is when the last event came, None before the first.
    """

    run: RunEvent | None
    broker: BrokerEvent | None
    heard: float | None

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.run = None
        self.broker = None
        self.clients: dict[int, ClientEvent] = {}
        self.servers: dict[int, ServerEvent] = {}
        self.rounds: dict[int, RoundEvent] = {}
        self.log: deque[LogEvent] = deque(maxlen=LINES)
        self.curve = Curve()
        self.missed = self.repeats = self.unreadable = 0
        self.heard = None
        self._seen: dict[str, tuple[int, float]] = {}
        self._ahead = 0.0
        self._parts: dict[int, tuple[int, float]] = {}

    @property
    def ended(self) -> bool:
        """Whether the run is finished or has failed."""
        return self.run is not None and self.run.state in ENDED

    def read(self, message: Sequence[bytes], now: float) -> AnyEvent | None:
        """Take one message, `[topic, body]`; return its event if that is new. What is no event is counted."""
        event = _decode(message)
        if event is None:
            self.unreadable += 1
            return None
        return event if self.take(event, now) else None

    def take(self, event: AnyEvent, now: float) -> bool:
        """Fold in one event that came at `now`; return whether it is new. A repeat changes nothing.

        The run event of another run clears the board. A `seq` that went back while `time` went on is a
        broker that was started again and counts from 1.
        """
        if isinstance(event, RunEvent) and self.run is not None and event.run != self.run.run:
            self._clear()
        if not self._is_new(event):
            self.repeats += 1
            return False
        self.heard = now
        self._ahead = event.time - now
        self._keep(event)
        return True

    def note(self, event: LogEvent) -> None:
        """Put a line among the broker's that is not the broker's."""
        self._keep(event)

    def age(self, peer: ClientEvent | ServerEvent, now: float) -> float:
        """Return the seconds since a peer's last sign of life, as the broker's clock has it."""
        return peer.age + max(0.0, now + self._ahead - peer.time)

    def elapsed(self, now: float) -> float:
        """Return the seconds that the run has taken; they stand still once it has ended."""
        if self.run is None or self.ended:
            return self.run.seconds if self.run else 0.0
        return self.run.seconds + max(0.0, now + self._ahead - self.run.time)

    def round(self) -> int:
        """Return the round that is worked on, counted from 1; before the first it is 0, at the end the last done."""
        if self.run is None or self.ended or self.run.state in BEFORE:
            return self.run.round if self.run else 0
        return self.run.current

    def progress(self) -> float:
        """Return the share of the run's rounds that is done, the steps of the current one included."""
        if self.run is None or self.run.rounds < 1:
            return 0.0
        if self.run.state in ("finished", "serving"):
            return 1.0
        parts = [part for number, part in self._parts.values() if number == self.run.current]
        done = max(0, self.run.current - 1) + sum(parts) / max(1, self.run.clients, len(parts))
        return min(1.0, max(0.0, done / self.run.rounds))

    def _is_new(self, event: AnyEvent) -> bool:
        name = topic(event)
        seq, time = self._seen.get(name, (0, 0.0))
        if event.seq <= seq and event.time <= time:
            return False
        if seq and event.seq > seq:
            self.missed += event.seq - seq - 1
        self._seen[name] = (event.seq, event.time)
        return True

    def _keep(self, event: AnyEvent) -> None:
        match event:
            case RunEvent():
                self.run = event
            case BrokerEvent():
                self.broker = event
            case ServerEvent():
                self.servers[event.index] = event
            case LogEvent():
                self.log.append(event)
            case RoundEvent():
                self.rounds[event.round] = event
                if len(self.rounds) > ROUNDS:
                    del self.rounds[min(self.rounds)]
            case ClientEvent():
                self._keep_client(event)

    def _keep_client(self, event: ClientEvent) -> None:
        before = self.clients.get(event.index)
        if event.loss is None and before is not None:  # no step since the last event
            event = msgspec.structs.replace(event, loss=before.loss)
        self.clients[event.index] = event
        for loss in event.losses:
            self.curve.add(loss)
        if event.state == "training" and event.steps > 0:
            number, part = self._parts.get(event.index, (0, 0.0))
            share = min(1.0, event.step / event.steps)
            self._parts[event.index] = (event.round, max(part, share) if number == event.round else share)


def _decode(message: Sequence[bytes]) -> AnyEvent | None:
    try:
        event = decode_event(message[-1])
    except RemoteProtocolError:
        return None
    fits = event.v == SCHEMA and list(message[:-1]) == [topic(event).encode()]
    return _printable(event) if fits else None


def _printable(event: E) -> E:
    """Return the event with nothing in its texts that could steer a terminal, and no text without end."""
    texts = {name: getattr(event, name) for name in event.__struct_fields__}
    changed = {
        name: "".join(c if c.isprintable() else " " for c in text[:LONGEST])
        for name, text in texts.items()
        if isinstance(text, str) and not (text.isprintable() and len(text) <= LONGEST)
    }
    return msgspec.structs.replace(event, **changed) if changed else event
