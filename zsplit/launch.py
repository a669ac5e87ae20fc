"""A whole run on this machine: the broker, a server and the clients, as the processes they always are.

The broker is a program of its own; the torch side is forked from one process that has torch loaded, which
saves seconds of importing for each. Who is killed is started again (`supervise`). None of them outlives this process:
the broker reads the end of its input, the others watch their parent.
"""

import contextlib
import json
import os
import pickle
import signal
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from zsplit import crash
from zsplit.child import Peer, Task
from zsplit.config import Config, to_toml
from zsplit.errors import ConfigError
from zsplit.restarts import ALLOWED
from zsplit.supervise import Broker, Household, Place, has_versions
from zsplit_broker.journal import JOURNAL
from zsplit_broker.record import SUMMARY, read_config

if TYPE_CHECKING:
    from torch import nn

    from zsplit.data import Data

Watch = Callable[[Place, Callable[[], bool]], object]
"""Shows a run until the function that it is given says that it is over."""


class Result(NamedTuple):
    """How a run ended, and its `summary.json` (empty where it never began)."""

    ok: bool
    sentence: str
    folder: Path
    summary: dict[str, Any]


class Manner(NamedTuple):
    """How processes are started and looked after, whatever the run is.

    `allow` are the modules of which the config may name functions (`zsplit.own`). `restarts` is how often each process
    that is killed is started again; `say` is told so. Where SIGTERM `drains`, the round under way is finished first.
    """

    device: str = ""
    watch: Watch | None = None
    allow: Collection[str] = ()
    restarts: int = ALLOWED
    say: Callable[[str], None] = lambda _: None
    drains: bool = False


def run_here(
    config: Config,
    out: str | None = None,
    model: "nn.Module | None" = None,
    data: "Data | None" = None,
    device: str = "",
    watch: Watch | None = None,
    allow: Collection[str] = (),
    restarts: int = ALLOWED,
    say: Callable[[str], None] = lambda _: None,
    drains: bool = False,
) -> Result:
    """Run to the end on this machine; return how it went. An unfinished run of the same config in `out` is resumed.

    `allow` are the modules of which the config may name functions (`zsplit.own`). `watch` is called once the
    processes have been started, with a function that says whether the run is still on, and shows it until then; it
    has to call that function often, since it is what sees to the processes. One that is killed is started again, at
    most `restarts` times, and `say` is told so. Where SIGTERM `drains`, it ends the run after the round under way.
    Ctrl-C stops everything and is raised again as `Interrupted`.
    Raises ZsplitError where a process cannot start.
    """
    objects = _objects(config, model, data)
    config = deal_cores(_named(config, model, data), out or config.run.out)
    _fetch(config)
    with _written(config) as file:
        broker = _listening([file, *(["--out", out] if out else [])])
    return _run(config, broker, objects, Manner(device, watch, allow, restarts, say, drains))


def resume_here(folder: Path, manner: Manner) -> Result:
    """Go on with the unfinished run in a folder, with its own config; otherwise as `run_here`.

    Raises ConfigError where there is none, or where a script handed its data over: nobody else can.
    """
    config = read_config(folder)
    if config.data.name == "own":
        raise ConfigError(
            f"The data of {folder} came from a script: start that script again, with the same folder in `run_here`."
        )
    _fetch(config)
    return _run(config, _listening(["--resume", str(folder)]), _objects(config, None, None), manner)


def _run(config: Config, broker: Broker, objects: Mapping[str, bytes], manner: Manner) -> Result:
    """Start the peers of a broker that listens, and see to all of them until the run is over."""
    with contextlib.closing(broker):
        place = broker.listen()
        peers = [Peer(task) for task in _tasks(config, place, objects, manner)]
        household = Household(broker, peers, manner.restarts, manner.say)
        try:
            with _drained(household) if manner.drains else contextlib.nullcontext():
                for peer in peers:
                    peer.start()
                if manner.watch is not None:
                    manner.watch(place, household.still_on)
                while household.still_on():
                    household.pause()
            failed = household.failure()
        except KeyboardInterrupt:
            household.stop()
            raise Interrupted(_result(broker, household, place.folder)) from None
        finally:
            household.stop()
        result = _result(broker, household, place.folder)
        if failed is None:
            return result
        if not result.summary and not has_versions(place.folder):
            raise failed
        return result._replace(sentence=f"{failed}; {result.sentence}")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C stopped the run; `result` says what was kept."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.sentence)
        self.result = result


def _named(config: Config, model: "nn.Module | None", data: "Data | None") -> Config:
    """Return the config with the names of what a script hands over in place of those that it replaces."""
    replace = msgspec.structs.replace
    if model is not None:
        config = replace(config, model=replace(config.model, name=type(model).__name__))
    if data is not None:
        config = replace(config, data=replace(config.data, name="own"))
    return config


def _objects(config: Config, model: "nn.Module | None", data: "Data | None") -> dict[str, bytes]:
    """Return a script's objects by the role that they are for: clients get no labels that live at the server."""
    theirs = data
    if data is not None and config.train.labels == "server":
        from zsplit.data import unlabelled

        theirs = unlabelled(data)
    return {"server": _pickled(model, data), "client": _pickled(model, theirs)}


def _pickled(model: "nn.Module | None", data: "Data | None") -> bytes:
    """Return a script's objects for its own child processes; nothing pickled ever crosses the network."""
    try:
        return pickle.dumps((model, data))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"The model or the data cannot be handed to other processes ({error}): "
            "define its classes and functions at the top level of a module"
        ) from error


def share_cores(config: Config) -> Config:
    """Return the config with this machine's cores dealt out to the processes that compute at the same time."""
    busy = 1 + (config.schedule.clients if config.schedule.policy == "parallel" else 1)
    share = max(1, (os.cpu_count() or 1) // busy)
    replace = msgspec.structs.replace
    return replace(
        config,
        server=replace(config.server, threads=config.server.threads or share),
        client=replace(config.client, threads=config.client.threads or share),
    )


def deal_cores(config: Config, folder: str) -> Config:
    """Return the config with the cores dealt out; as they were, where the folder has a run that is to be resumed.

    Numbers of threads are part of what a result depends on, and this machine may have other cores than that one.
    """
    replace = msgspec.structs.replace
    if folder and (Path(folder).expanduser() / JOURNAL).exists():
        with contextlib.suppress(ConfigError):  # the broker says what is wrong with the folder
            before = read_config(Path(folder).expanduser())
            return replace(
                config,
                server=replace(config.server, threads=config.server.threads or before.server.threads),
                client=replace(config.client, threads=config.client.threads or before.client.threads),
            )
    return share_cores(config)


def _fetch(config: Config) -> None:
    """Download what the config asks for: here, where its progress is seen."""
    if config.data.download:
        from zsplit.data import fetch_originals

        fetch_originals(config)


def _listening(arguments: list[str]) -> Broker:
    """Start a broker with these arguments and return it once it listens. Raises ZsplitError where it does not."""
    broker = Broker(arguments)
    try:
        broker.start()
        broker.listen()
    except BaseException:
        broker.close()
        raise
    return broker


@contextlib.contextmanager
def _written(config: Config) -> Iterator[str]:
    """Write the config to a file of its own, which is gone again afterwards."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(to_toml(config))
        file.flush()
        yield file.name


@contextlib.contextmanager
def _drained(household: Household) -> Iterator[None]:
    """Have SIGTERM end the run after the round under way."""
    before = signal.signal(signal.SIGTERM, lambda *_: household.drain())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tasks(config: Config, place: Place, objects: Mapping[str, bytes], manner: Manner) -> Iterator[Task]:
    """Yield what each peer is to be."""
    logs = place.folder / "logs"
    logs.mkdir(exist_ok=True)
    for role, index in [("server", 0), *(("client", i) for i in range(config.schedule.clients))]:
        log, allowed = logs / f"{role}-{index}.log", tuple(manner.allow)
        trap = crash.variables()
        yield Task(role, index, place.address, manner.device, objects[role], Path.cwd(), log, allowed, trap)


def _tidy(folder: Path) -> None:
    """Remove the logs of a run that never began where nobody wrote anything, and with them the folder."""
    for log in folder.glob("logs/*.log"):
        if not log.stat().st_size:
            log.unlink()
    with contextlib.suppress(OSError):  # not empty: somebody did
        (folder / "logs").rmdir()
        folder.rmdir()


def _result(broker: Broker, household: Household, folder: Path) -> Result:
    """Return how a run went, from its summary; without one it never began, or its broker died."""
    if broker.concluded:
        summary = json.loads((folder / SUMMARY).read_text())
        return Result(summary["ok"], summary["sentence"], folder, summary)
    _tidy(folder)
    sentence = household.words()
    if has_versions(folder):
        sentence += f"; what it stored is kept, and `zsplit resume {folder}` goes on with it"
    return Result(False, sentence, folder, {})
