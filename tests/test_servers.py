"""Several servers share the clients, and the result is that of one server, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import zmq
from conftest import QUICK, Command, Processes, free_port, settings
from tap import broker_here

from zsplit import load_config
from zsplit.wire.frames import decode_data
from zsplit.wire.messages import Pull
from zsplit_broker.port import Port
from zsplit_broker.sockets import Sockets


def summary_with(servers: int, folder: Path) -> dict[str, Any]:
    """Run two clients with so many servers, all of which are there before the first client; return the summary."""
    folder.mkdir()
    port = free_port()
    threads = "server.threads=1", "client.threads=1", "server.device=cpu", "client.device=cpu"
    with Processes(folder) as processes:
        broker = processes.start("broker", *settings(f"broker.port={port}", *QUICK, *threads), "--out", "out")
        broker.line("listens")
        peers = [processes.start("server", "--broker", f"127.0.0.1:{port}") for _ in range(servers)]
        for peer in peers:
            peer.line("joined the run")
        peers += [processes.start("client", "--broker", f"127.0.0.1:{port}") for _ in range(2)]
        for command in [broker, *peers]:
            command.wait()
    return json.loads((folder / "out" / "summary.json").read_text())


@pytest.mark.timeout(120)
def test_two_servers_share_the_turns_and_change_no_bit(tmp_path: Path) -> None:
    one, two = (summary_with(servers, tmp_path / f"{servers}") for servers in (1, 2))
    assert one["ok"]
    assert two["ok"]
    assert two["versions"] == one["versions"]
    journal = (tmp_path / "2" / "out" / "journal.log").read_text()
    assert '"server","index":1' in journal
    assert '"side":"server"' in journal


class Grave(Port):
    """The broker's port. The server that another one first asks for a state dies before the question gets there."""

    def __init__(self, sockets: Sockets, servers: list[Command]) -> None:
        super().__init__(sockets.data)
        self.died: list[str] = []
        self._servers = servers

    def send(self, to: bytes, header: bytes, frames: list[zmq.Frame]) -> bool:
        message = decode_data(header)
        if isinstance(message, Pull) and message.origin.startswith("server") and not self.died:
            self.died.append(message.source)
            self._servers[int(message.source.removeprefix("server."))].process.kill()
            return True  # so it is for a moment, until the connection is found closed
        return super().send(to, header, frames)


def test_what_was_asked_of_a_server_that_died_before_it_heard_of_it_is_asked_again(processes: Processes) -> None:
    threads = "server.threads=1", "client.threads=1", "server.device=cpu", "client.device=cpu"
    config = load_config(None, ["broker.port=0", *QUICK, *threads, "link.lease_seconds=3", "link.beat_seconds=0.5"])
    servers: list[Command] = []
    graves: list[Grave] = []

    def port(sockets: Sockets) -> Grave:
        graves.append(Grave(sockets, servers))
        return graves[0]

    with broker_here(config, processes.folder / "run", port) as address:
        for _ in range(2):
            servers.append(processes.start("server", "--broker", address))
            servers[-1].line("joined the run")
        clients = [processes.start("client", "--broker", address) for _ in range(2)]
        assert [client.wait() for client in clients] == [0, 0], clients[0].err[-5:]
    assert graves[0].died == ["server.0"]
    assert servers[1].wait() == 0
    assert json.loads((processes.folder / "run" / "summary.json").read_text())["ok"]
