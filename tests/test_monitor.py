"""The monitor: what a board knows, how it looks at every size, and that it follows a real publisher."""

import io
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from rich.cells import cell_len
from rich.console import Console

from zsplit.errors import ConfigError, LinkError, RemoteProtocolError
from zsplit.monitor import figures
from zsplit.monitor.attach import events_of
from zsplit.monitor.board import LINES, LONGEST, ROUNDS, Board
from zsplit.monitor.curve import Curve, draw
from zsplit.monitor.lines import Lines
from zsplit.monitor.screen import Block, allot, render
from zsplit.monitor.subscribe import watch
from zsplit.monitor.views import LiveView, PlainView, view_for
from zsplit.wire.events import (
    AnyEvent,
    BrokerEvent,
    ClientEvent,
    Event,
    LogEvent,
    RoundEvent,
    RunEvent,
    ServerEvent,
    encode_event,
    topic,
)
from zsplit.wire.frames import decode_control, encode
from zsplit.wire.messages import ControlMessage, Refused, Welcome

DOC = Path(__file__).parent.parent / "docs" / "monitor.md"
NOON = 1.76e9
ENDPOINT = "tcp://127.0.0.1:5759"


def run_event(**changes: Any) -> RunEvent:
    """Return a run of four clients in its third round of twelve: two are done."""
    event = RunEvent(
        seq=1, time=NOON, name="digits", run="r1", state="training", policy="parallel", model="digits/cnn",
        data="digits", cut="features.3", round=2, current=3, rounds=12, clients=4, joined=4, servers=1,
        version="3f2a9c1e" * 8, out="runs/digits-1", seconds=125.0,
    )  # fmt: skip
    return structs.replace(event, **changes)


def client(index: int, **changes: Any) -> ClientEvent:
    event = ClientEvent(
        seq=1, time=NOON, index=index, state="training", round=3, step=12, steps=45, loss=0.4123, losses=(0.5, 0.4),
        samples_per_second=1234.0, bytes_up=12_300_000, bytes_down=456_000, idle_share=0.78, age=0.2, server=0,
        host="laptop", device="cpu",
    )  # fmt: skip
    return structs.replace(event, **changes)


def server(index: int, **changes: Any) -> ServerEvent:
    event = ServerEvent(
        seq=1, time=NOON, index=index, state="training", clients=(0, 1, 2, 3), samples_per_second=4936.0,
        idle_share=0.41, age=0.3, host="gpu-box", device="cuda:0",
    )  # fmt: skip
    return structs.replace(event, **changes)


def broker(**changes: Any) -> BrokerEvent:
    event = BrokerEvent(
        seq=1, time=NOON, messages_per_second=321.0, bytes_per_second=45.6e6, messages=9000, bytes=823_000_000,
        dropped=2, seconds=44.0,
    )  # fmt: skip
    return structs.replace(event, **changes)


def round_event(number: int, **changes: Any) -> RoundEvent:
    event = RoundEvent(
        seq=number, time=NOON, round=number, samples=1437, steps=180, train_loss=0.412, val_loss=0.398,
        val_accuracy=0.961, val_top5=0.999, seconds=1.9,
    )  # fmt: skip
    return structs.replace(event, **changes)


def log(text: str, seq: int = 1, level: str = "info") -> LogEvent:
    return LogEvent(seq=seq, time=NOON, level=level, who="client 2", text=text)


def board_of(*events: AnyEvent, now: float = 0.0) -> Board:
    board = Board()
    for event in events:
        assert board.take(event, now)
    return board


def full_board(clients: int = 4) -> Board:
    rounds = [round_event(1), round_event(2)]
    peers = [client(i) for i in range(clients)]
    return board_of(broker(), *rounds, *peers, server(0), log("its torch is older"), run_event(clients=clients))


def screen(board: Board, width: int, height: int, now: float = 0.0) -> list[str]:
    """Return the picture's lines as plain text."""
    console = Console(width=1000, file=io.StringIO(), color_system=None)
    console.print(render(board, width, height, now, ENDPOINT))
    return written(console).splitlines()


def written(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


# The board


@given(st.integers(1, 60), st.data())
def test_whatever_is_lost_doubled_or_late_the_board_shows_the_newest_and_accounts_for_every_number(
    last: int, data: st.DataObject
) -> None:
    sent = [client(0, seq=seq, time=NOON + seq, step=seq, losses=(float(seq),)) for seq in range(1, last + 1)]
    arrived = data.draw(st.lists(st.sampled_from(sent), min_size=1, max_size=100))
    board = Board()
    taken = [event for event in arrived if board.take(event, 0.0)]
    assert board.clients[0] == max(arrived, key=lambda event: event.seq)
    assert len(taken) + board.repeats == len(arrived)
    assert len(taken) + board.missed == taken[-1].seq - taken[0].seq + 1
    assert board.curve.count == len(taken)


def test_topics_are_counted_apart() -> None:
    board = board_of(client(0, seq=7), client(1, seq=3), server(0, seq=1))
    assert (board.missed, board.repeats) == (0, 0)
    board.take(client(1, seq=6), 0.0)
    assert board.missed == 2


def test_a_broker_that_was_started_again_counts_from_one_and_is_believed() -> None:
    board = board_of(client(0, seq=500))
    assert board.take(client(0, seq=1, time=NOON + 9, step=13), 0.0)
    assert (board.clients[0].step, board.missed) == (13, 0)


def test_another_run_at_the_same_address_clears_the_board() -> None:
    board = full_board()
    assert board.take(run_event(run="r2", seq=1, time=NOON + 99), 5.0)
    assert (board.run and board.run.run, board.clients, board.curve.count) == ("r2", {}, 0)


def test_broken_bodies_are_counted_and_skipped() -> None:
    board = Board()
    good = encode_event(client(3))
    messages = [[b"client.3", b"{"], [b"client.3", b"\xff"], [b"client.4", good], [b"client.3"], [good], [b""]]
    messages += [[b"client.3", encode_event(client(3, v=2))], [b"client.3", good, good]]
    assert all(board.read(message, 0.0) is None for message in messages)
    assert (board.unreadable, board.clients, board.heard) == (len(messages), {}, None)
    assert board.read([b"client.3", good], 1.0) == client(3)
    assert board.heard == 1.0


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=3))
def test_any_bytes_are_read_without_an_error(message: list[bytes]) -> None:
    assert Board().read(message, 0.0) is None


def test_texts_cannot_steer_the_terminal() -> None:
    board = Board()
    board.read([b"log", encode_event(log("\x1b]0;mine\x07 ends\nhere \u202e" + "x" * 2 * LONGEST))], 0.0)
    assert board.log[0].text.startswith(" ]0;mine  ends here  x")
    assert len(board.log[0].text) == LONGEST


def test_what_is_kept_is_bounded() -> None:
    board = Board()
    for seq in range(1, 2 * ROUNDS):
        board.take(round_event(seq), 0.0)
        board.take(log(f"{seq}", seq), 0.0)
    assert (len(board.rounds), min(board.rounds)) == (ROUNDS, ROUNDS)
    assert (len(board.log), board.log[-1].text) == (LINES, f"{2 * ROUNDS - 1}")


def test_ages_and_elapsed_time_go_on_between_events_whatever_the_two_clocks_say() -> None:
    board = board_of(client(0, age=0.5), run_event(seconds=83.0), broker(time=NOON + 2.0), now=1000.0)
    assert board.age(board.clients[0], 1000.0) == pytest.approx(2.5)
    assert board.age(board.clients[0], 1004.0) == pytest.approx(6.5)
    assert board.elapsed(1004.0) == pytest.approx(83.0 + 6.0)


def test_the_elapsed_time_of_a_run_that_has_ended_stands_still() -> None:
    board = board_of(run_event(state="finished", seconds=30.0))
    assert board.ended
    assert (board.elapsed(1000.0), board.progress()) == (30.0, 1.0)


def test_progress_counts_rounds_and_the_steps_of_the_current_one_and_never_goes_back_within_it() -> None:
    board = board_of(run_event(clients=2, round=1, current=3), client(0, step=45), client(1, step=0))
    assert board.progress() == pytest.approx(2.5 / 12)
    board.take(client(0, seq=2, state="waiting", round=2, step=0, steps=0), 0.0)
    assert board.progress() == pytest.approx(2.5 / 12)
    board.take(run_event(seq=2, clients=2, round=2, current=4), 0.0)
    assert board.progress() == pytest.approx(3 / 12)
    assert Board().progress() == 0.0


@pytest.mark.parametrize(
    ("state", "done", "shown"), [("waiting", 0, 0), ("training", 0, 2), ("evaluating", 11, 12), ("failed", 7, 7)]
)
def test_the_round_is_the_one_that_is_worked_on(state: str, done: int, shown: int) -> None:
    current = {"training": 2, "evaluating": 12}.get(state, 0)  # beside the storing of the one before
    assert board_of(run_event(state=state, round=done, current=current)).round() == shown
    assert Board().round() == 0


def test_a_client_between_two_steps_shows_its_last_loss() -> None:
    board = board_of(client(0, loss=0.7), client(0, seq=2, loss=None, losses=()))
    assert (board.clients[0].loss, board.curve.count) == (0.7, 2)


# The curve


@given(st.lists(st.floats(-1e6, 1e6), max_size=400), st.sampled_from([2, 8, 64]))
def test_a_curve_in_bounded_memory_keeps_the_mean_of_all_that_was_added(values: list[float], capacity: int) -> None:
    curve = Curve(capacity)
    for value in values:
        curve.add(value)
    points = curve.points()
    assert curve.count == len(values)
    assert len(points) <= capacity
    rest = len(values) % curve.stride
    weights = [curve.stride] * (len(points) - (rest > 0)) + [rest] * (rest > 0)
    total = sum(weight * point for weight, point in zip(weights, points, strict=True))
    assert total == pytest.approx(math.fsum(values), abs=1e-3)


def test_a_million_steps_fit_a_small_curve_in_order() -> None:
    curve = Curve(64)
    for value in range(1_000_000):
        curve.add(value)
    assert len(curve.points()) <= 64
    assert curve.points() == sorted(curve.points())


def test_a_curve_of_odd_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity must be even"):
        Curve(3)


def test_a_loss_that_is_no_number_is_counted_and_leaves_no_dot() -> None:
    curve = Curve()
    for value in (1.0, math.nan, math.inf, 3.0):
        curve.add(value)
    assert (curve.count, curve.points()) == (4, [1.0, 3.0])


def test_a_falling_loss_is_drawn_falling_with_its_ends_labelled() -> None:
    lines = draw([2.0, 1.5, 1.0], width=14, height=5)
    assert lines == [
        " 2.0000 │⠱⡀   ",
        "        │ ⠱⡀  ",
        " 1.5000 │  ⢱  ",
        "        │   ⢣ ",
        " 1.0000 │    ⢣",
    ]


@given(
    st.lists(st.floats(), max_size=300),
    st.integers(0, 60),
    st.integers(0, 12),
)
def test_any_curve_is_drawn_as_lines_of_the_right_size(losses: list[float], width: int, height: int) -> None:
    curve = Curve(64)
    for loss in losses:
        curve.add(loss)
    lines = draw(curve.points(), width, height)
    assert len(lines) == height
    assert {cell_len(line) for line in lines} <= {width}


# The figures


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (figures.loss(None), "–"),
        (figures.loss(0.41234), "0.4123"),
        (figures.loss(12.345), "12.35"),
        (figures.loss(1e30), "1e+30"),
        (figures.percent(0.961), "96.1 %"),
        (figures.percent(1e300), "1e+302 %"),
        (figures.count(0.42), "0.4"),
        (figures.count(1234.4), "1,234"),
        (figures.count(1.23e6), "1.2 M"),
        (figures.scaled(512, "B"), "512 B"),
        (figures.scaled(999_499, "B"), "999 kB"),
        (figures.scaled(999_500, "B"), "1.0 MB"),
        (figures.scaled(12.34e6, "B"), "12.3 MB"),
        (figures.scaled(1e22, "B"), "1e+07 PB"),
        (figures.seconds(1.94), "1.9 s"),
        (figures.seconds(125), "2:05"),
        (figures.seconds(3725), "1:02:05"),
        (figures.seconds(3 * 86400 + 4 * 3600 + 300), "3 d 04:05"),
        (figures.seconds(math.inf), "–"),
        (figures.clock(1e300), "--:--:--"),
        (figures.ranges([3, 0, 1, 2, 7]), "0–3, 7"),
        (figures.ranges([]), "–"),
        (figures.some(1, "client"), "1 client"),
        (figures.some(1234, "client"), "1,234 clients"),
    ],
)
def test_figures_read_as_people_write_them(text: str, expected: str) -> None:
    assert text == expected


@given(st.floats())
def test_any_figure_is_short(value: float) -> None:
    assert len(figures.loss(value)) <= 8
    texts = [figures.percent(value), figures.count(value), figures.scaled(value, "B"), figures.seconds(value)]
    assert max(map(len, texts)) <= 13


# The screen

FIGURES = {
    40: ["digits", "● training", "round 3/12", "4/4 clients", "version 3f2a9c1e", "12/45", "0.4123", "0.2 s"],
    80: ["parallel", "digits/cnn @ features.3", "2:05", "1,234", "12.3 MB", "456 kB", "78 %", "4,936", "321 msg/s",
         "45.6 MB/s", "2 dropped", "96.1 %", "0.3980", "best val 96.1 %", "8 steps", "runs/digits-1"],
    160: ["99.9 %", "laptop", "gpu-box", "cuda:0", "██████▎"],
}  # fmt: skip
"""What a picture shows from a width on."""


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_screen_shows_the_key_figures_at_every_width_and_never_exceeds_it(width: int) -> None:
    lines = screen(full_board(), width, 40)
    assert max(map(cell_len, lines)) <= width
    missing = [
        text for least, texts in FIGURES.items() if least <= width for text in texts if text not in "\n".join(lines)
    ]
    assert missing == []


def test_numbers_stand_under_each_other_whatever_their_length() -> None:
    board = board_of(client(0, loss=0.4), client(1, loss=12.5, step=3, bytes_up=7), client(2, loss=None))
    lines = screen(board, 120, 20)
    ends = {match.end() for line in lines if "training" in line for match in re.finditer("0.4000|12.50|–", line)}
    assert len(ends) == 1


def test_growing_numbers_move_no_column() -> None:
    early, late = client(0, step=1, bytes_up=5, samples_per_second=3.0), client(0, seq=2, step=44, bytes_up=10**9)
    titles = [next(line for line in screen(board_of(event), 100, 20) if "state" in line) for event in (early, late)]
    assert titles[0] == titles[1]


words = st.text(max_size=30)
numbers = st.floats(allow_nan=False) | st.floats(0, 5)
naturals = st.integers(0, 2**63 - 1) | st.integers(0, 40)
events = st.one_of(
    st.builds(run_event, name=words, state=st.sampled_from(["waiting", "failed"]) | words, sentence=words, out=words,
              round=naturals, rounds=naturals, clients=naturals, seconds=numbers, test_accuracy=st.none() | numbers),
    st.builds(client, naturals, state=words, step=naturals, steps=naturals, loss=st.none() | numbers, host=words,
              losses=st.lists(numbers, max_size=5).map(tuple), samples_per_second=numbers, bytes_up=naturals,
              idle_share=numbers, age=numbers, server=st.none() | naturals),
    st.builds(server, naturals, state=words, clients=st.lists(naturals, max_size=9).map(tuple), age=numbers),
    st.builds(broker, messages_per_second=numbers, bytes=naturals, dropped=naturals),
    st.builds(round_event, naturals, seq=naturals, train_loss=st.none() | numbers, val_accuracy=st.none() | numbers),
    st.builds(log, words, naturals, st.sampled_from(["info", "warning", "error"])),
)  # fmt: skip


@given(st.lists(events, max_size=12), st.integers(1, 200), st.integers(1, 60), numbers)
def test_any_board_fits_any_terminal(taken: list[AnyEvent], width: int, height: int, now: float) -> None:
    board = Board()
    for event in taken:
        board.read([topic(event).encode(), encode_event(event)], 0.0)
    lines = screen(board, width, height, now)
    assert len(lines) <= height
    assert max(map(cell_len, lines)) <= width


@pytest.mark.parametrize("clients", [100, 1000])
def test_of_many_clients_as_many_as_fit_are_shown_those_in_trouble_first(clients: int) -> None:
    board = full_board(clients)
    board.take(client(clients - 3, seq=2, state="lost"), 0.0)
    board.take(client(clients - 2, seq=2, age=9.0), 0.0)
    board.take(client(0, seq=2, state="waiting"), 0.0)
    lines = screen(board, 80, 40)
    rows = [int(found[1]) for line in lines if (found := re.match(r" *(\d+) +● \w+ .* s$", line))]
    assert rows[:4] == [clients - 3, clients - 2, 1, 2]
    assert 10 <= len(rows) <= 30
    assert f"{clients - len(rows)} more, hidden" in "\n".join(lines)
    assert len(lines) == 40


def test_a_silent_peer_and_a_silent_broker_are_pointed_out() -> None:
    board = full_board()
    assert "nothing from the broker" not in "\n".join(screen(board, 80, 30, now=4.0))
    text = "\n".join(screen(board, 80, 30, now=8.0))
    assert "nothing from the broker for 8.0 s" in text
    assert "8.2 s" in text


def test_what_was_missed_or_could_not_be_read_is_said() -> None:
    board = full_board()
    board.take(log("later", seq=4), 0.0)
    board.read([b"run", b"?"], 0.0)
    assert "2 events missed · 1 message unreadable" in screen(board, 80, 30)[2]


def test_the_sentence_of_a_failed_run_is_shown_in_full() -> None:
    sentence = "Client 2 is lost: nothing was heard from it for 10 s. Round 3 is kept, and the folder can be resumed."
    lines = screen(board_of(run_event(state="failed", sentence=sentence)), 60, 24)
    assert " ".join(line.strip() for line in lines[2:4]) == sentence


def test_before_the_first_event_the_screen_says_where_it_waits() -> None:
    assert screen(Board(), 80, 24) == [f"zsplit · waiting for a run at {ENDPOINT}"]


sizes = st.tuples(st.integers(0, 9), st.integers(0, 30))


@given(st.lists(sizes, min_size=1, max_size=6), st.integers(0, 80))
def test_lines_are_allotted_up_to_the_height_and_no_block_gets_less_than_its_least(
    limits: list[tuple[int, int]], height: int
) -> None:
    blocks = [Block(least, most, lambda lines: []) for least, most in limits]
    given_out = allot(height, blocks, order=range(len(blocks)))
    assert sum(given_out) <= height
    for block, lines in zip(blocks, given_out, strict=True):
        assert lines == 0 or min(block.least, block.most) <= lines <= block.most
    growing = [0 < lines < block.most for block, lines in zip(blocks, given_out, strict=True)]
    assert sum(given_out) == height or not any(growing)


# Plain lines


def test_plain_lines_say_each_thing_once() -> None:
    lines = Lines()
    events: list[AnyEvent] = [
        run_event(state="waiting", joined=3),
        run_event(seq=2),
        client(0),
        broker(),
        log("joined", seq=1),
        run_event(seq=3, state="evaluating"),
        round_event(3),
        run_event(seq=4, state="storing"),
        run_event(seq=5),
        log("is slow", seq=2, level="warning"),
        round_event(4, val_accuracy=None),
        run_event(seq=6, state="finished", test_accuracy=0.983, seconds=33.2),
        run_event(seq=7, state="failed", sentence="Disk full."),
    ]
    at = figures.clock(NOON)
    assert [line for event in events if (line := lines.line(event))] == [
        f"{at} run digits waiting  parallel  digits/cnn cut at features.3  digits  3/4 clients, 1 server",
        f"{at} run digits training  parallel  digits/cnn cut at features.3  digits  4/4 clients, 1 server",
        f"{at} client 2  joined",
        f"{at} round 3/12  loss 0.4120  val 96.1 %  1.9 s",
        f"{at} client 2  warning: is slow",
        f"{at} round 4/12  loss 0.4120  1.9 s",
        f"{at} run digits finished  test 98.3 %  33.2 s",
        f"{at} run digits failed  2:05  Disk full.",
    ]


# The shells


class Publisher:
    """The events socket of a broker: what is published last on each topic is sent again to who subscribes."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.socket = context.socket(zmq.XPUB)
        self.socket.linger = 0
        self.socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        self.endpoint = f"tcp://127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"
        self.last: dict[bytes, bytes] = {}

    def publish(self, *events: AnyEvent) -> None:
        for event in events:
            self.send(topic(event).encode(), encode_event(event))

    def send(self, name: bytes, body: bytes) -> None:
        self.last[name] = body
        self.socket.send_multipart([name, body])

    def serve(self, milliseconds: int = 0) -> bool:
        """Answer subscriptions; return whether there was one."""
        subscribed = False
        while self.socket.poll(milliseconds):
            if self.socket.recv().startswith(b"\x01"):
                subscribed = True
                for name, body in self.last.items():
                    self.socket.send_multipart([name, body])
        return subscribed

    def play(self, *acts: list[AnyEvent]) -> Callable[[], bool]:
        """Return a `poll` that publishes one act at a time, once somebody has subscribed."""
        waiting = iter(acts)
        here = False

        def poll() -> bool:
            nonlocal here
            came = self.serve()
            if here:
                self.publish(*next(waiting, []))
            here = here or came
            return True

        return poll


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    with zmq.Context() as context:
        publisher = Publisher(context)
        yield publisher
        publisher.socket.close()


def terminal(width: int = 80, height: int = 24) -> Console:
    return Console(width=width, height=height, file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm"})


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


@pytest.mark.timeout(30)
def test_a_run_is_followed_to_its_end_in_plain_lines(publisher: Publisher) -> None:
    console = plain()
    finished = run_event(seq=3, state="finished", test_accuracy=0.983)
    publisher.publish(run_event())
    poll = publisher.play([round_event(3), log("joined")], [round_event(3), finished])
    assert watch(publisher.endpoint, view_for(console, publisher.endpoint), poll=poll) == finished
    shown = [line.split(maxsplit=1)[1][:18] for line in written(console).splitlines()]
    assert shown == ["run digits trainin", "round 3/12  loss 0", "client 2  joined", "run digits finishe"]


@pytest.mark.timeout(30)
def test_a_late_monitor_sees_the_last_value_of_every_topic(publisher: Publisher) -> None:
    publisher.publish(
        run_event(seq=9, state="finished"), broker(seq=70), round_event(12), server(0), client(2), log("bye")
    )
    console = terminal()
    result = watch(publisher.endpoint, LiveView(console, publisher.endpoint), poll=publisher.play())
    last = written(console).rpartition("\x1b[?1049l")[2]
    assert result is not None
    assert result.state == "finished"
    assert [text for text in ("finished", "321 msg/s", "bye", "0.4123", "gpu-box", "2 steps") if text not in last] == []


@pytest.mark.timeout(30)
def test_what_is_no_event_disturbs_nobody(publisher: Publisher) -> None:
    console = terminal()
    publisher.send(b"client.0", b"no json")
    publisher.publish(run_event(state="failed", sentence="Disk full."))
    result = watch(publisher.endpoint, LiveView(console, publisher.endpoint), poll=publisher.play())
    assert result is not None
    assert "1 message unreadable" in written(console)


@pytest.mark.timeout(30)
def test_another_monitor_s_arrival_repeats_nothing(publisher: Publisher) -> None:
    console = plain()
    publisher.publish(run_event(), log("joined"))

    def again() -> list[AnyEvent]:
        return [run_event(), log("joined")]

    poll = publisher.play(again(), again(), [run_event(seq=2, state="finished")])
    watch(publisher.endpoint, PlainView(console), poll=poll)
    assert written(console).count("joined") == 1


@pytest.mark.timeout(30)
@pytest.mark.parametrize("live", [True, False])
def test_what_the_watcher_has_to_say_stands_among_the_broker_s_lines(publisher: Publisher, live: bool) -> None:
    console = terminal() if live else plain()
    notes = [LogEvent(time=NOON, level="warning", who="launcher", text="client 1 was killed")]
    last = LogEvent(time=NOON, level="warning", who="launcher", text="and again")

    def said() -> Iterator[LogEvent]:
        while notes:
            yield notes.pop(0)

    def end() -> list[AnyEvent]:
        notes.append(last)
        return [run_event(seq=2, state="finished")]

    publisher.publish(run_event(), log("joined"))
    poll = publisher.play([log("back again", seq=2)], *[()] * 3, end())
    view = view_for(console, publisher.endpoint)
    assert watch(publisher.endpoint, view, poll=poll, notes=said) == run_event(seq=2, state="finished")
    shown = written(console).rpartition("\x1b[?1049l")[2]
    texts = ("client 1 was killed", "back again", "and again")
    assert [text for text in texts if text not in shown] == []
    assert "missed" not in shown


@pytest.mark.timeout(30)
def test_a_poll_that_says_no_ends_the_watch_with_what_is_known(publisher: Publisher) -> None:
    publisher.publish(run_event())
    polls = iter([True, True, True, False])
    serve = publisher.play()
    result = watch(publisher.endpoint, PlainView(plain()), poll=lambda: serve() and next(polls))
    assert result == run_event()


@pytest.mark.timeout(30)
def test_a_broker_that_falls_silent_is_given_up(publisher: Publisher) -> None:
    publisher.publish(run_event())
    result = watch(publisher.endpoint, PlainView(plain()), poll=publisher.play(), silence=0.3)
    assert result == run_event()


@pytest.mark.timeout(30)
def test_nothing_at_the_address_is_said_in_a_sentence(publisher: Publisher) -> None:
    with pytest.raises(LinkError) as caught:
        watch(publisher.endpoint, PlainView(plain()), patience=0.1)
    assert str(caught.value) == (
        f"No broker published anything at {publisher.endpoint} within 0.1 s: start one with `zsplit broker`, "
        "or name its address with --broker HOST:PORT"
    )


@pytest.mark.timeout(30)
def test_events_of_another_version_are_said_in_a_sentence(publisher: Publisher) -> None:
    publisher.publish(run_event(v=99))
    with pytest.raises(RemoteProtocolError) as caught:
        watch(publisher.endpoint, PlainView(plain()), poll=publisher.play(), patience=0.6)
    assert str(caught.value) == (
        f"What {publisher.endpoint} publishes cannot be read (this monitor reads events of version 1): "
        "give the address of a broker of the same zsplit version"
    )


def test_an_impossible_address_is_refused_with_a_sentence() -> None:
    with pytest.raises(LinkError, match=r"nonsense is no address to connect to \(.*\): give one like tcp://HOST:PORT"):
        watch("nonsense", PlainView(plain()))


@contextmanager
def door(answer: ControlMessage) -> Iterator[str]:
    """The control socket of a broker that gives one answer to the first hello; yields its address."""

    def serve() -> None:
        sender, hello = socket.recv_multipart()
        assert decode_control(hello).role == "monitor"  # type: ignore[union-attr]
        socket.send_multipart([sender, encode(answer)])

    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 1000
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{port}"
        thread.join()


@pytest.mark.timeout(30)
def test_the_broker_says_where_its_events_are() -> None:
    welcome = Welcome(session="", run="r1", index=-1, config=b"{}", data_port=7001, events_port=7002)
    with door(welcome) as address:
        assert events_of(address, 20.0, print) == "tcp://127.0.0.1:7002"


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("code", "kind"), [(1, LinkError), (2, ConfigError)])
def test_a_refusal_is_passed_on_with_its_sentence(code: int, kind: type[Exception]) -> None:
    with door(Refused(sentence="wrong protocol", code=code)) as address, pytest.raises(kind, match="wrong protocol"):
        events_of(address, 20.0, print)


@pytest.mark.timeout(30)
def test_a_broker_that_does_not_answer_is_said_in_a_sentence() -> None:
    said: list[str] = []
    with zmq.Context() as context, context.socket(zmq.ROUTER) as deaf:
        address = f"127.0.0.1:{deaf.bind_to_random_port('tcp://127.0.0.1')}"
        with pytest.raises(LinkError) as caught:
            events_of(address, 0.1, said.append)
    assert said == [f"No answer from a broker at {address} yet; trying for 0.1 s"]
    assert str(caught.value) == (
        f"No broker answered at {address} within 0.1 s: "
        "start one there (zsplit broker), or give its address with --broker HOST:PORT"
    )


@pytest.mark.timeout(30)
def test_ctrl_c_goes_through_and_leaves_the_terminal_as_it_was(publisher: Publisher) -> None:
    console = terminal()

    def interrupt() -> bool:
        threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()
        return True

    with pytest.raises(KeyboardInterrupt):
        watch(publisher.endpoint, LiveView(console, publisher.endpoint), poll=interrupt)
    output = written(console)
    for entered, left in (("\x1b[?1049h", "\x1b[?1049l"), ("\x1b[?25l", "\x1b[?25h")):
        assert output.count(entered) == output.count(left) == 1
        assert output.index(entered) < output.index(left)


def test_a_terminal_gets_the_picture_and_all_else_gets_lines() -> None:
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    latin = Console(file=io.TextIOWrapper(io.BytesIO(), "latin-1"), force_terminal=True, _environ={"TERM": "xterm"})
    assert isinstance(view_for(terminal(), ENDPOINT), LiveView)
    assert isinstance(view_for(terminal(), ENDPOINT, plain=True), PlainView)
    for console in (plain(), dumb, latin):
        assert isinstance(view_for(console, ENDPOINT), PlainView)


def test_a_line_that_the_output_cannot_encode_is_still_printed() -> None:
    raw = io.BytesIO()
    view = PlainView(Console(file=io.TextIOWrapper(raw, "ascii")))
    view.take(log("→ done"))
    assert raw.getvalue().decode("ascii").strip().endswith("client 2  ? done")


def test_a_long_line_is_not_broken() -> None:
    console = plain()
    PlainView(console).take(log("long " * 100))
    assert written(console).count("\n") == 1


def test_listening_loads_neither_torch_nor_rich() -> None:
    code = "import sys, zsplit.monitor.subscribe; print({'torch', 'rich'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


# The page


def event_tables() -> str:
    """Return the documentation of all events, read from their classes."""
    common = "Every body has `topic` and\n\n" + _table(Event)
    kinds = [kind for kind in Event.__subclasses__() if kind.__struct_config__.tag]
    return "\n".join([common, *(f"### {_topic(kind)}\n\n{_about(kind)}\n\n{_table(kind)}" for kind in kinds)])


def _topic(kind: type[Event]) -> str:
    tag = kind.__struct_config__.tag
    return f"`{tag}.<index>`" if "index" in kind.__struct_fields__ else f"`{tag}`"


def _about(kind: type[Event]) -> str:
    return "\n".join(line.strip() for line in (kind.__doc__ or "").strip().splitlines())


def _table(kind: type[Event]) -> str:
    own = [field for field in structs.fields(kind) if kind is Event or field.name not in Event.__struct_fields__]
    rows = [f"| `{field.name}` | {_type(field.type)} | {_default(field)} |\n" for field in own]
    return "| field | type | without it |\n|---|---|---|\n" + "".join(rows)


def _type(kind: Any) -> str:
    names = {"str": "text", "int": "integer", "float": "number", "float | None": "number or null",
             "int | None": "integer or null", "tuple[int, ...]": "list of integers",
             "tuple[float, ...]": "list of numbers"}  # fmt: skip
    return names[kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)]


def _default(field: structs.FieldInfo) -> str:
    return "always there" if field.required else f"`{msgspec.json.encode(field.default).decode()}`"


def _section(name: str) -> tuple[str, str, str]:
    """Return the page before, between and after two markers."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, rest = DOC.read_text(encoding="utf-8").split(begin)
    inside, after = rest.split(end)
    return before + begin, inside, end + after


def test_the_page_s_tables_are_the_schema_in_the_code() -> None:
    assert _section("events")[1] == event_tables(), "run `python tests/test_monitor.py` to write them anew"


def test_every_topic_has_its_table() -> None:
    published: list[AnyEvent] = [run_event(), broker(), round_event(1), client(7), server(7), log("x")]
    headings = {re.sub(r"\.\d+$", ".<index>", topic(event)) for event in published}
    assert headings == set(re.findall("### `(.*)`", event_tables()))


@pytest.mark.timeout(30)
def test_the_page_s_subscriber_works_as_printed(publisher: Publisher) -> None:
    code = _section("subscriber")[1].removeprefix("```python\n").removesuffix("```\n")
    assert ENDPOINT in code
    publisher.publish(run_event())
    command = [sys.executable, "-c", code.replace(ENDPOINT, publisher.endpoint)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while not publisher.serve(20):
            assert process.poll() is None
        publisher.publish(run_event(seq=2, state="finished", round=12))
        output, _ = process.communicate(timeout=20)
    assert (process.returncode, output) == (0, "training 2 of 12\nfinished 12 of 12\n")


if __name__ == "__main__":
    head, _, tail = _section("events")
    DOC.write_text(head + event_tables() + tail, encoding="utf-8")
