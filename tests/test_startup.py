"""What a process has loaded, and how large it is, once it is there. How long that takes is a benchmark's business."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Processes, settings

MEMORY = 60_000_000
"""Bytes that a broker may have in memory once it listens."""


def loaded(statement: str) -> set[str]:
    """Return the packages that a fresh interpreter has loaded after a statement."""
    script = f"{statement}; import json, sys; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_importing_zsplit_loads_nothing_else() -> None:
    assert loaded("import zsplit").isdisjoint({"torch", "torchvision", "numpy", "zmq", "msgspec", "rich", "click"})


def test_every_public_name_is_found_when_it_is_asked_for() -> None:
    assert "torch" in loaded("import zsplit; [getattr(zsplit, name) for name in zsplit.__all__]")


def test_the_command_line_loads_torch_and_zmq_only_where_they_are_used() -> None:
    assert loaded("import zsplit.cli").isdisjoint({"torch", "torchvision", "numpy", "zmq", "rich"})


def test_a_config_is_read_without_torch_and_zmq() -> None:
    assert loaded("import zsplit; zsplit.load_config()").isdisjoint({"torch", "numpy", "zmq"})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's memory in /proc")
def test_a_broker_that_listens_is_small(processes: Processes) -> None:
    broker = processes.start("broker", *settings("broker.port=0"))
    broker.line("The broker listens at ")
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{broker.process.pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    assert 1_000_000 < 1024 * int(found[1]) < MEMORY
    broker.signal(signal.SIGINT)
    assert broker.wait() == 1
