"""Parameters on their way between turns: as they are, in half precision, or as quantised differences.

`half` rounds parameters wherever they are kept between turns: what a turn leaves, averages, and the versions
themselves. `delta:bits=b` sends what a client's turn leaves as differences from the version that it began with, which
whoever merges has as well (as updates are quantised in Konečný et al. 2016, "Federated learning: strategies for
improving communication efficiency"). Buffers, and what an optimizer keeps, travel as they are.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zsplit.codec import DTYPES, NAMES, codec, memory
from zsplit.errors import RemoteProtocolError
from zsplit.train.state import Tensors
from zsplit.wire.messages import TensorMeta

DELTA = "delta:"


class Packing:
    """How one half's parameters leave it: `spec` is `codec.weights`."""

    def __init__(self, spec: str) -> None:
        self._half = spec == "half"
        self._codec = difference_codec(spec)
        self._base: Tensors = {}

    def begin(self, part: nn.Module) -> None:
        """Remember the parameters that a turn begins with, where differences are to be sent."""
        if self._codec:
            self._base = {name: parameter.detach().clone() for name, parameter in part.named_parameters()}

    def pack(self, part: nn.Module) -> Tensors:
        """Return the parameters under their names as they leave; nothing where that is as they are."""
        parameters = {name: parameter.detach() for name, parameter in part.named_parameters()}
        if self._half:
            return {name: parameter.half() for name, parameter in parameters.items()}
        if self._codec:
            return {name: self._difference(name, parameter) for name, parameter in parameters.items()}
        return {}

    def _difference(self, name: str, parameter: Tensor) -> Tensor:
        _, (frame,) = codec(self._codec).encode(parameter - self._base[name])
        data = torch.empty(frame.nbytes, dtype=torch.uint8)
        data.numpy()[:] = frame
        return data


def difference_codec(spec: str) -> str:
    """Return the codec of differences; empty where none are sent."""
    return f"quantize:{spec.removeprefix(DELTA)}" if spec.startswith(DELTA) else ""


def unpack(spec: str, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Tensors:
    """Return what a client's turn left, with its differences added to the base that they are of.

    Raises RemoteProtocolError for what are no differences from it.
    """
    name_of_codec = difference_codec(spec)
    if not name_of_codec:
        return dict(tensors)
    return {name: _added(name_of_codec, name, tensor, base.get(name)) for name, tensor in tensors.items()}


def _added(name_of_codec: str, name: str, tensor: Tensor, base: Tensor | None) -> Tensor:
    """Return base and difference added; what is not packed as it is."""
    if base is None or not base.is_floating_point() or tensor.dtype != torch.uint8:
        return tensor
    if base.dtype not in DTYPES.values():
        raise RemoteProtocolError(f"{name} came as a difference from a {base.dtype}")
    meta = TensorMeta("weights", NAMES[base.dtype], tuple(base.shape), name_of_codec, tensor.numel())
    difference, _ = codec(name_of_codec).decode(meta, [memory(tensor)])
    return base + difference
