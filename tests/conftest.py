"""Real processes for the tests: `zsplit` commands in a folder of their own, none of which outlives its test."""

import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Condition, Thread
from time import monotonic, sleep
from typing import IO, TYPE_CHECKING, NamedTuple, Self

import hypothesis
import pytest

if TYPE_CHECKING:
    from lone_link import Joined

hypothesis.settings.register_profile(
    "zsplit", deadline=None
)  # how long an example takes says nothing on a busy machine
hypothesis.settings.load_profile("zsplit")

ZSPLIT = Path(sys.executable).with_name("zsplit")

PATIENCE = 90.0
"""Seconds that a test waits for what must come: a loaded machine takes long to import torch."""

LEAVING = 5.0
"""Seconds that processes have at the end of a test to be gone by themselves."""

POLL = 0.02
"""Seconds between two looks at what nobody tells of."""

MARK = "ZSPLIT_TEST"
"""Environment variable by which a test's processes are known, however they were started."""

# A shell that runs the tests in its background has them ignore Ctrl-C, and every process that they start after them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

QUICK = ("schedule.clients=2", "run.rounds=2", "server.threads=1", "client.threads=1")
"""A run that is soon over: one thread a process, since two cores are to be enough."""


def settings(*assignments: str) -> list[str]:
    """Return the options that set these keys."""
    return [part for assignment in assignments for part in ("--set", assignment)]


class Command:
    """A `zsplit` command (or another program) under way, in a session of its own as in a terminal.

    `out` and `err` are the lines that it has printed so far, `said` both in the order in which they came.
    """

    def __init__(
        self, arguments: tuple[str, ...], folder: Path, environment: dict[str, str], program: Sequence[str | Path]
    ) -> None:
        self.process = subprocess.Popen(
            [*program, *arguments],
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self.said: list[str] = []
        self._news = Condition()
        streams = ((self.process.stdout, self.out), (self.process.stderr, self.err))
        self._open = len(streams)
        self._readers = [Thread(target=self._read, args=each, daemon=True) for each in streams]
        for reader in self._readers:
            reader.start()

    def line(self, text: str, seconds: float = PATIENCE) -> str:
        """Return the first line with this text in it, as soon as it is there."""
        until, seen = monotonic() + seconds, 0
        with self._news:
            while True:
                for line in self.said[seen:]:
                    if text in line:
                        return line
                seen = len(self.said)
                came = self._open and self._news.wait(until - monotonic())
                assert came, f"no line with {text!r} in:\n" + "\n".join(self.said[-40:])

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait for its end and return its exit code."""
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(LEAVING)
        return code

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all processes of its terminal, as Ctrl-C does."""
        os.killpg(self.process.pid, number)

    def _read(self, stream: IO[str], lines: list[str]) -> None:
        with stream:
            for line in stream:
                with self._news:
                    lines.append(line.rstrip("\n"))
                    self.said.append(lines[-1])
                    self._news.notify_all()
        with self._news:
            self._open -= 1
            self._news.notify_all()


class Processes:
    """Starts commands in a folder, and sees to it at the end that all their processes are gone.

    `mark` is what their environment has to hold; what a test starts by itself with it belongs to them, too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = {MARK: uuid.uuid4().hex}
        self.started: list[Command] = []

    def start(self, *arguments: str, program: Sequence[str | Path] = (ZSPLIT,), **environment: str) -> Command:
        """Start `zsplit`, or another program, with these arguments."""
        command = Command(arguments, self.folder, environment | self.mark, program)
        self.started.append(command)
        return command

    def run(self, *arguments: str, **environment: str) -> Command:
        """Start `zsplit` with these arguments and wait for its end."""
        command = self.start(*arguments, **environment)
        command.wait()
        return command

    def alive(self) -> list[int]:
        """Return the ids of all processes that were started here, directly or not, and have not ended."""
        started = [command.process.pid for command in self.started if command.process.poll() is None]
        mark = f"{MARK}={self.mark[MARK]}".encode()
        return sorted({*started, *(int(path.parent.name) for path in _environments() if mark in _bytes_of(path))})

    def gone(self, seconds: float) -> bool:
        """Say whether all processes end within this time."""
        until = monotonic() + seconds
        while alive := self.alive():
            if not _ended(alive[0], until - monotonic()):
                return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        gone = self.gone(LEAVING if kind is None else 0)
        left = self.alive()
        for process in left:
            os.kill(process, signal.SIGKILL)
        for command in self.started:
            command.wait()
        assert gone or kind is not None, f"processes were left behind: {left}"


def _environments() -> Iterator[Path]:
    return Path("/proc").glob("[0-9]*/environ")


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended, or is not ours
        return b""


def _ended(process: int, seconds: float) -> bool:
    """Wait for the end of any process; say whether it came in time."""
    try:
        handle = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], max(0.0, seconds))[0])
    finally:
        os.close(handle)


def writer_of(log: Path) -> int:
    """Return the id of the process whose standard output is this file."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "fd/1").readlink() == log:
                return int(process.name)
        except OSError:
            continue
    raise AssertionError(f"no process writes to {log}")


def is_mapped(library: str, process: int) -> bool:
    """Say whether a process has a library of this name in its memory, be it still loading."""
    return library.encode() in _bytes_of(Path(f"/proc/{process}/maps"))


def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait for what nobody tells of."""
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end, "it did not come"
        sleep(POLL)


def free_port() -> int:
    """Return a port that is free, as the two after it are: a broker's.

    It lies below those that systems give away by themselves, so that nobody is given it meanwhile.
    """
    start = 20_000 + os.getpid() * 3 % 10_000
    return next(port for port in range(start, 32_000, 3) if all(map(_is_free, range(port, port + 3))))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Ending(NamedTuple):
    """How a command ended: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Commands in this test's own folder."""
    with Processes(tmp_path) as started:
        yield started


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ending]:
    """Run a command in this very process, in this test's own folder: its peers are forked with torch loaded."""
    from zsplit.cli import main

    def run(*arguments: str) -> Ending:
        code = 0
        monkeypatch.chdir(tmp_path)
        try:
            main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        assert not multiprocessing.active_children()
        return Ending(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the digits demo, two clients and two rounds: to be read, never to be changed."""
    from zsplit.config import load_config
    from zsplit.launch import run_here

    config = load_config(None, ["broker.port=0", *QUICK, "run.name=demo"])
    result = run_here(config, str(tmp_path_factory.mktemp("digits") / "demo"))
    assert result.ok, result.sentence
    return result.folder


@pytest.fixture
def joined() -> Iterator["Joined"]:
    """Make links that have joined a broker which does what the test says."""
    from lone_link import Joined

    made = Joined()
    yield made
    made.close()
