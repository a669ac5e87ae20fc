"""Parameters between turns, rounded or as quantised differences: the reference's bits at the end, on fewer bytes."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nets import Stack, images
from reference import Reference, Settings, State, Steps, Turn, deal
from slow_codec import quantize
from test_exact import SAMPLES, SGD, assert_same, names_up_to, train_split
from torch import Tensor, nn

from zsplit import load_config
from zsplit.errors import ConfigError, RemoteProtocolError
from zsplit.train.packing import Packing, unpack


class Rounded(Reference):
    """Parameters are in half precision in every version, and when a turn leaves them."""

    def train(self) -> tuple[list[State], list[float]]:
        names = {name for name, _ in self.model.named_parameters()}
        kept = self.model.state_dict

        def state_dict(*args: object, **kwargs: object) -> State:
            state: State = kept(*args, **kwargs)  # type: ignore[arg-type]
            return {name: tensor.half() if name in names else tensor for name, tensor in state.items()}

        self.model.state_dict = state_dict  # type: ignore[method-assign, assignment]
        return super().train()


class Quantised(Reference):
    """What a turn leaves of the front is the version it began with, and the quantised difference from it."""

    bits = 6

    def turn(self, version: State, client: int, round_: int, steps: Steps) -> Turn:
        turn = super().turn(version, client, round_, steps)
        state = {
            name: self.sent(version[name], tensor) if name in self.front else tensor
            for name, tensor in turn.state.items()
        }
        return Turn(state, turn.samples, turn.loss)

    def sent(self, base: Tensor, tensor: Tensor) -> Tensor:
        difference = (tensor - base).flatten().tolist()
        return base + torch.tensor(quantize(difference, self.bits).decoded).reshape(base.shape)


CASES: dict[str, tuple[str, type[Reference], Settings]] = {
    "half, parallel": ("half", Rounded, replace(SGD, policy="parallel", batch_size=10, aggregate_every=2)),
    "half, round-robin": ("half", Rounded, replace(SGD, policy="round_robin", batch_size=10)),
    "differences, parallel": (
        "delta:bits=6",
        Quantised,
        replace(SGD, policy="parallel", batch_size=10, aggregate_every=2),
    ),
    "differences, round-robin, reset": (
        "delta:bits=6",
        Quantised,
        replace(SGD, policy="round_robin", batch_size=10, optimizer_state="reset"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_whose_weights_are_packed_ends_with_the_weights_of_the_reference(case: str, tmp_path: Path) -> None:
    spec, kind, settings = CASES[case]
    torch.manual_seed(11)
    model = Stack()
    result = train_split(tmp_path / "run", model, "front.3", 2, settings, **{"codec.weights": spec})
    torch.set_num_threads(1)
    x, y = images(SAMPLES)
    shards = [(x[train], y[train]) for train, _ in deal(settings.seed, SAMPLES, 2)]
    front = names_up_to(model, "front")
    assert_same(result, kind(lambda: deepcopy(model), shards, settings, front, Stack.RANDOM).train()[0][-1])


def weights_up(tmp_path: Path, spec: str) -> int:
    settings = replace(SGD, policy="parallel", batch_size=35, optimizer_state="reset", momentum=0.0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
    keys = {"codec.weights": spec}
    result = train_split(tmp_path / spec.replace(":", "-"), model, "1", 1, settings, **keys)
    assert result.ok, result.sentence
    up: int = result.summary["bytes"]["kinds"]["weights"]["up"]
    return up


def test_packed_weights_are_fewer_bytes_on_the_wire(tmp_path: Path) -> None:
    raw, half, delta = (weights_up(tmp_path, spec) for spec in ("raw", "half", "delta:bits=4"))
    assert 0.5 < half / raw < 0.53
    assert 0.125 < delta / raw < 0.16


def test_a_difference_that_is_none_is_refused() -> None:
    base = {"w": torch.zeros(3, 3)}
    with pytest.raises(RemoteProtocolError):
        unpack("delta:bits=8", {"w": torch.zeros(5, dtype=torch.uint8)}, base)


def test_what_is_not_packed_passes_as_it_is() -> None:
    base = {"w": torch.zeros(2), "n": torch.tensor(3), "mask": torch.zeros(2, dtype=torch.uint8)}
    part = nn.Linear(2, 1, bias=False)
    packing = Packing("delta:bits=8")
    packing.begin(part)
    assert packing.pack(part).keys() == {"weight"}
    tensors = {"w": torch.ones(2), "n": torch.tensor(4), "mask": torch.ones(2, dtype=torch.uint8)}
    found = unpack("delta:bits=8", tensors, base)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert unpack("raw", tensors, base) == tensors
    assert Packing("raw").pack(part) == {}


@pytest.mark.parametrize("spec", ["delta", "delta:bits=0", "delta:bits=9", "quarter"])
def test_other_ways_to_pack_weights_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, {"codec.weights": spec})
    assert str(refused.value) == (
        f'codec.weights must be "raw" or "half" or "delta:bits=N" with N from 1 to 8, not "{spec}".'
    )
