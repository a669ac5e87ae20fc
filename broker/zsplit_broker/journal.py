"""The write-ahead log of a run: what was promised survives the broker.

One file, `journal.log`, in the run's folder. Each line is `<length> <crc32 as 8 hex> <payload>`; the
payload is JSON without a line break and opaque here, the first one is the header. A line counts
once `append` has returned: then it is on the disk. Whatever a crash leaves behind the last whole line was
promised to nobody, and is cut when the journal is opened. The file `lock` beside it says whose folder this is.
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any
from zlib import crc32

from zsplit.errors import LocalProtocolError, StorageError
from zsplit_broker.disk import PARTIAL, create_file, rename_file, storage_errors, write_all

FORMAT = 1
"""Version of the file's format, in the header."""

JOURNAL = "journal.log"
LOCK = "lock"


class Journal:
    """An open journal. Make one with `open`; `header` and `entries` are what it held then."""

    def __init__(
        self, folder: Path, file: int, lock: int, length: int, header: dict[str, Any], entries: list[bytes]
    ) -> None:
        self.header = header
        self.entries = entries
        self._folder = folder
        self._file = file
        self._lock = lock
        self._length = length

    @classmethod
    def open(cls, folder: Path, header: Mapping[str, object] | None = None) -> "Journal":
        """Lock the folder, open its journal or start one with this header, and cut a torn tail.

        The header of a journal that exists stays as it is; a new one should name the `zsplit` version that
        writes it. Raises StorageError: folder in use by another process, damaged journal, journal of a
        newer format, disk full.
        """
        with storage_errors(folder, 0, "nothing was changed"), ExitStack() as undo:
            lock = _lock(folder)
            undo.callback(os.close, lock)
            path = folder / JOURNAL
            if not path.exists():
                _create(path, {"format": FORMAT, **(header or {})})
            file = os.open(path, os.O_RDWR)
            undo.callback(os.close, file)
            data = path.read_bytes()
            lines = _whole_lines(path, data)
            found = _header(path, lines[0])
            length = sum(len(_line(payload)) for payload in lines)
            if length < len(data):
                _cut(file, length)
            undo.pop_all()
            return cls(folder, file, lock, length, found, lines[1:])

    def append(self, payloads: Sequence[bytes]) -> None:
        """Make the payloads durable, in this order, with one fsync.

        Raises StorageError (disk full, …): then none of them counts, and they are cut away again.
        """
        if any(b"\n" in payload for payload in payloads):
            raise LocalProtocolError("a line of the journal cannot hold a line break: encode it as compact JSON")
        data = b"".join(map(_line, payloads))
        with storage_errors(self._folder, len(data), "all that the journal held before is intact"):
            try:
                write_all(self._file, data, self._length)
                os.fsync(self._file)
            except OSError:
                self._roll_back()
                raise
        self._length += len(data)

    def _roll_back(self) -> None:
        """Cut what a failed append left. Where even that fails, close the file: nothing may follow it."""
        try:
            _cut(self._file, self._length)
        except OSError:
            os.close(self._file)
            self._file = -1

    def close(self) -> None:
        """Let go of the folder. A second call does nothing."""
        for descriptor in (self._file, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._lock = -1

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _line(payload: bytes) -> bytes:
    return b"%d %08x %b\n" % (len(payload), crc32(payload), payload)


def _payload(line: bytes) -> bytes | None:
    """Return the payload of a line (without its line break), or None where the line is not whole."""
    payload = line.split(b" ", 2)[-1]
    return payload if _line(payload) == line + b"\n" else None


def _whole_lines(path: Path, data: bytes) -> list[bytes]:
    """Return the payloads up to the torn tail. Raises StorageError for a bad line that is not the tail."""
    payloads = [_payload(line) for line in data.split(b"\n")[:-1]]
    whole = payloads.index(None) if None in payloads else len(payloads)
    if whole == 0:
        raise StorageError(f"{path} is not a journal, or its line 1 is damaged: start in another folder")
    if any(payload is not None for payload in payloads[whole:]):
        raise StorageError(
            f"line {whole + 1} of {path} is damaged, and not the last: put the file back from a copy, or keep"
            f" only the lines before it (`head -n {whole}`) and resume from there"
        )
    return [payload for payload in payloads[:whole] if payload is not None]


def _header(path: Path, payload: bytes) -> dict[str, Any]:
    """Return the header. Raises StorageError unless this version can read it."""
    try:
        header: dict[str, Any] = json.loads(payload)
        newer = header["format"] > FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} is not a journal of zsplit: start in another folder") from error
    if newer:
        raise StorageError(
            f"{path} is a journal of a newer format ({header['format']}; this zsplit reads {FORMAT}): "
            f"use zsplit >= {header.get('zsplit', 'the one that wrote it')}"
        )
    return header


def _lock(folder: Path) -> int:
    """Lock the folder until the returned descriptor is closed, and leave our name in the lock file.

    The file stays when the lock goes: to remove it would race with the next process that locks.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        name = f"{os.getpid()} {socket.gethostname()}\n".encode()
        with contextlib.suppress(OSError):  # a full disk has the lock nameless, and takes the run up all the same
            write_all(descriptor, name, 0)
            os.ftruncate(descriptor, len(name))
    except BlockingIOError as error:
        pid, _, host = os.pread(descriptor, 4096, 0).decode(errors="replace").strip().partition(" ")
        os.close(descriptor)
        raise StorageError(
            f"{folder} is in use by process {pid or 'unknown'} on {host or 'another host'}: stop it first, or"
            " choose another folder"
        ) from error
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _create(path: Path, header: Mapping[str, object]) -> None:
    """Start a journal. It appears with its header or not at all, so no file of another kind is ever cut."""
    line = _line(json.dumps(header, separators=(",", ":")).encode())
    temporary = path.with_name(path.name + PARTIAL)
    descriptor = create_file(temporary, len(line))
    try:
        write_all(descriptor, line, 0)
        rename_file(descriptor, temporary, path)
    finally:
        os.close(descriptor)


def _cut(file: int, length: int) -> None:
    os.ftruncate(file, length)
    os.fsync(file)
