"""How long it takes until something is there: `import zsplit`, and a broker that listens.

Every figure is that of a fresh process. The things measured take turns, in another order in each round, with
`python -c pass` among them: what the interpreter itself takes on this machine, now. A broker is there when it has
said where it listens; its memory is what is resident then (VmRSS of proc(5)).

What a process loads is what its own interpreter lists (`-X importtime`) over a whole run on the digits with a broker,
a server and a client.
"""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import IO, Any

import click
from common import json_option, machine, running_broker, show, with_goal, write
from rich.box import SIMPLE
from rich.table import Table

SCRIPTS = {"python": "pass", "import": "import zsplit"}
"""What is measured with `python -c`."""

BROKER = "broker"

SECONDS_GOALS = {"import": 0.05, BROKER: 0.5}
"""Seconds from the start of the process that are to be enough."""

MEMORY_GOAL = 60_000_000
"""Bytes of memory that are to be enough for a broker that listens."""

FORBIDDEN = {"broker": ("torch", "torchvision", "numpy"), "server": ("torchvision",), "client": ("torchvision",)}
"""Packages that are not to be loaded, by process."""

SHORT_RUN = ("run.rounds=1", "schedule.clients=1", "server.threads=1", "client.threads=1")
"""What is set for the run on the digits."""

PEER = "from zsplit.cli import main; main()"
"""The script of the console command `zsplit`."""

RUN_SECONDS = 120.0
"""How long the run on the digits may take before the benchmark gives up."""


def run_script(script: str) -> float:
    """Return the seconds that a fresh interpreter takes to run a script."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", script], check=True)
    return time.perf_counter() - began


def start_broker() -> tuple[float, int]:
    """Return the seconds until a broker listens, and the bytes of memory that it then has."""
    began = time.perf_counter()
    with running_broker(()) as (process, _):
        return time.perf_counter() - began, resident(process.pid)


def resident(process: int) -> int:
    """Return the memory of a process in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def measure(rounds: int) -> list[dict[str, float]]:
    """Start everything once in each round; return the seconds, and the broker's memory in bytes."""
    taken = []
    for order in itertools.islice(itertools.cycle(itertools.permutations([*SCRIPTS, BROKER])), rounds):
        figures: dict[str, float] = {}
        for name in order:
            if name == BROKER:
                figures[name], figures["memory"] = start_broker()
            else:
                figures[name] = run_script(SCRIPTS[name])
        taken.append(figures)
    return taken


def loaded() -> dict[str, list[str]]:
    """Run the digits once; return the names of the packages that each process has loaded."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    with TemporaryDirectory() as folder, ExitStack() as stack:
        logs = {role: stack.enter_context(Path(folder, role).open("w+b")) for role in FORBIDDEN}
        broker, told = stack.enter_context(running_broker(SHORT_RUN, logs["broker"], environment))
        running = {"broker": broker}
        for role in ("server", "client"):
            command = [sys.executable, "-c", PEER, role, "--broker", told["address"]]
            running[role] = subprocess.Popen(command, stderr=logs[role], env=environment, text=True)
            stack.callback(running[role].kill)
        for role in reversed(running):  # whose failure would let the others wait is asked first
            _expect_success(role, running[role], logs[role])
        return {role: packages_in(_read(log)) for role, log in logs.items()}


def _expect_success(role: str, process: "subprocess.Popen[str]", log: IO[bytes]) -> None:
    try:
        code = process.wait(RUN_SECONDS)
    except subprocess.TimeoutExpired:
        raise click.ClickException(f"the {role} was still busy with the digits after {RUN_SECONDS:g} s") from None
    if code:
        raise click.ClickException(f"the {role} failed on the digits: {_read(log).strip().rpartition(chr(10))[2]}")


def _read(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode()


def packages_in(log: str) -> list[str]:
    """Return the packages that a listing of `-X importtime` names."""
    names = (line.rpartition("|")[2].strip() for line in log.splitlines() if line.startswith("import time:"))
    return sorted({name.partition(".")[0] for name in names} - {"imported package"})


def figures_of(taken: Sequence[dict[str, float]], packages: dict[str, list[str]]) -> dict[str, Any]:
    """Return the medians, and which of the forbidden packages were loaded all the same."""
    seconds = {name: median(each[name] for each in taken) for name in (*SCRIPTS, BROKER)}
    return {
        "seconds": seconds,
        "over_python": {name: median(each[name] - each["python"] for each in taken) for name in SECONDS_GOALS},
        "memory": median(each["memory"] for each in taken),
        "trespasses": {role: [name for name in names if name in packages[role]] for role, names in FORBIDDEN.items()},
        "goals": {"seconds": SECONDS_GOALS, "memory": MEMORY_GOAL, "trespasses": {role: [] for role in FORBIDDEN}},
        "loaded": packages,
        "taken": taken,
    }


def table_of(figures: dict[str, Any]) -> Table:
    """Return the figures as a table."""
    seconds, over = figures["seconds"], figures["over_python"]
    table = Table(title=f"Starting up: medians of {len(figures['taken'])}", box=SIMPLE)
    for column in ("what", "figure (to reach)", "beyond `python -c pass`"):
        table.add_column(column, justify="left" if column == "what" else "right")
    table.add_row("python -c pass", f"{seconds['python'] * 1e3:.0f} ms")
    for name, label in {"import": "python -c 'import zsplit'", BROKER: "broker, until it listens"}.items():
        figure = with_goal(f"{seconds[name] * 1e3:.0f} ms", f"{SECONDS_GOALS[name] * 1e3:.0f}")
        table.add_row(label, figure, f"{over[name] * 1e3:.0f} ms")
    table.add_row("broker, memory", with_goal(f"{figures['memory'] / 1e6:.0f} MB", f"{MEMORY_GOAL / 1e6:.0f}"))
    for role, names in FORBIDDEN.items():
        found = figures["trespasses"][role]
        table.add_row(f"{role} on the digits: {', '.join(names)}", f"{', '.join(found) or 'not'} loaded (not)")
    return table


@click.command(context_settings={"show_default": True})
@click.option("--rounds", default=11, type=click.IntRange(min=1), help="How often everything is started.")
@json_option
def main(rounds: int, file: Path | None) -> None:
    """Measure the import of zsplit and the start of a broker, and look at what processes load."""
    figures = figures_of(measure(rounds), loaded())
    show(table_of(figures))
    write(file, {"machine": machine("msgspec", "pyzmq", "torch"), **figures})


if __name__ == "__main__":
    main()
