"""The order of micro-batches within a step, as data."""

from collections.abc import Iterator
from typing import Literal, NamedTuple


class Action(NamedTuple):
    """What the client does next: compute and send a forward, or wait for a gradient and go backward."""

    what: Literal["forward", "backward"]
    micro: int


def order(micro_batches: int, window: int) -> Iterator[Action]:
    """Yield the client's actions of one step: at most `window` micro-batches are unanswered at any time.

    >>> [f"{a.what[0]}{a.micro}" for a in order(3, 2)]
    ['f0', 'f1', 'b0', 'f2', 'b1', 'b2']
    """
    answered = 0
    for micro in range(micro_batches):
        if micro - answered == window:
            yield Action("backward", answered)
            answered += 1
        yield Action("forward", micro)
    for micro in range(answered, micro_batches):
        yield Action("backward", micro)
