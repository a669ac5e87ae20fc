"""Deferred BatchNorm: slices are normalised as ever, and running statistics move once for the mini-batch."""

from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from helpers import unhurried
from hypothesis import given
from hypothesis import strategies as st
from nets import Normed, images
from torch import Tensor, nn

from zsplit.errors import PlanError
from zsplit.model import DeferredBatchNorm
from zsplit.model.norm import Statistics, pool

INPUT = 3 + 2 * torch.randn(12, 4, 5, 5, generator=torch.Generator().manual_seed(2))


def run(root: nn.Module, slices: Sequence[Tensor]) -> list[Tensor]:
    """Run a mini-batch through a module whose BatchNorm is deferred."""
    deferred = DeferredBatchNorm(root)
    deferred.begin(len(slices))
    outputs = [root(x) for x in slices]
    deferred.commit()
    return outputs


def assert_same(left: nn.Module, right: nn.Module) -> None:
    theirs = right.state_dict()
    assert left.state_dict().keys() == theirs.keys()
    assert [name for name, tensor in left.state_dict().items() if not torch.equal(tensor, theirs[name])] == []


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("slices", [2, 3, 5, 6])
def test_running_statistics_are_those_of_the_whole_mini_batch(slices: int, momentum: float | None) -> None:
    whole, sliced = nn.BatchNorm2d(4, momentum=momentum), nn.BatchNorm2d(4, momentum=momentum)
    for batch in (INPUT, INPUT**2):
        whole(batch)
        run(sliced, batch.tensor_split(slices))
    assert sliced.num_batches_tracked == 2
    torch.testing.assert_close(sliced.state_dict(), whole.state_dict(), rtol=1e-5, atol=1e-6)


@unhurried
@given(st.lists(st.integers(2, 40), min_size=1, max_size=9), st.floats(-1e3, 1e3), st.integers(0, 2**31))
def test_pooling_slices_of_any_size_gives_mean_and_unbiased_variance_of_all(
    sizes: list[int], offset: float, seed: int
) -> None:
    values = offset + torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean, variance = pool([Statistics(len(x), x.mean(0), x.var(0)) for x in values.split(sizes)])
    torch.testing.assert_close(mean, values.mean(0))
    torch.testing.assert_close(variance, values.var(0))


def test_half_precision_is_pooled_in_single_precision() -> None:
    slices = [Statistics(2, torch.full((1,), value).half(), torch.ones(1).half()) for value in (0.0, 600.0)]
    mean, variance = pool(slices)
    assert (mean.dtype, mean.item(), variance.item()) == (torch.float32, 300.0, pytest.approx((2 + 4 * 300.0**2) / 3))


@pytest.mark.parametrize("slices", [1, 2, 5])
def test_outputs_and_gradients_are_those_of_plain_torch_bit_for_bit(slices: int) -> None:
    plain, x, y = Normed(), *images(10)
    deferred = deepcopy(plain)
    outputs = run(deferred, x.tensor_split(slices))
    expected = [plain(each) for each in x.tensor_split(slices)]
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    for logits in (outputs, expected):
        F.cross_entropy(torch.cat(logits), y).backward()
    for mine, theirs in zip(deferred.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert torch.equal(mine.grad, theirs.grad)


def test_one_slice_is_plain_torch_bit_for_bit() -> None:
    plain, (x, _) = Normed(), images(10)
    deferred = deepcopy(plain)
    run(deferred, [x])
    plain(x)
    assert_same(deferred, plain)


def test_nothing_moves_before_the_commit() -> None:
    model, (x, _) = Normed(), images(10)
    before = deepcopy(model)
    deferred = DeferredBatchNorm(model)
    deferred.begin(2)
    for each in x.tensor_split(2):
        model(each)
    assert_same(model, before)
    deferred.commit()
    assert all(norm.num_batches_tracked > 0 for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))


def test_a_module_that_runs_twice_moves_once_for_each_call_in_their_order() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4, momentum=0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norm(x) + 7)

    root = Twice()
    run(root, INPUT.tensor_split(3))
    # The input's mean m moves 0 to m/2, and the second call's mean of 7 that to m/4 + 7/2.
    torch.testing.assert_close(root.norm.running_mean, INPUT.mean((0, 2, 3)) / 4 + 3.5)
    assert root.norm.num_batches_tracked == 2


def test_evaluation_and_what_runs_outside_of_a_mini_batch_is_plain_torch() -> None:
    model, (x, _) = Normed(), images(10)
    plain = deepcopy(model)
    deferred = DeferredBatchNorm(model)
    deferred.begin(2)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    deferred.commit()
    model.train()(x)
    plain.train()(x)
    assert_same(model, plain)


def test_a_mini_batch_that_was_given_up_leaves_nothing_behind() -> None:
    model, (x, _) = Normed(), images(10)
    plain = deepcopy(model)
    deferred = DeferredBatchNorm(model)
    deferred.begin(5)
    model(x[:2])
    deferred.begin(2)
    for each in x.tensor_split(2):
        model(each)
    deferred.commit()
    run(plain, x.tensor_split(2))
    assert_same(model, plain)


def test_a_forward_pass_that_fails_leaves_the_module_as_it_was() -> None:
    norm = nn.BatchNorm2d(4, momentum=None)
    before = deepcopy(norm)
    deferred = DeferredBatchNorm(norm)
    deferred.begin(2)
    with pytest.raises(ValueError, match="expected 4D input"):
        norm(torch.zeros(3, 4))
    assert norm.momentum is None
    deferred.commit()
    assert_same(norm, before)


def test_a_slice_without_a_variance_is_refused_with_a_sentence() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    deferred = DeferredBatchNorm(model)
    deferred.begin(2)
    with pytest.raises(PlanError) as caught:
        model(torch.zeros(1, 3))
    assert str(caught.value) == (
        "A micro-batch of 1 sample leaves BatchNorm '1' a single value for each channel: lower "
        "train.micro_batches, or set train.batch_size so that no batch of an epoch is so short."
    )
    assert model.eval()(torch.zeros(1, 3)).shape == (1, 4)


def test_norms_that_track_nothing_or_no_longer_are_left_alone() -> None:
    without, no_longer = nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm2d(4)
    no_longer.track_running_stats = False
    for norm in (without, no_longer):
        before = deepcopy(norm)
        run(norm, INPUT.tensor_split(2))
        assert_same(norm, before)


def test_a_copy_is_independent() -> None:
    model, (x, _) = Normed(), images(10)
    pair = model, DeferredBatchNorm(model)
    other, its = deepcopy(pair)
    its.begin(2)
    for each in x.tensor_split(2):
        other(each)
    its.commit()
    plain = Normed()
    plain.load_state_dict(model.state_dict())
    run(plain, x.tensor_split(2))
    assert_same(other, plain)
    assert model.bn1.num_batches_tracked == 0
