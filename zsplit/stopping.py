"""Ending a run from outside: whose folder it is says its `lock`, and a signal to that broker does the rest."""

import fcntl
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from zsplit.errors import ConfigError, ZsplitError
from zsplit.results import RunFolder, open_run
from zsplit_broker.journal import LOCK
from zsplit_broker.record import CONFIG


class Holder(NamedTuple):
    """The process that has a folder in use."""

    pid: int
    host: str


def stop_run(folder: Path, now: bool, say: Callable[[str], None]) -> str:
    """Have the broker of a run end it, after the round under way or `now`; wait for that and return how it ended.

    Raises ConfigError where there is no run, ZsplitError where none is under way there, or not for us to stop.
    """
    run = open_run(folder)
    with _locked_by(folder) as (lock, holder):
        if holder is None:
            raise ZsplitError(f"No run is under way in {folder}{_since(run)}")
        if holder.host != socket.gethostname():
            raise ZsplitError(f"{folder} is in use by process {holder.pid} on {holder.host}: run `zsplit stop` there")
        try:
            os.kill(holder.pid, signal.SIGINT if now else signal.SIGTERM)
        except PermissionError as error:
            raise ZsplitError(
                f"{folder} is in use by process {holder.pid} of another user: run `zsplit stop` as that user"
            ) from error
        if not now:
            say(f"The run in {folder} ends after the round under way; --now ends it at once")
        fcntl.flock(lock, fcntl.LOCK_SH)  # free when the broker is gone
    sentence = run.summary().get("sentence")
    if sentence is None and not (folder / CONFIG).exists():
        return "The run never began, and leaves nothing behind"
    if sentence is None:
        raise ZsplitError(
            f"The broker of {folder} is gone and left no summary: `zsplit resume {folder}` goes on with it"
        )
    return str(sentence)


def under_way(runs: Path) -> Path:
    """Return the run in this folder that is under way. Raises ConfigError where there is none, or more than one."""
    found: list[Path] = []
    for path in sorted(runs.glob(f"*/{LOCK}")):
        with _locked_by(path.parent) as (_, holder):
            if holder is not None:
                found.append(path.parent)
    if not found:
        raise ConfigError(f"No run is under way in {runs}/: give the folder of one, as `zsplit stop RUN`")
    if len(found) > 1:
        raise ConfigError(f"{' and '.join(map(str, found))} are under way: say which, as `zsplit stop {found[-1]}`")
    return found[0]


@contextmanager
def _locked_by(folder: Path) -> Iterator[tuple[int, Holder | None]]:
    """Yield the open lock file of a folder, and who holds the lock: None where nobody does."""
    try:
        lock = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError as error:
        raise ZsplitError(f"No run is under way in {folder}: it has no {LOCK} file") from error
    try:
        yield lock, _holder(folder, lock)
    finally:
        os.close(lock)


def _holder(folder: Path, lock: int) -> Holder | None:
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        pid, _, host = os.pread(lock, 4096, 0).decode(errors="replace").strip().partition(" ")
        if not pid.isdigit():
            raise ZsplitError(f"{folder} was taken by a process a moment ago: try again") from None
        return Holder(int(pid), host)
    fcntl.flock(lock, fcntl.LOCK_UN)
    return None


def _since(run: RunFolder) -> str:
    """Say what became of a run that is not under way."""
    if run.finished():
        return ": it is finished"
    return f": `zsplit resume {run.path}` goes on with it"
