"""How each kind of span is drawn: a letter and a colour, the same in the terminal and in a picture."""

from collections.abc import Iterable
from typing import NamedTuple

WAITING = frozenset({"wait", "fetch"})
"""Spans in which nothing is done: they are idle time that has a reason."""

IDLE = "-"
"""Letter of the spans in which a peer waits."""


class Kind(NamedTuple):
    """A kind of span: its letter, unique when its case is ignored too, and its colour as in CSS."""

    letter: str
    colour: str


KNOWN = {
    "load": Kind("L", "#8c8279"),
    "forward": Kind("F", "#4c78a8"),
    "tail": Kind("T", "#e45756"),
    "backward": Kind("B", "#f58518"),
    "step": Kind("O", "#54a24b"),
    "encode": Kind("E", "#b279a2"),
    "send": Kind("S", "#72b7b2"),
    "receive": Kind("R", "#d9b32c"),
    "decode": Kind("D", "#ff9da6"),
    "aggregate": Kind("A", "#9d755d"),
    "evaluate": Kind("V", "#5f6bb3"),
    "measure": Kind("M", "#c75d8a"),
    "wait": Kind(IDLE, "#d8d8d8"),
    "fetch": Kind(IDLE, "#d8d8d8"),
}
"""Letters and colours of the names that peers give their spans, in the order of the legend."""

OTHERS = ("#439894", "#d67195", "#b6992d", "#8cd17d", "#499894", "#79706e")
"""Colours of names that are not known here, in turn."""


def kinds_of(names: Iterable[str]) -> dict[str, Kind]:
    """Return the kind of each name, known ones first; an unknown one gets a letter of its own that is free, or `?`."""
    present = set(names)
    kinds = {name: kind for name, kind in KNOWN.items() if name in present}
    taken = {kind.letter for kind in KNOWN.values()}
    for number, name in enumerate(sorted(present - KNOWN.keys())):
        letter = next((c for c in name.upper() if c.isascii() and c.isalpha() and c not in taken), "?")
        taken.add(letter)
        kinds[name] = Kind(letter, OTHERS[number % len(OTHERS)])
    return kinds
