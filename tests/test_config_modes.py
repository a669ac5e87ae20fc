"""Configs of policies, shared backs, cuts of single clients, rates and averages: what cannot be gets a sentence."""

from typing import Any

import pytest

from zsplit import load_config
from zsplit.config import cut_of
from zsplit.errors import ConfigError

ONE_TABLE = [{"clients": "1", "cut": 2}]

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"train.lr_step": 3}, 'train.lr_step = 3 means nothing under train.lr_schedule = "constant": leave it out'),
    ({"train.lr_gamma": 0.5, "train.lr_schedule": "cosine"}, "train.lr_gamma = 0.5 means nothing under"),
    ({"train.lr_epochs": 5, "train.lr_schedule": "step"}, 'or set train.lr_schedule = "cosine".'),
    ({"train.lr_schedule": "multistep"}, "needs train.lr_milestones, such as [60, 120, 160]."),
    (
        {"train.lr_schedule": "multistep", "train.lr_milestones": [9, 3, 9]},
        "train.lr_milestones = [9, 3, 9] is not in order: write [3, 9].",
    ),
    ({"schedule.shared_order": "turn"}, 'schedule.shared_order = "turn" means nothing under schedule.server_model = '),
    (
        {"schedule.server_model": "shared", "schedule.policy": "round_robin"},
        'schedule.server_model = "shared" means nothing under schedule.policy = "round_robin": leave it out',
    ),
    (
        {"schedule.server_model": "fused", "model.client": ONE_TABLE},
        'schedule.server_model = "fused" has one back, which cannot begin at different cuts',
    ),
    (
        {"schedule.server_model": "fused", "model.cut": "auto"},
        'schedule.server_model = "fused" has one back, and model.cut = "auto" may cut for each client elsewhere',
    ),
    ({"schedule.server_model": "fused", "train.clip_norm": 1.0}, "train.clip_norm = 1.0 has no meaning for one back"),
    (
        {"schedule.server_model": "shared", "train.labels": "keep"},
        'schedule.server_model = "shared" cannot be with train.labels = "keep", where the loss is the client\'s',
    ),
    (
        {"schedule.server_model": "fused", "model.cut": "output"},
        'schedule.server_model = "fused" cannot be with model.cut = "output"',
    ),
    (
        {"model.cut": "output", "codec.up": "half"},
        'codec.up = "half" means nothing under model.cut = "output", where no tensors cross but weights',
    ),
    (
        {"model.cut": "output", "codec.down": "quantize:bits=8"},
        'codec.down = "quantize:bits=8" means nothing under model.cut = "output"',
    ),
    ({"schedule.mixing": 0.5}, 'schedule.mixing = 0.5 means nothing under schedule.policy = "parallel"'),
    ({"schedule.max_staleness": 2}, "schedule.max_staleness = 2 means nothing under"),
    (
        {"schedule.policy": "async", "schedule.optimizer_state": "carry"},
        'schedule.optimizer_state = "carry" cannot be under schedule.policy = "async"',
    ),
    (
        {"schedule.policy": "async", "schedule.clients_per_round": 2},
        'schedule.clients_per_round = 2 means nothing under schedule.policy = "async", where rounds do not begin',
    ),
    (
        {"model.client": ONE_TABLE, "schedule.policy": "round_robin"},
        '[[model.client]] tables cannot be under schedule.policy = "round_robin", where the front is handed on',
    ),
    ({"model.client": ONE_TABLE, "train.micro_batches": "auto"}, "[[model.client]] tables fix what the planner is to"),
    (
        {"model.client": [{"clients": "2-9", "cut": 1}]},
        'The [[model.client]] table of clients = "2-9" names client 9: with schedule.clients = 4 the last one is 3.',
    ),
    ({"model.client": [{"clients": "1", "cut": "auto"}]}, 'sets cut = "auto": name a place'),
    (
        {"aggregate.exclude": ["*bn*"], "schedule.policy": "round_robin"},
        'aggregate.exclude = ["*bn*"] needs a model of its own for each client',
    ),
    ({"run.patience": 2, "run.eval_every": 0}, "run.patience = 2 needs evaluations on validation data: set run.eval_"),
    ({"run.patience": 2, "data.val_fraction": 0}, "set data.val_fraction above 0."),
]


@pytest.mark.parametrize(("values", "sentence"), REFUSED, ids=[sentence[:40] for _, sentence in REFUSED])
def test_what_cannot_be_gets_a_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, values)
    assert sentence in str(refused.value)


def test_the_last_table_says_where_a_client_is_cut() -> None:
    tables = [{"clients": "0-2", "cut": "relu1"}, {"clients": "2", "cut": 5}]
    config = load_config(None, {"model.cut": "pool", "model.client": tables})
    assert [cut_of(config, client) for client in range(4)] == ["relu1", "relu1", 5, "pool"]


def test_clients_that_do_not_wait_have_a_fresh_optimizer_in_every_turn() -> None:
    assert load_config(None, {"schedule.policy": "async"}).schedule.optimizer_state == "reset"
