"""Storing a version: pulled chunk by chunk from the peer that made it, written off the relay's thread."""

from collections.abc import Iterator

from zsplit.wire.manifest import Manifest
from zsplit.wire.messages import Chunk, Lease, Pull, Ref
from zsplit.wire.transfer import Fetch, Sink
from zsplit_broker.disk import Writer
from zsplit_broker.versions import Draft, Versions

NO_LEASE = Lease(0, 0)

PIECE = "piece "
"""What stands before the digest in the keys of the writer's tasks, the last one's excepted."""


class Intake:
    """One version on its way to the disk. Its `Writer` outcome, under the digest, says when it is there."""

    def __init__(self, ref: Ref, run: str, versions: Versions, writer: Writer) -> None:
        self.ref = ref
        self._run = run
        self._versions = versions
        self._writer = writer
        self._draft: Draft | None = None
        self._fetch = Fetch(ref.digest, self._open)
        self._committing = False

    def turn_to(self, ref: Ref) -> None:
        """Have what is still missing come from this holder of the same state."""
        if ref != self.ref:
            self.ref = ref
            self.ask_again()

    def ask_again(self) -> None:
        """Have `pulls` yield again what was asked for and has not come."""
        self._fetch.again()

    def pulls(self) -> Iterator[Pull]:
        """Yield what to ask the holder for now."""
        for piece in self._fetch.want():
            yield Pull(
                self._run,
                "",
                NO_LEASE,
                self.ref.holder,
                self.ref.digest,
                piece.offset,
                piece.length,
                piece.what,
                "broker",
            )

    def retry(self) -> None:
        """Ask anew for what the holder could not give."""
        self._fetch.retry()

    def refuse(self, offset: int) -> None:
        """The holder has not given this piece: it is asked for again at the next `retry`."""
        self._fetch.refuse(offset)

    @property
    def nbytes(self) -> int:
        """How much room the version needs, as far as is known."""
        return self._fetch.manifest.nbytes if self._fetch.manifest is not None else 0

    def take(self, chunk: Chunk, data: memoryview | None) -> None:
        """Take a chunk in; None is a holder that lacks the state. Raises RemoteProtocolError for a wrong one."""
        if data is None:
            self.refuse(chunk.offset)
            return
        self._fetch.take(chunk.offset, data)
        if self._fetch.done and self._draft is not None and not self._committing:
            self._committing = True
            self._writer.submit(self.ref.digest, self._draft.commit)

    def abort(self) -> None:
        """Give up: whatever is on the disk of it goes."""
        if self._draft is not None:
            self._writer.submit("", self._draft.abort)

    def _open(self, manifest: Manifest) -> Sink:
        draft = self._draft = self._versions.begin(manifest)

        def write(offset: int, data: memoryview) -> None:
            self._writer.submit(PIECE + self.ref.digest, lambda: draft.write(offset, data), data.nbytes)

        return write
