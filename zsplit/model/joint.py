"""BatchNorm over a micro-batch that lies on several processes: normalised, and remembered, as one process would.

Each process has a slice. What torch's SyncBatchNorm does on GPUs alone is done here on any device, with collectives of
torch.distributed on whole sums: first of the values, then of their squared distances from the mean, so that float32
loses no more than torch's own BatchNorm does.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zsplit.model.norm import move


@dataclass
class Slice:
    """Which part of a micro-batch is here now.

    It is of `total` samples. This process has `own` of them and computes on `rows`, the same number everywhere: what
    is more than its own fills up and counts for nothing.
    """

    own: int = 1
    rows: int = 1
    total: int = 1

    def counted(self, x: Tensor) -> Tensor:
        """Return what counts of a tensor (rows, …): that of this process's own samples."""
        return x[: self.own * (len(x) // self.rows)]

    def elements(self, x: Tensor) -> int:
        """Return how many values each channel of x (rows, C, …) has on all processes together."""
        return x.numel() // x.shape[1] // self.rows * self.total


def synchronise(root: nn.Module, here: Slice) -> None:
    """Have all BatchNorm modules in `root` take their statistics from the slices of all processes.

    `here` is looked at in every forward pass in which they normalise with a batch's statistics; all processes have to
    run it at once, and the backward pass too. Names, hooks, buffers and the evaluation mode stay as they are.
    """
    for module in root.modules():
        if isinstance(module, _BatchNorm):
            module.forward = partial(_forward, module, here)  # type: ignore[method-assign]


def _forward(module: _BatchNorm, here: Slice, x: Tensor) -> Tensor:
    if not module.training and module.running_mean is not None:
        return type(module).forward(module, x)
    others = [0, *range(2, x.ndim)]
    shape = [1, -1] + [1] * (x.ndim - 2)
    elements = here.elements(x)
    mean: Tensor = _Sum.apply(here.counted(x).sum(others)) / elements
    centred = x - mean.view(shape)
    squares: Tensor = _Sum.apply(here.counted(centred).square().sum(others))
    if module.training and module.track_running_stats:
        move(module, mean, squares / (elements - 1))
    scale = torch.rsqrt(squares / elements + module.eps)
    normed = centred * (scale if module.weight is None else scale * module.weight).view(shape)
    return normed if module.bias is None else normed + module.bias.view(shape)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes; every process's loss depends on it, so its gradients add up too."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return _total(x)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return _total(gradients[0])


def _total(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total
