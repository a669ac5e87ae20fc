"""Computing with one thread, beside a trainer that has the others."""

import contextlib
import ctypes
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute in the calling thread alone for a while; what other threads have stays as it is.

    `torch.set_num_threads` would say it for all of them. Where two threads of a process have OpenMP threads of their
    own, these are more than there are cores, and libgomp puts whoever comes first to one of the many barriers of a
    training step to sleep at once: on two cores steps took 15 % longer. Where torch has no OpenMP this does nothing.
    """
    before = torch.get_num_threads()  # the first time a thread asks, torch sets what it has
    _use(1)
    try:
        yield
    finally:
        _use(before)


def _use(threads: int) -> None:
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).omp_set_num_threads(threads)
