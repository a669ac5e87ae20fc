"""Versions between their holders and the disk: those that are being stored, those that wait for room, those pulled.

The relay's thread calls all of it; what waits for the disk is done by the writer.
"""

import shutil
from collections.abc import Callable

from zsplit import crash
from zsplit.errors import RemoteProtocolError, StorageError
from zsplit.wire.frames import CHUNK
from zsplit.wire.messages import Chunk, Pull, Ref
from zsplit.wire.transfer import MANIFEST
from zsplit_broker.disk import DiskFullError, Outcome, Writer
from zsplit_broker.events import Damaged, Stored
from zsplit_broker.intake import PIECE, Intake
from zsplit_broker.versions import Versions
from zsplit_broker.work import Peer, peer_of

MAX_PENDING = 64 * 2**20
"""Bytes that may wait for the disk before the broker pulls no more."""

READ = "read "
"""What stands before a digest in the key of the task that reads a version that is there already."""


class Depot:
    """The versions of a run. `ask` sends a pull to its holder; it returns false where that cannot be reached."""

    def __init__(self, run: str, versions: Versions, writer: Writer, ask: Callable[[Pull], bool]) -> None:
        self.versions = versions
        self._run, self._writer, self._ask = run, writer, ask
        self._intakes: dict[str, Intake] = {}
        self._waiting: dict[str, tuple[Ref, int]] = {}

    @property
    def waits_for_room(self) -> bool:
        """Whether a version waits for room on the disk."""
        return bool(self._waiting)

    def store(self, ref: Ref) -> None:
        """Pull a state from its holder and store it; where it is on its way already, go on from this holder.

        One that lies on the disk, which the journal did not come to say, is read instead.
        """
        if ref.digest in self._intakes:
            self._intakes[ref.digest].turn_to(ref)
        elif ref.digest in self.versions:
            self._writer.submit(READ + ref.digest, lambda: self.versions.verify(ref.digest))
        elif ref.digest not in self._waiting:
            self._intakes[ref.digest] = Intake(ref, self._run, self.versions, self._writer)
        self._pull()

    def ask_again(self, holder: Peer) -> None:
        """Ask a holder anew, whose connection is a new one: what it was asked for before may be lost."""
        for intake in self._intakes.values():
            if peer_of(intake.ref.holder) == holder:
                intake.ask_again()
        self._pull()

    def forsake(self, digest: str) -> None:
        """Give up a state that is on its way."""
        self._waiting.pop(digest, None)
        intake = self._intakes.pop(digest, None)
        if intake is not None:
            intake.abort()

    def discard(self, digest: str) -> None:
        """Remove a version from the disk; from now on it is not there."""
        self.versions.forget(digest)
        self._writer.submit("", lambda: self.versions.delete(digest))

    def take(self, chunk: Chunk, data: memoryview | None) -> None:
        """Take in a piece of a state that is being stored. One that is not what its digest says is asked for anew."""
        intake = self._intakes.get(chunk.digest)
        if intake is None:
            return
        try:
            intake.take(chunk, data)
            crash.at("broker.storing")
        except RemoteProtocolError:
            self._begin_anew(intake.ref)
        self._pull()

    def read(self, pull: Pull) -> bytes:
        """Return the bytes that a pull asks for; none where there are no such bytes."""
        try:
            if pull.offset == MANIFEST:
                return self.versions.manifest(pull.digest).encode()
            return self.versions.read(pull.digest, pull.offset, min(pull.length, CHUNK))
        except (RemoteProtocolError, StorageError):
            return b""

    def tick(self) -> None:
        """Ask again for what holders lacked, and begin anew with what waits for room, where there is some."""
        free = shutil.disk_usage(self.versions.folder).free
        for digest, (ref, need) in list(self._waiting.items()):
            if free > need:
                del self._waiting[digest]
                self._intakes[digest] = Intake(ref, self._run, self.versions, self._writer)
        for intake in self._intakes.values():
            intake.retry()
        self._pull()

    def written(self, outcome: Outcome) -> Stored | Damaged | None:
        """Take in what the writer did about versions; return what is news. Raises what ends the run."""
        kind, _, digest = outcome.key.rpartition(" ")
        error = outcome.error
        if kind == READ.strip() and error is not None:
            self.versions.forget(digest)
            return Damaged(digest, str(error))
        if isinstance(error, DiskFullError) and digest in self._intakes:
            self._wait_for_room(digest)
            raise error
        if isinstance(error, RemoteProtocolError) and digest in self._intakes:
            self._begin_anew(self._intakes[digest].ref)
            return None
        given_up = digest not in self._intakes and isinstance(error, DiskFullError | RemoteProtocolError)
        if error is not None and not given_up:
            raise error
        if given_up or kind == PIECE.strip():
            return None
        self._intakes.pop(digest, None)
        crash.at("broker.stored")
        return Stored(digest)

    def resume(self) -> None:
        """Pull on, now that the writer has less to do."""
        self._pull()

    def _wait_for_room(self, digest: str) -> None:
        intake = self._intakes.pop(digest)
        intake.abort()
        self._waiting[digest] = intake.ref, intake.nbytes

    def _begin_anew(self, ref: Ref) -> None:
        self.forsake(ref.digest)
        self._intakes[ref.digest] = Intake(ref, self._run, self.versions, self._writer)

    def _pull(self) -> None:
        for intake in self._intakes.values():
            if self._writer.pending_bytes < MAX_PENDING:
                for pull in intake.pulls():
                    if not self._ask(pull):
                        intake.refuse(pull.offset)
