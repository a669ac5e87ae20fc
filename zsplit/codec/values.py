"""How values are written, by the stage of a spec: as they are, in 16 bits, on a grid, or behind a mask."""

import torch
from torch import Tensor

from zsplit.codec import half, ms, quantize
from zsplit.codec.context import Context
from zsplit.codec.tensors import from_bytes, to_bytes
from zsplit.spec import Half, Ms, Quantize, Raw
from zsplit.spec.stages import Values


def write(stage: Values, x: Tensor, context: Context, seed: int | None) -> list[Tensor]:
    """Return a contiguous tensor of floats as the pieces of a frame, on its device."""
    if not x.numel():
        return [torch.empty(0, dtype=torch.uint8, device=x.device)]
    match stage:
        case Raw():
            return [to_bytes(x)]
        case Half():
            return half.write(stage, x)
        case Quantize():
            return quantize.write(stage, x, seed)
        case Ms():
            return ms.write(stage, x, context)


def read(stage: Values, data: Tensor, shape: tuple[int, ...], dtype: torch.dtype, context: Context) -> Tensor:
    """Return the tensor that bytes of the right number hold, on their device."""
    match stage:
        case Raw():
            return from_bytes(data, dtype).view(shape)
        case Half():
            return half.read(stage, data, shape, dtype)
        case Quantize():
            return quantize.read(stage, data, shape, dtype)
        case Ms():
            return ms.read(stage, data, shape, dtype, context)
