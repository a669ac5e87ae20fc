"""Stored versions: one file for each state, under its digest.

`versions/<digest>.safetensors` in the run's folder is a plain safetensors file with all tensors of the
state, optimizer buffers included; its metadata holds the manifest. A file appears whole or not at all:
it is written under another name, checked against the digests of its tensors, synced, renamed, and the
folder synced. Nothing here starts a thread.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import msgspec
from blake3 import blake3

from zsplit.errors import LocalProtocolError, RemoteProtocolError, StorageError
from zsplit.wire.frames import CHUNK
from zsplit.wire.manifest import METADATA, Manifest, hex_of
from zsplit_broker.disk import PARTIAL, begin_sync, create_file, rename_file, storage_errors, sync_folder, write_all

SUFFIX = ".safetensors"

MAX_OPEN = 8
"""Files kept open for reading: more than the versions that are pulled at any one time."""

_INTACT = "the previous version is intact"


class _Metadata(msgspec.Struct):
    manifest: str


class _Head(msgspec.Struct, rename={"metadata": METADATA}):
    metadata: _Metadata


class _Stored(NamedTuple):
    """An open file: its descriptor, where its data section starts, what it holds."""

    descriptor: int
    start: int
    manifest: Manifest


class Versions:
    """The versions in a folder. Safe to use from the relay's and from the writer's thread.

    Opening them makes the folder where need be and removes what a crash left unfinished there, so the run's
    folder must be locked (see `Journal.open`). Raises StorageError.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with storage_errors(folder, 0, _INTACT):
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)
            for unfinished in folder.glob("*" + PARTIAL):
                unfinished.unlink()
            self._digests = {path.name.removesuffix(SUFFIX) for path in folder.glob("*" + SUFFIX)}
        self._open: OrderedDict[str, _Stored] = OrderedDict()
        self._lock = Lock()
        self._numbers = count()

    def __contains__(self, digest: str) -> bool:
        return digest in self._digests

    def digests(self) -> list[str]:
        """Return the digests of all versions, sorted."""
        with self._lock:
            return sorted(self._digests)

    def path(self, digest: str) -> Path:
        """Return where the version with this digest is, or will be."""
        return self.folder / (digest + SUFFIX)

    def begin(self, manifest: Manifest) -> "Draft":
        """Return a draft of this state. Nothing touches the disk yet."""
        temporary = self.folder / f"{manifest.digest}.{next(self._numbers)}{PARTIAL}"
        return Draft(manifest, temporary, self._publish)

    def manifest(self, digest: str) -> Manifest:
        """Return the version's manifest. Raises StorageError where it is missing or its header is damaged."""
        with self._lock:
            return self._stored(digest).manifest

    def read(self, digest: str, offset: int, length: int) -> bytes:
        """Return bytes of the version's data section.

        Raises RemoteProtocolError for bytes that it does not have, StorageError where it is missing or damaged.
        """
        with self._lock:
            stored = self._stored(digest)
            _check_span(stored.manifest, offset, length)
            with storage_errors(self.folder, 0, _INTACT):
                data = os.pread(stored.descriptor, length, stored.start + offset)
        if len(data) != length:
            raise _damaged(self.path(digest), "it became shorter while it was in use")
        return data

    def verify(self, digest: str) -> None:
        """Read the whole version. Raises StorageError where it is missing or damaged."""
        with self._fresh(digest):
            pass

    def export(self, digest: str, path: Path) -> None:
        """Write the plain model, without optimizer and local buffers, as a safetensors file.

        It appears whole or not at all. Raises StorageError, also where the version is damaged.
        """
        with self._fresh(digest) as stored:
            _export(stored, path)

    def delete(self, digest: str) -> None:
        """Remove the version. One that is not there is no error. Raises StorageError."""
        self._forget(digest)
        with storage_errors(self.folder, 0, _INTACT):
            self.path(digest).unlink(missing_ok=True)

    def forget(self, digest: str) -> None:
        """Take a version for one that is not there; its file stays until it is deleted, or stored again."""
        self._forget(digest)

    def close(self) -> None:
        """Close the files that are open for reading; they open again when they are needed."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1].descriptor)

    def _publish(self, temporary: Path, descriptor: int, digest: str) -> None:
        """Make a checked draft a version. One that is there already is replaced by the same bytes."""
        with storage_errors(self.folder, 0, _INTACT):
            rename_file(descriptor, temporary, self.path(digest))
        self._forget(digest)
        with self._lock:
            self._digests.add(digest)

    def _forget(self, digest: str) -> None:
        with self._lock:
            self._digests.discard(digest)
            stored = self._open.pop(digest, None)
        if stored is not None:
            os.close(stored.descriptor)

    def _stored(self, digest: str) -> _Stored:
        """Return the open file, the one used least lately closed for it if need be. The lock is held."""
        if digest not in self._open:
            self._open[digest] = self._opened(digest)
            if len(self._open) > MAX_OPEN:
                os.close(self._open.popitem(last=False)[1].descriptor)
        self._open.move_to_end(digest)
        return self._open[digest]

    def _opened(self, digest: str) -> _Stored:
        """Open a version. Only digests that are known become paths: others are whatever a peer sent."""
        if digest not in self._digests:
            raise StorageError(f"there is no version {digest!r} in {self.folder}: name one that is there")
        path = self.path(digest)
        with storage_errors(self.folder, 0, _INTACT):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                return _read_head(descriptor, path, digest)
            except BaseException:
                os.close(descriptor)
                raise

    @contextmanager
    def _fresh(self, digest: str) -> Iterator[_Stored]:
        """Open a version anew and read it all, so that what follows cannot meet damage halfway."""
        stored = self._opened(digest)
        try:
            with storage_errors(self.folder, 0, _INTACT):
                wrong = _wrong_tensor(stored)
            if wrong is not None:
                raise _damaged(self.path(digest), f"tensor {wrong!r} does not have its digest")
            yield stored
        finally:
            os.close(stored.descriptor)


class Draft:
    """A version on its way to the disk: `write` until all is there, then `commit`; or `abort`.

    One thread at a time. The first write takes up the space of the whole file, so that a full disk shows at once. What
    comes in order is checked as it comes; otherwise `commit` reads it back. After a StorageError, `write` and `commit`
    raise it again: what could not be written then would be missing in the version.
    """

    def __init__(self, manifest: Manifest, temporary: Path, publish: Callable[[Path, int, str], None]) -> None:
        self.manifest = manifest
        self._head = _head(manifest, msgspec.json.encode(manifest).decode())
        self._temporary = temporary
        self._publish = publish
        self._descriptor = -1
        self._over = False
        self._failed: StorageError | None = None
        self._check = _Check(manifest)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes of the data section, in any order. The same bytes may come again.

        Raises RemoteProtocolError for bytes beyond the state, StorageError.
        """
        _check_span(self.manifest, offset, len(data))
        with self._errors():
            write_all(self._file(), data, len(self._head) + offset)
            begin_sync(self._file())
        self._check.take(offset, data)

    def commit(self) -> None:
        """Check every tensor and make the draft a version; when this returns it is durable.

        Raises RemoteProtocolError naming the first tensor that is not what its digest says, StorageError.
        Either way the draft is over then.
        """
        digest = self.manifest.digest
        try:
            with self._errors():
                stored = _Stored(self._file(), len(self._head), self.manifest)
                wrong = self._check.wrong if self._check.whole else _wrong_tensor(stored)
            if wrong is not None:
                raise RemoteProtocolError(
                    f"tensor {wrong!r} of state {digest} came with other bytes than its digest says: pull it again"
                )
            self._publish(self._temporary, self._descriptor, digest)
        finally:
            self.abort()

    def abort(self) -> None:
        """Remove what was written. After a commit, or a second time, this does nothing."""
        self._over = True
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            with suppress(OSError):  # a file that stays is removed when the versions are opened again
                self._temporary.unlink()

    def _file(self) -> int:
        """Return the file's descriptor; the first call makes it, with its head. Raises OSError."""
        if self._over:
            raise LocalProtocolError("a draft takes nothing after its commit or abort: begin another")
        if self._descriptor < 0:
            self._descriptor = create_file(self._temporary, len(self._head) + self.manifest.nbytes)
            write_all(self._descriptor, self._head, 0)
        return self._descriptor

    @contextmanager
    def _errors(self) -> Iterator[None]:
        if self._failed is not None:
            raise self._failed
        try:
            with storage_errors(self._temporary.parent, self.manifest.nbytes, _INTACT):
                yield
        except StorageError as error:
            self._failed = error
            raise


def _head(manifest: Manifest, text: str) -> bytes:
    """Return the head of a version's file. `text` is the manifest as JSON."""
    return manifest.safetensors_header(metadata={"format": "pt", "manifest": text})


def _read_head(descriptor: int, path: Path, digest: str) -> _Stored:
    """Read the head of a version. Raises StorageError unless it is the one written for this digest, OSError."""
    size = os.fstat(descriptor).st_size
    length = 8 + int.from_bytes(os.pread(descriptor, 8, 0), "little")
    head = os.pread(descriptor, min(length, size), 0)
    try:
        text = msgspec.json.decode(head[8:], type=_Head).metadata.manifest
        manifest = msgspec.json.decode(text, type=Manifest)
        manifest.check()
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, RemoteProtocolError) as error:
        raise _damaged(path, "its header is not that of a version") from error
    if manifest.digest != digest or head != _head(manifest, text):
        raise _damaged(path, "its header belongs to another state")
    if size != length + manifest.nbytes:
        raise _damaged(path, f"it has {size} bytes instead of {length + manifest.nbytes}")
    return _Stored(descriptor, length, manifest)


def _damaged(path: Path, why: str) -> StorageError:
    return StorageError(
        f"{path} is damaged ({why}): put it back from a copy, or delete it and resume from the version before it"
    )


def _check_span(manifest: Manifest, offset: int, length: int) -> None:
    if not 0 <= offset <= offset + length <= manifest.nbytes:
        raise RemoteProtocolError(
            f"bytes {offset} to {offset + length} are not in state {manifest.digest}, which has {manifest.nbytes}"
        )


class _Check:
    """Compares a state's tensors with their digests as the bytes of its data section come, first to last.

    `wrong` is the first tensor so far that is another than its digest says. Bytes out of order, or that come again,
    are not looked at, and `whole` is false from then on.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.wrong: str | None = None
        self._left = iter(manifest.entries)
        self._entry = next(self._left, None)
        self._found, self._missing = blake3(), self._entry.nbytes if self._entry else 0
        self._next, self._in_order = 0, True
        self._end_tensors()

    @property
    def whole(self) -> bool:
        """Whether all bytes came, each once, and every tensor was compared."""
        return self._in_order and self._entry is None

    @property
    def missing(self) -> str | None:
        """The first tensor that was not compared, for want of its bytes."""
        return self._entry.name if self._entry is not None else None

    def take(self, offset: int, data: bytes | memoryview) -> None:
        """Take in the bytes that stand at this offset, if they are the next ones."""
        self._in_order = self._in_order and offset == self._next
        if not self._in_order:
            return
        self._next += len(data)
        rest = memoryview(data)
        while rest:
            self._found.update(rest[: self._missing])
            taken = min(self._missing, len(rest))
            rest, self._missing = rest[taken:], self._missing - taken
            self._end_tensors()

    def _end_tensors(self) -> None:
        """Compare the tensor that has all its bytes, and the empty ones after it."""
        while self._entry is not None and not self._missing:
            if self.wrong is None and hex_of(self._found) != self._entry.digest:
                self.wrong = self._entry.name
            self._entry = next(self._left, None)
            self._found, self._missing = blake3(), self._entry.nbytes if self._entry else 0


def _wrong_tensor(stored: _Stored) -> str | None:
    """Return the name of the first tensor whose bytes do not have its digest. Raises OSError."""
    check = _Check(stored.manifest)
    for offset in range(0, stored.manifest.nbytes, CHUNK):
        length = min(CHUNK, stored.manifest.nbytes - offset)
        check.take(offset, os.pread(stored.descriptor, length, stored.start + offset))
        if check.wrong is not None:
            break
    return check.wrong or check.missing


def _export(stored: _Stored, path: Path) -> None:
    names = [entry.name for entry in stored.manifest.entries if not entry.is_optimizer]
    metadata = {"format": "pt", "version": stored.manifest.digest}
    head = stored.manifest.safetensors_header(names, metadata)
    position, chunks = len(head), list(stored.manifest.chunks(names))
    size = position + sum(length for _, length, _ in chunks)
    temporary = path.with_name(path.name + PARTIAL)
    with storage_errors(path.parent, size, "the version itself is intact"):
        descriptor = create_file(temporary, size)
        try:
            write_all(descriptor, head, 0)
            for offset, length, _ in chunks:
                write_all(descriptor, os.pread(stored.descriptor, length, stored.start + offset), position)
                position += length
            rename_file(descriptor, temporary, path)
        finally:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
