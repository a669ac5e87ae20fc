"""Split training is training: real processes over the real wire end with the reference's weights, bit for bit."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from nets import Idle, Normed, Plain, SmallResidual, images
from reference import Reference, Settings, deal, derive
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from zsplit import from_datasets, load_config, run_here
from zsplit.launch import Result
from zsplit.results import open_run

SAMPLES, TESTS = 70, 22

SUMMED = 1e-12
"""How far a mean of float64 sums may be off: the clients' are added in the order in which they come."""

BASE = {
    "data.name": "own",
    "data.val_fraction": 0.0,
    "broker.port": 0,
    "server.threads": 1,
    "client.threads": 1,
    "server.device": "cpu",
    "client.device": "cpu",
    "link.beat_seconds": 0.5,
}


def train_split(out: Path, model: nn.Module, cut: str, clients: int, settings: Settings, **keys: object) -> Result:
    """Train with one server and the clients as processes."""
    train, test = images(SAMPLES), images(TESTS, seed=1)
    config = load_config(
        None,
        {
            **BASE,
            "run.seed": settings.seed,
            "run.rounds": settings.rounds,
            "model.cut": cut,
            "train.batch_size": settings.batch_size,
            "train.local_epochs": settings.local_epochs,
            "train.micro_batches": settings.micro_batches,
            "train.batch_norm": settings.batch_norm,
            "train.optimizer": settings.optimizer,
            "train.client_lr": settings.client_lr,
            "train.server_lr": settings.server_lr,
            "train.momentum": settings.momentum,
            "train.nesterov": settings.nesterov,
            "train.weight_decay": settings.weight_decay,
            "train.clip_norm": settings.clip_norm,
            "schedule.clients": clients,
            "schedule.clients_per_round": settings.clients_per_round,
            "schedule.policy": settings.policy,
            "schedule.weighting": settings.weighting,
            "schedule.optimizer_state": settings.optimizer_state,
            **({"schedule.aggregate_every": settings.aggregate_every} if settings.policy == "parallel" else {}),
            **keys,
        },
    )
    data = from_datasets(TensorDataset(*train), TensorDataset(*test), classes=10)
    return run_here(config, str(out), model, data)


def train_plain(model: nn.Module, front: set[str], clients: int, settings: Settings) -> dict[str, Tensor]:
    """Return the last version of the reference."""
    return reference_of(model, front, clients, settings).train()[0][-1]


def reference_of(
    model: nn.Module, front: set[str], clients: int, settings: Settings, val_fraction: float = 0.0
) -> Reference:
    """Return the reference for the clients' training data."""
    torch.set_num_threads(1)
    x, y = images(SAMPLES)
    shards = [(x[train], y[train]) for train, _ in deal(settings.seed, SAMPLES, clients, val_fraction)]
    return Reference(lambda: deepcopy(model), shards, settings, front, type(model).RANDOM)


def names_up_to(model: nn.Module, *modules: str) -> set[str]:
    """Return the names of the parameters of these modules: what the front holds."""
    return {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{m}." for m in modules))}


def assert_same(result: Result, expected: dict[str, Tensor]) -> None:
    """Compare names, dtypes and bits of the whole version: weights, buffers, optimizer."""
    assert result.ok, result.sentence
    version = load_file(result.folder / "versions" / f"{result.summary['versions'][-1]}.safetensors")
    assert sorted(version) == sorted(expected)
    for name, tensor in expected.items():
        assert version[name].dtype == tensor.dtype, name
        assert torch.equal(version[name], tensor), name
    exported = load_file(result.folder / "model.safetensors")
    plain = {name: tensor for name, tensor in expected.items() if not name.startswith(("optimizer/", "local/"))}
    assert sorted(exported) == sorted(plain)
    assert all(torch.equal(exported[name], tensor) for name, tensor in plain.items())


SGD = Settings(rounds=2, batch_size=8, client_lr=0.05, server_lr=0.05, momentum=0.9, weight_decay=1e-3, seed=3)
ADAM = replace(SGD, optimizer="adam", momentum=0.0, client_lr=0.01, server_lr=0.01)

CASES: dict[str, tuple[int, Settings]] = {
    "round-robin, carry": (3, replace(SGD, policy="round_robin")),
    "round-robin, reset": (3, replace(SGD, policy="round_robin", optimizer_state="reset")),
    "round-robin, local": (3, replace(SGD, policy="round_robin", optimizer_state="local")),
    "round-robin, carry, adam": (3, replace(ADAM, policy="round_robin")),
    "round-robin, two rates": (2, replace(SGD, policy="round_robin", client_lr=0.01, nesterov=True)),
    "round-robin, a sample of the clients": (3, replace(SGD, policy="round_robin", clients_per_round=2)),
    "round-robin, micro-batches": (2, replace(SGD, policy="round_robin", micro_batches=3)),
    "round-robin, clipped": (2, replace(SGD, policy="round_robin", clip_norm=0.5, micro_batches=2)),
    "parallel, carry": (3, replace(SGD, policy="parallel")),
    "parallel, carry, two aggregations a round": (3, replace(SGD, policy="parallel", aggregate_every=2)),
    "parallel, unequal steps": (3, replace(SGD, policy="parallel", batch_size=23, aggregate_every=1)),
    "parallel, reset": (3, replace(SGD, policy="parallel", aggregate_every=2, optimizer_state="reset")),
    "parallel, local": (3, replace(SGD, policy="parallel", aggregate_every=2, optimizer_state="local")),
    "parallel, carry, adam, local epochs": (3, replace(ADAM, policy="parallel", local_epochs=2)),
    "parallel, uniform": (3, replace(SGD, policy="parallel", weighting="uniform")),
    "parallel, a sample of the clients, local": (
        3,
        replace(SGD, policy="parallel", clients_per_round=2, optimizer_state="local", rounds=3),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_split_run_ends_with_the_weights_of_the_reference(case: str, tmp_path: Path) -> None:
    clients, settings = CASES[case]
    torch.manual_seed(11)
    model = SmallResidual()
    result = train_split(tmp_path / "run", model, "block.add", clients, settings)
    front = names_up_to(model, "stem", "block")
    assert_same(result, train_plain(model, front, clients, settings))


# (clients, window, settings) with batches of 10, 10, 10 and 5 (two clients) or 10, 10 and 3 or 4 (three): 3 and 8
# slices are not equal, and where 8 are asked for the last batch has fewer samples. M of 1, 2 and 3 are above, too.
MICRO_BATCHES: dict[str, tuple[int, int, Settings]] = {
    "round-robin, 8 in a window of 3": (2, 3, replace(SGD, policy="round_robin", micro_batches=8)),
    "parallel, 2, not deferred": (3, 0, replace(SGD, policy="parallel", micro_batches=2, batch_norm="micro")),
    "parallel, 3 in a window of 2": (3, 2, replace(SGD, policy="parallel", micro_batches=3, aggregate_every=2)),
    "parallel, 8 in a window of 1, clipped": (2, 1, replace(SGD, policy="parallel", micro_batches=8, clip_norm=0.5)),
}


@pytest.mark.parametrize("case", MICRO_BATCHES)
def test_micro_batches_on_both_sides_of_batch_norm_end_with_the_weights_of_the_reference(
    case: str, tmp_path: Path
) -> None:
    clients, window, settings = MICRO_BATCHES[case]
    settings = replace(settings, batch_size=10)
    torch.manual_seed(11)
    model = Normed()
    result = train_split(tmp_path / "run", model, "relu", clients, settings, **{"plan.window": window})
    assert_same(result, train_plain(model, names_up_to(model, "conv1", "bn1", "conv2"), clients, settings))


@pytest.mark.parametrize("cut", ["stem", "block.relu_1", "flatten", "drop"])
def test_where_the_model_is_cut_changes_no_bit(cut: str, tmp_path: Path) -> None:
    settings = replace(SGD, policy="round_robin")
    torch.manual_seed(11)
    model = SmallResidual()
    result = train_split(tmp_path / "run", model, cut, 1, settings)
    assert_same(result, train_plain(model, set(), 1, settings))


@pytest.mark.parametrize("settings", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("policy", ["round_robin", "parallel"])
def test_a_parameter_that_gets_no_gradient_gets_no_buffers(
    policy: Literal["round_robin", "parallel"], settings: Settings, tmp_path: Path
) -> None:
    settings = replace(settings, policy=policy)
    torch.manual_seed(11)
    model = Idle()
    result = train_split(tmp_path / "run", model, "fc1", 2, settings)
    expected = train_plain(model, names_up_to(model, "fc1"), 2, settings)
    assert_same(result, expected)
    buffers = {name for name in expected if name.startswith("optimizer/")}
    assert any(name.endswith("/fc2.weight") for name in buffers)
    assert not any(name.endswith(("/unused", "/fc2.bias")) for name in buffers)


def test_a_model_named_in_the_config_is_built_from_the_seed(tmp_path: Path) -> None:
    config: dict[str, Any] = {**BASE, "data.name": "digits", "run.rounds": 1, "schedule.clients": 1, "run.seed": 5}
    result = run_here(load_config(None, config), str(tmp_path / "run"))
    assert result.ok, result.sentence
    from zsplit.data import ClientData, open_data
    from zsplit.model import zoo

    settings = load_config(None, config)
    mine = ClientData(settings, 0, open_data(settings))
    batches = [mine.train_batch(0, step) for step in range(mine.steps_per_round)]
    torch.set_num_threads(1)
    torch.manual_seed(derive(5, "init"))
    model = zoo.build("digits/cnn", 10, 5, (1, 8, 8))
    train = settings.train
    optimizer = torch.optim.SGD(
        model.parameters(), train.lr, train.momentum, weight_decay=train.weight_decay, foreach=False, fused=False
    )
    for x, y in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    exported = load_file(result.folder / "model.safetensors")
    fresh = zoo.build("digits/cnn", 10, 0, (1, 8, 8))
    fresh.load_state_dict(exported)
    assert all(torch.equal(tensor, exported[name]) for name, tensor in model.state_dict().items())


def test_evaluation_sums_are_those_of_the_uncut_model(tmp_path: Path) -> None:
    settings = replace(SGD, policy="parallel")
    torch.manual_seed(11)
    model = Plain()
    result = train_split(tmp_path / "run", model, "relu1", 3, settings)
    expected = train_plain(model, set(), 3, settings)
    assert_same(result, expected)
    model.load_state_dict({name: t for name, t in expected.items() if not name.startswith("optimizer/")})
    model.eval()
    x, y = images(TESTS, seed=1)
    with torch.no_grad():
        outputs = model(x)
    right = (outputs.argmax(1) == y).sum().item()
    assert result.summary["test_accuracy"] == right / TESTS
    loss = torch.nn.functional.cross_entropy(outputs, y).item()
    assert result.summary["test_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("optimizer_state", ["carry", "local"])
@pytest.mark.parametrize("policy", ["round_robin", "parallel"])
def test_rounds_that_are_evaluated_end_with_the_same_weights_and_the_figures_of_the_uncut_model(
    policy: Literal["round_robin", "parallel"], optimizer_state: Literal["carry", "local"], tmp_path: Path
) -> None:
    clients, fraction = 3, 0.3
    settings = replace(SGD, policy=policy, optimizer_state=optimizer_state, rounds=3)
    torch.manual_seed(11)
    model = SmallResidual()
    result = train_split(tmp_path / "run", model, "block.add", clients, settings, **{"data.val_fraction": fraction})
    reference = reference_of(model, names_up_to(model, "stem", "block"), clients, settings, fraction)
    versions, losses = reference.train()
    assert_same(result, versions[-1])
    x, y = images(SAMPLES)
    held_out = [validation for _, validation in deal(settings.seed, SAMPLES, clients, fraction)]
    rounds = open_run(result.folder).rounds()
    assert len(rounds) == settings.rounds
    for event, version, loss in zip(rounds, versions[1:], losses, strict=True):
        assert event.train_loss == pytest.approx(loss, rel=SUMMED)
        scores = [reference.evaluate(version, x[own], y[own]) for own in held_out]
        samples = sum(score.samples for score in scores)
        assert event.val_loss == pytest.approx(sum(score.loss for score in scores) / samples, rel=SUMMED)
        assert event.val_accuracy == sum(score.top1 for score in scores) / samples
        assert event.val_top5 == sum(score.top5 for score in scores) / samples
