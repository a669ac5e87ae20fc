"""`zsplit data`: who has how many samples of which label, as a table and as JSON."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from samples import config_of

from zsplit.data import ClientData, labels_of, open_data
from zsplit.data_cli import draw_holdings, list_holdings

Here = Callable[..., Any]

SHARDS = ("--set", "data.partition=shards:k=2", "--set", "schedule.clients=5")


def test_it_counts_what_the_clients_will_have(here: Here) -> None:
    ending = here("data", *SHARDS, "--json")
    assert ending.code == 0
    config = config_of(data__partition="shards:k=2", schedule__clients=5)
    data = open_data(config)
    labels = labels_of(data.train)
    for client, said in enumerate(json.loads(ending.out)):
        mine = ClientData(config, client, data)
        assert said["client"] == client
        assert (said["train"], said["validation"], said["test"]) == tuple(
            map(mine.size, ("train", "validation", "test"))
        )
        shard = [*mine.indices["train"].tolist(), *mine.indices["validation"].tolist()]
        assert said["labels"] == labels[shard].bincount(minlength=10).tolist()


def test_the_table_has_a_row_for_each_client_and_a_bar_for_each_label(here: Here) -> None:
    out = here("data", *SHARDS).out
    rows = [line for line in out.splitlines() if line.lstrip()[:1].isdigit()]
    assert "digits, data.partition = shards:k=2: 5 clients" in out
    assert len(rows) == 6
    assert all("█" in row and row.rstrip().endswith("%)") for row in rows[:5])
    assert rows[5].strip() == "0 to 9, a bar for each label; full: 144 samples. Counts: --json"


def test_the_partition_is_shown_as_it_is_written(here: Here) -> None:
    assert (
        "data.partition = labels:[[0],[1]]: 2 clients"
        in here("data", "--set", "data.partition=labels:[[0],[1]]", "--set", "schedule.clients=2").out
    )


def test_many_labels_share_bars() -> None:
    config = config_of(data__name="fake", data__classes=100, data__samples=3000)
    holdings = list_holdings(config)
    assert [sum(each.labels) for each in holdings] == [750] * 4
    assert {len(each.labels) for each in holdings} == {100}
    assert "a bar for 3 labels" in str(draw_holdings(config, holdings).caption)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (
            "schedule.clients=2000",
            "zsplit: schedule.clients = 2000 leaves client 1442 without a sample: there are 1442",
        ),
        ("data.partition=iit", 'zsplit: data.partition = "iit" does not exist: the nearest is "iid".'),
    ],
)
def test_what_cannot_be_is_one_sentence(here: Here, setting: str, sentence: str) -> None:
    ending = here("data", "--set", setting)
    assert ending.code == 2
    assert ending.err.startswith(sentence)
    assert not ending.out


def test_data_of_ones_own_have_to_be_allowed(here: Here) -> None:
    name = "data.name=test_data:make_numbered"
    refused, shown = here("data", "--set", name), here("data", "--set", name, "--allow", "test_data", "--json")
    assert "start the peer with --allow test_data" in refused.err
    assert sum(each["train"] + each["validation"] for each in json.loads(shown.out)) == 30
