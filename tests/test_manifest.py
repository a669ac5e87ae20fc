"""A state's manifest: one order, one digest, chunks that cover it, and a head that safetensors reads."""

import json
from collections.abc import Callable
from itertools import pairwise
from random import Random

import msgspec
import pytest
import safetensors
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from zsplit.errors import RemoteProtocolError
from zsplit.wire.frames import CHUNK, ITEMSIZE
from zsplit.wire.manifest import LOCAL, OPTIMIZER, Entry, Manifest, digest_of, hex_of

prefixes = st.sampled_from(["", "", OPTIMIZER + "momentum_buffer/", LOCAL + "server.0/step/"])
names = st.builds(str.__add__, prefixes, st.text(min_size=1, max_size=6).filter(lambda name: name != "__metadata__"))
small_shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
"""Also scalars and empty tensors."""

large_shapes = st.sampled_from([(), (0, 3), (5,), (1000, 1000), (CHUNK // 4,), (CHUNK // 8, 3), (3, CHUNK // 8)])
"""Of sizes around a chunk's: up to twice."""


@st.composite
def manifests(draw: st.DrawFn, shapes: st.SearchStrategy[tuple[int, ...]] = large_shapes) -> Manifest:
    """Manifests of tensors that nobody has to make."""
    chosen = draw(st.lists(names, unique=True, max_size=8))
    dtypes = st.sampled_from(sorted(ITEMSIZE))
    return Manifest.of(Entry(name, draw(dtypes), draw(shapes), digest_of(name.encode())) for name in chosen)


@st.composite
def states(draw: st.DrawFn) -> tuple[Manifest, bytes]:
    """Small states: the manifest and the data section."""
    outline = draw(manifests(small_shapes))
    pieces = {entry.name: draw(st.binary(min_size=entry.nbytes, max_size=entry.nbytes)) for entry in outline.entries}
    return state_of({entry.name: (entry.dtype, entry.shape, pieces[entry.name]) for entry in outline.entries})


def state_of(tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> tuple[Manifest, bytes]:
    """Return the manifest and the data section of tensors given as name → (dtype, shape, bytes)."""
    manifest = Manifest.of(Entry(name, dtype, shape, digest_of(data)) for name, (dtype, shape, data) in tensors.items())
    return manifest, b"".join(tensors[entry.name][2] for entry in manifest.entries)


EXAMPLE = Manifest.of(
    [
        Entry("fc.weight", "F32", (2, 3), digest_of(b"w")),
        Entry("fc.bias", "F16", (2,), digest_of(b"b")),
        Entry("optimizer/step/fc.weight", "I64", (), digest_of(b"s")),
    ]
)


def changed(change: Callable[[list[list[object]]], object]) -> bytes:
    """Return the example's bytes after a change to its rows `[name, dtype, shape, digest]`."""
    rows: list[list[object]] = msgspec.msgpack.decode(EXAMPLE.encode())["entries"]
    change(rows)
    return msgspec.msgpack.encode({"entries": rows})


@given(manifests(), st.randoms(use_true_random=False))
def test_the_order_and_the_digest_do_not_depend_on_the_order_of_making(manifest: Manifest, random: Random) -> None:
    entries = list(manifest.entries)
    random.shuffle(entries)
    assert Manifest.of(entries) == manifest
    assert Manifest.of(entries).digest == manifest.digest


@given(manifests())
def test_tensors_lie_end_to_end_each_on_a_multiple_of_its_item_size(manifest: Manifest) -> None:
    spans = [manifest.offsets()[entry.name] for entry in manifest.entries]
    assert [0, *(last for _, last in spans)] == [*(first for first, _ in spans), manifest.nbytes]
    assert all(first % ITEMSIZE[e.dtype] == 0 for e, (first, _) in zip(manifest.entries, spans, strict=True))
    keys = [(-ITEMSIZE[entry.dtype], entry.name) for entry in manifest.entries]
    assert all(one < other for one, other in pairwise(keys))


@pytest.mark.parametrize(
    "other",
    [
        Entry("b", "F32", (2, 3), digest_of(b"x")),
        Entry("a", "I32", (2, 3), digest_of(b"x")),
        Entry("a", "F32", (3, 2), digest_of(b"x")),
        Entry("a", "F32", (2, 3), digest_of(b"y")),
    ],
)
def test_the_digest_names_everything_about_a_tensor(other: Entry) -> None:
    assert Manifest.of([other]).digest != Manifest.of([Entry("a", "F32", (2, 3), digest_of(b"x"))]).digest


def test_the_digest_is_the_one_that_is_written_down() -> None:
    assert digest_of(b"") == "af1349b9f5f9a1a6a0404dea36dcc949"
    rows = sorted([entry.name, entry.dtype, list(entry.shape), entry.digest] for entry in EXAMPLE.entries)
    assert EXAMPLE.digest == digest_of(json.dumps(rows, separators=(",", ":")).encode())


@given(st.lists(st.binary()))
def test_a_digest_in_pieces_is_that_of_the_whole(pieces: list[bytes]) -> None:
    found = blake3()
    for piece in pieces:
        found.update(piece)
    assert hex_of(found) == digest_of(b"".join(pieces))


@settings(deadline=None)
@given(manifests(), st.data())
def test_chunks_cover_exactly_the_named_tensors_and_never_mix_kinds(manifest: Manifest, data: st.DataObject) -> None:
    everything = [entry.name for entry in manifest.entries]
    wanted = set(data.draw(st.lists(st.sampled_from(everything)))) if everything else set()
    chunks = list(manifest.chunks(wanted))
    assert all(0 < length <= CHUNK for _, length, _ in chunks)
    assert all(one[0] + one[1] <= other[0] for one, other in pairwise(chunks))
    spans = manifest.offsets()
    for entry in manifest.entries:
        first, last = spans[entry.name]
        covered = [
            (min(last, offset + length) - max(first, offset), is_optimizer)
            for offset, length, is_optimizer in chunks
            if max(first, offset) < min(last, offset + length)
        ]
        assert sum(nbytes for nbytes, _ in covered) == (last - first if entry.name in wanted else 0)
        assert all(is_optimizer == entry.is_optimizer for _, is_optimizer in covered)


@given(manifests())
def test_without_names_the_chunks_cover_everything(manifest: Manifest) -> None:
    assert list(manifest.chunks()) == list(manifest.chunks(entry.name for entry in manifest.entries))
    assert sum(length for _, length, _ in manifest.chunks()) == manifest.nbytes


def test_neighbours_share_a_chunk() -> None:
    rows = [Entry(f"layer{i}.bias", "F32", (8,), digest_of(b"")) for i in range(100)]
    assert list(Manifest.of(rows).chunks()) == [(0, 3200, False)]


@given(manifests())
def test_a_manifest_comes_back_as_it_was(manifest: Manifest) -> None:
    assert Manifest.decode(manifest.encode(), manifest.digest) == manifest


@given(st.binary() | manifests().map(Manifest.encode), st.data())
def test_any_other_bytes_are_one_typed_error(data: bytes, more: st.DataObject) -> None:
    if data:
        position = more.draw(st.integers(0, len(data) - 1))
        data = data[:position] + more.draw(st.binary(max_size=3)) + data[position + 1 :]
    with pytest.raises(RemoteProtocolError):
        Manifest.decode(data, "a digest that no state has")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (EXAMPLE.encode()[:-1], "not a manifest: Input data was truncated"),
        (b"\x81\xa7entries\x91\x94\xa1\xff\xa3F32\x90\xa0", "not a manifest: 'utf-8' codec can't decode byte 0xff"),
        (changed(lambda rows: rows.reverse()), "a manifest whose tensors are out of order, doubled or misnamed"),
        (changed(lambda rows: rows.append(rows[-1])), "a manifest whose tensors are out of order, doubled or misnamed"),
        (changed(lambda rows: rows[2].__setitem__(0, "__metadata__")), "out of order, doubled or misnamed"),
        (changed(lambda rows: rows[0].__setitem__(1, "F8")), "a manifest with the unknown dtype 'F8'"),
        (changed(lambda rows: rows[1].__setitem__(2, [2, -3])), r"not a manifest: Expected `int` >= 0"),
        (changed(lambda rows: rows[1].__setitem__(2, [2**40, 2**40])), "is over the limit of 1125899906842624 for a"),
        (changed(lambda rows: rows[1].__setitem__(3, "x" * 32)), "not a manifest: Expected `str` matching regex"),
        (changed(lambda rows: rows[1].__setitem__(3, digest_of(b"") + "\n")), "Expected `str` matching regex"),
        (changed(lambda rows: rows[1].__setitem__(3, digest_of(b""))), f"came for state {EXAMPLE.digest}"),
    ],
)
def test_what_is_not_the_manifest_asked_for_is_refused(data: bytes, sentence: str) -> None:
    with pytest.raises(RemoteProtocolError, match=sentence):
        Manifest.decode(data, EXAMPLE.digest)


@settings(deadline=None)
@given(states())
def test_the_safetensors_library_reads_what_the_head_says(state: tuple[Manifest, bytes]) -> None:
    manifest, data = state
    head = manifest.safetensors_header(metadata={"any": "text"})
    assert len(head) % 8 == 0
    found = dict(safetensors.deserialize(head + data))
    assert found.keys() == {entry.name for entry in manifest.entries}
    for entry in manifest.entries:
        tensor = found[entry.name]
        assert (tensor["dtype"], tuple(tensor["shape"])) == (entry.dtype, entry.shape)
        assert digest_of(bytes(tensor["data"])) == entry.digest


@settings(deadline=None)
@given(states())
def test_a_head_for_some_names_packs_just_those(state: tuple[Manifest, bytes]) -> None:
    manifest, data = state
    names = [entry.name for entry in manifest.entries if not entry.is_optimizer]
    body = b"".join(data[offset : offset + length] for offset, length, _ in manifest.chunks(names))
    found = dict(safetensors.deserialize(manifest.safetensors_header(names) + body))
    digests = {entry.name: entry.digest for entry in manifest.entries if not entry.is_optimizer}
    assert {name: digest_of(bytes(tensor["data"])) for name, tensor in found.items()} == digests
