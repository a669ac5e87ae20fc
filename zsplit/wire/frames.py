"""Headers to bytes and back, and the rules that every message must meet before anyone looks at a payload."""

from collections.abc import Sequence
from math import prod

import msgspec

from zsplit.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from zsplit.spec import bounds, parse
from zsplit.wire.messages import Chunk, ControlMessage, Data, DataMessage, TensorMeta, Tensors

MAX_HEADER = 64 * 1024
"""Bytes of a data header; only those of tensors with very many dimensions come near."""

MAX_CONTROL = 16 * 1024 * 1024
"""Bytes of a control message: the config, and the orders of a server with a thousand clients."""

CHUNK = 4 * 1024 * 1024
"""Bytes of a state that travel in one frame at most."""

LARGEST = 2**40
"""Bytes of a tensor in memory that any peer could mean; where a config says less, that holds."""

MAX_FRAMES = 8
"""Frames behind the header of a data message."""

ITEMSIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of one element, by safetensors' name of the dtype."""

UNDECODABLE = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError)
"""What msgspec raises for bytes that are no message."""

NO_MESSAGE = "not a message of protocol 1"

Tail = tuple[int, int, dict[str, float]]
"""What differs in the headers of tensors of the like: step, micro and scalars."""

TAIL, NO_TAIL = b"\x93", b"\x00\x00\x80"
"""What makes a tail an array of three; and the tail of step 0, micro 0 and no scalars."""

_encoder = msgspec.msgpack.Encoder()
_control: msgspec.msgpack.Decoder[ControlMessage] = msgspec.msgpack.Decoder(ControlMessage)
_data: msgspec.msgpack.Decoder[DataMessage] = msgspec.msgpack.Decoder(DataMessage)
_tail: msgspec.msgpack.Decoder[Tail] = msgspec.msgpack.Decoder(Tail)


class _Preamble(msgspec.Struct, tag_field="type", tag="hello"):
    protocol: int


_preamble = msgspec.msgpack.Decoder(_Preamble)


def encode(message: ControlMessage | DataMessage) -> bytes:
    """Return the header's bytes."""
    try:
        header = _encoder.encode(message)
    except (TypeError, ValueError, OverflowError) as error:
        raise LocalProtocolError(f"cannot encode {type(message).__name__}: {error}") from error
    limit = MAX_HEADER if isinstance(message, Data) else MAX_CONTROL
    if len(header) > limit:
        raise LocalProtocolError(f"{type(message).__name__} of {len(header)} bytes is over the limit of {limit}")
    if not isinstance(message, Data):
        _check_receivable(message, header)
    return header


def _check_receivable(message: ControlMessage, header: bytes) -> None:
    """Raise LocalProtocolError where the other end would drop the message, and everybody would wait for it for ever."""
    try:
        _control.decode(header)
    except msgspec.ValidationError as error:
        raise LocalProtocolError(f"cannot send {type(message).__name__}, which is not valid: {error}") from error


def decode_control(header: bytes) -> ControlMessage:
    """Return the control message. Raises RemoteProtocolError for anything else."""
    if len(header) > MAX_CONTROL:
        raise RemoteProtocolError(f"a control message of {len(header)} bytes is over the limit of {MAX_CONTROL}")
    try:
        return _control.decode(header)
    except UNDECODABLE as error:
        raise RemoteProtocolError(f"{NO_MESSAGE}: {error}") from error


def decode_data(header: bytes) -> DataMessage:
    """Return the data message's header. Raises RemoteProtocolError for anything else."""
    if len(header) > MAX_HEADER:
        raise RemoteProtocolError(f"a data header of {len(header)} bytes is over the limit of {MAX_HEADER}")
    try:
        return _data.decode(header)
    except UNDECODABLE as error:
        raise RemoteProtocolError(f"{NO_MESSAGE}: {error}") from error


def head_of(message: Tensors) -> bytes:
    """Return the bytes with which the headers of all tensors of the like begin: all but step, micro and scalars."""
    return _encoder.encode(msgspec.structs.replace(message, step=0, micro=0, scalars={}))[: -len(NO_TAIL)]


def decode_tail(tail: bytes) -> Tail:
    """Return step, micro and scalars from a header's bytes after its head. Raises RemoteProtocolError for others."""
    try:
        return _tail.decode(TAIL + tail)
    except UNDECODABLE as error:
        raise RemoteProtocolError(f"{NO_MESSAGE}: {error}") from error


def protocol_of(header: bytes) -> int | None:
    """Return the protocol version of a hello that this version may be unable to decode, or None."""
    try:
        return _preamble.decode(header).protocol
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return None


def check_frames(message: DataMessage, sizes: Sequence[int], largest: int = LARGEST) -> None:
    """Check that the frames behind a header are what it declares: their number, sizes, dtypes, shapes and codecs.

    Raises RemoteProtocolError. Shapes and byte counts must be what the codec makes of each other, and no tensor may
    have more than `largest` bytes, whatever it was compressed to.
    """
    if isinstance(message, Tensors):
        for meta in message.tensors:
            _check_meta(meta, largest)
    check_sizes(message, sizes)


def check_sizes(message: DataMessage, sizes: Sequence[int]) -> None:
    """Check that the frames behind a header have the number and the sizes that it declares.

    Raises RemoteProtocolError. To whoever only passes the frames on nothing else matters, but how many bytes compressed
    tensors would have had.
    """
    declared: list[int] = []
    name = type(message).__name__
    if isinstance(message, Tensors):
        declared = [meta.nbytes for meta in message.tensors]
        if any(meta.codec != "raw" and raw_size(meta) > LARGEST for meta in message.tensors):
            raise RemoteProtocolError(f"{name} declares a tensor of more than {LARGEST} bytes")
    elif isinstance(message, Chunk) and message.nbytes:
        declared = [message.nbytes]
    if list(sizes) != declared:
        raise RemoteProtocolError(f"{name} declares frames of {declared} bytes, {list(sizes)} came")


def elements(shape: Sequence[int]) -> int:
    """Return the number of elements of a shape. Raises RemoteProtocolError for a negative dimension."""
    if min(shape, default=0) < 0:
        raise RemoteProtocolError(f"a tensor cannot have the shape {list(shape)}")
    return prod(shape)


def raw_size(meta: TensorMeta) -> int:
    """Return the bytes of a tensor as it is in memory. Raises RemoteProtocolError where there is no such tensor."""
    if meta.dtype not in ITEMSIZE:
        raise RemoteProtocolError(f"unknown dtype {meta.dtype!r}")
    return elements(meta.shape) * ITEMSIZE[meta.dtype]


def _check_meta(meta: TensorMeta, largest: int) -> None:
    raw = raw_size(meta)
    least, most = raw, raw
    if meta.codec != "raw":
        try:
            least, most = bounds(parse(meta.codec), meta.shape, ITEMSIZE[meta.dtype])
        except ConfigError as error:
            raise RemoteProtocolError(str(error)) from error
    if not least <= meta.nbytes <= most:
        size = f"{raw} bytes" if meta.codec == "raw" else f'{least} to {most} bytes with the codec "{meta.codec}"'
        raise RemoteProtocolError(f"{meta.dtype}{list(meta.shape)} is {size}, the header says {meta.nbytes}")
    if raw > largest:
        raise RemoteProtocolError(f"{meta.dtype}{list(meta.shape)} is {raw} bytes, the limit is {largest}")
