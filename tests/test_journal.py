"""The write-ahead log: what `append` promised is there whatever happens, and nothing else is."""

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsplit.errors import LocalProtocolError, StorageError
from zsplit_broker.journal import FORMAT, Journal

HEADER = {"zsplit": "0.1.0", "run": "demo"}
HEADER_LINE = b'42 15a9591b {"format":1,"zsplit":"0.1.0","run":"demo"}\n'

payloads = st.binary(max_size=12).filter(lambda payload: b"\n" not in payload)


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """No file of this process can grow beyond this while it lasts: a disk error that any user can make."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    """A disk of this size at the folder. Skips the test where it cannot be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    try:
        refused = subprocess.run(mount, capture_output=True, text=True).stderr.strip()
    except FileNotFoundError as error:
        refused = str(error)
    if refused:
        pytest.skip(f"cannot mount a small disk here: {refused}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def process(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that is killed with -9 at the end; waits until it has printed a line."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == "ready\n"
            yield running
        finally:
            running.send_signal(signal.SIGKILL)


def line(payload: bytes) -> bytes:
    return b"%d %08x %b\n" % (len(payload), crc32(payload), payload)


def journal_of(folder: Path, entries: list[bytes]) -> Path:
    """Write a journal with these entries; return its file."""
    with Journal.open(folder, HEADER) as journal:
        journal.append(entries)
    return folder / "journal.log"


def entries_in(folder: Path) -> list[bytes]:
    with Journal.open(folder) as journal:
        return journal.entries


def test_what_was_appended_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    with Journal.open(tmp_path, HEADER) as journal:
        assert journal.entries == []
        journal.append([b'{"a":1}', b""])
        journal.append([b"caf\xc3\xa9 with spaces"])
    assert entries_in(tmp_path) == [b'{"a":1}', b"", b"caf\xc3\xa9 with spaces"]


def test_the_file_is_the_format_that_is_written_down(tmp_path: Path) -> None:
    path = journal_of(tmp_path, [b'{"a":1}'])
    assert path.read_bytes() == HEADER_LINE + b'7 561bacaf {"a":1}\n'


def test_the_header_is_that_of_the_one_who_started_it(tmp_path: Path) -> None:
    journal_of(tmp_path, [])
    with Journal.open(tmp_path, {"run": "another"}) as journal:
        assert journal.header == {"format": FORMAT, **HEADER}


def test_what_was_appended_survives_a_kill(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from zsplit_broker.journal import Journal
Journal.open(Path(sys.argv[1])).append([b"first", b"second"])
print("ready", flush=True)
time.sleep(60)
"""
    with process(script, tmp_path):
        pass
    assert entries_in(tmp_path) == [b"first", b"second"]


@settings(max_examples=20, deadline=None)
@given(st.lists(payloads, max_size=3))
def test_a_tail_torn_at_any_byte_leaves_exactly_the_whole_lines(entries: list[bytes]) -> None:
    with TemporaryDirectory() as folder:
        path = journal_of(Path(folder), entries)
        written = path.read_bytes()
        for position in range(len(HEADER_LINE), len(written) + 1):
            path.write_bytes(written[:position])
            whole = written[len(HEADER_LINE) : position].count(b"\n")
            assert entries_in(Path(folder)) == entries[:whole]
            assert path.read_bytes() == HEADER_LINE + b"".join(map(line, entries[:whole]))


@pytest.mark.parametrize("tail", [b"\0" * 100, b"7 561bacaf {\0\0\0\0}\n", b"no line\nand another\n"])
def test_a_tail_of_other_bytes_is_cut_too(tmp_path: Path, tail: bytes) -> None:
    path = journal_of(tmp_path, [b"first"])
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    with Journal.open(tmp_path) as journal:
        journal.append([b"second"])
    assert path.read_bytes() == whole + line(b"second")


@settings(max_examples=50, deadline=None)
@given(st.lists(payloads, min_size=2, max_size=4), st.data())
def test_damage_before_the_last_line_is_refused_and_left_alone(entries: list[bytes], data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        path = journal_of(Path(folder), entries)
        lines = [HEADER_LINE, *map(line, entries)]
        number = data.draw(st.integers(1, len(entries) - 1))
        damaged = bytearray(lines[number])
        damaged[data.draw(st.integers(0, len(damaged) - 2))] ^= data.draw(st.integers(1, 255))
        lines[number] = bytes(damaged)
        path.write_bytes(b"".join(lines))
        with pytest.raises(StorageError) as refusal:
            Journal.open(Path(folder))
        assert str(refusal.value) == (
            f"line {number + 1} of {path} is damaged, and not the last: put the file back from a copy, or keep only "
            f"the lines before it (`head -n {number}`) and resume from there"
        )
        assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize("contents", [b"", b"a diary\n", HEADER_LINE[:-1], b"x" + HEADER_LINE])
def test_a_file_without_a_whole_header_is_refused_and_left_alone(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "journal.log"
    path.write_bytes(contents)
    with pytest.raises(StorageError, match=r"is not a journal, or its line 1 is damaged: start in another folder$"):
        Journal.open(tmp_path)
    assert path.read_bytes() == contents


@pytest.mark.parametrize("header", [b"[]", b"{}", b"\xff", b'{"format":"one"}'])
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "journal.log").write_bytes(line(header))
    with pytest.raises(StorageError, match=r"is not a journal of zsplit: start in another folder$"):
        Journal.open(tmp_path)


def test_a_newer_format_is_refused_with_the_version_to_use(tmp_path: Path) -> None:
    (tmp_path / "journal.log").write_bytes(line(b'{"format":2,"zsplit":"3.1.0"}'))
    with pytest.raises(StorageError) as refusal:
        Journal.open(tmp_path)
    assert str(refusal.value) == (
        f"{tmp_path / 'journal.log'} is a journal of a newer format (2; this zsplit reads 1): use zsplit >= 3.1.0"
    )


def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from zsplit_broker.journal import Journal
journal = Journal.open(Path(sys.argv[1]))
print("ready", flush=True)
time.sleep(60)
"""
    with process(script, tmp_path) as first:
        with pytest.raises(StorageError) as refusal:
            Journal.open(tmp_path)
        assert str(refusal.value) == (
            f"{tmp_path} is in use by process {first.pid} on {socket.gethostname()}: stop it first, or choose another "
            "folder"
        )
    assert entries_in(tmp_path) == []  # the lock died with the process


def test_a_refused_journal_does_not_keep_the_folder_locked(tmp_path: Path) -> None:
    path = journal_of(tmp_path, [b"first"])
    whole = path.read_bytes()
    path.write_bytes(b"a diary\n")
    with pytest.raises(StorageError):
        Journal.open(tmp_path)
    path.write_bytes(whole)
    assert entries_in(tmp_path) == [b"first"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"/nowhere cannot be used \(No such file or directory\): mend that"):
        Journal.open(tmp_path / "nowhere")


def test_a_payload_with_a_line_break_is_refused(tmp_path: Path) -> None:
    sentence = "a line of the journal cannot hold a line break: encode it as compact JSON"
    with Journal.open(tmp_path) as journal, pytest.raises(LocalProtocolError, match=sentence):
        journal.append([b"fine", b"two\nlines"])
    assert entries_in(tmp_path) == []


def test_a_failed_append_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    path = journal_of(tmp_path, [b"first"])
    whole = path.read_bytes()
    with Journal.open(tmp_path) as journal:
        with file_size_limit(len(whole) + 20), pytest.raises(StorageError) as refusal:
            journal.append([b"second", b"x" * 100])
        assert path.read_bytes() == whole
        journal.append([b"third"])
    assert str(refusal.value) == (
        f"{tmp_path} cannot be used (File too large): mend that and resume; all that the journal held before is intact"
    )
    assert entries_in(tmp_path) == [b"first", b"third"]


def test_a_full_disk_is_named_with_what_to_free(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 256 * 1024) as disk:
        with Journal.open(disk) as journal:
            journal.append([b"first"])
            with pytest.raises(StorageError) as refusal:
                journal.append([b"x" * 1_500_000])
            journal.append([b"second"])
        assert entries_in(disk) == [b"first", b"second"]
    assert str(refusal.value) == (f"the disk of {disk} is full: free 2 MB; all that the journal held before is intact")


def test_nothing_follows_a_torn_line_that_cannot_be_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: int, length: int) -> None:
        raise OSError(5, "Input/output error")

    path = journal_of(tmp_path, [b"first"])
    with Journal.open(tmp_path) as journal:
        with monkeypatch.context() as disk, file_size_limit(path.stat().st_size + 20):
            disk.setattr(os, "ftruncate", broken)
            with pytest.raises(StorageError, match="File too large"):
                journal.append([b"x" * 100])
        with pytest.raises(StorageError, match="Bad file descriptor"):
            journal.append([b"second"])
    assert entries_in(tmp_path) == [b"first"]


def test_closing_twice_is_no_error(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    journal.close()
    journal.close()
