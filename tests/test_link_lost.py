"""A peer whose broker or connection is lost, against a broker that says and does only what the test wants."""

import time
from queue import SimpleQueue

import msgspec
import pytest
import torch
import zmq
from conftest import until
from lone_link import LEASE, TURN, Broker, Joined

from zsplit.codec import encode as encode_tensor
from zsplit.errors import ConfigError, LinkError
from zsplit.train.link import Fetched, Incoming, Leave, Link
from zsplit.train.state import State
from zsplit.wire import messages
from zsplit.wire.messages import Beat, Held, Lease, Orders, Prepared, Pull, Tensors

QUICK = {"link__beat_seconds": 0.1, "link__lease_seconds": 0.5}


def ask(link: Link, *places: tuple[int, int]) -> None:
    """Have a client send these steps and micro-batches."""
    for step, micro in places:
        link.send_tensors(LEASE, "train", step, micro, 0, [("smashed", torch.full((2,), step + micro), "raw")], {})


def came(broker: Broker, number: int) -> list[tuple[int, int]]:
    """Return the places of the next tensors."""
    return [(message.step, message.micro) for message in (broker.came(Tensors) for _ in range(number))]


def answer(broker: Broker, step: int, micro: int) -> None:
    meta, frame = encode_tensor("gradients", torch.ones(3))
    broker.pass_on(Tensors(broker.run, broker.session, LEASE, "train", 1, (meta,), step, micro), bytes(frame))


def taken(link: Link) -> tuple[int, int]:
    """Return the place of the next tensors that the trainer gets; orders do not count."""
    while True:
        event = link.next(10)
        assert event is not None
        if isinstance(event, Incoming):
            assert isinstance(event.message, Tensors)
            return event.message.step, event.message.micro


def ordered(link: Link, *jobs: messages.Job) -> None:
    """Wait for orders that list these jobs."""
    while not isinstance(event := link.next(10), Orders) or event.jobs != jobs:
        assert event is not None


def is_bound(socket: "zmq.Socket[bytes]", port: int) -> bool:
    """Bind a socket to a port that another one is about to let go; return whether that is done."""
    try:
        socket.bind(f"tcp://127.0.0.1:{port}")
    except zmq.ZMQError:
        return False
    return True


# The data connection


def test_what_is_unanswered_is_sent_again_on_a_new_connection_before_anything_new(joined: Joined) -> None:
    link, broker = joined()
    ask(link, (0, 0), (0, 1), (0, 2))
    assert came(broker, 3) == [(0, 0), (0, 1), (0, 2)]
    answer(broker, 0, 0)
    assert taken(link) == (0, 0)
    before = broker.data_peer
    broker.pass_on(messages.Detached("r", ""))
    broker.came(messages.Attach)
    assert broker.data_peer != before
    ask(link, (0, 3))
    broker.pass_on(messages.Attached("r", "s"))
    assert came(broker, 3) == [(0, 1), (0, 2), (0, 3)]


def test_a_connection_that_ends_is_made_anew(joined: Joined) -> None:
    link, broker = joined()
    ask(link, (0, 0))
    assert came(broker, 1) == [(0, 0)]
    broker.data.close(linger=0)
    broker.data = broker.context.socket(zmq.ROUTER)
    until(lambda: is_bound(broker.data, broker.data_port))
    ask(link, (0, 1))
    broker.came(messages.Attach)
    broker.pass_on(messages.Attached("r", "s"))
    assert came(broker, 2) == [(0, 0), (0, 1)]


def test_what_the_other_end_may_have_lost_is_sent_again_where_the_connection_is(joined: Joined) -> None:
    link, broker = joined()
    ask(link, (0, 0), (0, 1))
    assert came(broker, 2) == [(0, 0), (0, 1)]
    peer = broker.data_peer
    broker.pass_on(messages.Resend("r", "s", Lease(7, 7)))
    broker.pass_on(messages.Resend("r", "s", LEASE))
    assert came(broker, 2) == [(0, 0), (0, 1)]
    assert broker.data_peer == peer


def test_answers_that_come_again_or_too_early_do_not_reach_the_trainer(joined: Joined) -> None:
    link, broker = joined()
    ask(link, (0, 0), (0, 1))
    came(broker, 2)
    for micro in (1, 0, 0, 1, 1):
        answer(broker, 0, micro)
    ask(link, (1, 0))
    came(broker, 1)
    answer(broker, 1, 0)
    assert [taken(link) for _ in range(3)] == [(0, 0), (0, 1), (1, 0)]


def test_a_server_answers_a_repeat_with_what_it_answered_before(joined: Joined) -> None:
    link, broker = joined("server")
    meta, frame = encode_tensor("smashed", torch.ones(3))
    question = Tensors("r", "s", LEASE, "train", 0, (meta,), 0, 0, {"micros": 1.0})
    broker.pass_on(question, bytes(frame))
    assert taken(link) == (0, 0)
    broker.pass_on(question, bytes(frame))  # while it is computed
    link.send_tensors(LEASE, "train", 0, 0, 1, [("gradients", torch.ones(3), "raw")], {"loss": 0.25})
    assert broker.came(Tensors).scalars["loss"] == 0.25
    broker.pass_on(question, bytes(frame))
    again = broker.came(Tensors)
    assert (again.step, again.micro, again.leg, again.scalars["loss"]) == (0, 0, 1, 0.25)
    assert not any(isinstance(event, Incoming) for event in iter(lambda: link.next(0), None))


def test_a_state_on_its_way_is_asked_for_anew(joined: Joined) -> None:
    link, broker = joined()
    state = State.of({"weight": torch.arange(4.0)})
    ref = messages.Ref(state.digest, "client.1")
    link.fetch(LEASE, ref)
    assert broker.came(Pull).offset == -1
    broker.pass_on(messages.Resend("r", "s", LEASE))
    assert broker.came(Pull).offset == -1
    broker.pass_on(messages.Detached("r", ""))
    broker.came(messages.Attach)
    broker.pass_on(messages.Attached("r", "s"))
    for _ in range(2):
        pull = broker.came(Pull)
        data = bytes(state.manifest.encode() if pull.offset < 0 else state.read(pull.offset, pull.length))
        chunk = messages.Chunk("r", "", LEASE, "client.0", state.digest, pull.offset, len(data), pull.what)
        broker.pass_on(chunk, data)
        broker.pass_on(chunk, data)
    while not isinstance(event := link.next(10), Fetched):
        assert event is not None
    assert torch.equal(event.tensors["weight"], torch.arange(4.0))


# The session


def rejoined(broker: Broker, session: str, *jobs: messages.Job) -> messages.Hello:
    """Have a broker that does not know the peer any more bid it welcome again, with these jobs to do."""
    broker.welcomed = False
    hello = broker.welcome(session)
    broker.attach(*jobs)
    return hello


def test_a_peer_that_the_broker_does_not_know_joins_again_as_who_it_is_and_goes_on(joined: Joined) -> None:
    link, broker = joined(**QUICK)
    link.prepared(Prepared(train=3))
    instance = broker.heard(Beat).session and link._hello.instance
    ask(link, (0, 0))
    assert came(broker, 1) == [(0, 0)]
    broker.tell(messages.Unknown())
    hello = rejoined(broker, "s2")
    assert (hello.index, hello.instance, hello.role) == (0, instance, "client")
    again = broker.came(Tensors)
    assert (again.session, again.step) == ("s2", 0)
    beat = broker.heard(Beat)
    assert (beat.session, beat.prepared) == ("s2", Prepared(train=3))
    assert joined.said == ["the broker had given this peer up; joined again as client 0"]
    link.telemetry((), 1.0, 0.0)
    assert broker.heard(messages.Telemetry).session == "s2"


def test_orders_of_a_new_session_are_obeyed_from_their_first_on(joined: Joined) -> None:
    link, broker = joined(**QUICK)
    for _ in range(5):
        broker.order(broker.heard(Beat))
    broker.tell(messages.Unknown())
    other = msgspec.structs.replace(TURN, lease=Lease(2, 1))
    rejoined(broker, "s2", other)
    assert broker.revision == 1
    ordered(link, other)
    ask(link, (0, 0))  # under the lease that is over
    link.send_tensors(other.lease, "train", 3, 0, 0, [("smashed", torch.ones(2), "raw")], {})
    assert came(broker, 1) == [(3, 0)]


def test_what_a_new_session_does_not_keep_is_forgotten(joined: Joined) -> None:
    link, broker = joined(**QUICK)
    state = State.of({"weight": torch.ones(2)})
    link.report(Held(lease=LEASE, state="done", digest=state.digest), state)
    while not broker.heard(Beat).have:
        pass
    broker.tell(messages.Unknown())
    rejoined(broker, "s2", msgspec.structs.replace(TURN, lease=Lease(2, 1)))
    while (beat := broker.heard(Beat)).have or beat.held:
        pass
    assert beat.session == "s2"


def test_a_hello_is_said_until_it_is_answered_and_no_beat_meanwhile(joined: Joined) -> None:
    _, broker = joined(**QUICK)
    broker.heard(Beat)
    broker.tell(messages.Unknown())
    broker.welcomed = False
    broker.heard(messages.Hello)
    assert isinstance(broker.heard(messages.Hello | Beat), messages.Hello)
    assert isinstance(broker.heard(messages.Hello | Beat), messages.Hello)


def test_another_run_at_the_same_address_is_not_joined(joined: Joined) -> None:
    link, broker = joined(**QUICK)
    broker.heard(Beat)
    broker.tell(messages.Unknown())
    broker.welcomed = False
    broker.welcome("s2", run="r2")
    with pytest.raises(LinkError, match=rf"the broker at {broker.address} has another run now: start this peer again"):
        ordered(link)


@pytest.mark.parametrize(("code", "kind"), [(1, LinkError), (2, ConfigError)])
def test_a_peer_that_is_refused_ends(joined: Joined, code: int, kind: type[Exception]) -> None:
    link, broker = joined(**QUICK)
    broker.heard(Beat)
    broker.tell(messages.Refused(sentence="somebody else is client 0", code=code))
    with pytest.raises(kind, match="somebody else is client 0"):
        ordered(link)


def test_a_broker_that_is_back_is_found_within_two_seconds_and_work_goes_on(joined: Joined) -> None:
    link, broker = joined(link__beat_seconds=0.1, link__lease_seconds=100.0)
    ask(link, (0, 0))
    assert came(broker, 1) == [(0, 0)]
    broker.stop()
    ask(link, (0, 1))
    broker.restart()
    began = time.monotonic()
    rejoined(broker, "s2")
    assert time.monotonic() - began < 2
    assert came(broker, 2) == [(0, 0), (0, 1)]
    answer(broker, 0, 0)
    assert taken(link) == (0, 0)
    assert joined.said == [f"found the broker at {broker.address} again; joined again as client 0"]


def test_a_silent_broker_is_looked_for_and_the_person_is_told(joined: Joined) -> None:
    link, broker = joined(**QUICK, link__patience_seconds=0.0)
    said: SimpleQueue[str] = SimpleQueue()
    link._session._inform = said.put
    assert said.get(timeout=10) == f"the broker at {broker.address} has been silent for 0.5 s; looking for it"
    broker.heard(messages.Hello)
    broker.bid_welcome()
    assert said.get(timeout=10) == f"the broker at {broker.address} is back"
    broker.order(broker.heard(Beat))
    ordered(link, TURN)


def test_patience_with_a_silent_broker_comes_to_an_end(joined: Joined) -> None:
    link, broker = joined(**QUICK, link__patience_seconds=1.0)
    with pytest.raises(LinkError) as lost:
        ordered(link)
    assert str(lost.value) == f"the broker at {broker.address} has been silent for 1 s: is it still running?"


def test_a_reason_to_leave_is_an_event(joined: Joined) -> None:
    link, _ = joined()
    link.leave("stopped by SIGTERM")
    while not isinstance(event := link.next(10), Leave):
        assert event is not None
    assert event.sentence == "stopped by SIGTERM"


def test_a_peer_that_was_stopped_itself_does_not_blame_the_broker(
    joined: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, broker = joined(**QUICK)
    broker.heard(Beat)
    connection = link._session._connection
    pauses, wait = [2 * QUICK["link__lease_seconds"]], connection.wait

    def stopped(until: float) -> None:
        wait(until)
        if pauses:
            time.sleep(pauses.pop())  # as SIGSTOP does it

    monkeypatch.setattr(connection, "wait", stopped)
    until(lambda: not pauses)
    broker.tell(messages.Unknown())
    rejoined(broker, "s2")
    ordered(link, TURN)
    assert joined.said == ["the broker had given this peer up; joined again as client 0"]
