"""What the scheduler writes down of each round: who did how much, and when turns were open. No clock, no socket."""

from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from typing import NamedTuple

from zsplit.wire.messages import Evaluate, Init, Job, Measure, Merge, Tally, Turn
from zsplit_broker.tally import NOTHING, add


class RoundRecord(NamedTuple):
    """What a round was: the version it made, tallies of both sides and of validation, seconds.

    `train` sums `clients`; `server` sums `servers`, which have the turns of each, and `merges`. `seconds` is what the
    round took of the run's time, `training` the part of it from the first turn to the last merge, `open` for each
    server the time in which at least one turn was open at it.
    """

    round: int
    version: str
    train: Tally
    server: Tally
    validation: Tally
    seconds: float
    training: float
    clients: Mapping[int, Tally]
    servers: Mapping[int, Tally]
    merges: Mapping[int, Tally]
    open: Mapping[int, float]


class RoundBook:
    """One round while it goes on: tallies of finished jobs by who did them.

    `backs` has, for each client, the server's side of that client's turns.
    """

    def __init__(self, began: float) -> None:
        self.began = began
        self.trained = began
        self.ended: float | None = None
        self.clients: defaultdict[int, Tally] = defaultdict(Tally)
        self.backs: defaultdict[int, Tally] = defaultdict(Tally)
        self.servers: defaultdict[int, Tally] = defaultdict(Tally)
        self.merges: defaultdict[int, Tally] = defaultdict(Tally)
        self.validation = NOTHING
        self.open: defaultdict[int, float] = defaultdict(float)

    def record(self, round_: int, version: str, now: float) -> RoundRecord:
        """Return the round as it is kept; `now` is its end where the next round did not begin before."""
        return RoundRecord(
            round=round_,
            version=version,
            train=add(self.clients.values()),
            server=add([*self.servers.values(), *self.merges.values()]),
            validation=self.validation,
            seconds=(now if self.ended is None else self.ended) - self.began,
            training=self.trained - self.began,
            clients=dict(self.clients),
            servers=dict(self.servers),
            merges=dict(self.merges),
            open=dict(self.open),
        )


class Books:
    """The rounds that are not over, by number, and what was tested at the end, by the codec of the smashed data."""

    def __init__(self) -> None:
        self.rounds: dict[int, RoundBook] = {}
        self.tests: dict[str, Tally] = {}
        self._turns: dict[int, int] = {}
        self._since: dict[int, float] = {}

    def begin(self, round_: int, now: float) -> None:
        """A round begins, and with it ends what the round before it took of the run's time."""
        if round_ - 1 in self.rounds:
            self.rounds[round_ - 1].ended = now
        self.rounds[round_] = RoundBook(now)

    def trained(self, round_: int, now: float) -> None:
        """The round's last merge is done."""
        self.rounds[round_].trained = now

    def end(self, round_: int, version: str, now: float) -> RoundRecord:
        """The round is over: return what it was."""
        return self.rounds.pop(round_).record(round_, version, now)

    def go_back(self, round_: int, book: RoundBook | None) -> None:
        """Forget what was written down of this round and of later ones; `book` is what remains of it."""
        self.rounds = {number: kept for number, kept in self.rounds.items() if number < round_}
        if book is not None:
            self.rounds[round_] = deepcopy(book)

    def opened(self, job: Job, now: float) -> None:
        """A lease was opened."""
        if isinstance(job, Turn):
            self._turns[job.server] = self._turns.get(job.server, 0) + 1
            self._since.setdefault(job.server, now)

    def closed(self, job: Job, now: float, round_: int) -> None:
        """A lease is over, done or not."""
        if isinstance(job, Turn):
            self._turns[job.server] -= 1
            if not self._turns[job.server]:
                since = self._since.pop(job.server)
                if round_ in self.rounds:
                    self.rounds[round_].open[job.server] += now - since

    def count(self, job: Job, client: Tally, server: Tally, round_: int) -> None:
        """Keep what each side did in a job that counts, nothing where a side had no part. A turn is `round_`'s."""
        match job:
            case Turn():
                book = self.rounds[round_]
                book.clients[job.client] = add([book.clients[job.client], client])
                book.backs[job.client] = add([book.backs[job.client], server])
                book.servers[job.server] = add([book.servers[job.server], server])
            case Merge():
                book = self.rounds[job.round]
                book.merges[job.server] = add([book.merges[job.server], server])
            case Evaluate(part="validation"):
                book = self.rounds[job.round]
                book.validation = add([book.validation, client])
            case Evaluate():
                self.tests[job.plan.up] = add([self.tests.get(job.plan.up, NOTHING), client])
            case Init() | Measure():
                pass  # before the first round
