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

LOOK_SECONDS = 0.2
"""How often the load is looked at."""

ROOM, FULL = 0.75, 0.9
"""What the threads need of a processor: below the one they are brought together, above the other parted."""

OFTEN, RARELY = 0.07, 0.05
"""The calling thread's share of that: from the one they are brought together, below the other parted. It has 16 % with
tensors of 1 MiB, 7 % with 2 MiB, 4 % with 4 MiB."""

TOGETHER_SECONDS = 5.0
"""How long they stay on one processor before the system may choose anew: somebody else may have come to it."""


def threads() -> set[int]:
    """Return the ids of this process's threads; none where the system does not tell."""
    with contextlib.suppress(OSError):
        return {int(task.name) for task in TASKS.iterdir()}
    return set()


def thread_seconds(thread: int) -> float:
    """Return the CPU time so far of a thread of this process (its pthread_getcpuclockid(3) on Linux).

    Raises OSError where there is no such thread.
    """
    return time.clock_gettime(~thread << 3 | 6)


def last_processor(thread: int) -> int:
    """Return the processor on which a thread of this process ran last.

    Raises OSError where there is no such thread, ValueError or LookupError where the system tells something else of it.
    """
    fields = (TASKS / str(thread) / "stat").read_text().rpartition(")")[2].split()
    return int(fields[36])  # `processor`, the 39th of proc_pid_stat(5), of which two stand before the bracket


class Processor:
    """Where the calling thread and some `others` run. Threads that it starts while they share one stay there too."""

    def __init__(self, others: Collection[int], seconds: Callable[[int], float] = thread_seconds) -> None:
        """`seconds` tells a thread's CPU time so far."""
        self.shared = False
        self._own, self._others, self._seconds = get_native_id(), others, seconds
        self._allowed: set[int] = set()
        with contextlib.suppress(AttributeError, OSError):  # not Linux, or a sandbox
            self._allowed = os.sched_getaffinity(0) if others else set()
        self._looked = self._since = 0.0
        self._before = 0.0, 0.0

    def look(self, now: float) -> None:
        """Bring the threads together or part them, as their work since the last time says. `now` is in seconds."""
        if len(self._allowed) < 2 or now < self._looked + LOOK_SECONDS:
            return
        try:
            own = self._seconds(self._own)
            both = own + sum(map(self._seconds, self._others))
        except OSError:
            self._give_up()
            return
        (own_before, both_before), self._before = self._before, (own, both)
        first, seconds, self._looked = not self._looked, now - self._looked, now
        own, both = own - own_before, both - both_before
        if first:
            return
        if not self.shared and both < ROOM * seconds and own >= OFTEN * both:
            self._since = now
            self._share(True)
        elif self.shared and (both > FULL * seconds or own < RARELY * both or now >= self._since + TOGETHER_SECONDS):
            self._share(False)

    def leave(self) -> None:
        """Let the threads run anywhere again."""
        if self.shared:
            self._share(False)

    def _share(self, shared: bool) -> None:
        try:
            self._run_on({last_processor(self._own)} if shared else self._allowed)
            self.shared = shared
        except (OSError, ValueError, LookupError):  # it is not allowed, or not told
            self._give_up()

    def _give_up(self) -> None:
        """Leave it to the system from now on."""
        allowed, self._allowed, self.shared = self._allowed, set(), False
        for thread in (self._own, *self._others):
            with contextlib.suppress(OSError):
                os.sched_setaffinity(thread, allowed)

    def _run_on(self, processors: set[int]) -> None:
        for thread in (self._own, *self._others):
            os.sched_setaffinity(thread, processors)
