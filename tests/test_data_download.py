"""Downloads: fetched where asked for, checked, never fetched twice; tested against a server on this machine."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from conftest import settings
from formats import pack, write, write_cifar10
from samples import config_of

from zsplit.config import load_config
from zsplit.data import open_data
from zsplit.data.download import ORIGINALS, Original, download
from zsplit.data.files import Place
from zsplit.errors import ConfigError, DataError


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder, and counts what is asked for."""

    asked: list[str]

    def log_message(self, format: str, *args: Any) -> None:
        self.asked.append(self.path)


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the address at which a folder is served, and the list of what was asked for."""
    handler = type("Handler", (Quiet,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", handler.asked
        finally:
            server.shutdown()
            thread.join()


def original(path: Path, folder: str = ".", also: tuple[str, ...] = ()) -> Original:
    """Return the entry of a file in the list of originals."""
    return Original("http://nowhere.invalid/", path.name, hashlib.md5(path.read_bytes()).hexdigest(), folder, also)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """CIFAR-10's archive, as a server has it."""
    write_cifar10(tmp_path / "there", np.random.default_rng(0))
    packed = tmp_path / "there" / "cifar-10-python.tar.gz"
    pack(packed, tmp_path / "there" / "cifar-10-batches-py")
    return packed


def test_a_file_is_fetched_once_and_read_as_it_lies(archive: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here" / "data"
    place = Place("cifar10", folder, "files")
    with serving(archive.parent) as (base, asked):
        for _ in range(2):
            download(place, base, (original(archive),))
        assert len(asked) == 1
    assert [path.name for path in folder.iterdir()] == ["cifar-10-python.tar.gz"]
    assert len(open_data(config_of(data__name="cifar10", data__path=str(folder))).train) == 20


def test_processes_that_ask_at_once_fetch_once(archive: Path, tmp_path: Path) -> None:
    place = Place("cifar10", tmp_path / "here", "files")
    with serving(archive.parent) as (base, asked):
        threads = [Thread(target=download, args=(place, base, (original(archive),))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(asked) == 1
    assert [path.name for path in place.folder.iterdir()] == ["cifar-10-python.tar.gz"]
    assert (place.folder / archive.name).read_bytes() == archive.read_bytes()


def test_files_go_where_torchvision_puts_them_and_unpacked_ones_are_not_fetched(tmp_path: Path) -> None:
    write("mnist", tmp_path / "there")
    write("mnist", tmp_path / "here" / "MNIST" / "raw")
    (tmp_path / "here" / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    files = [path for path in (tmp_path / "there").iterdir() if path.is_file()]
    with serving(tmp_path / "there") as (base, asked):
        download(Place("mnist", tmp_path / "here", ""), base, tuple(original(path, "MNIST/raw") for path in files))
        assert asked == ["/t10k-labels-idx1-ubyte"]


def test_a_file_with_another_sum_is_not_taken(archive: Path, tmp_path: Path) -> None:
    wanted = original(archive)._replace(md5="0" * 32)
    found = original(archive).md5
    with serving(archive.parent) as (base, _), pytest.raises(DataError) as caught:
        download(Place("cifar10", tmp_path / "here", ""), base, (wanted,))
    url, target = f"{base}cifar-10-python.tar.gz", tmp_path / "here" / "cifar-10-python.tar.gz"
    assert str(caught.value) == (
        f"{url} is not the original (MD5 {found}, not {wanted.md5}): fetch {url} elsewhere and put it at {target}."
    )
    assert not target.exists()


def test_what_is_not_there_says_what_to_put_where(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with serving(tmp_path / "there") as (base, _), pytest.raises(DataError) as caught:
        download(Place("svhn", tmp_path / "here", ""), base)
    url = f"{base}train_32x32.mat"
    assert str(caught.value) == (
        f"{url} could not be fetched (File not found): "
        f"fetch {url} elsewhere and put it at {tmp_path}/here/train_32x32.mat."
    )


def test_offline_it_says_what_to_put_where(tmp_path: Path) -> None:
    with serving(tmp_path) as (base, _):
        pass
    with pytest.raises(DataError) as caught:
        download(Place("mnist", tmp_path / "here", ""), base)
    sentence = str(caught.value)
    assert "Connection refused" in sentence
    assert sentence.endswith(
        f"fetch {base}train-images-idx3-ubyte.gz elsewhere and put it at "
        f"{tmp_path}/here/MNIST/raw/train-images-idx3-ubyte.gz."
    )


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"could not be fetched \(Not a directory\): fetch .* elsewhere and put it at"):
        download(Place("mnist", tmp_path / "file" / "here", ""))


def test_nothing_is_fetched_where_nobody_asked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no train_32x32"):
        open_data(config_of(data__name="svhn", data__path=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_a_complete_folder_needs_no_network(tmp_path: Path) -> None:
    write("svhn", tmp_path)
    assert len(open_data(config_of(data__name="svhn", data__path=str(tmp_path), data__download=True)).train) == 20


def test_a_run_fetches_before_its_clients_start(tmp_path: Path, here: Callable[..., Any]) -> None:
    (tmp_path / "file").write_text("")
    ending = here("run", *settings("data.name=svhn", "data.download=true", f"data.path={tmp_path}/file/x"))
    assert ending.code == 2
    assert ending.err.endswith(f"train_32x32.mat elsewhere and put it at {tmp_path}/file/x/train_32x32.mat.\n")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["digits", "fake", "imagefolder", "own"])
def test_datasets_without_originals_refuse_it(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"data.name": name, "data.download": True})
    assert str(caught.value) == (
        f'data.download = true means nothing for data.name = "{name}": '
        'leave it out, or set data.name = "mnist" or "svhn" or "cifar10" or "cifar100".'
    )


def test_the_list_of_originals_is_that_of_torchvision() -> None:
    from torchvision import datasets

    known = {name: {file.base + file.name: file.md5 for file in files} for name, files in ORIGINALS.items()}
    mirror = datasets.MNIST.mirrors[0]
    assert known["mnist"] == {mirror + name: md5 for name, md5 in datasets.MNIST.resources}
    assert known["svhn"] == {url: md5 for part, (url, _, md5) in datasets.SVHN.split_list.items() if part != "extra"}
    assert known["cifar10"] == {datasets.CIFAR10.url: datasets.CIFAR10.tgz_md5}
    assert known["cifar100"] == {datasets.CIFAR100.url: datasets.CIFAR100.tgz_md5}
