"""What the broker promised is on the disk before it says so: the order of its system calls, which no kill can show."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import QUICK, ZSPLIT, Processes, free_port, settings

CALLS = "fsync,rename,renameat,renameat2,pwrite64"


class Call(NamedTuple):
    """A system call: when it began and ended, as lines of the trace, and what it was."""

    begin: int
    end: int
    name: str
    text: str


def calls_of(trace: Path) -> Iterator[Call]:
    """Yield the calls in a trace of several threads, in the order in which they ended."""
    under_way: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(trace.read_text(errors="replace").splitlines()):
        thread, _, rest = line.partition(" ")
        rest = rest.strip()
        if rest.endswith("<unfinished ...>"):
            under_way[thread] = number, rest
        elif rest.startswith("<... "):
            begin, first = under_way.pop(thread)
            yield Call(begin, number, first.partition("(")[0], first + rest)
        elif "(" in rest:
            yield Call(number, number, rest.partition("(")[0], rest)


def first(calls: list[Call], after: int, name: str, *texts: str) -> Call:
    """Return the first call of this name, with these texts in it, that began after a line of the trace."""
    for call in calls:
        if call.begin >= after and call.name.startswith(name) and all(text in call.text for text in texts):
            return call
    raise AssertionError(f"no {name} of {texts} after line {after}")


class Traced(NamedTuple):
    """A run that is over, and what its broker asked of the system."""

    out: Path
    calls: list[Call]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """A whole run whose broker is traced."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    folder, port = tmp_path_factory.mktemp("traced"), free_port()
    trace, address = folder / "trace", f"127.0.0.1:{port}"
    program = ["strace", "-f", "-y", "-s", "200", "-e", f"trace={CALLS}", "-o", trace, ZSPLIT]
    with Processes(folder) as processes:
        options = [*settings(*QUICK, f"broker.port={port}"), "--out", "out"]
        processes.start("broker", *options, program=program).line("listens")
        for words in ("server", "client", "client"):
            processes.start(words, "--broker", address)
        for command in processes.started:
            assert command.wait() == 0, command.err
    return Traced(folder / "out", list(calls_of(trace)))


def test_a_version_is_on_the_disk_under_its_name_before_the_journal_names_it(traced: Traced) -> None:
    calls = traced.calls
    stored = re.findall(r'"event":"stored","digest":"(\w+)"', (traced.out / "journal.log").read_text())
    assert len(stored) == 3, "version 0 and one for each of two rounds"
    for digest in stored:
        contents = first(calls, 0, "fsync", f"{digest}.", ".partial")
        name = first(calls, contents.end, "rename", f"{digest}.", f"{digest}.safetensors")
        folder = first(calls, name.end, "fsync", "/out/versions>")
        line = first(calls, 0, "pwrite64", "journal.log", "stored", digest)
        assert folder.end < line.begin


def test_every_line_of_the_journal_is_synced_before_the_next_is_written(traced: Traced) -> None:
    of_journal = [c.name for c in traced.calls if "journal.log>" in c.text and c.name in ("pwrite64", "fsync")]
    writes = [i for i, name in enumerate(of_journal) if name == "pwrite64"]
    assert len(writes) > 10
    assert all(of_journal[i + 1] == "fsync" for i in writes)
