"""Pulling a state in chunks, under credit: which bytes to ask for next, and what to do with those that came.

The same small machine serves a client that pulls its front, a server that pulls contributions and the
broker that stores a version. It does no I/O: the shell sends what `want` asks for and hands the
answers to `take`.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from zsplit.errors import RemoteProtocolError
from zsplit.wire.manifest import Manifest
from zsplit.wire.messages import What

CREDIT = 4
"""Chunks on their way at once: 16 MiB at most, enough to fill a long link."""

MANIFEST = -1
"""The offset that stands for the manifest."""


class Piece(NamedTuple):
    """Bytes to ask for: offset and length in the data section, or the manifest."""

    offset: int
    length: int
    what: What


Sink = Callable[[int, memoryview], None]


class Fetch:
    """One state on its way here. `open_sink` is called with the manifest and returns where bytes go.

    `select` says which tensors are wanted by name; all by default.
    """

    def __init__(
        self,
        digest: str,
        open_sink: Callable[[Manifest], Sink],
        select: Callable[[str], bool] | None = None,
    ) -> None:
        self.digest = digest
        self.manifest: Manifest | None = None
        self._open_sink = open_sink
        self._select = select
        self._sink: Sink | None = None
        self._waiting: deque[Piece] = deque([Piece(MANIFEST, 0, "other")])
        self._flying: dict[int, Piece] = {}
        self._refused: list[Piece] = []

    @property
    def done(self) -> bool:
        """Whether every wanted byte is here."""
        return self.manifest is not None and not (self._waiting or self._flying or self._refused)

    def want(self) -> list[Piece]:
        """Return what to ask for now; asking counts against the credit until the answer is taken."""
        pieces = []
        while self._waiting and len(self._flying) < CREDIT:
            piece = self._waiting.popleft()
            self._flying[piece.offset] = piece
            pieces.append(piece)
        return pieces

    def again(self) -> None:
        """Forget what was asked for without an answer, so that `want` asks anew (after a lost connection)."""
        self._waiting.extendleft(reversed(self._flying.values()))
        self._flying.clear()

    def refuse(self, offset: int) -> None:
        """The holder could not be reached or lacks the state: set the piece aside until `retry`."""
        piece = self._flying.pop(offset, None)
        if piece is not None:
            self._refused.append(piece)

    def retry(self) -> None:
        """Ask anew for what was refused."""
        self._waiting.extend(self._refused)
        self._refused.clear()

    def take(self, offset: int, data: memoryview) -> None:
        """Take an answer in. A repeat is ignored. Raises RemoteProtocolError for what was not asked for."""
        piece = self._flying.get(offset)
        if piece is None:
            return
        if offset == MANIFEST:
            self._begin(Manifest.decode(bytes(data), self.digest))
        elif len(data) != piece.length:
            raise RemoteProtocolError(
                f"a chunk of {len(data)} bytes came for state {self.digest}, {piece.length} were asked for"
            )
        elif self._sink is not None:
            self._sink(offset, data)
        del self._flying[offset]

    def _begin(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._sink = self._open_sink(manifest)
        names = [e.name for e in manifest.entries if self._select is None or self._select(e.name)]
        for offset, length, is_optimizer in manifest.chunks(names):
            self._waiting.append(Piece(offset, length, "optimizer" if is_optimizer else "weights"))
