"""`zsplit timeline`: reads the timeline that a run wrote, and draws a stretch of it as text or as a picture."""

from pathlib import Path

import msgspec
from rich.console import Console
from rich.text import Text

from zsplit.errors import StorageError
from zsplit.monitor.timeline.drawing import draw, moment
from zsplit.monitor.timeline.figures import figures_of
from zsplit.monitor.timeline.picture import picture
from zsplit.monitor.timeline.read import read_timeline
from zsplit.monitor.timeline.stretch import Wanted, choose

PLAIN = 120
"""Cells of a line where the output is no terminal."""


def show(run: Path, wanted: Wanted, svg: Path | None, as_json: bool, console: Console) -> None:
    """Print a stretch of a run's timeline: drawn, or its figures as JSON, or the name of the picture written.

    Raises ConfigError where there is no timeline or no such stretch, StorageError where a file cannot be read or
    written.
    """
    timeline = read_timeline(run)
    extent = choose(timeline, wanted)
    figures = figures_of(timeline, extent)
    title = f"{run}: {moment(extent.begin, extent)} to {moment(extent.end, extent)}"
    if svg is not None:
        _write(svg, picture(timeline, extent, figures, title))
    if as_json:
        lines = [Text(msgspec.json.format(msgspec.json.encode(figures)).decode())]
    elif svg is not None:
        lines = [Text(f"The picture is {svg}")]
    else:
        width = console.width if console.is_terminal else PLAIN
        lines = [Text(title), Text(), *draw(timeline, extent, figures, width)]
    console.print(*(_encodable(line, console.encoding) for line in lines), sep="\n", soft_wrap=True)


def _encodable(line: Text, encoding: str) -> Text:
    """Return the line with whatever the output cannot show replaced."""
    shown = line.plain.encode(encoding, "replace").decode(encoding)
    return line if shown == line.plain else Text(shown)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror}): choose another --svg") from error


__all__ = ["Wanted", "show"]
