"""What the benchmarks share: child processes that end with their parent, the product's broker, the machine's name."""

import itertools
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

import click
from rich.console import Console
from rich.table import Table

WIDTH = 110
"""Characters in a line of a table."""

processes = multiprocessing.get_context("spawn")

json_option = click.option("--json", "file", type=click.Path(path_type=Path), help="Write all figures to this file.")


@contextmanager
def child(target: Callable[..., None], *arguments: object) -> Iterator[tuple[int, Any]]:
    """Run `target(report, *arguments)` in a process of its own; yield the process id and what it first reports."""
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=_with_parent, args=(target, theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        assert process.pid is not None
        yield process.pid, ours.recv()
    finally:
        process.kill()
        process.join()


def _with_parent(target: Callable[..., None], report: Connection, *arguments: object) -> None:
    """Run the function; whatever it waits for, this process ends with its parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    target(report, *arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextmanager
def running_broker(
    settings: Iterable[str], errors: IO[bytes] | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[tuple["subprocess.Popen[str]", dict[str, str]]]:
    """Start the product's broker; yield it and its line once it listens. It is killed at the end.

    `settings` are keys of the config as `KEY=VALUE`, `errors` takes its stderr.
    """
    options = itertools.chain.from_iterable(("--set", setting) for setting in ("broker.port=0", *settings))
    command = [sys.executable, "-m", "zsplit_broker", "--json", "--attached", *options]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--out", str(Path(folder, "run"))]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
        ) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise click.ClickException("the broker did not start: its own words are above")
            try:
                yield process, json.loads(line)
            finally:
                process.kill()


def machine(*packages: str) -> dict[str, Any]:
    """Return what the figures depend on, the versions of these packages included."""
    return {
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def with_goal(figure: str, goal: str) -> str:
    """Return a table's cell: the figure, and in brackets what it is to reach."""
    return f"{figure} ({goal})"


def show(table: Table) -> None:
    """Print the table, just as wide on a terminal as into a file."""
    Console(width=WIDTH).print(table)


def write(file: Path | None, figures: Mapping[str, Any]) -> None:
    """Write the figures as JSON where a file was asked for."""
    if file is not None:
        file.write_text(json.dumps(figures, indent=1) + "\n")
