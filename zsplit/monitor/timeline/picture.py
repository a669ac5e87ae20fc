"""A stretch of a timeline as an SVG picture: a rect for each span, an axis, a legend, tooltips."""

from collections.abc import Mapping
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from zsplit.errors import ConfigError
from zsplit.monitor.figures import percent
from zsplit.monitor.timeline.drawing import legend_of, moment, ticks
from zsplit.monitor.timeline.figures import Busy, Figures, PeerFigures
from zsplit.monitor.timeline.kinds import WAITING, Kind, kinds_of
from zsplit.monitor.timeline.read import Bar, Row, Timeline
from zsplit.monitor.timeline.stretch import COMPUTE, Extent, within

WIDTH = 1200
"""Of the picture, in px, as all lengths here."""

LEFT, RIGHT = 110, 60
"""Margins: names of the rows at the left, their busy shares at the right."""

ROW, SPACE, HEAD = 22, 3, 28
"""Heights of a row, of the space below it, and of a peer's heading."""

TOP, ENTRY, AXIS = 34, 24, 34
"""Heights of the title, of a line of the legend, and of the axis."""

CHARACTER = 7.0
"""Width of a character, about: what is longer than its rect is not written into it."""

SEAM = 1.0
"""Gap by which neighbouring spans are told apart."""

THINNEST = 0.5
"""Width of a rect at least: no span is too short to be seen."""

MOST = 20_000
"""Spans that a picture shows at most: viewers are slow with more."""

INK, FAINT, GRID, BAND = "#222222", "#6b6b6b", "#d0d0d0", "#f5f5f5"


class Canvas:
    """An SVG element that things are put on, from top to bottom: `y` is where the next one goes."""

    def __init__(self, root: Element, y: float = 0.0) -> None:
        self.root = root
        self.y = y

    def rect(self, x: float, y: float, width: float, height: float, colour: str, **more: str) -> Element:
        """Put a filled rect there and return it."""
        place = {"x": f"{x:.2f}", "y": f"{y:g}", "width": f"{width:.2f}", "height": f"{height:g}"}
        return SubElement(self.root, "rect", {**place, "fill": colour, **more})

    def text(self, x: float, y: float, text: str, colour: str = INK, **more: str) -> None:
        """Write a text whose baseline begins there."""
        SubElement(self.root, "text", {"x": f"{x:.2f}", "y": f"{y:g}", "fill": colour, **more}).text = text


def picture(timeline: Timeline, extent: Extent, figures: Figures, title: str) -> str:
    """Return the picture as the text of an SVG file. Raises ConfigError where there is too much to show."""
    found = {row: within(bars, extent) for row, bars in timeline.rows.items()}
    rows = {row: bars for row, bars in found.items() if bars or row.lane == COMPUTE}
    count = sum(map(len, rows.values()))
    if count > MOST:
        raise ConfigError(
            f"the stretch has {count:,} spans and a picture shows {MOST:,} at most: take a shorter one with --from "
            "and --to"
        )
    root = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "font-family": "DejaVu Sans, Verdana, sans-serif"})
    canvas = Canvas(root, TOP)
    background = canvas.rect(0, 0, WIDTH, 0, "#ffffff")
    canvas.text(12, 22, title, **{"font-size": "14", "font-weight": "bold"})
    _draw(canvas, rows, extent, figures)
    height = f"{canvas.y:g}"
    background.set("height", height)
    root.attrib |= {"width": f"{WIDTH}", "height": height, "viewBox": f"0 0 {WIDTH} {height}", "font-size": "11"}
    indent(root)
    return tostring(root, encoding="unicode") + "\n"


def _draw(canvas: Canvas, rows: Mapping[Row, list[Bar]], extent: Extent, figures: Figures) -> None:
    kinds = kinds_of(bar.name for bars in rows.values() for bar in bars)
    _legend(canvas, kinds)
    top = canvas.y
    grid = Canvas(SubElement(canvas.root, "g", {"stroke": GRID}))
    for peer in figures.peers:
        _peer(canvas, peer, {row: bars for row, bars in rows.items() if row.peer == peer.peer}, extent, kinds)
    _axis(canvas, grid, top, extent)


def _legend(canvas: Canvas, kinds: Mapping[str, Kind]) -> None:
    """Write what the colours and letters mean, in as many lines as that takes."""
    x = 12.0
    for kind, name in legend_of(kinds):
        width = 24 + CHARACTER * len(name) + 14
        if x + width > WIDTH:
            x, canvas.y = 12.0, canvas.y + ENTRY
        canvas.rect(x, canvas.y, 18, 14, kind.colour)
        canvas.text(x + 9, canvas.y + 11, kind.letter, _ink(kind), **{"text-anchor": "middle"})
        canvas.text(x + 24, canvas.y + 11, name)
        x += width
    canvas.y += ENTRY


def _peer(
    canvas: Canvas, peer: PeerFigures, rows: Mapping[Row, list[Bar]], extent: Extent, kinds: Mapping[str, Kind]
) -> None:
    """Draw a peer: its name and figures, and its rows, each with the share of the stretch in which it is busy."""
    bubble = f", bubble {percent(peer.bubble, 0)} of a step" if peer.bubble is not None else ""
    canvas.text(12, canvas.y + 19, peer.peer, **{"font-weight": "bold", "font-size": "12"})
    canvas.text(LEFT, canvas.y + 19, f"computes {percent(peer.busy, 0)} of the time{bubble}", FAINT)
    canvas.y += HEAD
    for row, bars in rows.items():
        canvas.rect(LEFT, canvas.y, WIDTH - LEFT - RIGHT, ROW, BAND)
        canvas.text(LEFT - 8, canvas.y + 15, row.title, FAINT, **{"text-anchor": "end"})
        share = percent(Busy(bars).share(extent), 0)
        canvas.text(WIDTH - 12, canvas.y + 15, share, FAINT, **{"text-anchor": "end"})
        for bar in bars:
            _bar(canvas, bar, extent, kinds[bar.name])
        canvas.y += ROW + SPACE


def _bar(canvas: Canvas, bar: Bar, extent: Extent, kind: Kind) -> None:
    """Draw a span; one in which the peer waits is a thin line, so that it looks idle."""
    left, width = _x(bar.begin, extent), _x(bar.end, extent) - _x(bar.begin, extent)
    waits = bar.name in WAITING
    inset, height = (ROW / 2 - 2, 4) if waits else (1, ROW - 2)
    drawn = max(THINNEST, width - SEAM if width > 4 * SEAM else width)
    rect = canvas.rect(left, canvas.y + inset, drawn, height, kind.colour, **{"class": "span"})
    SubElement(rect, "title").text = tooltip(bar)
    label = "" if waits else _label(bar, kind, width)
    if label:
        middle = {"text-anchor": "middle", "pointer-events": "none"}
        canvas.text(left + width / 2, canvas.y + 15, label, _ink(kind), **middle)


def _label(bar: Bar, kind: Kind, width: float) -> str:
    """Return as much as fits into a span of letter, micro-batch and, on a server, client."""
    micro = f"{bar.micro}" if bar.micro >= 0 else ""
    client = f" c{bar.client}" if bar.client >= 0 else ""
    labels = (kind.letter + micro + client, kind.letter + micro, kind.letter)
    return next((label for label in labels if len(label) * CHARACTER + 2 <= width), "")


def tooltip(bar: Bar) -> str:
    """Return all that is known of a span, in words."""
    names = {"round": bar.round, "step": bar.step, "micro-batch": bar.micro, "client": bar.client}
    where = [f"{name} {number}" for name, number in names.items() if number >= 0]
    return f"{', '.join([bar.name, *where])}: {1000 * bar.seconds:.2f} ms from {bar.begin:.4f} s"


def _axis(canvas: Canvas, grid: Canvas, top: float, extent: Extent) -> None:
    """Draw the axis, and the grid behind the rows."""
    for time in ticks(extent, 12):
        x = f"{_x(time, extent):.2f}"
        SubElement(grid.root, "line", {"x1": x, "x2": x, "y1": f"{top:g}", "y2": f"{canvas.y + 4:g}"})
        canvas.text(float(x), canvas.y + 18, moment(time, extent), FAINT, **{"text-anchor": "middle"})
    canvas.y += AXIS


def _x(time: float, extent: Extent) -> float:
    return LEFT + (time - extent.begin) / (extent.end - extent.begin) * (WIDTH - LEFT - RIGHT)


def _ink(kind: Kind) -> str:
    """Return white on dark colours and black on light ones, by their luminance (ITU-R BT.601)."""
    red, green, blue = (int(kind.colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else INK
