"""A run whose disk is full waits, says so, and goes on as if nothing had happened when there is room."""

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import QUICK, Processes, free_port, settings


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for the first version and half of the second."""
    (disk := tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", disk]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("policy", ["parallel", "round_robin"])
def test_a_run_with_a_full_disk_waits_and_goes_on_when_there_is_room(
    policy: str, killed: bool, small_disk: Path, processes: Processes, digits_run: Path
) -> None:
    port, out = free_port(), small_disk / "out"
    address = f"127.0.0.1:{port}"
    keys = settings(f"broker.port={port}", f"schedule.policy={policy}", "run.name=demo", *QUICK)
    broker = processes.start("broker", *keys, "--out", str(out))
    broker.line("listens")
    monitor = processes.start("monitor", "--broker", address)
    for words in ("server", "client", "client"):
        processes.start(words, "--broker", address)
    monitor.line("is full: free ")
    assert "The run waits for room on the disk" in monitor.line("is full: free ")
    if killed:
        with suppress(OSError), (small_disk / "filling").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        broker.process.kill()
        broker.wait()
        processes.started.remove(broker)
        processes.start("broker", *keys, "--out", str(out)).line("listens")
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    if not killed:
        monitor.line("there is room on the disk again: the run goes on")
    for command in processes.started:
        assert command.wait() == 0, command.err
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["ok"], summary["rounds"]) == (True, 2)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    assert (out / "model.safetensors").exists()
    undisturbed = json.loads((digits_run / "summary.json").read_text())
    if policy == undisturbed["policy"]:
        assert summary["versions"] == undisturbed["versions"]


def test_a_run_that_waits_for_room_can_be_stopped(small_disk: Path, processes: Processes) -> None:
    port = free_port()
    broker = processes.start("broker", *settings(f"broker.port={port}", *QUICK), "--out", str(small_disk / "out"))
    broker.line("listens")
    monitor = processes.start("monitor", "--broker", f"127.0.0.1:{port}")
    for words in ("server", "client", "client"):
        processes.start(words, "--broker", f"127.0.0.1:{port}")
    monitor.line("is full: free ")
    with suppress(OSError), (small_disk / "filling").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    broker.process.send_signal(signal.SIGINT)
    assert broker.wait(20) == 1
    assert broker.err[-1].startswith("stopped by SIGINT. The last version, ")
    for command in processes.started:
        command.wait()
