"""Runs that go through codecs, have a tail, or a model of one's own: tested, exported and asked afterwards."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import QUICK, Ending, Processes, free_port
from safetensors.torch import save_file
from test_after import digits, write_digit
from torch import Tensor

from zsplit.after.coded import coded
from zsplit.after.trained import load_trained
from zsplit.config import load_config, to_toml
from zsplit.launch import run_here
from zsplit.model import split, zoo
from zsplit.results import open_run

Here = Callable[..., Ending]

CPU = torch.device("cpu")


class Case(NamedTuple):
    """Keys of a run, and the cuts that its clients end with."""

    keys: dict[str, object]
    cuts: list[tuple[str, ...]]


CASES = {
    "each client has its own cut": Case(
        {
            "codec.up": "ms:ratio=0.9,bits=2+lz4",
            "codec.down": "mask",
            "model.client": [{"clients": "0", "cut": "relu1"}, {"clients": "1", "cut": "flatten"}],
        },
        [("relu1",), ("flatten",)],
    ),
    "the labels are kept": Case(
        {
            "codec.up": "quantize:bits=3",
            "codec.eval": False,
            "train.labels": "keep",
            "model.cut": "relu1",
            "model.tail": "flatten",
        },
        [("relu1", "flatten")] * 2,
    ),
}


@pytest.fixture(scope="module", params=CASES)
def coded_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Case]:
    """A finished run through a lossy codec."""
    case = CASES[request.param]
    quick = dict(assignment.split("=") for assignment in QUICK)
    config = load_config(None, {**{key: int(value) for key, value in quick.items()}, "broker.port": 0, **case.keys})
    result = run_here(config, str(tmp_path_factory.mktemp("coded") / "run"))
    assert result.ok, result.sentence
    return result.folder, case


# zsplit eval


@pytest.mark.parametrize("way", ["raw", "codec"])
def test_a_run_through_a_codec_is_tested_as_the_run_tested_it(
    coded_run: tuple[Path, Case], way: str, here: Here
) -> None:
    run, case = coded_run
    summary = json.loads((run / "summary.json").read_text())
    options = ["--with-codec"] if way == "codec" else []
    answer = json.loads(here("eval", str(run), "--device", "cpu", "--json", *options).out)
    assert answer["accuracy"] == answer["expected"]["accuracy"] == summary[f"test_accuracy_{way}"]
    assert answer["loss"] == pytest.approx(summary[f"test_loss_{way}"], rel=1e-5)
    assert (answer["same"], answer["codec"], answer["through"]) == (True, case.keys["codec.up"], way == "codec")
    assert summary["test_loss_raw"] != summary["test_loss_codec"]
    out = here("eval", str(run), "--device", "cpu", *options).out
    word = "through" if way == "codec" else "without"
    assert out.splitlines()[-1].startswith(f"Equal to the run's summary {word} {case.keys['codec.up']}: test accuracy ")


def test_a_run_that_does_not_say_where_it_was_cut_is_tested_without_its_codec_only(
    digits_run: Path, here: Here, tmp_path: Path
) -> None:
    shutil.copytree(digits_run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    assert here("eval", "run").code == 0
    assert here("eval", "run", "--with-codec") == (
        2,
        "",
        "zsplit: The run's summary does not say where its model was cut: leave --with-codec out, or test a run that "
        "came to its end.\n",
    )


def test_a_lossless_codec_changes_nothing(digits_run: Path, here: Here) -> None:
    with_it, without = (
        json.loads(here("eval", str(digits_run), "--json", *more).out) for more in (["--with-codec"], [])
    )
    assert (with_it["accuracy"], with_it["same"]) == (without["accuracy"], True)


# zsplit export


def test_an_exported_program_has_the_codec_at_the_cut(coded_run: tuple[Path, Case], here: Here, tmp_path: Path) -> None:
    run, case = coded_run
    one_place = len(set(case.cuts)) == 1
    options = [] if one_place else ["--cut", "relu1"]
    code, out, err = here("export", str(run), "--to", "it.pt2", "--with-codec", *options)
    assert (code, out, err) == (0, "Written: it.pt2\n", "")
    program = torch.export.load(tmp_path / "it.pt2").module()
    trained = load_trained(open_run(run), CPU)
    for size in (1, 2, 5):
        x = digits(*range(size))[0]
        with torch.no_grad():
            found, without = program(x), trained.model(x)
            expected = by_frames(trained.model, x, case.cuts[0], str(case.keys["codec.up"]))
        assert torch.allclose(found, expected, atol=1e-4)
        assert not torch.allclose(found, without, atol=1e-2)
    if not one_place:
        code, _, err = here("export", str(run), "--to", "pt2", "--with-codec")
        assert (code, err) == (
            2,
            "zsplit: The run does not say where its model is cut, or not once for all: name the place with --cut.\n",
        )


def by_frames(model: torch.nn.Module, x: Tensor, cuts: tuple[str, ...], spec: str) -> Tensor:
    """Return the model's outputs where what crosses each cut is packed and unpacked as on the wire."""
    from zsplit.codec import codec

    first, *others = split(model, torch.zeros(2, 1, 8, 8), *cuts)
    x = first(x)
    for part in others:
        meta, frames = codec(spec).encode(x)
        x = part(codec(spec).decode(meta, frames)[0])
    return x


def test_a_model_that_is_the_client_s_alone_has_no_place_for_a_codec(digits_run: Path) -> None:
    trained = load_trained(open_run(digits_run), CPU)
    assert coded(trained, ("output",), "half") is trained.model


@pytest.mark.parametrize("name", ["it.pt", "it.safetensors", "it.front+back"])
def test_a_format_of_weights_alone_holds_no_codec(name: str, digits_run: Path, here: Here) -> None:
    assert here("export", str(digits_run), "--to", name, "--with-codec") == (
        2,
        "",
        f"zsplit: {name} holds weights alone, and a codec has none: leave --with-codec out, "
        "or end it in .onnx, .pt2, .ts, .torchscript.\n",
    )


# zsplit predict --split


class Served(NamedTuple):
    """Keys of a run that is served, and what its model does to smashed data: the cuts and the codec."""

    keys: tuple[str, ...]
    cuts: tuple[str, ...] = ()
    codec: str = ""


KEPT = ("train.labels=keep", "model.cut=relu1", "model.tail=flatten", "codec.up=quantize:bits=2")

SERVED = {
    "a tail is asked through the codec": Served(KEPT, ("relu1", "flatten"), "quantize:bits=2"),
    "nothing goes through a codec that evaluations do not take": Served((*KEPT, "codec.eval=false")),
    "at the input the images themselves travel": Served(("model.cut=input",)),
    "no labels are asked for": Served(
        ("data.name=mnist", "data.path=gone", "model.input=[1,8,8]", "train.labels=server", "codec.up=topk:ratio=0.8"),
        ("pool",),
        "topk:ratio=0.8",
    ),
}


def with_keys(digits_run: Path, folder: Path, *keys: str) -> Path:
    """Return a copy of the run's folder whose config has these keys: the model is the same, wherever it is cut."""
    shutil.copytree(digits_run, folder)
    (folder / "config.toml").write_text(to_toml(load_config(folder / "config.toml", keys)))
    return folder


@pytest.mark.parametrize("case", SERVED)
def test_a_prediction_across_the_cut(
    case: str, digits_run: Path, here: Here, processes: Processes, tmp_path: Path
) -> None:
    served = SERVED[case]
    port = free_port()
    run = with_keys(digits_run, tmp_path / "run", *served.keys, f"broker.port={port}")
    broker = processes.start("broker", "--serve", "run")
    broker.line("The broker listens at ")
    processes.start("server", "--broker", f"127.0.0.1:{port}", "--device", "cpu")
    names = [f"{index}.png" for index in range(3)]
    for index, name in enumerate(names):
        write_digit(tmp_path / name, index)
    code, out, err = here(
        "predict", "run", *names, "--split", "--broker", f"127.0.0.1:{port}", "--device", "cpu", "--json"
    )
    assert code == 0, err
    trained = load_trained(open_run(run), CPU)
    model = coded(trained, served.cuts, served.codec) if served.codec else trained.model
    for each, x in zip(json.loads(out), images(run, names), strict=True):
        with torch.no_grad():
            expected = model(x[None])[0].double().softmax(0)
        for guess in each["classes"]:
            assert guess["probability"] == pytest.approx(float(expected[guess["index"]]), abs=1e-5)
    broker.signal(2)
    assert broker.wait() == 0


def images(run: Path, names: list[str]) -> Tensor:
    from zsplit.after.images import read_images, scale_of

    config = open_run(run).config()
    return read_images([run.parent / name for name in names], (1, 8, 8), scale_of(config, 1), False)


def test_a_model_that_is_the_client_s_alone_is_not_asked_across_a_cut(
    digits_run: Path, here: Here, processes: Processes, tmp_path: Path
) -> None:
    port = free_port()
    with_keys(digits_run, tmp_path / "run", "model.cut=output", f"broker.port={port}")
    broker = processes.start("broker", "--serve", "run")
    broker.line("The broker listens at ")
    write_digit(tmp_path / "it.png", 0)
    assert here("predict", "run", "it.png", "--split", "--broker", f"127.0.0.1:{port}", "--device", "cpu") == (
        2,
        "",
        "zsplit: The model is cut at its output, so that all of it is here and nothing at a server: "
        "leave --split out.\n",
    )
    broker.signal(2)
    assert broker.wait() == 0


# --allow

MODULE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

from zsplit import from_datasets


def net(num_classes, shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))


def data(config):
    samples = TensorDataset(torch.randn(20, 1, 8, 8), torch.arange(20) % 10)
    return from_datasets(samples, samples)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder `run` of a run with a model and data of one's own, and the name of their module."""
    module = f"own_{tmp_path.name}"  # not imported before
    (tmp_path / f"{module}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(
        f'[model]\nname = "{module}:net"\ncut = "child:2"\ninput = [1, 8, 8]\n[data]\nname = "{module}:data"\n'
    )
    model = zoo.build(f"{module}:net", 10, 0, (1, 8, 8), [module])
    save_file(model.state_dict(), tmp_path / "run" / "model.safetensors")
    return module


def test_a_model_and_data_of_one_s_own_are_used_where_their_module_is_allowed(own: str, here: Here) -> None:
    code, out, err = here("eval", "run", "--allow", own, "--json")
    assert (code, err, json.loads(out)["samples"]) == (0, "", 20)
    assert here("export", "run", "--to", "it.pt2", "--allow", own).code == 0


@pytest.mark.parametrize("command", [("eval", "run"), ("export", "run", "--to", "pt"), ("predict", "run", "it.png")])
def test_a_module_that_is_not_allowed_is_not_imported(
    own: str, command: tuple[str, ...], here: Here, tmp_path: Path
) -> None:
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace(f'"{own}:data"', '"digits"'))
    write_digit(tmp_path / "it.png", 0)
    code, out, err = here(*command)
    assert (code, out) == (2, "")
    assert err.startswith(
        f"zsplit: model.name = '{own}:net' would import {own}, which this peer was not started with: "
    )
    assert here(*command, "--allow", own).code == 0
