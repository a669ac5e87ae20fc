"""The order of micro-batches within a step, as data: made, checked, and drawn."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Literal, NamedTuple

from zsplit.errors import LocalProtocolError


class Action(NamedTuple):
    """What the client does next: compute and send a forward, or wait for a gradient and go backward."""

    what: Literal["forward", "backward"]
    micro: int

    def __str__(self) -> str:
        return f"{self.what[0]}{self.micro}"


def order(micro_batches: int, window: int) -> Iterator[Action]:
    """Yield the client's actions of one step: at most `window` micro-batches are unanswered at any time.

    >>> " ".join(map(str, order(3, 2)))
    'f0 f1 b0 f2 b1 b2'
    """
    answered = 0
    for micro in range(micro_batches):
        if micro - answered == window:
            yield Action("backward", answered)
            answered += 1
        yield Action("forward", micro)
    for micro in range(answered, micro_batches):
        yield Action("backward", micro)


def check(actions: Iterable[Action], micro_batches: int, window: int) -> None:
    """Raise LocalProtocolError for the first action that a step of so many micro-batches and this window forbids.

    Forwards go out and backwards are made in the order of the micro-batches, each once, a backward after its forward,
    and no more than `window` micro-batches are unanswered.
    """
    done: list[Action] = []
    counts = {"forward": 0, "backward": 0}
    for action in actions:
        wrong = _wrong(action, counts["forward"], counts["backward"], micro_batches, window)
        if wrong:
            raise LocalProtocolError(_sentence(done, f"{action} is wrong: {wrong}"))
        counts[action.what] += 1
        done.append(action)
    for what, count in counts.items():
        if count < micro_batches:
            raise LocalProtocolError(_sentence(done, f"the step ends without {what[0]}{count}"))


def _wrong(action: Action, sent: int, answered: int, micro_batches: int, window: int) -> str:
    """Return why an action cannot come after so many forwards and backwards, or nothing."""
    what, micro = action
    due = sent if what == "forward" else answered
    if not 0 <= micro < micro_batches:
        return f"the step has {micro_batches} micro-batches, counted from 0"
    if micro < due:
        return "it was done before"
    if micro > due:
        return f"{what[0]}{due} comes first"
    if what == "backward" and micro == sent:
        return f"f{micro} comes first"
    if what == "forward" and sent - answered == window:
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
    wrong order is drawn as well: what was never sent is not waited for.

    >>> print(picture(order(3, 2)))
    client      f0  f1          b0  f2  b1          b2
    uplink          0   1               2
    server              0   1               2
    downlink                0   1               2
    in flight   1   2   2   2   2   2   2   1   1   1
    """
    names = "client", "uplink", "server", "downlink", "in flight"
    client, uplink, server, downlink, flight = rows = [_Row() for _ in names]
    answers: dict[int, int] = {}
    change: Counter[int] = Counter()
    for action in actions:
        what, micro = action
        if what == "forward":
            ended = client.add(str(action), 0, slots.forward)
            change[ended - slots.forward] += 1
            arrived = server.add(str(micro), uplink.add(str(micro), ended, slots.uplink), slots.server)
            answers[micro] = downlink.add(str(micro), arrived, slots.downlink)
        else:
            change[client.add(str(action), answers.get(micro, 0), slots.backward)] -= 1
    for count in accumulate(change[slot] for slot in range(client.free)):
        flight.add(str(count), 0, 1)
    return "\n".join(_line(name, row) for name, row in zip(names, rows, strict=True))


def _line(name: str, row: _Row) -> str:
    cells = (f"{row.cells.get(slot, ''):4}" for slot in range(row.free))
    return f"{name:12}{''.join(cells)}".rstrip()
