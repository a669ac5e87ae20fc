"""A round as data: who trains which steps, beside whom."""

import doctest
from itertools import accumulate

import pytest
import torch
from helpers import config_of, configs, unhurried
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import Reference, Settings
from torch import nn

from zsplit.config import Config
from zsplit_broker import policy
from zsplit_broker.policy import Share, hands_back_on, merges_after, participants, picture, stages_of

counts = st.lists(st.integers(1, 12), min_size=4, max_size=4).map(lambda steps: dict(enumerate(steps)))
"""Steps of up to four clients."""

NO_DATA = (torch.zeros(0), torch.zeros(0))


def test_the_examples_in_the_documentation_are_right() -> None:
    config = config_of(schedule__policy="round_robin", schedule__clients=2)
    tried = doctest.testmod(policy, extraglobs={"config": config})
    assert (tried.failed, tried.attempted > 0) == (0, True)


@unhurried
@given(configs(), st.integers(0, 3), counts)
def test_every_participant_trains_all_its_steps_once_and_in_order(
    config: Config, round_: int, steps: dict[int, int]
) -> None:
    stages = stages_of(config, participants(config, round_), steps)
    trained: dict[int, list[int]] = {}
    for share in (share for stage in stages for share in stage):
        trained.setdefault(share.client, []).extend(range(share.first, share.first + share.steps))
    assert trained == {client: list(range(steps[client])) for client in participants(config, round_)}
    assert all(share.steps > 0 for stage in stages for share in stage)


@unhurried
@given(configs(("round_robin",)), st.integers(0, 3), counts)
def test_round_robin_is_one_client_a_stage_in_order(config: Config, round_: int, steps: dict[int, int]) -> None:
    stages = stages_of(config, participants(config, round_), steps)
    assert stages == [(Share(client, 0, steps[client]),) for client in participants(config, round_)]


@unhurried
@given(configs(("parallel",)), st.integers(0, 3), counts)
def test_parallel_clients_begin_together_and_keep_step_until_their_data_is_used_up(
    config: Config, round_: int, steps: dict[int, int]
) -> None:
    assume(not hands_back_on(config))
    stages = stages_of(config, participants(config, round_), steps)
    every = config.schedule.aggregate_every
    assert [share.client for share in stages[0]] == participants(config, round_)
    for stage in stages:
        clients = [share.client for share in stage]
        assert clients == sorted(set(clients))
        assert len({share.first for share in stage}) == 1
    lengths = [max(share.steps for share in stage) for stage in stages]
    if every == -1:
        assert len(stages) == 1
    else:
        assert set(lengths[:-1]) <= {every}
        assert lengths[-1] <= every
    assert [stage[0].first for stage in stages] == [0, *accumulate(lengths[:-1])]


@unhurried
@given(configs(), st.integers(0, 3), st.integers(0, 99))
def test_the_sample_is_sorted_and_the_one_that_the_reference_draws(config: Config, round_: int, seed: int) -> None:
    schedule = config.schedule
    config = config_of(
        run__seed=seed, schedule__clients=schedule.clients, schedule__clients_per_round=schedule.clients_per_round
    )
    settings = Settings(seed=seed, clients_per_round=schedule.clients_per_round)
    drawn = Reference(nn.Identity, [NO_DATA] * schedule.clients, settings).sampled(round_)
    assert participants(config, round_) == drawn
    assert len(drawn) == (schedule.clients_per_round or schedule.clients)


def test_samples_differ_from_round_to_round() -> None:
    config = config_of(schedule__clients=20, schedule__clients_per_round=5)
    assert len({tuple(participants(config, round_)) for round_ in range(10)}) > 1


@pytest.mark.parametrize(
    ("every", "drawn"),
    [
        (-1, ["stage 0   client 0: steps 0 to 4   client 1: steps 0 to 1"]),
        (
            2,
            [
                "stage 0   client 0: steps 0 to 1   client 1: steps 0 to 1",
                "stage 1   client 0: steps 2 to 3",
                "stage 2   client 0: steps 4 to 4",
            ],
        ),
    ],
)
def test_unequal_shards_drawn(every: int, drawn: list[str]) -> None:
    config = config_of(schedule__clients=2, schedule__aggregate_every=every)
    assert picture(stages_of(config, [0, 1], {0: 5, 1: 2})).splitlines() == drawn


def test_a_back_that_is_handed_on_goes_from_client_to_client_until_all_have_done_as_many_steps() -> None:
    config = config_of(
        schedule__clients=2,
        schedule__aggregate_every=2,
        schedule__server_model="shared",
        schedule__shared_order="turn",
    )
    stages = stages_of(config, [0, 1], {0: 5, 1: 2})
    assert picture(stages).splitlines() == [
        "stage 0   client 0: steps 0 to 1",
        "stage 1   client 1: steps 0 to 1",
        "stage 2   client 0: steps 2 to 3",
        "stage 3   client 0: steps 4 to 4",
    ]
    assert [merges_after(config, stages, number) for number in range(4)] == [False, True, True, True]
