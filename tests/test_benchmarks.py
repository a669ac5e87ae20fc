"""The benchmarks run, and write what they promise. What the figures are is not for a test to say."""

import json
import math
import subprocess
import sys
from pathlib import Path

RELAY = Path(__file__).parents[1] / "benchmarks" / "relay.py"
SIZES = [100, 70_000]


def run_relay(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RELAY), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_relay_benchmark_compares_every_size_with_a_proxy_and_a_direct_connection(tmp_path: Path) -> None:
    file = tmp_path / "relay.json"
    sizes = ",".join(map(str, SIZES))
    finished = run_relay("--starts", 2, "--pairs", 1, "--sizes", sizes, "--seconds-per-point", 0.01, "--json", file)
    assert (finished.returncode, finished.stderr) == (0, "")
    points = json.loads(file.read_text())["points"]
    assert [(point["size"], point["window"]) for point in points] == [(size, w) for size in SIZES for w in (1, 8)]
    for point in points:
        assert set(point["ratios"]) == {"wall_proxy", "wall_direct", "cpu_proxy"}
        assert all(0 < ratio < math.inf for ratio in point["ratios"].values())
        assert [set(pair) for pair in point["pairs"]] == [{"broker", "proxy", "direct"}] * 2
        assert all(pair["broker"]["cpu"] > 0 and pair["proxy"]["cpu"] > 0 for pair in point["pairs"])
    assert "100 B" in finished.stdout
    assert "70000 B" in finished.stdout


def test_the_relay_benchmark_says_what_a_list_of_sizes_is() -> None:
    finished = run_relay("--sizes", "4k")
    assert finished.returncode == 2
    assert "'4k' is no list of sizes: give bytes, such as 100,65536" in finished.stderr
