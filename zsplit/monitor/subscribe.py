"""The monitor's shell towards the broker: the socket and the clock. It listens and sends nothing.

It runs in the caller's thread until the run has ended, and nothing waits for it: a monitor that comes late is
sent the last value of each topic, one that goes is not missed.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import ceil, inf
from time import monotonic
from types import TracebackType
from typing import Protocol, Self

import zmq

from zsplit.errors import LinkError, RemoteProtocolError, ZsplitError
from zsplit.monitor import figures
from zsplit.monitor.board import SCHEMA, Board
from zsplit.wire.events import AnyEvent, LogEvent, RunEvent

Socket = zmq.Socket[bytes]

REFRESH = 0.25
"""Seconds between two pictures, and the longest that `poll` waits for its turn."""

SILENCE = 15.0
"""Seconds after which a broker that says nothing is taken for gone: it publishes its rates every second."""

LINGER = 0.25
"""Seconds for which a run that has ended is listened to: a late monitor gets the last values in any order."""

WAITING = 10_000
"""Messages that may wait in the socket while the terminal is held up; later ones are lost: a gap in `seq`."""

HEARTBEAT = 2000
"""Milliseconds between pings, so that a connection that died without a word is made anew."""


class View(Protocol):
    """Where a board is shown: entered before the first event, left after the last."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """End, and leave the terminal as it was."""

    def take(self, event: AnyEvent) -> None:
        """Show one new event, which the board has taken already."""

    def show(self, board: Board, now: float) -> None:
        """Show the board as it stands; called every `REFRESH` seconds and at the end."""


def watch(
    endpoint: str,
    view: View,
    *,
    poll: Callable[[], bool] = lambda: True,
    silence: float = SILENCE,
    patience: float = inf,
    notes: Callable[[], Iterable[LogEvent]] = tuple,
) -> RunEvent | None:
    """Show the run that is published at a zmq endpoint until it has ended; return its last run event.

    It ends sooner when `poll`, called every `REFRESH` seconds in this thread, returns False, or when nothing
    came for `silence` seconds: the state of the returned event, or None where none came, tells which. `notes`, called
    after it, has lines that whoever watches wants to be shown among the broker's. Raises
    LinkError for an impossible endpoint or when nothing at all came within `patience` seconds,
    RemoteProtocolError when what came was no event. Whatever is raised, KeyboardInterrupt too, the view has
    been left and the socket closed.
    """
    board = Board()
    began = monotonic()
    with _subscription(endpoint) as socket, view:
        while poll() and not board.ended and not _is_silent(board, silence):
            if board.heard is None and monotonic() - began > patience:
                raise _nothing(endpoint, board, patience)
            _note(notes(), board, view)
            view.show(board, monotonic())
            _listen(socket, board, view, REFRESH)
        if board.ended:
            _listen(socket, board, view, LINGER)
        _note(notes(), board, view)
        view.show(board, monotonic())
    return board.run


@contextmanager
def _subscription(endpoint: str) -> Iterator[Socket]:
    """Connect to all topics; no broker need be there yet, and one that comes back is found again."""
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.linger = 0
        socket.ipv6 = "[" in endpoint
        socket.heartbeat_ivl = HEARTBEAT
        socket.rcvhwm = WAITING
        socket.subscribe(b"")
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise LinkError(
                f"{endpoint} is no address to connect to ({error}): give one like tcp://HOST:PORT"
            ) from error
        yield socket


def _note(notes: Iterable[LogEvent], board: Board, view: View) -> None:
    for event in notes:
        board.note(event)
        view.take(event)


def _listen(socket: Socket, board: Board, view: View, duration: float) -> None:
    """Take what comes within `duration` seconds."""
    until = monotonic() + duration
    while (left := until - monotonic()) > 0:
        if not socket.poll(ceil(1000 * left)):
            break
        event = board.read(socket.recv_multipart(), monotonic())
        if event is not None:
            view.take(event)


def _is_silent(board: Board, silence: float) -> bool:
    return board.heard is not None and monotonic() - board.heard > silence


def _nothing(endpoint: str, board: Board, patience: float) -> ZsplitError:
    waited = figures.seconds(patience)
    if board.unreadable:
        return RemoteProtocolError(
            f"What {endpoint} publishes cannot be read (this monitor reads events of version {SCHEMA}): "
            "give the address of a broker of the same zsplit version"
        )
    return LinkError(
        f"No broker published anything at {endpoint} within {waited}: start one with `zsplit broker`, "
        "or name its address with --broker HOST:PORT"
    )
