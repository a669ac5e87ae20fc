"""Every config in configs/ loads, says where it is from, and trains: two steps on data in the dataset's own format."""

from pathlib import Path

import formats
import pytest

from zsplit import load_config, run_here

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))

PACKAGED = ("digits", "fake")
"""Datasets without files of their own."""

STEPS = 2
SAMPLES = 4
"""Samples of a mini-batch: at two, BatchNorm's gradients grow over all measure in a ResNet-50."""


def few(path: Path, folder: Path) -> dict[str, object]:
    """Return what makes a run short: two clients at most, two steps for each, and little to test."""
    config = load_config(path)
    clients = min(config.schedule.clients, 2)
    everyone = 1 if config.data.partition == "replicate" else clients
    keys: dict[str, object] = {
        "run.rounds": 1,
        "schedule.clients": clients,
        "train.batch_size": SAMPLES,
        "data.val_fraction": 0.0,
        "data.train_size": STEPS * SAMPLES * everyone,
        "data.test_size": SAMPLES,
        "plan.profile_steps": 1,
        "plan.profile_seconds": 0.2,
        "broker.port": 0,
        "server.device": "cpu",
        "client.device": "cpu",
        "link.uplink_mbps": 0.0,
        "link.downlink_mbps": 0.0,
    }
    if config.data.name not in PACKAGED:
        keys["data.path"] = str(folder)
    return keys


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_two_steps_on_data_in_the_dataset_s_own_format(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    if config.data.name not in PACKAGED:
        formats.write(config.data.name, tmp_path / "data")
    result = run_here(load_config(path, few(path, tmp_path / "data")), str(tmp_path / "run"))
    assert result.ok, result.sentence
    assert result.summary["steps"] == STEPS * result.summary["clients"]
    assert result.summary["test_accuracy"] is not None
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_what_it_is_where_it_is_from_and_what_to_expect(path: Path) -> None:
    head = path.read_text(encoding="utf-8").partition("\n[")[0]
    assert all(line.startswith("#") for line in head.splitlines() if line)
    if path.stem != "digits":
        assert "# Source: " in head
        assert "# Expect: " in head


def test_every_experiment_of_the_reference_systems_is_there() -> None:
    models = ["vgg5", "vgg11", "vgg16", "resnet18", "resnet50", "mobilenet_small", "mobilenet_large"]
    pipelearn = [f"pipelearn-{model}-{data}" for model in models for data in ("cifar10", "mnist", "svhn")]
    masks = [f"mask-sparsification-{end}" for end in ("vgg19-cifar10", "resnet18-cifar100", "resnet34-imagenet")]
    others = ["digits", "tutorial-resnet18-cifar10", "tutorial-round-robin-10-clients", "splitnn-mnist"]
    others += ["ushaped-mnist", "splitfed-v1", "splitfed-v2", "fedavg", "centralised"]
    assert {*pipelearn, *masks, *others} <= {path.stem for path in CONFIGS}
