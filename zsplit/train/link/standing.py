"""What a peer holds and says in every beat: its jobs, its states, whether it is prepared. Thread-safe, no socket."""

import threading

from zsplit.train.link.shelf import Shelf
from zsplit.train.state import State
from zsplit.wire.messages import Beat, Held, Lease, Orders, Prepared


class Standing:
    """Written by the trainer, read by the link's thread."""

    def __init__(self) -> None:
        self.shelf = Shelf()
        self._lock = threading.Lock()
        self._held: dict[Lease, Held] = {}
        self._prepared: Prepared | None = None

    def prepare(self, prepared: Prepared) -> None:
        """This peer can be given jobs from now on."""
        with self._lock:
            self._prepared = prepared

    def report(self, held: Held, state: State | None) -> None:
        """A job is so far; `state` is its result, whose digest `held` names."""
        with self._lock:
            self._held[held.lease] = held
            if state is not None:
                self.shelf.put(state)

    def beat(self, session: str, sent: float, revision: int, reachable: bool) -> Beat:
        """Return all that is to be said; a peer that tensors do not reach is not prepared yet."""
        with self._lock:
            return Beat(
                session=session,
                sent=sent,
                revision=revision,
                held=tuple(self._held.values()),
                have=self.shelf.digests(),
                prepared=self._prepared if reachable else None,
            )

    def obey(self, orders: Orders) -> None:
        """Forget what the broker no longer lists."""
        leases = {job.lease for job in orders.jobs}
        with self._lock:
            self._held = {lease: held for lease, held in self._held.items() if lease in leases}
            self.shelf.keep({*orders.keep, *(held.digest for held in self._held.values())}, leases)
