"""The data connection over real sockets: what passes, what is dropped, and that all of it is counted."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from desk import RUN, SMASHED, Member, Stage
from helpers import config_of

from zsplit.wire.frames import MAX_FRAMES, MAX_HEADER, encode, head_of
from zsplit.wire.messages import Attach, Tensors
from zsplit_broker.disk import Writer
from zsplit_broker.port import Port
from zsplit_broker.sockets import Sockets, bound
from zsplit_broker.switch import TOGETHER, Switch
from zsplit_broker.versions import Versions

Socket = zmq.Socket[bytes]

BODIES = [bytes(range(24)), bytes(16)]


class Line(Stage):
    """A client and its server on real connections; the bell is in the test's hands."""

    def __init__(self, sockets: Sockets, folder: Path) -> None:
        super().__init__()
        self.writer = Writer(lambda: None)
        self.switch = Switch(RUN, Port(sockets.data), self.router, Versions(folder), self.writer)
        self.turn, self.bell, self.address = self.turns[0], sockets.bell, f"tcp://127.0.0.1:{sockets.data_port}"
        self.context: zmq.Context[Socket] = zmq.Context()
        self.client, self.server = self.connect(self.clients[0]), self.connect(self.servers[0])

    def close(self) -> None:
        self.context.destroy(linger=0)
        self.writer.close()
        self.switch.depot.versions.close()

    def connect(self, member: Member) -> Socket:
        """Connect with the routing id under which the member has attached."""
        made = self.context.socket(zmq.DEALER)
        made.setsockopt(zmq.ROUTING_ID, member.data)
        made.connect(self.address)
        return made

    def smashed(self, step: int = 0, micro: int = 0) -> Tensors:
        return self.tensors(self.clients[0], self.turn.lease, step=step, micro=micro)

    def received(self, by: Socket) -> list[bytes]:
        """Pass messages on until one has come, and return it."""
        while not by.poll(10):
            self.bell.send(b"")
            self.switch.pass_on_until_the_bell()
        return by.recv_multipart()


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    with bound(config_of(broker__port=0)) as sockets:
        line = Line(sockets, tmp_path)
        yield line
        line.close()


def test_tensors_pass_and_count_whether_a_lane_is_known_or_not(line: Line) -> None:
    sent = 0
    for step in range(2 * TOGETHER + 3):
        header = encode(line.smashed(step))
        line.client.send_multipart([header, *BODIES])
        assert line.received(line.server) == [header, *BODIES]
        answer = encode(line.tensors(line.servers[0], line.turn.lease, SMASHED, step=step))
        line.server.send_multipart([answer, BODIES[0]])
        assert line.received(line.client) == [answer, BODIES[0]]
        sent += len(header) + 40 + len(answer) + 24
    assert (line.switch.relayed, line.switch.relayed_bytes) == (2 * (2 * TOGETHER + 3), sent)
    counted = line.router.relay.counted(line.turn.lease)
    assert sum(up + down for up, down in counted.values()) == sent
    assert counted["labels"] == (16 * (2 * TOGETHER + 3), 0)
    assert line.router.dropped == 0
    assert not line.router.relay.asks_server(line.turn.lease)


def test_a_message_that_waits_to_be_counted_is_counted_before_what_ends_its_lane(line: Line) -> None:
    for step in range(3):
        line.client.send_multipart([encode(line.smashed(step)), *BODIES])
        line.received(line.server)
    line.client.send_multipart([encode(line.smashed(3)), *BODIES])
    line.client.send(encode(Attach(RUN, line.clients[0].token)))
    line.received(line.client)
    assert line.switch.relayed == 5
    assert line.router.relay.counted(line.turn.lease)["labels"] == (4 * 16, 0)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("wrong", ["frames", "size", "long", "many", "garbage"])
def test_what_is_not_what_its_header_says_is_dropped_and_the_next_one_passes(
    line: Line, known: bool, wrong: str
) -> None:
    first, last = encode(line.smashed(0)), encode(line.smashed(2))
    bad = encode(line.smashed(1))
    if known:
        line.client.send_multipart([first, *BODIES])
        line.received(line.server)
    long = encode(msgspec.structs.replace(line.smashed(1), scalars={"x" * (MAX_HEADER // 2): 1.0}))
    line.client.send_multipart(
        {
            "frames": [bad, BODIES[0]],
            "size": [bad, BODIES[0], bytes(17)],
            "long": [long + bytes(MAX_HEADER // 2), *BODIES],
            "many": [bad, *BODIES, *[b""] * MAX_FRAMES],
            "garbage": [b"\x9a" + bad[2:], *BODIES],
        }[wrong]
    )
    line.client.send_multipart([last, *BODIES])
    assert line.received(line.server) == [last, *BODIES]
    assert (line.router.dropped, line.switch.relayed) == (1, 2 if known else 1)


def test_a_tail_that_is_none_is_left_to_who_gets_it_and_counts_as_dropped(line: Line) -> None:
    line.client.send_multipart([encode(line.smashed(0)), *BODIES])
    line.received(line.server)
    bad = head_of(line.smashed()) + b"\xff"
    line.client.send_multipart([bad, *BODIES])
    assert line.received(line.server) == [bad, *BODIES]
    assert line.router.dropped == 1
    assert line.router.relay.counted(line.turn.lease)["labels"] == (16, 0)


def test_tensors_for_one_whose_connection_is_gone_are_dropped(line: Line) -> None:
    for step in range(2):
        line.client.send_multipart([encode(line.smashed(step)), *BODIES])
        line.received(line.server)
    line.server.close(linger=0)
    step = 1
    while not line.router.dropped:
        step += 1
        line.client.send_multipart([encode(line.smashed(step)), *BODIES])
        line.bell.send(b"")
        line.switch.pass_on_until_the_bell()
    assert line.switch.relayed >= 3
