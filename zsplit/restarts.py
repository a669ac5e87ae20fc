"""Who was killed is started again: after how long, how often, and in what words. No process, no clock of its own."""

from collections.abc import Callable, Iterable
from typing import Protocol

FIRST = 0.5
"""Seconds before a child is started again the first time; each later time takes twice as long."""

LONGEST = 30.0
"""Seconds that it takes at most."""

DOUBLINGS = 10
"""After so many the pause is as long as it gets."""

SETTLED = 60.0
"""Seconds that a child has to live for what came before to be forgotten."""

ALLOWED = 3
"""How often a child is started again, unless told otherwise."""


class Restarts:
    """What one child has used up of its restarts; `count` are those since it last lived long."""

    def __init__(self, allowed: int, now: float) -> None:
        self.count = 0
        self._allowed = allowed
        self._since = now

    def again(self, now: float) -> float | None:
        """The child died: return the seconds until it is to be started again, None where it no more is."""
        if now - self._since >= SETTLED:
            self.count = 0
        if self.count >= self._allowed:
            return None
        self.count += 1
        return min(LONGEST, FIRST * 2.0 ** min(self.count - 1, DOUBLINGS))

    def began(self, now: float) -> None:
        """The child was started again."""
        self._since = now


class Child(Protocol):
    """A process that can be started again."""

    name: str

    @property
    def killed(self) -> str:
        """How it died, where it was killed or said nothing; empty while it lives, and where it had words."""

    def bury(self) -> None:
        """Let go of what is left of it."""

    def start(self) -> None:
        """Start it once more."""


class Keeper:
    """Starts children again; `lost` is the first that it does not, with the reason. `now` is any clock's time."""

    def __init__(self, children: Iterable[Child], allowed: int, say: Callable[[str], None], now: float) -> None:
        self.lost: tuple[Child, str] | None = None
        self._allowed = allowed
        self._say = say
        self._kept = [(child, Restarts(allowed, now)) for child in children]
        self._due: dict[Child, float] = {}

    def look(self, now: float) -> None:
        """Notice who was killed, and start those whose time has come."""
        for child, restarts in self._kept:
            if child in self._due:
                if now >= self._due[child]:
                    del self._due[child]
                    child.start()
                    restarts.began(now)
            elif self.lost is None and child.killed:
                self._mourn(child, restarts, now)

    def waits(self, child: Child) -> bool:
        """Whether the child is dead, and going to be started again."""
        return child in self._due

    def until_due(self, now: float) -> float | None:
        """Return the seconds until somebody is to be started; None where nobody is."""
        return max(0.0, min(self._due.values()) - now) if self._due else None

    def _mourn(self, child: Child, restarts: Restarts, now: float) -> None:
        how = child.killed
        child.bury()
        pause = restarts.again(now)
        if pause is None:
            before = f", after it was started again {_times(restarts.count)}" if restarts.count else ""
            self.lost = child, how + before
            return
        self._due[child] = now + pause
        self._say(f"{child.name} {how}; it is started again in {pause:g} s ({restarts.count} of {self._allowed})")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
