"""The same run as in separate terminals: broker, server, clients and monitor, in any order of starting."""

import json
import signal
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import QUICK, Command, Processes, free_port, settings
from safetensors.torch import load_file

from zsplit.config import differences, load_config
from zsplit.model import zoo

ORDERS = {
    "broker last": ("client -i 1", "monitor", "server", "client -i 0", "broker"),
    "broker first, clients without an index, server last": ("broker", "client", "client", "monitor", "server"),
}

CONFIG = '[run]\nname = "quick"\n[data]\nval_fraction = 0.2\n'


class Terminals(NamedTuple):
    """A run that is over: what was said in each terminal, by command, and the run's folder."""

    commands: dict[str, Command]
    folder: Path
    port: int

    def of(self, role: str) -> list[Command]:
        return [command for arguments, command in self.commands.items() if role in arguments]


@pytest.fixture(scope="module", params=ORDERS.values(), ids=ORDERS)
def terminals(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Terminals:
    """Start everybody in this order (who comes before the broker has said that it waits) and wait for the end."""
    folder, port = tmp_path_factory.mktemp("terminals"), free_port()
    (folder / "quick.toml").write_text(CONFIG)
    broker = ["broker", "quick.toml", *settings(f"broker.port={port}", *QUICK), "--out", "out"]
    commands: dict[str, Command] = {}
    with Processes(folder) as processes:
        for number, words in enumerate(request.param):
            joiner = [*words.split(), "--broker", f"127.0.0.1:{port}"]
            # What an interpreter loads, it lists on stderr.
            started = processes.start(*(broker if words == "broker" else joiner), PYTHONPROFILEIMPORTTIME="1")
            commands[f"{words} ({number})"] = started
            if "broker" not in " ".join(commands):
                started.line("yet; trying for")
        for command in commands.values():
            command.wait()
    return Terminals(commands, folder / "out", port)


def packages(command: Command) -> set[str]:
    """Return the packages that a process has loaded."""
    names = (line.rpartition("|")[2].strip() for line in command.err if line.startswith("import time:"))
    return {name.partition(".")[0] for name in names}


def spoken(command: Command) -> list[str]:
    """Return what was said to a person, on stderr."""
    return [line for line in command.err if not line.startswith("import time:")]


# A finished run


def test_all_of_them_end_with_exit_code_zero_and_no_traceback(terminals: Terminals) -> None:
    for words, command in terminals.commands.items():
        assert command.process.returncode == 0, (words, command.out, spoken(command))
        assert not any("Traceback" in line for line in command.said), words


def test_who_comes_before_the_broker_says_that_it_tries_and_joins_later(terminals: Terminals) -> None:
    waited = False
    for words, command in terminals.commands.items():
        if "broker" in words:
            break
        assert spoken(command)[0] == f"No answer from a broker at 127.0.0.1:{terminals.port} yet; trying for 60 s"
        waited = True
    assert waited == (not next(iter(terminals.commands)).startswith("broker"))


def test_each_peer_says_that_it_joined_and_how_the_run_ended(terminals: Terminals) -> None:
    ends = [spoken(peer)[-2:] for role in ("server", "client") for peer in terminals.of(role)]
    address = f"127.0.0.1:{terminals.port}"
    joined = [f"{peer} joined the run at {address}" for peer in ("client 0", "client 1", "server 0")]
    assert sorted(first for first, _ in ends) == joined
    assert {last for _, last in ends} == {"the run is finished"}


def test_the_monitor_shows_every_round_and_ends_with_the_run(terminals: Terminals) -> None:
    (monitor,) = terminals.of("monitor")
    for text in ("client.0  joined: ", "round 2/2  loss ", "run quick finished  test "):
        assert any(text in line for line in monitor.out), (text, monitor.out)


def test_the_folder_holds_config_metrics_summary_model_versions_and_journal(terminals: Terminals) -> None:
    names = {"config.toml", "metrics.jsonl", "summary.json", "model.safetensors", "versions", "journal.log", "lock"}
    assert {path.name for path in terminals.folder.iterdir()} == names
    asked = load_config(terminals.folder.parent / "quick.toml", [f"broker.port={terminals.port}", *QUICK])
    assert differences(load_config(terminals.folder / "config.toml"), asked) == []
    rounds = [json.loads(line) for line in (terminals.folder / "metrics.jsonl").read_text().splitlines()]
    assert [each["round"] for each in rounds] == [1, 2]
    stored = {path.stem for path in (terminals.folder / "versions").iterdir()}
    assert stored == {each["version"] for each in rounds}
    assert (terminals.folder / "journal.log").stat().st_size > 0


def test_the_summary_has_the_figures_of_the_run(terminals: Terminals) -> None:
    summary = json.loads((terminals.folder / "summary.json").read_text())
    assert summary["ok"] is True
    assert (summary["policy"], summary["clients"], summary["rounds"]) == ("parallel", 2, 2)
    assert summary["model"] == "digits/cnn"
    rounds = [json.loads(line) for line in (terminals.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(summary[each] == sum(row[each] for row in rounds) > 0 for each in ("samples", "steps"))
    assert 0 < summary["train_loss"] < 2.3
    assert all(0.3 < summary[f"{part}_accuracy"] <= 1 for part in ("val", "test"))
    assert summary["seconds"] > 0
    assert 0 < summary["step_seconds"]["median"] <= summary["step_seconds"]["p95"]
    assert all(0 <= summary["idle"][role] <= 1 for role in ("client", "server"))
    kinds = summary["bytes"].pop("kinds")
    assert {"smashed", "gradients", "weights", "optimizer", "labels", "evaluation"} <= kinds.keys()
    assert summary["bytes"] == {way: sum(kind[way] for kind in kinds.values()) for way in ("up", "down")}
    assert len(summary["versions"]) == 2


def test_the_model_loads_into_the_plain_one(terminals: Terminals) -> None:
    model = zoo.build("digits/cnn", 10, 0, (1, 8, 8))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(load_file(terminals.folder / "model.safetensors"))
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_broker_and_monitor_never_load_torch_and_the_peers_no_torchvision(terminals: Terminals) -> None:
    for role in ("broker", "monitor"):
        (command,) = terminals.of(role)
        assert "zmq" in packages(command)
        assert packages(command).isdisjoint({"torch", "torchvision", "numpy"}), role
    for role in ("server", "client"):
        for command in terminals.of(role):
            assert "torch" in packages(command)
            assert "torchvision" not in packages(command), role


# A monitor and a run that goes on


def test_monitors_come_and_go_without_the_run_noticing(processes: Processes) -> None:
    address = f"127.0.0.1:{(port := free_port())}"
    run = processes.start("run", "--no-monitor", *settings(f"broker.port={port}", *QUICK, "run.rounds=100000"))
    killed = processes.start("monitor", "--broker", address)
    killed.line("round 2/100000")
    killed.signal(signal.SIGKILL)
    killed.wait()
    late = processes.start("monitor", "--broker", address)
    assert number_of(late.line(" round ")) >= 2
    late.line("run digits training  parallel  digits/cnn cut at pool  digits  2/2 clients, 1 server")
    late.signal(signal.SIGINT)
    assert late.wait() == 130
    assert late.err[-1] == "zsplit: interrupted."
    seen = max(number_of(line) for line in run.out if " round " in line)
    run.line(f" round {seen + 2}/100000")
    assert not any("error" in line or "warning" in line for line in run.said)
    run.signal(signal.SIGINT)
    assert run.wait() == 1


def number_of(line: str) -> int:
    """Return the number of the round that a line tells of."""
    return int(line.partition(" round ")[2].partition("/")[0])
