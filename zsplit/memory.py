"""What the C library does with the memory of messages that have been passed on."""

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Options of mallopt(3), from glibc's malloc.h."""

LARGEST = 32 * 2**20
"""Bytes of an allocation that can be kept; glibc allows no more."""


def keep_freed() -> None:
    """Have freed memory kept for the next messages; call it before the first thread starts.

    By default glibc gives large blocks back to the system as they are freed, and the next message faults its
    pages in again: a tenth of the relay's CPU time at 1 MiB, a sixth at 16 MiB. What is kept is at most
    what was in flight at once. Under other C libraries this does nothing.
    """
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_ARENA_MAX, 1)  # the others are made of pieces that are given back whole
