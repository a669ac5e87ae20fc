"""Contributions to a version: joined where there is one, averaged by name where there are several.

Floating tensors, optimizer moments and BatchNorm statistics among them, become Σ nᵢ·wᵢ ÷ Σ nᵢ, summed in client order
in float64 and cast once; integers and the optimizer's step counts become their maximum. The variance
between clients' BatchNorm means is ignored, as in SplitFed (Thapa et al. 2022, algorithm 1) and PipeLearn.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zsplit.train.state import Tensors
from zsplit.wire.manifest import LOCAL, OPTIMIZER


class Part(NamedTuple):
    """One client's contribution: its weight n, and the tensors of its front and back together."""

    weight: float
    tensors: Mapping[str, Tensor]


def merge(base: Mapping[str, Tensor], parts: Sequence[Part], share: float = 1.0) -> Tensors:
    """Return the next version. What peers keep for themselves is not averaged, and outlives rounds without them.

    A name that only some contributions have is averaged over those. With a `share` below 1 the rest is the base's
    (FedAsync, Xie et al. 2019, algorithm 1).
    """
    merged = _merged(base, parts)
    return merged if share == 1.0 else {name: _mixed(base.get(name), tensor, share) for name, tensor in merged.items()}


def _mixed(base: Tensor | None, tensor: Tensor, share: float) -> Tensor:
    """Return (1 − share)·base + share·tensor, in float64 and cast once; integers become their maximum."""
    if base is None:
        return tensor
    if not tensor.is_floating_point():
        return torch.maximum(base, tensor)
    return (base.double() * (1 - share) + tensor.double() * share).to(tensor.dtype)


def _merged(base: Mapping[str, Tensor], parts: Sequence[Part]) -> Tensors:
    merged: Tensors = {name: tensor for name, tensor in base.items() if name.startswith(LOCAL)}
    for name in dict.fromkeys(name for part in parts for name in part.tensors):
        having = [(part.weight, part.tensors[name]) for part in parts if name in part.tensors]
        if len(having) == 1 or name.startswith(LOCAL):
            merged[name] = having[-1][1]
        elif name.startswith(f"{OPTIMIZER}step/") or not having[0][1].is_floating_point():
            merged[name] = torch.stack([tensor for _, tensor in having]).amax(dim=0)
        else:
            merged[name] = mean(having)
    return merged


def mean(weighted: Iterable[tuple[float, Tensor]]) -> Tensor:
    """Return the weighted mean of tensors of one shape and dtype, summed in float64 in the order given."""
    pairs = list(weighted)
    total = torch.zeros_like(pairs[0][1], dtype=torch.float64)
    for weight, tensor in pairs:
        total += tensor.double() * weight
    return (total / sum(weight for weight, _ in pairs)).to(pairs[0][1].dtype)
