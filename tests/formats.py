"""Datasets of random images in their own file formats: `write(name, folder)` makes any of them."""

import gzip
import pickle
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, np.dtype[Any]]
Part = tuple[Array, Array]
"""Images as the file has them, and labels."""


def write(name: str, folder: Path, train: int = 20, test: int = 10) -> None:
    """Write a dataset with so many random images, so that `data.name` and `data.path` find it."""
    rng = np.random.default_rng(0)
    match name:
        case "mnist":
            write_mnist(folder, "", rng, train, test)
        case "svhn":
            write_svhn(folder, rng, train, test)
        case "cifar10":
            write_cifar10(folder, rng, -(-train // 5), test)
        case "cifar100":
            write_cifar100(folder, rng, train, test)
        case "imagefolder":
            write_imagefolder(folder, rng, train, test)
        case _:
            raise ValueError(f"no files make {name}")


# MNIST: IDX


def write_idx(path: Path, values: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    content = head + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, end: str, rng: np.random.Generator, train: int = 20, test: int = 6) -> dict[str, Array]:
    """Write random images in MNIST's format; return them by file name."""
    files: dict[str, Array] = {}
    for prefix, n in (("train", train), ("t10k", test)):
        files[f"{prefix}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28))
        files[f"{prefix}-labels-idx1-ubyte"] = rng.integers(0, 10, n)
    for name, values in files.items():
        write_idx(folder / f"{name}{end}", values)
    return files


# CIFAR: pickles


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
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        CifarPickler(file, protocol=2).dump(batch)


def write_cifar10(folder: Path, rng: np.random.Generator, train: int = 4, test: int = 4) -> dict[str, dict[str, Any]]:
    """Write CIFAR-10's six batches, `train` images in each of five; return their contents."""
    sizes = {**{f"data_batch_{number}": train for number in range(1, 6)}, "test_batch": test}
    batches = {
        name: {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), "labels": rng.integers(0, 10, n).tolist()}
        for name, n in sizes.items()
    }
    for name, batch in batches.items():
        write_cifar_batch(folder / "cifar-10-batches-py" / name, batch)
    return batches


def write_cifar100(folder: Path, rng: np.random.Generator, train: int = 20, test: int = 6) -> dict[str, dict[str, Any]]:
    """Write CIFAR-100's two files; return their contents."""
    batches = {
        name: {
            "data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
            "fine_labels": rng.integers(0, 100, n).tolist(),
            "coarse_labels": rng.integers(0, 20, n).tolist(),
        }
        for name, n in (("train", train), ("test", test))
    }
    for name, batch in batches.items():
        write_cifar_batch(folder / "cifar-100-python" / name, batch)
    return batches


def pack(archive: Path, folder: Path) -> None:
    """Put a folder into an archive beside it, as it is downloaded, and take it away."""
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, folder.name)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


# SVHN: MAT-files of level 5

MAT_TYPES = {"i1": 1, "u1": 2, "i2": 3, "u2": 4, "i4": 5, "u4": 6, "f4": 7, "f8": 9}
MAT_CLASSES = {"f8": 6, "f4": 7, "i1": 8, "u1": 9, "i2": 10, "u2": 11, "i4": 12, "u4": 13}


def mat_element(kind: int, content: bytes, order: str) -> bytes:
    if 0 < len(content) <= 4:  # within its head
        return struct.pack(f"{order}I", len(content) << 16 | kind) + content.ljust(4, b"\0")
    return struct.pack(f"{order}II", kind, len(content)) + content + bytes(-len(content) % 8)


def mat_variable(name: str, values: Array, order: str = "<", compress: bool = True) -> bytes:
    """Return a variable as MATLAB writes it, its numbers column by column."""
    code = values.dtype.str[1:]
    matrix = b"".join(
        (
            mat_element(MAT_TYPES["u4"], struct.pack(f"{order}II", MAT_CLASSES[code], 0), order),
            mat_element(MAT_TYPES["i4"], np.array(values.shape, f"{order}i4").tobytes(), order),
            mat_element(MAT_TYPES["i1"], name.encode(), order),
            mat_element(MAT_TYPES[code], values.astype(f"{order}{code}").tobytes(order="F"), order),
        )
    )
    variable = mat_element(14, matrix, order)
    if not compress:
        return variable
    packed = zlib.compress(variable)
    return struct.pack(f"{order}II", 15, len(packed)) + packed


def write_mat(path: Path, variables: list[bytes], order: str = "<") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = b"IM" if order == "<" else b"MI"
    head = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(f"{order}H", 0x0100) + mark
    path.write_bytes(head + b"".join(variables))


def write_svhn(folder: Path, rng: np.random.Generator, train: int = 20, test: int = 6) -> dict[str, Part]:
    """Write SVHN's two files of cropped digits; return images (32, 32, 3, N) and labels (N, 1), 10 for the digit 0."""
    files: dict[str, Part] = {}
    for name, n in (("train", train), ("test", test)):
        images = rng.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
        labels = (np.arange(n) % 10 + 1).astype(np.uint8).reshape(n, 1)
        write_mat(folder / f"{name}_32x32.mat", [mat_variable("X", images), mat_variable("y", labels)])
        files[name] = images, labels
    return files


# Image files


def write_image(path: Path, size: tuple[int, int] = (6, 5), colour: tuple[int, int, int] = (255, 0, 0)) -> None:
    """Write an image of one colour; the size is width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def write_imagefolder(
    folder: Path, rng: np.random.Generator, train: int = 20, test: int = 6, smallest: int = 30, classes: int = 2
) -> None:
    """Write random JPEG images of many sizes in ImageNet's layout."""
    for part, n in (("train", train), ("val", test)):
        for index in range(max(n, classes)):
            path = folder / part / f"class{index % classes}" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = rng.integers(smallest, 2 * smallest, 2)
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
