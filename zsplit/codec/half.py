"""`half` and `bf16`: values in 16 bits. What is beyond the type becomes its largest value; NaN stays NaN."""

import torch
from torch import Tensor

from zsplit.codec.tensors import from_bytes, to_bytes
from zsplit.spec import Half


def write(stage: Half, x: Tensor) -> list[Tensor]:
    """Return the values, rounded to nearest, as the one piece of a frame."""
    narrow = _type(stage)
    most = min(torch.finfo(narrow).max, torch.finfo(x.dtype).max)
    return [to_bytes(x.clamp(-most, most).to(narrow))]


def read(stage: Half, data: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the tensor that a frame of the right length holds."""
    x, most = from_bytes(data, _type(stage)).view(shape), torch.finfo(dtype).max
    if torch.finfo(x.dtype).max > most:  # what was rounded up to beyond the tensor's own type
        x = x.float().clamp(-most, most)
    return x.to(dtype)


def _type(stage: Half) -> torch.dtype:
    return torch.bfloat16 if stage.brain else torch.float16
