"""`timeline.json`: what every peer did when, as a trace that Perfetto and `zsplit timeline` open.

The file is in the array form of Chrome's trace event format: a process for each peer, a thread for each of its lanes,
an event on a line. The array's closing bracket may be missing in that form, so what a killed broker leaves opens too.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec
from msgspec import UNSET, UnsetType

from zsplit.wire.messages import Amount, Finite, Span
from zsplit_broker.disk import storage_errors, write_all
from zsplit_broker.work import Peer

TIMELINE = "timeline.json"

MAX_SPANS = 2_000_000
"""Spans that a timeline takes, about 250 MB: more than any viewer is pleased with."""

SLACK = 0.001
"""Seconds by which spans of a thread may seem to overlap: what is known of a peer's clock gets better as it runs."""

ROWS = 32
"""Rows of a thread at most; what overlaps still is moved behind what was there."""

SERVERS = 1_000_000
"""Place of server 0 in the order of the peers, below all clients."""

LANES = {"compute": "compute", "up": "out", "down": "in"}
"""Lanes in the order of a peer's rows, and what they are called here: a server's way out is a client's way in."""

ARROWS = {
    ("client", "send"): ("s", 0),
    ("server", "receive"): ("f", 0),
    ("server", "send"): ("s", 1),
    ("client", "receive"): ("f", 1),
}
"""Where the arrow of a micro-batch starts and finishes on each leg, by role and name of the span."""


class TraceEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One event of the format: `ph` is its phase, `ts` and `dur` are in µs; the names are the format's.

    Phases written here: M names a process or a thread, X is a span, s and f are the two ends of an arrow.
    """

    ph: str
    name: str
    pid: int
    tid: int = 0
    ts: Finite | UnsetType = UNSET
    dur: Amount | UnsetType = UNSET
    args: dict[str, str | int] = {}
    cat: str = ""  # the lane of a span
    id: str = ""
    bp: str = ""


class Timeline:
    """The file. Its methods only queue what is to be done, by `submit`: the disk and the encoding are the writer's."""

    def __init__(self, folder: Path, submit: Callable[[str, Callable[[], None]], None]) -> None:
        self._folder = folder
        self._submit = submit
        self._trace = Trace()
        self._spans = 0
        self._file = -1
        self._length = 0

    def begin_round(self, number: int, now: float) -> None:
        """Note that spans from `now` on belong to this round, counted from 1. Only its first call counts."""
        self._submit("", partial(self._trace.begin_round, number, now))

    def add(self, peer: Peer, spans: Sequence[Span]) -> str:
        """Write a peer's spans; return the sentence to log when the timeline is full, once, else nothing."""
        room = MAX_SPANS - self._spans
        self._spans += len(spans)
        if spans and room > 0:
            self._submit("", partial(self._append, peer, spans[:room]))
        if 0 <= room < len(spans):
            return f"{TIMELINE} is full ({MAX_SPANS:,} spans): the rest of the run is not in it"
        return ""

    def finish(self) -> None:
        """Close the array and the file."""
        self._submit("", self._finish)

    def _append(self, peer: Peer, spans: Sequence[Span]) -> None:
        lines = [msgspec.json.encode(event) for event in self._trace.events(peer, spans)]
        self._write((b",\n" if self._length else b"[\n") + b",\n".join(lines))

    def _finish(self) -> None:
        self._write(b"\n]\n" if self._length else b"[\n]\n")
        os.close(self._file)

    def _write(self, data: bytes) -> None:
        with storage_errors(self._folder, len(data), "what was stored is intact"):
            if self._file < 0:
                self._file = os.open(self._folder / TIMELINE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            write_all(self._file, data, self._length)
        self._length += len(data)


class Trace:
    """Turns spans into events. It remembers who has a name already, and when rounds began."""

    def __init__(self) -> None:
        self._rounds: list[int] = []
        self._began: list[float] = []
        self._processes: dict[Peer, Process] = {}

    def begin_round(self, number: int, now: float) -> None:
        """Note when a round began."""
        if not self._rounds or number > self._rounds[-1]:
            self._rounds.append(number)
            self._began.append(now)

    def events(self, peer: Peer, spans: Sequence[Span]) -> Iterator[TraceEvent]:
        """Yield the events of a peer's spans, and before them those that name what is new."""
        if peer not in self._processes:
            self._processes[peer] = Process(peer, len(self._processes) + 1)
            yield from self._processes[peer].name()
        process = self._processes[peer]
        for span in sorted(spans, key=lambda span: span.begin):
            track = process.track(span)
            row, begin = track.place(span)
            if row == track.named:
                yield from process.name_row(track)
            times = _micros(begin), _micros(span.seconds)
            args, lane = self._args(span, begin), LANES[span.lane]
            event = TraceEvent("X", span.name, process.pid, track.tid + row, *times, args, lane)
            yield event
            yield from _arrow(peer, span, event)

    def _args(self, span: Span, begin: float) -> dict[str, str | int]:
        number = bisect_right(self._began, begin)
        known = {"client": span.client, "step": span.step, "micro": span.micro}
        args: dict[str, str | int] = {"round": self._rounds[number - 1]} if number else {}
        return args | {name: value for name, value in known.items() if value >= 0}


class Track:
    """Spans of one kind in rows: a viewer draws no two that overlap in a thread, so the later one gets another."""

    def __init__(self, title: str, tid: int) -> None:
        self.title = title
        self.tid = tid
        self.named = 0
        self._ends: list[float] = []

    def place(self, span: Span) -> tuple[int, float]:
        """Return the row of a span and when it begins there, which may be a little later than it says."""
        free = (row for row, end in enumerate(self._ends) if end <= span.begin + SLACK)
        row = next(free, min(len(self._ends), ROWS - 1))
        if row == len(self._ends):
            self._ends.append(0.0)
        begin = max(span.begin, self._ends[row])
        self._ends[row] = begin + span.seconds
        return row, begin


class Process:
    """A peer in the trace. All that computes is one track of it; on the ways in and out each kind of span is one."""

    def __init__(self, peer: Peer, pid: int) -> None:
        self.peer = peer
        self.pid = pid
        self._tracks: dict[tuple[str, str], Track] = {}

    def name(self) -> Iterator[TraceEvent]:
        """Yield the events that name the process and say where it is shown."""
        role, index = self.peer
        place = index + (SERVERS if role == "server" else 0)
        yield TraceEvent("M", "process_name", self.pid, args={"name": f"{role} {index}"})
        yield TraceEvent("M", "process_sort_index", self.pid, args={"sort_index": place})

    def track(self, span: Span) -> Track:
        """Return the track of a span."""
        title = span.lane if span.lane == "compute" else span.name
        if (span.lane, title) not in self._tracks:
            place = 100 * list(LANES).index(span.lane) + len(self._tracks)
            self._tracks[span.lane, title] = Track(title, (1000 * self.pid + place) * ROWS)
        return self._tracks[span.lane, title]

    def name_row(self, track: Track) -> Iterator[TraceEvent]:
        """Yield the events that name the next row of a track and say where it is shown."""
        tid = track.tid + track.named
        track.named += 1
        title = f"{track.title} {track.named}" if track.named > 1 else track.title
        yield TraceEvent("M", "thread_name", self.pid, tid, args={"name": title})
        yield TraceEvent("M", "thread_sort_index", self.pid, tid, args={"sort_index": tid})


def _arrow(peer: Peer, span: Span, event: TraceEvent) -> Iterator[TraceEvent]:
    """Yield the end of the arrow that joins the sending of a micro-batch with its arrival, if the span has one."""
    role, index = peer
    client = index if role == "client" else span.client
    arrow = ARROWS.get((role, span.name))
    if arrow and min(client, span.step, span.micro) >= 0:
        phase, leg = arrow
        key = f"{event.args.get('round', 0)}.{client}.{span.step}.{span.micro}.{leg}"
        bound = "e" if phase == "f" else ""
        yield TraceEvent(phase, "micro-batch", event.pid, event.tid, event.ts, cat="arrow", id=key, bp=bound)


def _micros(seconds: float) -> float:
    return round(seconds * 1e6, 3)
