"""What the control messages show: every job that was given, who is at work, and how soon after a fault again.

It reads what passes the proxies, on their thread, and asks the product's own processes nothing.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from random import Random
from threading import Lock
from typing import NamedTuple

from zsplit.errors import RemoteProtocolError
from zsplit.wire.frames import decode_control
from zsplit.wire.messages import Beat, ControlMessage, Hello, Job, Lease, Orders, Turn, Unknown, Welcome

Progress = Mapping[Lease, tuple[str, int]]
"""A client's turns that run or are done, how far each is."""


class Recovery(NamedTuple):
    """How long it took after a fault until all whom it had stopped were at work again, and within what it was to be."""

    kind: str
    seconds: float
    goal: float


class Trial:
    """A fault that stopped turns, until all of them go on."""

    def __init__(self, kind: str, who: str, goal: float, stopped: Mapping[str, Progress]) -> None:
        self.kind, self.who, self.goal = kind, who, goal
        self.stopped = dict(stopped)
        self.told: set[str] = set()
        self.since: float | None = None
        self.restarted: float | None = None
        self.seconds: float | None = None


class Watch:
    """The run as the network sees it. `judge` gives each proxy its rule; all else is asked by the main thread."""

    def __init__(self, seed: str, loss: float, double: float) -> None:
        self.jobs: dict[Lease, Job] = {}
        self.injected: Counter[str] = Counter()
        self.moved = time.monotonic()
        self.trials: list[Trial] = []
        self.loading = {"broker"}
        self._seed, self._loss, self._double = seed, loss, double
        self._turns: dict[str, list[Turn]] = {}
        self._progress: dict[str, Progress] = {}
        self._lock = Lock()

    def judge(self, who: str) -> Callable[[bool, bytes], int]:
        """Return the rule of a peer's control connection: it looks at a message, and says how often it arrives."""
        random = Random(f"{self._seed} {who}")

        def judged(up: bool, body: bytes) -> int:
            with self._lock:
                self._see(who, up, body)
                drawn = random.random()
                if drawn < self._loss:
                    self.injected["message dropped"] += 1
                    return 0
                if drawn < self._loss + self._double:
                    self.injected["message doubled"] += 1
                    return 2
                return 1

        return judged

    @property
    def begun(self) -> bool:
        """Whether somebody was ever given a turn."""
        with self._lock:
            return any(isinstance(job, Turn) for job in self.jobs.values())

    def seen_jobs(self) -> dict[Lease, Job]:
        """Return every job that was given so far."""
        with self._lock:
            return dict(self.jobs)

    # How soon after a fault

    def trial(self, kind: str, who: str, goal: float) -> Trial | None:
        """Watch from now on, just before a process is killed, until its turns go on; None where it has none."""
        with self._lock:
            stopped = {
                client: self._progress.get(client, {})
                for client, turns in self._turns.items()
                if any(self._concerns(turn, who) for turn in turns if not self._is_done(client, turn))
            }
            if not stopped:
                return None
            trial = Trial(kind, who, goal, stopped)
            if who.startswith("server"):
                trial.since = time.monotonic()
            self.trials.append(trial)
            return trial

    def killed(self, who: str) -> None:
        """A process was killed. It is loading from now on: a peer until it is prepared, a broker until it answers."""
        with self._lock:
            self.moved = time.monotonic()
            self.loading.add(who)

    def restarted(self, who: str) -> None:
        """A process that was killed has been started again."""
        with self._lock:
            for trial in self.trials:
                if trial.who == who and trial.restarted is None:
                    trial.restarted = time.monotonic()

    def _concerns(self, turn: Turn, who: str) -> bool:
        return who in ("broker", f"client {turn.client}", f"server {turn.server}")

    def _is_done(self, client: str, turn: Turn) -> bool:
        return self._progress.get(client, {}).get(turn.lease, ("", 0))[0] == "done"

    # What passes

    def _see(self, who: str, up: bool, body: bytes) -> None:
        try:
            message = decode_control(body)
        except RemoteProtocolError:
            return
        now = time.monotonic()
        for trial in self.trials:
            if trial.since is None and trial.restarted is not None and self._begins(trial, who, up, message):
                trial.since = now
        match message:
            case Orders(jobs=jobs):
                self.jobs.update({job.lease: job for job in jobs})
                if who.startswith("client"):
                    self._turns[who] = [job for job in jobs if isinstance(job, Turn)]
            case Welcome() | Unknown():
                self.loading.discard("broker")
            case Beat(prepared=prepared) if up:
                if prepared is not None:
                    self.loading.discard(who)
                if who.startswith("client"):
                    self._beat(who, message, now)
            case _:
                pass

    def _begins(self, trial: Trial, who: str, up: bool, message: ControlMessage) -> bool:
        """Whether the clock of a trial starts: a client's hello, or the first word to a broker that is there again."""
        return up and (trial.who == "broker" or (who == trial.who and isinstance(message, Hello)))

    def _beat(self, client: str, beat: Beat, now: float) -> None:
        progress = {
            held.lease: (held.state, held.step)
            for held in beat.held
            if isinstance(self.jobs.get(held.lease), Turn) and held.state in ("running", "done")
        }
        before, self._progress[client] = self._progress.get(client, {}), progress
        if progress != before:
            self.moved = now
        for trial in self.trials:
            self._go_on(trial, client, progress, now)

    def _go_on(self, trial: Trial, client: str, progress: Progress, now: float) -> None:
        """Take a client off a trial where it is at work on what it was not when the fault came.

        With a peer the lease is over; one that a broker gave lives on, and what a client tells the next broker first
        may be from before: from there it has to go on.
        """
        if trial.since is None or client not in trial.stopped:
            return
        before = trial.stopped[client]
        if trial.who == "broker" and client not in trial.told:
            trial.told.add(client)
            trial.stopped[client] = progress
        elif any(
            at != before.get(lease) if trial.who == "broker" else lease not in before for lease, at in progress.items()
        ):
            del trial.stopped[client]
            if not trial.stopped:
                trial.seconds = now - trial.since

    def recoveries(self) -> list[Recovery]:
        """Return what was measured."""
        return [Recovery(t.kind, t.seconds, t.goal) for t in self.trials if t.seconds is not None]
