"""The broker as a process: a folder, a journal, sockets, signals. A folder with an unfinished run is taken up again."""

import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from threading import Thread

import msgspec

from zsplit import crash
from zsplit.config import Config
from zsplit.errors import ConfigError, StorageError
from zsplit.memory import keep_freed
from zsplit_broker.events import Damaged, Finish
from zsplit_broker.journal import JOURNAL, Journal
from zsplit_broker.loop import Broker
from zsplit_broker.record import (
    choose_folder,
    create_folder,
    forget_ending,
    is_concluded,
    put_timeline_aside,
    read_config,
    read_plans,
    remove_folder,
    write_plans,
)
from zsplit_broker.scheduler import Scheduler, restore
from zsplit_broker.sockets import Sockets, bound
from zsplit_broker.versions import Versions

NAMED = 4
"""Differing keys that a sentence names; it counts the others."""


def run_broker(
    config: Config | None, out: str | None, ready: Callable[[Sockets, Path], None], attached: bool
) -> Finish:
    """Run a broker to the end of its run. `ready` is called with its sockets and folder once it listens.

    Where `out` is the folder of an unfinished run of the same config, that run goes on; without a config it has to be
    one. `attached`: the end of the standard input stops it, so that it cannot outlive whoever started it. A run that
    never began leaves no folder behind.

    Raises ConfigError where the folder holds something else, or a run of another config or a finished one, where a port
    is taken, or `plan.file` is no plan for this run; StorageError where it cannot write, or what is there is damaged.
    """
    keep_freed(one_arena=True)
    folder = choose_folder(config, out)
    with ExitStack() as stack:
        if (folder / JOURNAL).exists():
            broker, sockets = _resumed(stack, config, folder)
        elif config is not None:
            broker, sockets = _begun(stack, config, folder)
        else:
            raise ConfigError(f"{folder} holds no run: give the folder of one, such as runs/digits-1.")
        stack.callback(broker.close)
        signal.signal(signal.SIGINT, lambda *_: broker.stop("stopped by SIGINT"))
        signal.signal(signal.SIGTERM, lambda *_: broker.drain("stopped by SIGTERM"))
        if attached:
            Thread(target=stop_at_end_of_input, args=(broker,), daemon=True).start()
        ready(sockets, folder)
        outcome = broker.serve()
    if broker.scheduler.version is None:
        remove_folder(folder)
    return outcome


def _begun(stack: ExitStack, config: Config, folder: Path) -> tuple[Broker, Sockets]:
    """Return the broker of a new run."""
    planned, run = read_plans(config), secrets.token_hex(4)
    sockets = stack.enter_context(bound(config))
    create_folder(folder, config)
    journal = stack.enter_context(Journal.open(folder, {"run": run, "zsplit": version("zsplit")}))
    if planned:
        write_plans(folder, planned)
    return Broker(config, run, folder, journal, sockets, planned), sockets


def _resumed(stack: ExitStack, asked: Config | None, folder: Path) -> tuple[Broker, Sockets]:
    """Return a broker that takes up what the journal in the folder says."""
    config = read_config(folder)
    journal = stack.enter_context(Journal.open(folder))
    if asked is not None:
        _compare(config, asked, folder)
        config = msgspec.structs.replace(config, broker=asked.broker)
    scheduler = restore(config, _replayed(journal.entries))
    if scheduler.outcome is not None and scheduler.outcome.ok and is_concluded(folder):
        raise ConfigError(f"{folder} holds a run that is finished: choose another --out to train anew.")
    sockets = stack.enter_context(bound(config, scheduler.ports))
    forget_ending(folder)
    put_timeline_aside(folder, scheduler.epoch)
    broker = Broker(config, journal.header["run"], folder, journal, sockets, scheduler=scheduler)
    broker.news += examine(scheduler, broker.versions)
    return broker, sockets


def _replayed(entries: list[bytes]) -> Iterator[bytes]:
    for entry in entries:
        yield entry
        crash.at("broker.replay")


def _compare(there: Config, here: Config, folder: Path) -> None:
    """Raise ConfigError where a run was begun with another config. Where its broker listens may differ."""
    before, now = _flat(there), _flat(here)
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    keys = [key for key in keys if not key.startswith("broker.") and key != "run.out"]
    if keys:
        named = "; ".join(f"{key} is {before.get(key)!r} there and {now.get(key)!r} here" for key in keys[:NAMED])
        more = f"; and {len(keys) - NAMED} more keys" if len(keys) > NAMED else ""
        raise ConfigError(
            f"{folder} holds a run of another config ({named}{more}): resume it with its own (zsplit resume {folder}), "
            "or choose another --out."
        )


def _flat(config: Config) -> dict[str, object]:
    sections: dict[str, dict[str, object]] = msgspec.to_builtins(config)
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}


def examine(scheduler: Scheduler, versions: Versions) -> list[Damaged]:
    """Return the stored versions that are damaged or gone. Raises StorageError where all of them are."""
    damaged = []
    for digest in scheduler.stored:
        try:
            versions.verify(digest)
        except StorageError as error:
            damaged.append(Damaged(digest, str(error)))
    if damaged and len(damaged) == len(scheduler.stored):
        raise StorageError(
            f"every version in {versions.folder} is damaged or gone ({damaged[-1].sentence}): "
            "put one back from a copy, or start the run again with another --out"
        )
    return damaged


def stop_at_end_of_input(broker: Broker) -> None:
    """Stop the broker when the standard input ends."""
    while os.read(0, 4096):
        pass
    broker.stop("whoever started the broker is gone")
