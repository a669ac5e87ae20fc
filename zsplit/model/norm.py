"""BatchNorm over a mini-batch that comes in slices: running statistics move once for the mini-batch.

torch moves them with every slice, which makes momentum m an effective 1 − (1 − m)^M for M slices. Deferring is
torchgpipe's idea (Kim et al. 2020, arXiv 2004.09910; `torchgpipe/batchnorm.py`); unlike there, the variance is
unbiased, as torch's own is. Slices are pooled after Chan, Golub, LeVeque (1979), "Updating formulae and a pairwise
algorithm for computing sample variances".
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zsplit.errors import PlanError


class Statistics(NamedTuple):
    """How many elements each channel has in one slice, and the mean and unbiased variance of each channel (C)."""

    elements: int
    mean: Tensor
    variance: Tensor


class Running(NamedTuple):
    """What a BatchNorm module keeps from batch to batch, and how it moves."""

    mean: Tensor | None
    variance: Tensor | None
    batches: Tensor | None
    momentum: float | None


class DeferredBatchNorm:
    """Defers the running statistics of all BatchNorm modules in `root` while a mini-batch is in several slices.

    Between `begin(slices)` with two or more slices and `commit`, a module in training mode still normalises each
    slice with that slice's own statistics, but keeps its running statistics as they are. `commit` moves them once,
    as one mini-batch of all slices' elements would: by the pooled mean and the pooled unbiased variance, with the
    module's momentum (None: the cumulative average). A module that runs several times in a forward pass moves once
    for each of its calls, in their order. With one slice, in evaluation mode, and outside of a mini-batch nothing
    differs from plain torch.

    Covered are modules of torch's BatchNorm classes that track running statistics. What a model does with
    `torch.nn.functional.batch_norm`, and InstanceNorm, moves with every slice. The hooks stay on the modules; a copy
    of `root` has its own. `root` has to be called itself (its `forward` alone starts no new slice). Running it raises
    PlanError where training leaves a module one value for each channel, which has no variance.
    """

    def __init__(self, root: nn.Module) -> None:
        norms = {name: module for name, module in root.named_modules() if isinstance(module, _BatchNorm)}
        self._recorders = [_Recorder(name, module) for name, module in norms.items()]
        root.register_forward_pre_hook(self._begin_slice, prepend=True)

    def count_with(self, elements: Callable[[Tensor], int]) -> None:
        """Count with this how many values each channel of a tensor (N, C, …) has: more than are here, where other
        processes have the rest of a slice.
        """
        for recorder in self._recorders:
            recorder.elements = elements

    def begin(self, slices: int) -> None:
        """Start a mini-batch of so many slices. What came of one that was given up is forgotten."""
        for recorder in self._recorders:
            recorder.reset(active=slices > 1)

    def commit(self) -> None:
        """Move the running statistics by what all slices since `begin` showed."""
        for recorder in self._recorders:
            recorder.commit()
            recorder.reset(active=False)

    def _begin_slice(self, *_: Any) -> None:
        for recorder in self._recorders:
            recorder.call = 0


class _Recorder:
    """Reads off one module what each slice shows.

    While the module runs it has scratch buffers and a momentum of 1, so that torch leaves the slice's own mean and
    unbiased variance in them, without another pass over the data. Whatever happens, it gets back what it had.
    """

    def __init__(self, name: str, module: _BatchNorm) -> None:
        self.name, self.module = name, module
        self.elements: Callable[[Tensor], int] = elements_here
        self.call = 0
        self._active = False
        self._calls: list[list[Statistics]] = []
        self._kept: Running | None = None
        module.register_forward_pre_hook(self._lend)
        module.register_forward_hook(self._take_back, always_call=True)

    def reset(self, active: bool) -> None:
        self._active = active
        self._calls = []

    def commit(self) -> None:
        for slices in self._calls:
            move(self.module, *pool(slices))

    def _lend(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        module, own = self.module, self.module.running_mean
        if module.training:
            for x in inputs:
                self._check(x)
        if self._active and module.training and module.track_running_stats and own is not None:
            self._kept = exchange(module, Running(torch.zeros_like(own), torch.zeros_like(own), None, 1.0))

    def _check(self, x: Tensor) -> None:
        if x.ndim > 1 and self.elements(x) == 1:
            raise PlanError(
                f"A micro-batch of 1 sample leaves BatchNorm '{self.name}' a single value for each channel: "
                "lower train.micro_batches, or set train.batch_size so that no batch of an epoch is so short."
            )

    def _take_back(self, _: nn.Module, __: Any, output: Tensor | None) -> None:
        if self._kept is None:
            return
        mean, variance, *_rest = exchange(self.module, self._kept)
        self._kept = None
        if output is not None and mean is not None and variance is not None:  # None: the forward pass failed
            self._record(Statistics(self.elements(output), mean, variance))

    def _record(self, statistics: Statistics) -> None:
        if self.call == len(self._calls):
            self._calls.append([])
        self._calls[self.call].append(statistics)
        self.call += 1


def elements_here(x: Tensor) -> int:
    """Return how many values each channel of a tensor (N, C, …) has."""
    return x.numel() // x.shape[1]


def exchange(module: _BatchNorm, new: Running) -> Running:
    """Give a module other running statistics and return those that it had."""
    old = Running(module.running_mean, module.running_var, module.num_batches_tracked, module.momentum)
    module.running_mean, module.running_var, module.num_batches_tracked, module.momentum = new
    return old


def pool(slices: Sequence[Statistics]) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance of each channel over the elements of all slices, in float32 or better."""
    own = slices[0].mean
    dtype = torch.promote_types(own.dtype, torch.float32)
    elements = torch.tensor([[each.elements] for each in slices], dtype=dtype, device=own.device)
    means = torch.stack([each.mean for each in slices]).to(dtype)
    variances = torch.stack([each.variance for each in slices]).to(dtype)
    total = sum(each.elements for each in slices)
    mean = (elements * means).sum(0) / total
    squares = (elements - 1) * variances + elements * (means - mean) ** 2
    return mean, squares.sum(0) / (total - 1)


@torch.no_grad()
def move(module: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Move a module's running statistics towards those of a batch, as its own forward pass would."""
    momentum = module.momentum
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        momentum = 1 / float(module.num_batches_tracked) if momentum is None else momentum
    for running, new in ((module.running_mean, mean), (module.running_var, variance)):
        if running is not None and momentum is not None:
            running.copy_((1 - momentum) * running + momentum * new)
