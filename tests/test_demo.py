"""The demo does what the README says."""

from pathlib import Path
from statistics import mean

import pytest

from zsplit import load_config, run_here


@pytest.mark.timeout(300)
def test_the_demo_reaches_98_percent_on_the_test_images_in_the_mean_of_three_seeds(tmp_path: Path) -> None:
    accuracies = []
    for seed in range(3):
        result = run_here(load_config(None, {"run.seed": seed, "broker.port": 0}), str(tmp_path / f"{seed}"))
        assert result.ok, result.sentence
        accuracies.append(result.summary["test_accuracy"])
    assert mean(accuracies) >= 0.98
