"""A peer as a child process of `zsplit run`: its life, and what the parent knows of it."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

from zsplit import crash
from zsplit.errors import RunFailedError, ZsplitError


class Task(NamedTuple):
    """What a child process is to be.

    `objects` are a script's model and data, `cwd` is where relative paths begin, `allowed` the modules of which the
    config may name functions, `trap` where a test has it killed.
    """

    role: str
    number: int
    address: str
    device: str
    objects: bytes
    cwd: Path
    log: Path
    allowed: tuple[str, ...]
    trap: Mapping[str, str]


class Peer:
    """A peer as a child process, in all its lives, and the pipe through which each life says how it ended."""

    def __init__(self, task: Task) -> None:
        self.name = f"{task.role} {task.number}"
        self._task = task
        self._process: Any = None
        self._ending: Connection | None = None
        self._said: tuple[int, str] | None = None

    def start(self) -> None:
        """Fork it from the process that has torch loaded."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["zsplit.train.nursery"])
        self._ending, theirs = context.Pipe(duplex=False)
        self._said = None
        name = f"zsplit {self.name}"
        process = context.Process(target=live, args=(self._task, theirs), name=name, daemon=True)
        process.start()  # Ctrl-C may come meanwhile: then there is none
        self._process = process
        theirs.close()

    @property
    def sentinel(self) -> int | None:
        """What is ready once it has ended; None where it has."""
        alive = self._process is not None and self._process.exitcode is None
        return int(self._process.sentinel) if alive else None

    @property
    def killed(self) -> str:
        """How it died, where it was killed or said nothing; empty while it lives, and where it had words."""
        code = self._process.exitcode if self._process is not None else None
        return death(code) if code and self._last_words is None else ""

    @property
    def failure(self) -> ZsplitError | None:
        """Why it failed, in its own words; None where it has not, or had none."""
        if self.sentinel is not None or self._last_words is None:
            return None
        code, sentence = self._last_words
        if not code:
            return None
        error = RunFailedError(f"{self.name.capitalize()}: {sentence}")
        error.exit_code = code
        return error

    @property
    def _last_words(self) -> tuple[int, str] | None:
        """Exit code and sentence of one that has ended; None where it was killed before it could say them."""
        with contextlib.suppress(EOFError):
            if self._said is None and self._ending is not None and self._ending.poll():
                self._said = self._ending.recv()
        return self._said

    def join(self, seconds: float | None = None) -> None:
        """Wait for its end."""
        if self._process is not None:
            self._process.join(seconds)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()

    def bury(self) -> None:
        """Let go of one that has ended, or seems to since the process that it was forked from has: then it ends."""
        self._process.close()
        self._process = None
        if self._ending is not None:
            self._ending.close()
            self._ending = None


def live(task: Task, ending: Connection) -> None:
    """The life of a child: its words go to its log, and how it ended to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_die_with_parent, daemon=True).start()
    crash.arm(task.trap)
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
        run_server(task.address, task.device, model, data=data, allow=task.allowed, index=task.number)
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
