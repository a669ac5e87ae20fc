"""Averaging, bit for bit as the reference does it."""

import pytest
import torch
from helpers import unhurried
from hypothesis import given
from hypothesis import strategies as st
from reference import State, average
from torch import Tensor

from zsplit.train.aggregate import Part, mean, merge

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.bool]

NAMES = {
    "conv.weight": torch.float32,
    "fc.bias": torch.float64,
    "half.weight": torch.float16,
    "brain.weight": torch.bfloat16,
    "bn.running_var": torch.float32,
    "bn.num_batches_tracked": torch.int64,
    "mask": torch.bool,
    "table": torch.uint8,
    "optimizer/momentum_buffer/conv.weight": torch.float32,
    "optimizer/exp_avg_sq/fc.bias": torch.float64,
    "optimizer/step/conv.weight": torch.float32,
    "optimizer/step/fc.bias": torch.float32,
}
"""What a state can hold; a contribution may lack any of it."""

shapes = st.sampled_from([(), (1,), (3,), (2, 0), (4, 5)])


def filled(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** (seed % 7 - 3)).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=generator).to(dtype)


@st.composite
def contributions(draw: st.DrawFn) -> list[tuple[State, int]]:
    """Return what one to five clients contribute: states with common shapes and gaps of their own, and weights."""
    shape = {name: draw(shapes) for name in NAMES}
    seeds = st.integers(0, 2**20)
    shares = []
    for client in range(draw(st.integers(1, 5))):
        names = draw(st.sets(st.sampled_from(sorted(NAMES))))
        state = {name: filled(NAMES[name], shape[name], draw(seeds)) for name in sorted(names)}
        state[f"local/{client}/momentum_buffer/conv.weight"] = filled(torch.float32, (3,), draw(seeds))
        shares.append((state, draw(st.integers(1, 1000))))
    return shares


def parts(shares: list[tuple[State, int]]) -> list[Part]:
    return [Part(float(weight), state) for state, weight in shares]


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


@unhurried
@given(contributions())
def test_a_merge_has_the_bits_of_the_reference(shares: list[tuple[State, int]]) -> None:
    assert_same_bits(merge({}, parts(shares)), average(shares))


@unhurried
@given(contributions())
def test_a_merge_changes_nothing_that_it_was_given(shares: list[tuple[State, int]]) -> None:
    before = [{name: tensor.clone() for name, tensor in state.items()} for state, _ in shares]
    merge({}, parts(shares))
    for (state, _), copy in zip(shares, before, strict=True):
        assert_same_bits(state, copy)


def test_the_order_of_clients_decides_the_last_bits_so_it_is_fixed() -> None:
    shares = [({"w": filled(torch.float32, (1000,), seed)}, weight) for seed, weight in [(0, 3), (1, 7), (6, 11)]]
    assert_same_bits(merge({}, parts(shares)), average(shares))
    total = sum(state["w"].double() * weight for state, weight in shares)
    assert torch.equal(merge({}, parts(shares))["w"], (total / 21).float())


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_what_one_client_alone_has_is_taken_as_it_is(dtype: torch.dtype) -> None:
    tensor = filled(dtype, (50,), 5)
    merged = merge({"w": torch.zeros(50, dtype=dtype)}, [Part(0.3, {"w": tensor}), Part(7.0, {})])
    assert_same_bits(merged, {"w": tensor})


def test_not_even_a_strange_value_changes_on_the_way_through_one_client() -> None:
    tensor = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    merged = merge({}, [Part(3.0, {"w": tensor})])["w"]
    assert torch.equal(merged.view(torch.int32), tensor.view(torch.int32))


def test_weights_weigh() -> None:
    merged = merge({}, [Part(1.0, {"w": torch.tensor([0.0])}), Part(3.0, {"w": torch.tensor([4.0])})])
    assert merged["w"].item() == 3.0


@pytest.mark.parametrize("name", ["bn.num_batches_tracked", "optimizer/step/conv.weight"])
def test_counters_are_the_largest_not_the_mean(name: str) -> None:
    dtype = NAMES[name]
    counts = [Part(weight, {name: torch.tensor(count, dtype=dtype)}) for weight, count in [(1.0, 4), (99.0, 2)]]
    merged = merge({}, counts)[name]
    assert (merged.item(), merged.dtype) == (4, dtype)


def test_what_peers_keep_for_themselves_outlives_a_round_without_them() -> None:
    mine, old, new = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])
    base = {"w": old, "local/0/momentum_buffer/w": mine, "local/1/momentum_buffer/w": old}
    merged = merge(base, [Part(1.0, {"w": mine, "local/1/momentum_buffer/w": new})])
    assert_same_bits(merged, {"local/0/momentum_buffer/w": mine, "local/1/momentum_buffer/w": new, "w": mine})


@unhurried
@given(st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=5), st.data())
def test_a_mean_lies_between_what_it_is_the_mean_of(values: list[float], data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(1, 10**6), min_size=len(values), max_size=len(values)))
    rounded = torch.tensor(values, dtype=torch.float32)
    found = mean((float(n), value) for n, value in zip(weights, rounded, strict=True))
    slack = 1e-6 * rounded.abs().max()
    assert rounded.min() - slack <= found <= rounded.max() + slack
