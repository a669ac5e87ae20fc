"""What a run left, beside what it was to leave: rounds, versions, and every step of every client exactly once."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.numpy import load_file

from zsplit.wire.messages import Job, Lease, Merge, Turn

Row = tuple[int, int, int]
"""A round's number, steps and samples."""

Unit = tuple[int, int, int]
"""A step of training: client, round, step of the round."""


class Run(NamedTuple):
    """What a finished run's folder says. `versions` are in the order of the rounds."""

    rows: list[Row]
    versions: list[str]
    weights: dict[str, tuple[str, tuple[int, ...], bytes]]
    totals: tuple[int, int]


class Verdict(NamedTuple):
    """How a run that ended compares with one that nothing happened to.

    `survived`: it ended with the same weights; `identical`: each of its rounds did, and its figures are the same.
    `lost` and `twice` count steps of the rounds that are missing, or that stand more than once in what was merged.
    """

    survived: bool
    lost: int
    twice: int
    identical: bool

    @property
    def good(self) -> bool:
        """Whether it is as if nothing had happened."""
        return self.survived and self.identical and not (self.lost or self.twice)


def read_run(folder: Path) -> Run:
    """Read the folder of a finished run. Raises OSError, ValueError or KeyError where something is missing."""
    summary = json.loads((folder / "summary.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = {
        name: (str(array.dtype), array.shape, array.tobytes())
        for name, array in load_file(folder / "model.safetensors").items()
    }
    return Run(
        rows=[(row["round"], row["steps"], row["samples"]) for row in metrics],
        versions=[row["version"] for row in metrics],
        weights=weights,
        totals=(summary["steps"], summary["samples"]),
    )


def judge(expected: Run, folder: Path, jobs: Mapping[Lease, Job]) -> Verdict:
    """Compare a run with the undisturbed one, and follow its last version back to the first, merge by merge."""
    found = read_run(folder)
    counted = trained(found.versions[-1], jobs, list(done_events(folder / "journal.log")))
    steps = _steps(jobs)
    rows, wanted = Counter(found.rows), Counter(expected.rows)
    lost = sum((steps - counted).values()) + sum((wanted - rows).values())
    twice = sum((counted - steps).values()) + sum((rows - wanted).values())
    same = (found.weights, found.versions[-1]) == (expected.weights, expected.versions[-1])
    return Verdict(same, lost, twice, found == expected)


def done_events(journal: Path) -> Iterator[dict[str, Any]]:
    """Yield what the journal says of finished jobs: lease, side, digest."""
    for line in journal.read_bytes().splitlines()[1:]:
        event = json.loads(line.split(b" ", 2)[2])["event"]
        if event["event"] == "done":
            yield event


def trained(last: str, jobs: Mapping[Lease, Job], done: Iterable[Mapping[str, Any]]) -> Counter[Unit]:
    """Return how often each step stands in the merges that lead to a version.

    Who repeats a turn or a merge comes to the same digest: what counts is the state that the next one was made from.
    """
    turns: dict[tuple[int, int, str], set[tuple[int, int]]] = defaultdict(set)
    merges: dict[str, Merge] = {}
    for event in done:
        job = jobs.get(Lease(*event["lease"]))
        if isinstance(job, Turn) and event["side"] == "client":
            turns[job.client, job.round, event["digest"]].add((job.first, job.count))
        elif isinstance(job, Merge):
            merges[event["digest"]] = job
    counted: Counter[Unit] = Counter()
    at = last
    while (merge := merges.pop(at, None)) is not None:
        for each in merge.inputs:
            for first, count in turns[each.client, merge.round, each.front.digest]:
                counted.update((each.client, merge.round, step) for step in range(first, first + count))
        at = merge.base.digest
    return counted


def _steps(jobs: Mapping[Lease, Job]) -> Counter[Unit]:
    """Return every step of the run once: each client trains one epoch in each round."""
    return Counter(
        {
            (job.client, job.round, step)
            for job in jobs.values()
            if isinstance(job, Turn)
            for step in range(job.epoch_steps)
        }
    )
