"""A run with a model of one's own and weights from a file: named by the config, allowed where the peers are started."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import QUICK, Ending, Processes, free_port, settings
from safetensors.torch import load_file, save_file

import zsplit

MODULE = """
from torch import nn


def net(num_classes, shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[-1] ** 2, 16), nn.ReLU(), nn.Linear(16, num_classes))


def no_net(num_classes, shape):
    return shape
"""

STILL = ("model.name=mynets:net", "model.cut=child:2", "train.lr=0", "run.rounds=1")
"""Nothing is learned, so that what a run ends with is what it began with."""


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, torch.Tensor]:
    """The module, and weights for its model, where a run finds them."""
    (tmp_path / "mynets.py").write_text(MODULE)
    shapes = {"1.weight": (16, 64), "1.bias": (16,), "3.weight": (10, 16), "3.bias": (10,)}
    made = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(made, tmp_path / "first.safetensors")
    return made


def test_a_run_begins_with_the_weights_of_a_file_and_cuts_a_model_of_one_s_own(
    weights: dict[str, torch.Tensor], here: Callable[..., Ending], tmp_path: Path
) -> None:
    keys = settings("broker.port=0", *QUICK, *STILL, "model.weights=first.safetensors")
    code, out, err = here("run", "--allow", "mynets", "--json", "--out", "out", *keys)
    assert code == 0, err
    assert json.loads(out)["model"] == "mynets:net"
    trained = load_file(tmp_path / "out" / "model.safetensors")
    assert trained.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trained.items())


@pytest.mark.usefixtures("weights")
def test_a_model_of_one_s_own_is_swept_tested_and_exported_where_it_is_allowed(here: Callable[..., Ending]) -> None:
    keys = settings("broker.port=0", *QUICK, *STILL, "run.name=own")
    code, _, err = here("sweep", "--allow", "mynets", "--out", "swept", *keys)
    assert code == 0, err
    code, out, _ = here("eval", "swept/seed=0", "--allow", "mynets")
    assert (code, out.splitlines()[-1].startswith("Equal to the run's summary: ")) == (0, True)
    assert here("export", "swept/seed=0", "--to", "pt", "--allow", "mynets").out == "Written: own.pt\n"
    code, _, err = here("export", "swept/seed=0", "--to", "safetensors")
    assert (code, "start the peer with --allow mynets" in err) == (2, True)


def test_weights_that_the_server_cannot_read_end_a_run_that_never_began(
    here: Callable[..., Ending], tmp_path: Path
) -> None:
    code, _, err = here("run", "--out", "out", *settings("broker.port=0", *QUICK, "model.weights=none.pt"))
    assert code == 2
    assert "model.weights = none.pt is no file on the server: put it there, or mend the path" in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("weights")
def test_a_script_allows_modules_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assignments = ["broker.port=0", *QUICK, *STILL, "model.name=mynets:no_net"]
    with pytest.raises(zsplit.ZsplitError) as caught:
        zsplit.run_here(zsplit.load_config(None, assignments), str(tmp_path / "out"), allow=["mynets"])
    assert "model.name = 'mynets:no_net' gave a tuple: it has to return a Module." in str(caught.value)


@pytest.mark.usefixtures("weights")
def test_a_broker_s_config_makes_no_peer_import_what_it_was_not_started_with(
    processes: Processes, tmp_path: Path
) -> None:
    (tmp_path / "mynets.py").write_text("from pathlib import Path\nPath('imported').touch()\n" + MODULE)
    port = free_port()
    broker = processes.start("broker", *settings(f"broker.port={port}", *QUICK, *STILL))
    broker.line("The broker listens at ")
    address = f"127.0.0.1:{port}"
    server = processes.start("server", "--broker", address)
    client = processes.start("client", "--broker", address, "--allow", "mynet", "--allow", "mynets.small")
    for peer in (server, client):
        assert peer.wait() == 2
        assert "would import mynets, which this peer was not started with" in peer.err[-1]
    assert not (tmp_path / "imported").exists()
    broker.signal(signal.SIGINT)
    assert broker.wait() == 1
