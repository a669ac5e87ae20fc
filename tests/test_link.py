"""A peer's link, against a broker that says and does only what the test wants."""

import math
import time
from pathlib import Path

import pytest
import torch
from lone_link import AHEAD, LEASE, Broker, Joined

from zsplit.codec import encode as encode_tensor
from zsplit.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from zsplit.train.link import Incoming, Link
from zsplit.wire import messages
from zsplit.wire.messages import Step, Tensors


def tensors_of(values: torch.Tensor, left: float | None = None, micro: int = 0) -> tuple[Tensors, bytes]:
    """Return what a server sends: gradients that left at a time of the broker's clock."""
    meta, frame = encode_tensor("gradients", values)
    scalars = {} if left is None else {"left": left}
    return Tensors("r", "s", LEASE, "train", 1, (meta,), 0, micro, scalars), bytes(frame)


def ask(link: Link, broker: Broker, step: int = 0, micro: int = 0, leg: int = 0) -> Tensors:
    """Have a client send a micro-batch, and return it as it came."""
    link.send_tensors(LEASE, "train", step, micro, leg, [("smashed", torch.ones(2), "raw")], {})
    message: Tensors = broker.came(Tensors)
    return message


def test_tensors_say_when_they_left_on_the_brokers_clock(joined: Joined) -> None:
    link, broker = joined()
    before = time.monotonic()
    link.send_tensors(LEASE, "train", 3, 1, 0, [("smashed", torch.ones(2, 3), "raw")], {"batch": 2.0})
    message = broker.came(Tensors)
    assert (message.step, message.micro, message.scalars["batch"]) == (3, 1, 2.0)
    assert [(meta.what, meta.shape, meta.codec) for meta in message.tensors] == [("smashed", (2, 3), "raw")]
    assert before - 1 < message.scalars["left"] - AHEAD < time.monotonic() + 1


def test_what_comes_is_timed_and_counted_for_its_lease(joined: Joined) -> None:
    link, broker = joined()
    values = torch.arange(100_000.0)
    ask(link, broker)
    left = time.monotonic()
    broker.pass_on(*tensors_of(values, left + AHEAD))
    event = link.next(10)
    assert isinstance(event, Incoming)
    assert torch.equal(event.tensors["gradients"], values)
    assert left <= event.arrived <= time.monotonic()
    flow = link.flow(LEASE)
    assert (flow.bytes, flow.starts) == (values.nbytes, 1)
    assert math.isclose(flow.seconds, event.arrived - left, abs_tol=1.0)
    assert link.flow(LEASE) == messages.Flow()


def test_a_step_stays_behind_the_tensors_before_it(joined: Joined) -> None:
    link, broker = joined()
    strided = torch.ones(300, 300).t()  # its memory is put in order by the lane
    for number in range(5):
        link.send_tensors(LEASE, "train", number, 0, 0, [("smashed", strided, "raw")], {})
        link.send_step(LEASE, number, 0.5)
    order = [broker.came(Tensors | Step) for _ in range(10)]
    assert [(type(message), message.step) for message in order] == [(k, n) for n in range(5) for k in (Tensors, Step)]


def test_large_and_small_tensors_are_decoded_in_the_order_in_which_they_come(joined: Joined) -> None:
    link, broker = joined()
    sizes = [500_000, 1, 200_000, 1, 1]
    for micro, _ in enumerate(sizes):
        ask(link, broker, micro=micro)
    for micro, size in enumerate(sizes):
        broker.pass_on(*tensors_of(torch.zeros(size), micro=micro))
    events = [link.next(10) for _ in sizes]
    assert [len(event.tensors["gradients"]) for event in events if isinstance(event, Incoming)] == sizes


def test_a_tensor_that_cannot_be_encoded_ends_the_link_with_a_sentence_and_the_broker_may_be_told(
    joined: Joined,
) -> None:
    link, broker = joined()
    link.send_tensors(LEASE, "train", 0, 0, 0, [("smashed", torch.ones(2), "unheard of")], {})
    with pytest.raises(LocalProtocolError, match="unheard of") as failed:
        link.next(10)
    link.fault(str(failed.value))
    assert "unheard of" in broker.heard(messages.Fault).sentence


def test_a_tensor_that_cannot_be_decoded_ends_the_link_with_a_sentence(joined: Joined) -> None:
    link, broker = joined()
    meta = messages.TensorMeta("gradients", "F32", (1,), "unheard of", 3)
    ask(link, broker)
    broker.pass_on(Tensors("r", "s", LEASE, "train", 1, (meta,), 0, 0), b"abc")
    with pytest.raises(RemoteProtocolError, match="unheard of"):
        link.next(10)


def test_a_beat_does_not_wait_behind_queued_tensors_on_a_slow_link(joined: Joined) -> None:
    link, broker = joined(link__uplink_mbps=0.8)
    link.send_tensors(LEASE, "train", 0, 0, 0, [("smashed", torch.ones(10**6), "raw")], {})  # forty seconds' worth
    for _ in range(3):
        broker.heard(messages.Beat)
        assert not broker.data.poll(0)


def test_tensors_on_a_slow_link_arrive_when_their_last_byte_would(joined: Joined) -> None:
    link, broker = joined(link__downlink_mbps=8.0, link__rtt_ms=40.0)
    ask(link, broker)
    left = time.monotonic()
    broker.pass_on(*tensors_of(torch.zeros(25_000), left + AHEAD))
    event = link.next(10)
    assert isinstance(event, Incoming)
    assert event.arrived - left > 0.1 + 0.02
    assert event.arrived <= time.monotonic()


def test_a_server_is_not_slowed_down(joined: Joined) -> None:
    link, broker = joined("server", link__uplink_mbps=1e-6, link__downlink_mbps=1e-6)
    link.send_step(LEASE, 0, 1.0)
    assert broker.came(Step).scale == 1.0


def test_a_trace_that_cannot_be_read_ends_the_client_and_the_broker_knows_why(joined: Joined, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read") as failed:
        joined(link__trace=str(tmp_path / "none.csv"))
    _, broker = joined.open[0]
    assert broker.heard(messages.Fault).sentence == str(failed.value)


def test_spans_are_sent_with_the_figures_told_last_and_all_of_them_before_the_goodbye(joined: Joined) -> None:
    link, broker = joined(run__timeline=True)
    link.telemetry((0.5,), 12.0, 0.25)
    assert broker.heard(messages.Telemetry).spans == ()
    link.spans.add("compute", "forward", 1.0, 3.0, 0, 0)
    first = broker.heard(messages.Telemetry)
    assert (first.losses, first.samples_per_second, first.idle_share) == ((), 12.0, 0.25)
    assert [(span.name, span.seconds) for span in first.spans] == [("forward", 2.0)]
    assert math.isclose(first.spans[0].begin, 1.0 + AHEAD, abs_tol=10.0)
    link.spans.add("compute", "step", 3.0, 4.0)
    link.close()
    last = broker.heard(messages.Telemetry | messages.Bye)
    assert [span.name for span in last.spans] == ["step"]
    broker.heard(messages.Bye)


def test_beats_come_faster_until_the_brokers_clock_is_known(joined: Joined) -> None:
    link, broker = joined()
    while link.clock.samples < 5:
        broker.order(broker.heard(messages.Beat))
        link.next(1)
    assert math.isclose(link.clock.now(), time.monotonic() + AHEAD, abs_tol=10.0)
