"""What it costs that nothing is lost: seconds in journal, storing and kept messages, beside those of the run.

A broker, a server and two clients train as always, each with a stopwatch around what is there for recovery only:

    journal    appending lines and waiting until the disk has them; the broker's loop waits for it
    storing    writing, checking and syncing versions: the broker's writer thread does it beside the next round
    kept       knowing repeats, and keeping what is not answered, at the server and at the clients

The clients take turns: there the next round begins beside the storing. In parallel training it waits for it, as for the
evaluation.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from common import child, json_option, machine, show, write
from rich.box import SIMPLE
from rich.table import Table
from runs import UNLIMITED, Task

from zsplit.config import load_config

CLIENTS = 2


class Stopwatch:
    """Seconds spent in methods, by a name for what they are for."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def hang_on(self, name: str, owner: type, *methods: str) -> None:
        """Measure these methods of a class from now on."""
        for method in methods:
            setattr(owner, method, self._timed(name, getattr(owner, method)))

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return timed


def broker(report: Connection, keys: dict[str, object], out: str, result: str) -> None:
    """Be the broker; report its address, and write the seconds when the run is over."""
    from zsplit_broker.journal import Journal
    from zsplit_broker.process import run_broker
    from zsplit_broker.versions import Draft

    watch = Stopwatch()
    watch.hang_on("journal", Journal, "append")
    watch.hang_on("storing", Draft, "write", "commit")
    run_broker(load_config(None, keys), out, lambda sockets, _: report.send(f"127.0.0.1:{sockets.port}"), False)
    Path(result).write_text(json.dumps(watch.seconds))


def peer(report: Connection, role: str, index: int, address: str, result: str) -> None:
    """Be a server or a client; write the seconds when the run is over."""
    from zsplit.train.link.repeats import Answers, Questions
    from zsplit.train.peer import run_client, run_server

    watch = Stopwatch()
    watch.hang_on(f"kept ({role})", Answers if role == "server" else Questions, "keep", "leaves", "comes", "answer")
    report.send("")
    if role == "server":
        run_server(address)
    else:
        run_client(address, index)
    Path(result).write_text(json.dumps(watch.seconds))


def measure(task: Task, rounds: int) -> tuple[dict[str, float], float, int]:
    """Return seconds by what they were spent on, the seconds of the rounds, and the bytes of a version."""
    keys = task.settings | {"run.rounds": rounds, "broker.port": 0, "server.threads": 1, "client.threads": 1}
    keys |= {"schedule.policy": "round_robin"}
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
        seconds: dict[str, float] = {}
        for file in files:
            for what, spent in json.loads(file.read_text()).items():
                seconds[what] = max(seconds.get(what, 0.0), spent)
        lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
        version = next((folder / "out" / "versions").iterdir())
        return seconds, sum(line["seconds"] for line in lines), version.stat().st_size


@click.command()
@click.option("--model", default="resnet18", show_default=True)
@click.option("--steps", default=12, show_default=True, help="Steps of a client in a round.")
@click.option("--batch", default=32, show_default=True)
@click.option("--rounds", default=4, show_default=True)
@json_option
def main(model: str, steps: int, batch: int, rounds: int, file: Path | None) -> None:
    """Train, and say what share of the time went into being able to go on after a crash."""
    task = Task(model, (3, 32, 32), batch, UNLIMITED, CLIENTS, steps)
    seconds, wall, nbytes = measure(task, rounds)
    title = f"Shares of a round of {wall / rounds:.1f} s"
    table = Table("what", "ms a round", "share of the round", box=SIMPLE, title=title)
    shares = {what: spent / wall for what, spent in seconds.items()}
    for what, spent in seconds.items():
        table.add_row(what, f"{1000 * spent / rounds:.1f}", f"{100 * shares[what]:.3f} %")
    waited_for = sum(share for what, share in shares.items() if what != "storing")
    for what, share in (("waited for", waited_for), ("in all", sum(shares.values()))):
        table.add_row(what, f"{1000 * share * wall / rounds:.1f}", f"{100 * share:.3f} %")
    show(table)
    click.echo(f"A version has {nbytes / 1e6:.1f} MB; storing goes on beside the next round.")
    write(
        file,
        {
            "machine": machine(),
            "model": model,
            "rounds": rounds,
            "round_seconds": wall / rounds,
            "version_bytes": nbytes,
            "seconds": seconds,
            "shares": shares,
            "waited_for": waited_for,
        },
    )


if __name__ == "__main__":
    main()
