"""The processes of a run on one machine: watched, started again where they were killed, stopped.

All of it happens in one thread: whoever shows the run meanwhile calls `still_on` again and again.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from zsplit.child import Peer, death
from zsplit.errors import RunFailedError, ZsplitError
from zsplit.restarts import Keeper
from zsplit_broker.record import SUMMARY

STOP_SECONDS = 2.0
"""How long processes have to leave once they were told to; then they are killed."""

NOTICE_SECONDS = 3.0
"""How long the broker has to end a run of which a peer told it that it failed; one that never began goes on."""

LOG = "logs/launcher.log"
"""The file in the run's folder that says who was started again."""


class Place(NamedTuple):
    """Where a run is: the broker's address, what it publishes, its folder."""

    address: str
    events: str
    folder: Path


class Broker:
    """The broker as a child process, in all its lives; each goes on in the folder of the first.

    `place` is where the first one listened, `moved` where a later one does if that is elsewhere. One that is `leaving`
    has been told to, and is not missed.
    """

    name = "the broker"

    def __init__(self, arguments: Sequence[str]) -> None:
        self.place: Place | None = None
        self.moved: Place | None = None
        self.leaving = False
        self._arguments = list(arguments)
        self._process: subprocess.Popen[str] | None = None
        self._listening = False
        self._code: int | None = None
        self._earlier: int | None = None
        self._words = ""

    def start(self) -> None:
        """Start the program. `listen` or `look` notices where it listens."""
        arguments = self._arguments if self.place is None else ["--resume", str(self.place.folder)]
        self._listening, self._code, self._words = False, None, ""
        self._process = subprocess.Popen(  # noqa: S603  (our own program)
            [sys.executable, "-m", "zsplit_broker", *arguments, "--json", "--attached"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is ours to pass on
        )

    def listen(self) -> Place:
        """Wait until it says where it listens. Raises ZsplitError with its sentence where it ends instead."""
        if self.place is None:
            self._hear()
        if self.place is None:
            error = ZsplitError(self.words or "The broker did not start.")
            error.exit_code = max(1, self._code or 0)
            raise error
        return self.place

    def look(self) -> None:
        """Take in what it said, and whether it has ended."""
        if self._process is not None and self._code is None:
            if wait([self._output], 0):
                self._hear()
            else:
                self._code = self._process.poll()

    def _hear(self) -> None:
        """Take in a line of its output, which ends with it."""
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._code = self._process.wait()
        elif not self._listening:
            self._listening = True
            told = json.loads(line)
            here = Place(told["address"], told["events"], Path(told["out"]))
            if self.place is None:
                self.place = here
                self._earlier = _changed(here.folder / SUMMARY)
            elif here[:2] != self.place[:2]:
                self.moved = here

    @property
    def _output(self) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    @property
    def sentinel(self) -> int | None:
        """What is ready when it has said something, or has ended; None where it has."""
        return None if self.ended else self._output

    @property
    def ended(self) -> bool:
        """Whether this life was over at the last look."""
        return self._process is None or self._code is not None

    @property
    def killed(self) -> str:
        """How it died, where it was killed before the run was over; else empty."""
        was = self._code is not None and self._code < 0 and not self.concluded and not self.leaving
        return death(self._code) if self._code is not None and was else ""

    @property
    def concluded(self) -> bool:
        """Whether it has written down how the run ended; what an earlier broker wrote does not count."""
        return self.place is not None and _changed(self.place.folder / SUMMARY) not in (None, self._earlier)

    @property
    def words(self) -> str:
        """The last line that it said before it ended: its sentence, or how it died."""
        if self._words or self._process is None or self._code is None:
            return self._words
        assert self._process.stderr is not None
        said = self._process.stderr.read().strip().rpartition("\n")[2].removeprefix("zsplit-broker: ")
        self._words = said or (f"{self.name} {death(self._code)}" if self._code else "")
        return self._words

    def tell(self, number: signal.Signals) -> bool:
        """Send a signal; return whether it was there to take it. One that does not listen yet does not take any."""
        there = self._process is not None and self._listening and self._process.poll() is None
        if there and self._process is not None:
            self._process.send_signal(number)
        return there

    def join(self, seconds: float) -> bool:
        """Wait for its end; return whether it came."""
        if self._process is not None and self._code is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._code = self._process.wait(seconds)
        return self.ended

    def bury(self) -> None:
        """Kill it, unless it has ended, and let go of what is left of it; its words are kept."""
        if self._process is not None:
            self._process.kill()
            self._code = self._process.wait()
            self._words = self.words
            with self._process:
                self._process = None

    close = bury


class Household:
    """Broker and peers of a run. `still_on` sees to them, `pause` waits until that is worth while."""

    def __init__(
        self,
        broker: Broker,
        peers: Sequence[Peer],
        restarts: int,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._broker = broker
        self._peers = peers
        self._say = say
        self._clock = clock
        self._keeper = Keeper([broker, *peers], restarts, self._tell, clock())
        self._to_drain = False

    def still_on(self) -> bool:
        """Start again who was killed and is due; return whether the run goes on, if its broker does not just now."""
        self._broker.look()
        if not self._over and not self._broker.concluded:  # else whoever leaves now may
            self._keeper.look(self._clock())
        if self._to_drain:
            self.drain()
        return not self._over and self._failure is None

    def pause(self) -> None:
        """Wait until somebody ended or says something, or is to be started."""
        sentinels = [self._broker.sentinel, *(peer.sentinel for peer in self._peers)]
        wait([each for each in sentinels if each is not None], self._keeper.until_due(self._clock()))

    def drain(self) -> None:
        """Ask for the run's end once the round under way is done; safe to call from a signal handler."""
        self._broker.leaving = True
        self._to_drain = not self._broker.tell(signal.SIGTERM) and not self._broker.ended

    def failure(self) -> ZsplitError | None:
        """Return why the run is not on any more, where it is not for its broker to say."""
        if self._over:
            return None
        folder = self._folder
        if any(peer.failure for peer in self._peers) and self._broker.join(
            NOTICE_SECONDS if has_versions(folder) else 0
        ):
            return None
        return self._failure

    def words(self) -> str:
        """Say how the broker ended, where it has."""
        if self._keeper.lost is not None and self._keeper.lost[0] is self._broker:
            return f"{self._broker.name} {self._keeper.lost[1]}"
        return self._broker.words

    def stop(self) -> None:
        """Tell the broker to end the run now, give everybody a moment, and kill who is still there."""
        if not has_versions(self._folder):
            self._kill()  # they have nothing to finish, and may be loading for seconds
        until = self._clock() + STOP_SECONDS
        self._broker.leaving = True
        if not self._broker.tell(signal.SIGINT):
            self._broker.bury()
        if not self._broker.join(STOP_SECONDS):
            self._broker.bury()
        for peer in self._peers:
            peer.join(max(0.0, until - self._clock()))
        self._kill()

    @property
    def _folder(self) -> Path:
        assert self._broker.place is not None
        return self._broker.place.folder

    @property
    def _over(self) -> bool:
        """Whether there is no broker, and none comes back."""
        comes_back = self._keeper.waits(self._broker) or (self._broker.killed and self._keeper.lost is None)
        return self._broker.ended and (self._broker.leaving or not comes_back)

    @property
    def _failure(self) -> ZsplitError | None:
        if self._broker.moved is not None:
            assert self._broker.place is not None
            return RunFailedError(
                f"The broker was started again at {self._broker.moved.address}, not at {self._broker.place.address}, "
                "where the others look for it"
            )
        if self._keeper.lost is not None:
            child, how = self._keeper.lost
            return RunFailedError(f"{child.name.capitalize()}: it {how}")
        return next((peer.failure for peer in self._peers if peer.failure is not None), None)

    def _kill(self) -> None:
        for peer in self._peers:
            peer.kill()
        for peer in self._peers:
            peer.join()

    def _tell(self, sentence: str) -> None:
        with contextlib.suppress(FileNotFoundError), (self._folder / LOG).open("a") as log:  # a run that never began
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}\n")
        self._say(sentence)


def has_versions(folder: Path) -> bool:
    """Whether a run has stored anything yet."""
    return any(folder.glob("versions/*.safetensors"))


def _changed(file: Path) -> int | None:
    """Return when a file was written, None where there is none."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None
