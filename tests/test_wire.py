"""Messages, headers and events: what was sent comes back, and anything else is one typed error."""

import math
import select
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from helpers import anything, damaged, unhurried
from hypothesis import example, given
from hypothesis import strategies as st

from zsplit.errors import LocalProtocolError, RemoteProtocolError
from zsplit.wire import events
from zsplit.wire.events import AnyEvent, ClientEvent, LogEvent, ServerEvent, decode_event, encode_event, topic
from zsplit.wire.frames import (
    CHUNK,
    ITEMSIZE,
    MAX_CONTROL,
    MAX_HEADER,
    check_frames,
    decode_control,
    decode_data,
    decode_tail,
    elements,
    encode,
    head_of,
    protocol_of,
)
from zsplit.wire.messages import (
    PROTOCOL,
    Attach,
    Beat,
    Chunk,
    ControlMessage,
    DataMessage,
    Held,
    Hello,
    Lease,
    Pull,
    Step,
    Tally,
    TensorMeta,
    Tensors,
    bucket_of,
    bucket_seconds,
)
from zsplit.wire.wake import Wake

Decoder = Callable[[bytes], Any]

LEASE = Lease(1, 7)
F32 = TensorMeta("smashed", "F32", (2, 3), "raw", 24)
LABELS = TensorMeta("labels", "I64", (2,), "raw", 16)

nested = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
"""What msgpack can say."""


def tensors(*metas: TensorMeta) -> Tensors:
    return Tensors("run", "token", LEASE, "train", 0, metas, 3, 0, {})


def decoded_or_refused(decode: Decoder, data: bytes) -> Any:
    """Return the message, or None where the bytes were refused with the one error that is allowed."""
    try:
        return decode(data)
    except RemoteProtocolError:
        return None


# Messages


@unhurried
@given(anything(ControlMessage))
def test_a_control_message_comes_back_as_it_was(message: ControlMessage) -> None:
    assert decode_control(encode(message)) == message


@unhurried
@given(anything(DataMessage))
def test_a_data_header_comes_back_as_it_was(message: DataMessage) -> None:
    assert decode_data(encode(message)) == message


@unhurried
@given(anything(Tensors), st.integers(0, 2**32), st.integers(0, 2**32))
def test_a_header_is_its_head_and_its_tail(message: Tensors, step: int, micro: int) -> None:
    header, head = encode(message), head_of(message)
    assert header.startswith(head)
    assert decode_tail(header[len(head) :]) == (message.step, message.micro, message.scalars)
    assert head_of(msgspec.structs.replace(message, step=step, micro=micro, scalars={"loss": 0.5})) == head
    assert head_of(msgspec.structs.replace(message, leg=message.leg ^ 1)) != head


@unhurried
@given(damaged(st.just(b"\x05\x00\x81\xa4loss\xcb\x00\x00\x00\x00\x00\x00\x00\x00")) | st.binary(max_size=20))
def test_a_tail_is_read_where_the_whole_header_is(tail: bytes) -> None:
    message = tensors(F32)
    whole = decoded_or_refused(decode_data, head_of(message) + tail)
    read = decoded_or_refused(decode_tail, tail)
    assert (whole and repr((whole.step, whole.micro, whole.scalars))) == (read and repr(read))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_reaches_the_other_side(loss: float) -> None:
    message = Tensors("run", "token", LEASE, "train", 1, (), 3, 0, {"loss": loss})
    received = decode_data(encode(message))
    assert isinstance(received, Tensors)
    assert repr(received.scalars["loss"]) == repr(loss)


@pytest.mark.parametrize("decode", [decode_control, decode_data, decode_event])
@unhurried
@given(data=st.binary() | nested.map(msgspec.msgpack.encode) | nested.map(msgspec.json.encode))
def test_any_bytes_are_a_message_or_one_typed_error(decode: Decoder, data: bytes) -> None:
    decoded_or_refused(decode, data)


@unhurried
@given(damaged(anything(ControlMessage).map(encode)))
@example(b"\x81\xa4type\xa3h\xff\xff")
@example(b"\x81\xa1x" + b"\x91" * 100_000)
def test_damaged_control_messages_are_read_or_refused(data: bytes) -> None:
    message = decoded_or_refused(decode_control, data)
    assert message is None or isinstance(message, ControlMessage)


@unhurried
@given(damaged(anything(DataMessage).map(encode)))
@example(b"\x93\xa1\xff\xa0\xa0")
@example(b"\x93\xa1a" + b"\x91" * (MAX_HEADER - 10))
def test_damaged_data_headers_are_read_or_refused(data: bytes) -> None:
    message = decoded_or_refused(decode_data, data)
    assert message is None or isinstance(message, DataMessage)


@unhurried
@given(damaged(anything(ControlMessage).map(encode)) | nested.map(msgspec.msgpack.encode) | st.binary())
@example(b"\x82\xa4type\xa5hel\xff\xff\xa8protocol\x02")
@example(b"\x81\xa1x" + b"\x91" * 100_000)
def test_asking_for_the_protocol_of_any_bytes_never_raises(data: bytes) -> None:
    assert protocol_of(data) is None or isinstance(protocol_of(data), int)


def test_the_protocol_of_a_hello_from_another_time_can_still_be_read() -> None:
    hello = {"type": "hello", "protocol": PROTOCOL + 1, "role": "oracle", "colour": ["unheard of"]}
    with pytest.raises(RemoteProtocolError):
        decode_control(msgspec.msgpack.encode(hello))
    assert protocol_of(msgspec.msgpack.encode(hello)) == PROTOCOL + 1
    assert protocol_of(encode(Beat(session="token", sent=0.0))) is None


@pytest.mark.parametrize(("decode", "limit"), [(decode_control, MAX_CONTROL), (decode_data, MAX_HEADER)])
def test_a_header_over_the_limit_is_refused_unread(decode: Decoder, limit: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"of {limit + 1} bytes is over the limit of {limit}"):
        decode(b"\xc0" * (limit + 1))
    with pytest.raises(RemoteProtocolError, match="not a message of protocol 1"):
        decode(b"\xc0" * limit)


@pytest.mark.parametrize(
    "message",
    [
        Hello(protocol=2**64, role="client", instance="a"),
        Hello(protocol=PROTOCOL, role="client", instance="\ud800"),
        Beat(session="token", sent=0.0, held=(Held(lease=Lease(1, -(2**63) - 1), state="done"),)),
        Step("run", "token", LEASE, 3, object()),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_encoded_is_a_local_fault(message: ControlMessage | DataMessage) -> None:
    with pytest.raises(LocalProtocolError, match=f"cannot encode {type(message).__name__}: "):
        encode(message)


def test_a_control_message_that_the_other_end_would_drop_is_a_local_fault() -> None:
    held = Held(lease=Lease(1, 1), state="done", tally=Tally(seconds=-1.0))
    with pytest.raises(LocalProtocolError, match=r"cannot send Beat, which is not valid: Expected `float` >= 0\.0"):
        encode(Beat(session="s", sent=0.0, held=(held,)))


def test_a_header_that_every_peer_would_refuse_is_a_local_fault() -> None:
    with pytest.raises(LocalProtocolError, match="over the limit"):
        encode(Attach("run", "x" * MAX_HEADER))


@unhurried
@given(st.floats(1e-9, 1e9))
def test_a_bucket_is_right_to_half_a_percent(seconds: float) -> None:
    assert bucket_seconds(bucket_of(seconds)) == pytest.approx(seconds, rel=0.005)


@unhurried
@given(st.floats(max_value=1e-9, allow_nan=False))
def test_no_time_at_all_has_a_bucket_too(seconds: float) -> None:
    assert bucket_seconds(bucket_of(seconds)) == pytest.approx(1e-9, rel=0.005)


# Frames

metas = st.builds(
    lambda what, dtype, shape: TensorMeta(what, dtype, tuple(shape), "raw", elements(shape) * ITEMSIZE[dtype]),
    st.sampled_from(["smashed", "labels", "gradients"]),
    st.sampled_from(sorted(ITEMSIZE)),
    st.lists(st.integers(0, 5), max_size=3),
)


@st.composite
def declared(draw: st.DrawFn) -> tuple[DataMessage, list[int]]:
    """Return a message that is as it should be, and the sizes of its frames."""
    message = draw(anything(DataMessage))
    if isinstance(message, Tensors):
        message = msgspec.structs.replace(message, tensors=tuple(draw(st.lists(metas, max_size=3))))
        return message, [meta.nbytes for meta in message.tensors]
    if isinstance(message, Chunk):
        message = msgspec.structs.replace(message, nbytes=draw(st.integers(0, CHUNK)))
        return message, [message.nbytes] if message.nbytes else []
    return message, []


@unhurried
@given(declared())
def test_frames_as_declared_pass(pair: tuple[DataMessage, list[int]]) -> None:
    check_frames(*pair)


@unhurried
@given(declared(), st.lists(st.integers(0, 2**20), max_size=4))
def test_frames_of_any_other_number_or_size_are_refused(pair: tuple[DataMessage, list[int]], other: list[int]) -> None:
    message, sizes = pair
    for wrong in (other, sizes + other, sizes[1:], [size + 1 for size in sizes]):
        if wrong != sizes:
            with pytest.raises(RemoteProtocolError, match=f"{type(message).__name__} declares frames of"):
                check_frames(message, wrong)


@pytest.mark.parametrize(
    ("meta", "sentence"),
    [
        (TensorMeta("smashed", "F32", (2, 3), "raw", 25), r"F32\[2, 3\] is 24 bytes, the header says 25"),
        (TensorMeta("smashed", "F32", (2, -3), "raw", 24), r"cannot have the shape \[2, -3\]"),
        (TensorMeta("smashed", "F31", (2, 3), "raw", 24), "unknown dtype 'F31'"),
        (TensorMeta("smashed", "F32", (2, 3), "lz4", -1), "the header says -1"),
        (TensorMeta("smashed", "F64", (2**40, 2**40), "raw", 0), "the header says 0"),
    ],
)
def test_a_tensor_that_does_not_multiply_out_is_refused(meta: TensorMeta, sentence: str) -> None:
    with pytest.raises(RemoteProtocolError, match=sentence):
        check_frames(tensors(LABELS, meta), [LABELS.nbytes, meta.nbytes])


def test_a_compressed_tensor_may_have_any_number_of_bytes() -> None:
    check_frames(tensors(TensorMeta("smashed", "F32", (2, 3), "lz4", 7)), [7])


def test_a_chunk_of_less_than_nothing_is_refused() -> None:
    chunk = Chunk("run", "token", LEASE, "client.0", "d", 0, -1, "weights")
    with pytest.raises(RemoteProtocolError, match=r"declares frames of \[-1\] bytes, \[\] came"):
        check_frames(chunk, [])


def test_messages_without_tensors_have_no_frames() -> None:
    for message in (Attach("run", "token"), Pull("run", "token", LEASE, "server.0", "d", -1, 0, "other")):
        check_frames(message, [])
        with pytest.raises(RemoteProtocolError, match=r"declares frames of \[\] bytes, \[0\] came"):
            check_frames(message, [0])


# Events


@unhurried
@given(anything(AnyEvent))
def test_an_event_comes_back_as_it_was(event: AnyEvent) -> None:
    assert decode_event(encode_event(event)) == event


@unhurried
@given(damaged(anything(AnyEvent).map(encode_event)))
@example(b'{"topic":"log\xff"}')
@example(b"\xff")
@example(b'{"topic":' + b"[" * 100_000)
def test_damaged_events_are_read_or_refused(data: bytes) -> None:
    event = decoded_or_refused(decode_event, data)
    assert event is None or isinstance(event, AnyEvent)


def test_a_topic_names_the_kind_and_where_there_are_several_the_index() -> None:
    assert topic(LogEvent(level="info", who="broker", text="")) == "log"
    assert topic(ClientEvent(index=3, state="waiting")) == "client.3"
    assert topic(ServerEvent(index=0, state="waiting")) == "server.0"


def test_every_event_says_its_topic_and_the_version_of_its_schema() -> None:
    for kind in msgspec.inspect.type_info(events.AnyEvent).types:
        assert [field.name for field in kind.fields][:3] == ["v", "seq", "time"]
        assert kind.tag_field == "topic"


# Waking a poller


def readable(wake: Wake) -> bool:
    return bool(select.select([wake.fd], [], [], 0)[0])


def test_waking_shows_until_it_is_cleared_however_often_it_was_done() -> None:
    wake = Wake()
    assert not readable(wake)
    for _ in range(100_000):  # more than the pipe holds
        wake.set()
    assert readable(wake)
    wake.clear()
    assert not readable(wake)
    wake.set()
    assert readable(wake)
    wake.close()


def test_waking_one_that_has_gone_is_no_error() -> None:
    wake = Wake()
    wake.close()
    wake.set()
