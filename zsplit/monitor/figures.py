"""Figures as people read them: short, of steady width, with their unit. Any number has a text."""

from collections.abc import Iterable
from datetime import datetime
from itertools import pairwise
from math import isfinite

NONE = "–"


def loss(value: float | None) -> str:
    """Return a loss in at most 7 cells: `0.4123`, `12.40`, `3e+05`."""
    if value is None:
        return NONE
    size = abs(value)
    if size < 10:
        return f"{value:.4f}"
    return f"{value:.2f}" if size < 1000 else f"{value:.0e}"


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share of 1 as `96.1 %`."""
    if share is None:
        return NONE
    return f"{100 * share:.{digits}f} %" if abs(share) < 100 else f"{100 * share:.0e} %"


def count(value: float) -> str:
    """Return a rate or a number of things: `0.4`, `12`, `1,234`, `1.2 M`."""
    if 0 < value < 9.95:
        return f"{value:.1f}"
    return f"{value:,.0f}" if abs(value) < 99_999.5 else scaled(value, "").rstrip()


def scaled(value: float, unit: str) -> str:
    """Return a quantity with a decimal prefix: `512 B`, `12.3 MB`."""
    prefixes = iter(("", "k", "M", "G", "T", "P"))
    prefix = next(prefixes)
    while abs(value) >= 999.5 and (bigger := next(prefixes, None)):
        value, prefix = value / 1000, bigger
    if abs(value) >= 9999.5:
        return f"{value:.0e} {prefix}{unit}"
    return f"{value:.{0 if not prefix or abs(value) >= 99.95 else 1}f} {prefix}{unit}"


def seconds(value: float) -> str:
    """Return a duration: `1.9 s`, `2:05`, `1:02:05`, `3 d 04:05`."""
    if not isfinite(value) or value < 0:
        return NONE
    if value < 99.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(int(value), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days:,} d {hours:02}:{minutes:02}" if days < 10_000 else f"{days:.0e} d"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def clock(time: float) -> str:
    """Return the local time of day of a moment in unix seconds."""
    try:
        return f"{datetime.fromtimestamp(time):%H:%M:%S}"
    except (OverflowError, ValueError, OSError):
        return "--:--:--"


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as `0–3, 7`."""
    ordered = sorted(set(numbers))
    if not ordered:
        return NONE
    breaks = [i + 1 for i, (a, b) in enumerate(pairwise(ordered)) if b != a + 1]
    runs = [ordered[a:b] for a, b in pairwise([0, *breaks, len(ordered)])]
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def some(number: int, noun: str) -> str:
    """Return `1 client`, `2 clients`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
