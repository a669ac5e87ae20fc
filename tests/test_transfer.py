"""A state on its way: whatever is lost, doubled or asked for again, what arrives is what was wanted."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from threading import Event

import pytest
from helpers import unhurried
from hypothesis import given
from hypothesis import strategies as st

from zsplit.errors import RemoteProtocolError
from zsplit.wire.frames import CHUNK
from zsplit.wire.manifest import Entry, Manifest, digest_of
from zsplit.wire.messages import Chunk, Ref
from zsplit.wire.transfer import CREDIT, MANIFEST, Fetch, Piece, Sink
from zsplit_broker.disk import Writer
from zsplit_broker.intake import NO_LEASE, Intake
from zsplit_broker.versions import Versions

NAMES = ["conv.weight", "conv.bias", "fc.weight", "optimizer/step/fc.weight", "optimizer/momentum_buffer/conv.bias"]
SIZES = [0, 1, 1000, CHUNK, CHUNK + 1, 5 * CHUNK // 2]

SECTION = bytes(range(251)) * (len(NAMES) * max(SIZES) // 251 + 1)
"""The data section of every state here, or the beginning of it: a byte says where it belongs."""


@st.composite
def states(draw: st.DrawFn) -> Manifest:
    """Return the manifest of a state of up to twelve chunks."""
    names = draw(st.lists(st.sampled_from(NAMES), unique=True))
    sizes = st.sampled_from(SIZES)
    return Manifest.of(Entry(name, "U8", (draw(sizes),), digest_of(name.encode())) for name in names)


class Holder:
    """Somebody who has a state, and a sink that writes down what it is given."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.received: dict[int, int] = {}

    def answer(self, piece: Piece) -> memoryview:
        if piece.offset == MANIFEST:
            return memoryview(self.manifest.encode())
        return memoryview(SECTION)[piece.offset : piece.offset + piece.length]

    def open_sink(self, manifest: Manifest) -> Sink:
        assert manifest == self.manifest

        def write(offset: int, data: memoryview) -> None:
            assert offset not in self.received, "the same bytes were written twice"
            assert bytes(data) == SECTION[offset : offset + len(data)]
            self.received[offset] = len(data)

        return write

    def spans(self, wanted: Callable[[str], bool]) -> dict[int, int]:
        """Return offset and length of everything that is to arrive."""
        names = [entry.name for entry in self.manifest.entries if wanted(entry.name)]
        return {offset: length for offset, length, _ in self.manifest.chunks(names)}


moves = st.sampled_from(["ask", "answer", "answer", "repeat", "refuse", "retry", "again"])


@unhurried
@given(states(), st.sets(st.sampled_from(NAMES)), st.lists(moves, max_size=40), st.randoms(use_true_random=False))
def test_whatever_order_answers_come_in_exactly_the_wanted_bytes_arrive(
    manifest: Manifest, wanted: set[str], moves: list[str], random: Random
) -> None:
    holder = Holder(manifest)
    fetch = Fetch(manifest.digest, holder.open_sink, wanted.__contains__)
    asked: list[Piece] = []
    answered: list[Piece] = []
    for move in moves + ["retry", "ask", "answer"] * (1 + CREDIT + manifest.nbytes // CHUNK + len(NAMES)):
        match move:
            case "ask":
                asked += fetch.want()
                assert len(asked) <= CREDIT
                assert fetch.want() == [], "asking twice asks for more than the credit"
            case "answer" if asked:
                answered.append(asked.pop(random.randrange(len(asked))))
                fetch.take(answered[-1].offset, holder.answer(answered[-1]))
            case "repeat" if answered:
                piece = random.choice(answered)
                fetch.take(piece.offset, holder.answer(piece))
                asked = [other for other in asked if other.offset != piece.offset]
            case "refuse" if asked:
                fetch.refuse(asked.pop().offset)
            case "retry":
                fetch.retry()
            case "again":
                answered += asked  # their answers may still come
                asked = []
                fetch.again()
    assert fetch.done
    assert fetch.want() == []
    assert fetch.manifest == manifest
    assert holder.received == holder.spans(wanted.__contains__)


@unhurried
@given(states())
def test_all_tensors_are_wanted_by_default_and_each_kind_is_called_by_its_name(manifest: Manifest) -> None:
    holder = Holder(manifest)
    fetch = Fetch(manifest.digest, holder.open_sink)
    asked = [piece for piece in fetch.want() if not fetch.take(piece.offset, holder.answer(piece))]
    while not fetch.done:
        for piece in fetch.want():
            asked.append(piece)
            fetch.take(piece.offset, holder.answer(piece))
    assert asked[0] == Piece(MANIFEST, 0, "other")
    assert sum(holder.received.values()) == manifest.nbytes
    for offset, length, is_optimizer in manifest.chunks():
        assert Piece(offset, length, "optimizer" if is_optimizer else "weights") in asked


def test_what_was_asked_for_before_a_lost_connection_is_asked_for_again_in_the_same_order() -> None:
    manifest = Manifest.of([Entry("fc.weight", "U8", (6 * CHUNK,), digest_of(b""))])
    fetch = Fetch(manifest.digest, Holder(manifest).open_sink)
    fetch.want()
    fetch.take(MANIFEST, memoryview(manifest.encode()))
    first = fetch.want()
    assert [piece.offset for piece in first] == [n * CHUNK for n in range(CREDIT)]
    fetch.take(CHUNK, memoryview(SECTION)[CHUNK : 2 * CHUNK])
    fetch.again()
    assert [piece.offset for piece in fetch.want()] == [n * CHUNK for n in (0, 2, 3, 4)]


def test_what_was_refused_is_asked_for_when_it_is_tried_again_and_not_before() -> None:
    manifest = Manifest.of([Entry("fc.weight", "U8", (10,), digest_of(b""))])
    fetch = Fetch(manifest.digest, Holder(manifest).open_sink)
    (piece,) = fetch.want()
    fetch.refuse(piece.offset)
    fetch.refuse(piece.offset)
    assert fetch.want() == []
    assert not fetch.done
    fetch.retry()
    assert fetch.want() == [piece]


def test_an_answer_to_nothing_is_ignored() -> None:
    manifest = Manifest.of([Entry("fc.weight", "U8", (10,), digest_of(b""))])
    holder = Holder(manifest)
    fetch = Fetch(manifest.digest, holder.open_sink)
    fetch.take(MANIFEST, memoryview(manifest.encode()))
    fetch.take(0, memoryview(b"0123456789"))
    assert not fetch.done
    assert holder.received == {}


@pytest.mark.parametrize("size", [0, 9, 11])
def test_a_chunk_of_another_length_is_refused_and_can_still_come_right(size: int) -> None:
    manifest = Manifest.of([Entry("fc.weight", "U8", (10,), digest_of(b""))])
    fetch = Fetch(manifest.digest, Holder(manifest).open_sink)
    fetch.want()
    fetch.take(MANIFEST, memoryview(manifest.encode()))
    fetch.want()
    with pytest.raises(RemoteProtocolError, match=f"a chunk of {size} bytes came for state .*, 10 were asked for"):
        fetch.take(0, memoryview(SECTION)[:size])
    assert not fetch.done
    fetch.take(0, memoryview(SECTION)[:10])
    assert fetch.done


@pytest.mark.parametrize(
    ("data", "sentence"), [(b"", "not a manifest"), (Manifest(()).encode(), "a manifest with digest")]
)
def test_a_manifest_of_another_state_is_refused(data: bytes, sentence: str) -> None:
    manifest = Manifest.of([Entry("fc.weight", "U8", (10,), digest_of(b""))])
    fetch = Fetch(manifest.digest, Holder(manifest).open_sink)
    fetch.want()
    with pytest.raises(RemoteProtocolError, match=sentence):
        fetch.take(MANIFEST, memoryview(data))


# The broker's own fetch


def state(size: int) -> Manifest:
    return Manifest.of([Entry("fc.weight", "U8", (size,), digest_of(SECTION[:size]))])


def test_a_version_is_pulled_from_its_holder_and_stored_once_all_is_there(tmp_path: Path) -> None:
    manifest, woken = state(2 * CHUNK + 5), Event()
    holder, versions, writer = Holder(manifest), Versions(tmp_path), Writer(woken.set)
    intake = Intake(Ref(digest=manifest.digest, holder="server.0"), "run", versions, writer)
    while pulls := list(intake.pulls()):
        for pull in pulls:
            assert (pull.run, pull.lease, pull.source, pull.digest) == ("run", NO_LEASE, "server.0", manifest.digest)
            assert pull.origin == "broker"
            data = holder.answer(Piece(pull.offset, pull.length, pull.what))
            came = Chunk("run", "token", NO_LEASE, "broker", pull.digest, pull.offset, len(data), pull.what)
            intake.take(came, data)
            intake.take(came, data)  # a repeat stores nothing twice
    writer.close()
    assert [outcome.error for outcome in writer.finished() if outcome.key == manifest.digest] == [None]
    assert versions.read(manifest.digest, CHUNK, 7) == SECTION[CHUNK : CHUNK + 7]
    versions.verify(manifest.digest)
    versions.close()


def test_a_version_whose_holder_is_away_is_asked_for_again(tmp_path: Path) -> None:
    manifest = state(100)
    versions, writer = Versions(tmp_path), Writer(lambda: None)
    intake = Intake(Ref(digest=manifest.digest, holder="server.0"), "run", versions, writer)
    (pull,) = intake.pulls()
    intake.take(Chunk("run", "", NO_LEASE, "broker", pull.digest, pull.offset, 0, pull.what), None)
    assert list(intake.pulls()) == []
    intake.retry()
    assert list(intake.pulls()) == [pull]
    writer.close()
    versions.close()


def test_a_version_that_came_damaged_is_not_stored(tmp_path: Path) -> None:
    manifest = state(100)
    versions, writer = Versions(tmp_path), Writer(lambda: None)
    intake = Intake(Ref(digest=manifest.digest, holder="server.0"), "run", versions, writer)
    for pull in intake.pulls():
        came = Chunk("run", "token", NO_LEASE, "broker", pull.digest, pull.offset, 0, pull.what)
        intake.take(came, memoryview(manifest.encode()))
    for pull in intake.pulls():
        came = Chunk("run", "token", NO_LEASE, "broker", pull.digest, pull.offset, 100, pull.what)
        intake.take(came, memoryview(bytes(100)))
    writer.close()
    (outcome,) = [outcome for outcome in writer.finished() if outcome.key == manifest.digest]
    assert isinstance(outcome.error, RemoteProtocolError)
    assert list(tmp_path.iterdir()) == []
    versions.close()
