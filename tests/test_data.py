"""Datasets: what is read from which files, and what is refused in which words."""

import gzip
import hashlib
import os
import re
import sys
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formats import (
    mat_variable,
    pack,
    write,
    write_cifar10,
    write_cifar100,
    write_cifar_batch,
    write_idx,
    write_image,
    write_imagefolder,
    write_mat,
    write_mnist,
    write_svhn,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from samples import SHARED, Own, config_of, needs_shared, numbered, permutation, pixels_of
from torch.utils.data import Dataset
from torchvision.transforms import functional

import zsplit.data
from zsplit.config import Config, augment, partition
from zsplit.config.datasets import DATASETS, FETCHED
from zsplit.data import Data, from_datasets, gather, open_data, sample_shape
from zsplit.data.cifar import CIFAR10, CIFAR100
from zsplit.data.download import ORIGINALS
from zsplit.data.folder import IMAGENET, centre
from zsplit.data.images import Pixels
from zsplit.data.mat import read_mat
from zsplit.data.mnist import DIGITS, MNIST, read_idx
from zsplit.data.sources import SCALES, SOURCES
from zsplit.data.svhn import SVHN
from zsplit.errors import ConfigError, DataError

MAT = (
    b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + mat_variable("X", np.arange(48.0).reshape(6, 8), compress=False)
)
"""A small MAT-file, uncompressed."""

PACKAGE = Path(zsplit.data.__file__).parent


def refusal(config: Config) -> str:
    with pytest.raises(DataError) as caught:
        open_data(config)
    return str(caught.value)


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
    def test_every_name_of_the_config_is_there(self) -> None:
        assert {*DATASETS} == {*SOURCES, "fake", "own"}
        assert {*FETCHED} == {*ORIGINALS}

    def test_the_page_has_every_name_every_constant_and_every_change(self) -> None:
        page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
        assert all(f"| `{name}` |" in page for name in DATASETS)
        assert all(f"| `{name}" in page for name in (*partition.FORMS, *augment.FORMS))
        for name, scale in SCALES.items():
            (said,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` | ."))
            assert [float(each) for each in re.findall(r"\.\d+", said)] == [*scale.mean, *scale.std]

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
        assert (
            f"data.path = {tmp_path}/absent is no folder: cifar10 needs one with cifar-10-python.tar.gz, or" in sentence
        )

    def test_a_tilde_is_the_home_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert f"{tmp_path}/data" in refusal(config_of(data__name="mnist", data__path="~/data"))


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


class Harmful:
    def __reduce__(self) -> Any:
        return os.getcwd, ()


class TestCifar10:
    def test_the_batches_are_read_in_order(self, tmp_path: Path) -> None:
        batches = write_cifar10(tmp_path, np.random.default_rng(0))
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
        write_cifar10(tmp_path, np.random.default_rng(0))
        path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
        write_cifar_batch(path, batch)
        found = refusal(config_of(data__name="cifar10", data__path=str(tmp_path)))
        assert found.startswith(f"{path} is damaged (")
        assert sentence in found

    def test_a_missing_batch_is_named(self, tmp_path: Path) -> None:
        write_cifar10(tmp_path, np.random.default_rng(0))
        (tmp_path / "cifar-10-batches-py" / "test_batch").unlink()
        found = refusal(config_of(data__name="cifar10", data__path=str(tmp_path)))
        assert found.startswith(f"{tmp_path} has no test_batch: cifar10 needs a folder with cifar-10-python.tar.gz")


class TestCifar100:
    def test_the_fine_labels_count(self, tmp_path: Path) -> None:
        files = write_cifar100(tmp_path, np.random.default_rng(0))
        data = open_data(config_of(data__name="cifar100", data__path=str(tmp_path)))
        x, y = gather(data.test, torch.arange(6))
        assert torch.equal(x, CIFAR100(torch.from_numpy(files["test"]["data"]).view(6, 3, 32, 32)))
        assert y.tolist() == files["test"]["fine_labels"]
        assert (len(data.train), len(data.test), data.shape, data.classes) == (20, 6, (3, 32, 32), 100)


class TestCifarArchives:
    def packed(self, folder: Path) -> Path:
        """Write CIFAR-100's archive and nothing else."""
        write_cifar100(folder, np.random.default_rng(0))
        archive = folder / "cifar-100-python.tar.gz"
        pack(archive, folder / "cifar-100-python")
        return archive

    def test_an_archive_is_read_where_it_lies(self, tmp_path: Path) -> None:
        files = write_cifar100(tmp_path, np.random.default_rng(0))
        config = config_of(data__name="cifar100", data__path=str(tmp_path))
        beside = gather(open_data(config).train, torch.arange(20))
        archive = self.packed(tmp_path)
        assert all(map(torch.equal, gather(open_data(config).train, torch.arange(20)), beside))
        assert beside[1].tolist() == files["train"]["fine_labels"]
        assert list(tmp_path.iterdir()) == [archive]

    def test_cifar10_is_read_in_the_order_of_its_batches(self, tmp_path: Path) -> None:
        batches = write_cifar10(tmp_path, np.random.default_rng(0))
        pack(tmp_path / "cifar-10-python.tar.gz", tmp_path / "cifar-10-batches-py")
        data = open_data(config_of(data__name="cifar10", data__path=str(tmp_path)))
        labels = [label for number in range(1, 6) for label in batches[f"data_batch_{number}"]["labels"]]
        assert gather(data.train, torch.arange(20))[1].tolist() == labels

    @pytest.mark.parametrize("damage", [lambda content: content[:900], lambda content: b"no archive"])
    def test_a_damaged_archive_is_named(self, tmp_path: Path, damage: Any) -> None:
        archive = self.packed(tmp_path)
        archive.write_bytes(damage(archive.read_bytes()))
        found = refusal(config_of(data__name="cifar100", data__path=str(tmp_path)))
        assert found.startswith(str(archive))
        assert " is damaged (" in found

    def test_an_archive_that_lacks_a_file_is_named(self, tmp_path: Path) -> None:
        write_cifar100(tmp_path, np.random.default_rng(0))
        (tmp_path / "cifar-100-python" / "test").unlink()
        pack(tmp_path / "cifar-100-python.tar.gz", tmp_path / "cifar-100-python")
        found = refusal(config_of(data__name="cifar100", data__path=str(tmp_path)))
        assert found == f"{tmp_path}/cifar-100-python.tar.gz is damaged (test is not in it): fetch it again."

    def test_a_pickle_in_an_archive_makes_nothing_but_arrays(self, tmp_path: Path) -> None:
        write_cifar100(tmp_path, np.random.default_rng(0))
        write_cifar_batch(tmp_path / "cifar-100-python" / "train", {"data": Harmful()})
        pack(tmp_path / "cifar-100-python.tar.gz", tmp_path / "cifar-100-python")
        found = refusal(config_of(data__name="cifar100", data__path=str(tmp_path)))
        assert found.startswith(f"{tmp_path}/cifar-100-python.tar.gz/cifar-100-python/train is damaged (")
        assert "getcwd is no part of an array" in found


class TestSvhn:
    def test_images_stand_upright_and_ten_is_the_digit_zero(self, tmp_path: Path) -> None:
        files = write_svhn(tmp_path, np.random.default_rng(0))
        data = open_data(config_of(data__name="svhn", data__path=str(tmp_path)))
        images, labels = files["train"]
        x, y = gather(data.train, torch.arange(20))
        assert torch.equal(x, SVHN(torch.from_numpy(images.transpose(3, 2, 0, 1).copy())))
        assert y.tolist() == [label % 10 for label in labels.flatten().tolist()]
        assert (len(data.train), len(data.test), data.shape, data.classes) == (20, 6, (3, 32, 32), 10)

    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize("compress", [True, False])
    @pytest.mark.parametrize("code", ["u1", "i2", "i4", "f8"])
    def test_arrays_are_read_in_every_order_and_type(
        self, tmp_path: Path, order: str, compress: bool, code: str
    ) -> None:
        values = np.arange(24).reshape(2, 3, 4).astype(code)
        path = tmp_path / "a.mat"
        others = [mat_variable(name, np.zeros((2, 2)), order, compress) for name in ("b", "a_long_name")]
        write_mat(path, [others[0], mat_variable("a", values, order, compress), others[1]], order)
        assert read_mat(path, "a").numpy().transpose(2, 1, 0).tolist() == values.tolist()
        assert read_mat(path, "a_long_name").tolist() == [[0, 0], [0, 0]]

    @pytest.mark.parametrize(
        ("damage", "sentence"),
        [
            (lambda content: content[:100], "it is no MAT-file of level 5"),
            (lambda content: content[:-30], "it ends within a variable"),
            (lambda content: content[:140] + b"\0" * 40 + content[180:], "Error -3 while decompressing data"),
            (lambda content: content[:128], "it has no variable X"),
            (lambda content: content[:132], "unpack requires a buffer of 8 bytes"),
        ],
    )
    def test_a_damaged_file_is_named(self, tmp_path: Path, damage: Any, sentence: str) -> None:
        write_svhn(tmp_path, np.random.default_rng(0))
        path = tmp_path / "train_32x32.mat"
        path.write_bytes(damage(path.read_bytes()))
        found = refusal(config_of(data__name="svhn", data__path=str(tmp_path)))
        assert found.startswith(f"{path} is damaged (")
        assert sentence in found

    @pytest.mark.parametrize(
        ("images", "labels", "sentence"),
        [
            (np.zeros((3, 32, 32, 4), np.uint8), 4, "X has the shape (3, 32, 32, 4) and the type torch.uint8"),
            (np.zeros((32, 32, 3, 4)), 4, "X has the shape (32, 32, 3, 4) and the type torch.float64"),
            (np.zeros((32, 32, 3, 4), np.uint8), 5, "4 images, 5 labels"),
        ],
    )
    def test_what_holds_something_else_is_named(self, tmp_path: Path, images: Any, labels: int, sentence: str) -> None:
        path = tmp_path / "train_32x32.mat"
        write_mat(path, [mat_variable("X", images), mat_variable("y", np.ones((labels, 1)))])
        found = refusal(config_of(data__name="svhn", data__path=str(tmp_path)))
        assert found == f"{path} is damaged ({sentence}): fetch it again."

    @given(st.binary(max_size=200), st.integers(128, 400))
    def test_whatever_the_file_says_it_is_read_or_named(self, noise: bytes, at: int) -> None:
        content = bytearray(MAT)
        content[at : at + len(noise)] = noise
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.mat"
            path.write_bytes(content)
            with suppress(DataError):
                assert read_mat(path, "X").numel() >= 0


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

    def test_images_of_two_sizes_need_a_size_to_be_brought_to(self, image_folder: Path) -> None:
        path = image_folder / "train" / "cat" / "b.jpg"
        write_image(path, size=(9, 9))
        data = open_data(config_of(data__name="imagefolder", data__path=str(image_folder)))
        with pytest.raises(DataError) as caught:
            gather(data.train, torch.tensor([0, 1]))
        assert str(caught.value) == (
            f"{path} has the size 9×9, other images 5×6: set model.input, such as model.input = [3, 224, 224], "
            "and all are brought to that size."
        )

    def test_images_of_all_sizes_are_brought_to_that_of_the_model(self, tmp_path: Path) -> None:
        write_imagefolder(tmp_path, np.random.default_rng(0), train=6, test=4)
        data = open_data(config_of(data__name="imagefolder", data__path=str(tmp_path), model__input=[3, 16, 24]))
        assert data.shape == (3, 16, 24)
        assert gather(data.train, torch.arange(6))[0].shape == (6, 3, 16, 24)

    def test_an_image_of_the_models_size_stays_as_it_is(self, image_folder: Path) -> None:
        keys = {"data__name": "imagefolder", "data__path": str(image_folder)}
        plain, sized = (open_data(config_of(**keys, **more)) for more in ({}, {"model__input": [3, 5, 6]}))
        assert torch.equal(gather(plain.train, torch.arange(4))[0], gather(sized.train, torch.arange(4))[0])

    @pytest.mark.parametrize("size", [(300, 260), (375, 500), (224, 224), (1000, 256), (231, 777)])
    def test_what_is_shown_of_a_test_image_is_torchvisions_resize_256_and_centre_crop_224(
        self, size: tuple[int, int]
    ) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        expected = functional.center_crop(functional.resize(image, [256]), [224, 224])
        assert centre(image, 224, 224).tobytes() == expected.tobytes()

    def test_small_images_are_read_once(self, image_folder: Path) -> None:
        data = open_data(config_of(data__name="imagefolder", data__path=str(image_folder)))
        before = gather(data.train, torch.arange(4))
        for path in image_folder.rglob("*.*"):
            path.unlink()
        assert all(map(torch.equal, gather(data.train, torch.arange(4)), before))

    def test_large_images_are_not_kept(self, image_folder: Path) -> None:
        data = open_data(
            config_of(data__name="imagefolder", data__path=str(image_folder), model__input=[3, 20000, 20000])
        )
        for path in image_folder.rglob("*.*"):
            path.unlink()
        with pytest.raises(DataError, match=r"a\.png is damaged"):
            gather(data.train, torch.tensor([0]))

    def test_a_shape_without_three_channels_is_refused(self, image_folder: Path) -> None:
        with pytest.raises(ConfigError) as caught:
            open_data(config_of(data__name="imagefolder", data__path=str(image_folder), model__input=[1, 9, 9]))
        assert str(caught.value) == (
            "model.input = [1, 9, 9] is no shape of a colour image: set [3, height, width] for imagefolder."
        )

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


class TestWhatIsUsed:
    def test_a_size_keeps_so_many_random_samples_in_the_order_of_the_files(self) -> None:
        whole, few = (open_data(config_of(data__train_size=size, data__test_size=size)) for size in (0, 50))
        assert (len(few.train), len(few.test)) == (50, 50)
        kept = permutation(len(whole.train), 0, "size", "train")[:50].sort().values
        assert torch.equal(pixels_of(few.train), pixels_of(whole.train)[kept])
        assert not torch.equal(pixels_of(few.train), pixels_of(whole.train)[:50])

    def test_another_seed_keeps_others(self) -> None:
        one, other = (open_data(config_of(data__train_size=50, run__seed=seed)) for seed in (0, 1))
        assert not torch.equal(pixels_of(one.train), pixels_of(other.train))

    def test_more_than_there_are_is_refused(self) -> None:
        assert refusal(config_of(data__test_size=360)) == (
            "data.test_size = 360 is more than the 355 samples there are: set 355 at most, or 0."
        )

    def test_image_files_are_taken_in_part_as_well(self, image_folder: Path) -> None:
        data = open_data(config_of(data__name="imagefolder", data__path=str(image_folder), data__train_size=3))
        assert len(data.train) == 3

    def test_pixels_are_less_their_mean_over_their_deviation_as_asked_for(self) -> None:
        plain, half, none = (
            gather(open_data(config_of(data__normalize=how)).train, torch.arange(9))[0]
            for how in ("dataset", "half", "none")
        )
        assert (none.min().item(), none.max().item()) == (0, 1)
        assert torch.allclose(half, none * 2 - 1)
        assert torch.allclose(plain, (none - DIGITS.mean[0]) / DIGITS.std[0], atol=1e-6)

    def test_half_is_for_colours_too(self, tmp_path: Path) -> None:
        write("cifar10", tmp_path)
        data = open_data(config_of(data__name="cifar10", data__path=str(tmp_path), data__normalize="half"))
        x, _ = gather(data.train, torch.arange(20))
        assert -1 <= x.min() < -0.9 < 0.9 < x.max() <= 1

    @pytest.mark.parametrize("name", ["fake", "own", "package.data:make"])
    def test_data_without_constants_cannot_be_normalised(self, name: str) -> None:
        with pytest.raises(
            ConfigError, match=r'data\.normalize = "half" means nothing for data\.name = .*: leave it out'
        ):
            config_of(data__name=name, data__normalize="half")

    def test_objects_that_a_script_hands_over_are_its_own_to_cut(self) -> None:
        with pytest.raises(ConfigError, match=r"data\.train_size = 9 means nothing for data\.name = \"own\""):
            config_of(data__name="own", data__train_size=9)

    def test_images_of_another_shape_than_the_models_input_are_refused(self) -> None:
        assert refusal(config_of(model__input=[3, 32, 32])) == (
            "The samples of digits have the shape [1, 8, 8], model.input is [3, 32, 32]: "
            "leave model.input out, or take a dataset of that shape."
        )


def make_numbered(config: Config) -> Data:
    return from_datasets(numbered(30), numbered(6))


def make_nothing(config: Config) -> None:
    return None


class TestFunctionsOfOnesOwn:
    def test_a_function_makes_the_data_of_the_config(self) -> None:
        config = config_of(data__name="test_data:make_numbered", data__train_size=7)
        data = open_data(config, allowed=["test_data"])
        assert (len(data.train), len(data.test), data.shape, data.classes) == (7, 6, (1,), 10)

    def test_a_module_that_was_not_allowed_is_not_imported(self) -> None:
        with pytest.raises(ConfigError) as caught:
            open_data(config_of(data__name="antigravity:fly"))
        assert "would import antigravity, which this peer was not started with" in str(caught.value)
        assert "antigravity" not in sys.modules

    def test_what_returns_something_else_is_refused(self) -> None:
        with pytest.raises(ConfigError) as caught:
            open_data(config_of(data__name="test_data:make_nothing"), allowed=["test_data"])
        assert str(caught.value) == "data.name = 'test_data:make_nothing' gave a NoneType: it has to return a Data."

    @pytest.mark.parametrize(
        ("name", "sentence"),
        [
            ("absent_module:make", "there is no module absent_module here: install it, or start this peer in its"),
            ("test_data:absent", "test_data has no function absent: define it at the module's top level."),
            ("test_data:PACKAGE", "test_data has no function PACKAGE: define it at the module's top level."),
        ],
    )
    def test_what_cannot_be_called_is_named(self, name: str, sentence: str) -> None:
        with pytest.raises(ConfigError) as caught:
            open_data(config_of(data__name=name), allowed=[name.partition(":")[0]])
        assert str(caught.value).startswith(f"data.name = {name!r}: {sentence}")

    @pytest.mark.parametrize("name", ["a.b:", ":f", "a b:f", "a:b:c", "a:f()", "1a:f", "a..b:f"])
    def test_other_texts_name_no_function(self, name: str) -> None:
        with pytest.raises(ConfigError, match=r"data\.name = .* does not exist: "):
            config_of(data__name=name)


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
