"""Stored versions: whole or not there, under the digest of their contents, readable by anybody."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from threading import Event, Semaphore, Thread

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_journal import file_size_limit, process, small_disk
from test_manifest import state_of, states
from torch import nn

from zsplit.errors import LocalProtocolError, RemoteProtocolError, StorageError
from zsplit.wire.frames import CHUNK
from zsplit.wire.manifest import Entry, Manifest, digest_of
from zsplit_broker.disk import Outcome, Writer
from zsplit_broker.versions import MAX_OPEN, Versions

State = tuple[Manifest, bytes]

DTYPES = {torch.float32: "F32", torch.int64: "I64"}


def state(seed: int, kilobytes: int = 20) -> State:
    """A state of two weights and an optimizer buffer, of about this size."""
    random = Random(seed)
    shape = (kilobytes * 256 // 3,)
    names = ("conv.weight", "conv.bias", "optimizer/momentum_buffer/conv.weight")
    return state_of({name: ("F32", shape, random.randbytes(4 * shape[0])) for name in names})


def store(versions: Versions, made: State, order: Callable[[list[int]], list[int]] = list) -> str:
    """Store a state chunk by chunk, in this order; return its digest."""
    manifest, data = made
    draft = versions.begin(manifest)
    chunks = {offset: length for offset, length, _ in manifest.chunks()}
    for offset in order(list(chunks)):
        draft.write(offset, memoryview(data)[offset : offset + chunks[offset]])
    draft.commit()
    return manifest.digest


def stored(versions: Versions, digest: str) -> State:
    manifest = versions.manifest(digest)
    return manifest, versions.read(digest, 0, manifest.nbytes)


def damage(path: Path, position: int) -> None:
    contents = bytearray(path.read_bytes())
    contents[position] ^= 1
    path.write_bytes(contents)


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads take turns after a microsecond instead of five thousand, so that they meet in every place."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    return Versions(tmp_path / "versions")


@settings(max_examples=50, deadline=None)
@given(states(), st.data())
def test_what_was_stored_is_read_back_also_by_the_next_process(made: State, data: st.DataObject) -> None:
    manifest, contents = made
    with TemporaryDirectory() as folder:
        digest = store(Versions(Path(folder) / "versions"), made)
        versions = Versions(Path(folder) / "versions")
        assert versions.digests() == [digest]
        assert digest in versions
        assert stored(versions, digest) == made
        first = data.draw(st.integers(0, manifest.nbytes))
        last = data.draw(st.integers(first, manifest.nbytes))
        assert versions.read(digest, first, last - first) == contents[first:last]
        versions.verify(digest)
        versions.close()


def test_chunks_may_come_in_any_order_and_twice(versions: Versions) -> None:
    made = state(1, kilobytes=3 * CHUNK // 1024)
    digest = store(versions, made, lambda offsets: [*reversed(offsets), *offsets[:2]])
    assert stored(versions, digest) == made


@pytest.mark.parametrize("position", [0, -1])
def test_a_chunk_that_comes_again_with_other_bytes_is_noticed(versions: Versions, position: int) -> None:
    manifest, data = state(1)
    draft = versions.begin(manifest)
    draft.write(0, data)
    other = bytearray(data)
    other[position] ^= 1
    draft.write(0, other)
    with pytest.raises(RemoteProtocolError, match="came with other bytes than its digest says"):
        draft.commit()
    assert versions.digests() == []


def test_what_came_in_order_is_not_read_back(versions: Versions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.pread", None)
    assert store(versions, state(1)) in versions


def test_a_version_is_a_plain_safetensors_file(versions: Versions) -> None:
    manifest, data = made = state(1)
    found = dict(safetensors.deserialize(versions.path(store(versions, made)).read_bytes()))
    assert found.keys() == {entry.name for entry in manifest.entries}
    spans = manifest.offsets()
    assert all(bytes(found[name]["data"]) == data[first:last] for name, (first, last) in spans.items())


def test_storing_what_is_there_already_changes_nothing(versions: Versions) -> None:
    digest = store(versions, state(1))
    assert stored(versions, digest) == state(1)
    assert store(versions, state(1)) == digest
    assert stored(versions, digest) == state(1)
    assert os.listdir(versions.folder) == [f"{digest}.safetensors"]


def test_storing_again_mends_a_damaged_version(versions: Versions) -> None:
    digest = store(versions, state(1))
    damage(versions.path(digest), -1)
    assert stored(versions, digest) != state(1)
    store(versions, state(1))
    assert stored(versions, digest) == state(1)
    versions.verify(digest)


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (lambda draft, data: draft.write(100, bytes(8)), "conv.bias"),
        (lambda draft, data: draft.write(len(data) - 1, b"?"), "optimizer/momentum_buffer/conv.weight"),
        (lambda draft, data: draft.write(len(data) // 3, data[:100]), "conv.weight"),
    ],
)
def test_other_bytes_than_the_digest_says_are_refused_by_name(
    versions: Versions, fault: Callable[[object, bytes], None], name: str
) -> None:
    manifest, data = state(1)
    draft = versions.begin(manifest)
    draft.write(0, data)
    fault(draft, data)
    with pytest.raises(RemoteProtocolError) as refusal:
        draft.commit()
    assert str(refusal.value) == (
        f"tensor {name!r} of state {manifest.digest} came with other bytes than its digest says: pull it again"
    )
    assert versions.digests() == []
    assert os.listdir(versions.folder) == []


def test_a_part_that_never_came_is_refused_by_name(versions: Versions) -> None:
    manifest, data = state(1)
    draft = versions.begin(manifest)
    draft.write(0, data[:-1])
    with pytest.raises(RemoteProtocolError, match=r"tensor 'optimizer/momentum_buffer/conv\.weight' of state"):
        draft.commit()


@pytest.mark.parametrize("cut", [1, 30_000])
def test_a_part_that_never_came_is_noticed_where_no_space_can_be_reserved(
    versions: Versions, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    monkeypatch.delattr("os.posix_fallocate")
    manifest, data = state(1, kilobytes=60)
    draft = versions.begin(manifest)
    draft.write(0, data[:-cut])
    with pytest.raises(RemoteProtocolError, match="came with other bytes than its digest says"):
        draft.commit()
    assert versions.digests() == []


def test_bytes_beyond_the_state_are_refused(versions: Versions) -> None:
    manifest, data = state(1)
    draft = versions.begin(manifest)
    sentence = f"bytes 8 to {len(data) + 8} are not in state {manifest.digest}, which has {len(data)}"
    with pytest.raises(RemoteProtocolError, match=sentence):
        draft.write(8, data)
    with pytest.raises(RemoteProtocolError, match="bytes -8 to 0 are not in"):
        draft.write(-8, data[:8])
    digest = store(versions, state(1))
    with pytest.raises(RemoteProtocolError, match=sentence):
        versions.read(digest, 8, len(data))
    with pytest.raises(RemoteProtocolError, match="bytes 8 to 4 are not in"):
        versions.read(digest, 8, -4)


def test_an_aborted_draft_leaves_nothing_and_takes_nothing_more(versions: Versions) -> None:
    manifest, data = state(1)
    draft = versions.begin(manifest)
    draft.write(0, data)
    draft.abort()
    draft.abort()
    with pytest.raises(LocalProtocolError, match="a draft takes nothing after its commit or abort: begin another"):
        draft.write(0, data)
    with pytest.raises(LocalProtocolError, match="begin another"):
        draft.commit()
    assert versions.digests() == []
    assert os.listdir(versions.folder) == []


def test_a_deleted_version_is_gone(versions: Versions) -> None:
    digest, kept = store(versions, state(1)), store(versions, state(2))
    assert stored(versions, digest) == state(1)
    versions.delete(digest)
    versions.delete(digest)
    assert versions.digests() == [kept]
    assert os.listdir(versions.folder) == [f"{kept}.safetensors"]
    for use in (versions.manifest, versions.verify, partial(versions.read, offset=0, length=1)):
        with pytest.raises(StorageError) as refusal:
            use(digest)
        assert str(refusal.value) == f"there is no version '{digest}' in {versions.folder}: name one that is there"


def test_a_digest_from_the_wire_never_becomes_a_path(versions: Versions) -> None:
    elsewhere = Versions(versions.folder.parent / "elsewhere")
    digest = store(elsewhere, state(1))
    with pytest.raises(StorageError, match=r"there is no version '\.\./elsewhere/"):
        versions.read(f"../elsewhere/{digest}", 0, 1)


@pytest.mark.parametrize(
    ("position", "why"),
    [
        (-1, "tensor 'optimizer/momentum_buffer/conv.weight' does not have its digest"),
        (0, "its header is not that of a version"),
        (7, "its header is not that of a version"),
        (8, "its header is not that of a version"),
        (60, "its header is not that of a version|its header belongs to another state"),
        (20, "its header is not that of a version"),
    ],
)
def test_a_damaged_version_is_told(versions: Versions, position: int, why: str) -> None:
    digest = store(versions, state(1))
    path = versions.path(digest)
    damage(path, position)
    with pytest.raises(StorageError) as refusal:
        versions.verify(digest)
    assert re.fullmatch(
        f"{path} is damaged \\(({why})\\): put it back from a copy, or delete it and resume from the version before it",
        str(refusal.value),
    )


@settings(deadline=None)
@given(st.data())
def test_no_changed_byte_of_a_version_goes_unnoticed(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        versions = Versions(Path(folder) / "versions")
        path = versions.path(store(versions, state(1, kilobytes=1)))
        damage(path, data.draw(st.integers(0, path.stat().st_size - 1)))
        with pytest.raises(StorageError, match="is damaged"):
            versions.verify(versions.digests()[0])


def test_a_version_that_was_cut_short_is_told(versions: Versions) -> None:
    digest = store(versions, state(1))
    size = versions.path(digest).stat().st_size
    os.truncate(versions.path(digest), size - 1)
    with pytest.raises(StorageError, match=rf"is damaged \(it has {size - 1} bytes instead of {size}\)"):
        versions.read(digest, 0, 1)


def test_a_version_that_is_cut_short_while_it_is_in_use_is_told(versions: Versions) -> None:
    data = state(1)[1]
    digest = store(versions, state(1))
    assert versions.read(digest, 0, len(data)) == data
    os.truncate(versions.path(digest), versions.path(digest).stat().st_size - 1)
    with pytest.raises(StorageError, match=r"is damaged \(it became shorter while it was in use\)"):
        versions.read(digest, 0, len(data))


def test_a_version_under_another_digest_is_told(versions: Versions) -> None:
    one, other = store(versions, state(1)), store(versions, state(2))
    versions.path(one).rename(versions.path(other))
    with pytest.raises(StorageError, match="its header belongs to another state"):
        versions.manifest(other)


def test_more_versions_are_read_than_files_are_kept_open(versions: Versions) -> None:
    made = {store(versions, state(seed, 1)): state(seed, 1) for seed in range(2 * MAX_OPEN)}
    before = len(os.listdir("/dev/fd"))
    for digest, expected in [*made.items(), *made.items()]:
        assert stored(versions, digest) == expected
    assert len(os.listdir("/dev/fd")) - before == MAX_OPEN
    versions.close()
    assert len(os.listdir("/dev/fd")) == before
    assert stored(versions, digest) == expected


def test_the_file_that_was_not_read_for_longest_is_closed_first(versions: Versions) -> None:
    digests = [store(versions, state(seed, 1)) for seed in range(MAX_OPEN + 1)]
    for digest in [*digests[:-1], digests[0], digests[-1]]:
        versions.read(digest, 0, 1)
    for path in versions.folder.iterdir():
        path.unlink()  # what is open can still be read
    assert stored(versions, digests[0]) == state(0, 1)
    with pytest.raises(StorageError, match="No such file or directory"):
        versions.read(digests[1], 0, 1)


@pytest.mark.usefixtures("eager_threads")
def test_reads_are_right_while_another_thread_reads_stores_and_deletes(versions: Versions) -> None:
    made = [state(seed, 1) for seed in range(2 * MAX_OPEN)]
    digests = [store(versions, one) for one in made]
    over = Event()
    wrong: list[Exception] = []

    def churn() -> None:
        try:
            for turn in range(20):
                assert [stored(versions, digest) for digest in digests] == made
                store(versions, state(-1, 1))
                versions.delete(digests[turn % 8])
                store(versions, made[turn % 8])
        except Exception as error:
            wrong.append(error)
        over.set()

    thread = Thread(target=churn)
    thread.start()
    while not over.is_set():
        assert stored(versions, digests[-1]) == made[-1]
    thread.join()
    assert wrong == []


def test_a_kill_in_the_middle_of_a_draft_leaves_no_version_and_the_file_is_cleaned_up(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from zsplit.wire.manifest import Manifest
from zsplit_broker.versions import Versions
folder = Path(sys.argv[1])
data = (folder / "data").read_bytes()
draft = Versions(folder / "versions").begin(Manifest.decode((folder / "manifest").read_bytes(), sys.argv[2]))
draft.write(0, data[: len(data) // 2])
print("ready", flush=True)
time.sleep(60)
"""
    previous = store(Versions(tmp_path / "versions"), state(1))
    manifest, data = state(2)
    (tmp_path / "manifest").write_bytes(manifest.encode())
    (tmp_path / "data").write_bytes(data)
    with process(script, tmp_path, manifest.digest) as running:
        running.send_signal(signal.SIGKILL)
    assert len(list((tmp_path / "versions").glob(f"{manifest.digest}.*.partial"))) == 1
    versions = Versions(tmp_path / "versions")
    assert os.listdir(versions.folder) == [f"{previous}.safetensors"]
    assert versions.digests() == [previous]
    assert stored(versions, previous) == state(1)


def test_a_full_disk_leaves_the_previous_version_intact(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2_000_000) as disk:
        versions = Versions(disk / "versions")
        previous = store(versions, state(1, kilobytes=1400))
        manifest, data = state(2, kilobytes=1200)
        draft = versions.begin(manifest)
        with pytest.raises(StorageError) as refusal:
            draft.write(0, data[:8])  # the space of the whole is taken up with the first bytes
        draft.abort()
        assert os.listdir(versions.folder) == [f"{previous}.safetensors"]
        assert stored(versions, previous) == state(1, kilobytes=1400)
        with pytest.raises(StorageError) as export_refusal:
            versions.export(previous, disk / "model.safetensors")
        assert os.listdir(disk) == ["versions"]
        versions.close()
    assert str(refusal.value) == (f"the disk of {versions.folder} is full: free 2 MB; the previous version is intact")
    assert str(export_refusal.value) == f"the disk of {disk} is full: free 1 MB; the version itself is intact"


def test_a_file_that_may_not_grow_leaves_the_previous_version_intact(tmp_path: Path, versions: Versions) -> None:
    previous = store(versions, state(1))
    manifest, data = state(2, kilobytes=100)
    draft = versions.begin(manifest)
    with file_size_limit(len(data) // 2), pytest.raises(StorageError) as refusal:
        draft.write(0, data[:8])
    draft.abort()
    assert str(refusal.value) == (
        f"{versions.folder} cannot be used (File too large): mend that and resume; the previous version is intact"
    )
    with file_size_limit(1000), pytest.raises(StorageError, match="the version itself is intact"):
        versions.export(previous, tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == ["versions"]
    assert os.listdir(versions.folder) == [f"{previous}.safetensors"]
    assert stored(versions, previous) == state(1)


def trained() -> tuple[nn.Module, State]:
    """A small model after a step, and its state with momentum and a local buffer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(5, 1, 4, 4)).sum().backward()
    optimizer.step()
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        buffer = optimizer.state[parameter]["momentum_buffer"]
        tensors[f"optimizer/momentum_buffer/{name}"] = tensors[f"local/client.0/momentum_buffer/{name}"] = buffer
    rows = {n: (DTYPES[t.dtype], tuple(t.shape), t.contiguous().numpy().tobytes()) for n, t in tensors.items()}
    return model, state_of(rows)


def test_the_export_loads_into_the_plain_model(tmp_path: Path, versions: Versions) -> None:
    model, made = trained()
    digest = store(versions, made)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"an earlier one")
    versions.export(digest, path)
    fresh = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    fresh.load_state_dict(load_file(path))
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "version": digest}
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "versions"]


def test_a_damaged_version_is_not_exported(tmp_path: Path, versions: Versions) -> None:
    digest = store(versions, state(1))
    damage(versions.path(digest), -1)
    with pytest.raises(StorageError, match="is damaged"):
        versions.export(digest, tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == ["versions"]


SYNCED = """
import sys
from pathlib import Path
from zsplit.wire.manifest import Entry, Manifest, digest_of
from zsplit_broker.journal import Journal
from zsplit_broker.versions import Versions
folder = Path(sys.argv[1])
journal = Journal.open(folder)
versions = Versions(folder / "versions")
draft = versions.begin(Manifest.of([Entry("a", "U8", (5,), digest_of(b"bytes"))]))
draft.write(0, b"bytes")
draft.commit()
journal.append([b"the version is there", b"so is its line"])
versions.export(versions.digests()[0], folder / "model.safetensors")
"""


def traced(folder: Path) -> list[str]:
    """Run SYNCED under strace; return its writes, syncs and renames as `call file`, files by their names."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    calls = ["-e", "trace=fsync,fdatasync,rename,renameat,renameat2,pwrite64,fallocate", "-e", "signal=none"]
    command = [strace, "-y", "-f", *calls, sys.executable, "-c", SYNCED, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    if "ptrace" in result.stderr and result.returncode:
        pytest.skip(f"strace may not trace here: {result.stderr.splitlines()[0]}")
    assert result.returncode == 0, result.stderr
    pattern = re.compile(r'(\w+)\((?:\d+<|"|AT_FDCWD[^"]*")([^>"]+)')
    found = [pattern.search(row) for row in result.stderr.splitlines()]
    return [f"{match[1].removesuffix('64')} {Path(match[2]).name}" for match in found if match]


def test_the_disk_sees_the_file_then_its_name_then_the_folder_then_the_line(tmp_path: Path) -> None:
    digest = Manifest.of([Entry("a", "U8", (5,), digest_of(b"bytes"))]).digest
    run, draft = tmp_path.name, f"{digest}.0.partial"
    assert traced(tmp_path) == [
        "pwrite lock",
        *["fallocate journal.log.partial", "pwrite journal.log.partial", "fsync journal.log.partial"],
        *["rename journal.log.partial", f"fsync {run}"],
        f"fsync {run}",  # the folder of the versions is new
        *[f"fallocate {draft}", f"pwrite {draft}", f"pwrite {draft}", f"fsync {draft}"],
        *[f"rename {draft}", "fsync versions"],
        *["pwrite journal.log", "fsync journal.log"],
        *[
            "fallocate model.safetensors.partial",
            "pwrite model.safetensors.partial",
            "pwrite model.safetensors.partial",
        ],
        *["fsync model.safetensors.partial", "rename model.safetensors.partial", f"fsync {run}"],
    ]


def fail(error: Exception) -> None:
    raise error


def test_the_writer_runs_tasks_in_order_and_hands_back_their_errors() -> None:
    woken = Semaphore(0)
    done: list[int] = []
    writer = Writer(woken.release)
    full, bug = StorageError("the disk is full"), KeyError("a bug")
    writer.submit("a", partial(done.append, 1))
    writer.submit("b", partial(fail, full))
    writer.submit("c", partial(fail, bug))
    writer.submit("d", partial(done.append, 2))
    for _ in range(4):
        assert woken.acquire(timeout=10)
    assert done == [1, 2]
    assert writer.finished() == [Outcome("a", None), Outcome("b", full), Outcome("c", bug), Outcome("d", None)]
    assert writer.finished() == []
    writer.close()


def test_bytes_are_pending_until_their_outcome_is_collected() -> None:
    woken, gate = Semaphore(0), Event()
    writer = Writer(woken.release)
    writer.submit("a", lambda: None, 100)
    writer.submit("b", lambda: fail(OSError()) if gate.wait(10) else None, 10)
    assert woken.acquire(timeout=10)
    assert (writer.pending_bytes, len(writer.finished()), writer.pending_bytes) == (110, 1, 10)
    gate.set()
    assert woken.acquire(timeout=10)
    assert (writer.pending_bytes, len(writer.finished()), writer.pending_bytes) == (10, 1, 0)
    writer.close()


def test_closing_the_writer_finishes_what_was_submitted(versions: Versions) -> None:
    manifest, data = state(1)
    writer = Writer(lambda: None)
    draft = versions.begin(manifest)
    for offset in range(0, len(data), 1000):
        writer.submit("", partial(draft.write, offset, data[offset : offset + 1000]))
    writer.submit(manifest.digest, draft.commit)
    writer.close()
    assert writer.finished()[-1] == Outcome(manifest.digest, None)
    assert stored(versions, manifest.digest) == state(1)
