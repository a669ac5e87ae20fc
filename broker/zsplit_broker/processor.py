"""Which processor the relay runs on: ZeroMQ's, for as long as one is enough for both and they take turns often.

A message passes two threads, ZeroMQ's, which reads and writes the sockets, and the relay's, and they take turns. Where
each has a processor of its own, that sleeps when the other one's works, and each turn begins with an interrupt that
wakes it: on a virtual machine this takes longer than all that is done with the message. Where they share one, a turn
is a switch between threads. With tensors of several MiB turns are rare, and ZeroMQ's thread, which then works for
milliseconds without a pause, is better off where the system puts it.
"""

import contextlib
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from threading import get_native_id

TASKS = Path("/proc/self/task")

OWN = 0
"""The calling thread, to the system."""

LOOK_SECONDS = 0.2
"""How often the load is looked at."""

ROOM, FULL = 0.75, 0.9
"""The process's share of a processor below which the two threads are brought together, and above which parted."""

TURNS = 0.06
"""The calling thread's share of the process's work below which its turns are too rare: with tensors of about 3 MiB."""

TOGETHER_SECONDS = 5.0
"""How long they stay on one processor before the system may choose anew: somebody else may have come to it."""


def threads() -> set[int]:
    """Return the ids of this process's threads; none where the system does not tell."""
    with contextlib.suppress(OSError):
        return {int(task.name) for task in TASKS.iterdir()}
    return set()


class Processor:
    """Where the calling thread and some `others` run. Threads that it starts while they share one stay there too."""

    def __init__(
        self,
        others: Collection[int],
        used: Callable[[], float] = time.process_time,
        own: Callable[[], float] = time.thread_time,
    ) -> None:
        self.shared = False
        self._others, self._used, self._own = others, used, own
        self._allowed: set[int] = set()
        with contextlib.suppress(AttributeError, OSError):  # not Linux, or a sandbox
            self._allowed = os.sched_getaffinity(0) if others else set()
        self._looked = self._used_before = self._own_before = self._since = 0.0

    def look(self, now: float) -> None:
        """Bring the threads together or part them, as their work since the last time says. `now` is in seconds."""
        if len(self._allowed) < 2 or now < self._looked + LOOK_SECONDS:
            return
        all_used, own_used = self._used(), self._own()
        used, own, first = all_used - self._used_before, own_used - self._own_before, not self._looked
        load, turns = used / (now - self._looked), own >= TURNS * used
        self._looked, self._used_before, self._own_before = now, all_used, own_used
        if first:
            return
        if not self.shared and turns and load < ROOM:
            self._since = now
            self._share(True)
        elif self.shared and (not turns or load > FULL or now >= self._since + TOGETHER_SECONDS):
            self._share(False)

    def leave(self) -> None:
        """Let the threads run anywhere again."""
        if self.shared:
            self._share(False)

    def _share(self, shared: bool) -> None:
        try:
            self._run_on({last_processor(get_native_id())} if shared else self._allowed)
            self.shared = shared
        except (OSError, ValueError, LookupError):  # it is not allowed, or not told: the system chooses from now on
            allowed, self._allowed, self.shared = self._allowed, set(), False
            for thread in (OWN, *self._others):
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(thread, allowed)

    def _run_on(self, processors: set[int]) -> None:
        for thread in (OWN, *self._others):
            os.sched_setaffinity(thread, processors)


def last_processor(thread: int) -> int:
    """Return the processor on which a thread of this process ran last.

    Raises OSError where there is no such thread, ValueError or LookupError where the system tells something else of it.
    """
    fields = (TASKS / str(thread) / "stat").read_text().rpartition(")")[2].split()
    return int(fields[36])  # `processor`, the 39th of proc_pid_stat(5), of which two stand before the bracket
