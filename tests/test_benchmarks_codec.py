"""The benchmark of the codecs runs, and writes what it promises."""

import json
import subprocess
import sys
from pathlib import Path

CODEC = Path(__file__).parents[1] / "benchmarks" / "codec.py"


def test_the_codec_benchmark_has_a_row_for_each_codec_and_kind_of_values(tmp_path: Path) -> None:
    file = tmp_path / "codec.json"
    asked = ["quantize:bits=4", "ms:ratio=0.99,bits=2", "mask"]
    command = [sys.executable, str(CODEC), "--rounds", "1", "--threads", "1", "--json", str(file)]
    command += [word for spec in asked for word in ("--codec", spec)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    rows = json.loads(file.read_text())["rows"]
    assert [(row["codec"], row["kind"]) for row in rows] == [
        (spec, kind) for spec in asked for kind in ("normal", "ReLU")
    ]
    assert all(row["rate"] > 0 and row["encode"] > 0 and row["decode"] > 0 for row in rows)
    assert [round(row["less"], 1) for row in rows if row["kind"] == "ReLU"] == [8.0, 13.8, 100.0]
    assert [row["goal"] for row in rows[::2]] == [1500.0, 600.0, None]
    assert "ms:ratio=0.99,bits=2" in finished.stdout
