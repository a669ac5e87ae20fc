"""A stretch of a timeline as lines of text: a row for each lane, a letter for each kind of span."""

from collections.abc import Iterable, Mapping
from math import floor, log10

from rich.text import Text

from zsplit.monitor.figures import percent
from zsplit.monitor.table import Column, flow, table
from zsplit.monitor.timeline.figures import Figures
from zsplit.monitor.timeline.kinds import IDLE, WAITING, Kind, kinds_of
from zsplit.monitor.timeline.read import Bar, Timeline
from zsplit.monitor.timeline.stretch import Extent, within

GAP = " "
"""What a cell shows in which the lane did nothing that it kept a span of."""

BUSY = 7
"""Cells of the busy share at the end of a row."""

SLIVER = 1e-6
"""Share of a cell from which on something is shown: what is less is a rounding error."""

LEAST = 20
"""Cells of a row at least, however narrow the terminal."""

TICKS = 12
"""Cells between two labels of the axis at least."""


def draw(timeline: Timeline, extent: Extent, figures: Figures, width: int) -> list[Text]:
    """Return the picture: rows, axis, legend and figures, `width` cells wide where that is enough."""
    lanes = {lane: within(bars, extent) for lane, bars in timeline.lanes().items()}
    kinds = kinds_of(bar.name for bars in lanes.values() for bar in bars)
    margin = max(len(f"{peer} {lane}") for peer, lane in lanes) + 1
    cells = max(LEAST, width - margin - BUSY)
    lines = []
    for peer in figures.peers:
        for lane, lane_figures in peer.lanes.items():
            name = f"{peer.peer if lane == next(iter(peer.lanes)) else '':<{len(peer.peer)}} {lane}"
            row = _cells(lanes[peer.peer, lane], extent, cells, kinds)
            lines.append(Text.assemble((f"{name:<{margin}}", "dim"), row, f"{percent(lane_figures.busy, 0):>{BUSY}}"))
    return [*lines, *_axis(extent, cells, margin), Text(), *_legend(kinds, width), Text(), *_table(figures, width)]


def _cells(bars: list[Bar], extent: Extent, count: int, kinds: Mapping[str, Kind]) -> Text:
    """Return a row: each cell shows the work that took most of it, in a small letter where it was mostly idle."""
    width = (extent.end - extent.begin) / count
    text = Text()
    for seconds in _shares(bars, extent.begin, width, count):
        work = {name: part for name, part in seconds.items() if name not in WAITING and part > SLIVER * width}
        if work:
            kind = kinds[max(work, key=lambda name: work[name])]
            full = sum(work.values()) >= width / 2
            text.append(*((kind.letter, f"black on {kind.colour}") if full else (kind.letter.lower(), kind.colour)))
        else:
            waited = any(part > SLIVER * width for part in seconds.values())
            text.append(IDLE if waited else GAP, "dim")
    return text


def _shares(bars: Iterable[Bar], begin: float, width: float, count: int) -> list[dict[str, float]]:
    """Return the seconds of each name in each of the cells."""
    shares: list[dict[str, float]] = [{} for _ in range(count)]
    for bar in bars:
        first, last = (min(count - 1, max(0, int((time - begin) / width))) for time in (bar.begin, bar.end))
        for cell in range(first, last + 1):
            left = begin + cell * width
            part = max(0.0, min(bar.end, left + width) - max(bar.begin, left))
            shares[cell][bar.name] = shares[cell].get(bar.name, 0.0) + part
    return shares


def ticks(extent: Extent, most: int) -> list[float]:
    """Return the round moments of a stretch, in seconds, at most `most` and about that many."""
    rough = (extent.end - extent.begin) / max(1, most)
    power = 10.0 ** floor(log10(rough))
    step = next((factor * power for factor in (1, 2, 5) if factor * power >= rough), 10 * power)
    first = -(-extent.begin // step)
    return [(first + i) * step for i in range(int(extent.end // step - first) + 1)]


def moment(time: float, extent: Extent) -> str:
    """Return a moment with as many digits as tell it from its neighbours in a stretch."""
    digits = max(0, 2 - floor(log10(extent.end - extent.begin)))
    return f"{time:.{min(digits, 6)}f} s"


def _axis(extent: Extent, cells: int, margin: int) -> list[Text]:
    """Return the axis and its labels."""
    line, labels = ["─"] * cells, [" "] * (cells + margin)
    free = 0
    for time in ticks(extent, cells // TICKS):
        cell = min(cells - 1, int((time - extent.begin) / (extent.end - extent.begin) * cells))
        line[cell] = "┴"
        label = moment(time, extent)
        if free <= cell and cell + len(label) <= cells:
            labels[margin + cell : margin + cell + len(label)] = label
            free = cell + len(label) + 1
    return [Text(" " * margin + "".join(line), "dim"), Text("".join(labels).rstrip(), "dim")]


def legend_of(kinds: Mapping[str, Kind]) -> list[tuple[Kind, str]]:
    """Return what is to be explained: each kind with its name; kinds that look the same stand together."""
    names: dict[Kind, list[str]] = {}
    for name, kind in kinds.items():
        names.setdefault(kind, []).append(name)
    return [(kind, ", ".join(same)) for kind, same in names.items()]


def _legend(kinds: Mapping[str, Kind], width: int) -> list[Text]:
    items = [
        Text.assemble((kind.letter, "dim" if kind.letter == IDLE else f"black on {kind.colour}"), f" {names}")
        for kind, names in legend_of(kinds)
    ]
    return flow([*items, Text("small letters: idle for more than half of the cell", "dim")], width)


def _table(figures: Figures, width: int) -> list[Text]:
    """Return the busy share and the bubble of each peer."""
    columns = [
        Column("peer", [Text(peer.peer) for peer in figures.peers], left=True),
        Column("busy", [Text(percent(peer.busy, 0)) for peer in figures.peers]),
        Column("bubble", [Text(percent(peer.bubble, 0)) for peer in figures.peers]),
        Column("of steps", [Text(f"{peer.steps}") for peer in figures.peers]),
    ]
    return table(columns, width)
