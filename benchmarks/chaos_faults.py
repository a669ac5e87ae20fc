"""Which faults come, to whom, when and for how long: drawn from one generator, so that a seed gives the same again."""

from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import NamedTuple

KINDS: Mapping[str, int] = {
    "kill client": 5,
    "kill server": 3,
    "kill broker": 3,
    "stop client (short)": 2,
    "stop client (long)": 2,
    "stop server (short)": 1,
    "stop server (long)": 1,
    "stop broker": 2,
    "cut one": 3,
    "cut all": 2,
    "half-open": 3,
    "cable out": 3,
    "duplicate client": 1,
    "full disk": 2,
}
"""Every kind of fault that comes at its time, and how often beside the others. Messages are lost and doubled always."""

GAP = 3.0
"""Mean seconds between two faults."""

SHORT, LONG = (0.1, 0.6), (1.3, 2.5)
"""How long a process is stopped that is to keep its lease, or to lose it: so many times `link.lease_seconds`."""


class Fault(NamedTuple):
    """One fault: `pause` seconds after the one before, for so many seconds.

    To whom, by a number from 0 to 1 among those that it can hit; `port` is that of the connection that is cut.
    `alone`: nothing else may happen until all is at work again, so that it can be seen how long that takes.
    """

    kind: str
    pause: float
    target: float
    seconds: float
    port: int
    alone: bool

    @property
    def role(self) -> str:
        """The role of whom it hits; empty: any peer. A disk is the broker's."""
        if self.kind == "full disk":
            return "broker"
        return next((role for role in ("client", "server", "broker") if role in self.kind.split()), "")


def faults(random: Random, kinds: Sequence[str], lease: float) -> Iterator[Fault]:
    """Yield one fault after the other, for ever."""
    while True:
        [kind] = random.choices(kinds, [KINDS[kind] for kind in kinds])
        yield Fault(
            kind,
            pause=min(random.expovariate(1 / GAP), 5 * GAP),
            target=random.random(),
            seconds=_seconds(random, kind, lease),
            port=random.randrange(2),  # control or data: nobody here listens to events
            alone=random.random() < 0.5 and kind.startswith("kill"),
        )


def _seconds(random: Random, kind: str, lease: float) -> float:
    """Return how long a fault lasts: a process is away, a connection swallows, a disk is full."""
    match kind:
        case "kill client" | "kill server" | "kill broker":
            return random.choice([0.0, random.uniform(0.1, 3.0)])
        case "stop client (long)" | "stop server (long)":
            return random.uniform(*LONG) * lease
        case "stop client (short)" | "stop server (short)" | "stop broker":
            return random.uniform(*SHORT) * lease
        case "half-open" | "cable out":
            return random.uniform(0.3, 2.0) * lease
        case "full disk":
            return random.uniform(1.0, 4.0)
        case _:
            return 0.0
