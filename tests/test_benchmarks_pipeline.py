"""The benchmarks of pipelining, planning and idle time run, and write what they promise; no figure is judged."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def start(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


def figures_of(script: str, folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    """Run a benchmark; return the JSON that it wrote, and what it printed."""
    file = folder / "figures.json"
    done = start(script, *options, "--json", str(file))
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


def test_the_pipeline_benchmark_compares_every_m_with_its_prediction_and_a_loop(tmp_path: Path) -> None:
    options = "--models digits --links 200/200 --micro-batches 2 --batch 8 --steps 2 --repetitions 2"
    figures, printed = figures_of("pipeline.py", tmp_path, *options.split())
    [point] = figures["points"]
    assert (point["cut"], point["link"], point["rtt_ms"]) == ("pool", "200/200", 10)
    planned = str(point["planned"])
    assert {"1", "2", planned, "pickle"} == set(point["step_seconds"])
    assert {"1", "2", planned} == set(point["predicted_seconds"])
    assert all(seconds > 0.01 for seconds in point["step_seconds"].values())  # no step is shorter than a round trip
    for m, error in point["errors"].items():
        assert point["step_seconds"][m] == pytest.approx(point["predicted_seconds"][m] * (1 + error))
    assert len(point["taken"]) == 2 * len(point["predicted_seconds"])
    assert len(point["pickled"]) == 2 * 2
    assert "samples of 1×8×8" in printed


def test_the_pipeline_benchmark_says_what_a_list_of_links_is() -> None:
    done = start("pipeline.py", "--links", "fast")
    assert done.returncode == 2
    assert "'fast' does not do: give a list such as 10/25,50/50,200/200,unlimited" in done.stderr


def test_the_planner_benchmark_measures_the_choice_again_beside_the_best_others(tmp_path: Path) -> None:
    options = ["--only", "digits/cnn 50/50 x1", "--batch", "4", "--steps", "1", "--again", "1", "--repetitions", "2"]
    figures, printed = figures_of("planner.py", tmp_path, *options)
    [point] = figures["points"]
    tried = [(cut, m) for cut, m, *_ in point["tried"]]
    assert len(tried) == len(set(tried)) > 3
    assert {m for _, m in tried} <= {1, 2, 4}
    assert len(point["again"]) == 4
    assert point["again"][0] == [point["chosen"], point["chosen_seconds"]]
    assert point["over_best"] == point["chosen_seconds"] / point["best_seconds"] >= 1
    assert figures["over_best"] == {"median": point["over_best"], "worst": point["over_best"]}
    assert "The planner's choice beside the best of all" in printed


def test_the_planner_benchmark_names_its_combinations_where_none_was_meant() -> None:
    done = start("planner.py", "--only", "lenet")
    assert done.returncode == 2
    assert "they are digits/cnn 10/25 x1" in " ".join(done.stderr.split())


def test_the_idle_benchmark_compares_the_planned_way_with_three_others(tmp_path: Path) -> None:
    options = "--model digits/cnn --link 200/200 --clients 2 --batch 8 --steps 2 --rounds 2"
    figures, printed = figures_of("idle.py", tmp_path, *options.split())
    ways = {"planned", "pipelined", "sequential", "federated"}
    assert ways == set(figures["round_seconds"]) == set(figures["idle_share"])
    assert all(0 < share < 1 for share in figures["idle_share"].values())
    assert figures["faster"]["planned"] == figures["less_idle"]["planned"] == 1
    assert figures["plans"]["sequential"] == ["pool, 1"]
    assert all(way in printed for way in ways)
