"""Columns, rules and rows of text that never exceed a width: what does not fit is left out, whole."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

GAP = 4
"""Most spaces between two columns."""


@dataclass(frozen=True)
class Column:
    """One column of a table. The higher its `rank`, the sooner it is left out; 0 always stays.

    `least` cells are taken even where the texts are shorter, so that a growing number moves nothing; longer
    texts than `most` are cut. A column that is `close` stays one space from the one before it.
    """

    title: str
    cells: Sequence[Text]
    rank: int = 0
    least: int = 0
    most: int = 24
    left: bool = False
    close: bool = False

    @property
    def width(self) -> int:
        """Cells that the column takes."""
        return min(self.most, max([self.least, len(self.title), *(cell.cell_len for cell in self.cells)]))

    def lines(self) -> list[Text]:
        """Return the title and the cells, all of the column's width."""
        return [self._fit(text) for text in (Text(self.title, "dim"), *self.cells)]

    def _fit(self, text: Text) -> Text:
        text = cut(text, self.width)
        text.align("left" if self.left else "right", self.width)
        return text


def table(columns: Sequence[Column], width: int) -> list[Text]:
    """Return a line of titles and one for each row, at most `width` cells wide."""
    columns = _that_fit(columns, width)
    gaps = _gaps(width - sum(column.width for column in columns), [column.close for column in columns[1:]])
    texts = [column.lines() for column in columns]
    return [cut(_join(row, gaps), width) for row in zip(*texts, strict=True)]


def _that_fit(columns: Sequence[Column], width: int) -> list[Column]:
    kept = list(columns)
    while sum(column.width + 1 for column in kept) - 1 > width:
        rank = max(column.rank for column in kept)
        if not rank:
            break
        kept.remove(next(column for column in reversed(kept) if column.rank == rank))
    return kept


def _gaps(spare: int, close: Sequence[bool]) -> list[int]:
    """Share spare cells out evenly, the first gaps getting one more; none is under 1 or over `GAP`."""
    share, rest = divmod(max(spare - sum(close), 0), max(len(close) - sum(close), 1))
    return [1 if near else max(1, min(GAP, share + (i < rest))) for i, near in enumerate(close)]


def _join(row: Sequence[Text], gaps: Sequence[int]) -> Text:
    line = Text()
    for text, gap in zip(row, [*gaps, 0], strict=True):
        line.append_text(text).append(" " * gap)
    return line


def rule(title: str, notes: Sequence[str], width: int) -> Text:
    """Return the heading of a section: its title and, at the right, the longest of the `notes` that fits."""
    room = width - len(title) - 8
    note = next((note for note in notes if Text(note).cell_len <= room), "")
    end = f" {note} ──" if note else ""
    dashes = width - len(title) - 4 - Text(end).cell_len
    line = Text("── ", "dim").append(title, "not dim bold").append(" " + "─" * max(0, dashes) + end)
    return cut(line, width)


def ends(left: Text, right: Text, width: int) -> Text:
    """Return one line with a text at each end; the left one is cut where both do not fit."""
    room = width - right.cell_len - 1
    if room < min(left.cell_len, 8):
        return cut(left, width)
    left = cut(left, room)
    left.align("left", room + 1)
    return cut(left.append_text(right), width)


def flow(items: Sequence[Text], width: int) -> list[Text]:
    """Return the items in as few lines as they need, parted by dots."""
    lines: list[Text] = []
    for item in items:
        if lines and lines[-1].cell_len + 3 + item.cell_len <= width:
            lines[-1].append(" · ", "dim").append_text(item)
        else:
            lines.append(item.copy())
    return [cut(line, width) for line in lines]


def beside(left: Sequence[Text], right: Sequence[Text], gap: int) -> list[Text]:
    """Return two blocks side by side; the left one is rectangular and at least as long."""
    filled = [*right, *[Text()] * (len(left) - len(right))]
    return [Text.assemble(a, " " * gap, b) for a, b in zip(left, filled, strict=True)]


def cut(text: Text, width: int) -> Text:
    """Return a copy of the text, at most `width` cells wide."""
    text = text.copy()
    text.truncate(max(0, width), overflow="ellipsis")
    return text
