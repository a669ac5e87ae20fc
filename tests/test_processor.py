"""The relay's two threads share a processor while one is enough for both, and part where it is not."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread, get_native_id

import pytest
from conftest import Processes, settings, until

from zsplit_broker.processor import (
    FULL,
    LOOK_SECONDS,
    OFTEN,
    RARELY,
    ROOM,
    TOGETHER_SECONDS,
    Processor,
    last_processor,
    thread_seconds,
    threads,
)

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two processors"
)


class Load:
    """Clocks of two threads that a test moves, its own and another one's."""

    def __init__(self) -> None:
        self.own = self.others = self.now = 0.0
        self._over, ready = Event(), Event()
        self.thread = Thread(target=lambda: (ready.set(), self._over.wait()))
        self.thread.start()
        ready.wait()
        self.all = os.sched_getaffinity(0)
        self.processor = Processor([self.other], self.seconds)
        assert not self.work(0.0), "there is nothing yet to compare with"

    @property
    def other(self) -> int:
        assert self.thread.native_id is not None
        return self.thread.native_id

    def seconds(self, thread: int) -> float:
        return {get_native_id(): self.own, self.other: self.others}[thread]

    def work(self, share: float, seconds: float = LOOK_SECONDS, own: float = 0.5) -> bool:
        """Let time pass with so much of a processor used, `own` of that here; return whether the two share one then."""
        self.now += seconds
        self.own += share * seconds * own
        self.others += share * seconds * (1 - own)
        self.processor.look(self.now)
        mine, others = os.sched_getaffinity(0), os.sched_getaffinity(self.other)
        assert mine == others
        assert (mine == self.all) != (len(mine) == 1)
        assert self.processor.shared == (len(mine) == 1)
        return self.processor.shared

    def close(self) -> None:
        self.processor.leave()
        self._over.set()
        self.thread.join()


@pytest.fixture
def load() -> Iterator[Load]:
    load = Load()
    yield load
    load.close()
    assert os.sched_getaffinity(0) == load.all


def test_two_threads_share_a_processor_until_they_fill_it(load: Load) -> None:
    assert load.work(0.1)
    assert load.work(FULL - 0.01), "there is room still"
    assert not load.work(FULL + 0.05)
    assert not load.work(ROOM + 0.05), "not at once again"
    assert load.work(ROOM - 0.05)


def test_two_threads_share_a_processor_while_they_take_turns_often(load: Load) -> None:
    between = (OFTEN + RARELY) / 2
    assert not load.work(0.5, own=between)
    assert load.work(0.5, own=OFTEN * 1.1)
    assert load.work(0.5, own=between), "not at once again"
    assert load.work(0.0), "idle, and ready for the next turn"
    assert not load.work(0.5, own=RARELY * 0.9)


def test_what_a_thread_has_used_is_told() -> None:
    used: list[float] = []
    begun, over = Event(), Event()

    def use() -> None:
        used.append(time.thread_time())
        begun.set()
        over.wait()
        used.append(time.thread_time())

    thread = Thread(target=use, daemon=True)
    thread.start()
    begun.wait()
    other = thread.native_id
    assert other is not None
    before, mine, after = time.thread_time(), thread_seconds(get_native_id()), time.thread_time()
    others = thread_seconds(other)
    over.set()
    thread.join()
    assert before <= mine <= after
    assert used[0] <= others <= used[1]
    until(lambda: other not in threads())
    with pytest.raises(OSError, match="Invalid argument"):
        thread_seconds(other)


def test_the_system_may_choose_the_processor_anew_from_time_to_time(load: Load) -> None:
    assert load.work(0.1)
    while load.work(0.1):
        assert load.now < 2 * TOGETHER_SECONDS, "it never may"
    assert load.now >= TOGETHER_SECONDS
    assert load.work(0.1)


def test_threads_of_this_process_are_those_that_run() -> None:
    load = Load()
    assert {get_native_id(), load.other} <= threads()
    other = load.other
    load.close()
    until(lambda: other not in threads())


def test_the_load_is_looked_at_now_and_then(load: Load) -> None:
    assert load.work(0.1)
    assert load.work(9.0, LOOK_SECONDS / 2), "too early to tell"
    assert not load.work(9.0, LOOK_SECONDS * 0.6)


def test_where_it_may_not_be_chosen_the_system_chooses(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: int, _processors: object) -> None:
        raise PermissionError

    with monkeypatch.context() as patched:
        patched.setattr(os, "sched_setaffinity", refuse)
        assert not load.work(0.1)
    assert not load.work(0.1), "and is not asked again"


def test_where_the_load_is_not_told_the_system_chooses(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load.work(0.1)
    with monkeypatch.context() as patched:
        patched.setattr(load.processor, "_seconds", thread_that_is_gone)
        assert not load.work(0.1)
    assert not load.work(0.1), "and is not asked again"


def thread_that_is_gone(_thread: int) -> float:
    raise OSError


def test_a_thread_s_last_processor_is_one_that_it_may_run_on(load: Load) -> None:
    assert load.work(0.1)
    assert {last_processor(get_native_id())} == os.sched_getaffinity(0)
    with pytest.raises(FileNotFoundError):
        last_processor(2**22 + 1)


def test_a_broker_brings_its_relay_and_zeromq_together_and_nothing_else(processes: Processes) -> None:
    broker = processes.start("broker", *settings("broker.port=0"))
    broker.line("The broker listens at ")
    relay, everywhere = broker.process.pid, os.sched_getaffinity(0)
    names = {int(task.name): (task / "comm").read_text() for task in Path(f"/proc/{relay}/task").iterdir()}
    zeromq = {thread for thread, name in names.items() if "ZMQ" in name}
    assert zeromq, names

    def together() -> bool:
        places = {thread: os.sched_getaffinity(thread) for thread in names}
        on_one = {thread for thread, place in places.items() if place != everywhere}
        return on_one == {relay, *zeromq} and len(set.union(*map(places.__getitem__, on_one))) == 1

    until(together)
    broker.signal(signal.SIGINT)
    broker.wait()
