"""What a run's journal says of where its last version came from: every turn in it, and what both sides say they did."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import msgspec

from zsplit.config import load_config
from zsplit.wire.messages import Lease, Merge, Turn
from zsplit_broker.events import Done, Entry, Open
from zsplit_broker.journal import JOURNAL, _whole_lines
from zsplit_broker.scheduler import Scheduler


class Step(NamedTuple):
    """A step of a client in a round: what must be in the lineage of the last version exactly once."""

    client: int
    round: int
    step: int


class Lineage(NamedTuple):
    """The steps in a version with how often each is there, and for each turn the samples of both sides."""

    steps: Counter[Step]
    samples: list[tuple[int, int]]


def lineage_of(folder: Path) -> Lineage:
    """Walk back from the last version of a finished run to version 0, along the bases of what was merged."""
    config = load_config(folder / "config.toml")
    journal = folder / JOURNAL
    scheduler = Scheduler(config)
    turns: dict[Lease, Turn] = {}
    merges: dict[Lease, Merge] = {}
    samples: dict[tuple[Lease, str], int] = {}
    front_of: dict[tuple[int, str], Lease] = {}
    made: dict[str, Merge] = {}
    for line in _whole_lines(journal, journal.read_bytes())[1:]:
        entry = msgspec.json.decode(line, type=Entry)
        if isinstance(entry.event, Done) and entry.event.lease in scheduler.work:
            done = entry.event
            samples.setdefault((done.lease, done.side), done.tally.samples)
            if done.lease in turns and done.side == "client":
                front_of[turns[done.lease].client, done.digest] = done.lease
            if done.lease in merges:
                made[done.digest] = merges[done.lease]
        for said in scheduler.handle(entry):
            if isinstance(said, Open) and isinstance(said.job, Turn):
                turns[said.job.lease] = said.job
            elif isinstance(said, Open) and isinstance(said.job, Merge):
                merges[said.job.lease] = said.job
    steps: Counter[Step] = Counter()
    both: list[tuple[int, int]] = []
    version = scheduler.history[-1].version
    while version in made:
        merge = made.pop(version)
        for contribution in merge.inputs:
            lease = front_of[contribution.client, contribution.front.digest]
            turn = turns[lease]
            steps.update(Step(turn.client, turn.round, step) for step in range(turn.first, turn.first + turn.count))
            both.append((samples[lease, "client"], samples[lease, "server"]))
        version = merge.base.digest
    return Lineage(steps, both)
