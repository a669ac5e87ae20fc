"""A peer as a child process of `zsplit run`: its life, and what the parent knows of it."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

from zsplit import crash
from zsplit.errors import RunFailedError, ZsplitError


class Task(NamedTuple):
    """What a child process is to be.

    `objects` are a script's model and data, `cwd` is where relative paths begin, `allowed` the modules of which the
    config may name functions.
    """

    role: str
    number: int
    address: str
    device: str
    objects: bytes
    cwd: Path
    log: Path
    allowed: tuple[str, ...]


class Peer:
    """A child process, and the pipe through which it says how it ended."""

    def __init__(self, name: str, process: Any, ending: Connection) -> None:
        self.name = name
        self.process = process
        self._ending = ending
        self._said: tuple[int, str] | None = None

    @property
    def failed(self) -> bool:
        """Whether it has ended in failure."""
        return self.process.exitcode not in (None, 0)

    @property
    def last_words(self) -> tuple[int, str] | None:
        """Exit code and sentence of one that has ended; None where it was killed before it could say them."""
        with contextlib.suppress(EOFError):
            if self._said is None and self._ending.poll():
                self._said = self._ending.recv()
        return self._said

    def failure(self) -> ZsplitError:
        """Return why it failed."""
        code, sentence = self.last_words or (1, f"it {death(self.process.exitcode)}")
        error = RunFailedError(f"{self.name.capitalize()}: {sentence}")
        error.exit_code = code
        return error


def live(task: Task, ending: Connection) -> None:
    """The life of a child: its words go to its log, and how it ended to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_die_with_parent, daemon=True).start()
    crash.arm()
    os.chdir(task.cwd)
    try:
        output = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except FileNotFoundError:
        return  # the folder is gone again: the run was stopped before it began
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        _work(task)
    except ZsplitError as error:
        ending.send((error.exit_code, str(error)))
        sys.exit(error.exit_code)
    except Exception as error:
        ending.send((1, f"it failed with {type(error).__name__}: {error} (the traceback is in {task.log})"))
        raise
    ending.send((0, ""))


def _work(task: Task) -> None:
    from zsplit.train.peer import run_client, run_server

    model, data = pickle.loads(task.objects)  # noqa: S301  (from our own parent)
    if task.role == "server":
        run_server(task.address, task.device, model, data=data, allow=task.allowed)
    else:
        run_client(task.address, task.number, task.device, model, data, allow=task.allowed)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def death(code: int) -> str:
    """Say how a process with this exit code ended."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"died with exit code {code}"
