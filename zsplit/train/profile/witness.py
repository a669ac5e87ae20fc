"""What a forward pass leaves in memory for the backward pass, and what each cut's tensor is on the wire."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from zsplit.codec import encode
from zsplit.config.sections import CodecSection
from zsplit.model import CutPoint


class Witness:
    """Sees a chain of stretches run forward: bytes a sample that each saves (`saved`), and at each cut (`up`, `down`).

    Where a cut's tensor was not seen, zeros stand for it.
    """

    def __init__(self, cuts: Sequence[CutPoint], codec: CodecSection) -> None:
        self._codec = codec
        self.saved = [0.0] * (len(cuts) + 1)
        self.up, self.down = [0.0] * len(cuts), [0.0] * len(cuts)
        for cut in cuts:
            self.look(cut.index, torch.zeros(1, *cut.shape, dtype=getattr(torch, cut.dtype)))

    def begin(self, samples: int, weights: Iterable[Tensor]) -> None:
        """Watch a pass of so many samples. What lies in the memory of the weights is not counted."""
        self._samples = samples
        self._seen = {weight.untyped_storage().data_ptr() for weight in weights}
        self.saved = [0.0] * len(self.saved)

    @contextmanager
    def watch(self, stretch: int) -> Iterator[None]:
        """Count what autograd saves meanwhile, each memory once: for the stretch that saves it first."""

        def pack(tensor: Tensor) -> Tensor:
            memory = tensor.untyped_storage()
            if memory.data_ptr() not in self._seen:
                self._seen.add(memory.data_ptr())
                self.saved[stretch] += memory.nbytes() / self._samples
            return tensor.detach()  # the tensor itself would hold its own graph, for ever

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def look(self, cut: int, output: Tensor) -> None:
        """Weigh the tensor at a cut. Its gradient has the same shape."""
        self.up[cut] = encode("smashed", output, self._codec.up)[1].nbytes / len(output)
        self.down[cut] = encode("gradients", output, self._codec.down)[1].nbytes / len(output)
