"""Random changes of training images: functions of the seed and the sample, whatever batch it comes in."""

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from formats import write_imagefolder
from hypothesis import given
from hypothesis import strategies as st
from samples import config_of, numbered_data, pixels_of
from torch import Tensor
from torch.utils.data import TensorDataset

from zsplit.config import load_config
from zsplit.config.augment import Crop, Flip, ResizedCrop, parse_augment
from zsplit.data import ClientData, Data, from_datasets, open_data
from zsplit.data.augment import draws_of, random_window
from zsplit.errors import ConfigError, DataError
from zsplit.seeds import derive

IMAGES = torch.arange(6 * 2 * 5 * 7, dtype=torch.uint8).view(6, 2, 5, 7)


def changed(text: str, images: Tensor = IMAGES, seed: int = 0, round: int = 0, epoch: int = 0) -> Tensor:
    """Return images changed as the samples 0, 1, 2, … of client 3."""
    draws = draws_of(parse_augment(text), seed, 3, round, epoch, range(len(images)))
    assert draws is not None
    return draws.apply(images)


def cropped(image: Tensor, pad: int, top: int, left: int) -> Tensor:
    """Return a window of an image with black pixels around it, pixel by pixel."""
    channels, height, width = image.shape
    framed = torch.zeros(channels, height + 2 * pad, width + 2 * pad, dtype=image.dtype)
    framed[:, pad : pad + height, pad : pad + width] = image
    return framed[:, top : top + height, left : left + width]


class TestText:
    @pytest.mark.parametrize(
        ("text", "meant"),
        [
            ("none", ()),
            ("flip", (Flip(),)),
            ("crop:pad=4+flip", (Crop(4), Flip())),
            ("resized_crop+flip", (ResizedCrop(), Flip())),
        ],
    )
    def test_it_means_what_it_says(self, text: str, meant: object) -> None:
        assert parse_augment(text) == meant

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("flop", 'does not exist: the nearest is "flip".'),
            ("", "does not exist: there are none, crop, flip, resized_crop."),
            ("crop:pad=4+flop", 'names "flop", which does not exist: the nearest is "flip".'),
            ("crop", "ends too early: write crop:pad=P with a whole number above 0, such as crop:pad=4."),
            ("flip+crop:pad=0", 'cannot be read from character 15 on, "0": write crop:pad=P'),
            ("crop+flip", 'cannot be read from character 5 on, "+flip": write crop:pad=P'),
            ("flip:p=0.5", 'cannot be read from character 5 on, ":p=0.5": write flip.'),
            ("flip+flip", "names a change twice: name each once."),
            ("flip+resized_crop", "changes images before they have one size: put resized_crop first."),
            ("resized_crop", 'is for images of many sizes: take crop for crops, or set data.name = "imagefolder".'),
        ],
    )
    def test_what_cannot_be_is_refused_before_anything_starts(self, text: str, sentence: str) -> None:
        with pytest.raises(ConfigError) as caught:
            load_config(None, {"data.augment": text})
        assert str(caught.value).startswith(f'data.augment = "{text}" ')
        assert sentence in str(caught.value)

    def test_a_resized_crop_needs_a_size(self) -> None:
        with pytest.raises(ConfigError, match=r"needs a size to crop to: set model\.input, such as"):
            config_of(data__name="imagefolder", data__augment="resized_crop")


class TestChanges:
    def test_a_flip_turns_about_half_of_the_images_and_nothing_else(self) -> None:
        images = torch.arange(400 * 3, dtype=torch.int16).view(400, 1, 1, 3)
        flipped = changed("flip", images)
        turned = (flipped == images.flip(3)).flatten(1).all(1)
        assert ((flipped == images).flatten(1).all(1) ^ turned).all()
        assert 160 < turned.sum() < 240

    def test_a_crop_shows_a_window_of_the_framed_image(self) -> None:
        for index, image in enumerate(changed("crop:pad=2")):
            key = derive(0, "augment", 3, 0, 0, index)
            top, left = key % 5, key // 5 % 5
            assert torch.equal(image, cropped(IMAGES[index], 2, top, left))

    def test_every_place_of_a_crop_comes_equally_often(self) -> None:
        images = torch.zeros(900, 1, 3, 3, dtype=torch.uint8)
        images[:, :, 1, 1] = 1
        places = changed("crop:pad=1", images).flatten(1).argmax(1).bincount(minlength=9)
        assert places.min() > 60

    def test_one_change_follows_the_other(self) -> None:
        both, crop = changed("crop:pad=2+flip"), changed("crop:pad=2")
        turned = [torch.equal(one, other.flip(2)) for one, other in zip(both, crop, strict=True)]
        same = [torch.equal(one, other) for one, other in zip(both, crop, strict=True)]
        assert all(a or b for a, b in zip(turned, same, strict=True))
        assert any(turned)

    @given(st.integers(0, 2**40), st.integers(0, 99), st.integers(0, 9))
    def test_it_is_a_function_of_seed_round_and_epoch(self, seed: int, round: int, epoch: int) -> None:
        one, other = (changed("crop:pad=2+flip", IMAGES, seed, round, epoch) for _ in range(2))
        assert torch.equal(one, other)

    def test_floats_are_changed_as_bytes_are(self) -> None:
        assert torch.equal(changed("crop:pad=1+flip", IMAGES.float()), changed("crop:pad=1+flip").float())

    def test_nothing_is_drawn_from_torchs_generator(self) -> None:
        before = torch.get_rng_state()
        changed("crop:pad=1+flip")
        assert torch.equal(torch.get_rng_state(), before)

    def test_samples_that_are_no_images_are_refused(self) -> None:
        client = ClientData(config_of(data__augment="flip"), 0, numbered_data(40))
        with pytest.raises(DataError) as caught:
            client.train_batch(0, 0)
        assert str(caught.value) == (
            "data.augment changes images of shape (channels, height, width), the samples have the shape (1,): "
            'set data.augment = "none".'
        )


def images_data(n: int = 40) -> Data:
    images = torch.arange(n * 3 * 4, dtype=torch.float32).view(n, 1, 3, 4)
    dataset = TensorDataset(images, torch.zeros(n))
    return from_datasets(dataset, dataset)


class TestClients:
    def test_a_sample_is_changed_alike_in_batches_of_any_size(self) -> None:
        found: list[dict[int, Tensor]] = []
        for size in (1, 3, 32):
            config = config_of(data__augment="crop:pad=1+flip", train__batch_size=size, schedule__clients=1)
            client = ClientData(config, 0, images_data())
            steps = range(client.steps_per_epoch)
            found.append(
                {
                    int(i): x
                    for step in steps
                    for i, x in zip(client.train_ids(2, step), client.train_batch(2, step)[0], strict=True)
                }
            )
        for other in found[1:]:
            assert all(torch.equal(found[0][i], other[i]) for i in found[0])

    def test_rounds_epochs_clients_and_seeds_change_it_differently(self) -> None:
        def shown(client: int, round: int, step: int, **keys: object) -> dict[int, Tensor]:
            config = config_of(
                data__augment="crop:pad=3+flip",
                data__partition="replicate",
                data__val_fraction=0,
                train__batch_size=40,
                train__local_epochs=2,
                schedule__clients=2,
                **keys,
            )
            mine = ClientData(config, client, images_data())
            x, _ = mine.train_batch(round, step)
            return {int(i): image for i, image in zip(mine.train_ids(round, step), x, strict=True)}

        first = shown(0, 0, 0)
        for other in (shown(1, 0, 0), shown(0, 1, 0), shown(0, 0, 1), shown(0, 0, 0, run__seed=1)):
            assert sum(torch.equal(first[i], other[i]) for i in first) < 10

    def test_validation_and_test_images_stay_as_they_are(self) -> None:
        keys: dict[str, Any] = {"schedule__clients": 1, "data__val_fraction": 0.5}
        plain, changed = (
            ClientData(config_of(**keys, data__augment=text), 0, images_data()) for text in ("none", "crop:pad=1")
        )
        for part in ("validation", "test"):
            for one, other in zip(plain.eval_batches(part), changed.eval_batches(part), strict=True):
                assert torch.equal(one[0], other[0])

    def test_black_is_put_around_images_before_they_are_normalised(self) -> None:
        config = config_of(data__augment="crop:pad=8", schedule__clients=1)
        data = open_data(config)
        x, _ = ClientData(config, 0, data).train_batch(0, 0)
        assert pixels_of(data.train).min() == 0
        assert x.min().item() == pytest.approx(-0.3051 / 0.3762, abs=1e-4)


class TestResizedCrop:
    @given(st.integers(0, 2**40), st.integers(1, 500), st.integers(1, 500))
    def test_a_window_lies_within_the_image(self, seed: int, width: int, height: int) -> None:
        left, top, right, bottom = random_window(Random(seed), width, height)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height

    def test_windows_have_the_areas_and_aspects_of_imagenet_training(self) -> None:
        boxes = [random_window(Random(seed), 400, 400) for seed in range(500)]
        areas = np.array([(right - left) * (bottom - top) / 400**2 for left, top, right, bottom in boxes])
        aspects = np.array([(right - left) / (bottom - top) for left, top, right, bottom in boxes])
        assert 0.07 < areas.min() < 0.12
        assert 0.9 < areas.max() <= 1
        assert areas.mean() == pytest.approx(0.5, abs=0.06)
        assert 0.74 < aspects.min() < aspects.max() < 1.35

    def test_an_image_that_no_window_fits_shows_its_centre(self) -> None:
        assert random_window(Random(0), 100, 1) == (49, 0, 50, 1)

    def test_images_of_all_sizes_make_batches_of_one(self, tmp_path: Path) -> None:
        write_imagefolder(tmp_path, np.random.default_rng(0), train=8, test=4)
        config = config_of(
            data__name="imagefolder",
            data__path=str(tmp_path),
            data__augment="resized_crop+flip",
            model__input=[3, 24, 24],
            schedule__clients=1,
            data__val_fraction=0,
        )
        one, other = (ClientData(config, 0, open_data(config)) for _ in range(2))
        x, _ = one.train_batch(0, 0)
        assert x.shape == (8, 3, 24, 24)
        assert torch.equal(x, other.train_batch(0, 0)[0])
        assert not torch.equal(x, one.train_batch(1, 0)[0])

    def test_what_is_shown_is_torchvisions_resized_crop(self, tmp_path: Path) -> None:
        from PIL import Image
        from torchvision.transforms import functional

        from zsplit.data.folder import IMAGENET, Folder

        write_imagefolder(tmp_path, np.random.default_rng(0), train=2)
        path = tmp_path / "train" / "class0" / "0.jpg"
        folder = Folder([str(path)], torch.tensor([0]), (3, 16, 16), True)
        draws = draws_of((ResizedCrop(),), 5, 0, 0, 0, [0])
        assert draws is not None
        with Image.open(path) as image:
            left, top, right, bottom = draws.window(0, image.width, image.height)
            expected = functional.resized_crop(image.convert("RGB"), top, left, bottom - top, right - left, [16, 16])
        shown, _ = folder.batch(torch.tensor([0]), draws)
        assert torch.equal(shown[0], IMAGENET(functional.pil_to_tensor(expected)))
