"""Places at which a test has a process killed, to see that nothing is lost and nothing happens twice.

`ZSPLIT_CRASH_AT=name[:n]` names one of `POINTS`; the process that passes it for the n-th time kills itself with
SIGKILL, once: it leaves the file `ZSPLIT_CRASH_ONCE`, and whoever finds that there lives on. So a process that is
started again in its place, and others that pass the same place, are spared, and a test sees whether it was reached.
Refused unless `ZSPLIT_TEST_FAULTS=1`: a run that people trust has no such thing in its environment.
"""

import os
import signal
from collections.abc import Mapping
from pathlib import Path

from zsplit.errors import ConfigError

POINTS: dict[str, str] = {
    "client.start": "welcomed, and not prepared yet",
    "client.load": "the base version is here, and not loaded yet",
    "client.send": "before a micro-batch is sent",
    "client.frames": "between the header of a message and its frames",
    "client.answer": "an answer is here, and not used yet",
    "client.step": "after a step of its optimizer",
    "client.done": "a turn is done, and not reported yet",
    "client.serve": "in the middle of streaming what its turn leaves",
    "client.evaluate": "in the middle of an evaluation",
    "server.start": "welcomed, and not prepared yet",
    "server.init": "version 0 is made, and not reported yet",
    "server.ready": "the base version is loaded, and not reported yet",
    "server.apply": "a micro-batch is applied, and not answered yet",
    "server.frames": "between the header of a message and its frames",
    "server.reply": "after an answer was sent",
    "server.step": "after a step of its optimizer",
    "server.done": "its side of a turn is done, and not reported yet",
    "server.merge": "in the middle of an aggregation",
    "server.merged": "a version is made, and not reported yet",
    "server.serve": "in the middle of streaming a state",
    "broker.replay": "at start-up, in the middle of a replay",
    "broker.journal": "before lines of the journal are written",
    "broker.journaled": "after lines of the journal are written, before what follows from them",
    "broker.relay": "a message was received, and not passed on yet",
    "broker.storing": "in the middle of storing a version",
    "broker.stored": "a version is on the disk, and the journal does not name it yet",
    "broker.announce": "before a round is announced",
    "broker.announced": "after a round was announced",
    "broker.export": "before the merged model is written",
}
"""Every place, by the role of the process that passes it: what has happened there and what has not."""


class Trap:
    """Where this process is to die: at the n-th time that it passes a place."""

    def __init__(self, name: str, number: int, once: Path) -> None:
        self.name, self._left, self._once = name, number, once

    def spring(self) -> None:
        """Count the place once more; die where it was the last time, unless somebody did already."""
        self._left -= 1
        if self._left:
            return
        try:
            os.close(os.open(self._once, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


def trap_of(environment: Mapping[str, str]) -> Trap | None:
    """Return the trap that the environment asks for, if any. Raises ConfigError where it may not, or names no place."""
    asked = environment.get("ZSPLIT_CRASH_AT", "")
    if not asked:
        return None
    if environment.get("ZSPLIT_TEST_FAULTS") != "1":
        raise ConfigError("ZSPLIT_CRASH_AT is for tests only: take it out of the environment.")
    name, _, number = asked.partition(":")
    if name not in POINTS or not (number or "1").isdigit() or int(number or 1) < 1:
        raise ConfigError(f"ZSPLIT_CRASH_AT={asked} names no place: give one of {', '.join(POINTS)}, or one with :N.")
    once = environment.get("ZSPLIT_CRASH_ONCE", "")
    if not once:
        raise ConfigError("ZSPLIT_CRASH_AT needs ZSPLIT_CRASH_ONCE, the file that says that it happened.")
    return Trap(name, int(number or 1), Path(once))


_trap: Trap | None = None


def variables() -> dict[str, str]:
    """Return what the environment says of all this: for a child process that does not inherit it."""
    return {
        name: value for name, value in os.environ.items() if name.startswith(("ZSPLIT_CRASH_", "ZSPLIT_TEST_FAULTS"))
    }


def arm(environment: Mapping[str, str] = os.environ) -> None:
    """Look into the environment, once for each process, before it does anything. Raises ConfigError as `trap_of`."""
    global _trap
    _trap = trap_of(environment)


def trap(name: str) -> Trap | None:
    """Return what is set at a place that is passed very often, if anything is."""
    return _trap if _trap is not None and _trap.name == name else None


def at(name: str) -> None:
    """Pass a place."""
    found = trap(name)
    if found is not None:
        found.spring()
