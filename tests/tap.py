"""A broker in this process whose data messages a test can look at, or lose; its peers are real processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, NamedTuple

from conftest import Processes

from zsplit.config import Config
from zsplit.wire.frames import decode_data
from zsplit.wire.messages import DataMessage
from zsplit_broker.journal import Journal
from zsplit_broker.loop import Broker
from zsplit_broker.port import Port
from zsplit_broker.record import create_folder
from zsplit_broker.sockets import BELL, Sockets, bound


class Passed(NamedTuple):
    """A data message: its header, and the bytes of its frames."""

    message: DataMessage
    frames: list[bytes]


class Tap(Port):
    """The broker's port, which keeps what it receives."""

    def __init__(self, sockets: Sockets) -> None:
        super().__init__(sockets.data)
        self.passed: list[Passed] = []
        self._parts: list[bytes] = []
        self._take, self.receive = self.receive, self._keep

    def _keep(self, *how: Any) -> Any:
        part = self._take(*how)
        if not how:  # a sender, with which a message begins
            self._parts = [part]
            return part
        self._parts.append(part.bytes)
        sender, header, *frames = self._parts
        if sender != BELL and not part.more:
            self.passed.append(Passed(decode_data(header), frames))
        return part


def recorded(config: Config, processes: Processes) -> list[Passed]:
    """Run to the end with one server and the clients as processes; return what passed the broker, in order."""
    taps: list[Tap] = []

    def tapped(sockets: Sockets) -> Tap:
        taps.append(Tap(sockets))
        return taps[0]

    with broker_here(config, processes.folder / "run", tapped) as address:
        peers = [processes.start("server", "--broker", address)]
        peers += [processes.start("client", "--broker", address) for _ in range(config.schedule.clients)]
        assert [peer.wait() for peer in peers] == [0] * len(peers), [peer.err[-5:] for peer in peers]
    assert taps[0].passed, "the tap hears nothing"
    return taps[0].passed


@contextmanager
def broker_here(config: Config, folder: Path, port: Callable[[Sockets], Port]) -> Iterator[str]:
    """Run a broker with a port of the test's own in this process; give its address, and wait for its end."""
    heard: Queue[str] = Queue()
    thread = Thread(target=_serve, args=(config, folder, port, heard), daemon=True)
    thread.start()
    yield heard.get()
    thread.join()


def _serve(config: Config, folder: Path, port: Callable[[Sockets], Port], heard: "Queue[str]") -> None:
    create_folder(folder, config)
    with bound(config) as sockets, Journal.open(folder, {"run": "tapped"}) as journal:
        broker = Broker(config, "tapped", folder, journal, sockets)
        broker.switch.port = port(sockets)
        heard.put(f"127.0.0.1:{sockets.port}")
        broker.serve()
        broker.close()
