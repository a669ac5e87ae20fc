"""Several servers share the clients, and the result is that of one server, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK, Processes, free_port, settings


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
