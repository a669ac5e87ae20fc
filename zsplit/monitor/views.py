"""The monitor's shell towards the person: a live picture on a terminal, plain lines anywhere else."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from zsplit.monitor.board import Board
from zsplit.monitor.lines import Lines
from zsplit.monitor.screen import render
from zsplit.wire.events import AnyEvent


class LiveView:
    """The picture on the terminal's second screen, redrawn in place; the last one is left behind on the first."""

    def __init__(self, console: Console, endpoint: str) -> None:
        self._console = console
        self._endpoint = endpoint
        self._live = Live(console=console, screen=True, auto_refresh=False)
        self._last: tuple[Board, float] | None = None

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._live.stop()
        if kind is None and self._last:
            board, now = self._last
            self._console.print(render(board, *self._size(), now, self._endpoint))

    def take(self, event: AnyEvent) -> None:
        """Leave the event to the next picture."""

    def show(self, board: Board, now: float) -> None:
        """Redraw."""
        self._last = board, now
        self._live.update(render(board, *self._console.size, now, self._endpoint), refresh=True)

    def _size(self) -> tuple[int, int]:
        """Return the room for a picture that stays: the prompt's line is left free."""
        width, height = self._console.size
        return width, max(1, height - 1)


class PlainView:
    """One line for each thing that happens; see `Lines`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lines = Lines()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Nothing to put back."""

    def take(self, event: AnyEvent) -> None:
        """Print the event's line, if it has one."""
        line = self._lines.line(event)
        if line is not None:
            encoding = self._console.encoding
            self._console.print(Text(line.encode(encoding, "replace").decode(encoding)), soft_wrap=True)

    def show(self, board: Board, now: float) -> None:
        """Print nothing: a picture is for a terminal."""


def view_for(console: Console, endpoint: str, *, plain: bool = False) -> LiveView | PlainView:
    """Return the live view for a terminal that can show it, plain lines elsewhere or where asked for."""
    draws = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
    return LiveView(console, endpoint) if draws and not plain else PlainView(console)
