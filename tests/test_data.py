"""Datasets, partitions and batches: what every client sees, in which order, and what is refused in which words."""

import gzip
import hashlib
import math
import os
import pickle
import struct
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

import zsplit.data
from zsplit.config import Config, keys, load_config
from zsplit.data import ClientData, Data, Prefetch, from_datasets, gather, open_data, sample_shape, shards
from zsplit.data.client import PARTITIONS
from zsplit.data.images import Pixels
from zsplit.data.readers import read_idx
from zsplit.data.sources import CIFAR10, DIGITS, IMAGENET, MNIST, SOURCES
from zsplit.errors import ConfigError, DataError
from zsplit.seeds import derive

PACKAGE = Path(zsplit.data.__file__).parent
SHARED = os.environ.get("ZSPLIT_TEST_DATA", "")
needs_shared = pytest.mark.skipif(not SHARED, reason="ZSPLIT_TEST_DATA names no folder with real images")


def config_of(**overrides: object) -> Config:
    """Return a config with keys written `section__key`."""
    return load_config(None, {key.replace("__", "."): value for key, value in overrides.items()})


def numbered(n: int, classes: int = 10) -> TensorDataset:
    """Return n samples whose only feature is their index."""
    return TensorDataset(torch.arange(n, dtype=torch.float32).view(n, 1), torch.arange(n) % classes)


def numbered_data(n_train: int, n_test: int = 10) -> Data:
    return from_datasets(numbered(n_train), numbered(n_test))


def permutation(n: int, *purpose: Any) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(derive(*purpose)))


def refusal(config: Config) -> str:
    with pytest.raises(DataError) as caught:
        open_data(config)
    return str(caught.value)


class Own(Dataset[Any]):
    """A map-style dataset of whatever it is given."""

    def __init__(self, *samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data(Config())


class TestDigits:
    def test_the_package_holds_the_1797_images_and_labels_of_the_uci_set(self) -> None:
        images, labels = (
            gzip.decompress((PACKAGE / f"digits-{kind}-ubyte.gz").read_bytes())
            for kind in ("images-idx3", "labels-idx1")
        )
        digest = hashlib.sha256(images + labels).hexdigest()
        assert digest == "663fb76c4498a2e6a9ea2c09e2b4c4ed5dacbb5707e8f598be22c9624f62bb4e"
        assert "CC BY 4.0" in (PACKAGE / "DIGITS-LICENSE.txt").read_text()

    def test_one_in_five_of_each_class_is_held_out_for_testing(self, digits: Data) -> None:
        assert isinstance(digits.train, Pixels)
        assert isinstance(digits.test, Pixels)
        train, test = digits.train.labels.bincount(), digits.test.labels.bincount()
        assert (train + test).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
        assert test.tolist() == ((train + test) // 5).tolist()

    def test_no_image_is_in_both_parts(self, digits: Data) -> None:
        assert isinstance(digits.train, Pixels)
        assert isinstance(digits.test, Pixels)
        train, test = ({image.numpy().tobytes() for image in part.pixels} for part in (digits.train, digits.test))
        assert not train & test

    def test_the_constants_are_those_of_the_training_images(self, digits: Data) -> None:
        assert isinstance(digits.train, Pixels)
        values = digits.train.pixels.double() / DIGITS.full
        assert (round(values.mean().item(), 4), round(values.std(correction=0).item(), 4)) == (
            *DIGITS.mean,
            *DIGITS.std,
        )

    def test_a_sample_is_a_float_image_and_a_label(self, digits: Data) -> None:
        x, y = digits.train[0]
        assert (tuple(x.shape), x.dtype, type(y)) == ((1, 8, 8), torch.float32, int)
        assert (digits.shape, digits.classes) == ((1, 8, 8), 10)

    def test_a_batch_has_the_bits_of_its_samples(self, digits: Data) -> None:
        indices = torch.tensor([5, 1000, 2])
        x, y = gather(digits.train, indices)
        samples = [digits.train[int(index)] for index in indices]
        assert torch.equal(x, torch.stack([image for image, _ in samples]))
        assert y.tolist() == [label for _, label in samples]


class TestNames:
    def test_every_name_and_partition_of_the_config_is_there(self) -> None:
        choices = {each.key: set(each.choices) for each in keys()}
        assert choices["data.name"] == {*SOURCES, "fake", "own"}
        assert choices["data.partition"] == set(PARTITIONS)

    def test_own_datasets_cannot_be_opened_by_name(self) -> None:
        with pytest.raises(ConfigError, match=r"stands for datasets that a Python script hands over: start that"):
            open_data(config_of(data__name="own"))

    def test_the_shape_is_known_without_the_files(self) -> None:
        assert sample_shape(Config()) == (1, 8, 8)
        assert sample_shape(config_of(data__name="cifar10", data__path="/nowhere")) == (3, 32, 32)
        assert sample_shape(config_of(data__name="own", model__input=[5])) == (5,)
        assert sample_shape(config_of(data__name="fake", data__shape=[1, 4, 6])) == (1, 4, 6)

    @pytest.mark.parametrize("name", ["own", "imagefolder"])
    def test_a_shape_that_only_the_files_tell_has_to_be_set(self, name: str) -> None:
        with pytest.raises(ConfigError, match=rf'data\.name = "{name}" does not tell .* set model\.input, such as'):
            sample_shape(config_of(data__name=name))

    def test_an_unset_path_says_what_is_needed(self) -> None:
        assert refusal(config_of(data__name="mnist")) == (
            "mnist needs a folder with MNIST/raw/train-images-idx3-ubyte, train-labels-idx1-ubyte, "
            "t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, as they are or .gz: set data.path to it."
        )

    def test_a_missing_folder_says_what_is_needed(self, tmp_path: Path) -> None:
        sentence = refusal(config_of(data__name="cifar10", data__path=str(tmp_path / "absent")))
        assert f"data.path = {tmp_path}/absent is no folder: cifar10 needs one with cifar-10-batches-py/" in sentence

    def test_a_tilde_is_the_home_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert f"{tmp_path}/data" in refusal(config_of(data__name="mnist", data__path="~/data"))


def write_idx(path: Path, values: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    content = head + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, end: str, rng: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """Write 20 training and 6 test images in MNIST's format; return them by file name."""
    files: dict[str, np.ndarray[Any, Any]] = {}
    for prefix, n in (("train", 20), ("t10k", 6)):
        files[f"{prefix}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28))
        files[f"{prefix}-labels-idx1-ubyte"] = rng.integers(0, 10, n)
    for name, values in files.items():
        write_idx(folder / f"{name}{end}", values)
    return files


class TestMnist:
    @pytest.mark.parametrize("end", ["", ".gz"])
    @pytest.mark.parametrize("inner", ["MNIST/raw", "."])
    def test_it_is_read_as_it_lies_there(self, tmp_path: Path, inner: str, end: str) -> None:
        files = write_mnist(tmp_path / inner, end, np.random.default_rng(0))
        before = sorted(tmp_path.rglob("*"))
        data = open_data(config_of(data__name="mnist", data__path=str(tmp_path)))
        x, y = data.train[7]
        expected = torch.from_numpy(files["train-images-idx3-ubyte"][7] / 255.0)
        assert torch.allclose(x.double(), (expected - MNIST.mean[0]).unsqueeze(0) / MNIST.std[0], atol=1e-6)
        assert y == files["train-labels-idx1-ubyte"][7]
        assert (len(data.train), len(data.test), data.shape, data.classes) == (20, 6, (1, 28, 28), 10)
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize(
        ("damage", "sentence"),
        [
            (lambda content: content[:-3], "bytes should follow its head"),
            (lambda content: content[:9], "it ends within its head"),
            (lambda content: b"\x1f" + content[1:], "it is no IDX file of bytes in 3 dimensions"),
            (lambda content: b"", "it ends within its head"),
        ],
    )
    def test_a_damaged_file_is_named(self, tmp_path: Path, damage: Any, sentence: str) -> None:
        write_mnist(tmp_path, "", np.random.default_rng(0))
        path = tmp_path / "train-images-idx3-ubyte"
        path.write_bytes(damage(path.read_bytes()))
        found = refusal(config_of(data__name="mnist", data__path=str(tmp_path)))
        assert found.startswith(f"{path} is damaged (")
        assert sentence in found
        assert found.endswith("fetch it again.")

    @pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"not gzip"])
    def test_a_damaged_gzip_file_is_named(self, tmp_path: Path, damage: Any) -> None:
        write_mnist(tmp_path, ".gz", np.random.default_rng(0))
        path = tmp_path / "t10k-labels-idx1-ubyte.gz"
        path.write_bytes(damage(path.read_bytes()))
        found = refusal(config_of(data__name="mnist", data__path=str(tmp_path)))
        assert found.startswith(f"{path} is damaged (")

    def test_a_file_that_is_missing_is_named(self, tmp_path: Path) -> None:
        write_mnist(tmp_path, "", np.random.default_rng(0))
        (tmp_path / "t10k-labels-idx1-ubyte").unlink()
        found = refusal(config_of(data__name="mnist", data__path=str(tmp_path)))
        assert found.startswith(f"{tmp_path} has no t10k-labels-idx1-ubyte: mnist needs a folder with MNIST/raw/")

    def test_labels_and_images_have_to_be_equally_many(self, tmp_path: Path) -> None:
        write_mnist(tmp_path, "", np.random.default_rng(0))
        write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.zeros(5))
        found = refusal(config_of(data__name="mnist", data__path=str(tmp_path)))
        assert "t10k-images-idx3-ubyte is damaged (6 images, 5 labels)" in found

    def test_a_file_that_cannot_be_read_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError) as caught:
            read_idx(tmp_path, 3)
        assert str(caught.value) == f"{tmp_path} cannot be read (Is a directory): mend that."

    @needs_shared
    def test_the_real_set_has_the_mean_that_its_constants_say(self) -> None:
        data = open_data(config_of(data__name="mnist", data__path=SHARED))
        assert isinstance(data.train, Pixels)
        assert (len(data.train), len(data.test)) == (60_000, 10_000)
        values = data.train.pixels[::7].double() / 255
        assert values.mean().item() == pytest.approx(MNIST.mean[0], abs=1e-3)
        assert values.std().item() == pytest.approx(MNIST.std[0], abs=1e-3)


class CifarPickler(pickle._Pickler):
    """Writes an array as the original files have it: numbers for truth values, raw bytes as Python 2 text."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.dtype):
            return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)
        if isinstance(obj, np.ndarray):
            rebuild = np.empty(0).__reduce__()[0]
            return rebuild, (np.ndarray, (0,), "b"), (1, obj.shape, obj.dtype, False, obj.tobytes().decode("latin1"))
        return NotImplemented


def write_cifar_batch(path: Path, batch: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        CifarPickler(file, protocol=2).dump(batch)


def write_cifar(folder: Path, rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Write CIFAR-10's six batches with four images each; return their contents."""
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    batches = {
        name: {
            "data": rng.integers(0, 256, (4, 3072), dtype=np.uint8),
            "labels": rng.integers(0, 10, 4).tolist(),
        }
        for name in names
    }
    for name, batch in batches.items():
        write_cifar_batch(folder / "cifar-10-batches-py" / name, batch)
    return batches


class Harmful:
    def __reduce__(self) -> Any:
        return os.getcwd, ()


class TestCifar10:
    def test_the_batches_are_read_in_order(self, tmp_path: Path) -> None:
        batches = write_cifar(tmp_path, np.random.default_rng(0))
        data = open_data(config_of(data__name="cifar10", data__path=str(tmp_path)))
        x, y = data.train[6]
        pixels = torch.from_numpy(batches["data_batch_2"]["data"][2]).view(3, 32, 32)
        assert torch.equal(x, CIFAR10(pixels))
        assert y == batches["data_batch_2"]["labels"][2]
        assert (len(data.train), len(data.test), data.shape, data.classes) == (20, 4, (3, 32, 32), 10)

    def test_a_scaled_image_is_less_its_mean_over_its_deviation(self) -> None:
        x = CIFAR10(torch.full((3, 1, 1), 255, dtype=torch.uint8)).flatten().tolist()
        assert x == pytest.approx([(1 - 0.4914) / 0.2470, (1 - 0.4822) / 0.2435, (1 - 0.4465) / 0.2616])

    @pytest.mark.parametrize(
        ("batch", "sentence"),
        [
            ({"data": Harmful(), "labels": []}, "getcwd is no part of an array"),
            ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "pixels and labels do not match"),
            ({"data": np.zeros((2, 100), np.uint8), "labels": [1, 2]}, "shape"),
            ({"labels": [1]}, "KeyError"),
        ],
    )
    def test_a_file_that_holds_something_else_is_named(self, tmp_path: Path, batch: Any, sentence: str) -> None:
        write_cifar(tmp_path, np.random.default_rng(0))
        path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
        write_cifar_batch(path, batch)
        found = refusal(config_of(data__name="cifar10", data__path=str(tmp_path)))
        assert found.startswith(f"{path} is damaged (")
        assert sentence in found

    def test_a_missing_batch_is_named(self, tmp_path: Path) -> None:
        write_cifar(tmp_path, np.random.default_rng(0))
        (tmp_path / "cifar-10-batches-py" / "test_batch").unlink()
        found = refusal(config_of(data__name="cifar10", data__path=str(tmp_path)))
        assert found.startswith(f"{tmp_path} has no test_batch: cifar10 needs a folder with cifar-10-batches-py/")


def write_image(path: Path, size: tuple[int, int] = (6, 5), colour: tuple[int, int, int] = (255, 0, 0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder of two classes, two training images each, one test image each; 6 wide, 5 high."""
    for name, colour in (("cat", (255, 0, 0)), ("dog", (0, 255, 0))):
        write_image(tmp_path / "train" / name / "a.png", colour=colour)
        write_image(tmp_path / "train" / name / "b.jpg", colour=colour)
        write_image(tmp_path / "val" / name / "c.png", colour=colour)
    return tmp_path


class TestImageFolder:
    def test_classes_are_the_folders_in_order(self, image_folder: Path) -> None:
        data = open_data(config_of(data__name="imagefolder", data__path=str(image_folder)))
        assert (len(data.train), len(data.test), data.shape, data.classes) == (4, 2, (3, 5, 6), 2)
        x, y = gather(data.test, torch.tensor([1, 0]))
        green = torch.tensor([0, 255, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 5, 6)
        assert torch.equal(x[0], IMAGENET(green))
        assert y.tolist() == [1, 0]

    def test_val_serves_where_there_is_no_test(self, image_folder: Path) -> None:
        (image_folder / "val").rename(image_folder / "test")
        assert len(open_data(config_of(data__name="imagefolder", data__path=str(image_folder))).test) == 2

    def test_a_missing_part_is_named(self, image_folder: Path) -> None:
        (image_folder / "train").rename(image_folder / "training")
        found = refusal(config_of(data__name="imagefolder", data__path=str(image_folder)))
        assert found.startswith(f"{image_folder} has no train/: imagefolder needs train/CLASS/ and test/CLASS/")

    def test_a_class_without_images_is_refused(self, image_folder: Path) -> None:
        (image_folder / "train" / "cow").mkdir()
        found = refusal(config_of(data__name="imagefolder", data__path=str(image_folder)))
        assert "train has a class without images, or none: put images into" in found

    def test_both_parts_have_the_same_classes(self, image_folder: Path) -> None:
        write_image(image_folder / "train" / "cow" / "a.png")
        found = refusal(config_of(data__name="imagefolder", data__path=str(image_folder)))
        assert "differ in classes (cow): give both the same." in found

    def test_a_damaged_image_is_named_when_it_is_read(self, image_folder: Path) -> None:
        path = image_folder / "train" / "dog" / "b.jpg"
        path.write_bytes(path.read_bytes()[:200])
        data = open_data(config_of(data__name="imagefolder", data__path=str(image_folder)))
        with pytest.raises(DataError, match=r"b\.jpg is damaged \(.*\): fetch it again\."):
            data.train[3]

    def test_images_of_two_sizes_make_no_batch(self, image_folder: Path) -> None:
        write_image(image_folder / "train" / "cat" / "b.jpg", size=(9, 9))
        data = open_data(config_of(data__name="imagefolder", data__path=str(image_folder)))
        with pytest.raises(DataError, match=r"Sample 1 .* shape \(3, 9, 9\), sample 0 has \(3, 5, 6\): bring all"):
            gather(data.train, torch.tensor([0, 1]))

    @needs_shared
    def test_real_jpeg_images_are_read(self, tmp_path: Path) -> None:
        with tarfile.open(Path(SHARED) / "cifar10-images.tar.xz") as archive:
            for member in archive:
                if member.name.endswith("0000.jpg"):
                    archive.extract(member, tmp_path, filter="data")
        data = open_data(config_of(data__name="imagefolder", data__path=str(tmp_path)))
        assert (len(data.train), data.shape, data.classes) == (10, (3, 32, 32), 10)
        x, y = gather(data.train, torch.arange(10))
        assert y.tolist() == list(range(10))
        assert x.std().item() == pytest.approx(1, abs=0.5)


def fake(**keys: object) -> Data:
    return open_data(config_of(data__name="fake", **keys))


def pixels_of(part: Any) -> Tensor:
    assert isinstance(part, Pixels)
    return part.pixels


class TestFake:
    def test_size_shape_and_classes_are_those_of_the_config(self) -> None:
        data = fake(data__samples=50, data__shape=[2, 4, 6], data__classes=7)
        assert (len(data.train), len(data.test), data.shape, data.classes) == (50, 5, (2, 4, 6), 7)
        x, y = gather(data.train, torch.arange(50))
        assert x.shape == (50, 2, 4, 6)
        assert set(y.tolist()) <= set(range(7))
        assert len(fake(data__samples=3).test) == 1

    def test_it_takes_a_byte_a_pixel(self) -> None:
        pixels = pixels_of(fake(data__samples=20).train)
        assert (pixels.dtype, pixels.nbytes) == (torch.uint8, 20 * 3 * 32 * 32)

    def test_a_sample_follows_from_seed_and_index_alone(self) -> None:
        few, many = (gather(fake(data__samples=n).train, torch.arange(30)) for n in (30, 3000))
        assert all(map(torch.equal, few, many))
        other = gather(fake(data__samples=30, run__seed=1).train, torch.arange(30))
        assert not any(map(torch.equal, few, other))

    def test_making_it_draws_nothing_from_torchs_generator(self) -> None:
        before = torch.get_rng_state()
        fake(data__samples=20)
        assert torch.equal(torch.get_rng_state(), before)

    def test_no_image_is_in_both_parts(self) -> None:
        data = fake(data__samples=200)
        train, test = ({image.numpy().tobytes() for image in pixels_of(part)} for part in (data.train, data.test))
        assert (len(train), len(test), len(train & test)) == (200, 20, 0)

    def test_pixels_are_scaled_to_mean_0_and_deviation_1(self) -> None:
        x, _ = gather(fake(data__samples=300).train, torch.arange(300))
        assert x.mean().item() == pytest.approx(0, abs=0.01)
        assert x.std().item() == pytest.approx(1, abs=0.01)

    def test_it_can_be_learnt(self) -> None:
        data = fake(data__samples=500)
        x, y = gather(data.train, torch.arange(500))
        means = torch.stack([x[y == label].mean(0) for label in range(10)])
        unseen, labels = gather(data.test, torch.arange(50))
        nearest = torch.cdist(unseen.flatten(1), means.flatten(1)).argmin(1)
        assert torch.equal(nearest, labels)

    def test_a_shape_that_is_no_image_is_refused(self) -> None:
        with pytest.raises(ConfigError) as caught:
            fake(data__shape=[64])
        assert str(caught.value) == (
            "data.shape = [64] is no image's shape: set channels, height and width, such as [3, 32, 32]."
        )


class TestOwnDatasets:
    def test_shape_and_classes_are_found(self) -> None:
        data = from_datasets(numbered(20, classes=3), numbered(5, classes=4))
        assert (data.shape, data.classes) == ((1,), 4)

    def test_classes_are_unknown_where_the_dataset_does_not_say(self) -> None:
        own = Own((torch.zeros(2), 1), (torch.zeros(2), torch.tensor(0)))
        assert from_datasets(own, own).classes is None
        assert from_datasets(own, own, classes=7).classes == 7

    def test_any_map_style_dataset_is_gathered(self) -> None:
        own = Own(*((torch.full((2, 2), float(i)), i) for i in range(4)))
        x, y = gather(own, torch.tensor([3, 1]))
        assert x[:, 0, 0].tolist() == [3, 1]
        assert (y.tolist(), y.dtype) == ([3, 1], torch.int64)

    @pytest.mark.parametrize(
        ("sample", "found"),
        [
            ((np.zeros(2), 1), r"a pair \(ndarray, int\)"),
            ((torch.zeros(2), "cat"), r"a pair \(Tensor, str\)"),
            (torch.zeros(3), "a Tensor"),
        ],
    )
    def test_other_samples_are_refused(self, sample: Any, found: str) -> None:
        own = Own(sample)
        with pytest.raises(DataError, match=rf"Sample 0 of the dataset is {found} in place of a pair .* transform"):
            from_datasets(own, own)

    def test_a_dataset_without_samples_is_refused(self) -> None:
        with pytest.raises(DataError, match="The test dataset has no samples: give one that has"):
            from_datasets(numbered(1), Own())

    def test_a_dataset_without_a_length_is_refused(self) -> None:
        unsized: Any = Dataset()
        with pytest.raises(DataError, match=r"training dataset is a Dataset without __len__ .* map-style"):
            from_datasets(unsized, numbered(1))


class TestPartition:
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
    """Samples that take a millisecond of a clock of their own each; `asked` says in which thread each was loaded."""

    def __init__(self, samples: int, seconds: float = 0.001, draw: bool = False) -> None:
        self.samples, self.seconds, self.draw = samples, seconds, draw
        self.asked: list[tuple[int, str]] = []
        self.now = 0.0
        self.broken = -1

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        self.now += self.seconds
        self.asked.append((index, threading.current_thread().name))
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
