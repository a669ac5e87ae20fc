"""`half` and `bf16`: values in 16 bits. What is beyond the type becomes its largest value; NaN stays NaN."""

import torch
from torch import Tensor

from zsplit.codec.tensors import from_bytes, to_bytes
from zsplit.spec import Half


def write(stage: Half, x: Tensor) -> list[Tensor]:
    """Return the values, rounded to nearest, as the one piece of a frame."""
    return [to_bytes(narrow(stage, x))]


def read(stage: Half, data: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the tensor that a frame of the right length holds."""
    return widen(from_bytes(data, _type(stage)).view(shape), dtype)


def narrow(stage: Half, x: Tensor) -> Tensor:
    """Return the values in 16 bits."""
    to = _type(stage)
    most = min(torch.finfo(to).max, torch.finfo(x.dtype).max)
    return x.clamp(-most, most).to(to)


def widen(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values of 16 bits in the tensor's own type."""
    most = torch.finfo(dtype).max
    if torch.finfo(x.dtype).max > most:  # what was rounded up to beyond the tensor's own type
        x = x.float().clamp(-most, most)
    return x.to(dtype)


def _type(stage: Half) -> torch.dtype:
    return torch.bfloat16 if stage.brain else torch.float16
