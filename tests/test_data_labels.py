"""Labels apart: read alone for a server, left out for its clients, joined by the ids of samples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from formats import write, write_mat, write_svhn
from samples import Own, config_of, numbered, numbered_data
from torch.utils.data import Subset

from zsplit.config import Config
from zsplit.data import ClientData, gather, labels_of, open_data, open_labels
from zsplit.data.labels import without_labels

FILED = ("mnist", "svhn", "cifar10", "cifar100", "imagefolder")
ALL = ("digits", "fake", *FILED)


def config_for(name: str, folder: Path, **keys: object) -> Config:
    """Return the config of a dataset whose files are written for it."""
    if name not in FILED:
        return config_of(data__name=name, **keys)
    if not any(folder.iterdir()):
        write(name, folder)
    shape = {"model__input": [3, 16, 16]} if name == "imagefolder" else {}
    return config_of(data__name=name, data__path=str(folder), **shape, **keys)


@pytest.mark.parametrize("name", ALL)
def test_a_dataset_without_labels_has_the_same_images_and_no_label(name: str, tmp_path: Path) -> None:
    config = config_for(name, tmp_path)
    labelled, bare = open_data(config), open_data(config, labels=False)
    for one, other in ((labelled.train, bare.train), (labelled.test, bare.test)):
        (x, y), (same, unknown) = (gather(each, torch.arange(6)) for each in (one, other))
        assert torch.equal(x, same)
        assert unknown.tolist() == [-1] * 6
        assert y.min() >= 0
        assert set(labels_of(other).tolist()) == {-1}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [0, 7])
def test_the_labels_alone_are_those_of_the_samples(name: str, size: int, tmp_path: Path) -> None:
    config = config_for(name, tmp_path, data__train_size=size, data__test_size=min(size, 3))
    data, labels = open_data(config), open_labels(config)
    assert torch.equal(labels.train, labels_of(data.train))
    assert torch.equal(labels.test, labels_of(data.test))
    assert labels.train.dtype == torch.int64


def test_clients_without_labels_need_no_file_of_them(tmp_path: Path) -> None:
    write("mnist", tmp_path)
    for path in tmp_path.rglob("*labels*"):
        path.unlink()
    assert len(open_data(config_for("mnist", tmp_path), labels=False).train) == 20


def test_a_server_needs_no_file_of_images(tmp_path: Path) -> None:
    write("mnist", tmp_path)
    for path in tmp_path.rglob("*images*"):
        path.unlink()
    assert len(open_labels(config_for("mnist", tmp_path)).train) == 20


def test_clients_of_svhn_need_no_labels_in_the_file(tmp_path: Path) -> None:
    write_svhn(tmp_path, np.random.default_rng(0))
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        images_end = 128 + 8 + int.from_bytes(content[132:136], "little")
        path.write_bytes(content[:images_end])
    assert len(open_data(config_for("svhn", tmp_path), labels=False).train) == 20


def test_a_server_of_svhn_needs_no_images_in_the_file(tmp_path: Path) -> None:
    files = write_svhn(tmp_path, np.random.default_rng(0))
    from formats import mat_variable

    for name, (_, labels) in files.items():
        write_mat(tmp_path / f"{name}_32x32.mat", [mat_variable("y", labels)])
    assert open_labels(config_for("svhn", tmp_path)).train[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_ids_join_batches_and_labels() -> None:
    config = config_of(train__local_epochs=2, data__val_fraction=0.2, data__train_size=300)
    labels = open_labels(config)
    known, bare = (ClientData(config, 2, open_data(config, labels=each), each) for each in (True, False))
    for step in range(bare.steps_per_round):
        x, unknown = bare.train_batch(1, step)
        same, y = known.train_batch(1, step)
        assert torch.equal(x, same)
        assert set(unknown.tolist()) == {-1}
        assert torch.equal(labels.train[bare.train_ids(1, step)], y)
    for part, those in (("validation", labels.train), ("test", labels.test)):
        for ids, (_, y) in zip(bare.eval_ids(part), known.eval_batches(part), strict=True):
            assert torch.equal(those[ids], y)


def test_ids_of_a_step_are_those_of_its_samples() -> None:
    client = ClientData(config_of(train__batch_size=4), 1, numbered_data(60))
    for step in range(client.steps_per_round):
        x, _ = client.train_batch(3, step)
        assert x[:, 0].tolist() == client.train_ids(3, step).tolist()


def test_a_step_beyond_the_round_has_no_ids() -> None:
    with pytest.raises(IndexError, match="step 9 of a round of 1 steps"):
        ClientData(config_of(), 0, numbered_data(40)).train_ids(0, 9)


def test_labels_of_ones_own_datasets_are_found_without_reading_samples_where_they_say_them() -> None:
    class Said(Own):
        targets = (4, 2)

    assert labels_of(Said()).tolist() == [4, 2]
    assert labels_of(Own((torch.zeros(1), 5), (torch.zeros(1), 6))).tolist() == [5, 6]
    whole = numbered(9)
    assert labels_of(Subset(whole, [8, 3])).tolist() == [8, 3]


def test_ones_own_samples_lose_their_labels_as_they_are_read() -> None:
    bare = without_labels(Own((torch.ones(1), 5)))
    assert (len(bare), bare[0][0].item(), bare[0][1]) == (1, 1, -1)
    assert gather(without_labels(numbered(4)), torch.arange(4))[1].tolist() == [-1] * 4
