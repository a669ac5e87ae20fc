"""Work that is done in order on a thread of its own, so that it holds up neither who computes nor who sends."""

import queue
import threading
from collections.abc import Callable

CLOSE_SECONDS = 5.0
"""How long a lane that is closed may take to finish what it was given."""

Work = Callable[[], None]


class Lane:
    """Work in the order in which it was given. One thread gives; the lane's thread starts when it is first needed.

    The first error ends the lane: `failed` is told of it, and what was given behind it is not done.
    """

    def __init__(self, name: str, failed: Callable[[Exception], None]) -> None:
        self._name = name
        self._failed = failed
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._given = self._done = 0  # each is written by one thread only
        self._broken = False

    def do(self, work: Work, here: bool = False) -> None:
        """Do the work: with `here` in this thread, where nothing given earlier is left to do; else on the lane's."""
        if here and self._given == self._done:
            self._try(work)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._live, name=self._name, daemon=True)
            self._thread.start()
        self._given += 1
        self._queue.put(work)

    def close(self) -> None:
        """Finish what was given, and end the thread."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)

    def _live(self) -> None:
        while (work := self._queue.get()) is not None:
            self._try(work)
            self._done += 1

    def _try(self, work: Work) -> None:
        if self._broken:
            return
        try:
            work()
        except Exception as error:  # whoever waits for the result must hear of it
            self._broken = True
            self._failed(error)
