"""What a client sees in which order: its batches, the ids of their samples, and batches loaded ahead."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import Own, config_of, numbered_data, permutation
from torch.utils.data import Dataset

from zsplit.config import Config
from zsplit.data import ClientData, Data, Prefetch, from_datasets, open_data, shards
from zsplit.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data(Config())


class TestClientData:
    def test_validation_is_the_head_of_a_permutation_of_the_shard(self) -> None:
        config = config_of(schedule__clients=2, data__val_fraction=0.25, run__seed=3)
        client = ClientData(config, 1, numbered_data(22))
        shard, order = shards(config, 22)[1], permutation(11, 3, "validation", 1)
        assert client.indices["validation"].tolist() == shard[order[:2]].tolist()
        assert client.indices["train"].tolist() == shard[order[2:]].tolist()
        assert (client.size("train"), client.size("validation")) == (9, 2)

    @given(st.integers(1, 200), st.floats(0, 1, exclude_max=True))
    def test_some_sample_is_always_left_to_train_on(self, n: int, fraction: float) -> None:
        client = ClientData(config_of(schedule__clients=1, data__val_fraction=fraction), 0, numbered_data(n))
        assert client.size("validation") == math.floor(fraction * n)
        assert client.size("train") >= 1

    def test_test_data_is_dealt_out_in_order(self) -> None:
        config, data = config_of(schedule__clients=3), numbered_data(30, n_test=7)
        parts = [ClientData(config, index, data).indices["test"].tolist() for index in range(3)]
        assert parts == [[0, 1, 2], [3, 4], [5, 6]]

    def test_a_batch_is_a_slice_of_its_epochs_permutation(self) -> None:
        config = config_of(schedule__clients=2, train__batch_size=4, train__local_epochs=3, data__val_fraction=0)
        client = ClientData(config, 1, numbered_data(20))
        assert (client.steps_per_epoch, client.steps_per_round) == (3, 9)
        train = client.indices["train"]
        for step in range(9):
            order = train[permutation(10, 0, "order", 1, 7, step // 3)]
            x, y = client.train_batch(7, step)
            expected = order[step % 3 * 4 : step % 3 * 4 + 4]
            assert x[:, 0].tolist() == expected.tolist()
            assert y.tolist() == (expected % 10).tolist()

    def test_a_replay_may_start_in_the_middle(self) -> None:
        config = config_of(train__local_epochs=2, schedule__clients=1, data__val_fraction=0)
        data = numbered_data(100)
        forward, backward = ClientData(config, 0, data), ClientData(config, 0, data)
        places = [(round, step) for round in range(2) for step in range(forward.steps_per_round)]
        batches = {place: forward.train_batch(*place) for place in places}
        for place in reversed(places):
            assert all(map(torch.equal, backward.train_batch(*place), batches[place]))

    def test_each_epoch_shows_every_sample_once(self) -> None:
        config = config_of(train__batch_size=7, schedule__clients=1)
        client = ClientData(config, 0, numbered_data(50))
        seen = torch.cat([client.train_batch(0, step)[0] for step in range(client.steps_per_round)])
        assert sorted(seen[:, 0].int().tolist()) == sorted(client.indices["train"].tolist())

    def test_a_step_beyond_the_round_is_refused(self) -> None:
        client = ClientData(config_of(schedule__clients=1), 0, numbered_data(32))
        with pytest.raises(IndexError, match="step 1 of a round of 1 steps"):
            client.train_batch(0, 1)

    def test_evaluation_goes_through_a_part_in_order(self) -> None:
        config = config_of(train__batch_size=4, schedule__clients=1, data__val_fraction=0.5)
        client = ClientData(config, 0, numbered_data(12, n_test=9))
        validation = torch.cat([x for x, _ in client.eval_batches("validation")])
        assert validation[:, 0].tolist() == client.indices["validation"].tolist()
        assert [len(x) for x, _ in client.eval_batches("test")] == [4, 4, 1]
        assert client.batches("test") == 3

    def test_a_part_without_samples_has_no_batches(self) -> None:
        client = ClientData(config_of(schedule__clients=1, data__val_fraction=0), 0, numbered_data(4))
        assert list(client.eval_batches("validation")) == []

    def test_all_ways_to_hold_the_same_data_give_the_same_batches(self, digits: Data) -> None:
        config = config_of(schedule__clients=4)
        as_own = Own(*(digits.train[i] for i in range(len(digits.train))))
        own = from_datasets(as_own, digits.test)
        for step in (0, 5):
            one, other = (ClientData(config, 2, data).train_batch(1, step) for data in (digits, own))
            assert all(map(torch.equal, one, other))

    @pytest.mark.parametrize("index", [-1, 4])
    def test_a_client_index_out_of_range_is_refused(self, index: int) -> None:
        with pytest.raises(ConfigError, match=rf"There is no client {index}: with schedule\.clients = 4 .* 0 to 3\."):
            ClientData(Config(), index, numbered_data(40))

    def test_one_beyond_the_last_has_data_in_an_elastic_run_in_which_all_have_all(self) -> None:
        keys = {"schedule__clients": 2, "schedule__elastic": True}
        beyond = 'and one beyond them has data under data.partition = "replicate" only'
        with pytest.raises(ConfigError, match=rf"There is no client 2: .* 0 to 1, {beyond}\."):
            ClientData(config_of(**keys), 2, numbered_data(40))
        config = config_of(**keys, data__partition="replicate")
        first, beyond_all = (ClientData(config, client, numbered_data(40)) for client in (0, 2))
        assert torch.equal(beyond_all.indices["train"], first.indices["train"])
        assert (beyond_all.size("validation"), beyond_all.size("test")) == (0, 0)

    def test_too_few_classes_are_refused_at_once_where_they_are_known(self, digits: Data) -> None:
        with pytest.raises(ConfigError) as caught:
            ClientData(config_of(model__num_classes=7), 0, digits)
        assert str(caught.value) == (
            "model.num_classes = 7 is too small, the data has 10 classes: set model.num_classes = 10."
        )

    def test_too_few_classes_are_refused_at_the_first_label_where_they_are_not(self) -> None:
        own = Own((torch.zeros(2), 12))
        client = ClientData(config_of(schedule__clients=1), 0, from_datasets(own, own))
        with pytest.raises(ConfigError, match=r"the data has the label 12: set model\.num_classes to 13 or more"):
            client.train_batch(0, 0)

    def test_a_negative_label_is_refused(self) -> None:
        own = Own((torch.zeros(2), -1))
        client = ClientData(config_of(schedule__clients=1), 0, from_datasets(own, own))
        with pytest.raises(ConfigError, match="The data has the label -1: number its classes from 0"):
            client.train_batch(0, 0)


class Slow(Dataset[Any]):
    """Samples that take a millisecond of a clock of their own each. `asked` says in which thread each was loaded,
    `threads` how many torch would have used there."""

    def __init__(self, samples: int, seconds: float = 0.001, draw: bool = False) -> None:
        self.samples, self.seconds, self.draw = samples, seconds, draw
        self.asked: list[tuple[int, str]] = []
        self.threads: set[int] = set()
        self.now = 0.0
        self.broken = -1

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        self.now += self.seconds
        self.asked.append((index, threading.current_thread().name))
        self.threads.add(torch.get_num_threads())
        if index == self.broken:
            raise DataError(f"sample {index} is damaged")
        return torch.rand(1) if self.draw else torch.full((1,), float(index)), 0

    def ahead(self) -> list[int]:
        """Return the samples that were loaded ahead."""
        return [index for index, thread in self.asked if thread.startswith("zsplit-data")]


@contextmanager
def prefetch(dataset: Slow, rounds: int = 2) -> Iterator[tuple[Prefetch, ClientData]]:
    """Yield the mini-batches of a client that has all samples, ahead and not, two samples in each."""
    config = config_of(schedule__clients=1, data__val_fraction=0, train__batch_size=2)
    data = Data(dataset, dataset, (1,), 1)
    ahead = Prefetch(ClientData(config, 0, data), rounds, lambda: dataset.now)
    try:
        yield ahead, ClientData(config, 0, numbered_data(dataset.samples))
    finally:
        ahead.close()


class TestPrefetch:
    def test_the_batches_are_those_of_the_client_in_any_order(self) -> None:
        places = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (1, 1), (0, 1), (0, 1), (1, 2)]
        with prefetch(Slow(6)) as (ahead, plain):
            for place in places:
                assert torch.equal(ahead.train_batch(*place)[0], plain.train_batch(*place)[0])

    def test_the_next_batch_is_loaded_in_a_thread_over_the_end_of_a_round_too(self) -> None:
        with prefetch(dataset := Slow(4)) as (ahead, plain):
            for round, step in ((0, 0), (0, 1), (1, 0), (1, 1)):
                ahead.train_batch(round, step)
            expected = [plain.train_batch(*place)[0][:, 0].tolist() for place in ((0, 1), (1, 0), (1, 1))]
        assert dataset.ahead() == [index for batch in expected for index in batch]
        assert len(dataset.asked) == 8

    def test_a_batch_is_loaded_with_one_thread_wherever_that_is_and_the_trainer_keeps_its_own(self) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            with prefetch(dataset := Slow(4)) as (ahead, _):
                for step in range(2):
                    ahead.train_batch(0, step)
                    assert torch.get_num_threads() == 3
                dataset.broken = dataset.asked[0][0]
                with pytest.raises(DataError):
                    ahead.train_batch(0, 0)
                assert torch.get_num_threads() == 3
        finally:
            torch.set_num_threads(before)
        assert dataset.ahead()
        assert dataset.threads == {1}

    def test_nothing_is_loaded_behind_the_last_round(self) -> None:
        with prefetch(dataset := Slow(2), rounds=1) as (ahead, _):
            ahead.train_batch(0, 0)
        assert len(dataset.asked) == 2

    def test_what_loads_at_once_is_not_loaded_ahead(self) -> None:
        with prefetch(dataset := Slow(6, seconds=0.0001)) as (ahead, _):
            for step in range(3):
                ahead.train_batch(0, step)
        assert dataset.ahead() == []

    def test_what_draws_from_torchs_generator_is_not_loaded_ahead(self) -> None:
        with prefetch(dataset := Slow(6, draw=True)) as (ahead, _):
            for step in range(3):
                ahead.train_batch(0, step)
        assert dataset.ahead() == []

    def test_a_turn_that_begins_anew_loads_nothing_beside_what_is_being_loaded_ahead(self) -> None:
        with prefetch(dataset := Slow(6)) as (ahead, plain):
            ahead.train_batch(0, 0)
            ahead.train_batch(0, 0)
            first, following = (plain.train_batch(0, step)[0][:, 0].tolist() for step in range(2))
        assert [index for index, _ in dataset.asked[:6]] == [*first, *following, *first]

    def test_an_error_is_raised_where_its_batch_is_asked_for(self) -> None:
        with prefetch(dataset := Slow(4)) as (ahead, plain):
            dataset.broken = int(plain.train_batch(0, 1)[0][0, 0])
            ahead.train_batch(0, 0)
            with pytest.raises(DataError, match=f"sample {dataset.broken} is damaged"):
                ahead.train_batch(0, 1)

    def test_an_error_in_a_batch_that_nobody_asks_for_is_nobodys(self) -> None:
        with prefetch(dataset := Slow(4)) as (ahead, plain):
            dataset.broken = int(plain.train_batch(0, 1)[0][0, 0])
            ahead.train_batch(0, 0)
            dataset.broken = -1
            assert torch.equal(ahead.train_batch(0, 0)[0], plain.train_batch(0, 0)[0])

    def test_the_thread_ends_when_it_is_closed(self) -> None:
        with prefetch(Slow(4)) as (ahead, _):
            ahead.train_batch(0, 0)
            ahead.train_batch(0, 1)
        for thread in threading.enumerate():
            if thread.name.startswith("zsplit-data"):
                thread.join(10)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("zsplit-data")]
