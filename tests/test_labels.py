"""Where the labels are: through real processes, every mode ends with the reference's weights, bit for bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Normed, SmallResidual
from reference import Settings
from test_exact import SGD, assert_same, names_up_to, train_plain, train_split

Kinds = dict[str, dict[str, int]]


def small(model: type[Any] = SmallResidual) -> Any:
    torch.manual_seed(11)
    return model()


# The cut at the output and at the input

OUTPUT: dict[str, tuple[int, Settings]] = {
    "three clients": (3, replace(SGD, policy="parallel")),
    "clipped micro-batches, two aggregations a round": (
        2,
        replace(SGD, policy="parallel", aggregate_every=2, micro_batches=3, clip_norm=0.5),
    ),
    "in turn, buffers kept": (2, replace(SGD, policy="round_robin", optimizer_state="local")),
}


@pytest.mark.parametrize("case", OUTPUT)
def test_a_cut_at_the_output_is_federated_averaging(case: str, tmp_path: Path) -> None:
    clients, settings = OUTPUT[case]
    model = small()
    result = train_split(tmp_path / "run", model, "output", clients, settings)
    everything = {name for name, _ in model.named_parameters()}
    assert_same(result, train_plain(model, everything, clients, settings))
    kinds: Kinds = result.summary["bytes"]["kinds"]
    assert kinds.keys() <= {"weights", "optimizer", "other"}, "more than states and their manifests travels"
    assert result.summary["test_accuracy"] is not None
    assert result.summary["train_loss"] > 0


INPUT: dict[str, tuple[int, Settings]] = {
    "one client": (1, replace(SGD, policy="parallel")),
    "one client, clipped micro-batches": (1, replace(SGD, policy="round_robin", micro_batches=3, clip_norm=0.5)),
    "three clients": (3, replace(SGD, policy="parallel")),
}


@pytest.mark.parametrize("case", INPUT)
def test_a_cut_at_the_input_is_centralised_training(case: str, tmp_path: Path) -> None:
    clients, settings = INPUT[case]
    model = small()
    result = train_split(tmp_path / "run", model, "input", clients, settings)
    assert_same(result, train_plain(model, set(), clients, settings))
    kinds: Kinds = result.summary["bytes"]["kinds"]
    assert "gradients" not in kinds
    assert kinds["smashed"]["up"] == 4 * 64 * result.summary["samples"]


# Labels at the server

SERVER: dict[str, tuple[int, Settings]] = {
    "parallel": (3, replace(SGD, policy="parallel", micro_batches=2)),
    "in turn": (2, replace(SGD, policy="round_robin")),
}


@pytest.mark.parametrize("case", SERVER)
def test_labels_that_live_at_the_server_change_no_bit(case: str, tmp_path: Path) -> None:
    clients, settings = SERVER[case]
    model = small()
    keys = {"train.labels": "server", "data.val_fraction": 0.0}
    result = train_split(tmp_path / "run", model, "block.add", clients, settings, **keys)
    assert_same(result, train_plain(model, names_up_to(model, "stem", "block"), clients, settings))
    kinds: Kinds = result.summary["bytes"]["kinds"]
    assert "labels" not in kinds
    assert kinds["ids"]["up"] == 8 * result.summary["samples"]


# Labels kept

KEEP: dict[str, tuple[type[Any], int, str, str, int, Settings]] = {
    "one client": (SmallResidual, 1, "stem", "pool", 0, replace(SGD, policy="round_robin")),
    "one client, parallel, micro-batches": (
        SmallResidual, 1, "block.add", "pool", 2, replace(SGD, policy="parallel", micro_batches=3),
    ),
    "in turn": (SmallResidual, 3, "stem", "pool", 0, replace(SGD, policy="round_robin")),
    "in turn, micro-batches": (
        SmallResidual, 3, "stem", "flatten", 0, replace(SGD, policy="round_robin", micro_batches=3, client_lr=0.01),
    ),
    "parallel": (SmallResidual, 3, "stem", "", 0, replace(SGD, policy="parallel", aggregate_every=2)),
    "parallel, clipped micro-batches in a window of 2, buffers kept": (
        SmallResidual, 3, "stem", "pool", 2,
        replace(SGD, policy="parallel", micro_batches=3, clip_norm=0.5, optimizer_state="local"),
    ),
    "the loss alone": (SmallResidual, 2, "block.add", "output", 0, replace(SGD, policy="parallel", micro_batches=3)),
    "inputs and loss": (
        SmallResidual, 2, "input", "output", 0, replace(SGD, policy="parallel", micro_batches=3, clip_norm=0.5),
    ),
    "BatchNorm deferred in all three": (
        Normed, 2, "relu", "bn2", 3, replace(SGD, policy="parallel", micro_batches=3, batch_size=10),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KEEP)
def test_labels_that_stay_at_the_client_change_no_bit(case: str, tmp_path: Path) -> None:
    network, clients, cut, tail, window, settings = KEEP[case]
    model = small(network)
    keys = {"train.labels": "keep", "model.tail": tail, "plan.window": window}
    result = train_split(tmp_path / "run", model, cut, clients, settings, **keys)
    assert_same(result, train_plain(model, ends_of(model, cut, tail), clients, settings))
    kinds: Kinds = result.summary["bytes"]["kinds"]
    assert not kinds.keys() & {"labels", "ids"}
    assert result.summary["test_accuracy"] is not None
    if cut != "input":
        assert kinds["smashed"]["up"] == kinds["gradients"]["down"]
    assert kinds["smashed"]["down"] == kinds["gradients"]["up"]


def ends_of(model: Any, cut: str, tail: str) -> set[str]:
    """Return the names of the parameters before the cut and behind the tail."""
    fronts = {
        "input": (),
        "stem": ("stem",),
        "block.add": ("stem", "block"),
        "relu": ("conv1", "bn1", "conv2"),
    }
    tails = {"output": (), "bn2": ("fc",)}
    return names_up_to(model, *fronts[cut], *tails.get(tail, ("fc",)))
