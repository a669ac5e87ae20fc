"""What the C library does with memory that is freed and soon needed again."""

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Options of mallopt(3), from glibc's malloc.h."""

LARGEST = 32 * 2**20
"""Bytes of an allocation that can be kept; glibc allows no more."""


def keep_freed(one_arena: bool = False) -> None:
    """Have freed memory kept for what comes next.

    By default glibc gives large blocks back to the system as they are freed, and their pages are faulted in again the
    next time: for messages a tenth of the relay's CPU time at 1 MiB and a sixth at 16 MiB, for the activations of small
    micro-batches up to a third of the training step. What is kept is at most what was in use at once. With `one_arena`
    threads that start later allocate from one place; others would be made of pieces that are given back whole. Under
    other C libraries this does nothing.
    """
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        if one_arena:
            mallopt(M_ARENA_MAX, 1)
