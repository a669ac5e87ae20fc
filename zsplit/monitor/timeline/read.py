"""From `timeline.json` to spans in rows. What a killed broker left is read up to its last whole line."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import msgspec

from zsplit.errors import ConfigError, StorageError
from zsplit_broker.timeline import TIMELINE, TraceEvent

LONGEST = 40
"""Characters of a name that are shown."""


class Row(NamedTuple):
    """Who, which lane, and what of it: `client 0`, `out`, `send`. Spans of a row do not overlap, those of a lane do."""

    peer: str
    lane: str
    title: str


class Bar(NamedTuple):
    """A span as it was written: from `begin` to `end` in seconds since the run began; −1 is none known."""

    name: str
    begin: float
    end: float
    round: int = -1
    step: int = -1
    micro: int = -1
    client: int = -1

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.begin


@dataclass(frozen=True)
class Timeline:
    """All of a file: its rows as they are to be drawn, each with its spans in the order of their begin."""

    path: Path
    rows: dict[Row, list[Bar]]

    @property
    def begin(self) -> float:
        """When the first span begins, in seconds."""
        return min(bars[0].begin for bars in self.rows.values())

    @property
    def end(self) -> float:
        """When the last span ends, in seconds."""
        return max(bar.end for bars in self.rows.values() for bar in bars)

    def lanes(self) -> dict[tuple[str, str], list[Bar]]:
        """Return the spans of each lane of each peer, all of its rows together."""
        grouped = groupby(self.rows.items(), key=lambda item: item[0][:2])
        return {lane: [bar for _, bars in rows for bar in bars] for lane, rows in grouped}


class Thread(NamedTuple):
    """A row as the file has it: numbers of its process and its thread, and the lane."""

    pid: int
    tid: int
    lane: str


@dataclass
class Names:
    """What the naming events of a file said, by process and by thread."""

    peers: dict[int, str] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)
    titles: dict[int, str] = field(default_factory=dict)

    def take(self, event: TraceEvent) -> None:
        """Take in one naming event."""
        name, place = _printable(str(event.args.get("name", ""))), event.args.get("sort_index", 0)
        match event.name:
            case "process_name":
                self.peers[event.pid] = name
            case "process_sort_index" if isinstance(place, int):
                self.places[event.pid] = place
            case "thread_name":
                self.titles[event.tid] = name

    def place(self, thread: Thread) -> tuple[int, int, int]:
        """Return by what rows are ordered: clients, then servers, and for each what computes, then out, then in."""
        return self.places.get(thread.pid, 0), thread.pid, thread.tid

    def row(self, thread: Thread) -> Row:
        """Return the row of a thread; one without a name goes by its number."""
        pid, tid, lane = thread
        return Row(self.peers.get(pid, f"process {pid}"), lane, self.titles.get(tid, f"thread {tid}"))


def read_timeline(run: Path) -> Timeline:
    """Read the timeline of a run, given its folder or the file itself.

    Raises ConfigError where there is none, StorageError where the file cannot be read or is no timeline of zsplit.
    """
    path = run / TIMELINE if run.is_dir() else run
    names, threads = Names(), dict[Thread, list[Bar]]()
    for event in _events(path, _lines(path, run)):
        if event.ph == "M":
            names.take(event)
        elif event.ph == "X":
            thread = Thread(event.pid, event.tid, _printable(event.cat))
            threads.setdefault(thread, []).append(_bar(event))
    if not threads:
        raise StorageError(f"{path} has no span in it yet: wait until the run trains, or look at another run")
    for bars in threads.values():
        bars.sort(key=lambda bar: bar.begin)
    return Timeline(path, {names.row(thread): threads[thread] for thread in sorted(threads, key=names.place)})


def _lines(path: Path, run: Path) -> list[bytes]:
    """Return the lines of the file."""
    try:
        return path.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        if run.is_dir():
            sentence = f"{run} has no {TIMELINE}: run it with --set run.timeline=true, or wait until it has begun"
        else:
            sentence = f"{run} does not exist: give the folder of a run, such as runs/digits-1"
        raise ConfigError(sentence) from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror}): mend that and try again") from error


def _events(path: Path, lines: list[bytes]) -> Iterator[TraceEvent]:
    """Yield the events of the lines; the last one may be torn, and the closing bracket may be missing."""
    if lines[0].strip() != b"[":
        raise StorageError(f"{path} is no timeline that zsplit wrote: give the folder of a run")
    decoder = msgspec.json.Decoder(TraceEvent)
    for number, line in enumerate(lines[1:], 2):
        text = line.strip().removesuffix(b",")
        if text in (b"", b"]"):
            continue
        try:
            yield decoder.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if number == len(lines):
                return
            raise StorageError(_damaged(path, number)) from error


def _damaged(path: Path, number: int) -> str:
    return f"line {number} of {path} is damaged, and not the last: cut the file there (`head -n {number - 1}`)"


def _bar(event: TraceEvent) -> Bar:
    begin = event.ts / 1e6 if event.ts else 0.0
    seconds = event.dur / 1e6 if event.dur else 0.0
    args = [value if isinstance(value := event.args.get(name), int) else -1 for name in Bar._fields[3:]]
    return Bar(_printable(event.name), begin, begin + seconds, *args)


@cache
def _printable(name: str) -> str:
    """Return a name with nothing in it that could steer a terminal or spoil a picture, and not without end."""
    return "".join(c if c.isprintable() else " " for c in name[:LONGEST])
