"""What is sent again and what comes again: whatever is lost or doubled, everything happens once and in order."""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lone_link import TURN

from zsplit.train.link.repeats import BEHIND, Answers, Questions
from zsplit.wire.messages import (
    Evaluate,
    Init,
    Job,
    Kind,
    Lease,
    Measure,
    Plan,
    Predict,
    Step,
    TensorMeta,
    Tensors,
)

LEASE = TURN.lease
OTHER = Lease(1, 2)
Message = Tensors | Step

NORMS = (TensorMeta("norms", "F32", (1,), "raw", 4),)


def turn(first: int = 0, count: int = 3, tail: str = "", lease: Lease = LEASE) -> Job:
    return msgspec.structs.replace(TURN, lease=lease, first=first, count=count, plan=Plan(cut="relu", tail=tail))


def tensors(
    step: int, micro: int = 0, leg: int = 0, micros: int = 1, kind: Kind = "train", norms: bool = False
) -> Tensors:
    scalars = {"micros": float(micros)} if kind == "train" and leg == 0 else {}
    return Tensors("", "", LEASE, kind, leg, NORMS if norms else (), step, micro, scalars)


def stop(step: int) -> Step:
    return Step("", "", LEASE, step, 0.5)


def asking(*messages: Message) -> Questions[Message]:
    """Return a client's side that has asked these."""
    questions: Questions[Message] = Questions()
    questions.keep([turn()])
    for message in messages:
        assert questions.leaves(message, message)
    return questions


def answering(job: Job) -> Answers[Message]:
    answers: Answers[Message] = Answers()
    answers.keep([job])
    return answers


# The client's side


def test_what_is_not_answered_is_sent_again_in_order() -> None:
    asked = [tensors(0, 0), tensors(0, 1), tensors(0, 2)]
    questions = asking(*asked)
    assert questions.comes(tensors(0, 0, leg=1))
    assert list(questions.unanswered()) == list(questions.unanswered(LEASE)) == asked[1:]
    assert list(questions.unanswered(OTHER)) == []


def test_an_answer_is_taken_once_and_never_before_an_earlier_one() -> None:
    questions = asking(tensors(0, 0), tensors(0, 1))
    assert not questions.comes(tensors(0, 1, leg=1))
    assert questions.comes(tensors(0, 0, leg=1))
    assert not questions.comes(tensors(0, 0, leg=1))
    assert questions.comes(tensors(0, 1, leg=1))
    assert not questions.comes(tensors(0, 1, leg=1))


def test_with_a_tail_each_leg_up_is_answered_by_the_one_behind_it() -> None:
    questions = asking(tensors(0, leg=0))
    assert not questions.comes(tensors(0, leg=3))
    assert questions.comes(tensors(0, leg=1))
    questions.leaves(tensors(0, leg=2), tensors(0, leg=2))
    assert not questions.comes(tensors(0, leg=1))
    assert questions.comes(tensors(0, leg=3))
    assert not list(questions.unanswered())


def test_a_step_is_answered_by_what_comes_of_a_later_one() -> None:
    questions = asking(tensors(0), stop(0), tensors(1), stop(1))
    assert questions.comes(tensors(0, leg=1))
    assert list(questions.unanswered()) == [stop(0), tensors(1), stop(1)]
    assert not questions.comes(tensors(0, leg=1))
    assert questions.comes(tensors(1, leg=1))
    assert list(questions.unanswered()) == [stop(1)]
    assert not questions.comes(tensors(2, leg=1))
    assert list(questions.unanswered()) == []


def test_nothing_is_asked_or_answered_under_a_lease_that_is_over() -> None:
    questions = asking(tensors(0))
    questions.keep([turn(lease=OTHER)])
    assert not questions.comes(tensors(0, leg=1))
    assert not questions.leaves(tensors(1), tensors(1))
    assert not list(questions.unanswered(LEASE))
    questions.keep([turn()])
    assert not list(questions.unanswered())


def test_a_client_takes_no_step_and_answers_nothing() -> None:
    questions = asking(tensors(0))
    assert not questions.comes(stop(0))
    assert questions.answer(tensors(0)) is None


# The server's side


def test_what_comes_again_is_not_taken_again_and_its_answer_is_given_again() -> None:
    answers = answering(turn())
    question, answer = tensors(0, micros=2), tensors(0, leg=1)
    assert answers.comes(question)
    assert not answers.comes(question)
    assert answers.answer(question) is None  # it is being computed
    assert answers.leaves(answer, answer)
    assert not answers.comes(question)
    assert answers.answer(question) is answer


@pytest.mark.parametrize("early", [(0, 1), (0, 2), (1, 0), (2, 0)])
def test_what_comes_before_something_that_must_come_first_is_dropped(early: tuple[int, int]) -> None:
    answers = answering(turn())
    assert not answers.comes(tensors(*early, micros=2))
    assert answers.answer(tensors(*early)) is None
    for place in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]:
        assert answers.comes(tensors(*place, micros=2))


def test_a_turn_begins_with_the_step_that_it_names_and_ends_with_its_last() -> None:
    answers = answering(turn(first=5, count=1))
    assert not answers.comes(tensors(0))
    assert answers.comes(tensors(5))
    assert not answers.comes(tensors(6))


def test_where_the_client_was_told_norms_it_says_how_the_step_ends_before_anything_else() -> None:
    answers = answering(turn())
    assert not answers.comes(stop(0))
    assert answers.comes(tensors(0))
    assert not answers.comes(stop(0))
    answers.leaves(tensors(0, leg=1, norms=True), tensors(0, leg=1))
    assert not answers.comes(tensors(1))
    assert not answers.comes(stop(1))
    assert answers.comes(stop(0))
    assert not answers.comes(stop(0))
    assert answers.answer(stop(0)) is None
    assert answers.comes(tensors(1))


def test_with_a_tail_gradients_follow_what_went_forward_and_end_the_step() -> None:
    answers = answering(turn(tail="pool"))
    assert not answers.comes(tensors(0, leg=2))
    for micro in range(2):
        assert answers.comes(tensors(0, micro, micros=2))
    assert not answers.comes(tensors(1, 0, micros=2))
    assert not answers.comes(tensors(0, 1, leg=2))
    assert answers.comes(tensors(0, 0, leg=2))
    assert not answers.comes(tensors(0, 0, leg=2))
    assert not answers.comes(tensors(1, 0, micros=2))
    assert answers.comes(tensors(0, 1, leg=2))
    assert answers.comes(tensors(1, 0, micros=2))


def test_without_a_tail_nothing_goes_back() -> None:
    answers = answering(turn())
    assert answers.comes(tensors(0))
    assert not answers.comes(tensors(0, leg=2))


JOBS: dict[Kind, Job] = {
    "train": turn(count=100),
    "eval": Evaluate(lease=LEASE, client=0, server=0, base=TURN.base, plan=TURN.plan, round=0, part="test"),
    "predict": Predict(lease=LEASE, client=0, server=0, base=TURN.base, plan=TURN.plan),
    "probe": Measure(lease=LEASE, server=0, client=0),
}


@pytest.mark.parametrize("kind", BEHIND)
def test_answers_are_kept_for_as_long_as_their_question_can_come_again(kind: Kind) -> None:
    answers = answering(JOBS[kind])
    for step in range(20):
        assert answers.comes(tensors(step, kind=kind))
        answers.leaves(tensors(step, leg=1, kind=kind), tensors(step, leg=1, kind=kind))
    kept = [step for step in range(20) if answers.answer(tensors(step, kind=kind)) is not None]
    assert kept == list(range(19 - BEHIND[kind], 20))


def test_a_server_keeps_nothing_of_a_lease_that_is_over_nor_of_one_that_it_does_not_know() -> None:
    answers = answering(turn())
    answers.comes(tensors(0))
    answers.keep([Init(lease=OTHER, server=0)])
    assert not answers.leaves(tensors(0, leg=1), tensors(0, leg=1))
    assert answers.answer(tensors(0)) is None
    assert not answers.comes(tensors(0))
    assert not list(answers.unanswered())
    answers.keep([turn()])
    assert answers.comes(tensors(0))


# Both, over a network that loses and doubles


class Answer(NamedTuple):
    """An answer by step, micro-batch and leg."""

    step: int
    micro: int
    leg: int


class Shape(NamedTuple):
    """A turn: steps, micro-batches, whether the loss is the client's, whether gradients are clipped, the window."""

    steps: int
    micros: int
    tail: bool
    clips: bool
    window: int


def script(shape: Shape) -> Iterator[Message | Answer]:
    """Yield what a client's trainer asks and the answers that it waits for: a window of micro-batches at a time."""
    for step in range(shape.steps):
        for begin in range(0, shape.micros, shape.window):
            group = range(begin, min(begin + shape.window, shape.micros))
            yield from (tensors(step, micro, 0, shape.micros) for micro in group)
            for micro in group:
                yield Answer(step, micro, 1)
                if shape.tail:
                    yield tensors(step, micro, 2)
            if shape.tail:
                yield from (Answer(step, micro, 3) for micro in group)
        if shape.clips:
            yield stop(step)


class Ends:
    """A client, a server, and the two ways between them, on which anything may be lost and doubled."""

    def __init__(self, shape: Shape) -> None:
        job = turn(count=shape.steps, tail="pool" if shape.tail else "")
        self.shape = shape
        self.questions: Questions[Message] = Questions()
        self.answers: Answers[Message] = Answers()
        self.questions.keep([job])
        self.answers.keep([job])
        self.up: deque[Message] = deque()
        self.down: deque[Message] = deque()
        self.applied: list[Message] = []
        self.computing: deque[Tensors] = deque()
        self.told: deque[Answer] = deque()
        self._script = script(shape)
        self._waits: Answer | None = None
        self.over = False

    def client(self) -> None:
        """Let the client go on until it has to wait."""
        while not self.over:
            if self._waits is not None:
                if not self.told:
                    return
                assert self.told.popleft() == self._waits
            what = next(self._script, None)
            self.over = what is None
            self._waits = what if isinstance(what, Answer) else None
            if isinstance(what, Tensors | Step):
                assert self.questions.leaves(what, what)
                self.up.append(what)

    def server(self) -> None:
        """Let the server answer one question."""
        if self.computing:
            asked = self.computing.popleft()
            last = asked.micro == self.shape.micros - 1 and asked.leg == (2 if self.shape.tail else 0)
            answer = tensors(asked.step, asked.micro, asked.leg + 1, norms=last and self.shape.clips)
            assert self.answers.leaves(answer, answer)
            self.down.append(answer)

    def carry_up(self) -> None:
        if self.up:
            message = self.up.popleft()
            if self.answers.comes(message):
                self.applied.append(message)
                if isinstance(message, Tensors):
                    self.computing.append(message)
            elif (answer := self.answers.answer(message)) is not None:
                self.down.append(answer)

    def carry_down(self) -> None:
        if self.down:
            message = self.down.popleft()
            assert isinstance(message, Tensors)
            if self.questions.comes(message):
                self.told.append(Answer(message.step, message.micro, message.leg))

    def lose_up(self) -> None:
        if self.up:
            self.up.popleft()

    def lose_down(self) -> None:
        if self.down:
            self.down.popleft()

    def double_up(self) -> None:
        self.up.extendleft(list(self.up)[:1])

    def double_down(self) -> None:
        self.down.extendleft(list(self.down)[:1])

    def ask_again(self) -> None:
        self.up.extend(self.questions.unanswered())


SHAPES = st.builds(
    Shape,
    steps=st.integers(1, 3),
    micros=st.integers(1, 4),
    tail=st.booleans(),
    clips=st.booleans(),
    window=st.integers(1, 4),
)
EVENTS = ["client", "server", "carry_up", "carry_down", "lose_up", "lose_down", "double_up", "double_down", "ask_again"]


@given(SHAPES, st.lists(st.sampled_from(EVENTS), max_size=120))
def test_whatever_is_lost_and_doubled_all_is_applied_once_and_in_order(shape: Shape, events: list[str]) -> None:
    ends = Ends(shape)
    for event in events:
        getattr(ends, event)()
    rounds = 0
    while not ends.over or len(ends.applied) < len([each for each in script(shape) if not isinstance(each, Answer)]):
        rounds += 1
        assert rounds < 1000, "it hangs"
        ends.client()
        ends.ask_again()
        while ends.up or ends.down or ends.computing:
            for event in ("carry_up", "server", "carry_down", "client"):
                getattr(ends, event)()
    asked = [each for each in script(shape) if not isinstance(each, Answer)]
    for leg in (0, 2):
        assert [m for m in ends.applied if leg_of(m) == leg] == [m for m in asked if leg_of(m) == leg]
    assert [m for m in ends.applied if isinstance(m, Step)] == [m for m in asked if isinstance(m, Step)]
    assert [m.step for m in ends.applied] == sorted(m.step for m in ends.applied)


def leg_of(message: Message) -> int:
    return -1 if isinstance(message, Step) else message.leg
