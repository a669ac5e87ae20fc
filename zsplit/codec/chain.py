"""The stages of a spec put together: select values, write them, compress the bytes; and the way back."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from zsplit.codec import lz4, topk, values
from zsplit.codec.context import Context
from zsplit.codec.tensors import DTYPES, NAMES, aligned, memory, tensor_of
from zsplit.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from zsplit.spec import Half, Mask, Ms, Quantize, Spec, bounds, nbytes, parse, sizes
from zsplit.wire.frames import elements
from zsplit.wire.messages import TensorMeta, What

CPU = torch.device("cpu")


@lru_cache(maxsize=256)
def codec(spec: str) -> "Codec":
    """Return the codec that a spec names. Raises ConfigError where it names none."""
    return Codec(parse(spec))


class Codec:
    """A codec. `encode` and `decode` work on the device where the tensor is, or is to be, and keep no state.

    `context` is what both ends know of the tensor that this one answers: `mask` reads it; codecs that keep positions
    fill it in.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def encode(
        self, tensor: Tensor, context: Context | None = None, seed: int | None = None, what: What = "other"
    ) -> tuple[TensorMeta, list[memoryview]]:
        """Return the tensor's description and its one frame; a contiguous CPU tensor's raw frame is its own memory.

        `seed` is for what is random in training; without one nothing is. Raises LocalProtocolError for a tensor that
        cannot travel so, RunFailedError for values that are not finite where they are compared.
        """
        dtype = tensor.dtype
        if dtype not in NAMES or not (self.spec.lossless or dtype.is_floating_point):
            raise LocalProtocolError(f'cannot send {dtype} with the codec "{self.spec.text}"')
        frame = self._frame(tensor.detach(), context if context is not None else Context(), seed)
        return TensorMeta(what, NAMES[dtype], tuple(tensor.shape), self.spec.text, frame.nbytes), [frame]

    def decode(
        self,
        meta: TensorMeta,
        frames: Sequence[memoryview],
        context: Context | None = None,
        device: torch.device = CPU,
    ) -> tuple[Tensor, Context]:
        """Return the tensor, and what this end now knows of it.

        A raw tensor is in the frame's memory where that is aligned as torch's own, else a copy, and always on the CPU.
        Raises RemoteProtocolError where the frame is not what `meta` says, before memory is taken for it.
        """
        context = context if context is not None else Context()
        dtype = self._checked(meta, frames)
        if self.spec.lossless and not self.spec.lz4:
            return aligned(tensor_of(frames[0], dtype)).reshape(meta.shape), context
        places = self._places_before(meta, context, device)
        size = nbytes(self.spec, meta.shape, dtype.itemsize, 0 if places is None else len(places))
        data = tensor_of(self._bytes(frames[0], size, dtype), torch.uint8).to(device)
        return self._tensor(data, meta.shape, dtype, context, places), context

    # Out

    def _frame(self, tensor: Tensor, context: Context, seed: int | None) -> memoryview:
        if not tensor.numel():
            self._keep_nothing(tuple(tensor.shape), context)
            return memoryview(b"")
        if self.spec.lossless:
            data = memory(tensor.cpu())
        else:
            pieces = self._pieces(tensor.contiguous(), context, seed)
            data = memory((torch.cat(pieces) if len(pieces) > 1 else pieces[0]).cpu())
        return lz4.squeeze(data, self._item(tensor.dtype)) if self.spec.lz4 else data

    def _pieces(self, x: Tensor, context: Context, seed: int | None) -> list[Tensor]:
        match self.spec.select:
            case None:
                return values.write(self.spec.values, x, context, seed)
            case Mask():
                places = topk.kept_before(tuple(x.shape), context, x.device, ours=True)
                return values.write(self.spec.values, x.view(-1).take(places), context, seed)
            case stage:
                places = topk.choose(stage, x, seed)
                context.keep(tuple(x.shape), places)
                kept = values.write(self.spec.values, x.view(-1).take(places), context, seed)
                return [topk.write(stage, tuple(x.shape), places), *kept]

    def _keep_nothing(self, shape: tuple[int, ...], context: Context) -> None:
        if self.spec.keeps:
            context.keep(shape, torch.empty(0, dtype=torch.int64))

    # In

    def _checked(self, meta: TensorMeta, frames: Sequence[memoryview]) -> torch.dtype:
        """Return the tensor's type. Raises RemoteProtocolError unless header and frame can belong together."""
        if meta.codec != self.spec.text or meta.dtype not in DTYPES:
            raise RemoteProtocolError(f'cannot decode {meta.dtype} with the codec "{meta.codec}"')
        elements(meta.shape)
        dtype = DTYPES[meta.dtype]
        if not (self.spec.lossless or dtype.is_floating_point):
            raise RemoteProtocolError(f'cannot decode {meta.dtype} with the codec "{meta.codec}"')
        least, most = bounds(self.spec, meta.shape, dtype.itemsize)
        came = [frame.nbytes for frame in frames]
        if came != [meta.nbytes] or not least <= meta.nbytes <= most:
            raise RemoteProtocolError(
                f'{meta.dtype}{list(meta.shape)} is {least} to {most} bytes with the codec "{meta.codec}", '
                f"the header says {meta.nbytes}, {came} came"
            )
        return dtype

    def _places_before(self, meta: TensorMeta, context: Context, device: torch.device) -> Tensor | None:
        if isinstance(self.spec.select, Mask) and elements(meta.shape):
            return topk.kept_before(meta.shape, context, device, ours=False)
        return None

    def _bytes(self, frame: memoryview, size: int, dtype: torch.dtype) -> memoryview:
        """Return the frame's bytes before `lz4`. Raises RemoteProtocolError where they are not so many."""
        data = lz4.expand(frame, size, self._item(dtype)) if self.spec.lz4 and frame.nbytes else frame
        if data.nbytes != size:
            raise RemoteProtocolError(f'A frame of the codec "{self.spec.text}" has {data.nbytes} bytes, not {size}')
        return data

    def _item(self, dtype: torch.dtype) -> int:
        """Return how many bytes belong together in a frame: those of a value where there is nothing else in it."""
        if self.spec.select is not None or isinstance(self.spec.values, Quantize | Ms):
            return 1
        return 2 if isinstance(self.spec.values, Half) else dtype.itemsize

    def _tensor(
        self, data: Tensor, shape: tuple[int, ...], dtype: torch.dtype, context: Context, places: Tensor | None
    ) -> Tensor:
        if not elements(shape):
            self._keep_nothing(shape, context)
            return torch.empty(shape, dtype=dtype, device=data.device)
        stage = self.spec.select
        if stage is None:
            return values.read(self.spec.values, data, shape, dtype, context)
        if not isinstance(stage, Mask):
            size = sizes.positions(stage, shape)
            places = topk.read(stage, data[:size], shape)
            context.keep(shape, places)
            data = data[size:]
        x = torch.zeros(elements(shape), dtype=dtype, device=data.device)
        if places is not None and len(places):
            x[places] = values.read(self.spec.values, data, (len(places),), dtype, context)
        return x.view(shape)


def encode(
    what: What, tensor: Tensor, spec: str = "raw", context: Context | None = None, seed: int | None = None
) -> tuple[TensorMeta, memoryview]:
    """Return the tensor's description and its frame. Raises LocalProtocolError for a tensor that cannot travel so."""
    try:
        meta, frames = codec(spec).encode(tensor, context, seed, what)
    except ConfigError as error:
        raise LocalProtocolError(str(error)) from error
    return meta, frames[0]


def decode(meta: TensorMeta, frame: memoryview, context: Context | None = None, device: torch.device = CPU) -> Tensor:
    """Return the tensor that a frame holds. Raises RemoteProtocolError where it holds none."""
    try:
        named = codec(meta.codec)
    except ConfigError as error:
        raise RemoteProtocolError(str(error)) from error
    return named.decode(meta, [frame], context, device)[0]


def is_view(tensor: Tensor, spec: str = "raw") -> bool:
    """Whether encoding computes and copies nothing: the frame is the tensor's own memory."""
    return spec == "raw" and tensor.device.type == "cpu" and tensor.is_contiguous()
