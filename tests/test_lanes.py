"""Work on a thread of its own: in order, and with an end that is heard of."""

import threading

from hypothesis import given
from hypothesis import strategies as st

from zsplit.train.link.lanes import Lane


@given(st.lists(st.booleans(), max_size=50))
def test_work_is_done_in_the_order_in_which_it_is_given_wherever_it_is_done(places: list[bool]) -> None:
    done: list[int] = []
    failed: list[Exception] = []
    lane = Lane("lane", failed.append)
    for number, here in enumerate(places):
        lane.do(lambda number=number: done.append(number), here)
    lane.close()
    assert (done, failed) == (list(range(len(places))), [])


def test_what_may_be_done_here_is_where_nothing_waits_before_it() -> None:
    names: list[str] = []
    held = threading.Event()
    lane = Lane("lane", lambda _: None)

    def note() -> None:
        names.append(threading.current_thread().name)

    lane.do(note, here=True)
    lane.do(held.wait)
    lane.do(note, here=True)
    held.set()
    lane.close()
    assert names == [threading.current_thread().name, "lane"]


def test_without_work_for_it_there_is_no_thread() -> None:
    before = threading.active_count()
    lane = Lane("lane", lambda _: None)
    lane.do(lambda: None, here=True)
    assert threading.active_count() == before
    lane.close()


@given(st.integers(0, 5), st.booleans())
def test_an_error_is_told_once_and_nothing_is_done_behind_it(position: int, here: bool) -> None:
    done: list[int] = []
    failed: list[Exception] = []
    lane = Lane("lane", failed.append)
    for number in range(6):
        lane.do(lambda number=number: done.append(1 // (number - position)), here)
    lane.close()
    assert len(done) == position
    assert [type(error) for error in failed] == [ZeroDivisionError]
