"""Codecs on the way between two peers: seeds, what was kept for the way back, and the bytes at the socket."""

import time
from collections.abc import Iterator
from queue import SimpleQueue

import msgspec
import pytest
import torch
import zmq
from torch import Tensor

from zsplit.errors import LocalProtocolError, RemoteProtocolError
from zsplit.spec import nbytes, parse
from zsplit.train.link.clock import Clock
from zsplit.train.link.exchange import Exchange, Incoming, Outgoing, Tagged
from zsplit.train.link.spans import Recorder
from zsplit.wire import frames, messages
from zsplit.wire.messages import Lease, Plan, Tensors

LEASE = Lease(1, 1)
MS, MASK = "ms:ratio=0.9,bits=2", "mask"


def turn(up: str, down: str, client: int = 0, round_: int = 0) -> messages.Turn:
    base, plan = messages.Ref("", "broker"), Plan("relu", up=up, down=down)
    return messages.Turn(lease=LEASE, client=client, server=0, base=base, plan=plan, round=round_, first=0, count=9)


class End:
    """One end: an exchange as a peer has it, on a real socket. `size` is what the last message took there."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self.socket = socket
        self.out: SimpleQueue[Outgoing] = SimpleQueue()
        self.into: SimpleQueue[Incoming | Exception] = SimpleQueue()
        self.exchange = Exchange(Clock(), Recorder(False), self.out.put, self.into.put, self.into.put, seed=3)
        self.sizes: list[int] = []

    def give(self, leg: int, *tensors: Tagged, step: int = 0, micro: int = 0, kind: messages.Kind = "train") -> None:
        self.exchange.send(Tensors("r", "s", LEASE, kind, leg, (), step, micro), tensors)

    def pass_on(self) -> None:
        """Put the next message that is ready on the wire."""
        message, payload, _ = self.out.get(timeout=10)
        self.socket.send_multipart([frames.encode(message), *payload], copy=False)

    def take(self) -> Incoming:
        """Receive a message and return it decoded. Raises what went wrong."""
        assert self.socket.poll(10_000)
        header, *parts = self.socket.recv_multipart(copy=False)
        buffers = [memoryview(part.buffer) for part in parts]
        self.sizes = [len(header.bytes), *(buffer.nbytes for buffer in buffers)]
        message = frames.decode_data(header.bytes)
        frames.check_frames(message, self.sizes[1:])
        assert isinstance(message, Tensors)
        self.exchange.receive(message, buffers, time.monotonic())
        event = self.into.get(timeout=10)
        if isinstance(event, Exception):
            raise event
        return event


class Way:
    """A client and a server with a socket between them, and one turn."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        sockets = [context.socket(zmq.PAIR) for _ in range(2)]
        sockets[1].connect(f"tcp://127.0.0.1:{sockets[0].bind_to_random_port('tcp://127.0.0.1')}")
        self.client, self.server = map(End, sockets)

    def begin(self, *jobs: messages.Job) -> None:
        for end in (self.client, self.server):
            end.exchange.contexts.keep(jobs)

    def up(self, leg: int, *tensors: Tagged, **place: int) -> dict[str, Tensor]:
        return self._send(self.client, self.server, leg, *tensors, **place)

    def down(self, leg: int, *tensors: Tagged, **place: int) -> dict[str, Tensor]:
        return self._send(self.server, self.client, leg, *tensors, **place)

    def _send(self, one: End, other: End, leg: int, *tensors: Tagged, **place: int) -> dict[str, Tensor]:
        one.give(leg, *tensors, **place)  # type: ignore[arg-type]
        one.pass_on()
        return other.take().tensors

    def open_contexts(self) -> list[int]:
        return [len(end.exchange.contexts) for end in (self.client, self.server)]


@pytest.fixture
def way() -> Iterator[Way]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = Way(context)
    yield made
    for end in (made.client, made.server):
        end.exchange.close()
    context.destroy(linger=0)


def values(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (8, 50)), generator=torch.Generator().manual_seed(seed))


def masked(gradient: Tensor, of: Tensor) -> Tensor:
    """Return the gradient where a tensor is among its tenth of largest magnitude."""
    kept = of.reshape(-1).abs().argsort(descending=True, stable=True)[: of.numel() // 10]
    result = torch.zeros(gradient.numel())
    result[kept] = gradient.reshape(-1)[kept]
    return result.reshape(gradient.shape)


def test_gradients_come_down_at_the_places_that_smashed_data_kept(way: Way) -> None:
    way.begin(turn(MS, MASK))
    for micro in range(3):  # all of them go up before the first is answered
        way.up(0, ("smashed", values(micro), MS), ("labels", torch.zeros(8), "raw"), micro=micro)
    assert way.open_contexts() == [3, 3]
    for micro in range(3):
        came = way.down(1, ("gradients", values(9 + micro), MASK), micro=micro)
        assert torch.equal(came["gradients"], masked(values(9 + micro), of=values(micro)))
    assert way.open_contexts() == [0, 0]


def test_with_a_tail_at_the_client_each_gradient_follows_its_own_tensor(way: Way) -> None:
    way.begin(turn(MS, MASK))
    smashed, activations = values(0), values(1, 8, 20)
    way.up(0, ("smashed", smashed, MS))
    way.down(1, ("smashed", activations, MS))
    came = way.up(2, ("gradients", values(2, 8, 20), MASK))
    assert torch.equal(came["gradients"], masked(values(2, 8, 20), of=activations))
    came = way.down(3, ("gradients", values(3), MASK))
    assert torch.equal(came["gradients"], masked(values(3), of=smashed))
    assert way.open_contexts() == [0, 0]


def test_what_was_kept_is_forgotten_with_the_lease(way: Way) -> None:
    way.begin(turn(MS, MASK))
    way.up(0, ("smashed", values(0), MS))
    assert way.open_contexts() == [1, 1]
    way.begin()
    assert way.open_contexts() == [0, 0]


def test_nothing_is_kept_where_the_way_back_has_no_use_for_it(way: Way) -> None:
    way.begin(turn(MS, "half"))
    way.up(0, ("smashed", values(0), MS))
    assert way.open_contexts() == [0, 0]


def test_an_answer_under_a_lease_that_is_over_is_dropped(way: Way) -> None:
    way.begin(turn(MS, MASK))
    way.up(0, ("smashed", values(0), MS))
    way.server.give(1, ("gradients", values(1), MASK))
    way.server.pass_on()
    way.begin()
    way.server.give(1, ("gradients", values(1), MASK))
    way.server.give(1, ("gradients", values(2), "raw"), step=7)
    way.server.pass_on()
    header = way.client.socket.recv_multipart()[0]
    late = frames.decode_data(header)
    assert isinstance(late, Tensors)
    way.client.exchange.receive(late, [memoryview(bytearray(late.tensors[0].nbytes))], 0.0)
    assert way.client.take().message.step == 7


def test_an_answer_to_nothing_under_an_open_lease_is_an_error(way: Way) -> None:
    way.begin(turn(MS, MASK))
    way.server.give(1, ("gradients", values(1), MASK))
    error = way.server.into.get(timeout=10)
    assert isinstance(error, LocalProtocolError)
    assert str(error) == '"mask" has no positions for a tensor of [8, 50]: what it answers kept none'


def test_what_is_random_depends_on_the_place_of_a_message_and_on_nothing_else(way: Way) -> None:
    spec = "randtopk:ratio=0.9,alpha=0.5"

    def drawn(job: messages.Job, **place: int) -> list[int]:
        way.begin(job)
        return list(way.up(0, ("smashed", values(0), spec), **place)["smashed"].reshape(-1).nonzero()[:, 0])

    job = turn(spec, "raw")
    first = drawn(job)
    others = [
        drawn(job, step=1),
        drawn(job, micro=1),
        drawn(turn(spec, "raw", client=1)),
        drawn(turn(spec, "raw", round_=1)),
    ]
    assert all(other != first for other in others)
    assert drawn(msgspec.structs.replace(job, lease=LEASE)) == first
    evaluation = messages.Evaluate(
        lease=LEASE, client=0, server=0, base=messages.Ref("", "broker"), plan=job.plan, round=0, part="test"
    )
    way.begin(evaluation)
    way.client.give(0, ("smashed", values(0), spec), kind="eval")
    way.client.pass_on()
    best = values(0).reshape(-1).abs().argsort(descending=True)[:40].sort().values
    assert torch.equal(way.server.take().tensors["smashed"].reshape(-1).nonzero()[:, 0], best)


@pytest.mark.parametrize(
    "spec",
    [
        "raw",
        "half",
        "quantize:bits=3",
        "quantize:bits=4,scope=channel",
        "topk:ratio=0.9",
        "topk:ratio=0.95875+half",
        "randtopk:ratio=0.9,alpha=0.1",
        "ms:ratio=0.99,bits=2",
        "ms:ratio=0.97,bits=3,scope=sample",
    ],
)
def test_bytes_at_the_socket_are_those_of_the_formula(way: Way, spec: str) -> None:
    way.begin(turn(spec, "raw"))
    shape = (64, 16, 30, 30)
    way.up(0, ("smashed", values(0, *shape), spec))
    formula = nbytes(parse(spec), shape, 4)
    assert formula > 100_000
    assert way.server.sizes[1] == formula
    assert abs(sum(way.server.sizes) - formula) <= 0.01 * formula  # header and all


def test_bytes_of_gradients_at_the_kept_places_are_those_of_the_formula(way: Way) -> None:
    way.begin(turn("topk:ratio=0.9", "mask"))
    shape = (64, 16, 30, 30)
    way.up(0, ("smashed", values(0, *shape), "topk:ratio=0.9"))
    way.down(1, ("gradients", values(1, *shape), "mask"))
    formula = 4 * (64 * 16 * 30 * 30 // 10)
    assert abs(sum(way.client.sizes) - formula) <= 0.01 * formula


@pytest.mark.parametrize(
    ("meta", "sentence"),
    [
        (("F32", (100,), "half", 199), r'F32\[100\] is 200 to 200 bytes with the codec "half", the header says 199'),
        (("F32", (100,), "lz4", 402), r'F32\[100\] is 1 to 401 bytes with the codec "lz4", the header says 402'),
        (("F32", (100,), "mask", 404), r'F32\[100\] is 0 to 400 bytes with the codec "mask", the header says 404'),
        (("F32", (100,), "hlaf", 200), 'The codec "hlaf" is wrong at character 1'),
        (("F32", (2**35,), "lz4", 9), r"F32\[34359738368\] is 137438953472 bytes, the limit is 1073741824"),
    ],
)
def test_a_header_that_no_codec_could_have_written_is_refused(
    meta: tuple[str, tuple[int, ...], str, int], sentence: str
) -> None:
    message = Tensors("r", "s", LEASE, "train", 0, (messages.TensorMeta("smashed", *meta),), 0, 0)
    with pytest.raises(RemoteProtocolError, match=sentence):
        frames.check_frames(message, [meta[3]], 2**30)
