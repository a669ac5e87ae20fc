"""The data connection over real sockets: what passes, what is dropped, and that all of it is counted."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import msgspec
import pytest
import zmq
from desk import RUN, SMASHED, Member, Stage
from helpers import config_of

from zsplit.wire.frames import MAX_FRAMES, MAX_HEADER, decode_data, encode, head_of
from zsplit.wire.messages import Attach, Attached, Detached, Resend, TensorMeta, Tensors
from zsplit_broker.disk import Writer
from zsplit_broker.port import Port
from zsplit_broker.relay import LANES
from zsplit_broker.sockets import Sockets, bound
from zsplit_broker.switch import BATCH, Switch
from zsplit_broker.traffic import Lane
from zsplit_broker.versions import Versions

Socket = zmq.Socket[bytes]

BODIES = [bytes(range(24)), bytes(16)]


class Line(Stage):
    """A client and its server on real connections; the bell is in the test's hands."""

    def __init__(self, sockets: Sockets, folder: Path) -> None:
        super().__init__()
        self.writer = Writer(lambda: None)
        self.versions = Versions(folder)
        self.switch = Switch(RUN, Port(sockets.data), self.router, self.versions, self.writer)
        self.turn, self.bell, self.address = self.turns[0], sockets.bell, f"tcp://127.0.0.1:{sockets.data_port}"
        self.context: zmq.Context[Socket] = zmq.Context()
        with self.passing():  # who has had an answer can be sent to
            self.server = self.connect(self.servers[0])
            self.attach(self.server, self.servers[0])
            self.client = self.connect(self.clients[0])
            self.attach(self.client, self.clients[0])
            assert decode_data(self.server.recv()) == Resend(RUN, self.servers[0].token, self.turn.lease)
        self.router.dropped = self.switch.relayed = self.switch.relayed_bytes = 0

    def close(self) -> None:
        self.context.destroy(linger=0)
        self.writer.close()
        self.versions.close()

    def connect(self, member: Member) -> Socket:
        """Connect with the routing id under which the member has attached."""
        made = self.context.socket(zmq.DEALER)
        made.setsockopt(zmq.ROUTING_ID, member.data)
        made.setsockopt(zmq.RCVTIMEO, 10_000)
        made.setsockopt(zmq.LINGER, 0)
        made.connect(self.address)
        return made

    def attach(self, connection: Socket, member: Member) -> None:
        """Say on a connection whose it is, and take the answer."""
        connection.send(encode(Attach(RUN, member.token)))
        assert decode_data(connection.recv()) == Attached(RUN, member.token)

    def smashed(self, step: int = 0) -> Tensors:
        return self.tensors(self.clients[0], self.turn.lease, step=step)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Pass messages on meanwhile, and ring the bell at the end."""
        thread = Thread(target=self.switch.pass_on_until_the_bell)
        thread.start()
        try:
            yield
        finally:
            self.bell.send(b"")
            thread.join()

    def counted(self, what: str) -> tuple[int, int]:
        return self.router.relay.counted(self.turn.lease).get(what, (0, 0))


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    with bound(config_of(broker__port=0)) as sockets:
        line = Line(sockets, tmp_path)
        yield line
        line.close()


def test_tensors_pass_and_count_whether_a_lane_is_known_or_not(line: Line) -> None:
    steps, sent = 2 * BATCH + 3, 0
    with line.passing():
        for step in range(steps):
            header = encode(line.smashed(step))
            line.client.send_multipart([header, *BODIES])
            assert line.server.recv_multipart() == [header, *BODIES]
            answer = encode(line.tensors(line.servers[0], line.turn.lease, SMASHED, step=step))
            line.server.send_multipart([answer, BODIES[0]])
            assert line.client.recv_multipart() == [answer, BODIES[0]]
            sent += len(header) + 40 + len(answer) + 24
    assert (line.switch.relayed, line.switch.relayed_bytes) == (2 * steps, sent)
    counted = line.router.relay.counted(line.turn.lease)
    assert sum(up + down for up, down in counted.values()) == sent
    assert line.counted("labels") == (16 * steps, 0)
    assert line.router.dropped == 0
    assert not line.router.relay.asks_server(line.turn.lease)


def test_each_goes_to_the_other_end_whatever_came_before_it(line: Line) -> None:
    smashed = msgspec.structs.replace(line.smashed(), tensors=(SMASHED,))
    up, down, last = encode(line.smashed()), encode(line.tensors(line.servers[0], line.turn.lease)), encode(smashed)
    sent = {
        "u": (line.client, line.server, [up, *BODIES]),
        "d": (line.server, line.client, [down, *BODIES]),
        "l": (line.client, line.server, [last, BODIES[0]]),
    }
    order = "udududuldudluuddulldulddduuul"
    with line.passing():
        for each in order:
            sender, receiver, message = sent[each]
            sender.send_multipart(message)
            assert receiver.recv_multipart() == message
    counted = {each: order.count(each) for each in sent}
    assert line.counted("smashed") == (24 * (counted["u"] + counted["l"]), 24 * counted["d"])
    assert line.counted("labels") == (16 * counted["u"], 16 * counted["d"])
    assert (line.switch.relayed, line.router.dropped) == (len(order), 0)


def test_what_follows_goes_to_the_connection_that_has_come_in_between(line: Line) -> None:
    up, down = encode(line.smashed()), encode(line.tensors(line.servers[0], line.turn.lease))
    old, again = line.server, Member("server", 0, "", b"", line.routing_id())
    with line.connect(again) as new, line.passing():
        for server in (old, old, new):
            if server is new:
                line.attach(new, line.servers[0])
                assert decode_data(line.client.recv()) == Resend(RUN, line.clients[0].token, line.turn.lease)
            line.client.send_multipart([up, *BODIES])
            assert server.recv_multipart() == [up, *BODIES]
            server.send_multipart([down, *BODIES])
            assert line.client.recv_multipart() == [down, *BODIES]
        old.send_multipart([down, *BODIES])
        assert decode_data(old.recv()) == Detached(RUN, "")
    sizes = [len(body) for body in BODIES]
    assert line.router.relay.lane(line.clients[0].data, up, sizes) is not None, "one is known again"


def test_a_lane_that_is_expected_ends_with_its_lease(line: Line) -> None:
    header = encode(line.smashed())
    for _ in range(4):
        with line.passing():
            for _ in range(3):
                line.client.send_multipart([header, *BODIES])
                assert line.server.recv_multipart() == [header, *BODIES]
    line.scheduler.work.pop(line.turn.lease)
    line.router.relay.forget(line.turn.lease)
    with line.passing():
        line.client.send_multipart([header, *BODIES])
        line.client.send(encode(Attach(RUN, line.clients[0].token)))
        assert decode_data(line.client.recv()) == Attached(RUN, line.clients[0].token)
    assert (line.switch.relayed, line.router.dropped) == (12 + 1, 1)


def test_lanes_that_are_no_longer_kept_end_whichever_they_came_before(line: Line) -> None:
    def send(columns: int) -> None:
        meta = TensorMeta("smashed", "U8", (columns,), "raw", columns)
        message = [encode(msgspec.structs.replace(line.smashed(), tensors=(meta,))), bytes(columns)]
        line.client.send_multipart(message)
        assert line.server.recv_multipart() == message

    def alive() -> int:
        gc.collect()
        # By type, for isinstance asks each object what it is, and some of torch's answer with a warning.
        return sum(type(each) is Lane and each.sender == line.clients[0].data for each in gc.get_objects())

    down, before = encode(line.tensors(line.servers[0], line.turn.lease)), alive()
    with line.passing():
        send(0)
        for _ in range(2):
            line.server.send_multipart([down, *BODIES])
            line.client.recv_multipart()
        for columns in range(1, LANES + 3):
            for each in (columns - 1, columns, columns - 1, columns):
                send(each)
    assert alive() == before + LANES


@pytest.mark.parametrize("before", [0, 1, 3])  # no lane yet, one to be looked up, one that is expected
@pytest.mark.parametrize("wrong", ["frames", "size", "long", "many", "garbage", "kind", "token"])
def test_what_is_not_what_its_header_says_is_dropped_and_the_next_one_passes(
    line: Line, before: int, wrong: str
) -> None:
    bad, last = encode(line.smashed(1)), encode(line.smashed(2))
    kind = encode(msgspec.structs.replace(line.smashed(1), kind="eval"))
    token = encode(msgspec.structs.replace(line.smashed(1), session=line.servers[0].token))
    long = encode(msgspec.structs.replace(line.smashed(1), scalars={"x" * (MAX_HEADER // 2): 1.0}))
    with line.passing():
        for _ in range(before):
            line.client.send_multipart([encode(line.smashed(0)), *BODIES])
            line.server.recv_multipart()
        line.client.send_multipart(
            {
                "frames": [bad, BODIES[0]],
                "size": [bad, BODIES[0], bytes(17)],
                "long": [long + bytes(MAX_HEADER // 2), *BODIES],
                "many": [bad, *BODIES, *[b""] * MAX_FRAMES],
                "garbage": [b"\x9a" + bad[2:], *BODIES],
                "kind": [kind, *BODIES],
                "token": [token, *BODIES],
            }[wrong]
        )
        line.client.send_multipart([last, *BODIES])
        assert line.server.recv_multipart() == [last, *BODIES]
    assert (line.router.dropped, line.switch.relayed) == (1, before + 1)


def test_a_tail_that_is_none_is_left_to_who_gets_it(line: Line) -> None:
    bad = head_of(line.smashed()) + b"\xff"
    with line.passing():
        line.client.send_multipart([encode(line.smashed(0)), *BODIES])
        line.server.recv_multipart()
        line.client.send_multipart([bad, *BODIES])
        assert line.server.recv_multipart() == [bad, *BODIES]
    assert (line.router.dropped, line.switch.relayed) == (0, 2)
    assert line.counted("labels") == (16, 0), "whose step it was is not known"


def test_tensors_for_one_whose_connection_is_gone_are_dropped(line: Line) -> None:
    with line.passing():
        for step in range(2):
            line.client.send_multipart([encode(line.smashed(step)), *BODIES])
            line.server.recv_multipart()
    line.server.close(linger=0)
    while not line.router.dropped:
        with line.passing():
            line.client.send_multipart([encode(line.smashed(2)), *BODIES])


def test_the_longest_header_that_may_come_passes(line: Line) -> None:
    def header(dimensions: int) -> bytes:
        """Return a header that lacks its last field, which has a default: with it there would be one byte more."""
        meta = ["smashed", "F32", [0] * dimensions, "raw", 0]
        fields = ["t", RUN, line.clients[0].token, line.turn.lease, "train", 0, [meta], 1, 0]
        return msgspec.msgpack.encode(fields)

    longest = header(60_000 + MAX_HEADER - len(header(60_000)))
    assert len(longest) == MAX_HEADER
    with line.passing():
        line.client.send_multipart([longest, b""])
        assert line.server.recv_multipart() == [longest, b""]
    assert line.router.dropped == 0
