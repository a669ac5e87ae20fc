"""Who has which training samples: disjoint where meant to be, complete, and the same wherever it is computed."""

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import config_of, numbered_data, permutation
from torch import Tensor

from zsplit.config import load_config
from zsplit.config.partition import ByLabel, Dirichlet, FromFile, Iid, Quantity, Replicate, Shards, parse_partition
from zsplit.data import ClientData, shards
from zsplit.errors import ConfigError, DataError

alphas = st.floats(1e-3, 1e3)
seeds = st.integers(0, 2**40)

GOLDEN = [[18, 0, 2], [2, 18, 0], [0, 2, 18]]
"""Samples of each label, for each of three clients."""


def dealt(partition: str, labels: Tensor, clients: int, seed: int = 0) -> list[Tensor]:
    """Return the parts of samples that have these labels."""
    config = config_of(data__partition=partition, schedule__clients=clients, run__seed=seed)
    return shards(config, len(labels), lambda: labels)


def labels_like(n: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def assert_dealt_out(parts: list[Tensor], n: int) -> None:
    """Every sample has one owner."""
    assert sorted(torch.cat(parts).tolist()) == list(range(n))


def refusal(partition: str, n: int = 40, clients: int = 4) -> str:
    with pytest.raises(ConfigError) as caught:
        dealt(partition, torch.arange(n) % 10, clients)
    return str(caught.value)


class TestText:
    @pytest.mark.parametrize(
        ("text", "meant"),
        [
            ("iid", Iid()),
            ("replicate", Replicate()),
            ("dirichlet:alpha=0.5", Dirichlet(0.5)),
            ("dirichlet:alpha=1e-2", Dirichlet(0.01)),
            ("shards:k=2", Shards(2)),
            ("quantity:alpha=3", Quantity(3.0)),
            ("labels:[[0, 1], [2]]", ByLabel(((0, 1), (2,)))),
            ("file:~/a=b.json", FromFile("~/a=b.json")),
        ],
    )
    def test_it_means_what_it_says(self, text: str, meant: object) -> None:
        assert parse_partition(text) == meant

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("iit", 'does not exist: the nearest is "iid".'),
            (
                "by-moon",
                "does not exist: there are iid, replicate, dirichlet, shards, quantity, labels, file.",
            ),
            ("drichlet:alpha=1", 'names "drichlet", which does not exist: the nearest is "dirichlet".'),
            (
                "dirichlet",
                "ends too early: write dirichlet:alpha=A with A above 0, such as dirichlet:alpha=0.5.",
            ),
            ("dirichlet:alpa=1", 'cannot be read from character 11 on, "alpa=1": write dirichlet:alpha=A'),
            ("dirichlet:alpha=0", 'cannot be read from character 17 on, "0": write dirichlet:alpha=A with A above 0'),
            ("dirichlet:alpha=nan", 'cannot be read from character 17 on, "nan": write dirichlet:alpha=A'),
            ("quantity:alpha=", "ends too early: write quantity:alpha=A"),
            ("shards:k=2.5", 'cannot be read from character 10 on, "2.5": write shards:k=K with a whole number'),
            ("iid:3", 'cannot be read from character 4 on, ":3": write iid.'),
            ("replicate:", 'cannot be read from character 10 on, ":": write replicate.'),
            ("labels:[[0,1],[2,]]", 'cannot be read from character 18 on, "]]": write labels: and a list of labels'),
            ("labels:[[0,0]]", 'cannot be read from character 8 on, "[[0,0]]": write labels: and a list of labels'),
            ("labels:[[0],[]]", "cannot be read from character 8 on"),
            ("labels:[[true]]", "cannot be read from character 8 on"),
            ("file:", "ends too early: write file: and the path of a file with the samples of each client"),
        ],
    )
    def test_what_cannot_be_read_is_pointed_at_before_anything_starts(self, text: str, sentence: str) -> None:
        with pytest.raises(ConfigError) as caught:
            load_config(None, {"data.partition": text})
        assert str(caught.value).startswith(f'data.partition = "{text}" ')
        assert sentence in str(caught.value)

    def test_labels_have_a_list_for_each_client(self) -> None:
        with pytest.raises(ConfigError) as caught:
            config_of(data__partition="labels:[[0],[1]]", schedule__clients=3)
        assert str(caught.value) == (
            'data.partition = "labels:[[0],[1]]" has 2 lists for schedule.clients = 3: give each client one.'
        )

    def test_a_file_and_a_size_contradict_each_other(self) -> None:
        with pytest.raises(
            ConfigError, match=r"data\.train_size = 9 means nothing with .*: leave one of the two out\."
        ):
            config_of(data__partition="file:a.json", data__train_size=9)


class TestIid:
    def test_iid_is_the_permutation_cut_into_parts(self) -> None:
        parts = shards(config_of(schedule__clients=3, run__seed=5), 11)
        expected = permutation(11, 5, "partition").tensor_split(3)
        assert [part.tolist() for part in parts] == [part.tolist() for part in expected]

    @given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**40))
    def test_iid_gives_each_sample_to_one_client(self, n: int, clients: int, seed: int) -> None:
        clients = min(n, clients)
        parts = shards(config_of(schedule__clients=clients, run__seed=seed), n)
        assert sorted(torch.cat(parts).tolist()) == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1

    def test_a_client_without_a_sample_is_refused(self) -> None:
        with pytest.raises(ConfigError) as caught:
            shards(config_of(schedule__clients=5), 4)
        assert str(caught.value) == (
            "schedule.clients = 5 leaves client 4 without a sample: there are 4 training samples, "
            "take 4 clients at most."
        )

    def test_a_seed_of_their_own_gives_other_parts(self) -> None:
        one, other = (dealt("iid", torch.zeros(40), 2, seed)[0].tolist() for seed in (0, 1))
        assert one != other


class TestReplicate:
    def test_everybody_has_everything(self) -> None:
        parts = dealt("replicate", torch.zeros(9), 3)
        assert [part.tolist() for part in parts] == [list(range(9))] * 3

    def test_all_hold_the_same_samples_out_and_each_validates_on_its_share(self) -> None:
        config = config_of(data__partition="replicate", schedule__clients=3, data__val_fraction=0.3)
        mine = [ClientData(config, index, numbered_data(20)) for index in range(3)]
        held_out = torch.cat([each.indices["validation"] for each in mine]).tolist()
        assert len(held_out) == len(set(held_out)) == 6
        for each in mine:
            assert sorted([*each.indices["train"].tolist(), *held_out]) == list(range(20))

    def test_each_client_goes_through_them_in_an_order_of_its_own(self) -> None:
        config = config_of(data__partition="replicate", schedule__clients=2)
        one, other = (ClientData(config, index, numbered_data(64)).train_ids(0, 0).tolist() for index in range(2))
        assert one != other


class TestDirichlet:
    @given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 12), alphas, seeds)
    def test_each_sample_has_one_owner_and_sizes_differ_by_one_at_most(
        self, n: int, clients: int, classes: int, alpha: float, seed: int
    ) -> None:
        clients = min(n, clients)
        parts = dealt(f"dirichlet:alpha={alpha}", labels_like(n, classes, seed % 7), clients, seed)
        assert_dealt_out(parts, n)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1

    @given(seeds)
    def test_it_is_the_same_wherever_it_is_computed(self, seed: int) -> None:
        labels = labels_like(100, 5)
        one, other = (dealt("dirichlet:alpha=0.3", labels, 4, seed) for _ in range(2))
        assert all(map(torch.equal, one, other))

    def test_its_draws_are_written_down_so_that_other_versions_of_numpy_are_noticed(self) -> None:
        parts = dealt("dirichlet:alpha=0.5", torch.arange(60) % 3, 3)
        assert [(torch.arange(60) % 3)[part].bincount(minlength=3).tolist() for part in parts] == GOLDEN

    def test_a_small_alpha_separates_labels_and_a_large_one_mixes_them(self) -> None:
        labels = torch.arange(2000) % 10

        def largest_shares(alpha: float) -> float:
            parts = dealt(f"dirichlet:alpha={alpha}", labels, 10)
            return sum(labels[part].bincount().max().item() / len(part) for part in parts) / len(parts)

        assert largest_shares(0.01) > 0.8
        assert largest_shares(1000) < 0.15

    def test_alphas_that_would_underflow_still_deal_everything_out(self) -> None:
        assert_dealt_out(dealt("dirichlet:alpha=1e-9", torch.arange(200) % 10, 7), 200)


class TestShards:
    @given(st.integers(1, 5), st.integers(1, 10), seeds)
    def test_each_sample_has_one_owner(self, k: int, clients: int, seed: int) -> None:
        n = 7 * k * clients
        parts = dealt(f"shards:k={k}", labels_like(n, 10, seed % 7), clients, seed)
        assert_dealt_out(parts, n)
        assert {len(part) for part in parts} == {7 * k}

    def test_a_client_has_the_labels_of_its_pieces(self) -> None:
        labels = torch.arange(100) % 10
        parts = dealt("shards:k=2", labels, 5)
        assert [len(labels[part].unique()) for part in parts] == [2] * 5

    def test_pieces_without_a_sample_are_refused(self) -> None:
        assert refusal("shards:k=30", n=4, clients=4) == (
            'data.partition = "shards:k=30" leaves client 3 without a sample: '
            "4 samples make 4 pieces at most, take fewer than 30 for each of 4 clients."
        )


class TestQuantity:
    @given(st.integers(100, 300), st.integers(1, 5), st.floats(0.3, 100), seeds)
    def test_each_sample_has_one_owner_and_each_client_a_sample(
        self, n: int, clients: int, alpha: float, seed: int
    ) -> None:
        parts = dealt(f"quantity:alpha={alpha}", torch.zeros(n), clients, seed)
        assert_dealt_out(parts, n)
        assert all(map(len, parts))

    def test_sizes_differ_more_where_alpha_is_small(self) -> None:
        small, large = (
            sorted(map(len, dealt(f"quantity:alpha={alpha}", torch.zeros(1000), 4))) for alpha in (0.3, 1e4)
        )
        assert small[-1] - small[0] > 200
        assert large[-1] - large[0] < 50

    def test_no_labels_are_needed(self) -> None:
        assert len(shards(config_of(data__partition="quantity:alpha=5"), 400)) == 4

    def test_where_a_hundred_draws_leave_clients_empty_it_is_refused(self) -> None:
        found = refusal("quantity:alpha=0.0001", n=400, clients=40)
        assert found.startswith('data.partition = "quantity:alpha=0.0001" leaves client ')
        assert found.endswith(" without a sample: so did 100 draws, take a larger alpha or fewer clients.")


class TestLabels:
    def test_each_client_has_the_samples_of_its_labels(self) -> None:
        labels = torch.arange(40) % 4
        parts = dealt("labels:[[0,1],[3]]", labels, 2)
        assert [sorted(labels[part].unique().tolist()) for part in parts] == [[0, 1], [3]]
        assert [len(part) for part in parts] == [20, 10]

    @given(st.lists(st.lists(st.integers(0, 4), min_size=1, unique=True), min_size=1, max_size=5), seeds)
    def test_samples_of_a_label_of_several_clients_have_one_owner_each(self, lists: list[list[int]], seed: int) -> None:
        labels = torch.arange(60) % 5
        parts = dealt(f"labels:{json.dumps(lists)}", labels, len(lists), seed)
        owned = torch.cat(parts)
        wanted = {label for each in lists for label in each}
        assert len(owned) == len(owned.unique()) == 12 * len(wanted)
        for part, each in zip(parts, lists, strict=True):
            assert set(labels[part].tolist()) == set(each)

    def test_a_label_that_no_sample_has_is_refused_where_a_client_has_no_other(self) -> None:
        assert refusal("labels:[[0],[17]]", clients=2) == (
            'data.partition = "labels:[[0],[17]]" leaves client 1 without a sample: '
            "no sample of the labels [17] is left for it, list others."
        )


class TestFile:
    @pytest.mark.parametrize("text", ["[[0, 5], [1, 2, 3]]", "0 5\n1,2, 3\n"])
    def test_it_says_who_has_what(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "parts"
        path.write_text(text)
        parts = dealt(f"file:{path}", torch.zeros(6), 2)
        assert [part.tolist() for part in parts] == [[0, 5], [1, 2, 3]]

    def test_samples_may_have_two_owners_where_nothing_is_held_out(self, tmp_path: Path) -> None:
        path = tmp_path / "parts.json"
        path.write_text("[[0, 1], [1, 2]]")
        config = config_of(data__partition=f"file:{path}", schedule__clients=2, data__val_fraction=0)
        assert [part.tolist() for part in shards(config, 3)] == [[0, 1], [1, 2]]

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("[[0]]", "has 1 lists for schedule.clients = 2: give each client one."),
            ("[[0], [6]]", "gives client 1 the sample 6: with 6 of them they are 0 to 5."),
            ("[[0], [-1]]", "gives client 1 the sample -1: with 6 of them they are 0 to 5."),
            ("[[0, 0], [1]]", "gives client 0 the sample 0 twice: name it once."),
            (
                "[[0, 1], [1]]",
                "gives sample 1 to clients 0 and 1, and one could train on what the other validates on "
                "(data.val_fraction = 0.1): set data.val_fraction = 0, or give it to one of them.",
            ),
            ("[[0], 1]", "has no list of samples for each client (it holds something else): write JSON such as"),
            ("[[0], [true]]", "has no list of samples for each client (it holds something else)"),
            ("[[0],", "has no list of samples for each client (Expecting value"),
            ("a b", "has no list of samples for each client (invalid literal for int() with base 10: 'a'): write"),
        ],
    )
    def test_nonsense_is_refused(self, tmp_path: Path, text: str, sentence: str) -> None:
        path = tmp_path / "parts"
        path.write_text(text)
        with pytest.raises(DataError) as caught:
            dealt(f"file:{path}", torch.zeros(6), 2)
        assert str(caught.value).startswith(f"{path} {sentence}")

    def test_a_list_without_samples_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "parts.json"
        path.write_text("[[0], []]")
        with pytest.raises(ConfigError, match="leaves client 1 without a sample: give it some"):
            dealt(f"file:{path}", torch.zeros(6), 2)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError) as caught:
            dealt(f"file:{tmp_path}/parts", torch.zeros(6), 2)
        assert str(caught.value) == (
            f"{tmp_path}/parts cannot be read (No such file or directory): put data.partition's file there."
        )


class TestUnknownLabels:
    @pytest.mark.parametrize("partition", ["dirichlet:alpha=1", "shards:k=1", "labels:[[0],[1],[2],[3]]"])
    def test_partitions_by_label_need_labels(self, partition: str) -> None:
        with pytest.raises(ConfigError) as caught:
            ClientData(config_of(data__partition=partition), 0, numbered_data(40), labels_known=False)
        assert str(caught.value) == (
            f'data.partition = "{partition}" needs labels, which clients do not have under train.labels = "server": '
            "take iid, replicate, quantity or file."
        )

    def test_a_config_with_both_is_refused_before_anything_starts(self) -> None:
        with pytest.raises(
            ConfigError, match=r'"shards:k=1" needs labels, which clients do not have under train\.labels'
        ):
            config_of(data__partition="shards:k=1", train__labels="server")

    @pytest.mark.parametrize("partition", ["iid", "replicate", "quantity:alpha=2"])
    def test_the_others_are_the_same_with_labels_and_without(self, partition: str) -> None:
        config = config_of(data__partition=partition)
        known, unknown = (ClientData(config, 1, numbered_data(90), each).indices for each in (True, False))
        assert all(torch.equal(known[part], unknown[part]) for part in known)


@pytest.mark.parametrize("partition", ["iid", "dirichlet:alpha=0.4", "shards:k=3", "quantity:alpha=2"])
def test_training_and_validation_samples_of_all_clients_are_disjoint_and_complete(partition: str) -> None:
    config = config_of(data__partition=partition, data__val_fraction=0.25)
    parts = [
        set(ClientData(config, client, numbered_data(120)).indices[part].tolist())
        for client in range(4)
        for part in ("train", "validation")
    ]
    assert not any(one & other for one, other in combinations(parts, 2))
    assert set().union(*parts) == set(range(120))
