"""The order of micro-batches: a property of every step, what refuses a wrong one, and some steps drawn."""

import doctest
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import pytest
from helpers import unhurried
from hypothesis import given
from hypothesis import strategies as st

from zsplit.errors import LocalProtocolError
from zsplit.train import schedule
from zsplit.train.schedule import SPLIT, U_SHAPED, Action, Slots, What, check, order, picture

sizes = st.integers(1, 30)
small = st.integers(1, 4)
slots = st.builds(Slots, *[st.integers(1, 3)] * 5)


NAMES: dict[str, What] = {"f": "forward", "t": "tail", "b": "backward"}


def drawn(micro_batches: int, window: int, way: Sequence[What] = SPLIT) -> str:
    return " ".join(map(str, order(micro_batches, window, way)))


def actions_of(text: str) -> list[Action]:
    return [Action(NAMES[word[0]], int(word[1:])) for word in text.split()]


def is_refused(actions: Sequence[Action], micro_batches: int, window: int, way: Sequence[What] = SPLIT) -> bool:
    try:
        check(actions, micro_batches, window, way)
    except LocalProtocolError:
        return True
    return False


def is_legal(actions: Sequence[Action], micro_batches: int, window: int) -> bool:
    """What `check` checks, said about the whole step instead of action by action."""
    each = list(range(micro_batches))
    if any([a.micro for a in actions if a.what == what] != each for what in ("forward", "backward")):
        return False
    unanswered = list(accumulate(1 if action.what == "forward" else -1 for action in actions))
    return min(unanswered, default=0) >= 0 and max(unanswered, default=0) <= window


def row(drawing: str, name: str) -> list[str]:
    """Return the cells of one row of a picture, empty ones too."""
    line = next(line for line in drawing.splitlines() if line.startswith(name))[12:]
    return [line[i : i + 4].strip() for i in range(0, len(line), 4)]


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
    ("micro_batches", "window", "expected"),
    [
        (1, 1, "f0 b0"),
        (3, 1, "f0 b0 f1 b1 f2 b2"),
        (3, 3, "f0 f1 f2 b0 b1 b2"),
        (4, 2, "f0 f1 b0 f2 b1 f3 b2 b3"),
        (2, 9, "f0 f1 b0 b1"),
    ],
)
def test_steps_as_a_sequence(micro_batches: int, window: int, expected: str) -> None:
    assert drawn(micro_batches, window) == expected


@unhurried
@given(sizes, sizes)
def test_every_order_passes_the_check(micro_batches: int, window: int) -> None:
    check(order(micro_batches, window), micro_batches, window)


@unhurried
@given(sizes, sizes, st.data())
def test_an_order_with_an_action_lost_doubled_or_changed_is_refused(
    micro_batches: int, window: int, data: st.DataObject
) -> None:
    actions = list(order(micro_batches, window))
    at = data.draw(st.integers(0, len(actions) - 1))
    other = data.draw(st.builds(Action, st.sampled_from(["forward", "backward"]), st.integers(-1, micro_batches)))
    lost = actions[:at] + actions[at + 1 :]
    doubled = actions[: at + 1] + actions[at:]
    assert is_refused(lost, micro_batches, window)
    assert is_refused(doubled, micro_batches, window)
    if other != actions[at]:
        assert is_refused([*actions[:at], other, *actions[at + 1 :]], micro_batches, window)


@unhurried
@given(sizes, sizes, st.data())
def test_a_shuffled_order_is_refused_where_it_breaks_a_rule_and_only_there(
    micro_batches: int, window: int, data: st.DataObject
) -> None:
    actions = data.draw(st.permutations(list(order(micro_batches, window))))
    assert is_refused(actions, micro_batches, window) != is_legal(actions, micro_batches, window)


@unhurried
@given(
    st.lists(st.builds(Action, st.sampled_from(["forward", "backward"]), st.integers(0, 2)), max_size=6), small, small
)
def test_anything_is_refused_unless_it_is_legal(actions: list[Action], micro_batches: int, window: int) -> None:
    assert is_refused(actions, micro_batches, window) != is_legal(actions, micro_batches, window)


@unhurried
@given(sizes, sizes)
def test_a_smaller_window_is_refused_where_the_order_uses_all_of_it(micro_batches: int, window: int) -> None:
    actions = list(order(micro_batches, window))
    assert is_refused(actions, micro_batches, window - 1) == (window <= micro_batches)


@pytest.mark.parametrize(
    ("actions", "sentence"),
    [
        ("b0 f0 f1 b1", "At the beginning of the step, b0 is wrong: f0 comes first"),
        ("f0 f1 b1 b0", "After f0 f1, b1 is wrong: b0 comes first"),
        ("f1 f0 b0 b1", "At the beginning of the step, f1 is wrong: f0 comes first"),
        ("f0 f0 b0 b1", "After f0, f0 is wrong: it was done before"),
        ("f0 f1 b0 b0", "After f0 f1 b0, b0 is wrong: it was done before"),
        ("f0 b0 b1 f1", "After f0 b0, b1 is wrong: f1 comes first"),
        ("f0 f1 f2 b0", "After f0 f1, f2 is wrong: the step has 2 micro-batches, counted from 0"),
        ("f0 f1 b0", "After f0 f1 b0, the step ends without b1"),
        ("f0 b0", "After f0 b0, the step ends without f1"),
    ],
)
def test_the_first_wrong_action_is_named(actions: str, sentence: str) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        check(actions_of(actions), 2, 2)
    assert str(caught.value) == f"{sentence}; take the actions as zsplit.train.schedule.order gives them."


def test_what_passes_the_window_is_named() -> None:
    with pytest.raises(LocalProtocolError, match="After f0 f1, f2 is wrong: the window allows 2 unanswered"):
        check(order(5, 3), 5, 2)


def test_a_step_whose_uplink_is_slow_drawn() -> None:
    assert (
        "\n" + picture(order(3, 3), Slots(uplink=3, downlink=2))
        == """
client      f0  f1  f2                  b0          b1          b2
uplink          0   ·   ·   1   ·   ·   2   ·   ·
server                      0           1           2
downlink                        0   ·       1   ·       2   ·
in flight   1   2   3   3   3   3   3   3   2   2   2   1   1   1"""
    )


def test_a_wrong_order_is_drawn_as_it_is() -> None:
    assert row(picture(actions_of("b0 f0")), "client") == ["b0", "f0"]


@unhurried
@given(sizes, sizes, slots)
def test_a_picture_shows_every_micro_batch_once_in_each_row_and_after_the_row_above(
    micro_batches: int, window: int, costs: Slots
) -> None:
    drawing = picture(order(micro_batches, window), costs)
    client = row(drawing, "client")
    rows = [[cell.removeprefix("f") for cell in client]] + [row(drawing, n) for n in ("uplink", "server", "downlink")]
    rows.append([cell.removeprefix("b") for cell in client])
    for micro in map(str, range(micro_batches)):
        assert [cells.count(micro) for cells in rows] == [1] * 5
        places = [cells.index(micro) for cells in rows]
        assert all(place + cost <= after for place, cost, after in zip(places, costs, places[1:], strict=False))


@unhurried
@given(sizes, sizes, slots)
def test_a_picture_counts_what_is_in_flight_up_to_the_window(micro_batches: int, window: int, costs: Slots) -> None:
    drawing = picture(order(micro_batches, window), costs)
    assert max(map(int, row(drawing, "in flight"))) == min(micro_batches, window)
    assert len(row(drawing, "in flight")) == len(row(drawing, "client"))


# U-shaped


@unhurried
@given(sizes, sizes)
def test_a_u_shaped_step_takes_answers_in_the_order_in_which_a_server_gives_them(
    micro_batches: int, window: int
) -> None:
    actions = list(order(micro_batches, window, U_SHAPED))
    answers = [Action("tail" if a.what == "forward" else "backward", a.micro) for a in actions if a.what != "backward"]
    assert [action for action in actions if action.what != "forward"] == answers
    assert len(actions) == 3 * micro_batches
    check(actions, micro_batches, window, U_SHAPED)


@unhurried
@given(sizes, sizes)
def test_a_u_shaped_step_sends_a_forward_as_soon_as_the_window_allows(micro_batches: int, window: int) -> None:
    sent = answered = 0
    for action in order(micro_batches, window, U_SHAPED):
        if action.what == "forward":
            sent += 1
        else:
            assert sent == micro_batches or sent - answered == window, "the link is left idle"
            answered += action.what == "backward"
        assert sent - answered <= window


@pytest.mark.parametrize(
    ("micro_batches", "window", "expected"),
    [
        (1, 1, "f0 t0 b0"),
        (2, 1, "f0 t0 b0 f1 t1 b1"),
        (3, 3, "f0 f1 f2 t0 t1 t2 b0 b1 b2"),
        (4, 2, "f0 f1 t0 t1 b0 f2 b1 f3 t2 t3 b2 b3"),
        (4, 3, "f0 f1 f2 t0 t1 t2 b0 f3 b1 b2 t3 b3"),
    ],
)
def test_u_shaped_steps_as_a_sequence(micro_batches: int, window: int, expected: str) -> None:
    assert drawn(micro_batches, window, U_SHAPED) == expected


@unhurried
@given(
    st.lists(st.builds(Action, st.sampled_from(["forward", "tail", "backward"]), st.integers(0, 2)), max_size=9),
    small,
    small,
)
def test_any_u_shaped_step_is_refused_unless_it_is_legal(
    actions: list[Action], micro_batches: int, window: int
) -> None:
    each = list(range(micro_batches))
    legal = all([a.micro for a in actions if a.what == what] == each for what in U_SHAPED)
    tails = list(accumulate({"forward": 1, "tail": -1}.get(action.what, 0) for action in actions))
    backs = list(accumulate({"tail": 1, "backward": -1}.get(action.what, 0) for action in actions))
    open_ = list(accumulate({"forward": 1, "backward": -1}.get(action.what, 0) for action in actions))
    legal = legal and min(tails + backs, default=0) >= 0 and max(open_, default=0) <= window
    assert is_refused(actions, micro_batches, window, U_SHAPED) != legal


@pytest.mark.parametrize(
    ("actions", "way", "sentence"),
    [
        ("f0 b0", U_SHAPED, "After f0, b0 is wrong: t0 comes first"),
        ("f0 t1", U_SHAPED, "After f0, t1 is wrong: t0 comes first"),
        ("f0 t0 t1", U_SHAPED, "After f0 t0, t1 is wrong: f1 comes first"),
        ("f0 t0 b0 f1", U_SHAPED, "After f0 t0 b0 f1, the step ends without t1"),
        ("f0 t0", SPLIT, "After f0, t0 is wrong: the model has no tail at the client"),
    ],
)
def test_the_first_wrong_action_of_a_u_shaped_step_is_named(actions: str, way: Sequence[What], sentence: str) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        check(actions_of(actions), 2, 2, way)
    assert str(caught.value) == f"{sentence}; take the actions as zsplit.train.schedule.order gives them."


@unhurried
@given(sizes, sizes)
def test_a_picture_of_a_u_shaped_step_shows_both_ways_of_every_micro_batch(micro_batches: int, window: int) -> None:
    drawing = picture(order(micro_batches, window, U_SHAPED))
    for name in ("uplink", "server", "downlink"):
        cells = row(drawing, name)
        for micro in range(micro_batches):
            assert cells.index(str(micro)) < cells.index(f"{micro}'")
    assert max(map(int, row(drawing, "in flight"))) == min(micro_batches, window)


def test_the_page_about_labels_draws_a_u_shaped_step_as_it_is() -> None:
    page = (Path(__file__).parents[1] / "docs" / "labels.md").read_text()
    assert f"<!-- u-shaped: begin -->\n```\n{picture(order(3, 3, U_SHAPED))}\n```\n" in page
