"""The datasets that have a name, each read from local files and scaled with constants of known origin."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from zsplit.config import Config
from zsplit.data.fake import open_fake
from zsplit.data.images import Data, Pixels, Scale
from zsplit.data.readers import damaged, read_cifar_batch, read_idx
from zsplit.errors import ConfigError, DataError

# Mean and deviation of the training images themselves (a test computes them again).
DIGITS = Scale(16, (0.3051,), (0.3762,))
# PyTorch's MNIST example (pytorch/examples, mnist/main.py): those of the training images.
MNIST = Scale(255, (0.1307,), (0.3081,))
# Those of the 50,000 training images, over all pixels of a channel.
CIFAR10 = Scale(255, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
# ImageNet's, as torchvision's pretrained models expect them (torchvision.models, "transforms").
IMAGENET = Scale(255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

HELD_OUT_EVERY = 5


class Source(NamedTuple):
    """A dataset in files: how it is opened, the shape of its samples where its name says it, what the files are."""

    open: Callable[[Path], Data]
    shape: tuple[int, ...] | None
    files: str


def open_data(config: Config) -> Data:
    """Return the data that `data.name` and `data.path` say: from local files, or made up.

    Raises `DataError` where files are missing or damaged, with what to put where, and `ConfigError` for
    `data.name = "own"`, which no file can stand for.
    """
    name = config.data.name
    if name == "own":
        raise ConfigError(
            'data.name = "own" stands for datasets that a Python script hands over: '
            f"start that script, or name one of {', '.join((*SOURCES, 'fake'))}."
        )
    if name == "fake":
        return open_fake(config)
    source = SOURCES[name]
    if not source.files:
        return source.open(Path(__file__).parent)
    if not config.data.path:
        raise DataError(f"{name} needs a folder with {source.files}: set data.path to it.")
    folder = Path(config.data.path).expanduser()
    if not folder.is_dir():
        raise DataError(f"data.path = {folder} is no folder: {name} needs one with {source.files}.")
    return source.open(folder)


def sample_shape(config: Config) -> tuple[int, ...]:
    """Return the shape of one sample without opening any file: `model.input`, or what `data.name` implies.

    Raises `ConfigError` where only the files tell.
    """
    name = config.data.name
    implied = config.data.shape if name == "fake" else SOURCES[name].shape if name in SOURCES else None
    shape = config.model.input or implied
    if not shape:
        raise ConfigError(
            f'data.name = "{name}" does not tell the shape of a sample: '
            "set model.input, such as model.input = [3, 32, 32]."
        )
    return shape


def _open_digits(folder: Path) -> Data:
    pixels = read_idx(folder / "digits-images-idx3-ubyte.gz", 3).unsqueeze(1)
    labels = read_idx(folder / "digits-labels-idx1-ubyte.gz", 1).to(torch.int64)
    held_out = _every_fifth_of_its_class(labels)
    train, test = (Pixels(pixels[mask], labels[mask], DIGITS) for mask in (~held_out, held_out))
    return Data(train, test, (1, 8, 8), 10)


def _every_fifth_of_its_class(labels: Tensor) -> Tensor:
    """Return the mask of the test images: in each class the fifth, tenth, … in the file's order."""
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        held_out[(labels == label).nonzero().squeeze(1)[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]] = True
    return held_out


def _open_mnist(folder: Path) -> Data:
    return Data(_mnist_part(folder, "train"), _mnist_part(folder, "t10k"), (1, 28, 28), 10)


def _mnist_part(folder: Path, prefix: str) -> Pixels:
    images, labels = (
        _file("mnist", folder, "MNIST/raw", (f"{prefix}-{kind}", f"{prefix}-{kind}.gz"))
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    return _pixels(images, read_idx(images, 3).unsqueeze(1), read_idx(labels, 1).to(torch.int64), MNIST)


def _open_cifar10(folder: Path) -> Data:
    train = [f"data_batch_{number}" for number in range(1, 6)]
    return Data(_cifar_part(folder, train), _cifar_part(folder, ["test_batch"]), (3, 32, 32), 10)


def _cifar_part(folder: Path, names: Sequence[str]) -> Pixels:
    paths = [_file("cifar10", folder, "cifar-10-batches-py", (name,)) for name in names]
    pixels, labels = zip(*map(read_cifar_batch, paths), strict=True)
    return _pixels(paths[0], torch.cat(pixels), torch.cat(labels), CIFAR10)


def _pixels(path: Path, pixels: Tensor, labels: Tensor, scale: Scale) -> Pixels:
    if not len(pixels) == len(labels) > 0:
        raise damaged(path, f"{len(pixels)} images, {len(labels)} labels")
    return Pixels(pixels, labels, scale)


def _file(name: str, folder: Path, inner: str, names: Sequence[str]) -> Path:
    """Return the first file of these names in `folder/inner` or `folder`."""
    for place in (folder / inner, folder):
        for each in names:
            if (place / each).is_file():
                return place / each
    raise DataError(f"{folder} has no {names[0]}: {name} needs a folder with {SOURCES[name].files}.")


class Folder(Dataset[tuple[Tensor, int]]):
    """Image files of one shape, read when they are asked for: `samples` are paths and labels, `read` reads one."""

    def __init__(self, files: Any, read: Callable[[str], Tensor]) -> None:
        self.samples: list[tuple[str, int]] = files.samples
        self.classes: list[str] = files.classes
        self._read = read

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return IMAGENET(self._read(path)), label


def _open_imagefolder(folder: Path) -> Data:
    train = _image_files(folder, ("train",))
    test = _image_files(folder, ("test", "val"))
    if train.classes != test.classes:
        odd = ", ".join(sorted({*train.classes} ^ {*test.classes}))
        raise DataError(f"Training and test images in {folder} differ in classes ({odd}): give both the same.")
    shape = tuple(train[0][0].shape)
    return Data(train, test, shape, len(train.classes))


def _image_files(folder: Path, names: Sequence[str]) -> Folder:
    from torchvision.datasets import ImageFolder

    part = next((folder / name for name in names if (folder / name).is_dir()), None)
    if part is None:
        raise DataError(f"{folder} has no {names[0]}/: imagefolder needs {SOURCES['imagefolder'].files}.")
    try:
        files = ImageFolder(str(part))
    except FileNotFoundError as error:
        raise DataError(f"{part} has a class without images, or none: put images into {part}/CLASS/.") from error
    return Folder(files, partial(_read_image, load=files.loader))


def _read_image(path: str, load: Callable[[str], Any]) -> Tensor:
    from torchvision.transforms.functional import pil_to_tensor

    try:
        pixels: Tensor = pil_to_tensor(load(path))
    # Pillow's plugins raise each of these for a damaged file.
    except (OSError, SyntaxError, ValueError) as error:
        raise damaged(Path(path), str(error)) from error
    return pixels


SOURCES: dict[str, Source] = {
    "digits": Source(_open_digits, (1, 8, 8), ""),
    "mnist": Source(
        _open_mnist,
        (1, 28, 28),
        "MNIST/raw/train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
        "t10k-labels-idx1-ubyte, as they are or .gz",
    ),
    "cifar10": Source(
        _open_cifar10,
        (3, 32, 32),
        "cifar-10-batches-py/data_batch_1 to data_batch_5 and test_batch, out of cifar-10-python.tar.gz",
    ),
    "imagefolder": Source(
        _open_imagefolder, None, "train/CLASS/ and test/CLASS/ (or val/CLASS/), images of one size in them"
    ),
}
