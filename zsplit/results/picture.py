"""Runs as an SVG picture: accuracy on the validation data against rounds, seconds and bytes."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from zsplit.monitor.figures import NONE, percent
from zsplit.monitor.timeline.drawing import ticks
from zsplit.monitor.timeline.picture import CHARACTER, ENTRY, FAINT, GRID, INK, WIDTH, Canvas
from zsplit.monitor.timeline.stretch import Extent
from zsplit.results.compare import Comparison, Entry
from zsplit.results.figures import Course

HEIGHT, GAP, LEFT, TOP, FOOT = 300, 46, 56, 40, 48
"""Of a panel's plot, between two panels, left of the first, above and below, in px."""

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#d9b32c", "#5f6bb3", "#79706e")
DASHES = ("", "6 3", "2 3")
"""Lines are told apart by colour, and, where these are used up, by dashes."""


class Panel(NamedTuple):
    """One of the plots: what its x axis shows, and how it is read off a run's course."""

    title: str
    x: Callable[[Course], float]


PANELS = (
    Panel("rounds", lambda at: at.round),
    Panel("seconds", lambda at: at.seconds),
    Panel("MB up and down", lambda at: (at.bytes_up + at.bytes_down) / 1e6),
)

WIDE = (WIDTH - LEFT - 24 - GAP * (len(PANELS) - 1)) / len(PANELS)
"""Width of a plot."""


class Frame(NamedTuple):
    """A plot's place on the picture, and what its edges mean: x from 0 on, accuracy of 1."""

    left: float
    top: float
    most: float
    low: float
    high: float

    def x(self, value: float) -> float:
        """Return where a value of the x axis is."""
        return self.left + value / self.most * WIDE

    def y(self, accuracy: float) -> float:
        """Return where an accuracy is."""
        return self.top + (self.high - accuracy) / (self.high - self.low) * HEIGHT


def picture(comparison: Comparison) -> str:
    """Return the picture as the text of an SVG file: a panel for rounds, seconds and bytes, a line for each run."""
    root = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "font-family": "DejaVu Sans, Verdana, sans-serif"})
    canvas = Canvas(root, TOP)
    background = canvas.rect(0, 0, WIDTH, 0, "#ffffff")
    canvas.text(12, 22, "Accuracy on the validation data", **{"font-size": "14", "font-weight": "bold"})
    _legend(canvas, comparison.runs)
    low, high = _range(comparison)
    for number, panel in enumerate(PANELS):
        xs = [panel.x(at) for entry in comparison.runs for at in entry.course]
        left = LEFT + number * (WIDE + GAP)
        _panel(canvas, Frame(left, canvas.y, max([*xs, 1e-6]), low, high), panel, comparison)
    height = f"{canvas.y + HEIGHT + FOOT:g}"
    background.set("height", height)
    root.attrib |= {"width": f"{WIDTH}", "height": height, "viewBox": f"0 0 {WIDTH} {height}", "font-size": "11"}
    indent(root)
    return tostring(root, encoding="unicode") + "\n"


def _range(comparison: Comparison) -> tuple[float, float]:
    """Return the accuracies between which everything lies, in whole steps of 5 %."""
    found = [at.accuracy for entry in comparison.runs for at in entry.course if at.accuracy is not None]
    found += [] if comparison.target_accuracy is None else [comparison.target_accuracy]
    low, high = min(found, default=0.0), max(found, default=1.0)
    first = min(19, int(20 * low))
    return first / 20, max(first + 1, min(20, int(20 * high) + 1)) / 20


def _legend(canvas: Canvas, runs: Sequence[Entry]) -> None:
    """Write which line is whose: the run, and the values in which it differs from the others."""
    for number, entry in enumerate(runs):
        _line(canvas, [(12, canvas.y + 7), (36, canvas.y + 7)], number)
        differs = ", ".join(f"{key}={value or NONE}" for key, value in entry.keys.items())
        name = f"{entry.figures.run} ({differs})" if differs else entry.figures.run
        canvas.text(44, canvas.y + 11, name[: int((WIDTH - 60) / CHARACTER)])
        canvas.y += ENTRY - 4
    canvas.y += 14


def _panel(canvas: Canvas, frame: Frame, panel: Panel, comparison: Comparison) -> None:
    _axes(canvas, frame, panel)
    if (target := comparison.target_accuracy) is not None:
        ends = (frame.left, frame.y(target)), (frame.left + WIDE, frame.y(target))
        _rule(canvas, *ends, {"stroke": INK, "stroke-dasharray": "4 4", "class": "target"})
    for number, entry in enumerate(comparison.runs):
        known = [at for at in entry.course if at.accuracy is not None]
        places = [(frame.x(panel.x(at)), frame.y(at.accuracy or 0.0)) for at in known]
        _line(canvas, places, number)
        for at, (x, y) in zip(known, places, strict=True):
            dot = {"cx": f"{x:.2f}", "cy": f"{y:.2f}", "r": "2.5", "fill": COLOURS[number % len(COLOURS)]}
            SubElement(SubElement(canvas.root, "circle", dot), "title").text = tooltip(entry, at)


def tooltip(entry: Entry, at: Course) -> str:
    """Return all that is known of a point, in words."""
    volume = f"{at.bytes_up / 1e6:.2f} MB up, {at.bytes_down / 1e6:.2f} MB down"
    return f"{entry.figures.run}, round {at.round}: {percent(at.accuracy, 2)} after {at.seconds:.1f} s, {volume}"


def _axes(canvas: Canvas, frame: Frame, panel: Panel) -> None:
    grid = Canvas(SubElement(canvas.root, "g", {"stroke": GRID}))
    bottom = frame.top + HEIGHT
    for value in ticks(Extent(0.0, frame.most), 5):
        x = frame.x(value)
        _rule(grid, (x, frame.top), (x, bottom + 4), {})
        canvas.text(x, bottom + 18, f"{value:g}", FAINT, **{"text-anchor": "middle"})
    for value in ticks(Extent(frame.low, frame.high), 6):
        y = frame.y(value)
        _rule(grid, (frame.left, y), (frame.left + WIDE, y), {})
        canvas.text(frame.left - 6, round(y + 4, 2), f"{100 * value:.3g} %", FAINT, **{"text-anchor": "end"})
    canvas.text(frame.left + WIDE / 2, bottom + 36, panel.title, INK, **{"text-anchor": "middle"})


def _rule(canvas: Canvas, begin: tuple[float, float], end: tuple[float, float], style: Mapping[str, str]) -> None:
    """Draw a straight line."""
    ends = {"x1": begin[0], "y1": begin[1], "x2": end[0], "y2": end[1]}
    SubElement(canvas.root, "line", {**{name: f"{place:.2f}" for name, place in ends.items()}, **style})


def _line(canvas: Canvas, places: Sequence[tuple[float, float]], number: int) -> None:
    """Draw a run's line through these places."""
    style = {"fill": "none", "stroke": COLOURS[number % len(COLOURS)], "stroke-width": "1.8"}
    if dashes := DASHES[number // len(COLOURS) % len(DASHES)]:
        style["stroke-dasharray"] = dashes
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y in places)
    SubElement(canvas.root, "polyline", {"points": points, **style})
