"""The states that a peer holds and serves to others, and those that are on their way to it. Thread-safe, no socket."""

import threading
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from zsplit.errors import RemoteProtocolError
from zsplit.train.state import Arriving, State, Tensors
from zsplit.wire.frames import CHUNK
from zsplit.wire.manifest import Manifest
from zsplit.wire.messages import Chunk, Lease, Pull, Ref
from zsplit.wire.transfer import MANIFEST, Fetch, Piece, Sink

NOTHING = memoryview(b"")
"""What a holder answers that lacks the state."""


class Fetched(NamedTuple):
    """A state, or the wanted part of one, that the trainer asked for under a lease."""

    lease: Lease
    ref: Ref
    tensors: Tensors


class Transfer:
    """A fetch under way: for which lease, from whom, and where the bytes go."""

    def __init__(self, lease: Lease, ref: Ref, wanted: Callable[[str], bool]) -> None:
        self.lease = lease
        self.ref = ref
        self.fetch = Fetch(ref.digest, self._open, wanted)
        self._wanted = wanted
        self._arriving: Arriving | None = None

    def _open(self, manifest: Manifest) -> Sink:
        self._arriving = Arriving(manifest, self._wanted)
        return self._arriving.write

    def finish(self) -> Fetched:
        """Return what came. Raises RemoteProtocolError where it is not what was asked for."""
        if self._arriving is None:
            raise RemoteProtocolError(f"state {self.ref.digest} came without its manifest")
        return Fetched(self.lease, self.ref, self._arriving.finish())


class Shelf:
    """States by digest, and transfers by lease and digest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._states: dict[str, State] = {}
        self._transfers: dict[tuple[Lease, str], Transfer] = {}

    def put(self, state: State) -> None:
        with self._lock:
            self._states[state.digest] = state

    def digests(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._states)

    def keep(self, digests: Collection[str], leases: Collection[Lease]) -> None:
        """Forget every other state, and the transfers of every other lease."""
        with self._lock:
            self._states = {digest: state for digest, state in self._states.items() if digest in digests}
            self._transfers = {key: t for key, t in self._transfers.items() if t.lease in leases}

    def fetch(self, lease: Lease, ref: Ref, wanted: Callable[[str], bool]) -> Fetched | None:
        """Return the wanted tensors of a state that is held here; else begin to fetch it."""
        with self._lock:
            state = self._states.get(ref.digest)
            if state is None:
                self._transfers[lease, ref.digest] = Transfer(lease, ref, wanted)
                return None
        return Fetched(lease, ref, state.tensors(wanted))

    def wants(self) -> Iterator[tuple[Transfer, Piece]]:
        """Yield the pieces to ask for now."""
        with self._lock:
            transfers = list(self._transfers.values())
        for transfer in transfers:
            for piece in transfer.fetch.want():
                yield transfer, piece

    def start_over(self, lease: Lease | None = None) -> None:
        """Ask anew for all that is on its way, under a lease or at all: it may have been lost."""
        with self._lock:
            for transfer in self._transfers.values():
                if lease in (None, transfer.lease):
                    transfer.fetch.again()

    def again(self) -> None:
        """Ask anew for what a holder could not give when it was asked."""
        with self._lock:
            for transfer in self._transfers.values():
                transfer.fetch.retry()

    def take(self, chunk: Chunk, data: memoryview | None) -> Fetched | None:
        """Take an answer in; return the state once it is whole. Raises RemoteProtocolError for a wrong one."""
        key = chunk.lease, chunk.digest
        with self._lock:
            transfer = self._transfers.get(key)
        if transfer is None:
            return None
        if data is None:
            transfer.fetch.refuse(chunk.offset)
        else:
            transfer.fetch.take(chunk.offset, data)
        if not transfer.fetch.done:
            return None
        with self._lock:
            self._transfers.pop(key, None)
        return transfer.finish()

    def serve(self, pull: Pull) -> memoryview:
        """Return the bytes that a peer asks for, or nothing where they are not held here."""
        with self._lock:
            state = self._states.get(pull.digest)
        if state is None:
            return NOTHING
        if pull.offset == MANIFEST:
            return memoryview(state.manifest.encode())
        try:
            return state.read(pull.offset, min(pull.length, CHUNK))
        except RemoteProtocolError:
            return NOTHING
