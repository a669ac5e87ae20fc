"""What a peer keeps for the timeline."""

from contextlib import suppress
from threading import Thread

from zsplit.train.link.clock import Clock
from zsplit.train.link.spans import BATCH, KEPT, Recorder
from zsplit.wire.messages import Lease, Span

LEASE = Lease(1, 1)


def ahead(seconds: float) -> Clock:
    """Return a clock of a broker that is so far ahead."""
    clock = Clock()
    clock.take(1.0, 1.0 + seconds, 1.0)
    return clock


def test_spans_leave_on_the_brokers_clock() -> None:
    recorder = Recorder(on=True)
    recorder.add("compute", "forward", 10.0, 12.5, step=3, micro=1)
    assert recorder.drain(ahead(100.0)) == (Span("compute", "forward", 110.0, 2.5, 3, 1),)
    assert recorder.drain(ahead(100.0)) == ()


def test_what_is_done_inside_is_one_span_also_where_it_fails() -> None:
    recorder = Recorder(on=True)
    with suppress(KeyError), recorder.span("up", "encode", 2, 0, LEASE):
        raise KeyError
    (span,) = recorder.drain(Clock())
    assert span._replace(begin=0.0, seconds=0.0) == Span("up", "encode", 0.0, 0.0, 2, 0)
    assert span.seconds >= 0


def test_a_server_says_whose_job_it_was() -> None:
    recorder = Recorder(on=True)
    recorder.clients = {LEASE: 7}
    recorder.add("down", "receive", 1.0, 2.0, 0, 0, LEASE)
    recorder.add("down", "receive", 1.0, 2.0, 0, 0, Lease(1, 2))
    assert [span.client for span in recorder.drain(Clock())] == [7, -1]


def test_where_it_is_off_nothing_is_kept() -> None:
    recorder = Recorder(on=False)
    recorder.add("down", "receive", 1.0, 2.0)
    with recorder.span("down", "decode", 0, 0, LEASE):
        pass
    assert recorder.drain(Clock()) == ()


def test_one_message_has_a_bounded_number_of_spans_and_the_oldest_go_first() -> None:
    recorder = Recorder(on=True)
    for number in range(BATCH + 1):
        recorder.add("up", "send", number, number)
    assert [span.begin for span in recorder.drain(Clock())] == list(range(BATCH))
    assert [span.begin for span in recorder.drain(Clock())] == [BATCH]


def test_of_too_many_the_oldest_are_lost() -> None:
    recorder = Recorder(on=True)
    for number in range(KEPT + 2):
        recorder.add("up", "send", number, number)
    assert recorder.drain(Clock())[0].begin == 2


def test_threads_may_add_at_once() -> None:
    recorder = Recorder(on=True)
    threads = [Thread(target=lambda: [recorder.add("up", "send", 0, 1) for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(recorder.drain(Clock())) == 4000
