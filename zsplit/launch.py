"""A whole run on this machine: the broker, a server and the clients, as the processes they always are.

The broker is a program of its own; the torch side is forked from one process that has torch loaded, which
saves seconds of importing for each. None of them outlives this process: the broker reads the end of its
input, the others watch their parent.
"""

import contextlib
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from zsplit.child import Peer, Task, death, live
from zsplit.config import Config, to_toml
from zsplit.errors import ConfigError, ZsplitError

if TYPE_CHECKING:
    from torch import nn

    from zsplit.data import Data

STOP_SECONDS = 2.0
"""How long processes have to leave once they were told to; then they are killed."""


NOTICE_SECONDS = 3.0
"""How long the broker has to end a run of which a peer told it that it failed; one that never began goes on."""


class Place(NamedTuple):
    """Where a run is: the broker's address, what it publishes, its folder."""

    address: str
    events: str
    folder: Path


class Result(NamedTuple):
    """How a run ended, and its `summary.json` (empty where it never began)."""

    ok: bool
    sentence: str
    folder: Path
    summary: dict[str, Any]


def run_here(
    config: Config,
    out: str | None = None,
    model: "nn.Module | None" = None,
    data: "Data | None" = None,
    device: str = "",
    watch: Callable[[Place, Callable[[], bool]], object] | None = None,
    allow: Collection[str] = (),
) -> Result:
    """Run to the end on this machine; return how it went.

    `allow` are the modules of which the config may name functions (`zsplit.own`). `watch` is called once the
    processes have been started, with a function that says whether the run is still on, and shows it until then.
    Ctrl-C stops everything and is raised again as `Interrupted`.
    Raises ZsplitError where a process cannot start.
    """
    objects = _objects(config, model, data)
    config = share_cores(_named(config, model, data))
    if config.data.download:
        from zsplit.data import fetch_originals

        fetch_originals(config)  # here, where its progress is seen
    with _broker(config, out) as (process, place):
        peers: list[Peer] = []
        try:
            for peer in _peers(config, place, objects, device, tuple(allow)):
                peers.append(peer)
            if watch is not None:
                watch(place, lambda: process.poll() is None and not any(peer.failed for peer in peers))
            failed = _wait(process, peers, place.folder)
        except KeyboardInterrupt:
            _stop(process, peers, place.folder)
            raise Interrupted(_result(process, place)) from None
        finally:
            _stop(process, peers, place.folder)
        result = _result(process, place)
        if failed is None:
            return result
        if not result.summary:
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


@contextlib.contextmanager
def _broker(config: Config, out: str | None) -> Iterator[tuple["subprocess.Popen[str]", Place]]:
    """Start the broker; yield it and where it is once it listens. Raises ZsplitError where it does not start."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(to_toml(config))
        file.flush()
        command = [sys.executable, "-m", "zsplit_broker", file.name, "--json", "--attached"]
        with subprocess.Popen(  # noqa: S603  (our own program)
            command + (["--out", out] if out else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is ours to pass on
        ) as process:
            place = _place(process)
            file.close()  # it was read, and is gone now, whatever this process is killed by
            try:
                yield process, place
            finally:
                process.kill()


def _place(process: "subprocess.Popen[str]") -> Place:
    """Wait until the broker says where it listens. Raises ZsplitError with its sentence where it ends instead."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        error = ZsplitError(_last_line(process) or "The broker did not start.")
        error.exit_code = process.wait()
        raise error
    told = json.loads(line)
    return Place(told["address"], told["events"], Path(told["out"]))


def _peers(
    config: Config, place: Place, objects: dict[str, bytes], device: str, allowed: tuple[str, ...]
) -> Iterator[Peer]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zsplit.train.nursery"])
    logs = place.folder / "logs"
    logs.mkdir(exist_ok=True)
    for role, index in [("server", 0), *(("client", i) for i in range(config.schedule.clients))]:
        name = f"{role} {index}"
        ours, theirs = context.Pipe(duplex=False)
        log = logs / f"{role}-{index}.log"
        task = Task(role, index, place.address, device, objects[role], Path.cwd(), log, allowed)
        process = context.Process(target=live, args=(task, theirs), name=f"zsplit {name}", daemon=True)
        process.start()
        theirs.close()
        yield Peer(name, process, ours)


def _wait(process: "subprocess.Popen[str]", peers: list[Peer], folder: Path) -> ZsplitError | None:
    """Wait until the broker has ended (return None), or a peer failed and it does not end (return why)."""
    assert process.stdout is not None
    waiting = [peer.process.sentinel for peer in peers]
    while process.poll() is None:
        wait([process.stdout.fileno(), *waiting])  # the broker's output ends with it
        if (failed := next((peer for peer in peers if peer.failed), None)) is not None:
            told = failed.last_words is not None and _has_versions(folder)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(NOTICE_SECONDS if told else 0)
                return None
            return failed.failure()
        waiting = [peer.process.sentinel for peer in peers if peer.process.exitcode is None]
        if not waiting:
            process.wait()
    return None


def _stop(process: "subprocess.Popen[str]", peers: list[Peer], folder: Path) -> None:
    """Tell the broker to end the run, give everybody a moment, and kill who is still there."""
    if not _has_versions(folder):
        _kill(peers)  # they have nothing to finish, and may be loading for seconds
    until = time.monotonic() + STOP_SECONDS
    if process.poll() is None:
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    for peer in peers:
        peer.process.join(max(0.0, until - time.monotonic()))
    _kill(peers)


def _kill(peers: list[Peer]) -> None:
    for peer in peers:
        peer.process.kill()
    for peer in peers:
        peer.process.join()


def _tidy(folder: Path) -> None:
    """Remove the logs of a run that never began where nobody wrote anything, and with them the folder."""
    for log in folder.glob("logs/*.log"):
        if not log.stat().st_size:
            log.unlink()
    with contextlib.suppress(OSError):  # not empty: somebody did
        (folder / "logs").rmdir()
        folder.rmdir()


def _result(process: "subprocess.Popen[str]", place: Place) -> Result:
    """Return how a run went, from its summary; without one it never began, or its broker died."""
    file = place.folder / "summary.json"
    if file.exists():
        summary = json.loads(file.read_text())
        return Result(process.returncode == 0, summary["sentence"], place.folder, summary)
    _tidy(place.folder)
    sentence = _last_line(process) or f"the broker {death(process.returncode)}"
    if _has_versions(place.folder):
        sentence += "; what it stored is kept, and the folder can be resumed"
    return Result(False, sentence, place.folder, {})


def _has_versions(folder: Path) -> bool:
    return any(folder.glob("versions/*.safetensors"))


def _last_line(process: "subprocess.Popen[str]") -> str:
    """Return the last line that a process said before it ended: its sentence."""
    assert process.stderr is not None
    return process.stderr.read().strip().rpartition("\n")[2].removeprefix("zsplit broker: ")
