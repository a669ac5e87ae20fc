"""What is sent again after a connection was lost, and what comes again: nothing is lost and nothing happens twice.

A client asks, the server answers: a question is smashed data, or with a tail the gradients of what the middle made of
them, and its answer comes on the next leg. The client keeps each question until it is answered and asks again what is
not; the server keeps its answers and gives them again. Both take in only what is next: a repeat, and what comes
before something that must come first, are dropped before anybody decodes them. Pure: no socket, no clock.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from zsplit.wire.messages import Job, Kind, Lease, Step, Tensors, Turn

T = TypeVar("T")

BEHIND: dict[Kind, int] = {"train": 0, "eval": 4, "predict": 8, "probe": 0}
"""Steps before the latest question of which a question may still be unanswered: more than clients have in flight."""

Place = tuple[int, int]
"""Step and micro-batch."""


class Repeats(Protocol[T]):
    """One side of every lease. `T` is a message as it was encoded."""

    def keep(self, jobs: Iterable[Job]) -> None:
        """Forget all that belongs to leases other than those of these jobs."""

    def leaves(self, message: Tensors | Step, encoded: T) -> bool:
        """Remember what is about to be sent; return whether it may be: not under a lease that is over."""

    def comes(self, message: Tensors | Step) -> bool:
        """Return whether what came is what is next, and for the trainer."""

    def answer(self, message: Tensors | Step) -> T | None:
        """Return what is to be sent once more for a message that is not next."""

    def unanswered(self, lease: Lease | None = None) -> Iterator[T]:
        """Yield what is to be sent again under a lease, or all of them, in order."""


class Questions(Generic[T]):
    """A client's side. The server answers in the order in which it is asked."""

    def __init__(self) -> None:
        self._asked: dict[Lease, deque[tuple[Tensors | Step, T]]] = {}

    def keep(self, jobs: Iterable[Job]) -> None:
        self._asked = {job.lease: self._asked.get(job.lease, deque()) for job in jobs}

    def leaves(self, message: Tensors | Step, encoded: T) -> bool:
        asked = self._asked.get(message.lease)
        if asked is None:
            return False
        asked.append((message, encoded))
        return True

    def comes(self, message: Tensors | Step) -> bool:
        """Return whether a message answers the question that is unanswered for longest, which it is no longer then."""
        asked = self._asked.get(message.lease)
        if not asked or isinstance(message, Step):
            return False
        while isinstance(asked[0][0], Step) and asked[0][0].step < message.step:
            asked.popleft()  # nobody answers it, but what comes of a later step does
            if not asked:
                return False
        first = asked[0][0]
        place = message.kind, message.step, message.micro, message.leg - 1
        if isinstance(first, Step) or (first.kind, first.step, first.micro, first.leg) != place:
            return False
        asked.popleft()
        return True

    def answer(self, message: Tensors | Step) -> T | None:  # noqa: ARG002  (a client answers nothing)
        return None

    def unanswered(self, lease: Lease | None = None) -> Iterator[T]:
        leases = self._asked if lease is None else self._asked.keys() & {lease}
        return (encoded for each in leases for _, encoded in self._asked[each])


class Answers(Generic[T]):
    """A server's side."""

    def __init__(self) -> None:
        self._courses: dict[Lease, Course[T]] = {}

    def keep(self, jobs: Iterable[Job]) -> None:
        self._courses = {job.lease: self._courses.get(job.lease) or Course(job) for job in jobs}

    def leaves(self, message: Tensors | Step, encoded: T) -> bool:
        course = self._courses.get(message.lease)
        if course is None:
            return False
        if isinstance(message, Tensors):
            course.answered(message, encoded)
        return True

    def comes(self, message: Tensors | Step) -> bool:
        course = self._courses.get(message.lease)
        return course is not None and course.comes(message)

    def answer(self, message: Tensors | Step) -> T | None:
        course = self._courses.get(message.lease)
        if course is None or isinstance(message, Step):
            return None
        return course.answers.get((message.step, message.micro, message.leg))

    def unanswered(self, lease: Lease | None = None) -> Iterator[T]:  # noqa: ARG002  (a server asks nothing)
        return iter(())


class Course(Generic[T]):
    """How far the questions under one lease are. `answers` are the kept ones by step, micro-batch and leg."""

    def __init__(self, job: Job) -> None:
        self.answers: dict[tuple[int, int, int], T] = {}
        first = job.first if isinstance(job, Turn) else 0
        self._end = first + job.count if isinstance(job, Turn) else math.inf
        self._tail = isinstance(job, Turn) and job.plan.tail != ""
        self._due = self._back_due = (first, 0)  # what is due on leg 0, and on leg 2 where there is a tail
        self._micros = 1.0
        self._owed = False  # the client was told norms, and says how the step ends before anything else

    def comes(self, message: Tensors | Step) -> bool:
        """Return whether a question is the next one, and go on to the one after it."""
        if isinstance(message, Step):
            return self._ends(message)
        place = message.step, message.micro
        return self._goes_back(place) if message.leg == 2 else self._goes_forward(place, message)

    def answered(self, message: Tensors, encoded: T) -> None:
        """Keep an answer."""
        self.answers[message.step, message.micro, message.leg - 1] = encoded
        self._owed = any(meta.what == "norms" for meta in message.tensors)

    def _ends(self, message: Step) -> bool:
        ends = self._owed and message.step == self._due[0] - 1
        self._owed = self._owed and not ends
        return ends

    def _goes_forward(self, place: Place, message: Tensors) -> bool:
        step, micro = place
        waits = self._owed or (self._tail and micro == 0 and place != self._back_due)
        if place != self._due or step >= self._end or waits:
            return False
        self._micros = message.scalars.get("micros", 1.0)
        self._due = self._after(place)
        self._forget(step - BEHIND[message.kind])
        return True

    def _goes_back(self, place: Place) -> bool:
        if not self._tail or place != self._back_due or place >= self._due:
            return False
        self._back_due = self._after(place)
        return True

    def _after(self, place: Place) -> Place:
        step, micro = place
        return (step, micro + 1) if micro + 1 < self._micros else (step + 1, 0)

    def _forget(self, before: int) -> None:
        """Forget the answers of steps before this one: whoever asks of this one has them."""
        while (oldest := next(iter(self.answers), None)) is not None and oldest[0] < before:
            del self.answers[oldest]
