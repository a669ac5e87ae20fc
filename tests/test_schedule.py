"""The order of micro-batches: a property of every step, and some steps drawn."""

import doctest

import pytest
from helpers import unhurried
from hypothesis import given
from hypothesis import strategies as st

from zsplit.train import schedule
from zsplit.train.schedule import order

sizes = st.integers(1, 30)


def drawn(micro_batches: int, window: int) -> str:
    return " ".join(f"{action.what[0]}{action.micro}" for action in order(micro_batches, window))


def test_the_examples_in_the_documentation_are_right() -> None:
    tried = doctest.testmod(schedule)
    assert (tried.failed, tried.attempted > 0) == (0, True)


@unhurried
@given(sizes, sizes)
def test_every_micro_batch_goes_forward_once_and_backward_once_in_order(micro_batches: int, window: int) -> None:
    actions = list(order(micro_batches, window))
    for what in ("forward", "backward"):
        assert [action.micro for action in actions if action.what == what] == list(range(micro_batches))
    assert len(actions) == 2 * micro_batches


@unhurried
@given(sizes, sizes)
def test_no_more_than_the_window_is_unanswered_and_no_less_than_it_could_be(micro_batches: int, window: int) -> None:
    sent = answered = 0
    for action in order(micro_batches, window):
        if action.what == "forward":
            assert sent - answered < window
            sent += 1
        else:
            assert action.micro < sent, "an answer is awaited to what was not sent"
            assert sent == micro_batches or sent - answered == window, "the link is left idle"
            answered += 1


@pytest.mark.parametrize(
    ("micro_batches", "window", "picture"),
    [
        (1, 1, "f0 b0"),
        (3, 1, "f0 b0 f1 b1 f2 b2"),
        (3, 3, "f0 f1 f2 b0 b1 b2"),
        (4, 2, "f0 f1 b0 f2 b1 f3 b2 b3"),
        (2, 9, "f0 f1 b0 b1"),
    ],
)
def test_steps_drawn(micro_batches: int, window: int, picture: str) -> None:
    assert drawn(micro_batches, window) == picture
