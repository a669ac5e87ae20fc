"""The benchmarks of a step, of starting up and of recovery run, and write what they measured."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def figures_of(script: str, folder: Path, *options: str) -> dict[str, Any]:
    """Run a benchmark; return the JSON that it wrote. What it printed must be a table."""
    file = folder / "figures.json"
    command = [sys.executable, str(BENCHMARKS / script), *options, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "of " in done.stdout.splitlines()[0]  # the title of the table
    return json.loads(file.read_text())


def test_the_step_benchmark_compares_all_ways_in_every_round(tmp_path: Path) -> None:
    options = "--model digits/cnn --input 1x8x8 --cut pool --batch 4 --threads 1 --rounds 3 --steps 2"
    figures = figures_of("step.py", tmp_path, *options.split())
    [point] = figures["points"]
    assert [{way: len(steps) for way, steps in each.items()} for each in point["taken"]] == [
        {"uncut": 2, "split": 2, "pickle": 2}
    ] * 3
    assert all(each > 0 for each in point["step_seconds"].values())
    for way in ("split", "pickle"):
        low, high = point["ranges"][way]
        assert 0 < low <= point["ratios"][way] <= high
    assert figures["machine"]["torch"]


def test_the_step_benchmark_refuses_what_is_no_list_of_threads() -> None:
    command = [sys.executable, str(BENCHMARKS / "step.py"), "--threads", "1,none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'1,none' does not do: give numbers such as 1,2" in done.stderr


@pytest.fixture(scope="module")
def startup(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Figures of one round."""
    return figures_of("startup.py", tmp_path_factory.mktemp("startup"), "--rounds", "1")


def test_the_startup_benchmark_times_interpreter_import_and_broker(startup: dict[str, Any]) -> None:
    assert set(startup["seconds"]) == {"python", "import", "broker"}
    assert all(each > 0 for each in startup["seconds"].values())
    assert startup["over_python"]["broker"] > 0


def test_a_broker_that_listens_is_small(startup: dict[str, Any]) -> None:
    assert 5_000_000 < startup["memory"] < startup["goals"]["memory"] == 60_000_000


def test_a_run_on_the_digits_loads_no_torch_in_the_broker_and_no_torchvision_anywhere(startup: dict[str, Any]) -> None:
    assert startup["trespasses"] == {"broker": [], "server": [], "client": []}
    loaded = startup["loaded"]
    assert {"zsplit", "zsplit_broker", "zmq"} <= set(loaded["broker"])
    assert all({"zsplit", "torch", "zmq"} <= set(loaded[role]) for role in ("server", "client"))


def test_the_durability_benchmark_says_what_recovery_costs(tmp_path: Path) -> None:
    options = "--model pipelearn/vgg5 --steps 2 --batch 4 --rounds 3"
    figures = figures_of("durability.py", tmp_path, *options.split())
    seconds, (round_seconds, ten) = figures["seconds"], figures["lengths"]
    kept = {"kept (server)", "kept (client)"}
    assert set(seconds) == {"journal", "storing", "moving (server)", "moving (broker)"} | kept
    assert all(each > 0 for each in seconds.values())
    waited_for = {what: each for what, each in seconds.items() if what != "storing"}
    assert figures["shares"]["waited for"][0] == pytest.approx(sum(waited_for.values()) / round_seconds)
    assert figures["shares"]["in all"][0] == pytest.approx(sum(seconds.values()) / round_seconds)
    grown = sum(each * (ten / round_seconds if what in kept else 1) for what, each in seconds.items())
    assert figures["shares"]["in all"][1] == pytest.approx(grown / ten)
    assert figures["version_bytes"] > 1_000_000
