"""What it costs that nothing is lost: seconds in journal, storing and kept messages, beside those of the run.

A broker, a server and two clients train as always, each with a stopwatch around what is there for recovery only:

    journal    appending lines and waiting until the disk has them; the broker's loop waits for it
    moving     taking a version in at the broker's loop and giving it out at the server's, without the sockets' own work
    storing    writing, checking and syncing a version, and deleting one before it, on the broker's writer thread
    kept       knowing repeats, and keeping what is not answered, at the server and at the clients

Moving and storing are those of the versions that were stored beside a round: neither the first, before which there is
none, nor the last, after which there is none.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import click
from common import child, json_option, machine, show, write
from rich.box import SIMPLE
from rich.table import Table
from runs import UNLIMITED, Task

from zsplit.config import load_config

CLIENTS = 2

STORING, MOVING, KEPT = "storing", "moving", "kept"

ALL = ""
"""Stands for all rounds where seconds are not those of one version."""

LONG_ROUND = 10.0
"""Seconds of the round with one commit in which all of this is to take less than 1 %."""


class Stopwatch:
    """Seconds spent in methods, by a name for what they are for and by whom they were spent on."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))

    def hang_on(self, name: str, owner: type, *methods: str, on: Callable[..., str | None] = lambda *_: ALL) -> None:
        """Measure these methods of a class from now on. `on` says of a call what it is for; None: it does not count."""
        for method in methods:
            setattr(owner, method, self._timed(name, getattr(owner, method), on))

    def _timed(self, name: str, method: Callable[..., Any], on: Callable[..., str | None]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                what = on(*arguments)
                if what is not None:
                    self.seconds[name][what] += time.perf_counter() - began

        return timed


def broker(report: Connection, keys: dict[str, object], out: str, result: str) -> None:
    """Be the broker; report its address, and write the seconds when the run is over."""
    from zsplit_broker.depot import Depot
    from zsplit_broker.journal import Journal
    from zsplit_broker.process import run_broker
    from zsplit_broker.versions import Draft, Versions

    watch = Stopwatch()
    watch.hang_on("journal", Journal, "append")
    watch.hang_on(STORING, Draft, "write", "commit", on=lambda draft, *_: draft.manifest.digest)
    watch.hang_on(STORING, Versions, "delete", on=lambda _, digest: digest)
    watch.hang_on(f"{MOVING} (broker)", Depot, "take", on=lambda _, chunk, __: chunk.digest)
    run_broker(load_config(None, keys), out, lambda sockets, _: report.send(f"127.0.0.1:{sockets.port}"), False)
    Path(result).write_text(json.dumps(watch.seconds))


def peer(report: Connection, role: str, index: int, address: str, result: str) -> None:
    """Be a server or a client; write the seconds when the run is over."""
    from zsplit.train.link.repeats import Answers, Questions
    from zsplit.train.link.session import Session
    from zsplit.train.peer import run_client, run_server

    watch = Stopwatch()
    watch.hang_on(f"{KEPT} ({role})", Answers if role == "server" else Questions, "keep", "leaves", "comes", "answer")
    if role == "server":
        to_broker = f"{MOVING} (server)"
        watch.hang_on(to_broker, Session, "_serve", on=lambda _, pull: pull.digest if pull.origin == "broker" else None)
    report.send("")
    if role == "server":
        run_server(address)
    else:
        run_client(address, index)
    Path(result).write_text(json.dumps(watch.seconds))


class Cost(NamedTuple):
    """Seconds by what they were spent on, for a round or a version; those of a round; the bytes of a version."""

    seconds: dict[str, float]
    round_seconds: float
    version_bytes: int

    def share(self, what: str, length: float) -> float:
        """Return the share in a round of so many seconds: what is kept grows with the steps."""
        steps = length / self.round_seconds if what.startswith(KEPT) else 1.0
        return self.seconds[what] * steps / length


def measure(task: Task, policy: str, rounds: int) -> Cost:
    """Train, and return what it cost."""
    keys = task.settings | {"run.rounds": rounds, "broker.port": 0, "server.threads": 1, "client.threads": 1}
    keys |= {"schedule.policy": policy}
    peers = [("server", 0), *(("client", index) for index in range(task.clients))]
    with TemporaryDirectory() as name:
        folder = Path(name)
        files = [folder / f"{role}-{index}.json" for role, index in peers] + [folder / "broker.json"]
        with child(broker, keys, str(folder / "out"), str(files[-1])) as (_, address):
            started = [
                child(peer, role, index, address, str(file))
                for (role, index), file in zip(peers, files[:-1], strict=True)
            ]
            for each in started:
                each.__enter__()
            while not all(file.exists() and file.stat().st_size for file in files):
                time.sleep(0.1)
            for each in started:
                each.__exit__(None, None, None)
        seconds: defaultdict[str, float] = defaultdict(float)
        for file in files:
            for what, spent in json.loads(file.read_text()).items():
                seconds[what] += spent[ALL] / rounds if ALL in spent else mean(list(spent.values())[1:-1])
        lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
        version = next((folder / "out" / "versions").iterdir())
        return Cost(dict(seconds), sum(line["seconds"] for line in lines) / rounds, version.stat().st_size)


@click.command()
@click.option("--model", default="resnet18", show_default=True)
@click.option("--policy", type=click.Choice(["round_robin", "parallel"]), default="round_robin", show_default=True)
@click.option("--steps", default=30, show_default=True, help="Steps of a client in a round.")
@click.option("--batch", default=32, show_default=True)
@click.option("--rounds", default=6, type=click.IntRange(min=3), show_default=True)
@json_option
def main(model: str, policy: str, steps: int, batch: int, rounds: int, file: Path | None) -> None:
    """Train, and say what share of the time went into being able to go on after a crash."""
    cost = measure(Task(model, (3, 32, 32), batch, UNLIMITED, CLIENTS, steps), policy, rounds)
    lengths = (cost.round_seconds, LONG_ROUND)
    sums = {"waited for": [what for what in cost.seconds if what != STORING], "in all": list(cost.seconds)}
    table = Table("what", "ms", *(f"of {length:.1f} s" for length in lengths), box=SIMPLE, title="Costs of a round")
    shares: dict[str, list[float]] = {}
    for name, parts in ({what: [what] for what in cost.seconds} | sums).items():
        shares[name] = [sum(cost.share(what, length) for what in parts) for length in lengths]
        spent = sum(cost.seconds[what] for what in parts)
        table.add_row(name, f"{1000 * spent:.1f}", *(f"{100 * share:.3f} %" for share in shares[name]))
    show(table)
    click.echo(f"A version has {cost.version_bytes / 1e6:.1f} MB; storing goes on beside the next round.")
    figures = {"machine": machine(), "model": model, "policy": policy, "rounds": rounds}
    write(file, figures | cost._asdict() | {"lengths": lengths, "shares": shares})


if __name__ == "__main__":
    main()
