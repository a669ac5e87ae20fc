"""A warm start: a file's weights are the first version, and those of another model are refused."""

from pathlib import Path

import pytest
import torch
from helpers import config_of
from nets import Normed, Plain
from safetensors.torch import save_file
from torch import Tensor, nn

from zsplit.errors import ConfigError
from zsplit.model.weights import read_weights
from zsplit.train.half import Workshop

CPU = torch.device("cpu")


def write(path: Path, state: dict[str, Tensor]) -> Path:
    """Write a state_dict in the format that the name says."""
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def other(model: nn.Module) -> dict[str, Tensor]:
    """Return a state_dict of this model that is not its own."""
    return {name: torch.full_like(tensor, 3) for name, tensor in model.state_dict().items()}


def refusal(path: Path, model: nn.Module) -> str:
    with pytest.raises(ConfigError) as caught:
        read_weights(path, model.state_dict())
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.pth"])
def test_version_0_is_what_the_file_holds(name: str, tmp_path: Path) -> None:
    wanted = other(Normed())
    path = write(tmp_path / name, wanted)
    model = Normed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    workshop = Workshop(config_of(data__name="own", model__weights=str(path)), (1, 8, 8), CPU, model)
    first = workshop.initial().tensors()
    assert first.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in first.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_without_a_file_version_0_is_the_model_as_it_was_built() -> None:
    model = Plain()
    first = Workshop(config_of(data__name="own"), (1, 8, 8), CPU, model).initial().tensors()
    assert all(torch.equal(first[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_of_half_precision_become_those_of_the_model(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", {name: tensor.half() for name, tensor in other(Plain()).items()})
    read = read_weights(path, Plain().state_dict())
    assert {tensor.dtype for tensor in read.values()} == {torch.float32}
    assert list(read) == list(Plain().state_dict())


def test_a_file_from_before_batch_norm_counted_batches_will_do(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in other(Normed()).items() if "num_batches" not in name}
    read = read_weights(write(tmp_path / "old.pth", state), Normed().state_dict())
    assert list(read) == list(Normed().state_dict())
    assert read["bn1.num_batches_tracked"] == 0
    assert float(read["bn1.running_var"][0]) == 3


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.pt", other(Plain()))
    config = config_of(data__name="own", model__weights="~/a.pt")
    assert float(Workshop(config, (1, 8, 8), CPU, Plain()).initial().tensors()["fc1.bias"][0]) == 3


def test_names_and_shapes_that_are_not_the_model_s_are_refused_with_the_first_few(tmp_path: Path) -> None:
    state = other(Plain())
    del state["fc1.weight"], state["fc1.bias"], state["fc2.weight"], state["fc2.bias"]
    state["fc3.weight"], state["head"], state["fc3.bias"] = torch.zeros(100, 12), torch.zeros(1), torch.zeros(())
    path = write(tmp_path / "a.safetensors", state)
    assert refusal(path, Plain()) == (
        f"model.weights = {path} does not fit the model: it lacks fc1.weight, fc1.bias, fc2.weight and 1 more; "
        "it has also head; fc3.weight is 100×12, not 10×12, fc3.bias is one number, not 10; "
        "name the weights of this very model, its number of classes included."
    )


class Anything:
    """What is no tensor."""


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    nowhere = tmp_path / "none.pt"
    assert (
        refusal(nowhere, Plain())
        == f"model.weights = {nowhere} is no file on the server: put it there, or mend the path."
    )
    named = write(tmp_path / "a.bin", other(Plain()))
    assert refusal(named, Plain()) == (
        f"model.weights = {named} is neither .safetensors nor .pt nor .pth: save it as one of these."
    )
    for name in ("b.safetensors", "b.pt"):
        (damaged := tmp_path / name).write_bytes(b"\x20" * 64)
        assert refusal(damaged, Plain()).startswith(f"model.weights = {damaged} ")
    empty = tmp_path / "empty.pth"
    empty.touch()
    assert refusal(empty, Plain()).startswith(f"model.weights = {empty} cannot be read (")
    assert refusal(empty, Plain()).endswith("): save it again.")


def test_a_file_that_holds_more_than_tensors_is_refused_and_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "whole.pt"
    torch.save(Anything(), path)
    assert refusal(path, Plain()) == (
        f"model.weights = {path} is damaged or holds more than tensors: save the model's state_dict() alone."
    )


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}, "epoch": 3}])
def test_a_file_without_a_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    assert refusal(path, Plain()) == (
        f"model.weights = {path} is no state_dict of tensors: save the model's state_dict() alone."
    )
