"""Tensors as memory and memory as tensors."""

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
"""torch's dtype by safetensors' name."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""safetensors' name by torch's dtype."""

ALIGNMENT = 64
"""Bytes that torch aligns its own CPU tensors to. Matrix products on others round differently in the last bit."""


def memory(tensor: Tensor) -> memoryview:
    """Return a CPU tensor's bytes, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def tensor_of(frame: memoryview, dtype: torch.dtype) -> Tensor:
    """Return the flat CPU tensor that lies in the frame's own memory."""
    return torch.frombuffer(frame, dtype=dtype) if frame.nbytes else torch.empty(0, dtype=dtype)


def aligned(flat: Tensor) -> Tensor:
    """Return the CPU tensor: where it is, if that is aligned as torch's own, else a copy.

    The copy is made without torch's threads, which the trainer needs meanwhile.
    """
    if flat.data_ptr() % ALIGNMENT == 0:
        return flat
    copy = torch.empty_like(flat)
    to_bytes(copy).numpy()[:] = to_bytes(flat).numpy()
    return copy


def to_bytes(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes as a flat uint8 tensor on its device."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def from_bytes(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the flat tensor that a piece of a frame holds: a copy, since a piece begins anywhere."""
    return data.clone().view(dtype)


def working(dtype: torch.dtype) -> torch.dtype:
    """Return what codes are computed in: float32, or the tensor's own type where that is wider."""
    return torch.float64 if dtype == torch.float64 else torch.float32
