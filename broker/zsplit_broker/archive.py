"""Which versions are on the disk and on their way there, in the order of training. No disk here."""

from collections.abc import Collection, Iterator

from zsplit.wire.messages import Ref

KEPT_VERSIONS = 2
"""Stored versions: the newest, and the one before it for when the newest is damaged."""


class Archive:
    """The versions of a run: `storing` by digest with their holders, `stored` oldest first."""

    def __init__(self) -> None:
        self.storing: dict[str, Ref] = {}
        self.stored: list[str] = []
        self._ordered: list[str] = []  # both, as training made them, not as the disk finished them

    def store(self, ref: Ref) -> None:
        """A version is to be stored. One that training came back to is the newest again; it comes from where it did."""
        self._ordered = [*(other for other in self._ordered if other != ref.digest), ref.digest]
        self.stored = [other for other in self._ordered if other in self.stored]
        self.storing.setdefault(ref.digest, ref)

    def forsake(self) -> list[str]:
        """Give up what is on its way; return its digests."""
        given_up = list(self.storing)
        self.storing.clear()
        self._ordered = [other for other in self._ordered if other in self.stored]
        return given_up

    def remove(self, digest: str) -> None:
        """A stored version is gone, or must not be used."""
        self.stored = [other for other in self.stored if other != digest]
        self._ordered = [other for other in self._ordered if other in self.stored or other in self.storing]

    def store_again(self, ref: Ref) -> None:
        """The file of a stored version must not be used: it is on its way anew, and as old as it was."""
        self.stored = [other for other in self.stored if other != ref.digest]
        self.storing[ref.digest] = ref

    def written(self, digest: str, needed: Collection[str] = ()) -> Iterator[str]:
        """A version is on the disk; yield those that nothing needs any more."""
        if self.storing.pop(digest, None) is None:
            return
        self.stored = [other for other in self._ordered if other == digest or other in self.stored]
        while len(self.stored) > KEPT_VERSIONS and self.stored[0] not in needed and not self._is_footing():
            yield self.stored.pop(0)
        self._ordered = [other for other in self._ordered if other in self.stored or other in self.storing]

    def _is_footing(self) -> bool:
        """Whether a version between the oldest two is on its way: were it lost, the oldest would be gone back to."""
        between = self._ordered[: self._ordered.index(self.stored[1])]
        return any(other in self.storing for other in between)
