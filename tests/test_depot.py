"""What becomes of a state on its way to the disk, when that is full or the state is not wanted any more."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest
from test_journal import small_disk
from test_versions import State, state, stored

from zsplit.wire.messages import Chunk, Lease, Pull, Ref
from zsplit.wire.transfer import MANIFEST
from zsplit_broker.depot import Depot
from zsplit_broker.disk import DiskFullError, Writer
from zsplit_broker.events import Stored
from zsplit_broker.versions import Versions

RUN = "demo"


class Holder:
    """A peer that has a state, and answers pulls when it is told to."""

    def __init__(self, made: State) -> None:
        self.manifest, self.data = made
        self.ref = Ref(self.manifest.digest, "server.0")
        self.asked: list[Pull] = []

    def ask(self, pull: Pull) -> bool:
        self.asked.append(pull)
        return True

    def answer(self, depot: Depot, swap: bool = False) -> None:
        """Answer what was asked for first, with other bytes where they are to be swapped."""
        pull = self.asked.pop(0)
        whole = pull.offset == MANIFEST
        data = self.manifest.encode() if whole else self.data[pull.offset : pull.offset + pull.length]
        data = data[::-1] if swap else data
        chunk = Chunk(RUN, "", Lease(0, 0), "broker", pull.digest, pull.offset, len(data), pull.what)
        depot.take(chunk, memoryview(data))


@contextmanager
def waiting(writer: Writer) -> Iterator[None]:
    """Let the writer do nothing meanwhile, and all that was submitted behind it."""
    go, done = Event(), Event()
    writer.submit("", lambda: (go.wait(), None)[1])
    yield
    writer.submit("", done.set)
    go.set()
    assert done.wait(30)


def outcomes(depot: Depot, writer: Writer) -> list[Stored | DiskFullError]:
    """Have the depot take in what the writer finished about versions; return what came of it."""
    found: list[Stored | DiskFullError] = []
    for outcome in writer.finished():
        if outcome.key:
            try:
                news = depot.written(outcome)
            except DiskFullError as error:
                found.append(error)
            else:
                assert news is None or isinstance(news, Stored)
                found += [news] if news else []
    return found


@pytest.fixture
def writer() -> Iterator[Writer]:
    writer = Writer(lambda: None)
    yield writer
    writer.close()


def test_room_that_comes_after_the_first_piece_failed_is_used_by_the_next_try_and_not_by_half_a_version(
    tmp_path: Path, writer: Writer
) -> None:
    holder = Holder(state(1, kilobytes=400))
    with small_disk(tmp_path / "disk", 800_000) as disk:
        (filling := disk / "filling").write_bytes(bytes(600_000))
        versions = Versions(disk / "versions")
        depot = Depot(RUN, versions, writer, holder.ask)
        depot.store(holder.ref)
        holder.answer(depot)
        with waiting(writer):
            assert len(holder.asked) == 2
            holder.answer(depot)
            writer.submit("", filling.unlink)
            holder.answer(depot)
        assert [type(each) for each in outcomes(depot, writer)] == [DiskFullError]
        assert depot.waits_for_room
        depot.tick()
        with waiting(writer):
            while holder.asked:
                holder.answer(depot)
        assert outcomes(depot, writer) == [Stored(holder.ref.digest)]
        assert not depot.waits_for_room
        assert stored(versions, holder.ref.digest) == (holder.manifest, holder.data)
        versions.close()


def test_what_is_wrong_with_a_state_that_is_not_wanted_any_more_is_no_news(tmp_path: Path, writer: Writer) -> None:
    holder = Holder(state(1))
    versions = Versions(tmp_path / "versions")
    depot = Depot(RUN, versions, writer, holder.ask)
    depot.store(holder.ref)
    holder.answer(depot)
    with waiting(writer):
        while holder.asked:
            holder.answer(depot, swap=True)
        depot.forsake(holder.ref.digest)
    assert outcomes(depot, writer) == []
    assert versions.digests() == []
