"""The order of micro-batches within a step, as data: made, checked, and drawn."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

from zsplit.errors import LocalProtocolError

What = Literal["forward", "tail", "backward"]


class Action(NamedTuple):
    """What the client does next with a micro-batch.

    Compute and send a forward; wait for a gradient and go backward; and in a U-shaped model between the two, wait for
    the middle's output, go forward and backward through the tail, and send the gradient.
    """

    what: What
    micro: int

    def __str__(self) -> str:
        return f"{self.what[0]}{self.micro}"


SPLIT: tuple[What, ...] = ("forward", "backward")
"""What becomes of each micro-batch, in order; the client waits for the server between one and the next."""

U_SHAPED: tuple[What, ...] = ("forward", "tail", "backward")
"""The same where the tail is at the client."""


def order(micro_batches: int, window: int, way: Sequence[What] = SPLIT) -> Iterator[Action]:
    """Yield the client's actions of one step: at most `window` micro-batches are between forward and backward.

    A forward goes out as soon as the window allows it. Answers are taken in the order in which the server gives them,
    which is that of the questions.

    >>> " ".join(map(str, order(3, 2)))
    'f0 f1 b0 f2 b1 b2'
    >>> " ".join(map(str, order(3, 2, U_SHAPED)))
    'f0 f1 t0 t1 b0 f2 b1 t2 b2'
    """
    next_of = dict(pairwise(way))
    asked: deque[Action] = deque()
    sent = answered = 0
    while answered < micro_batches:
        if sent < micro_batches and sent - answered < window:
            action = Action(way[0], sent)
            sent += 1
        else:
            before = asked.popleft()
            action = Action(next_of[before.what], before.micro)
        if action.what == way[-1]:
            answered += 1
        else:
            asked.append(action)
        yield action


def check(actions: Iterable[Action], micro_batches: int, window: int, way: Sequence[What] = SPLIT) -> None:
    """Raise LocalProtocolError for the first action that a step of so many micro-batches and this window forbids.

    Each action is made once for each micro-batch, in the order of the micro-batches, a tail after its forward, a
    backward after what comes before it, and no more than `window` micro-batches are between forward and backward.
    """
    done: list[Action] = []
    counts = dict.fromkeys(way, 0)
    for action in actions:
        wrong = _wrong(action, counts, micro_batches, window)
        if wrong:
            raise LocalProtocolError(_sentence(done, f"{action} is wrong: {wrong}"))
        counts[action.what] += 1
        done.append(action)
    for what, count in counts.items():
        if count < micro_batches:
            raise LocalProtocolError(_sentence(done, f"the step ends without {what[0]}{count}"))


def _wrong(action: Action, counts: Mapping[What, int], micro_batches: int, window: int) -> str:
    """Return why an action cannot come after so many of each kind, or nothing. `counts` is in the order of the way."""
    what, micro = action
    before = {later: earlier for earlier, later in pairwise(counts)}
    if what not in counts:
        return "the model has no tail at the client"
    if not 0 <= micro < micro_batches:
        return f"the step has {micro_batches} micro-batches, counted from 0"
    if micro < counts[what]:
        return "it was done before"
    if micro > counts[what]:
        return f"{what[0]}{counts[what]} comes first"
    if what in before and micro == counts[before[what]]:
        return f"{before[what][0]}{micro} comes first"
    if what == "forward" and counts["forward"] - counts["backward"] == window:
        return f"the window allows {window} unanswered"
    return ""


def _sentence(done: list[Action], what: str) -> str:
    story = f"After {' '.join(map(str, done))}" if done else "At the beginning of the step"
    return f"{story}, {what}; take the actions as zsplit.train.schedule.order gives them."


class Slots(NamedTuple):
    """How many slots of a picture each part of a micro-batch's way takes."""

    forward: int = 1
    uplink: int = 1
    server: int = 1
    downlink: int = 1
    backward: int = 1
    tail: int = 1


EVEN = Slots()


class _Row:
    """One row of a picture: one thing after the other."""

    def __init__(self) -> None:
        self.cells: dict[int, str] = {}
        self.free = 0

    def add(self, label: str, ready: int, slots: int) -> int:
        """Begin where it is ready and the row is free; return the slot in which it has ended."""
        begin = max(ready, self.free)
        self.free = begin + slots
        self.cells |= {slot: label if slot == begin else "·" for slot in range(begin, self.free)}
        return self.free


def picture(actions: Iterable[Action], slots: Slots = EVEN) -> str:
    """Draw a step: a row for each of client, uplink, server and downlink, which do one thing at a time.

    A column is a slot of time, and a dot goes on with what began before it. The last row counts the micro-batches in
    flight: those whose activations the client keeps, from the begin of the forward to the end of the backward. A
    wrong order is drawn as well: what was never sent is not waited for. In a U-shaped step a
    prime marks the gradients with which the server goes backward.

    >>> print(picture(order(3, 2)))
    client      f0  f1          b0  f2  b1          b2
    uplink          0   1               2
    server              0   1               2
    downlink                0   1               2
    in flight   1   2   2   2   2   2   2   1   1   1
    >>> print(picture(order(2, 2, U_SHAPED)))
    client      f0  f1          t0  t1          b0  b1
    uplink          0   1           0'  1'
    server              0   1           0'  1'
    downlink                0   1           0'  1'
    in flight   1   2   2   2   2   2   2   2   2   1
    """
    names = "client", "uplink", "server", "downlink", "in flight"
    client, uplink, server, downlink, flight = rows = [_Row() for _ in names]
    answers: dict[int, int] = {}
    change: Counter[int] = Counter()
    for action in actions:
        what, micro = action
        ready = 0 if what == "forward" else answers.get(micro, 0)
        ended = client.add(str(action), ready, getattr(slots, what))
        if what == "backward":
            change[ended] -= 1
            continue
        if what == "forward":
            change[ended - slots.forward] += 1
        label = f"{micro}'" if what == "tail" else str(micro)
        arrived = server.add(label, uplink.add(label, ended, slots.uplink), slots.server)
        answers[micro] = downlink.add(label, arrived, slots.downlink)
    for count in accumulate(change[slot] for slot in range(client.free)):
        flight.add(str(count), 0, 1)
    return "\n".join(_line(name, row) for name, row in zip(names, rows, strict=True))


def _line(name: str, row: _Row) -> str:
    cells = (f"{row.cells.get(slot, ''):4}" for slot in range(row.free))
    return f"{name:12}{''.join(cells)}".rstrip()
