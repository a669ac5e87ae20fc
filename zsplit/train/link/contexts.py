"""What codecs need beside the tensor: the seed of a message, and what was kept of the tensor that it answers.

Both follow from the job of the message's lease and from its place in it, so they are the same at both ends.
"""

from collections.abc import Iterable

from zsplit.codec import Context
from zsplit.seeds import derive
from zsplit.wire.messages import Job, Lease, Tensors, Turn

ANSWERED = {1: 0, 2: 1, 3: 0}
"""Which leg the gradients on a leg belong to. Without a tail at the client leg 1 has those of the smashed data, leg 0;
with one, leg 2 those of the activations on leg 1, and leg 3 those of the smashed data."""

Place = tuple[Lease, str, int, int, int]
"""Lease, kind, step, micro-batch, leg."""


class Contexts:
    """The contexts of the tensors that are not answered yet. `keep` runs in the link's thread, all else in lanes."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._jobs: dict[Lease, Job] = {}
        self._kept: dict[Place, Context] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, jobs: Iterable[Job]) -> None:
        """Forget all that belongs to leases other than those of these jobs."""
        self._jobs = {job.lease: job for job in jobs}
        for place in list(self._kept):
            if place[0] not in self._jobs:
                self._kept.pop(place, None)

    def lacks(self, message: Tensors, codec: str) -> bool:
        """Whether a tensor in this codec answers one of a lease that is over, so that nobody waits for it."""
        return message.lease not in self._jobs and answers(codec)

    def seed(self, message: Tensors) -> int | None:
        """Return the seed of what is random in encoding a message of a turn; None where nothing may be."""
        job = self._jobs.get(message.lease)
        if not isinstance(job, Turn) or message.kind != "train":
            return None
        return derive(self._seed, "codec", job.client, job.round, message.step, message.micro, message.leg)

    def of(self, message: Tensors, codec: str) -> Context:
        """Return what is known of the tensor that one in this codec answers, and forget it; else a fresh context."""
        if answers(codec):
            return self._kept.pop(self._place(message, ANSWERED.get(message.leg, -1)), Context())
        return Context()

    def add(self, message: Tensors, codec: str, context: Context) -> None:
        """Remember what was kept of a tensor of a turn in this codec, where the way back will need it."""
        job = self._jobs.get(message.lease)
        needed = isinstance(job, Turn) and answers(job.plan.down) and not answers(codec)
        if needed and context.kept is not None:
            self._kept[self._place(message, message.leg)] = context

    def _place(self, message: Tensors, leg: int) -> Place:
        return message.lease, message.kind, message.step, message.micro, leg


def answers(codec: str) -> bool:
    """Whether a codec needs what was kept of another tensor. Nothing may stand before `mask`, so its place says it."""
    return codec.partition("+")[0] == "mask"
