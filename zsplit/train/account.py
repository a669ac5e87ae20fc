"""What the trainer's thread does with its time: seconds added up for the tally, spans kept for the timeline."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from zsplit.train.link.spans import Recorder
from zsplit.wire.messages import Lease


class Account:
    """Seconds of one job: `busy` in forward, backward and step, `idle` in waiting for the other side."""

    def __init__(self, spans: Recorder, device: torch.device, lease: Lease | None = None) -> None:
        self.spans = spans
        self.lease = lease
        self.busy = 0.0
        self.idle = 0.0
        # Kernels run behind the program's back on a GPU: only after this is their time known.
        self._finish = torch.cuda.synchronize if device.type == "cuda" else None

    @contextmanager
    def computing(self, name: str, step: int = -1, micro: int = -1) -> Iterator[None]:
        """Count what is done inside as busy."""
        began = time.monotonic()
        yield
        if self._finish is not None:
            self._finish()
        ended = time.monotonic()
        self.busy += ended - began
        self.spans.add("compute", name, began, ended, step, micro, self.lease)

    @contextmanager
    def waiting(self, name: str = "wait", step: int = -1, micro: int = -1) -> Iterator[None]:
        """Count what is done inside as idle."""
        began = time.monotonic()
        yield
        ended = time.monotonic()
        self.idle += ended - began
        self.spans.add("compute", name, began, ended, step, micro, self.lease)
