"""What a forward pass leaves in memory for the backward pass; what the tensor at each cut is on the wire, and costs."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from zsplit.codec import Codec, Context, codec
from zsplit.config.sections import CodecSection
from zsplit.model import CutPoint
from zsplit.train.profile.overhead import Clock


class Passage(NamedTuple):
    """What a tensor is on the wire, in bytes, and the seconds in which it is packed and unpacked."""

    nbytes: int
    encode: float
    decode: float


class Witness:
    """Sees a chain of stretches run forward: bytes a sample that each saves (`saved`), and at each cut (`up`, `down`).

    `encode` and `decode` are the seconds a sample in which a peer of this role packs what it sends and unpacks what it
    receives at each cut, 0 where that travels raw. Where a cut's tensor was not seen, zeros stand for it.
    """

    def __init__(self, cuts: Sequence[CutPoint], codecs: CodecSection, role: str, clock: Clock) -> None:
        self._up, self._down = codec(codecs.up), codec(codecs.down)
        self._role, self._clock = role, clock
        self.saved = [0.0] * (len(cuts) + 1)
        self.up, self.down, self.encode, self.decode = ([0.0] * len(cuts) for _ in range(4))
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
        """Weigh and time the tensor at a cut. Its gradient has the same shape."""
        context, samples = Context(), len(output)
        smashed = self._pass(self._up, output, context)
        gradients = self._pass(self._down, output, context)
        self.up[cut], self.down[cut] = smashed.nbytes / samples, gradients.nbytes / samples
        sent, received = (smashed, gradients) if self._role == "client" else (gradients, smashed)
        self.encode[cut], self.decode[cut] = sent.encode / samples, received.decode / samples

    def _pass(self, codec_: Codec, tensor: Tensor, context: Context) -> Passage:
        """Pack a tensor and unpack it, twice: what is done for the first time takes longer."""
        if codec_.spec.text == "raw":
            return Passage(tensor.nbytes, 0.0, 0.0)
        for _ in range(2):
            began = self._now(tensor.device)
            meta, frames = codec_.encode(tensor, context)
            packed = self._now(tensor.device)
            codec_.decode(meta, frames, context, tensor.device)
        return Passage(meta.nbytes, packed - began, self._now(tensor.device) - packed)

    def _now(self, device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return self._clock()
