"""Every way to share a back, to average and to choose rates ends with the reference's weights, bit for bit."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from nets import Plain, SmallResidual, Stack, images
from reference import Reference, Settings, deal
from reference_shared import SharedReference, train_async
from safetensors.torch import load_file
from test_exact import SAMPLES, SGD, assert_same, names_up_to, train_plain, train_split

from zsplit import load_config
from zsplit.wire.messages import Merge, Turn
from zsplit_broker.events import Entry, Open
from zsplit_broker.journal import Journal
from zsplit_broker.scheduler import Scheduler

PARALLEL = replace(SGD, policy="parallel", batch_size=10)

SHARED: dict[str, tuple[str, int, Settings]] = {
    "step by step": ("step", 3, PARALLEL),
    "step by step, two aggregations a round, micro-batches": (
        "step",
        3,
        replace(PARALLEL, aggregate_every=2, micro_batches=3),
    ),
    "step by step, reset, uniform": (
        "step",
        3,
        replace(PARALLEL, aggregate_every=2, optimizer_state="reset", weighting="uniform"),
    ),
    "a sample of the clients": ("step", 3, replace(PARALLEL, clients_per_round=2, rounds=3)),
    "turn by turn": ("turn", 3, replace(PARALLEL, local_epochs=2)),
    "turn by turn, two aggregations a round, reset": (
        "turn",
        3,
        replace(PARALLEL, aggregate_every=2, optimizer_state="reset"),
    ),
    "fused": ("fused", 3, PARALLEL),
    "fused, unequal slices": ("fused", 3, replace(PARALLEL, batch_size=23, micro_batches=4, aggregate_every=1)),
    "fused, reset, 8 micro-batches of 3 or 4 samples": (
        "fused",
        3,
        replace(PARALLEL, micro_batches=8, optimizer_state="reset"),
    ),
}


@pytest.mark.parametrize("case", SHARED)
def test_clients_that_share_a_back_end_with_the_weights_of_the_reference(case: str, tmp_path: Path) -> None:
    mode, clients, settings = SHARED[case]
    torch.manual_seed(11)
    model = Stack()
    keys = {"server_model": "fused"} if mode == "fused" else {"server_model": "shared", "shared_order": mode}
    result = train_split(
        tmp_path / "run", model, "front.3", clients, settings, **{f"schedule.{k}": v for k, v in keys.items()}
    )
    torch.set_num_threads(1)
    x, y = images(SAMPLES)
    shards = [(x[train], y[train]) for train, _ in deal(settings.seed, SAMPLES, clients)]
    front = names_up_to(model, "front")
    reference = SharedReference(
        lambda m: (m.front, m.back), mode, lambda: deepcopy(model), shards, settings, front, Stack.RANDOM
    )
    assert_same(result, reference.train()[0][-1])


def test_fused_clients_that_aggregate_every_step_train_the_uncut_model_on_the_union(tmp_path: Path) -> None:
    settings = replace(PARALLEL, momentum=0.0, weight_decay=0.0, aggregate_every=1, rounds=2)
    torch.manual_seed(11)
    model = Plain()
    result = train_split(tmp_path / "run", model, "relu1", 3, settings, **{"schedule.server_model": "fused"})
    x, y = images(SAMPLES)
    shards = [train for train, _ in deal(settings.seed, SAMPLES, 3)]
    reference = Reference(lambda: deepcopy(model), [(x[s], y[s]) for s in shards], settings)
    plain = deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), settings.client_lr)
    for round_ in range(settings.rounds):
        orders = [dict(reference.steps(client, round_)) for client in range(3)]
        for step in range(max(map(len, orders))):
            union = torch.cat(
                [shard[order[step]] for shard, order in zip(shards, orders, strict=True) if step in order]
            )
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(plain(x[union]), y[union]).backward()
            optimizer.step()
    exported = load_file(result.folder / "model.safetensors")
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(exported[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "rates",
    [
        {"lr_schedule": "step", "lr_step": 2, "lr_gamma": 0.5},
        {"lr_schedule": "multistep", "lr_milestones": (1, 3), "lr_gamma": 0.3},
        {"lr_schedule": "cosine"},
    ],
    ids=lambda rates: rates["lr_schedule"],
)
@pytest.mark.parametrize("policy", ["round_robin", "parallel"])
def test_learning_rates_follow_the_epochs(policy: str, rates: dict[str, Any], tmp_path: Path) -> None:
    settings = replace(SGD, policy=policy, local_epochs=2, **rates)
    torch.manual_seed(11)
    model = SmallResidual()
    keys = {f"train.{key}": value for key, value in rates.items()}
    result = train_split(tmp_path / "run", model, "block.add", 2, settings, **keys)
    assert_same(result, train_plain(model, names_up_to(model, "stem", "block"), 2, settings))


@pytest.mark.parametrize("state", ["carry", "local", "reset"])
def test_excluded_names_stay_with_their_clients(state: str, tmp_path: Path) -> None:
    settings = replace(PARALLEL, exclude=("*bn1*",), optimizer_state=state, aggregate_every=2)
    torch.manual_seed(11)
    model = SmallResidual()
    keys = {"aggregate.exclude": ["*bn1*"]}
    result = train_split(tmp_path / "run", model, "block.add", 3, settings, **keys)
    assert_same(result, train_plain(model, names_up_to(model, "stem", "block"), 3, settings))


def test_clients_may_be_cut_in_different_places(tmp_path: Path) -> None:
    torch.manual_seed(11)
    model = SmallResidual()
    tables = [{"clients": "1", "cut": "flatten"}, {"clients": "2", "cut": 0}]
    result = train_split(tmp_path / "run", model, "block.add", 3, PARALLEL, **{"model.client": tables})
    assert_same(result, train_plain(model, set(), 3, PARALLEL))
    assert [plan["cut"] for plan in result.summary["plan"].values()] == ["block.add", "flatten", "stem"]


def test_clients_that_do_not_wait_end_with_the_weights_of_the_reference_in_their_order_of_arrival(
    tmp_path: Path,
) -> None:
    settings = replace(SGD, policy="async", optimizer_state="reset", rounds=4, batch_size=6)
    torch.manual_seed(11)
    model = SmallResidual()
    result = train_split(tmp_path / "run", model, "block.add", 3, settings, **{"schedule.mixing": 0.7})
    arrivals, shares = arrivals_in(tmp_path / "run")
    assert len(arrivals) == 12
    torch.set_num_threads(1)
    x, y = images(SAMPLES)
    shards = [(x[train], y[train]) for train, _ in deal(settings.seed, SAMPLES, 3)]
    front = names_up_to(model, "stem", "block")
    reference = Reference(lambda: deepcopy(model), shards, settings, front, SmallResidual.RANDOM)
    assert_same(result, train_async(reference, arrivals, 0.7, 0.5)[-1])
    assert shares == [0.7 * (number - base + 1) ** -0.5 for number, (_, _, base) in enumerate(arrivals)]


def arrivals_in(folder: Path) -> tuple[list[tuple[int, int, int]], list[float]]:
    """Return (client, its round, version it began with) of each result that was mixed in, and its share."""
    scheduler = Scheduler(load_config(folder / "config.toml"))
    versions: dict[str, int] = {}
    begun: dict[int, Turn] = {}
    arrivals, shares = [], []
    with Journal.open(folder) as journal:
        for line in journal.entries:
            for said in scheduler.handle(msgspec.json.decode(line, type=Entry)):
                if scheduler.version is not None:
                    versions.setdefault(scheduler.version.digest, len(versions))
                match said:
                    case Open(Merge(inputs=(contribution,), share=share)):
                        turn = begun[contribution.client]
                        arrivals.append((turn.client, turn.round, versions[turn.base.digest]))
                        shares.append(share)
                    case Open(Turn() as turn):
                        begun[turn.client] = turn
    return arrivals, shares
