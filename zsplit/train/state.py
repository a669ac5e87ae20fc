"""States in memory: named tensors in one buffer, laid out as they travel and as they are stored.

A snapshot is taken by copying once into the buffer; every chunk of it is then a slice, and every tensor a
view. The plain functions collect what a half of the model holds, weights and optimizer buffers alike.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zsplit.codec import DTYPES, NAMES, memory
from zsplit.errors import RemoteProtocolError
from zsplit.wire.manifest import LOCAL, OPTIMIZER, WEIGHTS, Entry, Manifest, digest_of

Tensors = dict[str, Tensor]


class State:
    """A part of the run's state, complete here: its manifest, and one buffer with all bytes in layout order."""

    def __init__(self, manifest: Manifest, buffer: Tensor) -> None:
        self.manifest = manifest
        self.buffer = buffer
        self.digest = manifest.digest

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "State":
        """Take a snapshot of the tensors, on whichever device they are."""
        layout = Manifest.of(Entry(n, NAMES[t.dtype], tuple(t.shape), "") for n, t in tensors.items())
        buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
        for name, (first, last) in layout.offsets().items():
            _view(buffer[first:last], tensors[name].dtype, tensors[name].shape).copy_(tensors[name].detach())
        return cls(_digested(layout, buffer), buffer)

    def tensors(self, wanted: Callable[[str], bool] = lambda _: True) -> Tensors:
        """Return the tensors by name, as views of the buffer. Do not write to them."""
        offsets = self.manifest.offsets()
        return {
            e.name: _view(self.buffer[slice(*offsets[e.name])], DTYPES[e.dtype], e.shape)
            for e in self.manifest.entries
            if wanted(e.name)
        }

    def read(self, offset: int, length: int) -> memoryview:
        """Return bytes of the data section, without a copy. Raises RemoteProtocolError outside of it."""
        if offset < 0 or length < 0 or offset + length > len(self.buffer):
            raise RemoteProtocolError(f"bytes {offset} to {offset + length} are outside of state {self.digest}")
        return memory(self.buffer[offset : offset + length])


class Arriving:
    """The buffer that a fetched state, or the wanted part of one, is written into."""

    def __init__(self, manifest: Manifest, wanted: Callable[[str], bool]) -> None:
        self.manifest = manifest
        self._wanted = wanted
        self._buffer = torch.empty(manifest.nbytes, dtype=torch.uint8)  # pages that nobody writes cost nothing
        self._memory = self._buffer.numpy().data  # written without torch's threads, which the trainer needs meanwhile

    def write(self, offset: int, data: memoryview) -> None:
        if data.nbytes:
            self._memory[offset : offset + data.nbytes] = data

    def finish(self) -> Tensors:
        """Return the wanted tensors. Raises RemoteProtocolError where one is not what the manifest names."""
        offsets = self.manifest.offsets()
        for entry in self.manifest.entries:
            if self._wanted(entry.name):
                data = memory(self._buffer[slice(*offsets[entry.name])])
                if digest_of(data) != entry.digest:
                    raise RemoteProtocolError(f"{entry.name} was damaged on the way")
        return State(self.manifest, self._buffer).tensors(self._wanted)


def _view(data: Tensor, dtype: torch.dtype, shape: Iterable[int]) -> Tensor:
    return data.view(dtype).reshape(tuple(shape))


def _digested(layout: Manifest, buffer: Tensor) -> Manifest:
    offsets = layout.offsets()
    return Manifest(
        tuple(
            Entry(e.name, e.dtype, e.shape, digest_of(memory(buffer[slice(*offsets[e.name])]))) for e in layout.entries
        )
    )


# What a half of the model holds, by name


def weights_of(part: nn.Module) -> Tensors:
    """Return parameters and buffers under their plain names, not copied."""
    return dict(part.state_dict())


Prefix = Callable[[str], str]
"""What stands before the buffers of the parameter of this name."""


def optimizer_buffers(part: nn.Module, optimizer: Optimizer, prefix: Prefix) -> Tensors:
    """Return the optimizer's buffers as `<prefix><buffer>/<parameter>`; a buffer that does not exist is absent."""
    found: Tensors = {}
    for name, parameter in part.named_parameters():
        for buffer, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{prefix(name)}{buffer}/{name}"] = value
    return found


def load_optimizer(part: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], prefix: Prefix) -> None:
    """Give the optimizer copies of its buffers from a state; those that the state lacks are absent again."""
    optimizer.state.clear()
    by_parameter: dict[str, Tensors] = {}
    for name, value in tensors.items():
        if name.startswith((OPTIMIZER, LOCAL)):
            *_, buffer, parameter = name.split("/", 3 if name.startswith(LOCAL) else 2)
            if buffer != WEIGHTS and name == f"{prefix(parameter)}{buffer}/{parameter}":
                by_parameter.setdefault(parameter, {})[buffer] = value
    for key, weight in part.named_parameters():
        if key in by_parameter:
            optimizer.state[weight] = {
                buffer: value.clone() if buffer == "step" else value.to(weight.device, copy=True)
                for buffer, value in by_parameter[key].items()
            }


def local_prefix(owner: str) -> str:
    """Return the prefix of the buffers that a peer keeps for itself, stored for it in the version."""
    return f"{LOCAL}{owner}/"
