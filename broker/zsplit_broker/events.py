"""What the scheduler is told and what it answers: plain records, journaled as JSON.

Events are all that the scheduler ever learns, in the order of the journal, so that replaying them gives
the same scheduler again. Instructions are what follows from an event; they are derived, never stored.
"""

from typing import Literal

import msgspec

from zsplit.plan import Situation
from zsplit.wire.messages import Job, Lease, LinkSpeed, Plan, Prepared, Profile, Ref, Tally


class Fact(msgspec.Struct, frozen=True, tag_field="event"):
    """Base of the events."""


class Started(Fact, frozen=True, tag="started"):
    """A broker process took up the run: a new epoch, from which leases are numbered anew.

    `ports` are those that it listens on (control, data, events), so that the next one can be found where this one was.
    """

    epoch: int
    ports: tuple[int, int, int] = (0, 0, 0)


class Joined(Fact, frozen=True, tag="joined"):
    """A peer has loaded its data (a client, with the sizes of its parts) or its model (a server).

    `instance` is the process: another one of the same index holds nothing of what this one held.
    """

    role: Literal["client", "server"]
    index: int
    prepared: Prepared
    instance: str = ""


class Lost(Fact, frozen=True, tag="lost"):
    """A peer is gone: silent, closed, failed or without progress; the sentence says which.

    `fatal`: it says that nobody can go on.
    """

    role: Literal["client", "server"]
    index: int
    sentence: str
    fatal: bool = False


class Missed(Fact, frozen=True, tag="missed"):
    """A client was waited for long enough: what it is waited for goes on without it, for the reason given."""

    client: int
    sentence: str


class Damaged(Fact, frozen=True, tag="damaged"):
    """A version that was stored cannot be used any more, for the reason given."""

    digest: str
    sentence: str


class Draining(Fact, frozen=True, tag="draining"):
    """The run is to end once the version of the round under way is committed, for the reason given."""

    sentence: str


class Ready(Fact, frozen=True, tag="ready"):
    """The server of this lease has loaded the base version."""

    lease: Lease


class Done(Fact, frozen=True, tag="done"):
    """One side of a lease has finished; `digest` is the state that it holds since.

    One that measured has a profile, and a client its link too.
    """

    lease: Lease
    side: Literal["client", "server"]
    digest: str
    tally: Tally
    profile: Profile | None = None
    link: LinkSpeed | None = None


class Stored(Fact, frozen=True, tag="stored"):
    """A version is on the broker's disk: this line is its commit."""

    digest: str


class Stopped(Fact, frozen=True, tag="stopped"):
    """The run is to end now, for the reason given."""

    sentence: str


class Planned(Fact, frozen=True, tag="planned"):
    """What each client is told to use from a round on, the step seconds predicted for it, and a sentence about it.

    Every `Decide` is answered by one; it has no plans where those that there are stay.
    """

    round: int
    plans: dict[int, Plan] = {}
    predicted: dict[int, float] = {}
    sentence: str = ""


Event = Started | Joined | Lost | Missed | Ready | Done | Stored | Damaged | Draining | Stopped | Planned


class Entry(msgspec.Struct, frozen=True):
    """A line of the journal: an event and when it was taken in, in seconds since the run began."""

    at: float
    event: Event


class Open(msgspec.Struct, frozen=True):
    """Tell the job's server to load what it needs."""

    job: Job


class Grant(msgspec.Struct, frozen=True):
    """Tell the job's client to begin."""

    job: Job


class Close(msgspec.Struct, frozen=True):
    """The job is over, on both sides."""

    job: Job


class Decide(msgspec.Struct, frozen=True):
    """Make a plan for this situation from a round on; where there are current ones, others only if faster by `gain`.

    `why` says for each client what has moved since its plan was made.
    """

    round: int
    situation: Situation
    current: dict[int, Plan] = {}
    gain: float = 0.0
    why: dict[int, str] = {}


class Store(msgspec.Struct, frozen=True):
    """Pull this state from its holder and write it to disk. Said again, it is to come from another holder."""

    ref: Ref


class Forsake(msgspec.Struct, frozen=True):
    """A state that was to be stored is needed no more."""

    digest: str


class Discard(msgspec.Struct, frozen=True):
    """A stored version that nothing needs any more."""

    digest: str


class Announce(msgspec.Struct, frozen=True):
    """A round is over; its record is the last of the scheduler's history."""

    round: int


class Finish(msgspec.Struct, frozen=True):
    """The run is over."""

    ok: bool
    sentence: str


Instruction = Open | Grant | Close | Decide | Store | Forsake | Discard | Announce | Finish
