"""The broker as a process: a folder, a journal, sockets, signals."""

import os
import secrets
import signal
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from threading import Thread

from zsplit.config import Config
from zsplit.memory import keep_freed
from zsplit_broker.events import Finish
from zsplit_broker.journal import Journal
from zsplit_broker.loop import Broker
from zsplit_broker.record import choose_folder, create_folder, read_config, read_plans, remove_folder, write_plans
from zsplit_broker.sockets import Sockets, bound


def run_broker(
    config: Config | None, out: str | None, ready: Callable[[Sockets, Path], None], attached: bool
) -> Finish:
    """Run a broker to the end of its run. `ready` is called with its sockets and folder once it listens.

    Without a config, that of the folder `out` is taken.

    `attached`: the end of the standard input stops it, so that it cannot outlive whoever started it. A run that
    never began leaves no folder behind.

    Raises ConfigError where the folder exists, a port is taken or `plan.file` is no plan for this run, StorageError
    where it cannot write.
    """
    keep_freed(one_arena=True)
    config = config or read_config(Path(out or ""))
    planned = read_plans(config)
    folder = choose_folder(config, out)
    run = secrets.token_hex(4)
    with ExitStack() as stack:
        sockets = stack.enter_context(bound(config))
        create_folder(folder, config)
        journal = stack.enter_context(Journal.open(folder, {"run": run, "zsplit": version("zsplit")}))
        if planned:
            write_plans(folder, planned)
        broker = Broker(config, run, folder, journal, sockets, planned)
        stack.callback(broker.close)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda n, _: broker.stop(f"stopped by {signal.Signals(n).name}"))
        if attached:
            Thread(target=stop_at_end_of_input, args=(broker,), daemon=True).start()
        ready(sockets, folder)
        outcome = broker.serve()
    if broker.scheduler.version is None:
        remove_folder(folder)
    return outcome


def stop_at_end_of_input(broker: Broker) -> None:
    """Stop the broker when the standard input ends."""
    while os.read(0, 4096):
        pass
    broker.stop("whoever started the broker is gone")
