"""How a tensor becomes bytes, and back. A codec is named in the plan; `raw` sends the tensor's own memory."""

import torch
from torch import Tensor

from zsplit.errors import LocalProtocolError, RemoteProtocolError
from zsplit.wire.messages import TensorMeta, What

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
"""torch's dtype by safetensors' name."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""safetensors' name by torch's dtype."""


def encode(what: What, tensor: Tensor, codec: str = "raw") -> tuple[TensorMeta, memoryview]:
    """Return the tensor's description and its frame; a contiguous CPU tensor's frame is its own memory.

    Raises LocalProtocolError for a dtype that cannot travel or an unknown codec.
    """
    if codec != "raw" or tensor.dtype not in NAMES:
        raise LocalProtocolError(f"cannot send {tensor.dtype} with the codec {codec!r}")
    frame = memory(tensor.cpu())
    return TensorMeta(what, NAMES[tensor.dtype], tuple(tensor.shape), codec, frame.nbytes), frame


def is_view(tensor: Tensor, codec: str = "raw") -> bool:
    """Whether encoding computes and copies nothing: the frame is the tensor's own memory."""
    return codec == "raw" and tensor.device.type == "cpu" and tensor.is_contiguous()


ALIGNMENT = 64
"""Bytes that torch aligns its own CPU tensors to. Matrix products on others round differently in the last bit."""


def decode(meta: TensorMeta, frame: memoryview) -> Tensor:
    """Return the tensor that a frame holds: in the frame's memory where that is aligned as torch's own, else copied.

    Raises RemoteProtocolError for a codec or dtype that this side does not know; sizes were checked with
    the header.
    """
    if meta.codec != "raw" or meta.dtype not in DTYPES:
        raise RemoteProtocolError(f"cannot decode {meta.dtype} with the codec {meta.codec!r}")
    dtype = DTYPES[meta.dtype]
    flat = torch.frombuffer(frame, dtype=dtype) if meta.nbytes else torch.empty(0, dtype=dtype)
    return (flat.clone() if flat.data_ptr() % ALIGNMENT else flat).reshape(meta.shape)


def memory(tensor: Tensor) -> memoryview:
    """Return a CPU tensor's bytes, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
