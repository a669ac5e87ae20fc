"""Fetching a dataset's original files: only where `data.download` asks for it, each checked against its MD5."""

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import IO, NamedTuple
from urllib.error import HTTPError
from urllib.request import urlopen

from zsplit.data.files import Place
from zsplit.errors import DataError

CHUNK = 2**18
PATIENCE = 30.0
"""Seconds without a byte after which a download has failed."""


class Original(NamedTuple):
    """One file: where it comes from, its MD5, where it goes, and the names under which it may be there already."""

    base: str
    name: str
    md5: str
    folder: str = "."
    also: tuple[str, ...] = ()


def _mnist(name: str, md5: str) -> Original:
    base = "https://ossci-datasets.s3.amazonaws.com/mnist/"
    return Original(base, f"{name}.gz", md5, "MNIST/raw", (name,))


# Addresses and sums are those that torchvision lists (torchvision.datasets).
ORIGINALS: dict[str, tuple[Original, ...]] = {
    "mnist": (
        _mnist("train-images-idx3-ubyte", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        _mnist("train-labels-idx1-ubyte", "d53e105ee54ea40749a09fcbcd1e9432"),
        _mnist("t10k-images-idx3-ubyte", "9fb629c4189551a2d022fa330f9573f3"),
        _mnist("t10k-labels-idx1-ubyte", "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
    "svhn": (
        Original(
            "http://ufldl.stanford.edu/housenumbers/", "train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"
        ),
        Original("http://ufldl.stanford.edu/housenumbers/", "test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
    ),
    "cifar10": (
        Original(
            "https://www.cs.toronto.edu/~kriz/",
            "cifar-10-python.tar.gz",
            "c58f30108f718f92721af3b95e74349a",
            also=("cifar-10-batches-py/test_batch", "test_batch"),
        ),
    ),
    "cifar100": (
        Original(
            "https://www.cs.toronto.edu/~kriz/",
            "cifar-100-python.tar.gz",
            "eb9058c3a382ffc7106e4002c42a8d85",
            also=("cifar-100-python/test", "test"),
        ),
    ),
}  # fmt: skip


def download(place: Place, base: str = "", originals: tuple[Original, ...] = ()) -> None:
    """Fetch the originals of a dataset that are missing from its folder, which is made where there is none.

    Processes that ask at the same time wait for the first. `base` takes the place of the addresses, `originals` that
    of the list. Raises `DataError`, which says what file to put where.
    """
    for original in originals or ORIGINALS[place.dataset]:
        if place.look(original.folder, (original.name, *original.also)) is None:
            _fetch(original, place.folder / original.folder / original.name, (base or original.base) + original.name)


def _fetch(original: Original, target: Path, url: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target) as part:
            if target.exists():  # another process was faster, and what is open here may be its file
                Path(part.name).unlink(missing_ok=True)
                return
            part.truncate(0)
            found = _received(url, part)
            if found != original.md5:
                raise DataError(
                    f"{url} is not the original (MD5 {found}, not {original.md5}): {_by_hand(url, target)}."
                )
            part.flush()
            Path(part.name).replace(target)
    except (OSError, HTTPException) as error:  # URLError is an OSError
        if isinstance(error, HTTPError):
            error.close()
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise DataError(f"{url} could not be fetched ({reason}): {_by_hand(url, target)}.") from error


def _by_hand(url: str, target: Path) -> str:
    return f"fetch {url} elsewhere and put it at {target}"


@contextmanager
def _alone(target: Path) -> Iterator[IO[bytes]]:
    """Yield the file that the download is written to, for one process at a time."""
    with target.with_name(f"{target.name}.part").open("ab") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        yield part


def _received(url: str, part: IO[bytes]) -> str:
    """Write what the address has to the file, show how far it is, and return its MD5."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    digest = hashlib.md5(usedforsecurity=False)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    # Addresses are those of the list above, or a test's own.
    with urlopen(url, timeout=PATIENCE) as answer, Progress(*columns, console=Console(stderr=True)) as progress:  # noqa: S310
        size = answer.headers["Content-Length"]
        task = progress.add_task(url.rpartition("/")[2], total=int(size) if size else None)
        while chunk := answer.read(CHUNK):
            part.write(chunk)
            digest.update(chunk)
            progress.advance(task, len(chunk))
    return digest.hexdigest()
