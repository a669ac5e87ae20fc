"""Files that survive a crash whole or not at all, and the thread that waits for the disk in the relay's place."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple

from zsplit.errors import StorageError

PARTIAL = ".partial"
"""Ending of a file that is not whole yet; what a crash leaves of it is never read."""

AT_ONCE = 2**18
"""Bytes written by one system call: for more at once Linux looks for memory in one piece, which can take 100 ms."""

_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(StorageError):
    """There is no room on the disk: the same can be tried again when there is."""


@contextmanager
def storage_errors(folder: Path, need: int, kept: str) -> Iterator[None]:
    """Turn an OSError into a StorageError that says what to do, one for want of room into a DiskFullError.

    `need` is how many bytes were to be written in `folder`; `kept` says what is safe all the same.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            megabytes = max(1, -(-need // 1_000_000))
            raise DiskFullError(f"the disk of {folder} is full: free {megabytes} MB; {kept}") from error
        raise StorageError(f"{folder} cannot be used ({error.strerror}): mend that and resume; {kept}") from error


def sync_folder(folder: Path) -> None:
    """Make durable which files the folder names. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of the data at the offset; a single system call may write less than it is given. Raises OSError."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest[:AT_ONCE], offset)
        rest, offset = rest[written:], offset + written


def begin_sync(descriptor: int) -> None:
    """Let the disk begin with what was written so far, so that less is left for `fsync`. Raises OSError."""
    if hasattr(os, "posix_fadvise"):
        # Linux writes out at once what it is told that nobody will need; versions are seldom read back.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def create_file(path: Path, size: int) -> int:
    """Create a file with this many bytes of the disk reserved, where the system can do that. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
    except OSError:
        os.close(descriptor)
        path.unlink()
        raise
    return descriptor


def rename_file(descriptor: int, temporary: Path, path: Path) -> None:
    """Give a finished file its name, durably: first the contents, then the name, then the folder. Raises OSError."""
    os.fsync(descriptor)
    temporary.rename(path)
    sync_folder(path.parent)


class Outcome(NamedTuple):
    """A finished task: its key, and the error that it raised, if any."""

    key: str
    error: Exception | None


class Writer:
    """The thread that owns the slow work on the disk, so that the relay never waits for it.

    Tasks run in the order of `submit`. `wake` is called on the writer's thread after each; then `finished`
    has its outcome. All methods belong to the thread that made the writer.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self.pending_bytes = 0
        self._wake = wake
        self._tasks: SimpleQueue[tuple[str, Callable[[], None], int] | None] = SimpleQueue()
        self._outcomes: SimpleQueue[tuple[Outcome, int]] = SimpleQueue()
        self._thread = Thread(target=self._work, name="writer", daemon=True)
        self._thread.start()

    def submit(self, key: str, task: Callable[[], None], nbytes: int = 0) -> None:
        """Queue a task that holds `nbytes` bytes of memory: they count as pending until it is collected."""
        self.pending_bytes += nbytes
        self._tasks.put((key, task, nbytes))

    def finished(self) -> list[Outcome]:
        """Return the outcomes of tasks that finished since the last call, in order. Never waits."""
        outcomes = []
        for _ in range(self._outcomes.qsize()):
            outcome, nbytes = self._outcomes.get()
            self.pending_bytes -= nbytes
            outcomes.append(outcome)
        return outcomes

    def close(self) -> None:
        """Finish what was submitted and end the thread. The last outcomes can be collected after it."""
        self._tasks.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._tasks.get()) is not None:
            key, task, nbytes = job
            self._outcomes.put((Outcome(key, _error_of(task)), nbytes))
            del job, task  # they hold a frame's memory
            self._wake()


def _error_of(task: Callable[[], None]) -> Exception | None:
    """Run a task. What it raises, bugs too, belongs to whoever submitted it, not to the thread."""
    try:
        task()
    except Exception as error:
        return error
    return None
